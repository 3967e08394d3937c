"""Puts the library, its examples and the other benchmarks on the path."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS.parent / "examples"), str(BENCHMARKS)]

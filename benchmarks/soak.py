"""The figures of the long tests: kills, processes that end, how long it takes the others to notice.

    make soak                                       # runs them: some twenty minutes on two cores
    python benchmarks/soak.py --output-of soak.log  # reads what such a run has printed

Writes `results/soak-<device>.json`.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from overhead import ROOT, publish, results_file

FIGURES = {
    "a process of four ends": r"(?P<signal>SIG\w+) of process (?P<process>\d+): "
    r"others ended in (?P<seconds>[\d.]+) s",
    "kills of one run": r"(?P<kills>\d+) kills, (?P<while_saving>\d+) while a checkpoint",
    "tests": r"(?P<passed>\d+) passed.* in (?P<seconds>[\d.]+)s",
}


def run() -> str:
    """Runs the long tests, and shows what they print as it comes."""
    command = [sys.executable, "-m", "pytest", "-m", "soak", "-s"]
    printed = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            printed.append(line)
    if tests.returncode:
        raise SystemExit(tests.returncode)
    return "".join(printed)


def figures(printed: str) -> list[dict[str, Any]]:
    def number(x):
        return float(x) if "." in x else int(x) if x.isdecimal() else x

    return [
        {"figure": figure, **{name: number(x) for name, x in match.groupdict().items()}}
        for figure, pattern in FIGURES.items()
        for match in re.finditer(pattern, printed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-of", type=Path, help="what a run has printed, instead of one")
    parser.add_argument("--output", type=Path, default=results_file("soak"))
    arguments = parser.parse_args()
    printed = arguments.output_of.read_text() if arguments.output_of else run()
    rows = figures(printed)
    missing = FIGURES.keys() - {row["figure"] for row in rows}
    if missing or re.search(r"^\d+ failed", printed, re.MULTILINE):
        raise SystemExit(f"error: tests failed, or figures are missing: {sorted(missing)}.")
    publish(arguments.output, "\n".join(map(str, rows)), rows)


if __name__ == "__main__":
    main()

"""What importing the package does, and what it does not."""

import subprocess
import sys

import pytest

import cdb_jax

PROGRAM = """
import sys, cdb_jax
assert "flax" not in sys.modules
cdb_jax.nnx.Backdrop, cdb_jax.linen.DropPath
assert "flax" in sys.modules
"""


def test_flax_is_imported_when_it_is_used():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'cdb_jax' has no attribute 'torch'"):
        _ = cdb_jax.torch

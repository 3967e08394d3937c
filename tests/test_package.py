"""What importing the package does, and what it does not."""

import subprocess
import sys

import pytest

import cdb_jax

PROGRAM = """
import sys, jax, optax
earlier = set(sys.modules)
import cdb_jax
new = {name.partition(".")[0] for name in set(sys.modules) - earlier}
assert new - sys.stdlib_module_names <= {"cdb_jax", "jax"}, new
cdb_jax.nnx.Backdrop, cdb_jax.linen.DropPath
assert "flax" in sys.modules
"""


def test_other_packages_are_imported_when_they_are_used():
    """So importing the library takes little longer than importing jax and optax."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'cdb_jax' has no attribute 'torch'"):
        _ = cdb_jax.torch

"""What importing the package does, and what it does not."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

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


def imports(file, package):
    """The modules of a package that a file of it imports at run time."""
    tree, found = ast.parse(file.read_text()), set()
    # What only type checkers import stands at the top, in an `if`.
    tree.body = [x for x in tree.body if not isinstance(x, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_imports_go_one_way():
    root = Path(cdb_jax.__file__).parent
    files = {
        ".".join(("cdb_jax", *x.relative_to(root).with_suffix("").parts)): x
        for x in root.rglob("*.py")
        if x.name != "__init__.py"
    }
    graph = {name: imports(file, "cdb_jax") & files.keys() for name, file in files.items()}
    assert sum(map(len, graph.values())) > 100
    graphlib.TopologicalSorter(graph).prepare()  # Raises an error if there is a cycle.

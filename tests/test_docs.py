"""The pages: their code runs and prints what they say, their links lead somewhere."""

import ast
import contextlib
import inspect
import io
import json
import re
import sys
import types
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

import cdb_jax

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

A_MODEL = """
import cdb_jax, jax, jax.numpy as jnp, optax

params = {
    "embed": {"embedding": jnp.ones((9, 6))},
    "head": {"bias": jnp.zeros(4), "kernel": jnp.ones((6, 4))},
}
batch = jnp.arange(8)


def loss_fn(params, batch):
    table = params["embed"]["embedding"]
    x = jax.nn.softmax(table[batch] @ table.T) @ table
    return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"]) ** 2)


opt_state = optax.adamw(1e-3).init(params)
"""
LAYERS = """
import cdb_jax, jax, jax.numpy as jnp
from flax import nnx

key, rngs, rate = jax.random.key(0), nnx.Rngs(0), 0.2
x, y = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 8, 8, 3))
attend, branch = nnx.Linear(3, 3, rngs=rngs), jnp.sin
gated_loss = lambda gates, x, y: jnp.mean((x * gates.sum() - y) ** 2)
block, blocks = lambda w, x: w * x, jnp.ones(4)
rates, l = [0.5] * 4, 0


def gradient(kept, params, x, y):
    def loss(params):
        z = x
        for is_kept in kept:
            z = z + cdb_jax.drop_backward(lambda z: z * params["head"]["bias"][0], z, kept=is_kept)
        return jnp.mean((z - y) ** 2)

    return jax.grad(loss)(params)


"""
# What fragments of these pages take for granted: the reader's own model, loss and batch.
GIVEN = {
    "README.md": A_MODEL,
    "index.md": A_MODEL,
    "freezing.md": """
import jax.numpy as jnp
from flax import nnx
class Model(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(8, 10, rngs=rngs)
model = Model(nnx.Rngs(0))
def loss_of_model(model, batch):
    return jnp.mean(model.head(jnp.ones((2, 8))) ** 2)
""",
    "methods.md": LAYERS,
}


def blocks(page):
    """The fenced blocks of a page: language, text and line."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        yield block[1], block[2], text[: block.start(2)].count("\n")


def with_code(pages):
    return [page for page in pages if any(kind == "python" for kind, *_ in blocks(page))]


@pytest.fixture
def module(monkeypatch, tmp_path):
    """A fresh module in an empty folder, with the settings that JAX has by default."""
    monkeypatch.chdir(tmp_path)
    found = types.ModuleType("a_page")
    monkeypatch.setitem(sys.modules, found.__name__, found)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield found


def run(code, file, line, module):
    """Runs code as if it stood in the file at that line; returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile("\n" * line + code, file, "exec", dont_inherit=True), module.__dict__)
    return shown.getvalue()


@pytest.mark.parametrize("page", with_code(PAGES), ids=lambda page: page.name)
def test_code_runs_and_prints_what_the_page_says(page, module):
    """A `text` block after a `python` block holds what that prints."""
    run(GIVEN.get(page.name, ""), "GIVEN", 0, module)
    printed = None
    for kind, code, line in blocks(page):
        if kind == "text" and printed is not None:
            assert printed.rstrip() == code.rstrip(), f"{page.name}, line {line}"
        printed = run(code, str(page), line, module) if kind == "python" else None


NOTEBOOK = DOCS / "digits.ipynb"


def cells():
    return [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.mark.slow
def test_the_notebook_runs(module):
    matplotlib.use("Agg")
    for number, code in enumerate(cells()):
        # Commands of Jupyter, such as %pip, are none of Python.
        run(re.sub(r"^(\s*)%.*", r"\1pass", code, flags=re.MULTILINE), f"cell {number}", 0, module)
    pyplot = sys.modules["matplotlib.pyplot"]
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
    assert np.mean(module.with_it, axis=0)[-1] > 90


def test_the_notebook_is_kept_with_its_results():
    found = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in found] == list(range(1, len(found) + 1))
    assert sum("image/png" in o.get("data", {}) for c in found for o in c["outputs"]) == 2
    assert not any(o["output_type"] == "error" for c in found for o in c["outputs"])
    assert NOTEBOOK.stat().st_size < 300_000


def public_names():
    for node in ast.parse(Path(cdb_jax.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cdb_jax."):
            yield from (alias.asname for alias in node.names if not alias.asname.startswith("_"))
    for name in ("ChannelReport", "ChannelRow", "Savings", "Amount"):  # What a report consists of.
        yield f"report.{name}"
    for module in (cdb_jax.presets, cdb_jax.nnx, cdb_jax.linen):
        for name, x in inspect.getmembers(module, callable):
            if getattr(x, "__module__", "") == module.__name__ and not name.startswith("_"):
                yield f"{module.__name__.removeprefix('cdb_jax.')}.{name}"


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^\.\. [\w:]+:: cdb_jax\.([\w.]+)", (DOCS / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(public_names())


def anchors(page):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        file = page.parent / file if file else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^[\w-]+$", "".join(b[1] for b in contents()), re.MULTILINE)
    pages = {page.stem for page in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))}
    assert sorted(listed) == sorted(pages - {"index", "releasing"})


def contents():
    return re.finditer(r"^```{toctree}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.M | re.S)


def results():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return {file.stem: json.loads(file.read_text())["rows"] for file in files}


POINTS = ("accuracy_difference", "difference")
INTERVALS = dict.fromkeys(POINTS, "{:+.2f} [{:+.2f}, {:+.2f}]")
INTERVALS |= dict.fromkeys(("nll_difference", "ece_difference"), "{:+.3f} [{:+.3f}, {:+.3f}]")
SHARES = ("step_time", "time_to_accuracy", "time_against_baseline", "flops_against_baseline")
SHARES += ("total",)  # Of tracing and compiling.
INTERVALS |= dict.fromkeys(SHARES, "{:.2f} [{:.2f}, {:.2f}]")


def test_numbers_with_intervals_come_from_the_committed_results():
    rows = [row for rows in results().values() for row in rows]
    known = set()
    for names in (("ratio", "low", "high"), ("time_ratio", "time_low", "time_high")):
        found = [[row[name] for name in names] for row in rows if set(names) <= row.keys()]
        known |= {"{:.3f} [{:.3f}, {:.3f}]".format(*values) for values in found}
    for name, text in INTERVALS.items():
        found = [[np.inf if x is None else x for x in row[name]] for row in rows if name in row]
        scale = 100 if name in POINTS else 1
        texts = {text.format(*(scale * x for x in values)) for values in found}
        known |= {text.replace("inf", "never") for text in texts}
    number = r"(?:[+-]?\d+\.\d{2,3}|never)"
    shown = re.compile(rf"({number})(?: \|)? (\[{number}, {number}\])")
    found = {" ".join(x) for page in PAGES for x in shown.findall(page.read_text())}
    assert len(found) > 60
    assert not found - known


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {cdb_jax.__version__}\n" in citation

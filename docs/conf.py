"""Settings of the site: `make docs`. Nothing here needs the network, nor do the pages it makes."""

import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from docutils import nodes  # noqa: E402
from latex2mathml import converter  # noqa: E402

import cdb_jax  # noqa: E402

project = "cdb_jax"
author = "The cdb_jax authors"
copyright = author
version = release = cdb_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "releasing.md"]  # The latter is for maintainers.
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"cdb_jax {release}"
html_math_renderer = "mathml"
pygments_style = "tango"
smartquotes = False

myst_heading_anchors = 3
nb_execution_mode = "off"  # The notebook is kept with its results; the tests run it.

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # The docstrings say what an argument may be.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "py:obj"  # Single backticks in docstrings: a link where there is one.
nitpick_ignore_regex = [("py:(obj|exc|class)", ".*")]


def visit_math(translator: Any, node: Any) -> None:
    """Formulas as MathML, which browsers draw by themselves."""
    display = "block" if node.tagname == "math_block" else "inline"
    translator.body.append(converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))

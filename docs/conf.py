"""Sphinx configuration: API pages from the docstrings, the notebooks with their kept outputs."""

import re
import shutil
import sys
from pathlib import Path

import lowrank_jax

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS.parent / "notebooks"
sys.path.insert(0, str(DOCS / "_extensions"))

project = "lowrank_jax"
author = "The lowrank_jax authors"
copyright = author
version = release = lowrank_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "breaks", "links", "mathml", "outputs"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lowrank_jax {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_show_copyright = html_show_sphinx = False
html_show_search_summary = False  # summaries are fetched, which browsers forbid on a disk
smartquotes = False  # quoted words are values to type

nb_execution_mode = "off"  # outputs are kept in the notebooks
myst_enable_extensions = ["dollarmath"]

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"nnx.Module": "flax.nnx.Module"}  # imported for type checkers only
maximum_signature_line_length = 88

# Other projects' names stay text: the build needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|flax|optax|collections|os|re)\..*"),
    ("py:obj", r"lowrank_jax\.names\.[A-Z0-9]+"),  # the tables, which the module's text lists
]


def copy_notebooks():
    """Sphinx reads only below its own folder: notebooks in it are copies, and git ignores them."""
    notebooks = {path.name: path for path in NOTEBOOKS.glob("*.ipynb")}
    for old in DOCS.glob("*.ipynb"):
        if old.name not in notebooks:
            old.unlink(missing_ok=True)
    for name, notebook in notebooks.items():
        shutil.copy2(notebook, DOCS / name)


INLINE = re.compile(r"(:\w+:`[^`]+`)|`([^`]+)`|\$([^$]+)\$|([*_|\\])")


def inline(match):
    """Role, code, math, or a sign that reStructuredText would read as markup."""
    role, code, math, sign = match.groups()
    return role or (code and f"``{code}``") or (math and f":math:`{math}`") or f"\\{sign}"


def sections(block):
    """Args, Returns, Raises and Source as fields."""
    name, _, body = block.partition(":")
    if name == "Args":
        return ":Parameters:" + re.sub(r"^  (\S.*?):(?=\s)", r"  - `\1`:", body, flags=re.M)
    if name == "Raises":
        links = lambda match: "  - " + re.sub(r"\w+", r":exc:`.\g<0>`", match[1]) + ":"
        return ":Raises:" + re.sub(r"^  (\S.*?):(?=\s)", links, body, flags=re.M)
    if name == "Returns":
        return f":Returns:{body}"
    if name == "Source":
        return ":Source:" + body.replace("\n", "\n  ")
    return block


def convert(app, what, name, obj, options, lines):
    """Docstrings (Google style, `code`, $math$, doctests) as reStructuredText."""
    blocks = re.split(r"\n\n+", "\n".join(lines))
    lines[:] = "\n\n".join(
        block if block.startswith(">>>") else INLINE.sub(inline, sections(block))
        for block in blocks
    ).split("\n")


def setup(app):
    """Fetch the notebooks and register the hook."""
    copy_notebooks()
    app.connect("autodoc-process-docstring", convert)

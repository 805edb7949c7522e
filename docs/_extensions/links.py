"""Names in the text are links: `lowrank.merge`, in code style, leads to its place in the API."""

import re

from docutils import nodes
from sphinx import addnodes

NAME = re.compile(r"lowrank(?:_jax)?\.([A-Za-z_][\w.]*\w)(?:\(.*\))?", re.DOTALL)


def link_names(app, doctree):
    """Wrap each name of the package in a reference; one that is not in the API is a warning."""
    for literal in list(doctree.findall(nodes.literal)):
        name = NAME.fullmatch(literal.astext())
        if name is None or isinstance(literal.parent, addnodes.pending_xref | nodes.reference):
            continue
        reference = addnodes.pending_xref(
            "",
            literal.deepcopy(),
            refdomain="py",
            reftype="obj",
            reftarget=f"lowrank_jax.{name[1]}",
            refdoc=app.env.docname,
            refexplicit=True,
        )
        literal.replace_self(reference)


def setup(app):
    """Register the hook."""
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

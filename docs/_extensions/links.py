"""Names in the text are links: `lowrank.merge`, in code style, leads to its place in the API."""

import re

from docutils import nodes
from sphinx import addnodes

import lowrank_jax

NAME = re.compile(r"(lowrank\.|lowrank_jax\.)?([A-Za-z_]\w*(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)


def find_target(text):
    """Return the dotted name in the package that a text in code style is, or None.

    Without "lowrank." before it, only what cannot be mistaken for a plain word or an argument:
    `fold_norms`, `LoraConfig`, `peft.load`, but not `stack`.
    """
    if (found := NAME.fullmatch(text)) is None:
        return None
    prefix, name = found.groups()
    if prefix is None and not re.search(r"\w[._]\w|^[A-Z]", name):
        return None
    value, keys = lowrank_jax, ["lowrank_jax"]
    for key in name.split("."):
        if not hasattr(value, key):
            return None
        if not isinstance(value, type):  # a field of a class is described in the class
            keys.append(key)
        value = getattr(value, key)
    return ".".join(keys)


def link_names(app, doctree):
    """Wrap each name of the package in a reference; one that is not in the API is a warning."""
    for literal in list(doctree.findall(nodes.literal)):
        target = find_target(literal.astext())
        if target is None or isinstance(literal.parent, addnodes.pending_xref | nodes.reference):
            continue
        reference = addnodes.pending_xref(
            "",
            literal.deepcopy(),
            refdomain="py",
            reftype="obj",
            reftarget=target,
            refdoc=app.env.docname,
            refexplicit=True,
        )
        literal.replace_self(reference)


def setup(app):
    """Register the hook."""
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

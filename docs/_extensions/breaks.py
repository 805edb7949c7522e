"""Code in tables may break after its punctuation, so that a table fits a phone."""

import re

from docutils import nodes

PIECE = re.compile(r"(?:[^/._,(=\[-]|\.(?=py\b))*[/._,(=\[-]*")


def allow_breaks(app, doctree, docname):
    """Put a <wbr> between the pieces of each code in a table: it is not seen, and not copied."""
    if app.builder.format != "html":
        return
    for table in doctree.findall(nodes.table):
        for literal in table.findall(nodes.literal):
            pieces = [nodes.Text(piece) for piece in PIECE.findall(literal.astext()) if piece]
            literal.clear()
            for piece in pieces:
                literal += [piece, nodes.raw("", "<wbr>", format="html")]


def setup(app):
    """Register the hook."""
    app.connect("doctree-resolved", allow_breaks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Long outputs are folded: a page shows their number of lines, and the lines on a click."""

from docutils import nodes

LONGEST = 40  # lines of an output that is shown whole


def is_long_output(node):
    """Whether a block is printed text (not code) of too many lines."""
    printed = node.get("language") in ("text", "myst-ansi", "none")
    return printed and len(node.astext().splitlines()) > LONGEST


def fold(app, doctree, docname):
    """Put long outputs into <details>."""
    if app.builder.format != "html":
        return
    for node in list(doctree.findall(nodes.literal_block)):
        if is_long_output(node):
            count = len(node.astext().splitlines())
            start = f'<details class="output"><summary>Output, {count} lines</summary>'
            node.replace_self(
                [
                    nodes.raw("", start, format="html"),
                    node.deepcopy(),
                    nodes.raw("", "</details>", format="html"),
                ]
            )


def setup(app):
    """Register the hook."""
    app.connect("doctree-resolved", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

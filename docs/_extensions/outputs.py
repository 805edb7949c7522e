"""Outputs of programs: long ones are folded, and plots get a text for those who cannot see them."""

import re

from docutils import nodes

LONGEST = 40  # lines of an output that is shown whole
LABEL = re.compile(r'(xlabel|ylabel|set_title\()=?"([^"]*)"')


def is_output(block):
    """Whether a block is printed text, and not code."""
    return block.get("language") in ("text", "myst-ansi", "none")


def is_table(block):
    """Whether a printed text has columns, which would not survive a line break."""
    return "\n-----" in block.astext()


def fold(block):
    """Put a block into <details>."""
    count = len(block.astext().splitlines())
    start = f'<details class="output"><summary>Output, {count} lines</summary>'
    raw = lambda html: nodes.raw("", html, format="html")
    block.replace_self([raw(start), block.deepcopy(), raw("</details>")])


def describe_plot(code):
    """A text for a plot, of the labels and the title in the code that drew it."""
    label = {name.strip("("): text for name, text in LABEL.findall(code)}
    axes = " over ".join(label[axis] for axis in ("ylabel", "xlabel") if axis in label)
    return ": ".join(filter(None, ("Plot", axes, label.get("set_title"))))


def finish(app, doctree, docname):
    """Fold the long outputs of a page, and describe its plots."""
    if app.builder.format != "html":
        return
    for block in filter(is_output, list(doctree.findall(nodes.literal_block))):
        if not is_table(block):
            block["classes"].append("wraps")
        if len(block.astext().splitlines()) > LONGEST:
            fold(block)
    for cell in doctree.findall(nodes.container):
        if "cell" not in cell["classes"]:
            continue
        code = "\n".join(block.astext() for block in cell.findall(nodes.literal_block))
        for image in cell.findall(nodes.image):
            image.setdefault("alt", describe_plot(code))


def setup(app):
    """Register the hook."""
    app.connect("doctree-resolved", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The guides of docs/ as programs: their blocks run in order, and print what the page shows."""

import contextlib
import dataclasses
import io
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of Python, and what the page says that it prints."""

    code: str
    printed: str


def read_blocks(text):
    """The Python blocks of a page.

    What a block prints is in a text block after it, or in comments behind its prints.
    """
    fences = [*FENCE.finditer(text), None]
    for this, after in zip(fences, fences[1:], strict=False):
        if this[1] == "python":
            shown = after is not None and after[1] == "text"
            comments = "".join(f"{line}\n" for line in COMMENT.findall(this[2]))
            yield Block(this[2], after[2] if shown else comments)


def run_guide(name, skip=()):
    """Run the blocks of docs/NAME in one namespace; those that hold a word of skip are left out."""
    space = {}
    for block in read_blocks((DOCS / name).read_text()):
        if any(word in block.code for word in skip):
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.code, name, "exec"), space)
        assert_same_text(out.getvalue(), block.printed)
    return space


def assert_same_text(came, shown):
    """Assert that two texts are equal, but for one in the last digit of a decimal number."""
    assert NUMBER.sub("0", squeeze(came)) == NUMBER.sub("0", squeeze(shown)), came
    for got, want in zip(NUMBER.findall(came), NUMBER.findall(shown), strict=True):
        assert abs(float(got) - float(want)) <= last_digit(want) * 1.001, f"{got} for {want}:\n{came}"


def squeeze(text):
    """A text with single spaces: a number may be one digit longer."""
    return " ".join(text.split())


def last_digit(number):
    """The place of a number's last digit, 0 for an integer.

    >>> last_digit("0.25"), last_digit("17"), last_digit("1.5e-06")
    (0.01, 0.0, 1e-07)
    """
    mantissa, _, exponent = number.partition("e")
    if "." not in mantissa and not exponent:
        return 0.0
    decimals = len(mantissa.partition(".")[2])
    return float(f"1e{int(exponent or 0) - decimals}")


def rewrite_outputs(name):
    """Run docs/NAME, and put what its blocks print into its text blocks."""
    page = DOCS / name
    text = page.read_text()
    fences, space, pieces, end = [*FENCE.finditer(text), None], {}, [], 0
    for this, after in zip(fences, fences[1:], strict=False):
        if this[1] == "text":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(this[2], name, "exec"), space)
        shown = after if after is not None and after[1] == "text" else None
        if out.getvalue() and not COMMENT.search(this[2]):
            pieces.append(text[end : this.end()])
            end = this.end() if shown is None else shown.end()
            between = "\n\n" if shown is None else text[this.end() : shown.start()]
            pieces.append(f"{between}```text\n{out.getvalue()}```")
    page.write_text("".join(pieces) + text[end:])


if __name__ == "__main__":
    for guide in sys.argv[1:]:
        rewrite_outputs(guide)

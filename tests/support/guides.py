"""The guides of docs/ as programs: their blocks run in order, and print what the page shows.

Run: python tests/support/guides.py docs/guides/sweeps.md    (writes what it prints into the page)
"""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"^print\(.*\)  # ([^:\n]+)", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of Python of a page.

    Args:
      code: its text.
      line: of the page, from 1.
      end: where the block ends in the page's text.
      shown: where the text block is that shows what it prints, (start, end); None without one.
      printed: what the page says it prints, in that block or in comments behind its prints.
    """

    code: str
    line: int
    end: int
    shown: tuple[int, int] | None
    printed: str


def read_blocks(text):
    """The Python blocks of a page."""
    fences = [*FENCE.finditer(text), None]
    for this, after in itertools.pairwise(fences):
        if this[1] == "python":
            shown, printed = None, "".join(f"{line}\n" for line in COMMENT.findall(this[2]))
            if after is not None and after[1] == "text":
                shown, printed = after.span(), after[2]
            line = text.count("\n", 0, this.start(2)) + 1
            yield Block(this[2], line, this.end(), shown, printed)


def run_blocks(name, skip, space):
    """Run the blocks of a page in a namespace; yield each with what it prints.

    Blocks with an import of a package in skip are left out.
    """
    for block in read_blocks((DOCS / name).read_text()):
        if not any(re.search(rf"^import {word}$", block.code, re.MULTILINE) for word in skip):
            out = io.StringIO()
            padded = "\n" * (block.line - 1) + block.code  # errors name the line of the page
            with contextlib.redirect_stdout(out):
                exec(compile(padded, str(DOCS / name), "exec"), space)
            yield block, out.getvalue()


def run_guide(name, skip=()):
    """Run docs/NAME, check what it prints, and return its namespace."""
    space = {"__name__": "__guide__"}
    for block, came in run_blocks(name, skip, space):
        assert_same_text(came, block.printed, f"docs/{name}, line {block.line}")
    return space


def assert_same_text(came, shown, where):
    """Assert that two texts are equal, but for 1 in the last digit of a decimal number."""
    words = lambda text: NUMBER.sub("0", text).split()
    assert words(came) == words(shown), f"{where} prints\n{came}"
    for got, want in zip(NUMBER.findall(came), NUMBER.findall(shown), strict=True):
        close = abs(float(got) - float(want)) <= 1.001 * last_digit(want)
        assert close, f"{where}: {got}, and the page says {want}"


def last_digit(number):
    """The unit of a number's last digit; 0 for an integer, which must be exact.

    >>> last_digit("0.25"), last_digit("17"), last_digit("1.5e-06")
    (0.01, 0.0, 1e-07)
    """
    mantissa, _, exponent = number.partition("e")
    if "." not in mantissa and not exponent:
        return 0.0
    return float(f"1e{int(exponent or 0) - len(mantissa.partition('.')[2])}")


def write_outputs(name, skip=()):
    """Run docs/NAME, and write what its blocks print into the page."""
    text, pieces, end = (DOCS / name).read_text(), [], 0
    for block, came in run_blocks(name, skip, {"__name__": "__guide__"}):
        if came and not COMMENT.search(block.code):
            start, after = block.shown or (block.end, block.end)
            between = "" if block.shown else "\n\n"
            pieces += [text[end:start], between, f"```text\n{came}```"]
            end = after
    (DOCS / name).write_text("".join(pieces) + text[end:])


if __name__ == "__main__":
    sys.path.append(str(DOCS.parent / "examples"))
    for page in sys.argv[1:]:
        write_outputs(Path(page).resolve().relative_to(DOCS).as_posix())

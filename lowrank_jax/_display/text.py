"""Printable text: control characters escaped and long text shortened, for names from files."""

from __future__ import annotations

import re

# Control characters, line ends, bidirectional overrides and lone surrogates could move the cursor
# of a terminal or disguise a name. Zero-width joiners, which scripts and emoji need, are kept.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNPRINTABLE_LINES = re.compile(f"(?!\n){_UNPRINTABLE.pattern}")
_PIECE = re.compile(r"[^\s/]*(?:/|\s+|$)|[^\s/]+")
_NAME, _LINE, _TEXT = 200, 1000, 8000


def to_printable(text: object, limit: int = _NAME) -> str:
    r"""Return text as one line: control characters are escaped, and a long middle is left out.

    >>> to_printable("a\x1b[31m\n"), to_printable("层/überß")
    ('a\\x1b[31m\\n', '层/überß')
    >>> to_printable("abcdefghijk", limit=5)
    'ab...jk'
    """
    return _UNPRINTABLE.sub(_escape, shorten(str(text), limit))


def to_printable_lines(text: str) -> str:
    """Return text of several lines, each of them printable."""
    if len(text) <= _LINE and not _UNPRINTABLE_LINES.search(text):
        return text
    return shorten("\n".join(to_printable(line, _LINE) for line in text.split("\n")), _TEXT)


def break_text(text: str, width: int) -> list[str]:
    """Break text into lines after spaces and slashes; a longer word keeps its line.

    >>> break_text("params/layers/self_attn/q_proj/kernel", 16)
    ['params/layers/', 'self_attn/', 'q_proj/kernel']
    """
    lines = [""]
    for piece in _PIECE.findall(text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def quote_value(value: object) -> str:
    """Return the repr of a value, shortened to 200 characters, or its type if it has no repr."""
    try:
        return shorten(repr(value), _NAME)
    except (ValueError, RecursionError):  # an int of thousands of digits, or deeply nested lists
        return f"a {type(value).__name__} too large to be shown"


def shorten(text: str, limit: int) -> str:
    """Shorten text above the limit by leaving out its middle."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def _escape(found: re.Match) -> str:
    return found.group().encode("unicode_escape").decode()

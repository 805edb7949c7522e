"""Text of files and trees made fit to print: one line, nothing that steers a terminal."""

from __future__ import annotations

import re

# what moves a cursor, ends a line, turns the direction of writing, or has no place in UTF-8; the
# joiners of scripts and emoji stay
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNPRINTABLE_LINES = re.compile(f"(?!\n){_UNPRINTABLE.pattern}")
_NAME, _LINE, _TEXT = 200, 1000, 8000


def to_printable(text: object, limit: int = _NAME) -> str:
    r"""A text in one line: control characters escaped as Python does, and cut where it is long.

    >>> printable("a\x1b[31m\n"), printable("层/überß")
    ('a\\x1b[31m\\n', '层/überß')
    >>> printable("abcdefghijk", limit=5)
    'ab...jk'
    """
    return _UNPRINTABLE.sub(_escape, shorten(str(text), limit))


def to_printable_lines(text: str) -> str:
    """A message of several lines, each fit to print."""
    if len(text) <= _LINE and not _UNPRINTABLE_LINES.search(text):
        return text
    return shorten("\n".join(to_printable(line, _LINE) for line in text.split("\n")), _TEXT)


def quote_value(value: object) -> str:
    """A value as Python writes it, in 200 characters; its type alone where it has no text."""
    try:
        return shorten(repr(value), _NAME)
    except (ValueError, RecursionError):  # thousands of digits, or of lists in lists
        return f"a {type(value).__name__} too large to be shown"


def shorten(text: str, limit: int) -> str:
    """The text, its middle left out where it is longer than the limit."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def _escape(found: re.Match) -> str:
    return found.group().encode("unicode_escape").decode()

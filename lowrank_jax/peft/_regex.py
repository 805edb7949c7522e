"""A recursive-descent parser for the regexes in adapter configurations.

Backreferences, lookbehinds, flags, word boundaries and possessive repeats are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_LENGTH, _MAX_DEPTH, _MAX_REPEATS = 1000, 30, 1000

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_ANCHORS = {"^": "start", "$": "end"}
_GROUPS = {"(?:": "", "(?=": "ahead", "(?!": "not ahead"}
_COUNTS = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
_NAMED = re.compile(r"\(\?P<([A-Za-z_][A-Za-z0-9_]*)>")


class RegexError(ValueError):
    """A regex is malformed or not supported."""


class RegexNode(NamedTuple):
    """A node of a regex's syntax tree.

    Args:
      kind: "char"; "sequence" and "choice" of items; "repeat" of one item; "start", "end" ($) and
        "last" (\\Z), which have no width; "ahead" and "not ahead", lookaheads of one item.
      items: the child nodes.
      low, high: the bounds of a repeat; high is None if there is no upper bound.
      takes: for "char", a predicate of the characters that match.
    """

    # q_|v.* is choice(sequence(char "q", char "_"), sequence(char "v", repeat(char any, 0, None)))

    kind: str
    items: tuple[RegexNode, ...] = ()
    low: int = 0
    high: int | None = 0
    takes: Callable[[str], bool] = bool


def parse_regex(text: str) -> RegexNode:
    """Parse a regex into its syntax tree.

    Raises:
      RegexError: it is malformed, too long, or not supported.
    """
    if len(text) > MAX_LENGTH:
        raise RegexError(f"it has {len(text)} characters")
    parser = _Parser(text)
    node = parser.parse_choice(0)
    if parser.at < len(text):
        raise RegexError("it has an unmatched ')'")
    return node


class _Parser:
    """A recursive-descent parser at a position of a regex.

    choice = sequence ("|" sequence)*; sequence = (item repeat?)*; item = char | class | group.
    """

    def __init__(self, text: str):
        self.text, self.at, self._names = text, 0, set()

    def parse_choice(self, depth: int) -> RegexNode:
        """Parse alternatives up to the end or the group's ")"."""
        if depth > _MAX_DEPTH:
            raise RegexError("its groups are nested too deeply")
        branches = [self._parse_sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._parse_sequence(depth))
        return branches[0] if len(branches) == 1 else RegexNode("choice", tuple(branches))

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self) -> str:
        """Consume and return the next character."""
        if not (char := self._peek()):
            raise RegexError("it ends unexpectedly")
        self.at += 1
        return char

    def _parse_sequence(self, depth: int) -> RegexNode:
        items: list[RegexNode] = []
        while (char := self._peek()) and char not in "|)":
            item = self._parse_item(depth)
            items.append(self._parse_repeat(item))
        return items[0] if len(items) == 1 else RegexNode("sequence", tuple(items))

    def _parse_repeat(self, item: RegexNode) -> RegexNode:
        """Wrap an item in the repeat that follows it, if any."""
        bounds = self._parse_bounds()
        if bounds is None:
            return item
        if item.kind in ("start", "end", "last"):
            raise RegexError("nothing to repeat")
        if self._peek() == "?":
            self.at += 1  # lazy: it matches the same texts
        elif self._peek() == "+" or self._parse_bounds() is not None:
            raise RegexError("it repeats a repeat")
        return RegexNode("repeat", (item,), *bounds)

    def _parse_bounds(self) -> tuple[int, int | None] | None:
        """Consume the repeat at this position and return its bounds; None if there is none."""
        char = self._peek()
        if char and char in "*+?":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        # {3} is (3, 3), {3,} is (3, None), {,3} is (0, 3); {} alone is two literal characters
        found = _COUNTS.match(self.text, self.at)
        if found is None or found.group() == "{}":
            return None
        self.at = found.end()
        first, comma, second = found.groups()
        if len(first) > 4 or len(second) > 4:
            raise RegexError("it repeats too often")
        low = int(first or 0)
        high = (int(second) if second else None) if comma else low
        if max(low, high or 0) > _MAX_REPEATS or (high is not None and high < low):
            raise RegexError("it repeats too often, or from more to fewer times")
        return low, high

    def _parse_item(self, depth: int) -> RegexNode:
        char = self._take()
        if char in _ANCHORS:
            return RegexNode(_ANCHORS[char])
        if char == "(":
            return self._parse_group(depth)
        if char == "[":
            return self._parse_class()
        if char == ".":
            return RegexNode("char", takes=lambda other: other != "\n")
        if char in "*+?":
            raise RegexError("nothing to repeat")
        if char == "{" and _COUNTS.match(self.text, self.at - 1) and self._peek() != "}":
            raise RegexError("nothing to repeat")
        if char == "\\":
            escaped = self._take()
            if escaped in "AZ":
                return RegexNode("start" if escaped == "A" else "last")
            if (kind := _find_class(escaped)) is not None:
                return RegexNode("char", takes=kind)
            char = _unescape(escaped)
        return RegexNode("char", takes=char.__eq__)

    def _parse_group(self, depth: int) -> RegexNode:
        kind = ""
        if self._peek() == "?":
            start = self.at - 1
            opening = self.text[start : start + 3]
            if named := _NAMED.match(self.text, start):
                if named.group(1) in self._names:
                    raise RegexError("it has two groups of one name")
                self._names.add(named.group(1))
                self.at = named.end()
            elif opening in _GROUPS:
                kind, self.at = _GROUPS[opening], start + 3
            else:
                raise RegexError(f"it has {opening!r}, which is not supported")
        inner = self.parse_choice(depth + 1)
        if self._take() != ")":
            raise RegexError("it has an unmatched '('")
        # a group stays one item, so that a repeat after it applies to the whole group
        return RegexNode(kind, (inner,)) if kind else RegexNode("sequence", (inner,))

    def _parse_class(self) -> RegexNode:
        """Parse a character class after its "["."""
        negated = self._peek() == "^"
        self.at += negated
        kinds: list[Callable[[str], bool]] = []
        ranges: list[tuple[str, str]] = []
        # a "]" right after "[" or "[^" is a literal, and so is a "-" before the closing "]"
        first = True
        while (char := self._take()) != "]" or first:
            first = False
            if char == "[" or (char == self._peek() and char in "-&~|"):
                raise RegexError("it has a class in the ambiguous syntax of nested sets")
            low = self._parse_class_char(char, kinds)
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                following = self._take()
                high = self._parse_class_char(following, kinds)
                if low is None or high is None or low > high or following in "-[":
                    raise RegexError("it has an invalid range")
                ranges.append((low, high))
            elif low is not None:
                ranges.append((low, low))
        holds = lambda char: (
            any(low <= char <= high for low, high in ranges) or any(kind(char) for kind in kinds)
        )
        return RegexNode("char", takes=(lambda char: not holds(char)) if negated else holds)

    def _parse_class_char(self, char: str, kinds: list[Callable[[str], bool]]) -> str | None:
        """Return a character of a class, or add an escape such as \\d to kinds and return None."""
        if char != "\\":
            return char
        escaped = self._take()
        if (kind := _find_class(escaped)) is not None:
            kinds.append(kind)
            return None
        return _unescape(escaped)


def _find_class(escaped: str) -> Callable[[str], bool] | None:
    r"""Return the predicate of an escape such as \d or \D, or None."""
    kind = _CLASSES.get(escaped.lower()) if escaped in "dDwWsS" else None
    if kind is None or escaped.islower():
        return kind
    return lambda char: not kind(char)


def _unescape(char: str) -> str:
    r"""Return the character that an escape such as \n or \. stands for."""
    if char in _CONTROLS:
        return _CONTROLS[char]
    if char.isascii() and char.isalnum():
        raise RegexError(f"it has '\\{char}', which is not supported")
    return char

"""Regexes of an adapter's configuration, matched in linear time by an automaton.

A file may hold any regex, and Python's `re` takes exponential time for some. What is supported here
is what configurations use: literals, classes, groups, alternatives, repeats, anchors, lookaheads.

Source: K. Thompson, "Regular expression search algorithm", CACM 11(6), 1968; a text is read from
its end, so that what a lookahead says of the rest is known before it is needed.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lowrank_jax._display.text import shorten
from lowrank_jax._errors import CheckpointError
from lowrank_jax.peft._regex import RegexError, RegexNode, parse_regex

# steps of an automaton; steps that all of its matches may look at, some 0.2 microseconds each; what
# a state costs besides, in such steps
_MAX_STEPS, _WORK, _STATE_COST = 10_000, 2_000_000, 20
_MAX_KINDS = 256  # of names with holes


class _Step(NamedTuple):
    """What must hold at a position of the text for the rest of it to match, by later steps."""

    kind: str
    node: RegexNode | None = None
    next: int = 0
    other: int = 0


class Automaton:
    """Patterns compiled into one automaton, whose states are made when they are met.

    Args:
      whole: whether a pattern must match all of a text (re.fullmatch), or its beginning (re.match).
      what: the field that the patterns are of, for errors.
    """

    def __init__(self, whole: bool, what: str):
        self._what, self._work, self._built = what, 0, 0
        self._steps: list[_Step] = []
        self._levels: list[list[int]] = [[]]  # steps by how many lookaheads they are in
        self._back: dict[int, int] = {}  # first step of a repeated part -> the repeat
        self._known: dict[tuple[bytes, str, bool, bool], bytes] = {}
        self._accept = self._add(0, "last" if whole else "match")
        self._starts: list[int] = []

    def append(self, node: RegexNode) -> None:
        """Add one more pattern; none is added once a text was matched.

        Raises:
          RegexError: there would be too many steps.
        """
        self._starts.append(self._build(node, self._accept, 0))

    def first(self, text: str) -> int | None:
        """The number of the first pattern that matches a text, or None.

        Raises:
          CheckpointError: the patterns have taken too many steps.
        """
        size, state = len(text), b""
        for place in range(size, -1, -1):
            char = text[place : place + 1]
            end = place == size or (place == size - 1 and char == "\n")
            key = state, char, place == 0, end
            state = self._known.get(key) or self._evaluate(*key)
        return next((i for i, start in enumerate(self._starts) if state[start]), None)

    def _evaluate(self, after: bytes, char: str, start: bool, end: bool) -> bytes:
        """Which steps lead to a match from a position, by those that do from the next one."""
        now, steps = bytearray(len(self._steps)), self._steps
        for numbers in reversed(self._levels):  # what a lookahead says is known before it is used
            again = True
            while again:  # only where a repeated part of no width leads back
                again = False
                for number in numbers:
                    kind, node, following, other = steps[number]
                    match kind:
                        case "char":
                            holds = char and after[following] and node.takes(char)  # type: ignore
                        case "either":
                            holds = now[following] or now[other]
                        case "start":
                            holds = start and now[following]
                        case "end":
                            holds = end and now[following]
                        case "at last":
                            holds = not char and now[following]
                        case "ahead":
                            holds = now[other] and now[following]
                        case "not ahead":
                            holds = not now[other] and now[following]
                        case "last":
                            holds = not char
                        case _:  # "match"
                            holds = True
                    if holds and not now[number]:
                        now[number] = 1
                        again |= number in self._back and not now[self._back[number]]
                self._work += len(numbers) + _STATE_COST
                if self._work > _WORK:
                    raise CheckpointError(
                        f"the regexes of {self._what} take too many steps to match: write the "
                        "names of the modules in their place"
                    )
        state = self._known[after, char, start, end] = bytes(now)
        return state

    def _add(self, level: int, *step: Any) -> int:
        """The number of a new step."""
        if len(self._steps) >= _MAX_STEPS:
            raise RegexError(f"it makes more than {_MAX_STEPS} steps, with those before it")
        self._levels[level].append(len(self._steps))
        self._steps.append(_Step(*step))
        return len(self._steps) - 1

    def _build(self, node: RegexNode, following: int, level: int) -> int:
        """The first step of a part that is followed by a step."""
        self._built += 1
        if self._built > _MAX_STEPS:
            raise RegexError(f"it has more than {_MAX_STEPS} parts, with those before it")
        match node.kind:
            case "char":
                return self._add(level, "char", node, following)
            case "sequence":
                for item in reversed(node.items):
                    following = self._build(item, following, level)
                return following
            case "choice":
                starts = [self._build(item, following, level) for item in node.items]
                return functools.reduce(
                    lambda one, two: self._add(level, "either", None, two, one), starts
                )
            case "repeat":
                return self._build_repeat(node, following, level)
            case "ahead" | "not ahead":
                if level + 1 == len(self._levels):
                    self._levels.append([])
                inner = self._build(node.items[0], self._add(level + 1, "match"), level + 1)
                return self._add(level, node.kind, None, following, inner)
            case _:
                kind = "at last" if node.kind == "last" else node.kind
                return self._add(level, kind, None, following)

    def _build_repeat(self, node: RegexNode, following: int, level: int) -> int:
        """The first step of a repeat."""
        (item,) = node.items
        if node.high is None:
            loop = self._add(level, "either", None, following, following)
            body = self._build(item, loop, level)
            self._steps[loop] = _Step("either", None, following, body)
            self._back[body] = loop
            following = loop
        else:
            after = following
            for _ in range(node.high - node.low):
                body = self._build(item, following, level)
                following = self._add(level, "either", None, body, after)
        for _ in range(node.low):
            following = self._build(item, following, level)
        return following


class Suffixes:
    """Names, each of which stands for the modules whose last parts it is; looked up, not compared.

    A name may have holes, where any character may stand: a regex often has a bare "." in a name.
    """

    def __init__(self) -> None:
        # length, parts between the holes -> those parts of a name -> its number
        self._tables: dict[tuple[int, tuple[tuple[int, int], ...]], dict[str, int]] = {}

    def append(self, chars: Sequence[str], number: int) -> bool:
        """Add a name, "" for a hole, unless there are too many kinds; the first of two counts."""
        holes = [-1, *(place for place, char in enumerate(chars) if not char), len(chars)]
        parts = tuple((a + 1, b) for a, b in itertools.pairwise(holes) if b > a + 1)
        kind = len(chars), parts
        if len(holes) > 2 and kind not in self._tables and len(self._tables) >= _MAX_KINDS:
            return False
        self._tables.setdefault(kind, {}).setdefault("".join(chars), number)
        return True

    def first(self, module: str) -> int | None:
        """The least number of a name that stands for a module, or None."""
        found = []
        for (length, parts), names in self._tables.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                text = "".join(module[start + a : start + b] for a, b in parts)
                if text in names:
                    found.append(names[text])
        return min(found, default=None)


class ModulePatterns:
    """The keys of rank_pattern or alpha_pattern, of which the first that matches a module counts.

    What `re.match(rf"(.*\\.)?({key})$", module)` says, as peft.utils.get_pattern_key asks it. A key
    that is a plain name, as most are, is looked up, however many there are.

    Args:
      keys: the regexes.
      what: the field that they are of, for errors.

    Raises:
      RegexError: keys are malformed or use what is not supported; the first of them is named.
    """

    def __init__(self, keys: Iterable[str], what: str):
        self._exact: dict[str, int] = {}
        self._ends = Suffixes()
        self._automaton, self._numbers = Automaton(False, what), []
        for number, key in enumerate(keys):
            try:
                name, exact = _parse_name(key)
                if name is not None and exact and all(name):
                    self._exact.setdefault("".join(name), number)
                elif name is None or exact or not self._ends.append(name, number):
                    node = parse_regex(key)
                    self._automaton.append(RegexNode("sequence", (_PARENTS, node, _END)))
                    self._numbers.append(number)
            except RegexError as error:
                raise RegexError(f"{shorten(repr(key), 80)}: {error}") from error

    def first(self, module: str) -> int | None:
        """The number of the first key that matches a module, or None."""
        found = [self._exact.get(module), self._ends.first(module)]
        if self._numbers and (place := self._automaton.first(module)) is not None:
            found.append(self._numbers[place])
        return min((number for number in found if number is not None), default=None)


def _parse_name(key: str) -> tuple[list[str] | None, bool]:
    """The characters of the name that a key is, "" for any, and whether it is the whole name."""
    if (found := _NAME.fullmatch(key)) is None:
        return None, False
    chars = _CHARS.findall(found[2])
    return ["" if char == "." else char[-1] for char in chars], bool(found[1])


_NAME, _CHARS = re.compile(r"(\^?)((?:[\w.-]|\\[.-])*)\$?", re.ASCII), re.compile(r"\\?.")
_END = RegexNode("end")
_PARENTS = parse_regex(r"(.*\.)?")

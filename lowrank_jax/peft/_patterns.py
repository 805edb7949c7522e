"""Match the regexes of an adapter's configuration in linear time, with an automaton.

A file may contain any regex, and Python's `re` takes exponential time for some. Literals, classes,
groups, alternatives, repeats, anchors and lookaheads are supported.

Source: K. Thompson, "Regular expression search algorithm", CACM 11(6), 1968, reading the text from
its end, so that the result of a lookahead is known before it is needed.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_jax._display.text import shorten
from lowrank_jax._errors import CheckpointError
from lowrank_jax.peft._regex import RegexError, RegexNode, parse_regex

# Limits: the steps of an automaton; the steps evaluated in all matches of a configuration, about
# 0.1 microseconds each; and the fixed cost of a new state, counted in evaluated steps. Unsloth's
# regex of 376 characters takes 51,000 for 24,000 modules of five architectures.
_MAX_STEPS, _WORK, _STATE_COST = 10_000, 300_000, 100
_MAX_KINDS = 256  # kinds of names with holes, see Suffixes


class _Step(NamedTuple):
    """A state of the automaton: a condition at a position, and the steps that must match after it.

    Args:
      kind: the condition, as in `Automaton._evaluate`.
      node: the character class of "char".
      next, other: numbers of the following steps; `other` is the second alternative of "either", or
        the body of a lookahead.
    """

    kind: str
    node: RegexNode | None = None
    next: int = 0
    other: int = 0


class Budget:
    """The steps that all automata of one configuration may still evaluate."""

    def __init__(self) -> None:
        self._left = _WORK

    def spend(self, count: int, what: str) -> None:
        """Subtract evaluated steps.

        Raises:
          CheckpointError: none are left.
        """
        self._left -= count
        if self._left < 0:
            raise CheckpointError(
                f"the regexes of {what} take too many steps to match: use the names of the modules "
                "instead"
            )


class Automaton:
    """Several patterns compiled into one automaton, whose states are computed on demand.

    Args:
      whole: whether a pattern must match the whole text (re.fullmatch) or a prefix (re.match).
      what: the field that the patterns come from, for errors.
      budget: limits the steps that are evaluated.
    """

    # The pattern "a|b*" with whole=True becomes these steps:
    #   0 last                    holds at the end of the text
    #   1 char "a", next 0        holds before an "a" that step 0 follows
    #   2 either, next 0, other 3   the loop of b*: leave to 0, or enter the body 3
    #   3 char "b", next 2
    #   4 either, next 2, other 1   the choice; matching starts here
    # A set of steps is bytes with one flag per step. The text is read backwards; at each position
    # the flags of the steps that lead to a match from there follow from those one position later.
    # For "bb": at its end steps 0, 2, 4 hold, before each "b" 2, 3, 4 hold. 4 holds at 0: a match.

    def __init__(self, whole: bool, what: str, budget: Budget):
        self._what, self._budget, self._built = what, budget, 0
        self._steps: list[_Step] = []
        self._levels: list[list[int]] = [[]]  # steps by their depth in lookaheads
        self._back: dict[int, int] = {}  # first step of a repeated part -> the repeat
        self._known: dict[tuple[bytes, str, bool, bool], bytes] = {}
        self._takers: dict[str, np.ndarray] = {}
        self._accept = self._add(0, "last" if whole else "match")
        self._starts: list[int] = []

    def append(self, node: RegexNode) -> None:
        """Add a pattern; allowed only before the first match.

        Raises:
          RegexError: the automaton would have too many steps.
        """
        self._starts.append(self._build(node, self._accept, 0))

    def first(self, text: str) -> int | None:
        """Return the number of the first pattern that matches a text, or None.

        Raises:
          CheckpointError: all matches together have evaluated too many steps.
        """
        size, state = len(text), b""
        for place in range(size, -1, -1):
            char = text[place : place + 1]
            end = place == size or (place == size - 1 and char == "\n")
            key = state, char, place == 0, end
            state = self._known.get(key) or self._evaluate(*key)
        return next((i for i, start in enumerate(self._starts) if state[start]), None)

    def _evaluate(self, after: bytes, char: str, start: bool, end: bool) -> bytes:
        """Compute which steps lead to a match from a position, given those of the next one."""
        chars, followings, others = self._split_steps
        now, steps = bytearray(len(self._steps)), self._steps
        if char:  # a step that takes the character depends on the next position alone
            ready = np.frombuffer(after, np.uint8)[followings] & self._find_takers(char)
            np.frombuffer(now, np.uint8)[chars] = ready
        for numbers in reversed(others):  # bodies of lookaheads first
            again = True
            while again:  # repeats only after an empty body leads back to its loop
                again = False
                for number in numbers:
                    kind, _, following, other = steps[number]
                    match kind:
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
                self._budget.spend(len(numbers) + _STATE_COST, self._what)
        state = self._known[after, char, start, end] = bytes(now)
        return state

    @functools.cached_property
    def _split_steps(self) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
        """The steps that take a character, the steps that follow them, and the others by level."""
        chars = [i for i, step in enumerate(self._steps) if step.kind == "char"]
        followings = [self._steps[i].next for i in chars]
        taken = {*chars}
        others = [[i for i in level if i not in taken] for level in self._levels]
        return np.array(chars, int), np.array(followings, int), others

    def _find_takers(self, char: str) -> np.ndarray:
        """Return a flag for each step of _split_steps that says whether it takes a character."""
        if char not in self._takers:
            nodes = [step.node for step in self._steps if step.kind == "char"]
            self._budget.spend(len(nodes), self._what)
            flags = [bool(node.takes(char)) for node in nodes]  # type: ignore
            self._takers[char] = np.array(flags, np.uint8)
        return self._takers[char]

    def _add(self, level: int, *step: Any) -> int:
        """Add a step and return its number."""
        if len(self._steps) >= _MAX_STEPS:
            raise RegexError(f"it makes more than {_MAX_STEPS} steps, including those before it")
        self._levels[level].append(len(self._steps))
        self._steps.append(_Step(*step))
        return len(self._steps) - 1

    def _build(self, node: RegexNode, following: int, level: int) -> int:
        """Build the steps of a node before the step `following`, last first; return the first."""
        self._built += 1
        if self._built > _MAX_STEPS:
            raise RegexError(f"it has more than {_MAX_STEPS} parts, including those before it")
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
        """Build the steps of a repeat; return its first step."""
        # x{2,} -> x x x*, where x* is a loop step that the body leads back to
        # x{1,3} -> x (x (x)?)?; each of the optional copies may skip to the end
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
    """Names that match the modules that end with them, found by dictionary lookups.

    A name may have holes that match any character, since a regex often has a bare "." in a name.
    """

    def __init__(self) -> None:
        # A kind is a length with the spans between the holes. "self.attn" as a regex, whose "." is
        # a hole, is of the kind (9, ((0, 4), (5, 9))) and has the key "selfattn" in its table. A
        # module is cut to each length and to the spans, then looked up in that kind's table.
        self._tables: dict[tuple[int, tuple[tuple[int, int], ...]], dict[str, int]] = {}

    def append(self, chars: Sequence[str], number: int) -> bool:
        """Add a name, with "" for a hole; return False if there are too many kinds."""
        if isinstance(chars, str):  # it has no holes: the loop over its characters is not needed
            kind = len(chars), (((0, len(chars)),) if chars else ())
            self._tables.setdefault(kind, {}).setdefault(chars, number)
            return True
        holes = [-1, *(place for place, char in enumerate(chars) if not char), len(chars)]
        parts = tuple((a + 1, b) for a, b in itertools.pairwise(holes) if b > a + 1)
        kind = len(chars), parts
        if len(holes) > 2 and kind not in self._tables and len(self._tables) >= _MAX_KINDS:
            return False
        self._tables.setdefault(kind, {}).setdefault("".join(chars), number)
        return True

    def first(self, module: str) -> int | None:
        """Return the smallest number of a name that matches a module, or None."""
        found = []
        for (length, parts), names in self._tables.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                text = "".join(module[start + a : start + b] for a, b in parts)
                if text in names:
                    found.append(names[text])
        return min(found, default=None)


class ModulePatterns:
    """The keys of rank_pattern or alpha_pattern; the first one that matches a module wins.

    A key matches if `re.match(rf"(.*\\.)?({key})$", module)` does, as in
    peft.utils.get_pattern_key. Plain names, which most keys are, are looked up in dictionaries.

    Args:
      keys: the regexes.
      what: the field that they come from, for errors.
      budget: limits the steps that matching may take.

    Raises:
      RegexError: a key is malformed or not supported; the first one is named.
    """

    def __init__(self, keys: Iterable[str], what: str, budget: Budget):
        self._exact: dict[str, int] = {}
        self._ends = Suffixes()
        self._automaton, self._numbers = Automaton(False, what, budget), []
        for number, key in enumerate(keys):
            if _IS_PLAIN(key):
                self._ends.append(key, number)
                continue
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
        """Return the number of the first key that matches a module, or None."""
        found = [self._exact.get(module), self._ends.first(module)]
        if self._numbers and (place := self._automaton.first(module)) is not None:
            found.append(self._numbers[place])
        return min((number for number in found if number is not None), default=None)


def _parse_name(key: str) -> tuple[list[str] | None, bool]:
    """Return the characters of a key that is a name, "" for any, and whether "^" starts it."""
    if (found := _NAME.fullmatch(key)) is None:
        return None, False
    chars = _CHARS.findall(found[2])
    return ["" if char == "." else char[-1] for char in chars], bool(found[1])


_NAME, _CHARS = re.compile(r"(\^?)((?:[\w.-]|\\[.-])*)\$?", re.ASCII), re.compile(r"\\?.")
_IS_PLAIN = re.compile(r"[\w-]+", re.ASCII).fullmatch
_END = RegexNode("end")
_PARENTS = parse_regex(r"(.*\.)?")

"""Errors and the warning: each names a path, what came, what was expected, and the remedy."""

import itertools
from collections.abc import Iterable

_LONGEST, _LONGEST_LINE = 8000, 1000


class LowrankError(ValueError):
    """Base of every error this library raises on bad input; its text can be printed anywhere."""

    def __init__(self, message: str = ""):
        lines = [shorten(line, _LONGEST_LINE) for line in printable(message).split("\n")]
        super().__init__(shorten("\n".join(lines), _LONGEST))


class PatternError(LowrankError):
    """A path pattern is malformed or matches nothing."""


class ConfigError(LowrankError):
    """A configuration value is of the wrong type or out of range."""


class AxesError(LowrankError):
    """The fan-in, fan-out or stack axes of a leaf are unknown or impossible."""


class TreeError(LowrankError):
    """Two trees, or a tree and an adapter, do not fit each other."""


class StateError(LowrankError):
    """A call changes state of a model that its pure function cannot return."""


class MaterializeError(LowrankError):
    """A weight would have to be built densely and the caller asked for that to be an error."""


class CheckpointError(LowrankError):
    """A checkpoint is missing, damaged, or belongs to another base."""


class MaterializeWarning(UserWarning):
    """A weight was built densely because no rule covers the equation that uses it."""


class PlanWarning(UserWarning):
    """A leaf reaches a product by operations no rule follows, so "all-linear" passes over it."""


class OffloadWarning(UserWarning):
    """An optimizer's state stays on the device, which has no host memory to put it in."""


def listing(problems: list[str], limit: int = 20) -> str:
    """Join problems one to a line, saying how many were left out."""
    return listing_of(problems, len(problems), limit)


def listing_of(problems: Iterable[str], count: int, limit: int = 20) -> str:
    """Join the first of `count` problems one to a line; the others are not asked for."""
    lines = [f"  - {p}" for p in itertools.islice(problems, limit)]
    if count > limit:
        lines.append(f"  ... and {count - limit} more")
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with each character that is not printed as its escape; line breaks stay."""
    if text.isprintable():
        return text
    shown = lambda char: char if char.isprintable() or char == "\n" else ascii(char)[1:-1]
    return "".join(map(shown, text))


def quoted(value: object) -> str:
    """A value as Python writes it, within 200 characters; its type alone where it has no text."""
    try:
        return shorten(repr(value), 200)
    except (
        ValueError,
        RecursionError,
    ):  # thousands of digits, or of lists in lists
        return f"a {type(value).__name__} too large to be shown"


def shorten(text: str, limit: int) -> str:
    """The text, its middle left out where it is longer than the limit."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [...] {text[-half:]}"


def forgotten(what: str) -> LowrankError:
    """The error of a node that met a function which knows none."""
    return LowrankError(
        f"{what} was used as if it were an array: the function that uses the parameters must be "
        "lifted; call lowrank.lift(fn)(tree, ...) instead of fn(tree, ...), or pass "
        "lowrank.merge(base, lora)"
    )

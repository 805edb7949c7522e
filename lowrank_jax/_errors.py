"""Errors and the warning: each names a path, what came, what was expected, and the remedy.

What files and trees are called is in their texts: control characters are escaped in all of them.
"""

import itertools
from collections.abc import Iterable

from lowrank_jax._display.text import to_printable, to_printable_lines


class _PrintableMessage(Exception):
    """An exception whose text is fit to print."""

    def __init__(self, *args: object):
        super().__init__(*(to_printable_lines(a) if isinstance(a, str) else a for a in args))


class LowrankError(_PrintableMessage, ValueError):
    """Base of every error this library raises on bad input."""


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


class MaterializeWarning(_PrintableMessage, UserWarning):
    """A weight was built densely because no rule covers the equation that uses it."""


class PlanWarning(_PrintableMessage, UserWarning):
    """A leaf reaches a product by operations no rule follows, so "all-linear" passes over it."""


class OffloadWarning(_PrintableMessage, UserWarning):
    """An optimizer's state stays on the device, which has no host memory to put it in."""


def list_problems(problems: list[str], limit: int = 20) -> str:
    """Join problems one to a line, saying how many were left out."""
    return list_first_problems(problems, len(problems), limit)


def list_first_problems(problems: Iterable[str], count: int, limit: int = 20) -> str:
    """Join the first of `count` problems one to a line; the others are not asked for."""
    lines = [f"  - {to_printable(p, 1000)}" for p in itertools.islice(problems, limit)]
    if count > limit:
        lines.append(f"  ... and {count - limit} more")
    return "\n".join(lines)


def make_not_lifted_error(what: str) -> LowrankError:
    """The error of a node that met a function which knows none."""
    return LowrankError(
        f"{what} was used as if it were an array: the function that uses the parameters must be "
        "lifted; call lowrank.lift(fn)(tree, ...) instead of fn(tree, ...), or pass "
        "lowrank.merge(base, lora)"
    )

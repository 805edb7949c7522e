"""Errors and warnings, each of which names a path, what was expected, and a remedy.

Messages contain names from files and trees, so control characters in them are escaped.
"""

import itertools
from collections.abc import Iterable

from lowrank_jax._display.text import to_printable, to_printable_lines


class _PrintableMessage(Exception):
    """An exception whose message has its control characters escaped."""

    def __init__(self, *args: object):
        super().__init__(*(to_printable_lines(a) if isinstance(a, str) else a for a in args))


class LowrankError(_PrintableMessage, ValueError):
    """Base class of the errors that this library raises for invalid input."""


class PatternError(LowrankError):
    """A path pattern is malformed or matches nothing."""


class ConfigError(LowrankError):
    """An argument or a configuration value has the wrong type or is out of range."""


class AxesError(LowrankError):
    """The fan-in, fan-out or stack axes of a leaf are unknown or impossible."""


class TreeError(LowrankError):
    """Two trees, or a tree and an adapter, do not match."""


class StateError(LowrankError):
    """A call changes state of a model that a pure function cannot return."""


class MaterializeError(LowrankError):
    """A weight would have to be materialized, and `fallback` is "raise"."""


class CheckpointError(LowrankError):
    """A checkpoint is missing, damaged, or belongs to another base."""


class MaterializeWarning(_PrintableMessage, UserWarning):
    """A weight was materialized because no rule covers the equation that uses it."""


class PlanWarning(_PrintableMessage, UserWarning):
    """A leaf reaches a product through operations without a rule, so "all-linear" skips it."""


class OffloadWarning(_PrintableMessage, UserWarning):
    """Optimizer state stays on the device, because the platform has no host memory space."""


def list_problems(problems: list[str], limit: int = 20) -> str:
    """Join problems, one on each line, with the number of those left out."""
    return list_first_problems(problems, len(problems), limit)


def list_first_problems(problems: Iterable[str], count: int, limit: int = 20) -> str:
    """Join the first of `count` problems, one on each line; the others are not generated."""
    lines = [f"  - {to_printable(p, 1000)}" for p in itertools.islice(problems, limit)]
    if count > limit:
        lines.append(f"  ... and {count - limit} more")
    return "\n".join(lines)


def make_not_lifted_error(what: str) -> LowrankError:
    """Make the error for a node that was used as an array, in a function that is not lifted."""
    return LowrankError(
        f"{what} was used as if it were an array: the function that uses the parameters must be "
        "lifted; call lowrank.lift(fn)(tree, ...) instead of fn(tree, ...), and for an NNX module "
        "lowrank.lift(type(module).__call__)(module, ...); or pass lowrank.merge(base, lora)"
    )

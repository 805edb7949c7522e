"""Validation of the fields of configurations, and of the JSON they are read from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_jax._checks.arguments import describe_value, is_finite, rank
from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError

MAX_DEPTH, _BITS = 50, 1024


def _is_finite_float(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def check_json(name: str, value: object, depth: int = 0) -> None:
    """Raise ConfigError if a value cannot be written to JSON and read back unchanged."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{name[:80]} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name} has the key {quote_value(key)}: keys of JSON are texts")
            check_json(f"{name}[{quote_value(key)}]", item, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(f"{name}[{index}]", item, depth + 1)
    elif isinstance(value, int):
        if value.bit_length() > _BITS:
            raise ConfigError(f"{name} is an integer of more than {_BITS} bits")
    elif not (value is None or isinstance(value, str) or _is_finite_float(value)):
        raise ConfigError(f"{name} is {describe_value(value)}, which is not a JSON value")


def check_rank(name: str, value: object) -> None:
    """Raise ConfigError if a value is not a rank."""
    if not isinstance(value, int) or not rank.holds(value):
        raise ConfigError(f"{name} must be {rank.expected}, not {quote_value(value)}")


def check_alpha(name: str, value: object) -> None:
    """Raise ConfigError if a value is not a finite number above 0."""
    if not isinstance(value, int | float) or not is_finite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, not {quote_value(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise ConfigError if a value is not a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {quote_value(value)}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError if a value is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {tuple(choices)}, not {quote_value(value)}")


def check_scale(what: str, scale: float) -> None:
    """Raise ConfigError if a scale is not a normal float32 number: XLA flushes others to 0."""
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= scale <= float(limits.max):
        raise ConfigError(
            f"{what} give the scale {scale}, which is 0 or infinite in float32: take an alpha "
            "nearer to the rank"
        )


def to_pairs(name: str, value: object) -> list[Any]:
    """Return the items of a mapping, or the pairs of a list, as a list of pairs."""
    pairs = [*value.items()] if isinstance(value, Mapping) else value
    is_regex = lambda key: isinstance(key, Mapping) and {"re"} <= {*key} <= {"re", "flags"}
    is_key = lambda key: isinstance(key, str | re.Pattern) or is_regex(key)
    is_pair = lambda item: isinstance(item, list | tuple) and len(item) == 2 and is_key(item[0])
    if not isinstance(pairs, list | tuple) or not all(map(is_pair, pairs)):
        raise ConfigError(
            f"{name} takes a mapping of pattern to value, or a list of [pattern, value], not "
            f"{describe_value(value)}"
        )
    return [*pairs]

"""Checks of the values of configurations, and of the JSON that they come from."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_jax._checks import shown
from lowrank_jax._errors import ConfigError


def _is_finite_float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def check_json(name: str, value: Any) -> None:
    """Raise where a value is not one of JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name} has the key {key!r}: keys of JSON are texts")
            check_json(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(f"{name}[{index}]", item)
    elif not (value is None or isinstance(value, str | int) or _is_finite_float(value)):
        raise ConfigError(f"{name} is {shown(value)}, which is not a JSON value")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise where a value is not one of some texts."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {tuple(choices)}, not {value!r}")


def check_keys(cls: Any, values: Any) -> None:
    """Raise where what from_dict was given is not a mapping of fields of the class."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{cls.__name__}.from_dict takes a mapping, as to_dict returns it, not {shown(values)}"
        )
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known, key=str):
        raise ConfigError(f"unknown {cls.__name__} keys {unknown}; known are {sorted(known)}")


def check_scale(what: str, scale: float) -> None:
    """Raise where a scale is not a normal number of float32: XLA would take it for 0."""
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= scale <= float(limits.max):
        raise ConfigError(
            f"{what} give the scale {scale}, which is 0 or infinite in float32: take an alpha "
            "nearer to the rank"
        )


def pairs_of(name: str, value: Any) -> list[Any]:
    """The items of a mapping of JSON, or of a list of pairs in its place."""
    pairs = [*value.items()] if isinstance(value, Mapping) else value
    is_key = lambda key: isinstance(key, str | re.Pattern | Mapping)
    is_pair = lambda item: isinstance(item, list | tuple) and len(item) == 2 and is_key(item[0])
    if not isinstance(pairs, list | tuple) or not all(map(is_pair, pairs)):
        raise ConfigError(
            f"{name} takes a mapping of pattern to value, or a list of [pattern, value], not "
            f"{shown(value)}"
        )
    return [*pairs]

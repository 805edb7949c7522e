"""Values of configurations: hashable mappings, normalized patterns, and their JSON form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_jax._checks.arguments import is_index
from lowrank_jax._checks.fields import MAX_DEPTH
from lowrank_jax._checks.regexes import RegexBudget
from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError
from lowrank_jax._jax.paths import ALL_LINEAR, Pattern, check_pattern


class FrozenMapping(Mapping):
    """An ordered, hashable mapping; equality respects order, because the first match wins.

    >>> FrozenMapping({"a": 1, "b": 2}) == {"b": 2, "a": 1}
    False
    """

    __slots__ = ("_items", "_values")

    def __init__(self, items: Mapping | tuple = ()):
        self._values = dict(items)
        self._items = tuple(self._values.items())

    def __getitem__(self, key: object) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self._items == tuple(other.items())

    def __repr__(self) -> str:
        return repr(dict(self._items))


class Readable:
    """A dataclass whose repr is a call with the fields that differ from their default."""

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self._get_changed_fields().items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Render for treescope, which alone calls this."""
        from treescope import repr_lib  # type: ignore[import-not-found]

        return repr_lib.render_object_constructor(
            type(self), self._get_changed_fields(), path, subtree_renderer, roundtrippable=True
        )

    def _get_changed_fields(self) -> dict[str, Any]:
        """Return the fields that differ from their default, as plain values."""
        default = type(self)()
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        return {name: _to_plain(getattr(self, name)) for name in changed}


def _to_plain(value: Any) -> Any:
    """Return a mapping as a dict, and a single pattern without its tuple."""
    if isinstance(value, FrozenMapping):
        return dict(value)
    is_pattern = isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if is_pattern else value


def normalize_patterns(name: str, value: object) -> tuple[Pattern, ...]:
    """Normalize one pattern or a sequence of them to a tuple."""
    items = (value,) if isinstance(value, str | re.Pattern) else value
    if not isinstance(items, tuple | list | set | frozenset):
        raise ConfigError(
            f"{name} takes a pattern or a sequence of patterns, not {quote_value(value)}"
        )
    items = tuple(sorted(items, key=str) if isinstance(items, set | frozenset) else items)
    for item in items:
        if not isinstance(item, str) or item != ALL_LINEAR:
            check_pattern(item)
    return items


def normalize_pattern_map(name: str, value: object) -> FrozenMapping:
    """Normalize a mapping whose keys are patterns."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} takes a mapping of pattern to value, not {quote_value(value)}")
    for key in value:
        check_pattern(key)
    return FrozenMapping(value)


def normalize_integers(name: str, values: Mapping, what: str) -> FrozenMapping:
    """Normalize a mapping of pattern -> integer or integers to pattern -> tuple."""
    found = {}
    for pattern, value in values.items():
        items = (value,) if isinstance(value, int) else value
        if not isinstance(items, tuple | list) or not all(map(is_index, items)):
            raise ConfigError(
                f"{name}[{quote_value(pattern)}] takes {what} (integers), not {quote_value(value)}"
            )
        found[pattern] = tuple(items)
    return FrozenMapping(found)


def normalize_axis_pairs(name: str, values: Mapping) -> FrozenMapping:
    """Normalize a mapping of pattern -> (fan_in, fan_out) to pattern -> pair of tuples."""
    found = {}
    for pattern, pair in values.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigError(
                f"{name}[{quote_value(pattern)}] takes (fan_in, fan_out), not {quote_value(pair)}"
            )
        named = {"fan_in": pair[0], "fan_out": pair[1]}
        parts = normalize_integers(f"{name}[{quote_value(pattern)}]", named, "axes")
        found[pattern] = tuple(parts.values())
    return FrozenMapping(found)


def to_json(value: object) -> Any:
    """Convert a value of a configuration to plain JSON values."""
    # A regex becomes {"re": pattern}. A mapping with a regex among its keys becomes a list of
    # pairs, because keys of JSON objects are strings.
    if isinstance(value, re.Pattern):
        named = {"re": value.pattern}
        flags = value.flags & ~re.UNICODE
        return {**named, "flags": flags} if flags else named
    if isinstance(value, FrozenMapping):
        if all(isinstance(key, str) for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return [[to_json(key), to_json(item)] for key, item in value.items()]
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def freeze(value: object) -> Any:
    """Convert JSON values to hashable ones: tuples, and mappings with sorted keys."""
    if isinstance(value, Mapping):
        return FrozenMapping({key: freeze(value[key]) for key in sorted(value, key=str)})
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value


def from_json(value: object, budget: RegexBudget, depth: int = 0) -> Any:
    """Convert plain JSON values back, {"re": pattern} to a compiled regex."""
    if isinstance(value, Mapping) and set(value) in ({"re"}, {"re", "flags"}):
        return budget.compile(value)
    if isinstance(value, list | tuple):
        if depth > MAX_DEPTH:
            raise ConfigError(f"a value is nested more than {MAX_DEPTH} deep")
        return tuple(from_json(item, budget, depth + 1) for item in value)
    return value

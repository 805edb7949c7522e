"""Cache keys for static values that `==` does not distinguish: True and 1, 0.0 and -0.0."""

from __future__ import annotations

import collections
import dataclasses
import functools
import struct
from collections.abc import Hashable, Mapping
from typing import Any

import jax

from lowrank_jax._jax.types import TreeDef


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """A static value as part of a cache key.

    jax.jit compares the types of static arguments and then their values: True differs from 1, but
    (True,) equals (1,), and 0.0 equals -0.0. Here all of these differ.

    >>> Static((True,)) == Static((1,)), Static(0.0) == Static(-0.0), Static([1]) == Static([1])
    (False, False, True)
    """

    value: Any

    @functools.cached_property
    def key(self) -> Hashable:
        """The key that is compared and hashed."""
        return make_key(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def make_key(value: object) -> Hashable:
    """Return a key that is equal for two values only if their types and values are, throughout.

    It covers containers, dataclasses that compare by field, and pytree structures (keys of dicts,
    static fields of nodes). Other types are compared by their own `==`.
    """
    kind = type(value)
    if kind is str or kind is int:  # the only keys that are not tuples
        return value
    if isinstance(value, float):
        return kind, struct.pack("d", value)
    if isinstance(value, complex):
        return kind, struct.pack("dd", value.real, value.imag)
    if isinstance(value, tuple | list):
        return kind, tuple(map(make_key, value))
    if isinstance(value, set | frozenset):
        return kind, frozenset(map(make_key, value))
    if isinstance(value, Mapping):
        return kind, tuple((make_key(name), make_key(item)) for name, item in value.items())
    if isinstance(value, jax.tree_util.PyTreeDef):
        return kind, value if has_plain_keys(value) else _make_structure_key(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, value, _make_field_keys(value)
    return kind, value


@functools.lru_cache(maxsize=4096)
def has_plain_keys(treedef: TreeDef) -> bool:
    """Whether a pytree structure has only built-in containers and str keys: its `==` is exact."""
    node = treedef.node_data()
    if node is None:
        return True
    kind, static = node
    if kind in (dict, collections.OrderedDict):
        known = {*map(type, static)} <= {str}
    else:
        known = kind in (list, tuple, type(None)) or hasattr(kind, "_fields")
    return known and all(map(has_plain_keys, treedef.children()))


def _make_structure_key(treedef: TreeDef) -> Hashable:
    """Return the key of a pytree structure: type, static data and children of each node."""
    node = treedef.node_data()
    if node is None:
        return None
    kind, static = node
    return kind, make_key(static), tuple(map(_make_structure_key, treedef.children()))


def _make_field_keys(value: Any) -> Hashable:
    """Return the keys of the fields that a dataclass compares, () if it compares by identity."""
    if type(value).__eq__ is object.__eq__:
        return ()
    keys = []
    for field in dataclasses.fields(value):
        if field.compare:
            key = make_key(getattr(value, field.name))
            try:
                hash(key)
            except TypeError:  # an unhashable field, which the dataclass leaves out of its hash
                key = None
            keys.append(key)
    return tuple(keys)

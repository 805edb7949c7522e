"""Nodes in `flax.serialization`: each as a plain dict of its arrays, and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FLAX = "flax.serialization"
_RENAMED_FIELDS = {"moved": "base_modified"}  # old name -> name today
_WIDE = {"uint4": np.uint8, "int4": np.int8}  # what Flax's msgpack has no dtype for


class Node:
    """What all nodes are; the static fields say what it is, and the others hold arrays.

    Flax looks a type up in a registry, which is the only way in, and this library does not import
    Flax. So the first node of a type that is made once Flax is imported enters the type. (Every
    operation on a tree makes its nodes anew, so only a tree that is older than the import of Flax,
    and not touched since, is unknown to Flax.)
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        flax = sys.modules.get(_FLAX)
        # Flax may be in the middle of its own import
        register = getattr(flax, "register_serialization_state", None)
        if register is not None and not flax.is_serializable(cls):  # type: ignore[union-attr]
            register(cls, to_state, from_state)
        return super().__new__(cls)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or copy the node; a pickle of an older release has the old field names."""
        vars(self).update(with_current_names(state))

    def __repr__(self) -> str:
        """The shapes and dtypes of its arrays, and what differs from the defaults."""
        fields = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]  # type: ignore
        said = [f"{f.name}={_summarize(v)}" for f, v in fields if v is not None and v != f.default]
        return f"{type(self).__name__}({', '.join([*said, *self._extra_repr()])})"

    def _extra_repr(self) -> list[str]:
        """What else its repr says."""
        return []


class Wrapper(Node):
    """A node around one array, or another node, whose shape and dtype it has."""

    @property
    def inner(self) -> Any:
        """What it is around."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.inner.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the leaf."""
        return self.inner.ndim

    @property
    def size(self) -> int:
        """Number of elements of the leaf."""
        return self.inner.size

    @property
    def dtype(self) -> Any:
        """Dtype of the leaf, as it is held."""
        return self.inner.dtype


def _summarize(value: Any) -> str:
    """An array as its dtype and shape: float32[4, 2]."""
    if isinstance(value, Node) or not hasattr(value, "dtype"):
        return repr(value)
    return f"{value.dtype}{[*value.shape]}"


def with_current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a node with those that an older release wrote under today's names.

    >>> with_current_names({"kind": "dot", "moved": True})
    {'kind': 'dot', 'base_modified': True}
    """
    current = dict(fields)
    for old, new in _RENAMED_FIELDS.items():
        if old in current and new not in current:  # with both the node is not one that was written
            current[new] = current.pop(old)
    return current


def list_array_fields(node: Any) -> list[str]:
    """Names of the fields that hold arrays, or trees of them."""
    return [field.name for field in dataclasses.fields(node) if not field.metadata.get("static")]


def to_state(node: Any) -> dict[str, Any]:
    """The arrays of a node by field, as flax.serialization.to_state_dict wants them."""
    convert = sys.modules[_FLAX].to_state_dict
    return {name: convert(_to_plain(getattr(node, name))) for name in list_array_fields(node)}


def from_state(node: Any, state: dict[str, Any]) -> Any:
    """The node with the arrays of such a dict; the static fields are its own."""
    names = list_array_fields(node)
    held = lambda values: {name for name in names if values[name] is not None}
    own = {name: getattr(node, name) for name in names}
    if set(state) != set(names) or held(state) != held(own):
        raise ValueError(
            f"a {type(node).__name__} with the arrays {sorted(held(own))} cannot take those of "
            f"{sorted(name for name in state if state[name] is not None)}, at "
            f"{sys.modules[_FLAX].current_path()}: make the target by the config of the state"
        )
    convert = sys.modules[_FLAX].from_state_dict
    parts = {
        name: _restore_dtype(own[name], convert(own[name], state[name], name=name))
        for name in names
    }
    return dataclasses.replace(node, **parts)


def _to_plain(value: Any) -> Any:
    """A typed key as its data, 4-bit integers in a byte each; all else as it is."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(value, Node):
        return value
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value.astype(_WIDE[dtype.name]) if dtype.name in _WIDE else value


def _restore_dtype(own: Any, value: Any) -> Any:
    """What `_to_plain` made, as the target has it."""
    dtype = getattr(own, "dtype", None)
    if dtype is None or isinstance(own, Node):
        return value
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(own))
    return value.astype(dtype) if dtype.name in _WIDE else value

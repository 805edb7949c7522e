"""The base class of nodes: registration with `flax.serialization`, pickling, repr."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import make_not_lifted_error

_FLAX = "flax.serialization"
_RENAMED_FIELDS = {"moved": "base_modified"}  # old name -> name today
_WIDE = {"uint4": np.uint8, "int4": np.int8}  # dtypes that Flax's msgpack cannot hold -> wider ones


class Node:
    """Base class of all nodes: static fields describe the node, the other fields hold arrays."""

    def __new__(cls, *args: object, **kwargs: object):
        # Flax serializes types in its registry only, and this library does not import Flax. So the
        # first node of a type that is created after Flax was imported registers the type. Every
        # operation on a tree creates new nodes; only a tree that is older than the import of Flax,
        # and not mapped over since, is unknown to Flax.
        flax = sys.modules.get(_FLAX)
        # None while Flax itself is being imported
        register = getattr(flax, "register_serialization_state", None)
        if register is not None and not flax.is_serializable(cls):  # type: ignore[union-attr]
            register(cls, to_state, from_state)
        return super().__new__(cls)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle or copy the fields of the node alone."""
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or copy the node; a pickle of an older release has the old field names."""
        vars(self).update(with_current_names(state))

    def __jax_array__(self) -> Any:
        """Raise the error of a node that is used as an array."""
        raise make_not_lifted_error(f"a {type(self).__name__} node")

    def _refuse_arithmetic(self, *_: object) -> Any:
        """Raise the same error where Python would say that a node has no such operator."""
        return self.__jax_array__()

    # x @ node calls __jax_array__; these are node @ x, and node[...] as Flax NNX reads a variable
    __getitem__ = __matmul__ = __mul__ = __add__ = __sub__ = __truediv__ = _refuse_arithmetic
    __iter__ = None  # iter() would index the node: it raises TypeError, as iter() of any object

    def __repr__(self) -> str:
        """Show the node in a line: what describes it, and dtypes and shapes instead of arrays."""
        shown = [f"{name}={_summarize(value)}" for name, value in self._get_shown_fields().items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Render for treescope, which alone calls this."""
        from treescope import repr_lib  # type: ignore[import-not-found]

        return repr_lib.render_object_constructor(
            type(self), self._get_shown_fields(), path, subtree_renderer, roundtrippable=False
        )

    def _get_shown_fields(self) -> dict[str, Any]:
        """Return what a reader wants to know: by default, fields that differ from their default."""
        fields = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]  # type: ignore
        return {f.name: v for f, v in fields if v is not None and v != f.default}


class Wrapper(Node):
    """A node around an array or another node; it has the shape and dtype of that."""

    @property
    def inner(self) -> Any:
        """The wrapped array or node."""
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
        """Dtype of the wrapped array or node."""
        return self.inner.dtype


def _summarize(value: Any) -> str:
    """Format an array as its dtype and shape, float32[4, 2], and any other value by repr."""
    if isinstance(value, Node) or not hasattr(value, "dtype"):
        return repr(value)
    return f"{value.dtype}{[*value.shape]}"


def with_current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a node with the names of an older release replaced by the current ones.

    >>> with_current_names({"kind": "dot", "moved": True})
    {'kind': 'dot', 'base_modified': True}
    """
    current = dict(fields)
    for old, new in _RENAMED_FIELDS.items():
        if old in current and new not in current:  # no release wrote both
            current[new] = current.pop(old)
    return current


def list_array_fields(node: Node) -> list[str]:
    """List the names of the fields that hold arrays or trees of arrays."""
    fields = dataclasses.fields(node)  # type: ignore[arg-type]
    return [field.name for field in fields if not field.metadata.get("static")]


def to_state(node: Node) -> dict[str, Any]:
    """Convert a node to a dict of its arrays by field, for flax.serialization.to_state_dict."""
    convert = sys.modules[_FLAX].to_state_dict
    return {name: convert(_to_plain(getattr(node, name))) for name in list_array_fields(node)}


def from_state(node: Node, state: dict[str, Any]) -> Any:
    """Return the node with the arrays of a dict by `to_state`; it keeps its static fields.

    Raises:
      ValueError: state does not hold the arrays that the node has.
    """
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
    return dataclasses.replace(node, **parts)  # type: ignore[type-var]


def _to_plain(value: Any) -> Any:
    """Convert typed PRNG keys to their data and 4-bit integers to bytes, as msgpack requires."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(value, Node):
        return value
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value.astype(_WIDE[dtype.name]) if dtype.name in _WIDE else value


def _restore_dtype(own: Any, value: Any) -> Any:
    """Undo `_to_plain`: convert value to the dtype of the target's array."""
    dtype = getattr(own, "dtype", None)
    if dtype is None or isinstance(own, Node):
        return value
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(own))
    return value.astype(dtype) if dtype.name in _WIDE else value

"""What a checkpoint's manifest says of each leaf, and whether it fits the trees it meets."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, listing
from lowrank_jax._fingerprint import (
    Fingerprint,
    differences,
    fingerprint,
    to_host,
)
from lowrank_jax._nodes import Adapted, Full, LowRank, is_node
from lowrank_jax._paths import flatten

_NODES = {"LowRank": LowRank, "Full": Full}
_SCALARS = {"bool": bool, "int": int, "float": float}
_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


@dataclasses.dataclass(frozen=True)
class _Array:
    """A saved array, not yet read: its name in the archive, and what it is to become."""

    name: str
    form: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        """Number of axes: a node that holds entries knows its dense shape."""
        return len(self.shape)


# What a tree holds, by path


def nodes_of(lora: Any) -> dict[str, Any]:
    """The nodes of an adapter by path."""
    nodes = dict(flatten(lora, is_leaf=is_node)[0])
    for path, node in nodes.items():
        if not isinstance(node, LowRank | Full):
            hint = "lowrank.partition(tree)[1]" if isinstance(node, Adapted) else "init's second"
            raise CheckpointError(
                f"lora holds {type(node).__name__} at {path!r}, where LowRank, Full or None is "
                f"expected: pass the adapter ({hint})"
            )
    if not nodes:
        raise CheckpointError("lora holds no adapter: pass the second result of init")
    return nodes


def parts_of(nodes: dict[str, Any]) -> dict[str, Any]:
    """The arrays of nodes, by path and field."""
    return {
        f"{path}/{field.name}": getattr(node, field.name)
        for path, node in nodes.items()
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and getattr(node, field.name) is not None
    }


def in_structure(tree: Any, leaves: dict[str, Any], is_leaf: Any = None) -> Any:
    """A tree's structure with these at its leaves, None where there is none."""
    own, treedef = flatten(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, [leaves.get(path) for path, _ in own])


def nested(leaves: dict[str, Any]) -> Any:
    """Nested dicts by path; the leaf itself where the tree was one leaf."""
    if set(leaves) == {""}:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inner = tree
        for key in parents:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise CheckpointError(f"{path!r} is a leaf and a branch (a '/' in a key): rename it")
        inner[last] = leaf
    return tree


def dense_shapes(nodes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves that nodes are for, without the axis of a stack of adapters."""
    extra = [
        node.a.ndim - 1 - len(node.stack) - len(node.fan_in)
        for node in nodes.values()
        if isinstance(node, LowRank)
    ]
    cut = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[max(extra, default=0) :], jnp.float32)
    return {path: jax.tree.map(cut, node).shape for path, node in nodes.items()}


# Entries of the manifest


def write_entry(name: str, leaf: Any, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Put a leaf's values among the arrays; return its entry."""
    name = quote(name, errors="surrogatepass")
    arrays[name] = to_host(name, leaf)
    return {"name": name, "form": _form(leaf)}


def _form(leaf: Any) -> str:
    """What an array is to become again: a JAX array (weakly typed or not), a PRNG key, a number."""
    dtype = getattr(leaf, "dtype", None)
    if type(leaf).__name__ in _SCALARS:
        return type(leaf).__name__
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return str(dtype)
    return "weak" if getattr(leaf, "weak_type", False) and not leaf.shape else "array"


def read_entry(entry: Mapping, body: Mapping) -> _Array:
    """The array of an entry."""
    if entry["form"] not in {"array", "weak", *_SCALARS, *_KEYS}:
        raise CheckpointError(
            f"{entry['name']!r} is a {entry['form']!r}, unknown to this lowrank_jax"
        )
    shape, dtype, _ = body["arrays"][entry["name"]]
    if entry["form"] in _KEYS:  # what it will be, not the words it is stored as
        shape, dtype = shape[:-1], entry["form"]
    return _Array(entry["name"], entry["form"], tuple(shape), dtype)


def write_node(path: str, node: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The entry of a node: its path, type, static fields and arrays."""
    parts = parts_of({"": node}).items()
    return {
        "path": path.split("/"),
        "type": type(node).__name__,
        "static": _static(type(node), vars(node)),
        "arrays": {
            name[1:]: write_entry(f"lora/{path}{name}", leaf, arrays) for name, leaf in parts
        },
    }


def read_node(entry: Mapping, body: Mapping) -> Any:
    """The node of an entry, holding arrays not yet read."""
    kind = _NODES[entry["type"]]
    arrays = {name: read_entry(part, body) for name, part in entry["arrays"].items()}
    return kind(**arrays, **_static(kind, entry["static"]))


def _static(kind: type, values: Mapping) -> dict[str, Any]:
    """The static fields of a node, as plain values of the fields' own types."""
    plain = {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("static"):
            value, default = values[field.name], field.default
            axes = isinstance(default, tuple)
            plain[field.name] = (
                tuple(operator.index(axis) for axis in value) if axes else type(default)(value)
            )
    return plain


def loaded(entry: _Array, array: np.ndarray, sharding: Any) -> Any:
    """The leaf of an array: placed by a sharding if there is one."""
    if entry.form in _SCALARS:
        return _SCALARS[entry.form](array)
    if entry.form in _KEYS:
        leaf = jax.random.wrap_key_data(jnp.array(array), impl=_KEYS[entry.form])
    elif jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64-bit numbers, of NumPy, in a program of 32-bit ones
    else:
        leaf = jnp.asarray(array.item()) if entry.form == "weak" else jnp.array(array)
        leaf = leaf if leaf.dtype == array.dtype else jnp.array(array)
    return leaf if sharding is None else jax.device_put(leaf, sharding)


# Checks: all that is wrong, in one error


def _refuse(why: str, problems: list[str]) -> None:
    """Raise one error with all problems, if there are any."""
    if problems:
        raise CheckpointError(f"{why}:\n{listing(problems)}")


def refuse_misshapen(nodes: dict[str, Any], base: Any) -> None:
    """The adapter's leaves are the base's, and of their shapes."""
    leaves = dict(flatten(base, is_leaf=is_node)[0])
    if adapted := [p for p, leaf in leaves.items() if isinstance(leaf, LowRank | Full | Adapted)]:
        raise CheckpointError(
            f"base holds an adapter at {adapted[0]!r}: pass the frozen tree (lowrank.partition "
            "takes a combined one apart)"
        )
    _refuse(
        "the adapter does not fit the base: pass the base it was trained on, at the same level",
        differences(
            {path: str(np.shape(leaves[path])) for path in nodes if path in leaves},
            {path: str(shape) for path, shape in dense_shapes(nodes).items()},
        ),
    )


def refuse_other_base(nodes: dict[str, Any], trained_on: Any, base: Any, check: bool) -> None:
    """The base is the one trained on, as far as that is known."""
    if check and trained_on is not None:
        own = base if isinstance(base, Fingerprint) else fingerprint(base)
        _refuse(
            "this base is not the one the adapter was trained on: pass that one, or "
            "check_base=False to take this one all the same",
            trained_on.differences(own),
        )
    if not isinstance(base, Fingerprint):
        refuse_misshapen(nodes, base)


def static_differences(wanted: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Differences in axes, kind and scale of the nodes that both have."""
    both = {path for path in wanted if type(saved.get(path)) is type(wanted[path])}
    show = lambda nodes: {
        f"{path}.{name}": repr(value)
        for path in both
        for name, value in _static(type(nodes[path]), vars(nodes[path])).items()
    }
    return differences(show(wanted), show(saved))


def fitted(what: str, wanted: dict[str, Any], saved: dict[str, Any], more: Any = ()) -> dict:
    """Refuse saved leaves that are not those wanted; return the shardings wanted, by name."""
    wanted = {p: np.asarray(v) if _form(v) in _SCALARS else v for p, v in wanted.items()}
    show = lambda leaves: {p: f"{leaf.dtype}{list(leaf.shape)}" for p, leaf in leaves.items()}
    _refuse(
        f"the saved {what} is not that of like.{what}: restore without it and convert, or make it "
        "by the config and optimizer of the checkpoint",
        differences(show(wanted), show(saved)) + list(more),
    )
    # an uncommitted array is where it is by default only
    placed = {
        p: getattr(v, "sharding", None) for p, v in wanted.items() if getattr(v, "committed", True)
    }
    return {saved[path].name: sharding for path, sharding in placed.items()}

"""Shardings of leaves on their devices: resolved from the caller's, or read from the arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import NamedSharding, P

from lowrank_jax._errors import TreeError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.processes import place_array
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Normed, is_node, strip_norms
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._trees.annotations import count_named_axes, read_specs
from lowrank_jax._trees.specs import derive_specs, specs


def shard_leaf(path: str, leaf: PyTree, sharding: jax.sharding.Sharding | None) -> Any:
    """Return the shardings of a leaf's arrays, given that of the dense leaf; None for None."""
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding):
        return specs({path: leaf}, {path: sharding})[path]
    return jax.tree.map(lambda _: sharding, leaf)


def resolve_shardings(tree: PyTree, shardings: PyTree) -> Any:
    """Return the tree with a NamedSharding in place of every array.

    Args:
      tree: dense or quantized parameters, or their shapes.
      shardings: like `dense_specs` of `specs`, but on a mesh: that of its NamedShardings, or of
        jax.set_mesh for PartitionSpecs.

    Raises:
      TreeError: a leaf has no sharding, or cannot be sharded so; there is no mesh, or several.
    """
    given = read_specs(shardings, None, "shardings")
    meshes = {spec.mesh for spec in given.values() if isinstance(spec, NamedSharding)}
    if not meshes and not (mesh := jax.sharding.get_mesh()).empty:
        meshes = {mesh}
    if len(meshes) != 1:
        raise TreeError(
            f"shardings are on {len(meshes)} meshes: pass a tree of jax.NamedSharding on one mesh, "
            "like the parameters, or PartitionSpecs within jax.set_mesh(mesh)"
        )
    (mesh,) = meshes
    on_mesh = {
        path: spec if isinstance(spec, NamedSharding) else NamedSharding(mesh, spec or P())
        for path, spec in given.items()
    }
    return derive_specs(tree, on_mesh, count_named_axes(shardings), "shardings")


def place_tree(tree: PyTree, shardings: PyTree) -> Any:
    """Place parameters on the devices of `shardings`, given as to `resolve_shardings`.

    Of a NumPy array, memory-mapped or not, only the shards of this process are copied. Shapes get
    the sharding as theirs.
    """
    return jax.tree.map(place_leaf, tree, resolve_shardings(tree, shardings))


def place_leaf(leaf: Any, sharding: NamedSharding) -> Any:
    """Place one array, or give a shape its sharding; what is not an array stays as it is."""
    if not hasattr(leaf, "dtype"):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if jaxprs.is_tracer(leaf):
        return _place_tracer(leaf, sharding)
    if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
        leaf = leaf.astype(leaf.dtype.newbyteorder("="))
    return place_array(leaf, sharding)


def place_like(array: jax.Array, leaf: Any, sharding: NamedSharding | None = None) -> Any:
    """Place an array of a leaf's shape as the leaf; see place_node."""
    sharding = sharding or find_sharding(leaf)
    return array if sharding is None else place_leaf(array, sharding)


def _place_tracer(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Shard a traced array by its type along explicit mesh axes, by a constraint along the rest.

    Raises:
      TreeError: an axis is split along both, and the explicit mesh axes are not first.
    """
    # On the mesh ("data" explicit, "model" auto), P(("data", "model"), None) is resharded to
    # P("data", None) and constrained to P("model", None): the constraint divides each shard further
    mesh, spec = sharding.mesh, sharding.spec
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {name for name, kind in kinds.items() if kind == jax.sharding.AxisType.Explicit}
    if explicit in ({*kinds}, set()):
        place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        return place(array, sharding)
    typed = P(*(_select_names(entry, explicit) for entry in spec))
    rest = P(*(_select_names(entry, {*kinds} - explicit) for entry in spec))
    for entry, *parts in zip(spec, typed, rest, strict=True):
        order = tuple(name for part in parts for name in _list_names(part))
        if order != _list_names(entry):
            raise TreeError(
                f"an array of shape {array.shape} is to be split by {spec}, and an array inside "
                "jax.jit first along the explicit axes of its mesh, then along the others: write "
                f"{order} for {entry}"
            )
    if any(typed) or jaxprs.is_split(array):
        array = jax.sharding.reshard(array, NamedSharding(mesh, typed))
    rest = NamedSharding(mesh, rest, memory_kind=sharding.memory_kind)
    return jax.lax.with_sharding_constraint(array, rest)


def _list_names(entry: Any) -> tuple[Any, ...]:
    """List the mesh axes of an entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _select_names(entry: Any, names: set[str]) -> Any:
    """Return an entry of a PartitionSpec with the mesh axes of names alone."""
    return tuple(name for name in _list_names(entry) if name in names) or None


def find_sharding(leaf: Any) -> NamedSharding | None:
    """Return the NamedSharding of the dense leaf if its arrays lie on several devices, else None.

    A leaf stored flat keeps that of its stack axes. Of a tracer nothing is known.
    """
    leaf = strip_norms(leaf)
    array = leaf.codes if isinstance(leaf, Quantized) else leaf
    if jaxprs.is_tracer(array) or not getattr(array, "committed", True):
        return None
    own = getattr(array, "sharding", None)
    if not isinstance(own, NamedSharding) or own.mesh.size < 2:
        return None
    return _to_dense(leaf, own)


def find_dense_shardings(tree: PyTree, resolved: PyTree) -> dict[str, NamedSharding]:
    """Return path -> sharding of the dense leaf, from the shardings of the arrays of each leaf."""
    own, given = (flatten(part, is_leaf=is_node)[0] for part in (tree, resolved))
    found = {}
    for (path, leaf), (_, place) in zip(own, given, strict=True):
        leaf, place = strip_norms(leaf), strip_norms(place)
        found[path] = _to_dense(leaf, place.codes if isinstance(leaf, Quantized) else place)
    return found


def _to_dense(leaf: Any, sharding: NamedSharding) -> NamedSharding:
    """Return the sharding of the dense leaf, from that of the array or of its codes."""
    if not isinstance(leaf, Quantized):
        return sharding
    entries = dict(zip(leaf.labels, sharding.spec, strict=False))
    spec = P(*(entries.get(axis) for axis in range(leaf.ndim)))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def find_constraint(leaf: Any, sharding: NamedSharding | None = None) -> NamedSharding | None:
    """Return the sharding of the dense leaf, if a compiled function may be constrained to it.

    Explicit mesh axes are in the types of the arrays, and allow no constraint.

    sharding: as for place_node.
    """
    sharding = sharding or find_sharding(leaf)
    kinds = () if sharding is None else sharding.mesh.axis_types
    return sharding if jax.sharding.AxisType.Auto in kinds else None


def place_node(path: str, node: Any, leaf: Any, sharding: NamedSharding | None = None) -> Any:
    """Place an adapter node as the leaf that it belongs to, if that lies on several devices.

    sharding: that of the dense leaf, if it is given; else that of the leaf, if it is known.
    """
    if sharding is None and any(map(jaxprs.is_tracer, jax.tree.leaves(node))):
        return node
    sharding = sharding or find_sharding(leaf)
    if sharding is None or not is_node(node):
        return node
    return jax.tree.map(place_leaf, node, shard_leaf(path, node, sharding))


def place_norms(path: str, leaf: Any, sharding: NamedSharding | None = None) -> Any:
    """Place the squared norms of a leaf, if it has some, as the leaf itself; see place_node."""
    if not isinstance(leaf, Normed) or (sharding is None and jaxprs.is_tracer(leaf.squares)):
        return leaf
    sharding = sharding or find_sharding(leaf)
    if sharding is None:
        return leaf
    at = shard_leaf(path, leaf, sharding).squares
    return dataclasses.replace(leaf, squares=place_leaf(leaf.squares, at))

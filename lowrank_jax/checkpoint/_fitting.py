"""Check that a checkpoint's nodes and arrays fit the base and the trees they are restored to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import UNADAPTED, LowRank, find_adapters, is_node
from lowrank_jax._nodes.family import Rows
from lowrank_jax._trees.fingerprint import Fingerprint, fingerprint, list_differences
from lowrank_jax.checkpoint._entries import collect_arrays, get_static_fields, raise_problems


def compute_dense_shapes(nodes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the dense weights' shapes, without the leading axis of a stack of adapters."""
    extra = max((n.adapters for n in nodes.values() if isinstance(n, LowRank)), default=0)
    cut = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[extra:], jnp.float32)
    return {path: jax.tree.map(cut, node).shape for path, node in nodes.items()}


# Checks: each lists all problems in one error


def refuse_malformed(nodes: dict[str, Any]) -> None:
    """Check that the arrays of each adapter match its axes, and agree on their sizes."""
    shown = lambda node: ", ".join(
        f"{name[1:]} {tuple(part.shape)}" for name, part in collect_arrays({"": node}).items()
    )
    raise_problems(
        "lora holds arrays that do not fit each other or their axes: make it by init",
        [
            f"{path}: {shown(node)} of {node.kind!r} with stack {node.stack}, fan_in {node.fan_in} "
            f"and fan_out {node.fan_out}"
            for path, node in nodes.items()
            if isinstance(node, LowRank) and not _is_well_formed(node)
        ],
    )


def _is_well_formed(node: LowRank) -> bool:
    """Whether a node's arrays are the factors of one weight."""
    # Each axis of an array is labeled by the weight's axis that it is, or by "r" for the rank.
    # With fan_in (0,) and fan_out (1,), a [4, 2] has the labels (0, "r") and b [2, 3] ("r", 1),
    # which gives the pairs (0, 4), ("r", 2), (1, 3). No label may have two sizes. Leading axes
    # without a label are those of a stack of adapters; all arrays have the same number of them.
    axes = node.stack + node.fan_in + node.fan_out
    labeled = node.array_labels
    if not {*node.required} <= labeled.keys() <= {*node.required, "magnitude"}:
        return False
    parts = [(getattr(node, name), labels) for name, labels in labeled.items()]
    many = node.adapters
    fits = all(part.ndim - len(labels) == many >= 0 for part, labels in parts)
    pairs = {
        pair
        for part, labels in parts
        for pair in zip([*(("many", n) for n in range(many)), *labels], part.shape, strict=False)
    }
    if isinstance(node, Rows):
        pairs.add((None, len(node.rows)))
        fits = fits and all(0 <= row < node.size for row in node.rows)
    return (
        sorted(axes) == list(range(len(axes)))
        and fits
        and len(pairs) == len({label for label, _ in pairs})
        and node.kind in ("dot", "conv", "lookup")
    )


def refuse_misshapen(nodes: dict[str, Any], base: PyTree) -> None:
    """Check that the adapter's leaves are in the base, with the same shapes."""
    leaves = dict(flatten(base, is_leaf=is_node)[0])
    if adapted := find_adapters(leaves.items()):
        raise CheckpointError(f"base holds an adapter at {adapted[0]!r}: pass {UNADAPTED}")
    raise_problems(
        "the adapter does not fit the base: pass the base it was trained on, at the same level",
        list_differences(
            {path: str(np.shape(leaves[path])) for path in nodes if path in leaves},
            {path: str(shape) for path, shape in compute_dense_shapes(nodes).items()},
        ),
    )


def refuse_other_base(
    nodes: dict[str, Any], trained_on: Fingerprint | None, base: PyTree, check: bool
) -> None:
    """Check that the base is the one trained on, if its fingerprint is known."""
    if check and trained_on is not None:
        own = base if isinstance(base, Fingerprint) else fingerprint(base)
        raise_problems(
            "this base is not the one the adapter was trained on: pass that one, or "
            "check_base=False to use this one anyway",
            trained_on.differences(own),
        )
    if not isinstance(base, Fingerprint):
        refuse_misshapen(nodes, base)


def compare_static_fields(wanted: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """List the differences in static fields (axes, kind, scale, dtype) of nodes that both have."""
    both = {path for path in wanted if type(saved.get(path)) is type(wanted[path])}
    show = lambda nodes: {
        f"{path}.{name}": repr(value)
        for path in both
        for name, value in get_static_fields(type(nodes[path]), vars(nodes[path])).items()
        if name != "base_modified"  # a property of the saved base, which a new init cannot know
    }
    return list_differences(show(wanted), show(saved))


def match_leaves(
    what: str, wanted: dict[str, Any], saved: dict[str, Any], more: Iterable[str] = ()
) -> dict:
    """Check that saved leaves match the wanted ones; return the latter's shardings, by name."""
    wanted = {p: v if hasattr(v, "dtype") else np.asarray(v) for p, v in wanted.items()}
    # arrays without elements, which older releases saved, are ignored
    saved = {p: v for p, v in saved.items() if p in wanted or 0 not in v.shape}
    show = lambda leaves: {p: f"{leaf.dtype}{list(leaf.shape)}" for p, leaf in leaves.items()}
    raise_problems(
        f"the saved {what} does not match like.{what}: restore without it and convert, or make it "
        "with the config and optimizer of the checkpoint",
        list_differences(show(wanted), show(saved)) + list(more),
    )
    # the sharding of an uncommitted array is only the default: it is not asked for
    placed = {
        p: getattr(v, "sharding", None) for p, v in wanted.items() if getattr(v, "committed", True)
    }
    raise_problems(
        f"like.{what} has shardings that do not fit: give ones that divide the saved shapes",
        [
            f"{path}: {saved[path].dtype}{list(saved[path].shape)} by {sharding}"
            for path, sharding in placed.items()
            if sharding is not None and not _can_divide(sharding, saved[path].shape)
        ],
    )
    return {saved[path].name: sharding for path, sharding in placed.items()}


def _can_divide(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> bool:
    """Whether a sharding can split an array of the given shape."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True

"""Which mesh axes split the fan-in of a weight inside shard_map, as far as types tell it.

DoRA's norm is of the whole fan-in. Inside shard_map a device holds a part of the weight, and the
type of an array tells the mesh axes along which devices may hold different values, but not what
differs: a part of fan-in or of fan-out, another layer, or nothing, after an all_gather.
"""

from __future__ import annotations

import itertools
import math

import jax

from lowrank_jax._errors import TreeError
from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.adapted import Leaf, Normed, find_frozen
from lowrank_jax._nodes.low_rank import LowRank


def find_fan_in_axes(leaf: Normed, node: LowRank) -> tuple[str, ...] | None:
    """Return the mesh axes that split the fan-in: () if it is whole, None if types do not tell."""
    # The number of terms says how many parts there are: 16 here of 128 are 8 parts. W and a are
    # different in each part, so the axes are among those both vary along: of "data" 2, "stage" 4
    # and "model" 4, 8 parts may be those of ("data", "stage") or of ("data", "model"), which is not
    # known; 16 parts of ("stage", "model") would be.
    here = _count_fan_in(leaf, node)
    if here == leaf.terms:
        return ()
    parts, rest = divmod(leaf.terms, here)
    varying = _find_common_axes((find_frozen(leaf), node.a))
    if rest or varying is None:
        return None
    sizes = jaxprs.get_manual_axes()
    known = sorted(name for name in varying if sizes[name] > 1)
    sets = [
        names
        for count in range(1, len(known) + 1)
        for names in itertools.combinations(known, count)
        if math.prod(sizes[name] for name in names) == parts
    ]
    return sets[0] if len(sets) == 1 else None


def get_fan_in_error(leaf: Leaf, node: LowRank) -> str | None:
    """Explain why the norms of W + s a b cannot be computed here, or return None if they can."""
    if isinstance(leaf, Normed):
        if find_fan_in_axes(leaf, node) is not None:
            return None
        return (
            f"here are {_count_fan_in(leaf, node)} of the {leaf.terms} weights of each output "
            "feature, DoRA's norm is of all of them, and types do not tell along which mesh axes "
            "the others are; inside shard_map leave check_vma=True, split other axes, or lift the "
            "function that shard_map returned"
        )
    varying = _find_common_axes((find_frozen(leaf), node.a))
    if varying is not None and not varying:
        return None
    return (
        "DoRA's norm is of all weights of an output feature, and inside shard_map or pmap a device "
        "may have a part of them; pass the base that init returned, or one from "
        "lowrank.partition(lowrank.combine(base, lora)) outside, which hold the norms"
    )


def check_fan_in(leaf: Leaf, node: LowRank, path: str) -> None:
    """Raise TreeError if the types do not determine the norms of W + s a b inside shard_map."""
    if node.magnitude is None or node.folded:
        return
    if problem := get_fan_in_error(leaf, node):
        raise TreeError(f"{path!r}: {problem}")


def check_is_whole(leaf: Leaf, path: str) -> None:
    """Raise TreeError if a device may have a part of a leaf, so that its norms are not known."""
    varying = [jaxprs.find_varying_axes(array) for array in jax.tree.leaves(leaf)]
    if any(axes is None or axes for axes in varying):
        raise TreeError(
            f"{path!r}: DoRA's magnitude is the norm of each output feature, and inside shard_map "
            "or pmap a device may have a part of its weights; call init outside, or under jax.jit "
            "with shardings"
        )


def _count_fan_in(leaf: Leaf, node: LowRank) -> int:
    """Count the weights of an output feature on this device."""
    fan_in, _, _ = node.for_shape(leaf.shape).axes(leaf.ndim)
    return math.prod(leaf.shape[axis] for axis in fan_in)


def _find_common_axes(tree: object) -> frozenset[str] | None:
    """Return the mesh axes along which all arrays of a tree vary, None if types do not tell."""
    found = [jaxprs.find_varying_axes(array) for array in jax.tree.leaves(tree)]
    known = [axes for axes in found if axes is not None]
    return frozenset.intersection(*known) if len(known) == len(found) else None

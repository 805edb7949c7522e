"""Checks of a node before use: it has a base, and arrays that fit the base and each other."""

from __future__ import annotations

import math

from lowrank_jax import _codecs
from lowrank_jax._errors import TreeError
from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes import Adapted, Full, LowRank, strip_norms
from lowrank_jax._nodes.family import Rows
from lowrank_jax._nodes.fan_in import check_fan_in
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.serialization import Node
from lowrank_jax._primitives.contract import RANK


def check_node(node: Node, path: str) -> None:
    """Raise TreeError if a node has no base or its arrays do not fit the base or each other."""
    if isinstance(node, LowRank):
        raise TreeError(
            f"{path!r} is a LowRank adapter without its base: pass lowrank.combine(base, lora) to "
            "the lifted function"
        )
    node = strip_norms(node)
    if isinstance(node, Quantized):
        _check_codes(node, path)
    if not isinstance(node, Adapted):
        return
    check_node(node.base, path)
    delta = node.delta
    if not isinstance(delta, LowRank | Full):
        raise TreeError(f"{path!r} holds an Adapted node whose delta is {type(delta).__name__}")
    if not delta.fits(node.base.shape):
        raise TreeError(
            f"{path!r}: the adapter is for shape {tuple(delta.shape)}, the base has "
            f"{tuple(node.base.shape)}; it belongs to another model"
        )
    if isinstance(delta, LowRank):
        _check_ranks(delta, path)
        if delta.magnitude is not None:
            _check_magnitude(node, delta, path)
            check_fan_in(node.base, delta, path)


def _check_codes(leaf: Quantized, path: str) -> None:
    """Raise TreeError if a loop or vmap removed an axis of the codes that is not a leading one."""
    # Codes [12, 2, 64, 6] with one trailing axis have the elements of a block, 64, at axis 2.
    # Looped over axis 0 they are [2, 64, 6], with the elements at axis 1 as computed from the
    # number of axes. Looped over the last axis they are [12, 2, 64], where axis 1 has size 2.
    halved = _codecs.get_format(leaf.format).is_packed and leaf.packing == "uint8"
    place, elements = leaf.leading + 1, leaf.block_size // (2 if halved else 1)
    codes, blocks = tuple(leaf.codes.shape), -(-math.prod(leaf.blocked) // leaf.block_size)
    fits = place > 0 and codes[place] == elements
    if fits and not jaxprs.is_manual():  # inside shard_map a device has only some of the blocks
        fits = codes[place - 1] == blocks
    if not fits or tuple(leaf.scales.shape) != codes[:place] + codes[place + 1 :]:
        raise TreeError(
            f"{path!r}: codes of shape {codes} with {leaf.trailing} axes after those of blocks of "
            f"{leaf.block_size} have no such blocks: a loop or vmap took away an axis of the "
            "weight that is not its first; put the loop inside the lifted function"
        )


def _check_ranks(delta: LowRank, path: str) -> None:
    """Raise TreeError if the ranks of a and b differ, or trained rows and their changes do."""
    if isinstance(delta, Rows) and delta.b.shape[0] != delta.rank:
        raise TreeError(
            f"{path!r}: changes of shape {delta.b.shape} for {delta.rank} rows of a table; they "
            "belong to different adapters"
        )
    axes = delta.array_labels
    if RANK not in axes.get("a", ()) or RANK not in axes.get("b", ()):
        return
    size = lambda array, labels: array.shape[labels.index(RANK) - len(labels)]
    outer, inner = size(delta.a, axes["a"]), size(delta.b, axes["b"])
    if inner != outer:
        raise TreeError(
            f"{path!r}: a of shape {delta.a.shape} has rank {outer}, but b of shape "
            f"{delta.b.shape} has rank {inner}; they belong to different adapters"
        )


def _check_magnitude(node: Adapted, delta: LowRank, path: str) -> None:
    """Raise TreeError if the magnitude or the stored norm does not fit the output features."""
    _, fan_out, stack = delta.for_shape(node.base.shape).axes(node.base.ndim)
    sizes = lambda axes: tuple(node.base.shape[axis] for axis in axes)
    if tuple(delta.magnitude.shape) != sizes((*stack, *fan_out)):
        raise TreeError(
            f"{path!r}: DoRA's magnitude has shape {tuple(delta.magnitude.shape)}, but the output "
            f"features of the base have {sizes((*stack, *fan_out))}; it belongs to another model"
        )

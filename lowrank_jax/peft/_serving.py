"""Adapt an adapter to inference servers, which read LoRA factors of one rank and one scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._nodes import Adapted, Full, LowRank, attach_norms
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._nodes.padding import pad_rank
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._operators.materialize import materialize


def describe_unservable(node: LowRank | Full) -> str:
    """Describe a node that servers do not support; "" for one that they support."""
    if isinstance(node, Full):
        return "trained whole"
    if (label := get_label(node)) != "LoRA":
        return label
    return "a convolution" if node.kind == "conv" else ""


@jax.jit
def fold_into(leaf: jax.Array | Quantized, node: LowRank | Full) -> jax.Array:
    """Merge a leaf and its adapter into a dense leaf."""
    if isinstance(node, Full):
        return jnp.array(node.weight, leaf.dtype, copy=True)  # the adapter may be donated
    with_norms = isinstance(node, LowRank) and node.magnitude is not None and not node.folded
    return materialize(Adapted(attach_norms(leaf, node) if with_norms else leaf, node))


def unify_factors(
    nodes: dict[str, LowRank | Full], ranks: Sequence[int] | None = None
) -> dict[str, Any]:
    """Give all nodes one rank and one scale: pad ranks with zeros, and fold scales into b."""
    if problems := [
        f"{path}: {kind}" for path, node in nodes.items() if (kind := describe_unservable(node))
    ]:
        raise CheckpointError(
            "servers read only LoRA factors; lowrank.peft.servable(base, lora) folds the rest into "
            f"the base, or omit for_serving:\n{list_problems(problems)}"
        )
    factors = {path: node for path, node in nodes.items() if isinstance(node, LowRank)}
    if zero := [path for path, node in factors.items() if not node.scale > 0]:
        raise CheckpointError(
            f"{zero[0]!r}: scale {factors[zero[0]].scale}; PEFT requires alpha > 0"
        )
    rank = find_rank(max(node.rank for node in factors.values()), ranks)
    scale = max(node.scale for node in factors.values())
    return {path: _pad_factors(node, rank, scale) for path, node in factors.items()}


def pad_to_ranks(nodes: dict[str, LowRank | Full], ranks: Sequence[int]) -> dict[str, Any]:
    """Pad the factors of each node with zeros to the next of these ranks."""
    pad = lambda node: _pad_factors(node, find_rank(node.rank, ranks), node.scale)
    return {path: pad(node) if type(node) is LowRank else node for path, node in nodes.items()}


def find_rank(rank: int, ranks: Sequence[int] | None) -> int:
    """Return the smallest of the ranks that is at least rank; rank itself without ranks.

    >>> find_rank(12, [8, 16, 32]), find_rank(12, None)
    (16, 12)
    """
    if ranks is None:
        return rank
    if not (found := [r for r in ranks if r >= rank]):
        raise CheckpointError(
            f"rank {rank} is larger than every one of ranks={[*ranks]}: lowrank.compress(lora, "
            "rank) makes it smaller"
        )
    return min(found)


def _pad_factors(node: LowRank, rank: int, scale: float) -> LowRank:
    """Return a node of the same product with a larger rank and scale."""
    node = pad_rank(node, rank)
    if node.scale == scale:
        return node
    # in a narrower dtype the quotient would be lost by rounding
    b = node.b.astype(jnp.promote_types(node.b.dtype, jnp.float32)) * (node.scale / scale)
    return dataclasses.replace(node, b=b, scale=scale)

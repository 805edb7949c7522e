"""Adapt an adapter to inference servers, which read LoRA factors of one rank and one scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._nodes import Adapted, Full, LowRank, attach_norms
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._operators.materialize import materialize
from lowrank_jax._trees.fingerprint import to_numpy


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


def unify_factors(nodes: dict[str, Any]) -> dict[str, Any]:
    """Give all nodes one rank and one scale: pad ranks with zeros, and fold scales into b."""
    if problems := [
        f"{path}: {kind}" for path, node in nodes.items() if (kind := describe_unservable(node))
    ]:
        raise CheckpointError(
            "servers read only LoRA factors; lowrank.peft.servable(base, lora) folds the rest into "
            f"the base, or omit for_serving:\n{list_problems(problems)}"
        )
    if zero := [path for path, node in nodes.items() if not node.scale > 0]:
        raise CheckpointError(f"{zero[0]!r}: scale {nodes[zero[0]].scale}; PEFT requires alpha > 0")
    rank, scale = max(n.rank for n in nodes.values()), max(n.scale for n in nodes.values())
    return {path: _pad_factors(path, node, rank, scale) for path, node in nodes.items()}


def _pad_factors(path: str, node: LowRank, rank: int, scale: float) -> LowRank:
    """Return a node of the same product with a larger rank and scale."""
    # node of rank 2 and scale 1, stack axes [layers]; rank 3 and scale 2 are wanted:
    #   a [layers, i, 2] -> [layers, i, 3]              padded on the last axis
    #   b [layers, 2, o] -> [layers, 3, o] * (1 / 2)    padded on the axis after the stack
    a, b = to_numpy(path, node.a), to_numpy(path, node.b)
    padding, axis = (0, rank - node.rank), len(node.stack)
    a = np.pad(a, [*[(0, 0)] * (a.ndim - 1), padding])
    b = np.pad(b, [(0, 0) if i != axis else padding for i in range(b.ndim)])
    ratio = b.dtype.type(node.scale / scale)
    return dataclasses.replace(node, a=a, b=b if ratio == 1 else b * ratio, scale=scale)

"""What servers can take of an adapter: LoRA's factors, of one rank and one scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._nodes import Adapted, Full, LowRank, attach_norms
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._operators.materialize import materialize
from lowrank_jax._trees.fingerprint import to_numpy


def describe_unservable(node: Any) -> str:
    """What a node is that servers have not, or ""."""
    if isinstance(node, Full):
        return "trained whole"
    if (label := get_label(node)) != "LoRA":
        return label
    return "a convolution" if node.kind == "conv" else ""


@jax.jit
def fold_into(leaf: Any, node: Any) -> Any:
    """The dense leaf that the two stand for."""
    if isinstance(node, Full):
        return jnp.array(node.weight, leaf.dtype, copy=True)  # the adapter may be donated
    with_norms = isinstance(node, LowRank) and node.magnitude is not None and not node.folded
    return materialize(Adapted(attach_norms(leaf, node) if with_norms else leaf, node))


def unify_factors(nodes: dict[str, Any]) -> dict[str, Any]:
    """The nodes with one rank and one scale: ranks padded with zeros, scales folded into b."""
    if problems := [
        f"{path}: {kind}" for path, node in nodes.items() if (kind := describe_unservable(node))
    ]:
        raise CheckpointError(
            "servers read LoRA's factors alone; lowrank.peft.servable(base, lora) folds the rest "
            f"into the base, or leave for_serving out:\n{list_problems(problems)}"
        )
    if zero := [path for path, node in nodes.items() if not node.scale > 0]:
        raise CheckpointError(f"{zero[0]!r}: scale {nodes[zero[0]].scale}; PEFT's alpha is above 0")
    rank, scale = max(n.rank for n in nodes.values()), max(n.scale for n in nodes.values())
    return {path: _pad_factors(path, node, rank, scale) for path, node in nodes.items()}


def _pad_factors(path: str, node: LowRank, rank: int, scale: float) -> LowRank:
    """The same product with another rank and scale."""
    a, b = to_numpy(path, node.a), to_numpy(path, node.b)
    room, axis = (0, rank - node.rank), len(node.stack)
    a = np.pad(a, [*[(0, 0)] * (a.ndim - 1), room])
    b = np.pad(b, [(0, 0) if i != axis else room for i in range(b.ndim)])
    times = b.dtype.type(node.scale / scale)
    return dataclasses.replace(node, a=a, b=b if times == 1 else b * times, scale=scale)

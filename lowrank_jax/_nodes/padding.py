"""Adapters with factors of a larger rank, padded with zeros."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import ConfigError
from lowrank_jax._nodes.family import LoHa
from lowrank_jax._nodes.low_rank import LowRank
from lowrank_jax._nodes.methods import get_label


def pad_rank(node: LowRank, rank: int) -> LowRank:
    """The same adapter with factors of a larger rank, the new columns of a and rows of b zero.

    The two products of LoHa are padded each: a [*fan_in, 2 r] is two halves side by side. Arrays of
    NumPy stay so.

    Raises:
      ConfigError: the method's padding would be trained, or the rank is smaller.
    """
    if node.rank == rank:
        return node
    if node.rank > rank:
        raise ConfigError(f"an adapter of rank {node.rank} does not fit into rank {rank}")
    halves = {LowRank: 1, LoHa: 2}.get(type(node))
    if halves is None:
        raise ConfigError(
            f"{get_label(node)} of ranks {node.rank} and {rank}: padding would change its fixed "
            "matrices, or be trained; use one rank"
        )
    at = node.b.ndim - 1 - len(node.fan_out)
    return dataclasses.replace(
        node,
        a=_pad_parts(node.a, node.a.ndim - 1, rank, halves),
        b=_pad_parts(node.b, at, rank, halves),
    )


def _pad_parts(array: Any, axis: int, rank: int, parts: int) -> Any:
    """An axis of `parts` equal parts, each padded at its end to this rank."""
    xp = jnp if isinstance(array, jax.Array) else np
    pieces = xp.split(array, parts, axis)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - pieces[0].shape[axis])
    return xp.concatenate([xp.pad(piece, widths) for piece in pieces], axis)

"""How an array with labeled axes follows a reshape of the weight that its labels are of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._primitives.contract import RANK, Labels


def regroup(
    array: jax.Array, labels: Labels, groups: Any, sizes: dict[Any, int]
) -> tuple[jax.Array, Labels] | None:
    """Reshape one factor along with the weight, or None where a group is not wholly its own."""
    mine = []
    for old, new in groups:
        held = [axis for axis in old if axis in labels]
        if held and len(held) < len(old):
            return None
        if held:
            mine.append((old, new))
    known = {axis for old, _ in mine for axis in old}
    rank_first = RANK in labels and labels.index(RANK) == 0
    order = [axis for old, _ in mine for axis in old]
    named = [axis for _, new in mine for axis in new]
    tail = [RANK] if RANK in labels else []
    order, named = (tail + order, tail + named) if rank_first else (order + tail, named + tail)
    unit = tuple(i for i, x in enumerate(labels) if x not in known and x != RANK)
    array = jnp.squeeze(array, unit) if unit else array
    labels = tuple(x for x in labels if x in known or x == RANK)
    if all(len(old) == len(new) == 1 for old, new in mine):
        place = {old[0]: new[0] for old, new in mine}
        return array, tuple(place.get(label, label) for label in labels)
    array = lax.transpose(array, tuple(labels.index(label) for label in order))
    rank = array.shape[order.index(RANK)] if tail else 1
    shape = tuple(rank if label == RANK else sizes[label] for label in named)
    return array.reshape(shape), tuple(named)

"""Reshapes of one labeled array, a factor for example, along with its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._primitives.contract import RANK, Labels
from lowrank_jax._primitives.selected_dot import ENTRY


def regroup(
    array: jax.Array,
    labels: Labels,
    groups: Sequence[tuple[list[int], list[int]]],
    sizes: Mapping[Any, int],
) -> tuple[jax.Array, Labels] | None:
    """Reshape a labeled array along with its weight, or return None.

    Args:
      array: the array.
      labels: for each of its axes, the axis of the weight, RANK or ENTRY.
      groups: (old axes, new axes) of each group of axes that the reshape maps on each other, as
        from `reshape_groups`.
      sizes: the size of each new axis.

    Returns:
      The array and its new labels; None if the array has some but not all old axes of a group.
    """
    # A weight [2, 3, 4] becomes [6, 4]: groups ([0, 1], [0]) and ([2], [1]). A factor
    #     a [2, 3, r] labeled (0, 1, RANK)  has all of the first group: a [6, r] labeled (0, RANK).
    #     a [3, r] labeled (1, RANK)        has part of it: None; 0 and 1 cannot be merged in it.
    #     b [r, 4] labeled (RANK, 2)        follows the second group: only its label changes.
    if ENTRY in labels:
        return _regroup_entries(array, labels, groups, sizes)
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
    # An axis of size 1 is in no group, so its label has no place in the new weight: squeeze it.
    unit = tuple(i for i, x in enumerate(labels) if x not in known and x != RANK)
    array = jnp.squeeze(array, unit) if unit else array
    labels = tuple(x for x in labels if x in known or x == RANK)
    if all(len(old) == len(new) == 1 for old, new in mine):
        place = {old[0]: new[0] for old, new in mine}
        return array, tuple(place.get(label, label) for label in labels)
    # A group is merged or split: bring its old axes next to each other, in the weight's order,
    # then reshape. RANK stays first or last, whichever side it is on, to save a transpose.
    array = lax.transpose(array, tuple(labels.index(label) for label in order))
    rank = array.shape[order.index(RANK)] if tail else 1
    shape = tuple(rank if label == RANK else sizes[label] for label in named)
    return array.reshape(shape), tuple(named)


def _regroup_entries(
    array: jax.Array,
    labels: Labels,
    groups: Sequence[tuple[list[int], list[int]]],
    sizes: Mapping[Any, int],
) -> tuple[jax.Array, Labels] | None:
    """Reshape each entry of a table of factors; its axis ENTRY becomes the first one."""
    at = labels.index(ENTRY)
    own, made = (*labels[:at], *labels[at + 1 :]), []

    def reshape(entry: jax.Array) -> Any:
        found = regroup(entry, own, groups, sizes)
        if found is None:
            return None
        made.extend(found[1])
        return found[0]

    array = jax.vmap(reshape, at)(array)
    return None if array is None else (array, (ENTRY, *made))

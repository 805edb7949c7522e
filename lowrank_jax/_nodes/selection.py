"""Notes on nodes that `select` made: the stack and the index that their arrays were taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lowrank_jax._nodes.adapted import Adapted
from lowrank_jax._nodes.low_rank import LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Where the arrays of a LowRank node were taken from: an entry of a stack of adapters.

    Args:
      many: the node of the stack, each of whose arrays has a leading axis of n adapters.
      index: the number of the adapter, an integer [].
    """

    many: LowRank
    index: jax.Array


def attach_selection(node: LowRank, selection: Selection) -> LowRank:
    """Return the node with a note of where its arrays were taken from."""
    noted = dataclasses.replace(node)
    object.__setattr__(noted, "selection", selection)
    return noted


def get_selection(node: object) -> Selection | None:
    """Return where the arrays of an adapter were taken from, or None if that is not known."""
    return getattr(node.delta if isinstance(node, Adapted) else node, "selection", None)


def restore_selections(leaves: Sequence[Any], selections: Sequence[Selection | None]) -> list[Any]:
    """Return leaves, some of them Adapted, with the notes that a transformation dropped."""
    pairs = zip(leaves, selections, strict=True)
    return [leaf if note is None else _restore(leaf, note) for leaf, note in pairs]


def _restore(leaf: Adapted, note: Selection) -> Adapted:
    """Return an Adapted node whose adapter has a note."""
    assert isinstance(leaf.delta, LowRank)
    return dataclasses.replace(leaf, delta=attach_selection(leaf.delta, note))

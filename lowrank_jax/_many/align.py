"""Align adapters of one model leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lowrank_jax._errors import ConfigError, TreeError, list_problems
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Full, LowRank, explain_combined, is_node
from lowrank_jax._nodes.quantized_factors import dequantize_factors

# A node, or None where an adapter leaves the leaf alone.
MaybeNode = LowRank | Full | None


def align(
    loras: Sequence[PyTree], *, decode: bool = True
) -> tuple[dict[str, list[MaybeNode]], Any]:
    """Align adapters of one model leaf by leaf.

    Args:
      loras: adapters, trees with a node at each adapted leaf and None elsewhere.
      decode: whether quantized factors are decoded.

    Returns:
      (path -> the node of each adapter, or None, for each leaf that any of them adapts; a function
      from path -> node to a tree like the adapters, with None elsewhere).

    Raises:
      ConfigError: the list of adapters is empty.
      TreeError: a tree is not an adapter, or the trees are of different models.
    """
    if not loras:
        raise ConfigError("there is no adapter: pass a list of adapters as init returns them")
    flat = [flatten(lora, is_leaf=_is_slot) for lora in loras]
    for number, (leaves, _) in enumerate(flat):
        refuse_other_leaves(leaves, f"adapter {number}")
    paths = [[path for path, _ in leaves] for leaves, _ in flat]
    for number, own in enumerate(paths):
        if {*own} != {*paths[0]}:
            problems = [f"{path}: in adapter {number} only" for path in own if path not in paths[0]]
            problems += [f"{path}: in adapter 0 only" for path in paths[0] if path not in own]
            raise TreeError(f"the adapters are of different models:\n{list_problems(problems)}")
    keep = dequantize_factors if decode else lambda node: node
    slots = [{path: keep(node) for path, node in leaves} for leaves, _ in flat]
    rows = {path: [own[path] for own in slots] for path in paths[0]}
    adapted = {path: row for path, row in rows.items() if any(node is not None for node in row)}
    treedef = flat[0][1]
    unflatten = lambda nodes: jax.tree.unflatten(treedef, [nodes.get(path) for path in paths[0]])
    return adapted, unflatten


def refuse_other_leaves(leaves: Sequence[tuple[str, Any]], what: str) -> None:
    """Raise TreeError where a leaf of an adapter is not LowRank, Full or None."""
    if problem := explain_combined(leaves, what):
        raise TreeError(problem)
    for path, leaf in leaves:
        if leaf is not None and not isinstance(leaf, LowRank | Full):
            raise TreeError(
                f"{path!r} of {what} is {type(leaf).__name__}, not LowRank, Full or None: pass "
                "the second result of init"
            )
    if all(leaf is None for _, leaf in leaves):
        raise TreeError(f"{what} holds no node: pass the second result of init")


def _is_slot(value: Any) -> bool:
    """Whether a value stands for a leaf: a node, or None."""
    return value is None or is_node(value)

"""The groups of a step's arguments: base, scales, adapters, optimizer, other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lowrank_jax._nodes import Adapted, Normed, is_adapter, is_node, strip_norms
from lowrank_jax._nodes.quantized import Quantized

GROUPS = ("base", "scales", "adapters", "optimizer", "other")
_SCALES = {"scales", "nested", "offset", "nested_map"}  # fields of Quantized


def group_arguments(args: Sequence[Any]) -> list[str]:
    """Return the group of each leaf of the arguments, in the order of jax.tree.leaves(args).

    The optimizer's are the arrays of Optax's states and of a field `opt_state`. Adapters are nodes
    elsewhere. The base is the argument that holds adapted or quantized weights, or a leaf at every
    path of an adapter; without any of these, the first argument. All else is "other".
    """
    # ({"w": W}, {"w": LowRank(a, b)}, (ScaleByAdamState(count, mu, nu),), x)
    #   base      adapters, adapters    optimizer ...                      other
    bases = _find_bases(args)
    groups: list[str] = []
    for number, arg in enumerate(args):
        for path, leaf in _flatten(arg):
            if _is_state(leaf) or _has_state_key(path):
                groups += ["optimizer"] * len(jax.tree.leaves(leaf))
            elif is_node(leaf):
                groups += _group_node(leaf)
            else:
                groups += ["base" if number in bases else "other"] * len(jax.tree.leaves(leaf))
    return groups


def _flatten(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """List (path, leaf), nodes and states of an optimizer whole."""
    is_leaf = lambda value: is_node(value) or _is_state(value)
    return jax.tree.flatten_with_path(tree, is_leaf=is_leaf)[0]


def _is_state(value: Any) -> bool:
    """Whether a value is one of the named tuples in which Optax, or this library, keeps states."""
    is_named = isinstance(value, tuple) and hasattr(value, "_fields")
    return is_named and type(value).__module__.startswith(("optax.", "lowrank_jax."))


def _has_state_key(path: tuple[Any, ...]) -> bool:
    """Whether a path leads through a field or key `opt_state`, as a TrainState's does."""
    names = (getattr(key, "name", getattr(key, "key", None)) for key in path)
    return "opt_state" in names


def _find_bases(args: Sequence[Any]) -> set[int]:
    """Return the numbers of the arguments that are, or contain, the frozen parameters."""
    flat = [_flatten(arg) for arg in args]
    bases, adapted = set(), []
    for number, leaves in enumerate(flat):
        own = {path for path, leaf in leaves if is_adapter(leaf) and not isinstance(leaf, Adapted)}
        if own:
            adapted.append((number, own))
        if any(isinstance(strip_norms(leaf), Adapted | Quantized | Normed) for _, leaf in leaves):
            bases.add(number)
    for number, paths in adapted:
        others = (i for i in range(len(args)) if i != number)
        bases |= {i for i in others if paths <= {path for path, _ in flat[i]}}
    return bases or ({0} if args and not adapted else set())


def _group_node(node: Any) -> list[str]:
    """Return the groups of the arrays of a node, in its order of leaves."""
    whole = "adapters" if is_adapter(node) else "base"
    groups = []
    for path, _ in jax.tree.leaves_with_path(node):
        names = [getattr(key, "name", None) for key in path]
        frozen = whole == "base" or (isinstance(node, Adapted) and names[0] == "base")
        is_scale = frozen and not _SCALES.isdisjoint(names)
        groups.append("scales" if is_scale else "base" if frozen else "adapters")
    return groups

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
    elsewhere. The base is what holds adapted or quantized weights, or a leaf at every path of the
    adapter; without any of these, the first argument. All else is "other".
    """
    # ({"w": W}, {"w": LowRank(a, b)}, (ScaleByAdamState(count, mu, nu),), x)
    #   base      adapters, adapters    optimizer ...                      other
    leaves = _flatten(tuple(args))
    bases = _find_bases(leaves)
    groups: list[str] = []
    for path, leaf in leaves:
        if _is_optimizer(path, leaf):
            groups += ["optimizer"] * len(jax.tree.leaves(leaf))
        elif is_node(leaf):
            groups += _group_node(leaf)
        else:
            is_base = any(path[: len(base)] == base for base in bases)
            groups += ["base" if is_base else "other"] * len(jax.tree.leaves(leaf))
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


def _is_optimizer(path: tuple[Any, ...], leaf: Any) -> bool:
    return _is_state(leaf) or _has_state_key(path)


def _find_bases(leaves: Sequence[tuple[tuple[Any, ...], Any]]) -> set[tuple[Any, ...]]:
    """Return the paths of the subtrees of frozen parameters."""
    rest = [(path, leaf) for path, leaf in leaves if not _is_optimizer(path, leaf)]
    own = [path for path, leaf in rest if is_adapter(leaf) and not isinstance(leaf, Adapted)]
    frozen = (Adapted, Quantized, Normed)
    # the argument that holds them, or where there is one argument, the field of it
    depth = 1 if len({path[0] for path, _ in rest}) > 1 else 2
    bases = {path[:depth] for path, leaf in rest if isinstance(strip_norms(leaf), frozen)}
    if not own:
        return bases or {path[:1] for path, _ in rest[:1]}
    plain = [path for path, leaf in rest if not is_adapter(leaf)]
    for number in {path[0] for path in own}:
        bases |= _find_mirrored(plain, [path for path in own if path[0] == number])
    return bases


def _find_mirrored(
    paths: Sequence[tuple[Any, ...]], own: Sequence[tuple[Any, ...]]
) -> set[tuple[Any, ...]]:
    """Return the prefixes below which there is each path of the adapter, less its own prefix."""
    # adapter at (1, params, w), as of a TrainState: ("w",) is sought below (0,), (0, base), ...
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == own[0][shared] for path in own):
        shared += 1
    below: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    for path in paths:
        for depth in range(1, min(len(path), 5)):
            below.setdefault(path[:depth], set()).add(path[depth:])
    for start in range(
        1, shared + 1
    ):  # the longest match first: the whole path within the argument
        wanted = {path[start:] for path in own}
        if found := {prefix for prefix, rest in below.items() if wanted <= rest}:
            return found
    return set()


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

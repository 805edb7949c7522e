"""Shardings that a model's own annotations give: Flax's boxes and variables with names of axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import NamedSharding
from jax import P as PartitionSpec

from lowrank_jax._errors import TreeError, list_problems
from lowrank_jax._jax.paths import find_wrappers, flatten, flatten_checked, join_keys
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import is_node

Spec = PartitionSpec | NamedSharding
Rules = Mapping[str, Any] | Sequence[tuple[str, Any]]


def is_spec(leaf: object) -> bool:
    """Whether a leaf is a spec, or None, which replicates."""
    return leaf is None or isinstance(leaf, Spec)


def read_specs(
    tree: PyTree, rules: Rules | None, what: str = "dense_specs"
) -> dict[str, Spec | None]:
    """Return path -> spec of a tree of specs, or of annotated parameters.

    Args:
      tree: a tree of PartitionSpec, NamedSharding or None; or parameters in Flax's boxes or
        variables, whose names of axes become specs. Parameters without names are replicated.
      rules: logical axis -> mesh axis, several or None; as a mapping, or as Flax's pairs, of which
        the first wins whose mesh axis the leaf does not use already.
      what: the name of the argument that the tree is, for errors.

    Raises:
      TreeError: the tree holds neither specs nor annotations; a logical axis has no rule; or there
        are rules and no annotations.
    """
    annotated = _find_annotations(tree)
    if not annotated:
        found = dict(flatten(tree, is_leaf=is_spec)[0])
        order = ": the order is (tree, dense_specs)" if what == "dense_specs" else ""
        if wrong := [path for path, spec in found.items() if not is_spec(spec)]:
            raise TreeError(
                f"{what} holds {type(found[wrong[0]]).__name__} at {wrong[0]!r}, where a "
                f"PartitionSpec, a NamedSharding or None is expected{order}. Parameters will do if "
                "Flax's annotations name their axes (nn.with_partitioning, nnx.with_partitioning)"
            )
        if rules is not None:
            raise TreeError(
                "rules map the logical axes of annotated parameters, and dense_specs holds none: "
                "pass the parameters in their boxes, or leave out rules"
            )
        return found
    specs, problems = {}, []
    for path, leaf in annotated.items():
        if is_spec(leaf):  # a spec beside annotations, for a leaf or for a branch
            specs[path] = leaf
            continue
        names, own, is_logical = _get_names(leaf)
        pairs = _to_pairs(rules if rules is not None else own)
        known = {name for name, _ in pairs}
        missing = [name for name in _flat_names(names) if is_logical and name not in known]
        problems += [f"{path}: logical axis {name!r}" for name in missing]
        specs[path] = _apply_rules(names, pairs)
    if problems:
        raise TreeError(
            "rules say nothing of some logical axes: name a mesh axis for each, or None to "
            f"replicate it, as in rules={{'embed': None}}:\n{list_problems(problems)}"
        )
    return specs


def count_named_axes(tree: PyTree) -> dict[str, int]:
    """Return path -> number of axes that its annotation names, of annotated leaves alone."""
    names = {path: _get_names(leaf)[0] for path, leaf in _find_annotations(tree).items()}
    return {path: len(own) for path, own in names.items() if own}


def _find_annotations(tree: PyTree) -> dict[str, Any]:
    """Return path -> wrapper, or array, of a tree in which a wrapper around a value has names."""
    wrappers = find_wrappers()
    if not wrappers:
        return {}
    closed = lambda node: isinstance(node, wrappers) or is_spec(node) or is_node(node)
    bare, _ = flatten_checked(jax.tree.flatten, tree, closed)  # paths take longer to find
    if not any(isinstance(leaf, wrappers) and _is_annotated(leaf) for leaf in bare):
        return {}
    leaves, _ = flatten_checked(jax.tree.flatten_with_path, tree, closed)
    return {join_keys(keys): leaf for keys, leaf in leaves}


def _is_annotated(wrapper: Any) -> bool:
    """Whether a wrapper has names of axes, around a value that is not their spec already."""
    # nnx.get_partition_spec returns variables around specs, which keep their names
    inner = jax.tree.leaves(wrapper, is_leaf=lambda leaf: isinstance(leaf, Spec))
    return bool(inner and _get_names(wrapper)[0]) and not isinstance(inner[0], Spec)


def _get_names(leaf: Any) -> tuple[tuple[Any, ...], Rules | None, bool]:
    """Return the names of a leaf's axes, rules of its own, and whether the names are logical."""
    if hasattr(leaf, "get_metadata"):  # an nnx.Variable
        metadata = leaf.get_metadata()
        # "sharding" until Flax 0.12; a box within a variable carries the names itself
        names = metadata.get("out_sharding") or metadata.get("sharding") or ()
        if names:
            own = metadata.get("sharding_rules")
            return tuple(names), own, False
        inner = jax.tree.leaves(leaf, is_leaf=lambda node: hasattr(node, "get_partition_spec"))
        leaf = inner[0] if len(inner) == 1 else None
    if not hasattr(leaf, "get_partition_spec"):
        return (), None, False
    is_logical = any(cls.__name__ == "LogicallyPartitioned" for cls in type(leaf).__mro__)
    return tuple(leaf.get_partition_spec()), getattr(leaf, "rules", None), is_logical


def _flat_names(names: Sequence[Any]) -> list[str]:
    """The names of all axes; an axis may have several, or none."""
    groups = (name if isinstance(name, tuple | list) else (name,) for name in names)
    return [name for group in groups for name in group if isinstance(name, str)]


def _to_pairs(rules: Rules | None) -> list[tuple[str, Any]]:
    if rules is None:
        return []
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    return [(name, axes) for name, axes in pairs]


def _apply_rules(names: Sequence[Any], pairs: Sequence[tuple[str, Any]]) -> PartitionSpec:
    """Return the spec of axes with these names; a name without a rule is a mesh axis."""
    # Rules in order, as Flax applies them: (("batch", "x"), ("embed", "x"), ("embed", "y")) gives
    # ("batch", "embed") the spec ("x", "y"), for a mesh axis splits one axis of a leaf.
    known = {name for name, _ in pairs}
    entries: list[Any] = [None if name in known else name for name in names]
    open_axes = {axis for axis, name in enumerate(names) if name in known}
    used = {*_flat_names(entries)}
    for logical, mesh_axes in pairs:
        for axis in sorted(open_axes):
            wanted = _flat_names((mesh_axes,))
            if names[axis] == logical and not used.intersection(wanted):
                entries[axis] = tuple(mesh_axes) if isinstance(mesh_axes, list) else mesh_axes
                used.update(wanted)
                open_axes.remove(axis)
    return PartitionSpec(*entries)

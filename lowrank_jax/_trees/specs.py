"""specs: derives the PartitionSpecs of a base or an adapter from those of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import NamedSharding
from jax import P as PartitionSpec

from lowrank_jax._checks.arguments import axis_rules, check_arguments
from lowrank_jax._errors import TreeError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, Full, LowRank, Normed, find_frozen, is_node
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._primitives.contract import RANK, Labels, labeled_spec
from lowrank_jax._trees.annotations import Rules, Spec, count_named_axes, read_specs


@check_arguments(rules=axis_rules)
def specs(tree: PyTree, dense_specs: PyTree, *, rules: Rules | None = None) -> Any:
    """Derive the PartitionSpec of every array of a tree from the specs of the dense parameters.

    An axis of a factor is sharded as the corresponding axis of the weight, and the axis of the rank
    is not sharded: for a weight [i, o] with P("data", "model"), a has P("data", None) and b has
    P(None, "model"). Codes and scales of a quantized leaf are sharded as its axes, with whole
    blocks on a device. The second level of scales, and a leaf stored flat, are sharded along stack
    axes only.

    Args:
      tree: a base, an adapter, or a combined tree. It may hold jax.ShapeDtypeStruct, for example
        jax.eval_shape of init, to create an adapter that is sharded from the start.
      dense_specs: a tree of PartitionSpec, NamedSharding or None (replicated) like the dense
        parameters. An entry at a branch applies to all leaves below it. Or the parameters
        themselves, in the boxes of Flax Linen or the variables of NNX whose annotations name their
        axes; those without names, and axes after the last name, are replicated.
      rules: for annotated parameters, logical axis -> mesh axis, several, or None to replicate it:
        a mapping, or the pairs that Flax takes.

    Returns:
      A tree with the structure of `tree` and a PartitionSpec for every array, or a NamedSharding
      where dense_specs has one, as accepted by jax.device_put and jax.jit.

    Raises:
      TreeError: a leaf has no spec, a spec has no leaf or more entries than its leaf has axes, or
        would split a block; a logical axis has no rule; all problems are listed.

    Source: the layout of Megatron-LM, arXiv 1909.08053 section 3, carried over to the factors.

    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> from jax.sharding import PartitionSpec as P
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, config)
    >>> split = specs(lora, {"w": P("data", "model")})
    >>> split["w"].a == P("data", None), split["w"].b == P(None, "model")
    (True, True)
    """
    return derive_specs(
        tree, read_specs(dense_specs, rules), count_named_axes(dense_specs), "dense_specs"
    )


def derive_specs(
    tree: PyTree, given: Mapping[str, Spec | None], named: Mapping[str, int], what: str
) -> Any:
    """Return `specs` of a tree.

    Args:
      tree: see specs.
      given: path of a leaf or a branch -> spec.
      named: path -> number of axes that an annotation names.
      what: the name of the argument that the specs are from, for errors.
    """
    leaves, treedef = flatten(tree, is_leaf=is_node)
    many = _count_adapter_axes([leaf for _, leaf in leaves])
    found, used, problems = [], set(), []
    for path, leaf in leaves:
        at = _find_spec(given, path)
        if at is None:
            problems.append(f"{path}: no spec")
            continue
        used.add(at)
        own = given[at]
        spec = PartitionSpec() if own is None else own
        ndim = _count_axes(leaf, many)
        if len(_get_entries(spec)) > ndim:
            problems.append(f"{path}: {_get_entries(spec)} for a leaf of {ndim} axes")
            continue
        # Flax's attention names the axes of its kernels [embed, heads, kv] by two names, and means
        # the first two. Of a leaf with a stack axis, the names would be those of other axes.
        if named.get(at, ndim) != ndim and _has_stack(leaf):
            problems.append(
                f"{path}: the annotation names {named[at]} axes of {ndim}; a scan or vmap over "
                "layers needs a name for its axis (metadata_params, transform_metadata)"
            )
            continue
        if problem := _explain_indivisible(find_frozen(leaf), spec, ndim):
            problems.append(f"{path}: {problem}")
            continue
        found.append(_make_specs(leaf, spec, ndim, many))
    if not any(isinstance(leaf, LowRank | Full) for _, leaf in leaves):  # an adapter has few paths
        unused = [path for path, spec in given.items() if spec is not None and path not in used]
        problems += [f"{path}: a spec, but no leaf" for path in unused]
    if problems:
        raise TreeError(
            f"{what} does not fit the tree: pass the specs of the dense parameters, at the same "
            f"level of the tree:\n{list_problems(problems)}"
        )
    return jax.tree.unflatten(treedef, found)


def _find_spec(given: Mapping[str, Any], path: str) -> str | None:
    """Find the path of the spec that applies to a leaf: its own path, or a branch above it."""
    # "a/b/w" looks for "a/b/w", "a/b", "a" and "" (a spec for the whole tree), in this order.
    if path in given:
        return path
    parts = path.split("/")
    above = ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
    return next((name for name in above if name in given), None)


def _has_stack(leaf: object) -> bool:
    """Whether a leaf is known to stack weights; of an array this is not known."""
    node = leaf.delta if isinstance(leaf, Adapted) else leaf
    if isinstance(node, Normed):
        return node.axes[0] == 0
    if isinstance(node, Quantized):
        return node.stacked > 0
    return isinstance(node, LowRank) and bool(node.stack)


def _get_entries(spec: Spec) -> PartitionSpec:
    """Get the PartitionSpec of a spec that may be a NamedSharding."""
    return spec.spec if isinstance(spec, NamedSharding) else spec


def _explain_indivisible(leaf: object, spec: Spec, ndim: int) -> str | None:
    """Explain why a leaf cannot be sharded by the spec, or return None if it can."""
    # Codes [4, 2, 64, 6] of a leaf [4, 16, 8, 6]: the blocks span axes 1 and 2 of the leaf. Axis 2
    # lies within a block and cannot be split. Axis 1 becomes the axis of 2 blocks, so at most two
    # devices can share it.
    if isinstance(spec, NamedSharding) and (problem := _explain_uneven(leaf, spec, ndim)):
        return problem
    if not isinstance(leaf, Quantized) or leaf.order is not None:
        return None
    first, entries = leaf.leading, tuple(_get_entries(spec))
    last = first + len(leaf.blocked) - 1
    inner = range(first + 1, min(last + 1, len(entries)))
    if within := [axis for axis in inner if entries[axis] is not None]:
        return (
            f"axis {within[0]} is split, but blocks of {leaf.block_size} run through axes {first} "
            f"to {last}; split axis {first}, or another one"
        )
    entry = entries[first] if first < len(entries) else None
    if entry is None or not isinstance(spec, NamedSharding):
        return None
    names = (entry,) if isinstance(entry, str) else entry
    blocks, devices = leaf.codes.shape[first], jaxprs.count_shards(spec.mesh, entry)
    if blocks % devices == 0:
        return None
    return (
        f"axis {first} is {blocks} blocks of {leaf.block_size}, which {devices} devices "
        f"({', '.join(names)}) cannot share; split another axis, or quantize it in smaller blocks"
    )


def _explain_uneven(leaf: object, spec: NamedSharding, ndim: int) -> str | None:
    """Explain which axis of an array its devices cannot share evenly, or return None."""
    shape = getattr(leaf, "shape", ())
    shape = shape[len(shape) - ndim :]  # without an axis of stacked adapters
    for axis, entry in enumerate(spec.spec):
        if entry is None or (isinstance(leaf, Quantized) and axis >= leaf.leading):
            continue
        size, devices = shape[axis], jaxprs.count_shards(spec.mesh, entry)
        if size % devices:
            names = (entry,) if isinstance(entry, str) else entry
            return (
                f"axis {axis} is of size {size}, which {devices} devices ({', '.join(names)}) "
                "cannot share; split another axis, or pad it"
            )
    return None


def _count_adapter_axes(leaves: Sequence[Any]) -> int:
    """Count the axes of stacked adapters that lead the arrays of an adapter."""
    return max((leaf.adapters for leaf in leaves if isinstance(leaf, LowRank)), default=0)


def _count_axes(leaf: object, many: int) -> int:
    """Count the axes of the dense leaf, without the `many` axes of stacked adapters."""
    if isinstance(leaf, LowRank):
        return len(leaf.fan_in) + len(leaf.fan_out) + len(leaf.stack)
    return getattr(leaf, "ndim", 0) - (many if isinstance(leaf, Full) else 0)


def _make_specs(leaf: object, spec: Spec, ndim: int, many: int = 0) -> Any:
    """Return the leaf with specs in place of its arrays."""
    # Each array's spec is picked from the dense spec by labels, the axes of the weight that the
    # axes of the array correspond to: with P("data", "model") for a weight [i, o], the labels
    # (0, RANK) of a give P("data", None). `many` axes of stacked adapters lead, and are not split.
    entries = _get_entries(spec)
    ahead = (RANK,) * many
    wrap = lambda own: (
        NamedSharding(spec.mesh, own, memory_kind=spec.memory_kind)
        if isinstance(spec, NamedSharding)
        else own
    )
    if isinstance(leaf, Full):
        value = labeled_spec(entries, (*ahead, *range(ndim))) if many else entries
        return dataclasses.replace(leaf, value=wrap(value))
    if isinstance(leaf, Adapted):
        keys = leaf.delta.stack if isinstance(leaf.delta, LowRank) else ()
        return dataclasses.replace(
            leaf,
            base=_make_specs(leaf.base, spec, ndim),
            delta=_make_specs(leaf.delta, spec, ndim),
            multiplier=None if leaf.multiplier is None else wrap(PartitionSpec()),
            key=None if leaf.key is None else wrap(labeled_spec(entries, keys)),
        )
    if isinstance(leaf, Normed):
        squares = wrap(labeled_spec(entries, leaf.axes))
        return dataclasses.replace(leaf, value=_make_specs(leaf.value, spec, ndim), squares=squares)
    if isinstance(leaf, Quantized):
        return leaf.map_axes(lambda labels: wrap(labeled_spec(entries, labels)))
    if not isinstance(leaf, LowRank):
        return wrap(entries)
    make = lambda labels: wrap(labeled_spec(entries, labels))
    parts = {
        name: _map_factor_axes(getattr(leaf, name), (*ahead, *labels), make)
        for name, labels in leaf.array_labels.items()
    }
    return dataclasses.replace(leaf, **parts)


def _map_factor_axes(array: Any, labels: Labels, make: Callable[[Labels], Any]) -> Any:
    """Return make(labels) in place of an array; axes in which blocks run are not split."""
    if not isinstance(array, Quantized):
        return make(labels)
    # stack axes, which lead; the blocks of a factor are small, and few devices could share them
    return array.map_axes(
        lambda axes: make(
            tuple(RANK if n is None or n >= array.leading else labels[n] for n in axes)
        )
    )

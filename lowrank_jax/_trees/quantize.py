"""quantize and dequantize: convert leaves of a tree to blocks of small integers, and back."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments, tree_of_arrays
from lowrank_jax._errors import ConfigError, PatternError, TreeError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import UNADAPTED, Full, LowRank, Normed, as_dense, find_adapters, is_node
from lowrank_jax._nodes.host import count_nonfinite, quantize_on_host
from lowrank_jax._nodes.quantized import Axes, Quantized, quantize_array
from lowrank_jax._nodes.quantized_factors import dequantize_factors, has_quantized_factors
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._targeting.targets import (
    choose_paths,
    explain_no_target,
    resolve_axes,
    warn_skipped,
)
from lowrank_jax._trees.donation import Donation
from lowrank_jax._trees.shardings import (
    find_constraint,
    find_sharding,
    place_leaf,
    resolve_shardings,
    shard_leaf,
)
from lowrank_jax._trees.specs import specs

Array: TypeAlias = jax.Array | np.ndarray


@check_arguments()
def quantize(
    params: PyTree,
    quant: QuantConfig,
    *,
    plan: Plan | None = None,
    donate: bool = False,
    shardings: PyTree = None,
) -> Any:
    r"""Quantize leaves of a parameter tree to blocks of small integers with a scale for each block.

    $c_i = \operatorname{nearest}(w_i / m)$, $m = \max_i |w_i|$ over a block; blocks run along the
    axes that products contract (along the features of a table that is read by rows).

    Leaves are quantized one by one, so that besides the result at most one dense leaf of memory is
    needed. A NumPy array is encoded on the host in small pieces, and only its codes are copied to
    the device. A leaf that is sharded stays so, in whole blocks: each device encodes its part.
    Under jit a stack is looped over layer by layer, which gathers it if its layers are sharded:
    call quantize eagerly then.

    Args:
      params: any pytree of arrays; it may hold NumPy arrays (memory-mapped ones are read once, in
        parts).
      quant: selects the leaves and the format.
      plan: plan of the function that uses params; required for "all-linear" and for leaves of more
        than two axes. Without it a matrix is taken as [i, o].
      donate: delete each dense leaf once it is encoded and no other leaf of params that shares its
        buffer is still needed. Nothing is deleted if one of the errors below is raised. It has no
        effect under jit: use `donate_argnums` of jit.
      shardings: a tree of NamedSharding like params, or of PartitionSpec within jax.set_mesh, by
        which every leaf of the result is placed; an entry at a branch applies to all leaves below
        it. Of a NumPy array a process reads the layers, and keeps the shards, of its own devices.

    Returns:
      The tree with Quantized leaves, for lift, init, plan and dequantize.

    Raises:
      PatternError: a pattern matches no leaf, or no leaf is selected.
      AxesError: the contracted axes of a leaf are not known, or a leaf has no elements.
      TreeError: params holds nodes or shapes instead of arrays, the plan belongs to another tree,
        shardings do not fit it, its sharding would split a block, or a leaf has values that are not
        finite.
      ConfigError: the scales of a leaf are too large for double quantization.

    Traced values cannot be checked. A block with a value that is not finite then decodes to NaN;
    with double quantization, so do the 256 blocks whose scales share a scale.

    Warns:
      PlanWarning: "all-linear" skips leaves that reach a product through operations that no rule
        follows.

    Source: QLoRA, arXiv 2305.14314, section 3.

    >>> params = {"w": jnp.linspace(-1, 1, 128 * 4).reshape(128, 4)}
    >>> frozen = quantize(params, QuantConfig(targets="w"))
    >>> frozen["w"].codes.shape, frozen["w"].codes.dtype.name, frozen["w"].shape
    ((2, 64, 4), 'uint4', (128, 4))
    """
    leaves, treedef = flatten(params, is_leaf=is_node)
    if wrong := [path for path, leaf in leaves if is_node(leaf)]:
        kinds = {Quantized: "quantized leaves", Normed: "leaves with DoRA's norms"}
        kind = kinds.get(type(dict(leaves)[wrong[0]]), "adapters")
        remedy = f"quantize {UNADAPTED}" if kind == "adapters" else "pass dense parameters"
        raise TreeError(f"params already holds {kind} ({wrong[0]!r}): {remedy}")
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    chosen = choose_targets(arrays, quant, plan)
    if shapes := [p for p in chosen if isinstance(arrays[p], jax.ShapeDtypeStruct)]:
        raise TreeError(
            f"{shapes[0]!r} is a shape without values: for the shapes of the result call "
            "jax.eval_shape(lambda params: lowrank.quantize(params, quant, plan=plan), params)"
        )
    axes = {path: resolve_block_axes(path, arrays[path], plan) for path in chosen}
    places: dict[str, Any] = {}
    if shardings is not None:
        at = resolve_shardings(params, shardings)
        places = dict(flatten(at)[0])
        shapes = {
            path: eval_quantized_shapes(leaf, *axes[path], quant) if path in axes else leaf
            for path, leaf in arrays.items()
        }
        known = {path: places[path] for path in shapes}
        resolve_shardings(shapes, known)  # raises where a block would be split
    donation = None
    if donate:  # all leaves are checked before the first one is deleted
        check_quantized(
            {path: _find_bad_values(path, arrays[path], *axes[path], quant) for path in axes},
            arrays,
        )
        donation = Donation(arrays, axes)
    out, bad = [], {}
    for path, leaf in leaves:
        place = places.get(path)
        if place is not None and (path not in axes or not isinstance(leaf, np.ndarray)):
            leaf = place_leaf(leaf, place)
        if path in axes:
            leaf, bad[path] = quantize_leaf(path, leaf, *axes[path], quant, place)
            if not any(map(jaxprs.is_tracer, bad[path])):
                jax.block_until_ready(leaf)  # dispatch must not run ahead: one dense leaf at a time
                if donation is not None:
                    donation.release(path)
        out.append(leaf)
    check_quantized(bad, arrays)
    return jax.tree.unflatten(treedef, out)


def _find_bad_values(path: str, leaf: Array, fan_in: Axes, stack: Axes, quant: QuantConfig) -> Any:
    """Return the counts of `quantize_leaf` without encoding the leaf, unless that is needed."""
    shapes = eval_quantized_shapes(leaf, fan_in, stack, quant)  # raises the errors of encoding
    on_host = isinstance(leaf, np.ndarray)
    bad = count_nonfinite(leaf) if on_host else _count_nonfinite(leaf)
    if jaxprs.is_tracer(bad) or int(bad) or not quant.double_quant:
        return bad, 0
    largest = max(leaf.max(), -leaf.min()) if on_host else _max_magnitude(leaf)
    # Scales are at most the largest magnitude of the leaf. If that is small enough, the sum of all
    # scales fits float32, and the sum of their mean and a difference from it fits the dtype of the
    # leaf: double quantization cannot overflow, and nothing need be encoded to know this.
    sums, values = (float(jnp.finfo(dtype).max) for dtype in (jnp.float32, shapes.dtype))
    if float(largest) < 0.99 * min(sums / shapes.scales.size, values / 2):
        return bad, 0
    return quantize_leaf(path, leaf, fan_in, stack, quant)[1]


def choose_targets(arrays: dict[str, Any], quant: QuantConfig, plan: Plan | None) -> list[str]:
    """Select the paths to quantize; raises PatternError if there is none."""
    chosen, linear = choose_paths(arrays, quant.targets, quant.exclude, plan)
    if not chosen:
        raise PatternError(f"no leaf is left to quantize: {explain_no_target(plan, linear)}")
    warn_skipped(plan, quant.targets, chosen, quant.exclude)
    return chosen


def resolve_block_axes(path: str, leaf: Array, plan: Plan | None) -> tuple[Axes, Axes]:
    """Return the axes along which blocks run, and the stack axes."""
    # A product contracts its blocks: a weight [i, o] used as x @ w has blocks along i. A table
    # [rows, features] read by rows has them along features, so that a row is whole blocks, also if
    # it is tied to an output projection, which contracts the same axis. A stacked table
    # [12, rows, features] with stack (0,): the rows are the first other axis, 1, and blocks run
    # along 2.
    use = plan[path] if plan is not None else None
    fan_in, fan_out, stack, kind = resolve_axes(
        path, tuple(leaf.shape), use, "blocks run along the contracted axes"
    )
    if kind != "lookup" and use is not None and use.lookup:
        rows = min({*range(leaf.ndim)} - {*stack})
        return tuple(a for a in range(leaf.ndim) if a not in stack and a != rows), stack
    return (fan_out if kind == "lookup" else fan_in), stack


def quantize_leaf(
    path: str,
    leaf: Array,
    fan_in: Axes,
    stack: Axes,
    quant: QuantConfig,
    place: jax.NamedSharding | None = None,
) -> tuple[Any, Any]:
    """Quantize a leaf, a NumPy array on the host; return the node and two counts.

    The result of a NumPy array is placed by the sharding `place`, that of a jax.Array as the array.

    The counts, for `check_quantized`, are of values that are not finite, and of blocks of scales
    that are too large for double quantization.
    """
    if isinstance(leaf, np.ndarray):
        shapes = eval_quantized_shapes(leaf, fan_in, stack, quant)
        at = shard_leaf(path, shapes, place)
        node, bad = quantize_on_host(leaf, shapes, shardings=at)
        return (jax.device_put(node) if at is None else node), bad
    together = 0 in stack and jaxprs.is_first_axis_split(leaf)
    encode = lambda leaf: _quantize_on_device(leaf, fan_in, stack, quant, together)
    if not jaxprs.is_split(leaf):
        at = _find_shardings(path, leaf, fan_in, stack, quant, place)
        return _quantize_on_device(leaf, fan_in, stack, quant, together, at)
    shapes, _ = jax.eval_shape(encode, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = jax.typeof(leaf).sharding
    number = jax.NamedSharding(sharding.mesh, jax.P())
    out = specs({path: shapes}, {path: sharding})[path], (number, number)
    with jaxprs.use_mesh_of(leaf):
        node, bad = jaxprs.call_with_auto_axes(encode, out, leaf)
    # the type, and so the result, lacks the axes of the mesh that are not explicit
    at = shard_leaf(path, shapes, place or find_sharding(leaf))
    return (node if at is None else jax.tree.map(place_leaf, node, at)), bad


def _find_shardings(
    path: str,
    leaf: Array,
    fan_in: Axes,
    stack: Axes,
    quant: QuantConfig,
    place: jax.NamedSharding | None,
) -> tuple[jax.NamedSharding, ...] | None:
    """Return the shardings of the arrays that a sharded leaf becomes; None if it is not sharded."""
    sharding = find_constraint(leaf, place)
    if sharding is None:
        return None
    shapes = eval_quantized_shapes(leaf, fan_in, stack, quant)
    return tuple(jax.tree.leaves(shard_leaf(path, shapes, sharding)))


def eval_quantized_shapes(
    leaf: Array | jax.ShapeDtypeStruct, fan_in: Axes, stack: Axes, quant: QuantConfig
) -> Any:
    """Return the node of a quantized leaf with shapes in place of arrays."""
    shapes = jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return jax.eval_shape(lambda leaf: _quantize_on_device(leaf, fan_in, stack, quant)[0], shapes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize_on_device(
    leaf: jax.Array,
    fan_in: Axes,
    stack: Axes,
    quant: QuantConfig,
    together: bool = False,
    shardings: tuple[jax.NamedSharding, ...] | None = None,
) -> tuple[Any, Any]:
    """Quantize a leaf on its device; return the node and the counts of `quantize_leaf`."""
    node = quantize_array(
        leaf,
        fan_in,
        stack,
        format=quant.format,
        block_size=quant.block_size,
        double_quant=quant.double_quant,
        packing=quant.packing,
        together=together,
    )
    if shardings is not None:
        at = jax.tree.unflatten(jax.tree.structure(node), shardings)
        node = jax.lax.with_sharding_constraint(node, at)
    return node, (
        _count_nonfinite(leaf),
        jnp.zeros(()) if node.nested is None else _count_nonfinite(node.nested),
    )


@jax.jit
def _count_nonfinite(leaf: jax.Array) -> jax.Array:
    """Count the values that are not finite in float32; as float32, since int32 may overflow."""
    finite = jnp.isfinite(leaf.astype(jnp.float32))
    return jnp.sum(~finite, -1, jnp.int32).sum(dtype=jnp.float32)


@jax.jit
def _max_magnitude(leaf: jax.Array) -> jax.Array:
    """Compute the largest magnitude of a leaf without NaN, without an array of magnitudes."""
    return jnp.maximum(jnp.max(leaf), -jnp.min(leaf)).astype(jnp.float32)


def check_quantized(bad: dict[str, tuple[Any, Any]], leaves: dict[str, Any]) -> None:
    """Raise if known counts are not 0: TreeError for nonfinite values, ConfigError for scales."""
    known = {
        path: tuple(map(int, counts))
        for path, counts in bad.items()
        if not any(map(jaxprs.is_tracer, counts))
    }
    problems = [
        f"{path}: {count} of {leaves[path].size} values are not finite"
        for path, (count, _) in known.items()
        if count
    ]
    if problems:
        raise TreeError(
            "a block with a NaN or an infinity has no scale: repair the weights, or exclude the "
            f"leaf:\n{list_problems(problems)}"
        )
    problems = [
        f"{path}: its scales, after double quantization, are beyond the range of "
        f"{jnp.dtype(leaves[path].dtype).name}"
        for path, (_, count) in known.items()
        if count
    ]
    if problems:
        raise ConfigError(
            "weights are too large for double quantization: pass double_quant=False, or exclude "
            f"the leaf:\n{list_problems(problems)}"
        )


@check_arguments(frozen=tree_of_arrays)
def dequantize(frozen: PyTree) -> Any:
    """Decode the quantized leaves of a tree in float32, each cast once to its dtype.

    Args:
      frozen: a tree as returned by quantize, or an adapter as returned by quantize_adapter.

    Returns:
      The tree with dense arrays, rounded to the values of their codes.

    Raises:
      TreeError: the tree holds adapted weights; use merge.

    Source: QLoRA, arXiv 2305.14314, equation 6.

    >>> frozen = quantize({"w": jnp.ones((64, 4))}, QuantConfig(targets="w", double_quant=False))
    >>> bool((dequantize(frozen)["w"] == 1).all())
    True
    """
    leaves, treedef = flatten(frozen, is_leaf=is_node)
    if any(has_quantized_factors(leaf) for _, leaf in leaves):
        is_adapter = lambda leaf: isinstance(leaf, LowRank | Full)
        decode = lambda leaf: dequantize_factors(leaf) if is_adapter(leaf) else as_dense(leaf)
        return jax.tree.unflatten(treedef, [decode(leaf) for _, leaf in leaves])
    if adapted := find_adapters(leaves):
        raise TreeError(
            f"{adapted[0]!r} is adapted: lowrank.merge(base, lora) gives dense weights, adapters "
            "folded in"
        )
    dense = [as_dense(leaf) for _, leaf in leaves]
    return jax.tree.unflatten(treedef, dense)

"""quantize and dequantize: leaves of a tree as small integers, and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments, tree_of_arrays
from lowrank_jax._errors import ConfigError, PatternError, TreeError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Normed, as_dense, is_adapter, is_node
from lowrank_jax._nodes.host import count_nonfinite, quantize_on_host
from lowrank_jax._nodes.quantized import Axes, Quantized, quantize_array
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._targeting.targets import (
    choose_paths,
    explain_no_target,
    resolve_axes,
    warn_skipped,
)
from lowrank_jax._trees.donation import Donation
from lowrank_jax._trees.specs import specs


@check_arguments()
def quantize(
    params: PyTree, quant: QuantConfig, *, plan: Plan | None = None, donate: bool = False
) -> Any:
    r"""Keep leaves of a parameter tree as blocks of small integers with a scale each.

    $c_i = \operatorname{nearest}(w_i / m)$, $m = \max_i |w_i|$ over a block; blocks run along the
    axes that products contract (along the features of a table that is read by rows).

    It works leaf by leaf: beside the result at most one dense leaf's worth of memory is used. A
    NumPy array is encoded on the host in small pieces, and its codes alone go to the device. Under
    jit a stack is looped over layer by layer, and so gathered where its layers are split over
    devices: call quantize eagerly there.

    Args:
      params: any pytree of arrays, NumPy arrays too (memory-mapped ones are read once, in parts).
      quant: which leaves, and how.
      plan: of the function that uses params; needed for "all-linear" and for leaves of more than
        two axes. Without it a matrix is taken as [i, o].
      donate: delete each dense leaf as soon as its codes are there, and no other leaf of params
        that shares its buffer is still to be read or is returned. Nothing is deleted where an error
        of those below is raised. Under jit it does nothing: give jit itself `donate_argnums`.

    Returns:
      The tree with Quantized leaves: for lift, init, plan, dequantize.

    Raises:
      PatternError, AxesError, ConfigError, TreeError: naming each leaf, what it is, and the remedy;
        where values are known, leaves with values that are not finite, or whose scales are too
        large to be quantized in their turn. Where they are traced, the blocks of such values are
        decoded to NaN, and no others (with double quantization the 256 blocks whose scales share a
        scale).

    Warns:
      PlanWarning: naming the leaves that "all-linear" passes over though they reach a product, by
        operations that no rule follows.

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
        raise TreeError(f"params already holds {kind} ({wrong[0]!r}): pass dense parameters")
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    chosen = choose_targets(arrays, quant, plan)
    if shapes := [p for p in chosen if isinstance(arrays[p], jax.ShapeDtypeStruct)]:
        raise TreeError(
            f"{shapes[0]!r} is a shape without values: for the shapes of the result call "
            "jax.eval_shape(lambda params: lowrank.quantize(params, quant, plan=plan), params)"
        )
    axes = {path: resolve_block_axes(path, arrays[path], plan) for path in chosen}
    donation = None
    if donate:  # nothing is deleted before all is known to be good
        check_quantized(
            {path: _find_bad_values(path, arrays[path], *axes[path], quant) for path in axes},
            arrays,
        )
        donation = Donation(arrays, axes)
    out, bad = [], {}
    for path, leaf in leaves:
        if path in axes:
            leaf, bad[path] = quantize_leaf(path, leaf, *axes[path], quant)
            if not any(map(jaxprs.is_tracer, bad[path])):
                jax.block_until_ready(leaf)  # one by one, however fast they are asked for
                if donation is not None:
                    donation.release(path)
        out.append(leaf)
    check_quantized(bad, arrays)
    return jax.tree.unflatten(treedef, out)


def _find_bad_values(path: str, leaf: Any, fan_in: Axes, stack: Axes, quant: QuantConfig) -> Any:
    """What `quantize_leaf` would find wrong with a leaf, which is encoded only where it must be."""
    shapes = eval_quantized_shapes(leaf, fan_in, stack, quant)  # which raises what encoding would
    on_host = isinstance(leaf, np.ndarray)
    bad = count_nonfinite(leaf) if on_host else _count_nonfinite(leaf)
    if jaxprs.is_tracer(bad) or int(bad) or not quant.double_quant:
        return bad, 0
    largest = max(leaf.max(), -leaf.min()) if on_host else _max_magnitude(leaf)
    # so that the sum of all scales, and their mean and a difference from it, are within range
    sums, values = (float(jnp.finfo(dtype).max) for dtype in (jnp.float32, shapes.dtype))
    if float(largest) < 0.99 * min(sums / shapes.scales.size, values / 2):
        return bad, 0
    return quantize_leaf(path, leaf, fan_in, stack, quant)[1]


def choose_targets(arrays: dict[str, Any], quant: QuantConfig, plan: Plan | None) -> list[str]:
    """The paths to quantize; at least one."""
    chosen, linear = choose_paths(arrays, quant.targets, quant.exclude, plan)
    if not chosen:
        raise PatternError(f"no leaf is left to quantize: {explain_no_target(plan, linear)}")
    warn_skipped(plan, quant.targets, chosen, quant.exclude)
    return chosen


def resolve_block_axes(path: str, leaf: Any, plan: Plan | None) -> tuple[Axes, Axes]:
    """The axes that blocks run along, and the stack axes."""
    use = plan[path] if plan is not None else None
    fan_in, fan_out, stack, kind = resolve_axes(
        path, tuple(leaf.shape), use, "blocks run along the contracted axes"
    )
    if kind != "lookup" and use is not None and use.lookup:
        kind = "lookup"  # rows are read somewhere: a row must hold whole blocks
        rows = min({*range(leaf.ndim)} - {*stack})
        return tuple(a for a in range(leaf.ndim) if a not in stack and a != rows), stack
    return (fan_out if kind == "lookup" else fan_in), stack


def quantize_leaf(
    path: str, leaf: Any, fan_in: Axes, stack: Axes, quant: QuantConfig
) -> tuple[Any, Any]:
    """One leaf, and what `check_quantized` takes; a NumPy array is encoded on the host.

    The latter is two numbers: of values that are not finite, and of blocks of scales that are too
    large to be quantized in their turn.
    """
    if isinstance(leaf, np.ndarray):
        node, bad = quantize_on_host(leaf, eval_quantized_shapes(leaf, fan_in, stack, quant))
        return jax.device_put(node), bad
    together = 0 in stack and _is_first_axis_split(leaf)
    encode = lambda leaf: _quantize_on_device(leaf, fan_in, stack, quant, together)
    if not jaxprs.is_split(leaf):
        return encode(leaf)
    shapes, _ = jax.eval_shape(encode, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = jax.typeof(leaf).sharding
    number = jax.NamedSharding(sharding.mesh, jax.P())
    out = specs({path: shapes}, {path: sharding})[path], (number, number)
    with jaxprs.use_mesh_of(leaf):
        return jaxprs.call_with_auto_axes(encode, out, leaf)


def eval_quantized_shapes(leaf: Any, fan_in: Axes, stack: Axes, quant: QuantConfig) -> Any:
    """The node of a leaf of that shape and dtype, without values."""
    leaf = jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return jax.eval_shape(lambda leaf: _quantize_on_device(leaf, fan_in, stack, quant)[0], leaf)


def _is_first_axis_split(leaf: Any) -> bool:
    """Whether the first axis is known to be split over devices."""
    if jaxprs.is_tracer(leaf):
        return jaxprs.is_split(leaf, 0)
    concrete = isinstance(leaf, jax.Array)
    return concrete and leaf.sharding.shard_shape(leaf.shape)[0] < leaf.shape[0]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize_on_device(
    leaf: Any, fan_in: Axes, stack: Axes, quant: QuantConfig, together: bool = False
) -> tuple[Any, Any]:
    """One leaf on a device."""
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
    return node, (
        _count_nonfinite(leaf),
        jnp.zeros(()) if node.nested is None else _count_nonfinite(node.nested),
    )


@jax.jit
def _count_nonfinite(leaf: jax.Array) -> jax.Array:
    """How many values are not finite in float32; a leaf may have more than an integer counts."""
    finite = jnp.isfinite(leaf.astype(jnp.float32))
    return jnp.sum(~finite, -1, jnp.int32).sum(dtype=jnp.float32)


@jax.jit
def _max_magnitude(leaf: jax.Array) -> jax.Array:
    """The largest magnitude of a leaf without NaN; of what is written to memory nothing."""
    return jnp.maximum(jnp.max(leaf), -jnp.min(leaf)).astype(jnp.float32)


def check_quantized(bad: dict[str, tuple[Any, Any]], leaves: dict[str, Any]) -> None:
    """Raise where values are known and not finite, or their scales cannot be quantized."""
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
            "a block with a NaN or an infinity has no scale: mend the weights, or exclude the "
            f"leaf:\n{list_problems(problems)}"
        )
    problems = [
        f"{path}: its scales, quantized in their turn, are beyond "
        f"{jnp.dtype(leaves[path].dtype).name}"
        for path, (_, count) in known.items()
        if count
    ]
    if problems:
        raise ConfigError(
            "weights as large cannot be quantized doubly: pass double_quant=False, or exclude the "
            f"leaf:\n{list_problems(problems)}"
        )


@check_arguments(frozen=tree_of_arrays)
def dequantize(frozen: PyTree) -> Any:
    """The dense tree again: each quantized leaf decoded in float32 and cast once to its dtype.

    Args:
      frozen: a tree that quantize returned.

    Returns:
      The tree with arrays, rounded to what their codes hold.

    Raises:
      TreeError: the tree holds adapters: merge folds those.

    Source: QLoRA, arXiv 2305.14314, equation 6.

    >>> frozen = quantize({"w": jnp.ones((64, 4))}, QuantConfig(targets="w", double_quant=False))
    >>> bool((dequantize(frozen)["w"] == 1).all())
    True
    """
    leaves, treedef = flatten(frozen, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves if is_adapter(leaf)]:
        raise TreeError(
            f"{adapted[0]!r} is adapted: lowrank.merge(base, lora) gives dense weights, adapters "
            "folded in"
        )
    dense = [as_dense(leaf) for _, leaf in leaves]
    return jax.tree.unflatten(treedef, dense)

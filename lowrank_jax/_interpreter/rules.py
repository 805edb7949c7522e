"""One rule for each primitive that can take a weight without building it.

A rule gets the context, the equation and its operands (at least one a Virtual) and returns the
results, or None to have the weights built. To teach the library a primitive, add one function and
one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax import _jaxprs
from lowrank_jax._interpreter.control import CONTROL
from lowrank_jax._interpreter.interpret import Context, Rule
from lowrank_jax._weights.joined import JoinedWeight
from lowrank_jax._weights.virtual import Virtual

Out = Sequence[Any] | None


def _one(result: Any) -> Out:
    return None if result is None else [result]


def _first_only(values: list[Any]) -> bool:
    """Whether the first operand is the only weight."""
    return isinstance(values[0], Virtual) and not any(isinstance(v, Virtual) for v in values[1:])


# Verbs that pass a weight on.


def _convert(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return _one(values[0].astype(eqn.params["new_dtype"]))


def _transpose(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return _one(values[0].transpose(eqn.params["permutation"]))


def _reshape(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    if eqn.params.get("dimensions") is not None:
        return None
    return _one(values[0].reshape(eqn.params["new_sizes"]))


def _squeeze(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    gone = {axis % values[0].ndim for axis in eqn.params["dimensions"]}
    shape = [size for axis, size in enumerate(values[0].shape) if axis not in gone]
    return _one(values[0].reshape(shape))


def _broadcast_in_dim(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    if not _first_only(values) or len(values) > 1:
        return None
    bound = lambda array: _jaxprs.bind(eqn, [array])[0]
    axes = [int(axis) for axis in eqn.params["broadcast_dimensions"]]  # vmap leaves NumPy's
    return _one(values[0].broadcast(eqn.params["shape"], axes, bound))


def _slice(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    weight, params = values[0], eqn.params
    strides = params["strides"] or (1,) * weight.ndim
    return _one(weight.slice(params["start_indices"], params["limit_indices"], strides))


def _dynamic_slice(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    if not _first_only(values):
        return None
    weight, starts = values[0], values[1 : 1 + values[0].ndim]
    sizes = eqn.params["slice_sizes"]
    parts = [axis for axis, size in enumerate(sizes) if size != weight.shape[axis]]

    def take(array: Any, where: dict[int, int]) -> Any:
        for axis in parts:
            if axis in where:
                array = _dynamic_slice_of(array, starts[axis], sizes[axis], where[axis])
        return array

    return _one(weight.index(take, {axis: sizes[axis] for axis in parts}, parts))


def _dynamic_slice_of(array: Any, start: Any, size: int, axis: int) -> Any:
    """A slice of one axis, its start clamped as the primitive clamps it: none is from the end."""
    sizes = [size if i == axis else full for i, full in enumerate(array.shape)]
    zero = jnp.zeros((), start.dtype)
    start = lax.clamp(zero, start, zero + (array.shape[axis] - size))
    starts = [start if i == axis else zero for i in range(array.ndim)]
    return lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False)


def _split(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    edges = itertools.accumulate(eqn.params["sizes"], initial=0)
    slices = itertools.pairwise(edges)
    return _all([values[0].slice_axis(eqn.params["axis"], *cut) for cut in slices])


def _unstack(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    weight, axis = values[0], eqn.params["axis"]
    return _all([weight.take_index(axis, number) for number in range(weight.shape[axis])])


def _all(results: list[Any]) -> Out:
    """The results, or None where one of them is."""
    return None if any(result is None for result in results) else results


def _concatenate(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return [JoinedWeight.of(values, eqn.params["dimension"])]


def _stack(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    axis, shape = eqn.params["axis"], list(values[0].shape)
    slices = _all([value.reshape([*shape[:axis], 1, *shape[axis:]]) for value in values])
    return slices and [JoinedWeight.of(slices, axis)]


def _pad(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    """Padding around a weight is joined to it."""
    edges = eqn.params["padding_config"]
    if not _first_only(values) or any(min(edge) < 0 or edge[2] for edge in edges):
        return None
    weight, value = values
    for axis, (low, high, _) in enumerate(edges):
        before, after = (list(weight.shape) for _ in "ab")
        before[axis], after[axis] = low, high
        parts = [lax.broadcast(value, before), weight, lax.broadcast(value, after)]
        weight = JoinedWeight.of(parts, axis)
    return [weight]


def _rev(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return _one(values[0].rev(list(eqn.params["dimensions"])))


def _identity(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    """Copies, names and sharding constraints say something of the base alone."""
    return _one(values[0].each(lambda array: _jaxprs.bind(eqn, [array])[0], base_only=True))


def _constraint(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    """What is said of how the whole lies is not said of the parts of joined weights."""
    return values if isinstance(values[0], JoinedWeight) else _identity(ctx, eqn, values)


def _device_put(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    """A move of one weight is a move of its base, to the memory of the host or of the device."""
    if len(values) > 1:
        return None
    (weight,), (target,) = values, eqn.params["devices"]
    if _jaxprs.is_host(target):
        return _one(weight.put(_jaxprs.to_host))
    moved = weight.put(_jaxprs.on_device)
    if moved is None or isinstance(target, jax.memory.Space):
        return _one(moved)
    return _identity(ctx, eqn, [moved])


def _reshard(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    """Each array is laid out as the axes of the weight that it runs along."""
    wanted = eqn.params["dst_sharding"]

    def move(array: Any, spec: Any) -> Any:
        sharding = type(wanted)(wanted.mesh, spec, memory_kind=wanted.memory_kind)
        return _jaxprs.bind(eqn, [array], dst_sharding=sharding)[0]

    return _one(values[0].reshard(wanted.spec, move))


def _stop_gradient(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return _one(values[0].frozen())


def _everywhere(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    """reduce_precision acts on the base and on the factors."""
    return _one(values[0].each(lambda array: _jaxprs.bind(eqn, [array])[0]))


def _barrier(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return list(lax.optimization_barrier(tuple(values)))


def _scaled(swap: bool) -> Rule:
    """Multiplication or division of a weight by one number, or by numbers along some axes."""

    def rule(ctx: Context, eqn: Any, values: list[Any]) -> Out:
        weight, other = values if isinstance(values[0], Virtual) else values[::-1]
        if isinstance(other, Virtual) or tuple(weight.shape) != tuple(eqn.outvars[0].aval.shape):
            return None
        if not swap and not isinstance(values[0], Virtual):
            return None
        operation = lax.mul if swap else lax.div
        axes = [axis for axis, size in enumerate(other.shape) if size != 1]
        if not axes:
            apply = lambda array, scalar: operation(array, lax.broadcast(scalar, array.shape))
            scaled = weight.multiply(other.reshape(()), apply)
            if scaled is not None:
                return [scaled]
        elif len(axes) == weight.ndim:
            return None  # a mask, say: a number for each entry
        numbers = other.reshape([other.shape[axis] for axis in axes])
        return _one(weight.stretch(numbers, axes, operation))

    return rule


def _neg(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    return _one(values[0].multiply(-1.0, lambda array, scalar: array * scalar))


# Verbs that consume a weight.


def _larger(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
    """Of two weights that meet, build the smaller: the only way, and so not a fallback."""
    left, right = values[:2]
    if isinstance(left, Virtual) and isinstance(right, Virtual):
        size = lambda w: _size(w.shape)
        if size(left) <= size(right):
            left = ctx.built(left, eqn)
        else:
            right = ctx.built(right, eqn)
    return [left, right, *values[2:]]


def _size(shape: Sequence[int]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


def _consumed(ctx: Context, eqn: Any, weight: Virtual, out: Any) -> Out:
    if out is None:
        return None
    if not isinstance(out, Virtual):
        for leaf in weight.leaves():
            ctx.record(leaf, eqn, leaf.how)
    return [out]


def _dot_general(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    left, right = _larger(ctx, eqn, values)
    on_left = isinstance(left, Virtual)
    weight, other = (left, right) if on_left else (right, left)
    options = {
        k: eqn.params.get(k) for k in ("precision", "preferred_element_type", "out_sharding")
    }
    options = {k: v for k, v in options.items() if v is not None}
    out = ctx.use(weight).dot(other, eqn.params["dimension_numbers"], on_left, options)
    return _consumed(ctx, eqn, weight, out)


def _ragged_dot_general(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    left, right, sizes = _larger(ctx, eqn, values)
    params = eqn.params
    if (
        not isinstance(right, Virtual)
        or isinstance(sizes, Virtual)
        or params["group_offset"] is not None
    ):
        return None
    names = ("precision", "preferred_element_type", "out_sharding")
    options = {k: params[k] for k in names if params.get(k) is not None}
    out = ctx.use(right).ragged_dot(left, sizes, params["ragged_dot_dimension_numbers"], options)
    return _consumed(ctx, eqn, right, out)


def _conv_general_dilated(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    left, right = _larger(ctx, eqn, values)
    if not isinstance(right, Virtual):
        return None
    return _consumed(ctx, eqn, right, ctx.use(right).conv(left, eqn.params))


def _gather(ctx: Context, eqn: Any, values: list[Any]) -> Out:
    if not _first_only(values):
        return None
    weight = values[0]
    indices, params = _without_whole_axes(weight.shape, values[1], eqn.params)
    if not indices.shape[-1]:  # nothing is chosen: as many copies as there are indices
        numbers, shape = params["dimension_numbers"], eqn.outvars[0].aval.shape
        bound = lambda array: lax.broadcast_in_dim(array, shape, numbers.offset_dims)
        return _one(weight.broadcast(shape, [*map(int, numbers.offset_dims)], bound))
    return _consumed(ctx, eqn, weight, weight.gather(indices, params))


def _without_whole_axes(shape: Sequence[int], indices: Any, params: Any) -> tuple[Any, Any]:
    """Leave out of the indices those of axes that are read whole, which are clamped to 0.

    Such are in the index of a dynamic_slice under vmap, which names every axis.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    mapped = numbers.start_index_map
    kept = [i for i, axis in enumerate(mapped) if sizes[axis] != shape[axis] or sizes[axis] == 1]
    clamped = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if len(kept) == len(mapped) or params["mode"] not in clamped:
        return indices, params
    if not kept and numbers.operand_batching_dims:
        return indices, params
    numbers = numbers._replace(start_index_map=tuple(mapped[i] for i in kept))
    chosen = indices[..., np.array(kept, int)]
    # the rest of an index may repeat, in any order
    more = {"unique_indices": False, "indices_are_sorted": False}
    return chosen, {**params, "dimension_numbers": numbers, **more}


RULES: dict[str, Rule] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "rev": _rev,
    "unstack": _unstack,
    "copy": _identity,
    "name": _identity,
    "device_put": _device_put,
    "sharding_constraint": _constraint,
    "layout_constraint": _constraint,
    "reshard": _reshard,
    "pvary": _identity,
    "reduced_vary_cast": _identity,
    "stop_gradient": _stop_gradient,
    "reduce_precision": _everywhere,
    "optimization_barrier": _barrier,
    "mul": _scaled(swap=True),
    "div": _scaled(swap=False),
    "neg": _neg,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "gather": _gather,
    **CONTROL,
}

"""Convolutions with a low-rank kernel: convolve with a to r channels, then multiply by b."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._operators.branch import apply_adapter, multiply_labeled
from lowrank_jax._operators.weight import Options
from lowrank_jax._primitives.contract import RANK, arrange

if TYPE_CHECKING:
    from lowrank_jax._operators.low_rank import LowRankWeight


def conv(w: LowRankWeight, other: jax.Array, options: Options) -> jax.Array | None:
    """lax.conv_general_dilated: the base's convolution plus the factors', or None."""
    numbers = options["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    groups = options["feature_group_count"]
    if options["batch_group_count"] != 1:
        return None
    # The kernel's axes are (out, in, *window) in the order of rhs_spec, so a kernel [3, 3, in, out]
    # has out_axis 3, in_axis 2, window [0, 1]. The factors must be separable: a [3, 3, in, r] holds
    # the window and `in`, b [r, out] holds `out`. A transposed kernel swaps the two.
    a, a_axes, b, b_axes = w.a, w.a_axes, w.b, w.b_axes
    if out_axis in a_axes:
        a, a_axes, b, b_axes = b, b_axes, a, a_axes
    narrow = {axis for axis in range(w.ndim) if w.shape[axis] == 1}
    if {*a_axes} & {out_axis} or {*b_axes} & {in_axis, *window} - narrow:
        return None
    if {*w.gain_axes} - narrow - {out_axis}:
        return None
    squeezed = w.replace(a=a, a_axes=a_axes, b=b, b_axes=b_axes).drop_labels(narrow - {out_axis})
    # An axis of size 1 may be in either factor, like the window of a 1x1 kernel: drop its label.
    return _conv(squeezed, other, options, groups)


def _conv(w: LowRankWeight, x: jax.Array, options: Options, groups: int) -> jax.Array | None:
    """Convolve with a kernel whose a has the window and input axes, and b the output axis."""
    numbers = options["dimension_numbers"]
    out_axis, *kernel_axes = numbers.rhs_spec
    rank = w.a.shape[w.a_axes.index(RANK)]
    fan_in = math.prod(w.shape[axis] for axis in kernel_axes)
    outputs = w.shape[out_axis]
    cheap = fan_in * outputs <= rank * (fan_in * groups + outputs)
    if groups > 1 and cheap and w.key is None:
        # The kernel has fan_in * outputs weights; a, tiled for each group, and b have
        # rank * (fan_in * groups + outputs). For a depthwise kernel, fan_in = 9 and
        # groups = outputs, so the dense kernel is smaller, and one convolution is cheaper.
        return lax.conv_general_dilated(x, w.materialize(), **options)
    thin = {name: value for name, value in options.items() if name != "out_sharding"}

    def base(x: jax.Array) -> Any:
        return w.base.conv(x, options)

    def branch(w: LowRankWeight, x: jax.Array) -> jax.Array:
        return _apply_factors(w, x, numbers, groups, thin)

    def after(y: jax.Array, gains: jax.Array) -> jax.Array:
        labels = tuple(out_axis if axis == numbers.out_spec[1] else None for axis in range(y.ndim))
        return multiply_labeled(y, labels, gains, w.gain_axes)

    return apply_adapter(w, x, base, branch, after=after)


def _apply_factors(
    w: LowRankWeight, x: jax.Array, numbers: lax.ConvDimensionNumbers, groups: int, options: Options
) -> jax.Array:
    """Convolve with a, then mix channels with b."""
    out_axis, *kernel_axes = numbers.rhs_spec
    rank, outputs, dtype = w.a.shape[w.a_axes.index(RANK)], w.shape[out_axis], w.dtype
    sizes = {**dict(enumerate(w.shape)), RANK: rank}
    # a as a kernel [r, in, *window], once per group: [groups * r, in, *window]
    kernel = arrange(w.a.astype(dtype), w.a_axes, (RANK, *kernel_axes), sizes)
    kernel = jnp.tile(kernel, (groups,) + (1,) * len(kernel_axes))
    spec = type(numbers)(numbers.lhs_spec, tuple(range(w.ndim)), numbers.out_spec)
    thin = {**options, "dimension_numbers": spec, "preferred_element_type": None}
    inner = lax.conv_general_dilated(x, kernel, **thin)
    feature = numbers.out_spec[1]
    inner = jnp.moveaxis(w.apply_scale(inner).astype(x.dtype), feature, 0)
    # inner is [groups * r, *rest] now, rest being batch and space; b is [r, out], and out is split
    # by groups: [groups, r, *rest] x [r, groups, out / groups] -> [groups, *rest, out / groups]
    b = arrange(w.b.astype(dtype), w.b_axes, (RANK, out_axis), sizes)
    inner = inner.reshape(groups, rank, *inner.shape[1:])
    b = b.reshape(rank, groups, outputs // groups)
    last = {name: options.get(name) for name in ("precision", "preferred_element_type")}
    mixed = lax.dot_general(inner, b, (((1,), (0,)), ((0,), (1,))), **last)
    mixed = jnp.moveaxis(mixed, -1, 1)
    mixed = mixed.reshape(outputs, *mixed.shape[2:])
    return jnp.moveaxis(mixed, 0, feature)

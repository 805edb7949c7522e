"""Products of a quantized weight, through the quantized_dot primitive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.blocks import (
    BlockConv,
    BlockDot,
    BlockLayout,
    BlockRaggedDot,
    freeze_options,
)
from lowrank_jax._operators.decodings import GroupedDecoding
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight
from lowrank_jax._primitives.quantized_dot import PlatformFn, quantized_dot

if TYPE_CHECKING:
    from lowrank_jax._operators.quantized import QuantizedWeight


def dot(
    w: QuantizedWeight, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
) -> Any:
    """lax.dot_general; None if it contracts some but not all blocked axes, or batches one."""
    (lc, rc), (lb, rb) = numbers
    contracted, batch = (lc, lb) if on_left else (rc, rb)
    blocked = {*w.layout.blocked}
    if blocked & {*batch} or len(blocked & {*contracted}) not in (0, len(blocked)):
        return None
    if not jnp.issubdtype(other.dtype, jnp.floating):
        return None
    decode, parts, layout = w.decoder
    op = BlockDot(_local_layout(w, layout), numbers, on_left, freeze_options(options))
    like = lambda w, other: w.dot(other, numbers, on_left, options)
    return _run_product(w, like, op, decode, other, *parts)


def ragged_dot(
    w: QuantizedWeight, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
) -> Any:
    """lax.ragged_dot_general."""
    if not jnp.issubdtype(other.dtype, jnp.floating):
        return None
    decode, parts, layout = w.decoder
    op = BlockRaggedDot(_local_layout(w, layout), numbers, freeze_options(options))
    like = lambda w, other: w.ragged_dot(other, sizes, numbers, options)
    return _run_product(w, like, op, GroupedDecoding(decode), other, *parts, sizes)


def conv(w: QuantizedWeight, other: jax.Array, options: Options) -> Any:
    """lax.conv_general_dilated."""
    decode, parts, layout = w.decoder
    op = BlockConv(_local_layout(w, layout), freeze_options(options))
    like = lambda w, other: w.conv(other, options)
    return _run_product(w, like, op, decode, other, *parts)


def _run_product(
    w: QuantizedWeight,
    like: Callable[[Weight, jax.Array], jax.Array | None],
    op: PlatformFn,
    decode: PlatformFn,
    other: jax.Array,
    *parts: jax.Array,
) -> Any:
    """Run quantized_dot; on a mesh with explicit axes, with the sharding of the dense product."""
    run = lambda other, *parts: quantized_dot(other, parts, op, decode)
    if not any(map(jaxprs.has_explicit_axes, (other, *parts))):
        return run(other, *parts)
    dense = lambda own, other: like(DenseWeight(own.materialize()), other)
    result = jax.eval_shape(dense, w, other)
    if not any(map(jaxprs.is_split, (result, other, *parts))):
        return run(other, *parts)
    return jaxprs.call_with_auto_axes(run, result.sharding, other, *parts)


def _local_layout(w: QuantizedWeight, layout: BlockLayout) -> BlockLayout:
    """Return the layout with the sizes on this device, where a mesh is manual."""
    shape = w.shape
    return dataclasses.replace(layout, sizes=tuple(shape[axis] for axis in layout.blocked))

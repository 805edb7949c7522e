"""Products of a quantized weight: the blocks are decoded where the activation is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._operators.blocks import (
    BlockConv,
    BlockDot,
    BlockLayout,
    BlockRaggedDot,
    GroupedDecoding,
    freeze_options,
)
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers
from lowrank_jax._primitives.quantized_dot import quantized_dot

if TYPE_CHECKING:
    from lowrank_jax._operators.quantized import QuantizedWeight


def dot(
    w: QuantizedWeight, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
) -> Any:
    """lax.dot_general; None where it contracts a part of the axes that blocks run along."""
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
    w: QuantizedWeight, like: PyTree, op: Any, decode: Any, other: jax.Array, *parts: Any
) -> Any:
    """A product, on a mesh with explicit axes laid out as like(dense weight, other)."""
    run = lambda other, *parts: quantized_dot(other, parts, op, decode)
    if not any(map(jaxprs.has_explicit_axes, (other, *parts))):
        return run(other, *parts)
    dense = lambda own, other: like(DenseWeight(own.materialize()), other)
    result = jax.eval_shape(dense, w, other)
    if not any(map(jaxprs.is_split, (result, other, *parts))):
        return run(other, *parts)
    return jaxprs.call_with_auto_axes(run, result.sharding, other, *parts)


def _local_layout(w: QuantizedWeight, layout: BlockLayout) -> BlockLayout:
    """The layout with the sizes that this device has."""
    shape = w.shape
    return dataclasses.replace(layout, sizes=tuple(shape[axis] for axis in layout.blocked))

r"""Eight-bit codes of the dynamic map, blockwise: the codec of optimizer states, on bare arrays.

The map has a code for numbers from 1e-7 to 1: each decade has twice as many as the one below. In
unsigned form decade d, $10^{d-7} \ldots 10^{d-6}$, is cut into $2^{d+1}$ equal parts, whose middles
are its values, d = 0 ... 6; then 0 and 1. In signed form into $2^d$ parts, and their negatives are
values too. Both are points of one function, piecewise linear,

    V(y) = step_d (18 y + 9 - 16 * 2**(d+1)),  step_d = 10**(d-7) / 2**(d+2),  d = floor(log2 y) - 1

    unsigned: value(c) = V(c + 1)        signed: value(127 + p) = V(2 p + 1/2) = -value(127 - p)

So codes and values are found by arithmetic, which fuses with what makes and uses the numbers. A
table would be gathered from, by every number eight times: compiled for an H100, Adam's update of 16
leaves of 4 MiB has 8 MiB of temporaries this way and 89 MiB that way. Each value is one product of
a constant and an integer, so it is the same wherever it is computed.

Source: arXiv 2110.02861, "Dynamic Tree Quantization"; create_dynamic_map of bitsandbytes 0.50.2,
whose values differ by up to 2 ulps, but for signed code 0: -0.993 there, -1 here, so that the
largest number of a block is kept whatever its sign, and what is decoded and encoded again does not
shrink.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._codecs.blockwise import mask_with_nan

_DECADES = np.arange(8)
_STEPS = 10.0 ** (_DECADES - 7) / 2.0 ** (_DECADES + 2)
_STARTS = 16 * 2.0 ** (_DECADES + 1)
_TINY = np.finfo(np.float32).tiny
_HUGE = np.float32(2.0**100)


def choose_blocks(shape: tuple[int, ...], block_size: int) -> tuple[int, int]:
    """How blocks lie in an array: the axis that they divide, and how much of it is in one.

    A block has the axes after that one whole: a run of consecutive elements, at most block_size.

    >>> choose_blocks((32, 4096, 16), 256), choose_blocks((32, 16, 4096), 256), choose_blocks((8, 4), 256)
    ((-2, 16), (-1, 256), (-2, 8))
    """
    axis, whole = -1, 1
    while -axis < len(shape) and whole * shape[axis] <= block_size:
        whole *= shape[axis]
        axis -= 1
    return axis, min(block_size // whole, shape[axis])


@functools.partial(jax.jit, static_argnums=(1, 2))
def encode_dynamic(x: jax.Array, axis: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Codes of x / absmax: of two values as near the lower one.

    A block without a negative number has the unsigned form, and a negative absmax to tell. In it a
    positive number never becomes 0, which could be a divisor.

    Args:
      x: floating-point, computed in float32; a block with a NaN or an infinity decodes to NaN.
      axis: the axis that blocks divide, counted from the end.
      size: how much of it is in one; the last may be short.

    Returns:
      Codes uint8 of x's shape and absmax float32, of as many axes: ceil(n / size) along the axis,
      1 along those after it, as x before it.

    >>> encode_dynamic(jnp.array([[0.0, 1e-12, 2.0], [0.0, -2.0, 2.0]]), -1, 3)
    (Array([[  0,   1, 255], [127,   0, 255]], dtype=uint8),
     Array([[-2.], [ 2.]], dtype=float32))
    """
    blocks, within = _split(x.astype(jnp.float32), axis, size), tuple(range(axis, 0))
    # XLA's vectorized maximum and minimum on CPU drop NaN, so it is looked for beside them.
    finite = jnp.all(jnp.isfinite(blocks), within, keepdims=True)
    absmax = mask_with_nan(finite, jnp.max(jnp.abs(blocks), within, keepdims=True))
    unsigned = (jnp.min(blocks, within, keepdims=True) >= 0) & finite
    scaled = absmax >= _TINY  # False of a NaN
    # A quarter is exact, and keeps the reciprocal of a huge absmax above 2**-126.
    part = jnp.where(absmax > _HUGE, np.float32(0.25), np.float32(1))
    factor = jnp.where(scaled, 1 / (absmax * part), 0)
    ratios = jnp.where(scaled, blocks * part * factor, 0)
    codes = _join(_find_nearest(ratios, blocks > 0, unsigned), axis, x.shape[axis])
    return codes, jnp.squeeze(jnp.where(unsigned, -absmax, absmax), axis)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def decode_dynamic(
    codes: jax.Array, absmax: jax.Array, axis: int, size: int, dtype: str = "float32"
) -> jax.Array:
    """value(code) * absmax: two roundings in float32, then the cast.

    >>> x = jnp.array([0.0, 1e-12, 2.0])
    >>> decode_dynamic(*encode_dynamic(x, -1, 3), -1, 3)
    Array([0.0e+00, 6.5e-07, 2.0e+00], dtype=float32)
    """
    blocks, absmax = _split(codes, axis, size).astype(jnp.float32), jnp.expand_dims(absmax, axis)
    unsigned, below = absmax <= 0, blocks < 127  # a block of zeros is unsigned
    rank = jnp.where(blocks == 0, 128, jnp.abs(blocks - 127))
    values = _evaluate_map(jnp.where(unsigned, blocks + 1, 2 * rank + 0.5))
    values = jnp.where(~unsigned & below, -values, values) * jnp.abs(absmax)
    return _join(values, axis, codes.shape[axis]).astype(dtype)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., n, *rest] -> [..., ceil(n / size), size, *rest], zeros after the end."""
    at = x.ndim + axis
    short = -x.shape[at] % size
    if short:
        x = jnp.pad(x, [(0, short if i == at else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])


def _join(blocks: jax.Array, axis: int, n: int) -> jax.Array:
    """The inverse of _split."""
    at = blocks.ndim + axis - 1
    x = blocks.reshape(*blocks.shape[:at], -1, *blocks.shape[at + 2 :])
    return lax.slice_in_dim(x, 0, n, axis=at)


def _find_nearest(ratios: jax.Array, positive: jax.Array, unsigned: jax.Array) -> jax.Array:
    """The codes, uint8: the inverse of V tells two neighbors, and their middle which of them."""
    ratio, negative = jnp.abs(ratios), ratios < 0
    inverse, start = _select_by_decade(
        ratio, [-1, *10.0 ** (_DECADES[1:7] - 7)], 1 / _STEPS, _STARTS
    )
    y = (ratio * inverse + start - 9) / 18
    last = jnp.where(unsigned, 255, jnp.where(negative, 126, 127))
    rank = jnp.minimum(jnp.floor(jnp.where(unsigned, y - 0.25, y / 2 - 0.5)), last)

    def value(rank: jax.Array) -> jax.Array:
        rank = jnp.where(negative & (rank == 127), 128, rank)  # there is no -0.993
        return _evaluate_map(jnp.where(unsigned, rank, 2 * rank + 0.5))

    middle = (value(rank) + value(rank + 1)) / 2
    rank += jnp.where(negative, ratio >= middle, ratio > middle)
    whole = jnp.where(positive, jnp.maximum(rank, 2), rank) - 1
    codes = jnp.where(unsigned, whole, jnp.where(negative, 127 - rank, 127 + rank))
    return codes.astype(jnp.int32).astype(jnp.uint8)


def _evaluate_map(y: jax.Array) -> jax.Array:
    """V: 0 below y = 2, 1 from y = 256 on."""
    step, start = _select_by_decade(y, 2.0 ** (_DECADES + 1), _STEPS, _STARTS)
    return jnp.minimum(step * (18 * y + 9 - start), 1)


def _select_by_decade(x: jax.Array, bounds: Any, *rows: np.ndarray) -> list[jax.Array]:
    """The entries of each row at the last bound that x has reached; 0 before the first."""
    entries = [jnp.zeros_like(x) for _ in rows]
    for i, bound in enumerate(bounds):
        reached = x >= np.float32(bound)
        entries = [
            jnp.where(reached, np.float32(row[i]), entry)
            for row, entry in zip(rows, entries, strict=True)
        ]
    return entries

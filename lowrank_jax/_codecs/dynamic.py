r"""Blockwise 8-bit codes of the dynamic map: the codec of quantized optimizer states.

The map covers magnitudes from 1e-7 to 1, with twice as many codes in each decade as in the one
below. In the unsigned form, decade d, $10^{d-7} \ldots 10^{d-6}$, d = 0 ... 6, is cut into
$2^{d+1}$ equal parts whose midpoints are values of the map; 0 and 1 are values too. In the signed
form it is cut into $2^d$ parts, and the negatives of the midpoints are values too. Both forms are
points of one piecewise linear function,

    V(y) = step_d (18 y + 9 - 16 * 2**(d+1)),  step_d = 10**(d-7) / 2**(d+2),  d = floor(log2 y) - 1

    unsigned: value(c) = V(c + 1)        signed: value(127 + p) = V(2 p + 1/2) = -value(127 - p)

Codes and values are thus computed by arithmetic, which XLA fuses with the optimizer's update. A
table would need eight gathers for each number: compiled for an H100, Adam's update of 16 leaves of
4 MiB has 8 MiB of temporaries with arithmetic and 89 MiB with a table. Each value is one product of
a constant and an integer, so it is the same on every backend.

Source: arXiv 2110.02861, "Dynamic Tree Quantization"; create_dynamic_map of bitsandbytes 0.50.2,
whose values differ by up to 2 ulps, except for signed code 0: -0.993 there, -1 here. So the largest
number of a block is kept whatever its sign, and encoding decoded numbers again does not shrink
them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
    """Choose the axis that blocks divide, counted from the end, and the block's size along it.

    A block spans all later axes: it is a run of at most block_size consecutive elements.

    >>> choose_blocks((32, 4096, 16), 256), choose_blocks((32, 16, 4096), 256)
    ((-2, 16), (-1, 256))
    >>> choose_blocks((8, 4), 256)
    (-2, 8)
    """
    # [32, 4096, 16]: the last axis fits whole into 256 elements, two axes (65536) do not; so blocks
    # divide axis -2, 256 // 16 = 16 of it each, and a block is [16, 16] of consecutive elements.
    axis, whole = -1, 1
    while -axis < len(shape) and whole * shape[axis] <= block_size:
        whole *= shape[axis]
        axis -= 1
    return axis, min(block_size // whole, shape[axis])


@functools.partial(jax.jit, static_argnums=(1, 2))
def encode_dynamic(x: jax.Array, axis: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Encode x / absmax blockwise; ties go to the lower value.

    A block without negative numbers uses the unsigned form, which a negative absmax marks. In that
    form a positive number never becomes 0, because it may be a divisor.

    Args:
      x: floating-point array; the computation is in float32. A block with a NaN or an infinity
        decodes to NaN.
      axis: the axis that blocks divide, counted from the end.
      size: the block's size along the axis; the last block may be short.

    Returns:
      Codes, uint8 with the shape of x, and absmax, float32 with as many axes: the sizes of x before
      the axis, ceil(n / size) along it, 1 after it.

    >>> encode_dynamic(jnp.array([[0.0, 1e-12, 2.0], [0.0, -2.0, 2.0]]), -1, 3)
    (Array([[  0,   1, 255], [127,   0, 255]], dtype=uint8),
     Array([[-2.], [ 2.]], dtype=float32))
    """
    blocks, within = _split(x.astype(jnp.float32), axis, size), tuple(range(axis, 0))
    # x [32, 4096, 16] with axis -2 and size 16: blocks is [32, 256, 16, 16], `within` is the axes
    # (-2, -1), and absmax is [32, 256, 1, 1] until the axis of the elements is squeezed out.
    # XLA's vectorized maximum and minimum on CPU drop NaN, hence the separate isfinite.
    finite = jnp.all(jnp.isfinite(blocks), within, keepdims=True)
    absmax = mask_with_nan(finite, jnp.max(jnp.abs(blocks), within, keepdims=True))
    unsigned = (jnp.min(blocks, within, keepdims=True) >= 0) & finite
    scaled = absmax >= _TINY  # False of a NaN
    # Multiplying by a quarter is exact and keeps the reciprocal of a huge absmax above 2**-126.
    part = jnp.where(absmax > _HUGE, np.float32(0.25), np.float32(1))
    factor = jnp.where(scaled, 1 / (absmax * part), 0)
    ratios = jnp.where(scaled, blocks * part * factor, 0)
    codes = _join(_find_nearest(ratios, blocks > 0, unsigned), axis, x.shape[axis])
    return codes, jnp.squeeze(jnp.where(unsigned, -absmax, absmax), axis)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def decode_dynamic(
    codes: jax.Array, absmax: jax.Array, axis: int, size: int, dtype: str = "float32"
) -> jax.Array:
    """Decode blocks: value(code) * absmax, two roundings in float32 and then the cast.

    codes and absmax are as returned by `encode_dynamic`; the result has the shape of codes.

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
    """Reshape [..., n, *rest] to [..., ceil(n / size), size, *rest], padded with zeros."""
    at = x.ndim + axis
    short = -x.shape[at] % size
    if short:
        x = jnp.pad(x, [(0, short if i == at else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])


def _join(blocks: jax.Array, axis: int, n: int) -> jax.Array:
    """Undo `_split`: reshape [..., blocks, size, *rest] to [..., n, *rest]."""
    at = blocks.ndim + axis - 1
    x = blocks.reshape(*blocks.shape[:at], -1, *blocks.shape[at + 2 :])
    return lax.slice_in_dim(x, 0, n, axis=at)


def _find_nearest(ratios: jax.Array, positive: jax.Array, unsigned: jax.Array) -> jax.Array:
    """Return the nearest codes, uint8, of ratios in [-1, 1]; all arguments broadcast together."""
    # V(y) = |ratio|, so the nearest value has rank c + 1 near y (unsigned) or p near y / 2 - 1 / 4.
    # Rounding that down gives two candidates, rank and rank + 1, and the midpoint of their values
    # decides. A quarter is subtracted first: y = 5.001 computed as 4.999 or as 5.001 then gives the
    # candidates 4 and 5 alike, so float32 rounding cannot skip the nearest one.
    # Ties go to the lower value, which for a negative ratio is the one of larger magnitude.
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
    """Evaluate V, elementwise: 0 below y = 2, 1 from y = 256 on."""
    step, start = _select_by_decade(y, 2.0 ** (_DECADES + 1), _STEPS, _STARTS)
    return jnp.minimum(step * (18 * y + 9 - start), 1)


def _select_by_decade(
    x: jax.Array, bounds: Sequence[float] | np.ndarray, *rows: np.ndarray
) -> list[jax.Array]:
    """Select from each row the entry of the last bound that is <= x; 0 below the first bound."""
    # A chain of selects and not a gather, so that it fuses: x = 5 with bounds (2, 4, 8, ...) ends
    # up with entry 1 of each row. The results have the shape of x.
    entries = [jnp.zeros_like(x) for _ in rows]
    for i, bound in enumerate(bounds):
        reached = x >= np.float32(bound)
        entries = [
            jnp.where(reached, np.float32(row[i]), entry)
            for row, entry in zip(rows, entries, strict=True)
        ]
    return entries

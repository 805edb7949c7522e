"""Double quantization: the scales of blocks stored as 8-bit codes, as in bitsandbytes.

Source: QLoRA, arXiv 2305.14314, section 3, "Double Quantization".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._codecs.blockwise import mask_with_nan, normalize_flat
from lowrank_jax._codecs.formats import compute_midpoints, select_from_table

SCALE_BLOCK = 256  # number of scales that share one float32 of the second level


def _build_dynamic_map() -> np.ndarray:
    """Build the signed 8-bit map of bitsandbytes, float32 [256], ascending."""
    # For decade i the midpoints of 2**i equal parts of [0.1, 1], times 10**(i - 6), of both signs:
    # 2 * (1 + 2 + ... + 64) = 254 values, and then 0 and 1. torch.linspace uses a fused
    # multiply-add, which float64 reproduces. On a CPU without FMA torch's map differs by an ulp in
    # 42 entries, so a file may come with a map of its own.
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        parts, k = 2**i, np.arange(2**i + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(parts))
        rising = k < (parts + 1) // 2
        edges = np.where(rising, np.float64(np.float32(0.1)) + step * k, 1 - step * (parts - k))
        decade = np.float32(10.0 ** (i - 6)) * compute_midpoints(edges.astype(np.float32))
        values += [decade, -decade]
    return np.sort(np.concatenate(values))


DYNAMIC_MAP = _build_dynamic_map()


@functools.partial(jax.jit, static_argnums=1)
def encode_scales(
    absmax: jax.Array, dtype: str = "float32"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization: encode the differences of scales from their mean in 8 bits.

    Args:
      absmax: float32 [n], in the flat order of the blocks.
      dtype: dtype of the leaf. nested_absmax is NaN for scales that overflow it once decoded.

    Returns:
      Codes uint8 [n], nested_absmax float32 [ceil(n / 256)] and offset, a float32 scalar. The codes
      are those of the exact kernels of bitsandbytes; its CPU kernel rounds by a table of 65536
      entries and is off by a few codes near 0. The offset is the mean to 2 ulps, summed in a fixed
      order, so it may differ from torch's by 3 ulps. A scale that is NaN counts as 0 in the mean
      and makes its nested_absmax NaN: the 256 scales of that block, and no others, decode to NaN.

    Source: arXiv 2305.14314, section 3, "Double Quantization".

    >>> codes, nested, offset = encode_scales(jnp.array([1.0, 2.0, 3.0]))
    >>> codes, nested, offset
    (Array([  0, 127, 255], dtype=uint8), Array([1.], dtype=float32), Array(2., dtype=float32))
    """
    # The order is that of bitsandbytes: 1. offset = the mean of all scales, 2. the differences from
    # it, 3. nested = the absmax of each 256 differences, 4. codes = the nearest entries of the map.
    # For n = 300 scales: differences [300], ratios [300], nested [2], codes [300].
    offset = _pairwise_mean(jnp.where(jnp.isnan(absmax), np.float32(0), absmax))
    ratios, nested = normalize_flat(absmax - offset, SCALE_BLOCK)
    codes = jnp.searchsorted(compute_midpoints(DYNAMIC_MAP), ratios, side="left")
    codes = codes.astype(jnp.uint8)
    # Does the largest decoded scale of each block fit `dtype`? Decoded scales increase with their
    # codes, so it is that of the largest code: [300] -> padded [512] -> [2, 256] -> [2].
    short = -codes.size % SCALE_BLOCK
    last = jnp.max(jnp.pad(codes, (0, short)).reshape(-1, SCALE_BLOCK), 1)
    largest = _multiply_then_add(
        jnp.take(DYNAMIC_MAP, last.astype(jnp.int32), mode="clip"), nested, offset
    )
    fits = jnp.isfinite(largest.astype(dtype))
    return codes, mask_with_nan(fits, nested), offset


def _pairwise_mean(x: jax.Array) -> jax.Array:
    """Mean of non-negative numbers [n], summed pairwise in a fixed order."""
    # [5] -> [2] + [2] and the one left over -> [3] -> [2] -> [1]. jnp.sum would not do: XLA chooses
    # its order by backend, and the offset, hence every code, would depend on it.
    n = x.size
    while x.size > 1:
        half = x.size // 2
        x = jnp.concatenate([x[:half] + x[half : 2 * half], x[2 * half :]])
    # The maximum keeps XLA from fusing this product and a later sum into a multiply-add.
    return jnp.maximum(x[0] * (np.float32(1) / np.float32(n)), 0)


def decode_scales(
    codes: jax.Array,
    nested_absmax: jax.Array,
    offset: jax.Array,
    order: Sequence[int] | None = None,
    table: jax.Array | np.ndarray = DYNAMIC_MAP,
    tree: bool = False,
) -> jax.Array:
    """Decode scales: table[codes] * nested_absmax[flat index // 256] + offset, two roundings.

    Args:
      codes: uint8, [n] in flat order, or of any shape if `order` is given.
      nested_absmax: float32 [ceil(n / 256)].
      offset: float32 scalar.
      order: the axes of codes, from the slowest to the fastest of the flat order.
      table: float32 [256]; the map in a file may differ by an ulp.
      tree: look up by selects instead of a gather, which is slow on TPU. Pass the table as a traced
        array then (see `select_from_table`).

    Returns:
      float32 with the shape of codes.
    """
    # The flat index of a scale decides which nested scale it has. Codes [3, 200] with order (1, 0)
    # are flat with axis 1 slowest: nested [3] is repeated to [768], cut to [600], reshaped to
    # [200, 3] and transposed to [3, 200], so that it lines up with the codes, which stay in place.
    axes = range(codes.ndim) if order is None else order
    blocks = jnp.broadcast_to(nested_absmax[:, None], (nested_absmax.size, SCALE_BLOCK))
    nested = blocks.reshape(-1)[: codes.size].reshape([codes.shape[axis] for axis in axes])
    nested = jnp.transpose(nested, np.argsort(axes).tolist())
    table = jnp.asarray(table)
    values = (
        select_from_table(codes, table)
        if tree
        else jnp.take(table, codes.astype(jnp.int32), mode="clip")
    )
    return _multiply_then_add(values, nested, offset)


def _multiply_then_add(values: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    """Compute values * nested + offset with two roundings, as bitsandbytes does."""
    # |values| <= 1, so the clip changes nothing; it keeps XLA from emitting a fused multiply-add,
    # which would round once.
    return jnp.clip(values * nested, -nested, nested) + offset

"""Double quantization: the scales of blocks, themselves kept as 8-bit codes, as in bitsandbytes.

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

SCALE_BLOCK = 256  # how many scales share one float32


def _build_dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit map, float32 [256] ascending.

    Decade by decade, the middles of 2**i equal parts of [0.1, 1], both signs, then 0 and 1.
    torch.linspace fuses its multiply and add, which float64 does here. (Where torch runs on a CPU
    without FMA it does not, and 42 entries differ by an ulp: a file brings its own map.)
    """
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
    """Double quantization: 8-bit codes of the scales' differences from their mean.

    Args:
      absmax: float32 [n] in the flat order of the blocks.
      dtype: of the leaf that they scale. Where a scale, decoded again, would be beyond it,
        nested_absmax is NaN.

    Returns:
      Codes uint8 [n], nested_absmax float32 [ceil(n / 256)], offset float32 scalar. The codes are
      those of bitsandbytes' exact kernels; the one it runs on CPU rounds by a table of 65536 and
      is off by a few codes next to 0. The offset is the mean to 2 ulps, summed in a fixed order;
      so it may be 3 ulps from torch's. A scale that is NaN counts as 0 in it, and makes
      nested_absmax NaN: the scales beside it, and no others, are decoded to NaN.

    Source: arXiv 2305.14314, section 3, "Double Quantization".

    >>> codes, nested, offset = encode_scales(jnp.array([1.0, 2.0, 3.0]))
    >>> codes, nested, offset
    (Array([  0, 127, 255], dtype=uint8), Array([1.], dtype=float32), Array(2., dtype=float32))
    """
    offset = _pairwise_mean(jnp.where(jnp.isnan(absmax), np.float32(0), absmax))
    ratios, nested = normalize_flat(absmax - offset, SCALE_BLOCK)
    codes = jnp.searchsorted(compute_midpoints(DYNAMIC_MAP), ratios, side="left")
    codes = codes.astype(jnp.uint8)
    # decoded scales rise with their codes: of each block the last code tells
    short = -codes.size % SCALE_BLOCK
    last = jnp.max(jnp.pad(codes, (0, short)).reshape(-1, SCALE_BLOCK), 1)
    largest = _multiply_then_add(
        jnp.take(DYNAMIC_MAP, last.astype(jnp.int32), mode="clip"), nested, offset
    )
    fits = jnp.isfinite(largest.astype(dtype))
    return codes, mask_with_nan(fits, nested), offset


def _pairwise_mean(x: jax.Array) -> jax.Array:
    """Mean of non-negative numbers, by halves: the order of a reduction is XLA's choice."""
    n = x.size
    while x.size > 1:
        half = x.size // 2
        x = jnp.concatenate([x[:half] + x[half : 2 * half], x[2 * half :]])
    # The maximum keeps this product from being contracted with what is added to it.
    return jnp.maximum(x[0] * (np.float32(1) / np.float32(n)), 0)


def decode_scales(
    codes: jax.Array,
    nested_absmax: jax.Array,
    offset: jax.Array,
    order: Sequence[int] | None = None,
    table: jax.Array | np.ndarray = DYNAMIC_MAP,
    tree: bool = False,
) -> jax.Array:
    """The scales again: table[codes] * nested_absmax[flat index // 256] + offset, two roundings.

    Args:
      codes: uint8, [n] in flat order; in any other shape with an order.
      nested_absmax: float32 [ceil(n / 256)].
      offset: float32 scalar.
      order: the axes of codes, the slowest of the flat order first.
      table: float32 [256]; a file's own may differ by an ulp.
      tree: look up by selects. On TPU a gather is slow; 255 selects are quick. Pass the table as
        a traced array there (see `lookup`).

    Returns:
      float32 of codes' shape.
    """
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
    """values * nested + offset, two roundings."""
    # No value exceeds 1, so the clip changes nothing, but the product is rounded before the sum.
    return jnp.clip(values * nested, -nested, nested) + offset

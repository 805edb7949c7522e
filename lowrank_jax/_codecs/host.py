"""The blockwise codecs for NumPy arrays, computed on the host without compilation.

Codes and scales equal those of the JAX codecs bit for bit. NumPy divides with IEEE 754 rounding.
XLA flushes float32 below 2**-126 to 0, which `_flush_subnormals` does here.
"""

from __future__ import annotations

import jax
import numpy as np

from lowrank_jax._codecs.formats import check_block_size, compute_midpoints, get_format
from lowrank_jax._codecs.scales import DYNAMIC_MAP, SCALE_BLOCK

_TINY = np.finfo(np.float32).tiny
_SMALL = np.float32(2.0**-100)  # above this absmax, numbers that are flushed get 0's code anyway
_QUARTER = np.float32(0.25)
_PIECE = 1 << 18  # numbers searched at a time: searchsorted returns eight bytes for each


def encode_blocks(x: np.ndarray, format: str, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Encode whole blocks of a NumPy array, as `lowrank_jax._codecs.encode_blocks` does.

    Raises:
      ConfigError: the format is unknown, or the size of the axis is not one of BLOCK_SIZES.
    """
    check_block_size(x.shape[axis])
    row = get_format(format)
    ratios, absmax = _normalize(np.asarray(x, np.float32), axis, exact=row.has_two_zeros)
    return row.to_codes_numpy(ratios), absmax.squeeze(axis)


def encode_flat(x: np.ndarray, format: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode a flat array [n], as `lowrank_jax._codecs.encode_flat` does."""
    check_block_size(block_size)
    full = x.size - x.size % block_size
    codes, absmax = encode_blocks(x[:full].reshape(-1, block_size), format)
    codes = codes.reshape(-1)
    if full < x.size:
        ratios, last = _normalize_short(np.asarray(x[full:], np.float32))
        ratios = np.pad(ratios, (0, full + block_size - x.size))
        codes = np.concatenate([codes, get_format(format).to_codes_numpy(ratios)])
        absmax = np.append(absmax, last)
    return codes, absmax


def encode_scales(
    absmax: np.ndarray, dtype: jax.typing.DTypeLike = np.float32
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Quantize scales float32 [n] in their turn, as `_codecs.scales.encode_scales` does."""
    # The order of operations is that of the JAX codec: mean, differences, absmax of their blocks,
    # codes, and last the test whether the largest decoded scale of each block fits `dtype`.
    with np.errstate(over="ignore"):  # an infinite offset makes every scale NaN
        offset = _pairwise_mean(np.where(np.isnan(absmax), np.float32(0), absmax))
    x = _flush_subnormals(absmax - offset)
    full = x.size - x.size % SCALE_BLOCK
    ratios, nested = _normalize(x[:full].reshape(-1, SCALE_BLOCK), 1, exact=True)
    ratios, nested = ratios.reshape(-1), nested.reshape(-1)
    if full < x.size:
        rest, last = _normalize_short(x[full:])
        ratios, nested = np.concatenate([ratios, rest]), np.append(nested, last)
    codes, middles = np.empty(ratios.shape, np.uint8), compute_midpoints(DYNAMIC_MAP)
    for start in range(0, codes.size, _PIECE):
        piece = slice(start, start + _PIECE)
        codes[piece] = np.searchsorted(middles, ratios[piece], side="left")
    last = np.maximum.reduceat(codes, np.arange(0, codes.size, SCALE_BLOCK))
    with np.errstate(over="ignore"):
        largest = (DYNAMIC_MAP[last] * nested + offset).astype(dtype)
    nested[~np.isfinite(largest)] = np.nan
    return codes, nested, offset


def pack(codes: np.ndarray, axis: int, packing: str) -> np.ndarray:
    """Pack 4-bit codes as `lowrank_jax._codecs.packing.pack` does; "uint4" codes stay bytes."""
    if packing == "uint4":
        return codes
    high, low = np.split(codes, 2, axis)
    return (high << 4) | low


def _normalize(x: np.ndarray, axis: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return x / absmax in a new array, and absmax with the axis kept.

    A block with a value that is not finite gets ratios 0 and absmax NaN. With `exact`, subnormal
    numbers are flushed even where they would get the code of 0 in any case.
    """
    # In place as far as possible: besides x, one array of its size is allocated (`ratios`). As in
    # the JAX codec, x and absmax are quartered so that 1 / absmax does not become subnormal.
    ratios = np.abs(x)
    absmax = ratios.max(axis, keepdims=True, initial=0)
    bad = ~np.isfinite(absmax)
    absmax[bad] = np.nan
    exact = exact or not absmax.min(initial=_SMALL) >= _SMALL
    np.multiply(x, _QUARTER, out=ratios)
    if bad.any():
        np.copyto(ratios, np.float32(0), where=bad)
    divisor = absmax * _QUARTER
    none = ~(divisor >= _TINY)  # True of a NaN
    divisor[none] = 1
    factor = np.float32(1) / divisor
    factor[none] = 0
    if exact:
        _flush_subnormals(ratios)
    ratios *= factor
    if exact:
        _flush_subnormals(ratios)
    absmax[absmax < _TINY] = 0
    return ratios, absmax


def _normalize_short(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Return x / absmax of a short block [n], by division as in bitsandbytes, and absmax."""
    absmax = np.abs(x).max()
    if not np.isfinite(absmax):
        return np.zeros_like(x), np.float32(np.nan)
    if absmax < _TINY:
        return np.zeros_like(x), np.float32(0)
    return _flush_subnormals(_flush_subnormals(x.copy()) / absmax), absmax


def _flush_subnormals(x: np.ndarray) -> np.ndarray:
    """Set to 0, in place, the numbers that XLA flushes to 0; return the array."""
    x[np.abs(x) < _TINY] = 0
    return x


def _pairwise_mean(x: np.ndarray) -> np.float32:
    """Mean of non-negative numbers [n], summed pairwise in the order of the JAX codec."""
    n = x.size
    while x.size > 1:
        half = x.size // 2
        x = np.concatenate([x[:half] + x[half : 2 * half], x[2 * half :]])
    mean = x[0] * (np.float32(1) / np.float32(n))
    return np.float32(0) if mean < _TINY else mean

"""Blockwise quantization of plain arrays, bit-compatible with bitsandbytes.

A block of B elements is stored as B small codes and one float32 scale, its largest magnitude:

    absmax = max |x|,    code = nearest(x / absmax),    decoded = value[code] * absmax

A block that holds a NaN or an infinity gets absmax NaN, so the whole block decodes to NaN and no
other block is affected. Its codes are those of 0.

Codes are the same eagerly, under jit and under vmap, and equal those of bitsandbytes where absmax
is 0 or in [2e-35, 8e37]. Three measures ensure this. XLA flushes float32 below 2**-126 to 0, so a
block with such an absmax counts as a block of zeros. Division is done by `_divide`. All other
operations are products, comparisons and selects, which XLA does not rewrite (tested on CPU; the
PTX compiled for an H100 contains only mul.rn).

Sources: QLoRA, arXiv 2305.14314, section 3; bitsandbytes 0.50.2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._codecs.formats import check_block_size, get_format

_TINY = np.finfo(np.float32).tiny


@functools.partial(jax.jit, static_argnums=(1, 2))
def encode_blocks(x: jax.Array, format: str, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    r"""Encode whole blocks.

    $c_i = \operatorname{nearest}(x_i \cdot \frac{1}{m})$, $m = \max_i |x_i|$. As in bitsandbytes,
    elements are multiplied by the rounded reciprocal, not divided. Ties go to the lower value. int8
    rounds $127\, x_i \cdot \frac{1}{m}$ half to even, so the error is at most m / 254.

    Args:
      x: floating-point array; the computation is in float32.
      format: a name in FORMATS.
      axis: the axis of the elements of a block; its size is the block size.

    Returns:
      Codes with the shape of x, uint8 (int8 for "int8"), and absmax, float32, with the shape of x
      without the axis. absmax is 0 for a block of zeros and NaN for a block with a value that is
      not finite.

    Raises:
      ConfigError: the format is unknown, or the size of the axis is not one of BLOCK_SIZES.

    >>> codes, absmax = encode_blocks(jnp.linspace(-2.0, 2.0, 64), "nf4")
    >>> codes[::9], absmax
    (Array([ 0,  1,  3,  5,  9, 12, 14, 15], dtype=uint8), Array(2., dtype=float32))
    """
    check_block_size(x.shape[axis])
    ratios, absmax = _normalize(x, axis, short=False)
    return get_format(format).to_codes(ratios), absmax


@functools.partial(jax.jit, static_argnums=(1, 2))
def encode_flat(x: jax.Array, format: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Encode a flat array whose last block may be short.

    Args:
      x: floating-point [n], for example a torch weight [out, in] in row-major order.
      format: a name in FORMATS.
      block_size: one of BLOCK_SIZES.

    Returns:
      Codes [blocks * block_size], padded with the code of 0, and absmax float32 [blocks]. As in
      bitsandbytes, the elements of a short block are divided by absmax. (For a short block of zeros
      bitsandbytes stores 1e-38, which XLA flushes to 0; here absmax is 0.)

    Raises:
      ConfigError: the format is unknown, or block_size is not one of BLOCK_SIZES.

    >>> codes, absmax = encode_flat(jnp.ones(70), "fp4", 64)
    >>> codes[64:72], absmax
    (Array([3, 3, 3, 3, 3, 3, 0, 0], dtype=uint8), Array([1., 1.], dtype=float32))
    """
    check_block_size(block_size)
    ratios, absmax = normalize_flat(x, block_size)
    ratios = jnp.pad(ratios, (0, absmax.size * block_size - x.size))
    return get_format(format).to_codes(ratios), absmax


def mask_with_nan(condition: jax.Array, x: jax.Array) -> jax.Array:
    """Keep x where the condition holds and replace it by NaN elsewhere; float32."""
    # The NaN is computed as inf * 0: `jax_debug_nans` raises for a NaN constant even if unused.
    return x + jnp.where(condition, np.float32(0), np.float32(np.inf)) * np.float32(0)


def compute_absmax(x: jax.Array, axis: int) -> jax.Array:
    """Compute max |x| along an axis, which is kept with size 1; NaN if a value is not finite.

    The result is float32.

    >>> compute_absmax(jnp.array([[1.0, -2.0], [jnp.nan, 3.0], [-jnp.inf, 0.0]]), 1)
    Array([[ 2.], [nan], [nan]], dtype=float32)
    """
    # XLA's vectorized maximum and minimum on CPU drop NaN, hence the separate isfinite. They reduce
    # x itself and not |x|, since XLA would write |x|, an array of x's size, to memory first.
    over = {"axis": axis, "keepdims": True}
    largest = jnp.abs(jnp.maximum(jnp.max(x, **over), -jnp.min(x, **over)))
    return mask_with_nan(jnp.all(jnp.isfinite(x), **over), largest)


def _normalize(x: jax.Array, axis: int, short: bool) -> tuple[jax.Array, jax.Array]:
    """Return x / absmax in [-1, 1], which is 0 in a block without a scale, and absmax.

    x: [..., block, ...], the ratios too, with the block along `axis`; absmax lacks that axis.
    """
    x = x.astype(jnp.float32)
    absmax = compute_absmax(x, axis)
    scaled = absmax >= _TINY  # False of a NaN
    divisor = jnp.where(scaled, absmax, np.float32(1))
    if short:
        ratios = _divide(jnp.abs(x), divisor)
        ratios = jnp.where(x < 0, -ratios, ratios)
    else:
        # Multiplying by a quarter is exact and keeps the reciprocal of a huge absmax above 2**-126:
        # 1 / 3e38 would be flushed to 0, 1 / (3e38 / 4) is not. The clip changes no value, but it
        # keeps XLA from multiplying the reciprocal by the quarter first.
        divisor = divisor * np.float32(0.25)
        quarters = jnp.clip(x * np.float32(0.25), -divisor, divisor)
        ratios = quarters * _divide(np.float32(1), divisor)
    ratios = jnp.where(scaled, ratios, np.float32(0))
    absmax = jnp.squeeze(jnp.where(absmax < _TINY, np.float32(0), absmax), axis)  # a NaN stays one
    return jnp.clip(ratios, -1, 1), absmax


def _divide(x: jax.Array | np.float32, y: jax.Array) -> jax.Array:
    """Divide with IEEE 754 rounding, x >= 0 and y >= 2**-126; quotients below 2**-126 become 0."""
    # XLA's own division is not exact: on GPUs it is off by an ulp or two (rcp.approx, div.full), on
    # CPU it may become a product. This is long division of the 24-bit mantissas in int32. For 1 / 3
    # they are 2**23 and 3 * 2**22, so a is shifted left once, to be at least b, and the exponent
    # lowered by one; 25 steps then give 24 bits of the quotient and one rounding bit.
    x, y = jnp.broadcast_arrays(x, y)
    a, b = lax.bitcast_convert_type(x, jnp.int32), lax.bitcast_convert_type(y, jnp.int32)
    exponent = (a >> 23) - (b >> 23)
    a, b = (a & 0x7FFFFF) | 0x800000, (b & 0x7FFFFF) | 0x800000
    smaller = (a < b).astype(jnp.int32)
    a, exponent = a << smaller, exponent - smaller

    def step(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, quotient = carry
        bit = (rest >= b).astype(jnp.int32)
        return (rest - bit * b) << 1, (quotient << 1) | bit

    # Not a constant: inside shard_map a loop's carry must vary over the same axes as its result.
    zero = a & b & 0
    _, quotient = lax.fori_loop(0, 25, step, (a | zero, zero))
    # The 25th bit rounds to nearest: the quotient of two 24-bit numbers is never a tie.
    bits = ((exponent + 126) << 23) + ((quotient + 1) >> 1)
    normal = (exponent > -127) & (x >= _TINY)
    return jnp.where(normal, lax.bitcast_convert_type(bits, jnp.float32), np.float32(0))


def normalize_flat(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Return x / absmax, [n], and absmax, [ceil(n / block)], of a flat array x, [n]."""
    # n = 70 and block = 64: the first 64 elements are reshaped to [1, 64], the remaining 6 are a
    # short block of their own. bitsandbytes multiplies by the reciprocal in the former and divides
    # in the latter; the ratios are joined to [70], absmax is [2].
    n = x.size
    full = n - n % block
    ratios, absmax = _normalize(x[:full].reshape(-1, block), 1, short=False)
    ratios = ratios.reshape(-1)
    if full < n:
        rest, last = _normalize(x[full:], 0, short=True)
        ratios, absmax = jnp.concatenate([ratios, rest]), jnp.append(absmax, last)
    return ratios, absmax


def decode_blocks(
    codes: jax.Array,
    absmax: jax.Array,
    format: str,
    axis: int = -1,
    dtype: jax.typing.DTypeLike = jnp.float32,
    table: jax.Array | None = None,
    gather: bool = False,
) -> jax.Array:
    """Decode blocks: value[codes] * absmax, one rounding in float32 and then the cast.

    Args:
      codes: integers of any dtype, as returned by `encode_blocks`.
      absmax: shape of codes without the axis.
      format: a name in FORMATS.
      axis: the axis of the elements of a block.
      dtype: dtype of the result.
      table: the format's table as a traced array, for `select_from_table`.
      gather: whether values are gathered from the table, not selected.

    >>> x = jnp.array([[0.0, -0.5, 1.0, 0.25] * 8])
    >>> decode_blocks(*encode_blocks(x, "fp4"), "fp4")[0, :4]
    Array([ 0.  , -0.5 ,  1.  ,  0.25], dtype=float32)
    """
    values = get_format(format).to_values(codes, table, gather)
    return (values * jnp.expand_dims(to_code_scale(absmax, format), axis)).astype(dtype)


def to_code_scale(absmax: jax.Array, format: str) -> jax.Array:
    """Compute the factor from codes to weights: absmax, or absmax * (1 / limit) for integers."""
    spec = get_format(format)
    absmax = absmax.astype(jnp.float32)
    return absmax * (np.float32(1) / np.float32(spec.limit)) if spec.table is None else absmax

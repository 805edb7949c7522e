"""Blockwise codecs on bare arrays, bit for bit those of bitsandbytes.

A block of B elements is kept as B small codes and one float32, its largest magnitude:

    absmax = max |x|,    code = nearest(x / absmax),    decoded = value[code] * absmax

A block with a NaN or an infinity has absmax NaN, so that all of it, and no other block, decodes to
NaN; its codes are those of 0.

Codes are the same eager, under jit and under vmap, and equal bitsandbytes' wherever absmax is 0 or
in [2e-35, 8e37]. What that takes: XLA reads float32 below 2**-126 as 0, so a block with such an
absmax is a block of zeros; divisions are `_divide`; what follows is products, comparisons and
selects, which XLA leaves as they are (run on CPU; H100's PTX has only mul.rn).

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
    r"""Codes of whole blocks.

    $c_i = \operatorname{nearest}(x_i \cdot \frac{1}{m})$, $m = \max_i |x_i|$: multiplied by the
    rounded reciprocal, as bitsandbytes does, not divided. Ties go to the lower value. int8 rounds
    $127\, x_i \cdot \frac{1}{m}$ half to even, so that no element is off by more than m / 254.

    Args:
      x: floating-point array, computed in float32.
      format: a name in FORMATS.
      axis: the axis that is a block.

    Returns:
      Codes of x's shape, uint8 (int8 for "int8"), and absmax, float32, without the axis.
      A block of zeros has absmax 0, one with a value that is not finite NaN.

    Raises:
      ConfigError: the format is unknown, or the axis is not of a block's size.

    >>> codes, absmax = encode_blocks(jnp.linspace(-2.0, 2.0, 64), "nf4")
    >>> codes[::9], absmax
    (Array([ 0,  1,  3,  5,  9, 12, 14, 15], dtype=uint8), Array(2., dtype=float32))
    """
    check_block_size(x.shape[axis])
    ratios, absmax = _normalize(x, axis, short=False)
    return get_format(format).to_codes(ratios), absmax


@functools.partial(jax.jit, static_argnums=(1, 2))
def encode_flat(x: jax.Array, format: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Codes of a flat array, whose last block may be short.

    Args:
      x: floating-point [n], a torch weight [out, in] in its own order.
      format: a name in FORMATS.
      block_size: one of BLOCK_SIZES.

    Returns:
      Codes [blocks * block_size], padded with the code of 0, and absmax float32 [blocks]. As in
      bitsandbytes a short block is divided by its absmax. (If that is 0, bitsandbytes stores 1e-38,
      which XLA takes for 0: here it is 0.)

    Raises:
      ConfigError: the format is unknown or the block size impossible.

    >>> codes, absmax = encode_flat(jnp.ones(70), "fp4", 64)
    >>> codes[64:72], absmax
    (Array([3, 3, 3, 3, 3, 3, 0, 0], dtype=uint8), Array([1., 1.], dtype=float32))
    """
    check_block_size(block_size)
    ratios, absmax = normalize_flat(x, block_size)
    ratios = jnp.pad(ratios, (0, absmax.size * block_size - x.size))
    return get_format(format).to_codes(ratios), absmax


def mask_with_nan(condition: jax.Array, x: jax.Array) -> jax.Array:
    """x where the condition holds, else NaN; float32.

    The NaN is a product, for `jax_debug_nans` refuses one that is a constant, used or not.
    """
    return x + jnp.where(condition, np.float32(0), np.float32(np.inf)) * np.float32(0)


def compute_absmax(x: jax.Array, axis: int) -> jax.Array:
    """max |x| along an axis, which is kept; NaN where a value is not finite. float32.

    XLA's vectorized maximum and minimum on CPU drop NaN, so it is looked for beside them. They are
    of x itself, for magnitudes would be written to memory first.

    >>> compute_absmax(jnp.array([[1.0, -2.0], [jnp.nan, 3.0], [-jnp.inf, 0.0]]), 1)
    Array([[ 2.], [nan], [nan]], dtype=float32)
    """
    over = {"axis": axis, "keepdims": True}
    largest = jnp.abs(jnp.maximum(jnp.max(x, **over), -jnp.min(x, **over)))
    return mask_with_nan(jnp.all(jnp.isfinite(x), **over), largest)


def _normalize(x: jax.Array, axis: int, short: bool) -> tuple[jax.Array, jax.Array]:
    """x / absmax in [-1, 1], 0 in a block that has no scale, and absmax."""
    x = x.astype(jnp.float32)
    absmax = compute_absmax(x, axis)
    scaled = absmax >= _TINY  # False of a NaN
    divisor = jnp.where(scaled, absmax, np.float32(1))
    if short:
        ratios = _divide(jnp.abs(x), divisor)
        ratios = jnp.where(x < 0, -ratios, ratios)
    else:
        # Quarters are exact, and keep the reciprocal of a huge absmax above 2**-126. The clip
        # changes nothing, but XLA cannot multiply the reciprocal by the quarter first.
        divisor = divisor * np.float32(0.25)
        quarters = jnp.clip(x * np.float32(0.25), -divisor, divisor)
        ratios = quarters * _divide(np.float32(1), divisor)
    ratios = jnp.where(scaled, ratios, np.float32(0))
    absmax = jnp.squeeze(jnp.where(absmax < _TINY, np.float32(0), absmax), axis)  # a NaN stays one
    return jnp.clip(ratios, -1, 1), absmax


def _divide(x: jax.Array | np.float32, y: jax.Array) -> jax.Array:
    """x / y, x >= 0 and y >= 2**-126, rounded as IEEE 754 says; 0 where below 2**-126.

    XLA's division does not: it is off by an ulp or two on GPUs (rcp.approx, div.full), and on
    CPU by whether it becomes a product. This is long division of the mantissas, in integers.
    """
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

    none = a & b & 0  # not a constant: inside shard_map a loop's carry must vary as its result does
    _, quotient = lax.fori_loop(0, 25, step, (a | none, none))
    # The 25th bit rounds; a quotient of two 24-bit numbers never lies half way.
    bits = ((exponent + 126) << 23) + ((quotient + 1) >> 1)
    normal = (exponent > -127) & (x >= _TINY)
    return jnp.where(normal, lax.bitcast_convert_type(bits, jnp.float32), np.float32(0))


def normalize_flat(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Both of a flat array: whole blocks, then a short one."""
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
) -> jax.Array:
    """value[codes] * absmax: one rounding in float32, then the cast.

    Args:
      codes: of any integer dtype.
      absmax: of codes' shape without axis.
      format: a name in FORMATS.
      axis: the axis that is a block.
      dtype: of the result.
      table: the format's own as a traced array, for `lookup`.

    >>> x = jnp.array([[0.0, -0.5, 1.0, 0.25] * 8])
    >>> decode_blocks(*encode_blocks(x, "fp4"), "fp4")[0, :4]
    Array([ 0.  , -0.5 ,  1.  ,  0.25], dtype=float32)
    """
    values = get_format(format).to_values(codes, table)
    return (values * jnp.expand_dims(to_code_scale(absmax, format), axis)).astype(dtype)


def to_code_scale(absmax: jax.Array, format: str) -> jax.Array:
    """What numbers of codes are multiplied by: absmax, of integers absmax * (1 / limit)."""
    spec = get_format(format)
    absmax = absmax.astype(jnp.float32)
    return absmax * (np.float32(1) / np.float32(spec.limit)) if spec.table is None else absmax

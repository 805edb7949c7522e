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

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._errors import ConfigError
from lowrank_jax._text import quoted

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_TINY = np.finfo(np.float32).tiny

# arXiv 2305.14314, appendix E: the quantiles of N(0, 1), rounded to float32 by bitsandbytes
_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # sign, two bits of exponent, one of mantissa; over 12


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
    """What the codes of a block stand for, as fractions of its absmax.

    Args:
      name: what a configuration calls it.
      bits: the width of a code, 4 or 8.
      table: float32 [2**bits], the value of each code; None for the signed integers
        -limit .. limit in two's complement, whose value is code / limit.
      bitsandbytes: whether bitsandbytes' files have it, under the same name.
    """

    name: str
    bits: int
    table: np.ndarray | None = None
    bitsandbytes: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether codes are half a byte, stored as `packing` says."""
        return self.bits == 4

    @property
    def limit(self) -> int:
        """The largest integer code."""
        return 2 ** (self.bits - 1) - 1

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The codes by ascending value; of two equal values the smaller code comes first."""
        assert self.table is not None
        return np.argsort(self.table, stable=True).astype(np.uint8)

    @functools.cached_property
    def midpoints(self) -> np.ndarray:
        """float32, ascending: where the nearest value changes. A tie goes to the lower one."""
        assert self.table is not None
        return midpoints(self.table[self.order])

    @property
    def has_two_zeros(self) -> bool:
        """Whether the code of 0 tells the side from which a value was rounded to it."""
        return self.table is not None and bool(np.count_nonzero(self.table == 0) > 1)

    @property
    def zero(self) -> int:
        """The code that 0 gets."""
        return 0 if self.table is None else int(self.order[np.sum(self.midpoints < 0)])

    def encode(self, ratios: jax.Array) -> jax.Array:
        """Codes of x / absmax: uint8, or int8 of integers of 8 bits."""
        if self.table is None:
            scaled = lax.round(ratios * self.limit, lax.RoundingMethod.TO_NEAREST_EVEN)
            codes = scaled.astype(jnp.int8)
            return (codes & 15).astype(jnp.uint8) if self.is_packed else codes
        # A chain of selects fuses to one loop on every backend; searchsorted is a loop of gathers.
        codes = jnp.full(ratios.shape, self.order[0], jnp.uint8)
        for midpoint, code in zip(self.midpoints, self.order[1:], strict=True):
            codes = jnp.where(ratios > midpoint, code, codes)
        return codes

    def numbers(self, codes: jax.Array, table: jax.Array | np.ndarray | None = None) -> jax.Array:
        """float32: the values of codes in the table (its own, or one passed), or the integers."""
        if self.table is not None:
            return lookup(codes, self.table if table is None else table)
        if self.is_packed:  # the sign is the highest of four bits
            codes = (codes.astype(jnp.int8) ^ 8) - 8
        return codes.astype(jnp.float32)

    def numpy_codes(self, ratios: np.ndarray) -> np.ndarray:
        """`encode` of a NumPy array."""
        if self.table is None:
            codes = np.rint(ratios * np.float32(self.limit)).astype(np.int8)
            return (codes & 15).astype(np.uint8) if self.is_packed else codes
        place = np.zeros(ratios.shape, np.uint8)
        above = np.empty(ratios.shape, bool)
        for midpoint in self.midpoints:
            place += np.greater(ratios, midpoint, out=above).view(np.uint8)
        ordered = np.array_equal(self.order, np.arange(self.order.size))
        return place if ordered else self.order[place]


def midpoints(values: np.ndarray) -> np.ndarray:
    """Between neighbors."""
    return (values[:-1] + values[1:]) / np.float32(2)


# One row a format.
FORMATS = {
    row.name: row
    for row in (
        Format("nf4", 4, np.array(_NF4.split(), np.float32), bitsandbytes=True),
        Format(
            "fp4",
            4,
            np.array([*_FP4, 0, *(-v for v in _FP4[1:])], np.float32) / np.float32(12),
            bitsandbytes=True,
        ),
        Format("int8", 8),
    )
}


def format_of(name: str) -> Format:
    """The format of that name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"format must be one of {sorted(FORMATS)}, not {quoted(name)}")
    return FORMATS[name]


def check_block_size(size: int) -> None:
    """Refuse what bitsandbytes refuses."""
    if isinstance(size, bool) or not isinstance(size, int) or size not in BLOCK_SIZES:
        raise ConfigError(
            f"a block is of {quoted(size)} elements; block_size must be a power of two, one of "
            f"{BLOCK_SIZES}"
        )


@functools.partial(jax.jit, static_argnums=(1, 2))
def encode(x: jax.Array, format: str, axis: int = -1) -> tuple[jax.Array, jax.Array]:
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

    >>> codes, absmax = encode(jnp.linspace(-2.0, 2.0, 64), "nf4")
    >>> codes[::9], absmax
    (Array([ 0,  1,  3,  5,  9, 12, 14, 15], dtype=uint8), Array(2., dtype=float32))
    """
    check_block_size(x.shape[axis])
    ratios, absmax = _normalize(x, axis, short=False)
    return format_of(format).encode(ratios), absmax


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
    return format_of(format).encode(ratios), absmax


def nan_unless(condition: jax.Array, x: jax.Array) -> jax.Array:
    """x where the condition holds, else NaN; float32.

    The NaN is a product, for `jax_debug_nans` refuses one that is a constant, used or not.
    """
    return x + jnp.where(condition, np.float32(0), np.float32(np.inf)) * np.float32(0)


def largest_magnitude(x: jax.Array, axis: int) -> jax.Array:
    """max |x| along an axis, which is kept; NaN where a value is not finite. float32.

    XLA's vectorized maximum and minimum on CPU drop NaN, so it is looked for beside them. They are
    of x itself, for magnitudes would be written to memory first.

    >>> largest_magnitude(jnp.array([[1.0, -2.0], [jnp.nan, 3.0], [-jnp.inf, 0.0]]), 1)
    Array([[ 2.], [nan], [nan]], dtype=float32)
    """
    over = {"axis": axis, "keepdims": True}
    largest = jnp.abs(jnp.maximum(jnp.max(x, **over), -jnp.min(x, **over)))
    return nan_unless(jnp.all(jnp.isfinite(x), **over), largest)


def _normalize(x: jax.Array, axis: int, short: bool) -> tuple[jax.Array, jax.Array]:
    """x / absmax in [-1, 1], 0 in a block that has no scale, and absmax."""
    x = x.astype(jnp.float32)
    absmax = largest_magnitude(x, axis)
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

    XLA's division is no such thing: off by an ulp or two on GPUs (rcp.approx, div.full), and on
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


def lookup(codes: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
    """table[codes], by a tree of selects.

    Accelerators gather badly, and fuse selects into the product. Pass the table as a traced array
    where this runs in a loop: XLA hoists a constant's entries as full arrays each.

    Args:
      codes: integers of any shape.
      table: [2**bits].

    Returns:
      The table's dtype.

    >>> lookup(jnp.array([3, 0], jnp.uint8), jnp.array([1.0, 2.0, 4.0, 8.0]))
    Array([8., 1.], dtype=float32)
    """
    codes, table = codes.astype(jnp.uint8), jnp.asarray(table)
    values = [lax.index_in_dim(table, i, keepdims=False) for i in range(table.size)]
    for bit in range(table.size.bit_length() - 1):
        odd = (codes & np.uint8(1 << bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, high, low) for low, high in pairs]
    return values[0]


def decode(
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
    >>> decode(*encode(x, "fp4"), "fp4")[0, :4]
    Array([ 0.  , -0.5 ,  1.  ,  0.25], dtype=float32)
    """
    values = format_of(format).numbers(codes, table)
    return (values * jnp.expand_dims(unit(absmax, format), axis)).astype(dtype)


def unit(absmax: jax.Array, format: str) -> jax.Array:
    """What numbers of codes are multiplied by: absmax, of integers absmax * (1 / limit)."""
    spec = format_of(format)
    absmax = absmax.astype(jnp.float32)
    return absmax * (np.float32(1) / np.float32(spec.limit)) if spec.table is None else absmax

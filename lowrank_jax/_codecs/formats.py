"""The quantization formats nf4, fp4 and int8: the value of each code."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


# arXiv 2305.14314, appendix E: quantiles of N(0, 1), as bitsandbytes rounds them to float32
_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)


# Values of codes 0 to 7, times 12: two bits of exponent, one of mantissa. Code 8 + i is negative.
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
    """A quantization format: the values of its codes as fractions of a block's absmax.

    Args:
      name: its name in `QuantConfig.format`.
      bits: bits of a code, 4 or 8.
      table: float32 [2**bits], the value of each code; None for the signed integers
        -limit .. limit in two's complement, whose value is code / limit.
      bitsandbytes: whether bitsandbytes has this format under the same name.

    >>> FORMATS["int8"].limit, FORMATS["nf4"].zero, FORMATS["fp4"].has_two_zeros
    (127, 7, True)
    """

    name: str
    bits: int
    table: np.ndarray | None = None
    bitsandbytes: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether codes are of four bits and so stored in the configured packing."""
        return self.bits == 4

    @property
    def limit(self) -> int:
        """The largest integer code."""
        return 2 ** (self.bits - 1) - 1

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The codes in ascending order of value; of two equal values the smaller code is first."""
        assert self.table is not None
        return np.argsort(self.table, stable=True).astype(np.uint8)

    @functools.cached_property
    def midpoints(self) -> np.ndarray:
        """float32 [2**bits - 1], ascending: midpoints of adjacent values. Ties go to the lower."""
        assert self.table is not None
        return compute_midpoints(self.table[self.order])

    @property
    def has_two_zeros(self) -> bool:
        """Whether two codes mean 0, so that small positive and negative numbers differ in code."""
        return self.table is not None and bool(np.count_nonzero(self.table == 0) > 1)

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 0 if self.table is None else int(self.order[np.sum(self.midpoints < 0)])

    def to_codes(self, ratios: jax.Array) -> jax.Array:
        """Codes of ratios x / absmax, with their shape: uint8, or int8 for 8-bit integers."""
        if self.table is None:
            scaled = lax.round(ratios * self.limit, lax.RoundingMethod.TO_NEAREST_EVEN)
            codes = scaled.astype(jnp.int8)
            return (codes & 15).astype(jnp.uint8) if self.is_packed else codes
        # A chain of selects fuses into one loop on every backend; searchsorted gathers in a loop.
        # Codes in order of value: a ratio above k midpoints ends up with the code order[k].
        codes = jnp.full(ratios.shape, self.order[0], jnp.uint8)
        for midpoint, code in zip(self.midpoints, self.order[1:], strict=True):
            codes = jnp.where(ratios > midpoint, code, codes)
        return codes

    def to_values(
        self,
        codes: jax.Array,
        table: jax.Array | np.ndarray | None = None,
        gather: bool = False,
    ) -> jax.Array:
        """Values of codes, float32: entries of the table (or the one passed), or the integers.

        Entries are selected, or gathered if gather is set.
        """
        if self.table is not None:
            table = self.table if table is None else table
            if gather:
                return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
            return select_from_table(codes, table)
        if self.is_packed:  # sign extension from bit 3: 15 ^ 8 = 7, 7 - 8 = -1
            codes = (codes.astype(jnp.int8) ^ 8) - 8
        return codes.astype(jnp.float32)

    def to_codes_numpy(self, ratios: np.ndarray) -> np.ndarray:
        """`to_codes` of a NumPy array."""
        if self.table is None:
            codes = np.rint(ratios * np.float32(self.limit)).astype(np.int8)
            return (codes & 15).astype(np.uint8) if self.is_packed else codes
        place = np.zeros(ratios.shape, np.uint8)
        above = np.empty(ratios.shape, bool)
        for midpoint in self.midpoints:
            place += np.greater(ratios, midpoint, out=above).view(np.uint8)
        ordered = np.array_equal(self.order, np.arange(self.order.size))
        return place if ordered else self.order[place]


def compute_midpoints(values: np.ndarray) -> np.ndarray:
    """Midpoints of adjacent values, float32: [n] -> [n - 1]."""
    return (values[:-1] + values[1:]) / np.float32(2)


# One row per format.
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


def get_format(name: str) -> Format:
    """Look up a format by name; raises ConfigError if there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"format must be one of {sorted(FORMATS)}, not {quote_value(name)}")
    return FORMATS[name]


def check_block_size(size: int) -> None:
    """Raise ConfigError if size is not one of BLOCK_SIZES, those of bitsandbytes."""
    if isinstance(size, bool) or not isinstance(size, int) or size not in BLOCK_SIZES:
        raise ConfigError(
            f"a block is of {quote_value(size)} elements; block_size must be a power of two, one "
            f"of {BLOCK_SIZES}"
        )


def select_from_table(codes: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
    """Compute table[codes] by a tree of selects.

    Gathers are slow on accelerators, while selects fuse into the product. Pass the table as a
    traced array if this runs in a loop: of a constant table, XLA hoists each entry as a full array.

    Args:
      codes: integers of any shape.
      table: [2**bits].

    Returns:
      The entries, with the shape of codes and the dtype of the table.

    >>> select_from_table(jnp.array([3, 0], jnp.uint8), jnp.array([1.0, 2.0, 4.0, 8.0]))
    Array([8., 1.], dtype=float32)
    """
    codes, table = codes.astype(jnp.uint8), jnp.asarray(table)
    values = [lax.index_in_dim(table, i, keepdims=False) for i in range(table.size)]
    # Each round halves the candidates by one bit of the code, lowest bit first. Code 0b10 of the
    # table (a, b, c, d): bit 0 is 0 and leaves (a, c), bit 1 is 1 and leaves c.
    for bit in range(table.size.bit_length() - 1):
        odd = (codes & np.uint8(1 << bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, high, low) for low, high in pairs]
    return values[0]

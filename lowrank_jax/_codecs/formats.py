"""The table of formats: what the codes of a block stand for."""

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
        return compute_midpoints(self.table[self.order])

    @property
    def has_two_zeros(self) -> bool:
        """Whether the code of 0 tells the side from which a value was rounded to it."""
        return self.table is not None and bool(np.count_nonzero(self.table == 0) > 1)

    @property
    def zero(self) -> int:
        """The code that 0 gets."""
        return 0 if self.table is None else int(self.order[np.sum(self.midpoints < 0)])

    def to_codes(self, ratios: jax.Array) -> jax.Array:
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

    def to_values(self, codes: jax.Array, table: jax.Array | np.ndarray | None = None) -> jax.Array:
        """float32: the values of codes in the table (its own, or one passed), or the integers."""
        if self.table is not None:
            return select_from_table(codes, self.table if table is None else table)
        if self.is_packed:  # the sign is the highest of four bits
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


def get_format(name: str) -> Format:
    """The format of that name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"format must be one of {sorted(FORMATS)}, not {quote_value(name)}")
    return FORMATS[name]


def check_block_size(size: int) -> None:
    """Refuse what bitsandbytes refuses."""
    if isinstance(size, bool) or not isinstance(size, int) or size not in BLOCK_SIZES:
        raise ConfigError(
            f"a block is of {quote_value(size)} elements; block_size must be a power of two, one of "
            f"{BLOCK_SIZES}"
        )


def select_from_table(codes: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
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

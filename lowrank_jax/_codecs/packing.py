"""How 4-bit codes lie in memory: ours along the axis of a block, and bitsandbytes' bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowrank_jax._codecs.formats import get_format
from lowrank_jax._errors import ConfigError

PACKINGS = ("uint4", "uint8")


def pack(codes: jax.Array, axis: int, packing: str) -> jax.Array:
    """4-bit codes as stored.

    Args:
      codes: uint8 below 16.
      axis: the axis that is a block; its size is even.
      packing: "uint4", an array of that dtype, or "uint8", two codes a byte: code j of the axis in
        the high nibble, code j + half of it in the low one, so that nothing is interleaved.

    Returns:
      uint4 of the same shape, or uint8 with the axis halved.

    Raises:
      ConfigError: the packing is unknown, or the axis odd.

    >>> pack(jnp.array([1, 2, 3, 4], jnp.uint8), 0, "uint8")
    Array([19, 36], dtype=uint8)
    """
    if packing not in PACKINGS:
        raise ConfigError(f"packing must be one of {PACKINGS}, not {packing!r}")
    if packing == "uint4":
        return codes.astype(jnp.uint4)
    if codes.shape[axis] % 2:
        raise ConfigError(f'packing "uint8" halves axis {axis}, of odd size {codes.shape[axis]}')
    high, low = jnp.split(codes, 2, axis)
    return (high << 4) | low


def unpack(packed: jax.Array, axis: int, packing: str) -> jax.Array:
    """The codes, uint8, of what `pack` made."""
    if packing not in PACKINGS:
        raise ConfigError(f"packing must be one of {PACKINGS}, not {packing!r}")
    if packing == "uint4":
        return packed.astype(jnp.uint8)
    return jnp.concatenate([packed >> 4, packed & 15], axis)


def to_bnb_bytes(codes: jax.Array, format: str) -> jax.Array:
    """Flat codes [n] as bitsandbytes' bytes [(n + 1) // 2]: the first of a pair in the high nibble.

    An odd count is filled up with the format's code of 0.
    """
    codes = jnp.pad(codes, (0, codes.size % 2), constant_values=get_format(format).zero)
    return (codes[::2] << 4) | codes[1::2]


def from_bnb_bytes(packed: jax.Array, n: int) -> jax.Array:
    """The first n codes, uint8 [n], of bitsandbytes' bytes of any shape."""
    packed = packed.reshape(-1)
    return jnp.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n]

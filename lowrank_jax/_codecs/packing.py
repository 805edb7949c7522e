"""Packing of 4-bit codes: along the axis of a block, or in the byte order of bitsandbytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._codecs.formats import get_format
from lowrank_jax._errors import ConfigError

PACKINGS = ("uint4", "uint8")


def pack(codes: jax.Array, axis: int, packing: str) -> jax.Array:
    """Pack 4-bit codes.

    Args:
      codes: uint8, values below 16.
      axis: the axis of the elements of a block, of even size.
      packing: "uint4", an array of that dtype, or "uint8", two codes a byte.

    Returns:
      uint4 with the same shape, or uint8 with half the size along the axis.

    Raises:
      ConfigError: the packing is unknown, or packing is "uint8" and the axis has odd size.

    >>> pack(jnp.array([1, 2, 3, 4], jnp.uint8), 0, "uint8")
    Array([19, 36], dtype=uint8)
    """
    if packing not in PACKINGS:
        raise ConfigError(f"packing must be one of {PACKINGS}, not {packing!r}")
    if packing == "uint4":
        return codes.astype(jnp.uint4)
    if codes.shape[axis] % 2:
        raise ConfigError(f'packing "uint8" halves axis {axis}, of odd size {codes.shape[axis]}')
    # [blocks, 64, out] -> [blocks, 32, out]: byte j holds code j in the high and code j + 32 in the
    # low nibble. Unpacking is then a concatenation of two contiguous halves; adjacent codes in a
    # byte, the order of bitsandbytes, would have to be interleaved.
    high, low = jnp.split(codes, 2, axis)
    return (high << 4) | low


def unpack(packed: jax.Array, axis: int, packing: str) -> jax.Array:
    """Undo `pack`: return the codes, uint8, along the axis."""
    if packing not in PACKINGS:
        raise ConfigError(f"packing must be one of {PACKINGS}, not {packing!r}")
    if packing == "uint4":
        return packed.astype(jnp.uint8)
    return jnp.concatenate([packed >> 4, packed & 15], axis)


def get_unpacked_size(size: int, packing: str) -> int:
    """Return the number of codes along an axis that has this size once packed."""
    return size if packing == "uint4" else 2 * size


def to_bnb_bytes(codes: jax.Array, format: str) -> jax.Array:
    """Pack flat codes [n] into the bytes of bitsandbytes, [(n + 1) // 2]."""
    # (1, 2, 3) -> 0x12, 0x3z: the first code of a pair is the high nibble, and an odd number of
    # codes is padded with the format's code of 0, z.
    codes = jnp.pad(codes, (0, codes.size % 2), constant_values=get_format(format).zero)
    return (codes[::2] << 4) | codes[1::2]


def from_bnb_bytes(packed: jax.Array, n: int) -> jax.Array:
    """Unpack the first n codes, uint8 [n], from bytes of bitsandbytes of any shape."""
    packed = packed.reshape(-1)
    return jnp.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n]


def unpack_by_shifts(packed: jax.Array, axis: int, packing: str) -> jax.Array:
    """`unpack` without a concatenation, which a GPU's compiler does not fuse into a sum."""
    if packing != "uint8":
        return unpack(packed, axis, packing)
    # [blocks, 32, out] -> [blocks, 2, 32, out], shifted by 4 and by 0 bits -> [blocks, 64, out]
    shape = packed.shape
    shifts = jnp.array([4, 0], jnp.uint8).reshape(2, *(1 for _ in shape[axis:]))
    halves = (jnp.expand_dims(packed, axis) >> shifts) & np.uint8(15)
    return halves.reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])

"""Random matrices generated from a seed, with the same numbers in every process."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import ConfigError
from lowrank_jax._jax import jaxprs

_BITS = 23  # random bits of a float32 of jax.random, the size of its fraction


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def seeded_uniform(seed: int, stream: int, shape: tuple[int, ...], bound: float) -> jax.Array:
    r"""Draw from $U(-b, b)$, whatever PRNG this process uses.

    Up to rounding, the numbers are those of jax.random.uniform with key number `stream` of
    jax.random.split(jax.random.key(seed)) and JAX's defaults: Threefry, partitionable, 32 bits.
    They are computed from integers and one product, so they do not depend on jit, vmap, the
    release of JAX, jax_default_prng_impl, jax_threefry_partitionable, jax_random_seed_offset or
    jax_enable_x64.

    Args:
      seed: any integer; only its lowest 32 bits are used.
      stream: index of the matrix among those of this seed.
      shape: shape of the result, of less than 2^32 elements.
      bound: b.

    Returns:
      float32 array of this shape.

    Raises:
      ConfigError: the shape has 2^32 elements or more.

    Source: Threefry-2x32 with 20 rounds, Salmon et al., doi 10.1145/2063384.2063405.

    >>> seeded_uniform(5, 0, (2, 2), 1.0)
    Array([[ 0.32206488,  0.75001526],
           [-0.4939556 ,  0.78559375]], dtype=float32)
    """
    if math.prod(shape) >= 2**32:
        raise ConfigError(
            f"a random matrix of shape {shape} has more elements than there are counters of 32 "
            "bits: exclude the leaf, or take a smaller rank"
        )
    zero, *words = (np.uint32(word) for word in (0, seed % 2**32, stream))
    key = jaxprs.threefry2x32(zero, words[0], zero, words[1])
    # The counter of an element is its flat index: for shape (2, 3) the sum of 3 * [[0, 0, 0],
    # [1, 1, 1]] and [[0, 1, 2], [0, 1, 2]]. Written with iotas it fuses with the hash and the use.
    number = jnp.uint32(0)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        number = number + stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    high, low = jaxprs.threefry2x32(*key, jnp.zeros_like(number), number)
    bits = high ^ low
    # Integers from -2^22 to 2^22 - 1 are exact in float32, so only the product is rounded.
    centered = (bits >> np.uint32(32 - _BITS)).astype(jnp.int32) - np.int32(2 ** (_BITS - 1))
    return centered.astype(jnp.float32) * np.float32(bound / 2 ** (_BITS - 1))

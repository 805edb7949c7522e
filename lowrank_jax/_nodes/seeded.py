"""Random matrices that are remade from a seed, the same numbers in every process."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import ConfigError
from lowrank_jax._jax import jaxprs

# jax.random draws 23 bits of a float32's fraction
_BITS = 23


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def seeded_uniform(seed: int, stream: int, shape: tuple[int, ...], bound: float) -> jax.Array:
    r"""Draw from $U(-b, b)$, whatever PRNG this process uses.

    The numbers are, to rounding, those of jax.random.uniform at key number `stream` of
    jax.random.split(jax.random.key(seed)) with JAX's defaults: Threefry, partitionable, 32 bits.
    They are made of integers and one product, so that jit, vmap and the JAX release do not count,
    nor do jax_default_prng_impl, jax_threefry_partitionable, jax_random_seed_offset and
    jax_enable_x64.

    Args:
      seed: any integer; its lowest 32 bits count.
      stream: which of the matrices of this seed.
      shape: of the result, of less than 2^32 elements.
      bound: b.

    Returns:
      float32 of this shape.

    Raises:
      ConfigError: the shape has too many elements.

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
    number = jnp.uint32(0)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        number = number + stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    high, low = jaxprs.threefry2x32(*key, jnp.zeros_like(number), number)
    bits = high ^ low
    # from -2^22 up to 2^22 - 1: exact in float32, so that the product alone is rounded
    centered = (bits >> np.uint32(32 - _BITS)).astype(jnp.int32) - np.int32(2 ** (_BITS - 1))
    return centered.astype(jnp.float32) * np.float32(bound / 2 ** (_BITS - 1))

"""Initializers of the factors: plain functions (key, weight, rank, scale) -> (a, b, residual).

`weight` is float32 [i, o], axes grouped, stacks vmapped; a is [i, r], b is [r, o]; `residual` is
the weight that the base keeps where a method moves part of it into the factors, else None.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array, jax.Array | None]


def kaiming(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""The default: $a \sim U(-1/\sqrt{i},\, 1/\sqrt{i})$, $b = 0$.

    Args:
      key: PRNG key.
      weight: [i, o], float32; only its shape is used.
      rank: r.
      scale: unused.

    Returns:
      a [i, r], b [r, o] in float32, and None: the base is untouched.

    Source: LoRA, arXiv 2106.09685, section 4.1, with the uniform variance of its reference code.

    >>> a, b, residual = kaiming(jax.random.key(0), jnp.zeros((4, 3)), 2, 2.0)
    >>> a.shape, b.shape, residual
    ((4, 2), (2, 3), None)
    """
    del scale
    fan_in, fan_out = weight.shape
    bound = 1 / math.sqrt(fan_in)
    a = jax.random.uniform(key, (fan_in, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((rank, fan_out), jnp.float32), None


def gaussian(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""$a \sim N(0, 1/r^2)$, $b = 0$.

    Args:
      key: PRNG key.
      weight: [i, o], float32; only its shape is used.
      rank: r.
      scale: unused.

    Returns:
      a [i, r], b [r, o] in float32, and None: the base is untouched.

    Source: LoRA, arXiv 2106.09685, section 4.1 ("a random Gaussian initialization").

    >>> a, b, _ = gaussian(jax.random.key(0), jnp.zeros((4, 3)), 2, 2.0)
    >>> bool((b == 0).all()), a.dtype.name
    (True, 'float32')
    """
    del scale
    fan_in, fan_out = weight.shape
    a = jax.random.normal(key, (fan_in, rank), jnp.float32) / rank
    return a, jnp.zeros((rank, fan_out), jnp.float32), None


def lookup(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""For tables read by rows: $a = 0$, $b \sim N(0, 1)$.

    Args:
      key: PRNG key.
      weight: [rows, features], float32; only its shape is used.
      rank: r.
      scale: unused.

    Returns:
      a [rows, r], b [r, features] in float32, and None: the base is untouched.

    Source: the reference code of arXiv 2106.09685 (its Embedding layer).

    >>> a, b, _ = lookup(jax.random.key(0), jnp.zeros((4, 3)), 2, 2.0)
    >>> bool((a == 0).all()), b.shape
    (True, (2, 3))
    """
    del scale
    rows, features = weight.shape
    b = jax.random.normal(key, (rank, features), jnp.float32)
    return jnp.zeros((rows, rank), jnp.float32), b, None

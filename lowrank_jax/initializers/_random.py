"""Initializers that draw random factors and leave the base unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import (
    check_arguments,
    factor_scale,
    key,
    nothing,
    rank,
    shape_of_matrix,
)
from lowrank_jax._codecs.rounding import round_to
from lowrank_jax._errors import ConfigError

Factors = tuple[jax.Array, jax.Array, jax.Array | None]
Initializer = Callable[[jax.Array, jax.Array, int, float], Factors]

# checks the arguments of an initializer that uses only the shape of a weight
of_shape = check_arguments(key=key, weight=shape_of_matrix, rank=rank, scale=factor_scale | nothing)


@of_shape
def kaiming(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""The default initializer: $a \sim U(-1/\sqrt{i},\, 1/\sqrt{i})$, $b = 0$.

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


@of_shape
def gaussian(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""Gaussian: $a \sim N(0, 1/r^2)$, $b = 0$.

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


@of_shape
def lookup(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""The default for tables read by rows: $a = 0$, $b \sim N(0, 1)$.

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


@of_shape
def orthogonal(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""Orthogonal: neither factor is zero, but $a\,b = 0$.

    $a = X\,Q_\text{even} / 10$, $b = Q_\text{odd}^\top\,Y / 10$, where X [i, r/2] and Y [r/2, o]
    are standard normal, and Q is an orthogonal [r, r] matrix whose rows are taken alternately. SGD
    does not depend on Q. This Q rotates each pair of axes by 45 degrees, so a has pairs of equal
    columns and b pairs of opposite rows. Their products cancel exactly in any dtype of the factors,
    since entries of 8 significant bits make each product exact in float32.

    Args:
      key: PRNG key.
      weight: [i, o], float32; only its shape is used.
      rank: r, even.
      scale: unused.

    Returns:
      a [i, r], b [r, o] in float32, and None: the base is untouched.

    Raises:
      ConfigError: rank is odd.

    Source: https://datta0.github.io/posts/rethink-lora-init/, "Orthogonal initialisation".

    >>> a, b, _ = orthogonal(jax.random.key(0), jnp.zeros((4, 3)), 2, 2.0)
    >>> bool((a @ b == 0).all()), bool((b != 0).all())
    (True, True)
    """
    del scale
    if rank % 2:
        raise ConfigError(
            f"orthogonal splits the rank between a and b, and rank {rank} is odd: use an even "
            "rank, or another initializer for this leaf"
        )
    fan_in, fan_out = weight.shape
    of_a, of_b = jax.random.split(key)
    draw = lambda key, shape: round_to(
        jax.random.normal(key, shape, jnp.float32) / (10 * math.sqrt(2)), "bfloat16"
    )
    # i = 1, o = 1, r = 2: x [1, 1, 1] and y [1, 1, 1] become a = [[x, x]] and b = [[y], [-y]], and
    # a @ b = x y - x y. In general x [i, r/2, 1] is doubled along its last axis to [i, r/2, 2] and
    # y [r/2, 1, o] to [r/2, 2, o]; the reshapes interleave the pairs along the rank.
    x, y = draw(of_a, (fan_in, rank // 2, 1)), draw(of_b, (rank // 2, 1, fan_out))
    a = jnp.concatenate([x, x], 2).reshape(fan_in, rank)
    b = jnp.concatenate([y, -y], 1).reshape(rank, fan_out)
    return a, b, None

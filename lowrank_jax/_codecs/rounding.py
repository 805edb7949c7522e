"""Rounding to a narrower dtype within a wider one, where a compiler cannot leave it out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def is_narrower(dtype: jax.typing.DTypeLike, other: Any) -> bool:
    """Whether values of `other` are rounded in `dtype`."""
    return jnp.promote_types(dtype, other) != jnp.dtype(dtype)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x rounded to the nearest values of another floating dtype, in its own dtype.

    A cast there and back will not do: XLA may drop the pair (xla_allow_excess_precision), and then
    what was to be the rounded value is not. Casting the result to `dtype` is exact.

    >>> round_to(jnp.float32([1.001, 1e-6]), "float16")
    Array([1.0009766e+00, 1.0132790e-06], dtype=float32)
    """
    own, to = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if not is_narrower(dtype, x.dtype):
        return x
    rounded = lax.reduce_precision(x, to.nexp, to.nmant)
    if to.nexp == own.nexp:
        return rounded
    # reduce_precision has no subnormal numbers; those of float16 are multiples of 2^-24
    step = jnp.asarray(to.smallest_subnormal, x.dtype)
    return jnp.where(
        jnp.abs(x) < jnp.asarray(to.tiny, x.dtype), jnp.round(x / step) * step, rounded
    )

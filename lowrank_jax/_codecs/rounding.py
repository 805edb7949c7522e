"""Rounding to the values of a narrower dtype, in a way that XLA does not optimize away."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def is_narrower(dtype: jax.typing.DTypeLike, other: jax.typing.DTypeLike) -> bool:
    """Whether a cast from `other` to `dtype` rounds."""
    return jnp.promote_types(dtype, other) != jnp.dtype(dtype)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Round x to the nearest values of another floating dtype, but keep its own dtype.

    Casting the result to `dtype` is exact. A cast to `dtype` and back does not replace it: XLA may
    drop the pair (xla_allow_excess_precision), and the value stays unrounded.

    >>> round_to(jnp.float32([1.001, 1e-6]), "float16")
    Array([1.0009766e+00, 1.0132790e-06], dtype=float32)
    """
    own, to = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if not is_narrower(dtype, x.dtype):
        return x
    rounded = lax.reduce_precision(x, to.nexp, to.nmant)
    if to.nexp == own.nexp:
        return rounded
    # reduce_precision flushes numbers below the smallest normal one to 0. A narrower exponent, such
    # as float16's, has subnormal numbers there: multiples of one step, 2^-24 for float16.
    step = jnp.asarray(to.smallest_subnormal, x.dtype)
    return jnp.where(
        jnp.abs(x) < jnp.asarray(to.tiny, x.dtype), jnp.round(x / step) * step, rounded
    )

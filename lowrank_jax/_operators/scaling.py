"""A low-rank weight times a number, or times numbers along some of its axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lowrank_jax._primitives.contract import accumulator_dtype


def has_float32_range(*dtypes: Any) -> bool:
    """Whether dtypes have the range of float32: scaling may be moved past a cast to such."""
    return all(jnp.finfo(dtype).nexp >= jnp.finfo(jnp.float32).nexp for dtype in dtypes)


def multiply(w: Any, scalar: Any, fn: Callable) -> Any | None:
    """The base and b times a number, b in a dtype as wide as the weight's."""
    b = w.b.astype(accumulator_dtype(w.b.dtype, w.dtype))
    return w.with_base(w.base.multiply(scalar, fn), b=fn(b, jnp.asarray(scalar).astype(b.dtype)))


def scale_axes(w: Any, by: Any, axes: Sequence[int], fn: Callable) -> Any | None:
    """The base and that of the factors which has all these axes; None where neither has."""
    held = {"b": w.b_axes, "a": w.a_axes}
    names = [name for name, labels in held.items() if {*axes} <= {*labels}]
    if not names:
        return None
    labels, factor = held[names[0]], getattr(w, names[0])
    factor = factor.astype(accumulator_dtype(factor.dtype, by.dtype))
    order = sorted(range(len(axes)), key=lambda i: labels.index(axes[i]))
    own = lax.transpose(by.astype(factor.dtype), order)
    own = lax.broadcast_in_dim(own, factor.shape, [labels.index(axes[i]) for i in order])
    return w.with_base(w.base.scale_axes(by, axes, fn), **{names[0]: fn(factor, own)})

"""Products of a low-rank weight and a scalar, or numbers along some of its axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._primitives.contract import accumulator_dtype

if TYPE_CHECKING:
    from lowrank_jax._operators.low_rank import LowRankWeight


def has_float32_range(*dtypes: jax.typing.DTypeLike) -> bool:
    """Whether all dtypes have at least float32's range, so that scaling may move past a cast."""
    return all(jnp.finfo(dtype).nexp >= jnp.finfo(jnp.float32).nexp for dtype in dtypes)


def multiply(w: LowRankWeight, scalar: jax.typing.ArrayLike, fn: Callable) -> LowRankWeight | None:
    """Scale the base and b; b is kept in a dtype at least as wide as the weight's."""
    b = w.b.astype(accumulator_dtype(w.b.dtype, w.dtype))
    return w.with_base(w.base.multiply(scalar, fn), b=fn(b, jnp.asarray(scalar).astype(b.dtype)))


def scale_axes(
    w: LowRankWeight, by: jax.Array, axes: Sequence[int], fn: Callable
) -> LowRankWeight | None:
    """Scale the base and a factor that has all these axes, or return None if neither has.

    (base + s a b) * v = base * v + s a (b * v) if b has the axes of v. If v spans axes of both
    factors, as a mask does, no factor can absorb it.
    """
    held = {"b": w.b_axes, "a": w.a_axes}
    names = [name for name, labels in held.items() if {*axes} <= {*labels}]
    if not names:
        return None
    labels, factor = held[names[0]], getattr(w, names[0])
    factor = factor.astype(accumulator_dtype(factor.dtype, by.dtype))
    order = sorted(range(len(axes)), key=lambda i: labels.index(axes[i]))
    # by has the weight axes in the order of `axes`; the factor may have them in another order and
    # has more. For b [r, out_2, out_1] and by [out_1, out_2]: transpose `by` to [out_2, out_1],
    # then broadcast it to [r, out_2, out_1].
    own = lax.transpose(by.astype(factor.dtype), order)
    own = lax.broadcast_in_dim(own, factor.shape, [labels.index(axes[i]) for i in order])
    return w.with_base(w.base.scale_axes(by, axes, fn), **{names[0]: fn(factor, own)})

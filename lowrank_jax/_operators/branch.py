"""Combines the base's product and the adapter's: dropout on the adapter's input, DoRA's gain.

Source: DoRA, arXiv 2402.09353, equation 5; dropout as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._primitives.contract import Labels, accumulator_dtype

if TYPE_CHECKING:
    from lowrank_jax._operators.low_rank import LowRankWeight


def apply_adapter(
    w: LowRankWeight,
    x: jax.Array,
    base: Callable[[jax.Array], Any],
    branch: Callable[..., jax.Array],
    *others: jax.Array,
    before: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    after: Callable[..., jax.Array] | None = None,
    stacked: Labels = (),
) -> Any:
    """Return base(x) plus the adapter's change, or None if the base has no such product.

    As in PEFT, dropout acts only on the input of the change, which includes the base's part of it.

    Args:
      w: a LowRankWeight.
      x: the activation.
      base: x -> the product of the base and x, or None.
      branch: (w, x, *others) -> the scaled product of the factors and x.
      *others: further arrays that branch and after take.
      before: (x, gain) -> their product, if the gain acts on the activation.
      after: (y, gain, *others) -> their product, if the gain acts on the result.
      stacked: stack axes that x lacks but dropout masks vary along. base and branch then also take
        an activation [*stacked, *x.shape].
    """
    # Without a gain, with D for dropout and m for the multiplier:
    #     y = base(x) + m branch(D(x)).
    # DoRA multiplies the base's part too, so the change is the difference to the plain base:
    #     y = base(x) + m (gain * (base(D(x)) + branch(D(x))) - base(D(x))).
    # `before` and `after` are two places for the same gain: on the activation where the weight is
    # used transposed, so that the output features are contracted, else on the result.
    y = base(x)
    if y is None:
        return None
    if w.gain is None:
        part = lambda w, x, *others: branch(w, apply_dropout(w, x, stacked), *others).astype(
            y.dtype
        )
        return y + jaxprs.match_sharding(y, part, w, x, *others)
    dropped = x
    if stacked:
        dropped = apply_dropout(w, x, stacked)
    elif w.key is not None and w.rate:
        dropped = jaxprs.match_sharding(x, apply_dropout, w, x)
    same = y if dropped is x else base(dropped)
    start = dropped if before is None else jaxprs.match_sharding(dropped, before, dropped, w.gain)
    out = same if before is None else base(start)
    bare = w.replace(multiplier=None, key=None, gain=None)
    part = lambda w, x, *others: branch(w, x, *others).astype(out.dtype)
    out = out + jaxprs.match_sharding(out, part, bare, start, *others)
    if after is not None:
        out = jaxprs.match_sharding(out, after, out, w.gain, *others)
    if dropped is x and w.multiplier is None:
        return out
    exact = accumulator_dtype(y.dtype)
    return w.apply_multiplier(y.astype(exact), out.astype(exact), same.astype(exact)).astype(
        y.dtype
    )


def multiply_labeled(
    value: jax.Array, labels: Labels, gains: jax.Array, gain_axes: Labels
) -> jax.Array:
    """Multiply value by gains along axes of equal labels, in float32; value's dtype is kept."""
    own = [label for label in labels if label in gain_axes]
    gains = lax.transpose(gains, [gain_axes.index(label) for label in own])
    extent = dict(zip(own, gains.shape, strict=True))
    gains = gains.reshape([extent.get(label, 1) for label in labels])
    if value.dtype == gains.dtype:
        return value * gains
    dtype = accumulator_dtype(value.dtype, gains.dtype)
    # checkpoint: the backward pass keeps value in its own dtype, not the float32 copy
    exact = lambda value, gains: (value.astype(dtype) * gains.astype(dtype)).astype(value.dtype)
    return jax.checkpoint(exact, prevent_cse=False)(value, gains)


def apply_dropout(w: LowRankWeight, x: jax.Array, stacked: Labels = ()) -> jax.Array:
    """Apply inverted dropout to the adapter's input.

    Args:
      w: a LowRankWeight.
      x: the activation.
      stacked: stack axes that x lacks: all these layers take x, each with its own mask.

    Returns:
      Array [*stacked, *x.shape].
    """
    if w.key is None or w.rate == 0:
        return x
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(w.dtype)

    def drop(key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 1 - w.rate, x.shape)
        return jnp.where(kept, x / (1 - w.rate), 0).astype(x.dtype)

    # Keys [layers, experts] and an x that has the experts axis already: one key draws the mask of
    # the whole x, so take entry 0 of experts. The layers axis, which x lacks, is in `stacked` and
    # is mapped over: drop takes one key, drop(keys) with keys [layers] gives [layers, *x.shape].
    rest = [i for i, label in enumerate(w.key_axes) if label not in stacked]
    keys = w.key[tuple(0 if i in rest else slice(None) for i in range(w.key.ndim))]
    own = [label for label in w.key_axes if label in stacked]
    keys = keys.transpose([own.index(label) for label in stacked])
    for _ in stacked:
        drop = jax.vmap(drop)
    return drop(keys)


def get_stacked_key_axes(w: LowRankWeight, x_labels: Labels) -> Labels:
    """Return the stack axes that dropout keys vary along and x (of these labels) lacks."""
    if w.key is None or w.rate == 0:
        return ()
    pairs = zip(w.key_axes, w.key.shape, strict=True)
    return tuple(label for label, size in pairs if size > 1 and label not in x_labels)

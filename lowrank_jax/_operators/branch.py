"""Products with an adapted weight: dropout on the adapter's input, and DoRA's gain.

Source: DoRA, arXiv 2402.09353, equation 5; dropout as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._primitives.contract import Labels, accumulator_dtype


def apply_adapter(
    w: Any,
    x: jax.Array,
    base: Callable[[jax.Array], Any],
    branch: Callable[..., jax.Array],
    *others: Any,
    before: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    after: Callable[..., jax.Array] | None = None,
    stacked: Labels = (),
) -> Any:
    """A product with an adapted weight: base(x) and the adapter's change of it, or None.

    Args:
      w: a LowRankWeight.
      x: the activation.
      base: the base's product of an activation.
      branch: (w, x, *others) -> the factors' product, scaled.
      *others: arrays that branch and after take.
      before: where the gain acts on the activation: (activation, gain) -> their product.
      after: where it acts on the result: (result, gain, *others) -> their product.
      stacked: stack axes that x lacks and masks vary along: base and branch take an activation
        that has them in front, too.

    As in PEFT, dropout acts on the input of the change alone, the base's part of it included.
    """
    y = base(x)
    if y is None:
        return None
    if w.gain is None:
        part = lambda w, x, *others: branch(w, apply_dropout(w, x, stacked), *others).astype(
            y.dtype
        )
        return y + jaxprs.match_sharding(y, part, w, x, *others)
    dry = x
    if stacked:
        dry = apply_dropout(w, x, stacked)
    elif w.key is not None and w.rate:
        dry = jaxprs.match_sharding(x, apply_dropout, w, x)
    same = y if dry is x else base(dry)
    start = dry if before is None else jaxprs.match_sharding(dry, before, dry, w.gain)
    out = same if before is None else base(start)
    bare = w.replace(multiplier=None, key=None, gain=None)
    part = lambda w, x, *others: branch(w, x, *others).astype(out.dtype)
    out = out + jaxprs.match_sharding(out, part, bare, start, *others)
    if after is not None:
        out = jaxprs.match_sharding(out, after, out, w.gain, *others)
    if dry is x and w.multiplier is None:
        return out
    exact = accumulator_dtype(y.dtype)
    return w.apply_multiplier(y.astype(exact), out.astype(exact), same.astype(exact)).astype(
        y.dtype
    )


def multiply_labeled(
    value: jax.Array, labels: Labels, gains: jax.Array, gain_axes: Labels
) -> jax.Array:
    """value times gains along the axes of the same labels, in float32, in value's own dtype."""
    own = [label for label in labels if label in gain_axes]
    gains = lax.transpose(gains, [gain_axes.index(label) for label in own])
    extent = dict(zip(own, gains.shape, strict=True))
    gains = gains.reshape([extent.get(label, 1) for label in labels])
    if value.dtype == gains.dtype:
        return value * gains
    dtype = accumulator_dtype(value.dtype, gains.dtype)
    # what is kept for backward is value as it is, not its float32 copy
    exact = lambda value, gains: (value.astype(dtype) * gains.astype(dtype)).astype(value.dtype)
    return jax.checkpoint(exact, prevent_cse=False)(value, gains)


def apply_dropout(w: Any, x: jax.Array, stacked: Labels = ()) -> jax.Array:
    """Inverted dropout on the branch's input.

    Args:
      w: a LowRankWeight.
      x: the activation.
      stacked: stack axes that x lacks: layers which all take x, each with a mask of its own.

    Returns:
      [*stacked, *x.shape].
    """
    if w.key is None or w.rate == 0:
        return x
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(w.dtype)

    def drop(key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 1 - w.rate, x.shape)
        return jnp.where(kept, x / (1 - w.rate), 0).astype(x.dtype)

    # an axis of keys that x has, or that enumerates nothing here: one key draws for all of it
    rest = [i for i, label in enumerate(w.key_axes) if label not in stacked]
    keys = w.key[tuple(0 if i in rest else slice(None) for i in range(w.key.ndim))]
    own = [label for label in w.key_axes if label in stacked]
    keys = keys.transpose([own.index(label) for label in stacked])
    for _ in stacked:
        drop = jax.vmap(drop)
    return drop(keys)


def get_stacked_key_axes(w: Any, x_labels: Labels) -> Labels:
    """Stack axes that keys of masks vary along, and that an activation of these labels lacks."""
    if w.key is None or w.rate == 0:
        return ()
    pairs = zip(w.key_axes, w.key.shape, strict=True)
    return tuple(label for label, size in pairs if size > 1 and label not in x_labels)

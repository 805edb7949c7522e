"""Weight operators of nodes: frozen leaves, adapted leaves, and adapted leaves adapted again."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._errors import TreeError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, Full, LowRank, Normed, attach_norms, strip_norms
from lowrank_jax._nodes.fan_in import find_fan_in_axes, get_fan_in_error
from lowrank_jax._nodes.norms import compute_squared_norm, divide_by_norms
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.selection import get_selection
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.dora import compute_norms_of
from lowrank_jax._operators.low_rank import LowRankWeight
from lowrank_jax._operators.quantized import QuantizedWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._primitives.contract import RANK, accumulator_dtype
from lowrank_jax._primitives.selected_dot import ENTRY


def as_weight(leaf: PyTree, path: Hashable = None) -> Weight:
    """Return a frozen leaf (an array, Quantized, or Adapted, with norms or not) as an operator."""
    leaf = strip_norms(leaf)
    if isinstance(leaf, Adapted):
        return wrap_adapted(jax.tree.map(_freeze, leaf), path)
    if isinstance(leaf, Quantized):
        return QuantizedWeight.of(leaf, path)
    # stop_gradient outside all loops: inside a loop, its copies would be saved for backward
    return DenseWeight(lax.stop_gradient(leaf))


def _freeze(array: Any) -> Any:
    """Stop the gradient of an array of numbers."""
    return lax.stop_gradient(array) if jnp.issubdtype(array.dtype, jnp.inexact) else array


def wrap_adapted(node: Adapted, path: Hashable) -> Weight:
    """Return the operator of an adapted leaf: its base stays apart, factored or quantized."""
    if isinstance(node.delta, Full):
        return DenseWeight(_compute_whole(jaxprs.to_device(node)))
    selection = get_selection(node.delta)
    base, node = as_weight(node.base), jaxprs.to_device(node)
    assert isinstance(node.delta, LowRank)
    delta = node.delta.for_shape(base.shape)
    fan_in, fan_out, stack = delta.axes(base.ndim)
    (a, b), gain = delta.factors(), compute_gain(node.base, delta)
    lead, entry = (), None
    if selection is not None and type(delta) is LowRank:
        many = jaxprs.to_device(selection.many)
        (a, b), lead, entry = (many.a, many.b), (ENTRY,), selection.index
    return LowRankWeight(
        base=base,
        a=a,
        b=b,
        multiplier=node.multiplier,
        key=node.key,
        gain=gain,
        entry=entry,
        a_axes=(*lead, *stack, *fan_in, RANK),
        b_axes=(*lead, *stack, RANK, *fan_out),
        key_axes=() if node.key is None else stack,
        gain_axes=() if gain is None else (*stack, *fan_out),
        scale=delta.scale,
        rate=node.rate,
        path=path,
    )


def _compute_whole(node: Adapted) -> jax.Array:
    """Return the weight of a leaf trained whole; with a multiplier, W + m (value - W)."""
    assert isinstance(node.delta, Full)
    if node.multiplier is None:
        return node.delta.value.astype(node.base.dtype)  # the base does not matter
    base = as_weight(node.base).materialize()
    whole = base.astype(accumulator_dtype(base.dtype))
    change = node.delta.value.astype(whole.dtype) - whole
    return (whole + change * jnp.asarray(node.multiplier, whole.dtype)).astype(base.dtype)


# DoRA


def compute_gain(leaf: PyTree, delta: LowRank) -> jax.Array | None:
    """Return c of an adapted leaf, [*stack, *fan_out], or None if it has no magnitude."""
    if delta.magnitude is None or delta.folded:
        return delta.magnitude
    return divide_by_norms(delta.magnitude, compute_norms(leaf, delta))


def compute_norms(leaf: PyTree, delta: LowRank) -> jax.Array:
    """Return the norm of each output feature of W + s a b, [*stack, *fan_out], without gradient."""
    own = leaf if isinstance(leaf, Normed) else attach_all_norms(leaf, delta)
    delta = delta.for_shape(own.shape)
    return _compute_norms(own, delta, delta.factors(), as_weight(own))


def _compute_norms(
    own: Normed, delta: LowRank, factors: tuple[jax.Array, jax.Array], base: Weight
) -> jax.Array:
    """Return the norms of W + s a b for factors a and b; inside shard_map, of the whole fan-in."""
    split = find_fan_in_axes(own, delta)
    if split is None:
        raise TreeError(f"DoRA's norm: {get_fan_in_error(own, delta)}")
    fan_in, _, stack = delta.axes(own.ndim)
    base = _drop_keys(base)
    return compute_norms_of(base, (own.squares, *factors), delta.scale, fan_in, stack, split)


def _drop_keys(base: Weight) -> Weight:
    """Return a weight without dropout, which acts on activations and not on the factors' norms."""
    if not isinstance(base, LowRankWeight):
        return base
    return base.replace(base=_drop_keys(base.base), key=None, key_axes=())


def attach_all_norms(leaf: PyTree, delta: LowRank) -> Normed:
    """attach_norms, of a leaf that may itself be adapted.

    The norms of c (W + s a b) follow from those of W, from the factors and from c, so that no
    dense a b is formed. The rest is materialized: see _square_norms.
    """
    inner = strip_norms(leaf)
    if not isinstance(inner, Adapted):
        return attach_norms(leaf, delta)
    delta = delta.for_shape(inner.shape)
    fan_in, fan_out, stack = delta.axes(inner.ndim)
    terms = math.prod(inner.shape[axis] for axis in fan_in)
    frozen = jax.tree.map(_freeze, inner)
    squares = _square_norms(frozen, delta)
    if squares is None:
        squares = compute_squared_norm(as_weight(frozen).materialize(), stack, fan_out)
    return Normed(inner, lax.stop_gradient(squares), (*stack, *fan_out), terms)


def _square_norms(inner: Adapted, outer: LowRank) -> jax.Array | None:
    """Return the squared norms of an adapted leaf along the output features of another adapter.

    They are None for a leaf trained whole, an adapter of other axes, and one with a magnitude of
    which `scale` takes a part.
    """
    own = inner.delta
    if not isinstance(own, LowRank):
        return None
    if own.magnitude is not None and inner.multiplier is not None:
        return None
    own = own.for_shape(inner.shape)
    axes = own.axes(inner.ndim)
    if axes != outer.axes(inner.ndim):
        return None
    _, fan_out, stack = axes
    base = inner.base
    known = isinstance(base, Normed) and base.axes == (*stack, *fan_out)
    normed = base if known else attach_all_norms(base, outer)
    a, b = own.factors()
    if inner.multiplier is not None:
        b = b * jnp.asarray(inner.multiplier, b.dtype)
    norms = _compute_norms(normed, own, (a, b), as_weight(base))
    gain = compute_gain(normed, own)
    return jnp.square(norms if gain is None else norms * gain)


def count_dead_features(leaf: PyTree, delta: LowRank) -> int:
    """Count output features that training cannot change; 0 if this process cannot read the values.

    If a feature of W + s a b is 0, DoRA's gain is 0, and so is every gradient.
    """
    if not isinstance(leaf, Normed) or delta.magnitude is None or delta.folded:
        return 0
    if not all(map(_has_values, jax.tree.leaves((leaf, delta)))) or np.all(leaf.squares):
        return 0
    return int(np.sum(np.asarray(compute_norms(leaf, delta)) == 0))


def _has_values(leaf: object) -> bool:
    """Whether this process can read the values of an array."""
    if not isinstance(leaf, jax.Array):
        return isinstance(leaf, np.ndarray)
    return not jaxprs.is_tracer(leaf) and leaf.is_fully_addressable and not leaf.is_deleted()

r"""DoRA's gain: the number that multiplies each output feature.

$y = c \odot (x W + s\,(x a) b)$ with $c = m / \lVert W + s\,a\,b \rVert$. c is computed once per
call of the lifted function, outside all loops, so neither loops nor rematerialization compute it
again. Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax import lax

from lowrank_jax._errors import TreeError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import LowRank, Normed, attach_norms, strip_norms
from lowrank_jax._nodes.fan_in import find_fan_in_axes, get_fan_in_error
from lowrank_jax._nodes.norms import (
    compute_norm,
    compute_squared_norm_change,
    divide_by_norms,
    make_dimension_numbers,
)
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.quantized import QuantizedWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._primitives.contract import accumulator_dtype


def as_weight(leaf: PyTree, path: Hashable = None) -> Weight:
    """Return a frozen leaf (an array, Normed or Quantized) as a weight operator."""
    leaf = strip_norms(leaf)
    if isinstance(leaf, Quantized):
        return QuantizedWeight.of(leaf, path)
    # stop_gradient outside all loops: inside a loop, its copies would be saved for backward
    return DenseWeight(lax.stop_gradient(leaf))


def compute_gain(leaf: PyTree, delta: LowRank) -> jax.Array | None:
    """Return c of an adapted leaf, [*stack, *fan_out], or None if it has no magnitude."""
    if delta.magnitude is None or delta.folded:
        return delta.magnitude
    return divide_by_norms(delta.magnitude, compute_norms(leaf, delta))


def compute_norms(leaf: PyTree, delta: LowRank) -> jax.Array:
    """Return the norm of each output feature of W + s a b, [*stack, *fan_out], without gradient."""
    own = leaf if isinstance(leaf, Normed) else attach_norms(leaf, delta)
    delta = delta.for_shape(own.shape)
    axes = find_fan_in_axes(own, delta)
    if axes is None:
        raise TreeError(f"DoRA's norm: {get_fan_in_error(own, delta)}")
    change = _compute_changes(own, delta)
    if axes:  # this device has a part of the fan-in, and has summed that
        change = lax.psum(change, axes)
    return compute_norm(own.squares, change)


def _compute_changes(own: Normed, delta: LowRank) -> jax.Array:
    """Return what s a b adds to the squared norms of W, [*stack, *fan_out]."""
    fan_in, _, stack = delta.axes(own.ndim)
    operands = as_weight(own), delta.factors()
    exact = accumulator_dtype(own.squares.dtype)
    run = lambda base, parts: _compute_change(base, parts, delta.scale, fan_in, stack, exact)
    if not any(map(jaxprs.is_split, jax.tree.leaves((operands, own.squares)))):
        return run(*operands)
    sharding = jax.typeof(own.squares).sharding
    with jaxprs.use_mesh_of(own.squares):
        return jaxprs.call_with_auto_axes(run, sharding, *operands)


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


def _compute_change(
    base: Weight,
    factors: tuple[jax.Array, jax.Array],
    scale: float,
    fan_in: Sequence[int],
    stack: Sequence[int],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Return what s a b adds to the squared norms of W, [*stack, *fan_out], from (a, b)."""
    # A quantized stack [layers, in, out] is mapped over layer by layer, so that one layer at a time
    # is decoded: the stack axis goes first, and the rest is renumbered, `in` from axis 1 to 0.
    if stack and not isinstance(base, DenseWeight):
        rest = [axis for axis in range(base.ndim) if axis != stack[0]]
        front = base.transpose((stack[0], *rest))
        layers = front and front.unstack()
        if layers:
            arrays, rebuild = layers
            inner, outer = ([rest.index(axis) for axis in axes] for axes in (fan_in, stack[1:]))
            one = lambda layer: _compute_change(
                rebuild(layer[0]), layer[1], scale, inner, outer, dtype
            )
            return lax.map(one, (arrays, factors))
    a, b = factors
    exact = accumulator_dtype(base.dtype)
    options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": exact}

    def product(a: jax.Array) -> jax.Array:
        arguments = a, make_dimension_numbers(fan_in, stack), False, options
        out = base.dot(*arguments)
        return DenseWeight(base.materialize()).dot(*arguments) if out is None else out

    a, b = a.astype(base.dtype), b.astype(base.dtype)
    return compute_squared_norm_change(product, a, b, scale, len(stack), dtype)

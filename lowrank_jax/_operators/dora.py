r"""DoRA's gain: the one number that multiplies each output feature.

$y = c \odot (x W + s\,(x a) b)$ with $c = m / \lVert W + s\,a\,b \rVert$. c is made once for each
call of the lifted function, outside every loop, so that no loop and no rematerialization makes it
again. Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes import LowRank, Normed, attach_norms, strip_norms
from lowrank_jax._nodes.norms import compute_norm, divide_by_norms, make_dimension_numbers
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.quantized import QuantizedWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._primitives.contract import accumulator_dtype


def as_weight(leaf: Any, path: Any = None) -> Weight:
    """A frozen leaf as a weight operator."""
    leaf = strip_norms(leaf)
    if isinstance(leaf, Quantized):
        return QuantizedWeight.of(leaf, path)
    # frozen here, outside every loop: inside one, a stack of copies would be saved for backward
    return DenseWeight(lax.stop_gradient(leaf))


def compute_gain(leaf: Any, delta: LowRank) -> jax.Array | None:
    """c of an adapted leaf, [*stack, *fan_out], or None where it has no magnitude."""
    if delta.magnitude is None or delta.folded:
        return delta.magnitude
    return divide_by_norms(delta.magnitude, compute_norms(leaf, delta))


def compute_norms(leaf: Any, delta: LowRank) -> jax.Array:
    """The norm of each output feature of W + s a b, [*stack, *fan_out], a constant."""
    own = leaf if isinstance(leaf, Normed) else attach_norms(leaf, delta)
    delta = delta.for_shape(own.shape)
    fan_in, _, stack = delta.axes(own.ndim)
    operands = as_weight(own), (own.squares, *delta.factors())
    run = lambda base, parts: _compute_norms(base, parts, delta.scale, fan_in, stack)
    if not any(map(jaxprs.is_split, jax.tree.leaves(operands))):
        return run(*operands)
    sharding = jax.typeof(own.squares).sharding
    with jaxprs.use_mesh_of(own.squares):
        return jaxprs.call_with_auto_axes(run, sharding, *operands)


def count_dead_features(leaf: Any, delta: LowRank) -> int:
    """How many output features no training moves, as far as values are at hand.

    DoRA's gain is 0 where W + s a b is 0, and with it every gradient.
    """
    if not isinstance(leaf, Normed) or delta.magnitude is None or delta.folded:
        return 0
    if not all(map(_has_values, jax.tree.leaves((leaf, delta)))) or np.all(leaf.squares):
        return 0
    return int(np.sum(np.asarray(compute_norms(leaf, delta)) == 0))


def _has_values(leaf: Any) -> bool:
    """Whether this process can read an array."""
    if not isinstance(leaf, jax.Array):
        return isinstance(leaf, np.ndarray)
    return not jaxprs.is_tracer(leaf) and leaf.is_fully_addressable and not leaf.is_deleted()


def _compute_norms(
    base: Weight, parts: Any, scale: float, fan_in: Sequence[int], stack: Sequence[int]
) -> jax.Array:
    """The same; of a quantized stack layer by layer, so that one is decoded at a time."""
    if stack and not isinstance(base, DenseWeight):
        rest = [axis for axis in range(base.ndim) if axis != stack[0]]
        front = base.transpose((stack[0], *rest))
        layers = front and front.unstack()
        if layers:
            arrays, rebuild = layers
            inner = [[rest.index(axis) for axis in axes] for axes in (fan_in, stack[1:])]
            one = lambda layer: _compute_norms(rebuild(layer[0]), layer[1], scale, *inner)
            return lax.map(one, (arrays, parts))
    squares, a, b = parts
    exact = accumulator_dtype(base.dtype)
    options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": exact}

    def product(a: jax.Array) -> jax.Array:
        arguments = a, make_dimension_numbers(fan_in, stack), False, options
        out = base.dot(*arguments)
        return DenseWeight(base.materialize()).dot(*arguments) if out is None else out

    a, b = a.astype(base.dtype), b.astype(base.dtype)
    return compute_norm(squares, product, a, b, scale, len(stack))

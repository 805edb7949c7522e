r"""DoRA's gain: the number that multiplies each output feature.

$y = c \odot (x W + s\,(x a) b)$ with $c = m / \lVert W + s\,a\,b \rVert$. c is computed once per
call of the lifted function, outside all loops, so neither loops nor rematerialization compute it
again. Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.norms import (
    compute_norm,
    compute_squared_norm_change,
    make_dimension_numbers,
)
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._primitives.contract import accumulator_dtype


def compute_norms_of(
    base: Weight,
    parts: tuple[jax.Array, jax.Array, jax.Array],
    scale: float,
    fan_in: Sequence[int],
    stack: Sequence[int],
    split: Sequence[str] = (),
) -> jax.Array:
    """Return the norm of each output feature of W + s a b, [*stack, *fan_out], without gradient.

    Args:
      base: W, as a weight operator.
      parts: its squared norms [*stack, *fan_out], a and b.
      scale: s.
      fan_in: the fan-in axes of W.
      stack: its stack axes.
      split: the mesh axes of shard_map along which devices have parts of the fan-in.
    """
    squares, *factors = parts
    exact = accumulator_dtype(squares.dtype)
    run = lambda base, factors: _compute_change(base, factors, scale, fan_in, stack, exact)
    if any(map(jaxprs.is_split, jax.tree.leaves((base, parts)))):
        sharding = jax.typeof(squares).sharding
        with jaxprs.use_mesh_of(squares):
            change = jaxprs.call_with_auto_axes(run, sharding, base, tuple(factors))
    else:
        change = run(base, tuple(factors))
    if split:  # this device has summed its part
        change = lax.psum(change, tuple(split))
    return compute_norm(squares, change)


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

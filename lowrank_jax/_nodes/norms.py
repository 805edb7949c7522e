r"""DoRA's norm of an adapted weight, computed from the factors without forming $a\,b$.

For each output feature o,

$\lVert W + s\,a\,b\rVert_o^2 = \lVert W\rVert_o^2 + 2 s \sum_r (a^\top W)_{ro}\, b_{ro}
+ s^2 \sum_{qr} b_{qo} (a^\top a)_{qr}\, b_{ro}$,

The first term is constant and computed once. In derivatives the whole norm is held constant.

Source: DoRA, arXiv 2402.09353, sections 4.1 to 4.3; the factored form is arXiv 2603.22276.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.quantized import Quantized, dense_sharding_of, dequantize_node
from lowrank_jax._primitives.contract import accumulator_dtype, labeled_spec

_EXACT = lax.Precision.HIGHEST


def compute_squared_norm(
    leaf: jax.Array | Quantized, stack: Sequence[int], fan_out: Sequence[int]
) -> jax.Array:
    """Sum the squares over the fan-in axes: float32 [*stack, *fan_out], sharded as the leaf."""
    axes = (*stack, *fan_out)
    sharding = get_dense_sharding(leaf)
    together = isinstance(leaf, Quantized) and jaxprs.is_first_axis_split(leaf.codes)
    if sharding is None:
        return _sum_squares(leaf, axes, len(stack), together)
    out = jax.NamedSharding(sharding.mesh, labeled_spec(sharding.spec, axes))
    run = lambda leaf: _sum_squares(leaf, axes, len(stack), together)
    with jaxprs.use_mesh_of(jax.tree.leaves(leaf)[0]):
        return jaxprs.call_with_auto_axes(run, out, leaf)


def get_dense_sharding(leaf: jax.Array | Quantized) -> jax.NamedSharding | None:
    """Get the sharding of the dense leaf if its type (explicit mesh axes) splits it, else None."""
    if isinstance(leaf, Quantized):
        return dense_sharding_of(leaf)
    return jax.typeof(leaf).sharding if jaxprs.is_split(leaf) else None


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sum_squares(
    leaf: jax.Array | Quantized, axes: tuple[int, ...], stacked: int, together: bool = False
) -> jax.Array:
    """Sum squares over all axes but `axes`, in whose order the result is: [*stack, *fan_out].

    together: whether a quantized stack is vmapped, as needed if it is sharded, and not looped over.
    """
    # A quantized stack [12, i, o] with axes (0, 2) is looped over, so that one layer at a time is
    # decoded: each layer [i, o] has the axes (1,), and lax.map stacks the results [o] to [12, o].
    if isinstance(leaf, Quantized) and stacked and axes[0] == 0 and leaf.stacked:
        inner = tuple(axis - 1 for axis in axes[1:])
        one = lambda leaf: _sum_squares(leaf, inner, stacked - 1)
        return jax.vmap(one)(leaf) if together else lax.map(one, leaf)
    dense = dequantize_node(leaf) if isinstance(leaf, Quantized) else leaf
    fan_in = tuple(axis for axis in range(dense.ndim) if axis not in axes)
    squares = jnp.sum(jnp.square(dense.astype(accumulator_dtype(dense.dtype))), fan_in)
    # The sum keeps axes in ascending order: of a weight [o, i, s] with axes (2, 0) it leaves
    # [o, s], which is transposed to [s, o].
    kept = sorted(axes)
    return jnp.transpose(squares, [kept.index(axis) for axis in axes])


def compute_squared_norm_change(
    product: Callable[[jax.Array], jax.Array],
    a: jax.Array,
    b: jax.Array,
    scale: float,
    stacked: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Compute what s a b adds to the squared norm of each output feature, [*stack, *fan_out].

    Args:
      product: a -> a^T W, [*stack, r, *fan_out], accumulated in dtype.
      a: [*stack, *fan_in, r], in the dtype of the products.
      b: [*stack, r, *fan_out], in the dtype of the products.
      scale: s.
      stacked: number of stack axes.
      dtype: of the sums.

    Returns:
      A sum over fan-in; of a part of it, that part of the sum. It has no gradient.
    """
    # With one stack axis, a [12, i, r] and b [12, r, o]: gram = a^T a [12, r, r], mixed = gram b
    # [12, r, o], product(a) = a^T W [12, r, o]; times b and summed over r, both terms are [12, o].
    a, b = map(lax.stop_gradient, (a, b))
    lead, inner = tuple(range(stacked)), tuple(range(stacked, a.ndim - 1))
    options: dict[str, Any] = {"precision": _EXACT, "preferred_element_type": dtype}
    gram = lax.dot_general(a, a, ((inner, inner), (lead, lead)), **options)
    b = b.astype(dtype)
    mixed = lax.dot_general(gram, b, (((stacked + 1,), (stacked,)), (lead, lead)), **options)
    return jnp.sum((2 * scale * product(a) + scale**2 * mixed) * b, stacked)


def compute_norm(squares: jax.Array, change: jax.Array) -> jax.Array:
    """Compute the norm of each output feature of W + s a b, [*stack, *fan_out], without gradient.

    Args:
      squares: squared norm of W, [*stack, *fan_out].
      change: what s a b adds to it.
    """
    # The terms may cancel, and rounding then leaves a sum slightly below 0: take 0, a feature
    # without direction.
    total = squares.astype(change.dtype) + change
    total = jnp.where(total < 0, 0, total)  # XLA's maximum on CPU drops NaN
    return jnp.sqrt(lax.stop_gradient(total))


def divide_by_norms(magnitude: jax.Array, norms: jax.Array) -> jax.Array:
    """Compute DoRA's factor of each output feature, magnitude / norm; 0 where the norm is 0."""
    return magnitude.astype(norms.dtype) * jnp.where(norms <= 0, 0, 1) / _replace_zeros(norms)


def _replace_zeros(norms: jax.Array) -> jax.Array:
    """Replace zeros by ones, to divide by the result."""
    return jnp.where(norms <= 0, 1, norms)  # a NaN stays one


def make_dimension_numbers(fan_in: Sequence[int], stack: Sequence[int]) -> Any:
    """Make the dot_general dimension numbers of a^T W, with a [*stack, *fan_in, r]."""
    lead = tuple(range(len(stack)))
    inner = tuple(range(len(stack), len(stack) + len(fan_in)))
    return ((inner, tuple(fan_in)), (lead, tuple(stack)))

r"""DoRA's norm of an adapted weight, from the factors: $a\,b$ is never formed.

For each output feature o,

$\lVert W + s\,a\,b\rVert_o^2 = \lVert W\rVert_o^2 + 2 s \sum_r (a^\top W)_{ro}\, b_{ro}
+ s^2 \sum_{qr} b_{qo} (a^\top a)_{qr}\, b_{ro}$,

of which the first term is constant and computed once. Source: DoRA, arXiv 2402.09353, sections 4.1
to 4.3 (the norm is held constant in the derivative); factored in arXiv 2603.22276.
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


def compute_squared_norm(leaf: Any, stack: Sequence[int], fan_out: Sequence[int]) -> jax.Array:
    """Sum the squares over the fan-in axes: float32 [*stack, *fan_out], split as the leaf is."""
    axes = (*stack, *fan_out)
    sharding = get_dense_sharding(leaf)
    if sharding is None:
        return _sum_squares(leaf, axes, len(stack))
    out = jax.NamedSharding(sharding.mesh, labeled_spec(sharding.spec, axes))
    run = lambda leaf: _sum_squares(leaf, axes, len(stack))
    with jaxprs.use_mesh_of(jax.tree.leaves(leaf)[0]):
        return jaxprs.call_with_auto_axes(run, out, leaf)


def get_dense_sharding(leaf: Any) -> Any:
    """How a leaf lies, dense, where its type says that it is split, or None."""
    if isinstance(leaf, Quantized):
        return dense_sharding_of(leaf)
    return jax.typeof(leaf).sharding if jaxprs.is_split(leaf) else None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sum_squares(leaf: Any, axes: tuple[int, ...], stacked: int) -> jax.Array:
    """The same; of a quantized stack layer by layer, so that one is decoded at a time."""
    if isinstance(leaf, Quantized) and stacked and axes[0] == 0 and leaf.stacked:
        inner = tuple(axis - 1 for axis in axes[1:])
        return lax.map(lambda leaf: _sum_squares(leaf, inner, stacked - 1), leaf)
    dense = dequantize_node(leaf) if isinstance(leaf, Quantized) else leaf
    fan_in = tuple(axis for axis in range(dense.ndim) if axis not in axes)
    squares = jnp.sum(jnp.square(dense.astype(accumulator_dtype(dense.dtype))), fan_in)
    kept = sorted(axes)
    return jnp.transpose(squares, [kept.index(axis) for axis in axes])


def compute_norm(
    squares: jax.Array,
    product: Callable[[jax.Array], jax.Array],
    a: jax.Array,
    b: jax.Array,
    scale: float,
    stacked: int,
) -> jax.Array:
    """The norm of W + s a b, constant to every derivative: [*stack, *fan_out].

    Args:
      squares: the norm of W, squared, [*stack, *fan_out].
      product: a -> a^T W, [*stack, r, *fan_out], accumulated in float32.
      a: [*stack, *fan_in, r], in the dtype that products use.
      b: [*stack, r, *fan_out], likewise.
      scale: s.
      stacked: number of stack axes.
    """
    a, b, squares = map(lax.stop_gradient, (a, b, squares.astype(accumulator_dtype(squares.dtype))))
    lead, inner = tuple(range(stacked)), tuple(range(stacked, a.ndim - 1))
    options: dict[str, Any] = {"precision": _EXACT, "preferred_element_type": squares.dtype}
    gram = lax.dot_general(a, a, ((inner, inner), (lead, lead)), **options)
    b = b.astype(squares.dtype)
    mixed = lax.dot_general(gram, b, (((stacked + 1,), (stacked,)), (lead, lead)), **options)
    change = jnp.sum((2 * scale * product(a) + scale**2 * mixed) * b, stacked)
    # the sum of what cancels is not always above 0; a column of zeros has no direction
    total = squares + change
    total = jnp.where(total < 0, 0, total)  # XLA's maximum on CPU drops NaN
    return jnp.sqrt(lax.stop_gradient(total))


def divide_by_norms(magnitude: jax.Array, norms: jax.Array) -> jax.Array:
    """What each output feature is multiplied by: magnitude over norm; 0 where there is no norm."""
    return magnitude.astype(norms.dtype) * jnp.where(norms <= 0, 0, 1) / _replace_zeros(norms)


def _replace_zeros(norms: jax.Array) -> jax.Array:
    return jnp.where(norms <= 0, 1, norms)  # a NaN stays one


def make_dimension_numbers(fan_in: Sequence[int], stack: Sequence[int]) -> Any:
    """Dimension numbers of a^T W."""
    lead = tuple(range(len(stack)))
    inner = tuple(range(len(stack), len(stack) + len(fan_in)))
    return ((inner, tuple(fan_in)), (lead, tuple(stack)))

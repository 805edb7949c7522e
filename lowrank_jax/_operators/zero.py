"""A weight of zeros: the base of an adapter whose base product is computed elsewhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ZeroWeight(Weight):
    """Zeros of this shape and dtype; their products are zeros, an addition that XLA removes."""

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata={"static": True})

    def materialize(self) -> jax.Array:
        """Return the zeros."""
        return jnp.zeros(self.shape, self.dtype)

    def dot(
        self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
    ) -> jax.Array:
        """lax.dot_general."""
        return self._make_zeros("dot", other, numbers, on_left, options)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> jax.Array:
        """lax.ragged_dot_general."""
        return self._make_zeros("ragged_dot", other, sizes, numbers, options)

    def conv(self, other: jax.Array, options: Options) -> jax.Array:
        """lax.conv_general_dilated."""
        return self._make_zeros("conv", other, options)

    def _make_zeros(self, method: str, other: jax.Array, *args: object) -> jax.Array:
        """Return zeros of the shape that a product (a method of Weight) would have."""
        product = lambda other: getattr(DenseWeight(self.materialize()), method)(other, *args)
        shape = jax.eval_shape(product, other)
        return jnp.zeros(shape.shape, shape.dtype)

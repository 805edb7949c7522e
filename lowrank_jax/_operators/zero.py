"""A weight of zeros: the base of a delta whose base's product is computed elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ZeroWeight(Weight):
    """Zeros of this shape and dtype; a product with them is zeros, which XLA adds to nothing."""

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata={"static": True})

    def materialize(self) -> jax.Array:
        """The zeros."""
        return jnp.zeros(self.shape, self.dtype)

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> jax.Array:
        """lax.dot_general."""
        return self._make_zeros("dot", other, numbers, on_left, options)

    def ragged_dot(
        self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]
    ) -> jax.Array:
        """lax.ragged_dot_general."""
        return self._make_zeros("ragged_dot", other, sizes, numbers, options)

    def conv(self, other: Any, options: dict[str, Any]) -> jax.Array:
        """lax.conv_general_dilated."""
        return self._make_zeros("conv", other, options)

    def _make_zeros(self, verb: str, other: Any, *args: Any) -> jax.Array:
        product = lambda other: getattr(DenseWeight(self.materialize()), verb)(other, *args)
        shape = jax.eval_shape(product, other)
        return jnp.zeros(shape.shape, shape.dtype)

"""A dense array as a weight operator: each method calls the JAX operation it mirrors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lowrank_jax._operators.weight import DotNumbers, Indexer, Options, RaggedNumbers, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseWeight(Weight):
    """A dense array: the frozen base of an adapted weight, or an operand of a concatenation.

    Args:
      value: the array, of the weight's shape and dtype.
    """

    value: Any  # an array, or its PartitionSpec in the tree that `specs` returns

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.value.dtype

    def materialize(self) -> jax.Array:
        """Return the array."""
        return self.value

    def map_arrays(self, fn: Callable, base_only: bool = False) -> DenseWeight:
        """Apply fn, which keeps values."""
        return DenseWeight(fn(self.value))

    def reshard(self, spec: jax.P, fn: Callable) -> DenseWeight:
        """Apply fn to the array and its spec."""
        return DenseWeight(fn(self.value, spec))

    def astype(self, dtype: jax.typing.DTypeLike) -> DenseWeight:
        """Convert the dtype."""
        return DenseWeight(lax.convert_element_type(self.value, dtype))

    def transpose(self, order: Sequence[int]) -> DenseWeight:
        """Permute the axes."""
        return DenseWeight(lax.transpose(self.value, order))

    def reshape(self, shape: Sequence[int]) -> DenseWeight:
        """Change the shape."""
        return DenseWeight(lax.reshape(self.value, tuple(shape)))

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Callable) -> DenseWeight:
        """lax.broadcast_in_dim."""
        return DenseWeight(fn(self.value))

    def index(self, fn: Indexer, sizes: dict[int, int], axes: Sequence[int]) -> DenseWeight:
        """Take part of some axes."""
        return DenseWeight(fn(self.value, {axis: axis for axis in axes}))

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> DenseWeight:
        """Multiply by a scalar."""
        return DenseWeight(fn(self.value, scalar))

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> DenseWeight:
        """Multiply or divide along some axes."""
        return DenseWeight(fn(self.value, lax.broadcast_in_dim(by, self.shape, axes)))

    def unstack(self) -> tuple[Any, Any]:
        """Return the array to scan along its leading axis, and the constructor."""
        return self.value, DenseWeight

    def specs(self, spec: jax.P) -> DenseWeight:
        """Return the spec in place of the array."""
        return DenseWeight(spec)

    def dot(
        self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
    ) -> jax.Array:
        """lax.dot_general."""
        operands = (self.value, other) if on_left else (other, self.value)
        return lax.dot_general(*operands, numbers, **options)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> jax.Array:
        """lax.ragged_dot_general."""
        return lax.ragged_dot_general(other, self.value, sizes, numbers, **options)

    def conv(self, other: jax.Array, options: Options) -> jax.Array:
        """lax.conv_general_dilated."""
        return lax.conv_general_dilated(other, self.value, **options)

    def gather(self, indices: jax.Array, options: Options) -> jax.Array:
        """lax.gather."""
        return lax.gather(self.value, indices, **options)

"""A dense array as a weight operator: every method is JAX's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lowrank_jax._operators.weight import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseWeight(Weight):
    """The frozen base of an adapted weight where it is an array."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.value.dtype

    def materialize(self) -> Any:
        """The array."""
        return self.value

    def map_arrays(self, fn: Callable, base_only: bool = False) -> DenseWeight:
        """Apply an identity of values."""
        return DenseWeight(fn(self.value))

    def reshard(self, spec: Any, fn: Callable) -> DenseWeight:
        """Lay it out anew."""
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

    def index(self, fn: Callable, sizes: dict[int, int], axes: Sequence[int]) -> DenseWeight:
        """Take the part fn takes."""
        return DenseWeight(fn(self.value, {axis: axis for axis in axes}))

    def multiply(self, scalar: Any, fn: Callable) -> DenseWeight:
        """Multiply by a scalar."""
        return DenseWeight(fn(self.value, scalar))

    def scale_axes(self, by: Any, axes: Sequence[int], fn: Callable) -> DenseWeight:
        """Multiply along axes."""
        return DenseWeight(fn(self.value, lax.broadcast_in_dim(by, self.shape, axes)))

    def unstack(self) -> tuple[Any, Any]:
        """Slices along the leading axis."""
        return self.value, DenseWeight

    def specs(self, spec: Any) -> DenseWeight:
        """The array's own spec."""
        return DenseWeight(spec)

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> jax.Array:
        """lax.dot_general."""
        operands = (self.value, other) if on_left else (other, self.value)
        return lax.dot_general(*operands, numbers, **options)

    def ragged_dot(
        self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]
    ) -> jax.Array:
        """lax.ragged_dot_general."""
        return lax.ragged_dot_general(other, self.value, sizes, numbers, **options)

    def conv(self, other: Any, options: dict[str, Any]) -> jax.Array:
        """lax.conv_general_dilated."""
        return lax.conv_general_dilated(other, self.value, **options)

    def gather(self, indices: Any, options: dict[str, Any]) -> jax.Array:
        """lax.gather."""
        return lax.gather(self.value, indices, **options)

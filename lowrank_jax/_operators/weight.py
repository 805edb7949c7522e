"""The weight-operator interface that the interpreter's rules call.

A weight operator represents a dense weight without holding it. Each method mirrors one JAX
operation. It returns the result, or None if the weight must be materialized for that operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax import lax


@dataclasses.dataclass(frozen=True)
class JointPath:
    """The path of a weight made of several leaves, as when the model itself stacks its layers."""

    paths: tuple[Any, ...]

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))


def expand_path(path: Any) -> tuple[Any, ...]:
    """Return the leaf paths that a path represents: several for a JointPath, else itself."""
    return path.paths if isinstance(path, JointPath) else (path,)


Options: TypeAlias = dict[str, Any]  # keyword arguments of lax.dot_general, lax.gather, ...
DotNumbers: TypeAlias = lax.DotDimensionNumbers
RaggedNumbers: TypeAlias = lax.RaggedDotDimensionNumbers
# An indexer takes part of an array along some axes of the weight. The array may hold only some of
# these axes, and in another order, so the dict maps each weight axis to the axis of the array.
# For b [r, out] of a weight [in, out], slicing both weight axes passes {1: 1}: `in` is not in b.
Indexer: TypeAlias = Callable[[Any, dict[int, int]], Any]


def make_slicer(
    shape: Sequence[int], starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> tuple[Indexer, dict[int, int]]:
    """Return the Indexer for lax.slice, and the new size of each axis that it changes."""
    cuts = enumerate(zip(starts, limits, strides, strict=True))
    parts = {axis: cut for axis, cut in cuts if cut != (0, shape[axis], 1)}

    def take(array: jax.Array, where: dict[int, int]) -> jax.Array:
        window = {where[axis]: cut for axis, cut in parts.items() if axis in where}
        if not window:
            return array
        full = [window.get(i, (0, size, 1)) for i, size in enumerate(array.shape)]
        return lax.slice(array, *zip(*full, strict=True))

    return take, {axis: -(-(stop - start) // step) for axis, (start, stop, step) in parts.items()}


def make_reverser(axes: Sequence[int]) -> Indexer:
    """Return the Indexer for lax.rev."""
    return lambda array, where: lax.rev(array, [where[axis] for axis in axes if axis in where])


class Weight:
    """A weight operator: represents a dense weight of this shape and dtype.

    The methods of this base class return None or the weight unchanged; subclasses override them.
    """

    path: Any
    shape: tuple[int, ...]
    dtype: Any

    product_kind = "factored"  # how a report describes a product with this weight
    materialize_note = ""  # what is lost when the weight is materialized, for messages

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def materialize(self) -> jax.Array:
        """Return the dense array."""
        raise NotImplementedError

    def leaves(self) -> tuple[Weight, ...]:
        """Return the weights that have a path: itself, or the parts of a concatenated weight."""
        return (self,)

    def map_leaves(self, fn: Callable[[Any], Weight]) -> Weight:
        """Apply fn to each leaf and rebuild the weight."""
        return fn(self)

    def for_use(self, number: int) -> Weight:
        """Return the weight for its use of this number; each use has its own dropout mask."""
        return self

    def map_arrays(self, fn: Callable, base_only: bool = False) -> Weight | None:
        """Apply fn, which keeps values (a copy, a barrier, a name), to the arrays."""
        return None

    def transfer_base(self, fn: Callable) -> Weight | None:
        """Apply fn, which moves an array to another memory space, to the base's arrays."""
        return self.map_arrays(fn, base_only=True)

    def stop_gradient(self) -> Weight | None:
        """Apply lax.stop_gradient to the arrays."""
        return self.map_arrays(jax.lax.stop_gradient)

    def reshard(self, spec: jax.P, fn: Callable) -> Weight | None:
        """Apply fn(array, its PartitionSpec) to each array, for a weight partitioned by spec."""
        return None

    def astype(self, dtype: jax.typing.DTypeLike) -> Weight | None:
        """Convert the dtype."""
        return None

    def transpose(self, order: Sequence[int]) -> Weight | None:
        """Permute the axes."""
        return None

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Change the shape; the order of the elements is kept."""
        return None

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Callable) -> Weight | None:
        """Apply fn, a lax.broadcast_in_dim: axis i becomes axis axes[i] of shape."""
        return None

    def index(self, fn: Indexer, sizes: dict[int, int], axes: Sequence[int]) -> Weight | None:
        """Take part of some axes by an Indexer; sizes holds the new size of each of them."""
        return None

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> Weight | None:
        """lax.slice."""
        take, sizes = make_slicer(self.shape, starts, limits, strides)
        return self.index(take, sizes, list(sizes))

    def rev(self, axes: Sequence[int]) -> Weight | None:
        """lax.rev."""
        return self.index(make_reverser(axes), {axis: self.shape[axis] for axis in axes}, axes)

    def slice_axis(self, axis: int, start: int, stop: int) -> Weight | None:
        """Slice one axis from start to stop."""
        starts, limits = [0] * self.ndim, list(self.shape)
        starts[axis], limits[axis] = start, stop
        return self.slice(starts, limits, [1] * self.ndim)

    def take_index(self, axis: int, number: int) -> Weight | None:
        """Take one entry of an axis and drop the axis."""
        one = self.slice_axis(axis, number, number + 1)
        rest = [size for i, size in enumerate(self.shape) if i != axis]
        return None if one is None else one.reshape(rest)

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> Weight | None:
        """Apply fn(array, scalar), a multiplication or division by a scalar."""
        return None

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> Weight | None:
        """Apply fn (lax.mul or lax.div) to the weight and `by`, which has these weight axes."""
        return None

    def dot(
        self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
    ) -> Any | None:
        """lax.dot_general with other; the weight is the left or the right operand."""
        return None

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> jax.Array | None:
        """lax.ragged_dot_general with the weight on the right."""
        return None

    def conv(self, other: jax.Array, options: Options) -> jax.Array | None:
        """lax.conv_general_dilated with the weight as the kernel."""
        return None

    def gather(self, indices: jax.Array, options: Options) -> jax.Array | Weight | None:
        """lax.gather; a weight if only stack axes are indexed."""
        return None

    def unstack(self) -> tuple[Any, Any] | None:
        """Return (arrays to scan along axis 0, rebuild(one slice of them) -> weight)."""
        return None

    def prepare_split(self, spec: jax.P) -> Weight:
        """Return an equal weight whose arrays are still correct in parts when split by spec."""
        return self

    def specs(self, spec: jax.P) -> Any | None:
        """Return the weight's tree with a PartitionSpec in place of each array."""
        return None

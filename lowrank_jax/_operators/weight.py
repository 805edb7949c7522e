"""The interface of weight operators: what the rules of the interpreter call.

Every method returns the result, or None where this weight cannot take part without being built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


@dataclasses.dataclass(frozen=True)
class JointPath:
    """The path of a weight made of several leaves: layers stacked by the model itself, say."""

    paths: tuple[Any, ...]

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))


def expand_path(path: Any) -> tuple[Any, ...]:
    """The paths of leaves that a path stands for."""
    return path.paths if isinstance(path, JointPath) else (path,)


Indexer = Callable[[Any, dict[int, int]], Any]


def make_slicer(
    shape: Sequence[int], starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> tuple[Indexer, dict[int, int]]:
    """What `index` takes for lax.slice: a function of (array, axes of it), and the new sizes."""
    cuts = enumerate(zip(starts, limits, strides, strict=True))
    parts = {axis: cut for axis, cut in cuts if cut != (0, shape[axis], 1)}

    def take(array: Any, where: dict[int, int]) -> Any:
        window = {where[axis]: cut for axis, cut in parts.items() if axis in where}
        if not window:
            return array
        full = [window.get(i, (0, size, 1)) for i, size in enumerate(array.shape)]
        return lax.slice(array, *zip(*full, strict=True))

    return take, {axis: -(-(stop - start) // step) for axis, (start, stop, step) in parts.items()}


def make_reverser(axes: Sequence[int]) -> Indexer:
    """What `index` takes for lax.rev."""
    return lambda array, where: lax.rev(array, [where[axis] for axis in axes if axis in where])


class Weight:
    """A weight operator: it stands for a dense weight; subclasses say what each method does."""

    path: Any
    shape: tuple[int, ...]
    dtype: Any

    product_kind = "factored"  # what a report says of a product with it
    materialize_note = ""  # what it no longer does once it is built densely, for messages

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def materialize(self) -> Any:
        """The dense array it stands for."""
        raise NotImplementedError

    def leaves(self) -> tuple[Weight, ...]:
        """The weights it is made of, each of which has a path: itself, unless it joins several."""
        return (self,)

    def map_leaves(self, fn: Callable[[Any], Weight]) -> Weight:
        """The same weight of fn(each of its leaves)."""
        return fn(self)

    def for_use(self, number: int) -> Weight:
        """The weight for its use of this number: with a dropout mask of its own."""
        return self

    def map_arrays(self, fn: Callable, base_only: bool = False) -> Weight | None:
        """Apply an identity of values (a copy, a barrier, a name) to the arrays inside."""
        return None

    def transfer_base(self, fn: Callable) -> Weight | None:
        """fn, an identity that moves an array to another memory, of each array of the base."""
        return self.map_arrays(fn, base_only=True)

    def stop_gradient(self) -> Weight | None:
        """lax.stop_gradient of the arrays inside."""
        return self.map_arrays(jax.lax.stop_gradient)

    def reshard(self, spec: Any, fn: Callable) -> Weight | None:
        """fn(array, its PartitionSpec) on each array, spec being that of the whole weight."""
        return None

    def astype(self, dtype: jax.typing.DTypeLike) -> Weight | None:
        """Convert the dtype."""
        return None

    def transpose(self, order: Sequence[int]) -> Weight | None:
        """Permute the axes."""
        return None

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Change the shape, the order of elements kept."""
        return None

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Callable) -> Weight | None:
        """lax.broadcast_in_dim, which fn is: axis i becomes axis axes[i] of shape."""
        return None

    def index(self, fn: Callable, sizes: dict[int, int], axes: Sequence[int]) -> Weight | None:
        """Take part of some axes: fn(array, {axis of the weight: axis of the array}) on each array.

        `sizes` has the new size of each of `axes`.
        """
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
        """The entries from start to stop of one axis."""
        starts, limits = [0] * self.ndim, list(self.shape)
        starts[axis], limits[axis] = start, stop
        return self.slice(starts, limits, [1] * self.ndim)

    def take_index(self, axis: int, number: int) -> Weight | None:
        """One entry of an axis, which is then gone."""
        one = self.slice_axis(axis, number, number + 1)
        rest = [size for i, size in enumerate(self.shape) if i != axis]
        return None if one is None else one.reshape(rest)

    def multiply(self, scalar: Any, fn: Callable) -> Weight | None:
        """fn(array, scalar), linear in the array: multiplication or division by a scalar."""
        return None

    def scale_axes(self, by: Any, axes: Sequence[int], fn: Callable) -> Weight | None:
        """fn(weight, by), lax.mul or lax.div: by has these axes of the weight, in order."""
        return None

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> Any | None:
        """lax.dot_general with other, the weight on the left or the right."""
        return None

    def ragged_dot(
        self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]
    ) -> Any | None:
        """lax.ragged_dot_general with the weight on the right."""
        return None

    def conv(self, other: Any, options: dict[str, Any]) -> Any | None:
        """lax.conv_general_dilated with the weight as the kernel."""
        return None

    def gather(self, indices: Any, options: dict[str, Any]) -> Any | None:
        """lax.gather from the weight."""
        return None

    def unstack(self) -> tuple[Any, Any] | None:
        """(arrays with the leading axis to be scanned, rebuild(one slice of them) -> weight)."""
        return None

    def prepare_split(self, spec: Any) -> Weight:
        """The weight with arrays that mean the same in parts, where it is split by this spec."""
        return self

    def specs(self, spec: Any) -> Any | None:
        """The same tree with a PartitionSpec at each array, from the weight's own."""
        return None

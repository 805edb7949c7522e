r"""A quantized weight times numbers along some of its axes, in flight.

$x\,(W \odot v) = (x \odot v)\,W$ where v runs along fan-in, $(x W) \odot v$ where it runs along
fan-out. The codes stay as they are, and derivatives reach v.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import _jaxprs
from lowrank_jax._primitives.contract import accumulator, labeled_spec, reshape_groups
from lowrank_jax._weights.gain import times
from lowrank_jax._weights.products import operand_labels
from lowrank_jax._weights.regroup import regroup
from lowrank_jax._weights.scaling import is_wide
from lowrank_jax._weights.virtual import Virtual, reversing, slicing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StretchedWeight(Virtual):
    """A weight times an array.

    Args:
      base: the weight.
      by: the array, whose axes run along some of the weight's.
      axes: which, for each axis of `by`.
    """

    base: Virtual
    by: Any
    axes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:  # type: ignore[override]
        """Dtype of the weight."""
        return self.base.dtype

    @property
    def path(self) -> Any:  # type: ignore[override]
        """Path of the weight."""
        return self.base.path

    @property
    def how(self) -> str:  # type: ignore[override]
        """As of the weight."""
        return self.base.how

    def materialize(self) -> jax.Array:
        """The dense product."""
        return times(self.base.materialize(), tuple(range(self.ndim)), self.by, self.axes)

    def leaves(self) -> tuple[Virtual, ...]:
        """Those of the weight."""
        return self.base.leaves()

    def map_leaves(self, fn: Callable[[Any], Virtual]) -> StretchedWeight:
        """The same, with fn of each leaf."""
        return dataclasses.replace(self, base=self.base.map_leaves(fn))

    def for_use(self, number: int) -> StretchedWeight:
        """The weight for this use."""
        return dataclasses.replace(self, base=self.base.for_use(number))

    def _on(self, base: Virtual | None, **changes: Any) -> StretchedWeight | None:
        """On another base, or None where that could not take part."""
        return None if base is None else dataclasses.replace(self, base=base, **changes)

    # Structural operations

    def each(self, fn: Any, base_only: bool = False) -> StretchedWeight | None:
        """Apply an identity of values."""
        changes = {} if base_only else {"by": fn(self.by)}
        return self._on(self.base.each(fn, base_only), **changes)

    def put(self, fn: Any) -> StretchedWeight | None:
        """Move the weight."""
        return self._on(self.base.put(fn))

    def frozen(self) -> StretchedWeight | None:
        """Stop the gradients of both."""
        return self._on(self.base.frozen(), by=lax.stop_gradient(self.by))

    def astype(self, dtype: Any) -> StretchedWeight | None:
        """Convert the weight, to a dtype whose range holds what the product may be."""
        if not jnp.issubdtype(dtype, jnp.floating) or not is_wide(dtype):
            return None
        return self._on(self.base.astype(dtype))

    def transpose(self, order: Sequence[int]) -> StretchedWeight | None:
        """Permute the weight; renumber the labels."""
        place = {old: new for new, old in enumerate(order)}
        return self._renumbered(place, self.base.transpose(order))

    def _renumbered(
        self, place: dict[int, int], base: Virtual | None, **changes: Any
    ) -> StretchedWeight | None:
        axes = tuple(place.get(axis, axis) for axis in changes.pop("axes", self.axes))
        return self._on(base, axes=axes, **changes)

    def reshape(self, shape: Sequence[int]) -> StretchedWeight | None:
        """Split or merge axes; the array then has all of those that it had a part of."""
        if 0 in self.shape:
            return None
        groups = reshape_groups(self.shape, shape)
        held = {a for old, _ in groups if {*old} & {*self.axes} for a in old} | {*self.axes}
        axes = tuple(sorted(held))
        sizes = [self.shape[axis] for axis in axes]
        if math.prod(sizes) == math.prod(self.shape) and len(axes) > 1:
            return None  # a number for each entry
        place = [axes.index(axis) for axis in self.axes]
        order = sorted(range(len(place)), key=place.__getitem__)
        by = lax.transpose(self.by, order)
        by = lax.broadcast_in_dim(by, sizes, [place[i] for i in order])
        found = regroup(by, axes, groups, dict(enumerate(shape)))
        if found is None:
            return None
        return self._on(self.base.reshape(shape), by=found[0], axes=found[1])

    def broadcast(
        self, shape: Sequence[int], axes: Sequence[int], fn: Any
    ) -> StretchedWeight | None:
        """The array has none of the new axes, nor of those made longer."""
        place = dict(enumerate(axes))
        kept = [i for i, axis in enumerate(self.axes) if self.shape[axis] == shape[place[axis]]]
        gone = tuple(i for i in range(len(self.axes)) if i not in kept)
        changes = {"by": jnp.squeeze(self.by, gone), "axes": tuple(self.axes[i] for i in kept)}
        return self._renumbered(place, self.base.broadcast(shape, axes, fn), **changes)

    def index(self, fn: Any, sizes: dict[int, int], axes: Sequence[int]) -> StretchedWeight | None:
        """Take the part fn takes."""
        return self._indexed(self.base.index(fn, sizes, axes), fn, axes)

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> StretchedWeight | None:
        """lax.slice."""
        take, sizes = slicing(self.shape, starts, limits, strides)
        return self._indexed(self.base.slice(starts, limits, strides), take, list(sizes))

    def rev(self, axes: Sequence[int]) -> StretchedWeight | None:
        """lax.rev."""
        return self._indexed(self.base.rev(axes), reversing(axes), axes)

    def _indexed(
        self, base: Virtual | None, fn: Any, axes: Sequence[int]
    ) -> StretchedWeight | None:
        where = {axis: self.axes.index(axis) for axis in axes if axis in self.axes}
        return self._on(base, by=fn(self.by, where) if where else self.by)

    def multiply(self, scalar: Any, fn: Any) -> StretchedWeight:
        """fn of the array, in float32 at least."""
        by = self.by.astype(accumulator(self.by.dtype, self.dtype))
        return dataclasses.replace(self, by=fn(by, jnp.asarray(scalar).astype(by.dtype)))

    def stretch(self, by: Any, axes: Sequence[int], fn: Any) -> StretchedWeight:
        """Times another array."""
        return stretched(self, by, axes, fn)

    def unstack(self) -> tuple[Any, Any] | None:
        """Slices along the leading axis."""
        stacked = self.base.unstack()
        if stacked is None:
            return None
        arrays, rebuild = stacked
        down = {axis: axis - 1 for axis in range(1, self.ndim)}
        if 0 not in self.axes:
            return arrays, lambda base: self._renumbered(down, rebuild(base))
        front = jnp.moveaxis(self.by, self.axes.index(0), 0)
        axes = tuple(axis for axis in self.axes if axis != 0)
        return (arrays, front), lambda pair: self._renumbered(
            down, rebuild(pair[0]), by=pair[1], axes=axes
        )

    def splittable(self, spec: Any) -> StretchedWeight:
        """The weight may have to prepare."""
        return dataclasses.replace(self, base=self.base.splittable(spec))

    def specs(self, spec: Any) -> StretchedWeight | None:
        """PartitionSpecs of the arrays."""
        return self._on(self.base.specs(spec), by=labeled_spec(spec, self.axes))

    def reshard(self, spec: Any, fn: Any) -> StretchedWeight | None:
        """Lay both out."""
        by = fn(self.by, labeled_spec(spec, self.axes))
        return self._on(self.base.reshard(spec, fn), by=by)

    # Products

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> Any:
        """lax.dot_general."""
        (lc, rc), (lb, rb) = numbers
        mine, theirs = ((lc, lb), (rc, rb)) if on_left else ((rc, rb), (lc, lb))
        labels = operand_labels(other.ndim, mine, theirs)
        free = [axis for axis in range(self.ndim) if axis not in (*mine[0], *mine[1])]
        x_free = [label for label in labels if isinstance(label, tuple)]
        out = (*mine[1], *free, *x_free) if on_left else (*mine[1], *x_free, *free)
        run = lambda x: self.base.dot(x, numbers, on_left, options)
        return self._product(run, other, labels, out)

    def ragged_dot(self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]) -> Any:
        """lax.ragged_dot_general, where the rows are free."""
        (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
        groups = numbers.rhs_group_dimensions
        if lb or rb or len(groups) != 1 or {*numbers.lhs_ragged_dimensions} & {*lc}:
            return None
        labels = operand_labels(other.ndim, (rc, rb), (lc, lb))
        free = [axis for axis in range(self.ndim) if axis not in (*rc, *groups)]
        out = (*(label for label in labels if isinstance(label, tuple)), *free)
        run = lambda x: self.base.ragged_dot(x, sizes, numbers, options)
        (ragged,) = numbers.lhs_ragged_dimensions
        own = self._of_rows(groups[0], ("x", ragged), sizes, other.shape[ragged])
        return own._product(run, other, labels, out)

    def _of_rows(self, group: int, row: Any, sizes: Any, count: int) -> StretchedWeight:
        """Numbers of each group as numbers of its rows."""
        if group not in self.axes:
            return self
        ends = jnp.cumsum(sizes)
        groups = jnp.searchsorted(ends, jnp.arange(count, dtype=ends.dtype), side="right")
        by = jnp.take(self.by, groups, axis=self.axes.index(group), mode="clip")
        axes = tuple(row if axis == group else axis for axis in self.axes)
        return dataclasses.replace(self, by=by, axes=axes)

    def conv(self, other: Any, params: dict[str, Any]) -> Any:
        """lax.conv_general_dilated, of numbers along input or output features."""
        numbers = params["dimension_numbers"]
        out_axis, in_axis, *_ = numbers.rhs_spec
        if params["batch_group_count"] != 1:
            return None
        at = lambda spec, axis: tuple(axis if i == spec[1] else None for i in range(other.ndim))
        grouped = params["feature_group_count"] != 1
        labels = () if grouped else at(numbers.lhs_spec, in_axis)
        run = lambda x: self.base.conv(x, params)
        return self._product(run, other, labels, at(numbers.out_spec, out_axis))

    def _product(self, run: Any, x: Any, labels: Any, out: Any) -> Any:
        """run(x), the array acting on x or on the result, whichever has its axes."""
        if {*self.axes} <= {*out}:
            y = run(x)
            stretch = lambda y, by: times(y, out, by, self.axes)
            return None if y is None else _jaxprs.laid_out_like(y, stretch, y, self.by)
        if {*self.axes} <= {*labels}:
            stretch = lambda x, by: times(x, labels, by, self.axes)
            return run(_jaxprs.laid_out_like(x, stretch, x, self.by))
        return None


def stretched(weight: Virtual, by: Any, axes: Sequence[int], fn: Any) -> StretchedWeight:
    """fn(weight, by), a product or a quotient, `by` having the weight's axes of these numbers."""
    if fn is lax.div:
        by = by.astype(accumulator(by.dtype))
        by = jnp.ones((), by.dtype) / by
    return StretchedWeight(weight, by, tuple(axes))

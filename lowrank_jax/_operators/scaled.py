r"""A quantized weight scaled along some of its axes.

$x\,(W \odot v) = (x \odot v)\,W$ if v runs along fan-in, and $(x W) \odot v$ if it runs along
fan-out. The codes stay unchanged, and gradients reach v.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.branch import multiply_labeled
from lowrank_jax._operators.dot import label_operand
from lowrank_jax._operators.labeled import LabeledWeight
from lowrank_jax._operators.scaling import has_float32_range
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight
from lowrank_jax._primitives.contract import Labels, accumulator_dtype, reshape_groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledWeight(LabeledWeight):
    """A weight times an array that has some of its axes.

    Args:
      base: the weight.
      by: the array, floating-point.
      by_axes: for each axis of `by`, the axis of the weight.
    """

    base: Weight
    by: Any
    by_axes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    labeled = ("by",)

    @property
    def path(self) -> Any:  # type: ignore[override]
        """Path of the weight."""
        return self.base.path

    @property
    def product_kind(self) -> str:  # type: ignore[override]
        """The base's product_kind."""
        return self.base.product_kind

    def materialize(self) -> jax.Array:
        """Return the dense product."""
        return multiply_labeled(
            self.base.materialize(), tuple(range(self.ndim)), self.by, self.by_axes
        )

    def leaves(self) -> tuple[Weight, ...]:
        """Return the base's leaves."""
        return self.base.leaves()

    def map_leaves(self, fn: Callable[[Any], Weight]) -> ScaledWeight:
        """Apply fn to each leaf of the base."""
        return self.replace(base=self.base.map_leaves(fn))

    def for_use(self, number: int) -> ScaledWeight:
        """Return the weight for its use of this number."""
        return self.replace(base=self.base.for_use(number))

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> ScaledWeight | None:
        """Apply fn, which keeps values."""
        changes = {} if base_only else {"by": fn(self.by)}
        return self.with_base(self.base.map_arrays(fn, base_only), **changes)

    def stop_gradient(self) -> ScaledWeight | None:
        """Stop the gradients of both."""
        return self.with_base(self.base.stop_gradient(), by=lax.stop_gradient(self.by))

    def astype(self, dtype: jax.typing.DTypeLike) -> ScaledWeight | None:
        """Convert the base; None for a dtype of less range than float32, which could overflow."""
        if not jnp.issubdtype(dtype, jnp.floating) or not has_float32_range(dtype):
            return None
        return self.with_base(self.base.astype(dtype))

    def reshape(self, shape: Sequence[int]) -> ScaledWeight | None:
        """Split or merge axes; `by` is broadcast along axes that are merged with its own."""
        # A weight [4, 8, 6] scaled by [8] along axis 1, reshaped to [32, 6]: the group of axes
        # (0, 1) is merged, so `by` becomes [4, 8] and then [32]. If it would have to span all axes
        # of the weight, it would be as large as the dense weight: None.
        if 0 in self.shape:
            return None
        groups = reshape_groups(self.shape, shape)
        held = {a for old, _ in groups if {*old} & {*self.by_axes} for a in old} | {*self.by_axes}
        axes = tuple(sorted(held))
        sizes = [self.shape[axis] for axis in axes]
        if math.prod(sizes) == math.prod(self.shape) and len(axes) > 1:
            return None  # a number for each entry
        place = [axes.index(axis) for axis in self.by_axes]
        order = sorted(range(len(place)), key=place.__getitem__)
        by = lax.transpose(self.by, order)
        by = lax.broadcast_in_dim(by, sizes, [place[i] for i in order])
        return super(ScaledWeight, self.replace(by=by, by_axes=axes)).reshape(shape)

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> ScaledWeight:
        """Apply fn to `by`, in float32 or wider."""
        by = self.by.astype(accumulator_dtype(self.by.dtype, self.dtype))
        return self.replace(by=fn(by, jnp.asarray(scalar).astype(by.dtype)))

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> ScaledWeight:
        """Scale by another array."""
        return scale_weight(self, by, axes, fn)

    # Products

    def dot(self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options) -> Any:
        """lax.dot_general."""
        (lc, rc), (lb, rb) = numbers
        mine, theirs = ((lc, lb), (rc, rb)) if on_left else ((rc, rb), (lc, lb))
        labels = label_operand(other.ndim, mine, theirs)
        free = [axis for axis in range(self.ndim) if axis not in (*mine[0], *mine[1])]
        x_free = [label for label in labels if isinstance(label, tuple)]
        out = (*mine[1], *free, *x_free) if on_left else (*mine[1], *x_free, *free)
        run = lambda x: self.base.dot(x, numbers, on_left, options)
        return self._apply_scale(run, other, labels, out)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> Any:
        """lax.ragged_dot_general, if the ragged rows are not contracted."""
        (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
        groups = numbers.rhs_group_dimensions
        if lb or rb or len(groups) != 1 or {*numbers.lhs_ragged_dimensions} & {*lc}:
            return None
        labels = label_operand(other.ndim, (rc, rb), (lc, lb))
        free = [axis for axis in range(self.ndim) if axis not in (*rc, *groups)]
        out = (*(label for label in labels if isinstance(label, tuple)), *free)
        run = lambda x: self.base.ragged_dot(x, sizes, numbers, options)
        (ragged,) = numbers.lhs_ragged_dimensions
        own = self._expand_groups(groups[0], ("x", ragged), sizes, other.shape[ragged])
        return own._apply_scale(run, other, labels, out)

    def _expand_groups(
        self, group: int, row: Hashable, sizes: jax.Array, count: int
    ) -> ScaledWeight:
        """Expand `by` from groups to rows: entry g of the group axis for each row of group g."""
        # sizes (2, 3) and 5 rows: ends (2, 5), and searchsorted gives each row its group,
        # (0, 0, 1, 1, 1). `by` [groups, out] becomes [rows, out].
        if group not in self.by_axes:
            return self
        ends = jnp.cumsum(sizes)
        groups = jnp.searchsorted(ends, jnp.arange(count, dtype=ends.dtype), side="right")
        by = jnp.take(self.by, groups, axis=self.by_axes.index(group), mode="clip")
        axes = tuple(row if axis == group else axis for axis in self.by_axes)
        return self.replace(by=by, by_axes=axes)

    def conv(self, other: jax.Array, options: Options) -> Any:
        """lax.conv_general_dilated, if `by` runs along input or output features alone."""
        numbers = options["dimension_numbers"]
        out_axis, in_axis, *_ = numbers.rhs_spec
        if options["batch_group_count"] != 1:
            return None
        at = lambda spec, axis: tuple(axis if i == spec[1] else None for i in range(other.ndim))
        grouped = options["feature_group_count"] != 1
        labels = () if grouped else at(numbers.lhs_spec, in_axis)
        run = lambda x: self.base.conv(x, options)
        return self._apply_scale(run, other, labels, at(numbers.out_spec, out_axis))

    def _apply_scale(
        self, run: Callable[[jax.Array], Any], x: jax.Array, labels: Labels, out: Labels
    ) -> Any:
        """Return run(x), with `by` multiplied on the result or else on x; None if neither fits."""
        if {*self.by_axes} <= {*out}:
            y = run(x)
            scale_axes = lambda y, by: multiply_labeled(y, out, by, self.by_axes)
            return None if y is None else jaxprs.match_sharding(y, scale_axes, y, self.by)
        if {*self.by_axes} <= {*labels}:
            scale_axes = lambda x, by: multiply_labeled(x, labels, by, self.by_axes)
            return run(jaxprs.match_sharding(x, scale_axes, x, self.by))
        return None


def scale_weight(weight: Weight, by: jax.Array, axes: Sequence[int], fn: Callable) -> ScaledWeight:
    """Return fn(weight, by), for fn lax.mul or lax.div and `by` with these axes of the weight."""
    if fn is lax.div:
        by = by.astype(accumulator_dtype(by.dtype))
        by = jnp.ones((), by.dtype) / by
    return ScaledWeight(weight, by, tuple(axes))

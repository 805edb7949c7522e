r"""The covariance probe: a weight whose products yield $C = \sum x x^\top$ of their inputs.

A probe holds a frozen base and two labeled arrays. `total`, zeros [*stack, i * i], only serves to
be differentiated: a product returns the base's product, with the rule that its gradient with
respect to `total` is $C$, whatever the cotangent. So autodiff sums C over uses, loops and branches,
and keeps the C of stacked weights apart. `places`, [*fan_in], holds the position of each entry in
the leaf's flattened input.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators import dot, gather
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.labeled import LabeledWeight
from lowrank_jax._operators.weight import (
    DotNumbers,
    Indexer,
    Options,
    RaggedNumbers,
    Weight,
    make_slicer,
)
from lowrank_jax._primitives.contract import RANK, Labels, arrange, contract

_OTHER = "i"  # labels the second axis of C; RANK labels the first
_EXACT = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
_STATIC = {"static": True}


class Event(enum.Enum):
    """An event of one product, reported to `notify`."""

    OBSERVED = "its input is all of fan-in"
    DIFFERENTIATED = "its input was differentiated"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CovarianceProbe(LabeledWeight):
    """A weight that observes its inputs; products that do not contract all of fan-in do not count.

    Args:
      base: the weight.
      total: zeros, [*stack, i * i], float32, where i is the product of the fan-in sizes.
      places: [*fan_in], int32.
      total_axes, places_axes: their labels.
      path: of the leaf.
      notify: called with each Event of a product.
    """

    base: Weight
    total: Any
    places: Any
    total_axes: Labels = dataclasses.field(metadata=_STATIC)
    places_axes: Labels = dataclasses.field(metadata=_STATIC)
    path: Any = dataclasses.field(metadata=_STATIC)
    notify: Callable[[Event], None] = dataclasses.field(metadata=_STATIC)

    labeled = ("total", "places")

    @classmethod
    def of(cls, base: Weight, total: jax.Array, axes: Any, path: str) -> CovarianceProbe:
        """Return the probe of a leaf; `axes` has the attributes fan_in and stack."""
        shape = [base.shape[axis] for axis in axes.fan_in]
        places = jnp.arange(math.prod(shape)).reshape(shape)
        labels = (*axes.stack, RANK), tuple(axes.fan_in)
        return cls(base, total, places, *labels, path, lambda event: None)

    @property
    def product_kind(self) -> str:  # type: ignore[override]
        """The base's product_kind."""
        return self.base.product_kind

    def materialize(self) -> Any:
        """Return the dense base."""
        return self.base.materialize()

    def astype(self, dtype: jax.typing.DTypeLike) -> Any:
        """Convert the base; None if dtype is not floating-point."""
        floating = jnp.issubdtype(dtype, jnp.floating)
        return self.with_base(self.base.astype(dtype)) if floating else None

    # Structural operations. None for those that split fan-in: products of its parts would each see
    # a part of the input, and miss the covariances between parts.

    def map_arrays(self, fn: Callable, base_only: bool = False) -> Any:
        """Apply fn, which keeps values, to the base."""
        return self.with_base(self.base.map_arrays(fn, base_only))

    def stop_gradient(self) -> Any:
        """Stop the gradient of the base; the probe still observes its inputs."""
        return self.with_base(self.base.stop_gradient())

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> Any:
        """Scale the base."""
        return self.with_base(self.base.multiply(scalar, fn))

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> Any:
        """Scale the base; None along fan-in, where the scale would belong to the input."""
        return (
            None
            if {*axes} & {*self.places_axes}
            else self.with_base(self.base.scale_axes(by, axes, fn))
        )

    def index(self, fn: Indexer, sizes: dict[int, int], axes: Sequence[int]) -> Any:
        """Take part of stack or fan-out axes, or reverse any axis."""
        cut = {axis for axis in axes if sizes[axis] != self.shape[axis]}
        return None if cut & {*self.places_axes} else super().index(fn, sizes, axes)

    def slice(self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Any:
        """lax.slice of stack or fan-out axes."""
        _, sizes = make_slicer(self.shape, starts, limits, strides)
        cut = {axis for axis in sizes if sizes[axis] != self.shape[axis]}
        return None if cut & {*self.places_axes} else super().slice(starts, limits, strides)

    def unstack(self) -> tuple[Any, Any] | None:
        """Return arrays to scan along axis 0; None if it is a fan-in axis."""
        return None if 0 in self.places_axes else super().unstack()

    def reshard(self, spec: jax.P, fn: Callable) -> Any:
        """Reshard the base."""
        return self.with_base(self.base.reshard(spec, fn))

    def specs(self, spec: jax.P) -> None:
        """None: in a shard_map, a device cannot tell whether others see the same input."""
        return None

    # Products

    def dot(self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options) -> Any:
        """lax.dot_general."""
        y = self._apply_to_base("dot", other, numbers, on_left, options)
        (lc, rc), (lb, rb) = numbers
        mine, theirs = ((lc, lb), (rc, rb)) if on_left else ((rc, rb), (lc, lb))
        if not self._is_contracted(mine[0]):
            return y
        labels = dot.label_operand(other.ndim, mine, theirs)

        def covariance(x: jax.Array, places: jax.Array) -> jax.Array:
            return self._sum_outer_products(*self._flatten_fan_in(x, labels, places))

        return self._observe(y, covariance, other, self.places)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> Any:
        """lax.ragged_dot_general, with one C for each group of rows."""
        (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
        ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
        if lb or rb or ragged[0] in lc or self._stack_axes() != {*groups}:
            return None
        y = self._apply_to_base("ragged_dot", other, sizes, numbers, options)
        if not self._is_contracted(rc):
            return y
        labels = dot.label_operand(other.ndim, (rc, rb), (lc, lb))

        def covariance(x: jax.Array, places: jax.Array, sizes: jax.Array) -> jax.Array:
            x, tokens = self._flatten_fan_in(x, labels, places)
            rows = tuple(range(x.ndim - 1))
            by_group = lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=((rows, rows), ((), ())),
                lhs_ragged_dimensions=(tokens.index(("x", ragged[0])),),
                rhs_group_dimensions=(),
            )
            return lax.ragged_dot_general(x, x, sizes, by_group, **_EXACT)

        return self._observe(y, covariance, other, self.places, sizes)

    def conv(self, other: jax.Array, options: Options) -> Any:
        """lax.conv_general_dilated; the tokens are the patches of each group."""
        numbers, groups = options["dimension_numbers"], options["feature_group_count"]
        _, *kernel_axes = numbers.rhs_spec
        if options["batch_group_count"] != 1 or self._stack_axes():
            return None
        y = self._apply_to_base("conv", other, options)
        if not self._is_contracted(kernel_axes):
            return y
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        window = [self.shape[axis] for axis in kernel_axes[1:]]
        options = {name: options[name] for name in names if name in options}

        def covariance(x: jax.Array, places: jax.Array) -> jax.Array:
            # x [batch, height, width, channels] gives patches whose features are channels * window,
            # channels first; split into (groups, in, *window), the order of kernel_axes, they are
            # tokens [batch, height, width, groups] with fan-in axes `kernel_axes`.
            patches = lax.conv_general_dilated_patches(
                x, window, **options, dimension_numbers=numbers, precision=_EXACT["precision"]
            )
            patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
            patches = patches.reshape(
                *patches.shape[:-1], groups, *(self.shape[t] for t in kernel_axes)
            )
            tokens = tuple(("x", axis) for axis in range(other.ndim))
            return self._sum_outer_products(
                *self._flatten_fan_in(patches, (*tokens, *kernel_axes), places)
            )

        return self._observe(y, covariance, other, self.places)

    def gather(self, indices: jax.Array, options: Options) -> Any:
        """lax.gather; a probe if only stack axes are indexed. A look-up has no input to observe."""
        numbers = options["dimension_numbers"]
        indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
        values = self._apply_to_base("gather", indices, options)
        if indices.ndim > 1 and not indexed <= {*self.total_axes}:
            return values
        cut = {d for d in range(self.ndim) if options["slice_sizes"][d] != self.shape[d]}
        if (cut | indexed) & {*self.places_axes} or cut - indexed:
            return None
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [axis for axis in range(self.ndim) if axis not in gone]
        others = [axis for axis in range(values.ndim) if axis not in numbers.offset_dims]
        place = dict(zip(kept, numbers.offset_dims, strict=True))
        place |= {("n", i): axis for i, axis in enumerate(others)}
        total, labels = gather.gather_labeled(
            self.total, self.total_axes, indices, options, self.shape
        )
        return self.replace(total=total, total_axes=labels)._renumber(place, DenseWeight(values))

    def _apply_to_base(self, method: str, *args: object) -> Any:
        """Call a method of the base, or of the materialized base if that returns None."""
        out = getattr(self.base, method)(*args)
        if out is None:
            out = getattr(DenseWeight(self.base.materialize()), method)(*args)
        return out.materialize() if isinstance(out, Weight) else out

    def _is_contracted(self, axes: Sequence[int]) -> bool:
        """Whether a product sums over all of fan-in."""
        return bool(self.places_axes) and {*self.places_axes} <= {*axes}

    def _stack_axes(self) -> set[Any]:
        """Return the stack axes with more than one entry."""
        return {
            axis for axis, size in enumerate(self.shape) if axis in self.total_axes and size > 1
        }

    def _flatten_fan_in(
        self, x: jax.Array, labels: Labels, places: jax.Array
    ) -> tuple[jax.Array, Labels]:
        """Flatten the fan-in of x to a last axis, in the leaf's order; return x and its labels."""
        # A leaf [8, 16, out] with fan-in (8, 16), transposed and reshaped to [128, out]: places
        # [128] is 0, 16, 32, ..., 112, 1, 17, ..., the positions of its rows in the leaf. Sorting
        # x [n, 128] by them puts C [128, 128] in the leaf's order, whatever the model permutes.
        fan_in = self.places_axes
        tokens = tuple(label for label in labels if label not in fan_in)
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(self.dtype)
        x = arrange(x, labels, (*tokens, *fan_in), {})
        x = x.reshape(*x.shape[: len(tokens)], -1)
        order = jnp.argsort(places.reshape(-1))
        return jnp.take(x, order, axis=-1, mode="clip"), (*tokens, RANK)

    def _sum_outer_products(self, x: jax.Array, labels: Labels) -> jax.Array:
        """Return the sum of x x^T over tokens, [*stack, i, i], with the axis order of `total`."""
        other = (*labels[:-1], _OTHER)
        square = tuple(c for a in self.total_axes for c in ((a, _OTHER) if a == RANK else (a,)))
        out, made = contract(x, labels, x, other, {*square}, **_EXACT)
        sizes: dict[Any, int] = {**dict(enumerate(self.shape)), RANK: x.shape[-1]}
        return arrange(out, made, square, {**sizes, _OTHER: x.shape[-1]})

    def _observe(self, y: jax.Array, covariance: Callable, *operands: jax.Array) -> jax.Array:
        """Return y, with covariance(*operands) as its gradient with respect to `total`."""
        self.notify(Event.OBSERVED)
        kind = jax.typeof(self.total)

        @jax.custom_vjp
        def observed(y: jax.Array, total: jax.Array, *operands: jax.Array) -> jax.Array:
            return y

        def forward(y: jax.Array, total: jax.Array, *operands: jax.Array) -> Any:
            return y, operands

        def backward(operands: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
            self.notify(Event.DIFFERENTIATED)
            make = lambda *operands: covariance(*operands).reshape(kind.shape)
            if any(map(jaxprs.is_split, operands)):
                change = jaxprs.call_with_auto_axes(make, kind.sharding, *operands)
            else:
                change = make(*operands)
            return cotangent, change, *(None for _ in operands)

        observed.defvjp(forward, backward)
        return observed(y, self.total, *operands)

r"""A low-rank weight in flight: a dense base and two factors whose axes carry labels.

$W[d] = \text{base}[d] + s \sum_r a[\cdot, r]\, b[\cdot, r]$. Each axis of a and b is labeled with
the axis of the weight that it runs along, so a transpose renumbers labels and moves nothing. An
axis that only a has is fan-in, one that only b has is fan-out, one that both have enumerates
stacked weights, and one that neither has is constant along the delta. Products take whichever of
(x·a)·b and (x·b)·a costs less, so a weight used transposed or from the left needs no rule of its
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import _jaxprs
from lowrank_jax._nodes import Adapted, LowRank
from lowrank_jax._primitives.contract import (
    RANK,
    Labels,
    accumulator,
    arrange,
    contract,
    labeled_spec,
    reshape_groups,
)
from lowrank_jax._weights import convolution, lookup, products, scaling
from lowrank_jax._weights.dense import DenseWeight
from lowrank_jax._weights.magnitude import gain_of, weight_of
from lowrank_jax._weights.regroup import regroup
from lowrank_jax._weights.virtual import Virtual, reversing, slicing

_STATIC = {"static": True}
_LABELED = ("a", "b", "key", "gain")  # arrays whose axes are labeled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRankWeight(Virtual):
    """Base, factors, multiplier and dropout key of one weight, with the labels of their axes.

    With DoRA's `gain` the delta is that of gain (W + s a b), one number for each output feature.
    The base is itself a weight in flight, dense or quantized, and does what is asked of it in its
    own way; a verb that it does not have, this weight does not have either.
    """

    base: Virtual
    a: Any
    b: Any
    multiplier: Any
    key: Any
    gain: Any
    a_axes: Labels = dataclasses.field(metadata=_STATIC)
    b_axes: Labels = dataclasses.field(metadata=_STATIC)
    key_axes: Labels = dataclasses.field(metadata=_STATIC)
    gain_axes: Labels = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)
    rate: float = dataclasses.field(metadata=_STATIC)
    path: Any = dataclasses.field(metadata=_STATIC)

    @property
    def how(self) -> str:  # type: ignore[override]
        """The adapter is factored; a quantized base is dequantized at the product."""
        under = self.base.how
        return "factored" if isinstance(self.base, DenseWeight) else f"factored, {under}"

    @property
    def lost(self) -> str:  # type: ignore[override]
        """Dropout acts on the input of the factors, which a dense weight does not have."""
        return "" if self.key is None or not self.rate else "; its dropout is left out"

    @classmethod
    def of(cls, node: Adapted, path: str) -> LowRankWeight:
        """The weight of a node with LowRank factors."""
        base, node = weight_of(node.base), _jaxprs.on_device(node)
        assert isinstance(node.delta, LowRank)
        delta = node.delta.for_shape(base.shape)
        fan_in, fan_out, stack = delta.axes(base.ndim)
        (a, b), gain = delta.factors(), gain_of(node.base, delta)
        return cls(
            base=base,
            a=a,
            b=b,
            multiplier=node.multiplier,
            key=node.key,
            gain=gain,
            a_axes=(*stack, *fan_in, RANK),
            b_axes=(*stack, RANK, *fan_out),
            key_axes=stack,
            gain_axes=() if gain is None else (*stack, *fan_out),
            scale=delta.scale,
            rate=node.rate,
            path=path,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight, which is that of the product's operand."""
        return self.base.dtype

    def replaced(self, **changes: Any) -> LowRankWeight:
        """The weight with other fields."""
        return dataclasses.replace(self, **changes)

    def sizes(self) -> dict[Any, int]:
        """The size along each label: the weight's axes, and the rank."""
        return {**dict(enumerate(self.shape)), RANK: self.a.shape[self.a_axes.index(RANK)]}

    def scaled(self, value: jax.Array) -> jax.Array:
        """value times scale and multiplier, in its own dtype."""
        if self.multiplier is not None:
            factor = jnp.asarray(self.multiplier, accumulator(value.dtype)) * self.scale
            return value * factor.astype(value.dtype)
        return value if self.scale == 1 else value * self.scale

    def materialize(self) -> jax.Array:
        """The dense weight, summed in float32 and cast once."""
        dtype = accumulator(self.dtype)
        axes = tuple(range(self.ndim))
        change, labels = contract(
            self.a.astype(dtype),
            self.a_axes,
            self.b.astype(dtype),
            self.b_axes,
            axes,
            precision=lax.Precision.HIGHEST,
        )
        own = self.base.materialize().astype(dtype)
        if self.gain is None:
            change = arrange(self.scaled(change), labels, axes, self.sizes())
            return (own + change).astype(self.dtype)
        changed = own + arrange(change * self.scale, labels, axes, self.sizes())
        changed = changed * arrange(self.gain, self.gain_axes, axes, self.sizes())
        return self.multiplied(own, changed, own).astype(self.dtype)

    def multiplied(self, plain: jax.Array, changed: jax.Array, same: jax.Array) -> jax.Array:
        """Plain and the change from `same` to `changed`, times the multiplier."""
        if self.multiplier is None:
            return changed if plain is same else plain + (changed - same)
        return plain + (changed - same) * jnp.asarray(self.multiplier, plain.dtype)

    def for_use(self, number: int) -> LowRankWeight:
        """The same weight with a dropout key of its own for this use."""
        return self if self.key is None else self.replaced(key=_fold(self.key, number))

    # Verbs that pass the weight on.

    def each(self, fn: Any, base_only: bool = False) -> LowRankWeight | None:
        """Apply an identity of values to the base, and to the factors unless base_only."""
        base = self.base.each(fn, base_only)
        if base is None or base_only:
            return self.on(base)
        parts = {name: fn(getattr(self, name)) for name in self._held("a", "b", "gain")}
        return self.replaced(base=base, **parts)

    def put(self, fn: Any) -> LowRankWeight | None:
        """Move the base; the factors are on the device."""
        return self.on(self.base.put(fn))

    def _held(self, *names: str) -> list[str]:
        """Those of these fields that are there."""
        return [name for name in names if getattr(self, name) is not None]

    def on(self, base: Virtual | None, **changes: Any) -> LowRankWeight | None:
        """This weight on another base, or None where the base could not take part."""
        return None if base is None else self.replaced(base=base, **changes)

    def frozen(self) -> LowRankWeight | None:
        """Stop the gradients of the factors, of the gain and of the multiplier."""
        names = self._held("a", "b", "gain", "multiplier")
        parts = {n: lax.stop_gradient(getattr(self, n)) for n in names}
        return self.on(self.base.frozen(), **parts)

    def reshard(self, spec: Any, fn: Any) -> LowRankWeight | None:
        """Lay out the base by the spec, the factors by the axes that they have."""
        whole = self.specs(spec)
        names = self._held("a", "b", "multiplier", "key", "gain")
        parts = {n: fn(getattr(self, n), getattr(whole, n)) for n in names}
        return self.on(self.base.reshard(spec, fn), **parts)

    def astype(self, dtype: Any) -> LowRankWeight | None:
        """Convert the base; the factors are cast to its dtype in the product."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.on(self.base.astype(dtype))

    def transpose(self, order: Sequence[int]) -> LowRankWeight | None:
        """Permute the base; renumber the labels."""
        place = {old: new for new, old in enumerate(order)}
        return self._renumbered(place, self.base.transpose(order))

    def _renumbered(
        self, place: dict[Any, int], base: Virtual | None, **changes: Any
    ) -> LowRankWeight | None:
        rename = lambda labels: tuple(place.get(label, label) for label in labels)
        return self.on(
            base,
            a_axes=rename(self.a_axes),
            b_axes=rename(self.b_axes),
            key_axes=rename(self.key_axes),
            gain_axes=rename(self.gain_axes),
            **changes,
        )

    def reshape(self, shape: Sequence[int]) -> LowRankWeight | None:
        """Merge or split axes that belong together (all fan-in, all fan-out, or all stack)."""
        if 0 in self.shape:
            return None
        groups = reshape_groups(self.shape, shape)
        sizes = dict(enumerate(shape))
        parts = {}
        for name in self._held(*_LABELED):
            array, labels = getattr(self, name), getattr(self, name + "_axes")
            found = regroup(array, labels, groups, sizes)
            if found is None:
                return None
            parts[name], parts[name + "_axes"] = found
        return self.on(self.base.reshape(shape), **parts)

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Any) -> LowRankWeight | None:
        """New axes, and axes of size 1 made longer, are constant along the delta."""
        place = dict(enumerate(axes))
        grown = {old for old, new in place.items() if self.shape[old] != shape[new]}
        return self._dropped(grown)._renumbered(place, self.base.broadcast(shape, axes, fn))

    def _dropped(self, gone: set[int]) -> LowRankWeight:
        """Forget labels of axes of size 1."""
        parts = {}
        for name in self._held(*_LABELED):
            array, labels = getattr(self, name), getattr(self, name + "_axes")
            at = [i for i, label in enumerate(labels) if label in gone]
            if not at:
                continue
            parts[name] = jnp.squeeze(array, tuple(at))
            parts[name + "_axes"] = tuple(label for label in labels if label not in gone)
        return self.replaced(**parts) if parts else self

    def index(self, fn: Any, sizes: dict[int, int], axes: Sequence[int]) -> LowRankWeight | None:
        """Take the part fn takes from each array along the axes that it has."""
        return self._indexed(self.base.index(fn, sizes, axes), fn, axes)

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> LowRankWeight | None:
        """lax.slice of each array along the axes that it has."""
        take, sizes = slicing(self.shape, starts, limits, strides)
        return self._indexed(self.base.slice(starts, limits, strides), take, list(sizes))

    def rev(self, axes: Sequence[int]) -> LowRankWeight | None:
        """lax.rev of each array along the axes that it has."""
        return self._indexed(self.base.rev(axes), reversing(axes), axes)

    def _indexed(self, base: Virtual | None, fn: Any, axes: Sequence[int]) -> LowRankWeight | None:
        """On a part of the base, what fn takes from each array along the axes that it has."""
        parts = {}
        for name in self._held(*_LABELED):
            array, labels = getattr(self, name), getattr(self, name + "_axes")
            where = {axis: labels.index(axis) for axis in axes if axis in labels}
            if where:
                parts[name] = fn(array, where)
        return self.on(base, **parts)

    def multiply(self, scalar: Any, fn: Any) -> LowRankWeight | None:
        """Scale the base and b."""
        return scaling.multiply(self, scalar, fn)

    def stretch(self, by: Any, axes: Sequence[int], fn: Any) -> LowRankWeight | None:
        """Scale the base and one of the factors."""
        return scaling.stretch(self, by, axes, fn)

    def unstack(self) -> tuple[Any, Any] | None:
        """Slices along the leading axis; what does not vary along it is closed over."""
        stacked = self.base.unstack()
        if stacked is None:
            return None
        names = [n for n in self._held(*_LABELED) if 0 in getattr(self, n + "_axes")]
        arrays = {n: _front(getattr(self, n), getattr(self, n + "_axes").index(0)) for n in names}
        arrays["base"], rebuild_base = stacked
        place = {axis: axis - 1 for axis in range(1, self.ndim)}
        labels = {}
        for name in names:
            labels[name + "_axes"] = tuple(x for x in getattr(self, name + "_axes") if x != 0)
        for name in {*_LABELED} - {*self._held(*_LABELED)}:
            labels[name + "_axes"] = ()

        def rebuild(slices: dict[str, Any]) -> LowRankWeight | None:
            base = rebuild_base(slices.pop("base"))
            return self.replaced(**labels)._renumbered(place, base, **slices)

        return arrays, rebuild

    def splittable(self, spec: Any) -> LowRankWeight:
        """The base may have to prepare."""
        return self.replaced(base=self.base.splittable(spec))

    def specs(self, spec: Any) -> LowRankWeight | None:
        """PartitionSpecs of the arrays: each axis is split as the weight's axis of its label."""
        return self.on(
            self.base.specs(spec),
            a=labeled_spec(spec, self.a_axes),
            b=labeled_spec(spec, self.b_axes),
            multiplier=None if self.multiplier is None else type(spec)(),
            key=None if self.key is None else labeled_spec(spec, self.key_axes),
            gain=None if self.gain is None else labeled_spec(spec, self.gain_axes),
        )

    # Verbs that consume the weight.

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> Any:
        """lax.dot_general."""
        return products.dot(self, other, numbers, on_left, options)

    def ragged_dot(self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]) -> Any:
        """lax.ragged_dot_general."""
        return products.ragged_dot(self, other, sizes, numbers, options)

    def conv(self, other: Any, params: dict[str, Any]) -> Any:
        """lax.conv_general_dilated."""
        return convolution.conv(self, other, params)

    def gather(self, indices: Any, params: dict[str, Any]) -> Any:
        """lax.gather."""
        return lookup.gather(self, indices, params)


def _fold(key: jax.Array, number: int) -> jax.Array:
    """fold_in over keys of any shape."""
    fold = lambda k: jax.random.fold_in(k, number)
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    return fold(key)


def _front(array: jax.Array, axis: int) -> jax.Array:
    """Move one axis to the front."""
    return array if axis == 0 else jnp.moveaxis(array, axis, 0)

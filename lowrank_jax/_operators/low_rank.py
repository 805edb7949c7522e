r"""A low-rank weight operator: a base and two factors whose axes carry labels.

$W[d] = \text{base}[d] + s \sum_r a[\cdot, r]\, b[\cdot, r]$. Each axis of a and b is labeled with
the axis of the weight that it runs along, so a transpose renumbers labels and moves nothing. An
axis that only a has is fan-in, one that only b has is fan-out, one that both have enumerates
stacked weights, and one that neither has is constant along the delta. Products take whichever of
(x·a)·b and (x·b)·a costs less, so a weight used transposed or from the left needs no rule of its
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes import Adapted, LowRank
from lowrank_jax._operators import conv, dot, gather, scaling
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.dora import as_weight, compute_gain
from lowrank_jax._operators.labeled import LabeledWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._primitives.contract import (
    RANK,
    Labels,
    accumulator_dtype,
    arrange,
    contract,
)

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRankWeight(LabeledWeight):
    """Base, factors, multiplier and dropout key of one weight, with the labels of their axes.

    With DoRA's `gain` the delta is that of gain (W + s a b), one number for each output feature.
    The base is itself a weight operator, dense or quantized; where it has no rule (None), this
    weight has none either.
    """

    base: Weight
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

    labeled = ("a", "b", "key", "gain")

    @property
    def product_kind(self) -> str:  # type: ignore[override]
        """The adapter is factored; a quantized base is dequantized at the product."""
        under = self.base.product_kind
        return "factored" if isinstance(self.base, DenseWeight) else f"factored, {under}"

    @property
    def materialize_note(self) -> str:  # type: ignore[override]
        """Dropout acts on the input of the factors, which a dense weight does not have."""
        return "" if self.key is None or not self.rate else "; its dropout is left out"

    @classmethod
    def of(cls, node: Adapted, path: Any) -> LowRankWeight:
        """The weight of a node with LowRank factors."""
        base, node = as_weight(node.base), jaxprs.to_device(node)
        assert isinstance(node.delta, LowRank)
        delta = node.delta.for_shape(base.shape)
        fan_in, fan_out, stack = delta.axes(base.ndim)
        (a, b), gain = delta.factors(), compute_gain(node.base, delta)
        return cls(
            base=base,
            a=a,
            b=b,
            multiplier=node.multiplier,
            key=node.key,
            gain=gain,
            a_axes=(*stack, *fan_in, RANK),
            b_axes=(*stack, RANK, *fan_out),
            key_axes=() if node.key is None else stack,
            gain_axes=() if gain is None else (*stack, *fan_out),
            scale=delta.scale,
            rate=node.rate,
            path=path,
        )

    def sizes(self) -> dict[Any, int]:
        """The size along each label: the weight's axes, and the rank."""
        return {**dict(enumerate(self.shape)), RANK: self.a.shape[self.a_axes.index(RANK)]}

    def apply_scale(self, value: jax.Array) -> jax.Array:
        """value times scale and multiplier, in its own dtype."""
        if self.multiplier is not None:
            factor = jnp.asarray(self.multiplier, accumulator_dtype(value.dtype)) * self.scale
            return value * factor.astype(value.dtype)
        return value if self.scale == 1 else value * self.scale

    def materialize(self) -> jax.Array:
        """The dense weight, summed in float32 and cast once."""
        dtype = accumulator_dtype(self.dtype, self.a.dtype)
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
            change = arrange(self.apply_scale(change), labels, axes, self.sizes())
            return (own + change).astype(self.dtype)
        changed = own + arrange(change * self.scale, labels, axes, self.sizes())
        changed = changed * arrange(self.gain, self.gain_axes, axes, self.sizes())
        return self.apply_multiplier(own, changed, own).astype(self.dtype)

    def apply_multiplier(self, plain: jax.Array, changed: jax.Array, same: jax.Array) -> jax.Array:
        """Plain and the change from `same` to `changed`, times the multiplier."""
        if self.multiplier is None:
            return changed if plain is same else plain + (changed - same)
        return plain + (changed - same) * jnp.asarray(self.multiplier, plain.dtype)

    def for_use(self, number: int) -> LowRankWeight:
        """The same weight with a dropout key of its own for this use."""
        return self if self.key is None else self.replace(key=_fold_in(self.key, number))

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> LowRankWeight | None:
        """Apply an identity of values to the base, and to the factors unless base_only."""
        base = self.base.map_arrays(fn, base_only)
        if base is None or base_only:
            return self.with_base(base)
        parts = {name: fn(array) for name, array in self.get_arrays("a", "b", "gain").items()}
        return self.replace(base=base, **parts)

    def stop_gradient(self) -> LowRankWeight | None:
        """Stop the gradients of the factors, of the gain and of the multiplier."""
        parts = self.get_arrays("a", "b", "gain", "multiplier")
        parts = {name: lax.stop_gradient(array) for name, array in parts.items()}
        return self.with_base(self.base.stop_gradient(), **parts)

    def astype(self, dtype: jax.typing.DTypeLike) -> LowRankWeight | None:
        """Convert the base; the factors are cast to its dtype in the product."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.with_base(self.base.astype(dtype))

    def multiply(self, scalar: Any, fn: Callable) -> LowRankWeight | None:
        """Scale the base and b."""
        return scaling.multiply(self, scalar, fn)

    def scale_axes(self, by: Any, axes: Sequence[int], fn: Callable) -> LowRankWeight | None:
        """Scale the base and one of the factors."""
        return scaling.scale_axes(self, by, axes, fn)

    def specs(self, spec: Any) -> LowRankWeight | None:
        """PartitionSpecs of the arrays; the multiplier is whole everywhere."""
        whole = super().specs(spec)
        if whole is None or self.multiplier is None:
            return whole
        return whole.replace(multiplier=type(spec)())

    def reshard(self, spec: Any, fn: Callable) -> LowRankWeight | None:
        """Lay out the arrays likewise."""
        whole = super().reshard(spec, fn)
        if whole is None or self.multiplier is None:
            return whole
        return whole.replace(multiplier=fn(self.multiplier, type(spec)()))

    # Products

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> Any:
        """lax.dot_general."""
        return dot.dot(self, other, numbers, on_left, options)

    def ragged_dot(self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]) -> Any:
        """lax.ragged_dot_general."""
        return dot.ragged_dot(self, other, sizes, numbers, options)

    def conv(self, other: Any, options: dict[str, Any]) -> Any:
        """lax.conv_general_dilated."""
        return conv.conv(self, other, options)

    def gather(self, indices: Any, options: dict[str, Any]) -> Any:
        """lax.gather."""
        return gather.gather(self, indices, options)


def _fold_in(key: jax.Array, number: int) -> jax.Array:
    """fold_in over keys of any shape."""
    fold = lambda k: jax.random.fold_in(k, number)
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    return fold(key)

r"""The low-rank weight operator: a base plus two factors whose axes are labeled.

$W[d] = \text{base}[d] + s \sum_r a[\cdot, r]\, b[\cdot, r]$. Each axis of a and b is labeled with
the weight axis that it runs along, so a transpose renumbers labels and moves no data. A weight axis
that only a has is fan-in; one that only b has is fan-out; one that both have is a stack axis; along
one that neither has the delta is constant. Products compute the cheaper of (x·a)·b and (x·b)·a, so
a weight that is transposed, or the left operand, needs no separate rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._operators import conv, dot, gather, scaling
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.labeled import LabeledWeight
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight
from lowrank_jax._primitives.contract import (
    RANK,
    Labels,
    accumulator_dtype,
    arrange,
    contract,
)
from lowrank_jax._primitives.selected_dot import take_entries

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRankWeight(LabeledWeight):
    """An adapted weight: base, factors, multiplier, dropout key and DoRA gain, with labels.

    Args:
      base: the frozen weight as an operator, dense or quantized.
      a: [*stack, *fan_in, r], floating-point.
      b: [*stack, r, *fan_out], floating-point.
      multiplier: scalar that scales the adapter's change, or None.
      key: dropout keys, [*stack], or None.
      gain: DoRA's gain c, [*stack, *fan_out], or None. The weight is then c * (base + s a b).
      entry: the number of the adapter, if a and b are tables of n adapters' factors, with one more
        axis, labeled ENTRY; else None.
      a_axes, b_axes, key_axes, gain_axes: for each axis of an array, the weight axis, RANK or
        ENTRY.
      scale: s.
      rate: dropout rate.
      path: of the leaf.
      shared: the InputProduct of the product that comes next, if it is known, or None.
    """

    base: Weight
    a: Any
    b: Any
    multiplier: Any
    key: Any
    gain: Any
    entry: Any
    a_axes: Labels = dataclasses.field(metadata=_STATIC)
    b_axes: Labels = dataclasses.field(metadata=_STATIC)
    key_axes: Labels = dataclasses.field(metadata=_STATIC)
    gain_axes: Labels = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)
    rate: float = dataclasses.field(metadata=_STATIC)
    path: Any = dataclasses.field(metadata=_STATIC)
    shared: Any = None

    labeled = ("a", "b", "key", "gain")

    @property
    def product_kind(self) -> str:  # type: ignore[override]
        """The adapter is factored; a quantized base is dequantized in the product."""
        if isinstance(self.base, DenseWeight):
            return "factored"
        kind = self.base.product_kind
        return kind if isinstance(self.base, LowRankWeight) else f"factored, {kind}"

    @property
    def materialize_note(self) -> str:  # type: ignore[override]
        """A materialized weight has no factor input, so its dropout is not applied."""
        drops = self.key is not None and self.rate
        return "; its dropout is left out" if drops else self.base.materialize_note

    def sizes(self) -> dict[Any, int]:
        """Return the size along each label: the weight's axes, and RANK."""
        return {**dict(enumerate(self.shape)), RANK: self.a.shape[self.a_axes.index(RANK)]}

    def take_entry(self) -> LowRankWeight:
        """Return the weight with the factors of its own adapter in place of the tables."""
        if self.entry is None:
            return self
        a, a_axes = take_entries(self.a, self.a_axes, self.entry)
        b, b_axes = take_entries(self.b, self.b_axes, self.entry)
        return self.replace(a=a, a_axes=a_axes, b=b, b_axes=b_axes, entry=None)

    def apply_scale(self, value: jax.Array) -> jax.Array:
        """Multiply by scale and multiplier; the dtype is kept."""
        if self.multiplier is not None:
            factor = jnp.asarray(self.multiplier, accumulator_dtype(value.dtype)) * self.scale
            return value * factor.astype(value.dtype)
        return value if self.scale == 1 else value * self.scale

    def materialize(self) -> jax.Array:
        """Return the dense weight, summed in float32 and cast once."""
        if self.entry is not None:
            return self.take_entry().materialize()
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
        """Return plain + multiplier * (changed - same)."""
        if self.multiplier is None:
            return changed if plain is same else plain + (changed - same)
        return plain + (changed - same) * jnp.asarray(self.multiplier, plain.dtype)

    def for_use(self, number: int) -> LowRankWeight:
        """Return the weight with the dropout keys of this use."""
        key = None if self.key is None else _fold_in(self.key, number)
        return self.replace(base=self.base.for_use(number), key=key)

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> LowRankWeight | None:
        """Apply fn, which keeps values, to the base, and to the factors unless base_only."""
        base = self.base.map_arrays(fn, base_only)
        if base is None or base_only:
            return self.with_base(base)
        parts = {name: fn(array) for name, array in self.get_arrays("a", "b", "gain").items()}
        return self.replace(base=base, **parts)

    def stop_gradient(self) -> LowRankWeight | None:
        """Stop the gradients of the base, the factors, the gain and the multiplier."""
        parts = self.get_arrays("a", "b", "gain", "multiplier")
        parts = {name: lax.stop_gradient(array) for name, array in parts.items()}
        return self.with_base(self.base.stop_gradient(), **parts)

    def astype(self, dtype: jax.typing.DTypeLike) -> LowRankWeight | None:
        """Convert the base; the product casts the factors to its dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.with_base(self.base.astype(dtype))

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> LowRankWeight | None:
        """Scale the base and b."""
        return scaling.multiply(self, scalar, fn)

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> LowRankWeight | None:
        """Scale the base and one of the factors."""
        return scaling.scale_axes(self, by, axes, fn)

    def specs(self, spec: jax.P) -> LowRankWeight | None:
        """Return PartitionSpecs in place of the arrays; scalars are replicated."""
        whole = super().specs(spec)
        scalars = dict.fromkeys(self.get_arrays("multiplier", "entry"), type(spec)())
        return None if whole is None else whole.replace(**scalars)

    def reshard(self, spec: jax.P, fn: Callable) -> LowRankWeight | None:
        """Reshard the arrays by spec; scalars are replicated."""
        whole, found = super().reshard(spec, fn), self.get_arrays("multiplier", "entry")
        scalars = {name: fn(array, type(spec)()) for name, array in found.items()}
        return None if whole is None else whole.replace(**scalars)

    # Products

    def dot(self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options) -> Any:
        """lax.dot_general."""
        return dot.dot(self, other, numbers, on_left, options)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> Any:
        """lax.ragged_dot_general."""
        return dot.ragged_dot(self.take_entry(), other, sizes, numbers, options)

    def conv(self, other: jax.Array, options: Options) -> Any:
        """lax.conv_general_dilated."""
        return conv.conv(self.take_entry(), other, options)

    def gather(self, indices: jax.Array, options: Options) -> jax.Array | Weight | None:
        """lax.gather; a weight if only stack axes are indexed."""
        return gather.gather(self, indices, options)


def _fold_in(key: jax.Array, number: int) -> jax.Array:
    """Apply jax.random.fold_in to each of an array of keys."""
    fold = lambda k: jax.random.fold_in(k, number)
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    return fold(key)

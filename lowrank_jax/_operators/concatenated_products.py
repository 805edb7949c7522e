r"""Products of concatenated weights: one product of all dense bases, plus each part's change.

For $W = [W_1\ W_2]$ along an axis that the product keeps, $y = x W = [y_1\ y_2]$, and part i adds
its adapter's change to $y_i$: $y_i + s\,(x a_i) b_i$, or DoRA's $c_i \odot (y_i + s\,(x a_i) b_i)$.
Along a contracted axis, $y = x W$, and each part adds its change to all of y. In both cases the
base's product is bitwise equal to the model's. Quantized parts are multiplied one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.low_rank import LowRankWeight
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight
from lowrank_jax._operators.zero import ZeroWeight
from lowrank_jax._primitives.bilinear import product_dtype
from lowrank_jax._primitives.contract import accumulator_dtype

if TYPE_CHECKING:
    from lowrank_jax._operators.concatenated import ConcatenatedWeight

Product = Callable[[Any, jax.Array, Options], Any]  # (weight, operand, options) -> product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CachedProductWeight(DenseWeight):
    """A dense weight whose product with one operand is already computed.

    Args:
      value: the weight.
      operand: the other operand.
      product: their product.
    """

    operand: Any
    product: Any

    def dot(
        self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
    ) -> jax.Array:
        """lax.dot_general."""
        known = other is self.operand
        return self.product if known else super().dot(other, numbers, on_left, options)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> jax.Array:
        """lax.ragged_dot_general."""
        known = other is self.operand
        return self.product if known else super().ragged_dot(other, sizes, numbers, options)

    def conv(self, other: jax.Array, options: Options) -> jax.Array:
        """lax.conv_general_dilated."""
        return self.product if other is self.operand else super().conv(other, options)


def dot(
    w: ConcatenatedWeight, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
) -> Any:
    """lax.dot_general."""
    (lc, rc), (lb, rb) = numbers
    mine, theirs = ((lc, lb), (rc, rb)) if on_left else ((rc, rb), (lc, lb))
    product = lambda part, x, options: part.dot(x, numbers, on_left, options)
    # x [n, in] @ [W_1 W_2]: concatenated along `in`, the products are summed; along `out`, they are
    # concatenated along the axis of the result that `out` becomes: lax.dot_general puts batch axes
    # first, then the free axes of the left operand, then those of the right.
    if w.axis in mine[0]:
        return _sum_products(w, product, other, theirs[0][mine[0].index(w.axis)], options)
    if w.axis in mine[1]:
        at = theirs[1][mine[1].index(w.axis)]
        return _concat_products(
            w, product, other, w.split_operand(other, at), mine[1].index(w.axis), options
        )
    free = [axis for axis in range(w.ndim) if axis not in (*mine[0], *mine[1])]
    ahead = len(lb) + (0 if on_left else other.ndim - len(theirs[0]) - len(theirs[1]))
    return _concat_products(w, product, other, None, ahead + free.index(w.axis), options)


def ragged_dot(
    w: ConcatenatedWeight,
    other: jax.Array,
    sizes: jax.Array,
    numbers: RaggedNumbers,
    options: Options,
) -> Any:
    """lax.ragged_dot_general."""
    (lc, rc), (_, rb) = numbers.dot_dimension_numbers
    if len(numbers.rhs_group_dimensions) != 1 or {*numbers.lhs_ragged_dimensions} & {*lc}:
        return None  # groups along a contracted axis: the result would have a group axis
    product = lambda part, x, options: part.ragged_dot(x, sizes, numbers, options)
    if w.axis in rc:
        return _sum_products(w, product, other, lc[rc.index(w.axis)], options)
    bound = (*rc, *rb, *numbers.rhs_group_dimensions)
    if w.axis in bound:
        return None
    free = [axis for axis in range(w.ndim) if axis not in bound]
    return _concat_products(
        w, product, other, None, other.ndim - len(lc) + free.index(w.axis), options
    )


def conv(w: ConcatenatedWeight, other: jax.Array, options: Options) -> Any:
    """lax.conv_general_dilated."""
    numbers = options["dimension_numbers"]
    out_axis, in_axis, *_ = numbers.rhs_spec
    product = lambda part, x, options: part.conv(x, options)
    if options.get("feature_group_count", 1) != 1 or options.get("batch_group_count", 1) != 1:
        return None
    if w.axis == in_axis:
        return _sum_products(w, product, other, numbers.lhs_spec[1], options)
    if w.axis != out_axis:
        return None
    return _concat_products(w, product, other, None, numbers.out_spec[1], options)


def _concat_products(
    w: ConcatenatedWeight,
    product: Product,
    other: jax.Array,
    pieces: list | None,
    at: int,
    options: Options,
) -> Any:
    """Concatenate all parts' products along axis `at`; pieces=None: all of `other` for each."""
    if options.get("out_sharding") is not None:
        return None
    pieces = [other] * len(w.parts) if pieces is None else pieces
    bases = _get_dense_bases(w)
    if bases is None:
        return _concat_results(w.parts, product, pieces, at, options)
    y = product(_concat_bases(w, bases), other, options)
    if not _has_gain(w):
        parts = [_without_base(part) for part in w.parts]
        return _add_change(y, _concat_results(parts, product, pieces, at, options))
    # A gain multiplies the base's part of y too, so each part needs its own y_i: slice it from y
    # and give it to the part as the known product of its base and x.
    ends = itertools.accumulate((part.shape[w.axis] for part in w.parts), initial=0)
    parts = []
    for part, base, piece, cut in zip(
        w.parts, bases, pieces, itertools.pairwise(ends), strict=True
    ):
        known = CachedProductWeight(base.value, piece, lax.slice_in_dim(y, *cut, axis=at))
        parts.append(part.with_base(known) if isinstance(part, LowRankWeight) else known)
    return _concat_results(parts, product, pieces, at, options)


def _concat_results(
    parts: Sequence[Weight | None], product: Product, pieces: list, at: int, options: Options
) -> jax.Array | None:
    """Concatenate the product of each part with its piece, or return None if one is None."""
    results = [product(*pair, options) for pair in zip(parts, pieces, strict=True)]
    return None if any(y is None for y in results) else lax.concatenate(results, at)


def _sum_products(
    w: ConcatenatedWeight, product: Product, other: jax.Array, at: int, options: Options
) -> Any:
    """Sum all parts' products in float32 or wider, then cast once."""
    if options.get("out_sharding") is not None:
        return None
    wanted = options.get("preferred_element_type") or product_dtype(other.dtype, w.dtype)
    exact = {**options, "preferred_element_type": accumulator_dtype(wanted)}
    pairs = list(zip(w.parts, w.split_operand(other, at), strict=True))
    bases = _get_dense_bases(w)
    if bases is None:
        return _sum_results([product(*pair, exact) for pair in pairs], wanted)
    changes = []
    for (part, piece), base in zip(pairs, bases, strict=True):
        if isinstance(part, LowRankWeight) and part.gain is not None:
            changed = product(part, piece, exact)
            changes.append(None if changed is None else changed - product(base, piece, exact))
        else:
            changes.append(product(_without_base(part), piece, exact))
    return _add_change(
        product(_concat_bases(w, bases), other, options), _sum_results(changes, wanted)
    )


def _sum_results(results: list[Any], dtype: jax.typing.DTypeLike) -> jax.Array | None:
    """Sum the results and cast, or return None if one is None."""
    if any(y is None for y in results):
        return None
    return functools.reduce(jnp.add, results).astype(dtype)


def _add_change(y: jax.Array, change: jax.Array | None) -> jax.Array | None:
    """Add the change to y, or return None if it is None."""
    return None if change is None else y + change.astype(y.dtype)


def _get_dense_bases(w: ConcatenatedWeight) -> list[Any] | None:
    """Return the base of each part, or None if one is not dense."""
    bases = [part.base if type(part) is LowRankWeight else part for part in w.parts]
    return bases if all(type(base) is DenseWeight for base in bases) else None


def _concat_bases(w: ConcatenatedWeight, bases: list[Any]) -> DenseWeight:
    """Concatenate the bases."""
    return DenseWeight(lax.concatenate([base.value for base in bases], w.axis))


def _has_gain(w: ConcatenatedWeight) -> bool:
    """Whether a part has a DoRA gain."""
    return any(type(part) is LowRankWeight and part.gain is not None for part in w.parts)


def _without_base(part: Weight) -> Weight | None:
    """Replace the base of a part by zeros, so that its product is the adapter's change alone."""
    nothing = ZeroWeight(part.shape, part.dtype)
    return part.with_base(nothing) if isinstance(part, LowRankWeight) else nothing

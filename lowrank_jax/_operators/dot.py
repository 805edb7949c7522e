"""Products of a low-rank weight: the base's product plus the product of the factors."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._operators.branch import apply_adapter, get_stacked_key_axes, multiply_labeled
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers
from lowrank_jax._primitives.bilinear import product_dtype
from lowrank_jax._primitives.contract import RANK, Labels, arrange, contract, count_multiplies
from lowrank_jax._primitives.selected_dot import ENTRY

if TYPE_CHECKING:
    from lowrank_jax._operators.low_rank import LowRankWeight


def dot(
    w: LowRankWeight, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options
) -> Any:
    """lax.dot_general: the base's product as in the user's program, plus the factors' product."""
    x_labels, out, mine, theirs = label_product(w, other.ndim, numbers, on_left)
    sizes = {**w.sizes(), **dict(zip(x_labels, other.shape, strict=True))}
    last = {"preferred_element_type": options.get("preferred_element_type")}
    # Stack axes that x lacks: with dropout each layer has its own x, [*stacked, *other.shape].
    stacked = get_stacked_key_axes(w, x_labels)
    labels_of = lambda x: (*stacked, *x_labels) if x.ndim > other.ndim else x_labels
    before = after = None
    if {*w.gain_axes} <= {*out}:
        after = lambda y, gains: multiply_labeled(y, out, gains, w.gain_axes)
    elif {*w.gain_axes} <= {*x_labels}:
        before = lambda x, gains: multiply_labeled(x, labels_of(x), gains, w.gain_axes)
    else:  # the gain varies along both contracted and kept axes
        return None

    def base(x: jax.Array) -> Any:
        if x.ndim == other.ndim:
            return w.base.dot(x, numbers, on_left, options)
        # x is [*stacked, *other.shape]. The weight's stacked axes, free before, are batch axes now,
        # which lax.dot_general puts first; arrange moves them back to their place in out.
        shift = lambda axes: tuple(axis + len(stacked) for axis in axes)
        own = mine[0], (*stacked, *mine[1])
        its = shift(theirs[0]), (*range(len(stacked)), *shift(theirs[1]))
        sides: Any = (own, its) if on_left else (its, own)
        plain = {name: value for name, value in options.items() if name != "out_sharding"}
        (lc, rc), (lb, rb) = zip(*sides, strict=True)
        y = w.base.dot(x, ((lc, rc), (lb, rb)), on_left, plain)
        made = (*stacked, *(label for label in out if label not in stacked))
        return None if y is None else arrange(y, made, out, {})

    def branch(w: LowRankWeight, x: jax.Array) -> jax.Array:
        value, labels = _apply_factors(w, x, labels_of(x), out, sizes, on_left, options, last)
        return arrange(value, labels, out, sizes)

    return apply_adapter(w, other, base, branch, before=before, after=after, stacked=stacked)


def label_product(
    w: LowRankWeight, ndim: int, numbers: DotNumbers, on_left: bool
) -> tuple[Labels, Labels, Any, Any]:
    """Label the axes of a product's other operand and of its result.

    Returns:
      The labels of the operand and of the result; the (contracted, batch) axes of the weight, and
      the operand's axes that are matched with them.
    """
    # For x [batch, in] @ w [in, out], with numbers (((1,), (0,)), ((), ())):
    #     x_labels = (("x", 0), 0)    batch is free, `in` is axis 0 of w
    #     out      = (("x", 0), 1)    the axis order of lax.dot_general: batch axes, left, right
    (lc, rc), (lb, rb) = numbers
    mine, theirs = ((lc, lb), (rc, rb)) if on_left else ((rc, rb), (lc, lb))
    x_labels = label_operand(ndim, mine, theirs)
    bound = {*mine[0], *mine[1]}
    free = [axis for axis in range(w.ndim) if axis not in bound]
    x_free = [label for label in x_labels if isinstance(label, tuple)]
    out = (*mine[1], *free, *x_free) if on_left else (*mine[1], *x_free, *free)
    return x_labels, out, mine, theirs


def order_factors(
    w: LowRankWeight, sizes: dict[Any, int], x_labels: Labels, out: Labels
) -> tuple[str, str]:
    """Return the names of the factors in the order that takes fewer multiplications."""
    # x [n, in] · a [in, r] · b [r, out] costs n·r·(in + out). With w.T, x [n, out] is multiplied
    # by b first for the same cost, while x·a would be an outer product over n, out, in and r. The
    # count over labels finds the order, also for stacked and partly contracted weights.
    totals = []
    drop_entry = lambda labels: tuple(label for label in labels if label != ENTRY)
    factors = drop_entry(w.a_axes), drop_entry(w.b_axes)
    for first, second in (factors, factors[::-1]):
        one, left = count_multiplies(sizes, x_labels, first, {*second, *out})
        two, _ = count_multiplies(sizes, left, second, out)
        totals.append(one + two)
    return ("b", "a") if totals[1] < totals[0] else ("a", "b")


def _apply_factors(
    w: LowRankWeight,
    x: jax.Array,
    x_labels: Labels,
    out: Labels,
    sizes: dict[Any, int],
    on_left: bool,
    options: Options,
    last: dict[str, Any],
) -> tuple[jax.Array, Labels]:
    """Return x·a·b, or x·b·a if that takes fewer multiplications, and the labels of the result."""
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(w.dtype)
    dtype = product_dtype(x.dtype, w.dtype)
    first, second = order_factors(w, sizes, x_labels, out)
    first_axes, second_axes = w.labels(first), w.labels(second)
    precision = {"precision": options.get("precision")}

    def pair(x: jax.Array, xl: Labels, y: jax.Array, yl: Labels, keep: set, **kw: Any) -> Any:
        if ENTRY in yl:
            return contract(x, xl, y, yl, keep, index=w.entry, **kw)
        return contract(y, yl, x, xl, keep, **kw) if on_left else contract(x, xl, y, yl, keep, **kw)

    if w.shared is not None and w.shared.factor == first:
        inner = w.shared.value
        labels = (*(label for label in x_labels if isinstance(label, tuple)), RANK)
    else:
        factor, keep = getattr(w, first).astype(w.dtype), {*second_axes, *out}
        inner, labels = pair(x, x_labels, factor, first_axes, keep, **precision)
    inner = w.apply_scale(inner).astype(dtype)
    factor = getattr(w, second).astype(w.dtype)
    return pair(inner, labels, factor, second_axes, {*out}, **precision, **last)


def ragged_dot(
    w: LowRankWeight, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
) -> Any | None:
    """lax.ragged_dot_general: each group of rows times its own weight, factor by factor."""
    (contracting, batching) = numbers.dot_dimension_numbers
    (lc, rc), (lb, rb) = contracting, batching
    groups = tuple(numbers.rhs_group_dimensions)
    ragged = tuple(numbers.lhs_ragged_dimensions)
    if lb or rb or len(groups) != 1 or len(ragged) != 1 or ragged[0] in lc:
        return None
    if ({*w.a_axes} & {*w.b_axes}) - {RANK, groups[0]}:  # a stack axis other than the group axis
        return None
    x_labels = label_operand(other.ndim, (rc, rb), (lc, lb))
    rows = ("x", ragged[0])
    x_free = [label for label in x_labels if isinstance(label, tuple)]
    free = [axis for axis in range(w.ndim) if axis not in rc and axis != groups[0]]
    out = (*x_free, *free)
    extents = {**w.sizes(), **dict(zip(x_labels, other.shape, strict=True))}
    precision = {"precision": options.get("precision")}
    last = {**precision, "preferred_element_type": options.get("preferred_element_type")}

    def base(x: jax.Array) -> Any:
        return w.base.ragged_dot(x, sizes, numbers, options)

    def branch(w: LowRankWeight, x: jax.Array, sizes: jax.Array) -> jax.Array:
        step = lambda x, xl, y, yl, keep, options: _ragged_contract(
            x, xl, y, yl, keep, groups[0], rows, sizes, options
        )
        keep = {*w.b_axes, *out}
        value, labels = step(x, x_labels, w.a.astype(w.dtype), w.a_axes, keep, precision)
        value = w.apply_scale(value).astype(product_dtype(x.dtype, w.dtype))
        value, labels = step(value, labels, w.b.astype(w.dtype), w.b_axes, {*out}, last)
        return arrange(value, labels, out, extents)

    if not {*w.gain_axes} <= {*out, groups[0]}:
        return None

    def after(y: jax.Array, gains: jax.Array, sizes: jax.Array) -> jax.Array:
        """Multiply each row by the gains of its group."""
        # Which rows belong to which group is known at run time only. A ragged product of ones
        # [rows, 1] and gains [groups, out, 1] is [rows, out]: for each row its group's gains.
        ones = jnp.ones((other.shape[ragged[0]], 1), gains.dtype)
        labels = (*w.gain_axes, "one")
        each = _ragged_contract(
            ones, (rows, "one"), gains[..., None], labels, {*out}, groups[0], rows, sizes, {}
        )
        return multiply_labeled(y, out, *each)

    return apply_adapter(w, other, base, branch, sizes, after=after)


def _ragged_contract(
    x: jax.Array,
    xl: Labels,
    y: jax.Array,
    yl: Labels,
    keep: Collection[Hashable],
    group: int,
    rows: Hashable,
    sizes: jax.Array,
    options: Options,
) -> tuple[jax.Array, Labels]:
    """Contract x and y; if y has the axis `group`, group g of x's rows with its entry g."""
    if group not in yl:
        return contract(x, xl, y, yl, keep, **options)
    summed = [label for label in xl if label in yl and label not in keep]
    at = lambda labels, chosen: tuple(labels.index(label) for label in chosen)
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=((at(xl, summed), at(yl, summed)), ((), ())),
        lhs_ragged_dimensions=(xl.index(rows),),
        rhs_group_dimensions=(yl.index(group),),
    )
    out = lax.ragged_dot_general(x, y, sizes, numbers, **options)
    rest = [label for label in (*xl, *yl) if label not in summed and label != group]
    return out, tuple(rest)


def label_operand(
    ndim: int, mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> Labels:
    """Label the axes of a product's other operand.

    Args:
      ndim: the operand's number of axes.
      mine: the weight's contracted and batch axes.
      theirs: the operand's axes that are matched with them.

    Returns:
      The weight axis for each matched axis, ("x", i) for each other axis i.
    """
    labels: list[Any] = [("x", i) for i in range(ndim)]
    for weight_axes, operand_axes in zip(mine, theirs, strict=True):
        for weight_axis, axis in zip(weight_axes, operand_axes, strict=True):
            labels[axis] = weight_axis
    return tuple(labels)

"""Operations that multiply a weight or read its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lowrank_jax._interpreter.interpret import Context
from lowrank_jax._interpreter.operation import Operation
from lowrank_jax._interpreter.structural import is_only_first_weight, wrap_result
from lowrank_jax._interpreter.survey import Survey, Value, merge_values
from lowrank_jax._jax import equations
from lowrank_jax._jax.equations import Dot, RaggedDot
from lowrank_jax._jax.types import Equation
from lowrank_jax._operators.weight import Weight

Out = Sequence[Any] | None


# Evaluation


def _materialize_smaller(ctx: Context, eqn: Equation, values: list[Any]) -> list[Any]:
    """Of two weights that meet, build the smaller: the only way, and so not a fallback."""
    left, right = values[:2]
    if isinstance(left, Weight) and isinstance(right, Weight):
        if math.prod(left.shape) <= math.prod(right.shape):
            left = ctx.materialize_operand(left, eqn)
        else:
            right = ctx.materialize_operand(right, eqn)
    return [left, right, *values[2:]]


def _record_product(
    ctx: Context, eqn: Equation, weight: Weight, out: jax.Array | Weight | None
) -> Out:
    """The result of a product, noted for the report."""
    if out is not None and not isinstance(out, Weight):
        for leaf in weight.leaves():
            ctx.record(leaf, eqn, leaf.product_kind)
    return wrap_result(out)


def _evaluate_dot(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    left, right = _materialize_smaller(ctx, eqn, values)
    on_left = isinstance(left, Weight)
    weight, other = (left, right) if on_left else (right, left)
    numbers, options = Dot.of(eqn)
    return _record_product(
        ctx, eqn, weight, ctx.begin_use(weight).dot(other, numbers, on_left, options)
    )


def _evaluate_ragged_dot(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    left, right, sizes = _materialize_smaller(ctx, eqn, values)
    numbers, options, group_offset = RaggedDot.of(eqn)
    if not isinstance(right, Weight) or isinstance(sizes, Weight) or group_offset is not None:
        return None
    out = ctx.begin_use(right).ragged_dot(left, sizes, numbers, options)
    return _record_product(ctx, eqn, right, out)


def _evaluate_conv(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    left, right = _materialize_smaller(ctx, eqn, values)
    if not isinstance(right, Weight):
        return None
    return _record_product(
        ctx, eqn, right, ctx.begin_use(right).conv(left, equations.get_conv_options(eqn))
    )


def _evaluate_gather(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    if not is_only_first_weight(values):
        return None
    weight, options = values[0], equations.get_gather_options(eqn)
    indices, options = _drop_whole_axes(weight.shape, values[1], options)
    if not indices.shape[-1]:  # nothing is chosen: as many copies as there are indices
        shape = equations.get_result_shape(eqn)
        axes = [*map(int, options["dimension_numbers"].offset_dims)]
        bound = lambda array: lax.broadcast_in_dim(array, shape, axes)
        return wrap_result(weight.broadcast(shape, axes, bound))
    return _record_product(ctx, eqn, weight, weight.gather(indices, options))


def _drop_whole_axes(
    shape: Sequence[int], indices: jax.Array, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Leave out of the indices those of axes that are read whole, which are clamped to 0.

    Such are in the index of a dynamic_slice under vmap, which names every axis.
    """
    numbers, sizes = options["dimension_numbers"], options["slice_sizes"]
    mapped = numbers.start_index_map
    kept = [i for i, axis in enumerate(mapped) if sizes[axis] != shape[axis] or sizes[axis] == 1]
    clamped = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if len(kept) == len(mapped) or options["mode"] not in clamped:
        return indices, options
    if not kept and numbers.operand_batching_dims:
        return indices, options
    numbers = numbers._replace(start_index_map=tuple(mapped[i] for i in kept))
    chosen = indices[..., np.array(kept, int)]
    # the rest of an index may repeat, in any order
    more = {"unique_indices": False, "indices_are_sorted": False}
    return chosen, {**options, "dimension_numbers": numbers, **more}


# Survey

OperandAxes = tuple[Sequence[int], Sequence[int], Sequence[int]]  # contracted, batch and free axes


def _survey_product(
    survey: Survey,
    eqn: Equation,
    ins: Sequence[Value],
    roles: Sequence[OperandAxes | None],
    op: str = "dot",
) -> list[Value]:
    """A product whose operands have these roles; None: that operand is no weight."""
    left, right = ins
    fed = max(left.data_rank, right.data_rank) > 0  # by data, not by parameters alone
    sizes = [math.prod(equations.get_shape(atom)) for atom in eqn.invars]
    # of two parameters the smaller is as the input, if no product with data follows
    input_is = None if fed or right.has_no_leaves or left.has_no_leaves else sizes[0] > sizes[1]
    key, found = survey.make_key(eqn), []
    for at, (value, mine) in enumerate(zip(ins, roles, strict=True)):
        other = ins[1 - at]
        if value.data_rank > other.data_rank and not other.has_no_leaves:
            survey.note_read(eqn, value.views)
            continue
        if mine is None:  # the input of a convolution, the rows of a ragged product
            value, mine = survey.mark_computed(eqn, value), ((), (), ())
        value = survey.mark_computed(eqn, value, lambda v, mine=mine: v.is_masked(mine[0], mine[2]))
        for view in value.views:
            known = view.find_product_roles(op, *mine, provisional=not fed)
            survey.note_use(view.path, key, survey.describe(eqn), None if at == input_is else known)
        if fed:
            survey.note_unfollowed(value.computed)
        found += [view.path for view in value.views] + [path for path, _ in value.computed]
    out = merge_values(ins).replace(activation=fed, direct=frozenset())
    if found and fed:
        own = frozenset({survey.note_product(eqn, found, out)})
        return [out.replace(products=out.products | own, direct=own, near=own, output=False)]
    if not fed:
        out = out.replace(computed=survey.find_computed(eqn, ins, views=False), output=bool(found))
    return [out]


def _survey_dot(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    (lc, rc), (lb, rb) = Dot.of(eqn).numbers
    ndims = [len(equations.get_shape(atom)) for atom in eqn.invars]
    free = lambda ndim, *used: [axis for axis in range(ndim) if axis not in {*used}]
    lf, rf = free(ndims[0], *lc, *lb), free(ndims[1], *rc, *rb)
    (out,) = _survey_product(survey, eqn, ins, [(lc, lb, lf), (rc, rb, rf)])
    if out.activation:
        return [out]
    # of parameters alone: each is followed on, to a product with data
    shape = equations.get_result_shape(eqn)
    left = ins[0].map(lambda v: v.contract(shape, [*lb, *lf, *(None for _ in rf)], lc))
    right = ins[1].map(lambda v: v.contract(shape, [*rb, *(None for _ in lf), *rf], rc))
    views = tuple(dict.fromkeys((*left.views, *right.views)))
    return [out.replace(views=views)]


def _survey_ragged_dot(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    numbers = RaggedDot.of(eqn).numbers
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    batch = (*batch, *numbers.rhs_group_dimensions)
    ndim = len(equations.get_shape(eqn.invars[1]))
    free = [axis for axis in range(ndim) if axis not in (*contracted, *batch)]
    return _survey_product(survey, eqn, ins[:2], [None, (contracted, batch, free)])


def _survey_conv(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """The window and the input features are contracted."""
    out, *taps = equations.get_conv_options(eqn)["dimension_numbers"].rhs_spec
    return _survey_product(survey, eqn, ins, [None, (taps, (), (out,))], "conv")


def _survey_gather(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Rows of a table, one index of a stack, or many of them."""
    table, indices = ins
    options, shape = equations.get_gather_options(eqn), equations.get_result_shape(eqn)
    numbers, sizes = options["dimension_numbers"], options["slice_sizes"]
    many = len(equations.get_shape(eqn.invars[1])) > 1
    out = table.map(lambda view: view.gather(numbers, sizes, shape, indices.data, many), indices)
    # the rows of a matrix are vectors: no product can take them as a weight
    rows = [view for view in out.views if view.looked_up and view.has_vectors()]
    if rows:
        survey.note_read(eqn, rows)
        rest = tuple(view for view in out.views if view not in rows)
        out = out.replace(views=rest, activation=out.activation or indices.data)
    return [out]


PRODUCTS: dict[str, Operation] = {
    "dot_general": Operation("product", _evaluate_dot, _survey_dot),
    "ragged_dot_general": Operation("product", _evaluate_ragged_dot, _survey_ragged_dot),
    "conv_general_dilated": Operation("product", _evaluate_conv, _survey_conv),
    "gather": Operation("product", _evaluate_gather, _survey_gather),
}

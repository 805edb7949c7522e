"""Rules for operations that multiply a weight or read its rows."""

from __future__ import annotations

import dataclasses
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
from lowrank_jax._jax.inlined import call_abstract, call_inlined
from lowrank_jax._jax.types import Equation
from lowrank_jax._operators.low_rank import LowRankWeight
from lowrank_jax._operators.quantized import QuantizedWeight
from lowrank_jax._operators.weight import Weight

Out = Sequence[Any] | None


# Evaluation


def _materialize_smaller(ctx: Context, eqn: Equation, values: list[Any]) -> list[Any]:
    """Materialize the smaller of two weights; it is not a fallback, as every rule needs it."""
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
    """Record a product for the report, and return its result."""
    if out is not None and not isinstance(out, Weight):
        for leaf in weight.leaves():
            ctx.record(leaf, eqn, leaf.product_kind)
    return wrap_result(out)


def _multiply(ctx: Context, method: str, weight: Weight, operands: list[Any], *static: Any) -> Any:
    """Return a product of a weight; JAX differentiates equal products of several layers once."""
    if not isinstance(weight, LowRankWeight | QuantizedWeight):
        return getattr(weight, method)(*operands, *static)
    # Paths are static data of a weight's pytree, in which equal layers differ.
    bare = weight.map_leaves(lambda leaf: dataclasses.replace(leaf, path=None))
    call = call_abstract if ctx.abstract else call_inlined
    return call(_run_product, (method, *static), bare, operands)


def _run_product(method: str, *args: Any) -> Any:
    *static, weight, operands = args
    return getattr(weight, method)(*operands, *static)


def _evaluate_dot(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    left, right = _materialize_smaller(ctx, eqn, values)
    on_left = isinstance(left, Weight)
    weight, other = (left, right) if on_left else (right, left)
    numbers, options = Dot.of(eqn)
    out = _multiply(ctx, "dot", ctx.begin_use(weight), [other], numbers, on_left, options)
    return _record_product(ctx, eqn, weight, out)


def _evaluate_ragged_dot(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    left, right, sizes = _materialize_smaller(ctx, eqn, values)
    numbers, options, group_offset = RaggedDot.of(eqn)
    if not isinstance(right, Weight) or isinstance(sizes, Weight) or group_offset is not None:
        return None
    out = _multiply(ctx, "ragged_dot", ctx.begin_use(right), [left, sizes], numbers, options)
    return _record_product(ctx, eqn, right, out)


def _evaluate_conv(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    left, right = _materialize_smaller(ctx, eqn, values)
    if not isinstance(right, Weight):
        return None
    out = _multiply(ctx, "conv", ctx.begin_use(right), [left], equations.get_conv_options(eqn))
    return _record_product(ctx, eqn, right, out)


def _evaluate_gather(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    if not is_only_first_weight(values):
        return None
    weight, options = values[0], equations.get_gather_options(eqn)
    # table [V, D] at tokens [B, T, 1] gives [B, T, D]: the base is gathered, and of the factors
    # a [V, r] and b [r, D] so is a, to [B, T, r], which is then multiplied by b.
    indices, options = _drop_whole_axes(weight.shape, values[1], options)
    if not indices.shape[-1]:  # no axis is indexed: a copy for each index
        shape = equations.get_result_shape(eqn)
        axes = [*map(int, options["dimension_numbers"].offset_dims)]
        bound = lambda array: lax.broadcast_in_dim(array, shape, axes)
        return wrap_result(weight.broadcast(shape, axes, bound))
    return _record_product(ctx, eqn, weight, weight.gather(indices, options))


def _drop_whole_axes(
    shape: Sequence[int], indices: jax.Array, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Drop the indices of axes that are read whole, which are clamped to 0.

    Under vmap a dynamic_slice becomes a gather whose indices name every axis.
    """
    numbers, sizes = options["dimension_numbers"], options["slice_sizes"]
    # W [L, 16, 32] sliced at (i, 0, 0) with sizes (1, 16, 32), for a batch of i: indices [B, 3] and
    # start_index_map (0, 1, 2) become indices [B, 1] and (0,).
    mapped = numbers.start_index_map
    kept = [i for i, axis in enumerate(mapped) if sizes[axis] != shape[axis] or sizes[axis] == 1]
    clamped = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if len(kept) == len(mapped) or options["mode"] not in clamped:
        return indices, options
    if not kept and numbers.operand_batching_dims:
        return indices, options
    numbers = numbers._replace(start_index_map=tuple(mapped[i] for i in kept))
    chosen = indices[..., np.array(kept, int)]
    # what is left of the indices may repeat, in any order
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
    """Survey a product; `roles` has the axes of each operand, None for one that is not a weight."""
    left, right = ins
    fed = max(left.data_rank, right.data_rank) > 0  # whether data takes part
    sizes = [math.prod(equations.get_shape(atom)) for atom in eqn.invars]
    # Of a product of two parameters, the smaller counts as the input, unless a product with data
    # follows: of queries [8, 64] @ w [64, 256], w is the weight.
    input_is = None if fed or right.has_no_leaves or left.has_no_leaves else sizes[0] > sizes[1]
    key, found = survey.make_key(eqn), []
    for at, (value, mine) in enumerate(zip(ins, roles, strict=True)):
        other = ins[1 - at]
        if value.data_rank > other.data_rank and not other.has_no_leaves:
            survey.note_read(eqn, value.views)
            continue
        if mine is None:  # the input of a convolution or of a ragged product
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
        return [out.replace(near=own, direct=own, output=False)]
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
    # Of parameters alone, as in x @ (a @ b): both views are followed to the product with x. For
    # a [4, 2], b [2, 6] the result [4, 6] has axis 0 of a, axis 1 of b; the other axes are summed.
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
    """Survey a convolution, which contracts the window and the input features."""
    out, *kernel_axes = equations.get_conv_options(eqn)["dimension_numbers"].rhs_spec
    return _survey_product(survey, eqn, ins, [None, (kernel_axes, (), (out,))], "conv")


def _survey_gather(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey a read of rows of a table, or of one or many indices of a stack."""
    table, indices = ins
    options, shape = equations.get_gather_options(eqn), equations.get_result_shape(eqn)
    numbers, sizes = options["dimension_numbers"], options["slice_sizes"]
    many = len(equations.get_shape(eqn.invars[1])) > 1
    out = table.map(lambda view: view.gather(numbers, sizes, shape, indices.data, many), indices)
    # rows of a matrix are vectors, which cannot be the weight of a product: this is a lookup
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

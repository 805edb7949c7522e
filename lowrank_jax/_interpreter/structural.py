"""Rules for structural operations, which rearrange the elements of their operands.

Weights, which are evaluated, and views, which are surveyed, have methods of the same names, so that
most operations are one function of (equation, weight or view). A weight's method returns None if it
must be materialized; a view's, if the result contains no element of the leaf.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._interpreter.interpret import Context
from lowrank_jax._interpreter.operation import Operation, OperationTable
from lowrank_jax._interpreter.shardings import constrain_weight
from lowrank_jax._interpreter.survey import Survey, Value, clear_if_index, merge_values
from lowrank_jax._interpreter.views import View
from lowrank_jax._jax import equations, jaxprs
from lowrank_jax._jax.equations import Slice, Split
from lowrank_jax._jax.types import Equation
from lowrank_jax._operators.concatenated import ConcatenatedWeight
from lowrank_jax._operators.weight import Weight

Out = Sequence[Any] | None


def wrap_result(result: jax.Array | Weight | None) -> Out:
    """Wrap the only result of an equation in a list; None stays None."""
    return None if result is None else [result]


def all_or_none(results: list[Any]) -> Out:
    """Return the results, or None if one of them is None."""
    return None if any(result is None for result in results) else results


def is_only_first_weight(values: list[Any]) -> bool:
    """Whether the first operand is the only weight."""
    return isinstance(values[0], Weight) and not any(isinstance(v, Weight) for v in values[1:])


def make_structural(arrange: Callable[[Any, Any], Any], **more: Any) -> Operation:
    """Make an operation with one operand and one result from arrange(equation, weight or view)."""

    def evaluate(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
        return wrap_result(arrange(eqn, values[0])) if len(values) == 1 else None

    def survey(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
        return [ins[0].map(lambda view: arrange(eqn, view), *ins[1:])]

    return Operation("structural", evaluate, survey, **more)


def make_splitting(arrange: Callable[[Any, Any], list[Any]]) -> Operation:
    """Make an operation with one operand and several results, listed by `arrange`."""

    def evaluate(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
        return all_or_none(arrange(eqn, values[0]))

    def survey(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
        take = lambda view, at: arrange(eqn, view)[at]
        return [ins[0].map(lambda view, at=at: take(view, at)) for at in range(len(eqn.outvars))]

    return Operation("structural", evaluate, survey)


# One function of (equation, weight or view) each


def _transpose(eqn: Equation, w: Weight | View) -> Any:
    return w.transpose(equations.get_permutation(eqn))


def _find_transpose_source(table: OperationTable, eqn: Equation) -> list[Any]:
    return [(0, equations.get_permutation(eqn))]


def _reshape(eqn: Equation, w: Weight | View) -> Any:
    order = equations.get_reshape_order(eqn)
    ordered = w if order is None else w.transpose(order)
    return None if ordered is None else ordered.reshape(equations.get_result_shape(eqn))


def _reshape_ones(eqn: Equation, w: Weight | View) -> Any:
    return w.reshape(equations.get_result_shape(eqn))


def _broadcast_in_dim(eqn: Equation, w: Weight | View) -> Any:
    bound = lambda array: jaxprs.bind(eqn, [array])[0]
    return w.broadcast(
        equations.get_result_shape(eqn), equations.get_broadcast_dimensions(eqn), bound
    )


def _slice(eqn: Equation, w: Weight | View) -> Any:
    return w.slice(*Slice.of(eqn))


def _rev(eqn: Equation, w: Weight | View) -> Any:
    return w.rev(equations.get_reversed_axes(eqn))


def _split(eqn: Equation, w: Weight | View) -> list[Any]:
    axis, sizes = Split.of(eqn)
    edges = itertools.accumulate(sizes, initial=0)
    return [w.slice_axis(axis, *cut) for cut in itertools.pairwise(edges)]


def _unstack(eqn: Equation, w: Weight | View) -> list[Any]:
    axis = equations.get_stack_axis(eqn)
    return [w.take_index(axis, number) for number in range(w.shape[axis])]


# Operations with more operands, or with different rules for weights and views


def _evaluate_convert(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    return wrap_result(values[0].astype(equations.get_new_dtype(eqn)))


def _survey_convert(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Follow a view through a cast to a floating dtype; any other makes it a computed value."""
    if jnp.issubdtype(equations.get_new_dtype(eqn), jnp.floating):
        return ins
    return [clear_if_index(eqn, survey.mark_computed(eqn, ins[0]))]


def _evaluate_dynamic_slice(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    if not is_only_first_weight(values):
        return None
    weight, starts = values[0], values[1 : 1 + values[0].ndim]
    sizes = equations.get_slice_sizes(eqn)
    parts = [axis for axis, size in enumerate(sizes) if size != weight.shape[axis]]

    # The same slice is taken of each array inside, along those axes that it has: of W [16, 32] at
    # (0, i) with sizes (16, 8), base [16, 32] and b [r, 32] are sliced along axis 1, a [16, r] is
    # not. `where` maps an axis of the weight to that of the array.
    def take(array: jax.Array, where: dict[int, int]) -> Any:
        for axis in parts:
            if axis in where:
                array = _take_dynamic_slice(array, starts[axis], sizes[axis], where[axis])
        return array

    return wrap_result(weight.index(take, {axis: sizes[axis] for axis in parts}, parts))


def _take_dynamic_slice(array: jax.Array, start: jax.Array, size: int, axis: int) -> Any:
    """Slice one axis with the start clamped, as the primitive does; none counts from the end."""
    sizes = [size if i == axis else full for i, full in enumerate(array.shape)]
    zero = jnp.zeros((), start.dtype)
    start = lax.clamp(zero, start, zero + (array.shape[axis] - size))
    starts = [start if i == axis else zero for i in range(array.ndim)]
    return lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False)


def _survey_dynamic_slice(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    data = any(start.data for start in ins[1:])

    def cut(view: View) -> View:
        for axis, size in enumerate(equations.get_slice_sizes(eqn)):
            if size != view.shape[axis]:
                view = view.dynamic_slice(axis, size, data)
        return view

    return [ins[0].map(cut, *ins[1:])]


def _evaluate_concatenate(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    return [ConcatenatedWeight.of(values, equations.get_concatenate_axis(eqn))]


def _survey_concatenate(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    axis, shape, offset, parts = (
        equations.get_concatenate_axis(eqn),
        equations.get_result_shape(eqn),
        0,
        [],
    )
    for value, atom in zip(ins, eqn.invars, strict=True):
        place = lambda view, offset=offset: view.join(axis, shape, offset)
        parts.append(value.map(place))
        offset += equations.get_shape(atom)[axis]
    return _survey_concatenation(survey, eqn, ins, parts)


def _survey_concatenation(
    survey: Survey, eqn: Equation, ins: list[Value], parts: list[Value]
) -> list[Value]:
    """Survey a concatenation: leaves are followed, unless an activation is among the operands."""
    if any(value.is_activation_like for value in ins):
        for value in ins:
            survey.note_read(eqn, value.views)
        return [merge_values(ins).replace(activation=True)]
    views = tuple(view for value in parts for view in value.views)
    return [
        merge_values(ins).replace(views=views, computed=survey.find_computed(eqn, ins, views=False))
    ]


def _evaluate_stack(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Concatenate operands with a new axis of size 1; a primitive since JAX 0.12."""
    axis, shape = equations.get_stack_axis(eqn), list(values[0].shape)
    slices = all_or_none([value.reshape([*shape[:axis], 1, *shape[axis:]]) for value in values])
    return slices and [ConcatenatedWeight.of(slices, axis)]


def _survey_stack(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    axis, shape = equations.get_stack_axis(eqn), equations.get_result_shape(eqn)
    # operands [16, 32] stacked along axis 1 into [16, K, 32]: each is broadcast to [16, 1, 32] and
    # inserted at its index
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    kept = [i for i in range(len(shape)) if i != axis]
    parts = [
        value.map(lambda view, at=at: view.broadcast(one, kept).join(axis, shape, at))
        for at, value in enumerate(ins)
    ]
    return _survey_concatenation(survey, eqn, ins, parts)


def _evaluate_pad(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Concatenate a weight with arrays of the padding value; negative and interior: None."""
    edges = equations.get_padding(eqn)
    if not is_only_first_weight(values) or any(min(edge) < 0 or edge[2] for edge in edges):
        return None
    weight, value = values
    # W [16, 32] padded by ((1, 1), (0, 4)) becomes [1 | 16 | 1, 32], then [18, 0 | 32 | 4].
    for axis, (low, high, _) in enumerate(edges):
        before, after = (list(weight.shape) for _ in "ab")
        before[axis], after[axis] = low, high
        parts = [lax.broadcast(value, before), weight, lax.broadcast(value, after)]
        weight = ConcatenatedWeight.of(parts, axis)
    return [weight]


def _survey_pad(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    parts = [ins[0].map(lambda view: view.pad(equations.get_padding(eqn))), Value()]
    survey.note_read(eqn, ins[1].views)
    return _survey_concatenation(survey, eqn, [ins[0], ins[1].replace(views=())], parts)


# Operations that keep every element where it is


def _survey_identity(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Return the operands as the results."""
    return ins


def _evaluate_on_base(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Apply a copy, a name or a sharding constraint to the base only."""
    out = values[0].map_arrays(lambda array: jaxprs.bind(eqn, [array])[0], base_only=True)
    return wrap_result(out)


def _evaluate_constraint(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Constrain the base of a weight; a concatenation is left as it is, as its parts differ."""
    return (
        values if isinstance(values[0], ConcatenatedWeight) else _evaluate_on_base(ctx, eqn, values)
    )


def _evaluate_sharding_constraint(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Constrain all arrays of a weight, blocks of a quantized one too, where they can be split."""
    (weight,) = values
    constrained = constrain_weight(weight, equations.get_constraint(eqn))
    return [constrained] if constrained is not weight else _evaluate_constraint(ctx, eqn, values)


def _evaluate_device_put(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Move the base of a weight to host or device memory."""
    if len(values) > 1:
        return None
    (weight,), (target,) = values, equations.get_devices(eqn)
    if jaxprs.is_host(target):
        return wrap_result(weight.transfer_base(jaxprs.to_host))
    out = weight.transfer_base(jaxprs.to_device)
    if out is None or isinstance(target, jax.memory.Space):
        return wrap_result(out)
    return _evaluate_on_base(ctx, eqn, [out])


def _evaluate_reshard(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Reshard each array of a weight by the entries of the spec for the axes that it has."""
    wanted = equations.get_new_sharding(eqn)

    def move(array: jax.Array, spec: jax.sharding.PartitionSpec) -> Any:
        sharding = type(wanted)(wanted.mesh, spec, memory_kind=wanted.memory_kind)
        return equations.bind_reshard(eqn, array, sharding)

    return wrap_result(values[0].reshard(wanted.spec, move))


def _evaluate_stop_gradient(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    return wrap_result(values[0].stop_gradient())


def _evaluate_on_all(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Apply reduce_precision to the base and to the factors."""
    return wrap_result(values[0].map_arrays(lambda array: jaxprs.bind(eqn, [array])[0]))


def _evaluate_barrier(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    return list(lax.optimization_barrier(tuple(values)))


def _evaluate_negate(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    return wrap_result(values[0].multiply(-1.0, lambda array, scalar: array * scalar))


STRUCTURAL: dict[str, Operation] = {
    "transpose": make_structural(_transpose, sources=_find_transpose_source),
    "reshape": make_structural(_reshape),
    "squeeze": make_structural(_reshape_ones),
    "expand_dims": make_structural(_reshape_ones),
    "broadcast_in_dim": make_structural(_broadcast_in_dim),
    "slice": make_structural(_slice),
    "rev": make_structural(_rev),
    "split": make_splitting(_split),
    "unstack": make_splitting(_unstack),
    "convert_element_type": Operation("structural", _evaluate_convert, _survey_convert),
    "dynamic_slice": Operation("structural", _evaluate_dynamic_slice, _survey_dynamic_slice),
    "concatenate": Operation("structural", _evaluate_concatenate, _survey_concatenate),
    "stack": Operation("structural", _evaluate_stack, _survey_stack),
    "pad": Operation("structural", _evaluate_pad, _survey_pad),
    "copy": Operation("structural", _evaluate_on_base, _survey_identity),
    "name": Operation("structural", _evaluate_on_base, _survey_identity),
    "pvary": Operation("structural", _evaluate_on_base, _survey_identity),
    "reduced_vary_cast": Operation("structural", _evaluate_on_base, _survey_identity),
    "sharding_constraint": Operation("structural", _evaluate_sharding_constraint, _survey_identity),
    "layout_constraint": Operation("structural", _evaluate_constraint, _survey_identity),
    "device_put": Operation("structural", _evaluate_device_put, _survey_identity),
    "reshard": Operation("structural", _evaluate_reshard, _survey_identity),
    "stop_gradient": Operation("structural", _evaluate_stop_gradient, _survey_identity),
    "reduce_precision": Operation("structural", _evaluate_on_all, _survey_identity),
    "optimization_barrier": Operation("structural", _evaluate_barrier, _survey_identity),
    "neg": Operation("structural", _evaluate_negate, _survey_identity),
}

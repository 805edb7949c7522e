"""Rules for elementwise operations, and the survey of primitives without a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from lowrank_jax._interpreter.interpret import Context
from lowrank_jax._interpreter.operation import Operation, get_kind
from lowrank_jax._interpreter.structural import wrap_result
from lowrank_jax._interpreter.survey import Survey, Value, clear_if_index, merge_values
from lowrank_jax._jax import equations, jaxprs
from lowrank_jax._jax.types import Equation
from lowrank_jax._operators.weight import Weight

Out = Sequence[Any] | None


def _evaluate_scaled(operation: Callable) -> Callable:
    """Make the rule for lax.mul or lax.div of a weight by a scalar, or by numbers along axes."""

    def evaluate(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
        weight, other = values if isinstance(values[0], Weight) else values[::-1]
        if isinstance(other, Weight) or tuple(weight.shape) != equations.get_result_shape(eqn):
            return None
        if operation is lax.div and not isinstance(values[0], Weight):
            return None
        # W [16, 32] times s [1, 1] scales the arrays inside; times s [1, 32] it scales base and b
        # along axis 1, the one that s has; times a mask [16, 32] it is no longer low-rank.
        axes = [axis for axis, size in enumerate(other.shape) if size != 1]
        if not axes:
            apply = lambda array, scalar: operation(array, lax.broadcast(scalar, array.shape))
            scaled = weight.multiply(other.reshape(()), apply)
            if scaled is not None:
                return [scaled]
        elif len(axes) == weight.ndim:
            return None  # a number for each entry, such as a mask
        numbers = other.reshape([other.shape[axis] for axis in axes])
        return wrap_result(weight.scale_axes(numbers, axes, operation))

    return evaluate


def _survey_scaled(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Follow a view through a product with, or division by, numbers along some of its axes."""
    shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in eqn.invars]
    out_shape = equations.get_result_shape(eqn)
    at = int(math.prod(shapes[0]) < math.prod(shapes[1]) and eqn.primitive.name == "mul")
    weight, other = ins[at], ins[1 - at]
    axes = [axis for axis, size in enumerate(shapes[1 - at]) if size != 1]
    mask = axes and len(axes) == len(out_shape)
    if mask or not weight.views or math.prod(shapes[at]) != math.prod(out_shape):
        return survey_other(survey, eqn, ins)
    survey.note_read(eqn, other.views)
    scale_axes = lambda view: view.scale_axes(out_shape, axes) if axes else view.reshape(out_shape)
    out = weight.map(scale_axes, other)
    return [out.replace(near=weight.near | other.near)]


def survey_any(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey a primitive without a rule; a jaxpr in it is surveyed as a function of plain arrays.

    A custom_vjp_call, for example.
    """
    for body in equations.find_bodies(eqn):
        taken = [survey.mark_computed(eqn, value) for value in ins]
        with survey.enter(eqn):
            return survey.run(body, taken)
    return survey_other(survey, eqn, ins)


def survey_other(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey an elementwise or opaque equation."""
    activations = [value for value in ins if value.is_activation_like]
    for value in ins:
        survey.note_read(eqn, value.views, by_rows=bool(activations))
    fed = activations or [value for value in ins if value.data and value.has_no_leaves]
    if fed and _is_opaque(survey, eqn, ins):
        reached = survey.find_computed(eqn, ins)
        survey.note_unfollowed(reached)
        if reached:
            key = survey.note_product(eqn, [path for path, _ in reached], merge_values(ins))
            activations, ins = fed, [*ins, Value(near=frozenset({key}))]
    sources = [value for value in ins if value.output] or ins
    out = merge_values(ins).replace(
        computed=() if activations else survey.find_computed(eqn, sources),
        activation=bool(activations),
        direct=_find_direct(survey, eqn, ins),
    )
    return [clear_if_index(eqn, out, place) for place in range(len(eqn.outvars))]


def _find_direct(survey: Survey, eqn: Equation, ins: list[Value]) -> frozenset[Any]:
    """Return the products that reach the result directly, through this equation too."""
    # In logits = 30 * tanh((h @ w + b) / 30) each step keeps h @ w direct; softmax or relu ends it,
    # and so does the sum of two activations, as in a residual stream.
    kind = get_kind(survey.operations, eqn)
    if kind == "select":
        return merge_values(ins).direct
    activations = [value for value in ins if value.is_activation_like]
    zero = lambda atom: isinstance(atom, jaxprs.Literal) and np.all(np.asarray(atom.val) == 0)
    if eqn.primitive.name in ("max", "min") and any(map(zero, eqn.invars)):
        return frozenset()  # relu
    if kind == "unary" or (kind == "arithmetic" and len(activations) == 1):
        return merge_values(activations).direct
    return frozenset()


def _is_opaque(survey: Survey, eqn: Equation, ins: list[Value]) -> bool:
    """Whether a primitive may do anything with its operands, including products."""
    kind = get_kind(survey.operations, eqn)
    if kind == "opaque":
        return True
    if kind in ("select", "arithmetic") or eqn.primitive.name.startswith(
        ("scatter", "reduce", "select")
    ):
        return False
    # An unknown primitive is opaque if an operand made of parameters has another shape than the
    # result: elementwise operations keep the shape.
    shapes = [
        equations.get_shape(atom)
        for atom, value in zip(eqn.invars, ins, strict=True)
        if value.views or value.computed
    ]
    whole = equations.get_result_shape(eqn) if eqn.outvars else None
    return whole is not None and any(shape != whole for shape in shapes if shape)


def _survey_top_k(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey a top_k; the products that it selects from are those of routers."""
    survey.routers |= ins[0].near
    return survey_other(survey, eqn, ins)


def _survey_collective(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey a collective, which combines each operand with those of other devices."""
    return [survey.mark_computed(eqn, value) for value in ins]


_ARITHMETIC = ("add", "sub", "max", "min", "add_any", "clamp", "scatter-add")
_SELECTIONS = ("select_n", "dynamic_update_slice", "scatter", "sort")
_OPAQUE = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "triangular_solve")
_COLLECTIVES = (
    *("psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_to_all", "reduce_scatter"),
    *("all_gather", "all_gather_invariant"),
)

ELEMENTWISE: dict[str, Operation] = {
    "mul": Operation("arithmetic", _evaluate_scaled(lax.mul), _survey_scaled),
    "div": Operation("arithmetic", _evaluate_scaled(lax.div), _survey_scaled),
    "tanh": Operation("unary"),
    **dict.fromkeys(_ARITHMETIC, Operation("arithmetic")),
    **dict.fromkeys(_SELECTIONS, Operation("select")),
    **dict.fromkeys(("top_k", "approx_top_k"), Operation("select", survey=_survey_top_k)),
    **dict.fromkeys(_OPAQUE, Operation("opaque")),
    **dict.fromkeys(_COLLECTIVES, Operation("other", survey=_survey_collective)),
}

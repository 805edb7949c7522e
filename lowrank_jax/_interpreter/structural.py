"""The rules of a dry run for structural operations: each view is rearranged, the rest stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from lowrank_jax._interpreter.survey import Rule, Survey, Value, as_number, merge, shape_of
from lowrank_jax._interpreter.views import View

Out = Sequence[Value]


def _structural(arrange: Callable[[Any, View], View | None]) -> Rule:
    """Of one array; further operands are indices."""
    return lambda survey, eqn, ins: [ins[0].map(lambda view: arrange(eqn, view), *ins[1:])]


def _identity(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """Each result is an operand."""
    return ins


def _convert(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """Only casts among floating dtypes leave a weight a weight."""
    if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return ins
    return [as_number(eqn, survey.compute(eqn, ins[0]))]


def _slice(eqn: Any, view: View) -> View | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for axis, cut in enumerate(zip(starts, limits, strides, strict=True)):
        if cut == (0, view.shape[axis], 1):
            continue
        if (part := view.slice(axis, *cut)) is None:
            return None
        view = part
    return view


def _dynamic_slice(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    data = any(start.data for start in ins[1:])

    def cut(view: View) -> View:
        for axis, size in enumerate(eqn.params["slice_sizes"]):
            if size != view.shape[axis]:
                view = view.dynamic_slice(axis, size, data)
        return view

    return [ins[0].map(cut, *ins[1:])]


def _split(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    axis, outs, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        cut = lambda view, start=start, size=size: view.slice(axis, start, start + size)
        outs.append(ins[0].map(cut))
        start += size
    return outs


def _unstack(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    axis = eqn.params["axis"]

    def take(view: View, place: int) -> View | None:
        one = view.slice(axis, place, place + 1)
        return None if one is None else one.reshape(view.shape[:axis] + view.shape[axis + 1 :])

    return [
        ins[0].map(lambda view, place=place: take(view, place)) for place in range(len(eqn.outvars))
    ]


def _joined(survey: Survey, eqn: Any, ins: list[Value], parts: list[Value]) -> Out:
    """Parts beside each other: each leaf is followed; an activation among them makes one of all."""
    if any(value.moves for value in ins):
        return [_mix(survey, eqn, ins)]
    views = tuple(view for value in parts for view in value.views)
    return [merge(ins).replace(views=views, computed=survey.computed(eqn, ins, views=False))]


def _mix(survey: Survey, eqn: Any, ins: list[Value]) -> Value:
    """Elements of several operands, one of which at least is an activation."""
    for value in ins:
        survey.take(eqn, value.views)
    return merge(ins).replace(activation=True)


def _concatenate(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    axis, offset, parts = eqn.params["dimension"], 0, []
    for value, atom in zip(ins, eqn.invars, strict=True):
        place = lambda view, offset=offset: view.join(axis, shape_of(eqn), offset)
        parts.append(value.map(place))
        offset += atom.aval.shape[axis]
    return _joined(survey, eqn, ins, parts)


def _stack(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """jnp.stack from JAX 0.12 on."""
    axis, shape = eqn.params["axis"], shape_of(eqn)
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    kept = [i for i in range(len(shape)) if i != axis]
    parts = [
        value.map(lambda view, at=at: view.broadcast(one, kept).join(axis, shape, at))
        for at, value in enumerate(ins)
    ]
    return _joined(survey, eqn, ins, parts)


def _pad(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    parts = [ins[0].map(lambda view: view.pad(eqn.params["padding_config"])), Value()]
    survey.take(eqn, ins[1].views)
    return _joined(survey, eqn, [ins[0], ins[1].replace(views=())], parts)


def _gather(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """Rows of a table, one index of a stack, or many of them."""
    table, indices = ins
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    many = len(eqn.invars[1].aval.shape) > 1
    take = lambda view: view.gather(numbers, sizes, shape_of(eqn), indices.data, many)
    out = table.map(take, indices)
    # the rows of a matrix are vectors: no product can take them as a weight
    rows = [view for view in out.views if view.looked_up and view.has_vectors()]
    if rows:
        survey.take(eqn, rows)
        rest = tuple(view for view in out.views if view not in rows)
        out = out.replace(views=rest, activation=out.activation or indices.data)
    return [out]


_shaped = _structural(lambda eqn, view: view.reshape(shape_of(eqn)))
_IDENTITIES = (
    *("copy", "name", "device_put", "sharding_constraint", "layout_constraint", "reshard"),
    *("pvary", "reduced_vary_cast", "stop_gradient", "reduce_precision", "optimization_barrier"),
)


STRUCTURAL: dict[str, Rule] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    "convert_element_type": _convert,
    "transpose": _structural(lambda eqn, view: view.transpose(eqn.params["permutation"])),
    "reshape": _shaped,
    "squeeze": _shaped,
    "expand_dims": _shaped,
    "broadcast_in_dim": _structural(
        lambda eqn, view: view.broadcast(shape_of(eqn), eqn.params["broadcast_dimensions"])
    ),
    "slice": _structural(_slice),
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "stack": _stack,
    "concatenate": _concatenate,
    "pad": _pad,
    "rev": _structural(lambda eqn, view: view.reverse(eqn.params["dimensions"])),
    "neg": _structural(lambda eqn, view: view),
    "gather": _gather,
}

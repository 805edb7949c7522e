"""The rules of a dry run: for each primitive, what its results hold and depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_jax import _jaxprs
from lowrank_jax._interpreter.interpret import forwarded
from lowrank_jax._interpreter.structural import STRUCTURAL
from lowrank_jax._interpreter.survey import Rule, Survey, Value, as_number, merge, shape_of

Out = Sequence[Value]


# What is computed.

_UNARY = {"neg", "tanh", "convert_element_type", "reduce_precision"}
_SHIFTS = {"add", "sub", "mul", "div", "max", "min", "add_any", "clamp", "scatter-add"}
_MIXES = {"select_n", "dynamic_update_slice", "scatter", "sort", "top_k", "approx_top_k"}
_OPAQUE = {"pallas_call", "pure_callback", "io_callback", "ffi_call", "triangular_solve"}


def _other(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """Any other equation: parameters meet in it element by element, or whole."""
    name = eqn.primitive.name
    moving = [value for value in ins if value.moves]
    for value in ins:
        survey.take(eqn, value.views, by_rows=bool(moving))
    fed = moving or [value for value in ins if value.data and value.empty]
    if fed and _is_opaque(eqn, ins):
        reached = survey.computed(eqn, ins)
        survey.pass_over(reached)
        if reached:
            key = survey.register(eqn, [path for path, _ in reached], merge(ins))
            moving, ins = fed, [*ins, Value(products=frozenset({key}), near=frozenset({key}))]
    sources = [value for value in ins if value.output] or ins
    out = merge(ins).replace(
        computed=() if moving else survey.computed(eqn, sources),
        activation=bool(moving),
        direct=_direct(eqn, name, ins),
    )
    return [as_number(eqn, out, place) for place in range(len(eqn.outvars))]


def _top_k(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """A choice of the largest: what it is made from are the products of routers."""
    survey.routers |= ins[0].near
    return _other(survey, eqn, ins)


def _direct(eqn: Any, name: str, ins: list[Value]) -> frozenset[Any]:
    """The products that still reach the result directly."""
    if name in _MIXES:
        return merge(ins).direct
    moving = [value for value in ins if value.moves]
    zero = lambda atom: isinstance(atom, _jaxprs.Literal) and np.all(np.asarray(atom.val) == 0)
    if name in ("max", "min") and any(map(zero, eqn.invars)):
        return frozenset()  # relu
    if name in _UNARY or (name in _SHIFTS and len(moving) == 1):
        return merge(moving).direct
    return frozenset()


def _is_opaque(eqn: Any, ins: list[Value]) -> bool:
    """Whether a primitive may do anything with the parameters it takes, products too."""
    name = eqn.primitive.name
    if name in _OPAQUE:
        return True
    if name in _MIXES or name in _SHIFTS or name.startswith(("scatter", "reduce", "select")):
        return False
    shapes = [
        tuple(atom.aval.shape)
        for atom, value in zip(eqn.invars, ins, strict=True)
        if value.views or value.computed
    ]
    return any(shape != shape_of(eqn) for shape in shapes if shape) if eqn.outvars else False


def _collective(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """Each result is an operand and what other devices have of it."""
    return [survey.compute(eqn, value) for value in ins]


def _scaled(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """A weight times (or divided by) a number, or numbers along some axes, stays a weight."""
    shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in eqn.invars]
    out_shape = shape_of(eqn)
    at = int(math.prod(shapes[0]) < math.prod(shapes[1]) and eqn.primitive.name == "mul")
    weight, other = ins[at], ins[1 - at]
    axes = [axis for axis, size in enumerate(shapes[1 - at]) if size != 1]
    mask = axes and len(axes) == len(out_shape)
    if mask or not weight.views or math.prod(shapes[at]) != math.prod(out_shape):
        return _other(survey, eqn, ins)
    survey.take(eqn, other.views)
    stretch = lambda view: view.stretch(out_shape, axes) if axes else view.reshape(out_shape)
    out = weight.map(stretch, other)
    return [out.replace(products=weight.products | other.products, near=weight.near | other.near)]


# Products.


def _product(
    survey: Survey, eqn: Any, ins: Sequence[Value], roles: Sequence[Any], op: str = "dot"
) -> Out:
    """roles: for each operand (contracted, batch, free axes), or None if it is not a weight."""
    left, right = ins
    fed = max(left.rank, right.rank) > 0  # by data, not by parameters alone
    sizes = [math.prod(atom.aval.shape) for atom in eqn.invars]
    # of two parameters the smaller is as the input, if no product with data follows
    input_is = None if fed or right.empty or left.empty else sizes[0] > sizes[1]
    key, found = survey.key(eqn), []
    for at, (value, mine) in enumerate(zip(ins, roles, strict=True)):
        other = ins[1 - at]
        if value.rank > other.rank and not other.empty:
            survey.take(eqn, value.views)
            continue
        if mine is None:  # the input of a convolution, the rows of a ragged product
            value, mine = survey.compute(eqn, value), ((), (), ())
        value = survey.compute(eqn, value, lambda v, mine=mine: v.is_masked(mine[0], mine[2]))
        for view in value.views:
            known = view.product(op, *mine, provisional=not fed)
            survey.note(view.path, key, survey.describe(eqn), None if at == input_is else known)
        if fed:
            survey.pass_over(value.computed)
        found += [view.path for view in value.views] + [path for path, _ in value.computed]
    out = merge(ins).replace(activation=fed, direct=frozenset())
    if found and fed:
        own = frozenset({survey.register(eqn, found, out)})
        return [out.replace(products=out.products | own, direct=own, near=own, output=False)]
    if not fed:
        out = out.replace(computed=survey.computed(eqn, ins, views=False), output=bool(found))
    return [out]


def _dot_general(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    ndims = [len(atom.aval.shape) for atom in eqn.invars]
    free = lambda ndim, *used: [axis for axis in range(ndim) if axis not in {*used}]
    lf, rf = free(ndims[0], *lc, *lb), free(ndims[1], *rc, *rb)
    (out,) = _product(survey, eqn, ins, [(lc, lb, lf), (rc, rb, rf)])
    if out.activation:
        return [out]
    # of parameters alone: each is followed on, to a product with data
    shape = shape_of(eqn)
    left = ins[0].map(lambda v: v.contract(shape, [*lb, *lf, *(None for _ in rf)], lc))
    right = ins[1].map(lambda v: v.contract(shape, [*rb, *(None for _ in lf), *rf], rc))
    views = tuple(dict.fromkeys((*left.views, *right.views)))
    return [out.replace(views=views)]


def _ragged_dot(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    batch = (*batch, *numbers.rhs_group_dimensions)
    ndim = len(eqn.invars[1].aval.shape)
    free = [axis for axis in range(ndim) if axis not in (*contracted, *batch)]
    return _product(survey, eqn, ins[:2], [None, (contracted, batch, free)])


def _conv(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """The window and the input features are contracted."""
    out, *taps = eqn.params["dimension_numbers"].rhs_spec
    return _product(survey, eqn, ins, [None, (taps, (), (out,))], "conv")


# Control flow.


def _call(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    body = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    with survey.inside(eqn):
        return survey.run(body, ins)


def _shard_map(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """Inside, arrays are the parts on one device."""
    inner, _ = _jaxprs.opened(eqn.params["jaxpr"])
    placed = lambda values, atoms: [
        value.map(lambda view, atom=atom: view.place(atom.aval.shape))
        for value, atom in zip(values, atoms, strict=True)
    ]
    return placed(_call(survey, eqn, placed(ins, inner.invars)), eqn.outvars)


def _custom(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    """A function with a derivative of its own takes arrays; what it does with them is looked at."""
    for value in eqn.params.values():
        inner, _ = _jaxprs.opened(value)
        if hasattr(inner, "eqns") and _fits(inner, eqn):
            taken = [survey.compute(eqn, value) for value in ins]
            with survey.inside(eqn):
                return survey.run(value, taken)
    return _other(survey, eqn, ins)


def _fits(inner: Any, eqn: Any) -> bool:
    """Whether a jaxpr takes the operands of an equation and returns its results."""
    shapes = lambda atoms: [getattr(atom.aval, "shape", None) for atom in atoms]
    return all(
        shapes(inside) == shapes(outside)
        for inside, outside in ((inner.invars, eqn.invars), (inner.outvars, eqn.outvars))
    )


def _scan(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    consts, carries = _jaxprs.scan_split(eqn)
    body, first, key = eqn.params["jaxpr"], consts + carries, survey.key(eqn)
    fixed = ins[:consts]
    slices = [value.map(lambda view: view.step(key)) for value in ins[first:]]
    constant = [source == consts + i for i, source in enumerate(forwarded(body)[:carries])]
    with survey.inside(eqn):
        step = lambda carry: survey.run(body, [*fixed, *carry, *slices])
        carry, ys = survey.repeat(eqn, ins[consts:first], constant, step)
    length = eqn.params["length"]
    return [*carry, *(y.map(lambda view: view.collect(key, length)) for y in ys)]


def _while(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, body = ins[n_cond : n_cond + n_body], eqn.params["body_jaxpr"]
    constant = [source == n_body + i for i, source in enumerate(forwarded(body))]
    with survey.inside(eqn):
        step = lambda carry: survey.run(body, [*fixed, *carry])
        carry, _ = survey.repeat(eqn, ins[n_cond + n_body :], constant, step)
        survey.run(eqn.params["cond_jaxpr"], [*ins[:n_cond], *carry])
    return carry


def _cond(survey: Survey, eqn: Any, ins: list[Value]) -> Out:
    with survey.inside(eqn):
        branches = [survey.run(branch, ins[1:]) for branch in eqn.params["branches"]]
    outs = [survey.join(eqn, values) for values in zip(*branches, strict=True)]
    return [out.replace(data=out.data or ins[0].data) for out in outs]


_COLLECTIVES = (
    *("psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_to_all", "reduce_scatter"),
    *("all_gather", "all_gather_invariant"),
)
FLOW: dict[str, Rule] = {
    **STRUCTURAL,
    "": _custom,  # of any other name
    "mul": _scaled,
    "div": _scaled,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
FLOW |= dict.fromkeys(("jit", "closed_call", "core_call", "remat2", "checkpoint"), _call)
FLOW |= {"shard_map": _shard_map}
FLOW |= dict.fromkeys(("top_k", "approx_top_k"), _top_k)
FLOW |= dict.fromkeys(_COLLECTIVES, _collective)

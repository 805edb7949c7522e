"""plan: a dry run that learns how a function uses each of its parameters."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments, function_of_params
from lowrank_jax._interpreter.survey import Survey, Value, is_numeric_dtype, make_argument_value
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._interpreter.views import View
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import is_node
from lowrank_jax._targeting.plan import PRODUCTS, Plan, Use
from lowrank_jax._transforms.lift import is_array, split_arguments, trace


@check_arguments(fn=function_of_params)
def plan(fn: Callable, params: PyTree, *args: Any, **kwargs: Any) -> Plan:
    """Learn, without arithmetic, which equations of fn use each leaf of params, and by which axes.

    Args:
      fn: a pure function fn(params, *args, **kwargs).
      params: any pytree of arrays or jax.ShapeDtypeStruct.
      *args: other arguments of fn: arrays or jax.ShapeDtypeStruct, or anything static.
      **kwargs: likewise.

    Returns:
      A Plan: a mapping of the path of every array leaf of params to its Use.

    Raises:
      TreeError: two leaves share one path.

    Source: the targets of LoRA, arXiv 2106.09685 section 4.2, and of "LoRA Learns Less and Forgets
    Less", arXiv 2405.09673, appendix F ("all" linear layers), found by use and not by name.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: jnp.tanh(x @ p["w"] + p["bias"])
    >>> uses = plan(f, {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.ones((2, 4)))
    >>> uses["w"].op, uses["w"].fan_in, uses["w"].fan_out, uses["bias"].op
    ('dot', (0,), (1,), 'other')
    """
    leaves = [(path, leaf) for path, leaf in flatten(params, is_leaf=is_node)[0] if is_array(leaf)]
    call, dynamic, paths = split_arguments((params, *args), kwargs)
    traced = trace(fn, call, dynamic, paths)
    inner, _ = jaxprs.split_jaxpr(traced.jaxpr)
    given = [var.aval for var in inner.invars[len(leaves) :]]
    survey = Survey(OPERATIONS, constants_are_data=not any(aval.ndim for aval in given))
    values = [
        _make_value(path, var.aval) if i < len(leaves) else make_argument_value(var.aval)
        for i, (path, var) in enumerate(zip(paths, inner.invars, strict=True))
    ]
    outs = survey.run(traced.jaxpr, values)[: traced.out_tree.num_leaves]
    for i, value in enumerate(outs):
        for view in value.views:
            survey.note_use(
                view.path, (i,), "return at the results", view.find_read_roles(by_rows=True)
            )
    final = _find_final(survey, outs)
    uses = {path: _summarize_use(path, leaf, survey, final) for path, leaf in leaves}
    routers = {path for key in survey.routers for path in survey.leaves.get(key, ())}
    uses |= {path: dataclasses.replace(uses[path], router=True) for path in routers}
    for path, shared in _find_shared(survey, uses).items():
        uses[path] = dataclasses.replace(uses[path], shared=shared)
    results = [var.aval for var in inner.outvars[: len(outs)] if is_numeric_dtype(var.aval.dtype)]
    scalar = bool(results) and not any(aval.ndim for aval in results)
    return Plan(
        uses, _SCALAR_RESULT if scalar and not any(use.final for use in uses.values()) else ""
    )


_SCALAR_RESULT = (
    "the function returns a scalar, from which no final projection can be told: plan a function "
    "that returns the model's outputs, or exclude the final projection by name"
)


def _make_value(path: str, aval: Any) -> Value:
    """What a leaf holds: integers are as constants."""
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return Value()
    return Value((View.of(path, aval.shape),))


def _find_final(survey: Survey, outs: Sequence[Value]) -> dict[str, set[Any]]:
    """Leaves with a product that reaches a result directly and that no other leaf's depends on."""
    found: dict[str, set[Any]] = {}
    for key in frozenset().union(*(value.direct for value in outs)):
        after = [survey.leaves[k] for k, inputs in survey.inputs.items() if key in inputs]
        later = set().union(*after)
        for path in survey.leaves[key]:
            if not later - {path}:
                found.setdefault(path, set()).add(key)
    return found


def _find_shared(survey: Survey, uses: Mapping[str, Use]) -> dict[str, tuple[tuple[int, str], ...]]:
    """For each leaf, fan-out axes that are stack axes of a weight that multiplies its product."""
    found: dict[str, dict[int, str]] = {}
    for key, before in survey.before.items():
        for other in survey.leaves[key]:
            for path in set().union(*(survey.leaves[k] for k in before)) - {other}:
                one, next_one = uses[path], uses[other]
                sizes = Counter(next_one.shape[axis] for axis in next_one.stack)
                sizes -= Counter(one.shape[axis] for axis in one.stack)  # both are in a loop
                many = one.op in PRODUCTS and len(one.fan_out) > 1
                axes = [a for a in one.fan_out if sizes[one.shape[a]] and one.shape[a] > 1]
                if many and len(axes) == 1:  # two of one size cannot be told apart
                    found.setdefault(path, {}).setdefault(axes[0], other)
    return {path: tuple(sorted(axes.items())) for path, axes in found.items()}


def _summarize_use(path: str, leaf: Any, survey: Survey, final: Mapping[str, set[Any]]) -> Use:
    """Fold the uses of one leaf: the first product with data decides the axes."""
    found, reason = survey.uses.get(path, {}), survey.unfollowed.get(path, "")
    known = [roles for several, _ in found.values() for roles in several]
    if any(roles.op in PRODUCTS and not roles.provisional for roles in known):
        known = [roles for roles in known if not roles.provisional]
    products = [roles for roles in known if roles.op in PRODUCTS]
    lookups = [roles for roles in known if roles.op == "lookup"]
    equations = tuple(text for _, text in found.values())
    shape, is_final = tuple(leaf.shape), path in final
    common = {"shape": shape, "dtype": leaf.dtype, "uses": len(found), "equations": equations}
    common |= {"reason": reason}
    if not products and not lookups:
        op = "other" if found else "unused"
        return Use(op, (), (), (), final=is_final, **common)
    first = (products or lookups)[0]
    ways = {(roles.op, roles.fan_in, roles.fan_out) for roles in known}
    # an axis that one use takes an index of and another keeps is no stack axis
    stack = first.stack - frozenset().union(*(r.fan_in | r.fan_out for r in known))
    axes = frozenset(range(len(shape)))
    fan_in, fan_out = first.fan_in, (first.fan_out | (first.stack - stack)) - first.fan_in
    stack |= axes - fan_in - fan_out  # axes of size 1 that were dropped
    order = lambda chosen: tuple(sorted(chosen))
    return Use(
        first.op,
        order(fan_in),
        order(fan_out),
        order(stack),
        tied=len(ways) > 1,
        final=is_final and not any(shape[axis] > 1 for axis in stack),
        lookup=bool(lookups),
        **common,
    )

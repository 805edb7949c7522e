"""plan: a dry run that finds how a function uses each of its parameters."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.functions import function_of_params
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
def plan(fn: Callable, params: PyTree, *args: PyTree, **kwargs: PyTree) -> Plan:
    """Find, without computing, which equations of fn use each leaf of params, and on which axes.

    Args:
      fn: a pure function fn(params, *args, **kwargs).
      params: any pytree of arrays or jax.ShapeDtypeStruct.
      *args: the other arguments of fn: arrays, jax.ShapeDtypeStruct or static values.
      **kwargs: the same, by keyword.

    Returns:
      A Plan: a mapping from the path of each array leaf of params to its Use.

    Raises:
      ConfigError: fn is not callable.
      TreeError: two leaves have the same path.

    Source: the targets of LoRA, arXiv 2106.09685 section 4.2, and of "LoRA Learns Less and Forgets
    Less", arXiv 2405.09673, appendix F ("all" linear layers), found by use rather than by name.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: jnp.tanh(x @ p["w"] + p["bias"])
    >>> uses = plan(f, {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.ones((2, 4)))
    >>> uses["w"].op, uses["w"].fan_in, uses["w"].fan_out, uses["bias"].op
    ('dot', (0,), (1,), 'other')
    """
    # Each leaf enters the jaxpr as a View of itself, each other argument as data. The survey
    # carries views through structural operations up to the equations that consume them. For a
    # loop over two stacked layers:
    #   w             [2, 4, 8]   axes 0, 1, 2 of w
    #   w[0]             [4, 8]   axes 1, 2; axis 0 is selected
    #   x @ w[0]         [3, 8]   x [3, 4] contracts axis 1: fan_in (1,), fan_out (2,), stack (0,)
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
    "the function returns a scalar, so the final projection cannot be found: plan a function that "
    "returns the model's outputs, or exclude the final projection by name"
)


def _make_value(path: str, aval: jax.ShapeDtypeStruct) -> Value:
    """Make the value of a leaf: a view of it, or a constant if it holds integers."""
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return Value()
    return Value((View.of(path, aval.shape),))


def _find_final(survey: Survey, outs: Sequence[Value]) -> dict[str, set[Any]]:
    """Find leaves with a product that reaches a result directly, with no other leaf's after it.

    Returns:
      path -> its final products.
    """
    # tanh(x @ a) @ b + c: the product with b reaches the result directly, for adding c does not
    # count, and no other product takes it as an input. The product with a reaches the result
    # through tanh alone, and b's takes it. Only b is final. A leaf may follow itself, as the cell
    # of a recurrent network does.
    after: dict[Any, list[Any]] = {}  # product -> the products that come next
    for key, before in survey.before.items():
        for one in before:
            after.setdefault(one, []).append(key)
    found: dict[str, set[Any]] = {}
    for key in frozenset().union(*(value.direct for value in outs)):
        for path in survey.leaves[key]:
            if _is_last(key, path, after, survey.leaves):
                found.setdefault(path, set()).add(key)
    return found


def _is_last(
    key: Any, path: str, after: Mapping[Any, list[Any]], leaves: Mapping[Any, set[str]]
) -> bool:
    """Whether no product of another leaf comes after a product of this leaf."""
    seen, fresh = {key}, [key]
    while fresh:
        for one in after.get(fresh.pop(), ()):
            if leaves[one] - {path}:
                return False
            if one not in seen:
                seen.add(one)
                fresh.append(one)
    return True


def _find_shared(survey: Survey, uses: Mapping[str, Use]) -> dict[str, tuple[tuple[int, str], ...]]:
    """Find, for each leaf, fan-out axes that are stack axes of the next product's weight."""
    # Axes are matched by size. With x [3, 4]:
    #   y [3, 2, 8] = x @ a         a [4, 2, 8], fan_out (1, 2)
    #   einsum("bhd,hdo->bho", y, w)   w [2, 8, 5], stack (0,): one weight for each h
    # Axis 1 of a, of size 2, enumerates the stack of w: shared is ((1, "w"),) for a. Sizes of
    # stack axes that both have are left out, since those come from one loop over layers.
    split = {path for path, use in uses.items() if use.op in PRODUCTS and len(use.fan_out) > 1}
    ends = {key for key, paths in survey.leaves.items() if paths & split}
    found: dict[str, dict[int, str]] = {}
    for key, before in survey.before.items():
        for other in sorted(survey.leaves[key]):
            next_one = uses[other]
            if not next_one.stack:
                continue
            paths = set().union(*(survey.leaves[k] for k in before & ends)) & split - {other}
            for path in paths:
                one = uses[path]
                sizes = Counter(next_one.shape[axis] for axis in next_one.stack)
                sizes -= Counter(one.shape[axis] for axis in one.stack)
                axes = [a for a in one.fan_out if sizes[one.shape[a]] and one.shape[a] > 1]
                if len(axes) == 1:  # several axes of one size are ambiguous
                    found.setdefault(path, {}).setdefault(axes[0], other)
    return {path: tuple(sorted(axes.items())) for path, axes in found.items()}


def _summarize_use(
    path: str, leaf: jax.Array, survey: Survey, final: Mapping[str, set[Any]]
) -> Use:
    """Combine the uses of one leaf; the first product with data decides the roles of the axes."""
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
    # An axis that one use indexes and another keeps or contracts is not a stack axis. With
    # w [2, 4, 8]: x @ w[0] has stack {0}, einsum("bi,nio->bno", x, w) keeps axis 0, so the leaf
    # has fan_in (1,), fan_out (0, 2) and no stack.
    stack = first.stack - frozenset().union(*(r.fan_in | r.fan_out for r in known))
    axes = frozenset(range(len(shape)))
    fan_in, fan_out = first.fan_in, (first.fan_out | (first.stack - stack)) - first.fan_in
    stack |= axes - fan_in - fan_out  # axes of size 1 that a reshape dropped
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

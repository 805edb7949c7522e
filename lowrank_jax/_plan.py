"""plan: a dry run that learns how a function uses each of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import _jaxprs
from lowrank_jax._interpreter.interpret import Context, Record, interpret
from lowrank_jax._interpreter.probe import Log, Probe, Roles
from lowrank_jax._interpreter.rules import RULES
from lowrank_jax._lift import is_array, split, trace
from lowrank_jax._nodes import is_node, materialize
from lowrank_jax._paths import flatten
from lowrank_jax._table import Table, Tabled, collapsed, shape_text
from lowrank_jax._weights.virtual import Virtual

PRODUCTS = ("dot", "conv")
_COLUMNS = ("path", "shape", "op", "fan_in", "fan_out", "stack", "uses", "all-linear", "notes")


@dataclasses.dataclass(frozen=True)
class Use:
    """How a function uses one leaf.

    Args:
      op: "dot", "conv", "lookup", "other" or "unused": the first product, else the first use.
      fan_in, fan_out, stack: axes of the leaf that are contracted, kept, and that enumerate
        independent weights; empty where op is "other" or "unused".
      shape, dtype: of the leaf.
      uses: number of equations that take it.
      tied: it is used in two ways: two products over different axes, or a product and a look-up.
      final: an unstacked weight whose product reaches a result only through bias, scale, cast or
        soft-cap.
      lookup: it is read by rows somewhere.
      equations: one line for each use: the primitive and the user's source line.
    """

    op: str
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    uses: int
    tied: bool = False
    final: bool = False
    lookup: bool = False
    equations: tuple[str, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether "all-linear" takes it: products only, never read by rows, not the last."""
        return self.op in PRODUCTS and bool(self.fan_out) and not self.lookup and not self.final


class Plan(Tabled):
    """A mapping of path -> Use; `str`, rich and notebooks show it as a table.

    Leaves that differ only in the number of their layer share a row, `layers_{0..29}/w`. Under
    "all-linear" is "yes" where that word in `LoraConfig.targets` adapts the leaf.
    """

    def _table(self) -> Table:
        """One row for each leaf, or for leaves that differ only in the number of a layer."""
        rows = []
        for path, use in self.items():
            notes = [n for n in ("tied", "final", "lookup") if getattr(use, n) and n != use.op]
            sizes = [
                "·".join(str(use.shape[axis]) for axis in axes) or "-"
                for axes in (use.fan_in, use.fan_out, use.stack)
            ]
            linear = "yes" if use.linear else ""
            shape, notes = shape_text(use.shape), ", ".join(notes)
            rows.append((path, shape, use.op, *sizes, str(use.uses), linear, notes))
        return Table(_COLUMNS, tuple(row for row, _ in collapsed(rows)), frozenset({"uses"}))


@dataclasses.dataclass
class _Survey(Context):
    """A context that keeps, for each path and equation, the roles of the leaf's axes."""

    found: dict[Any, dict[Any, tuple[Roles | None, Record]]] = dataclasses.field(
        default_factory=dict
    )

    def record(self, weight: Virtual, eqn: Any, how: str, reason: str = "") -> None:
        super().record(weight, eqn, how, reason)
        assert isinstance(weight, Probe)
        roles = weight.log.take()
        self.found.setdefault(weight.path, {})[*map(id, self.frame), id(eqn)] = (
            roles,
            self.records[-1],
        )

    def dense(self, value: Any, eqn: Any, reason: str) -> Any:
        if isinstance(value, Virtual):
            out = value.materialize()
            self.record(value, eqn, "materialized", reason)
            return out
        return value


def plan(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Plan:
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
    call, dynamic, paths = split((params, *args), kwargs)
    traced = trace(fn, call, dynamic, paths)
    jaxpr = traced.jaxpr
    survey = _Survey(RULES, inline_jit=True)

    def run(*values: Any) -> list[Any]:
        log = Log()
        count = len(leaves)
        entered = [
            Probe.of(materialize(v), path, log) if i < count and _floating(v) else v
            for i, (v, path) in enumerate(zip(values, paths, strict=True))
        ]
        outs = interpret(survey, jaxpr, entered)[: traced.out_tree.num_leaves]
        return [survey.returned(v) if isinstance(v, Virtual) else v for v in outs]

    jax.eval_shape(run, *dynamic)
    final = _final_products(jaxpr, len(leaves), traced.out_tree.num_leaves)
    uses = {path: _use(leaf, survey.found.get(path, {}), final) for path, leaf in leaves}
    return Plan(uses)


def _floating(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _use(leaf: Any, found: Mapping[Any, tuple[Roles | None, Record]], final: set[Any]) -> Use:
    """Fold the meetings of one leaf into a Use: the first product decides the axes."""
    shape, dtype = tuple(leaf.shape), leaf.dtype
    equations = tuple(f"{r.primitive} at {r.source}" for _, r in found.values())
    known = [roles for roles, _ in found.values() if roles is not None]
    products = [roles for roles in known if roles.op in PRODUCTS]
    lookups = [roles for roles in known if roles.op == "lookup"]
    if not products and not lookups:
        return Use(
            "other" if found else "unused",
            (),
            (),
            (),
            shape,
            dtype,
            len(found),
            equations=equations,
        )
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
        shape,
        dtype,
        len(found),
        tied=len(ways) > 1,
        final=not any(shape[axis] > 1 for axis in stack) and any(key in final for key in found),
        lookup=bool(lookups),
        equations=equations,
    )


# The final projection: walk back from the results through what only shapes or shifts them.

_UNARY = {
    "convert_element_type",
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "squeeze",
    "tanh",
    "neg",
    "copy",
    "name",
    "sharding_constraint",
    "optimization_barrier",
    "reduce_precision",
}
_BINARY = {"add", "sub", "mul", "div", "max", "min", "add_any"}
_PRODUCT = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
_NESTED = {"jit", "remat2", "checkpoint", "closed_call", "core_call"}


def _final_products(jaxpr: Any, n_params: int, n_results: int) -> set[Any]:
    """Frames of the products that reach a result through bias, scale, cast or soft-cap alone."""
    inner, _ = _jaxprs.opened(jaxpr)
    data = {index for index in range(len(inner.invars)) if index >= n_params}
    found: set[Any] = set()
    _walk(jaxpr, data, range(n_results), (), found)
    return found


def _walk(
    jaxpr: Any, data: set[int], wanted: Any, frame: tuple[Any, ...], found: set[Any]
) -> set[int]:
    """Collect final products behind the wanted results; return inputs reached the same way."""
    inner, _ = _jaxprs.opened(jaxpr)
    tainted = {var for index, var in enumerate(inner.invars) if index in data}
    is_data = lambda atom: not isinstance(atom, _jaxprs.Literal) and atom in tainted
    for eqn in inner.eqns:
        if any(is_data(atom) for atom in eqn.invars):
            tainted.update(eqn.outvars)
    outvars = [inner.outvars[index] for index in wanted]
    live = {atom for atom in outvars if not isinstance(atom, _jaxprs.Literal)}
    for eqn in reversed(inner.eqns):
        reached = [i for i, var in enumerate(eqn.outvars) if var in live]
        if not reached:
            continue
        name = eqn.primitive.name
        moving = [atom for atom in eqn.invars if is_data(atom)]
        if name in _PRODUCT:
            found.add((*frame, id(eqn)))
        elif name in _UNARY or (name in _BINARY and len(moving) == 1):
            live.update(moving)
        elif name in _NESTED:
            body = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            inside = {i for i, atom in enumerate(eqn.invars) if is_data(atom)}
            through = _walk(body, inside, reached, (*frame, id(eqn)), found)
            live.update(eqn.invars[i] for i in through if is_data(eqn.invars[i]))
    return {i for i, var in enumerate(inner.invars) if var in live and i in data}

"""Survey rules for equations that hold jaxprs, and the operands that their results forward."""

from __future__ import annotations

from typing import Any

import jax

from lowrank_jax._interpreter import control
from lowrank_jax._interpreter.operation import (
    Operation,
    OperationTable,
    Source,
    find_forwarded,
    find_sources,
)
from lowrank_jax._interpreter.survey import Survey, Value
from lowrank_jax._jax import equations, jaxprs
from lowrank_jax._jax.equations import Scan, ShardMap, While
from lowrank_jax._jax.types import Equation

# Calls


def _survey_call(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey the body of a call."""
    with survey.enter(eqn):
        return survey.run(equations.get_body(eqn), ins)


def _find_call_sources(table: OperationTable, eqn: Equation) -> list[Source | None]:
    """Return the sources of the body."""
    return find_sources(table, equations.get_body(eqn))


def _survey_shard_map(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey the body of a shard_map, in which arrays have the shapes of one device's shards."""
    inner, _ = jaxprs.split_jaxpr(ShardMap.of(eqn).jaxpr)
    placed = lambda values, atoms: [
        value.map(lambda view, atom=atom: view.resize(equations.get_shape(atom)))
        for value, atom in zip(values, atoms, strict=True)
    ]
    return placed(_survey_call(survey, eqn, placed(ins, inner.invars)), eqn.outvars)


def _find_shard_map_sources(table: OperationTable, eqn: Equation) -> list[Source | None]:
    """Return the sources of the body whose results have the specs of their operands."""
    mapping, found = ShardMap.of(eqn), []
    for source, spec in zip(find_sources(table, mapping.jaxpr), mapping.out_specs, strict=True):
        if source is not None:
            number, order = source
            # x [8, 16] with P("data", None) returned as x.T [16, 8] has order (1, 0): it is x.T of
            # the whole only if its out_spec is P(None, "data").
            entries = dict(enumerate(mapping.in_specs[number]))
            if [entries.get(axis) for axis in order] != _list_spec_entries(spec, len(order)):
                source = None
        found.append(source)
    return found


def _list_spec_entries(spec: jax.sharding.PartitionSpec, ndim: int) -> list[Any]:
    """Return the entries of a PartitionSpec, one for each of `ndim` axes."""
    return [*spec, *(None for _ in range(ndim - len(spec)))]


# Loops and branches


def _survey_scan(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey a scan: slices of stacked leaves inside, stacks again outside."""
    # A view of a stack [L, 4096, 1024] enters the body as [4096, 1024], with axis 0 of the leaf
    # marked as selected: a product then reports it as a stack axis. A slice that the body returns
    # is stacked again by the same key, so that NNX's returned parameters are views of the leaf.
    # The carry is iterated to a fixed point: a value may depend on a product only from the second
    # step on.
    loop, key = Scan.of(eqn), survey.make_key(eqn)
    fixed = ins[: loop.consts]
    slices = [value.map(lambda view: view.slice_scan(key)) for value in ins[loop.first_slice :]]
    through = find_forwarded(survey.operations, loop.jaxpr)[: loop.carries]
    constant = [source == loop.consts + i for i, source in enumerate(through)]
    with survey.enter(eqn):
        step = lambda carry: survey.run(loop.jaxpr, [*fixed, *carry, *slices])
        carry, ys = survey.find_fixed_point(
            eqn, ins[loop.consts : loop.first_slice], constant, step
        )
    return [*carry, *(y.map(lambda view: view.stack_scan(key, loop.length)) for y in ys)]


def _find_scan_sources(table: OperationTable, eqn: Equation) -> list[Source | None]:
    """Return for each result of a scan the operand that it is a transposition of, or None."""
    # A carry forwards its own initial value, or a constant that every step writes to it. A stacked
    # result forwards a scanned operand if each slice does: slice [3, 8] with order (1, 0) of a
    # stack [L, 3, 8] makes the stack [L, 8, 3] with order (0, 2, 1).
    loop = Scan.of(eqn)
    inner = find_sources(table, loop.jaxpr)
    some = loop.length > 0  # else no step writes to the carry
    carried: list[Source | None] = []
    unmoved = find_forwarded(table, loop.jaxpr)[: loop.carries]
    for i, (index, var) in enumerate(zip(unmoved, eqn.outvars, strict=False)):
        source = None
        if index is not None and ((some and index < loop.consts) or index == loop.consts + i):
            source = index, tuple(range(len(equations.get_shape(var))))
        carried.append(source)
    slices: list[Source | None] = []
    for found in inner[loop.carries :]:
        source = None
        if found is not None and found[0] >= loop.first_slice:
            source = found[0], (0, *(axis + 1 for axis in found[1]))
        slices.append(source)
    return carried + slices


def _survey_while(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey a while loop: its body to a fixed point, then its condition."""
    loop = While.of(eqn)
    fixed = ins[loop.cond_consts : loop.first_carry]
    through = find_forwarded(survey.operations, loop.body)
    constant = [source == loop.body_consts + i for i, source in enumerate(through)]
    with survey.enter(eqn):
        step = lambda carry: survey.run(loop.body, [*fixed, *carry])
        carry, _ = survey.find_fixed_point(eqn, ins[loop.first_carry :], constant, step)
        survey.run(loop.cond, [*ins[: loop.cond_consts], *carry])
    return carry


def _survey_cond(survey: Survey, eqn: Equation, ins: list[Value]) -> list[Value]:
    """Survey each branch; a result that data selects depends on data."""
    with survey.enter(eqn):
        branches = [survey.run(branch, ins[1:]) for branch in equations.get_branches(eqn)]
    outs = [survey.join(eqn, values) for values in zip(*branches, strict=True)]
    return [out.replace(data=out.data or ins[0].data) for out in outs]


_JIT = Operation("control", control.evaluate_jit, _survey_call, _find_call_sources)
_CALL = Operation("control", control.evaluate_call, _survey_call, _find_call_sources)
_REMAT = Operation("control", control.evaluate_remat, _survey_call, _find_call_sources)

CALLS: dict[str, Operation] = {
    "jit": _JIT,
    "closed_call": _CALL,
    "core_call": _CALL,
    "remat2": _REMAT,
    "checkpoint": _REMAT,
    "shard_map": Operation(
        "control", control.evaluate_shard_map, _survey_shard_map, _find_shard_map_sources
    ),
    "scan": Operation("control", control.evaluate_scan, _survey_scan, _find_scan_sources),
    "while": Operation("control", control.evaluate_while, _survey_while),
    "cond": Operation("control", control.evaluate_cond, _survey_cond),
}

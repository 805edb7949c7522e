"""Evaluation rules for control flow: rebuild each equation with weights as pytree operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
from jax import lax

from lowrank_jax._interpreter.interpret import Context, interpret
from lowrank_jax._interpreter.operation import find_forwarded, find_forwarded_operands
from lowrank_jax._interpreter.remat import QuantizedDotPolicy
from lowrank_jax._interpreter.shardings import can_split, constrain_weight
from lowrank_jax._jax import equations
from lowrank_jax._jax.equations import Jit, Scan, ShardMap, While
from lowrank_jax._jax.types import Equation, Jaxpr
from lowrank_jax._operators.weight import Weight, expand_path

Out = Sequence[Any] | None


def _is_weight(value: object) -> TypeGuard[Weight]:
    return isinstance(value, Weight)


def _reenter(ctx: Context, eqn: Equation, values: list[Any], call: Callable) -> list[Any]:
    """Return call(run, values), where run evaluates the body of an equation.

    A weight that the body forwards is not returned through the call.
    """
    body, through = equations.get_body(eqn), find_forwarded_operands(ctx.operations, eqn)
    kept = {i: values[j] for i, j in enumerate(through) if j is not None and _is_weight(values[j])}

    def run(operands: list[Any]) -> list[Any]:
        outs = interpret(ctx, body, operands)
        return [None if i in kept else out for i, out in enumerate(outs)]

    with ctx.enter(eqn):
        outs = call(run, values)
    return [kept.get(i, out) for i, out in enumerate(outs)]


def evaluate_call(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate the body of a call in place."""
    return _reenter(ctx, eqn, values, lambda run, operands: run(operands))


@dataclasses.dataclass(frozen=True)
class _PathSlot:
    """A placeholder for a weight's path in a memoized jit, so that equal layers share one trace."""

    number: int


@dataclasses.dataclass
class _JitEntry:
    """A memoized jit, and the context that its trace records into, by slot."""

    ctx: Context
    call: Callable | None = None


def evaluate_jit(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate a jit by one jax.jit for each (jaxpr, structure of its weights).

    Equal layers are traced and compiled once.
    """
    if ctx.inline_jit:
        return evaluate_call(ctx, eqn, values)
    # Paths are static data of a weight's pytree, so layers that differ in nothing else would each
    # compile. With slots, the operands of block(w of "layer_0") and block(w of "layer_1"), calls of
    # one jaxpr, both have the path _PathSlot(0), and the second call finds the trace of the first.
    # The records of the trace name slots; they are copied with the paths of each call.
    slots: dict[Any, _PathSlot] = {}  # path -> slot

    def enter(leaf: Weight) -> Weight:
        slot = slots.setdefault(leaf.path, _PathSlot(len(slots)))
        numbered: Any = ctx.number_use(leaf)
        return dataclasses.replace(numbered, path=slot)

    operands = [v.map_leaves(enter) if _is_weight(v) else v for v in values]
    paths = {slot: path for path, slot in slots.items()}
    ctx.count_uses(slots)
    structure = tuple(jax.tree.structure(v) if _is_weight(v) else None for v in operands)
    key = (id(Jit.of(eqn).jaxpr), structure)
    if key not in ctx.memo:
        ctx.memo[key] = _JitEntry(Context(ctx.operations, ctx.refuse, memo=ctx.memo))
    entry = ctx.memo[key]
    entry.ctx.slot_paths = {slot: ctx.resolve_path(path) for slot, path in paths.items()}
    entry.ctx.frame = ctx.frame

    def call(run: Callable, operands: list[Any]) -> list[Any]:
        if entry.call is None:
            entry.call = _jit_with_name(run, eqn)
        return _place_results(entry.call(operands), eqn)

    outs = _reenter(entry.ctx, eqn, operands, call)
    ctx.records += [
        dataclasses.replace(record, path=path)
        for record in entry.ctx.records
        for path in expand_path(paths[record.path])
    ]
    leave = lambda leaf: dataclasses.replace(leaf, path=paths[leaf.path])
    return [out.map_leaves(leave) if _is_weight(out) else out for out in outs]


def _jit_with_name(run: Callable, eqn: Equation) -> Callable:
    """Return jax.jit(run) with the name of the user's function."""

    def named(operands: list[Any]) -> list[Any]:
        return run(operands)

    named.__name__ = named.__qualname__ = Jit.of(eqn).name
    return jax.jit(named)


def _place_results(outs: list[Any], eqn: Equation) -> list[Any]:
    """Apply the out_shardings of a jit to its results."""
    shardings = Jit.of(eqn).out_shardings
    outs = [
        constrain_weight(o, s) if _is_weight(o) else o for o, s in zip(outs, shardings, strict=True)
    ]
    plain = lambda i: shardings[i] is not None and hasattr(outs[i], "dtype")
    arrays = [i for i in range(len(outs)) if plain(i) and not _is_weight(outs[i])]
    if not arrays:
        return outs
    place = jax.jit(lambda *arrays: arrays, out_shardings=tuple(shardings[i] for i in arrays))
    placed = dict(zip(arrays, place(*(outs[i] for i in arrays)), strict=True))
    return [placed.get(i, out) for i, out in enumerate(outs)]


def evaluate_remat(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate the body of a jax.checkpoint inside a jax.checkpoint."""
    options = equations.get_remat_options(eqn)
    if options["policy"] is not None:
        options["policy"] = QuantizedDotPolicy(options["policy"])
    return _reenter(ctx, eqn, values, lambda run, v: jax.checkpoint(run, **options)(v))


def evaluate_shard_map(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate a shard_map whose weights enter as trees of sharded arrays."""
    # The spec of a weight gives one for each of its arrays: W [4096, 1024] with P("data", "model")
    # and rank 8 has base P("data", "model"), a [4096, 8] P("data", None), b [8, 1024]
    # P(None, "model"). The product of local factors is then the local part of the product.
    mapping = ShardMap.of(eqn)
    specs, parts = [], []
    for value, spec in zip(values, mapping.in_specs, strict=True):
        if _is_weight(value):
            whole = value.prepare_split(spec)
            found = whole.specs(spec)
            if found is None or not can_split(mapping.mesh, whole, found):
                value = ctx.materialize(value, eqn, "it cannot be sharded by this spec")
            else:
                value, spec = whole, found
        specs.append(spec)
        parts.append(value)

    def call(run: Callable, operands: list[Any]) -> list[Any]:
        mapped = jax.shard_map(
            lambda *operands: [
                None if out is None else ctx.materialize(out, eqn, "a shard_map returns it changed")
                for out in run(list(operands))
            ],
            mesh=mapping.mesh,
            in_specs=tuple(specs),
            out_specs=list(mapping.out_specs),
            check_vma=mapping.check_vma,
            axis_names=mapping.axis_names,
        )
        return mapped(*operands)

    return _reenter(ctx, eqn, parts, call)


def evaluate_scan(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate a scan without materializing the weights that it scans over or forwards."""
    # Operands are [consts, carry, xs], and a weight is handled by its group:
    #   const:  closed over. lax.scan never sees it.
    #   carry:  if the body forwards it, it is constant over the loop, and closed over too.
    #           Otherwise its value changes from step to step and it is materialized.
    #   xs:     a stack W [L, 4096, 1024] of rank 8 has the arrays base [L, 4096, 1024],
    #           a [L, 4096, 8] and b [L, 8, 1024], which lax.scan slices; `rebuild` makes the weight
    #           [4096, 1024] of a step from a slice of each.
    # A result that forwards an operand is left out of the new scan and restored after it. So for
    # body(c, h, x) -> (c, h', x) with a weight c, NNX's layout, the new scan carries h alone, and
    # its ys are None: neither c nor the stack of x is copied.
    loop = Scan.of(eqn)
    n_consts, n_carry, first = loop.consts, loop.carries, loop.first_slice
    through = find_forwarded(ctx.operations, loop.jaxpr)
    fixed: dict[int, Weight] = {}  # index -> weight (or constant) closed over
    carry: list[Any] = []
    for i, value in enumerate(values[:first]):
        if i < n_consts or (_is_weight(value) and through[i - n_consts] == i):
            fixed[i] = value
        else:
            carry.append(ctx.materialize(value, eqn, "the loop changes it"))
    moving = [i for i in range(n_consts, first) if i not in fixed]  # carried by the new scan
    slices, rebuild = [], {}
    for i, value in enumerate(values[first:], first):
        parts = value.unstack() if _is_weight(value) else None
        if parts is None:
            slices.append(ctx.materialize(value, eqn, "it cannot be sliced along its leading axis"))
        else:
            slices.append(parts[0])
            rebuild[i] = parts[1]
    kept = {
        i: values[j]
        for i, j in enumerate(through)
        if i >= n_carry and j is not None and j >= first and _is_weight(values[j])
    }

    def step(carried: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        full = {**fixed, **dict(zip(moving, carried, strict=True))}
        for i, x in enumerate(xs, first):
            full[i] = rebuild[i](x) if i in rebuild else x
        outs = interpret(ctx, loop.jaxpr, [full[i] for i in range(len(values))])
        outs = [
            None
            if i in kept or (i < n_carry and i + n_consts in fixed)
            else ctx.materialize(out, eqn, "the loop returns it changed")
            for i, out in enumerate(outs)
        ]
        return [outs[i - n_consts] for i in moving], outs[n_carry:]

    with ctx.enter(eqn):
        carried, ys = lax.scan(
            step,
            carry,
            slices,
            length=loop.length,
            reverse=loop.reverse,
            unroll=loop.unroll,
        )
    final = {**fixed, **dict(zip(moving, carried, strict=True))}
    return [final[i] for i in range(n_consts, first)] + [
        kept.get(i, y) for i, y in enumerate(ys, n_carry)
    ]


def evaluate_while(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate a while loop; a carried weight that the body forwards is closed over."""
    loop = While.of(eqn)
    cond_consts = values[: loop.cond_consts]
    body_consts, carry = values[loop.cond_consts : loop.first_carry], values[loop.first_carry :]
    through = find_forwarded(ctx.operations, loop.body)
    fixed = {
        i: value
        for i, value in enumerate(carry)
        if _is_weight(value) and through[i] == loop.body_consts + i
    }
    moving = [i for i in range(len(carry)) if i not in fixed]

    def full(carried: list[Any]) -> list[Any]:
        values = {**fixed, **dict(zip(moving, carried, strict=True))}
        return [values[i] for i in range(len(carry))]

    def condition(carried: list[Any]) -> Any:
        return interpret(ctx, loop.cond, [*cond_consts, *full(carried)])[0]

    def step(carried: list[Any]) -> list[Any]:
        outs = interpret(ctx, loop.body, [*body_consts, *full(carried)])
        return [ctx.materialize(outs[i], eqn, "the loop changes it") for i in moving]

    with ctx.enter(eqn):
        start = [ctx.materialize(carry[i], eqn, "the loop changes it") for i in moving]
        return full(lax.while_loop(condition, step, start))


def evaluate_cond(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Evaluate a cond or switch whose branches close over the weights."""
    # A weight may be a result only if every branch forwards the same operand: lax.switch needs the
    # same result types from all branches, and the pytrees of two weights may differ.
    index, *operands = values
    branches = equations.get_branches(eqn)
    through = [find_forwarded(ctx.operations, branch) for branch in branches]
    kept = {
        i: operands[js[0]]
        for i, js in enumerate(zip(*through, strict=True))
        if js[0] is not None and len(set(js)) == 1 and _is_weight(operands[js[0]])
    }

    def branch(body: Jaxpr) -> Callable:
        def run(*arrays: jax.Array) -> list[Any]:
            supply = iter(arrays)
            full = [value if _is_weight(value) else next(supply) for value in operands]
            outs = interpret(ctx, body, full)
            return [
                None if i in kept else ctx.materialize(out, eqn, "a branch returns it")
                for i, out in enumerate(outs)
            ]

        return run

    arrays = [value for value in operands if not _is_weight(value)]
    index = ctx.materialize(index, eqn, "it selects a branch")
    with ctx.enter(eqn):
        outs = lax.switch(index, [branch(body) for body in branches], *arrays)
    return [kept.get(i, out) for i, out in enumerate(outs)]

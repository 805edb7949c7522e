"""Evaluation of control flow: re-enter by JAX's public functions, weights crossing as pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
from jax import lax

from lowrank_jax._interpreter.interpret import Context, interpret
from lowrank_jax._interpreter.operation import find_forwarded, find_forwarded_operands
from lowrank_jax._interpreter.remat import QuantizedDotPolicy
from lowrank_jax._jax import equations, jaxprs
from lowrank_jax._jax.equations import Jit, Scan, ShardMap, While
from lowrank_jax._jax.types import Equation, Jaxpr, PyTree
from lowrank_jax._operators.weight import Weight, expand_path

Out = Sequence[Any] | None


def _is_weight(value: object) -> TypeGuard[Weight]:
    return isinstance(value, Weight)


def _reenter(ctx: Context, eqn: Equation, values: list[Any], call: Callable) -> list[Any]:
    """Evaluate the body through call(run, values); a weight returned unchanged stays outside."""
    body, through = equations.get_body(eqn), find_forwarded_operands(ctx.operations, eqn)
    kept = {i: values[j] for i, j in enumerate(through) if j is not None and _is_weight(values[j])}

    def run(operands: list[Any]) -> list[Any]:
        outs = interpret(ctx, body, operands)
        return [None if i in kept else out for i, out in enumerate(outs)]

    with ctx.enter(eqn):
        outs = call(run, values)
    return [kept.get(i, out) for i, out in enumerate(outs)]


def evaluate_call(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    return _reenter(ctx, eqn, values, lambda run, operands: run(operands))


@dataclasses.dataclass(frozen=True)
class _PathSlot:
    """Stands for a weight's path inside a memoized jit, so that equal blocks share one trace."""

    number: int


@dataclasses.dataclass
class _JitEntry:
    """A re-entered jit and the context its trace recorded into, by slot."""

    ctx: Context
    call: Callable | None = None


def evaluate_jit(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """One jax.jit for each (body, structure of weights): equal blocks trace and compile once."""
    if ctx.inline_jit:
        return evaluate_call(ctx, eqn, values)
    slots: dict[Any, _PathSlot] = {}  # path outside -> slot

    def enter(leaf: Weight) -> Weight:
        slot = slots.setdefault(leaf.path, _PathSlot(len(slots)))
        numbered: Any = ctx.number_use(leaf)
        return dataclasses.replace(numbered, path=slot)

    operands = [v.map_leaves(enter) if _is_weight(v) else v for v in values]
    paths = {slot: path for path, slot in slots.items()}
    ctx.count_uses(slots)
    structure = tuple(jax.tree.structure(v) if _is_weight(v) else None for v in operands)
    name = (id(Jit.of(eqn).jaxpr), structure)
    if name not in ctx.memo:
        ctx.memo[name] = _JitEntry(Context(ctx.operations, ctx.refuse, memo=ctx.memo))
    entry = ctx.memo[name]
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
    """jax.jit under the user's own name."""

    def named(operands: list[Any]) -> list[Any]:
        return run(operands)

    named.__name__ = named.__qualname__ = Jit.of(eqn).name
    return jax.jit(named)


def _place_results(outs: list[Any], eqn: Equation) -> list[Any]:
    """The results of a jit as its out_shardings say; a weight's arrays by the axes they have."""
    shardings = Jit.of(eqn).out_shardings
    outs = [
        _constrain_weight(o, s) if _is_weight(o) else o
        for o, s in zip(outs, shardings, strict=True)
    ]
    plain = lambda i: shardings[i] is not None and hasattr(outs[i], "dtype")
    arrays = [i for i in range(len(outs)) if plain(i) and not _is_weight(outs[i])]
    if not arrays:
        return outs
    place = jax.jit(lambda *arrays: arrays, out_shardings=tuple(shardings[i] for i in arrays))
    placed = dict(zip(arrays, place(*(outs[i] for i in arrays)), strict=True))
    return [placed.get(i, out) for i, out in enumerate(outs)]


def _constrain_weight(weight: Weight, sharding: jax.sharding.Sharding | None) -> Weight:
    """A weight whose arrays are split as its own sharding says, where whole parts can be."""
    kind = jax.sharding.AxisType.Explicit
    if not isinstance(sharding, jax.NamedSharding) or kind in sharding.mesh.axis_types:
        return weight
    found = weight.specs(sharding.spec)
    if found is None or not _can_split(sharding.mesh, weight, found):
        return weight
    split = lambda array, spec: lax.with_sharding_constraint(
        array, jax.NamedSharding(sharding.mesh, spec)
    )
    return weight.reshard(sharding.spec, split) or weight


def evaluate_remat(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    options = equations.get_remat_options(eqn)
    if options["policy"] is not None:
        options["policy"] = QuantizedDotPolicy(options["policy"])
    return _reenter(ctx, eqn, values, lambda run, v: jax.checkpoint(run, **options)(v))


def evaluate_shard_map(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    mapping = ShardMap.of(eqn)
    specs, parts = [], []
    for value, spec in zip(values, mapping.in_specs, strict=True):
        if _is_weight(value):
            whole = value.prepare_split(spec)
            found = whole.specs(spec)
            if found is None or not _can_split(mapping.mesh, whole, found):
                value = ctx.materialize(value, eqn, "it cannot be split so")
            else:
                value, spec = whole, found
        specs.append(spec)
        parts.append(value)

    def call(run: Callable, operands: list[Any]) -> list[Any]:
        mapped = jax.shard_map(
            lambda *operands: [
                None
                if out is None
                else ctx.materialize(out, eqn, "a weight leaves a shard_map changed")
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


def _can_split(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, weight: Weight, specs: PyTree
) -> bool:
    """Whether devices can share the arrays of a weight: whole blocks of a quantized one."""

    def fits(array: jax.Array, spec: jax.sharding.PartitionSpec) -> bool:
        pairs = zip(array.shape, spec, strict=False)
        return all(size % jaxprs.count_shards(mesh, entry) == 0 for size, entry in pairs)

    return jax.tree.all(jax.tree.map(fits, weight, specs))


def evaluate_scan(ctx: Context, eqn: Equation, values: list[Any]) -> Out:
    """Weights scanned over give slices; carried unchanged they are constants; else built."""
    loop = Scan.of(eqn)
    n_consts, n_carry, first = loop.consts, loop.carries, loop.first_slice
    through = find_forwarded(ctx.operations, loop.jaxpr)
    fixed: dict[int, Weight] = {}  # inputs of the body that are weights closed over
    carry: list[Any] = []
    for i, value in enumerate(values[:first]):
        if i < n_consts or (_is_weight(value) and through[i - n_consts] == i):
            fixed[i] = value
        else:
            carry.append(ctx.materialize(value, eqn, "the loop changes it"))
    moving = [i for i in range(n_consts, first) if i not in fixed]
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
            else ctx.materialize(out, eqn, "it leaves the loop changed")
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
                None if i in kept else ctx.materialize(out, eqn, "it leaves a branch")
                for i, out in enumerate(outs)
            ]

        return run

    arrays = [value for value in operands if not _is_weight(value)]
    index = ctx.materialize(index, eqn, "it chooses a branch")
    with ctx.enter(eqn):
        outs = lax.switch(index, [branch(body) for body in branches], *arrays)
    return [kept.get(i, out) for i, out in enumerate(outs)]

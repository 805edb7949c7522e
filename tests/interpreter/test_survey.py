"""Invariants of the plan: it names every use of every leaf, in programs nested at random.

Random programs are sequences of blocks on h [4, 4]; each block has leaves of its own, says what
they are used for, and may be wrapped in jit, remat, a loop, a branch or vmap. No program is run or
compiled.
"""

import dataclasses
import functools
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from models import one_device_mesh, tenfold

import lowrank_jax as lowrank

N = 4
MASK = np.tri(N, dtype=np.float32)
DENSE, LAST, STACKED = ((0,), (1,), ()), ((1,), (0,), ()), ((1,), (2,), (0,))
LOOKUP, ELEMENTWISE, NAMED, UNUSED, FINAL = "lookup", "elementwise", "named", "unused", "final"


@dataclasses.dataclass(frozen=True)
class Block:
    """call(leaves, h, ids) -> h; for each of its leaves the shape, and what it is used for."""

    call: Callable
    leaves: tuple[tuple[tuple[int, ...], object], ...]


BLOCKS: dict[str, Block] = {}


def block(*leaves):
    def enter(call):
        BLOCKS[call.__name__] = Block(call, leaves)
        return call

    return enter


def product(fn: Callable, *leaves) -> None:
    """A block of a product and a nonlinearity."""
    BLOCKS[f"product_{len(BLOCKS)}"] = Block(
        lambda p, h, ids: h + jax.nn.gelu(fn(h, *p)).reshape(N, N), leaves
    )


SQUARE = (N, N)
product(lambda h, w: h @ w, (SQUARE, DENSE))
product(lambda h, w: (w @ h.T).T, (SQUARE, LAST))
product(lambda h, w: h @ (-w.T * 0.5 / 3).astype(jnp.bfloat16).astype(jnp.float32), (SQUARE, LAST))
product(lambda h, w: jnp.einsum("ti,ihk->thk", h, w), ((N, 2, 2), ((0,), (1, 2), ())))
product(
    lambda h, w: jnp.einsum("thk,hkd->td", h.reshape(N, 2, 2), w), ((2, 2, N), ((0, 1), (2,), ()))
)
product(lambda h, w: jnp.einsum("ti,ihk->thk", h, w.reshape(N, 2, 2)[:, ::-1]), (SQUARE, DENSE))
product(
    lambda h, w: lax.conv_general_dilated(
        h[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    ((3, N, N), ((0, 1), (2,), ())),
)
product(
    lambda h, v, w: lax.scan(lambda c, w: (jnp.sin(c @ w) * v[0, 0], None), h, w)[0],
    (SQUARE, ELEMENTWISE), ((3, N, N), STACKED),
)  # fmt: skip
product(
    lambda h, w: lax.scan(lambda c, w: (jnp.sin(c @ w), None), h, jnp.moveaxis(w, 1, 0))[0],
    ((N, 3, N), ((0,), (2,), (1,))),
)
product(lambda h, w: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ w[i]), h), ((3, N, N), STACKED))
product(lambda h, w: jnp.sin(h @ w[0]) @ w[1], ((2, N, N), STACKED))
product(lambda h, w: h @ jnp.pad(w[1:3], ((1, 1), (0, 0))), (SQUARE, DENSE))
product(lambda h, v, w: h @ jnp.concatenate([v, w], 1), ((N, 1), DENSE), ((N, 3), DENSE))
product(lambda h, v, w: h @ jnp.concatenate([v, w], 0), ((1, N), DENSE), ((3, N), DENSE))
product(
    lambda h, v, w: jnp.einsum("ti,nij->tnj", h, jnp.stack([v, w])),
    ((N, 2), DENSE), ((N, 2), DENSE),
)  # fmt: skip
product(
    lambda h, v, w: sum(h @ part for part in jnp.split(jnp.concatenate([v, w.T], 1), 2, axis=1)),
    (SQUARE, DENSE), (SQUARE, LAST),
)  # fmt: skip
product(
    lambda h, v, w: sum(
        h @ flat.reshape(SQUARE)
        for flat in jnp.split(jnp.concatenate([v.ravel(), w.ravel()]), 2)
    ),
    (SQUARE, DENSE), (SQUARE, DENSE),
)  # fmt: skip
product(lambda h, v, w: h @ (v @ w), ((N, 2), DENSE), ((2, N), DENSE))
product(lambda h, v, w: h @ v @ w, ((N, 2), DENSE), ((2, N), DENSE))
product(lambda h, w: h @ jnp.tanh(w), (SQUARE, NAMED))
product(lambda h, w: h @ (w * MASK), (SQUARE, NAMED))
product(lambda h, w: h @ jnp.where(h[0, 0] > 0, w, 0), (SQUARE, NAMED))
product(lambda h, w: h @ (w / jnp.linalg.norm(w, axis=0)), (SQUARE, DENSE))
product(lambda h, v, w: h @ (w * v[0]), (SQUARE, ELEMENTWISE), (SQUARE, DENSE))
product(lambda h, v, w: h @ (w / v[:, :1]), (SQUARE, ELEMENTWISE), (SQUARE, DENSE))
product(lambda h, w: h @ (w * h[0]), (SQUARE, DENSE))
product(lambda h, v, w: h @ (w * (v[:1] * v[:, :1])), (SQUARE, ELEMENTWISE), (SQUARE, NAMED))
product(lambda h, v, w: h @ (v + w), (SQUARE, NAMED), (SQUARE, NAMED))
product(lambda h, v, w: h @ (jnp.tanh(v) @ w), ((N, 2), NAMED), ((2, N), DENSE))
product(lambda h, w: h @ w.at[0].set(0), (SQUARE, NAMED))
product(lambda h, w: h @ lax.fori_loop(0, 3, lambda i, w: jnp.tanh(w), w), (SQUARE, NAMED))
product(lambda h, v, w: h @ lax.cond(h[0, 0] > 0, lambda: v, lambda: w), *[(SQUARE, NAMED)] * 2)
product(tenfold, (SQUARE, NAMED))
product(
    lambda h, w: jax.pure_callback(np.matmul, h, h, w, vmap_method="expand_dims"),
    (SQUARE, NAMED),
)
product(lambda h, w: jnp.linalg.solve(w, h), (SQUARE, NAMED))


@block(((2, N, N), STACKED))
def ragged(p, h, ids):
    return h + jnp.tanh(lax.ragged_dot(h, p[0], jnp.array([3, 1])))


@block(((7, N), LOOKUP))
def rows(p, h, ids):
    return h + p[0][ids]


@block(((7, 2, 2), LOOKUP))
def rows_of_matrices(p, h, ids):
    return h + p[0][ids].reshape(N, N)


@block(((7, N), LOOKUP))
def rows_under_vmap(p, h, ids):
    return h + jax.vmap(lambda i: p[0][i])(ids)


@block(((3, 7, N), LOOKUP))
def rows_of_stacked_tables(p, h, ids):
    return lax.scan(lambda h, t: (h + t[ids], None), h, p[0])[0]


@block(((7, N, N), STACKED))
def experts_by_index(p, h, ids):
    return h + jnp.tanh(jax.vmap(lambda h, i: h @ p[0][i])(h, ids))


@block((SQUARE, ELEMENTWISE), ((2, 2), ELEMENTWISE))
def elementwise(p, h, ids):
    return h * p[0] + (h.reshape(N, 2, 2) * jnp.exp(p[1])).reshape(N, N)


@block(((3, N), ELEMENTWISE), ((3, N), ELEMENTWISE), ((3, N, N), STACKED))
def stacked_layers(p, h, ids):
    def layer(h, p):
        scale, bias, w = p
        return h + jnp.tanh(h * scale @ w + bias), None

    return lax.scan(layer, h, tuple(p))[0]


@block((SQUARE, UNUSED), (SQUARE, ELEMENTWISE))
def not_in_a_product(p, h, ids):
    return jnp.concatenate([h[:2], p[1][2:]])


@block((SQUARE, DENSE), (SQUARE, DENSE), (SQUARE, DENSE))
def attention(p, h, ids):
    q, k, v = (h @ w for w in p)
    return h + jax.nn.softmax(jnp.where(MASK > 0, q @ k.T, -1e9)) @ v


@block((SQUARE, DENSE))
def linear(p, h, ids):
    return h @ p[0]  # returned as an intermediate, no activation stands between it and the result


@block((SQUARE, ((1,), (0,), ())))
def tied(p, h, ids):
    return h + jax.nn.gelu(h @ p[0].T) @ p[0]


WRAPPERS: dict[str, Callable] = {
    "bare": lambda fn: fn,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat of jit": lambda fn: jax.checkpoint(jax.jit(fn)),
    "vmap": lambda fn: lambda p, h, ids: jax.vmap(fn, (None, 0, None))(p, h[None], ids)[0],
    "fori": lambda fn: lambda p, h, ids: lax.fori_loop(0, 2, lambda i, h: fn(p, h, ids), h),
    "carried": lambda fn: (
        lambda p, h, ids: lax.scan(
            lambda c, _: ((c[0], fn(*c, ids)), None), (p, h), None, length=2
        )[0][1]
    ),
    "while": lambda fn: (
        lambda p, h, ids: lax.while_loop(lambda h: h.sum() < 9, lambda h: fn(p, h, ids), h)
    ),
    "cond": lambda fn: (
        lambda p, h, ids: lax.cond(ids[0] > 2, lambda h: fn(p, h, ids), lambda h: h, h)
    ),
    "shard_map": lambda fn: jax.shard_map(
        fn, mesh=one_device_mesh(), in_specs=(P(), P(), P()), out_specs=P(), check_vma=False
    ),
}

HEADS: dict[str, Callable] = {
    "plain": lambda h, w: h @ w,
    "bias": lambda h, w: (h @ w + jnp.ones(3)).astype(jnp.bfloat16),
    "soft-cap": lambda h, w: 30 * jnp.tanh(h @ w / 30),
    "last": lambda h, w: (h @ w)[-1],
    "reversed": lambda h, w: lax.stop_gradient(h @ w)[::-1],
    "masked": lambda h, w: jnp.where(np.arange(3) > 1, h @ w, -1e9),
    "padded": lambda h, w: jnp.pad(h @ w, 1),
    "joined": lambda h, w: jnp.concatenate([h @ w, jnp.zeros((2, 3))]),
    "positions": lambda h, w: jnp.take(h @ w, jnp.array([0, 2]), axis=0),
    "ys": lambda h, w: lax.map(lambda h: h @ w, h),
    "step by step": lambda h, w: lax.scan(
        lambda token, h: (jnp.argmax(h[token] + h @ w), h @ w), 0, h
    )[1],
}


@dataclasses.dataclass(frozen=True)
class Program:
    """Names of blocks, each with its wrappers, and of a head."""

    blocks: tuple[tuple[str, tuple[str, ...]], ...]
    head: str

    def shapes(self):
        leaf = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
        layers = {f"{i}": [leaf(s) for s, _ in BLOCKS[b].leaves] for i, (b, _) in self.layers()}
        return {"layers": layers, "head": leaf((N, 3))}

    def layers(self):
        return enumerate(self.blocks)

    def expected(self):
        found = {
            f"layers/{i}/{j}": use
            for i, (name, _) in self.layers()
            for j, (_, use) in enumerate(BLOCKS[name].leaves)
        }
        return found | {"head": FINAL}

    def call(self, params, h, ids):
        """The result, and what each block returned."""
        seen = []
        for i, (name, wrappers) in self.layers():
            fn = functools.reduce(lambda fn, w: WRAPPERS[w](fn), wrappers, BLOCKS[name].call)
            h = fn(params["layers"][f"{i}"], h, ids)
            seen.append(h)
        return HEADS[self.head](h, params["head"]), seen

    def plan(self, wrap=lambda fn: fn):
        fn = wrap(lambda *args: self.call(*args)[0])
        return lowrank.plan(fn, self.shapes(), *ARGUMENTS)


ARGUMENTS = jax.ShapeDtypeStruct(SQUARE, np.float32), jax.ShapeDtypeStruct((N,), np.int32)


def is_possible(pair):
    """JAX has no shard_map in a shard_map of the same mesh, and no ragged product under vmap."""
    name, wrappers = pair
    return wrappers != ("shard_map",) * 2 and (name != "ragged" or "vmap" not in wrappers)


@st.composite
def programs(draw):
    wrappers = st.lists(st.sampled_from([*WRAPPERS]), max_size=2).map(tuple)
    pairs = st.tuples(st.sampled_from([*BLOCKS]), wrappers)
    blocks = st.lists(pairs.filter(is_possible), min_size=1, max_size=4)
    return Program(tuple(draw(blocks)), draw(st.sampled_from([*HEADS])))


def kind_of(use):
    """What the plan says of one leaf, in the words of the blocks."""
    if use.final:
        return FINAL
    if use.lookup:
        return LOOKUP
    if use.linear:
        return use.fan_in, use.fan_out, use.stack
    if use.reason:
        return NAMED
    return {"other": ELEMENTWISE, "unused": UNUSED}.get(use.op, f"unexplained {use}")


def check(program):
    """Every leaf is explained, and rightly; wrapping the program changes nothing."""
    plan = program.plan()
    assert {path: kind_of(use) for path, use in plan.items()} == program.expected()
    assert {path for path, use in plan.items() if use.passed_over} == {
        path for path, use in program.expected().items() if use == NAMED
    }
    assert dict(program.plan(jax.jit)) == dict(plan)
    assert dict(program.plan(jax.checkpoint)) == dict(plan)
    assert dict(lowrank.plan(program.call, program.shapes(), *ARGUMENTS)) == dict(plan)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_alone(name):
    check(Program(((name, ()),), "plain"))


@pytest.mark.parametrize("name", HEADS)
def test_every_head(name):
    check(Program((("attention", ()),), name))


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        derandomize=examples < 1000,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@settings(60)
@hypothesis.given(programs())
def test_random_programs(program):
    check(program)


@pytest.mark.slow
@settings(1000)
@hypothesis.given(programs())
def test_many_random_programs(program):
    check(program)

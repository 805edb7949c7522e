"""Random shapes, axes and layouts against a dense weight made by NumPy: 56 here, 5,000 by -m slow.

A leaf gets random fan-in, fan-out and stack axes, is led through random transposes, slices and
reshapes, and is consumed by a random product. Where the product uses each axis for what it is
(fan-in is contracted, fan-out kept, stack batched), fallback="raise" must pass; elsewhere the
fallback must give the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lowrank_jax as lowrank

# Each result is compared with the sum of magnitudes that went into it, so cancellation costs
# nothing. Every term passes through at most four products, each of which sums at most 2 * 4^4 terms
# in float32.
TOLERANCE = 64 * float(np.finfo(np.float32).eps)

ROLES = "ios"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf's shape, the role of each of its axes ("i", "o" or "s"), its rank and scale."""

    shape: tuple[int, ...]
    roles: str
    rank: int
    scale: float

    def axes(self, role: str) -> tuple[int, ...]:
        return tuple(axis for axis, mine in enumerate(self.roles) if mine == role)

    def arrays(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """base, a, b: integers over eight, exact in float32."""
        size = lambda role: tuple(self.shape[axis] for axis in self.axes(role))
        draw = lambda *shape: rng.integers(-8, 9, shape).astype(np.float32) / 8
        i, o, s = map(size, ROLES)
        return draw(*self.shape), draw(*s, *i, self.rank), draw(*s, self.rank, *o)

    def node(self, base: Any, a: Any, b: Any) -> lowrank.Adapted:
        """The adapted leaf."""
        i, o, s = map(self.axes, ROLES)
        return lowrank.Adapted(base, lowrank.LowRank(a, b, None, i, o, s, self.scale))

    def dense(self, base: Any, a: Any, b: Any, scale: Any) -> Any:
        """W + s a b by one einsum over named axes."""
        name = lambda axes: "".join(chr(ord("A") + axis) for axis in axes)
        i, o, s = (name(self.axes(role)) for role in ROLES)
        out = name(range(len(self.shape)))
        delta = jnp.einsum(f"{s}{i}r,{s}r{o}->{out}", a, b, precision="highest")
        return base + scale * delta


Step = Callable[[Any], Any]


@dataclasses.dataclass
class Way:
    """A leaf on its way to a product: the steps so far, and the shape and role of each axis now."""

    steps: list[Step]
    shape: list[int]
    roles: list[str]

    def __call__(self, w: Any) -> Any:
        for step in self.steps:
            w = step(w)
        return w

    def add(self, step: Step, roles: list[str]) -> None:
        self.steps.append(step)
        self.shape = list(jax.eval_shape(step, jax.ShapeDtypeStruct(self.shape, np.float32)).shape)
        self.roles = roles


def transpose(draw: Any, way: Way) -> None:
    order = draw(st.permutations(range(len(way.shape))))
    way.add(lambda w: jnp.transpose(w, order), [way.roles[axis] for axis in order])


def rev(draw: Any, way: Way) -> None:
    axis = draw(st.integers(0, len(way.shape) - 1))
    way.add(lambda w: lax.rev(w, (axis,)), way.roles)


def cut(draw: Any, way: Way) -> None:
    axis = draw(st.integers(0, len(way.shape) - 1))
    start = draw(st.integers(0, way.shape[axis] - 1))
    stop = draw(st.integers(start + 1, way.shape[axis]))
    step = draw(st.integers(1, 2))
    way.add(lambda w: lax.slice_in_dim(w, start, stop, step, axis), way.roles)


def dynamic(draw: Any, way: Way) -> None:
    axis = draw(st.integers(0, len(way.shape) - 1))
    size = draw(st.integers(1, way.shape[axis]))
    start = draw(st.integers(0, 3))  # beyond the end it is clamped
    way.add(
        lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(start) + jnp.int32(0), size, axis),
        way.roles,
    )


def piece(draw: Any, way: Way) -> None:
    axis = draw(st.integers(0, len(way.shape) - 1))
    at = draw(st.integers(1, way.shape[axis])) if way.shape[axis] > 1 else 1
    if at == way.shape[axis]:
        return
    which = draw(st.integers(0, 1))
    way.add(lambda w: jnp.split(w, [at], axis)[which], way.roles)


def expand(draw: Any, way: Way) -> None:
    axis = draw(st.integers(0, len(way.shape)))
    roles = [*way.roles[:axis], "1", *way.roles[axis:]]
    way.add(lambda w: jnp.expand_dims(w, axis), roles)


def squeeze(draw: Any, way: Way) -> None:
    ones = [axis for axis, size in enumerate(way.shape) if size == 1]
    if not ones or len(way.shape) == 1:
        return
    axis = draw(st.sampled_from(ones))
    way.add(lambda w: jnp.squeeze(w, axis), [*way.roles[:axis], *way.roles[axis + 1 :]])


def join(draw: Any, way: Way) -> None:
    """Merge two neighbors of one role."""
    pairs = [k for k in range(len(way.shape) - 1) if way.roles[k] == way.roles[k + 1]]
    if not pairs:
        return
    k = draw(st.sampled_from(pairs))
    shape = [*way.shape[:k], way.shape[k] * way.shape[k + 1], *way.shape[k + 2 :]]
    way.add(lambda w: w.reshape(shape), [*way.roles[:k], *way.roles[k + 1 :]])


def divide(draw: Any, way: Way) -> None:
    """Split one axis in two."""
    even = [k for k, size in enumerate(way.shape) if size > 1 and size % 2 == 0]
    if not even:
        return
    k = draw(st.sampled_from(even))
    shape = [*way.shape[:k], 2, way.shape[k] // 2, *way.shape[k + 1 :]]
    way.add(lambda w: w.reshape(shape), [*way.roles[: k + 1], *way.roles[k:]])


def flatten(draw: Any, way: Way) -> None:
    """Merge all axes, whatever their roles: no low-rank weight survives it."""
    way.add(lambda w: w.reshape(-1), ["x"])


def identity(draw: Any, way: Way) -> None:
    step = draw(
        st.sampled_from([jnp.copy, lax.optimization_barrier, jnp.negative, lambda w: w / 2])
    )
    way.add(step, way.roles)


KEEPING = (transpose, rev, cut, dynamic, piece, expand, squeeze, join, divide, identity)


@st.composite
def leaves(draw: Any, roles: str | None = None, max_axes: int = 4) -> Leaf:
    if roles is None:
        roles = "".join(draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=max_axes)))
    shape = tuple(draw(st.integers(1, 4)) for _ in roles)
    return Leaf(shape, roles, draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 0.5, -1.5])))


def walk(draw: Any, leaf: Leaf, steps: Any, most: int = 3) -> Way:
    way = Way([], list(leaf.shape), list(leaf.roles))
    for _ in range(draw(st.integers(0, most))):
        draw(st.sampled_from(steps))(draw, way)
    return way


@dataclasses.dataclass(frozen=True)
class Example:
    """fn(w, x), linear in both, the leaf, the shape of x, and whether a rule must serve."""

    leaf: Leaf
    fn: Callable[[Any, Any], Any]
    x: tuple[int, ...]
    factored: bool


@st.composite
def products(draw: Any) -> Example:
    """lax.dot_general on either side, over any axes."""
    leaf = draw(leaves())
    canonical = draw(st.booleans())
    way = walk(draw, leaf, KEEPING if canonical else (*KEEPING, flatten))
    use = {"i": "i", "o": "o", "s": "s", "1": "o"}
    uses = [use[role] if canonical else draw(st.sampled_from(ROLES)) for role in way.roles]
    mine = {kind: [axis for axis, k in enumerate(uses) if k == kind] for kind in ROLES}
    contracted, batch = draw(st.permutations(mine["i"])), draw(st.permutations(mine["s"]))
    free = draw(st.lists(st.integers(1, 3), max_size=2))
    sizes = [way.shape[k] for k in (*contracted, *batch)] + free
    order = draw(st.permutations(range(len(sizes))))  # axis of x -> entry of sizes
    place = [order.index(k) for k in range(len(sizes))]
    count = len(contracted)
    theirs = place[:count], place[count : count + len(batch)]
    ours = tuple(contracted), tuple(batch)
    left = draw(st.booleans())
    pair = lambda a, b: (tuple(a), tuple(b)) if left else (tuple(b), tuple(a))
    numbers = (pair(ours[0], theirs[0]), pair(ours[1], theirs[1]))

    def fn(w: Any, x: Any) -> Any:
        operands = (way(w), x) if left else (x, way(w))
        return lax.dot_general(*operands, numbers)

    return Example(leaf, fn, tuple(sizes[k] for k in order), canonical)


@st.composite
def lookups(draw: Any) -> Example:
    """Rows by an array of indices, along any axis, then a product with x."""
    canonical = draw(st.booleans())
    roles = "".join(draw(st.permutations("i" + "o" * draw(st.integers(1, 2)))))
    leaf = draw(leaves(roles if canonical else None, max_axes=3))
    way = walk(draw, leaf, (transpose, rev, cut, identity), most=2)
    axis = way.roles.index("i") if canonical else draw(st.integers(0, len(way.shape) - 1))
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)] if canonical else [(), (1,), (3,), (2, 2)]))
    size = math.prod(shape)
    indices = np.array(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)), np.int32)
    indices = indices.reshape(shape)  # some lie beyond the end
    mode = draw(st.sampled_from(["clip", "wrap", "fill"]))
    fill = draw(st.sampled_from([0.0, 7.0]))
    # linear in w but for the fill, which is the same on both sides and adds to the magnitude
    take = lambda w: jnp.take(way(w), indices, axis=axis, mode=mode, fill_value=fill)
    rows = jax.eval_shape(take, jax.ShapeDtypeStruct(leaf.shape, np.float32)).shape
    fn = lambda w, x: take(w) * x
    return Example(leaf, fn, rows, canonical)


@st.composite
def convolutions(draw: Any) -> Example:
    """Strides, dilations, groups, padding and layouts, one or two window axes."""
    dims = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 3))
    batch_groups = draw(st.sampled_from([1, 1, 1, 2])) if groups == 1 else 1
    inputs, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    outputs = per_group * groups * batch_groups
    window = [draw(st.integers(1, 3)) for _ in range(dims)]
    layout = draw(st.permutations(range(dims + 2)))  # rhs_spec: out, in, window
    shape, roles = [0] * (dims + 2), [""] * (dims + 2)
    canonical = draw(st.booleans())
    sizes = [outputs, inputs, *window]
    for k, axis in enumerate(layout):
        shape[axis] = sizes[k]
        roles[axis] = ("o" if k == 0 else "i") if canonical else draw(st.sampled_from(ROLES))
    leaf = Leaf(tuple(shape), "".join(roles), draw(st.integers(1, 3)), 1.5)
    x_layout, y_layout = (
        draw(st.permutations(range(dims + 2))),
        draw(st.permutations(range(dims + 2))),
    )
    x = [0] * (dims + 2)
    for k, size in enumerate([2, inputs * groups, *(draw(st.integers(3, 5)) for _ in range(dims))]):
        x[x_layout[k]] = size
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    # no negative padding: XLA on CPU then reads beyond the input, and a plain convolution gives
    # other numbers at each call (JAX 0.10.2)
    padding = draw(
        st.one_of(
            st.sampled_from(["SAME", "VALID"]),
            st.just([tuple(draw(st.integers(0, 2)) for _ in "ab") for _ in range(dims)]),
        )
    )
    x_dilation = each(1, 2) if not isinstance(padding, str) else (1,) * dims
    options = {
        "window_strides": each(1, 2),
        "padding": padding,
        "lhs_dilation": x_dilation,
        "rhs_dilation": each(1, 2),
        "dimension_numbers": lax.ConvDimensionNumbers(
            tuple(x_layout), tuple(layout), tuple(y_layout)
        ),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    fn = lambda w, x: lax.conv_general_dilated(x, w, **options)
    return Example(leaf, fn, tuple(x), canonical and batch_groups == 1)


def check(example: Example) -> None:
    """Value and gradients of a, b and x: live against dense, to rounding of their magnitudes."""
    leaf, fn = example.leaf, example.fn
    rng = np.random.default_rng(0)
    base, a, b = leaf.arrays(rng)
    x = rng.integers(-8, 9, example.x).astype(np.float32) / 8
    out = jax.eval_shape(fn, base, x)
    weights = rng.integers(-8, 9, out.shape).astype(np.float32) / 8
    lifted = lowrank.lift(fn, fallback="raise" if example.factored else "silent")

    def results(run: Callable, a: Any, b: Any, x: Any, weights: Any) -> Any:
        """y and the gradients of a, b and x."""
        y, pull = jax.vjp(run, a, b, x)
        return y, *pull(weights)

    @jax.jit
    def both(scale: Any, base: Any, *rest: Any) -> Any:
        live = lambda a, b, x: lifted(leaf.node(base, a, b), x)
        dense = lambda a, b, x: fn(leaf.dense(base, a, b, scale), x)
        return results(live, *rest), results(dense, *rest)

    # on magnitudes all terms of a sum have one sign: what fn makes of them bounds its rounding
    arrays = np.float32(leaf.scale), base, a, b, x, weights
    got, want = jax.device_get(both(*arrays))
    _, sizes = jax.device_get(both(*map(np.abs, arrays)))
    for name, one, other, size in zip(("y", "a", "b", "x"), got, want, sizes, strict=True):
        assert one.shape == other.shape
        excess = np.abs(one - other) - TOLERANCE * np.abs(size)
        assert np.all(excess <= 0), f"{name} is off by {np.abs(one - other).max()}"


def settings(examples: int) -> Any:
    return hypothesis.settings(
        max_examples=examples,
        derandomize=examples < 1000,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


PRODUCTS, LOOKUPS, CONVOLUTIONS = 20, 8, 8


@settings(PRODUCTS)
@hypothesis.given(products())
def test_products(fast_compile, example):
    check(example)


@settings(LOOKUPS)
@hypothesis.given(lookups())
def test_lookups(fast_compile, example):
    check(example)


@settings(CONVOLUTIONS)
@hypothesis.given(convolutions())
def test_convolutions(fast_compile, example):
    check(example)


@pytest.mark.slow
@settings(3000)
@hypothesis.given(products())
def test_many_products(fast_compile, example):
    check(example)


@pytest.mark.slow
@settings(1000)
@hypothesis.given(lookups())
def test_many_lookups(fast_compile, example):
    check(example)


@pytest.mark.slow
@settings(1000)
@hypothesis.given(convolutions())
def test_many_convolutions(fast_compile, example):
    check(example)


def test_the_suite_reaches_the_rules():
    """Enough of the examples must be those that no fallback may serve."""
    counts = {products(): PRODUCTS, lookups(): LOOKUPS, convolutions(): CONVOLUTIONS}
    for strategy, count in counts.items():
        seen = []
        settings(count)(hypothesis.given(strategy)(lambda example: seen.append(example.factored)))()
        assert sum(seen) >= 0.15 * len(seen)

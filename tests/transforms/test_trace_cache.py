"""Calls outside of any jit are traced and compiled once, under grad and vmap too."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")
PARAMS = {"w": normal(4, 4), "v": normal(4, 4, seed=1)}
BASE, LORA = lowrank.init(0, PARAMS, lowrank.LoraConfig(rank=2, targets=["w", "v"]))
LORA = jax.tree.map(lambda leaf: leaf + 0.1, LORA)
X = normal(3, 4, seed=2)


def model(p, x):
    """Two inner jits and a loop."""
    h = jax.jit(lambda x, w: jnp.tanh(x @ w))(x, p["w"])
    h = lax.scan(lambda h, _: (jnp.tanh(h @ p["v"]), None), h, None, length=2)[0]
    return jax.jit(lambda x, w: x @ w)(h, p["v"])


def transforms(f):
    """Each takes a number, that no two calls are alike."""
    whole = lambda lora, x: f(lowrank.combine(BASE, lora), x)
    total = lambda lora, x: whole(lora, x).sum()
    grow = lambda k: jax.tree.map(lambda leaf: leaf * k, LORA)
    tangent = jax.tree.map(jnp.ones_like, LORA)
    return {
        "eager": lambda k: whole(grow(k), X),
        "grad": lambda k: jax.grad(total)(grow(k), X),
        "grad of x": lambda k: jax.grad(total, 1)(LORA, X * k),
        "jvp": lambda k: jax.jvp(lambda l: whole(l, X), (grow(k),), (tangent,)),
        "vmap": lambda k: jax.vmap(whole, (None, 0))(LORA, jnp.stack([X, k * X])),
        "vmap of grad": lambda k: jax.vmap(jax.grad(total), (None, 0))(LORA, jnp.stack([X, k * X])),
        "second": lambda k: jax.grad(lambda l: jax.grad(total, 1)(l, X * k).sum())(LORA),
    }


@pytest.mark.parametrize("name", transforms(lambda *_: None))
def test_one_trace_serves_all_calls(name):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(lambda p, x: model(p, x), n=1)
    run = transforms(lowrank.lift(counted, fallback="raise"))[name]
    plain = transforms(lambda tree, x: model(lowrank.merge(*lowrank.partition(tree)), x))[name]
    for k in (1.0, 2.0, 3.0):
        chex.assert_trees_all_close(run(k), plain(k), rtol=1e-4, atol=1e-5)


def test_other_shapes_structures_and_static_arguments_are_traced_anew():
    seen = []

    def fn(p, x, flag):
        seen.append((x.shape, flag))
        return (x @ p["w"]).sum() * (2 if flag else 1)

    live = lowrank.lift(fn)
    slope = lambda x, flag: jax.grad(lambda l: live(lowrank.combine(BASE, l), x, flag))(LORA)
    for _ in range(2):
        for x, flag in ((X, True), (X, 1), (X[:1], True), (X, False)):
            got = slope(x, flag)["w"].b
            want = jax.grad(lambda b: fn({"w": PARAMS["w"] + 2 * LORA["w"].a @ b}, x, flag))
            np.testing.assert_allclose(got, want(LORA["w"].b), rtol=1e-4)
            seen.pop()
    assert seen == [((3, 4), True), ((3, 4), 1), ((1, 4), True), ((3, 4), False)]


def test_a_function_that_closes_over_tracers_is_not_kept():
    cell = []
    live = lowrank.lift(lambda p, x: (x @ p["w"]).sum() * cell[-1])
    tree = lowrank.combine(BASE, LORA)

    def outer(y):
        cell.append(y)
        return live(tree, X) * y

    want = (X @ lowrank.merge(BASE, LORA)["w"]).sum()
    for y in (2.0, 3.0):
        np.testing.assert_allclose(jax.grad(outer)(y), 2 * y * want, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(jax.grad(outer))(y), 2 * y * want, rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(outer)(jnp.array([y, 1.0])), [y * y * want, want], 1e-5)
    cell.append(5.0)
    np.testing.assert_allclose(live(tree, X), 5 * want, rtol=1e-5)


def test_arguments_that_cannot_be_hashed_are_taken_under_grad():
    class Options:
        __hash__ = None

        def __init__(self, k):
            self.k = k

    live = lowrank.lift(lambda p, x, options: (x @ p["w"]).sum() * options.k)
    slope = lambda k: jax.grad(lambda l: live(lowrank.combine(BASE, l), X, Options(k)))(LORA)
    np.testing.assert_allclose(slope(2.0)["w"].b, 2 * slope(1.0)["w"].b, rtol=1e-5)


def test_what_was_kept_is_freed_with_the_function():
    class Big:
        pass

    def use(big):
        live = lowrank.lift(lambda p, x: (x @ p["w"]).sum() * len(str(big)))
        jax.grad(lambda l: live(lowrank.combine(BASE, l), X))(LORA)
        return weakref.ref(big)

    ref = use(Big())
    gc.collect()
    assert ref() is None

"""The selected_dot primitive: all its forms are one function, of each example and its own entry."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax._primitives import selected_dot as module
from lowrank_jax._primitives.selected_dot import ENTRY, choose_form, selected_dot

pytestmark = pytest.mark.usefixtures("fast_compile")

EXAMPLES, TOKENS, COUNT, FAN_IN, RANK = 5, 3, 4, 6, 2
LABELS = {"xl": ("t", "in"), "yl": (ENTRY, "in", "r"), "out": ("t", "r")}
BATCHED = {"xl": ("e", "t", "in"), "yl": LABELS["yl"], "il": ("e",), "out": ("e", "t", "r")}
OPTIONS = {"precision": None, "preferred_element_type": None}
INDEX = jnp.array([3, 0, 3, 1, 2])


def draw(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


X, TABLE = draw(EXAMPLES, TOKENS, FAN_IN), draw(COUNT, FAN_IN, RANK)


def product(x, table, index):
    """The primitive, over examples."""
    return jax.vmap(lambda x, index: selected_dot(x, table, index, **LABELS))(x, index)


def reference(x, table, index):
    return jnp.einsum("eti,eir->etr", x, table[index])


@pytest.fixture(params=["gather", "mask_input", "mask_output"])
def form(request, monkeypatch):
    """Every product takes this form where it is possible, else it gathers."""
    real = module.choose_form

    def choose(xl, yl, il, out, sizes, balance):
        possible = real(xl, yl, il, out, {**sizes, ENTRY: 0}, balance) != "gather"
        return request.param if possible else "gather"

    monkeypatch.setattr(module, "choose_form", choose)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def test_values_and_derivatives_are_those_of_each_entry(form):
    value, grads = jax.jit(jax.vjp, static_argnums=0)(lambda *a: product(*a, INDEX), X, TABLE)
    expected, wanted = jax.vjp(lambda *a: reference(*a, INDEX), X, TABLE)
    chex.assert_trees_all_close(value, expected, rtol=1e-5, atol=1e-5)
    ct = draw(*expected.shape)
    chex.assert_trees_all_close(grads(ct), wanted(ct), rtol=1e-5, atol=1e-5)
    tangents = draw(*X.shape) + 1, draw(*TABLE.shape) - 1
    push = lambda fn: jax.jvp(lambda *a: fn(*a, INDEX), (X, TABLE), tangents)[1]
    chex.assert_trees_all_close(push(product), push(reference), rtol=1e-5, atol=1e-5)
    twice = lambda fn: jax.grad(
        lambda t: (jax.grad(lambda x: (fn(x, t, INDEX) ** 3).sum())(X) ** 2).sum()
    )
    chex.assert_trees_all_close(
        twice(product)(TABLE), twice(reference)(TABLE), rtol=1e-4, atol=1e-3
    )


def test_an_entry_that_is_not_finite_is_nan_for_its_own_examples_alone(form):
    bad = TABLE.at[3, 0, 0].set(jnp.nan).at[1, 2, 1].set(jnp.inf)
    got = jax.jit(product)(X, bad, INDEX)
    sound = np.isin(INDEX, [0, 2])
    expected = reference(X, TABLE, INDEX)
    chex.assert_trees_all_close(got[sound], expected[sound], rtol=1e-5, atol=1e-5)
    assert not jnp.isfinite(got[~sound]).all((1, 2)).any()


def test_an_index_outside_is_nan(form):
    index = jnp.array([0, -1, COUNT, 1, 1000], jnp.int32)
    got = jax.jit(product)(X, TABLE, index)
    assert jnp.isnan(got).all((1, 2)).tolist() == [False, True, True, False, True]
    assert jnp.isfinite(got[jnp.array([0, 3])]).all()


def test_narrow_integers_and_nested_vmaps(form):
    """One table for all, one for each of the outer examples, and one x for all of them."""
    xs, tables = draw(2, EXAMPLES, TOKENS, FAN_IN), draw(2, COUNT, FAN_IN, RANK)
    index = jnp.stack([INDEX, INDEX[::-1]]).astype(jnp.int8)
    got = jax.jit(jax.vmap(product, (0, None, 0)))(xs, TABLE, index)
    expected = jnp.stack([reference(x, TABLE, i) for x, i in zip(xs, index, strict=True)])
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    got = jax.jit(jax.vmap(product))(xs, tables, index)
    pairs = zip(xs, tables, index, strict=True)
    expected = jnp.stack([reference(*each) for each in pairs])
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    shared = jax.vmap(lambda i: selected_dot(X[0], TABLE, i, **LABELS))
    repeated = jnp.stack([X[0]] * EXAMPLES)
    chex.assert_trees_all_close(shared(INDEX), reference(repeated, TABLE, INDEX), rtol=1e-5)
    gradient = jax.grad(
        lambda x: (jax.vmap(lambda i: selected_dot(x, TABLE, i, **LABELS))(INDEX) ** 2).sum()
    )
    expected = jax.grad(lambda x: (jnp.einsum("ti,eir->etr", x, TABLE[INDEX]) ** 2).sum())
    chex.assert_trees_all_close(gradient(X[0]), expected(X[0]), rtol=1e-4, atol=1e-4)


def choose(examples, tokens, count, balance=24, **sizes):
    sizes = {"e": examples, "t": tokens, ENTRY: count, "in": 576, "r": 16} | sizes
    return choose_form(*(BATCHED[name] for name in ("xl", "yl", "il", "out")), sizes, balance)


def test_the_form_is_chosen_by_counting():
    assert choose(1, 1, 64) == "gather"  # one copy against 64 products
    assert choose(64, 1, 8) == "mask_output"  # 64 copies against 8 products
    assert choose(64, 128, 8) == "gather"  # many tokens for each copy
    assert choose(64, 1, 8, **{"in": 16, "r": 576}) == "mask_input"
    # an accelerator multiplies more in the time of a read, so its masks pay for more adapters
    assert choose(64, 8, 16) == "gather"
    assert choose(64, 8, 16, balance=128) == "mask_output"


def test_what_no_mask_can_do_is_gathered():
    sizes = {"e": 64, "t": 1, ENTRY: 2, "in": 576, "r": 16}
    labels = dict(BATCHED)
    for changed in ({"il": ()}, {"xl": ("t", "in")}, {"yl": ("e", *LABELS["yl"])}):
        other = labels | changed
        assert choose_form(*(other[n] for n in ("xl", "yl", "il", "out")), sizes, 24) == "gather"

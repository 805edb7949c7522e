"""Weights led through structural operations to a product: sliced, joined, indexed, reshaped.

Every test compares the lifted function with the same function on the merged tree: its value, the
gradient of every factor and the directional derivative, with no weight materialized unless the
test says so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal
from small_weights import assert_agrees, both_bases, node, quantized, small_blocks  # noqa: F401

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


# Reshapes


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 6)])
@pytest.mark.parametrize("on_codes", [False, True])
def test_a_reshape_that_splits_the_stack_axis(shape, on_codes):
    base = both_bases(normal(*shape), (1,), (0,))[on_codes]
    halves = (2, 2, *shape[1:])
    x = normal(3, shape[1], seed=9)
    fn = lambda p, x: (x @ p["w"].reshape(halves)[1, 0], x @ p["w"].reshape(halves)[0, 1])
    assert_agrees(fn, {"w": base}, {"w": node(shape, (1,), (2,), (0,))}, x)


@pytest.mark.parametrize("on_codes", [False, True])
def test_a_reshape_that_splits_fan_in(on_codes):
    base = both_bases(normal(16, 6), (0,))[on_codes]
    fn = lambda p, x: jnp.einsum("bij,ijo->bo", x, p["w"].reshape(4, 4, 6))
    assert_agrees(fn, {"w": base}, {"w": node((16, 6), (0,), (1,))}, normal(3, 4, 4, seed=9))


# Slices at run time


@pytest.mark.parametrize("start", [-5, -1, 9])
def test_dynamic_slices_are_clamped_as_jax_clamps_them(start):
    """A start below zero is one from the end in jnp's indexing alone; lax clamps it."""

    def fn(p, x):
        by_index = x @ p["w"][jnp.int32(start)]
        options = {"slice_sizes": (1, 6, 5), "allow_negative_indices": False}
        traced = lax.add(jnp.int32(start), jnp.int32(0))
        return by_index, x @ lax.dynamic_slice(p["w"], (traced, 0, 0), **options)[0]

    lora = {"w": node((4, 6, 5), (1,), (2,), (0,))}
    for base in both_bases(normal(4, 6, 5), (1,), (0,)):
        assert_agrees(fn, {"w": base}, lora, normal(3, 6, seed=9))


# Stack axes that a vmap outside of the lifted function takes away


def vmapped_over(axis, stack, shape, fan_in, fan_out, fn, x):
    """vmap of the lifted function over an axis of the weight, and that axis of its factors."""
    leaf, adapter = normal(*shape), node(shape, fan_in, fan_out, stack)
    at = stack.index(axis)
    axes = lowrank.Adapted(axis, jax.tree.map(lambda _: at, adapter))
    live = jax.vmap(lowrank.lift(fn, fallback="raise"), ({"w": axes}, None))
    merged = lowrank.merge({"w": leaf}, {"w": adapter})
    want = jax.vmap(fn, ({"w": axis}, None))(merged, x)
    got = live(lowrank.combine({"w": leaf}, {"w": adapter}), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 2])
def test_which_stack_axis_a_vmap_took_away_is_told_by_the_sizes(axis):
    form = {0: "bi,iso->bso", 2: "bi,sio->bso"}[axis]
    fn = lambda p, x: jnp.einsum(form, x, p["w"])
    vmapped_over(axis, (0, 2), (3, 4, 2, 5), (1,), (3,), fn, normal(2, 4, seed=9))


@pytest.mark.parametrize("axis", [0, 2])
def test_where_the_sizes_do_not_tell_it_is_refused(axis):
    """Sizes of 3, 3, 2: without axis 2 the adapter could as well be one without axis 0."""
    form = {0: "bi,iso->bso", 2: "bi,sio->bso"}[axis]
    fn = lambda p, x: jnp.einsum(form, x, p["w"])
    size = {0: (2, 3, 3, 5), 2: (3, 3, 2, 5)}[axis]
    with pytest.raises(lowrank.AxesError, match="do not tell which stack axis"):
        vmapped_over(axis, (0, 2), size, (1,), (3,), fn, normal(2, 3, seed=9))


@pytest.mark.parametrize("axis", [0, 2])
def test_codes_that_lost_an_axis_other_than_the_first_are_refused(axis):
    """Blocks run along axis 1: the codes are [stack, blocks, elements, stack, out]."""
    leaf = quantized(normal(3, 4, 2, 5), (1,), (0, 2))
    at = {0: 0, 2: 3}[axis]
    axes = jax.tree.map(lambda part: at if part.ndim == 5 else at - (at > 1), leaf)
    fn = lambda p, x: jnp.einsum({0: "bi,iso->bso", 2: "bi,sio->bso"}[axis], x, p["w"])
    live, x = jax.vmap(lowrank.lift(fn), ({"w": axes}, None)), normal(2, 4, seed=9)
    if axis:
        with pytest.raises(lowrank.TreeError, match="took away an axis of the weight"):
            live({"w": leaf}, x)
    else:
        want = jax.vmap(fn, (0, None))({"w": lowrank.dequantize({"w": leaf})["w"]}, x)
        np.testing.assert_allclose(live({"w": leaf}, x), want, rtol=1e-5, atol=1e-4)


def test_neighboring_stack_axes_are_alike():
    fn = lambda p, x: jnp.einsum("bi,sio->bso", x, p["w"])
    for axis in (0, 1):
        vmapped_over(axis, (0, 1), (3, 3, 3, 5), (2,), (3,), fn, normal(2, 3, seed=9))


def lookups(**options):
    return lambda p, ids: jnp.take(p["t"], ids, axis=0, **options)


# Dropout


@pytest.mark.parametrize("form", ["vmap", "einsum", "transposed"])
@pytest.mark.parametrize("dora", [False, True])
def test_stacked_layers_on_one_input_have_masks_of_their_own(form, dora):
    fns = {
        "vmap": lambda p, x: jax.vmap(lambda w: x @ w)(p["s"]),
        "einsum": lambda p, x: jnp.einsum("bi,lio->lbo", x, p["s"]),
        "transposed": lambda p, x: jnp.einsum("lio,bi->lbo", p["s"], x),
    }
    one = node((1, 6, 5), (1,), (2,), (0,), dora=dora)
    lora = {"s": jax.tree.map(lambda leaf: jnp.tile(leaf, (3,) + (1,) * (leaf.ndim - 1)), one)}
    x, base = normal(4, 6, seed=9), {"s": jnp.tile(normal(1, 6, 5), (3, 1, 1))}
    lifted = lowrank.lift(fns[form], fallback="raise")
    dropped = lambda key, rate: lifted(lowrank.combine(base, lora, dropout=rate, key=key), x)
    whole = lambda: lifted(lowrank.combine(base, lora), x)
    ys = np.asarray(jax.jit(dropped, static_argnums=1)(jax.random.key(0), 0.5))
    for i in range(3):
        assert np.any(ys[i] != ys[i - 1]), "two layers have one mask"
    keys = jax.random.split(jax.random.key(1), 2000)
    ys, want = jax.jit(lambda: (jax.vmap(lambda key: dropped(key, 0.25))(keys), whole()))()
    ys = np.asarray(ys, np.float64)
    error = np.abs(ys.mean(0) - np.asarray(want))
    assert np.all(error <= 5 * ys.std(0) / np.sqrt(len(keys)) + 1e-5)


# Padding


def test_nothing_of_a_weight_is_padded():
    fn = lambda p, x: x @ jnp.pad(p["w"][:, :0], ((0, 0), (1, 2)), constant_values=0.5)
    got = assert_agrees(fn, {"w": normal(8, 6)}, {"w": node((8, 6), (0,), (1,))}, normal(3, 8))
    assert got[0][0].shape == (3, 3)


def test_padding_alone_is_left_of_a_weight():
    def fn(p, x):
        padded = jnp.pad(jnp.pad(p["w"][:, :2], ((1, 0), (0, 0))), ((0, 0), (0, 1)))
        return x[:, :3] * jnp.split(padded, [1])[0], jnp.split(padded, [1])[0]

    got = assert_agrees(fn, {"w": normal(8, 6)}, {"w": node((8, 6), (0,), (1,))}, normal(3, 8))
    assert not any(map(np.any, jax.tree.leaves(got[0])))

"""Weights led through structural operations to a product: sliced, joined, indexed, reshaped.

Every test compares the lifted function with the same function on the merged tree: its value, the
gradient of every factor and the directional derivative, with no weight built densely unless the
test says so.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from models import noisy, normal
from small_weights import TOLERANCE, assert_agrees, both_bases, node, quantized, small_blocks  # noqa: F401

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
def test_a_scan_in_a_scan_over_a_stack_split_in_two(on_codes):
    base = both_bases(normal(4, 8, 8, scale=0.3), (1,), (0,))[on_codes]

    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        outer = lambda x, ws: lax.scan(inner, x, ws)
        return lax.scan(outer, x, p["w"].reshape(2, 2, 8, 8))[0]

    assert_agrees(fn, {"w": base}, {"w": node((4, 8, 8), (1,), (2,), (0,))}, normal(3, 8, seed=9))


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


@pytest.mark.parametrize("ids", [(0, 3, 2), (1, 9, -7)])
def test_experts_chosen_by_index_under_vmap(ids):
    def fn(p, x):
        return jax.vmap(lambda x, i: x @ p["w"][i])(x, jnp.array(ids))

    lora = {"w": node((4, 6, 5), (1,), (2,), (0,))}
    for base in both_bases(normal(4, 6, 5), (1,), (0,)):
        assert_agrees(fn, {"w": base}, lora, normal(3, 6, seed=9))


def test_rows_chosen_by_index_under_vmap():
    fn = lambda p: jax.vmap(lambda i: p["w"][i])(jnp.array([0, 3, 2, 8]))
    lora = {"w": node((5, 6), (0,), (1,), kind="lookup")}
    for base in both_bases(normal(5, 6), (1,)):
        assert_agrees(fn, {"w": base}, lora)


# Joined weights


JOINED = {
    "along fan-out": lambda p, x: jnp.split(
        x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), 3, -1
    ),
    "along fan-in": lambda p, x: jnp.tile(x, 3) @ jnp.concatenate([p["q"], p["k"], p["v"]], 0),
    "on the left": lambda p, x: jnp.concatenate([p["q"].T, p["k"].T], 0) @ x.T,
    "stacked, one input": lambda p, x: jnp.einsum("bi,nio->bno", x, jnp.stack([p["q"], p["v"]])),
    "stacked, an input each": lambda p, x: jnp.einsum(
        "nbi,nio->nbo", jnp.stack([x, 2 * x]), jnp.stack([p["q"], p["v"]])
    ),
    "with an array": lambda p, x: x @ jnp.concatenate([p["q"], jnp.ones((8, 2)), p["k"]], 1),
    "and cut elsewhere": lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1)[:, 3:11:2],
    "and an index": lambda p, x: x @ jnp.stack([p["q"], p["k"], p["v"]])[1],
    "and padded": lambda p, x: x @ jnp.pad(jnp.hstack([p["q"], p["k"]]), ((0, 0), (2, 1))),
    "and reversed": lambda p, x: x @ lax.rev(jnp.vstack([p["q"][:5], p["k"][5:]]), (0, 1)),
    "in an inner jit": lambda p, x: jax.jit(lambda w, x: x @ w)(jnp.hstack([p["q"], p["k"]]), x),
    "in a cond": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda w: x @ w, lambda w: -x @ w, jnp.hstack([p["q"], p["k"]])
    ),
    "in a loop": lambda p, x: lax.scan(
        lambda h, _: (jnp.tanh(h @ jnp.hstack([p["q"][:, :4], p["k"][:, 4:]])), None), x, None, 2
    )[0],
    "joined, then scanned over": lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["q"], p["k"], p["v"]])
    )[0],
}


# With DoRA and on codes, one for each way in which a product can take the axis joined along, and
# one loop; the rest is tried by `pytest -m slow`.
WAYS = {"along fan-out", "along fan-in", "stacked, an input each", "joined, then scanned over"}


def joined():
    for kind in ("dense", "DoRA", "codes"):
        for name in JOINED:
            slow = () if kind == "dense" or name in WAYS else (pytest.mark.slow,)
            yield pytest.param(name, kind, marks=slow, id=f"{kind}, {name}")


@pytest.mark.parametrize(("name", "kind"), [*joined()])
def test_joined_weights_stay_factored(name, kind):
    leaves = {k: normal(8, 8, seed=i, scale=0.4) for i, k in enumerate("qkv")}
    lora = {k: node((8, 8), (0,), (1,), seed=i, dora=kind == "DoRA") for i, k in enumerate("qkv")}
    base = {k: quantized(leaf, (0,)) for k, leaf in leaves.items()} if kind == "codes" else leaves
    assert_agrees(JOINED[name], base, lora, normal(4, 8, seed=9))


@pytest.mark.parametrize("dora", [False, True])
def test_joined_experts_and_kernels(dora):
    options = {"dora": dora}
    experts = {k: normal(3, 4, 6, seed=i) for i, k in enumerate("gu")}
    lora = {k: node((3, 4, 6), (1,), (2,), (0,), seed=i, **options) for i, k in enumerate("gu")}
    sizes = jnp.array([2, 0, 3], jnp.int32)
    fn = lambda p, x: lax.ragged_dot(x, jnp.concatenate([p["g"], p["u"]], 2), sizes)
    assert_agrees(fn, experts, lora, normal(5, 4, seed=9))
    kernels = {k: normal(3, 4, 6, seed=i) for i, k in enumerate("gu")}
    options["kind"] = "conv"
    lora = {k: node((3, 4, 6), (0, 1), (2,), seed=i, **options) for i, k in enumerate("gu")}

    def conv(p, x):
        kernel = jnp.concatenate([p["g"], p["u"]], 2)
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    assert_agrees(conv, kernels, lora, normal(2, 5, 4, seed=9))


def test_of_joined_weights_the_base_is_one_product_with_dora_too():
    """[4, 8] times [8, 24], and for each part two thin ones."""
    leaves = {k: normal(8, 8, seed=i, scale=0.4) for i, k in enumerate("qkv")}
    lora = {k: node((8, 8), (0,), (1,), seed=i, dora=True) for i, k in enumerate("qkv")}
    tree, x = lowrank.combine(leaves, lora), normal(4, 8, seed=9)
    text = jax.jit(lowrank.lift(JOINED["along fan-out"])).lower(tree, x).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert sum("-> tensor<4x24xf32>" in line for line in dots) == 1
    assert not any("tensor<4x8xf32>, tensor<8x8xf32>" in line for line in dots)


@pytest.mark.parametrize("dora", [False, True])
def test_joined_weights_have_the_masks_of_each(dora):
    leaves = {k: normal(8, 8, seed=i, scale=0.4) for i, k in enumerate("qk")}
    lora = {k: node((8, 8), (0,), (1,), seed=i, dora=dora) for i, k in enumerate("qk")}
    key, x = jax.random.key(5), normal(4, 8, seed=9)
    apart = lambda p, x: jnp.concatenate([x @ p["q"], x @ p["k"]], 1)
    joined = lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1)
    summed = lambda p, x: x @ p["q"] + x @ p["k"]
    along_fan_in = lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["q"], p["k"]], 0)

    def run(fn, lora):
        tree = lowrank.combine(leaves, lora, scale=0.7, dropout=0.5, key=key)
        return lowrank.lift(fn, fallback="raise")(tree, x)

    both = jax.jit(lambda lora: [run(fn, lora) for fn in (joined, apart, along_fan_in, summed)])
    joined, apart, along_fan_in, summed = both(lora)
    chex.assert_trees_all_close(joined, apart, atol=TOLERANCE)
    chex.assert_trees_all_close(along_fan_in, summed, atol=TOLERANCE)
    assert np.abs(joined - x @ jnp.hstack([*leaves.values()])).max() > 0.1


# Loops over any stack axis


def kinds_with_and_without_remat():
    default = {("dense", False), ("DoRA", False), ("nf4", True), ("int8", False), ("double", False)}
    for kind in ("dense", "DoRA", "nf4", "int8", "uint8", "double"):
        for remat in (False, True):
            slow = () if (kind, remat) in default else (pytest.mark.slow,)
            yield pytest.param(kind, remat, marks=slow)


@pytest.mark.parametrize(("kind", "remat"), [*kinds_with_and_without_remat()])
def test_a_scan_over_the_middle_axis(kind, remat):
    leaf = normal(8, 3, 8, scale=0.4)
    options = {
        "nf4": {}, "int8": {"format": "int8"}, "uint8": {"packing": "uint8"},
        "double": {"double_quant": True},
    }  # fmt: skip
    base = quantized(leaf, (0,), (1,), **options[kind]) if kind in options else leaf

    def fn(p, x):
        layer = lambda x, w: (jnp.tanh(x @ w) @ w.T, None)
        return lax.scan(jax.checkpoint(layer) if remat else layer, x, jnp.moveaxis(p["w"], 1, 0))[0]

    lora = {"w": node((8, 3, 8), (0,), (2,), (1,), dora=kind == "DoRA")}
    assert_agrees(fn, {"w": base}, lora, normal(3, 8, seed=9))
    if kind in options:
        quiet = lambda p, x: lowrank.lift(fn, fallback="raise")(p, x)
        got, want = jax.jit(lambda p, x: (quiet(p, x), fn(lowrank.dequantize(p), x)))(
            {"w": base}, normal(3, 8, seed=9)
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", ["split", "heads", "inner scan", "index"])
def test_a_scan_over_the_middle_axis_of_codes_and_what_a_layer_does_then(last):
    base = quantized(normal(8, 2, 3, 8, scale=0.4), (0,), (1, 2))
    steps = {
        "split": lambda x, w: x @ jnp.split(w[:, 0], 2, 1)[1] @ jnp.full((4, 8), 0.1),
        "heads": lambda x, w: (
            0.3 * jnp.einsum("bi,inho->bnho", x, w.reshape(8, 3, 2, 4)).sum(1).reshape(-1, 8)
        ),
        "inner scan": lambda x, w: lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(w, 1, 0)
        )[0],
        "index": lambda x, w: x @ lax.dynamic_index_in_dim(w, 2, 1, keepdims=False),
    }
    fn = lambda p, x: lax.scan(
        lambda x, w: (jnp.tanh(steps[last](x, w)), None), x, jnp.moveaxis(p["w"], 1, 0)
    )[0]
    lora = {"w": node((8, 2, 3, 8), (0,), (3,), (1, 2))}
    assert_agrees(fn, {"w": base}, lora, normal(3, 8, seed=9))


def test_a_scan_over_the_middle_axis_takes_the_memory_of_the_leading_one(full_compile):
    def temporaries(base, fn):
        lora = {"w": node(base.shape, *axes)}
        loss = lambda lora, base, x: lowrank.lift(fn, fallback="raise")(
            lowrank.combine(base, lora), x
        ).sum()
        step = jax.jit(jax.grad(loss)).lower(lora, {"w": base}, normal(8, 256))
        return step.compile().memory_analysis().temp_size_in_bytes

    step = lambda h, w: (jnp.tanh(h @ w), None)
    shape, found = (4, 256, 256), {}
    for name, at in {"leading": 0, "middle": 1, "last": 2}.items():
        axes = [(1,), (2,), (0,)] if at == 0 else [(0,), (2 if at == 1 else 1,), (at,)]
        leaf = jnp.moveaxis(normal(*shape, scale=0.1), 0, at)
        base = quantized(leaf, axes[0], axes[2], block_size=64, packing="uint8")
        fn = lambda p, x, at=at: lax.scan(step, x, jnp.moveaxis(p["w"], at, 0))[0]
        found[name] = temporaries(base, fn)
    # plain scales of the whole stack, 4 bytes for each 64 weights, are decoded outside of the loop
    slack = 1.05 * found["leading"] + 4 * np.prod(shape) / 64
    assert max(found.values()) <= slack, found


# Weights under shard_map


def test_a_weight_that_a_shard_map_lays_out_otherwise():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = lambda w, i, o: jax.shard_map(lambda w: w, mesh=mesh, in_specs=i, out_specs=o)(w)
    base, lora = {"w": normal(8, 6)}, {"w": node((8, 6), (0,), (1,))}
    fn = lambda p, x: x @ mapped(p["w"], P("a", "b"), P("b", "a"))
    assert_agrees(fn, base, lora, normal(3, 8, seed=9), fallback="silent")
    kept = lambda p, x: x @ mapped(p["w"], P("a"), P("a", None))
    assert_agrees(kept, base, lora, normal(3, 8, seed=9))


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


# Look-ups beyond the table


def lookups(**options):
    return lambda p, ids: jnp.take(p["t"], ids, axis=0, **options)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "scaled"])
def test_masked_ids_beyond_the_table_have_no_gradient(method):
    ids, mask = jnp.array([1, 6]), jnp.array([True, False])
    fn = lambda p, s: jnp.where(mask[:, None], jnp.take(p["t"], ids, axis=0), 0.0)
    params = {"t": normal(6, 4)}
    config = lowrank.LoraConfig(
        rank=2, targets="t", method="ia3" if method == "ia3" else "lora", dora=method == "dora"
    )
    plan = lowrank.plan(fn, params, 1.0)
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    lora = noisy(lora)

    def run(f):
        loss = lambda lora, scale: jnp.sum(jnp.sin(f(lora, scale)))
        return jax.grad(loss, (0, 1))(lora, 0.7)

    live = lambda lora, s: lowrank.lift(fn, fallback="raise")(
        lowrank.combine(base, lora, scale=s), 1.0
    )
    merged = lambda lora, s: fn(lowrank.merge(base, lora, scale=s), 1.0)
    got, want = jax.device_get(jax.jit(lambda: (run(live), run(merged)))())
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("mode", [None, "clip", "fill"])
@pytest.mark.parametrize("dora", [False, True])
def test_ids_out_of_range_have_the_gradient_that_jax_gives_them(mode, dora):
    """In default indexing JAX reads a row that is there, and drops its cotangent."""
    fn = lambda p: jnp.nan_to_num(p["t"].at[jnp.array([1, 9, -8, 5])].get(mode=mode))
    lora = {"t": node((6, 4), (0,), (1,), kind="lookup", dora=dora)}
    for base in both_bases(normal(6, 4), (1,)):
        assert_agrees(fn, {"t": base}, lora)


def test_trained_rows_out_of_range_have_the_gradient_that_jax_gives_them():
    params = {"t": normal(6, 4), "w": normal(4, 4)}
    fn = lambda p: p["t"][jnp.array([1, 9, 5])] @ p["w"]
    config = lowrank.LoraConfig(rank=2, targets="w", train_rows={"t": [5, 1]})
    base, lora = lowrank.init(jax.random.key(0), params, config)
    assert_agrees(fn, base, noisy(lora))


# Dtypes


def test_a_complex_input_keeps_its_imaginary_part():
    x = lax.complex(normal(3, 6, seed=8), normal(3, 6, seed=9))

    def fn(p, x):
        y = lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
        return y.real, y.imag

    for dora in (False, True):
        lora = {"w": node((6, 5), (0,), (1,), dora=dora)}
        for base in both_bases(normal(6, 5), (0,)):
            fallback = "raise" if isinstance(base, jax.Array) else "silent"
            assert_agrees(fn, {"w": base}, lora, x, fallback=fallback)


def test_a_float64_weight_with_float32_factors_is_merged_in_float64():
    with jax.enable_x64(True):
        w = np.random.default_rng(0).standard_normal((6, 5))
        lora = {"w": node((6, 5), (0,), (1,))}
        delta = 1.5 * np.asarray(lora["w"].a, np.float64) @ np.asarray(lora["w"].b, np.float64)
        merged = lowrank.merge({"w": jnp.asarray(w)}, lora)["w"]
        assert merged.dtype == np.float64
        np.testing.assert_allclose(merged, w + delta, rtol=0, atol=1e-14)
        live = lowrank.lift(lambda p, x: x @ p["w"])(
            lowrank.combine({"w": jnp.asarray(w)}, lora), jnp.eye(6)
        )
        np.testing.assert_allclose(live, w + delta, rtol=0, atol=1e-14)


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


# Found by reading: each is also a step or an end of the random programs (tests/support/programs.py)


def test_joined_weights_in_a_ragged_product_over_the_contracted_axis():
    numbers = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ())
    sizes = jnp.array([3, 7, 6], jnp.int32)
    for axis, width in ((0, 16), (1, 8)):
        fn = lambda p, x, axis=axis: lax.ragged_dot_general(
            x, jnp.concatenate([p["w"], p["v"]], axis), sizes, numbers
        )
        base = {name: quantized(normal(8, 8, seed=i), (0,)) for i, name in enumerate("wv")}
        x = normal(3, width, seed=9)
        live = lowrank.lift(fn, fallback="silent")
        want = fn(lowrank.dequantize(base), x)
        chex.assert_trees_all_close(live(base, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1])
def test_a_loop_that_puts_a_weight_into_its_carry(length):
    leaf = normal(8, 6)
    loop = lambda w, c: lax.scan(lambda _, __: (w, None), c, None, length=length)[0]
    fn = lambda p, x: x @ jax.jit(loop)(p["w"], jnp.ones((8, 6)))
    got = assert_agrees(
        fn, {"w": leaf}, {"w": node((8, 6), (0,), (1,))}, normal(3, 8), fallback="silent"
    )
    assert np.any(np.asarray(got[1]["w"].a)) == bool(length)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("number", [1e6, 1e-8, 0.1])
@pytest.mark.parametrize("traced", [False, True])
def test_a_scaled_weight_with_narrow_factors(dtype, number, traced):
    own = node((8, 6), (0,), (1,))
    lora = {"w": dataclasses.replace(own, a=own.a.astype(dtype), b=own.b.astype(dtype))}
    base, x = {"w": normal(8, 6)}, normal(3, 8, seed=9)
    fn = lambda p, x, s: ((x @ (p["w"] * s)) / s, x @ (p["w"] / s) * s)
    wrap = lambda f: jax.jit(lambda lora, s: f(lora, x, s)) if traced else lambda l, s: f(l, x, s)
    live = wrap(lambda lora, x, s: lowrank.lift(fn)(lowrank.combine(base, lora), x, s))
    want = wrap(lambda lora, x, s: fn(lowrank.merge(base, lora), x, s))
    s = jnp.float32(number)
    chex.assert_trees_all_close(live(lora, s), want(lora, s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1e6, 1e-8])
@pytest.mark.parametrize("reshaped", [False, True])
def test_codes_that_are_scaled_after_a_narrow_dtype(number, reshaped):
    turn = lambda w: lax.rev(w, (0, 1)) if reshaped else w
    fn = lambda p, x: x @ (turn(p["w"]).astype(jnp.float16).astype(jnp.float32) * number)
    base, x = {"w": quantized(normal(8, 6), (0,))}, normal(3, 8, seed=9)
    want = fn(lowrank.dequantize(base), x)
    assert np.all(np.isfinite(want))
    got = lowrank.lift(fn, fallback="silent")(base, x)
    chex.assert_trees_all_close(got, want, rtol=1e-3)


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

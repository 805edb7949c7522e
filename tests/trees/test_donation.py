"""A leaf that quantize was given for good goes when nobody needs its buffer, and not before."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

QUANT = lowrank.QuantConfig(targets=re.compile(r"(.*/)?[vw]"))


def array(seed=0, shape=(64, 8)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def on_many():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(array(), jax.NamedSharding(mesh, jax.P(None, "d")))


def shared(x):
    """Another array of the same buffer."""
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def buffers(tree):
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
    return {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in shards}


def alike(x):
    """How trees can hold an array and another of its buffer: the tree, what is gone, what stays."""
    other = shared(x)
    return {
        "quantized twice": ({"v": x, "w": x}, "vw", ""),
        "quantized twice, two arrays": ({"v": x, "w": other}, "vw", ""),
        "and returned": ({"b": x, "w": x}, "", "bw"),
        "and returned, after it": ({"w": x, "z": x}, "", "wz"),
        "and returned, two arrays": ({"w": x, "z": other}, "", "wz"),
        "twice, and returned": ({"a": x, "v": other, "w": x}, "", "avw"),
        "twice, and others": ({"v": array(1), "w": x, "z": array(2), "a": {"w": other}}, "vw", "z"),
        "as NumPy": ({"v": np.asarray(x), "w": x}, "w", "v"),
    }  # fmt: skip


@pytest.mark.parametrize("make", [array, on_many])
@pytest.mark.parametrize("case", alike(array()))
def test_donated_leaves_that_share_a_buffer(case, make):
    params, gone, stays = alike(make())[case]
    before = jax.tree.map(np.array, params)
    want = lowrank.quantize(params, QUANT)
    got = lowrank.quantize(params, QUANT, donate=True)
    chex.assert_trees_all_equal(got, want)
    assert all(params[key].is_deleted() for key in gone)
    if case == "twice, and others":
        assert params["a"]["w"].is_deleted()
    kept = {key: params[key] for key in stays}
    chex.assert_trees_all_equal(kept, {key: before[key] for key in stays})
    for key in set(stays) - {*"vw"}:
        assert got[key] is params[key]


def test_nothing_returned_shares_a_buffer_with_what_was_given():
    x = array()
    params = {"w": x, "deep": {"w": array(1), "b": array(2)}, "v": shared(x)}
    dense = buffers([params["w"], params["v"], params["deep"]["w"]])
    assert len(dense) == 2
    for donate in (False, True):
        got = lowrank.quantize(params, QUANT, donate=donate)
        assert got["deep"]["b"] is params["deep"]["b"]
        kept = [leaf for leaf in jax.tree.leaves(got) if leaf is not got["deep"]["b"]]
        assert donate or not buffers(kept) & dense
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(got))


def test_a_leaf_that_a_sharded_array_has_a_part_of_stays():
    x = on_many()
    part = x.addressable_shards[1].data
    lowrank.quantize({"w": x, "z": part}, QUANT, donate=True)
    assert not x.is_deleted()
    assert np.isfinite(part).all()


def test_donated_leaves_go_before_the_next_is_read(monkeypatch):
    """So that memory is that of one leaf."""
    from lowrank_jax._trees import quantize

    params = {"v": array(), "w": array(1)}
    encode = quantize.quantize_leaf
    seen = []

    def spy(path, leaf, *rest):
        seen.append((path, params["v"].is_deleted()))
        return encode(path, leaf, *rest)

    monkeypatch.setattr(quantize, "quantize_leaf", spy)
    lowrank.quantize(params, QUANT, donate=True)
    assert seen == [("v", False), ("w", True)]


def test_under_jit_nothing_is_donated():
    params = {"w": array(), "v": np.asarray(array(1))}
    want = lowrank.quantize(params, QUANT)
    donating = lambda params: lowrank.quantize(params, QUANT, donate=True)
    chex.assert_trees_all_equal(jax.jit(donating)(params), want)
    chex.assert_trees_all_equal(jax.jit(lambda: donating(params))(), want)  # held, not passed
    chex.assert_trees_all_equal(jax.jit(lambda: lowrank.quantize(params, QUANT))(), want)
    assert not params["w"].is_deleted()
    jax.jit(donating, donate_argnums=0)({"w": params["w"]})


MISTAKES = {
    "a NaN": (array(1).at[3, 4].set(np.nan), lowrank.TreeError, "w: 1 of 512 values"),
    "no values": (jnp.zeros((0, 4)), lowrank.AxesError, "no values to quantize"),
    "too large": (jnp.full((64, 64), 3e38), lowrank.ConfigError, "pass double_quant=False"),
}


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_nothing_is_gone_when_an_error_is_raised(mistake, kind):
    wrong, error, words = MISTAKES[mistake]
    params = {"v": array(), "w": kind(wrong), "b": array(2)}
    with pytest.raises(error, match=words):
        lowrank.quantize(params, QUANT, donate=True)
    arrays = [leaf for leaf in params.values() if isinstance(leaf, jax.Array)]
    assert not any(leaf.is_deleted() for leaf in arrays)

"""Adapters whose initializer changed the base are exported onto the original weight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import noisy
from peft_files import (
    LLAMA,
    drawn,
    load,
    nodes_of,
    ones,
    params_of,
    plan_of,
    save,
)

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def moved(dtype):
    params = jax.tree.map(lambda x: np.asarray(x, dtype), params_of(True))
    config = lowrank.LoraConfig(rank=3, alpha=5, targets="all-linear")
    pissa = lowrank.initializers.pissa
    init = lambda params: lowrank.init(
        jax.random.key(0), params, config, plan=plan_of(True), initializer=pissa
    )
    base, lora = jax.jit(init)(params)
    return params, base, noisy(lora), config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moved_weight_is_exported_onto_the_original(dtype, tmp_path):
    params, base, lora, config = moved(dtype)
    save(tmp_path, lora, config, base=base, original=params, names=LLAMA)
    again, difference, _ = load(tmp_path, params, plan=plan_of(True), names=LLAMA)
    for path, node in nodes_of(difference).items():
        mine = nodes_of(lora)[path]
        assert (node.rank, node.scale) == (2 * mine.rank, mine.scale), path
        chex.assert_trees_all_equal(np.asarray(node.a)[..., :3], mine.a)
        chex.assert_trees_all_equal(np.asarray(node.b)[:, :3], mine.b)
    merge = jax.jit(lambda *pairs: [lowrank.merge(*pair) for pair in pairs])
    merged = merge((again, difference), (base, lora))
    step = float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(*merged, atol=4 * step, rtol=step)


def test_an_untouched_leaf_is_exported_as_it_is(tmp_path):
    params = params_of(False)
    moves = {"params/layers_0/mlp/up_proj/kernel": lowrank.initializers.pissa}
    config = lowrank.LoraConfig(rank=3, targets="**/mlp/*/kernel")
    base, lora = lowrank.init(jax.random.key(0), params, config, initializer=moves)
    save(tmp_path, lora, config, base=base, original=params, names=LLAMA)
    _, again, _ = load(tmp_path, params, names=LLAMA)
    ranks = {path: node.rank for path, node in nodes_of(again).items()}
    assert ranks.pop("params/layers_0/mlp/up_proj/kernel") == 6
    assert set(ranks.values()) == {3}


def test_where_moved_weight_is_to_go_must_be_said(tmp_path):
    _, base, lora, config = moved("float32")
    said = r"(?s)base and original=params.*original=base.*params/layers/mlp/down_proj/kernel"
    for given in ({}, {"base": base}, {"for_serving": True}):
        with pytest.raises(lowrank.CheckpointError, match=said):
            save(tmp_path, lora, config, names=LLAMA, **given)
    assert not list(tmp_path.iterdir())
    save(tmp_path, lora, config, base=base, original=base, names=LLAMA)
    _, again, _ = load(tmp_path, base, plan=plan_of(True), names=LLAMA)
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(lora))


@pytest.mark.parametrize("turns", [1, 2])
def test_after_one_turn_of_loftq_the_base_is_the_weights_quantized(turns, tmp_path):
    params = {"w": {"kernel": np.array(drawn(np.random.default_rng(0), 64, 8))}}
    quant = lowrank.QuantConfig(targets="w/kernel")
    config = lowrank.LoraConfig(rank=2, targets="w/kernel")
    start = lowrank.initializers.loftq(quant, iterations=turns)
    base, lora = lowrank.init(jax.random.key(0), params, config, initializer=start)
    assert lora["w"]["kernel"].base_modified
    plain = lowrank.quantize(params, quant)
    same = jax.tree.map(lambda one, other: bool(np.equal(one, other).all()), base, plain)
    assert all(jax.tree.leaves(same)) == (turns == 1)
    save(tmp_path, lora, config, base=base, original=base)


def test_bases_that_no_adapter_can_tell_apart_are_refused(tmp_path):
    params, base, lora, config = moved("float32")
    give = lambda **kwargs: save(tmp_path, lora, config, names=LLAMA, **kwargs)
    with pytest.raises(lowrank.CheckpointError, match="original is given without base"):
        give(original=params)
    noise = noisy(base, scale=1.0)
    with pytest.raises(lowrank.CheckpointError, match=r"differs between base and original"):
        give(base=noise, original=params)
    path = "params/layers/mlp/up_proj/kernel"
    noise = jax.tree_util.tree_map_with_path(
        lambda keys, x, y: y if "/".join(k.key for k in keys) == path else x, base, noise
    )
    with pytest.raises(lowrank.CheckpointError, match=f"{path}.*more than a product of rank 3"):
        give(base=noise, original=params)
    with pytest.raises(lowrank.TreeError, match="have different structures"):
        give(base=base["params"], original=params)
    assert not list(tmp_path.iterdir())


def one(**fields):
    fields = {"a": ones(4, 2), "b": ones(2, 3), **fields}
    return {"layers": {"q": {"kernel": lowrank.LowRank(**fields)}}}

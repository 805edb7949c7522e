"""For serving: one rank and scale for all, and the rest folded into the base."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import noisy
from peft_files import (
    FILES,
    LLAMA,
    config_of,
    drawn,
    load,
    nodes_of,
    params_of,
    plan_of,
    save,
)

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_for_serving_one_rank_and_one_scale_hold_for_all(tmp_path):
    path = FILES / "rslora-patterns"
    base, lora, config = load(path, params_of(False), plan=plan_of(False), names=LLAMA)
    assert len({(node.rank, node.scale) for node in nodes_of(lora).values()}) > 2
    save(tmp_path, lora, config, names=LLAMA, for_serving=True)
    written = config_of(tmp_path)
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({}, {})
    assert written["use_rslora"] is False
    _, again, _ = load(tmp_path, params_of(False), plan=plan_of(False), names=LLAMA)
    merged = jax.jit(lambda *adapters: [lowrank.merge(base, lora) for lora in adapters])
    chex.assert_trees_all_close(*merged(again, lora), atol=1e-7)


@pytest.mark.parametrize(("case", "said"), [("dora", "kernel: DoRA"), ("saved", "trained whole")])
def test_for_serving_refuses_what_servers_have_not(case, said, tmp_path):
    _, lora, config = load(FILES / case, params_of(True), plan=plan_of(True), names=LLAMA)
    with pytest.raises(lowrank.CheckpointError, match=said):
        save(tmp_path, lora, config, names=LLAMA, for_serving=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantized", [False, True])
def test_servable_folds_the_rest_into_the_base(quantized, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"up": (64, 8), "down": (8, 64), "k": (3, 8, 8), "table": (9, 8), "norm": (8,)}
    params = {name: drawn(rng, *shape) for name, shape in shapes.items()}
    if quantized:
        params = lowrank.quantize(params, lowrank.QuantConfig(targets="up"))

    def fn(p, ids):
        x = p["table"][ids] * p["norm"]
        numbers = ("NHC", "HIO", "NHC")
        x = jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=numbers)
        return jnp.tanh(x @ p["down"]) @ p["up"]

    ids = np.array([[1, 2, 8, 4]])
    plan = lowrank.plan(fn, params, ids)
    make = lambda **kwargs: lowrank.init(
        jax.random.key(0), params, lowrank.LoraConfig(rank=2, alpha=3, **kwargs), plan=plan
    )[1]

    @jax.jit
    def both_kinds():
        lora = make(targets=("down", "k"), train="norm", train_rows={"table": (1, 8)})
        return {**lora, "up": make(targets="up", dora=True)["up"]}

    lora = noisy(both_kinds())
    base, kept = lowrank.peft.servable(params, lora)
    assert [name for name, node in kept.items() if node is not None] == ["down"]
    assert base["down"] is params["down"]
    lifted = lowrank.lift(fn)
    live = lambda base, lora: lifted(lowrank.combine(base, lora), ids)
    got, wanted = jax.jit(lambda *pairs: [live(*pair) for pair in pairs])(
        (base, kept), (params, lora)
    )
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    with pytest.raises(lowrank.TreeError, match="base holds a Adapted at"):
        lowrank.peft.servable(lowrank.combine(params, lora), lora)
    with pytest.raises(lowrank.TreeError, match="base holds a ShapeDtypeStruct at"):
        lowrank.peft.servable({**params, "norm": jax.ShapeDtypeStruct((8,), np.float32)}, lora)
    names = {"down": lowrank.names.Parameter("down")}
    save(tmp_path, kept, lowrank.LoraConfig(), names=names, for_serving=True)
    with pytest.raises(lowrank.TreeError, match=r"'down' of shape \(8, 64\), and base no such"):
        lowrank.peft.servable({"up": params["up"]}, {"down": kept["down"]})

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
from safetensors.numpy import load_file

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
    with pytest.raises(lowrank.TreeError, match="base holds an adapter at"):
        lowrank.peft.servable(lowrank.combine(params, lora), lora)
    with pytest.raises(lowrank.TreeError, match="base holds a ShapeDtypeStruct at"):
        lowrank.peft.servable({**params, "norm": jax.ShapeDtypeStruct((8,), np.float32)}, lora)
    names = {"down": lowrank.names.Parameter("down")}
    save(tmp_path, kept, lowrank.LoraConfig(), names=names, for_serving=True)
    with pytest.raises(lowrank.TreeError, match=r"'down' of shape \(8, 64\), and base no such"):
        lowrank.peft.servable({"up": params["up"]}, {"down": kept["down"]})


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", ["rslora-patterns", "dora", "saved"])
def test_tensors_are_what_save_writes_without_a_copy_to_the_host(case, scan, tmp_path):
    params, plan = params_of(scan), plan_of(scan)
    base, lora, config = load(FILES / case, params, plan=plan, names=LLAMA)
    options = {"base": base, "plan": plan, "names": LLAMA}
    save(tmp_path, lora, config, **options)
    fields = None

    @jax.jit
    def convert(lora):
        nonlocal fields
        arrays, fields = lowrank.peft.tensors(lora, config, **options)
        return arrays

    with jax.transfer_guard_device_to_host("disallow"):
        arrays = convert(lora)
    written = load_file(tmp_path / "adapter_model.safetensors")
    chex.assert_trees_all_equal(jax.device_get(arrays), written)
    assert fields == config_of(tmp_path)


@pytest.mark.parametrize("for_serving", [False, True])
def test_tensors_are_padded_to_the_ranks_of_a_server(for_serving):
    params, plan = params_of(False), plan_of(False)
    _, lora, config = load(FILES / "rslora-patterns", params, plan=plan, names=LLAMA)
    ranks = (1, 8, 16, 32)
    options = {"ranks": ranks, "for_serving": for_serving, "names": LLAMA}
    arrays, fields = lowrank.peft.tensors(lora, config, **options)
    found = {array.shape[0] for key, array in arrays.items() if "lora_A" in key}
    own = {min(r for r in ranks if r >= node.rank) for node in nodes_of(lora).values()}
    assert found == ({max(own)} if for_serving else own)
    assert fields["r"] in own
    # the padded factors are the same product
    plain, _ = lowrank.peft.tensors(lora, config, for_serving=for_serving, names=LLAMA)
    for key in [key for key in arrays if "lora_A" in key]:
        second = key.replace("lora_A", "lora_B")
        chex.assert_trees_all_close(
            arrays[second] @ arrays[key], plain[second] @ plain[key], rtol=1e-5, atol=1e-6
        )
    with pytest.raises(lowrank.CheckpointError, match="larger than every one of ranks="):
        lowrank.peft.tensors(lora, config, names=LLAMA, ranks=(1,))


def test_tensors_outlive_a_donated_adapter_and_keep_narrow_scales():
    params = {"up": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    config = lowrank.LoraConfig(rank=2, targets="**/kernel", train="**/bias")
    _, lora = lowrank.init(0, params, config)
    arrays, _ = lowrank.peft.tensors(lora, config)
    jax.jit(lambda x: jax.tree.map(jnp.sin, x), donate_argnums=0)(lora)
    assert not any(array.is_deleted() for array in arrays.values())
    b = jax.random.normal(jax.random.key(0), (2, 300)).astype(jnp.bfloat16)
    node = lambda scale: {"kernel": lowrank.LowRank(jnp.ones((4, 2), jnp.bfloat16), b, scale=scale)}
    lora = {"one": node(1.0), "two": node(1.002)}
    arrays, fields = lowrank.peft.tensors(lora, lowrank.LoraConfig(rank=2), for_serving=True)
    scale = fields["lora_alpha"] / fields["r"]
    found = scale * arrays["base_model.model.one.lora_B.weight"].astype(jnp.float32)
    ratio = found / b.T.astype(jnp.float32)
    chex.assert_trees_all_close(ratio, jnp.ones_like(ratio), rtol=1e-6)


def test_tensors_of_an_adapter_that_changed_the_base_may_be_traced():
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}}
    config = lowrank.LoraConfig(rank=2, targets="**/kernel")
    base, lora = lowrank.init(0, params, config, initializer="pissa")
    convert = lambda lora: lowrank.peft.tensors(lora, config, base=base, original=params)[0]
    chex.assert_trees_all_close(jax.jit(convert)(lora), convert(lora), rtol=1e-6)

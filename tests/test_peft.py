"""Adapters as `peft` saves them, both ways (tests/golden/make_peft_files.py)."""

import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import noisy
from test_golden_peft import flax_params
from test_golden_peft import load as llama_golden

import lowrank_jax as lowrank
from lowrank_jax._files.safetensors import TensorFile, write_tensors
from lowrank_jax._jax.paths import flatten
from lowrank_jax._nodes import is_node

FILES = Path(__file__).parent / "golden" / "peft_files"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")
LLAMA = lowrank.names.LLAMA
LLAMAS = sorted(
    path.stem for path in FILES.glob("*.npz") if path.stem.partition("-")[0] not in ("gpt2", "conv")
)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
save, load = lowrank.peft.save, lowrank.peft.load


def golden(name):
    with np.load(FILES / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def tensors_of(directory):
    with TensorFile(directory / TENSORS) as file:
        return {name: file.read(name) for name in file.entries}


def config_of(directory):
    return json.loads((directory / CONFIG).read_text())


def model(scan, tied=False):
    return llama.Llama(
        llama.LlamaConfig(
            vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48,
            tie_embeddings=tied, attention_bias=True, mlp_bias=True, scan_layers=scan,
        )
    )  # fmt: skip


BASE = llama_golden("base")
TOKENS = BASE["tokens"]


@functools.cache
def untied(scan):
    return jax.device_put(flax_params(BASE, scan))


def params_of(scan, tied=False):
    params = jax.tree.map(lambda x: x, untied(scan))
    if tied:
        del params["params"]["lm_head"]
    return params


@functools.cache
def plan_of(scan, tied=False):
    return lowrank.plan(model(scan, tied).apply, params_of(scan, tied), TOKENS)


def nodes_of(tree):
    return dict(flatten(tree, is_leaf=is_node)[0])


def assert_same(got, want):
    """Node for node, static fields too, bit for bit."""
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal_dtypes(got, want)


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert (got[key].dtype, got[key].shape) == (array.dtype, array.shape), key
        assert got[key].tobytes() == array.tobytes(), key


# Files of PEFT


def loss_of(scan, tied, base):
    lifted = lowrank.lift(model(scan, tied).apply, fallback="raise")

    def loss(lora):
        logits = lifted(lowrank.combine(base, lora), TOKENS)
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1
        )
        return -chosen.mean(), logits

    return loss


ONE_BY_ONE = ("dora", "layers", "rslora-patterns", "saved")


DIFFERENTIATED = [("rslora-patterns", False), ("dora", False), ("dora", True), ("embeddings", True)]


@functools.cache
def computed(case, scan):
    """((loss, logits), gradients or None, config) of one of PEFT's files."""
    tied = case.startswith("tied")
    params, plan = params_of(scan, tied), plan_of(scan, tied)
    base, lora, config = load(FILES / case, params, plan=plan, names=LLAMA)
    loss = loss_of(scan, tied, base)
    if (case, scan) in DIFFERENTIATED:
        return *jax.jit(jax.value_and_grad(loss, has_aux=True))(lora), config
    return jax.jit(loss)(lora), None, config


@pytest.mark.parametrize(
    ("case", "scan"), [(c, True) for c in LLAMAS] + [(c, False) for c in ONE_BY_ONE]
)
def test_pefts_files_give_pefts_logits(case, scan):
    (value, logits), *_ = computed(case, scan)
    expected = golden(case)
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-5)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)


@pytest.mark.parametrize(("case", "scan"), DIFFERENTIATED)
def test_pefts_files_give_pefts_gradients(case, scan, tmp_path):
    _, gradients, config = computed(case, scan)
    save(tmp_path, gradients, config, names=LLAMA)
    expected = {k.removeprefix("grad/"): v for k, v in golden(case).items() if "grad/" in k}
    got = tensors_of(tmp_path)
    assert got.keys() == expected.keys()
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=2e-6)


def test_conv1d_of_gpt2_is_in_out_in_torch(tmp_path):
    tensors = golden("gpt2")

    def tree_of(prefix):
        tree = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                *parents, last = key.removeprefix(prefix).split(".")[:-1]
                inner = tree
                for part in parents:
                    inner = inner.setdefault(part, {})
                inner[last] = {"kernel": value}
        return tree

    params = tree_of("base/")
    base, lora, config = load(FILES / "gpt2", params, names=lowrank.names.GPT2)
    merged = jax.jit(lowrank.merge)(base, lora)
    chex.assert_trees_all_close(merged, tree_of("merged/"), atol=1e-6)
    save(tmp_path, lora, config, names=lowrank.names.GPT2)
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    assert_same_bytes(tensors_of(tmp_path), tensors_of(FILES / "gpt2"))


def test_a_whole_conv1d_of_gpt2_is_in_out_in_torch(tmp_path):
    kernel = drawn(np.random.default_rng(0), 6, 4)
    leaf = {"kernel": lowrank.Full(kernel)}
    lora = {"h_0": {"mlp": {"c_proj": leaf}}, "lm_head": leaf}
    save(tmp_path, lora, lowrank.LoraConfig(), names=lowrank.names.GPT2)
    written = tensors_of(tmp_path)
    np.testing.assert_array_equal(
        written["base_model.model.transformer.h.0.mlp.c_proj.weight"], kernel
    )
    np.testing.assert_array_equal(written["base_model.model.lm_head.weight"], kernel.T)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), lora, is_leaf=is_node)
    assert_same(load(tmp_path, params, names=lowrank.names.GPT2)[1], lora)


CONVOLUTIONS = {
    "line": ((1,), [(1, 1)], ("NCH", "HIO", "NCH")),
    "plane": ((2, 2), [(0, 0)] * 2, ("NCHW", "HWIO", "NCHW")),
    "space": ((1, 1, 2), [(0, 0)] * 3, ("NCHWD", "HWDIO", "NCHWD")),
}


def convolve(params, inputs):
    outputs = {}
    for name, (strides, padding, numbers) in CONVOLUTIONS.items():
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        y = jax.lax.conv_general_dilated(
            inputs[name], kernel, strides, padding, dimension_numbers=numbers
        )
        outputs[name] = y + bias.reshape(-1, *[1] * len(strides))
    return outputs


@pytest.mark.parametrize("case", ["conv", "conv-dora"])
def test_convolutions_of_one_two_and_three_dimensions(case, tmp_path):
    tensors = golden(case)
    params = {
        name: {
            "kernel": np.moveaxis(tensors[f"base/{name}.weight"], (0, 1), (-1, -2)),
            "bias": tensors[f"base/{name}.bias"],
        }
        for name in CONVOLUTIONS
    }
    inputs = {name: tensors[f"input/{name}"] for name in CONVOLUTIONS}
    plan = lowrank.plan(convolve, params, inputs)
    base, lora, config = load(FILES / case, params, plan=plan)
    lifted = jax.jit(lowrank.lift(convolve, fallback="raise"))
    outputs = lifted(lowrank.combine(base, lora), inputs)
    expected = {name: tensors[f"output/{name}"] for name in CONVOLUTIONS}
    chex.assert_trees_all_close(outputs, expected, atol=1e-5)
    save(tmp_path, lora, config)
    assert_same_bytes(tensors_of(tmp_path), tensors_of(FILES / case))


# What we write


def peft_pattern(patterns, module, default):
    """peft.utils.get_pattern_key, as written there."""
    for key in patterns:
        if re.match(rf"(.*\.)?({key})$", module):
            return patterns[key]
    return default


BY_MODULE = ("rank_pattern", "alpha_pattern", "r", "lora_alpha", "target_modules")
SAME = ("lora", "rslora-patterns", "dora", "all-linear", "embeddings", "embeddings-dora")
SAME += ("bias-only", "bias-all", "saved", "bfloat16")


@pytest.mark.parametrize(
    ("case", "scan"),
    # a stack has one rank: that of rslora-patterns differs by layer
    [(c, False) for c in SAME] + [(c, True) for c in SAME if c != "rslora-patterns"],
)
def test_what_peft_saved_is_saved_as_peft_saves_it(case, scan, tmp_path):
    _, lora, config = load(FILES / case, params_of(scan), plan=plan_of(scan), names=LLAMA)
    save(tmp_path, lora, config, names=LLAMA, plan=plan_of(scan))
    theirs = tensors_of(FILES / case)
    copies = [key for key in theirs if key.endswith("base_layer.weight")]  # of what is frozen
    assert_same_bytes(tensors_of(tmp_path), {k: v for k, v in theirs.items() if k not in copies})
    ours, expected = config_of(tmp_path), config_of(FILES / case)
    assert ours.keys() == expected.keys()
    modules = {re.sub(r"\.lora_.*", "", k) for k in theirs if ".lora_" in k}
    modules = {module.removeprefix("base_model.model.") for module in modules}
    assert ours["target_modules"] == sorted(modules)
    for module in modules:
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            value = lambda c: peft_pattern(c[pattern], module, c[default])
            assert value(ours) == value(expected), module
    same = lambda c: {k: v for k, v in c.items() if k not in (*BY_MODULE, "modules_to_save")}
    assert same(ours) == {**same(expected), "exclude_modules": None}


def test_the_file_is_laid_out_as_safetensors_lays_it_out(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="pip install -e '.[dev]'")
    tensors = tensors_of(FILES / "saved")
    numpy.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with (tmp_path / "ours").open("wb") as file:
        write_tensors(file, tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def drawn(rng, *shape, dtype="float32"):
    return jax.device_put(rng.standard_normal(shape).astype(jnp.dtype(dtype)))


def ones(*shape):
    return np.ones(shape, np.float32)


def many_kinds(dtype):
    """Leaves of every kind, their adapters with scales that are no quotients of small numbers."""
    rng = np.random.default_rng(7)
    array = lambda *shape: drawn(rng, *shape, dtype=dtype)
    weights = {
        "params": {
            "embed": {"embedding": array(11, 6)},
            "layers": {
                "query": {"kernel": array(3, 6, 2, 4), "bias": array(3, 2, 4)},
                "out": {"kernel": array(3, 2, 4, 6)},
                "norm": {"scale": array(3, 6)},
            },
            "conv": {"kernel": array(3, 2, 4, 5)},
            "head": {"kernel": array(6, 7), "bias": array(7)},
        }
    }

    def fn(params, ids, image):
        p = params["params"]

        def layer(x, w):
            heads = jnp.einsum("td,dhk->thk", x, w["query"]["kernel"]) + w["query"]["bias"]
            out = jnp.einsum("thk,hkd->td", heads, w["out"]["kernel"])
            return x + out * w["norm"]["scale"], None

        x, _ = jax.lax.scan(layer, p["embed"]["embedding"][ids], p["layers"])
        y = jax.lax.conv_general_dilated(
            image, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x @ p["head"]["kernel"] + p["head"]["bias"], y

    ids, image = np.arange(4), np.ones((1, 5, 5, 4), dtype)
    plan = lowrank.plan(fn, weights, ids, image)
    config = lowrank.LoraConfig(
        rank=3,
        alpha=4.1,
        targets=["**/embedding", "**/kernel"],
        exclude="**/head/kernel",
        rank_pattern={"**/out/*": 2},
        alpha_pattern={"**/conv/*": 0.7},
        train=["**/head/kernel", "**/head/bias", "**/norm/scale", "**/query/bias"],
        factor_dtype=dtype,
        extras={"task_type": "CAUSAL_LM", "lora_dropout": 0.1, "auto_mapping": {"a": ["b", None]}},
    )
    init = lambda key: lowrank.init(key, weights, config, plan=plan)[1]
    lora = jax.eval_shape(init, jax.random.key(0))
    lora = jax.tree.map(lambda x: drawn(rng, *x.shape, dtype=x.dtype), lora)
    return weights, plan, config, weights, lora


def kinds_names(path):
    module = path.removeprefix("params/").rpartition("/")[0].replace("/", ".")
    return module.replace("layers.", "model.layers.{}.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_keeps_every_bit(dtype, tmp_path):
    weights, plan, config, base, lora = many_kinds(dtype)
    # leaves trained whole are trained in float32, and the file has the dtype of the leaf
    rounded = lambda x: x.astype(dtype).astype(x.dtype)
    lora = jax.tree.map(
        lambda node: jax.tree.map(rounded, node) if isinstance(node, lowrank.Full) else node,
        lora,
        is_leaf=is_node,
    )
    save(tmp_path, lora, config, plan=plan, names=kinds_names)
    again_base, again, found = load(tmp_path, weights, plan=plan, names=kinds_names)
    assert_same(again, lora)
    assert_same(again_base, base)
    assert (found.extras, found.factor_dtype) == (config.extras, dtype)
    assert lowrank.LoraConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert isinstance(hash(found), int)
    init = lambda key: lowrank.init(key, weights, found, plan=plan)[1]
    same = jax.eval_shape(init, jax.random.key(0))
    for path, node in nodes_of(same).items():
        if isinstance(node, lowrank.LowRank):
            wanted = nodes_of(lora)[path]
            assert (node.rank, node.scale) == (wanted.rank, wanted.scale), path
    # and the very same files again
    save(tmp_path / "second", again, found, plan=plan, names=kinds_names)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_come_back_to_the_last_bit(rslora, tmp_path):
    for rank in (1, 2, 3, 5, 7, 12, 48):
        for alpha in (1, 3, 16, 0.1, 5.3, 1e-6, 12345.678):
            config = lowrank.LoraConfig(rank=rank, alpha=alpha, rslora=rslora, targets="a/kernel")
            scale = config.scale_of(rank, alpha)
            node = lowrank.LowRank(ones(50, rank), ones(rank, 49), scale=scale)
            save(tmp_path, {"a": {"kernel": node}}, config)
            _, lora, found = load(tmp_path, {"a": {"kernel": ones(50, 49)}})
            assert lora["a"]["kernel"].scale == scale, (rank, alpha)
            assert found.scale_of(rank, found.alpha) == scale


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


# Initializers that move weight


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


# Files that are wrong


def rewritten(directory, tensors=None, **fields):
    """The golden of plain LoRA, changed."""
    directory.mkdir(exist_ok=True)
    written = tensors_of(FILES / "lora")
    with (directory / TENSORS).open("wb") as file:
        write_tensors(file, tensors(written) if tensors else written)
    config = {k: v for k, v in {**config_of(FILES / "lora"), **fields}.items() if v is not ...}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


def refusal(directory, scan=False):
    with pytest.raises(lowrank.CheckpointError) as error:
        load(directory, params_of(scan), plan=plan_of(scan), names=LLAMA)
    return " ".join(str(error.value).split())


FIELDS = {
    "peft_type": ("ADALORA", "peft_type 'ADALORA'; only 'LORA'"),
    "r": (0, "r=0: expected an integer of at least 1"),
    "lora_alpha": (math.nan, "lora_alpha=nan: expected a number above 0"),
    "rank_pattern": ({"q_proj": -1}, "rank_pattern={'q_proj': -1}: expected"),
    "alpha_pattern": ({r"(a)\1": 3}, r"alpha_pattern: the regex '(a)\\1': it has '\1', which is"),
    "use_dora": ("yes", "use_dora='yes': expected true or false"),
    "bias": ("some", "bias='some': expected 'none', 'all' or 'lora_only'"),
    "modules_to_save": ("lm_head", "modules_to_save='lm_head': expected a list of names"),
    "target_modules": (3, "target_modules=3: expected a list of names or a regex"),
    "layers_to_transform": ([0, "1"], "layers_to_transform=[0, '1']: expected an integer"),
    "trainable_token_indices": ([-1], "trainable_token_indices=[-1]: expected a list of rows"),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa': expected an initializer that"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens=[1, 2]: the adapter acts after"),
    "layer_replication": ([[0, 2]], "layer_replication=[[0, 2]]: layers are repeated"),
    "target_parameters": (["experts"], "target_parameters=['experts']: parameters of mixtures"),
    "use_qalora": (True, "use_qalora=True: inputs are pooled"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora={'nblocks': 2}: factors are block-diagonal"),
    "use_something": (True, "use_something=True: a field that peft 0.21.2 does not have"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_are_wrong_or_not_supported_are_named(field, tmp_path):
    value, said = FIELDS[field]
    assert said in refusal(rewritten(tmp_path, **{field: value}))


def test_all_that_is_wrong_with_a_configuration_is_in_one_error(tmp_path):
    text = refusal(rewritten(tmp_path, r=-3, kasa_config={"a": 1}, lora_bias="no", use_dora=1))
    for said in (str(tmp_path / CONFIG), "r=-3", "kasa_config=", "lora_bias='no'", "use_dora=1"):
        assert said in text


QUERY = "base_model.model.model.layers.0.self_attn.q_proj."


def test_all_that_is_wrong_with_the_tensors_is_in_one_error(tmp_path):
    def change(tensors):
        tensors[QUERY + "lora_A.weight"] = np.ones((2, 31), np.float32)
        del tensors[QUERY.replace("q_proj", "k_proj") + "lora_B.weight"]
        tensors[QUERY.replace("q_proj", "v_proj") + "lora_B.weight"] = np.ones((16, 2), np.int32)
        tensors[QUERY.replace("q_proj", "z_proj") + "lora_B.weight"] = np.ones((16, 2), np.float16)
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.ones(1, np.float32)
        tensors[QUERY + "lora_A.default.weight"] = np.ones(1, np.float32)
        up = QUERY.replace("self_attn.q_proj", "mlp.up_proj")
        tensors[up + "lora_A.weight"] = np.ones((3, 32), np.float32)
        for x in "AB":
            del tensors[up.replace("up_", "down_") + f"lora_{x}.weight"]
        return tensors

    text = refusal(rewritten(tmp_path, change))
    for said in (
        "q_proj.lora_A.weight: shape [2, 31], expected [2, 32] for "
        "'params/layers_0/self_attn/q_proj/kernel'",
        "k_proj.lora_B.weight: missing",
        "v_proj.lora_B.weight: dtype int32, expected a floating one",
        "z_proj.lora_B.weight: unexpected, no leaf of params has this name",
        "model.layers.0.self_attn.q_proj.lora_A.weight: unexpected, not a key of an adapter",
        "q_proj.lora_A.default.weight: unexpected",
        "up_proj.lora_A.weight: shape [3, 32], expected rank 2, as 'r' or rank_pattern says",
        "mlp.down_proj: no factors, and target_modules names it",
    ):
        assert said in text, said


def test_what_belongs_to_a_feature_comes_with_it_alone(tmp_path):
    assert "q_proj.lora_magnitude_vector: missing" in refusal(rewritten(tmp_path, use_dora=True))
    assert "q_proj.lora_B.bias: missing" in refusal(rewritten(tmp_path, lora_bias=True))
    shutil.copytree(FILES / "dora", tmp_path / "dora")
    config = {**config_of(FILES / "dora"), "use_dora": False}
    (tmp_path / "dora" / CONFIG).write_text(json.dumps(config))
    assert "q_proj.lora_magnitude_vector: unexpected" in refusal(tmp_path / "dora")


def test_a_stack_needs_names_with_a_number():
    with pytest.raises(lowrank.CheckpointError) as error:
        load(FILES / "lora", params_of(True), plan=plan_of(True))
    text = " ".join(str(error.value).split())
    assert "'params/layers/mlp/down_proj/kernel' has 1 stack axes, and its module's name" in text
    # what the file does not adapt may be called as it is
    names = lambda path: "q_proj" if path.endswith("q_proj/kernel") else LLAMA(path)
    load(FILES / "layers", params_of(True), plan=plan_of(True), names=names)


def test_dora_on_some_layers_of_a_stack_is_refused(tmp_path):
    keep = lambda tensors: {k: v for k, v in tensors.items() if ".layers.1." in k}
    with (tmp_path / TENSORS).open("wb") as file:
        write_tensors(file, keep(tensors_of(FILES / "dora")))
    config = {**config_of(FILES / "dora"), "layers_to_transform": [1]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert "DoRA on only some layers of a stack" in refusal(tmp_path, scan=True)
    _, lora, _ = load(tmp_path, params_of(False), plan=plan_of(False), names=LLAMA)
    assert all("layers_1" in path for path in nodes_of(lora))


def test_a_copy_of_another_base_is_noticed():
    params = params_of(False)
    params["params"]["lm_head"]["kernel"] = np.add(params["params"]["lm_head"]["kernel"], 0.5)
    with pytest.raises(lowrank.CheckpointError, match=r"copy of the base is not 'params/lm_head"):
        load(FILES / "embeddings", params, plan=plan_of(False), names=LLAMA)


def test_frozen_copies_of_whole_tables_are_no_trained_leaves(tmp_path):
    copies = {
        "base_model.model.lm_head.weight": BASE["lm_head.weight"],
        "base_model.model.model.embed_tokens.weight": BASE["model.embed_tokens.weight"],
    }
    directory = rewritten(tmp_path, lambda tensors: tensors | copies)
    _, lora, config = load(directory, params_of(False), plan=plan_of(False), names=LLAMA)
    assert config.train == ()
    copies["base_model.model.lm_head.weight"] = BASE["lm_head.weight"] + 1
    directory = rewritten(tmp_path, lambda tensors: tensors | copies)
    _, lora, config = load(directory, params_of(False), plan=plan_of(False), names=LLAMA)
    assert config.train == ("params/lm_head/kernel",)
    chex.assert_trees_all_equal(
        lora["params"]["lm_head"]["kernel"].value, BASE["lm_head.weight"].T + 1
    )


def test_a_table_that_params_tie_takes_both_changes_or_none(tmp_path):
    plan = plan_of(True, tied=True)
    for case, said in (("embeddings", "differs from"), ("saved", "is one leaf")):
        with pytest.raises(lowrank.CheckpointError, match=said):
            load(FILES / case, params_of(True, tied=True), plan=plan, names=LLAMA)
    with pytest.raises(
        lowrank.CheckpointError, match="PEFT normalizes the two over different axes"
    ):
        load(FILES / "embeddings-dora", params_of(True, tied=True), plan=plan, names=LLAMA)
    config = {**config_of(FILES / "embeddings"), "target_modules": ["embed_tokens", "v_proj"]}
    tensors = {k: v for k, v in tensors_of(FILES / "embeddings").items() if "lm_head" not in k}
    with (tmp_path / TENSORS).open("wb") as file:
        write_tensors(file, tensors)
    for tying in (False, True):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "ensure_weight_tying": tying}))
        if tying:
            load(tmp_path, params_of(True, tied=True), plan=plan, names=LLAMA)
            continue
        for given in (plan, None):  # without a plan, a tree without lm_head ties it
            with pytest.raises(lowrank.CheckpointError, match="the table but not 'lm_head'"):
                load(tmp_path, params_of(True, tied=True), plan=given, names=LLAMA)


def test_lora_bias_is_not_rounded_into_a_narrow_bias():
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params_of(True))
    with pytest.raises(
        lowrank.CheckpointError, match=r"bias' is bfloat16, to which lora_bias would be"
    ):
        load(FILES / "lora-bias", params, plan=plan_of(True), names=LLAMA)


@pytest.mark.parametrize("dora", [False, True])
def test_grouped_convolutions_are_refused(dora, tmp_path):
    tensors = {
        "base_model.model.c.lora_A.weight": np.ones((4, 3, 3), np.float32),
        "base_model.model.c.lora_B.weight": np.ones((6, 2, 1), np.float32),
    }
    if dora:
        tensors["base_model.model.c.lora_magnitude_vector"] = np.ones((1, 6, 1), np.float32)
    rewritten(tmp_path, lambda _: tensors, r=4, target_modules=["c"], use_dora=dora)
    params = {"c": {"kernel": ones(3, 3, 6)}}
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["c"]["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=2,
    )  # fmt: skip
    plan = lowrank.plan(conv, params, ones(1, 5, 6))
    with pytest.raises(lowrank.CheckpointError, match="belongs to a grouped convolution") as error:
        load(tmp_path, params, plan=plan)
    assert len(str(error.value).splitlines()) == 2  # the file, and the one thing wrong with it


def test_quantized_and_abstract_params(tmp_path):
    quant = lowrank.QuantConfig(block_size=32, targets="**/self_attn/*/kernel")
    params = jax.tree.map(np.asarray, params_of(True))
    frozen = lowrank.quantize(params, quant, plan=plan_of(True))
    dense = load(FILES / "lora", params_of(True), plan=plan_of(True), names=LLAMA)[1]
    base, lora, _ = load(FILES / "lora", frozen, plan=plan_of(True), names=LLAMA)
    assert_same(lora, dense)
    assert (
        base["params"]["layers"]["self_attn"]["q_proj"]["kernel"]
        is (frozen["params"]["layers"]["self_attn"]["q_proj"]["kernel"])
    )
    shapes = jax.eval_shape(lambda: params_of(True))
    assert_same(load(FILES / "lora", shapes, plan=plan_of(True), names=LLAMA)[1], dense)
    with pytest.raises(
        lowrank.CheckpointError,
        match="changes a part of it, but params hold no values for the rest",
    ):
        load(FILES / "tokens", shapes, plan=plan_of(True), names=LLAMA)


@pytest.mark.parametrize("case", ["tokens", "tied-tokens"])
def test_trained_rows_are_saved_as_rows(case, tmp_path):
    tied = case.startswith("tied")
    params = params_of(True, tied)
    base, lora, config = load(FILES / case, params, plan=plan_of(True, tied), names=LLAMA)
    assert lora["params"]["embed_tokens"]["embedding"].rows == (3, 17, 40)
    assert config.train_rows == {"params/embed_tokens/embedding": (3, 17, 40)}
    with pytest.raises(lowrank.CheckpointError, match="pass base"):
        save(tmp_path, lora, config, names=LLAMA)
    save(tmp_path, lora, config, base=base, names=LLAMA)
    chex.assert_trees_all_close(tensors_of(tmp_path), tensors_of(FILES / case), atol=1e-6)
    rows = config_of(tmp_path)["trainable_token_indices"]
    assert rows == {"model.embed_tokens": [3, 17, 40]}
    again = load(tmp_path, params, plan=plan_of(True, tied), names=LLAMA)
    chex.assert_trees_all_close(again[1], lora, atol=1e-6)
    assert again[2] == config


def test_rows_that_are_not_sorted_or_not_there(tmp_path):
    shutil.copytree(FILES / "tokens", tmp_path, dirs_exist_ok=True)
    put = lambda rows: (tmp_path / CONFIG).write_text(
        json.dumps({**config_of(FILES / "tokens"), "trainable_token_indices": rows})
    )
    put({"embed_tokens": [40, 3, 17]})
    base, lora, _ = load(tmp_path, params_of(True), plan=plan_of(True), names=LLAMA)
    table = np.asarray(lowrank.merge(base, lora)["params"]["embed_tokens"]["embedding"])
    (key,) = [key for key in tensors_of(tmp_path) if "tokens_delta" in key]
    np.testing.assert_allclose(table[[40, 3, 17]], tensors_of(tmp_path)[key], atol=1e-6)
    for rows, said in (
        ([3, 3, 40], "has duplicate rows, or rows above 63"),
        ([3, 17, 64], "has duplicate rows, or rows above 63"),
        ([3, 17], "tokens_delta: shape [3, 32], expected [2, 32]"),
        (None, "that trainable_token_indices does not list"),
    ):
        put(rows)
        assert said in refusal(tmp_path)


# What PEFT cannot hold


def one(**fields):
    fields = {"a": ones(4, 2), "b": ones(2, 3), **fields}
    return {"layers": {"q": {"kernel": lowrank.LowRank(**fields)}}}


CANNOT = {
    "a stack of layers without a number": (
        one(a=ones(5, 4, 2), b=ones(5, 2, 3), stack=(0,), fan_in=(1,), fan_out=(2,)),
        "has 1 stack axes, and its module's name 'layers.q' has 0 times '{}'",
    ),
    "several adapters in one": (
        one(a=ones(5, 4, 2), b=ones(5, 2, 3)),
        "several adapters in one; split them",
    ),
    "folded norms": (
        one(magnitude=ones(3), folded=True),
        "save the adapter before lowrank.fold_norms",
    ),
    "another product": (
        {
            "layers": {
                "q": {"kernel": lowrank.LoHa(ones(4, 4), ones(4, 3))},
                "k": {"kernel": lowrank.LowRank(ones(4, 0), ones(0, 3), ones(3))},
            }
        },
        "'layers/q/kernel': a LoRA file cannot hold LoHa",
    ),
    "another scale": (one(scale=-1.0), "scale -1.0, but PEFT requires alpha > 0"),
    "magnitudes here and there": (
        {**one(), "p": one(magnitude=ones(3))},
        "and some, such as 'layers/q/kernel', have none",
    ),
    "a combined tree": (
        lowrank.combine({"layers": {"q": {"kernel": ones(4, 3)}}}, one()),
        "holds Adapted at 'layers/q/kernel'",
    ),
    "nothing": ({"layers": None}, "lora holds no adapter"),
    "a whole kernel of many axes": (
        {"q": {"kernel": lowrank.Full(ones(4, 2, 3))}},
        "which of its axes are contracted is ambiguous",
    ),
    "a part of a module": (
        {"norm": {"scale": lowrank.Full(ones(3)), "bias": None}},
        "'norm/bias': PEFT saves whole modules, and another leaf of norm is trained whole: pass",
    ),
    "a parameter that is no weight": (
        {"embeddings": {"cls_token": lowrank.Full(ones(1, 1, 3))}},
        "cls_token is a parameter of embeddings other than its weight and bias",
    ),
    "integers": (
        {"q": {"kernel": lowrank.Full(jnp.ones((4, 2), jnp.uint4))}},
        "is uint4, which the file format does not support",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_peft_cannot_hold_is_refused_by_name(case, tmp_path):
    lora, said = CANNOT[case]
    with pytest.raises(lowrank.CheckpointError) as error:
        save(tmp_path, lora, lowrank.LoraConfig())
    assert said in " ".join(str(error.value).split())
    assert not list(tmp_path.iterdir())


def test_names_decide_or_refuse(tmp_path):
    config = lowrank.LoraConfig()
    refused: Any = (
        (lambda path: None, "names has no module for it"),
        ({"layers/q/kernel": 3}, "names gives 3 for 'layers/q/kernel'"),
        (lambda path: lowrank.names.Parameter("q", "bias"), "names gives 'q.bias'"),
    )
    for names, said in refused:
        with pytest.raises(lowrank.CheckpointError, match=said):
            save(tmp_path, one(), config, names=names)
    twice = {"layers/q/kernel": "q", "p/layers/q/kernel": "q"}
    with pytest.raises(lowrank.CheckpointError, match=r"names gives both .* 'q.weight'"):
        save(tmp_path, {**one(), "p": one()}, config, names=twice)
    with pytest.raises(lowrank.ConfigError, match=r"extras has \['r'\]"):
        save(tmp_path, one(), lowrank.LoraConfig(extras={"r": 4}))
    with pytest.raises(lowrank.ConfigError, match="nan, which is not a JSON value"):
        save(tmp_path, one(), lowrank.LoraConfig(extras={"lora_dropout": math.nan}))
    save(tmp_path, one(), config, names={"layers/q/kernel": "deep.q"})
    assert config_of(tmp_path)["target_modules"] == ["deep.q"]


def test_a_module_is_completed_from_the_base(tmp_path):
    params = {"norm": {"scale": ones(3), "bias": np.full(3, 0.5, np.float32)}}
    lora = {"norm": {"scale": lowrank.Full(np.full(3, 2.0, np.float32)), "bias": None}}
    save(tmp_path, lora, lowrank.LoraConfig(), base=params)
    written = tensors_of(tmp_path)
    np.testing.assert_array_equal(written["base_model.model.norm.bias"], params["norm"]["bias"])
    assert config_of(tmp_path)["modules_to_save"] == ["norm"]


# Names


def test_patterns_are_of_one_module_each(tmp_path):
    """`layers.1.q` ends the name of another module, and `.` is any character."""
    ranks = {"layers.1.q": 1, "deep.layers.1.q": 2, "layersx1.q": 3, "q": 4, "other": 4}
    lora = {
        name: {"kernel": lowrank.LowRank(ones(9, r), ones(r, 8), scale=1.5 / r)}
        for name, r in ranks.items()
    }
    names = lambda path: path.rpartition("/")[0]
    save(tmp_path, lora, lowrank.LoraConfig(), names=names)
    written = config_of(tmp_path)
    for module, rank in ranks.items():
        assert peft_pattern(written["rank_pattern"], module, written["r"]) == rank
    params = {name: {"kernel": ones(9, 8)} for name in ranks}
    assert_same(load(tmp_path, params, names=names)[1], lora)


SPELLINGS = {
    "LLAMA": {
        "model/layers/7/self_attn/q_proj/kernel": "model.layers.7.self_attn.q_proj.weight",
        "params/blocks_7/attention/query/bias": "model.layers.7.self_attn.q_proj.bias",
        "layers.7/mlp/gate/kernel": "model.layers.7.mlp.gate_proj.weight",
        "params/layers/attn/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
        "model/norm/weight": "model.norm.weight",
        "lm_head/kernel": "lm_head.weight",
        "layers/7/self_attn/q_proj/rotary": None,
        "vision/layers_7/self_attn/q_proj/kernel": None,
    },
    "QWEN": {"layers_0/attn/k_norm/scale": "model.layers.0.self_attn.k_norm.weight"},
    "GEMMA": {
        "transformer/layer_3/attn/q_einsum/w": "model.layers.3.self_attn.q_proj.weight",
        "transformer/embedder/input_embedding": "model.embed_tokens.weight",
        "transformer/layer_3/mlp/linear": "model.layers.3.mlp.down_proj.weight",
        "transformer/layer_3/mlp/gating_einsum": None,
        "layer_3/pre_ffw_norm/scale": "model.layers.3.post_attention_layernorm.weight",
    },
    "GEMMA2": {"layer_3/pre_ffw_norm/scale": "model.layers.3.pre_feedforward_layernorm.weight"},
    "GPT2": {
        "transformer/h/1/mlp/c_fc/kernel": "transformer.h.1.mlp.c_fc.weight",
        "transformer/wpe/embedding": "transformer.wpe.weight",
    },
    "BERT": {
        "bert/encoder/layer/0/attention/self/query/kernel": (
            "bert.encoder.layer.0.attention.self.query.weight"
        ),
        "encoder/layers_0/attention/out/bias": "bert.encoder.layer.0.attention.output.dense.bias",
        "cls/predictions/bias": "cls.predictions.bias",
    },
    "VIT": {
        "vit/encoder/layer/0/attention/attention/key/kernel": (
            "vit.encoder.layer.0.attention.attention.key.weight"
        ),
        "vit/embeddings/cls_token": "vit.embeddings.cls_token",
    },
    "VIT5": {
        "vit/encoder/layer/0/attention/attention/key/kernel": "vit.layers.0.attention.k_proj.weight"
    },
}


@pytest.mark.parametrize("table", SPELLINGS)
def test_tables_know_the_spellings_of_flax(table):
    for path, key in SPELLINGS[table].items():
        found = lowrank.names.parameter(path, getattr(lowrank.names, table))
        assert (found and found.key) == key, path


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "stacked"])
def test_the_table_of_llama_names_every_leaf_of_the_example(scan):
    named = [LLAMA(path) for path, _ in flatten(params_of(scan))[0]]
    found = {name and name.key for name in named}
    number = lambda key: re.sub(r"\.\d+\.", ".{}.", key) if scan else key
    assert found == {number(key) for key in BASE if key not in ("tokens", "logits")}

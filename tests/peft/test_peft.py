"""Adapters as `peft` saves them, both ways (tests/golden/make_peft_files.py)."""

import functools
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_files import (
    BASE,
    CONFIG,
    FILES,
    LLAMA,
    LLAMAS,
    TENSORS,
    TOKENS,
    assert_same,
    assert_same_bytes,
    config_of,
    drawn,
    golden,
    load,
    nodes_of,
    ones,
    params_of,
    peft_pattern,
    plan_of,
    refusal,
    rewritten,
    save,
    tensors_of,
)
from peft_llama import model

import lowrank_jax as lowrank
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax._nodes import is_node

pytestmark = pytest.mark.usefixtures("fast_compile")


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


# Files that are wrong


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

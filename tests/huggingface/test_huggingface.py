"""Models as Hugging Face keeps them, both ways (tests/golden/make_huggingface.py)."""

import contextlib
import functools
import itertools
import json
import os
import shutil
import weakref
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import noisy
from peft_llama import flax_params, model, shapes
from peft_llama import load as llama_golden

import lowrank_jax as lowrank
from lowrank_jax._files.safetensors import TensorFile, write_tensors
from lowrank_jax._files.shards import open_folder
from lowrank_jax._jax.paths import flatten

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS, PEFT = GOLDEN / "huggingface", GOLDEN / "peft_files"

pytestmark = pytest.mark.usefixtures("fast_compile")
LLAMA, GPT2, VIT = lowrank.names.LLAMA, lowrank.names.GPT2, lowrank.names.VIT
load, save, merge = lowrank.huggingface.load, lowrank.huggingface.save, lowrank.huggingface.merge
BASE = llama_golden("base")
TOKENS = BASE["tokens"]
with np.load(FOLDERS / "outputs.npz", allow_pickle=False) as file:
    OUTPUTS = dict(file)


@functools.cache
def compiled(scan, tied):
    return jax.jit(model(scan, tied).apply)


def logits_of(params, scan, tied=False):
    return compiled(scan, tied)(params, TOKENS)


@functools.cache
def plan_of(scan):
    return lowrank.plan(model(scan).apply, shapes(scan), TOKENS)


def tensors_of(folder):
    with open_folder(folder) as tensors:
        return dict(tensors)


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def bits(tree):
    """Leaves as bytes: NaN equals itself, and 0 is not -0."""
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype), np.asarray(x).tobytes()), tree)


# Reading


@pytest.mark.parametrize("scan", [False, True])
def test_a_llama_gives_the_logits_of_transformers(scan):
    params = load(FOLDERS / "llama", shapes(scan), names=LLAMA)
    chex.assert_trees_all_equal(params, flax_params(BASE, scan))
    np.testing.assert_allclose(logits_of(params, scan), BASE["logits"], atol=1e-5)


def test_a_tied_model_in_bfloat16():
    exact = load(FOLDERS / "tied", shapes(True, tied=True), names=LLAMA, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(exact)} == {"bfloat16"}
    params = load(FOLDERS / "tied", shapes(True, tied=True), names=LLAMA)
    chex.assert_trees_all_equal(
        params, jax.tree.map(lambda x: np.asarray(x).astype(np.float32), exact)
    )
    logits = logits_of(params, True, tied=True)
    np.testing.assert_allclose(logits, OUTPUTS["tied"], atol=1e-5)


def test_a_tied_model_into_a_tree_that_ties_nothing(tmp_path):
    params = load(FOLDERS / "tied", shapes(False), names=LLAMA)
    np.testing.assert_allclose(logits_of(params, False), OUTPUTS["tied"], atol=1e-5)
    config = {"tie_word_embeddings": False}
    folder = write(tmp_path / "untied", tensors_of(FOLDERS / "tied"), config)
    with pytest.raises(lowrank.CheckpointError, match=r"- lm_head\.weight \('params/lm_head/ker"):
        load(folder, shapes(False), names=LLAMA)


def test_a_projection_that_is_kept_beside_the_table_it_shares(tmp_path):
    tensors = tensors_of(FOLDERS / "tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = write(tmp_path / "both", tensors)
    params = load(folder, shapes(True, tied=True), names=LLAMA)
    chex.assert_trees_all_equal(params, load(FOLDERS / "tied", params, names=LLAMA))
    save(tmp_path / "again", params, names=LLAMA, like_folder=folder)
    assert tensors_of(tmp_path / "again").keys() == tensors.keys()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + tensors["lm_head.weight"][:1]
    with pytest.raises(lowrank.CheckpointError, match=r"lm_head\.weight: not model\.embed_tokens"):
        load(write(folder, tensors), params, names=LLAMA)


HEADS = {"q_proj": (32, 4, 8), "k_proj": (32, 2, 8), "v_proj": (32, 2, 8), "o_proj": (4, 8, 32)}


@pytest.mark.parametrize("scan", [False, True])
def test_kernels_of_heads_need_no_plan(scan, tmp_path):
    params = flax_params(BASE, scan)
    lead = (2,) if scan else ()
    for layer in (
        [params["params"]["layers"]]
        if scan
        else [params["params"][f"layers_{i}"] for i in range(2)]
    ):
        for name, shape in HEADS.items():
            linear = layer["self_attn"][name]
            linear["kernel"] = np.reshape(linear["kernel"], lead + shape)
            if name != "o_proj":
                linear["bias"] = np.reshape(linear["bias"], lead + shape[1:])
    like = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(load(FOLDERS / "llama", like, names=LLAMA), params)
    save(tmp_path, params, names=LLAMA, like_folder=FOLDERS / "llama")
    chex.assert_trees_all_equal(tensors_of(tmp_path), tensors_of(FOLDERS / "llama"))


def gpt2_tree(tensors, get):
    """Leaves of the names of transformers, each the shape that Flax gives it."""
    tree = {}
    for key in tensors:
        *keys, last = key.split(".")
        table = keys[0] in ("wte", "wpe")
        norm = keys[-1].startswith("ln")
        last = last if last == "bias" else "embedding" if table else "scale" if norm else "kernel"
        leaf = tree
        for part in ("transformer", *keys):
            leaf = leaf.setdefault(part, {})
        leaf[last] = get(key)
    return tree


def test_conv1d_and_the_names_of_a_base_model(tmp_path):
    tensors = tensors_of(FOLDERS / "gpt2")
    expected = gpt2_tree(tensors, tensors.__getitem__)
    assert expected["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"].shape == (12, 12)
    chex.assert_trees_all_equal(load(FOLDERS / "gpt2", expected, names=GPT2), expected)
    buffers = {"h.0.attn.bias": np.tri(8)[None, None], "h.0.attn.masked_bias": np.float32(-1e4)}
    folder = write(tmp_path / "old", {**tensors, **{k: np.asarray(v) for k, v in buffers.items()}})
    chex.assert_trees_all_equal(load(folder, expected, names=GPT2), expected)
    save(tmp_path / "new", expected, names=GPT2)
    saved = tensors_of(tmp_path / "new")
    chex.assert_trees_all_equal(saved, {f"transformer.{k}": v for k, v in tensors.items()})


def test_a_convolution_and_leaves_with_names_of_their_own(tmp_path):
    zeros = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    like = {
        "embeddings": {
            "cls_token": zeros(1, 1, 12),
            "position_embeddings": zeros(1, 5, 12),
            "patch_embeddings": {
                "projection": {"kernel": zeros(4, 4, 3, 12), "bias": zeros(12)},
            },
        }
    }
    others = ("vit.encoder.*", "vit.layernorm.*", "classifier.*")
    params = load(FOLDERS / "vit", like, names=VIT, ignore=others)["embeddings"]
    linear = params["patch_embeddings"]["projection"]
    pixels = OUTPUTS["pixels/vit"].transpose(0, 2, 3, 1)
    patches = lax.conv_general_dilated(
        pixels, linear["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    patches = (np.asarray(patches) + linear["bias"]).reshape(2, 4, 12)
    first = np.broadcast_to(params["cls_token"], (2, 1, 12))
    sums = np.concatenate([first, patches], 1) + params["position_embeddings"]
    np.testing.assert_allclose(sums, OUTPUTS["vit"], atol=1e-6)


def test_a_counter_stays_as_it_is():
    like = {**shapes(True), "step": jnp.asarray(7), "key": jax.random.key(1)}
    params = load(FOLDERS / "llama", like, names=LLAMA)
    assert int(params["step"]) == 7
    assert params["key"] is like["key"]


# Quantizing


@pytest.mark.parametrize("scan", [False, True])
def test_quantized_as_it_is_read(scan):
    quant = lowrank.QuantConfig(block_size=32, packing="uint8")
    params, plan = flax_params(BASE, scan), plan_of(scan)
    frozen = load(FOLDERS / "llama", shapes(scan), names=LLAMA, quant=quant, plan=plan)
    chex.assert_trees_all_equal(frozen, lowrank.quantize(params, quant, plan=plan))
    named = lowrank.QuantConfig(block_size=32, packing="uint8", targets="**/*_proj/kernel")
    without = load(FOLDERS / "llama", shapes(scan), names=LLAMA, quant=named)
    chex.assert_trees_all_equal(without, frozen)
    with pytest.raises(lowrank.AxesError, match="all-linear.*plan="):
        load(FOLDERS / "llama", shapes(scan), names=LLAMA, quant=quant)


@pytest.mark.parametrize("scan", [False, True])
def test_one_tensor_at_a_time(scan, monkeypatch):
    read, alive, most = TensorFile.read, [], []

    def watched(self, name):
        array = read(self, name)
        alive.append(weakref.ref(array))
        most.append(sum(ref() is not None for ref in alive))
        return array

    monkeypatch.setattr(TensorFile, "read", watched)
    quant = lowrank.QuantConfig(block_size=32, targets="**/*_proj/kernel")
    load(FOLDERS / "llama", shapes(scan), names=LLAMA, quant=quant)
    assert len(most) == 35
    kept = 0 if scan else 15  # a vector needs no copy: what was read is the leaf
    assert max(most) <= kept + 6


def test_values_that_are_not_finite_are_refused(tmp_path):
    tensors = tensors_of(FOLDERS / "llama")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    folder = write(tmp_path, tensors)
    quant = lowrank.QuantConfig(block_size=32, targets="**/*_proj/kernel")
    for scan, path in ((False, "layers_1/mlp/up_proj"), (True, "layers/mlp/up_proj")):
        load(folder, shapes(scan), names=LLAMA)
        with pytest.raises(lowrank.TreeError, match=f"{path}/kernel: 1 of .* are not finite"):
            load(folder, shapes(scan), names=LLAMA, quant=quant)


def test_leaves_come_where_like_has_them():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    split = jax.NamedSharding(mesh, jax.P(None, "data", "model"))
    like = shapes(True)
    kernel = like["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    like["params"]["layers"]["mlp"]["up_proj"]["kernel"] = kernel.update(sharding=split)
    get = lambda tree: tree["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    leaf = get(load(FOLDERS / "llama", like, names=LLAMA))
    assert leaf.sharding == split
    quant = lowrank.QuantConfig(block_size=32, double_quant=False, targets="**/gate_proj/kernel")
    like["params"]["layers"]["mlp"]["gate_proj"]["kernel"] = jax.ShapeDtypeStruct(
        (2, 32, 48), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, None, "model"))
    )
    node = load(FOLDERS / "llama", like, names=LLAMA, quant=quant)
    node = node["params"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert node.codes.sharding.spec == jax.P(None, None, None, "model")


# What does not fit


def spoiled(tmp_path, drop=(), config=None, **changes):
    tensors = tensors_of(FOLDERS / "llama")
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    return write(tmp_path / "spoiled", {k: v for k, v in tensors.items() if k not in drop}, config)


def test_all_that_is_wrong_is_in_one_error_and_nothing_was_read(tmp_path, monkeypatch):
    folder = spoiled(
        tmp_path,
        drop=("model.norm.weight", "model.layers.1.mlp.up_proj.bias"),
        model__extra=np.zeros((2, 3)),
        model__layers__0__mlp__up_proj__weight=np.zeros((32, 48), np.float32),
        model__layers__0__self_attn__q_proj__weight=np.zeros((32, 32), np.int32),
    )

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFile, "read", read)
    with pytest.raises(lowrank.CheckpointError) as caught:
        load(folder, shapes(False), names=LLAMA)
    assert str(caught.value).splitlines()[1:] == [
        "the folder has no tensor for",
        "  - model.layers.1.mlp.up_proj.bias ('params/layers_1/mlp/up_proj/bias')",
        "  - model.norm.weight ('params/norm/scale')",
        "the tree has no leaf for",
        "  - model.extra [2, 3]",
        "these do not fit",
        "  - model.layers.0.mlp.up_proj.weight: shape [32, 48], expected [48, 32] for "
        "'params/layers_0/mlp/up_proj/kernel' of shape (32, 48); if it is not a kernel [in, out], "
        "pass plan=lowrank.plan(fn, params, *args)",
        "  - model.layers.0.self_attn.q_proj.weight: dtype int32, expected float32 for "
        "'params/layers_0/self_attn/q_proj/kernel'",
    ]
    with pytest.raises(lowrank.CheckpointError) as caught:
        load(folder, shapes(True), names=LLAMA)
    for key in ("0.mlp.up_proj.weight: shape", "1.mlp.up_proj.bias ('params/layers/mlp/up_proj/b"):
        assert str(caught.value).count(f"  - model.layers.{key}") == 1


MISTAKES = {
    "no layers": (
        lambda p: load(
            FOLDERS / "llama",
            {"layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((0, 32, 32))}}}},
            names=LLAMA,
            ignore="*",
        ),
        r"stacks 0 layers",
    ),
    "no names": (lambda p: load(FOLDERS / "llama", shapes(True)), r"pass names=lowrank\.names\.LL"),
    "a leaf without a name": (
        lambda p: load(FOLDERS / "llama", {**shapes(True), "x": jnp.ones(2)}, names=LLAMA),
        r"'x': names has no module for it",
    ),
    "an unstacked name": (
        lambda p: load(
            FOLDERS / "llama",
            {"layers": {"kernel": jnp.ones(2)}},
            names={"layers/kernel": "model.layers.{}.{}.q_proj"},
            ignore="*",
        ),
        r"'layers/kernel' has 2 stack axes",
    ),
    "nodes": (
        lambda p: load(FOLDERS / "llama", {"w": lowrank.Full(jnp.ones(2))}),
        r"like holds Full at 'w': pass the dense tree",
    ),
    "a number": (lambda p: load(FOLDERS / "llama", {"w": 3}), r"like holds int at 'w'"),
    "quant of another kind": (
        lambda p: load(FOLDERS / "llama", shapes(True), quant="nf4"),
        r"quant is a str, 'nf4'; expected a QuantConfig",
    ),
    "a quantized model": (
        lambda p: load(
            spoiled(p, config={"quantization_config": {"quant_method": "gptq"}}), shapes(True)
        ),
        r"quantized, by 'gptq': fetch the model in its dense form",
    ),
    "no folder": (lambda p: load(p / "none", shapes(True)), r"none is not a folder: pass"),
    "a config that is none": (
        lambda p: load(spoiled(p, config=[1]), shapes(True)),
        r"config\.json holds list, not an object",
    ),
    "an adapter": (
        lambda p: save(p, lowrank.combine(*adapted())),
        r"'w' has an adapter: save lowrank\.merge\(base, lora\)",
    ),
    "a quantized leaf": (
        lambda p: save(p, {"w": {"kernel": quantized()}}),
        r"'w/kernel' is quantized: pass dequantize=True",
    ),
    "a shape": (
        lambda p: save(p, {"w": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}),
        r"'w/kernel' is a ShapeDtypeStruct, not an array with values",
    ),
    "a dtype": (
        lambda p: save(p, {"w": {"kernel": jnp.ones((2, 3), jnp.float8_e4m3fn)}}),
        r"'w/kernel' is float8_e4m3fn, a dtype that safetensors does not have",
    ),
    "axes": (
        lambda p: save(p, {"w": {"kernel": jnp.ones((2, 3, 4))}}),
        r"which of its axes are contracted is ambiguous",
    ),
    "no shard": (lambda p: save(p, {"w": {"kernel": jnp.ones(2)}}, max_shard=0), r"max_shard is 0"),
    "another model": (
        lambda p: save(
            p, {"norm": {"scale": jnp.ones(31)}, "lm_head": {"bias": jnp.ones(64)}},
            names=LLAMA, like_folder=FOLDERS / "llama",
        ),
        r"(?s)norm\.weight: shape \[32\], expected \[31\].*lm_head\.bias: not in like_folder"
        r".*embed_tokens\.weight: in like_folder, but the tree has no leaf.* \d+ more",
    ),
    "merged into itself": (
        lambda p: merge(FOLDERS / "llama", PEFT / "lora", FOLDERS / "llama"),
        r"llama is base or adapter",
    ),
    "merged into codes": (
        lambda p: merge(GOLDEN / "bitsandbytes_files" / "llama", PEFT / "lora", p),
        r"quantized, by 'bitsandbytes'",
    ),
    "merged into another model": (
        lambda p: merge(FOLDERS / "gpt2", PEFT / "lora", p / "out"),
        r"(?s)does not fit params.*q_proj\.lora_A\.weight: unexpected",
    ),
}  # fmt: skip


def adapted():
    params = {"w": jnp.ones((4, 3))}
    return lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=2, targets="w"))


def quantized():
    params = {"w": np.linspace(-1, 1, 128 * 4, dtype=np.float32).reshape(128, 4)}
    return lowrank.quantize(params, lowrank.QuantConfig(targets="w"))["w"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, tmp_path):
    call, words = MISTAKES[mistake]
    with pytest.raises(lowrank.LowrankError, match=words):
        call(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name not in ("spoiled",)]


# Writing


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    odd = np.array([[np.nan, -0.0, 1e-45], [np.inf, -np.inf, 1]], np.float32)
    odd.view(np.int32)[0, 0] |= 3  # a payload
    params = {
        "odd": {"kernel": odd},
        "stack": {"kernel": jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.bfloat16)},
        "middle": {"kernel": jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float16)},
        "conv": {"kernel": rng.standard_normal((2, 3, 4, 5)).astype(np.float32)},
        "heads": {"kernel": rng.standard_normal((6, 2, 3)).astype(np.float32)},
        "table": {"embedding": jnp.asarray(rng.standard_normal((7, 3)), jnp.bfloat16)},
        "count": {"mean": jnp.asarray([1, 2], jnp.int32), "flag": np.array([True, False])},
        "scalar": {"scale": jnp.asarray(2.5)},
    }
    use = lambda op, fan_in, fan_out, stack=(): lowrank.Use(
        op, fan_in, fan_out, stack, (), None, uses=1
    )
    plan = {
        **dict.fromkeys(dict(flatten(params)[0]), use("other", (), ())),
        "odd/kernel": use("dot", (0,), (1,)),
        "stack/kernel": use("dot", (2,), (3,), (0, 1)),
        "middle/kernel": use("dot", (0,), (2,), (1,)),
        "conv/kernel": use("conv", (0, 1, 2), (3,)),
        "heads/kernel": use("dot", (0,), (1, 2)),
        "table/embedding": use("lookup", (0,), (1,)),
    }
    modules = {"stack/kernel": "stack.{}.x.{}", "middle/kernel": "m.{}.y"}
    names = lambda path: modules.get(path, path.split("/")[0])
    for limit in (1, 100, 10**9):
        folder = tmp_path / str(limit)
        save(folder, params, names=names, plan=lowrank.Plan(plan), max_shard=limit)
        again = load(folder, params, names=names, plan=lowrank.Plan(plan))
        chex.assert_trees_all_equal(bits(again), bits(params))
    tensors = tensors_of(folder)
    assert tensors["stack.1.x.2.weight"].shape == (5, 4)
    assert tensors["m.2.y.weight"].shape == (5, 4)
    assert tensors["conv.weight"].shape == (5, 4, 2, 3)
    assert tensors["heads.weight"].shape == (6, 6)
    assert len([*(tmp_path / "1").glob("*.safetensors")]) == len(tensors)


def test_shards_are_as_full_as_they_may_be_and_indexed(tmp_path):
    params = load(FOLDERS / "llama", shapes(True), names=LLAMA)
    save(tmp_path, params, names=LLAMA, max_shard=30_000, like_folder=FOLDERS / "llama")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 80_256
    sizes = []
    for number in (1, 2, 3):
        with TensorFile(tmp_path / f"model-{number:05}-of-00003.safetensors") as file:
            sizes.append(sum(entry.stop - entry.start for entry in file.entries.values()))
            name = file.path.name
            assert {k for k, v in index["weight_map"].items() if v == name} == {*file.entries}
    assert sum(sizes) == 80_256
    assert max(sizes) <= 30_000
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "generation_config.json", *(
        f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)
    ), "model.safetensors.index.json"]  # fmt: skip
    save(tmp_path, params, names=LLAMA)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_the_configuration_names_the_dtype(tmp_path):
    params = load(FOLDERS / "llama", shapes(True), names=LLAMA, dtype=jnp.bfloat16)
    (tmp_path / "origin").mkdir()
    for path in (FOLDERS / "llama").iterdir():
        shutil.copy(path, tmp_path / "origin")
    beside = {"tokenizer.json": "{}", "vocab.txt": "a", "run.py": "", "pytorch_model.bin": ""}
    for name, text in beside.items():
        (tmp_path / "origin" / name).write_text(text)
    save(tmp_path / "out", params, names=LLAMA, like_folder=tmp_path / "origin")
    old, new = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("origin", "out"))
    assert new == {**old, "dtype": "bfloat16"}
    assert old["dtype"] == "float32"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"} | {
        "tokenizer.json", "vocab.txt",
    }  # fmt: skip


def test_quantized_and_normed_leaves_are_written_dense(tmp_path):
    params, plan = flax_params(BASE, True), plan_of(True)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(block_size=32), plan=plan)
    save(tmp_path, frozen, names=LLAMA, plan=plan, dequantize=True)
    dense = jax.jit(lowrank.dequantize)(frozen)
    chex.assert_trees_all_equal(load(tmp_path, params, names=LLAMA), dense)
    config = lowrank.LoraConfig(rank=2, dora=True)
    init = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan)[0]
    base = jax.jit(init)(params)
    save(tmp_path, base, names=LLAMA)
    chex.assert_trees_all_equal(load(tmp_path, params, names=LLAMA), params)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("limits", [*itertools.product((10**9, 50), repeat=2)])
def test_what_is_killed_leaves_no_mixture(limits, tmp_path, monkeypatch):
    trees = [{name: {"kernel": np.full((4, 3), k)} for name in "ab"} for k in (1.0, 2.0)]
    for number, tree in enumerate(trees):
        save(tmp_path / f"origin{number}", tree)
        (tmp_path / f"origin{number}" / "config.json").write_text(json.dumps({"n": number}))
    put = lambda folder, number: save(
        folder, trees[number], max_shard=limits[number], like_folder=tmp_path / f"origin{number}"
    )
    seen = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        put(folder, 0)
        count = itertools.count()

        def until(call):
            def guarded(*args, **kwargs):
                if next(count) >= step:
                    raise Killed
                return call(*args, **kwargs)

            return guarded

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, until(getattr(os, name)))
            try:
                put(folder, 1)
            except Killed:
                pass
            else:
                break
        config = folder / "config.json"
        state = json.loads(config.read_text())["n"] if config.exists() else None
        found = None
        with contextlib.suppress(lowrank.CheckpointError):
            found = tensors_of(folder)
        if found is not None:
            number = int(found["a.weight"][0, 0]) - 1
            assert all((value == number + 1).all() for value in found.values())
            assert state in (None, number)
        seen.add((state, found is not None))
        put(folder, 1)
        assert not [*folder.glob(".lowrank-*")]
    assert seen == {(0, True), (None, True), (None, False), (1, True)}
    assert {(value == 2).all() for value in tensors_of(folder).values()} == {True}


# Merging


CASES = (
    *("rslora-patterns", "dora", "all-linear", "embeddings", "embeddings-dora", "lora-bias"),
    *("bias-all", "saved", "tokens", "layers", "bfloat16", "tied", "tied-tokens"),
)


@pytest.mark.parametrize("case", CASES)
def test_merged_without_code_it_gives_the_logits_of_peft(case, tmp_path):
    tied, base = case.startswith("tied"), FOLDERS / "llama"
    if tied:
        tensors = {k: v for k, v in tensors_of(base).items() if k != "lm_head.weight"}
        base = write(tmp_path / "base", tensors, {"tie_word_embeddings": True})
    changed = merge(base, PEFT / case, tmp_path / "out")
    params = load(tmp_path / "out", shapes(True, tied), names=LLAMA)
    with np.load(PEFT / f"{case}.npz", allow_pickle=False) as file:
        expected = file["logits"]
    np.testing.assert_allclose(logits_of(params, True, tied), expected, atol=2e-5)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert changed == sorted(k for k in before if not np.array_equal(before[k], after[k]))
    names = lambda folder: sorted(path.name for path in folder.iterdir())
    assert names(base) == names(tmp_path / "out")


def test_merged_conv1d_and_convolutions(tmp_path):
    for case in ("gpt2", "conv", "conv-dora"):
        with np.load(PEFT / f"{case}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        base = {k.removeprefix("base/"): v for k, v in arrays.items() if k.startswith("base/")}
        merge(write(tmp_path / case, base), PEFT / case, tmp_path / "out")
        merged = tensors_of(tmp_path / "out")
        for key, expected in arrays.items():
            if key.startswith("merged/"):
                np.testing.assert_allclose(merged[key[7:]], expected, atol=1e-6)
            if key == "output/plane":
                plane = lax.conv(arrays["input/plane"], merged["plane.weight"], (2, 2), "VALID")
                plane = np.asarray(plane) + merged["plane.bias"][:, None, None]
                np.testing.assert_allclose(plane, expected, atol=1e-5)
    assert merged["plane.weight"].shape == (5, 3, 3, 2)


@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_merged_as_in_memory(scan, tmp_path):
    params = load(FOLDERS / "llama", shapes(scan), names=LLAMA)
    config = lowrank.LoraConfig(rank=3, alpha=5, train="**/norm/scale")
    init = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan_of(scan))
    base, lora = jax.eval_shape(init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(base, params)
    base, lora = params, noisy(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), lora))
    lowrank.checkpoint.save(tmp_path / "run", lora=lora, config=config, base=base)
    merge(FOLDERS / "llama", tmp_path / "run", tmp_path / "out", names=LLAMA)
    again = load(tmp_path / "out", params, names=LLAMA)
    chex.assert_trees_all_close(again, jax.jit(lowrank.merge)(base, lora), atol=1e-6, rtol=0)
    assert not np.array_equal(again["params"]["norm"]["scale"], params["params"]["norm"]["scale"])


def test_a_shared_weight_is_merged_once_and_stays_shared(tmp_path):
    tensors = tensors_of(FOLDERS / "llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    base = write(tmp_path / "base", tensors, {"tie_word_embeddings": True})
    merge(base, PEFT / "tied", tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert merged["lm_head.weight"].tobytes() == merged["model.embed_tokens.weight"].tobytes()
    params = load(tmp_path / "out", shapes(True, tied=True), names=LLAMA)
    with np.load(PEFT / "tied.npz", allow_pickle=False) as file:
        expected = file["logits"]
    np.testing.assert_allclose(logits_of(params, True, tied=True), expected, atol=2e-5)

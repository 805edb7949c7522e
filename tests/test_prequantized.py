"""Folders that bitsandbytes quantized, read into trees; the one here is of transformers itself."""

import json
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lowrank_jax as lowrank
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax._files.shards import open_folder
from lowrank_jax._nodes import is_node

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama

FOLDER = Path(__file__).parent / "golden" / "bitsandbytes_files" / "llama"
LLAMA, QuantConfig = lowrank.names.LLAMA, lowrank.QuantConfig
load = lowrank.huggingface.load
pytestmark = pytest.mark.usefixtures("fast_compile")


def tensors_of(folder=FOLDER):
    with open_folder(folder) as tensors:
        return {name: tensors[name] for name in tensors}


def like(scan):
    """The shapes of the model's parameters."""
    config = llama.LlamaConfig(
        vocab=64, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128,
        tie_embeddings=False, attention_bias=True, mlp_bias=True, scan_layers=scan,
    )  # fmt: skip
    return jax.eval_shape(llama.Llama(config).init, jax.random.key(0), np.zeros((1, 4), np.int32))


def leaves_of(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_node)
    }


def changed(tmp_path, **tensors):
    """The folder in one file, with other tensors; None takes one away."""
    shutil.copy(FOLDER / "config.json", tmp_path)
    every = {**tensors_of(), **tensors}
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_tensors(file, {name: x for name, x in every.items() if x is not None})
    return tmp_path


@pytest.mark.parametrize("packing", ["uint4", "uint8"])
@pytest.mark.parametrize("scan", [False, True])
def test_leaves_are_the_files_own_codes(scan, packing):
    quant = QuantConfig(targets="**/layers*/**/kernel", packing=packing)
    leaves = leaves_of(load(FOLDER, like(scan), names=LLAMA, quant=quant))
    tensors, seen = tensors_of(), 0
    for path, leaf in leaves.items():
        name = lowrank.names.parameter(path, LLAMA).key
        if isinstance(leaf, lowrank.Quantized):
            seen += 1
            wanted = lowrank.bitsandbytes.from_state_dict(tensors, name, packing=packing)
            chex.assert_trees_all_equal(leaf, wanted)
            mine = lowrank.bitsandbytes.to_state_dict(leaf, name)
            for key, array in mine.items():
                np.testing.assert_array_equal(array, tensors[key])
    assert seen == (7 if scan else 14)
    table = leaves["params/embed_tokens/embedding"]
    np.testing.assert_array_equal(table, tensors["model.embed_tokens.weight"])


def test_without_quant_codes_are_four_bits():
    leaves = leaves_of(load(FOLDER, like(True), names=LLAMA))
    kinds = {x.codes.dtype.name for x in leaves.values() if isinstance(x, lowrank.Quantized)}
    assert kinds == {"uint4"}


def test_what_the_folder_has_dense_is_quantized_as_quant_says():
    quant = QuantConfig(targets="**/kernel", packing="uint8")
    leaves = leaves_of(load(FOLDER, like(True), names=LLAMA, quant=quant))
    head = {"w": tensors_of()["lm_head.weight"].T}
    wanted = lowrank.quantize(head, QuantConfig(targets="w", packing="uint8"))["w"]
    chex.assert_trees_all_equal(leaves["params/lm_head/kernel"], wanted)


@pytest.mark.parametrize("heads", [(4, 16), (2, 32)])
def test_kernels_of_heads_are_the_same_codes_with_more_axes(heads):
    modules = {
        "q": "model.layers.0.self_attn.q_proj",
        "o": "model.layers.1.self_attn.o_proj",
        "b": "model.layers.{}.self_attn.q_proj",
    }
    shapes = {"q": (64, *heads), "o": (*heads, 64)}
    tensors = tensors_of()
    for leaf, shape in shapes.items():
        tree = {leaf: {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}}
        name = f"{modules[leaf]}.weight"
        flat = lowrank.bitsandbytes.from_state_dict(tensors, name)
        names, ignore = {f"{leaf}/kernel": modules[leaf]}, ["*"]
        node = load(FOLDER, tree, names=names, ignore=ignore)[leaf]["kernel"]
        assert (node.shape, node.dtype) == (shape, jnp.bfloat16)
        want = lowrank.dequantize({"w": flat})["w"].reshape(shape).astype(jnp.bfloat16)
        np.testing.assert_array_equal(lowrank.dequantize({"w": node})["w"], want)
    stack = {"b": {"kernel": jax.ShapeDtypeStruct((2, 64, *heads), np.float32)}}
    names = {"b/kernel": modules["b"]}
    node = load(FOLDER, stack, names=names, ignore=["*"])["b"]["kernel"]
    flat = lowrank.bitsandbytes.from_state_dict(tensors, f"{modules['b']}.weight")
    want = lowrank.dequantize({"w": flat})["w"].reshape(2, 64, *heads)
    np.testing.assert_array_equal(lowrank.dequantize({"w": node})["w"], want)


def test_leaves_lie_where_like_has_them():
    mesh = jax.make_mesh((2,), ("x",))
    place = lambda leaf: jax.NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "x"))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), like(True)
    )
    leaves = leaves_of(load(FOLDER, shapes, names=LLAMA))
    plain = leaves_of(load(FOLDER, like(True), names=LLAMA))
    chex.assert_trees_all_equal(leaves, plain)
    codes = leaves["params/layers/mlp/up_proj/kernel"].codes
    assert codes.addressable_shards[0].data.shape[-1] == codes.shape[-1] // 2


UP = "model.layers.1.mlp.up_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"
SIDES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
DENSE = {f"{UP}.{side}": None for side in SIDES} | {UP: np.zeros((128, 64), np.float32)}


def letters(text):
    return np.frombuffer(text.encode(), np.uint8).copy()


def state(**fields):
    """The JSON of a weight, with other fields."""
    own = json.loads(tensors_of()[f"{UP}.{STATE}"].tobytes())
    return letters(json.dumps({**own, **fields}))


@pytest.mark.parametrize(
    ("tensors", "quant", "said"),
    [
        (
            {},
            {"format": "fp4"},
            r"up_proj/kernel': the file has format='nf4', block_size=64, doubl",
        ),
        ({}, {"double_quant": False}, "double_quant=True; pass the same in quant, or leave"),
        (DENSE, {}, f"{UP} is dense, and other layers are not; load it with unrolled layers"),
        ({f"{UP}.absmax": None}, {}, f"{UP}.absmax is missing"),
        (
            {f"{UP}.absmax": np.zeros(3, np.uint8)},
            {},
            r"absmax has 3 bytes; \[128, 64\] needs 12",
        ),
        (
            {UP: np.zeros((9, 1), np.uint8)},
            {},
            r"up_proj.weight has 9 bytes; \[128, 64\] needs 4",
        ),
        (
            {f"{UP}.nested_absmax": np.array([np.nan], np.float32)},
            {},
            "nested_absmax holds values that",
        ),
        ({f"{UP}.{STATE}": state(shape=[32.5, 64])}, {}, r"a quant state .*shape is \[32.5, 64\]"),
        ({f"{UP}.{STATE}": state(shape="48")}, {}, "not a quant state .*shape is '48'"),
        ({f"{UP}.{STATE}": state(blocksize=64.0)}, {}, "blocksize is 64.0; expected"),
        ({f"{UP}.{STATE}": state(nested_offset=float("nan"))}, {}, "nested_offset is nan"),
        ({f"{UP}.{STATE}": state(nested_offset="0.5")}, {}, "is not a quant state"),
        ({f"{UP}.{STATE}": letters("[" * 60_000)}, {}, "is not a quant state .*too deep"),
        ({f"{UP}.{STATE}": letters('{"shape": [Infinity, 2]}')}, {}, "is not a quant state"),
        (
            {"other.weight.absmax": np.zeros(3)},
            {},
            "other.weight.absmax does not belong to a 4-bit",
        ),
    ],
)
def test_what_does_not_fit_is_said(tensors, quant, said, tmp_path):
    folder = changed(tmp_path, **tensors)
    quant = QuantConfig(targets="**/layers*/**/kernel", **quant)
    with pytest.raises(lowrank.CheckpointError, match=f"(?s){said}"):
        load(folder, like(True), names=LLAMA, quant=quant)


def test_unrolled_layers_may_be_dense_here_and_coded_there(tmp_path):
    leaves = leaves_of(load(changed(tmp_path, **DENSE), like(False), names=LLAMA))
    assert leaves["params/layers_1/mlp/up_proj/kernel"].dtype == jnp.float32
    assert not isinstance(leaves["params/layers_1/mlp/up_proj/kernel"], lowrank.Quantized)
    assert isinstance(leaves["params/layers_0/mlp/up_proj/kernel"], lowrank.Quantized)


@pytest.mark.parametrize("size", [3, 64])
def test_stacks_in_the_middle_are_refused(size, tmp_path):
    """A second level is of what a leading axis stacks. With 64 no shape would tell."""
    nodes = lowrank.quantize(
        {f"{i}": np.ones((64, 64), np.float32) for i in range(size)}, QuantConfig(targets="*")
    )
    tensors = {}
    for i, node in nodes.items():
        tensors |= lowrank.bitsandbytes.to_state_dict(node, f"layers.{i}.weight")
    shutil.copy(FOLDER / "config.json", tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_tensors(file, tensors)
    fn = lambda p, x: jax.vmap(lambda k, x: x @ k, in_axes=(1, 0))(p["w"], x)
    params = {"w": jax.ShapeDtypeStruct((64, size, 64), np.float32)}
    plan = lowrank.plan(fn, params, np.ones((size, 5, 64), np.float32))
    with pytest.raises(lowrank.CheckpointError, match=r"stacked along axes \(1,\); in 4 bits they"):
        load(tmp_path, params, names={"w": lowrank.names.Parameter("layers.{}")}, plan=plan)


@pytest.mark.parametrize("shape", [(128, 64), (64, 64)])
def test_a_conv1d_lies_out_in_when_it_is_in_4_bits(shape, tmp_path):
    """As transformers' quantizer turns the weights of GPT-2's Conv1D."""
    kernel = np.random.default_rng(0).standard_normal(shape, np.float32)
    node = lowrank.quantize({"w": kernel}, QuantConfig(targets="w"))["w"]
    shutil.copy(FOLDER / "config.json", tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_tensors(file, lowrank.bitsandbytes.to_state_dict(node, "h.weight"))
    names = {"w": lowrank.names.Parameter("h", fan_in_fan_out=True)}
    got = load(tmp_path, {"w": jax.ShapeDtypeStruct(shape, np.float32)}, names=names)["w"]
    chex.assert_trees_all_equal(got, node)


def test_quant_of_other_leaves_may_be_of_another_kind():
    quant = QuantConfig(targets="**/embedding", format="int8")
    leaves = leaves_of(load(FOLDER, like(True), names=LLAMA, quant=quant))
    kinds = {p: x.format for p, x in leaves.items() if isinstance(x, lowrank.Quantized)}
    assert kinds.pop("params/embed_tokens/embedding") == "int8"
    assert set(kinds.values()) == {"nf4"}


def test_a_folder_in_4_bits_is_no_folder_to_write_like(tmp_path):
    params = lowrank.dequantize(load(FOLDER, like(True), names=LLAMA))
    with pytest.raises(lowrank.CheckpointError, match="whose weights are in 4 bits, but dense"):
        lowrank.huggingface.save(tmp_path / "out", params, names=LLAMA, like_folder=FOLDER)
    lowrank.huggingface.save(tmp_path / "out", params, names=LLAMA)
    again = load(tmp_path / "out", like(True), names=LLAMA)
    chex.assert_trees_all_equal(again, params)


def test_other_shapes_and_tables_are_refused(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    small = {"w": {"kernel": jax.ShapeDtypeStruct((32, 64), np.float32)}}
    with pytest.raises(
        lowrank.CheckpointError, match=r"q_proj\.weight: shape \[64, 64\], expected"
    ):
        load(FOLDER, small, names={"w/kernel": name}, ignore=["*"])
    table = {"w": {"embedding": jax.ShapeDtypeStruct((64, 64), np.float32)}}
    with pytest.raises(lowrank.CheckpointError, match="the leaf is not the weight of a product"):
        load(FOLDER, table, names={"w/embedding": name}, ignore=["*"])


def test_other_methods_and_merging_are_refused_with_a_remedy(tmp_path):
    folder = changed(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(lowrank.CheckpointError, match="'bitsandbytes', and not in 4 bits: fetch"):
        load(folder, like(True), names=LLAMA)
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(lowrank.CheckpointError, match="by 'gptq': fetch the model in its dense"):
        load(folder, like(True), names=LLAMA)
    with pytest.raises(lowrank.CheckpointError, match=r"or load it \(lowrank.huggingface.load\)"):
        lowrank.huggingface.merge(FOLDER, tmp_path, tmp_path / "merged")

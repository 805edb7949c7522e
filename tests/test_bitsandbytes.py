"""4-bit files of bitsandbytes, both ways (tests/golden/make_bitsandbytes_files.py)."""

import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import sys
import weakref
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_golden_peft import adapter, flax_params

import lowrank_jax as lowrank
from lowrank_jax import _codecs
from lowrank_jax._codecs.scales import DYNAMIC_MAP as MAP
from lowrank_jax._files.shards import Tensors
from lowrank_jax._nodes.quantized import quantize_array

safetensors = pytest.importorskip("safetensors", reason="pip install -e '.[dev]'")
from safetensors.numpy import save_file  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = Path(__file__).parent / "golden"
FILES = GOLDEN / "bitsandbytes_files"
ABOUT = json.loads((FILES / "layers.json").read_text())["layers"]
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama  # noqa: E402

from_state_dict = lowrank.bitsandbytes.from_state_dict
to_state_dict = lowrank.bitsandbytes.to_state_dict
HEADER = "weight.quant_state.bitsandbytes__"


def read(*paths):
    """Every tensor of the files."""
    tensors = {}
    for path in paths:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def below(tensors, prefix):
    """The tensors whose names begin so, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


LAYERS = read(FILES / "layers.safetensors")
SHARDS = sorted((FILES / "llama").glob("*.safetensors"))
LLAMA = read(*SHARDS)
with np.load(GOLDEN / "bitsandbytes" / "inputs.npz", allow_pickle=False) as file:
    INPUTS = dict(file)


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        chex.assert_equal_shape([got[name], array])
        assert got[name].dtype == array.dtype, name
        assert got[name].tobytes() == array.tobytes(), name


dequantize = jax.jit(lowrank.dequantize)


def dense(node):
    return np.asarray(dequantize({"leaf": node})["leaf"])


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized_as(weight, fan_in, options):
    return quantize_array(weight, fan_in, (), **dict(options))


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def layer_of(case):
    """A case's tensors, and what to_state_dict has to be told of them."""
    tensors = below(LAYERS, f"{case}.")
    options = {"quant_storage": tensors["weight"].dtype.name}
    return tensors, {**options, **({"shape": (3, 32, 64)} if case == "experts" else {})}


def decoded(tensors, header):
    """QLoRA's double dequantization, in NumPy: [out, in]."""
    n, scales = math.prod(header["shape"]), tensors["weight.absmax"]
    if "nested_offset" in header:
        nested = np.repeat(tensors["weight.nested_absmax"], 256)[: scales.size]
        scales = tensors["weight.nested_quant_map"][scales] * nested
        scales = scales + np.float32(header["nested_offset"])
    packed = tensors["weight"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n]
    values = tensors["weight.quant_map"][codes] * np.repeat(scales, header["blocksize"])[:n]
    return values.astype(jnp.dtype(header["dtype"])).reshape(header["shape"])


# bitsandbytes' files


@pytest.mark.parametrize("case", ABOUT)
def test_a_file_is_read_to_the_bit_and_written_to_the_byte(case):
    tensors, options = layer_of(case)
    node = from_state_dict(tensors, "weight")
    assert node.dtype.name == ABOUT[case]["dtype"]
    assert digest(np.swapaxes(dense(node), -1, -2)) == ABOUT[case]["decoded"]
    assert_same_bytes(to_state_dict(node, "weight", **options), tensors)


@pytest.mark.parametrize("packing", ["uint4", "uint8"])
@pytest.mark.parametrize("case", ["nf4-double", "fp4-odd", "experts"])
def test_tables_stay_as_they_are(case, packing):
    tensors, options = layer_of(case)
    node = from_state_dict(tensors, "weight", transpose=False, packing=packing)
    assert node.codes.dtype == packing
    assert digest(dense(node)) == ABOUT[case]["decoded"]
    assert_same_bytes(to_state_dict(node, "weight", **options), tensors)
    jaxes = {name: jnp.asarray(array) for name, array in tensors.items()}
    again = from_state_dict(jaxes, "weight", transpose=False, packing=packing)
    chex.assert_trees_all_equal(again, node)


def nibbles(tensors):
    """The codes, FP4's two zeros as one."""
    packed = tensors["weight"].reshape(-1).view(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    return np.where(codes == 8, 0, codes) if f"{HEADER}fp4" in tensors else codes


MADE = [case for case in ABOUT if case[:3] in ("nf4", "fp4") and "kept" not in case]


@pytest.mark.parametrize("case", MADE)
def test_quantize_writes_what_bitsandbytes_writes(case):
    theirs, how = layer_of(case)
    weight = jnp.asarray(INPUTS[ABOUT[case]["input"]])
    if weight.dtype == jnp.uint16:
        weight = jax.lax.bitcast_convert_type(weight, jnp.bfloat16)
    format, double = case.split("-")[0], "weight.nested_absmax" in theirs
    header = json.loads(theirs[HEADER + format].tobytes())
    options = {"format": format, "block_size": header["blocksize"], "double_quant": double}
    quant = lowrank.QuantConfig(targets="kernel", **options)
    node = lowrank.quantize({"kernel": weight.T.astype(ABOUT[case]["dtype"])}, quant)["kernel"]
    mine = to_state_dict(node, "weight", **how)
    assert mine.keys() == theirs.keys()
    np.testing.assert_array_equal(nibbles(mine), nibbles(theirs))
    exact = set(theirs) - ({"weight"} if format == "fp4" else set())
    if double:
        # their kernel on CPU rounds by a table of 65536; the mean is summed in another order
        exact -= {"weight.absmax", "weight.nested_absmax", HEADER + format}
        far = mine["weight.absmax"].astype(int) - theirs["weight.absmax"]
        # (one block alone is its own mean: 0 times anything)
        assert theirs["weight.nested_absmax"][0] == 0 or np.abs(far).max() <= 2
        np.testing.assert_allclose(
            mine["weight.nested_absmax"], theirs["weight.nested_absmax"], rtol=1e-6
        )
        offsets = [json.loads(t[HEADER + format].tobytes()) for t in (mine, theirs)]
        np.testing.assert_allclose(*(o.pop("nested_offset") for o in offsets), rtol=1e-6)
        assert list(offsets[0].items()) == list(offsets[1].items())
    assert_same_bytes({k: mine[k] for k in exact}, {k: theirs[k] for k in exact})
    again = from_state_dict(mine, "weight")
    chex.assert_trees_all_equal(again, node)
    assert jax.tree.structure(again) == jax.tree.structure(node)


KERNELS = {  # shape, fan-in, torch's shape
    "heads": ((128, 4, 3), (0,), (12, 128)),
    "out of heads": ((4, 32, 10), (0, 1), (10, 128)),
    "out of heads of whole blocks": ((3, 64, 5), (0, 1), (5, 192)),
    "heads before": ((4, 64, 3), (1,), (12, 64)),
    "transposed": ((24, 128), (1,), (24, 128)),
    "gates, transposed": ((2, 5, 64), (2,), (10, 64)),
    "one row": ((64, 1), (0,), (1, 64)),
    "ragged heads": ((5, 4, 3), (0,), (12, 5)),
    "ragged, out of heads": ((4, 3, 5), (0, 1), (5, 12)),
    "ragged, transposed": ((2, 4, 9), (2,), (8, 9)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_many_axes_are_written_as_matrices(name):
    shape, fan_in, torch = KERNELS[name]
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    node = quantized_as(weight, fan_in, (("double_quant", name != "heads"),))
    tensors = to_state_dict(node, "weight")
    header = json.loads(tensors[HEADER + "nf4"].tobytes())
    assert tuple(header["shape"]) == torch
    order = (*(axis for axis in range(len(shape)) if axis not in fan_in), *fan_in)
    matrix = dense(node).transpose(order).reshape(torch)
    np.testing.assert_array_equal(decoded(tensors, header), matrix)


# Stacks


def layers(*shape, count=3, **options):
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((count, *shape), np.float32)
    return [quantized_as(weight, (0,), tuple(options.items())) for weight in weights]


@pytest.mark.parametrize(
    ("shape", "options"),
    [((64, 5), {}), ((64, 5), {"double_quant": False, "packing": "uint8"}), ((5, 30), {})],
)
def test_layers_stack(shape, options):
    nodes = layers(*shape, **options)
    if not options:
        maps = [jnp.asarray(MAP * np.float32(k / 5)) for k in (1, 2, 4)]
        nodes = [dataclasses.replace(n, nested_map=m) for n, m in zip(nodes, maps, strict=True)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *nodes)
    assert stacked.shape == (3, *shape)
    want = np.stack([dense(node) for node in nodes])
    np.testing.assert_array_equal(dense(stacked), want)

    name = "layers.{}.weight"
    tensors = to_state_dict(stacked, name)
    for i, node in enumerate(nodes):
        assert_same_bytes(below(tensors, f"layers.{i}."), to_state_dict(node, "weight"))
    again = from_state_dict(tensors, name, packing=options.get("packing", "uint4"))
    chex.assert_trees_all_equal(again, stacked)

    def model(weights, x):
        step = lambda x, w: (jnp.tanh(x @ w @ np.ones(w.shape[::-1], np.float32)), None)
        return jax.lax.scan(step, x, weights)[0]

    x = np.linspace(-1, 1, 2 * shape[0], dtype=np.float32).reshape(2, shape[0])
    lifted = lowrank.lift(model, fallback="raise")
    both = jax.jit(lambda stacked, dense: (lifted(stacked, x), model(dense, x)))
    np.testing.assert_allclose(*both(stacked, want), rtol=1e-5, atol=1e-5)


def test_two_axes_of_layers():
    nodes = layers(64, 2, count=6, double_quant=False)
    names = [f"layers.{i}.experts.{j}.weight" for i in range(2) for j in range(3)]
    tensors = {}
    for name, node in zip(names, nodes, strict=True):
        tensors |= to_state_dict(node, name)
    name = "layers.{}.experts.{}.weight"
    node = from_state_dict(tensors, name)
    assert node.shape == (2, 3, 64, 2)
    np.testing.assert_array_equal(dense(node).reshape(6, 64, 2), np.stack(list(map(dense, nodes))))
    assert_same_bytes(to_state_dict(node, name), tensors)


def test_a_file_brings_its_own_map():
    tensors = below(LAYERS, "plain.")
    node = from_state_dict(tensors, "weight")
    differ = np.asarray(node.nested_map) != MAP
    assert differ.any()
    usual = dataclasses.replace(node, nested_map=None)
    assert (dense(usual) != dense(node)).any()
    specs = lowrank.specs({"w": node}, {"w": P(None, "x")})["w"]
    assert (specs.nested_map, specs.scales) == (P(None), P(None, "x"))
    split = lowrank.specs({"w": jax.tree.map(lambda a: a[None], node)}, {"w": P("y", None, "x")})
    assert split["w"].nested_map == P("y", None)
    table = from_state_dict(tensors, "weight", transpose=False)
    look_up = jax.jit(lowrank.lift(lambda p, ids: p[ids], fallback="raise"))
    rows = look_up(table, np.array([7, 0]))
    np.testing.assert_array_equal(rows, dense(table)[[7, 0]])
    # a map all its own, so that a product cannot take the usual one unseen
    node = dataclasses.replace(node, nested_map=-node.nested_map)
    x, want = np.eye(64, dtype=np.float32), dense(node)
    mapped = jax.shard_map(
        lambda w, x: x @ w,
        mesh=jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=(P(None, "x"), P()),
        out_specs=P(None, "x"),
    )
    for fn in (lambda w, x: x @ w, mapped):
        got = jax.jit(lowrank.lift(fn, fallback="raise"))(node, x)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


# Any bytes go through


@st.composite
def files(draw):
    """Tensors that bitsandbytes could have written, with codes of any kind."""
    shape = tuple(draw(st.lists(st.integers(1, 70), min_size=2, max_size=2)))
    shape = draw(st.sampled_from([shape, (shape[0], 64), (shape[0], 128)]))
    format, block = draw(st.sampled_from(["nf4", "fp4"])), draw(st.sampled_from([32, 64, 128]))
    double, rng = draw(st.booleans()), np.random.default_rng(draw(st.integers(0, 99)))
    n = math.prod(shape)
    blocks = -(-n // block)
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    header = {"quant_type": format, "blocksize": block, "dtype": dtype, "shape": shape}
    tensors = {
        "weight": rng.integers(0, 256, ((n + 1) // 2, 1), np.uint8),
        "weight.absmax": rng.uniform(0.5, 2, blocks).astype(np.float32),
        "weight.quant_map": _codecs.FORMATS[format].table,
    }
    if double:
        offset = float(rng.standard_normal(dtype=np.float32))
        header |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {
            "weight.absmax": rng.integers(0, 256, blocks, np.uint8),
            "weight.nested_absmax": rng.uniform(0.5, 2, -(-blocks // 256)).astype(np.float32),
            "weight.nested_quant_map": MAP,
        }
    tensors[HEADER + format] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    return tensors, header


@settings(max_examples=8, deadline=None, derandomize=True)
@given(file=files(), transpose=st.booleans(), packing=st.sampled_from(["uint4", "uint8"]))
def test_any_codes_come_back(file, transpose, packing):
    tensors, want = file[0], decoded(*file)
    node = from_state_dict(tensors, "weight", transpose=transpose, packing=packing)
    np.testing.assert_array_equal(dense(node).T if transpose else dense(node), want)
    assert_same_bytes(to_state_dict(node, "weight"), tensors)


@pytest.mark.parametrize(("case", "side"), [("nf4", "absmax"), ("nf4-double", "nested_absmax")])
def test_bits_that_are_no_ordinary_numbers_come_back(case, side):
    numbers = LAYERS[f"{case}.weight.{side}"].view(np.uint32).copy()
    odd = [1, 0x7FC12345, 0x80000000, 0x00400000, 0x7F800000, 0xFFFFFFFF]
    numbers[:6] = odd[: numbers.size]
    tensors = changed(case, **{side: numbers.view(np.float32)})
    for transpose in (False, True):
        node = from_state_dict(tensors, "weight", transpose=transpose)
        assert_same_bytes(to_state_dict(node, "weight"), tensors)


# A model that transformers saved, with peft's adapter on it


def llama_params(scan):
    """What `load` reads, as parameters of examples/llama.py; its kernels are Flax's already."""
    return flax_params(lowrank.bitsandbytes.load(FILES / "llama"), scan, kernel=lambda leaf: leaf)


@pytest.mark.parametrize("scan", [False, True])
def test_logits_and_gradients_equal_peft_on_a_prequantized_llama(scan):
    params = llama_params(scan)
    golden = json.loads((FILES / "lora.json").read_text())
    with np.load(FILES / "lora.npz", allow_pickle=False) as file:
        tensors = dict(file)
    tokens = tensors["tokens"]
    model = llama.Llama(
        llama.LlamaConfig(
            vocab=64, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128,
            tie_embeddings=False, attention_bias=True, mlp_bias=True, scan_layers=scan,
        )
    )  # fmt: skip
    config = lowrank.LoraConfig(
        rank=golden["r"],
        alpha=golden["lora_alpha"],
        targets=[f"**/{name}/kernel" for name in golden["target_modules"]],
    )
    plan = lowrank.plan(model.apply, params, tokens)
    start = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan)[1]
    lora = adapter(jax.eval_shape(start, params), tensors, scan)
    lifted = lowrank.lift(model.apply, fallback="raise")

    def loss(lora):
        logits = lifted(lowrank.combine(params, lora), tokens)
        rows = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(rows, tokens[:, 1:, None], axis=-1).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    np.testing.assert_allclose(logits, tensors["logits"], atol=1e-5)
    np.testing.assert_allclose(value, tensors["loss"], rtol=1e-6)
    theirs = adapter(gradients, tensors, scan, prefix="grad/")
    chex.assert_trees_all_close(gradients, theirs, rtol=1e-4, atol=1e-6)


def test_the_pages_say_where_leaves_go():
    page = (Path(__file__).parents[1] / "docs" / "api" / "quantization.md").read_text()
    block = re.search(r"```python\n(leaves = lowrank\.bitsandbytes\.load.*?)```", page, re.DOTALL)
    names = {"lowrank": lowrank, "jax": jax, "jnp": jnp, "folder": FILES / "llama"}
    exec(block.group(1), names)
    params = llama_params(scan=True)["params"]
    chex.assert_trees_all_equal(names["params"]["embed_tokens"], params["embed_tokens"])
    chex.assert_trees_all_equal(names["params"]["lm_head"], params["lm_head"])
    for name, leaf in names["params"]["layers"]["self_attn"].items():
        kernel = params["layers"]["self_attn"][name]["kernel"]
        chex.assert_trees_all_equal(leaf["kernel"], kernel)


# Folders


def copy(tmp_path, config=None, drop=(), add=None):
    """The Llama's folder, changed."""
    folder = tmp_path / "model"
    shutil.copytree(FILES / "llama", folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v for k, v in {**LLAMA, **(add or {})}.items() if k not in drop}
    if drop or add:
        for path in folder.glob("model*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_folder_is_read_whole(tmp_path):
    half = np.linspace(0, 1, 6).astype(jnp.bfloat16).reshape(2, 3)
    folder = copy(tmp_path, add={"extra.bias": half, "counter": np.array(2**40)})
    for place, packing in ((FILES / "llama", "uint8"), (str(folder), "uint4")):
        leaves = lowrank.bitsandbytes.load(place, packing=packing)
        weights = {k for k, v in leaves.items() if isinstance(v, lowrank.Quantized)}
        assert len(weights) == 14
        assert {leaves[name].codes.dtype.name for name in weights} == {packing}
        tensors = {k: v for k, v in leaves.items() if k not in weights}
        for name in weights:
            tensors |= to_state_dict(leaves[name], name)
        extra = {"extra.bias": half, "counter": np.array(2**40)} if packing == "uint4" else {}
        assert_same_bytes(tensors, LLAMA | extra)


def test_a_folder_is_read_tensor_by_tensor(monkeypatch):
    read_one, read_all, alive = Tensors.__getitem__, [], []

    def watched(self, name):
        array = read_one(self, name)
        if array.dtype == np.uint8 and name.endswith(".weight"):
            read_all.append(weakref.ref(array))
            alive.append(sum(ref() is not None for ref in read_all))
        return array

    monkeypatch.setattr(Tensors, "__getitem__", watched)
    lowrank.bitsandbytes.load(FILES / "llama")
    assert len(alive) == 14
    assert max(alive) <= 2


def spoiled(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))
    return folder


def without(folder, *names):
    for name in names:
        (folder / name).unlink()
    return folder


INDEX, FIRST, SECOND = "model.safetensors.index.json", *(path.name for path in SHARDS)
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
FOLDERS = {
    "no folder": (lambda p: p / "none", r"none/config\.json could not be read \(FileNotFound"),
    "no model": (
        lambda p: without(copy(p), INDEX),
        r"holds neither model\.safetensors nor model\.safetensors\.index\.json: save the model",
    ),
    "a pickle": (
        lambda p: pickled(without(copy(p), INDEX)),
        r"pytorch_model\.bin is a pickle, and nothing here unpickles: save the model again, as",
    ),
    "not quantized": (lambda p: copy(p, {}), r"has quant_method None, but only 'bitsandbytes'"),
    "another method": (
        lambda p: copy(p, {"quantization_config": {"quant_method": "gptq"}}),
        r"has quant_method 'gptq', .* lowrank\.quantize it",
    ),
    "8 bits": (
        lambda p: copy(
            p, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        ),
        r"does not have load_in_4bit: 8-bit models \(LLM\.int8\) are not supported",
    ),
    "a config that is none": (lambda p: copy(p, [1]), r"config\.json holds list, not an"),
    "a missing shard": (
        lambda p: without(copy(p), SECOND),
        rf"(?s)model lacks shards that its index names; fetch them again\n  - {SECOND}",
    ),
    "a damaged shard": (
        lambda p: truncated(copy(p)),
        rf"{FIRST} is not a safetensors file, or is damaged: it holds \d+ bytes of data",
    ),
    "an index of other shards": (
        lambda p: spoiled(copy(p), INDEX, lambda text: text.replace('"lm_head', '"other_head')),
        r"(?s)names tensors that its shards do not hold: .*- other_head\.weight",
    ),
    "an index that leaves the folder": (
        lambda p: spoiled(copy(p), INDEX, lambda text: text.replace(f'"{FIRST}', f'"../{FIRST}')),
        rf"names files outside its folder:\n  - \.\./{FIRST}",
    ),
    "an index that is none": (
        lambda p: spoiled(copy(p), INDEX, lambda text: "{}"),
        r"is not an index of shards: expected a weight_map",
    ),
    "a tensor twice": (lambda p: twice(copy(p)), r"two shards hold '.*'; the second is .*00002"),
    "side tensors are missing": (
        lambda p: copy(p, drop=(f"{Q}.absmax", f"{K}.nested_absmax")),
        rf"(?s)is damaged:.*{Q}\.absmax is missing.*{K}\.nested_absmax is missing",
    ),
    "a weight is missing": (lambda p: copy(p, drop=(Q,)), rf"but no tensor '{Q}'"),
    "side tensors are left over": (
        lambda p: copy(p, add={"x.weight.absmax": np.zeros(1, np.float32)}),
        r"x\.weight\.absmax does not belong to a 4-bit weight",
    ),
    "an unknown format": (
        lambda p: copy(p, drop=(STATE,), add={f"{Q}.quant_state.bitsandbytes__nf3": LLAMA[STATE]}),
        rf"'{Q}' needs one of .*; there is \['{Q}\.quant_state\.bitsandbytes__nf3'\]",
    ),
}


def truncated(folder):
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def twice(folder):
    shutil.copy(folder / FIRST, folder / SECOND)
    return folder


@pytest.mark.parametrize("mistake", FOLDERS)
def test_folders_that_are_refused(mistake, tmp_path):
    make, words = FOLDERS[mistake]
    folder = make(tmp_path)
    with pytest.raises(lowrank.CheckpointError, match=words):
        lowrank.bitsandbytes.load(folder)


def test_files_are_read_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert len(lowrank.bitsandbytes.load(FILES / "llama")) == 35


# What is refused


def changed(case="nf4-double", header=None, **arrays):
    """A layer's tensors, some replaced, or left out by None, and the JSON updated."""
    tensors = dict(below(LAYERS, f"{case}."))
    key = next(key for key in tensors if HEADER in key)
    if header is not None:
        values = json.loads(tensors[key].tobytes()) | header
        values = {name: value for name, value in values.items() if value is not None}
        tensors[key] = np.frombuffer(json.dumps(values).encode(), np.uint8)
    tensors |= {f"weight.{side}": array for side, array in arrays.items()}
    return {name: array for name, array in tensors.items() if array is not None}


class Foreign:
    def __array__(self, *_, **__):
        raise TypeError("unsupported ScalarType BFloat16")


NF4, FP4 = _codecs.FORMATS["nf4"].table, _codecs.FORMATS["fp4"].table
TWO = {
    f"{i}.{k}": v
    for i, c in enumerate(("nf4", "fp4-double"))
    for k, v in below(LAYERS, f"{c}.").items()
}
READS = {
    "another name": (
        lambda: from_state_dict(LAYERS, "nf4.weigth"),
        r"no tensor 'nf4\.weigth': pass the weight's full key; the nearest are \['nf4\.weight'",
    ),
    "a dense weight": (
        lambda: from_state_dict(LLAMA, "lm_head.weight"),
        r"'lm_head\.weight' needs one of .*; there is none: it is not a 4-bit weight",
    ),
    "two formats": (
        lambda: from_state_dict(
            changed() | {HEADER + "fp4": LAYERS["nf4." + HEADER + "nf4"]}, "weight"
        ),
        r"'weight' needs one of .*; there is \[.*nf4', .*fp4'\]",
    ),
    "a format of another name": (
        lambda: from_state_dict(changed(header={"quant_type": "fp4"}), "weight"),
        r"quant_type is 'fp4'; expected 'nf4'",
    ),
    "no second level": (
        lambda: from_state_dict(changed(nested_absmax=None, quant_map=None), "weight"),
        r"(?s)weight\.quant_map is missing.*weight\.nested_absmax is missing",
    ),
    "a second level that the JSON does not know": (
        lambda: from_state_dict(changed(header={"nested_offset": None}), "weight"),
        r"(?s)weight\.nested_absmax is left over: .*weight\.nested_quant_map is left over",
    ),
    "JSON of unknown values": (
        lambda: from_state_dict(
            changed(header={"blocksize": 48, "dtype": "float64", "nested_blocksize": 64}), "weight"
        ),
        r"(?s)blocksize is 48; expected 32 or .*dtype is 'float64'; .*nested_blocksize is 64",
    ),
    "JSON of no shape": (
        lambda: from_state_dict(changed(header={"shape": None}), "weight"),
        r"is not a quant state of bitsandbytes \(KeyError\('shape'\)\)",
    ),
    "a shape of nothing": (
        lambda: from_state_dict(changed(header={"shape": [0, 64]}), "weight"),
        r"shape is \[0, 64\]; expected sizes of 1 or more",
    ),
    "no JSON": (
        lambda: from_state_dict(
            changed(**{"quant_state.bitsandbytes__nf4": np.arange(9, dtype=np.uint8)}), "weight"
        ),
        r"is not a quant state of bitsandbytes \(JSONDecodeError",
    ),
    "another shape": (
        lambda: from_state_dict(changed(header={"shape": [128, 64]}), "weight"),
        r"(?s)weight has 12288 bytes; \[128, 64\] needs 4096.*absmax is uint8 \[384\]; expected "
        r"uint8 \[128\].*nested_absmax is float32 \[2\]; expected float32 \[1\]",
    ),
    "scales in half precision": (
        lambda: from_state_dict(changed("nf4", absmax=np.ones(96, np.float16)), "weight"),
        r"weight\.absmax is float16 \[96\]; expected float32 \[96\]",
    ),
    "another table": (
        lambda: from_state_dict(changed(quant_map=np.nextafter(NF4, 2)), "weight"),
        r"weight\.quant_map is not the table of nf4",
    ),
    "a map beyond 1": (
        lambda: from_state_dict(changed(nested_quant_map=MAP * 2), "weight"),
        r"weight\.nested_quant_map has entries that are not in \[-1, 1\]",
    ),
    "an array that is none": (
        lambda: from_state_dict(changed(absmax=Foreign()), "weight"),
        r"weight\.absmax, a Foreign, is not a NumPy array \(unsupported ScalarType BFloat16\)",
    ),
    "no layers": (
        lambda: from_state_dict(LLAMA, "model.layers.{}.q_proj.weight"),
        r"no tensor matches 'model\.layers\.\{\}\.q_proj\.weight' with numbers",
    ),
    "a layer is missing": (
        lambda: from_state_dict({"0.w": 0, "2.w": 0, "4.w": 0}, "{}.w"),
        r"(?s)'\{\}\.w' cannot be stacked; missing are\n  - 1\.w\n  - 3\.w$",
    ),
    "layers that differ": (
        lambda: from_state_dict(TWO, "{}.weight"),
        r"'1\.weight' differs from '0\.weight' in shape, format or nested_quant_map",
    ),
}


@pytest.mark.parametrize("mistake", READS)
def test_tensors_that_are_refused(mistake):
    make, words = READS[mistake]
    with pytest.raises(lowrank.CheckpointError, match=words):
        make()


def test_the_other_zero_of_fp4_is_no_other_table():
    table = np.where(np.arange(16) == 8, np.float32(-0.0), FP4)
    node = from_state_dict(changed("fp4", quant_map=table), "weight")
    assert digest(dense(node).T) == ABOUT["fp4"]["decoded"]


@functools.cache
def node(shape=(64, 3), **options):
    return quantize_array(
        np.ones(shape, np.float32), (len(shape) - 2,), tuple(range(len(shape) - 2)), **options
    )


WRITES = {
    "an array": (
        lambda: to_state_dict(jnp.ones(3), "w"),
        lowrank.TreeError,
        r"w: to_state_dict takes a Quantized leaf, not ArrayImpl",
    ),
    "int8": (
        lambda: to_state_dict(node(format="int8"), "w"),
        lowrank.ConfigError,
        r"w is in format 'int8', which .*: quantize the dense weight with format=\"nf4\"",
    ),
    "a stack under one name": (
        lambda: to_state_dict(node((2, 64, 3)), "layers.weight"),
        lowrank.AxesError,
        r"stack axes of sizes \[2\], .*: 'layers\.weight' needs one '\{\}' for each",
    ),
    "one leaf under many names": (
        lambda: to_state_dict(node(), "layers.{}.weight"),
        lowrank.AxesError,
        r"stack axes of sizes \[\]",
    ),
    "another shape": (
        lambda: to_state_dict(node(), "w", shape=(3, 65)),
        lowrank.ConfigError,
        r"w: shape \[3, 65\] does not have the leaf's 192 elements",
    ),
    "an unknown storage": (
        lambda: to_state_dict(node(), "w", quant_storage="int4"),
        lowrank.ConfigError,
        r"w: bitsandbytes writes uint8 or bfloat16 or float16 or float32, not int4",
    ),
    "bytes that are no whole number": (
        lambda: to_state_dict(node((5, 2)), "w", quant_storage="float32"),
        lowrank.ConfigError,
        r"w: 5 bytes are not a multiple of float32",
    ),
    "an unknown dtype": (
        lambda: to_state_dict(dataclasses.replace(node(), weight_dtype="float64"), "w"),
        lowrank.ConfigError,
        r"w: bitsandbytes writes bfloat16 or float16 or float32, not float64",
    ),
    "a vector, transposed": (
        lambda: from_state_dict(changed(header={"shape": [128 * 192]}), "weight"),
        lowrank.AxesError,
        r"weight is of shape \[24576\]: pass transpose=False",
    ),
    "an unknown packing": (
        lambda: from_state_dict(changed(), "weight", packing="int4"),
        lowrank.ConfigError,
        r"packing must be one of",
    ),
}


@pytest.mark.parametrize("mistake", WRITES)
def test_leaves_and_options_that_are_refused(mistake):
    make, kind, words = WRITES[mistake]
    with pytest.raises(kind, match=words):
        make()

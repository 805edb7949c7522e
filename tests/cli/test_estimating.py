"""estimate, the command: known models have their number of parameters, and bad sizes are said."""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lowrank
from lowrank_jax._cli import estimating, plain_llama
from lowrank_jax._cli.main import main

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def count_parameters(name):
    shapes = plain_llama.make_shapes(plain_llama.MODELS[name], jnp.bfloat16)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


# as their authors count them
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_a_named_model_has_its_parameters(name, count):
    assert count_parameters(name) == count


def run(*flags):
    parser = argparse.ArgumentParser()
    estimating.add_arguments(parser)
    return estimating.estimate_llama(parser.parse_args(flags))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_a_folder_is_estimated_by_its_config(folder, fast_compile):
    dense = run("--like", str(folder), "--tokens", "16", "--rank", "4")
    four_bits = run("--like", str(folder), "--tokens", "16", "--rank", "4", "--quantize", "nf4")
    # q, k, v, o, gate, up and down of two layers, in float32
    sums = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 96)
    assert dense.groups["adapters"] == 2 * 4 * sums * 4
    assert dense.groups["optimizer"] == 2 * dense.groups["adapters"] + 4
    assert four_bits.groups["base"] < dense.groups["base"]
    assert four_bits.groups["scales"] > 0


def test_the_model_is_causal_and_uses_all_its_parameters(fast_compile):
    sizes = plain_llama.Sizes(**TINY, head_dim=8)
    apply = plain_llama.Llama(sizes).apply
    keys = iter(jax.random.split(jax.random.key(0), 100))
    normal = lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype) / 4
    params = jax.tree.map(normal, plain_llama.make_shapes(sizes, jnp.float32))
    tokens = jnp.arange(10)[None] % 7
    logits = apply(params, tokens)
    assert logits.shape == (1, 10, 64)
    changed = apply(params, tokens.at[0, 5].set(9))
    np.testing.assert_array_equal(logits[0, :5], changed[0, :5])
    assert (logits[0, 5:] != changed[0, 5:]).any(-1).all()
    grads = jax.grad(lambda params: apply(params, tokens).std())(params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


WIDE = {  # whole blocks of 64 for each of eight devices
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
FSDP = ("--mesh", "8x1", "--batch", "8", "--tokens", "4", "--rank", "2", "--quantize", "nf4")


@pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices")
def test_codes_are_gathered_and_no_weight(tmp_path, fast_compile):
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    found = run("--like", str(tmp_path), *FSDP)
    assert found.devices == 8
    values = 2 * 7 * 512 * 512  # of the linear layers; a code takes a byte on a CPU
    scales = values // 64
    vocabulary = 256 * 512 * 2 * 2 // 8  # the table and the head, in bfloat16
    assert found.groups["base"] == pytest.approx(values // 8 + vocabulary, rel=0.01)
    # each layer's, for the forward and for the backward pass
    assert found.collectives["all-gather u8"] == 2 * (values + scales)
    floats = [
        size
        for name, size in found.collectives.items()
        if name.startswith("all-gather") and name.split()[1] in ("f32", "bf16", "f16")
    ]
    assert sum(floats) < 512 * 512 * 2  # activations and factors, together less than one weight


def test_the_loss_over_chunks_is_the_whole_loss(fast_compile):
    sizes = plain_llama.Sizes(**TINY, head_dim=8, tie_word_embeddings=True)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    normal = lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype) / 4
    params = jax.tree.map(normal, plain_llama.make_shapes(sizes, jnp.float32))
    tokens = jax.random.randint(next(keys), (2, 13), 0, 64)
    logits = jax.jit(plain_llama.Llama(sizes).apply)(params, tokens[:, :-1])
    want = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    for chunk in (None, 4):
        loss = jax.jit(plain_llama.Llama(sizes, chunk=chunk).compute_loss)
        np.testing.assert_allclose(loss(params, tokens[:, :-1], tokens[:, 1:]), want, rtol=1e-6)


def test_meshes_and_chunks_that_do_not_divide_are_refused(folder, capsys):
    for flags, words in (
        (("--mesh", "2x1"), "--batch 1 does not divide among 2 devices"),
        (("--mesh", "1x2", "--tokens", "5"), "--tokens 5 does not divide among 2 devices"),
        (("--mesh", "64x64", "--batch", "64"), "is 4096 devices, and this machine has"),
        (("--tokens", "16", "--loss-chunk", "5"), "--loss-chunk 5 does not divide --tokens 16"),
    ):
        with pytest.raises(lowrank.ConfigError, match=words):
            run("--like", str(folder), *flags)
    with pytest.raises(SystemExit):
        main(["estimate", "--like", str(folder), "--mesh", "8"])
    assert "'8' is not two positive integers" in capsys.readouterr().err


def test_each_measure_saves_what_it_says(tmp_path):
    sizes = TINY | {"hidden_size": 64, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes))

    def count(*flags):
        parser = argparse.ArgumentParser()
        estimating.add_arguments(parser)
        common = ("--like", str(tmp_path), "--tokens", "16", "--packing", "uint8")
        _, args = estimating.make_step(parser.parse_args([*common, *flags]))
        size = lambda leaf: leaf.size * leaf.dtype.itemsize
        return [sum(map(size, jax.tree.leaves(arg))) for arg in args[:3]]

    base, lora, _ = count()
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # q, o, k, v, gate, up, down
    scales = lambda values: values / 64 * (1 + 4 / 256)  # a byte for 64, a float32 for 256 of those
    four_bits = count("--quantize", "nf4")[0]
    assert base - four_bits == pytest.approx(layers * 3 / 2 - scales(layers), rel=0.002)
    tables = 2 * 64 * 64
    both = count("--quantize", "nf4", "--quantize-vocabulary", "int8")[0]
    assert four_bits - both == pytest.approx(tables - scales(tables), rel=0.002)
    assert count("--factor-dtype", "bfloat16")[1] == lora // 2
    assert count("--rank", "64", "--optimizer-bits", "8")[2] < 0.3 * count("--rank", "64")[2]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": "32"}, r"hidden_size is '32'; expected a positive integer"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ],
)
def test_a_config_without_sizes_is_refused(folder, config, words):
    (folder / "config.json").write_text(json.dumps(TINY | config))
    with pytest.raises(lowrank.ConfigError, match=words):
        plain_llama.read_sizes(str(folder))


def test_other_models_are_refused_and_defaults_are_taken(folder):
    write = lambda **fields: (folder / "config.json").write_text(json.dumps(TINY | fields))
    for fields, words in (
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type is 'mixtral'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_key_value_heads": 3}, "4 heads share 3"),
    ):
        write(**fields)
        with pytest.raises(lowrank.ConfigError, match=words):
            plain_llama.read_sizes(str(folder))
    write(num_key_value_heads=None, head_dim=None, model_type="qwen3")
    sizes = plain_llama.read_sizes(str(folder))
    assert (sizes.num_key_value_heads, sizes.head_dim, sizes.tie_word_embeddings) == (4, 8, False)
    write(model_type="gemma2")
    assert plain_llama.read_sizes(str(folder)).tie_word_embeddings


def test_the_command(folder, capsys, fast_compile):
    assert main(["estimate", "--like", str(folder), "--tokens", "16"]) == 0
    out = capsys.readouterr().out
    assert "adapters" in out
    assert "temporaries" in out
    assert main(["estimate", "--like", "mixtral"]) == 1
    assert "neither a folder with a config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["estimate", "--like", str(folder), "--batch", "0"])
    assert "'0' is not a positive integer" in capsys.readouterr().err


def test_a_model_that_is_not_known_names_those_that_are():
    with pytest.raises(lowrank.ConfigError, match="llama-2-7b.*did you mean llama-3-8b"):
        plain_llama.read_sizes("llama3-8b")

"""estimate, the command: known models have their number of parameters, and bad sizes are said."""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
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
    apply = plain_llama.make_model(sizes, remat=True)
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

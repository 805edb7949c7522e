"""How the command line names the modules of an adapter."""

import json

import jax.numpy as jnp
import pytest

import lowrank_jax as lowrank
from lowrank_jax._cli.naming import PATHS, TABLES, choose_names


def adapter(*paths, stack=()):
    """A flat adapter with a leaf at each path."""
    ndim = len(stack)
    node = lowrank.LowRank(
        jnp.ones((2,) * ndim + (4, 1)),
        jnp.ones((2,) * ndim + (1, 4)),
        None,
        (ndim,),
        (ndim + 1,),
        stack,
    )
    return dict.fromkeys(paths, node)


QKV = [f"attention/{name}/kernel" for name in ("query", "key", "value")]

# name -> (adapter, model_type of the base or None, what is chosen)
CHOICES = {
    "a scanned Llama": (adapter("params/layers/mlp/up_proj/kernel", stack=(0,)), None, "llama"),
    "an unrolled Llama": (adapter("params/layers_0/self_attn/q_proj/kernel"), None, "llama"),
    "GPT-2": (adapter("h_0/attn/c_attn/kernel"), None, "gpt2"),
    "Gemma, by its einsum": (adapter("layer_0/attn/q_einsum/w"), None, "gemma"),
    "a model of no table": (adapter("encoder/block/kernel"), None, PATHS),
    "no table names all": (adapter("layers_0/mlp/up_proj/kernel", "adapter/kernel"), None, PATHS),
    "several tables, none of them sure": (adapter(*(f"layers_0/{n}" for n in QKV)), None, PATHS),
    "the same, and a base": (adapter(*(f"layers_0/{n}" for n in QKV)), "vit", "vit"),
    "a base that does not fit": (adapter("h_0/attn/c_attn/kernel"), "llama", "gpt2"),
    "an unknown base": (adapter("h_0/attn/c_attn/kernel"), "mamba", "gpt2"),
    "a module's own name": (adapter("model/layers/0/mlp/up_proj/kernel"), None, PATHS),
    "a Llama inside of a model": (
        adapter("language_model/model/layers/0/mlp/up_proj/kernel"), None, PATHS,
    ),
    "a BERT without its head": (adapter("encoder/layer/0/intermediate/dense/kernel"), None, PATHS),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case, tmp_path):
    lora, model_type, expected = CHOICES[case]
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert choose_names(lora, None, tmp_path) == expected


def test_what_is_given_is_taken():
    assert choose_names(adapter("h_0/attn/c_attn/kernel"), "bert") == "bert"


def test_ambiguous_stacks_are_refused_with_what_fits():
    lora = adapter(*(f"layers/{name}" for name in QKV), stack=(0,))
    with pytest.raises(lowrank.CheckpointError, match=r"--names TABLE, one of .*fit .*bert.*vit"):
        choose_names(lora, None)


def test_every_table_can_be_given():
    assert set(TABLES) == {"bert", "gemma", "gemma2", "gpt2", "llama", "qwen", "vit", "vit5"}

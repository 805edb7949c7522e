"""Tables of names: every spelling of Flax, every leaf of the example."""

import re

import pytest
from peft_files import (
    BASE,
    LLAMA,
    params_of,
)

import lowrank_jax as lowrank
from lowrank_jax._jax.paths import flatten

pytestmark = pytest.mark.usefixtures("fast_compile")

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

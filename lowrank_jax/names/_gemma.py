"""The tables of names for Gemma, Gemma 2 and Gemma 3."""

from __future__ import annotations

from lowrank_jax.names._llama import ATTENTION, ENDS, LLAMA, MLP, TIED
from lowrank_jax.names._table import Table

# The names of google-deepmind/gemma, in addition to those of Llama. Its fused kv_einsum and
# gating_einsum hold two torch modules each, so they have no name.
GEMMA_ATTENTION = {
    "#/attn/q_einsum": "model.layers.{}.self_attn.q_proj",
    "#/attn/attn_vec_einsum": "model.layers.{}.self_attn.o_proj",
    "#/attn/_query_norm": "model.layers.{}.self_attn.q_norm",
    "#/attn/_key_norm": "model.layers.{}.self_attn.k_norm",
}


GEMMA_LEAVES = {
    "embedder/input_embedding": "model.embed_tokens.weight",
    "#/mlp/linear": "model.layers.{}.mlp.down_proj.weight",
}


GEMMA = Table(
    {
        **GEMMA_ATTENTION,
        **LLAMA.modules,
        "#/mlp/linear": "model.layers.{}.mlp.down_proj",
        "#/pre_ffw_norm": "model.layers.{}.post_attention_layernorm",
    },
    GEMMA_LEAVES,
    tied=TIED,
)


GEMMA2 = Table(
    {
        **GEMMA_ATTENTION,
        **ATTENTION,
        **MLP,
        **ENDS,
        "#/mlp/linear": "model.layers.{}.mlp.down_proj",
        "#/input_layernorm|pre_attention_norm": "model.layers.{}.input_layernorm",
        "#/post_attention_layernorm|post_attention_norm": (
            "model.layers.{}.post_attention_layernorm"
        ),
        "#/pre_feedforward_layernorm|pre_ffw_norm": "model.layers.{}.pre_feedforward_layernorm",
        "#/post_feedforward_layernorm|post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    GEMMA_LEAVES,
    tied=TIED,
)

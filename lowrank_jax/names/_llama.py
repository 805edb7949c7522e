"""The table of names for Llama, Qwen and models with the same modules."""

from __future__ import annotations

from lowrank_jax.names._table import Table

ATTENTION = {
    f"#/self_attn|attention|attn|self_attention/{ours}": f"model.layers.{{}}.self_attn.{theirs}"
    for ours, theirs in {
        "q_proj|query|q": "q_proj",
        "k_proj|key|k": "k_proj",
        "v_proj|value|v": "v_proj",
        "o_proj|out|out_proj|output|o": "o_proj",
        "q_norm|query_norm": "q_norm",
        "k_norm|key_norm": "k_norm",
    }.items()
}


MLP = {
    f"#/mlp|feed_forward|ffn/{ours}": f"model.layers.{{}}.mlp.{theirs}"
    for ours, theirs in {
        "gate_proj|gate": "gate_proj",
        "up_proj|up": "up_proj",
        "down_proj|down": "down_proj",
    }.items()
}


ENDS = {
    "embed_tokens|embed|embedder|token_embed|wte": "model.embed_tokens",
    "norm|final_norm|ln_f": "model.norm",
    "lm_head": "lm_head",
}


TIED = {"model.embed_tokens": "lm_head"}


LLAMA = QWEN = Table(
    {
        **ATTENTION,
        **MLP,
        **ENDS,
        "#/input_layernorm|attention_norm|attn_norm|pre_attention_norm": (
            "model.layers.{}.input_layernorm"
        ),
        "#/post_attention_layernorm|ffn_norm|mlp_norm": "model.layers.{}.post_attention_layernorm",
    },
    tied=TIED,
)

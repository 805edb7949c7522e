"""The table of names for GPT-2."""

from __future__ import annotations

from lowrank_jax.names._table import Table

GPT2 = Table(
    {
        "wte|embed|token_embed": "transformer.wte",
        "wpe|position_embed": "transformer.wpe",
        "#/ln_1": "transformer.h.{}.ln_1",
        "#/attn|attention/c_attn": "transformer.h.{}.attn.c_attn",
        "#/attn|attention/c_proj": "transformer.h.{}.attn.c_proj",
        "#/ln_2": "transformer.h.{}.ln_2",
        "#/mlp/c_fc": "transformer.h.{}.mlp.c_fc",
        "#/mlp/c_proj": "transformer.h.{}.mlp.c_proj",
        "ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
        "score": "score",
    },
    fan_in_fan_out=("c_attn", "c_proj", "c_fc"),
    tied={"transformer.wte": "lm_head"},
)

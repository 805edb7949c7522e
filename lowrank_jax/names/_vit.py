"""The tables of names for ViT in transformers 4 and 5."""

from __future__ import annotations

from lowrank_jax.names._table import Table


def _make_vit(layer: str, query: str, key: str, value: str, out: str, up: str, down: str) -> Table:
    """Make the table from the torch names of a layer and of its modules."""
    parts = {
        "attention/attention/query|attention/query|attention/q_proj": query,
        "attention/attention/key|attention/key|attention/k_proj": key,
        "attention/attention/value|attention/value|attention/v_proj": value,
        "attention/output/dense|attention/out|attention/o_proj": out,
        "intermediate/dense|mlp/fc1": up,
        "output/dense|mlp/fc2": down,
        "layernorm_before": "layernorm_before",
        "layernorm_after": "layernorm_after",
    }
    return Table(
        {
            **{
                f"#/{rule}": f"vit.{layer}.{{}}.{name}"
                for rules, name in parts.items()
                for rule in rules.split("|")
            },
            "embeddings/patch_embeddings/projection": "vit.embeddings.patch_embeddings.projection",
            "layernorm": "vit.layernorm",
            "pooler/dense": "vit.pooler.dense",
            "classifier": "classifier",
        },
        {
            f"embeddings/{name}": f"vit.embeddings.{name}"
            for name in ("cls_token", "position_embeddings", "mask_token")
        },
        prefixes=Table.prefixes + "|vit",
    )


# Names in checkpoints; also the names of the modules up to transformers 4.
VIT = _make_vit(
    "encoder.layer",
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


# Names of the modules in transformers 5, under which its adapters are saved.
VIT5 = _make_vit(
    "layers",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.fc1",
    "mlp.fc2",
)

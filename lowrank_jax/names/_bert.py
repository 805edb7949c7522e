"""The table of names for BERT."""

from __future__ import annotations

from lowrank_jax.names._table import Table

BERT = Table(
    {
        **{
            f"embeddings/{name}": f"bert.embeddings.{name}"
            for name in (
                "word_embeddings",
                "position_embeddings",
                "token_type_embeddings",
                "LayerNorm",
            )
        },
        # with "self" between, as in transformers' Flax BERT, and without
        **{
            rule.replace("@", name): f"bert.encoder.layer.{{}}.attention.self.{name}"
            for name in ("query", "key", "value")
            for rule in ("#/attention/self/@", "#/attention/@")
        },
        "#/attention/output/dense": "bert.encoder.layer.{}.attention.output.dense",
        "#/attention/out": "bert.encoder.layer.{}.attention.output.dense",
        "#/attention/output/LayerNorm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "#/intermediate/dense": "bert.encoder.layer.{}.intermediate.dense",
        "#/output/dense": "bert.encoder.layer.{}.output.dense",
        "#/output/LayerNorm": "bert.encoder.layer.{}.output.LayerNorm",
        "pooler/dense": "bert.pooler.dense",
        "classifier": "classifier",
        "qa_outputs": "qa_outputs",
        "cls/predictions": "cls.predictions",
        "cls/predictions/transform/dense": "cls.predictions.transform.dense",
        "cls/predictions/transform/LayerNorm": "cls.predictions.transform.LayerNorm",
        "cls/predictions/decoder": "cls.predictions.decoder",
    },
    prefixes=Table.prefixes + "|bert",
)

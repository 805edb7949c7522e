"""The tiny Llama of tests/golden/peft_llama: its tensors, and parameters made of them."""

import dataclasses
from pathlib import Path

import chex
import jax
import llama
import numpy as np

import lowrank_jax as lowrank

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_llama"
PROJECTIONS = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
MODULES = tuple(f"{g}/{n}_proj" for g, names in PROJECTIONS.items() for n in names)
NORMS = ("input_layernorm", "post_attention_layernorm")


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def flax_params(tensors, scan, kernel=np.transpose):
    """The Hugging Face tensors as parameters of examples/llama.py; kernel: of a projection's."""
    get = lambda name: tensors["model." + name]

    def layer(i):
        tree = {name: {"scale": get(f"layers.{i}.{name}.weight")} for name in NORMS}
        for module in MODULES:
            group, name = module.split("/")
            at = f"layers.{i}.{group}.{name}"
            leaf = {"kernel": kernel(get(at + ".weight")), "bias": get(at + ".bias")}
            tree.setdefault(group, {})[name] = leaf
        return tree

    layers = [layer(i) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    blocks = {"layers": stacked} if scan else {f"layers_{i}": x for i, x in enumerate(layers)}
    return {
        "params": {
            "embed_tokens": {"embedding": get("embed_tokens.weight")},
            "norm": {"scale": get("norm.weight")},
            "lm_head": {"kernel": tensors["lm_head.weight"].T},
            **blocks,
        }
    }


def model(scan, tied=False):
    return llama.Llama(
        llama.LlamaConfig(
            vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48,
            tie_embeddings=tied, attention_bias=True, mlp_bias=True, scan_layers=scan,
        )
    )  # fmt: skip


def adapter(lora, tensors, scan, prefix="adapter/"):
    """lora with PEFT's tensors: a = A.T, b = B.T, stacked over layers where scanned."""
    paths = jax.tree_util.tree_leaves_with_path(
        lora, is_leaf=lambda x: isinstance(x, lowrank.LowRank)
    )
    put = {}
    for keys, node in paths:
        names = [key.key for key in keys][1:-1]
        layers = range(2) if scan else [int(names[0].split("_")[1])]
        at = [f"{prefix}base_model.model.model.layers.{i}.{'.'.join(names[1:])}" for i in layers]
        a = [tensors[name + ".lora_A.weight"].T for name in at]
        b = [tensors[name + ".lora_B.weight"].T for name in at]
        pair = (np.stack(a), np.stack(b)) if scan else (a[0], b[0])
        chex.assert_equal_shape([pair[0], node.a])
        put[tuple(names)] = dataclasses.replace(node, a=pair[0], b=pair[1])
    is_node = lambda x: isinstance(x, lowrank.LowRank)
    take = lambda keys, _: put[tuple(key.key for key in keys[1:-1])]
    return jax.tree_util.tree_map_with_path(take, lora, is_leaf=is_node)


def shapes(scan, tied=False):
    """The abstract parameters of model(scan, tied)."""
    params = flax_params(load("base"), scan)
    if tied:
        del params["params"]["lm_head"]
    return jax.eval_shape(lambda: params)

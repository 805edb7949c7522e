"""Merge, logits and gradients equal PEFT's on a tiny Llama (tests/golden/make_peft_llama.py)."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = Path(__file__).parent / "golden" / "peft_llama"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama  # noqa: E402

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


def model(scan):
    return llama.Llama(
        llama.LlamaConfig(
            vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48,
            tie_embeddings=False, attention_bias=True, mlp_bias=True, scan_layers=scan,
        )
    )  # fmt: skip


# The pattern tables of make_peft_llama.py in our words; the first match wins there as here.
PATTERNS = {
    "rank_pattern": {
        "**/layers_0/self_attn/q_proj/kernel": 2,
        re.compile(r".*/layers_1/mlp/(gate|up)_proj/kernel"): 3,
        re.compile(r".*/(k|o)_proj/kernel"): 5,
        "**/q_proj/kernel": 8,
    },
    "alpha_pattern": {
        "**/v_proj/kernel": 7,
        "**/layers_1/self_attn/v_proj/kernel": 13,  # shadowed by the line above
        "**/layers_1/**/o_proj/kernel": 3,
        "**/mlp/down_proj/kernel": 9,
        "**/layers_0/mlp/gate_proj/kernel": 11,
    },
}


def config_of(case, golden):
    return lowrank.LoraConfig(
        rank=golden["r"],
        alpha=golden["lora_alpha"],
        rslora=golden["use_rslora"],
        targets=[f"**/{name}/kernel" for name in golden["target_modules"]],
        **(PATTERNS if case == "patterns" else {}),
    )


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


CASES = [(case, scan) for case in ("lora", "rslora", "patterns") for scan in (False, True)]
CASES.remove(("patterns", True))  # ranks differ by layer: nothing to stack


@pytest.fixture(scope="module")
def base_tensors():
    return load("base")


@pytest.mark.parametrize(("case", "scan"), CASES)
def test_logits_gradients_and_merge_equal_peft(case, scan, base_tensors):
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = load(case)
    params = flax_params(base_tensors, scan)
    tokens = base_tensors["tokens"]
    apply = model(scan).apply
    with jax.default_matmul_precision("highest"):
        plan = lowrank.plan(apply, params, tokens)
        init = lambda key: lowrank.init(key, params, config_of(case, golden), plan=plan)[1]
        lora = adapter(jax.eval_shape(init, jax.random.key(0)), tensors, scan)
        for keys, node in jax.tree_util.tree_leaves_with_path(
            lora, is_leaf=lambda x: isinstance(x, lowrank.LowRank)
        ):
            names = [key.key for key in keys][1:-1]
            for i in range(2) if scan else [int(names[0].split("_")[1])]:
                theirs = golden["modules"][f"model.layers.{i}.{'.'.join(names[1:])}"]
                assert node.rank == theirs["r"]
                assert node.scale == pytest.approx(theirs["scaling"], rel=1e-12)

        lifted = lowrank.lift(apply, fallback="raise")

        def loss(lora, params):
            logits = lifted(lowrank.combine(params, lora), tokens)
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
            )
            return -chosen.mean(), logits

        @jax.jit
        def found(lora, params):
            merged = lowrank.merge(params, lora)
            dense = jax.lax.map(lambda tree: apply(tree, tokens), stack(params, merged))
            return jax.value_and_grad(loss, has_aux=True)(lora, params), merged, dense

        stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        ((value, logits), gradients), merged, dense = found(lora, params)
        np.testing.assert_allclose(dense[0], base_tensors["logits"], atol=1e-5)
        np.testing.assert_allclose(dense[1], tensors["logits"], atol=1e-5)
        np.testing.assert_allclose(logits, tensors["logits"], atol=1e-5)
        np.testing.assert_allclose(value, tensors["loss"], rtol=1e-6)
        theirs = adapter(gradients, tensors, scan, prefix="grad/")
        # the smallest gradient of a tensor has norm 0.045: atol is rounding, not room
        chex.assert_trees_all_close(gradients, theirs, rtol=1e-4, atol=1e-6)

        expected = dict(base_tensors)
        expected |= {k.removeprefix("merged/"): v for k, v in tensors.items() if "merged/" in k}
        chex.assert_trees_all_close(merged, flax_params(expected, scan), atol=1e-6, rtol=0)

"""Merge, logits and gradients equal PEFT's on a tiny Llama (tests/golden/make_peft_llama.py)."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import GOLDEN, adapter, flax_params, load, model

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


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

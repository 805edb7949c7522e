"""Forms in which libraries use their kernels: on codes, nothing is materialized, at any size."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from models import normal

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


def gated(p, x):
    """A recurrent cell with one matrix for three gates, split along fan-out."""
    n = x.shape[-1]
    to_gates, to_candidate = jnp.split(p["h"], [2 * n], axis=1)
    update, reset = jnp.split(nn.sigmoid(x @ p["i"][:, : 2 * n] + x @ to_gates), 2, -1)
    return update * jnp.tanh(x @ p["i"][:, 2 * n :] + (reset * x) @ to_candidate)


def depthwise(p, x):
    """A kernel [height, width, input, multiplier], reshaped to one input for each group."""
    height, width, inputs, multiplier = p["k"].shape
    kernel = p["k"].reshape(height, width, 1, inputs * multiplier)
    return lax.conv_general_dilated(
        *(x, kernel, (1, 1), "SAME"),
        feature_group_count=inputs,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def cell(n):
    return gated, {"h": normal(n, 3 * n), "i": normal(n, 3 * n, seed=1)}, normal(2, n)


def separable(n):
    return depthwise, {"k": normal(3, 3, n, 2)}, normal(1, 5, 5, n)


def transposed(n, turned=False):
    model, x = nn.ConvTranspose(n, (3,), strides=(2,), transpose_kernel=turned), normal(1, 5, n)
    return model.apply, model.init(jax.random.key(0), x), x


FORMS = {
    "gates of one matrix": cell,
    "depthwise": separable,
    "transposed convolution": transposed,
    "its kernel turned": lambda n: transposed(n, turned=True),
}


@pytest.mark.parametrize("n", [10, 32, 64])  # below a block, half of one, one
@pytest.mark.parametrize("name", FORMS)
def test_a_quantized_base_stays_quantized(name, n):
    fn, params, x = FORMS[name](n)
    plan = lowrank.plan(fn, params, x)
    targets = [path for path, use in plan.items() if use.op in ("dot", "conv")]
    assert targets
    quant = lowrank.QuantConfig(targets=targets, packing="uint8", double_quant=False)
    base = lowrank.quantize(params, quant, plan=plan)
    config = lowrank.LoraConfig(rank=2, targets=targets)
    base, lora = lowrank.init(0, base, config, plan=plan)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    got = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    chex.assert_trees_all_close(got, fn(lowrank.merge(base, lora), x), rtol=1e-4, atol=1e-4)

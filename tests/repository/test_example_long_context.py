"""The long-context example: its loss and gradients are those of the model written plainly."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("rich")

import long_context

import lowrank_jax as lowrank

CONFIG = long_context.Config(chunk=16, attention_chunk=8)
MODEL = long_context.LongLlama(CONFIG)
CHUNK = jax.ShapeDtypeStruct((16,), jnp.int32)


def make_params(tied):
    leaves, treedef = jax.tree.flatten(long_context.make_shapes(CONFIG, tied))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape) * leaf.shape[-2] ** -0.5
    return jax.tree.unflatten(treedef, map(draw, keys, leaves))


def compute_plain_loss(params, tokens):
    """The same model with all scores [t, t] and all logits [t, vocabulary] at once."""
    c, x = CONFIG, params["embed"][tokens[:-1]]
    at = jnp.arange(len(x))
    normalize, rotate = long_context.normalize, long_context.rotate
    for i in range(c.layers):
        w = jax.tree.map(lambda leaf: leaf[i], params["layers"])
        q, k, v = ((normalize(x) @ w[name]).reshape(len(x), -1, c.features) for name in "qkv")
        q, k, v = rotate(q, at)[None], rotate(k, at)[None], v[None]
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + y.reshape(len(x), -1) @ w["o"]
        z = normalize(x)
        x = x + (jax.nn.silu(z @ w["gate"]) * (z @ w["up"])) @ w["down"]
    head = params["head"] if "head" in params else params["embed"].T
    logits = normalize(x) @ head
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_values_and_gradients_are_those_of_the_plain_model(tied):
    params, tokens = make_params(tied), jax.random.randint(jax.random.key(9), (65,), 0, 128)
    plan = lowrank.plan(MODEL.logits, params, CHUNK)
    table = ["embed"] if tied else ["embed", "head"]
    quantize = lambda **options: lowrank.quantize(
        params, lowrank.QuantConfig(packing="uint8", **options), plan=plan
    )
    base = {**quantize(format="int8", targets=table), "layers": quantize()["layers"]}
    base, lora = lowrank.init(0, base, lowrank.LoraConfig(rank=4, alpha=6), plan=plan)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    lifted = lowrank.lift(MODEL.loss, fallback="raise")
    ours = lambda lora: lifted(lowrank.combine(base, lora), tokens)
    plain = lambda lora: compute_plain_loss(lowrank.merge(base, lora), tokens)
    got, want = (jax.jit(jax.value_and_grad(fn))(lora) for fn in (ours, plain))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    chex.assert_trees_all_close(got[1], want[1], rtol=1e-3, atol=1e-5)


def find_shapes(jaxpr):
    """Shapes of all values in a jaxpr, those of inner jaxprs included."""
    found = {var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars}
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            found |= find_shapes(inner) if hasattr(inner, "eqns") else set()
    return found


def test_no_array_is_of_tokens_squared_or_tokens_by_vocabulary():
    """And the inputs of layers are on the host, as of the plain function."""
    count, config = 4096, dataclasses.replace(CONFIG, vocab=1000)
    model = long_context.LongLlama(config)
    tokens = jax.ShapeDtypeStruct((count + 1,), jnp.int32)
    shapes = long_context.make_shapes(config)
    plan = lowrank.plan(model.logits, shapes, CHUNK)
    base, lora = jax.eval_shape(
        lambda params: lowrank.init(0, params, lowrank.LoraConfig(rank=4), plan=plan), shapes
    )
    lifted = lowrank.lift(model.loss, fallback="raise")
    loss = lambda lora, base, tokens: lifted(lowrank.combine(base, lora), tokens)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(lora, base, tokens)
    # the inputs of layers, and what a layer computes from them by chunks
    largest = max(config.layers * config.width, config.hidden) * count
    assert max(map(np.prod, find_shapes(jaxpr.jaxpr))) <= largest
    assert largest < count * min(count, config.vocab)
    host = f"f32<host>[{config.layers},{count},{config.width}]"
    assert host in str(jaxpr)


def test_it_trains(capsys):
    losses = long_context.main(["--tokens", "512", "--steps", "3", "--tied"])
    assert losses[2] < losses[0]
    assert "step   3: loss" in capsys.readouterr().out


def test_the_most_tokens_that_fit_are_found():
    asked = []

    def run(tokens):
        asked.append(tokens)
        total = 1000 + 7 * tokens + 40 * (tokens > 10**4)
        return lowrank.Estimate(total, 0, 0, {}, "h100", 1, capacity=10**6)

    most, found = long_context.find_most_tokens(run, 16)
    assert found.fits
    assert not run(most + 2 * 16).fits
    assert len(asked) < 8

"""Blends equal PEFT's add_weighted_adapter (golden/make_peft_blend.py), and their formulas."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax._many import blend as module

pytestmark = pytest.mark.usefixtures("fast_compile")

with np.load(Path(__file__).parents[1] / "golden" / "peft_blend.npz", allow_pickle=False) as file:
    GOLDEN = dict(file)
ALPHAS, WEIGHTS, DENSITY, RANK = (8, 2, 5), (0.7, -0.4, 1.3), 0.6, 4
PEFT_NAMES = {
    "concat": "cat",
    "svd": "svd",
    "linear": "linear",
    "magnitude_prune": "magnitude_prune",
    "ties": "ties",
    "dare": "dare_linear",
    "dare_ties": "dare_ties",
}


def golden_adapters():
    """PEFT's three adapters: a linear layer's A [r, in], B [out, r]; a table's A [r, rows]."""
    node = lambda name, k: lowrank.LowRank(
        jnp.asarray(GOLDEN[f"{name}/{k}/A"].T),
        jnp.asarray(GOLDEN[f"{name}/{k}/B"].T),
        scale=ALPHAS[k] / RANK,
    )
    return [{name: node(name, k) for name in ("table", "linear")} for k in range(3)]


def delta(node):
    return node.scale * np.asarray(node.a) @ np.asarray(node.b)


def options_of(method):
    options = {} if method in ("concat", "svd", "linear") else {"density": DENSITY}
    return options | ({"key": jax.random.key(0)} if method.startswith("dare") else {})


@pytest.mark.parametrize("name", ["table", "linear"])
@pytest.mark.parametrize("method", PEFT_NAMES)
def test_blends_are_pefts(method, name, monkeypatch):
    peft = PEFT_NAMES[method]
    if method.startswith("dare"):  # PEFT's masks, in the order of a and b
        masks = [GOLDEN[f"{name}/{peft}/mask_{factor}"].swapaxes(1, 2) for factor in "AB"]
        drawn = iter(masks)
        draw = lambda key, density, shape: jnp.asarray(next(drawn)).reshape(shape) > 0
        monkeypatch.setattr(module.jax.random, "bernoulli", draw)
    adapters = [{name: adapter[name]} for adapter in golden_adapters()]
    node = lowrank.blend(adapters, WEIGHTS, method, **options_of(method))[name]
    expected = GOLDEN[f"{name}/{peft}/delta"]
    # get_delta_weight is [out, in] of a Linear, and [rows, features] of an Embedding
    expected = expected if name == "table" else expected.T
    chex.assert_trees_all_close(delta(node), expected, rtol=1e-5, atol=1e-5)
    if method != "svd":  # its factors are of another scale, and of either sign
        chex.assert_trees_all_close(node.a, GOLDEN[f"{name}/{peft}/A"].T, rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(node.b, GOLDEN[f"{name}/{peft}/B"].T, rtol=1e-6, atol=1e-6)


def test_concat_is_the_sum_of_deltas_whatever_the_ranks_and_methods():
    params = {"w": jnp.zeros((3, 8, 5)), "table": jnp.zeros((7, 4)), "bias": jnp.zeros(5)}

    def fn(p, x):
        return jnp.einsum("bi,sio->bso", x, p["w"]) + p["table"][0, 0] + p["bias"]

    plan = lowrank.plan(fn, params, jnp.ones((2, 8)))
    adapters = []
    for k, method in enumerate(("lora", "loha", "vera")):
        config = lowrank.LoraConfig(
            rank=k + 1,
            targets="w",
            train="bias",
            method=method,
            projection_seed=3 if method == "vera" else None,
        )
        _, lora = lowrank.init(k, params, config, plan=plan)
        keys = iter(jax.random.split(jax.random.key(k), 9))
        adapters.append(jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), lora))
    weights = (0.5, 0.75, -0.25)
    got = lowrank.merge(params, lowrank.blend(adapters, weights))
    merged = [lowrank.merge(params, lora) for lora in adapters]
    expected = jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *merged
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_rows_blend_over_the_rows_that_any_changes():
    table = jnp.arange(20.0).reshape(5, 4)
    make = lambda rows, value: {
        "t": lowrank.Rows(b=jnp.full((len(rows), 4), value), kind="lookup", rows=rows, size=5)
    }
    blended = lowrank.blend([make((1, 3), 2.0), make((3, 4), 10.0)], [1.0, 0.5])
    got = lowrank.merge({"t": table}, blended)["t"] - table
    chex.assert_trees_all_close(got[:, 0], jnp.array([0.0, 2.0, 0.0, 7.0, 5.0]))


def test_stacked_weights_are_pruned_each_on_its_own():
    keys = jax.random.split(jax.random.key(0), 4)
    stacked = [
        lowrank.LowRank(
            jax.random.normal(keys[k], (3, 6, 2)) * jnp.array([1.0, 10.0, 100.0])[:, None, None],
            jax.random.normal(keys[2 + k], (3, 2, 5)),
            fan_in=(1,),
            fan_out=(2,),
            stack=(0,),
        )
        for k in range(2)
    ]
    layer = lambda node, i: {"w": lowrank.LowRank(node.a[i], node.b[i])}
    whole = lowrank.blend([{"w": node} for node in stacked], [1.0, 1.0], "ties", density=0.5)["w"]
    for i in range(3):
        one = lowrank.blend([layer(node, i) for node in stacked], [1.0, 1.0], "ties", density=0.5)
        chex.assert_trees_all_close((whole.a[i], whole.b[i]), (one["w"].a, one["w"].b))


def test_dare_keeps_the_expected_value():
    node = lowrank.LowRank(jnp.ones((200, 100)), jnp.ones((100, 3)))
    kept = lowrank.blend([{"w": node}], [1.0], "dare", density=0.25, key=jax.random.key(0))["w"].a
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert abs(float(kept.mean()) - 1) < 0.05  # 20,000 elements: five standard deviations


def test_weights_may_be_traced():
    adapters = golden_adapters()
    blend = lambda w: lowrank.blend(adapters, w)["linear"]
    traced = jax.jit(blend)(jnp.array(WEIGHTS))
    chex.assert_trees_all_close(delta(traced), delta(blend(WEIGHTS)), rtol=1e-5, atol=1e-6)


def test_nothing_is_lost_on_the_way():
    """NaN is kept, float16 does not overflow, LoHa keeps its rank r * r, no buffer is shared."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    nan = lowrank.LowRank(draw(4, 2).at[0, 0].set(jnp.nan), draw(2, 3))
    for method in ("magnitude_prune", "ties"):
        blended = lowrank.blend([{"w": nan}, {"w": nan}], [0.5, 0.5], method, density=0.5)
        assert bool(jnp.isnan(blended["w"].a).any())
    half = lowrank.LowRank(
        jnp.full((4, 1), 600, jnp.float16), jnp.ones((1, 3), jnp.float16), scale=128.0
    )
    blended = lowrank.blend([{"w": half}], [1.0])["w"]
    np.testing.assert_allclose(delta(blended), 600 * 128)
    loha = lowrank.LoHa(draw(6, 4), draw(4, 5))
    exact, truncated = (lowrank.blend([{"w": loha}], [1.0], m)["w"] for m in ("concat", "svd"))
    np.testing.assert_allclose(delta(exact), delta(truncated), rtol=1e-4, atol=1e-5)
    node = lowrank.LowRank(draw(4, 2), draw(2, 3))
    blended = lowrank.blend([{"w": node}], [0.5])
    jax.jit(lambda x: jax.tree.map(jnp.sin, x), donate_argnums=0)(blended)
    assert not node.b.is_deleted()
    slope = jax.grad(lambda w: lowrank.blend([{"w": node}] * 2, [w, 1.0], "linear")["w"].a.sum())(
        0.0
    )
    assert np.isfinite(slope)


DORA = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.ones(3))
WIDE = lowrank.LowRank(jnp.ones((4, 3)), jnp.ones((3, 3)))
LORA = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("nodes", "weights", "options", "message"),
    [
        ([LORA, LORA], [1.0], {}, "one number for each of the 2 adapters"),
        ([LORA], [jnp.ones(2)], {}, "one number for each of the 1 adapters"),
        ([LORA], [1.0], {"method": "mean"}, "expected one of concat, svd, linear"),
        ([LORA], [1.0], {"rank": 2}, 'rank applies only to method "svd"'),
        ([LORA], [1.0], {"method": "ties"}, "needs density"),
        ([LORA], [1.0], {"method": "ties", "density": 1.5}, r"in \(0, 1\]"),
        ([LORA], [1.0], {"density": 0.5}, "has no density"),
        ([LORA], [1.0], {"method": "dare", "density": 0.5}, "needs a key"),
        ([LORA], [1.0], {"key": jax.random.key(0)}, "has no key"),
        ([LORA, DORA], [1.0, 1.0], {}, "w: DoRA scales the whole weight"),
        ([LORA, WIDE], [1.0, 1.0], {"method": "linear"}, "w: factors of different ranks"),
        ([lowrank.Full(jnp.ones(3))] * 2, [1.0, 1.0], {}, "whose sum is 1"),
        ([lowrank.Full(jnp.ones(3)), LORA], [0.5, 0.5], {}, "others do not"),
    ],
)
def test_what_cannot_be_blended_is_refused(nodes, weights, options, message):
    with pytest.raises(lowrank.ConfigError, match=message):
        lowrank.blend([{"w": node} for node in nodes], weights, **options)

"""A pool serves any of its adapters by a program that is compiled once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {"w": jax.random.normal(jax.random.key(0), (8, 6)), "v": jnp.ones((6, 4))}
LIFTED = lowrank.lift(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])
X = jax.random.normal(jax.random.key(1), (5, 8))


def make(seed, rank=2, targets=("w", "v"), **options):
    config = lowrank.LoraConfig(rank=rank, targets=targets, **options)
    _, lora = lowrank.init(seed, PARAMS, config)
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    return jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape, x.dtype), lora)


def draw(rng, rank, scale):
    """An adapter of random factors, by NumPy."""
    node = lambda i, o: lowrank.LowRank(
        rng.standard_normal((i, rank), np.float32),
        rng.standard_normal((rank, o), np.float32),
        scale=scale,
    )
    return {"w": node(8, 6), "v": node(6, 4)}


def compute_by_hand(lora, x):
    """The model with an adapter's weights, by NumPy."""
    weights = {name: np.asarray(leaf) for name, leaf in PARAMS.items()}
    for name, node in (lora or {}).items():
        weights[name] = weights[name] + node.scale * np.asarray(node.a) @ np.asarray(node.b)
    return np.tanh(np.asarray(x) @ weights["w"]) @ weights["v"]


def test_a_hundred_adapters_through_sixteen_slots_trace_once():
    rng = np.random.default_rng(0)
    adapters = {f"task {k}": draw(rng, rank=1 + k % 4, scale=1 / (1 + k % 3)) for k in range(100)}
    pool = lowrank.pool(draw(rng, rank=4, scale=1.0), slots=16)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def serve(many, index, x):
        one = lambda k, x: LIFTED(lowrank.combine(PARAMS, lowrank.select(many, k)), x)
        return jax.vmap(one)(index, x)

    for name, lora in adapters.items():
        if len(pool) == pool.slots:
            pool.drop(rng.choice(pool.names))
        pool.put(name, lora)
        batch = [name, *rng.choice(pool.names, 3), None]
        got = serve(pool.tree, pool.index(batch), X)
        expected = [compute_by_hand(adapters.get(own), x) for own, x in zip(batch, X, strict=True)]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert len(pool) == 16


def test_a_name_put_again_is_replaced_and_a_dropped_slot_changes_nothing():
    pool = lowrank.pool(make(0), slots=2)
    pool.put("one", make(1))
    slot = int(pool.index("one"))
    pool.put("one", make(2, targets="w"))
    assert (int(pool.index("one")), pool.names, "one" in pool) == (slot, ("one",), True)
    got = lowrank.merge(PARAMS, lowrank.select(pool.tree, slot))
    want = lowrank.merge(PARAMS, make(2, targets="w"))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    pool.drop("one")
    for k in (slot, int(pool.index(None))):
        chex.assert_trees_all_close(lowrank.merge(PARAMS, lowrank.select(pool.tree, k)), PARAMS)
    assert pool.index(None).dtype == pool.index([None, None]).dtype == jnp.int32


def test_folded_dora_and_lora_share_a_pool():
    config = lowrank.LoraConfig(rank=2, targets=["w", "v"], dora=True)
    base, dora = lowrank.init(0, PARAMS, config)
    dora = jax.tree.map(lambda x: x + 0.3, dora)
    folded, lora = lowrank.fold_norms(base, dora), make(1)
    pool = lowrank.pool(folded, slots=2)
    pool.put("dora", folded)
    pool.put("lora", lora)
    for name, one in (("dora", dora), ("lora", lora)):
        got = LIFTED(lowrank.combine(base, lowrank.select(pool.tree, pool.index(name))), X)
        want = LIFTED(lowrank.combine(base, one), X)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
    for k in range(2):
        pool.drop(("dora", "lora")[k])
    got = LIFTED(lowrank.combine(base, lowrank.select(pool.tree, pool.index(None))), X)
    chex.assert_trees_all_close(got, LIFTED(PARAMS, X), rtol=1e-5, atol=1e-5)


def test_narrow_factors_are_scaled_in_float32():
    like = make(0, factor_dtype="bfloat16", alpha=2.0)
    pool = lowrank.pool(like, slots=1)
    lora = make(1, alpha=6.0)
    pool.put("one", lora)
    node = lowrank.select(pool.tree, 0)["w"]
    assert node.dtype == jnp.bfloat16
    exact = np.asarray(lora["w"].b * 3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(node.b), exact)


BIG = lambda scale, b: {
    "w": lowrank.LowRank(
        jnp.ones((8, 2), jnp.float16), jnp.full((2, 6), b, jnp.float16), scale=scale
    )
}
HALF, LARGE = lowrank.pool(BIG(0.05, 0), 1), BIG(64.0, 100)
FOLDED = lowrank.fold_norms(
    *lowrank.init(0, PARAMS, lowrank.LoraConfig(rank=2, targets=["w", "v"], dora=True))
)


def test_what_does_not_fit_is_refused_and_nothing_changes():
    pool = lowrank.pool(make(0), slots=1)
    pool.put("one", make(1))
    before = jax.device_get(pool.tree)
    refused = [
        (lambda: pool.put("two", make(2)), "all 1 slots are taken: drop an adapter first"),
        (lambda: pool.put("one", make(2, rank=3)), "w: rank 3 is larger than the 2 of its slots"),
        (lambda: pool.put("", make(2)), "the name of an adapter is text"),
        (lambda: pool.put("one", make(2, method="loha", rank=1)), "of different methods"),
        (lambda: pool.put("one", make(2, dora=True)), "the slots have no magnitude"),
        (lambda: pool.put("one", FOLDED), "it is DoRA, and the slots have no magnitude"),
        (lambda: jax.jit(lambda l: pool.put("one", l))(make(2)), "no traced function can make"),
        (lambda: HALF.put("one", LARGE), "overflows float16"),
        (lambda: pool.drop("ones"), "adapter 'ones' is not in the pool, which holds 'one'"),
        (lambda: pool.index(["one", "two"]), "adapter 'two' is not in the pool"),
        (lambda: lowrank.pool(make(0, dora=True), 2), "w: it is DoRA.*fold its norms"),
        (lambda: lowrank.pool(make(0, targets="w", train="v"), 2), "v: it is trained whole"),
        (lambda: lowrank.pool(make(0), 0), "slots"),
    ]
    for call, message in refused:
        with pytest.raises(lowrank.ConfigError, match=message):
            call()
    with pytest.raises(lowrank.TreeError, match="of different models"):
        pool.put("one", {"w": make(1)["w"]})
    chex.assert_trees_all_equal(pool.tree, before)

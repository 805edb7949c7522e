"""A stack of adapters is each of them: as a function, under training, in one program."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)


def model(params, x):
    """A convolution, a scan over layers, experts with stack axes, a table and a norm."""
    x = params["table"][x]  # [t, 32]
    y = jax.lax.conv_general_dilated(
        x.T[None], params["conv"], (1,), "SAME", dimension_numbers=("NCH", "HIO", "NCH")
    )[0].T
    y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, params["layers"])
    y = jnp.einsum("ti,eio->teo", y, params["experts"]).sum(1)
    return y * params["norm"] @ params["head"]


def make_params():
    shapes = {
        "table": (11, 32),
        "conv": (3, 32, 32),
        "layers": (2, 32, 32),
        "experts": (3, 32, 6),
        "norm": (6,),
        "head": (6, 5),
    }
    keys = jax.random.split(KEY, len(shapes))
    normal = lambda key, shape: jax.random.normal(key, shape) / 5
    return {
        name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


PARAMS, TOKENS = make_params(), jnp.array([3, 0, 7, 7, 10])
PLAN = lowrank.plan(model, PARAMS, TOKENS)
LIFTED = lowrank.lift(model, fallback="raise")


def noisy(lora, seed):
    """An adapter none of whose arrays is zero."""
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = lambda key, leaf: leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
    return jax.tree.unflatten(treedef, map(noise, keys, leaves))


def make(seed, base=PARAMS, **options):
    options = {"targets": ["table", "conv", "layers", "experts", "head"], "rank": 2} | options
    base, lora = lowrank.init(seed, base, lowrank.LoraConfig(**options), plan=PLAN)
    return base, noisy(lora, seed)


KINDS = {
    "ranks and scales": [{"rank": 1}, {"rank": 4, "alpha": 1.0}],
    "dora": [{"dora": True, "rank": r} for r in (1, 3)],
    "some leaves": [{"targets": ["table", "head"]}, {"targets": ["layers", "conv"]}, {}],
    "trained whole": [{"train": "norm"}, {"train": "norm", "rank": 3}],
    "rows": [{"targets": "head", "train_rows": {"table": (1, 3)}, "rank": r} for r in (1, 2)],
    "loha": [{"method": "loha", "rank": 1, "alpha": 3.0}, {"method": "loha", "rank": 2}],
    "vera": [{"method": "vera", "projection_seed": 5, "rank": 3, "alpha": a} for a in (1.0, 7.0)],
    "ia3": [{"method": "ia3", "targets": ["layers", "head"]}] * 2,
    "bfloat16 factors": [{"factor_dtype": "bfloat16", "alpha": a} for a in (3.0, 7.0)],
}
BASES = {
    "dense": lambda: PARAMS,
    "nf4": lambda: lowrank.quantize(
        PARAMS,
        lowrank.QuantConfig(targets=["layers", "experts"], block_size=32),
        plan=PLAN,
    ),
}


QUICK = {("ranks and scales", "dense"), ("dora", "nf4"), ("some leaves", "dense")}
PAIRS = [*((kind, "dense") for kind in KINDS), ("ranks and scales", "nf4"), ("dora", "nf4")]


def mark_slow(*values, quick):
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "base"), [mark_slow(*pair, quick=pair in QUICK) for pair in PAIRS]
)
def test_a_stack_is_each_of_its_adapters(kind, base):
    base = BASES[base]()
    pairs = [make(seed, base, **options) for seed, options in enumerate(KINDS[kind])]
    frozen, loras = pairs[0][0], [lora for _, lora in pairs]
    many = lowrank.stack(loras)
    run = jax.jit(lambda lora: LIFTED(lowrank.combine(frozen, lora), TOKENS))
    stacked = jax.jit(jax.vmap(lambda lora: LIFTED(lowrank.combine(frozen, lora), TOKENS)))(many)
    choose = lambda k: LIFTED(lowrank.combine(frozen, lowrank.select(many, k)), TOKENS)
    order = jnp.array([1, 0, 1, len(loras) - 1])
    each = jnp.stack([run(lora) for lora in loras])
    chex.assert_trees_all_close(stacked, each, rtol=2e-5, atol=2e-5)
    chosen = jax.jit(jax.vmap(choose))(order)
    chex.assert_trees_all_close(chosen, each[order], rtol=2e-5, atol=2e-5)
    assert float(jnp.abs(each[0] - each[1]).max()) > 1e-2  # they differ at all
    for k, lora in enumerate(loras):
        got = lowrank.merge(frozen, lowrank.select(many, k))
        chex.assert_trees_all_close(got, lowrank.merge(frozen, lora), rtol=2e-5, atol=2e-5)


def test_a_stack_is_what_init_makes_under_vmap():
    config = lowrank.LoraConfig(rank=2, targets=["conv", "layers"], train="norm")
    init = lambda key: lowrank.init(key, PARAMS, config, plan=PLAN)[1]
    keys = jax.random.split(KEY, 3)
    # two programs: the same numbers up to rounding
    many, stacked = jax.vmap(init)(keys), lowrank.stack([*map(init, keys)])
    chex.assert_trees_all_equal_structs(many, stacked)
    chex.assert_trees_all_close(many, stacked, rtol=1e-4, atol=1e-7)


def test_lora_stacks_beside_dora_whose_norms_are_folded():
    base, dora = make(0, dora=True)
    _, lora = make(1)
    many = lowrank.stack([lowrank.fold_norms(base, dora), lora])
    for k, one in enumerate([dora, lora]):
        got = LIFTED(lowrank.combine(base, lowrank.select(many, k)), TOKENS)
        expected = LIFTED(lowrank.combine(base, one), TOKENS)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["ranks and scales", mark_slow("loha", quick=False), mark_slow("dora", quick=False)]
)
def test_padding_stays_zero_under_training_and_each_trains_as_if_alone(kind):
    pairs = [make(seed, **options) for seed, options in enumerate(KINDS[kind])]
    base, loras = pairs[0][0], [lora for _, lora in pairs]
    # equal scales: rescaled factors are the same function, and another step of Adam
    scale = next(iter(jax.tree.leaves(loras, is_leaf=lambda x: hasattr(x, "scale")))).scale
    alike = lambda node: node if node is None else type(node)(**vars(node) | {"scale": scale})
    is_node = lambda x: isinstance(x, lowrank.LowRank)
    loras = [jax.tree.map(alike, lora, is_leaf=is_node) for lora in loras]
    many = lowrank.stack(loras)
    tx = optax.adamw(1e-2, weight_decay=0.1)

    def train(lora):
        loss = lambda lora: (LIFTED(lowrank.combine(base, lora), TOKENS) ** 2).mean()
        state = tx.init(lora)
        for _ in range(4):
            updates, state = tx.update(jax.grad(loss)(lora), state, lora)
            lora = optax.apply_updates(lora, updates)
        return lora

    trained = jax.jit(jax.vmap(train))(many)
    untouched = jax.tree.map(lambda x: x == 0, many)  # the padding, of float noise elsewhere
    still = jax.tree.map(
        lambda zero, x: bool((jnp.where(zero, x, 0) == 0).all()), untouched, trained
    )
    assert all(jax.tree.leaves(still))
    assert any(bool(zero.any()) for zero in jax.tree.leaves(untouched))
    for k, lora in enumerate(loras):
        got = lowrank.merge(base, lowrank.select(trained, k))
        expected = lowrank.merge(base, jax.jit(train)(lora))
        # Adam divides gradients near zero by their own size
        chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_mixed_batch_is_one_product_with_the_base_and_decodes_it_once():
    params = {"w": jax.random.normal(KEY, (64, 32))}
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"))
    fn = lowrank.lift(lambda p, x: x @ p["w"])
    config = lowrank.LoraConfig(rank=2, targets="w")
    many = lowrank.stack([noisy(lowrank.init(k, params, config)[1], k) for k in range(4)])
    index, x = jnp.arange(6) % 4, jnp.ones((6, 5, 64))

    def mixed(base, many, index, x):
        one = lambda k, x: fn(lowrank.combine(base, lowrank.select(many, k)), x)
        return jax.vmap(one)(index, x)

    dense = jax.jit(mixed).lower(params, many, index, x).compile().as_text()
    dots = re.findall(r"= (f32\[[\d,]*\])\S* dot\(", dense)
    # all 6 * 5 tokens at once, whether or not XLA keeps the two axes apart
    base_products = [d for d in dots if np.prod(eval(d[3:])) == 6 * 5 * 32 and "[6,2" not in d]
    assert len([d for d in base_products if d in ("f32[30,32]", "f32[6,5,32]")]) >= 1
    assert not re.findall(r"f32\[6,64,32\]", dense)  # no weight for each example
    coded = jax.jit(mixed).lower(frozen, many, index, x).compile().as_text()
    assert not re.findall(r"\[6,(?:64,32|32,64)\]", coded)
    got = jax.jit(mixed)(frozen, many, index, x)
    one = lambda k, x: fn(lowrank.combine(frozen, lowrank.select(many, k)), x)
    each = jnp.stack([one(int(k), x[j]) for j, k in enumerate(index)])
    chex.assert_trees_all_close(got, each, rtol=1e-5, atol=1e-5)


def test_swapping_traces_once():
    loras = [make(k, rank=1 + k % 4)[1] for k in range(8)]
    many = lowrank.stack(loras)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(lora):
        return LIFTED(lowrank.combine(PARAMS, lora), TOKENS)

    for k, lora in enumerate(loras):
        got = run(lowrank.select(many, k))
        expected = LIFTED(lowrank.combine(PARAMS, lora), TOKENS)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_index_outside_is_refused_or_gives_nan():
    many = lowrank.stack([make(k)[1] for k in range(3)])
    for index in (3, -1, jnp.array([0, 3]), np.array([-1])):
        with pytest.raises(lowrank.ConfigError, match=r"is not in \[0, 3\): the stack holds 3"):
            lowrank.select(many, index)
    for index in (True, 1.0, "one", None):
        with pytest.raises(lowrank.ConfigError, match="expected an integer or integers"):
            lowrank.select(many, index)
    for index in (3, -1):
        chosen = jax.jit(lambda k: lowrank.select(many, k))(index)
        assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(chosen))
    with pytest.raises(lowrank.TreeError, match="holds one LoRA adapter, not a stack"):
        lowrank.select(make(0)[1], 0)


def test_narrow_integers_index_large_stacks():
    many = jax.vmap(lambda x: lowrank.LowRank(jnp.full((4, 1), x), jnp.ones((1, 3))))(
        jnp.arange(200.0)
    )
    index = jnp.array([1, 100, 127], jnp.int8)
    assert lowrank.select({"w": many}, index)["w"].a[:, 0, 0].tolist() == [1, 100, 127]
    with pytest.raises(lowrank.TreeError, match="is one number, not a stack"):
        lowrank.select({"g": lowrank.Full(jnp.ones(()))}, 0)


def node(rank=2, **options):
    return lowrank.LowRank(jnp.ones((4, rank)), jnp.ones((rank, 3)), **options)


ROWS = {"b": jnp.ones((2, 3)), "kind": "lookup", "size": 4}
VERA = {"b": jnp.ones(3), "inputs": (4,)}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node(), lowrank.Full(jnp.ones((4, 3)))], "some adapters train it whole"),
        ([node(), node(magnitude=jnp.ones(3))], "fold its norms first"),
        ([node(), node(base_modified=True)], "different base_modified"),
        ([node(), node(scale=0.0)], "scales of 0 and of 1.0"),
        ([node(), node(fan_in=(1,), fan_out=(0,))], "different fan_in"),
        ([node(), lowrank.LoHa(jnp.ones((4, 2)), jnp.ones((2, 3)))], "of different methods"),
        ([lowrank.Rows(rows=r, **ROWS) for r in ((0, 1), (0, 2))], "would be trained too"),
        ([lowrank.VeRA(jnp.ones(r), **VERA) for r in (2, 3)], "VeRA of ranks 2 and 3"),
        ([lowrank.VeRA(jnp.ones(2), seed=s, **VERA) for s in (0, 1)], "random matrices differ"),
        ([node(magnitude=jnp.ones(3)), None], "without the base there is no DoRA"),
        ([node(), lowrank.LowRank(jnp.ones((5, 2)), jnp.ones((2, 3)))], "of different shapes"),
    ],
)
def test_what_cannot_be_stacked_is_refused(nodes, message):
    trees = [{"w": node, "other": lowrank.Full(jnp.ones(2))} for node in nodes]
    with pytest.raises(lowrank.ConfigError, match=f"w: .*{message}"):
        lowrank.stack(trees)


def test_trees_that_are_no_adapters_of_one_model_are_refused():
    lora = {"w": node()}
    with pytest.raises(lowrank.TreeError, match="of different models:\n.*v: in adapter 1 only"):
        lowrank.stack([lora, {"w": node(), "v": None}])
    with pytest.raises(lowrank.TreeError, match="adapter 1 is a combined tree"):
        lowrank.stack([lora, lowrank.combine({"w": jnp.ones((4, 3))}, lora)])
    with pytest.raises(lowrank.TreeError, match="not LowRank, Full or None"):
        lowrank.stack([{"w": jnp.ones(3)}])
    with pytest.raises(lowrank.ConfigError, match="there is no adapter"):
        lowrank.stack([])

"""LoHa, VeRA and (IA)^3: each is its equation, through the engine, with all that LoRA has."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import noisy, normal

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIGS = {
    "loha": lowrank.LoraConfig(rank=2, alpha=3.0, method="loha"),
    "vera": lowrank.LoraConfig(rank=7, method="vera", projection_seed=5),
    "vera, alpha": lowrank.LoraConfig(rank=7, alpha=3.0, method="vera", projection_seed=5),
    "ia3": lowrank.LoraConfig(method="ia3"),
    "loha, dora": lowrank.LoraConfig(rank=2, alpha=3.0, method="loha", dora=True),
    "vera, dora": lowrank.LoraConfig(rank=7, method="vera", projection_seed=5, dora=True),
}


def scanned(p, x):
    x = lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["stack"])[0]
    return jnp.einsum("ti,iho->tho", x, p["kept"]) @ p["head"]


PARAMS = {"stack": normal(3, 64, 64, scale=0.2), "kept": normal(64, 2, 5), "head": normal(5, 3)}
X = normal(4, 64)
PLAN = lowrank.plan(scanned, PARAMS, X)


@functools.cache
def adapted(name, quant=None):
    """The base and a new adapter of the model, quantized or not."""
    params = PARAMS
    if quant is not None:
        params = lowrank.quantize(jax.tree.map(np.asarray, PARAMS), quant, plan=PLAN)
    init = lambda key, params: lowrank.init(key, params, CONFIGS[name], plan=PLAN)
    return jax.jit(init)(jax.random.key(0), params)


def by_hand(name, w, node):
    """The effective weight of a matrix [i, o], in NumPy, from the papers' equations."""
    w, a, b = (np.asarray(v, np.float64) for v in (w, node.a, node.b))
    if name == "ia3":
        return w * np.asarray(node.magnitude)
    if name.startswith("loha"):
        r = node.rank
        change = (a[:, :r] @ b[:r]) * (a[:, r:] @ b[r:])
    else:
        ones = dataclasses.replace(node, a=np.ones_like(node.a), b=np.ones_like(node.b))
        factors = jax.jit(lambda node: node.factors())(ones)
        left, right = (np.asarray(f, np.float64) for f in factors)
        change = left @ np.diag(a) @ right @ np.diag(b)
    return w + node.scale * change


@pytest.mark.parametrize("name", [name for name in CONFIGS if "dora" not in name])
def test_a_matrix_is_what_the_paper_says(name):
    config = dataclasses.replace(CONFIGS[name], targets="w")
    fn, w = (lambda p, x: x @ p["w"]), normal(64, 9)
    base, fresh = lowrank.init(jax.random.key(0), {"w": w}, config)
    lifted = lowrank.lift(fn, fallback="raise")

    @jax.jit
    def run(lora):
        return lowrank.merge(base, lora)["w"], lifted(lowrank.combine(base, lora), X)

    np.testing.assert_allclose(run(fresh)[0], w, atol=1e-7)
    lora = noisy(fresh, scale=0.3 if name in ("loha", "ia3") else 1.0)
    want = by_hand(name, w, lora["w"])
    assert np.abs(want - np.asarray(w)).max() > 0.05
    merged, got = run(lora)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, np.asarray(X) @ want, rtol=1e-4, atol=1e-4)


def on_both_bases():
    """Each method on a dense base; on codes, one with two products and DoRA, and those without."""
    for name in CONFIGS:
        yield pytest.param(name, None, id=name)
        slow = (pytest.mark.slow,) if name in ("loha", "vera, alpha", "vera, dora") else ()
        yield pytest.param(name, lowrank.QuantConfig(), marks=slow, id=f"{name} on codes")


@pytest.mark.parametrize(("name", "quant"), [*on_both_bases()])
def test_the_laws_hold(name, quant):
    """lift(f)(combine) == f(merge), values and gradients, in scan, remat, n-D, jit and vmap."""
    base, fresh = adapted(name, quant)
    lora = noisy(fresh, scale=0.2)
    lifted = lowrank.lift(scanned, fallback="raise")
    live = lambda lora, base: jnp.sum(lifted(lowrank.combine(base, lora), X) ** 2)
    dense = lambda lora, base: jnp.sum(scanned(lowrank.merge(base, lora), X) ** 2)
    both = jax.jit(lambda *args: [jax.value_and_grad(loss)(*args) for loss in (live, dense)])
    got, want = jax.device_get(both(lora, base))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = max(np.abs(other).max(initial=0), 1e-30)
        np.testing.assert_allclose(one / largest, other / largest, atol=3e-5)
    for node in (lora["stack"], lora["kept"]):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(got[1]) if leaf.size), node
    many = jax.tree.map(lambda *x: np.stack(x), lora, fresh)
    rows = jax.jit(jax.vmap(live, (0, None)))(many, base)
    np.testing.assert_allclose(rows, [got[0], both(fresh, base)[0][0]], rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_trees_of_the_family_go_where_loras_go(name, tmp_path):
    config = CONFIGS[name]
    assert lowrank.LoraConfig.from_dict(config.to_dict()) == config
    base, fresh = adapted(name)
    lora = noisy(fresh)
    lowrank.checkpoint.save(tmp_path, lora=lora, config=config, base=base)
    found = lowrank.checkpoint.restore(tmp_path, base=base)
    chex.assert_trees_all_equal(found.lora, lora)
    assert type(found.lora["stack"]) is type(lora["stack"])
    labels = jax.tree.leaves(lowrank.factor_labels(lora))
    assert len(labels) == len(jax.tree.leaves(lora))
    layout = {"stack": jax.P(None, "x", "y"), "kept": jax.P("x", None, "y"), "head": jax.P()}
    specs = lowrank.specs(lora, layout)
    node = specs["stack"]
    for array, spec in zip(jax.tree.leaves(lora), jax.tree.leaves(specs), strict=True):
        assert array.ndim == len(spec)
    if name.startswith("vera"):
        assert node.a == jax.P(None, None)
        assert node.b == jax.P(None, "y")
    report = lowrank.report(scanned, lowrank.combine(base, lora), X)
    assert report["stack"].kind == {
        "loha": "LoHa", "vera": "VeRA", "vera, alpha": "VeRA", "ia3": "(IA)^3",
        "loha, dora": "DoRA of LoHa", "vera, dora": "DoRA of VeRA",
    }[name]  # fmt: skip


@pytest.mark.parametrize("quant", [None, lowrank.QuantConfig(targets="table")])
def test_rows_of_a_tied_table(quant):
    """Only the rows change, in look-ups and in the head; a quantized table's too."""
    params = {"table": normal(9, 64), "w": normal(64, 64)}
    tokens = np.array([[1, 4, 8], [4, 0, 1]])
    fn = lambda p, tokens: jnp.tanh(p["table"][tokens] @ p["w"]) @ p["table"].T
    plan = lowrank.plan(fn, params, tokens)
    config = lowrank.LoraConfig(rank=2, targets="w", train_rows={"table": [4, 1]})
    assert lowrank.LoraConfig.from_dict(config.to_dict()) == config
    on_host = jax.tree.map(np.asarray, params)
    frozen = params if quant is None else lowrank.quantize(on_host, quant, plan=plan)
    init = lambda key, params: lowrank.init(key, params, config, plan=plan)
    base, fresh = jax.jit(init)(jax.random.key(0), frozen)
    assert fresh["table"].rows == (1, 4)
    lora = noisy(fresh, scale=0.5)
    live = lambda lora: lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), tokens)
    merged = lambda lora: fn(lowrank.merge(base, lora), tokens)
    loss = lambda fn: lambda lora: (lambda out: (jnp.sum(jnp.sin(out)), out))(fn(lora))

    @jax.jit
    def run(lora):
        change = lowrank.merge(base, lora)["table"] - lowrank.dequantize(base)["table"]
        return change, *(jax.grad(loss(fn), has_aux=True)(lora) for fn in (live, merged))

    change, (got, out), (want, wanted) = jax.device_get(run(lora))
    np.testing.assert_allclose(change[[1, 4]], lora["table"].b, atol=1e-6)
    assert not change[[0, 2, 3, 5, 6, 7, 8]].any()
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-3)
    assert np.abs(got["table"].b).min() > 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_rows": {"head": [7]}}, "names row 7 of 'head', which has 5"),
        ({"train_rows": {"kept": [1]}, "targets": "kept"}, "'kept' is to be trained in two ways"),
        ({"train_rows": {"haed": [1]}}, "matches none"),
        ({"train_rows": {"head": "x"}}, "takes rows"),
    ],
)
def test_bad_rows(config, words):
    with pytest.raises(lowrank.LowrankError, match=words):
        config = lowrank.LoraConfig(**{"rank": 2, "targets": "stack", **config})
        lowrank.init(jax.random.key(0), PARAMS, config, plan=PLAN)


def test_vera_trains_few_numbers_and_keeps_no_matrix():
    _, lora = adapted("vera")
    assert [leaf.shape for leaf in jax.tree.leaves(lora["stack"])] == [(3, 7), (3, 64)]
    base, other = lowrank.init(jax.random.key(1), PARAMS, CONFIGS["vera"], plan=PLAN)
    chex.assert_trees_all_equal(lora, other)  # the matrices are the seed's, not the key's
    moved = noisy(lora)
    reseeded = jax.tree.map(
        lambda n: dataclasses.replace(n, seed=6),
        moved,
        is_leaf=lambda n: isinstance(n, lowrank.VeRA),
    )
    both = lambda *trees: [lowrank.merge(base, tree)["kept"] for tree in trees]
    one, two = jax.device_get(jax.jit(both)(moved, reseeded))
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lokr"}, "method must be one of"),
        ({"method": "vera"}, "drawn from projection_seed"),
        ({"projection_seed": 3}, "drawn from projection_seed"),
        ({"method": "ia3", "dora": True}, "no factors and no norm"),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(lowrank.ConfigError, match=words):
        lowrank.LoraConfig(**options)


def test_an_initializer_is_loras():
    with pytest.raises(lowrank.ConfigError, match="'loha' has its own"):
        lowrank.init(
            jax.random.key(0), PARAMS, CONFIGS["loha"], plan=PLAN,
            initializer=lowrank.initializers.pissa,
        )  # fmt: skip


@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x")])
def test_ia3_is_split_along_either_axis(spec):
    """A part of the fan-in has every output feature's number; one of the fan-out has its own."""
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    base, fresh = lowrank.init(
        jax.random.key(0), {"w": normal(64, 6)}, dataclasses.replace(CONFIGS["ia3"], targets="w")
    )
    tree = lowrank.combine(base, noisy(fresh, scale=0.3))
    inner = spec[0] is not None
    sum_up = (lambda y: lax.psum(y, "x")) if inner else (lambda y: y)
    run = jax.shard_map(
        lambda tree, x: sum_up(lowrank.lift(lambda p, x: x @ p["w"])(tree, x)),
        mesh=mesh,
        in_specs=(lowrank.specs(tree, {"w": spec}), jax.P(None, spec[0])),
        out_specs=jax.P() if inner else spec,
    )
    merged = lowrank.merge(*lowrank.partition(tree))["w"]
    np.testing.assert_allclose(jax.jit(run)(tree, X), X @ merged, rtol=1e-4, atol=1e-4)


def test_ia3_of_another_model_is_refused():
    _, lora = lowrank.init(
        jax.random.key(0), {"w": normal(64, 6)}, dataclasses.replace(CONFIGS["ia3"], targets="w")
    )
    with pytest.raises(lowrank.TreeError, match=r"the adapter is for shape \(64, 6\)"):
        lowrank.combine({"w": normal(64, 7)}, lora)
    with pytest.raises(lowrank.TreeError, match=r"the adapter is for shape \(64, 6\)"):
        lowrank.combine({"w": normal(2, 64, 6)}, lora)

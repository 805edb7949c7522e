"""A combined tree combined again: a frozen adapter under a trained one.

References are NumPy: W1 = W + s1 a1 b1 (LoRA, arXiv 2106.09685), m (W + s a b) / |W + s a b| by
columns (DoRA, arXiv 2402.09353), or the leaf trained whole; then the same with W1 in place of W.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lowrank
from lowrank_jax._nodes import Adapted

pytestmark = pytest.mark.usefixtures("fast_compile")
KINDS = ("lora", "dora", "whole")


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def scan_layers(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def convolve(params, x):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, params["w"], (1,), "SAME", dimension_numbers=numbers)


# name -> (function, parameters, arguments)
MODELS = {
    "dot": (lambda p, x: x @ p["w"] + p["bias"], {"w": draw(0, 64, 6), "bias": draw(1, 6)},
            (draw(2, 3, 64),)),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": draw(0, 6, 64)}, (draw(2, 3, 64),)),
    "scan": (scan_layers, {"w": draw(0, 3, 64, 64) / 8}, (draw(2, 3, 64),)),
    "conv": (convolve, {"w": draw(0, 3, 64, 6)}, (draw(2, 2, 5, 64),)),
    "lookup": (lambda p, i: p["w"][i], {"w": draw(0, 9, 64)}, (jnp.array([[1, 8], [0, 3]]),)),
    "joined": (lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
               {"w": draw(0, 64, 6), "v": draw(1, 64, 5)}, (draw(2, 3, 64),)),
}  # fmt: skip


def make(model, kind, seed, rank=2):
    """An adapter of w with values that change its function, and of another scale than 1."""
    fn, params, args = MODELS[model]
    plan = lowrank.plan(fn, params, *args)
    if kind == "whole":
        lora = {**dict.fromkeys(params), "w": lowrank.Full(draw(seed, *params["w"].shape))}
        return params, lora
    config = lowrank.LoraConfig(rank=rank, alpha=1.5 * rank, targets="w", dora=kind == "dora")
    base, lora = lowrank.init(seed, params, config, plan=plan)
    leaves, treedef = jax.tree.flatten(lora)
    noisy = [x + draw(seed + i, *x.shape) / 4 for i, x in enumerate(leaves)]
    return base, jax.tree.unflatten(treedef, noisy)


def change(w, node):
    """W with one adapter, in NumPy and float64."""
    if isinstance(node, lowrank.Full):
        return np.asarray(node.value, np.float64)
    a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
    lead = len(node.stack)
    flat = (*a.shape[:lead], -1, a.shape[-1]), (*b.shape[: lead + 1], -1)
    order = [*node.stack, *node.fan_in, *node.fan_out]
    sizes = [w.shape[axis] for axis in order]
    delta = (a.reshape(flat[0]) @ b.reshape(flat[1])).reshape(sizes)
    out = w + node.scale * delta.transpose(np.argsort(order))
    if node.magnitude is None:
        return out
    norms = np.sqrt(np.square(out).sum(axis=tuple(node.fan_in), keepdims=True))
    magnitude = np.asarray(node.magnitude, np.float64)
    kept = [*node.stack, *node.fan_out]
    shape = [w.shape[axis] if axis in kept else 1 for axis in range(w.ndim)]
    return out * magnitude.transpose(np.argsort(kept)).reshape(shape) / norms


def same(one, two, tolerance=2e-5):
    np.testing.assert_allclose(one, two, atol=tolerance * np.abs(two).max(), rtol=tolerance)


SHORT = [("dot", "lora", "lora"), ("dot", "lora", "dora"), ("dot", "dora", "lora")]
SHORT += [("dot", "whole", "dora"), ("dot", "dora", "whole"), ("transposed", "lora", "dora")]
SHORT += [(model, "lora", "dora") for model in ("scan", "conv", "lookup", "joined")]


@pytest.mark.parametrize(
    ("model", "inner", "outer"),
    [
        pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow)
        for case in itertools.product(MODELS, KINDS, KINDS)
    ],
)
def test_the_outer_adapter_acts_on_the_inner_weight(model, inner, outer):
    fn, params, args = MODELS[model]
    base, one = make(model, inner, 10)
    _, two = make(model, outer, 20, rank=3)
    tree = lowrank.combine(lowrank.combine(base, one), two)
    w = change(change(np.asarray(params["w"], np.float64), one["w"]), two["w"])
    merged = lowrank.merge(lowrank.combine(base, one), two)
    same(merged["w"], w)
    if "bias" in params:
        assert merged["bias"] is params["bias"]
    wanted = fn({**params, "w": jnp.asarray(w, jnp.float32)}, *args)
    same(jax.jit(lowrank.lift(fn, fallback="raise"))(tree, *args), wanted)
    assert isinstance(jax.tree.map(lambda x: x, tree)["w"].base, Adapted | lowrank.Normed)


METHODS = {
    "lora": {},
    "dora": {"dora": True},
    "loha": {"method": "loha"},
    "dora of loha": {"method": "loha", "dora": True},
    "vera": {"method": "vera", "projection_seed": 3},
    "dora of vera": {"method": "vera", "projection_seed": 3, "dora": True},
    "ia3": {"method": "ia3"},
    "folded": {"dora": True},
    "whole": None,
    "rows": None,
}


def add_noise(lora, seed):
    leaves, treedef = jax.tree.flatten(lora)
    noise = lambda i, x: np.random.default_rng([seed, i]).standard_normal(x.shape) / 4
    return jax.tree.unflatten(treedef, [x + noise(i, x) for i, x in enumerate(leaves)])


def make_leaf(use, method, seed, rank=2):
    """(base, adapter) of one leaf w, of any method."""
    fn, params, args = MODELS[use]
    params = {"w": params["w"]}
    fan_out = tuple(range(1, params["w"].ndim))
    rows = {"fan_in": (0,), "fan_out": fan_out, "kind": "lookup", "rows": (0, 2)}
    if method == "whole":
        return params, {"w": lowrank.Full(draw(seed, *params["w"].shape))}
    if method == "rows":
        changes = draw(seed, 2, *params["w"].shape[1:])
        return params, {"w": lowrank.Rows(b=changes, size=len(params["w"]), **rows)}
    plan = None if use in ("dot", "lookup", "joined") else lowrank.plan(fn, params, *args)
    options = {"rank": rank, "alpha": 1.5 * rank, "targets": "w", **METHODS[method]}
    base, lora = lowrank.init(seed, params, lowrank.LoraConfig(**options), plan=plan)
    lora = add_noise(lora, seed)
    return base, lowrank.fold_norms(base, lora) if method == "folded" else lora


SHORT_METHODS = [("dot", "dora of loha"), ("dot", "ia3")]


@pytest.mark.parametrize(
    ("use", "inner"),
    [
        pytest.param(use, inner, marks=() if (use, inner) in SHORT_METHODS else pytest.mark.slow)
        for use in ("dot", "transposed", "scan", "conv", "lookup")
        for inner in METHODS
    ],
)
def test_any_method_over_any_other_is_that_over_the_merged_weights(use, inner):
    """Values, and gradients of the outer adapter and the input, for all outer methods at once."""
    fn, bias, args = MODELS[use]
    bias = {name: leaf for name, leaf in bias.items() if name != "w"}
    base, one = make_leaf(use, inner, 10)
    over = {outer: make_leaf(use, outer, 20, rank=3)[1]["w"] for outer in METHODS}
    floats = tuple(jnp.issubdtype(x.dtype, jnp.floating) for x in args)

    def run(outer, node, inside, *args):
        has_rule = use not in ("conv", "scan") or "rows" not in (inner, outer)
        tree = {**bias, **lowrank.combine(inside, {"w": node})}
        return lowrank.lift(fn, fallback="raise" if has_rule else "silent")(tree, *args)

    def loss(over, inside, *args):
        values = {outer: run(outer, node, inside, *args) for outer, node in over.items()}
        return sum(jnp.sum(jnp.sin(value)) for value in values.values()), values

    numbers = (0, *(2 + i for i, is_float in enumerate(floats) if is_float))
    slope = jax.jit(jax.value_and_grad(loss, numbers, has_aux=True))
    (_, values), grads = slope(over, lowrank.combine(base, one), *args)
    (_, wanted), slopes = slope(over, lowrank.merge(base, one), *args)
    for outer in METHODS:
        same(values[outer], wanted[outer])
    # Some derivatives are small differences of large ones.
    jax.tree.map(lambda got, want: same(got, want, 2e-4), grads, slopes)
    moved = {name: any(np.any(x) for x in jax.tree.leaves(grad)) for name, grad in grads[0].items()}
    assert all(moved.values()), moved


@pytest.mark.parametrize("outer", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["dot", "scan"])
def test_on_a_quantized_base(kind, outer):
    fn, params, args = MODELS[kind]
    plan = lowrank.plan(fn, params, *args)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"), plan=plan)
    dense = lowrank.dequantize(frozen)
    (_, one), (_, two) = make(kind, "dora", 10), make(kind, outer, 20)
    run = lowrank.lift(fn, fallback="raise")
    twice = lambda base: lowrank.combine(lowrank.combine(base, one), two)
    same(run(twice(frozen), *args), run(twice(dense), *args))


@pytest.mark.parametrize(
    ("inner", "outer"), [("lora", "dora"), ("dora", "whole"), ("whole", "lora")]
)
def test_only_the_outermost_is_trained(inner, outer):
    fn, _, args = MODELS["dot"]
    base, one = make("dot", inner, 10)
    _, two = make("dot", outer, 20)
    tree = lowrank.combine(lowrank.combine(base, one), two)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    grads = jax.grad(lambda t: jnp.sum(lowrank.lift(fn)(t, *args) ** 2), allow_int=True)(tree)
    node = grads["w"]
    assert all(not np.any(x) for x in jax.tree.leaves(node.base))
    assert any(np.any(x) for x in jax.tree.leaves(node.delta))
    mask = lowrank.trainable_mask(tree)
    assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(two))
    assert jax.tree.leaves(mask["w"].delta) == [True] * len(jax.tree.leaves(two))
    optimizer = lowrank.only_adapters(optax.adam(0.1))
    state = optimizer.init(tree)
    assert count(state) == 2 * count(two) + 1
    updates, _ = optimizer.update(grads, state, tree)
    moved = optax.apply_updates(tree, updates)
    chex.assert_trees_all_equal(moved["w"].base, tree["w"].base)
    assert np.any(jax.tree.leaves(moved["w"].delta)[0] != jax.tree.leaves(two)[0])
    found = lowrank.report(fn, tree, *args)
    assert found.trainable == count(two)
    assert found.total - found.trainable == 64 * 6 + 6 + count(one)


@pytest.mark.parametrize("outer", KINDS)
def test_partition_takes_off_one_adapter_at_a_time(outer):
    """Also where the two adapters are of different leaves."""
    base, one = make("joined", "lora", 10)
    _, two = make("joined", outer, 20)
    two = {"v": lowrank.LowRank(draw(7, 64, 2), draw(8, 2, 5)), "w": two["w"]}
    three = {"v": lowrank.LowRank(draw(5, 64, 1), draw(6, 1, 5), scale=0.5), "w": None}
    tree = lowrank.combine(base, one)
    twice = lowrank.combine(tree, two)
    thrice = lowrank.combine(twice, three)
    assert not any(jax.tree.leaves(lowrank.trainable_mask(thrice)["w"]))
    for whole, under, adapter in ((thrice, twice, three), (twice, tree, two), (tree, base, one)):
        left, last = lowrank.partition(whole)
        chex.assert_trees_all_equal(last, adapter)
        chex.assert_trees_all_equal_structs(left, under)
        chex.assert_trees_all_equal(left, under)
    fn, _, args = MODELS["joined"]
    merged = lowrank.merge(lowrank.merge(lowrank.merge(base, one), two), three)
    same(lowrank.lift(fn, fallback="raise")(thrice, *args), fn(merged, *args))


def test_scale_is_of_the_outer_adapter():
    fn, params, args = MODELS["dot"]
    base, one = make("dot", "lora", 10)
    for kind in KINDS:
        _, two = make("dot", kind, 20)
        inner = lowrank.combine(base, one, scale=0.5)
        w = np.asarray(params["w"], np.float64)
        w = w + 0.5 * (change(w, one["w"]) - w)
        w = w + 2.0 * (change(w, two["w"]) - w)
        run = jax.jit(lambda m, inner=inner, two=two: lowrank.lift(fn)(
            lowrank.combine(inner, two, scale=m), *args))  # fmt: skip
        same(run(2.0), fn({**params, "w": jnp.asarray(w, jnp.float32)}, *args))
        same(run(0.0), lowrank.lift(fn)(inner, *args))


@pytest.mark.parametrize("outer", ["lora", "dora"])
@pytest.mark.parametrize("inner", [name for name in METHODS if name not in ("whole", "rows")])
def test_no_dense_product_of_factors_is_formed(inner, outer):
    """256 x 256 with 2 rows: two adapters cost what their factors do, not 256 x 256 x rank."""
    fn, args = lambda p, x: x @ p["w"], (draw(2, 2, 256),)
    params = {"w": draw(0, 256, 256)}
    config = lambda method: lowrank.LoraConfig(rank=4, targets="w", **METHODS[method])
    base, one = lowrank.init(0, params, config(inner))
    if inner == "folded":
        one = lowrank.fold_norms(base, one)
    _, two = lowrank.init(1, params, config(outer))
    run = lambda base, one, two, x: lowrank.lift(fn)(
        lowrank.combine(lowrank.combine(base, one), two), x
    )
    jaxpr = jax.make_jaxpr(run)(base, one, two, *args)
    eqns = list(list_equations(getattr(jaxpr, "jaxpr", jaxpr)))
    sizes = {tuple(var.aval.shape) for name, eqn in eqns for var in eqn.outvars if is_product(name)}
    assert (2, 256) in sizes
    assert (256, 256) not in sizes


def is_product(name):
    return "dot" in name or "bilinear" in name or "contract" in name


def list_equations(jaxpr):
    """Yield the name and the equation of all equations, also those of inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from list_equations(inner)


def test_specs_and_bytes_of_both_adapters():
    base, one = make("dot", "lora", 10)
    _, two = make("dot", "dora", 20)
    tree = lowrank.combine(lowrank.combine(base, one), two)
    spec = jax.P("x", "y")
    found = lowrank.specs(tree, {"w": spec, "bias": jax.P("y")})
    chex.assert_trees_all_equal_structs(jax.tree.map(lambda _: 0, tree), jax.tree.map(
        lambda _: 0, found, is_leaf=lambda s: isinstance(s, jax.P)))  # fmt: skip
    inner = found["w"].base.value
    assert inner.base == spec
    assert inner.delta.b == jax.P(None, "y")


def test_the_same_adapter_twice_is_refused():
    base, one = make("dot", "lora", 10)
    tree = lowrank.combine(base, one)
    with pytest.raises(lowrank.TreeError, match="already combined with this adapter .see 'w'."):
        lowrank.combine(tree, one)
    with pytest.raises(lowrank.TreeError, match="would act twice"):
        lowrank.combine(lowrank.combine(tree, make("dot", "lora", 20)[1]), one)


def test_norms_do_not_see_the_dropout_of_the_inner_adapter():
    """Dropout acts on activations: the norm is that of the weight, for any key."""
    for kind in ("dot", "scan"):
        base, one = make(kind, "lora", 10)
        _, two = make(kind, "dora", 20)
        plain = lowrank.combine(base, one)
        dropped = lowrank.combine(base, one, dropout=0.5, key=jax.random.key(3))
        same(lowrank.merge(dropped, two)["w"], lowrank.merge(plain, two)["w"])
        gains = [lowrank.fold_norms(inner, two)["w"].magnitude for inner in (dropped, plain)]
        same(*gains)

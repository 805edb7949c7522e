"""lift: identity, statics, caching, effects, warnings, errors."""

import dataclasses
import enum
import re
import warnings

import chex
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from models import made, noisy, normal, variables_of

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

W = normal(6, 5)
X = normal(4, 6)


def adapted(tree=None, targets="w", rank=2, stack=()):
    tree = {"w": W} if tree is None else tree
    config = lowrank.LoraConfig(rank=rank, alpha=3, targets=targets)
    base, lora = lowrank.init(jax.random.key(2), tree, config)
    return base, noisy(lora, scale=0.3)


def dense_and_tree(**options):
    base, lora = adapted(**options)
    return lowrank.merge(base, lora), lowrank.combine(base, lora)


def f(p, x):
    return jnp.tanh(x @ p["w"])


def test_identity_on_dense_trees():
    calls = []

    def fn(p, x, flag=None):
        calls.append(flag)
        return "not an array", p, x

    out = lowrank.lift(fn)({"w": W}, X, flag=[1])
    assert out[0] == "not an array"
    assert out[1]["w"] is W
    assert calls == [[1]]
    assert lowrank.lift(fn).__name__ == "fn"


def test_nodes_in_any_argument():
    dense, tree = dense_and_tree()
    lifted = lowrank.lift(lambda x, *rest, p: jnp.tanh(x @ p["w"]) + rest[0][1])
    want = f(dense, X) + X[:, :5]
    chex.assert_trees_all_close(lifted(X, (X, X[:, :5]), p=tree), want, atol=1e-5)


def test_static_arguments_stay_static_and_cache():
    dense, tree = dense_and_tree()
    traces = []

    def fn(p, x, mode, *, train):
        traces.append((mode, train))
        return f(p, x) if mode == "tanh" and train else x

    lifted = lowrank.lift(fn)
    for _ in range(3):
        chex.assert_trees_all_close(lifted(tree, X, "tanh", train=True), f(dense, X), atol=1e-5)
    assert len(traces) == 1
    assert lifted(tree, X, "other", train=True).shape == X.shape
    assert traces == [("tanh", True), ("other", True)]


def test_eager_calls_retrace_for_new_shapes_only():
    _, tree = dense_and_tree()
    fn = chex.assert_max_traces(f, n=2)
    lifted = lowrank.lift(fn)
    for rows in (4, 4, 2, 4, 2):
        assert lifted(tree, X[:rows]).shape == (rows, 5)


def test_swapping_adapters_never_recompiles():
    base, lora = adapted()
    fn = chex.assert_max_traces(f, n=1)
    step = jax.jit(lambda lora, x: lowrank.lift(fn)(lowrank.combine(base, lora), x))
    for shift in range(3):
        other = noisy(lora, shift)
        want = f(lowrank.merge(base, other), X)
        chex.assert_trees_all_close(step(other, X), want, atol=1e-4)
    assert step._cache_size() == 1


@dataclasses.dataclass(frozen=True)
class Option:
    value: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A pytree with a static field."""

    by: jax.Array
    static: object = dataclasses.field(metadata={"static": True})


class Mode(enum.Enum):
    LOW = 1


class Level(enum.IntEnum):
    LOW = 1


class Other(enum.IntEnum):
    LOW = 1


ONE = jnp.ones(())
# equal by `==`, and yet what a function makes of one is not what it makes of another
EQUAL = [
    [True, 1, 1.0, 1 + 0j, Level.LOW, Other.LOW, Mode.LOW],
    [0.0, -0.0, 0, False, 0j, complex(0.0, -0.0), complex(-0.0, 0.0)],
    [(1, "a"), (True, "a"), (1.0, "a")],
    [frozenset([1]), frozenset([True])],
    [Option(1), Option(True), Option(1.0)],
    [Option((Option(0.0),)), Option((Option(-0.0),))],
    [{True: ONE}, {1: ONE}, {1.0: ONE}],
    [{"a": {0.0: ONE}}, {"a": {-0.0: ONE}}],
    [Scaled(ONE, True), Scaled(ONE, 1), Scaled(ONE, 1.0)],
    [[Scaled(ONE, (0.0,))], [Scaled(ONE, (-0.0,))]],
    [Scaled(ONE, {"a": 1}), Scaled(ONE, {"a": True})],
]


def shown(value):
    """What a function of static values may tell them apart by: types and signs."""
    return repr(jax.tree.map(lambda leaf: "..." if hasattr(leaf, "shape") else repr(leaf), value))


@pytest.mark.parametrize("order", [1, -1])
def test_equal_static_arguments_are_told_apart(order):
    dense, tree = dense_and_tree()
    values = [value for group in EQUAL for value in group][::order]
    numbers = {shown(value): number for number, value in enumerate(values)}
    assert len(numbers) == len(values)
    traces = []

    def fn(p, x, value):
        traces.append(value)
        return f(p, x) + numbers[shown(value)]

    lifted = lowrank.lift(fn)
    for _ in range(2):
        for number, value in enumerate(values):
            want = np.asarray(f(dense, X)) + number
            np.testing.assert_allclose(lifted(tree, X, value), want, atol=1e-5, err_msg=f"{value}")
    assert len(traces) == len(values)  # what is the same is compiled once


def test_unhashable_static_argument_is_named():
    _, tree = dense_and_tree()
    with pytest.raises(lowrank.LowrankError, match=r"neither an array nor hashable"):
        lowrank.lift(lambda p, x, s: f(p, x))(tree, X, {1, 2})


def test_old_results_do_not_depend_on_earlier_products():
    # a library that finds weights by shape would adapt the activation, or nothing
    square, act = normal(5, 5), normal(5, 5, seed=1)
    dense, tree = dense_and_tree(tree={"w": square})
    _ = act @ square
    out = lowrank.lift(lambda p, x: x @ p["w"] @ x)(tree, act)
    chex.assert_trees_all_close(out, act @ dense["w"] @ act, rtol=1e-4)


def test_equal_blocks_share_one_trace():
    traces = []

    @jax.jit
    def block(w, x):
        traces.append(1)
        return jnp.tanh(x @ w)

    def net(p, x):
        for name in sorted(p):
            x = block(p[name], x)
        return x

    tree = {f"w{i}": normal(6, 6, seed=i) for i in range(8)}
    base, lora = adapted(tree, targets="*")
    lifted = lowrank.lift(net, fallback="raise")
    jaxpr = jax.make_jaxpr(lambda l, x: lifted(lowrank.combine(base, l), x))(lora, X)
    assert len(traces) == 1
    # every call of the block in the result is of one and the same inner jaxpr
    inner = [e.params["jaxpr"] for e in jaxpr.eqns if e.params.get("name") == "block"]
    assert len(inner) == 8
    assert len({id(j) for j in inner}) == 1
    merged = lambda lora: net(lowrank.merge(base, lora), X)
    got, want = jax.jit(lambda l: (lifted(lowrank.combine(base, l), X), merged(l)))(lora)
    chex.assert_trees_all_close(got, want, atol=1e-4)


def test_names_of_jits_and_scopes_survive():
    _, tree = dense_and_tree()

    @jax.jit
    def my_block(w, x):
        with jax.named_scope("my_scope"):
            return jnp.tanh(x @ w)

    lifted = lowrank.lift(lambda p, x: my_block(p["w"], x))
    text = jax.jit(lifted).lower(tree, X).as_text(debug_info=True)
    assert "my_block" in text
    assert "my_scope" in text


# Effects


def test_prints_and_callbacks_run(capfd):
    dense, tree = dense_and_tree()
    seen = []

    def fn(p, x):
        jax.debug.print("max {m:.3f}", m=x.max())
        jax.debug.callback(lambda v: seen.append(float(v)), x[0, 0])
        y = jax.pure_callback(
            lambda v: np.asarray(v) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x
        )
        z = jax.experimental.io_callback(
            lambda v: np.asarray(v) + 1, jax.ShapeDtypeStruct(x.shape, x.dtype), y, ordered=True
        )
        return f(p, z)

    out = lowrank.lift(fn, fallback="raise")(tree, X)
    jax.effects_barrier()
    chex.assert_trees_all_close(out, f(dense, 2 * X + 1), atol=1e-5)
    assert f"max {float(X.max()):.3f}" in capfd.readouterr().out
    assert seen == [float(X[0, 0])]


def test_printing_a_weight_shows_the_adapted_one(capfd):
    dense, tree = dense_and_tree()

    def fn(p, x):
        jax.debug.print("{}", p["w"][0, 0])
        return f(p, x)

    lowrank.lift(fn, fallback="silent")(tree, X)
    jax.effects_barrier()
    assert float(capfd.readouterr().out) == pytest.approx(float(dense["w"][0, 0]), rel=1e-5)


@pytest.mark.parametrize("place", ["closed", "argument", "inner"])
def test_refs(place):
    dense, tree = dense_and_tree()
    ref = jax.new_ref(jnp.zeros(()))
    want = f(dense, X)

    def closed(p, x):
        ref[...] = x.sum()
        return f(p, x)

    def argument(p, x, r):
        r[...] = x.sum()
        return f(p, x)

    def inner(p, x):
        r = jax.new_ref(jnp.zeros(()))
        r[...] = x.sum()
        return f(p, x) * jax.freeze(r)

    if place == "inner":
        chex.assert_trees_all_close(lowrank.lift(inner)(tree, X), want * X.sum(), rtol=1e-4)
        return
    extra = (ref,) if place == "argument" else ()
    out = lowrank.lift({"closed": closed, "argument": argument}[place])(tree, X, *extra)
    chex.assert_trees_all_close(out, want, atol=1e-5)
    assert float(ref[...]) == pytest.approx(float(X.sum()))


# Falling back


def weight_norm(p, x):
    w = p["w"]
    return x @ (w / jnp.linalg.norm(w, axis=0))


def test_fallback_warns_once_for_each_path_and_primitive():
    dense, tree = dense_and_tree()
    lifted = lowrank.lift(weight_norm)
    with pytest.warns(lowrank.MaterializeWarning, match=r"^w: materialized at ") as caught:
        out = lifted(tree, X)
    chex.assert_trees_all_close(out, weight_norm(dense, X), atol=1e-5)
    said = [str(w.message) for w in caught]
    assert len(said) == len(set(said))
    assert all("test_lift.py:" in text for text in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lifted(tree, X[:2])  # a new trace says nothing new


def test_fallback_raise_names_path_primitive_line_and_remedy():
    _, tree = dense_and_tree()
    with pytest.raises(lowrank.MaterializeError) as error:
        lowrank.lift(weight_norm, fallback="raise")(tree, X)
    text = str(error.value)
    assert re.search(
        r"the weight 'w' .*materialized at '\w+', test_lift.py:\d+ \(weight_norm\)", text
    )
    assert "fallback='warn'" in text


def test_fallback_raise_inside_a_jit_names_the_real_path():
    tree = {f"w{i}": W for i in range(3)}
    base, lora = adapted(tree, targets="*")
    norm = jax.jit(lambda w, x: weight_norm({"w": w}, x))
    fn = lambda p, x: sum(norm(p[f"w{i}"], x) for i in range(3))
    with pytest.raises(lowrank.MaterializeError, match="'w0'"):
        lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), X)
    with pytest.warns(lowrank.MaterializeWarning) as caught:
        lowrank.lift(fn)(lowrank.combine(base, lora), X)
    paths = {str(w.message).split(":")[0] for w in caught}
    assert paths == {"w0", "w1", "w2"}


def test_custom_derivatives_are_kept():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 10 * r[0].T @ g))
    base, lora = adapted()
    lifted = lowrank.lift(lambda p, x: product(x, p["w"]).sum(), fallback="silent")
    losses = (
        lambda l: lifted(lowrank.combine(base, l), X),
        lambda l: product(X, lowrank.merge(base, l)["w"]).sum(),
        lambda l: 10 * (X @ lowrank.merge(base, l)["w"]).sum(),
    )
    mine, want, tenfold = jax.jit(lambda l: [jax.grad(loss)(l) for loss in losses])(lora)
    chex.assert_trees_all_close(mine, want, rtol=1e-5)
    chex.assert_trees_all_close(mine, tenfold, rtol=1e-5)


def test_a_returned_weight_is_dense():
    dense, tree = dense_and_tree()
    lifted = lowrank.lift(lambda p, x: (f(p, x), p["w"]), fallback="silent")
    chex.assert_trees_all_close(lifted(tree, X)[1], dense["w"], rtol=1e-6)
    with pytest.raises(lowrank.MaterializeError, match="returns the weight 'w'"):
        lowrank.lift(lambda p, x: p["w"], fallback="raise")(tree, X)


# Errors


def test_errors_name_the_users_layer_and_path():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(5, name="body")(x))

    variables = variables_of(Net(), X)
    base, lora = adapted(variables, targets="**/kernel")
    tree = lowrank.combine(base, lora)
    bad = dataclasses.replace(tree["params"]["head"]["kernel"], key=jnp.zeros(()), rate=0.5)
    tree["params"]["head"]["kernel"] = bad  # no PRNG key
    with pytest.raises(TypeError) as error:
        lowrank.lift(Net().apply)(tree, X)
    notes = "\n".join(error.value.__notes__)
    assert "'params/head/kernel'" in notes
    assert "head" in notes.split("in layer")[1]
    assert "dot_general" in notes
    assert "test_lift.py" in notes


def test_factors_that_do_not_fit_are_named():
    _, lora = adapted()
    node = lora["w"]
    for a, b, words in (
        (node.a[:, :1], node.b, r"'w': a of shape \(6, 1\) has rank 1, but b .* rank 2"),
        (node.a[:5], node.b, r"'w': the adapter is for shape \(5, 5\), the base has \(6, 5\)"),
    ):
        bad = lowrank.Adapted(W, dataclasses.replace(node, a=a, b=b))
        with pytest.raises(lowrank.TreeError, match=words):
            lowrank.lift(f)({"w": bad}, X)
    with pytest.raises(lowrank.TreeError, match="'w' is a LowRank adapter without its base"):
        lowrank.lift(f)(lora, X)


def test_the_users_own_errors_are_untouched():
    _, tree = dense_and_tree()

    def fn(p, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lowrank.lift(fn)(tree, X)
    with pytest.raises(TypeError, match=r"dot_general requires contracting dimensions"):
        lowrank.lift(f)(tree, X[:, :3])


def test_forgetting_lift_is_one_clear_error():
    _, tree = dense_and_tree()
    with pytest.raises(lowrank.LowrankError, match=r"lowrank.lift\(fn\)"):
        f(tree, X)
    model = nn.Dense(5)
    variables = variables_of(model, X)
    base, lora = adapted(variables, targets="**/kernel")
    with pytest.raises(lowrank.LowrankError, match=r"lowrank.lift\(fn\)"):
        model.apply(lowrank.combine(base, lora), X)


# Transformations, outside and inside


def loss(fn):
    return lambda tree, x: jnp.sum(fn(tree, x) ** 2)


def test_one_tree_gradients_leave_the_base_alone():
    _, tree = dense_and_tree(tree={"w": W, "count": np.int32(2)})
    g = jax.jit(jax.grad(loss(lowrank.lift(f)), allow_int=True))(tree, X)
    assert not np.any(g["w"].base)
    assert np.any(g["w"].delta.a)
    assert g["count"].dtype == jax.dtypes.float0


def test_no_second_copy_of_a_scanned_base_is_saved():
    stacked = normal(7, 6, 6)
    config = lowrank.LoraConfig(rank=2, targets="w")

    def net(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    plan = lowrank.plan(net, {"w": stacked}, X)
    base, lora = lowrank.init(jax.random.key(0), {"w": stacked}, config, plan=plan)

    def fn(lora, base):
        return lowrank.lift(net, fallback="raise")(lowrank.combine(base, lora), X).sum()

    for one_tree in (False, True):

        def value(lora, base, one_tree=one_tree):
            if not one_tree:
                return jax.grad(fn)(lora, base)
            tree = lowrank.combine(base, lora)
            return jax.grad(lambda t: lowrank.lift(net)(t, X).sum())(tree)["w"].delta

        jaxpr = jax.make_jaxpr(value)(lora, base)
        made = [
            var.aval.shape
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "scan"
            for var in eqn.outvars
        ]
        assert made
        assert stacked.shape not in made


@pytest.mark.parametrize("wrap", ["jit", "remat", "vmap", "scan", "cond"])
def test_inside_other_transformations(wrap):
    base, lora = adapted()
    lifted = lowrank.lift(f, fallback="raise")
    run = {
        "jit": lambda fn: jax.jit(fn)(X),
        "remat": lambda fn: jax.checkpoint(fn)(X),
        "vmap": lambda fn: jax.vmap(fn)(X),
        "scan": lambda fn: lax.scan(lambda c, x: (c, fn(x)), 0.0, X)[1],
        "cond": lambda fn: lax.cond(X.sum() > 0, fn, lambda x: 2 * fn(x), X),
    }[wrap]
    mine = jax.value_and_grad(lambda l: run(lambda x: lifted(lowrank.combine(base, l), x)).sum())
    want = jax.value_and_grad(lambda l: run(lambda x: f(lowrank.merge(base, l), x)).sum())
    both = jax.jit(lambda lora: (mine(lora), want(lora)))
    chex.assert_trees_all_close(*both(lora), rtol=1e-4)


def test_many_adapters_are_vmap_and_the_base_product_stays_one():
    base, _ = adapted()
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="w")
    make = lambda key: lowrank.init(key, {"w": W}, config)[1]
    many = noisy(jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(0), 4)))
    lifted = lowrank.lift(f, fallback="raise")
    run = lambda lora, x: lifted(lowrank.combine(base, lora), x)
    out = np.asarray(jax.vmap(run, in_axes=(0, None))(many, X))
    reference = jax.jit(lambda one: f(lowrank.merge(base, one), X))
    for i in range(4):
        one = jax.tree.map(lambda v, i=i: np.asarray(v)[i], many)
        chex.assert_trees_all_close(out[i], reference(one), atol=1e-5)
    jaxpr = str(jax.make_jaxpr(jax.vmap(run, in_axes=(0, 0)))(many, np.stack([X] * 4)))
    assert "f32[4,6,5]" not in jaxpr  # no batch of base weights


def test_user_scan_over_combined_layers():
    stacked = {"w": normal(3, 6, 6)}
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="w")
    layer = lambda p, x: jnp.tanh(x @ p["w"])
    net = lambda p, x: lax.scan(lambda c, layer_p: (layer(layer_p, c), None), x, p)[0]
    plan = lowrank.plan(net, stacked, X)
    base, lora = lowrank.init(jax.random.key(0), stacked, config, plan=plan)
    step = lambda c, layer_p: (lowrank.lift(layer, fallback="raise")(layer_p, c), None)
    live = lambda lora: lax.scan(step, X, lowrank.combine(base, lora))[0]
    merged = lambda lora: net(lowrank.merge(base, lora), X)
    got, want = jax.jit(lambda lora: (live(lora), merged(lora)))(noisy(lora))
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_nnx_jit_remat_and_scan_return_no_dense_stack():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.vmap(lambda r: Block(r))(rngs.split(3))

        def __call__(self, x):
            step = nnx.scan(
                nnx.remat(lambda block, x: block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
            )
            return step(self.blocks, x)

    graphdef, params = nnx.split(made(lambda: Net(nnx.Rngs(0))))
    fn = lambda params, x: nnx.merge(graphdef, params)(x)
    plan = lowrank.plan(fn, params, X)
    assert plan["blocks/linear/kernel"].stack == (0,)
    config = lowrank.LoraConfig(rank=2, alpha=3)
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    lora = noisy(lora)
    lifted = lowrank.lift(fn, fallback="raise")
    run = lambda lora: lifted(lowrank.combine(base, lora), X)
    got, want = jax.jit(lambda lora: (run(lora), fn(lowrank.merge(base, lora), X)))(lora)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    jaxpr = jax.make_jaxpr(run)(lora)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert len(scans) == 1
    assert (3, 6, 6) not in [v.aval.shape for v in scans[0].outvars]

"""Adapters of weights that multiply the same input share one product, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import NamedSharding, P, lax
from jax.sharding import AxisType
from models import noisy, normal
from shared_inputs import list_products, products_alone

import lowrank_jax as lowrank
from lowrank_jax._estimate.collectives import count_collectives

TOKENS, DIM, HIDDEN, RANK = 40, 32, 48, 3
X, MANY = normal(TOKENS, DIM), normal(4 * TOKENS, DIM)


def layer(p, x, product=lambda x, w: x @ w):
    """As in a Llama, one input of three weights, and one of two."""
    q, k, v = (product(x, p[name]) for name in "qkv")
    x = x + jnp.tanh(q) * jnp.tanh(k) + v
    return product(jnp.tanh(product(x, p["gate"])) * product(x, p["up"]), p["down"])


def weights(*lead, transposed=False):
    shapes = dict.fromkeys("qkv", (DIM, DIM))
    shapes |= {"gate": (DIM, HIDDEN), "up": (DIM, HIDDEN), "down": (HIDDEN, DIM)}
    order = slice(None, None, -1 if transposed else 1)
    return {
        name: normal(*lead, *shape[order], seed=i, scale=DIM**-0.5)
        for i, (name, shape) in enumerate(shapes.items())
    }


def cast(x, w):
    """As Flax's layers compute in bfloat16: each casts the input for itself, and its kernel."""
    return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)


def scanned(body):
    return lambda p, x: lax.scan(lambda x, p: (body(p, x), None), x, p)[0]


MODELS = {
    "dense": (layer, weights()),
    "cast": (functools.partial(layer, product=cast), weights()),
    "transposed": (
        functools.partial(layer, product=lambda x, w: x @ w.T),
        weights(transposed=True),
    ),
    "on the left": (
        functools.partial(layer, product=lambda x, w: (w @ x.T).T),
        weights(transposed=True),
    ),
    "remat": (jax.checkpoint(layer), weights()),
    "scan": (scanned(layer), weights(2)),
    "scan of remat": (scanned(jax.checkpoint(layer)), weights(2)),
    "jit": (jax.jit(layer), weights()),
}


def adapt(fn, params, x=X, dora=False, codes=False, rank=RANK):
    """A base, an adapter none of whose factors is zero, and the output of both."""
    plan = lowrank.plan(fn, params, x)
    config = lowrank.LoraConfig(rank=rank, alpha=5, targets="**", dora=dora)
    quant = lowrank.QuantConfig(block_size=32, double_quant=False, packing="uint8", targets="**")

    def make(params):
        params = lowrank.quantize(params, quant, plan=plan) if codes else params
        return lowrank.init(0, params, config, plan=plan)

    if dora or codes:
        base, lora = jax.jit(make)(params)
    else:  # nothing is compiled
        base, lora = params, jax.eval_shape(make, params)[1]
        lora = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), lora)
    # a function of its own for each call, so that no trace is that of another
    run = lowrank.lift(lambda *args: fn(*args), fallback="raise")
    out = lambda lora, base, x, **options: run(lowrank.combine(base, lora, **options), x)
    return base, noisy(lora), out


def gradient(fn, params, **options):
    base, lora, out = adapt(fn, params, **options)
    loss = lambda lora, base, x: jnp.sin(out(lora, base, x)).sum()
    return base, lora, lambda lora, base, x: jax.grad(loss, (0, 2))(lora, base, x)


def alone(fn, *args):
    """Calls fn while no product is shared."""
    with products_alone():
        return fn(*args)


def count(jaxpr, name):
    """Equations of a primitive in a jaxpr, those of inner jaxprs included."""
    inner = [getattr(v, "jaxpr", v) for eqn in jaxpr.eqns for v in eqn.params.values()]
    own = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return own + sum(count(j, name) for j in inner if hasattr(j, "eqns"))


def count_products(fn, *args):
    """Products of adapters in a trace."""
    return count(jax.make_jaxpr(fn)(*args).jaxpr, "lowrank_bilinear")


def assert_close(got, want, dtype=jnp.float32):
    """Up to a few roundings of the largest entry."""
    room = (100 if dtype == jnp.float32 else 8) * float(jnp.finfo(dtype).eps)

    def check(got, want):
        got, want = (np.asarray(v, np.float64) for v in (got, want))
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=room * np.abs(want).max())

    jax.tree.map(check, got, want)


# Values and derivatives, with products shared and not


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "") for name in MODELS if name != "scan"),
        ("dense", "DoRA"),
        ("dense", "codes"),
        pytest.param("scan", "", marks=pytest.mark.slow),
        pytest.param("scan of remat", "codes", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_products_alone(name, form):
    fn, params = MODELS[name]

    def found():
        base, lora, grad = gradient(fn, params, dora=form == "DoRA", codes=form == "codes")
        return count_products(grad, lora, base, X), jax.jit(grad)(lora, base, X)

    (few, got), (many, want) = found(), alone(found)
    # of q, k and v two products less, of gate and up one, forward and twice backward; remat
    # computes the forward once more
    assert many - few == (12 if "remat" in name else 9)
    assert_close(got, want, jnp.bfloat16 if name == "cast" else jnp.float32)


@pytest.mark.usefixtures("fast_compile")
def test_under_transformations():
    def fn(p, x):
        return jnp.tanh(x @ p["q"]) * (x @ p["k"]) + x @ p["v"]

    params = {name: normal(DIM, 6, seed=i) for i, name in enumerate("qkv")}

    def found():
        base, lora, grad = gradient(fn, params)
        _, _, out = adapt(fn, params)
        many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), lora)
        xs = jnp.stack([X, X[::-1]])
        only = {"k": lora["k"]}

        @jax.jit
        def run(lora, x):
            along = lambda lora, x: jax.jvp(
                lambda lora, x: grad(lora, base, x), (lora, x), (lora, x)
            )
            return (
                jax.jvp(lambda only: out({**lora, **only}, base, x), (only,), (only,)),
                jax.grad(lambda only: out({**lora, **only}, base, x).sum())(only),
                jax.vmap(grad, (0, None, None))(many, base, x),
                jax.vmap(grad, (None, None, 0))(lora, base, xs),
                jax.vmap(along)(many, xs),  # second derivatives
            )

        return run(lora, X)

    assert_close(found(), alone(found))


# What XLA makes


def test_one_product_in_the_hlo():
    """Forward one product with the columns of all factors, backward one for them and one for x."""
    base, lora, grad = gradient(layer, weights())
    text = jax.jit(grad).lower(lora, base, X).compile().as_text()
    products = list_products(text)
    having = lambda columns: [p for p in products if any(columns in shape for shape in p)]
    for columns in (3 * RANK, 2 * RANK):
        made = having(columns)
        results = sorted(tuple(sorted(shapes[0])) for shapes in made)
        assert results == [(columns, DIM), (columns, TOKENS), (DIM, TOKENS)], made
    # of rank 3 alone: a of down, and all six of b, forward and twice backward
    assert len(having(RANK)) == 3 * (1 + 6)
    assert not re.search(r" pad\(", text)  # the cotangent of a split is one concatenation


# Where nothing is shared


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("the masks of dropout differ", {"dropout": 0.5, "key": jax.random.key(0)}),
        ("a copy of the factors costs more than the input", {"x": X[:2]}),
        ("the result would be larger than the input", {"x": MANY, "rank": DIM // 2 + 1}),
    ],
)
def test_not_shared(why, options):
    options = {"x": X, "rank": RANK, **options}
    x, rank = options.pop("x"), options.pop("rank")

    def found():
        base, lora, out = adapt(layer, weights(), x, rank=rank)
        return str(jax.make_jaxpr(functools.partial(out, **options))(lora, base, x))

    assert found() == alone(found)


def test_ranks_up_to_the_size_of_the_input_are_shared():
    """Of three weights of rank 12 and an input of 32, two share a product."""
    base, lora, out = adapt(layer, weights(), rank=12)
    assert count_products(out, lora, base, MANY) == 6 * 2 - 1 - 1


def test_adapters_chosen_for_each_example_are_not_shared():
    base, lora, out = adapt(layer, weights())
    many = lowrank.stack([lora, lora])
    xs = jnp.stack([X, X, X])

    @jax.jit
    def each(index, xs):
        one = lambda i, x: out(lowrank.select(many, i), base, x)
        return jax.vmap(one)(index, xs)

    jaxpr = jax.make_jaxpr(each)(jnp.array([0, 1, 0]), xs).jaxpr
    assert count(jaxpr, "concatenate") == 0
    assert count(jaxpr, "lowrank_selected_dot") == 12


@pytest.mark.parametrize(
    ("differs", "axis", "dtype", "precision"),
    [
        ("nothing", 1, "float32", "highest"),
        ("the contracted axis", 0, "float32", "highest"),
        ("the dtype", 1, "bfloat16", "highest"),
        ("the precision", 1, "float32", "default"),
    ],
)
def test_shared_if_nothing_differs(differs, axis, dtype, precision):
    params = {"v": normal(DIM, DIM), "w": normal(DIM, DIM, seed=1, dtype=dtype)}

    def fn(p, x):
        y = lax.dot_general(x, p["v"], (((1,), (0,)), ((), ())), precision="highest")
        return y + lax.dot_general(x, p["w"], (((axis,), (0,)), ((), ())), precision=precision)

    x = X[:DIM]
    base, lora, out = adapt(fn, params, x)
    assert count_products(out, lora, base, x) == (3 if differs == "nothing" else 4)
    want = jax.jit(fn)(lowrank.merge(base, lora), x)
    assert_close(jax.jit(out)(lora, base, x), want, jnp.dtype(dtype).type)


# Meshes


def on_mesh(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return mesh, lambda spec: NamedSharding(mesh, spec)


@pytest.mark.usefixtures("fast_compile")
def test_no_collective_is_added():
    """Data and tensor parallel: a and b are split as their weights, and never along the rank."""
    _, at = on_mesh(AxisType.Auto)
    wide, tall = P("data", "model"), P("model", "data")
    specs = {name: at(tall if name == "down" else wide) for name in weights()}

    def found():
        base, lora, grad = gradient(layer, weights())
        where = lowrank.specs(base, specs), lowrank.specs(lora, specs)
        base, lora = map(jax.device_put, (base, lora), where)
        x = jax.device_put(X, at(P("data")))
        step = jax.jit(grad, out_shardings=(where[1], at(P("data")))).lower(lora, base, x).compile()
        text = step.as_text()
        number = len(re.findall(r" (?:all-\w+|reduce-scatter|collective-permute)\(", text))
        return number, count_collectives(text), step(lora, base, x)

    (few, shared, got), (many, each, want) = found(), alone(found)
    assert 0 < few < many
    assert sum(shared.values()) <= sum(each.values()), (shared, each)
    assert_close(got, want)


@pytest.mark.usefixtures("fast_compile")
def test_explicit_axes_are_not_shared():
    mesh, at = on_mesh(AxisType.Explicit)
    fn = lambda p, x: x @ p["v"] + x @ p["w"]
    params = {"v": normal(DIM, DIM), "w": normal(DIM, DIM, seed=1)}
    base, lora, grad = gradient(fn, params)
    want = jax.jit(grad)(lora, base, X)
    assert count(jax.make_jaxpr(grad)(lora, base, X).jaxpr, "concatenate") == 2
    with jax.set_mesh(mesh):
        x = jax.device_put(X, at(P("data")))
        _, _, grad = gradient(fn, params)
        assert count(jax.make_jaxpr(grad)(lora, base, x).jaxpr, "concatenate") == 0
        assert_close(jax.jit(grad)(lora, base, x), want)


@pytest.mark.usefixtures("fast_compile")
def test_shared_inside_shard_map():
    mesh, _ = on_mesh(AxisType.Auto)

    def found():
        base, lora, grad = gradient(layer, weights())

        def each(lora, base, x):
            factors, dx = grad(lora, base, x)
            return lax.psum(factors, ("data", "model")), dx

        axes = P(("data", "model"))
        run = jax.shard_map(each, mesh=mesh, in_specs=(P(), P(), axes), out_specs=(P(), axes))
        x = jnp.concatenate([X] * 8)
        jaxpr = jax.make_jaxpr(run)(lora, base, x).jaxpr
        return count(jaxpr, "concatenate"), jax.jit(run)(lora, base, x)

    (shared, got), (each, want) = found(), alone(found)
    assert (shared, each) == (4, 0)  # two of factors, two of cotangents
    assert_close(got, want)

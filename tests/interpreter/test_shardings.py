"""A sharding constraint on a weight holds for its arrays: codes move between devices."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import NamedSharding, P
from jax.sharding import AxisType

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]
LAYERS, WIDTH, HIDDEN = 2, 256, 512
WHOLE = P()
SPECS = {"in": P(None, "data"), "out": P(None, None, "data")}


def make_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def make_model(mesh, wanted=WHOLE):
    """Layers as under FSDP: tokens stay where they are, and each layer's weights are gathered."""
    constrain = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def layer(x, w):
        w = jax.tree.map(lambda leaf: constrain(leaf, wanted), w)
        y = constrain(jnp.tanh(x @ w["up"]), P("data"))
        return constrain(x + y @ w["down"], P("data")), None

    return lambda params, x: jax.lax.scan(layer, constrain(x, P("data")), params)[0]


def make_args(mesh, split, quant, **options):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
    params = {
        name: jax.random.normal(key, shape) / 20
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x = jax.random.normal(keys[2], (64, WIDTH))
    plan = lowrank.plan(make_model(mesh), params, x)
    if quant:
        params = lowrank.quantize(params, quant, plan=plan)
    config = lowrank.LoraConfig(rank=4, targets=["up", "down"], **options)
    base, lora = lowrank.init(0, params, config, plan=plan)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    dense = dict.fromkeys(shapes, NamedSharding(mesh, SPECS[split]))
    put = lambda tree: jax.device_put(tree, lowrank.specs(tree, dense))
    return (base, lora, x), (
        put(base),
        put(lora),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )


def find_collectives(fn, *args):
    """(dtype, number of elements) of the arrays that devices gather, and of those they sum."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    gathers, sums = [], []
    for line in text.splitlines():
        if kind := re.search(r" (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", line[: kind.start()])  # several at a time
            sizes = [
                (dtype, math.prod(map(int, filter(None, s.split(","))))) for dtype, s in arrays
            ]
            (gathers if kind[1] == "all-gather" else sums).extend(sizes)
    return gathers, sums


def assert_sums_are_of_factors(sums, lora):
    """Each factor's gradient once, of a layer in the loop; on CPU, numbers that tie codes to x."""
    factors = sorted(leaf.size // LAYERS for leaf in jax.tree.leaves(lora))
    assert sorted(size for _, size in sums if size > 1) == factors


def make_gradient(model):
    fn = lowrank.lift(model, fallback="raise")
    return jax.grad(lambda lora, base, x: (fn(lowrank.combine(base, lora), x) ** 2).mean())


FOUR_BITS = {
    "uint8": lowrank.QuantConfig(block_size=32, packing="uint8", double_quant=False),
    "uint4": lowrank.QuantConfig(block_size=32),
}


@pytest.mark.parametrize(
    ("packing", "split"),
    [
        ("uint4", "in"),
        ("uint8", "out"),
        pytest.param("uint4", "out", marks=pytest.mark.slow),
        pytest.param("uint8", "in", marks=pytest.mark.slow),
    ],
)
def test_codes_are_gathered_and_not_the_weight(packing, split):
    mesh = make_mesh()
    whole, (base, lora, x) = make_args(mesh, split, FOUR_BITS[packing])
    gradient = make_gradient(make_model(mesh))
    gathers, sums = find_collectives(gradient, lora, base, x)
    assert_sums_are_of_factors(sums, lora)
    numbers = [count for dtype, count in gathers if dtype not in ("u8", "u4", "s8")]
    assert max(numbers) < WIDTH * HIDDEN // 8  # scales and factors
    assert sum(dtype in ("u8", "u4") for dtype, _ in gathers) >= 2
    base_alone, lora_alone, x_alone = whole
    want = make_gradient(make_model(mesh))(lora_alone, base_alone, x_alone)
    chex.assert_trees_all_close(gradient(lora, base, x), want, rtol=1e-4, atol=1e-7)


def test_a_dense_weight_is_gathered_as_the_plain_models():
    mesh = make_mesh()
    _, (base, lora, x) = make_args(mesh, "in", None)
    gathers, sums = find_collectives(make_gradient(make_model(mesh)), lora, base, x)
    assert_sums_are_of_factors(sums, lora)
    assert max(count for _, count in gathers) == WIDTH * HIDDEN


@pytest.mark.parametrize("wanted", [P("data"), P(P.UNCONSTRAINED, None), P(None, "data")])
@pytest.mark.parametrize("dora", [False, True])
def test_values_are_those_of_one_device_whatever_the_constraint(wanted, dora):
    """Also one that no block structure can follow."""
    mesh = make_mesh()
    quant = lowrank.QuantConfig(block_size=64)
    whole, (base, lora, x) = make_args(mesh, "out", quant, dora=dora)
    run = lambda base, lora, x: lowrank.lift(make_model(mesh, wanted), fallback="raise")(
        lowrank.combine(base, lora), x
    )
    got = jax.jit(run)(base, lora, x)
    chex.assert_trees_all_close(got, run(*whole), rtol=1e-4, atol=1e-5)

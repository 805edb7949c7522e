"""DoRA inside shard_map: the norm of a fan-in that mesh axes split, where types tell which."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import NamedSharding, P, lax
from jax.sharding import AxisType
from models import noisy, normal

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]

AXES = "data", "stage", "model"
PARAMS = {"w": normal(2, 64, 128) / 8, "v": normal(2, 128, 64) / 8}  # two layers
CONFIG = lowrank.LoraConfig(rank=3, alpha=5, dora=True, targets="*")
X = np.asarray(normal(4, 64, seed=1))
TOGETHER = "data", "model"
SPECS = {  # columns, rows; the sizes of the mesh
    "model 4": ({"w": P(None, None, "model"), "v": P(None, "model")}, (2, 1, 4)),
    "both": ({"w": P(None, None, TOGETHER), "v": P(None, TOGETHER)}, (2, 1, 4)),
    "stages": ({"w": P("stage", None, "model"), "v": P("stage", "model")}, (1, 2, 4)),
}


def scanned(p, x, axes=()):
    """Two layers; `axes` split the fan-in of v."""

    def layer(x, p):
        y = jnp.tanh(x @ p["w"]) @ p["v"]
        return jnp.tanh(lax.psum(y, axes) if axes else y), None

    return lax.scan(layer, x, p)[0]


def mesh_of(sizes, kind=AxisType.Auto):
    devices = jax.devices()[: np.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(kind,) * 3, devices=devices)


@functools.cache
def adapted(quantized=False):
    """Base, adapter and, on one device, the value and the gradients."""
    plan, params = lowrank.plan(scanned, PARAMS, X), PARAMS
    if quantized:
        quant = lowrank.QuantConfig(block_size=32, targets="*", double_quant=False)
        params = lowrank.quantize(params, quant, plan=plan)
    base, lora = jax.jit(lambda p: lowrank.init(0, p, CONFIG, plan=plan))(params)
    lora = noisy(lora, scale=0.2)

    def loss(lora, x):
        return jnp.sin(scanned(lowrank.merge(base, lora), x)).sum()

    return base, lora, jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, X)


def mapped(fn, specs, sizes, *, base, lora, check_vma=True, **options):
    """shard_map of fn(base, lora, x), with trees split as the dense specs say."""
    in_specs = lowrank.specs(base, specs), lowrank.specs(lora, specs), P()
    options = {"out_specs": P(), "mesh": mesh_of(sizes)} | options
    return jax.shard_map(fn, in_specs=in_specs, check_vma=check_vma, **options)


def run(base, lora, x, **axes):
    return lowrank.lift(functools.partial(scanned, **axes), fallback="raise")(
        lowrank.combine(base, lora), x
    )


def assert_as_alone(got, want):
    scale = lambda leaf: jax.tree.map(lambda x: np.asarray(x) / np.abs(x).max(), leaf)
    chex.assert_trees_all_close(scale(jax.device_get(got)), scale(want), rtol=0, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quantized"), [("model 4", True), ("both", False)])
def test_values_and_gradients_are_those_of_one_device(name, quantized):
    specs, sizes = SPECS[name]
    axes = "model" if name == "model 4" else TOGETHER
    base, lora, want = adapted(quantized)
    fn = mapped(functools.partial(run, axes=axes), specs, sizes, base=base, lora=lora)
    loss = lambda lora, x: jnp.sin(fn(base, lora, x)).sum()
    assert_as_alone(jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, X), want)


def test_gradients_taken_inside():
    """Types say that b and the magnitude are shared: their gradients are sums over devices."""
    specs, sizes = SPECS["model 4"]
    base, lora, want = adapted(quantized=True)

    def each(base, lora, x):
        loss = lambda lora, x: jnp.sin(run(base, lora, x, axes="model")).sum()
        return jax.value_and_grad(loss, (0, 1))(lora, x)

    out = P(), (lowrank.specs(lora, specs), P())
    fn = mapped(each, specs, sizes, base=base, lora=lora, out_specs=out)
    assert_as_alone(jax.jit(fn)(base, lora, X), want)


def test_merge_and_folded_norms():
    specs, sizes = SPECS["model 4"]
    base, lora, _ = adapted()

    def each(base, lora, x):
        folded = lowrank.fold_norms(base, lora)
        return lowrank.merge(base, lora), [folded[name].magnitude for name in "wv"]

    out = specs, [P(None, "model"), P()]
    weights, gains = jax.jit(mapped(each, specs, sizes, base=base, lora=lora, out_specs=out))(
        base, lora, X
    )
    chex.assert_trees_all_close(weights, jax.jit(lowrank.merge)(base, lora), rtol=1e-5, atol=1e-6)
    folded = jax.jit(lowrank.fold_norms)(base, lora)
    chex.assert_trees_all_close(gains, [folded[n].magnitude for n in "wv"], rtol=1e-5)


def staged(base, lora, x):
    """Each device has one of the two layers, and passes on what it made to the next."""
    at = lax.axis_index("stage")
    x = lax.pcast(x, "stage", to="varying")
    for turn in range(2):
        y = run(base, lora, x, axes="model")
        x = lax.ppermute(jnp.where(at == turn, y, x), "stage", [(0, 1), (1, 0)])
    return lax.psum(jnp.where(at == 0, x, 0), "stage")


def test_stages_split_along_the_model_too():
    """All arrays vary along the stages, v and a of v along both axes: four parts, not two."""
    specs, sizes = SPECS["stages"]
    base, lora, want = adapted()
    fn = mapped(staged, specs, sizes, base=base, lora=lora)
    loss = lambda lora, x: jnp.sin(fn(base, lora, x)).sum()
    assert_as_alone(jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, X), want)


@pytest.mark.slow
def test_a_mesh_of_explicit_axes_partly_manual():
    base, lora, want = adapted()
    specs, sizes = SPECS["model 4"]
    mesh = mesh_of(sizes, AxisType.Explicit)
    with jax.set_mesh(mesh):
        fn = mapped(
            functools.partial(run, axes="model"), specs, sizes, base=base, lora=lora,
            mesh=mesh, axis_names={"model"},
        )  # fmt: skip
        named = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        put = lambda tree: jax.device_put(jax.device_get(tree), lowrank.specs(tree, named))
        loss = lambda base, lora, x: jnp.sin(fn(base, lora, x)).sum()
        x = jax.device_put(X, NamedSharding(mesh, P()))
        got = jax.jit(jax.value_and_grad(loss, (1, 2)))(put(base), put(lora), x)
    assert_as_alone(got, want)


def test_parts_that_two_sets_of_axes_could_make_are_refused():
    """The stages vary too: of two parts, types do not tell along which axis the other one is."""
    specs, _ = SPECS["stages"]
    base, lora, _ = adapted()
    fn = mapped(staged, specs, (1, 2, 2), base=base, lora=lora)
    with pytest.raises(
        lowrank.TreeError, match="'v': here are 64 of the 128 weights .*types do no"
    ):
        jax.eval_shape(fn, base, lora, X)


def refused_inside(tree, *, sizes=(2, 1, 4), specs=None, check_vma=False, call=None):
    lora = adapted()[1]
    call = call or functools.partial(run, axes="model")
    fn = mapped(
        call, specs or SPECS["model 4"][0], sizes, base=tree, lora=lora, check_vma=check_vma
    )
    with pytest.raises(lowrank.TreeError) as caught:
        jax.eval_shape(fn, tree, lora, X)
    return str(caught.value)


def test_without_types_a_split_fan_in_is_refused():
    base, _, _ = adapted()
    said = refused_inside(base)
    assert said.startswith("'v': here are 32 of the 128 weights")
    assert "check_vma=True" in said
    for call in (lowrank.merge, lowrank.fold_norms):
        assert "32 of the 128" in refused_inside(base, call=lambda b, l, x, call=call: call(b, l))


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_base_without_norms_is_refused_where_it_may_be_split(check_vma):
    assert "pass the base that init returned" in refused_inside(PARAMS, check_vma=check_vma)


def test_a_base_without_norms_that_types_say_is_whole():
    _, lora, (want, _) = adapted()
    fn = mapped(run, {"w": P(), "v": P()}, (2, 1, 4), base=PARAMS, lora=lora)
    chex.assert_trees_all_close(jnp.sin(jax.jit(fn)(PARAMS, lora, X)).sum(), want, rtol=1e-5)


def test_init_with_a_magnitude_is_refused_where_a_leaf_may_be_split():
    config = lowrank.LoraConfig(rank=2, dora=True, targets="*")
    init = lambda p: lowrank.init(0, p, config)[1]["v"].magnitude
    for check_vma in (False, True):
        fn = jax.shard_map(
            init, mesh=mesh_of((1, 1, 2)), in_specs=P("model"), out_specs=P(), check_vma=check_vma
        )
        with pytest.raises(lowrank.TreeError, match="'v': DoRA's magnitude .*call init outside"):
            jax.eval_shape(fn, {"v": X})
    with pytest.raises(lowrank.TreeError, match="call init outside"):
        jax.pmap(init)({"v": np.zeros((8, 4, 4), np.float32)})
    closed = jax.pmap(lambda x: x * init({"v": X}))  # a constant is whole
    want = np.linalg.norm(X, axis=0)
    np.testing.assert_allclose(closed(jnp.ones(8))[7], want, rtol=1e-6)

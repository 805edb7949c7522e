"""Trees that are made where they belong: `shardings` of quantize, init, and of what loads files."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import NamedSharding, P

import lowrank_jax as lowrank
from lowrank_jax import TreeError

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]

QUANT = lowrank.QuantConfig(targets="w", packing="uint8", block_size=32)
CONFIG = lowrank.LoraConfig(rank=2, targets="w")


def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def params(shape=(128, 64), seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return {"w": values, "bias": np.ones(shape[-1], np.float32)}


def at(*spec):
    return NamedSharding(mesh(), P(*spec))


def check_places(tree, shardings):
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)


def test_specs_within_a_mesh_and_branches():
    raw, own = params(), {"w": at("data", "model"), "bias": at()}
    with jax.set_mesh(mesh()):
        got = lowrank.quantize(raw, QUANT, shardings={"w": P("data", "model"), "bias": None})
    check_places(got, lowrank.specs(got, own))
    chex.assert_trees_all_equal(got, lowrank.quantize(raw, QUANT))
    base, lora = lowrank.init(0, raw, CONFIG, shardings=at())
    check_places((base, lora), jax.tree.map(lambda _: at(), (base, lora)))


def test_the_adapter_of_a_sharded_leaf_is_sharded():
    own = {"w": at("data", "model"), "bias": at("model")}
    placed = jax.device_put(params(), own)
    for method in ("lora", "loha", "vera", "ia3"):
        seed = 3 if method == "vera" else None
        options = {"targets": "w", "train": "bias", "method": method, "projection_seed": seed}
        config = lowrank.LoraConfig(rank=2, **options)
        _, lora = lowrank.init(0, placed, config)
        check_places(lora, lowrank.specs(lora, own))
        chex.assert_trees_all_close(lora, lowrank.init(0, params(), config)[1], rtol=1e-6)
    for name in ("pissa", "olora", "orthogonal"):
        base, lora = lowrank.init(0, placed, CONFIG, initializer=name)
        check_places((base, lora), [lowrank.specs(tree, own) for tree in (base, lora)])
        wanted = lowrank.merge(*lowrank.init(0, params(), CONFIG, initializer=name))
        chex.assert_trees_all_close(lowrank.merge(base, lora), wanted, atol=1e-5)
    own["table"] = own["w"]
    placed["table"] = placed["w"]
    config = lowrank.LoraConfig(rank=2, targets="w", train_rows={"table": (1, 5)})
    _, lora = lowrank.init(0, placed, config)
    check_places(lora, lowrank.specs(lora, own))


def test_a_quantized_base_and_a_mapped_stack():
    raw = {"w": params((4, 128, 64))["w"]}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, p["w"])[0]
    plan = lowrank.plan(fn, raw, jnp.ones((2, 128)))
    own = {"w": at("data", None, "model")}  # the stack itself is split
    alone = lowrank.quantize(raw, QUANT, plan=plan)
    got = lowrank.quantize(raw, QUANT, plan=plan, shardings=own)
    check_places(got, lowrank.specs(got, own))
    chex.assert_trees_all_equal(got, alone)
    config = lowrank.LoraConfig(rank=2, targets="w", dora=True)
    base, lora = lowrank.init(0, alone, config, plan=plan, shardings=own)
    check_places((base, lora), [lowrank.specs(tree, own) for tree in (base, lora)])
    chex.assert_trees_all_close(lora, lowrank.init(0, alone, config, plan=plan)[1], rtol=1e-6)


def test_errors_name_the_leaf_and_the_remedy():
    raw = params((96, 50))
    with pytest.raises(TreeError, match=r"w: axis 1 is of size 50, which 4 devices \(data\)"):
        lowrank.init(0, raw, CONFIG, shardings={"w": at(None, "data"), "bias": at()})
    with pytest.raises(TreeError, match="w: axis 0 is 3 blocks of 32, which 2 devices"):
        lowrank.quantize(raw, QUANT, shardings={"w": at("model"), "bias": at()})
    with pytest.raises(TreeError, match="w: axis 0 is 3 blocks of 32, which 2 devices"):
        lowrank.quantize(jax.device_put(raw, {"w": at("model"), "bias": at()}), QUANT)
    with pytest.raises(TreeError, match="on 0 meshes: pass a tree of jax.NamedSharding"):
        lowrank.init(0, raw, CONFIG, shardings={"w": P("data"), "bias": None})
    other = NamedSharding(jax.make_mesh((8,), ("x",)), P())
    with pytest.raises(TreeError, match="on 2 meshes"):
        lowrank.init(0, raw, CONFIG, shardings={"w": at(), "bias": other})
    with pytest.raises(TreeError, match="bias: no spec"):
        lowrank.init(0, raw, CONFIG, shardings={"w": at()})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(TreeError, match="SingleDeviceSharding"):
        lowrank.init(0, raw, CONFIG, shardings=one)


def test_load_checks_and_places_every_leaf(tmp_path, monkeypatch):
    raw = {"a": {"kernel": params()["w"]}, "b": {"kernel": params((96, 64))["w"]}}
    lowrank.huggingface.save(tmp_path, raw)
    like = jax.eval_shape(lambda: raw) | {"count": np.int32(3)}
    quant = lowrank.QuantConfig(targets="**/kernel", block_size=32)
    load = lambda own: lowrank.huggingface.load(tmp_path, like, quant=quant, shardings=own)
    own = {"a": at(None, "data"), "b": at("data"), "count": at()}
    read = []
    monkeypatch.setattr(lowrank.huggingface._load, "read_quantized", lambda *args: read.append(1))
    with pytest.raises(TreeError, match="b/kernel: axis 0 is 3 blocks of 32, which 4 devices"):
        load(own)
    assert not read
    monkeypatch.undo()
    own["b"] = at(None, ("data", "model"))
    got = load(own)
    check_places(got, lowrank.specs(got, own))
    chex.assert_trees_all_equal(got["b"], lowrank.quantize(raw, quant)["b"])
    assert got["count"] == 3


MESHES = [
    ("Auto", "Auto", P("data", "model")),
    ("Explicit", "Explicit", P("data", "model")),
    pytest.param("Explicit", "Auto", P("data", "model"), marks=pytest.mark.slow),
    ("Auto", "Explicit", P("data", "model")),
    ("Explicit", "Auto", P(("data", "model"))),
]


def make_small_mesh(*kinds):
    kinds = tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds)
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])


@pytest.mark.parametrize(("first", "second", "spec"), MESHES)
def test_shardings_within_jit_are_of_any_kind_of_mesh(first, second, spec):
    mesh = make_small_mesh(first, second)
    own = {"w": NamedSharding(mesh, spec)}
    params = {"w": jnp.sin(jnp.arange(128.0 * 8)).reshape(128, 8)}
    with jax.set_mesh(mesh):  # JAX asks for it where an argument is on no mesh
        made = jax.jit(lambda tree: lowrank.quantize(tree, QUANT, shardings=own))(params)
        base, lora = jax.jit(lambda tree: lowrank.init(0, tree, CONFIG, shardings=own))(params)
    np.testing.assert_array_equal(
        np.asarray(made["w"].codes), np.asarray(lowrank.quantize(params, QUANT)["w"].codes)
    )
    trees = [made, base, lora]
    if first != second:  # nor is an axis lost without jit
        trees.append(lowrank.quantize(params, QUANT, shardings=own))
    for tree in trees:
        check_places(tree, lowrank.specs(tree, own))


def test_an_order_of_mesh_axes_that_types_cannot_express_is_refused_within_jit():
    mesh = make_small_mesh("Auto", "Explicit")
    params = {"w": jnp.ones((128, 8))}
    own = {"w": NamedSharding(mesh, P(("data", "model")))}
    words = r"\(128, 8\) .* write \('model', 'data'\) for \('data', 'model'\)"
    for make in (
        lambda tree: lowrank.quantize(tree, QUANT, shardings=own),
        lambda tree: lowrank.init(0, tree, CONFIG, shardings=own),
    ):
        with jax.set_mesh(mesh), pytest.raises(TreeError, match=words):
            jax.jit(make)(params)
    with jax.set_mesh(mesh):
        got = lowrank.quantize(params, QUANT, shardings=own)
        base, lora = lowrank.init(0, params, CONFIG, initializer="pissa", shardings=own)
    for tree in (got, base, lora):
        check_places(tree, lowrank.specs(tree, own))


def test_what_is_not_an_array_stays():
    raw = {**params(), "name": "llama", "swapped": np.ones(4, ">f4")}
    own = {"w": at("data"), "bias": at(), "name": P(), "swapped": P()}
    for tree in (
        lowrank.quantize(raw, QUANT, shardings=own),
        lowrank.init(0, raw, CONFIG, shardings=own)[0],
    ):
        assert tree["name"] == "llama"
        assert tree["swapped"].tolist() == [1, 1, 1, 1]

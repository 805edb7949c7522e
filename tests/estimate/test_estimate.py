"""estimate: its figures are the compiler's, and its groups are all of the arguments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import lowrank_jax as lowrank
from lowrank_jax._estimate import chips, compilation

WIDTH, LAYERS, BATCH = 64, 3, 8
CONFIG = lowrank.LoraConfig(rank=4, targets="all-linear")
X = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)


def model(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["head"]


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "layers": jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) / 8,
        "head": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 8,
    }


def make_step(tx):
    fn = lowrank.lift(model)

    def step(base, lora, state, x):
        loss = lambda lora: jnp.mean(fn(lowrank.combine(base, lora), x) ** 2)
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    return step


def make_args(quant=None, tx=None, **options):
    """The step, and its base, adapter, optimizer state and batch."""
    tx = tx or optax.adam(1e-3)
    params = make_params()
    plan = lowrank.plan(model, params, X)
    if quant:
        params = lowrank.quantize(params, quant, plan=plan)
    config = lowrank.LoraConfig(rank=4, **options)
    base, lora = lowrank.init(0, params, config, plan=plan)
    return make_step(tx), (base, lora, tx.init(lora), X)


def put(leaf, mesh, *spec):
    """The shape of a leaf on a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def count(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quant", [None, lowrank.QuantConfig(packing="uint8")])
def test_figures_are_the_compilers_and_the_arrays_own(quant, dora):
    step, args = make_args(quant, dora=dora)
    found = lowrank.estimate(step, *args, donate=(1, 2))
    memory = jax.jit(step, donate_argnums=(1, 2)).lower(*args).compile().memory_analysis()
    base, lora, state, _ = args
    assert found.arguments == sum(found.groups.values())
    assert found.arguments == memory.argument_size_in_bytes
    assert found.temporaries == memory.temp_size_in_bytes > 0
    assert found.outputs == memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert found.total == found.arguments + found.temporaries + found.outputs
    assert found.groups["adapters"] == count(lora)
    assert found.groups["optimizer"] == count(state)
    assert found.groups["other"] == BATCH * WIDTH * 4
    assert found.groups["base"] + found.groups["scales"] == count(base)
    assert bool(found.groups["scales"]) == bool(quant)
    assert (found.fits, found.devices, found.target) == (None, 1, "cpu")


def test_a_jitted_step_says_itself_what_it_donates():
    step, args = make_args()
    plain, donating = (lowrank.estimate(step, *args, donate=d) for d in ((), (1, 2)))
    jitted = lowrank.estimate(jax.jit(step, donate_argnums=(1, 2)), *args)
    assert jitted == donating
    assert plain.outputs - donating.outputs == count(args[1:3])
    with pytest.raises(lowrank.ConfigError, match="jitted already"):
        lowrank.estimate(jax.jit(step), *args, donate=1)
    with pytest.raises(lowrank.ConfigError, match="names the argument 4, but step is given 4"):
        lowrank.estimate(step, *args, donate=(1, 4))


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Used 17.5G of 15.75G hbm. Exceeded hbm capacity by 1.7G.",
        "RESOURCE_EXHAUSTED: Ran out of memory, the total memory required for HLO temporaries "
        "(17.5G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: total memory required (0.017089844T) exceeds available HBM (15.75G).",
    ],
)
def test_a_compiler_that_refuses_says_the_total(message):
    assert compilation._read_exhausted(RuntimeError(message)) == pytest.approx(17.5 * 2**30)


def test_one_tree_and_states_in_fields():
    _, (base, lora, state, x) = make_args()
    tree = {"params": lowrank.combine(base, lora), "opt_state": [*jax.tree.leaves(state)]}
    fn = lambda tree, x: lowrank.lift(model)(tree["params"], x)
    found = lowrank.estimate(fn, tree, x)
    assert found.groups["base"] == count(base)
    assert found.groups["adapters"] == count(lora)
    assert found.groups["optimizer"] == count(state)


def test_arguments_that_the_step_does_not_read_are_held_all_the_same():
    found = lowrank.estimate(lambda params, x: x + 1, make_params(), X)
    assert found.arguments == count(make_params()) + BATCH * WIDTH * 4
    assert found.groups["padding"] == 0


def test_without_an_adapter_the_first_argument_is_the_base():
    found = lowrank.estimate(model, make_params(), X)
    assert found.groups["base"] == count(make_params())
    assert found.groups["other"] == BATCH * WIDTH * 4


def test_four_bits_take_a_byte_on_a_cpu():
    quant = lowrank.QuantConfig(packing="uint4", double_quant=False)
    _, (base, *_) = make_args(quant)
    found = lowrank.estimate(lambda base, x: lowrank.lift(model)(base, x), base, X)
    values = LAYERS * WIDTH * WIDTH
    assert found.groups["base"] == values + 4 * WIDTH * WIDTH  # the head stays float32
    assert found.arguments == sum(found.groups.values())


def test_results_of_four_bits_take_a_byte_on_a_cpu():
    quant = lowrank.QuantConfig(targets="w", double_quant=False)
    encode = lambda params: lowrank.quantize(params, quant)
    found = lowrank.estimate(encode, {"w": jnp.ones((128, 64))})
    assert found.outputs == pytest.approx(128 * 64 + 2 * 64 * 4, abs=64)  # codes and scales
    codes = jax.ShapeDtypeStruct((1024,), jnp.uint4)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    again = lambda codes: codes + jnp.uint4(1)
    assert lowrank.estimate(again, codes).outputs == 1024
    assert lowrank.estimate(again, codes, donate=0).outputs == 0
    assert lowrank.estimate(again, put(codes, mesh, "d")).outputs == 1024 // 8


def test_bytes_are_those_of_one_device():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    step, (base, lora, state, x) = make_args()
    base = jax.tree.map(lambda leaf: put(leaf, mesh, *[None] * (leaf.ndim - 1), "model"), base)
    x = put(x, mesh, "data")
    found = lowrank.estimate(step, base, lora, state, x)
    assert found.devices == 8
    assert found.groups["base"] == count(make_params()) // 2
    assert found.groups["other"] == BATCH * WIDTH * 4 // 4
    assert "each of 8 devices" in str(found)


def test_advice_is_of_what_is_large():
    step, args = make_args()
    text = str(lowrank.estimate(step, *args))
    saved = float(re.search(r"lowrank.quantize .* saves up to ([\d.]+) KiB", text)[1])
    # a float32 of 32 bits becomes 4.127
    assert saved == pytest.approx((LAYERS + 1) * WIDTH**2 * (32 - 4.127) / 8 / 1024, abs=0.01)
    assert "donating the adapter and the optimizer's state" in text
    small = lowrank.estimate(step, *args, donate=(1, 2))
    assert "donating" not in str(small)
    quantized_states = make_args(
        tx=lowrank.quantize_state(optax.adam(1e-3), block_size=32, min_size=1)
    )
    assert "quantize_state" not in str(lowrank.estimate(quantized_states[0], *quantized_states[1]))


def test_it_prints_and_shows():
    step, args = make_args()
    found = lowrank.estimate(step, *args)
    html = found._repr_html_()
    assert "<table>" in html
    assert "temporaries" in html
    for name in ("arguments", "  base", "  adapters", "  optimizer", "temporaries", "total"):
        assert f"\n{name} " in str(found)
    assert lowrank.Estimate(10, 5, 1, {}, "h100", 1, capacity=16).fits is True
    small = lowrank.Estimate(10, 5, 1, {}, "h100", 1, capacity=15)
    assert small.fits is False
    assert "does not fit in 15 B" in str(small)


def test_a_chip_without_a_compiler_says_what_to_install(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Unknown backend tpu\nmore")

    monkeypatch.setattr(chips.topologies, "get_topology_desc", fail)
    for target, package in (("v5e", "jax[tpu]"), ("h100", "jax[cuda13]")):
        with pytest.raises(lowrank.ConfigError, match="no compiler") as error:
            lowrank.estimate(model, make_params(), X, target=target)
        assert package in str(error.value)
        assert "Unknown backend tpu)" in str(error.value)
    with pytest.raises(lowrank.ConfigError, match=r"'h100', 'v5e', 'v5p', 'v6e'"):
        lowrank.estimate(model, make_params(), X, target="h200")


def test_meshes_that_no_slice_has_are_refused():
    sharded = lambda mesh: jax.tree.map(lambda leaf: put(leaf, mesh), make_params())

    three, two = AbstractMesh((3,), ("x",)), AbstractMesh((2,), ("x",))
    with pytest.raises(lowrank.ConfigError, match=r"use 3 devices.*slices of \[1, 2, 4, 8"):
        lowrank.estimate(model, sharded(three), X, target="h100")
    with pytest.raises(lowrank.ConfigError, match="different meshes"):
        mixed = {**sharded(three), "head": sharded(two)["head"]}
        lowrank.estimate(model, mixed, X, target="h100")


def test_the_devices_of_a_chip_stand_for_the_mesh(monkeypatch):
    """As on a machine with a compiler: here the chips are this machine's own devices."""
    found = type("Topology", (), {"devices": jax.devices()})
    monkeypatch.setattr(chips.topologies, "get_topology_desc", lambda *a, **k: found)
    chip = chips.Chip("v5e", 10**6, {8: "v5e:2x4"}, "")
    monkeypatch.setitem(chips.CHIPS, "v5e", chip)
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda leaf: put(leaf, mesh, *[None] * (leaf.ndim - 1), "model")
    args = jax.tree.map(place, make_params()), np.ones((BATCH, WIDTH), np.float32)
    found = lowrank.estimate(model, *args, target="v5e")
    assert found.groups["base"] == count(make_params()) // 2
    assert found.groups["other"] == BATCH * WIDTH * 4  # whole on each
    assert (found.devices, found.capacity, found.fits) == (8, 10**6, True)


def test_arrays_that_the_step_closes_over_are_counted():
    params, big = make_params(), jnp.ones((512, 512))
    for step in (
        lambda params, x: model(params, x) + big.sum(),
        jax.jit(lambda params, x: jax.jit(lambda y: y + big.sum())(model(params, x))),
    ):
        found = lowrank.estimate(step, params, X)
        assert found.groups["closed over"] == big.nbytes
        assert found.arguments == sum(found.groups.values())
        assert "pass the base as an argument" in str(found)


def test_shardings_that_the_step_holds_are_the_arguments():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    w, x = jnp.ones((64, 64)), jnp.ones((8, 64))
    split = NamedSharding(mesh, PartitionSpec("d", None))
    fn = lambda w, x: x @ w
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(PartitionSpec(None, "d"), PartitionSpec()),
        out_specs=PartitionSpec(None, "d"),
    )
    for step in (
        jax.jit(fn, in_shardings=(split, NamedSharding(mesh, PartitionSpec()))),
        jax.jit(mapped),
    ):
        found = lowrank.estimate(step, jax.ShapeDtypeStruct((64, 64), jnp.float32), x)
        assert found.devices == 8
        assert found.groups["base"] == w.nbytes // 8
        assert found.groups["other"] == x.nbytes


def test_static_arguments_and_numbers():
    fn = lambda w, x, k: (x @ w) ** k
    w, x = jnp.ones((64, 64)), np.ones((8, 64))  # float64, which JAX takes as float32
    dynamic = lowrank.estimate(fn, w, x, 3)
    static = lowrank.estimate(jax.jit(fn, static_argnums=2), w, x, 3)
    assert dynamic.groups["other"] == 8 * 64 * 4 + 4
    assert static.groups["other"] == 8 * 64 * 4
    assert dynamic.groups["padding"] == static.groups["padding"] == 0


def test_a_base_is_found_at_any_depth():
    step, (base, lora, state, x) = make_args()
    train_state = {"params": lora, "opt_state": state}
    fn = lambda ts, base, x: step(base, ts["params"], ts["opt_state"], x)
    assert lowrank.estimate(fn, train_state, base, x).groups["base"] == count(base)
    fn = lambda all_of, x: step(all_of["base"], all_of["lora"], all_of["state"], x)
    one = {"base": base, "lora": lora, "state": state}
    found = lowrank.estimate(fn, one, x)
    assert found.groups["base"] == count(base)
    assert found.groups["optimizer"] == count(state)


def test_an_nnx_step():
    net = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    plain = lowrank.estimate(lambda net, x: net(x), net, X)
    jitted = lowrank.estimate(nnx.jit(lambda net, x: net(x)), net, X)
    assert plain.groups["base"] == jitted.groups["base"] == (64 * 64 + 64) * 4


def test_what_donation_would_save_is_what_is_not_donated():
    step, (base, lora, state, x) = make_args()

    def with_extra(base, lora, state, x):
        return *step(base, lora, state, x), jnp.ones((64, 64)) * x.sum()

    args = base, lora, state, x
    assert "donating" in str(lowrank.estimate(with_extra, *args))
    assert "donating" not in str(lowrank.estimate(with_extra, *args, donate=(1, 2)))
    inference = lambda base, lora, x: lowrank.lift(model)(lowrank.combine(base, lora), x)
    assert "donating" not in str(lowrank.estimate(inference, base, lora, x))


def test_a_mesh_without_devices_needs_a_target():
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.tree.map(lambda leaf: put(leaf, mesh), make_params())
    with pytest.raises(lowrank.ConfigError, match="AbstractMesh, which has no devices"):
        lowrank.estimate(model, params, X)

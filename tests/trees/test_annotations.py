"""specs of models that say themselves how they are sharded: Linen's boxes, NNX's variables."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import NamedSharding, P

import lowrank_jax as lowrank
from lowrank_jax._trees.annotations import read_specs

pytestmark = pytest.mark.usefixtures("fast_compile")
AUTO = jax.sharding.AxisType.Auto
RULES = {"vocab": "model", "embed": "data", "mlp": "model", "layers": None}
TOKENS = jnp.arange(12).reshape(4, 3) % 8


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        down = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", "embed"))
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",))
        y = nn.relu(nn.Dense(64, kernel_init=init, bias_init=bias, name="up")(x))
        return x + nn.Dense(32, kernel_init=down, use_bias=False, name="down")(y), None


class Model(nn.Module):
    """A scan over layers whose axes have logical names, as large public models have."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("vocab", "embed"))
        x = nn.Embed(8, 32, embedding_init=table)(tokens)
        scan = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(8, name="head")(x)  # without an annotation: replicated


@pytest.fixture(scope="module")
def boxed():
    return Model().init(jax.random.key(0), TOKENS)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, AUTO))


def test_boxes_need_rules_alone(boxed):
    plan = lowrank.plan(Model().apply, nn.unbox(boxed), TOKENS)
    config = lowrank.LoraConfig(rank=2)
    for params in (boxed, nn.unbox(boxed)):
        base, lora = lowrank.init(0, params, config, plan=plan)
        split = nn.unbox(lowrank.specs(lora, boxed, rules=RULES))["params"]
        up, down = split["layers"]["up"]["kernel"], split["layers"]["down"]["kernel"]
        assert (up.a, up.b) == (P(None, "data", None), P(None, None, "model"))
        assert (down.a, down.b) == (P(None, "model", None), P(None, None, "data"))
        frozen = nn.unbox(lowrank.specs(base, boxed, rules=[*RULES.items()]))["params"]
        assert frozen["Embed_0"]["embedding"] == P("model", "data")
        assert frozen["layers"]["up"]["bias"] == P(None, "model")
        assert frozen["head"]["kernel"] == P()


def test_a_model_runs_sharded_as_it_comes(boxed, mesh):
    params = nn.unbox(boxed)
    plan = lowrank.plan(Model().apply, params, TOKENS)
    quant = lowrank.QuantConfig(block_size=32, packing="uint8", targets="**/up/kernel")
    rules = RULES | {"embed": None}  # a block runs through the axis of 32
    params = lowrank.quantize(params, quant, plan=plan)
    base, lora = lowrank.init(0, params, lowrank.LoraConfig(rank=2, dora=True), plan=plan)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    run = jax.jit(lambda b, lora: lowrank.lift(Model().apply)(lowrank.combine(b, lora), TOKENS))
    place = lambda tree: jax.device_put(
        tree,
        jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            lowrank.specs(tree, boxed, rules=rules),
            is_leaf=lambda leaf: isinstance(leaf, P),
        ),
    )
    placed = place(base), place(lora)
    codes = placed[0]["params"]["layers"]["up"]["kernel"].value.codes
    assert codes.addressable_shards[0].data.size * 2 == codes.size
    chex.assert_trees_all_close(run(*placed), run(base, lora), rtol=1e-5, atol=1e-5)


def make_nnx(names=("embed", "mlp"), **metadata):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names, **metadata)
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0)))


def test_variables_of_nnx_name_their_axes():
    config = lowrank.LoraConfig(rank=2, targets="kernel")
    shapes = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
    lora = lowrank.init(0, shapes, config)[1]
    cases = [
        (make_nnx(("data", "model")), None),
        (make_nnx(), {"embed": "data", "mlp": "model"}),
        (make_nnx(sharding_rules=(("embed", "data"), ("mlp", "model"))), None),
        (make_nnx(("embed", "model")), {"embed": "data"}),  # a name without a rule: a mesh axis
    ]
    for model, rules in cases:
        for tree in (model, nnx.state(model, nnx.Param)):
            split = lowrank.specs(lora, tree, rules=rules)["kernel"]
            assert (split.a, split.b) == (P("data", None), P(None, "model"))
            assert lowrank.specs(shapes, tree, rules=rules)["bias"] == P()


def test_rules_are_applied_as_flax_does():
    """Random names and rules, against flax.linen.logical_to_mesh_axes."""
    random = np.random.default_rng(0)
    logical, axes = ["a", "b", "c", "d"], ["x", "y", "z", ("x", "y"), None]
    for _ in range(300):
        names = tuple(random.permutation(logical)[: random.integers(1, 5)].tolist())
        picks = random.integers(0, len(axes), random.integers(0, 6))
        rules = [(logical[random.integers(4)], axes[pick]) for pick in picks]
        rules += [(name, None) for name in logical]  # each has a rule
        box = {"w": nn.LogicallyPartitioned(jnp.ones((1,) * len(names)), names)}
        assert read_specs(box, rules)["w"] == nn.logical_to_mesh_axes(names, rules), (names, rules)


def test_a_logical_axis_without_a_rule_is_named(boxed):
    base = nn.unbox(boxed)
    with pytest.raises(lowrank.TreeError, match="say nothing of some logical axes") as error:
        lowrank.specs(base, boxed, rules={"vocab": "model", "embed": "data", "layers": None})
    assert "params/layers/up/bias: logical axis 'mlp'" in str(error.value)
    with pytest.raises(lowrank.TreeError, match="logical axis 'vocab'"):
        lowrank.specs(base, boxed)


def test_names_of_fewer_axes_than_a_stacked_leaf_has_are_refused():
    """As of a vmapped init that knows nothing of the names: split along the wrong axes."""
    stacked = {"w": nn.Partitioned(jnp.ones((2, 8, 4)), ("data", "model"))}
    config = lowrank.LoraConfig(rank=2, targets="w", axes={"w": (1, 2)})
    base, lora = lowrank.init(0, nn.unbox(stacked), config)
    normed, _ = lowrank.init(0, nn.unbox(stacked), dataclasses.replace(config, dora=True))
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, p["w"])[0]
    wide = {"w": jnp.ones((2, 32, 4))}
    plan = lowrank.plan(fn, wide, jnp.ones((1, 32)))
    frozen = lowrank.quantize(wide, lowrank.QuantConfig(targets="w", block_size=32), plan=plan)
    for tree in (lora, lowrank.combine(base, lora), normed, frozen):
        with pytest.raises(lowrank.TreeError, match="names 2 axes of 3"):
            lowrank.specs(tree, stacked)


def test_names_of_fewer_axes_are_of_the_first_ones():
    """As those of the kernels of Flax's attention, [embed, heads, kv] and [heads, kv, embed]."""
    axes = {"in": (0, (1, 2)), "out": ((0, 1), 2)}
    boxes = {name: nn.Partitioned(jnp.ones((8, 4, 8)), ("data", "model")) for name in axes}
    base, lora = lowrank.init(
        0, nn.unbox(boxes), lowrank.LoraConfig(rank=2, targets="*", axes=axes)
    )
    assert lowrank.specs(base, boxes) == dict.fromkeys(axes, P("data", "model"))
    split = lowrank.specs(lora, boxes)
    assert (split["in"].a, split["in"].b) == (P("data", None), P(None, "model", None))
    assert (split["out"].a, split["out"].b) == (P("data", "model", None), P(None, None))


def test_specs_stand_beside_boxes():
    w = jnp.ones((8, 4))
    box = nn.Partitioned(w, ("data", "model"))
    given = {"w": box, "head": P(None, "model"), "layers": P("model"), "norm": None}
    tree = {"w": w, "head": w, "layers": {"a": w, "b": w}, "norm": w}
    found = lowrank.specs(tree, given)
    assert found["w"] == P("data", "model")
    assert found["head"] == P(None, "model")
    assert found["layers"] == {"a": P("model"), "b": P("model")}
    assert found["norm"] == P()


def test_boxes_may_hold_quantized_leaves_alone():
    box = {"w": nn.Partitioned(jnp.ones((64, 8)), (None, "model"))}
    quant = lowrank.QuantConfig(block_size=32, targets="w")
    frozen = lowrank.quantize(box, quant)
    assert nn.unbox(lowrank.specs(frozen, frozen))["w"].codes == P(None, None, "model")


def test_arrays_without_names_and_rules_without_annotations_are_refused():
    params = {"w": jnp.ones((8, 4))}
    with pytest.raises(lowrank.TreeError, match="Parameters will do if"):
        lowrank.specs(params, params)
    with pytest.raises(lowrank.TreeError, match="rules map the logical axes"):
        lowrank.specs(params, {"w": P("data")}, rules={"embed": "data"})

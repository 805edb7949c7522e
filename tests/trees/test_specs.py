"""specs: layouts of adapters, from those of the dense parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import NamedSharding, P

import lowrank_jax as lowrank

KEY = jax.random.key(0)
PARAMS = {
    "embed": jnp.ones((16, 8)),
    "layers": {"q": jnp.ones((3, 8, 4, 2)), "o": jnp.ones((3, 4, 2, 8)), "bias": jnp.ones((3, 8))},
    "count": jnp.array(3),
}
SPECS = {
    "embed": P("model", "data"),
    "layers": {"q": P(None, "data", "model"), "o": P(None, "model", None, "data"), "bias": None},
    "count": P(),
}


BIG = {
    "embed": jnp.ones((16, 128)),
    "layers": {
        "q": jnp.ones((3, 128, 4, 2)), "o": jnp.ones((3, 4, 2, 128)), "bias": jnp.ones((3, 128)),
    },
    "count": jnp.array(3),
}  # fmt: skip


def fn(p, ids):
    def layer(x, w):
        h = jnp.einsum("btd,dhk->bthk", x, w["q"])
        return jnp.tanh(jnp.einsum("bthk,hkd->btd", h, w["o"]) + w["bias"]), None

    x, _ = jax.lax.scan(layer, p["embed"][ids], p["layers"])
    return x @ p["embed"].T * p["count"]


IDS = jnp.zeros((2, 3), jnp.int32)
CONFIG = lowrank.LoraConfig(rank=2, alpha=3, targets=("all-linear", "embed"), train="layers/bias")


@functools.cache
def trees():
    plan = lowrank.plan(fn, PARAMS, IDS)
    return jax.jit(lambda params: lowrank.init(KEY, params, CONFIG, plan=plan))(PARAMS)


def is_spec(leaf):
    return isinstance(leaf, P)


def test_a_factor_lies_along_the_axes_it_has():
    _, lora = trees()
    split = lowrank.specs(lora, SPECS)
    assert lora["layers"]["q"].a.shape == (3, 8, 2)  # [L, d, r]
    assert split["layers"]["q"].a == P(None, "data", None)
    assert lora["layers"]["q"].b.shape == (3, 2, 4, 2)  # [L, r, h, k]
    assert split["layers"]["q"].b == P(None, None, "model", None)
    assert split["layers"]["o"].a == P(None, "model", None, None)
    assert split["layers"]["o"].b == P(None, None, "data")
    assert lora["embed"].fan_in == (1,)  # of the product, which decides
    assert split["embed"].a == P("data", None)
    assert split["embed"].b == P(None, "model")
    assert split["layers"]["bias"].value == P()


@pytest.mark.parametrize("which", ["base", "lora", "combined", "scaled", "shapes", "many"])
def test_the_structure_is_the_trees_own(which):
    base, lora = trees()
    tree = {
        "base": base,
        "lora": lora,
        "combined": lowrank.combine(base, lora),
        "scaled": lowrank.combine(base, lora, scale=0.5, dropout=0.1, key=KEY),
        "shapes": jax.eval_shape(lowrank.combine, base, lora),
        "many": jax.tree.map(lambda leaf: np.stack([leaf] * 5), lora),
    }[which]
    split = lowrank.specs(tree, SPECS)
    chex.assert_trees_all_equal_structs(jax.tree.map(lambda _: 0, tree), jax.tree.map(
        lambda _: 0, split, is_leaf=is_spec
    ))  # fmt: skip
    ranks = jax.tree.map(lambda leaf, spec: len(spec) <= leaf.ndim, tree, split)
    assert jax.tree.all(ranks)
    if which == "base":
        assert split["layers"]["q"] == SPECS["layers"]["q"]
    if which == "scaled":
        assert split["layers"]["q"].multiplier == P()
        assert split["layers"]["q"].key == P(None)  # a mask for each layer
    if which == "many":
        assert split["layers"]["q"].a == P(None, None, "data", None)
        whole = lowrank.specs(
            tree, {**SPECS, "layers": {**SPECS["layers"], "bias": P(None, "data")}}
        )
        assert whole["layers"]["bias"].value == P(None, None, "data")  # [n, L, d]


def test_an_axis_of_a_scanned_layer_may_be_split():
    _, lora = trees()
    split = lowrank.specs(lora, {**SPECS, "layers": P("stage")})
    assert split["layers"]["q"].a == P("stage", None, None)
    assert split["layers"]["o"].b == P("stage", None, None)
    assert split["layers"]["bias"].value == P("stage")


def test_one_spec_holds_for_a_whole_branch_or_tree():
    base, lora = trees()
    for tree in (base, lora, lowrank.combine(base, lora)):
        split = jax.tree.leaves(lowrank.specs(tree, P()), is_leaf=is_spec)
        assert len(split) == len(jax.tree.leaves(tree))
        assert all(entry is None for spec in split for entry in spec)


def test_named_shardings_are_ready_to_use():
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    named = jax.tree.map(
        lambda s: NamedSharding(mesh, s or P()), SPECS, is_leaf=lambda s: s is None or is_spec(s)
    )
    base, lora = trees()
    tree = lowrank.combine(base, lora, scale=2.0, dropout=0.1, key=KEY)
    placed = jax.device_put(tree, lowrank.specs(tree, named))
    chex.assert_trees_all_equal(placed["layers"]["q"].delta, lora["layers"]["q"])
    assert placed["layers"]["q"].delta.b.sharding.spec == P(None, None, "model", None)
    assert placed["layers"]["q"].delta.b.addressable_shards[0].data.shape == (3, 2, 2, 2)
    plan = lowrank.plan(fn, PARAMS, IDS)
    make = lambda key, params: lowrank.init(key, params, CONFIG, plan=plan)[1]
    shapes = jax.eval_shape(make, KEY, PARAMS)
    made = jax.jit(make, out_shardings=lowrank.specs(shapes, named))(KEY, PARAMS)
    chex.assert_trees_all_close(made, lora, rtol=1e-6)
    assert made["layers"]["q"].a.sharding.spec == P(None, "data", None)


def test_specs_that_linen_and_nnx_annotate():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            box = lambda *names: nn.with_partitioning(nn.initializers.normal(), names)
            h = nn.Dense(16, kernel_init=box("data", "model"), name="up")(x)
            return nn.Dense(8, kernel_init=box("model", "data"), name="down")(jnp.tanh(h))

    x = jnp.ones((2, 8))
    boxed = jax.eval_shape(Boxed().init, KEY, x)
    plain = nn.meta.unbox(boxed)
    for variables in (boxed, plain):
        config = lowrank.LoraConfig(rank=2, targets="**/kernel")
        lora = jax.eval_shape(lambda tree: lowrank.init(KEY, tree, config)[1], variables)
        split = dict(
            jax.tree_util.tree_leaves_with_path(
                lowrank.specs(lora, nn.get_partition_spec(boxed)), is_leaf=is_spec
            )
        )
        assert sorted(map(str, split.values())) == sorted(
            map(str, [P("data", None), P(None, "model"), P("model", None), P(None, "data")])
        )

    init = lambda *names: nnx.with_partitioning(nnx.initializers.normal(), names)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 16, kernel_init=init("data", "model"), rngs=nnx.Rngs(0))
    _, params = lowrank.functional(model)
    state = nnx.get_partition_spec(nnx.state(model, nnx.Param))
    config = lowrank.LoraConfig(rank=2, targets="kernel")
    lora = jax.eval_shape(lambda tree: lowrank.init(KEY, tree, config)[1], params)
    split = lowrank.specs(lora, nnx.to_pure_dict(state))
    assert (split["kernel"].a, split["kernel"].b) == (P("data", None), P(None, "model"))
    assert lowrank.specs(lora, state)["kernel"].a == P("data", None)


def test_a_leaf_that_is_none_needs_no_spec():
    params = {"w": jnp.ones((4, 4)), "bias": None}
    config = lowrank.LoraConfig(rank=1, targets="w")
    base, lora = jax.eval_shape(lambda tree: lowrank.init(KEY, tree, config), params)
    for tree in (base, lora, lowrank.combine(base, lora)):
        assert lowrank.specs(tree, {"w": P("data"), "bias": None})["bias"] is None


def test_a_quantized_leaf_is_split_as_the_dense_one():
    plan = lowrank.plan(fn, BIG, IDS)
    frozen = jax.device_get(lowrank.quantize(jax.device_get(BIG), lowrank.QuantConfig(), plan=plan))
    split = lowrank.specs(frozen, SPECS)["layers"]["q"]  # [L, d, h, k] in blocks along d
    assert split.codes == P(None, "data", None, "model", None)
    assert split.scales == P(None, "data", "model", None)
    assert (split.nested, split.offset) == (P(None, None), P(None))
    chex.assert_trees_all_equal_structs(
        jax.tree.map(lambda _: 0, frozen),
        jax.tree.map(lambda _: 0, lowrank.specs(frozen, SPECS), is_leaf=is_spec),
    )
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    where = NamedSharding(mesh, split.codes)
    codes = jax.device_put(frozen["layers"]["q"].codes, where)
    assert codes.addressable_shards[0].data.shape == (3, 1, 64, 2, 2)


def test_whole_blocks_go_to_a_device():
    """Both problems are named, of the frozen leaf and of the adapted one."""
    params = {"w": np.ones((128, 8), np.float32), "heads": np.ones((2, 32, 8), np.float32)}
    fn = lambda p, x, y: (jnp.tanh(x @ p["w"]), jnp.einsum("bhk,hkd->bd", y, p["heads"]))
    plan = lowrank.plan(fn, params, jnp.ones((1, 128)), jnp.ones((1, 2, 32)))
    frozen = jax.device_get(lowrank.quantize(params, lowrank.QuantConfig(targets="*"), plan=plan))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    where = {
        "w": NamedSharding(mesh, P(("data", "model"))),
        "heads": NamedSharding(mesh, P(None, "data")),
    }
    config = lowrank.LoraConfig(rank=2, targets="*")
    start = lambda tree: lowrank.combine(*lowrank.init(KEY, tree, config, plan=plan))
    tree = jax.eval_shape(start, frozen)
    for leaves in (frozen, tree):
        with pytest.raises(lowrank.TreeError) as error:
            lowrank.specs(leaves, where)
        text = str(error.value)
        assert "w: axis 0 is 2 blocks of 64, which 8 devices (data, model) cannot share" in text
        assert "heads: axis 1 is split, but blocks of 64 run through axes 0 to 1; split" in text
    where = {"w": NamedSharding(mesh, P("data", "model")), "heads": NamedSharding(mesh, P())}
    placed = jax.device_put(frozen, lowrank.specs(frozen, where))
    assert placed["w"].codes.addressable_shards[0].data.shape == (1, 64, 2)


MISTAKES = {
    "a leaf without a spec": (
        lambda base, lora: lowrank.specs(base, {"embed": P(), "count": P()}),
        r"(?s)layers/bias: no spec.*layers/q: no spec",
    ),
    "a spec without a leaf": (
        lambda base, lora: lowrank.specs(base, {**SPECS, "head": P("model")}),
        r"head: a spec, but no leaf",
    ),
    "more entries than axes": (
        lambda base, lora: lowrank.specs(lora, {**SPECS, "embed": P(None, None, "model")}),
        r"embed: .*None, None, 'model'.* for a leaf of 2 axes",
    ),
    "swapped arguments": (
        lambda base, lora: lowrank.specs(SPECS, base),
        r"dense_specs holds \w+ at 'count'.*the order is \(tree, dense_specs\)",
    ),
    "another level": (
        lambda base, lora: lowrank.specs(base, {"params": SPECS}),
        r"(?s)same level.*embed: no spec",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    make, words = MISTAKES[mistake]
    with pytest.raises(lowrank.TreeError, match=words):
        make(*trees())

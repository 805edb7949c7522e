"""Adapters with quantized factors: equal to their decoded selves wherever they are used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import lowrank_jax as lowrank
from lowrank_jax import checkpoint, peft

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)
PARAMS = {
    "layers": jax.random.normal(KEY, (2, 64, 64)) / 8,
    "heads": jax.random.normal(KEY, (64, 2, 32)) / 8,
    "norm": jnp.ones(64),
}
X = jax.random.normal(KEY, (5, 64))
STORED = {
    "nf4": lowrank.QuantConfig(packing="uint8"),
    "fp4": lowrank.QuantConfig(format="fp4", block_size=32, double_quant=False),
    "int8": lowrank.QuantConfig(format="int8"),
}


def model(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return jnp.einsum("ti,iho->tho", x * params["norm"], params["heads"])


PLAN = lowrank.plan(model, PARAMS, X)
LIFTED = lowrank.lift(model, fallback="raise")


def make(seed=0, **options):
    options = {"rank": 3, "targets": ["layers", "heads"]} | options
    base, lora = lowrank.init(seed, PARAMS, lowrank.LoraConfig(**options), plan=PLAN)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape)
    return base, jax.tree.map(noise, lora)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {"dora": True, "train": "norm"}),
        pytest.param("fp4", {}, marks=pytest.mark.slow),
        pytest.param("int8", {"method": "loha"}, marks=pytest.mark.slow),
    ],
)
def test_a_quantized_adapter_is_its_dequantized_self(kind, options):
    base, lora = make(**options)
    stored = jax.jit(lambda lora: lowrank.quantize_adapter(lora, STORED[kind]))(lora)
    dense = lowrank.dequantize(stored)
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, lora)
    chex.assert_trees_all_equal(lowrank.merge(base, stored), lowrank.merge(base, dense))
    run = jax.jit(lambda lora: LIFTED(lowrank.combine(base, lora), X))
    chex.assert_trees_all_close(run(stored), run(dense), rtol=1e-5, atol=1e-5)
    # and near the adapter that it was: 4 bits keep a factor to about a tenth of its size
    loose = 0.02 if kind == "int8" else 0.2
    for one, other in zip(jax.tree.leaves(dense), jax.tree.leaves(lora), strict=True):
        assert jnp.linalg.norm(one - other) <= loose * jnp.linalg.norm(other)
    assert dense["layers"].scale == lora["layers"].scale == stored["layers"].scale


def test_blocks_run_along_features_also_in_stacks():
    stored = lowrank.quantize_adapter(make()[1], STORED["nf4"])
    assert stored["layers"].a.codes.shape == (2, 1, 32, 3)
    assert stored["layers"].b.codes.shape == (2, 3, 1, 32)
    assert stored["heads"].b.codes.shape == (3, 1, 32)  # two heads of 32 are one block
    loras = [make(seed)[1] for seed in range(3)]
    many = lowrank.quantize_adapter(lowrank.stack(loras), STORED["nf4"])
    each = [lowrank.quantize_adapter(lora, STORED["nf4"]) for lora in loras]
    chex.assert_trees_all_equal(many, lowrank.stack(each))
    chex.assert_trees_all_equal(lowrank.select(many, 1), each[1])


def test_only_chosen_leaves_are_quantized():
    _, lora = make(train="norm")
    stored = lowrank.quantize_adapter(lora, lowrank.QuantConfig(targets="heads"))
    assert stored["layers"] is lora["layers"]
    assert stored["norm"] is lora["norm"]
    stored = lowrank.quantize_adapter(lora, lowrank.QuantConfig(exclude="heads"))
    assert stored["heads"] is lora["heads"]
    with pytest.raises(lowrank.PatternError, match="'head'.*nearest|'head'"):
        lowrank.quantize_adapter(lora, lowrank.QuantConfig(targets="head"))


def test_a_mixed_batch_of_quantized_adapters():
    loras = [make(seed)[1] for seed in range(3)]
    many = lowrank.stack([lowrank.quantize_adapter(lora, STORED["nf4"]) for lora in loras])
    one = lambda k, x: LIFTED(lowrank.combine(PARAMS, lowrank.select(many, k)), x)
    index = jnp.array([2, 0, 3])  # there is no 3
    got = jax.jit(jax.vmap(one, (0, None)))(index, X)
    for k in range(2):
        alone = lowrank.combine(PARAMS, lowrank.dequantize(lowrank.select(many, int(index[k]))))
        chex.assert_trees_all_close(got[k], LIFTED(alone, X), rtol=1e-5, atol=1e-5)
    assert jnp.isnan(got[2]).all()


def test_a_pool_of_quantized_slots_takes_adapters_of_any_form():
    _, lora = make()
    stored = lowrank.quantize_adapter(lora, STORED["nf4"])
    pool = lowrank.pool(stored, slots=3)
    _, smaller = make(1, rank=2, targets="layers")
    pool.put("stored", stored)
    pool.put("dense", lora)
    pool.put("smaller", smaller)
    chosen = lambda name: lowrank.select(pool.tree, int(pool.index(name)))
    chex.assert_trees_all_equal(chosen("stored"), stored)
    chex.assert_trees_all_equal(chosen("dense"), stored)
    got = lowrank.merge(PARAMS, chosen("smaller"))
    # the slot decodes to the quantized adapter, whose padding and missing leaf change nothing
    chex.assert_trees_all_equal(got["heads"], PARAMS["heads"])
    near = lowrank.merge(PARAMS, smaller)["layers"]
    change = jnp.linalg.norm(near - PARAMS["layers"])
    assert jnp.linalg.norm(got["layers"] - near) < 0.2 * change
    chex.assert_trees_all_equal(lowrank.merge(PARAMS, chosen(None)), PARAMS)
    with pytest.raises(lowrank.ConfigError, match="rank 4 is larger than the 3 of its slots"):
        pool.put("large", make(rank=4)[1])


@pytest.mark.parametrize("kind", STORED)
def test_a_checkpoint_holds_the_codes(tmp_path, kind):
    base, lora = make(dora=True)
    config = lowrank.LoraConfig(rank=3, targets=["layers", "heads"], dora=True)
    stored = lowrank.quantize_adapter(lora, STORED[kind])
    checkpoint.save(tmp_path / "it", lora=stored, config=config, base=base)
    for found in (
        checkpoint.restore(tmp_path / "it", base=base).lora,
        checkpoint.restore(tmp_path / "it", base=base, like={"lora": stored}).lora,
    ):
        chex.assert_trees_all_equal(found, stored)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, stored)
    with pytest.raises(lowrank.CheckpointError, match="does not match like.lora"):
        checkpoint.restore(tmp_path / "it", base=base, like={"lora": lora})


def test_a_manifest_with_another_format_is_refused(tmp_path):
    stored = lowrank.quantize_adapter({"w": make()[1]["layers"]}, STORED["nf4"])
    entries, arrays = checkpoint._entries, {}
    entry = entries.write_node("w", stored["w"], arrays)
    known = {name: (a.shape, a.dtype.name, None) for name, a in arrays.items()}
    body = {"arrays": {part["name"]: known[part["name"]] for part in entry["arrays"].values()}}
    assert entries.read_node(entry, body).a.shape == (2, 64, 3)
    for field, value in (
        ("format", "fp5"), ("block_size", 33), ("packing", "uint2"), ("blocked", [-1]),
        ("trailing", True), ("strides", None), ("order", "a"), ("weight_dtype", "int32"),
        ("weight_dtype", "float99"), ("blocked", []), ("blocked", [96, 4]),
    ):  # fmt: skip
        wrong = {**entry["quantized"], "a": {**entry["quantized"]["a"], field: value}}
        with pytest.raises(lowrank.CheckpointError, match="w/a"):
            entries.read_node({**entry, "quantized": wrong}, body)
    for values in (
        {},
        {**entry["quantized"]["a"], "more": 1},
        {**entry["quantized"]["a"], "block_size": 32},
    ):
        with pytest.raises(lowrank.CheckpointError, match="'w/a'"):
            entries.read_node({**entry, "quantized": {**entry["quantized"], "a": values}}, body)


def test_peft_gets_decoded_factors():
    node = make()[1]["layers"]
    one = lowrank.LowRank(node.a[0], node.b[0])
    stored = lowrank.quantize_adapter({"proj": {"kernel": one}}, STORED["nf4"])
    config = lowrank.LoraConfig(rank=3, targets="**")
    got, _ = peft.tensors(stored, config)
    expected, _ = peft.tensors(lowrank.dequantize(stored), config)
    chex.assert_trees_all_equal(got, expected)


def test_blend_and_compress_decode():
    stored = lowrank.quantize_adapter(make()[1], STORED["nf4"])
    dense = lowrank.dequantize(stored)
    chex.assert_trees_all_equal(
        lowrank.blend([stored, stored], [1.0, 0.5]), lowrank.blend([dense, dense], [1.0, 0.5])
    )
    chex.assert_trees_all_equal(lowrank.compress(stored, 1), lowrank.compress(dense, 1))


def test_specs_split_stack_axes_alone():
    stored = lowrank.quantize_adapter(make(targets="layers")[1], STORED["nf4"])
    specs = lowrank.specs(
        stored, {"layers": P("stage", "data", "model"), "heads": None, "norm": None}
    )
    assert jax.tree.structure(specs) == jax.tree.structure(stored)
    assert specs["layers"].a.codes == P("stage", None, None, None)
    assert specs["layers"].b.scales == P("stage", None, None)


def test_training_is_refused():
    base, lora = make()
    stored = lowrank.quantize_adapter(lora, STORED["nf4"])
    tx = lowrank.only_adapters(optax.adam(1e-3))
    for call in (
        lambda: lowrank.trainable_mask(stored),
        lambda: lowrank.trainable_mask(lowrank.combine(base, stored)),
        lambda: lowrank.factor_labels(stored),
        lambda: tx.init(lowrank.combine(base, stored)),
    ):
        with pytest.raises(lowrank.TreeError, match="quantized factors, which has no gradient"):
            call()


def test_what_is_no_dense_adapter_is_refused():
    base, lora = make()
    quant = STORED["nf4"]
    stored = lowrank.quantize_adapter(lora, quant)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), lora)
    for tree, kind, words in (
        (stored, lowrank.ConfigError, "has quantized factors: pass lowrank.dequantize"),
        (PARAMS, lowrank.TreeError, "lowrank.quantize is for parameters"),
        (lowrank.combine(base, lora), lowrank.TreeError, "lowrank.partition"),
        (broken, lowrank.TreeError, "values are not finite"),
        ({"norm": lowrank.Full(jnp.ones(64))}, lowrank.PatternError, "has no leaf with factors"),
    ):
        with pytest.raises(kind, match=words):
            lowrank.quantize_adapter(tree, quant)


def test_a_hundred_adapters_of_smollm2_take_an_eighth():
    """By shapes alone: rank 16 at all projections of 30 layers, as the example trains them."""
    sizes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    sizes |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    stacks = {"fan_in": (1,), "fan_out": (2,), "stack": (0,)}
    node = lambda i, o: lowrank.LowRank(
        jnp.zeros((100, 30, i, 16)), jnp.zeros((100, 30, 16, o)), **stacks
    )
    build = lambda: {name: node(*size) for name, size in sizes.items()}
    count = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    dense = jax.eval_shape(build)
    stored = jax.eval_shape(lambda: lowrank.quantize_adapter(build(), STORED["nf4"]))
    share = count(stored) / count(dense)
    assert 0.125 < share < 0.13
    assert np.isclose(share, 4.127 / 32, rtol=0.01)

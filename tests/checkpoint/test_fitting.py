"""A checkpoint against the base and the tree that it is restored into."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from checkpoints import linen_base, made, same

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint
from lowrank_jax._trees.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_wrong_base_is_refused(tmp_path):
    base = linen_base()
    lora, config = made(base)
    computed = fingerprint(base)
    checkpoint.save(tmp_path, lora=lora, config=config, base=computed)
    other = jax.tree.map(lambda leaf: leaf, base)
    other["params"]["Dense_1"]["kernel"] = base["params"]["Dense_1"]["kernel"].at[0, 0].add(1)
    for wrong in (other, fingerprint(other)):
        with pytest.raises(CheckpointError, match="not the one the adapter was trained on") as info:
            checkpoint.restore(tmp_path, base=wrong)
        assert "check_base=False" in str(info.value)
        assert str(info.value).count("\n") == 1
        assert "params/Dense_1/kernel: float32[4, 5] of SHA-256" in str(info.value)
    same(lora, checkpoint.restore(tmp_path, base=other, check_base=False).lora)
    assert checkpoint.restore(tmp_path, base=computed).lora["params"]["Dense_0"]
    wide = jax.tree.map(lambda leaf: jnp.ones((*leaf.shape[:-1], 9)), base)
    for wrong, text in (
        (wide, r"Dense_0/kernel: \(3, 4\), expected \(3, 9\)"),
        (base["params"], r"params/Dense_0/bias: unexpected"),
        (lowrank.combine(base, lora), "holds an adapter at"),
    ):
        with pytest.raises(CheckpointError, match=text):
            checkpoint.restore(tmp_path, base=wrong, check_base=False)
        with pytest.raises(CheckpointError):
            checkpoint.restore(tmp_path, base=wrong)
    abstract = jax.eval_shape(lambda: base)
    with pytest.raises(CheckpointError, match="not an array of numbers with values"):
        checkpoint.restore(tmp_path, base=abstract)
    same(lora, checkpoint.restore(tmp_path, base=abstract, check_base=False).lora)


def test_like_lists_all_that_differs(tmp_path):
    base = linen_base()
    lora, config = made(base)
    tx = optax.adam(0.1)
    checkpoint.save(tmp_path, lora=lora, config=config, opt_state=tx.init(lora))
    wrong, _ = made(base, rank=3, targets="params/Dense_0/kernel", train="params/Dense_1/bias")
    with pytest.raises(CheckpointError) as info:
        checkpoint.restore(tmp_path, like={"lora": wrong})
    for text in (
        "params/Dense_0/kernel/a: float32[3, 2], expected float32[3, 3]",
        "params/Dense_1/kernel/a: unexpected, float32[4, 2]",
        "params/Dense_0/kernel.scale: 1.5, expected 1.0",
    ):
        assert text in str(info.value)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lora)
    with pytest.raises(CheckpointError, match=r"kernel/a: float32\[3, 2\], expected bfloat16"):
        checkpoint.restore(tmp_path, like={"lora": half})
    with pytest.raises(CheckpointError, match="0/trace/params/Dense_0/kernel/a: missing") as info:
        checkpoint.restore(tmp_path, like={"opt_state": optax.sgd(1, 0.9).init(lora)})
    assert "0/mu/params/Dense_0/kernel/a: unexpected, float32[3, 2]" in str(info.value)
    checkpoint.save(tmp_path, lora=lora, config=config)
    with pytest.raises(CheckpointError, match="0/count: missing, expected int32"):
        checkpoint.restore(tmp_path, like={"opt_state": tx.init(lora)})


STORED = {"format": "nf4", "block_size": 32, "double_quant": False, "packing": "uint4"}


def quantized(dtype=jnp.float32, **changes):
    quant = lowrank.QuantConfig(targets="w", **{**STORED, **changes})
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, dtype)
    return lowrank.quantize_adapter({"w": lowrank.LowRank(draw(0, 64, 2), draw(1, 2, 128))}, quant)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "fp4"}, "w/a.format: 'nf4', expected 'fp4'"),
        ({"format": "int8"}, "w/a.format: 'nf4', expected 'int8'"),
        ({"block_size": 64}, "w/b.block_size: 32, expected 64"),
        ({"double_quant": True}, "w/a/scales: float32[2, 2], expected uint8[2, 2]"),
        ({"packing": "uint8"}, "w/b.packing: 'uint4', expected 'uint8'"),
        ({"dtype": jnp.bfloat16}, "w/a.weight_dtype: 'float32', expected 'bfloat16'"),
    ],
)
@pytest.mark.parametrize("what", ["lora", "extra"])
def test_like_must_have_the_format_of_quantized_factors(what, change, text, tmp_path):
    """nf4 and fp4 have codes of the same shapes and dtypes: their arrays do not tell them apart."""
    lora, config = quantized(), lowrank.LoraConfig(rank=2, targets="w")
    checkpoint.save(tmp_path, lora=lora, config=config, extra=lora)
    same(lora, getattr(checkpoint.restore(tmp_path, like={what: quantized()}), what))
    with pytest.raises(CheckpointError) as info:
        checkpoint.restore(tmp_path, like={what: quantized(**change)})
    assert f"the saved {what} does not match like.{what}: restore without it" in str(info.value)
    assert text in str(info.value)


def test_only_files_with_quantized_arrays_are_of_a_later_version(tmp_path):
    lora, config = quantized(), lowrank.LoraConfig(rank=2, targets="w")
    dense = lowrank.dequantize(lora)
    for lora_, extra, version in ((dense, dense, 1), (lora, None, 2), (dense, lora, 2)):
        checkpoint.save(tmp_path, lora=lora_, config=config, extra=extra)
        assert json.loads((tmp_path / "manifest.json").read_text())["version"] == version
        same(lora_, checkpoint.restore(tmp_path).lora)


def test_quantized_float8_is_restored(tmp_path):
    weight = {"w": jnp.ones((64, 32), "float8_e4m3fn")}
    extra = lowrank.quantize(weight, lowrank.QuantConfig(targets="w"))
    lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))}
    config = lowrank.LoraConfig(rank=2, targets="w")
    lowrank.checkpoint.save(tmp_path, lora=lora, config=config, extra=extra)
    again = lowrank.checkpoint.restore(tmp_path, like={"extra": extra}).extra
    assert again["w"].weight_dtype == "float8_e4m3fn"
    assert (again["w"].codes == extra["w"].codes).all()

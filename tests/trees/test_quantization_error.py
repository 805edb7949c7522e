"""quantization_error: the figures are NumPy's, leaf by leaf, and the way back to 4 bits is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)
QUANT = lowrank.QuantConfig(packing="uint8")


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def model(p, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x = jax.lax.scan(layer, x, p["layers"])[0]
    return jnp.tanh(jnp.tanh(x @ p["odd"]) @ p["half"]) @ p["head"]


PARAMS = {
    "layers": normal(3, 64, 64),
    "odd": normal(64, 30),  # kept flat
    "half": normal(30, 64).astype(jnp.bfloat16),
    "head": normal(64, 5),
}
X = normal(2, 64)
PLAN = lowrank.plan(model, PARAMS, X)


def frozen_of(params, quant=QUANT):
    return lowrank.quantize(params, quant, plan=PLAN)


def reference(weight, other):
    """Relative, mean and largest error in float64."""
    weight, other = np.asarray(weight, np.float64), np.asarray(other, np.float64)
    error = np.abs(other - weight)
    return np.linalg.norm(error) / np.linalg.norm(weight), error.mean(), error.max()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_figures_are_those_of_numpy(format):
    frozen = frozen_of(PARAMS, lowrank.QuantConfig(format=format, packing="uint8"))
    errors = lowrank.quantization_error(PARAMS, frozen)
    dense = jax.jit(lowrank.dequantize)(frozen)
    assert set(errors) == {"layers", "odd", "half"}
    for path, leaf in errors.items():
        got = leaf.relative, leaf.mean, leaf.largest
        np.testing.assert_allclose(got, reference(PARAMS[path], dense[path]), rtol=1e-4)
        assert (leaf.shape, leaf.format) == (PARAMS[path].shape, format)
        bytes_held = sum(array.nbytes for array in jax.tree.leaves(frozen[path]))
        assert leaf.bits == 8 * bytes_held / PARAMS[path].size
        assert leaf.relative < (0.11 if format == "nf4" else 0.01)


def test_the_way_back_to_four_bits_is_explicit_and_says_its_error():
    """Elsewhere merging into the 4-bit base loses 42% of the adapter's effect, unsaid."""
    base = frozen_of(PARAMS)
    config = lowrank.LoraConfig(rank=2, alpha=3, targets=("layers", "odd", "half"))
    base, lora = lowrank.init(KEY, base, config, plan=PLAN)
    lora = jax.tree.map(lambda factor: factor + jnp.asarray(0.05, factor.dtype), lora)
    merged = lowrank.merge(base, lora)
    dense = lowrank.dequantize(base)
    for path, node in lora.items():
        if node is None:
            continue
        delta = 1.5 * np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
        wanted = np.asarray(dense[path], np.float64) + delta
        digits = {"rtol": 1e-2} if path == "half" else {"rtol": 1e-6, "atol": 1e-6}
        np.testing.assert_allclose(np.asarray(merged[path], np.float64), wanted, **digits)
    again = frozen_of(merged)
    errors = lowrank.quantization_error(merged, again)
    lost = lowrank.dequantize(again)
    for path, leaf in errors.items():
        np.testing.assert_allclose(leaf.relative, reference(merged[path], lost[path])[0], rtol=1e-4)
        # the base alone loses nearly nothing by going through codes again: this is the adapter's
        alone = lowrank.quantization_error(dense, frozen_of(dense))[path]
        assert leaf.relative > 5 * alone.relative


def test_layers_are_compared_one_by_one(tmp_path):
    """A stack on disk is never read whole: no program is given more than a layer."""
    from lowrank_jax._trees import quantization_error

    frozen = frozen_of(PARAMS)
    np.save(tmp_path / "layers.npy", PARAMS["layers"])
    mapped = {**PARAMS, "layers": np.load(tmp_path / "layers.npy", mmap_mode="r")}
    seen = []
    compare = quantization_error._compare
    spy = lambda dense, node: seen.append(dense.shape) or compare(dense, node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization_error, "_compare", spy)
        errors = lowrank.quantization_error(mapped, frozen)
    assert seen.count((64, 64)) == 3
    assert max(map(np.prod, seen)) == 64 * 64
    assert str(errors) == str(lowrank.quantization_error(PARAMS, frozen))


def test_text_and_html():
    params = {f"layer_{i}/w": np.linspace(-1, 1, 256, dtype=np.float32) for i in range(3)}
    params = {name: value.reshape(64, 4) for name, value in params.items()}
    quant = lowrank.QuantConfig(targets="**/w", packing="uint8", double_quant=False)
    errors = lowrank.quantization_error(params, lowrank.quantize(params, quant))
    rows = str(errors).splitlines()
    assert len(rows) == 3  # head, rule, and one row for layers that are alike
    assert rows[2].startswith("layer_{0..2}/w  64×4   nf4, 4.50 bits")
    assert repr(errors) == str(errors)
    html = errors._repr_html_()
    assert html.count("<tr>") == 2
    assert "relative error" in html


def test_a_leaf_of_zeros_has_no_error():
    params = {"w": np.zeros((64, 4), np.float32)}
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"))
    assert lowrank.quantization_error(params, frozen)["w"].relative == 0
    error = lowrank.quantization_error(params, lowrank.quantize(
        {"w": np.ones((64, 4), np.float32)}, lowrank.QuantConfig(targets="w")
    ))["w"]  # fmt: skip
    assert (error.relative, error.largest) == (np.inf, 1)


SMALL = {"w": jnp.ones((64, 2)), "b": jnp.ones(2)}
FROZEN = lowrank.quantize(SMALL, lowrank.QuantConfig(targets="w"))
ADAPTED = lowrank.combine(
    *lowrank.init(KEY, FROZEN, lowrank.LoraConfig(rank=1, targets="w")),
)
MISTAKES = {
    "nothing quantized": (SMALL, SMALL, r"frozen holds no quantized leaf: the order is"),
    "swapped": (FROZEN, SMALL, r"dense holds quantized leaves \('w'\): the order is"),
    "adapted": (SMALL, ADAPTED, r"frozen holds adapters \('w'\).*lowrank.merge"),
    "another tree": (
        {"w": jnp.ones((64, 3)), "c": jnp.ones(2)},
        FROZEN,
        r"(?s)b: in frozen, not in dense.*c: in dense, not in.*w: 64×2 in frozen, 64×3 in dense",
    ),
    "shapes alone": (jax.eval_shape(lambda: SMALL), FROZEN, r"'w' has no values here"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    dense, frozen, words = MISTAKES[mistake]
    with pytest.raises(lowrank.TreeError, match=words):
        lowrank.quantization_error(dense, frozen)


def test_it_says_that_jit_knows_no_values():
    with pytest.raises(lowrank.TreeError, match="traced by jit"):
        jax.jit(lambda p: lowrank.quantization_error(p, FROZEN)["w"].relative)(SMALL)

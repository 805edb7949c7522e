"""An extension is one table entry: a format, a method and a structural primitive, made up here."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from models import noisy, normal

import lowrank_jax as lowrank
from lowrank_jax import _codecs
from lowrank_jax._codecs import Format
from lowrank_jax._interpreter.structural import make_structural
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._nodes import methods
from lowrank_jax._nodes.family import LoHa, get_sizes, get_target_fields
from lowrank_jax._nodes.methods import Method

FORMATS = {
    "made-up integers of 4 bits": Format("int4", 4),
    "a made-up table of 4 bits": Format("steps", 4, np.linspace(-1, 1, 16, dtype=np.float32) ** 3),
    "a made-up table of 8 bits": Format("log8", 8, np.linspace(-1, 1, 256, dtype=np.float32)),
}


@pytest.mark.parametrize("packing", ["uint4", pytest.param("uint8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_one_entry(name, packing, monkeypatch, tmp_path):
    entry = FORMATS[name]
    monkeypatch.setitem(_codecs.FORMATS, entry.name, entry)
    params, x = {"w": normal(64, 6)}, normal(3, 64)
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    plan = lowrank.plan(fn, params, x)
    quant = lowrank.QuantConfig(targets="w", format=entry.name, packing=packing, double_quant=False)
    base = lowrank.quantize(params, quant, plan=plan)
    on_host = lowrank.quantize(jax.tree.map(np.asarray, params), quant, plan=plan)
    chex.assert_trees_all_equal(base, on_host)

    # by the definition of a block, in NumPy
    w = np.asarray(params["w"])
    absmax = np.abs(w).max(0)
    values = np.arange(-7, 8) / 7 if entry.table is None else entry.table
    nearest = values[np.abs((w / absmax)[..., None] - values).argmin(-1)]
    decoded = lowrank.dequantize(base)["w"]
    np.testing.assert_allclose(decoded, nearest * absmax, rtol=1e-6, atol=1e-6)

    config = lowrank.LoraConfig(rank=2, targets="w")
    base, lora = lowrank.init(jax.random.key(0), base, config, plan=plan)
    lora = noisy(lora)
    tree = lowrank.combine(base, lora)
    got = lowrank.lift(fn, fallback="raise")(tree, x)
    np.testing.assert_allclose(got, fn(lowrank.merge(base, lora), x), atol=1e-5)
    assert lowrank.report(fn, lowrank.combine(base, lora), x)["w"].format == entry.name
    lowrank.checkpoint.save(tmp_path / "c", lora=lora, config=config, base=base)
    chex.assert_trees_all_equal(lowrank.checkpoint.restore(tmp_path / "c", base=base).lora, lora)
    with pytest.raises(
        lowrank.ConfigError,
        match=f"w is in format {entry.name!r}, which bitsandbytes does not have",
    ):
        lowrank.bitsandbytes.to_state_dict(base["w"], "w")


@jax.tree_util.register_dataclass
class Halved(LoHa):
    """LoHa under another name."""


def start_halved(key, leaf, target, config):
    stack, fan_in, fan_out = get_sizes(leaf, target)
    a = jnp.zeros((*stack, *fan_in, 2 * target.rank), config.factor_dtype)
    b = jnp.ones((*stack, 2 * target.rank, *fan_out), config.factor_dtype)
    return Halved(a, b, **get_target_fields(target))


def test_a_method_is_one_entry(request, tmp_path):
    entry = Method(Halved, "made-up LoHa", "halved", start_halved, scale=0.5)
    methods.ADAPTER_METHODS.append(entry)
    request.addfinalizer(lambda: methods.ADAPTER_METHODS.remove(entry))
    params, x = {"w": normal(8, 6)}, normal(3, 8)
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    config = lowrank.LoraConfig(rank=2, targets="w", method="halved")
    base, lora = lowrank.init(jax.random.key(0), params, config)
    assert (type(lora["w"]), lora["w"].scale) == (Halved, 0.5)
    lora = noisy(lora)
    got = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(got, fn(lowrank.merge(base, lora), x), atol=1e-5)
    (a, c), (b, d) = np.split(lora["w"].a, 2, 1), np.split(lora["w"].b, 2, 0)
    want = params["w"] + 0.5 * (a @ b) * (c @ d)
    np.testing.assert_allclose(lowrank.merge(base, lora)["w"], want, atol=1e-6)
    assert lowrank.report(fn, lowrank.combine(base, lora), x)["w"].kind == "made-up LoHa"
    assert lowrank.factor_labels(lora)["w"].a == "a"
    lowrank.checkpoint.save(tmp_path / "c", lora=lora, config=config, base=base)
    chex.assert_trees_all_equal(lowrank.checkpoint.restore(tmp_path / "c", base=base).lora, lora)


def test_a_structural_primitive_is_one_entry(monkeypatch):
    flip_p = Primitive("made_up_flip")
    flip = lambda array: array[::-1]
    flip_p.def_abstract_eval(lambda aval: aval)
    mlir.register_lowering(flip_p, mlir.lower_fun(flip, multiple_results=False))
    ad.deflinear2(flip_p, lambda cotangent, _: [flip_p.bind(cotangent)])
    fn = lambda p, x: jnp.tanh(x @ flip_p.bind(p["w"]))
    params, x = {"w": normal(8, 6)}, normal(3, 8)
    assert lowrank.plan(fn, params, x)["w"].reason.startswith("made_up_flip")
    monkeypatch.setitem(OPERATIONS, "made_up_flip", make_structural(lambda eqn, w: w.rev((0,))))
    plan = lowrank.plan(fn, params, x)
    assert (plan["w"].op, plan["w"].fan_in, plan["w"].fan_out) == ("dot", (0,), (1,))
    base, lora = lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=2, targets="w"))
    lifted = lowrank.lift(fn, fallback="raise")
    live = lambda lora: lifted(lowrank.combine(base, lora), x)
    merged = lambda lora: fn(lowrank.merge(base, lora), x)
    pair = lambda f: jax.jit(lambda lora: (f(lora), jax.grad(lambda one: f(one).sum())(lora)))
    lora = noisy(lora)
    chex.assert_trees_all_close(pair(live)(lora), pair(merged)(lora), atol=1e-5)

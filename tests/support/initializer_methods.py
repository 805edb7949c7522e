"""Initializers under test: how to run them, their data, PEFT's results, and comparisons."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

import lowrank_jax as lowrank
from lowrank_jax import initializers
from lowrank_jax._nodes.quantized import dequantize_node, quantize_array

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_initializers"
EPS = float(np.finfo(np.float32).eps)
# Errors of float32 decompositions, relative to the spectral norm: an eps for each of some 10 steps,
# over the gaps between singular values, of a tenth or so in random matrices.
CLOSE = 100 * EPS
NF4 = lowrank.QuantConfig(double_quant=False)
RANK, SCALE = 6, 1.5


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def covariance(*shape, seed=7):
    """Of inputs whose directions differ in size: [*stack, i, i]."""
    x = normal(*shape[:-2], 4 * shape[-1], shape[-1], seed=seed) * np.linspace(2, 0.2, shape[-1])
    return np.swapaxes(x, -1, -2) @ x


def plain_methods():
    """Name -> initializer that looks at no data."""
    return {
        "kaiming": initializers.kaiming,
        "gaussian": initializers.gaussian,
        "lookup": initializers.lookup,
        "orthogonal": initializers.orthogonal,
        "pissa": initializers.pissa,
        "randomized_pissa": initializers.randomized_pissa(4),
        "olora": initializers.olora,
        "loftq": initializers.loftq(NF4),
    }


def data_methods(stack, fan_in, fan_out):
    """Name -> initializer of a leaf "w" that looks at data."""
    cov = {"w": covariance(*stack, fan_in, fan_in)}
    config = lowrank.LoraConfig(rank=RANK, targets="w")
    return {
        "corda_ipm": initializers.corda(cov)["w"],
        "corda_kpm": initializers.corda(cov, "kpm")["w"],
        "lora_ga": initializers.lora_ga({"w": normal(*stack, fan_in, fan_out, seed=8)})["w"],
        "lora_ga_paper": initializers.lora_ga(
            {"w": normal(*stack, fan_in, fan_out, seed=8)}, form="paper"
        )["w"],
        "eva": initializers.eva(cov, config, rho=1.0)[0]["w"],
        "loftq_weighted": initializers.loftq(NF4, 5, cov)["w"],
    }


@functools.cache
def methods(stack=(), fan_in=64, fan_out=24):
    return plain_methods() | data_methods(stack, fan_in, fan_out)


METHODS = sorted(methods())


def parts(make):
    """An initializer's arrays, and what is static in it."""
    data, form = jax.tree.flatten(make)
    return ([], make) if data == [make] else (data, form)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def compiled(form, data, key, weight, rank, scale):
    make = form if callable(form) else jax.tree.unflatten(form, data)
    return make(key, weight, rank, scale)


def run(make, weight, rank=RANK, scale=SCALE, seed=0):
    """a, b and the base (None: untouched) in NumPy."""
    data, form = parts(make)
    out = compiled(form, data, jax.random.key(seed), weight, rank, scale)
    return jax.tree.map(np.asarray, out)


def rounded(weight, quant=NF4):
    """Quantized and back."""
    options = {"format": quant.format, "block_size": quant.block_size, "packing": quant.packing}
    return np.asarray(
        dequantize_node(
            quantize_array(weight, (0,), (), double_quant=quant.double_quant, **options)
        )
    )


def base_of(make, weight, residual):
    """What init puts into the base."""
    if residual is None:
        return weight
    return rounded(residual, make.quant) if hasattr(make, "quant") else residual


def product(a, b, scale=SCALE):
    return scale * a.astype(np.float64) @ b.astype(np.float64)


def assert_near(ours, theirs, norm):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE * norm)


def norm(matrix):
    return np.linalg.norm(matrix, 2)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


ABOUT = json.loads((GOLDEN / "about.json").read_text())["cases"]
INPUTS = golden("inputs")
PEFT = {
    "pissa": lambda path: initializers.pissa,
    "olora": lambda path: initializers.olora,
    "corda_ipm": lambda path: initializers.corda({path: INPUTS[f"C/{path}"]})[path],
    "corda_kpm": lambda path: initializers.corda({path: INPUTS[f"C/{path}"]}, "kpm")[path],
    "loftq_1": lambda path: initializers.loftq(NF4, 1),
    "loftq_5": lambda path: initializers.loftq(NF4, 5),
}


def case(name, path):
    """PEFT's a, b, base in Flax orientation; the weight, rank and scale."""
    file, about = golden(name), ABOUT[name]
    a, b, base = (file[f"{kind}/{path}"].T for kind in ("A", "B", "base"))
    return a, b, base, INPUTS[f"W/{path}"].T, about["rank"], about["scaling"]


SHAPES = [(64, 24), (24, 40)]


def svd(matrix):
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)

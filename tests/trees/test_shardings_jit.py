"""Shardings of init and quantize within jit, on meshes of both kinds of axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import NamedSharding, P

import lowrank_jax as lowrank


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shardings_within_jit_are_of_any_kind_of_mesh(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    at = {"w": NamedSharding(mesh, P("data", "model"))}
    params = {"w": jnp.sin(jnp.arange(128.0 * 8)).reshape(128, 8)}
    quant = lowrank.QuantConfig(targets="w")
    config = lowrank.LoraConfig(rank=2, targets="w")
    with jax.set_mesh(mesh):  # JAX asks for it where an argument is on no mesh
        made = jax.jit(lambda tree: lowrank.quantize(tree, quant, shardings=at))(params)
        base, _ = jax.jit(lambda tree: lowrank.init(0, tree, config, shardings=at))(params)
    np.testing.assert_array_equal(
        np.asarray(made["w"].codes), np.asarray(lowrank.quantize(params, quant)["w"].codes)
    )
    assert base["w"].sharding.is_equivalent_to(at["w"], 2)

"""The seam to jaxprs: equations bound one by one are the function, and know their source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lowrank_jax._jax import jaxprs

TABLE = np.arange(12.0, dtype=np.float32).reshape(3, 4)


def fn(x, y):
    with jax.named_scope("outer"):
        h = jnp.sin(x @ TABLE) + y
    return jax.lax.scan(lambda c, row: (c + row, c * row), y, h)


def evaluate(jaxpr, *args):
    """The function, by `bind` of each equation."""
    inner, consts = jaxprs.split_jaxpr(jaxpr)
    values = dict(zip(jaxprs.get_input_vars(jaxpr), [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jaxprs.Literal) else values[atom]
    for eqn in inner.eqns:
        outs = jaxprs.bind(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in inner.outvars]


def test_equations_bound_one_by_one_are_the_function():
    args = TABLE[:, :3], TABLE[0]
    jaxpr = jax.make_jaxpr(fn)(*args)
    got = evaluate(jaxpr, *args)
    want = jax.tree.leaves(fn(*args))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_equations_bound_again_keep_their_names_and_lines():
    args = TABLE[:, :3], TABLE[0]
    jaxpr = jax.make_jaxpr(fn)(*args)
    again = jax.make_jaxpr(lambda *args: evaluate(jaxpr, *args))(*args)
    for one in (jaxpr, again):
        (sine,) = [eqn for eqn in jaxprs.split_jaxpr(one)[0].eqns if eqn.primitive.name == "sin"]
        assert jaxprs.find_user_line(sine).startswith("test_jaxprs.py:")
        assert jaxprs.find_user_line(sine).endswith("(fn)")
        assert jaxprs.get_user_layer(sine) == "outer"


def test_consumers_of_an_input():
    jaxpr = jax.make_jaxpr(lambda x, y: (jnp.sin(x) * x, y))(1.0, 2.0)
    names = lambda number: [e.primitive.name for e in jaxprs.find_consumers(jaxpr, number)]
    assert names(0) == ["sin", "mul"]
    assert names(1) == []


def test_only_a_jit_is_not_eager():
    seen = []

    def look(x):
        seen.append(jaxprs.is_eager())
        return x * x

    look(1.0)
    jax.grad(look)(1.0)
    jax.vmap(look)(jnp.ones(2))
    jax.jit(look)(1.0)
    jax.eval_shape(look, jnp.ones(2))
    assert seen == [True, True, True, False, False]


@pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices")
def test_what_a_type_says_of_its_mesh():
    kinds = {AxisType.Auto: (True, False), AxisType.Explicit: (False, True)}
    for kind, (auto, explicit) in kinds.items():
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
        sharding = jax.NamedSharding(mesh, jax.P("x", None))
        array = jax.device_put(np.zeros((8, 4), np.float32), sharding)
        assert jaxprs.has_auto_axes(array) == auto
        assert jaxprs.has_explicit_axes(array) == explicit
        assert not jaxprs.has_no_mesh(array)
        assert [jaxprs.is_split(array, axis) for axis in (None, 0, 1)] == [
            explicit,
            explicit,
            False,
        ]
        assert [jaxprs.count_shards(mesh, entry) for entry in (None, "x", ("x", "y"))] == [1, 4, 8]
    assert jaxprs.has_no_mesh(jnp.zeros(3))

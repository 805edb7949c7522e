"""Inlined calls: derived once for all equal layers, and the same programs as without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import ad

import lowrank_jax as lowrank
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.inlined import bind_inlined, call_inlined, is_transformed
from lowrank_jax._primitives.bilinear import bilinear_p
from lowrank_jax._primitives.quantized_dot import quantized_dot_p

TARGETS = ["**/up", "**/down"]
KINDS = ["dense", "quantized", "dora"]


def model(params, x):
    """Layers of equal shapes, each in a scope of its own."""
    for i, layer in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return (x * x).sum()


def trace_gradient(layers, kind, width):
    """The jaxpr of the adapters' gradient, of a lifted model of so many layers."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = [
        {"up": shape(width, 2 * width), "down": shape(2 * width, width)} for _ in range(layers)
    ]
    config = lowrank.LoraConfig(rank=2, alpha=6, targets=TARGETS, dora=kind == "dora")
    x = shape(2, width)
    plan = lowrank.plan(model, params, x)

    def make(params):
        if kind == "quantized":
            quant = lowrank.QuantConfig(format="nf4", block_size=32, targets=TARGETS)
            params = lowrank.quantize(params, quant, plan=plan)
        return lowrank.init(jax.random.key(0), params, config, plan=plan)

    base, lora = jax.eval_shape(make, params)
    lifted = lowrank.lift(model, fallback="raise")
    loss = lambda lora, base, x: lifted(lowrank.combine(base, lora), x)
    return jax.make_jaxpr(jax.grad(loss))(lora, base, x)


def list_equations(jaxpr):
    return jaxprs.split_jaxpr(jaxpr)[0].eqns


@pytest.mark.parametrize("kind", KINDS)
def test_equal_layers_are_differentiated_once(monkeypatch, kind):
    """The rules of primitives are called as often for five layers as for two."""
    calls = []

    def count(primitive):
        rule = ad.primitive_jvps[primitive]
        counted = lambda *args, **params: calls.append(primitive.name) or rule(*args, **params)
        monkeypatch.setitem(ad.primitive_jvps, primitive, counted)

    for primitive in (bilinear_p, quantized_dot_p, jax.lax.tanh_p, jax.lax.add_p):
        count(primitive)
    counts = []
    first = 96 + 64 * KINDS.index(kind)
    for layers, width in ((2, first), (5, first + 32)):  # shapes that no cache holds
        calls.clear()
        trace_gradient(layers, kind, width)
        counts.append(sorted(calls))
    assert {"lowrank_bilinear", "tanh", "add"} <= {*counts[0]}
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_has_no_call_and_each_layer_its_name_and_line(kind):
    equations = list_equations(trace_gradient(3, kind, 32))
    names = {e.params["name"] for e in equations if e.primitive.name == "jit"}
    assert names <= {"_where"}  # the library's own
    products = [e for e in equations if e.primitive is bilinear_p]
    assert {jaxprs.get_user_layer(e) for e in products} == {
        name for i in range(3) for name in (f"jvp(layer_{i})", f"transpose(jvp(layer_{i}))")
    }
    (line,) = {jaxprs.find_user_line(e) for e in products}
    assert line.startswith("test_inlined.py:")
    assert line.endswith("(model)")


def test_an_inlined_call_is_the_call():
    x, y = (np.array(rows, np.float32) for rows in ([[1, 2], [3, 4]], [[5, 6], [7, 8]]))
    params = {"xl": ("i", "j"), "yl": ("j", "k"), "out": ("i", "k")}
    params |= {"precision": None, "preferred_element_type": None}
    product = lambda x, y: bind_inlined(bilinear_p, (x, y), params)
    np.testing.assert_array_equal(product(x, y), x @ y)
    np.testing.assert_array_equal(jax.vmap(product, (None, 0))(x, y[None])[0], x @ y)
    out, tangent = jax.jvp(product, (x, y), (y, x))
    np.testing.assert_array_equal(out, x @ y)
    np.testing.assert_array_equal(tangent, y @ y + x @ x)
    gradient = jax.grad(lambda x, y: product(x, y).sum(), argnums=1)(x, y)
    np.testing.assert_array_equal(gradient, x.T @ np.ones((2, 2)))


def divide(zero, x):
    return x / jnp.float32(zero)


def test_static_values_that_are_equal_but_not_the_same_are_two_calls():
    """0.0 == -0.0, but they do not divide alike."""
    for zero, want in ((0.0, np.inf), (-0.0, -np.inf), (0.0, np.inf)):
        out, _ = jax.jvp(lambda x, zero=zero: call_inlined(divide, (zero,), x), (1.0,), (1.0,))
        assert out == want


def test_a_call_is_inlined_only_under_a_transformation():
    seen = []
    read = lambda x: seen.append(is_transformed([x])) or x
    read(1.0)
    jax.make_jaxpr(read)(1.0)
    assert seen == [False, False]
    jax.make_jaxpr(jax.grad(read))(1.0)
    jax.make_jaxpr(jax.vmap(read))(jnp.ones(2))
    jax.jvp(read, (1.0,), (1.0,))
    assert seen[2:] == [True, True, True]


def test_an_operation_keeps_the_context_of_its_equation():
    """Of two equal products one carries metadata for XLA, the other does not."""

    def model(params, x):
        x = jnp.tanh(x @ params["one"])
        with set_xla_metadata(mark="second"):
            x = jnp.tanh(x @ params["two"])
        return x.sum()

    params = {"one": jnp.ones((4, 4)), "two": jnp.ones((4, 4))}
    config = lowrank.LoraConfig(rank=2, targets=["one", "two"])
    base, lora = lowrank.init(jax.random.key(0), params, config)
    loss = lambda lora, x: lowrank.lift(model)(lowrank.combine(base, lora), x)
    equations = list_equations(jax.make_jaxpr(jax.grad(loss))(lora, jnp.ones((2, 4))))
    first, second = (e.ctx.xla_metadata for e in equations if e.primitive.name == "tanh")
    assert not first
    assert second == {"mark": "second"}

"""plan: what a dry run learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import lowrank_jax as lowrank

x = np.ones((2, 6), np.float32)
KERNEL = {"w": np.ones((6, 3), np.float32)}


def uses(fn, *args, **params):
    leaves = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in params.items()}
    return lowrank.plan(fn, leaves, *args)


@pytest.mark.parametrize(
    ("fn", "shape", "op", "fan_in", "fan_out", "stack"),
    [
        (lambda p, x: jnp.tanh(x @ p["w"]), (6, 3), "dot", (0,), (1,), ()),
        (lambda p, x: jnp.tanh(x @ p["w"].T), (3, 6), "dot", (1,), (0,), ()),
        (lambda p, x: jnp.tanh(p["w"] @ x.T), (3, 6), "dot", (1,), (0,), ()),
        (
            lambda p, x: jnp.tanh(jnp.einsum("bi,ihd->bhd", x, p["w"])),
            (6, 2, 3), "dot", (0,), (1, 2), (),
        ),
        (
            lambda p, x: jnp.tanh(jnp.einsum("bhd,hdo->bo", x.reshape(2, 2, 3), p["w"])),
            (2, 3, 4), "dot", (0, 1), (2,), (),
        ),
        (
            lambda p, x: jnp.tanh(jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 4), p["w"])),
            (4, 6, 3), "dot", (1,), (2,), (0,),
        ),
        (
            lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0],
            (4, 6, 6), "dot", (1,), (2,), (0,),
        ),
        (
            lambda p, x: lax.fori_loop(0, 4, lambda i, c: jnp.tanh(c @ p["w"][i]), x),
            (4, 6, 6), "dot", (1,), (2,), (0,),
        ),
        (
            lambda p, x: jnp.tanh(x @ p["w"][0]) @ jnp.tanh(p["w"][1]),
            (2, 6, 6), "dot", (1,), (2,), (0,),
        ),
        (
            lambda p, x: jnp.tanh(x @ p["w"].reshape(6, 2, 3).transpose(1, 0, 2)),
            (6, 6), "dot", (0,), (1,), (),
        ),
        (lambda p, x: p["w"][jnp.array([0, 2])], (5, 3), "lookup", (0,), (1,), ()),
        (lambda p, x: p["w"][:, jnp.array([0, 2])], (5, 3), "lookup", (1,), (0,), ()),
        (
            lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][jnp.array([1, 0])]).sum() ** 2,
            (3, 6, 2), "dot", (1,), (2,), (0,),
        ),
        (lambda p, x: x + p["w"], (6,), "other", (), (), ()),
        (lambda p, x: x, (6,), "unused", (), (), ()),
        (
            lambda p, x: jnp.tanh(lax.conv_general_dilated(
                x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))),
            (3, 6, 4), "conv", (0, 1), (2,), (),
        ),
    ],
)  # fmt: skip
def test_axes_by_use(fn, shape, op, fan_in, fan_out, stack):
    use = uses(fn, x, w=shape)["w"]
    assert (use.op, use.fan_in, use.fan_out, use.stack) == (op, fan_in, fan_out, stack)
    assert use.shape == shape


@pytest.mark.parametrize(
    ("head", "final"),
    [
        (lambda h, w: h @ w, True),
        (lambda h, w: (h @ w + jnp.ones(3)) * 0.5, True),
        (lambda h, w: (30 * jnp.tanh(h @ w / 30)).astype(jnp.bfloat16), True),
        (lambda h, w: jax.jit(lambda h, w: h @ w)(h, w), True),
        (lambda h, w: h @ w + h[:, :3], False),  # a residual stream, not a bias
        (lambda h, w: jax.nn.softmax(h @ w), False),
        (lambda h, w: jax.nn.relu(h @ w), False),
    ],
)
def test_the_final_projection(head, final):
    plan = uses(lambda p, x: head(jnp.tanh(x @ p["w1"]), p["w2"]), x, w1=(6, 6), w2=(6, 3))
    assert plan["w2"].final is final
    assert plan["w1"].final is False
    assert plan["w2"].linear is not final


def test_a_bias_that_is_a_parameter_and_a_stacked_last_layer():
    plan = uses(lambda p, x: x @ p["w"] + p["bias"], x, w=(6, 3), bias=(3,))
    assert plan["w"].final
    scan = lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]
    assert not uses(scan, x, w=(4, 6, 6))["w"].final


def test_tied_and_counted():
    def fn(p, x):
        h = jnp.tanh(p["t"][jnp.array([0, 1])])
        return jnp.tanh(h @ p["w"]) @ p["t"].T + jnp.tanh(h @ p["w"]).sum()

    plan = uses(fn, x, t=(7, 4), w=(4, 4))
    assert plan["t"].tied
    assert plan["t"].lookup
    assert (plan["t"].op, plan["t"].fan_in) == ("dot", (1,))
    assert not plan["t"].linear
    assert plan["w"].uses == 2
    assert not plan["w"].tied


def test_no_arithmetic_and_abstract_arguments():
    def fn(p, x):
        jax.debug.callback(lambda: pytest.fail("the plan ran the model"))
        return jnp.tanh(x @ p["w"])

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    plan = lowrank.plan(fn, {"w": shape(4096, 14336)}, shape(1, 4096))
    assert plan["w"].shape == (4096, 14336)
    assert plan["w"].dtype == jnp.bfloat16


def test_keyword_and_static_arguments():
    fn = lambda p, x, *, mode, train: jnp.tanh(x @ p["w"]) if mode == "a" and train else x
    plan = lowrank.plan(fn, KERNEL, x, mode="a", train=True)
    assert plan["w"].op == "dot"
    assert lowrank.plan(fn, KERNEL, x, mode="b", train=True)["w"].op == "unused"


def test_the_function_is_traced_once():
    traced = chex.assert_max_traces(lambda p, x: jnp.tanh(x @ p["w"]), n=1)
    lowrank.plan(traced, KERNEL, x)


def test_integers_and_non_arrays_are_left_alone():
    tree = {"w": np.ones((6, 3), np.float32), "table": np.ones((6, 3), np.int32), "name": "model"}
    plan = lowrank.plan(lambda p, x: x @ p["w"] + x @ p["table"], tree, x)
    assert plan["table"].op == "unused"
    assert "name" not in plan


def test_table_of_a_linen_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            h = nn.Embed(7, 6, name="embed")(ids)
            h = nn.SelfAttention(num_heads=2, name="attention")(h)
            return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(h))

    ids = np.zeros((1, 4), np.int32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), ids)
    table = str(lowrank.plan(Net().apply, variables, ids))
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}
    assert lines["params/embed/embedding"][:4] == ["7×6", "lookup", "7", "6"]
    assert lines["params/attention/query/kernel"][:4] == ["6×2×3", "dot", "6", "2·3"]
    assert lines["params/head/kernel"][-1] == "final"
    assert lines["params/norm/scale"][1] == "other"

"""plan: what a dry run learns."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from models import doubled, tenfold

import lowrank_jax as lowrank
from lowrank_jax._interpreter import survey
from lowrank_jax._interpreter.table import OPERATIONS

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
        (
            lambda p, x: jnp.tanh(jax.vmap(lambda x, i: x @ p["w"][i])(x, jnp.array([3, 1]))),
            (4, 6, 3), "dot", (1,), (2,), (0,),
        ),
        (
            lambda p, x: jnp.tanh(jax.vmap(lambda w, i: x @ w[i])(p["w"], jnp.array([3, 1]))),
            (2, 4, 6, 3), "dot", (2,), (0, 3), (1,),
        ),
        (
            lambda p, x: jax.vmap(lambda i: p["w"][i])(jnp.array([3, 1])),
            (6, 4), "lookup", (0,), (1,), (),
        ),
        (lambda p, x: p["w"][jnp.array([0, 2])], (4, 64, 2), "lookup", (0,), (1, 2), ()),
        (lambda p, x: p["w"][x.astype(int)[0, 0]], (4, 64, 2), "lookup", (0,), (1, 2), ()),
        (lambda p, x: p["w"][2], (4, 64, 2), "other", (), (), ()),
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
        (lambda h, w: (h @ w)[:, -1], True),
        (lambda h, w: (h @ w)[:1, ::-1], True),
        (lambda h, w: jnp.flip(lax.stop_gradient(h @ w), 0), True),
        (lambda h, w: lax.dynamic_slice(h @ w, (h.shape[0] - 1, 0), (1, 3)), True),
        (lambda h, w: jnp.take(h @ w, jnp.argmax(h, 1), axis=0), True),
        (lambda h, w: jnp.where(h[:, :3] > 0, h @ w, -1e9), True),
        (lambda h, w: (h @ w) * (h[:, :3] > 0), True),
        (lambda h, w: jnp.pad(jnp.concatenate([h @ w, jnp.zeros((1, 3))]), 1), True),
        (lambda h, w: lax.scan(lambda c, h: (c, h @ w), 0, h)[1], True),
        (lambda h, w: jax.checkpoint(jax.jit(lambda h, w: h @ w))(h, w), True),
        (lambda h, w: lax.cond(h[0, 0] > 0, lambda: h @ w, lambda: jnp.zeros((2, 3))), True),
        (lambda h, w: ((h @ w).sum(), h @ w), True),
        (lambda h, w: (h @ w, jax.nn.softmax(h @ w)), True),
        (lambda h, w: (h @ w, h.mean(), jnp.argmax(h @ w, 1)), True),
        (lambda h, w: (h @ w).sum(), False),
        (lambda h, w: lax.fori_loop(0, 2, lambda i, h: h @ (w @ w.T), h), False),
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


def linear(plan):
    """The names of the leaves that "all-linear" adapts."""
    return {path for path, use in plan.items() if use.linear}


def final(plan):
    return {path for path, use in plan.items() if use.final}


def decoder(p, ids, blocks=("a", "b")):
    """A transformer that returns its logits, the keys and values, and the output of each layer."""
    h, cache, layers = p["embed"][ids], [], []
    for name in blocks:
        q, k, v = (h @ p[name + which] for which in "qkv")
        attention = jax.nn.softmax(q @ k.T) @ v @ p[name + "o"]
        h = h + attention
        mlp = jax.nn.gelu(h @ p[name + "u"]) @ p[name + "d"]
        h = h + mlp
        cache.append((k, v))
        layers.append((attention, mlp))
    return h @ p["head"], cache, layers


DECODER = {name + which: (8, 8) for name in "ab" for which in "qkvoud"}
DECODER |= {"embed": (11, 8), "head": (8, 11)}


@pytest.mark.parametrize("returned", [slice(1), slice(2), slice(3)])
def test_a_leaf_whose_product_is_also_returned_is_no_final_projection(returned):
    plan = uses(lambda p, ids: decoder(p, ids)[returned], np.arange(5), **DECODER)
    assert linear(plan) == {*DECODER} - {"embed", "head"}
    assert final(plan) == {"head"}


def test_an_autoencoder_that_returns_what_it_decodes():
    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            h = nn.relu(nn.Dense(6, name="fc1")(x))
            mean, logvar = nn.Dense(3, name="fc2_mean")(h), nn.Dense(3, name="fc2_logvar")(h)
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
            h = nn.relu(nn.Dense(6, name="fc3")(z))
            return nn.Dense(8, name="fc4")(h), mean, logvar

    args = np.ones((2, 8), np.float32), jax.random.key(0)
    variables = jax.eval_shape(VAE().init, jax.random.key(0), *args)
    plan = lowrank.plan(VAE().apply, variables, *args)
    names = ("fc1", "fc2_mean", "fc2_logvar", "fc3")
    assert linear(plan) == {f"params/{name}/kernel" for name in names}
    assert final(plan) == {"params/fc4/kernel"}


def test_a_head_inside_an_rnn():
    class Cell(nn.LSTMCell):
        @nn.compact
        def __call__(self, carry, x):
            carry, h = nn.LSTMCell(self.features, name="lstm")(carry, x)
            return carry, nn.Dense(5, name="head")(h)

    model, xs = nn.RNN(Cell(4)), np.ones((2, 3, 8), np.float32)
    plan = lowrank.plan(model.apply, jax.eval_shape(model.init, jax.random.key(0), xs), xs)
    assert final(plan) == {"params/cell/head/kernel"}
    assert linear(plan) == {f"params/cell/lstm/{k}{g}/kernel" for k in "ih" for g in "ifgo"}


@pytest.mark.parametrize("through", ["integers", "numbers"])
def test_a_sampled_token_that_is_fed_back(through):
    def generate(p, ids):
        def step(carry, _):
            token, h = carry
            h = jnp.tanh(p["embed"][token] @ p["w"] + h @ p["u"])
            logits = h @ p["head"]
            fed = jax.nn.softmax(logits) @ p["embed"] if through == "numbers" else 0
            return (jnp.argmax(logits, -1), h + fed), logits

        return lax.scan(step, (ids, jnp.zeros((5, 8))), None, length=4)[1]

    plan = uses(generate, np.arange(5), embed=(11, 8), w=(8, 8), u=(8, 8), head=(8, 11))
    assert final(plan) == ({"head"} if through == "integers" else set())


def test_a_scalar_has_no_final_projection_and_the_plan_says_so():
    loss = lambda p, x: ((x @ p["w"] - 1) ** 2).mean()
    plan = uses(loss, x, w=(6, 3))
    said = "the function returns a scalar, so the final projection cannot be found"
    assert str(plan).splitlines()[-1].startswith(said)
    assert said in plan._repr_html_()
    assert plan["w"].linear
    assert said not in str(uses(lambda p, x: (loss(p, x), x @ p["w"]), x, w=(6, 3)))


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


@pytest.mark.parametrize(
    ("fn", "v", "w"),
    [
        (lambda x, v, w: jnp.split(jnp.sin(x @ jnp.concatenate([v, w], 1)), 2, -1), (6, 3), (6, 3)),
        (lambda x, v, w: jnp.sin(x @ jnp.concatenate([v, w], 0)), (4, 3), (2, 3)),
        (lambda x, v, w: jnp.sin(jnp.einsum("ti,nio->nto", x, jnp.stack([v, w]))), (6, 3), (6, 3)),
        (lambda x, v, w: jnp.sin(x @ jnp.hstack([v, w])[:, :4]), (6, 3), (6, 3)),
        (lambda x, v, w: jnp.sin(x @ (v @ w)), (6, 3), (3, 4)),
        (lambda x, v, w: jnp.sin(x @ (v @ w)), (6, 5), (5, 2)),
    ],
)
def test_weights_that_are_joined_before_one_product(fn, v, w):
    plan = uses(lambda p, x: fn(x, p["v"], p["w"]), x, v=v, w=w)
    assert {path: (use.op, use.fan_in, use.fan_out, use.stack) for path, use in plan.items()} == {
        "v": ("dot", (0,), (1,), ()),
        "w": ("dot", (0,), (1,), ()),
    }
    assert linear(plan) == {"v", "w"}


def test_parts_of_joined_weights_are_told_apart():
    def fn(p, x):
        q, k = jnp.split(jnp.concatenate([p["q"], p["k"].T], axis=1), 2, axis=1)
        return jnp.sin(x @ q) + jnp.sin(x @ k)

    plan = uses(fn, x, q=(6, 3), k=(3, 6))
    assert [(plan[p].fan_in, plan[p].uses, plan[p].tied) for p in "qk"] == [
        ((0,), 1, False),
        ((1,), 1, False),
    ]


def test_all_kernels_of_a_cell_that_concatenates_them():
    model, xs = nn.RNN(nn.OptimizedLSTMCell(4)), np.ones((2, 3, 5), np.float32)
    plan = lowrank.plan(model.apply, jax.eval_shape(model.init, jax.random.key(0), xs), xs)
    assert linear(plan) == {f"params/cell/{k}{g}/kernel" for k in "ih" for g in "ifgo"}


OPAQUE = {
    "elementwise": lambda x, w: x @ jnp.tanh(w),
    "masked": lambda x, w: x @ (w * (np.arange(18).reshape(6, 3) % 2)),
    "custom_vjp": lambda x, w: tenfold(x, w),
    "custom_jvp": lambda x, w: doubled(x, w),
    "callback": lambda x, w: jax.pure_callback(np.matmul, x[:, :3], x, w),
    "changed by a loop": lambda x, w: x @ lax.fori_loop(0, 2, lambda i, w: w * w, w),
}
NAMES = {"elementwise": "tanh", "masked": "mul", "custom_vjp": "custom_vjp_call"}
NAMES |= {"custom_jvp": "custom_jvp_call", "callback": "pure_callback", "changed by a loop": "mul"}


def test_a_weight_that_is_normed_is_adapted():
    fn = lambda p, x: jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))) @ p["head"]
    plan = lowrank.plan(fn, {"w": np.ones((6, 3)), "head": np.ones((3, 2))}, np.ones((2, 6)))
    assert (plan["w"].op, plan["w"].fan_in, plan["w"].fan_out) == ("dot", (0,), (1,))
    assert linear(plan) == {"w"}


@pytest.mark.parametrize("way", OPAQUE)
def test_what_no_rule_follows_is_named(way, recwarn, monkeypatch):
    monkeypatch.setattr(lowrank._codecs.formats, "BLOCK_SIZES", (2,))

    def fn(p, x):
        h = OPAQUE[way](x * p["scale"], p["deep"]["w"]) + p["bias"]
        return jnp.sin(h) @ p["v"] @ p["head"]

    leaf = lambda *shape: np.ones(shape, np.float32)
    params = {"deep": {"w": leaf(6, 3)}, "v": leaf(3, 3), "head": leaf(3, 2)}
    params |= {"scale": leaf(2, 6), "bias": leaf(2, 3)}
    plan = lowrank.plan(fn, params, x)
    line = next(line for line in str(plan).splitlines() if line.startswith("deep/w"))
    assert re.search(rf"not followed: {NAMES[way]} at test_plan.py:", line)
    assert {path for path, use in plan.items() if use.reason} == {"deep/w"}
    assert linear(plan) == {"v"}
    config, quant = lowrank.LoraConfig(rank=1), lowrank.QuantConfig(block_size=2)
    said = rf"passes over leaves .*follows: 'deep/w' \({NAMES[way]} at [^']*\)\. Name"
    start = lambda config: jax.eval_shape(
        lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan), params
    )
    freeze = lambda quant: jax.eval_shape(
        lambda params: lowrank.quantize(params, quant, plan=plan), params
    )
    with pytest.warns(lowrank.PlanWarning, match=said):
        start(config)
    with pytest.warns(lowrank.PlanWarning, match=said):
        freeze(quant)
    recwarn.clear()
    start(lowrank.LoraConfig(rank=1, exclude="deep/w"))
    start(lowrank.LoraConfig(rank=1, train="deep/*"))
    start(lowrank.LoraConfig(rank=1, targets=("all-linear", "deep/w")))
    start(lowrank.LoraConfig(rank=1, targets="v"))
    freeze(lowrank.QuantConfig(block_size=2, exclude="deep/w"))
    assert not [w for w in recwarn if w.category is lowrank.PlanWarning]


def test_learned_queries_are_named_and_their_biases_are_not():
    def fn(p, x):
        queries = jnp.tanh(p["queries"]) @ p["wq"] + p["bias"]
        return jnp.sin(jax.nn.softmax(queries @ (x @ p["wk"]).T) @ x)

    plan = uses(fn, x, queries=(4, 6), wq=(6, 6), wk=(6, 6), bias=(4, 6))
    assert linear(plan) == {"wq", "wk"}
    assert {path for path, use in plan.items() if use.passed_over} == {"queries"}


def test_what_only_parameters_are_multiplied_by_is_no_weight():
    def fn(p, x):
        sigma = jnp.linalg.norm(p["u"] @ p["w"])  # as spectral norm has it
        return jnp.sin(x @ (p["w"] / sigma)) + p["positions"] @ p["wide"]

    shapes = {"w": (6, 5), "u": (1, 6), "positions": (2, 3), "wide": (3, 5)}
    assert linear(uses(fn, x, **shapes)) == {"w", "wide"}


def test_a_matrix_contracted_whole_has_no_fan_out():
    plan = uses(lambda p, x: jnp.sin(x.reshape(12) @ p["w"].reshape(12)), x, w=(4, 3))
    assert not plan["w"].linear
    assert "no fan-out" in str(plan)


@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        (lambda p, x, ids: jax.vmap(lambda x, i: x @ p["w"][i])(x[ids % 2], ids), (4, 6, 6)),
        (lambda p, x, ids: jax.vmap(lambda i: p["w"][i])(ids), (4, 6)),
        (lambda p, x, ids: p["w"][ids], (4, 6, 2)),
        (lambda p, x, ids: p["w"][ids[0]], (4, 6, 2)),
    ],
)
def test_what_is_chosen_by_index_is_adapted_and_quantized(fn, shape, fast_compile, monkeypatch):
    monkeypatch.setattr(lowrank._codecs.formats, "BLOCK_SIZES", (2,))
    params = {"w": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    args = x, np.array([3, 1, 1], np.int32)
    plan = lowrank.plan(fn, params, *args)
    config = lowrank.LoraConfig(rank=2, targets="w")
    quant = lowrank.QuantConfig(targets="w", block_size=2)
    for base in (params, lowrank.quantize(params, quant, plan=plan)):
        base, lora = lowrank.init(jax.random.key(0), base, config, plan=plan)
        lora = jax.tree.map(lambda a: np.cos(np.arange(a.size)).reshape(a.shape), lora)
        live = lowrank.lift(fn, fallback="silent")(lowrank.combine(base, lora), *args)
        np.testing.assert_allclose(live, fn(lowrank.merge(base, lora), *args), rtol=0, atol=1e-5)


def test_data_that_the_function_closes_over():
    plan = uses(lambda p: jnp.sin(x @ p["w"]) @ p["v"], w=(6, 3), v=(3, 2))
    assert (linear(plan), final(plan)) == ({"w"}, {"v"})


def test_the_plan_knows_every_primitive_that_has_a_rule():
    evaluated = {name for name, op in OPERATIONS.items() if op.evaluate}
    assert len(evaluated) > 30
    assert evaluated <= {name for name, op in OPERATIONS.items() if op.survey}


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


def test_sets_of_products_are_copied_where_two_meet_alone(monkeypatch):
    """In a residual stream they grow with depth: one copy a layer, and not one an equation."""
    unite, copies = survey._unite, []

    def counted(sets):
        out = unite(sets)
        assert out == frozenset().union(*sets)
        copies.extend([out] * (bool(out) and all(out is not one for one in sets)))
        return out

    monkeypatch.setattr(survey, "_unite", counted)

    def model(params, x):
        for w in params:
            x = x + 2 * jnp.tanh(3 * x @ w)
        return x

    def count(layers):
        copies.clear()
        lowrank.plan(model, [np.ones((6, 6), np.float32)] * layers, x)
        return len(copies)

    assert count(4) - count(2) == 2


def test_what_follows_a_final_product_through_others_is_found():
    """A leaf whose product is used again, however far away, is not the last."""

    def model(params, x):
        first = x @ params["first"]
        h = first
        for _ in range(3):
            h = jnp.tanh(h @ params["again"])
        return first, h @ params["last"]

    params = {"first": np.ones((6, 6)), "again": np.ones((6, 6)), "last": np.ones((6, 3))}
    plan = lowrank.plan(model, params, x)
    assert [name for name, use in plan.items() if use.final] == ["last"]


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

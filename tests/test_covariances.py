"""covariances: the sum of x x^T at every target, against NumPy on the model's own equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from models import ROWS, made, variables_of
from models import normal as on_device

import lowrank_jax as lowrank
from lowrank_jax._jax.paths import flatten

pytestmark = pytest.mark.usefixtures("fast_compile")


def normal(*shape, **options):
    return np.asarray(on_device(*shape, **options))


def measured(fn, params, *args, targets="w", **options):
    plan = lowrank.plan(fn, params, *args)
    config = lowrank.LoraConfig(rank=1, targets=targets, **options)
    return lowrank.covariances(fn, config, plan=plan)(params, *args)


def gram(x, fan_in=1):
    """Sum of x x^T over all but the last fan_in axes."""
    x = np.asarray(x, np.float64)
    x = x.reshape(-1, int(np.prod(x.shape[x.ndim - fan_in :])))
    return x.T @ x


def close(got, want, tolerance=1e-5):
    assert got.dtype == jnp.float32
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def numbers(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_each_of_joined_weights_is_measured():
    """Side by side they have one input; one above the other each has its part of it."""
    params = {"q": normal(4, 3), "k": normal(4, 6), "v": normal(5, 9)}

    def fn(p, x):
        h = jnp.tanh(x @ jnp.concatenate([p["q"], p["k"]], 1))
        both = jnp.concatenate([jnp.concatenate([p["q"], p["k"]], 1), p["v"]])
        return jnp.tanh(jnp.concatenate([x, h[:, :5]], 1) @ both)

    x = normal(7, 4)
    found = measured(fn, params, x, targets=("q", "k", "v"))
    w = numbers(params)
    h = np.tanh(np.asarray(x, np.float64) @ np.concatenate([w["q"], w["k"]], 1))
    close(found["q"], 2 * gram(x))
    close(found["k"], 2 * gram(x))
    close(found["v"], gram(h[:, :5]))


# Models.


def test_linen_mlp():
    model, x = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(3)]), normal(5, 2, 4)
    params = variables_of(model, x)
    found = measured(model.apply, params, x, targets="**/kernel")
    first = numbers(params)["params"]["layers_0"]
    h = np.tanh(np.asarray(x, np.float64) @ first["kernel"] + first["bias"])
    assert list(found) == ["params/layers_0/kernel", "params/layers_2/kernel"]
    close(found["params/layers_0/kernel"], gram(x))
    close(found["params/layers_2/kernel"], gram(h))


def test_nnx_mlp():
    class Mlp(nnx.Module):
        def __init__(self):
            self.up, self.down = (nnx.Linear(*s, rngs=nnx.Rngs(0)) for s in ((4, 6), (6, 3)))

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    x = normal(5, 4)
    fn, params = lowrank.functional(made(Mlp))
    found = measured(fn, params, x, targets="**/kernel")
    up = numbers(params)["up"]
    close(found["up/kernel"], gram(x))
    close(found["down/kernel"], gram(np.tanh(np.asarray(x) @ up["kernel"] + up["bias"])))


def test_attention_with_heads():
    model, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6), normal(3, 5, 4)
    params = variables_of(model, x)
    found = measured(model.apply, params, x, targets="**/kernel")
    project = {
        name: np.einsum("btd,dhk->bthk", np.asarray(x, np.float64), leaf["kernel"]) + leaf["bias"]
        for name, leaf in numbers(params)["params"].items()
        if name != "out"
    }
    scores = np.einsum("bqhk,bshk->bhqs", project["query"], project["key"]) / np.sqrt(3)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhqs,bshk->bqhk", weights, project["value"])
    for name in ("query", "key", "value"):
        close(found[f"params/{name}/kernel"], gram(x))
    close(found["params/out/kernel"], gram(mixed, 2))


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_stack_has_one_for_each_layer(remat):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None

    scanned = nn.scan(
        nn.remat(Block) if remat else Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )
    model, x = scanned(), normal(5, 4)
    params = variables_of(model, x, None)
    found = measured(model.apply, params, x, None, targets="**/kernel")
    layers, h, ups, downs = numbers(params)["params"], np.asarray(x, np.float64), [], []
    for layer in range(3):
        of = lambda name, x, layer=layer: (
            x @ layers[name]["kernel"][layer] + layers[name]["bias"][layer]
        )
        ups.append(gram(h))
        inner = np.tanh(of("up", h))
        downs.append(gram(inner))
        h = h + of("down", inner)
    close(found["params/up/kernel"], np.stack(ups))
    close(found["params/down/kernel"], np.stack(downs))


def test_bfloat16_model_sums_in_float32():
    # 4096 ones added in bfloat16 would stop at 256
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    x = np.ones((4096, 3), jnp.bfloat16)
    found = measured(fn, {"w": normal(3, 5, dtype=jnp.bfloat16)}, x)["w"]
    close(found, np.full((3, 3), 4096.0), 0)


def test_quantized_base_is_measured_as_it_computes():
    params = {"w": normal(64, 128), "v": normal(128, 3), "u": normal(3, 64)}
    fn = lambda p, x: jnp.tanh(x @ p["w"] / 8) @ p["v"] @ p["u"]
    x = normal(5, 64)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets=("w", "u")))
    found = measured(fn, frozen, x, targets=("w", "v"))
    w = np.asarray(lowrank.dequantize(frozen)["w"], np.float64)
    assert np.abs(w - np.asarray(params["w"])).max() > 0.01
    close(found["w"], gram(x))
    close(found["v"], gram(np.tanh(np.asarray(x) @ w / 8)))


def test_quantized_stack():
    w = normal(3, 64, 64, scale=0.2)
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    plan = lowrank.plan(fn, {"w": w}, x := normal(5, 64))
    frozen = lowrank.quantize({"w": w}, lowrank.QuantConfig(targets="w"), plan=plan)
    found, h, want = measured(fn, frozen, x)["w"], np.asarray(x, np.float64), []
    for layer in np.asarray(lowrank.dequantize(frozen)["w"], np.float64):
        want.append(gram(h))
        h = np.tanh(h @ layer)
    close(found, np.stack(want))


def test_quantized_base_in_a_product_that_its_blocks_do_not_allow():
    def fn(p, x):
        whole = jnp.einsum("bhd,hdo->bo", x, p["w"])
        return whole, jnp.einsum("bh,hdo->bdo", x[:, :, 0], p["w"])  # one of a block's two axes

    params, x = {"w": normal(2, 32, 5)}, normal(7, 2, 32)
    plan = lowrank.plan(fn, params, x)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"), plan=plan)
    close(measured(fn, frozen, x)["w"], gram(x, 2))


# Convolutions.

CONVOLUTIONS = {  # features of input and output, size, window, then options of nn.Conv
    "1-D": (3, 5, (7,), (3,), {}),
    "1-D causal, dilated": (3, 5, (9,), (2,), {"kernel_dilation": 3, "padding": "CAUSAL"}),
    "2-D": (3, 5, (6, 5), (3, 2), {}),
    "2-D strided": (2, 5, (7, 8), (3, 3), {"strides": (2, 3), "padding": "VALID"}),
    "2-D padded": (2, 5, (4, 5), (2, 3), {"padding": ((0, 2), (1, 0)), "kernel_dilation": (2, 1)}),
    "2-D grouped": (6, 4, (5, 4), (3, 2), {"feature_group_count": 2, "strides": (2, 1)}),
    "depthwise": (4, 4, (6,), (3,), {"feature_group_count": 4}),
}


def patches(x, size, window, options):
    """[tokens, *window, in] of a padded x [n, *size, in], by slices alone."""
    strides = np.broadcast_to(options.get("strides", 1), len(size))
    dilation = np.broadcast_to(options.get("kernel_dilation", 1), len(size))
    reach = [d * (w - 1) + 1 for d, w in zip(dilation, window, strict=True)]
    padding = options.get("padding", "SAME")
    if padding == "SAME":
        short = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, s, r in zip(size, strides, reach, strict=True)
        ]
        padding = [(n // 2, n - n // 2) for n in short]
    elif padding == "CAUSAL":
        padding = [(reach[0] - 1, 0)]
    elif padding == "VALID":
        padding = [(0, 0)] * len(size)
    x = np.pad(np.asarray(x, np.float64), [(0, 0), *padding, (0, 0)])
    counts = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    out = []
    for at in np.ndindex(*counts):
        parts = zip(at, strides, reach, dilation, strict=True)
        out.append(x[:, *(slice(a * s, a * s + r, d) for a, s, r, d in parts)])
    return np.concatenate(out)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    features, outputs, size, window, options = CONVOLUTIONS[name]
    model, x = nn.Conv(outputs, window, **options), normal(2, *size, features)
    params = variables_of(model, x)
    found = measured(model.apply, params, x, targets="**/kernel")["params/kernel"]
    seen = patches(x, size, window, options)
    groups = options.get("feature_group_count", 1)
    want = sum(gram(part, len(size) + 1) for part in np.split(seen, groups, -1))
    close(found, want)


def test_convolution_of_a_reversed_kernel_keeps_the_order_of_the_leaf():
    conv = lambda p, x: lax.conv_general_dilated(
        x, jnp.flip(p["w"], 0), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = normal(2, 7, 2)
    seen = patches(x, (7,), (3,), {"padding": "VALID"})
    close(measured(conv, {"w": normal(3, 2, 4)}, x)["w"], gram(seen[:, ::-1], 2))


def test_convolutions_that_are_not_covered():
    conv = lambda p, x, **options: lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options
    )
    params, x = {"w": normal(3, 2, 4)}, normal(4, 7, 2)
    for fn, options in (
        (conv, {"stack": {"w": 0}}),
        (lambda *a: conv(*a, batch_group_count=2), {}),
    ):
        with pytest.raises(lowrank.LowrankError, match="'w' cannot be measured.*conv_general"):
            measured(fn, params, x, **options)


# Experts.


def test_experts_each_with_its_own_input():
    fn = lambda p, x: jnp.tanh(jnp.einsum("bei,eio->beo", x, p["w"]))
    x = normal(7, 3, 4)
    close(measured(fn, {"w": normal(3, 4, 5)}, x)["w"], np.stack([gram(x[:, e]) for e in range(3)]))


def test_experts_that_share_an_input():
    fn = lambda p, x: jnp.tanh(jnp.einsum("bi,eio->beo", x, p["w"]))
    x, params = normal(7, 4), {"w": normal(3, 4, 5)}
    close(measured(fn, params, x)["w"], gram(x))  # they look like heads
    close(measured(fn, params, x, stack={"w": 0})["w"], np.stack([gram(x)] * 3))


def test_experts_in_groups_of_rows():
    fn = lambda p, x, sizes: jnp.tanh(lax.ragged_dot(x, p["w"], sizes))
    x, sizes = normal(7, 4), np.array([2, 0, 4], np.int32)  # the last row is nobody's
    found = measured(fn, {"w": normal(3, 4, 5)}, x, sizes)["w"]
    close(found, np.stack([gram(x[:2]), gram(x[:0]), gram(x[2:6])]))


def test_experts_in_groups_of_rows_are_stacked():
    fn = lambda p, x, sizes: jnp.tanh(lax.ragged_dot(x, p["w"], sizes))
    with pytest.raises(lowrank.LowrankError, match="'w' cannot be measured.*ragged_dot_general"):
        measured(fn, {"w": normal(3, 4, 5)}, X, np.array([2, 0, 3], np.int32), stack={"w": ()})


def test_experts_by_gathered_weights():
    fn = lambda p, x, which: jnp.tanh(jnp.einsum("ti,tio->to", x, p["w"][which]))
    x, which = normal(5, 4), np.array([2, 0, 2, 2, 0])
    found = measured(fn, {"w": normal(3, 4, 6)}, x, which)["w"]
    close(found, np.stack([gram(x[which == e]) for e in range(3)]))


# Uses.


def test_uses_add_up():
    fn = lambda p, x, y: jnp.tanh(x @ p["w"]).sum() + jnp.tanh(p["w"].T @ y).sum()
    x, y = normal(5, 4), normal(4, 3)
    close(measured(fn, {"w": normal(4, 6)}, x, y)["w"], gram(x) + gram(y.T))


def test_weights_scaled_or_stopped_have_their_inputs():
    fn = lambda p, x: jnp.tanh(x @ -p["w"]) + x @ lax.stop_gradient(p["w"])
    close(measured(fn, {"w": normal(4, 6)}, x := normal(5, 4))["w"], 2 * gram(x))


def test_inner_jits_add_up():
    block = jax.jit(lambda w, x: jnp.tanh(x @ w))
    w, x = normal(4, 4), normal(5, 4)
    found = measured(lambda p, x: block(p["w"], block(p["w"], x)), {"w": w}, x)["w"]
    close(found, gram(x) + gram(np.tanh(np.asarray(x, np.float64) @ np.asarray(w))))


def test_loops_and_branches_add_up():
    def fn(p, x):
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)
        return lax.cond(x.sum() > 1e9, lambda x: 2 * x @ p["w"], lambda x: 3 * x, x)

    w, x, want = normal(4, 4), normal(5, 4), 0
    h = np.asarray(x, np.float64)
    for _ in range(3):
        want, h = want + gram(h), np.tanh(h @ np.asarray(w, np.float64))
    close(measured(fn, {"w": w}, x)["w"], want)


def test_order_is_that_of_the_leaf():
    """A kernel transposed and flattened by the model is [*fan_in] of the leaf here."""
    fn = lambda p, x: jnp.tanh(x @ p["w"].transpose(2, 0, 1).reshape(6, 5))
    x = normal(7, 6)  # (third axis, first axis) of w
    seen = np.asarray(x).reshape(7, 3, 2).transpose(0, 2, 1)
    close(measured(fn, {"w": normal(2, 5, 3)}, x)["w"], gram(seen, 2))


def test_only_the_product_that_decides_the_axes_counts():
    def fn(p, tokens):
        x = p["table"][tokens] + 0.5
        return jnp.tanh(x @ p["table"].T), jnp.tanh(jax.nn.one_hot(tokens, 6) @ p["table"])

    table, tokens = normal(6, 4), np.array([1, 5, 1])
    plan = lowrank.plan(fn, {"table": table}, tokens)
    assert (plan["table"].fan_in, plan["table"].tied) == ((1,), True)
    close(
        measured(fn, {"table": table}, tokens, targets="table")["table"], gram(table[tokens] + 0.5)
    )


def test_a_row_has_no_input_of_its_own():
    """Of one input feature: what is left of the weight without that axis contracts another."""
    fn = lambda p, x, y: jnp.tanh(x @ p["w"]).sum() + jnp.tanh(p["w"][0] @ y).sum()
    x, y = normal(5, 1), normal(4, 3)
    close(measured(fn, {"w": normal(1, 4)}, x, y)["w"], gram(x))


def test_other_arguments_are_not_targets():
    """A keyword argument may be called as a leaf is, and static ones pass through."""
    fn = lambda p, x, *, w, double: jnp.tanh((x + w) @ p["w"]) * (2 if double else 1)
    config = lowrank.LoraConfig(rank=1, targets="w")
    x, w = normal(5, 4), normal(5, 4, seed=1)
    found = lowrank.covariances(fn, config)({"w": normal(4, 6)}, x, w=w, double=True)
    close(found["w"], gram(x + w))


def test_weights_of_dora_are_measured_too():
    fn, params, x = lambda p, x: jnp.tanh(x @ p["w"]), {"w": normal(4, 6)}, normal(5, 4)
    config = lowrank.LoraConfig(rank=1, targets="w", dora=True)
    base, _ = lowrank.init(jax.random.key(0), params, config)
    close(lowrank.covariances(fn, config)(base, x)["w"], gram(x))


SPANS = [
    "dense_general_many_axes",
    "conv_local_1d",
    "linen_scan_at_top_level",
    "scan_over_indices",
    "scan_in_scan",
    "cond_and_switch",
    "nnx_linear_general",
    "list_tuple_dataclass_pytree",
]


@pytest.mark.parametrize("row", [r for r in ROWS if r.name in SPANS], ids=lambda row: row.name)
def test_gradients_lie_in_the_span_of_the_inputs(row):
    """dW is a sum of outer products with the x of C: what C does not reach dW does not have."""
    fn, params, args = row.build()
    found = measured(fn, params, *args, targets=row.targets)
    total = lambda p: sum(jnp.sin(1.3 * out).sum() for out in jax.tree.leaves(fn(p, *args)))
    grads, empty = dict(flatten(jax.jit(jax.grad(total))(params))[0]), 0
    for path, (fan_in, fan_out, stack) in row.axes.items():
        size = found[path].shape[-1]
        grad = np.asarray(grads[path], np.float64).transpose(*stack, *fan_in, *fan_out)
        grad = grad.reshape(-1, size, np.prod(grad.shape[-len(fan_out) :]))
        measured_at = np.asarray(found[path], np.float64).reshape(-1, size, size)
        for c, g in zip(measured_at, grad, strict=True):
            values, vectors = np.linalg.eigh(c)
            outside = vectors[:, values < 1e-4 * values.max()]
            empty += outside.shape[1]
            assert np.abs(outside.T @ g).max(initial=0) < 1e-4 * np.abs(g).max()
    assert empty  # else the law says nothing


# Transformations and meshes.


@functools.cache
def scanned():
    fn = lambda p, x: lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p["w"])[0]
    params, x = {"w": normal(3, 4, 4)}, normal(6, 4)
    plan = lowrank.plan(fn, params, x)
    return lowrank.covariances(fn, lowrank.LoraConfig(rank=1), plan=plan), params, x


def test_jit_and_vmap():
    measure, params, x = scanned()
    want = np.asarray(measure(params, x)["w"])
    close(jax.jit(measure)(params, x)["w"], want)
    each = jax.vmap(measure, (None, 0))(params, x.reshape(2, 3, 4))
    close(np.asarray(each["w"]).sum(0), want)
    assert jax.eval_shape(measure, params, x)["w"].shape == (3, 4, 4)


def test_batches_add_up():
    measure, params, x = scanned()
    halves = measure(params, x[:2]), measure(params, x[2:])
    close(np.add(*(half["w"] for half in halves)), np.asarray(measure(params, x)["w"]))


def test_a_second_batch_compiles_nothing():
    traces = []

    def fn(p, x):
        traces.append(0)
        return jnp.tanh(x @ p["w"])

    measure = lowrank.covariances(fn, lowrank.LoraConfig(rank=1, targets="w"))
    for seed in range(2):
        measure({"w": normal(4, 6)}, normal(5, 4, seed=seed))
    assert len(traces) == 1


def test_equal_static_arguments_are_told_apart():
    scales = {"True": 2, "1": 3, "1.0": 4, "0.0": 5, "-0.0": 6}
    fn = lambda p, x, value: scales[str(value)] * x @ p["w"]
    keyed = lambda p, x, tree: scales[str(next(iter(tree)))] * x @ p["w"]
    config = lowrank.LoraConfig(rank=1, targets="w")
    params, x = {"w": normal(4, 6)}, normal(3, 4)
    measure, by_key = (lowrank.covariances(fn, config) for fn in (fn, keyed))
    for value in (True, 1, 1.0, 0.0, -0.0):
        want = scales[str(value)] ** 2 * gram(x)
        close(measure(params, x, value)["w"], want)
        close(by_key(params, x, {value: x})["w"], want)


def test_costs_the_forward_pass_and_the_squares(full_compile):
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])
    params, x = {"w": normal(96, 160), "v": normal(160, 48)}, normal(64, 96)
    measure = lowrank.covariances(fn, lowrank.LoraConfig(rank=1, targets=("w", "v")))
    cost = jax.jit(measure).lower(params, x).compile().cost_analysis()["flops"]
    products = 2 * 64 * (96 * 160 + 160 * 48 + 96 * 96 + 160 * 160)
    assert cost < 1.01 * products


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
def test_meshes(kind, spec):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2])
    fn, x = lambda p, x: jnp.tanh(x @ p["w"]), normal(6, 4)
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    measure = lowrank.covariances(fn, lowrank.LoraConfig(rank=1, targets="w"))
    x_spec, w_spec = (P("d"), P()) if spec == P("d") else (P(), spec)
    with jax.set_mesh(mesh):
        found = measure({"w": put(normal(4, 6), w_spec)}, put(x, x_spec))
    close(found["w"], gram(x))


# Errors: nothing goes unseen.

STACK = normal(2, 4, 4)
X = normal(5, 4)
stop = lax.stop_gradient
one_device = lambda f: jax.shard_map(
    f, mesh=jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]),
    in_specs=P(), out_specs=P(),
)  # fmt: skip
UNSEEN = {
    "argmax": (lambda p, x: jnp.argmax(x @ p["w"][0], -1), "argmax"),
    "stopped": (lambda p, x: stop(jnp.tanh(x @ p["w"][0])), "stop_gradient"),
    "one use stopped": (
        lambda p, x: jnp.tanh(x @ p["w"][0]) + stop(jnp.tanh(x @ p["w"][1])),
        r"- w: dot_general at test_covariances\.py",
    ),
    "stopped in a loop": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w) + stop(h @ w), None), x, p["w"])[0],
        "stop_gradient",
    ),
    "stopped in a loop with remat": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda h, w: (jnp.tanh(h @ w) + stop(h @ w), None)), x, p["w"]
        )[0],
        "stop_gradient",
    ),
    "stopped in a branch": (
        lambda p, x: lax.cond(
            x.sum() > 0, lambda x: x @ p["w"][0], lambda x: stop(x @ p["w"][1]), x
        ),
        "stop_gradient",
    ),
    "result not used": (lambda p, x: (x @ p["w"][0], jnp.tanh(x @ p["w"][1]))[1], "not used"),
    "by elements": (lambda p, x: jnp.tanh(x @ p["w"][0]) + x @ jnp.tanh(p["w"][1]), "'tanh' at"),
    "fan-in in parts": (
        lambda p, x: jnp.tanh(x @ p["w"][0]) + x[:, :2] @ p["w"][1, :2] + x[:, 2:] @ p["w"][1, 2:],
        "cannot be followed",
    ),
    "fan-in in a loop": (
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h + x @ w), None),
            jnp.einsum("bai,aio->bo", jnp.stack([x, x], 1), p["w"]),
            p["w"],
        )[0],
        "leading axis",
    ),
    "one feature": (
        lambda p, x: (
            jnp.tanh(x @ p["w"][0])[:, :2]
            + x @ p["w"].at[:, jnp.argmax(x)].get(mode="fill", fill_value=0).T
        ),
        "'gather' at",
    ),
    "two weights": (lambda p, x: jnp.tanh(x @ p["w"][0] @ (p["w"][0] @ p["w"][1])), "not smaller"),
    "shard_map": (
        lambda p, x: jnp.tanh(x @ p["w"][0]) + one_device(lambda w, x: x @ w[1])(p["w"], x),
        "'shard_map' at",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_nothing_goes_unseen(name):
    fn, message = UNSEEN[name]
    with pytest.raises(lowrank.LowrankError, match=message):
        measured(fn, {"w": STACK}, X)


def test_errors_name_leaf_and_remedy():
    config = lowrank.LoraConfig(rank=1, targets="w")
    tables = lambda p, i: p["w"][i]
    with pytest.raises(lowrank.ConfigError, match=r"'w' is a table .*exclude=\['w'\]"):
        measured(tables, {"w": normal(6, 4)}, np.array([1, 2]))
    with pytest.raises(
        lowrank.AxesError, match=r"pass plan(.|\n)*w: no product contracts its axes"
    ):
        lowrank.covariances(lambda p, x: jnp.tanh(x @ p["w"].T), config)({"w": normal(6, 4)}, X)
    with pytest.raises(lowrank.ConfigError, match=r"fn is a dict; expected a function"):
        lowrank.covariances({"w": STACK}, config)
    params = {"w": normal(4, 6)}
    tree = lowrank.combine(*lowrank.init(jax.random.key(0), params, config))
    with pytest.raises(lowrank.TreeError, match="already holds adapters"):
        lowrank.covariances(lambda p, x: x @ p["w"], config)(tree, X)

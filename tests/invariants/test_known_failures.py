"""Failures known from other adapter libraries, a test for each: what must not happen here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from models import NnxStack, Stacked, Tied, doubled, made, noisy, normal, of_nnx, variables_of

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIG = lowrank.LoraConfig(rank=2, alpha=3.0, targets="w")


def adapted(fn, params, *args, config=CONFIG):
    """(base, an adapter of noise, lifted) with alpha != rank; init is only asked for shapes."""
    plan = lowrank.plan(fn, params, *args)
    init = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan)[1]
    lora = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, params))
    return params, noisy(lora, scale=0.5), lowrank.lift(fn, fallback="raise")


def assert_agrees(fn, params, *args, config=CONFIG, rtol=2e-5):
    """The lifted call is the call on merged weights: value and gradients, without a fallback."""
    base, lora, lifted = adapted(fn, params, *args, config=config)
    live = lambda lora: lifted(lowrank.combine(base, lora), *args)
    merged = lambda lora: fn(lowrank.merge(base, lora), *args)

    def total(f, lora):
        out = f(lora)
        return out.sum(), out

    differentiate = lambda f: jax.grad(functools.partial(total, f), has_aux=True)
    got, want = jax.jit(lambda lora: [differentiate(f)(lora) for f in (live, merged)])(lora)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())
    jax.tree.map(close, got, want)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(got[0]))


# In JAX.


def test_an_earlier_product_of_the_same_shapes_hides_nothing():
    """qwix 0.1.8: after any earlier x @ y of the same shapes a module's x @ w gets no adapter."""
    x, y = normal(5, 5), normal(5, 5, seed=1)
    _ = x @ y
    _ = jax.jit(lambda x, y: x @ y)(x, y)
    assert_agrees(lambda p, x: (x @ y) @ p["w"], {"w": normal(5, 5, seed=2)}, x)


def test_an_activation_of_the_weights_shape_is_not_taken_for_it():
    """qwix: a (5, 5) activation beside a (5, 5) weight makes the adapter act twice."""
    fn = lambda p, x: jnp.sin(x @ x) @ p["w"] + x @ x
    assert_agrees(fn, {"w": normal(5, 5, seed=1)}, normal(5, 5))
    fn = lambda p, x: x @ p["w"]
    eye = np.eye(5, dtype=np.float32)
    base, lora, lifted = adapted(fn, {"w": normal(5, 5)}, eye)
    delta = np.subtract(lifted(lowrank.combine(base, lora), eye), base["w"])
    want = 1.5 * np.matmul(lora["w"].a, lora["w"].b)
    np.testing.assert_allclose(delta, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ p["w"].T,
        lambda p, x: p["w"] @ x.T,
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"][None])[0],
    ],
    ids=["transposed", "on the left", "scan over a stack"],
)
def test_no_use_of_a_weight_is_skipped_silently(fn):
    """qwix: no adapter, silently, for these."""
    assert_agrees(fn, {"w": normal(5, 5)}, normal(3, 5))


def test_what_no_rule_covers_is_said():
    """qwix: no adapter, silently, for custom_vjp and weight norm. Here: right, and a warning."""
    norm = lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))
    custom = lambda p, x: doubled(x, p["w"])
    x, params = normal(3, 5), {"w": normal(5, 4)}
    for fn in (norm, custom):
        base, lora, _ = adapted(fn, params, x)

        def both(lora, fn=fn, base=base):
            live = lowrank.lift(fn)(lowrank.combine(base, lora), x)
            return live, fn(lowrank.merge(base, lora), x)

        with pytest.warns(
            lowrank.MaterializeWarning, match=r"w: materialized at .*test_known_failures"
        ):
            got, want = jax.jit(both)(lora)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_linen_einsum_nnx_scan_and_top_level_scan():
    """qwix: Linen einsum raises, nnx.scan raises, a top-level nn.scan loses its scan."""
    linear = lowrank.LoraConfig(rank=2, alpha=3.0)
    kernels = lowrank.LoraConfig(rank=2, alpha=3.0, targets="**/kernel")
    einsum, x = nn.Einsum((3, 6, 4), "bti,hio->bhto"), normal(2, 5, 6)
    assert_agrees(einsum.apply, variables_of(einsum, x), x, config=kernels)
    fn, params, args = of_nnx(made(lambda: NnxStack(nnx.Rngs(0))), normal(2, 4))
    assert_agrees(fn, params, *args, config=linear)


def test_a_scan_stays_one_scan():
    """qwix: a top-level nn.scan loses its scan."""
    module, x = Stacked(), normal(2, 4)
    params = variables_of(module, x)
    config = lowrank.LoraConfig(rank=2, alpha=3.0)
    base, lora, lifted = adapted(module.apply, params, x, config=config)
    count = lambda fn, p: str(jax.make_jaxpr(fn)(p, x)).count("scan[")
    assert count(lifted, lowrank.combine(base, lora)) == count(module.apply, params) == 1


def test_factors_are_float32_over_a_bfloat16_model():
    """qwix: adapters take the compute dtype."""
    params = {"w": normal(5, 4, dtype=jnp.bfloat16)}
    x = normal(3, 5, dtype=jnp.bfloat16)
    base, lora, lifted = adapted(lambda p, x: x @ p["w"], params, x)
    assert lora["w"].a.dtype == lora["w"].b.dtype == jnp.float32
    assert lifted(lowrank.combine(base, lora), x).dtype == jnp.bfloat16


def test_dropout_acts_only_where_it_is_asked_for():
    """qwix: dropout acts at evaluation."""
    fn, x = (lambda p, x: x @ p["w"]), normal(3, 5)
    base, lora, lifted = adapted(fn, {"w": normal(5, 4)}, x)
    trained = lowrank.combine(base, lora, dropout=0.5, key=jax.random.key(0))
    plain = lifted(lowrank.combine(base, lora), x)
    assert np.any(lifted(trained, x) != plain)
    np.testing.assert_array_equal(lifted(lowrank.combine(base, lora), x), plain)
    with pytest.raises(lowrank.LowrankError, match="key"):
        lowrank.combine(base, lora, dropout=0.5)


@pytest.mark.parametrize("kind", ["dense", "attention", "embed", "conv", "remat", "reshape"])
def test_bfloat16_modules(kind):
    """quax 0.4.6's LoRA fails on bf16 Dense, MHA, Embed, Conv, remat, reshape, custom_vjp."""
    dtype = {"dtype": jnp.bfloat16}
    x = normal(2, 5, 6)
    if kind == "reshape":
        fn = lambda p, x: jnp.einsum(
            "btd,dhk->bthk", x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16).reshape(6, 2, 3)
        ).astype(jnp.float32)
        assert_agrees(fn, {"w": normal(6, 6)}, x, rtol=0.05)
        return
    module = {
        "dense": nn.Dense(4, **dtype),
        "attention": nn.MultiHeadDotProductAttention(num_heads=2, **dtype),
        "embed": nn.Embed(9, 4, **dtype),
        "conv": nn.Conv(4, (3,), **dtype),
        "remat": nn.remat(nn.Dense)(4, **dtype),
    }[kind]
    if kind == "embed":
        x = np.array([[1, 2, 2], [8, 0, 3]])
    fn = lambda p, x: module.apply(p, x).astype(jnp.float32)
    pattern = "**/embedding" if kind == "embed" else "**/kernel"
    config = lowrank.LoraConfig(rank=2, alpha=3.0, targets=pattern)
    assert_agrees(fn, variables_of(module, x), x, config=config, rtol=0.05)


def test_merge_leaves_the_callers_buffers_alone():
    """lorax merges destructively by default: the caller's buffers are deleted."""
    params, x = {"w": normal(5, 4)}, normal(3, 5)
    before = np.array(params["w"])
    base, lora, lifted = adapted(lambda p, x: x @ p["w"], params, x)
    merged = lowrank.merge(base, lora)
    lifted(lowrank.combine(base, lora), x)
    assert not params["w"].is_deleted()
    assert not lora["w"].a.is_deleted()
    np.testing.assert_array_equal(params["w"], before)
    assert np.any(merged["w"] != before)


def test_a_scanned_base_is_not_restacked():
    """MaxText: every adapter restacks the whole base under scan."""
    fn = lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    params, x = {"w": normal(3, 16, 16)}, normal(2, 16)
    base, lora, lifted = adapted(fn, params, x)
    run = lambda lora: lifted(lowrank.combine(base, lora), x)
    text = str(jax.make_jaxpr(run)(lora))
    # freezing the base, if anything, is all that may make an array of the stack's shape
    made = [line for line in text.splitlines() if ":f32[3,16,16] =" in line]
    assert all("stop_gradient" in line for line in made), made
    assert jax.eval_shape(run, lora).shape == (2, 16)


def test_merging_adds_in_float32_and_never_subtracts():
    """MaxText merges and unmerges in bf16, which changes 18% of entries (PyTorch)."""
    params = {"w": normal(16, 16, dtype=jnp.bfloat16)}
    base, lora = lowrank.init(jax.random.key(0), params, CONFIG)
    lora = noisy(lora, scale=0.3)
    merged = lowrank.merge(base, lora)["w"]
    node = lora["w"]
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    want = np.asarray(params["w"], np.float64) + node.scale * a @ b
    error = np.abs(np.asarray(merged, np.float64) - want)
    half_unit = np.abs(want) * float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert np.all(error <= half_unit * 1.01)
    assert base["w"] is params["w"]
    assert not hasattr(lowrank, "unmerge")


def test_the_adapter_is_scaled_wherever_it_acts():
    """EasyDeL: unwrapping adds an unscaled product. PEFT: alpha = r hid a forgotten scale."""
    params, x = {"w": normal(5, 4)}, np.asarray(normal(3, 5))
    base, lora, lifted = adapted(lambda p, x: x @ p["w"], params, x)
    node = lora["w"]
    assert node.scale == 1.5
    w, a, b = (np.asarray(leaf) for leaf in (params["w"], node.a, node.b))
    live = lifted(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(live, x @ w + 1.5 * (x @ a) @ b, rtol=1e-5, atol=1e-5)
    merged = lowrank.merge(base, lora)["w"]
    np.testing.assert_allclose(merged, w + 1.5 * a @ b, rtol=1e-5, atol=1e-5)


def _net():
    """A model, its parameters, and the loss of a combined tree."""
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["bias"]) @ p["head"] + p["steps"]
    params = {"w": normal(5, 4), "bias": normal(4), "head": normal(4, 3), "steps": np.int32(0)}
    x = normal(3, 5)
    base, lora, lifted = adapted(fn, params, x)
    return base, lora, lambda tree: jnp.square(lifted(tree, x)).mean()


def test_only_adapters_train_and_only_they_count_in_the_norm():
    """Flax: a filter on Param trains the base too. MaxText clips the base's gradients."""
    base, lora, loss = _net()
    clip = optax.clip_by_global_norm(1e-3)
    tx = lowrank.only_adapters(optax.chain(clip, optax.adam(0.1)))

    @jax.jit
    def step(tree):
        grads = jax.grad(loss, allow_int=True)(tree)
        only = lowrank.only_adapters(clip)
        clipped, _ = only.update(grads, only.init(tree), tree)
        updates, _ = tx.update(grads, tx.init(tree), tree)
        return optax.apply_updates(tree, updates), lowrank.partition(clipped)[1]

    new, clipped = step(lowrank.combine(base, lora))
    new_base, new_lora = lowrank.partition(new)
    for name in base:
        np.testing.assert_array_equal(new_base[name], base[name])
    assert np.any(np.not_equal(new_lora["w"].a, lora["w"].a))
    assert np.any(np.not_equal(new_lora["w"].b, lora["w"].b))
    # the clipped norm is the adapters' own: the head's gradient would have shrunk it
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(clipped)))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-5)


def test_frozen_leaves_get_no_raw_gradient_and_integers_are_welcome():
    """optax.masked passes raw gradients through for "frozen" leaves; jax.grad refuses integers."""
    base, lora, loss = _net()
    tree = lowrank.combine(base, lora)
    tx = lowrank.only_adapters(optax.sgd(0.1))

    @jax.jit
    def step(tree):
        grads = jax.grad(loss, allow_int=True)(tree)
        return grads, tx.update(grads, tx.init(tree), tree)[0]

    grads, updates = step(tree)
    assert grads["steps"].dtype == jax.dtypes.float0
    assert np.any(grads["head"])
    assert not np.any(updates["head"])
    assert not np.any(updates["w"].base)
    assert not np.any(updates["steps"])
    mask = lowrank.trainable_mask(tree)
    trained = [str(keys) for keys, on in jax.tree_util.tree_leaves_with_path(mask) if on]
    assert len(trained) == 2


# In PyTorch.


def test_a_target_that_matches_nothing_raises_with_near_misses():
    """PEFT: silent."""
    params = {"layers_0": {"q_proj": {"kernel": normal(5, 4)}}}
    config = lowrank.LoraConfig(rank=1, targets="layers_0/q_prj/kernel")
    with pytest.raises(lowrank.PatternError, match="layers_0/q_proj/kernel"):
        lowrank.init(jax.random.key(0), params, config)


def test_tied_embeddings_have_one_adapter_used_twice():
    """PEFT: merged and live differ; with ensure_weight_tying the update is added twice."""
    module, tokens = Tied(), np.array([[1, 2, 2], [8, 0, 3]])
    params = variables_of(module, tokens)
    use = lowrank.plan(module.apply, params, tokens)["params/embed/embedding"]
    assert use.tied
    assert use.uses == 2
    config = lowrank.LoraConfig(rank=2, alpha=3.0, targets="**/embedding")
    _, lora, _ = adapted(module.apply, params, tokens, config=config)
    assert len(jax.tree.leaves(lora)) == 2
    assert_agrees(module.apply, params, tokens, config=config)


def test_the_base_is_never_mutated():
    """PEFT's PiSSA and OLoRA change the base in place. Here init returns a new one."""
    halve = lambda key, weight, rank, scale: (
        weight[:, :rank],
        jnp.eye(rank, weight.shape[1]) / scale,
        weight - weight[:, :rank] @ jnp.eye(rank, weight.shape[1]),
    )
    params = {"w": normal(5, 4)}
    before = np.array(params["w"])
    base, lora = lowrank.init(jax.random.key(0), params, CONFIG, initializer=halve)
    np.testing.assert_array_equal(params["w"], before)
    assert np.any(base["w"] != before)
    assert base["w"] is not params["w"]
    np.testing.assert_allclose(lowrank.merge(base, lora)["w"], before, rtol=1e-6, atol=1e-6)


def test_an_adapter_of_another_model_is_refused():
    """Elsewhere an adapter merges onto another model unnoticed. Here every misfit is listed."""
    params = {"w": normal(5, 4), "v": normal(4, 4)}
    _, lora = lowrank.init(jax.random.key(0), params, CONFIG)
    with pytest.raises(lowrank.TreeError, match=r"w: .*\(5, 4\).*\(6, 4\)"):
        lowrank.merge({"w": normal(6, 4), "v": normal(4, 4)}, lora)
    with pytest.raises(lowrank.TreeError, match="w: in the adapter, not in the base"):
        lowrank.combine({"u": normal(5, 4)}, lora)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_dilation": 2},
        {"padding": "CIRCULAR"},
        {"padding": "REFLECT"},
        {"padding": "CAUSAL"},
        {"feature_group_count": 3},
        {"feature_group_count": 3, "kernel_dilation": 2, "strides": 2, "padding": 2},
    ],
    ids=str,
)
def test_convolutions_keep_their_options(options):
    """PEFT loses dilation and padding_mode, and cannot merge grouped convolutions."""
    module, x = nn.Conv(6, (3,), **options), normal(2, 7, 6)
    config = lowrank.LoraConfig(rank=2, alpha=3.0, targets="**/kernel")
    assert_agrees(module.apply, variables_of(module, x), x, config=config)


def test_gradient_checkpointing_keeps_every_gradient():
    """PEFT: gradient checkpointing loses the adapter's gradients."""
    fn = lambda p, x: jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]))(p, x)
    assert_agrees(fn, {"w": normal(5, 4)}, normal(3, 5))
    module, x = Stacked(), normal(2, 4)
    config = lowrank.LoraConfig(rank=2, alpha=3.0)
    assert_agrees(module.apply, variables_of(module, x), x, config=config)


def test_biases_and_rectangles():
    """Rectangular weights, a bias and alpha != r show what square weights and alpha = r hide."""
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["bias"])
    assert_agrees(fn, {"w": normal(7, 3), "bias": normal(3)}, normal(2, 7))


def test_dropout_draws_a_mask_for_each_layer_of_a_scan():
    """qwix and others: one mask for all layers. Two equal layers, two different results."""
    fn = lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]
    params, x = {"w": np.stack([normal(8, 4)] * 2)}, normal(3, 8)
    base, lora, lifted = adapted(fn, params, x)
    lora = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)[0]] * 2), lora)
    one, two = lifted(lowrank.combine(base, lora, dropout=0.5, key=jax.random.key(0)), x)
    assert np.any(one != two)


def test_forward_and_backward_multiply_by_the_same_weight():
    """bitsandbytes: with a bfloat16 weight and float32 compute they use different ones."""
    params = {"w": np.asarray(normal(64, 24, dtype=jnp.bfloat16))}
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"))
    lifted = lowrank.lift(lambda p, x: x @ p["w"].astype(jnp.float32), fallback="raise")

    @jax.jit
    def both(frozen):
        forward, back = jax.vjp(lambda x: lifted(frozen, x), jnp.eye(64))
        (backward,) = jax.vmap(lambda ct: back(jnp.zeros((64, 24)).at[0].set(ct)))(jnp.eye(24))
        return forward, backward[:, 0].T, lowrank.dequantize(frozen)["w"].astype(jnp.float32)

    forward, backward, dense = both(frozen)
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(forward, dense)

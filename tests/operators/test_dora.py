"""DoRA: the norm, its gradient, the frozen form, and refusals. PEFT: peft/test_golden_dora.py."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from models import noisy, normal

import lowrank_jax as lowrank
from lowrank_jax._operators.wrapping import compute_norms

pytestmark = pytest.mark.usefixtures("fast_compile")

RANK, ALPHA = 3, 4.5
CONFIG = lowrank.LoraConfig(rank=RANK, alpha=ALPHA, targets="w", dora=True)


def waves(key, weight, rank, scale):
    """An initializer that draws nothing."""
    a = np.cos(np.arange(weight.shape[0] * rank, dtype=np.float32)).reshape(-1, rank)
    return jnp.asarray(a), jnp.zeros((rank, weight.shape[1])), None


def made(fn, params, *args, quant=None, **changes):
    """base and an adapter that matters, of one leaf "w"."""
    plan = lowrank.plan(fn, params, *args)
    config = dataclasses.replace(CONFIG, **changes)
    if quant is not None:
        params = lowrank.quantize(jax.device_get(params), quant, plan=plan)
    start = lambda p: lowrank.init(jax.random.key(0), p, config, plan=plan, initializer=waves)
    base, lora = jax.jit(start)(params)
    return base, noisy(lora, scale=0.3)


def matmul(p, x):
    return x @ p["w"]


@functools.cache
def matrix(quant=None, shape=(6, 5)):
    x = normal(4, shape[0])
    return matmul, x, *made(matmul, {"w": normal(*shape)}, x, quant=quant)


def by_hand(w, node):
    """DoRA of a matrix [i, o] in NumPy, from equation 5, in float64."""
    whole = np.asarray(w, np.float64) + node.scale * np.asarray(node.a) @ np.asarray(node.b)
    return np.asarray(node.magnitude) * whole / np.linalg.norm(whole, axis=0)


# Norms.

EINSUMS = {
    "matrix": ("ti,io->to", (6, 5), {}),
    "two contracted": ("thi,hio->to", (2, 3, 5), {}),
    "two kept": ("ti,iho->tho", (6, 2, 4), {}),
    "stack in the middle": ("nti,ino->nto", (6, 3, 5), {}),
    "stack in front": ("nti,nio->nto", (3, 6, 5), {}),
}
BLOCKS = lowrank.QuantConfig(targets="w", block_size=32, double_quant=True)


@pytest.mark.parametrize("quant", [None, BLOCKS], ids=["dense", "codes"])
@pytest.mark.parametrize("name", EINSUMS)
def test_norms_are_those_of_the_dense_sum(name, quant):
    equation, shape, _ = EINSUMS[name]
    inputs, kernel = equation.split("->")[0].split(",")
    extent = dict(zip(kernel, shape, strict=True))
    if quant is not None:  # a fan-in that blocks fill, and one that they do not
        extent["i"] = 64 if name != "two kept" else 6
    shape = tuple(extent[axis] for axis in kernel)
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    x = normal(*({**extent, "t": 4}[axis] for axis in inputs))
    base, lora = made(fn, {"w": normal(*shape)}, x, quant=quant)
    node = lora["w"]

    @jax.jit
    def run(base, node):
        """The dense weight, the change of it, and the norms of the sum."""
        dense = lowrank.dequantize({"w": base.value})["w"]
        plain = dataclasses.replace(node, magnitude=None)
        delta = lowrank.merge({"w": np.zeros(shape, np.float32)}, {"w": plain})["w"]
        return dense, delta, compute_norms(base, node)

    dense, delta, norms = run(base["w"], node)
    dense, delta = np.asarray(dense, np.float64), np.asarray(delta, np.float64)
    want = np.sqrt(np.sum((dense + delta) ** 2, node.fan_in))  # the fan-out and stack axes, sorted
    rest = sorted((*node.stack, *node.fan_out))
    want = want.transpose([rest.index(axis) for axis in (*node.stack, *node.fan_out)])
    np.testing.assert_allclose(norms, want, rtol=2e-6)
    squares = np.sum(dense**2, node.fan_in).transpose(
        [rest.index(axis) for axis in (*node.stack, *node.fan_out)]
    )
    np.testing.assert_allclose(base["w"].squares, squares, rtol=2e-6)


def test_a_matrix_is_what_equation_5_says():
    fn, x, base, lora = matrix()
    want = by_hand(base["w"].value, lora["w"])
    np.testing.assert_allclose(lowrank.merge(base, lora)["w"], want, rtol=1e-5, atol=1e-6)
    got = lowrank.lift(fn)(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(got, np.asarray(x) @ want, rtol=1e-5, atol=1e-5)


def test_the_norm_is_a_constant_to_the_gradient():
    """Section 4.3: with c = m / n held, dL/da = s c (x^T g) b^T; leaving n in changes it."""
    fn, x, base, lora = matrix()
    g = normal(4, 5, seed=3)
    loss = lambda lora: jnp.sum(lowrank.lift(fn)(lowrank.combine(base, lora), x) * g)
    got, node = jax.grad(loss)(lora)["w"], lora["w"]
    whole = np.asarray(base["w"].value) + node.scale * np.asarray(node.a @ node.b)
    norms = np.linalg.norm(whole, axis=0)
    c = np.asarray(node.magnitude) / norms
    dense = np.asarray(x).T @ (np.asarray(g) * c)
    np.testing.assert_allclose(got.a, node.scale * dense @ np.asarray(node.b).T, rtol=1e-4)
    np.testing.assert_allclose(got.b, node.scale * np.asarray(node.a).T @ dense, rtol=1e-4)
    free = np.sum((np.asarray(x) @ whole) * np.asarray(g), 0) / norms
    np.testing.assert_allclose(got.magnitude, free, rtol=1e-4)


def test_a_column_of_zeros_stays_finite():
    params = {"w": normal(6, 5).at[:, 2].set(0)}
    x = normal(4, 6)
    plan = lowrank.plan(matmul, params, x)
    base, lora = lowrank.init(jax.random.key(0), params, CONFIG, plan=plan)
    loss = lambda lora: jnp.sum(lowrank.lift(matmul)(lowrank.combine(base, lora), x) ** 2)
    value, gradient = jax.value_and_grad(loss)(lora)
    chex.assert_tree_all_finite((value, gradient))
    chex.assert_trees_all_equal(lowrank.merge(base, lora), params)


def test_an_adapter_that_cancels_the_weight_stays_finite():
    """W + s a b of rank 0: the factored norm is a difference of equal numbers."""
    base, lora = made(matmul, {"w": normal(4, 5)}, normal(2, 4), rank=4)
    node = dataclasses.replace(lora["w"], a=jnp.eye(4), b=-base["w"].value / lora["w"].scale)
    assert np.all(np.isfinite(compute_norms(base["w"], node)))
    chex.assert_tree_all_finite(lowrank.merge(base, {"w": node}))


# Trees.


def test_init_carries_squared_norms_and_magnitudes():
    params = {"w": normal(6, 5), "bias": normal(5)}
    fn = lambda p, x: x @ p["w"] + p["bias"]
    plan = lowrank.plan(fn, params, normal(4, 6))
    base, lora = lowrank.init(jax.random.key(0), params, CONFIG, plan=plan)
    assert isinstance(base["w"], lowrank.Normed)
    assert base["bias"] is params["bias"]
    chex.assert_trees_all_equal(base["w"].value, params["w"])
    np.testing.assert_allclose(lora["w"].magnitude, np.linalg.norm(params["w"], axis=0), rtol=1e-6)
    shapes = jax.eval_shape(lambda p: lowrank.init(jax.random.key(0), p, CONFIG, plan=plan), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, (base, lora))
    again, _ = lowrank.init(jax.random.key(0), base, dataclasses.replace(CONFIG, dora=False))
    chex.assert_trees_all_equal(again, params)


def test_magnitudes_stay_in_float32():
    """In bfloat16 they could not move by less than 0.4%."""
    params = {"w": normal(6, 5, dtype=jnp.bfloat16)}
    config = dataclasses.replace(CONFIG, factor_dtype="bfloat16")
    _, lora = lowrank.init(jax.random.key(0), params, config)
    assert lora["w"].a.dtype == jnp.bfloat16
    assert lora["w"].magnitude.dtype == jnp.float32


def test_raw_parameters_serve_as_base():
    fn, x, base, lora = matrix()
    raw = {"w": base["w"].value}
    live = lambda base: lowrank.lift(fn)(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(live(base), live(raw), rtol=1e-5, atol=1e-6)
    merged = lowrank.merge(raw, lora)["w"]
    np.testing.assert_allclose(lowrank.merge(base, lora)["w"], merged, rtol=1e-5, atol=1e-6)
    assert lowrank.fingerprint(base) == lowrank.fingerprint(raw)
    again, same = lowrank.partition(lowrank.combine(base, lora))
    assert again["w"] is base["w"]
    assert same["w"] is lora["w"]


def test_norms_of_an_adapter_with_other_axes_are_computed_anew():
    _, _, base, lora = matrix(shape=(5, 5))
    node = lora["w"]
    turned = dataclasses.replace(node, fan_in=(1,), fan_out=(0,))
    fresh = lowrank.merge({"w": base["w"].value}, {"w": turned})
    chex.assert_trees_all_equal(lowrank.merge(base, {"w": turned}), fresh)


def test_scale_multiplies_the_change_of_magnitude_too():
    fn, x, base, lora = matrix()
    apply = jax.jit(lambda scale: lowrank.lift(fn)(lowrank.combine(base, lora, scale=scale), x))
    plain, full = jax.jit(fn)({"w": base["w"].value}, x), apply(1.0)
    np.testing.assert_allclose(apply(0.0), plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(apply(0.25), plain + 0.25 * (full - plain), rtol=1e-5, atol=1e-5)
    merged = lowrank.merge(base, lora, scale=0.25)
    np.testing.assert_allclose(apply(0.25), x @ merged["w"], rtol=1e-5, atol=1e-5)


def test_dropout_leaves_the_bases_own_product_alone():
    """E[y] is the undropped y; with an adapter of no effect every mask gives the base's output."""
    fn, x, base, lora = matrix()
    apply = jax.jit(
        jax.vmap(
            lambda key, lora: lowrank.lift(fn)(
                lowrank.combine(base, lora, dropout=0.5, key=key), x
            ),
            in_axes=(0, None),
        )
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    many, want = apply(keys, lora), lowrank.lift(fn)(lowrank.combine(base, lora), x)
    error = np.abs(many.mean(0) - want) / (many.std(0) / np.sqrt(len(keys)))
    assert error.max() < 4.5
    assert many.std(0).min() > 0.1
    _, fresh = lowrank.init(jax.random.key(0), {"w": base["w"].value}, CONFIG)
    # an entry is a sum of six terms that may cancel: it is rounded by what they add up to
    factors = [np.asarray(factor, np.float64) for factor in (x, base["w"].value)]
    plain, terms = factors[0] @ factors[1], np.abs(factors[0]) @ np.abs(factors[1])
    error = np.abs(np.asarray(apply(keys[:8], fresh)) - plain)
    assert np.all(error <= 4 * np.finfo(np.float32).eps * terms)


def test_initializers_that_move_weight_keep_the_function():
    params, x = {"w": normal(6, 5)}, normal(4, 6)
    half = lambda key, w, rank, scale: (
        jnp.eye(*w.shape[:1], rank),
        w[:rank] / (2 * scale),
        w.at[:rank].multiply(0.5),
    )
    base, lora = lowrank.init(jax.random.key(0), params, CONFIG, initializer=half)
    np.testing.assert_allclose(lora["w"].magnitude, np.linalg.norm(params["w"], axis=0), rtol=1e-6)
    got = lowrank.lift(matmul)(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(got, x @ params["w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(base["w"].squares, np.sum(np.square(base["w"].value), 0), rtol=1e-5)


# The frozen form.


def products(fn, *args):
    """How many products a traced function has, loops counted once."""
    text = str(jax.make_jaxpr(fn)(*args))
    return (
        text.count("dot_general")
        + text.count("lowrank_bilinear")
        + text.count("lowrank_quantized_dot")
    )


@pytest.mark.parametrize("quant", [None, BLOCKS], ids=["dense", "codes"])
def test_folded_norms_cost_what_lora_costs(quant):
    fn, x, base, lora = matrix(quant, shape=(64, 5))
    folded = lowrank.fold_norms(base, lora)
    live = lambda lora: lowrank.lift(fn)(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(live(folded), live(lora), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        lowrank.merge(base, folded)["w"], lowrank.merge(base, lora)["w"], rtol=1e-5, atol=1e-6
    )
    plain = {"w": dataclasses.replace(lora["w"], magnitude=None)}
    assert products(live, folded) == products(live, plain) < products(live, lora)
    raw = lowrank.partition(lowrank.combine({"w": base["w"].value}, folded))[0]
    assert not isinstance(raw["w"], lowrank.Normed), "the frozen form needs no norm of the base"


def test_folding_twice_and_folding_lora():
    _, _, base, lora = matrix()
    once = lowrank.fold_norms(base, lora)
    chex.assert_trees_all_equal(lowrank.fold_norms(base, once), once)
    with pytest.raises(lowrank.TreeError, match="no magnitude"):
        lowrank.fold_norms(base, {"w": dataclasses.replace(lora["w"], magnitude=None)})


def test_adapters_of_one_base_are_swapped_by_vmap():
    fn, x, base, lora = matrix()
    loras = [noisy(lora, seed=i) for i in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loras)
    live = lambda lora, x: lowrank.lift(fn)(lowrank.combine(base, lora), x)
    folded = jax.vmap(lowrank.fold_norms, (None, 0))(base, many)
    for tree in (many, folded):
        got = jax.vmap(live)(tree, jnp.stack([x, 2 * x, -x]))
        for i, factor in enumerate((1, 2, -1)):
            np.testing.assert_allclose(got[i], live(loras[i], factor * x), rtol=1e-5, atol=1e-5)


# Where the norm is taken.


@pytest.mark.parametrize("quant", [None, BLOCKS], ids=["dense", "codes"])
def test_no_loop_takes_the_norm_again(quant):
    """In scan and remat the body holds LoRA's products alone, forward and backward."""
    layers, x = {"w": normal(3, 64, 64)}, normal(4, 64)

    def fn(p, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return lax.scan(body, x, p["w"])[0]

    base, lora = made(fn, layers, x, quant=quant)
    loss = lambda lora: jnp.sum(lowrank.lift(fn)(lowrank.combine(base, lora), x))
    plain = {"w": dataclasses.replace(lora["w"], magnitude=None)}

    def in_loops(lora):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(lora)
        scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 3]
        bodies = [str(e.params["jaxpr"]) for e in scans]
        return [body for body in bodies if "tanh" in body or "bilinear" in body]

    count = lambda texts: [
        sum(t.count(n) for n in ("dot_general[", "lowrank_bilinear[", "lowrank_quantized_dot["))
        for t in texts
    ]
    assert count(in_loops(lora)) == count(in_loops(plain))


# Devices.


def eight(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def scan_of(whole):
    back = normal(8, 256, seed=5, scale=0.3)

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(whole(x @ w) @ back), None), x, p["w"])[0]

    return fn


def slopes_of(fn):
    loss = lambda base, lora, x: jnp.sum(lowrank.lift(fn)(lowrank.combine(base, lora), x) ** 2)
    return jax.value_and_grad(loss, argnums=1)


@functools.cache
def scanned(quant):
    """Base, adapter, input, and on one device the loss and its gradient."""
    fn, x = scan_of(lambda y: y), normal(8, 256)
    base, lora = made(fn, {"w": normal(3, 256, 8, scale=0.05)}, x, quant=quant)
    return base, lora, x, jax.jit(slopes_of(fn))(base, lora, x)


SPLITS = [P(None, "data", "model"), P(None, "data", None), P(None, None, "data")]


@pytest.mark.parametrize("quant", [None, BLOCKS], ids=["dense", "codes"])
@pytest.mark.parametrize(
    ("kind", "spec"),
    # on an explicit mesh the model itself would have to say what becomes of a split contraction
    [*((AxisType.Auto, spec) for spec in SPLITS), (AxisType.Explicit, SPLITS[-1])],
)
def test_sharded_bases(kind, spec, quant):
    """A scanned stack split over inputs and outputs: values and gradients are one device's."""
    base, lora, x, want = scanned(quant)
    whole = (lambda y: jax.reshard(y, P())) if kind == AxisType.Explicit else lambda y: y
    mesh = eight(kind)
    with jax.set_mesh(mesh):
        layout = {"w": jax.NamedSharding(mesh, spec)}
        put = lambda tree: jax.device_put(jax.device_get(tree), lowrank.specs(tree, layout))
        step = jax.jit(slopes_of(scan_of(whole)))
        got = step(put(base), put(lora), np.asarray(x))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        largest = np.abs(other).max()
        np.testing.assert_allclose(one / largest, other / largest, atol=2e-5)


def test_inside_shard_map_a_part_of_the_inputs_needs_types():
    fn, x, base, lora = matrix(shape=(8, 4))
    mesh = eight(AxisType.Auto)

    def apply(spec, summed, check_vma=True):
        layout = {"w": spec}
        run = lambda base, lora, x: summed(lowrank.lift(fn)(lowrank.combine(base, lora), x))
        specs = lowrank.specs(base, layout), lowrank.specs(lora, layout)
        entry = spec[0] if len(spec) else None
        mapped = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(*specs, P(None, entry)),
            out_specs=P(None, *spec[1:]),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(base, lora, x)

    want = jax.jit(lambda lora: lowrank.lift(fn)(lowrank.combine(base, lora), x))(lora)
    summed = functools.partial(lax.psum, axis_name="data")
    for got in (apply(P(None, "model"), lambda y: y), apply(P("data", None), summed)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(lowrank.TreeError, match="here are 2 of the 8 weights"):
        apply(P("data", None), summed, check_vma=False)


def test_a_magnitude_of_another_model_is_refused():
    fn, x, base, lora = matrix()
    wrong = {"w": dataclasses.replace(lora["w"], magnitude=jnp.ones(7))}
    with pytest.raises(lowrank.TreeError, match=r"'w': DoRA's magnitude has shape \(7,\)"):
        lowrank.lift(fn)(lowrank.combine(base, wrong), x)


def test_report_says_dora():
    fn, x, base, lora = matrix()
    report = lowrank.report(fn, lowrank.combine(base, lora), x)
    assert report["w"].kind == "DoRA"
    assert report["w"].trainable == 6 * RANK + RANK * 5 + 5
    assert report["w"].how == "factored 1×"
    assert report.frozen == 30

"""Invariants: what holds of every model in tests/support/models.py under every transformation.

lift(f)(combine(base, lora), x) == f(merge(base, lora), x) in value and in the gradient of every
factor; bit for bit the frozen model at step 0; through jit, vmap over adapters, jvp and checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import (
    CASES,
    CODES,
    DORA,
    PLAIN,
    VARIANTS,
    Case,
    linen,
    mlp_all_linear_leaves_the_head,
    noisy,
    normal,
    one_device_mesh,
)
from models import Stacked as StackedLinen

import lowrank_jax as lowrank
from lowrank_jax import _codecs

# for all or none: a program compiled for one test serves the next, and bits are compared
pytestmark = pytest.mark.usefixtures("fast_compile")

# Both sides round; they differ by a few roundings for each product on the way, each of half a unit
# in the last place of a number no larger than the largest entry. The cases have at most six
# products in a chain (forward and backward), whose sums of at most 60 terms are kept in float32.
ROUNDINGS = {jnp.float32: 100, jnp.bfloat16: 8, jnp.float16: 8}

# XLA on CPU compiles a small loop on its own, with another tanh; and it fuses elementwise code into
# products, and rounds the result as it pleases.
LOOPS = {"xla_disable_hlo_passes": "small-while-loop-hoisting"}
UNFUSED = {"xla_disable_hlo_passes": "small-while-loop-hoisting,fusion,cpu-instruction-fusion"}
# alpha != rank, and neither divides the other: a forgotten or doubled scale cannot hide.
RANK, ALPHA = 2, 3.0


def tolerance(dtype: Any, chains: int = 1) -> float:
    """Relative to the largest entry."""
    return chains * ROUNDINGS[dtype] * float(jnp.finfo(dtype).eps)


def assert_close(got: Any, want: Any, dtype: Any, chains: int = 1, terms: Any = None) -> None:
    """Same structure, shapes and dtypes; each leaf within rounding of its largest entry.

    Of a leaf that is a sum which cancels, `terms` has the magnitudes of what is summed.
    """
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    terms = want if terms is None else terms
    for x, y, z in zip(*map(jax.tree.leaves, (got, want, terms)), strict=True):
        if jnp.issubdtype(y.dtype, jnp.floating):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            largest = max(*(np.abs(v).max(initial=0.0) for v in (y, np.asarray(z))), 1e-30)
            chex.assert_trees_all_close(
                x / largest, y / largest, rtol=0, atol=tolerance(dtype, chains)
            )
        else:
            chex.assert_trees_all_equal(x, y)


def perturbed(lora: Any, seed: int = 0) -> Any:
    """Factors that matter: random, neither of them zero."""
    return noisy(lora, seed, scale=0.3)


def waves(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.cos(np.arange(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)


def loss_of(fn: Callable, has_aux: bool = False) -> Callable:
    """A scalar of every floating result of fn, each entry with a weight of its own.

    With has_aux the results themselves too.
    """

    def loss(*args: Any) -> Any:
        out = fn(*args)
        leaves = [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.floating)]
        weigh = lambda y: jnp.sum(y.astype(jnp.float32) * waves(y.shape))
        total = functools.reduce(jnp.add, map(weigh, leaves))
        return (total, out) if has_aux else total

    return loss


def ramp(key: Any, weight: Any, rank: int, scale: float) -> Any:
    """An initializer of one's own, which draws nothing and so compiles in no time."""
    del key, scale
    a = waves((weight.shape[0], rank)) / weight.shape[0] ** 0.5
    return a, np.zeros((rank, weight.shape[1]), np.float32), None


class BuiltCase:
    """One case, built once: the dense model, its lifted twin, and a perturbed adapter."""

    def __init__(self, definition: Case, dora: bool = False):
        self.definition = definition
        self.fn, self.params, self.args = definition.build()
        self.config = lowrank.LoraConfig(
            rank=RANK, alpha=ALPHA, targets=definition.targets, stack=definition.stack, dora=dora
        )
        self.plan = lowrank.plan(self.fn, self.params, *self.args)
        self.base, self.fresh = lowrank.init(
            jax.random.key(0), self.params, self.config, plan=self.plan, initializer=ramp
        )
        self.lora = perturbed(self.fresh)
        self.materialized = definition.materialized
        self.lifted = lowrank.lift(self.fn, fallback="silent" if self.materialized else "raise")
        self.dense = jax.jit(self.fn)

    def live(self, lora: Any) -> Any:
        return self.lifted(lowrank.combine(self.base, lora), *self.args)

    def merged(self, lora: Any) -> Any:
        return self.fn(lowrank.merge(self.base, lora), *self.args)

    def differentiate(self, fn: Callable, has_aux: bool = False) -> Callable:
        """The gradient by reverse mode, or by forward mode where there is no other."""
        transform = jax.grad if self.definition.reverse else jax.jacfwd
        return transform(loss_of(fn, has_aux), has_aux=has_aux)

    @functools.cached_property
    def lively(self) -> Callable:
        """(base, adapter) -> (gradient, results) of the lifted model."""
        on = lambda base, lora: self.lifted(lowrank.combine(base, lora), *self.args)
        both = lambda base, lora: self.differentiate(functools.partial(on, base), True)(lora)
        return jax.jit(both, compiler_options=LOOPS)

    @functools.cached_property
    def reference_on(self) -> Callable:
        """(base, adapter) -> (gradient, results, parameters) merged, on any dense base."""

        def all_three(base: Any, lora: Any) -> tuple[Any, Any, Any]:
            merged = lambda lora: self.fn(lowrank.merge(base, lora), *self.args)
            return *self.differentiate(merged, True)(lora), lowrank.merge(base, lora)

        return jax.jit(all_three, compiler_options=LOOPS)

    @functools.cached_property
    def reference(self) -> Callable:
        """adapter -> (gradient, results, parameters) of the merged model."""
        return functools.partial(self.reference_on, self.base)

    def gradient_of_merged(self, lora: Any) -> Any:
        return self.reference(lora)[0]

    def assert_gradient_close(self, got: Any, lora: Any) -> None:
        """Against the merged model's; of a magnitude relative to the terms that it sums.

        m's gradient is sum(W_eff * G, fan-in) / m, G the gradient of the dense weight; a model that
        norms its weight or its activations makes that sum zero, but for rounding.
        """
        want, _, merged = self.reference(lora)
        terms = self.terms(want, lora, merged) if self.definition.normed else want
        assert_close(got, want, self.definition.dtype, terms=terms)

    def terms(self, gradient: Any, lora: Any, merged: Any) -> Any:
        """The gradient with the magnitudes of its terms in place of each magnitude's."""
        weights = nodes_of_dense(merged)
        slopes = nodes_of_dense(self.slopes(merged))
        adapters = nodes(lora)

        def summed(path: str, node: Any) -> Any:
            if node.magnitude is None:
                return node
            sums = np.abs(np.asarray(weights[path], np.float64) * slopes[path])
            sums = sums.sum(node.fan_in).reshape(node.magnitude.shape)
            return dataclasses.replace(node, magnitude=sums / np.abs(adapters[path].magnitude))

        put = lambda keys, node: summed(path_of(keys), node) if is_node(node) else node
        return jax.tree_util.tree_map_with_path(put, gradient, is_leaf=is_node)

    @functools.cached_property
    def slopes(self) -> Callable:
        """The gradient of the dense model."""
        loss = loss_of(lambda params: self.fn(params, *self.args))
        return jax.jit(jax.grad(loss, allow_int=True), compiler_options=LOOPS)


class QuantizedCase(BuiltCase):
    """The same model on a base of 4-bit codes, in blocks of two: these models are small.

    The reference is the dense model on the values that the codes stand for. Leaves whose fan-in is
    odd are kept flat.
    """

    def __init__(self, definition: Case, dora: bool = False):
        self.definition = definition
        self.of = build_case(definition.name + DORA * dora)
        self.fn, self.args, self.plan = self.of.fn, self.of.args, self.of.plan
        self.fresh, self.lora = self.of.fresh, self.of.lora
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_codecs.formats, "BLOCK_SIZES", (2,))
            quant = lowrank.QuantConfig(targets=tuple(definition.axes), block_size=2)
            on_host = jax.tree.map(np.asarray, self.of.params)  # where encoding compiles nothing
            self.base = lowrank.quantize(on_host, quant, plan=self.plan)
        self.materialized = definition.materialized
        self.lifted = lowrank.lift(self.fn, fallback="silent" if self.materialized else "raise")

    @functools.cached_property
    def reference(self) -> Callable:
        return functools.partial(self.of.reference_on, jax.jit(lowrank.dequantize)(self.base))


@functools.cache
def build_case(name: str) -> BuiltCase:
    """The case of a name, which ends as one of VARIANTS."""
    kind = QuantizedCase if name.endswith(CODES) else BuiltCase
    name = name.removesuffix(CODES)
    definition = next(case for case in CASES if case.name == name.removesuffix(DORA))
    return kind(definition, dora=name.endswith(DORA))


SLOW = (pytest.mark.slow,)


def select_cases(
    field: str,
    variants: tuple[str, ...] = VARIANTS,
    wanted: Callable[[Case, str], bool] = lambda case, variant: True,
) -> list[Any]:
    """Names of all cases in these variants; slow, but for those that the field lists."""
    return [
        pytest.param(case.name + variant, marks=() if variant in getattr(case, field) else SLOW)
        for variant in variants
        for case in CASES
        if (case.dora or DORA not in variant) and wanted(case, variant)
    ]


@pytest.fixture(params=[case.name for case in CASES])
def case(request) -> BuiltCase:
    return build_case(request.param)


@pytest.fixture(params=select_cases("values"))
def any_case(request) -> BuiltCase:
    """Every case, on a quantized base and with DoRA too."""
    return build_case(request.param)


# XLA of jaxlib 0.10, without its pass named fusion, compiles even some plain models wrongly.
PARTLY_FUSED = {"xla_disable_hlo_passes": "small-while-loop-hoisting,cpu-instruction-fusion"}
NOT_QUANTIZED = (PLAIN, DORA)


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def part(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def is_node(x: Any) -> bool:
    return isinstance(x, lowrank.LowRank | lowrank.Full)


def nodes(lora: Any) -> dict[str, lowrank.LowRank]:
    keyed = jax.tree_util.tree_leaves_with_path(lora, is_leaf=is_node)
    return {path_of(keys): node for keys, node in keyed}


def path_of(keys: Any) -> str:
    names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    return "/".join(names[:-1] if names[-1] == "value" else names)


def test_adapts_these_leaves_and_no_other(case):
    found = {path: (n.fan_in, n.fan_out, n.stack) for path, n in nodes(case.fresh).items()}
    assert found == dict(case.definition.axes)
    for node in nodes(case.fresh).values():
        assert node.scale == ALPHA / RANK
        assert node.a.dtype == node.b.dtype == jnp.float32
    chex.assert_trees_all_equal(case.base, case.params)


@pytest.mark.parametrize(
    "name", select_cases("values", NOT_QUANTIZED, lambda case, variant: variant not in case.fused)
)
def test_exact_at_step_0(name):
    """Bit for bit: of the merged model too, whose parameters are then those of the dense one."""
    case = build_case(name)
    (_, got), (_, want, merged) = case.lively(case.base, case.fresh), case.reference(case.fresh)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(merged, case.params)


@pytest.mark.parametrize("name", select_cases("optimized", NOT_QUANTIZED))
def test_exact_at_step_0_with_all_optimizations(name, full_compile):
    """Bit for bit, where XLA rounds both programs alike: what it fuses it may round once less."""
    case = build_case(name)
    options = PARTLY_FUSED if case.definition.miscompiled else UNFUSED
    live = lambda base, lora: case.lifted(lowrank.combine(base, lora), *case.args)
    got = jax.jit(live, compiler_options=options)(case.base, case.fresh)
    dense = lambda params: case.fn(params, *case.args)
    want = jax.jit(dense, compiler_options=options)(case.params)
    chex.assert_trees_all_equal(got, want)


def test_value_and_gradient(any_case):
    case = any_case
    gradient, got = case.lively(case.base, case.lora)
    want = case.reference(case.lora)[1]
    assert_close(got, want, case.definition.dtype)
    case.assert_gradient_close(gradient, case.lora)
    for path, node in nodes(gradient).items():
        assert np.any(node.a), f"no gradient for a of {path}"
        assert np.any(node.b), f"no gradient for b of {path}"
        assert node.magnitude is None or np.any(node.magnitude), f"of the magnitude of {path}"
    pairs = zip(*map(jax.tree.leaves, (want, case.reference(case.fresh)[1])), strict=True)
    change = max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in pairs)
    assert change > 1e-2, "the adapter changes nothing: the comparison would say nothing"


@pytest.mark.parametrize("name", select_cases("eager"))
def test_eager_calls(name):
    case = build_case(name)
    assert_close(case.live(case.lora), case.reference(case.lora)[1], case.definition.dtype)


@pytest.mark.parametrize("name", select_cases("checkpoint"))
def test_checkpoint_under_vmap_over_adapters(name):
    case = build_case(name)
    loras = [perturbed(case.fresh, seed=10 * i) for i in range(2)]
    gradient = case.differentiate(jax.checkpoint(case.live))
    if case.definition.vmap:
        got = jax.jit(jax.vmap(gradient))(stacked(loras))
    else:
        got = stacked(list(map(jax.jit(gradient), loras)))
    for i, lora in enumerate(loras):
        case.assert_gradient_close(part(got, i), lora)


@pytest.mark.parametrize("name", select_cases("transforms", wanted=lambda case, _: case.forward))
def test_jvp(name):
    case = build_case(name)
    tangent = jax.tree.map(lambda x: jax.device_put(waves(x.shape, x.dtype)), case.lora)
    _, got = jax.jit(lambda lora: jax.jvp(loss_of(case.live), (lora,), (tangent,)))(case.lora)
    gradient = case.gradient_of_merged(case.lora)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
    terms = [np.asarray(x) * y for x, y in pairs]
    size = sum(np.abs(term).sum() for term in terms)
    assert abs(got - sum(term.sum() for term in terms)) <= tolerance(case.definition.dtype) * size


def test_fallback_names_what_it_builds(any_case):
    case = any_case
    tree = lowrank.combine(case.base, case.lora)
    if not case.materialized:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(lowrank.lift(case.fn), tree, *case.args)
        return
    with pytest.raises(lowrank.MaterializeError) as error:
        jax.eval_shape(lowrank.lift(case.fn, fallback="raise"), tree, *case.args)
    assert any(repr(path) in str(error.value) for path in case.materialized)
    lifted = lowrank.lift(case.fn, fallback="warn")
    with pytest.warns(lowrank.MaterializeWarning) as caught:
        jax.eval_shape(lifted, tree, *case.args)
    said = [str(w.message) for w in caught]
    assert len(said) == len(set(said))
    assert {s.split(":")[0] for s in said} == set(case.materialized)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lifted, tree, *case.args)


def test_structural_verbs(case):
    """combine and partition are inverse; eval_shape of init tells the real shapes."""
    base, lora = lowrank.partition(lowrank.combine(case.base, case.lora))
    chex.assert_trees_all_equal(base, case.base)
    chex.assert_trees_all_equal(lora, case.lora)
    shapes = jax.eval_shape(
        lambda key, params: lowrank.init(key, params, case.config, plan=case.plan),
        jax.random.key(0),
        case.params,
    )
    chex.assert_trees_all_equal_structs(shapes[1], case.fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes[1], case.fresh)
    abstract = jax.eval_shape(lambda: case.params)
    assert dict(lowrank.plan(case.fn, abstract, *case.args)) == dict(case.plan)
    merged = jax.eval_shape(lowrank.merge, case.base, case.lora)
    chex.assert_trees_all_equal_structs(merged, case.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, case.params)


# Invariants that one or two models show.


def results_and_gradients(*fns: Callable) -> Callable:
    """arguments -> for each function (gradient, results), all compiled as one program."""
    each = [jax.grad(loss_of(fn, has_aux=True), has_aux=True) for fn in fns]
    return jax.jit(lambda *args: [run(*args) for run in each])


def simple(build: Callable = mlp_all_linear_leaves_the_head) -> BuiltCase:
    return build_case(build.__name__)


def test_the_authors_own_derivative_is_kept():
    """custom_vjp says ten times, custom_jvp twice: the adapter's gradient says so too."""
    for name, factor in (("custom_vjp", 10.0), ("custom_jvp", 2.0)):
        case = build_case(name)
        plain = lambda lora: jnp.sin(case.args[0] @ lowrank.merge(case.base, lora)["w"])
        ((cotangent, _),) = results_and_gradients(plain)(case.lora)
        want = jax.tree.map(lambda g: np.float32(factor) * np.asarray(g), cotangent)
        assert_close(case.lively(case.base, case.lora)[0], want, jnp.float32)


@pytest.mark.parametrize("fill", [None, 7.0])
def test_rows_beyond_the_table_are_the_fill_and_have_no_gradient(fill):
    """jnp.take gives NaN, or fill_value, beyond the end; masked, its gradient is zero, not NaN."""
    tokens = np.array([0, 2, 9])

    def fn(p, tokens):
        rows = jnp.take(p["w"], tokens, axis=0, fill_value=fill)
        return rows, jnp.where((tokens < 5)[:, None], rows, 0.0)

    params = {"w": normal(5, 4)}
    config = lowrank.LoraConfig(rank=RANK, alpha=ALPHA, targets="w")
    plan = lowrank.plan(fn, params, tokens)
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan, initializer=ramp)
    live = lambda lora: lowrank.lift(fn)(lowrank.combine(base, lora), tokens)
    merged = lambda lora: fn(lowrank.merge(base, lora), tokens)

    @jax.jit
    def both(lora):
        total = lambda f: lambda lora: (lambda rows, masked: (masked.sum(), rows))(*f(lora))
        return [jax.grad(total(f), has_aux=True)(lora) for f in (live, merged)]

    (got, rows), (want, wanted) = both(perturbed(lora))
    chex.assert_trees_all_close(rows, wanted, rtol=1e-5, atol=1e-5)
    assert_close(got, want, jnp.float32)


def test_dense_trees_pass_unchanged():
    case = simple()
    got = jax.jit(case.lifted)(case.params, *case.args)
    chex.assert_trees_all_equal(got, case.dense(case.params, *case.args))


def test_scale_multiplies_the_change_and_is_traced():
    case = simple()
    # the base is an argument: folded into the program as a constant it would be summed otherwise
    live = lambda scale, base: case.lifted(
        lowrank.combine(base, case.lora, scale=scale), *case.args
    )
    merged = lambda scale, base: case.fn(lowrank.merge(base, case.lora, scale=scale), *case.args)
    with_slope = lambda fn: jax.jit(lambda *args: (fn(*args), jax.jacfwd(fn)(*args)))
    live, merged = with_slope(live), with_slope(merged)
    for scale in map(np.float32, (0.0, 0.3, -2.0)):
        got, want = live(scale, case.base), merged(scale, case.base)
        assert_close(got, want, jnp.float32)
        if scale == 0:
            chex.assert_trees_all_equal(got[0], case.dense(case.params, *case.args))


def test_stop_gradient_stops_the_scale_too():
    case = build_case("stop_gradient_on_one_use")
    live = lambda s: case.lifted(lowrank.combine(case.base, case.lora, scale=s), *case.args)
    merged = lambda s: case.fn(lowrank.merge(case.base, case.lora, scale=s), *case.args)
    got, want = jax.jit(lambda s: (jax.jacfwd(live)(s), jax.jacfwd(merged)(s)))(0.7)
    assert_close(got, want, jnp.float32)


def test_leaves_trained_whole():
    case = simple()
    config = lowrank.LoraConfig(rank=RANK, alpha=ALPHA, train="**/bias")
    init = functools.partial(lowrank.init, plan=case.plan, initializer=ramp)
    base, fresh = init(jax.random.key(0), case.params, config)
    live = lambda lora, base: case.lifted(lowrank.combine(base, lora, scale=0.7), *case.args)
    merged = lambda lora, base: case.fn(lowrank.merge(base, lora, scale=0.7), *case.args)
    both = results_and_gradients(live, merged)
    (_, got), _ = both(fresh, base)
    chex.assert_trees_all_equal(got, case.dense(case.params, *case.args))
    got, want = both(perturbed(fresh), base)
    assert_close(got, want, jnp.float32)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(got[0]))


def test_the_base_inside_a_node_is_constant():
    case = simple()
    tree = lowrank.combine(case.base, case.lora)
    grads = jax.jit(jax.grad(loss_of(case.lifted)))(tree, *case.args)
    base, lora = lowrank.partition(grads)
    for path in case.definition.axes:
        _, layer, leaf = path.split("/")
        assert not np.any(base["params"][layer][leaf])
    assert_close(lora, case.gradient_of_merged(case.lora), jnp.float32)
    head = case.params["params"]["layers_4"]["kernel"]
    assert base["params"]["layers_4"]["kernel"].shape == head.shape
    assert np.any(base["params"]["layers_4"]["kernel"])


def test_gradient_with_respect_to_inputs():
    for case in (simple(), build_case("conv_strided"), build_case("linen_scan_remat")):
        live = lambda x: case.lifted(lowrank.combine(case.base, case.lora), x)
        merged = lambda x: case.fn(lowrank.merge(case.base, case.lora), x)
        got, want = results_and_gradients(live, merged)(*case.args)
        assert_close(got, want, jnp.float32)


def test_second_derivatives():
    case = simple()
    tangent = perturbed(case.fresh, seed=5)
    hvp = lambda fn, lora: jax.jvp(jax.grad(loss_of(fn)), (lora,), (tangent,))[1]
    got, want = jax.jit(lambda lora: (hvp(case.live, lora), hvp(case.merged, lora)))(case.lora)
    # forward over reverse: the chain of products twice
    assert_close(got, want, jnp.float32, chains=2)


def test_nodes_in_any_argument_and_keyword():
    case = simple()
    tree = lowrank.combine(case.base, case.lora)
    want = case.reference(case.lora)[1]
    fn = lambda flag, x, *, params, name: case.fn(params, x) if flag else name
    got = lowrank.lift(fn, fallback="raise")(True, *case.args, params=tree, name="static")
    assert_close(got, want, jnp.float32)


def test_inside_scan_with_the_tree_closed_over_and_carried():
    case = build_case("linen_scan_at_top_level")
    tree = lowrank.combine(case.base, case.lora)
    step = lambda fn: lambda carry, _: ((carry[0], fn(carry[0], carry[1], None)[0]), carry[1].sum())

    def run(fn, tree, x):
        (_, x), sums = jax.lax.scan(step(fn), (tree, x), None, length=2)
        return x, sums

    both = lambda tree, x: (
        run(case.lifted, tree, x),
        run(case.fn, lowrank.merge(*lowrank.partition(tree)), x),
    )
    got, want = jax.jit(both)(tree, case.args[0])
    assert_close(got, want, jnp.float32)


def test_inside_shard_map_and_pmap():
    case = simple()
    x, want = np.asarray(case.args[0]), case.reference(case.lora)[1]
    tree = lowrank.combine(case.base, case.lora)
    mesh = one_device_mesh()
    mapped = jax.shard_map(case.lifted, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    assert_close(jax.jit(mapped)(tree, x), want, jnp.float32)
    many = jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)
    assert_close(part(jax.pmap(case.lifted)(many, x[None]), 0), want, jnp.float32)


def test_vmap_over_examples_each_with_its_adapter():
    case = simple()
    loras = [perturbed(case.fresh, seed=10 * i) for i in range(3)]
    x = np.asarray(normal(3, 2, 3, 7, seed=3))
    one = lambda lora, x: case.lifted(lowrank.combine(case.base, lora), x)
    merged = jax.jit(lambda lora, x: case.fn(lowrank.merge(case.base, lora), x))
    got = jax.jit(jax.vmap(one))(stacked(loras), x)
    for i, lora in enumerate(loras):
        assert_close(part(got, i), merged(lora, x[i]), jnp.float32)


def test_vmap_of_init_combine_and_the_whole_tree():
    case = build_case("linen_scan_remat")
    keys = jax.random.split(jax.random.key(1), 2)
    make = lambda key: lowrank.init(key, case.params, case.config, plan=case.plan)[1]
    many = perturbed(jax.jit(jax.vmap(make))(keys))

    @jax.jit
    def both(many):
        trees = jax.vmap(lambda lora: lowrank.combine(case.base, lora))(many)
        return jax.vmap(case.live)(many), jax.vmap(lambda tree: case.lifted(tree, *case.args))(
            trees
        )

    got, whole = both(many)
    for i in range(2):
        want = case.reference(part(many, i))[1]
        assert_close(part(got, i), want, jnp.float32)
        assert_close(part(whole, i), want, jnp.float32)


def test_a_leaf_key_depends_on_its_path_alone():
    case = simple()
    few = dataclasses.replace(case.config, targets="**/layers_2/kernel")
    _, lora = lowrank.init(jax.random.key(0), case.params, few, plan=case.plan)
    _, more = lowrank.init(jax.random.key(0), case.params, case.config, plan=case.plan)
    kernel = lambda lora: lora["params"]["layers_2"]["kernel"]
    chex.assert_trees_all_equal(kernel(lora), kernel(more))
    first, second = nodes(more).values()
    assert not np.array_equal(np.asarray(first.a)[:6], np.asarray(second.a)[:6])


def test_rank_alpha_patterns_and_rslora():
    case = simple()
    config = lowrank.LoraConfig(
        rank=4,
        alpha=3.0,
        rslora=True,
        rank_pattern={"**/layers_2/*": 1},
        alpha_pattern={"**/layers_0/*": 5.0},
    )
    init = functools.partial(lowrank.init, plan=case.plan, initializer=ramp)
    base, lora = init(jax.random.key(0), case.params, config)
    first, second = nodes(lora).values()
    assert (first.rank, first.scale, second.rank, second.scale) == (4, 5.0 / 2.0, 1, 3.0)
    live = lambda lora: case.lifted(lowrank.combine(base, lora), *case.args)
    merged = lambda lora: case.fn(lowrank.merge(base, lora), *case.args)
    got, want = jax.jit(lambda lora: (live(lora), merged(lora)))(perturbed(lora))
    assert_close(got, want, jnp.float32)


def test_merge_is_the_formula():
    """Against NumPy in float64, each axis order by hand."""
    for name in ("einsum_stack_in_the_middle", "conv_strided", "linen_einsum", "dense_mixed"):
        case = build_case(name)
        merged = dict(
            zip(
                nodes_of_dense(case.params),
                jax.tree.leaves(lowrank.merge(case.base, case.lora)),
                strict=True,
            )
        )
        for path, node in nodes(case.lora).items():
            weight = np.asarray(nodes_of_dense(case.params)[path], np.float64)
            assert_close(merged[path], np.float32(weight + delta(node)), jnp.float32)


def nodes_of_dense(params: Any) -> dict[str, jax.Array]:
    return {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}


def delta(node: lowrank.LowRank) -> np.ndarray:
    """s a b by one einsum over named axes."""
    name = lambda axes: "".join(chr(ord("a") + axis) for axis in axes)
    order = name(range(len(node.fan_in + node.fan_out + node.stack)))
    a, b = name(node.stack + node.fan_in) + "z", name(node.stack) + "z" + name(node.fan_out)
    factors = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    return node.scale * np.einsum(f"{a},{b}->{order}", *factors)


def test_dropout_is_on_the_branch_alone_and_differs_by_use_and_layer():
    case = build_case("linen_scan_remat")
    x = case.args[0]
    drop = lambda key, lora, rate=0.5: case.lifted(
        lowrank.combine(case.base, lora, dropout=rate, key=key), x
    )
    frozen = case.dense(case.params, x)
    chex.assert_trees_all_equal(drop(jax.random.key(0), case.fresh), frozen)
    one, same, other = (drop(jax.random.key(k), case.lora) for k in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    assert np.any(one != other)
    chex.assert_trees_all_equal(drop(jax.random.key(0), case.lora, 0.0), case.live(case.lora))


def test_dropout_is_right_on_average():
    """For a linear model the mean over masks is the undropped result: to five standard errors."""
    case = build_case("dense_float32")
    x = case.args[0]
    keys = jax.random.split(jax.random.key(0), 2000)
    tree = lambda key: lowrank.combine(case.base, case.lora, dropout=0.25, key=key)
    ys = jax.jit(jax.vmap(lambda key: case.lifted(tree(key), x)))(keys)
    ys, want = np.asarray(ys, np.float64), np.asarray(case.lively(case.base, case.lora)[1])
    error = np.abs(ys.mean(0) - want)
    assert np.all(error <= 5 * ys.std(0) / np.sqrt(len(keys)) + 1e-6)
    assert np.all(ys.std(0) > 1e-3)


def test_each_use_has_its_own_mask():
    fn = lambda p, x: (x @ p["w"], x @ p["w"])
    twice = jax.jit(lambda w, x: x @ w)
    jitted = lambda p, x: (twice(p["w"], x), twice(p["w"], x))
    params = {"w": normal(8, 8)}
    base, lora = lowrank.init(
        jax.random.key(0),
        params,
        lowrank.LoraConfig(rank=2, alpha=3.0, targets="w"),
        initializer=ramp,
    )
    tree = lowrank.combine(base, perturbed(lora), dropout=0.5, key=jax.random.key(3))
    for f in (fn, jitted):
        one, two = lowrank.lift(f, fallback="raise")(tree, normal(4, 8))
        assert np.any(np.asarray(one) != np.asarray(two))
    stack = {"w": np.stack([params["w"]] * 2)}
    loop = lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]
    plan = lowrank.plan(loop, stack, normal(4, 8))
    base, lora = lowrank.init(
        jax.random.key(0),
        stack,
        lowrank.LoraConfig(rank=2, alpha=3.0, targets="w"),
        plan=plan,
        initializer=ramp,
    )
    lora = stacked([part(perturbed(lora), 0)] * 2)
    tree = lowrank.combine(base, lora, dropout=0.5, key=jax.random.key(3))
    one, two = np.asarray(lowrank.lift(loop, fallback="raise")(tree, normal(4, 8)))
    assert np.any(one != two)


def test_strict_dtype_promotion(strict_promotion):
    """The library adds no implicit promotion of its own to a model that has none."""
    fn = lambda p, x: jnp.sin(x @ p["w"].astype(jnp.bfloat16)) @ p["v"]
    params = {"w": normal(4, 6), "v": normal(6, 3, dtype=jnp.bfloat16)}
    x = normal(2, 4, dtype=jnp.bfloat16)
    config = lowrank.LoraConfig(rank=RANK, alpha=ALPHA, targets=("w", "v"))
    plan = lowrank.plan(fn, params, x)
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    lora = perturbed(lora)
    live = lambda lora, scale: lowrank.lift(fn)(lowrank.combine(base, lora, scale=scale), x)
    merged = lambda lora, scale: fn(lowrank.merge(base, lora, scale=scale), x)
    both = lambda lora, scale=1.0: (live(lora, scale), merged(lora, scale))
    for got, want in (jax.jit(both)(lora, np.float32(0.5)), jax.jit(both)(lora)):
        assert_close(got, want, jnp.bfloat16)
    assert_close(live(lora, 1.0), want, jnp.bfloat16)  # an eager call too


def test_whole_variables_or_the_params_level():
    """The paths are those of the first argument: the same model, one level down."""
    module = StackedLinen()
    apply, variables, args = linen(module, normal(2, 5, 4))
    fn = lambda params, x: apply({"params": params}, x)
    plan = lowrank.plan(fn, variables["params"], *args)
    base, lora = lowrank.init(
        jax.random.key(0), variables["params"], lowrank.LoraConfig(rank=RANK), plan=plan
    )
    assert set(nodes(lora)) == {"layers/up/kernel", "layers/down/kernel"}
    live = lambda lora: lowrank.lift(fn)(lowrank.combine(base, lora), *args)
    merged = lambda lora: fn(lowrank.merge(base, lora), *args)
    got, want = jax.jit(lambda lora: (live(lora), merged(lora)))(perturbed(lora))
    assert_close(got, want, jnp.float32)

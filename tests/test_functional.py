"""functional: NNX modules as functions, their state threaded, kept or refused."""

import collections
import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from models import noisy, normal

import lowrank_jax as lowrank
from lowrank_jax._jax.paths import flatten

pytestmark = pytest.mark.usefixtures("fast_compile")

X = normal(5, 4)


class Block(nnx.Module):
    """A layer with every kind of state: parameters, batch statistics, dropout's counter."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Model(nnx.Module):
    """The layer behind one of NNX's transforms, which hand every variable on as another array."""

    def __init__(self, rngs, kind="plain"):
        self.kind = kind
        make = lambda rngs: Block(rngs)
        if kind == "scan":
            make = nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=0, out_axes=0))
        self.block = make(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        call = lambda block, x: block(x)
        if self.kind == "remat":
            call = nnx.remat(call)
        if self.kind == "jit":
            call = nnx.jit(call)
        if self.kind == "scan":
            call = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(call(self.block, x))

    def features(self, x):
        return self.block(x)


KINDS = ["plain", "remat", "jit", "scan"]


def drawn(build):
    """What build makes, split, its weights drawn in NumPy: nothing is compiled."""

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape) if x.shape else jax.random.key(0)
        fill = np.ones if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros
        return jax.device_put(fill(x.shape, x.dtype))

    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    params, rest = jax.tree.map(fill, (params, rest))
    return graphdef, noisy(params, scale=0.4), rest


@functools.cache
def drawn_model(kind):
    return drawn(lambda: Model(nnx.Rngs(0), kind))


def model_of(kind="plain", mode="eval"):
    model = nnx.merge(*drawn_model(kind))
    getattr(model, mode)()
    return model


call = nnx.jit(lambda model, x: model(x))  # the reference


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_at_rest_is_a_function_of_its_parameters(kind, jit):
    model = model_of(kind)
    fn, params = lowrank.functional(model)
    chex.assert_trees_all_equal(params, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    run = jax.jit(fn) if jit else fn
    chex.assert_trees_all_close(run(params, X), call(model, X), atol=1e-6)
    other = noisy(params)
    changed = nnx.clone(model)
    nnx.update(changed, other)
    chex.assert_trees_all_close(run(other, X), call(changed, X), atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_changes_state_is_refused_by_name(kind, jit):
    fn, params = lowrank.functional(model_of(kind, "train"))
    with pytest.raises(lowrank.StateError) as caught:
        (jax.jit(fn) if jit else fn)(params, X)
    named = {line.strip(" -") for line in str(caught.value).split("\n")[1:]}
    assert named == {
        "block/norm/mean (BatchStat)",
        "block/norm/var (BatchStat)",
        "block/drop/rngs/count (RngCount)",
    }
    assert "model.eval()" in str(caught.value)
    assert "functional_with_state" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_threaded_as_the_model_threads_its_own(kind):
    model = model_of(kind, "train")
    fn, params, state = lowrank.functional_with_state(model)
    run = jax.jit(fn)
    for _ in range(3):
        out, state = run(params, state, X)
        chex.assert_trees_all_close(out, call(model, X), atol=1e-5)
    other = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    chex.assert_trees_all_equal_structs(state, other)
    chex.assert_trees_all_close(*map(without_keys, (state, other)), atol=1e-6)


def without_keys(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def test_the_model_is_left_alone_and_the_function_too():
    model = model_of(mode="train")
    before = without_keys(nnx.to_pure_dict(nnx.state(model)))
    fn, params, state = lowrank.functional_with_state(model)
    fn(params, state, X)
    chex.assert_trees_all_equal(without_keys(nnx.to_pure_dict(nnx.state(model))), before)
    resting, params = lowrank.functional(model_of())
    want = resting(params, X)
    model.eval()
    with jax.disable_jit():
        np.testing.assert_allclose(resting(params, X), want, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_functional_model(kind):
    fn, params = lowrank.functional(model_of(kind))
    plan = lowrank.plan(fn, params, X)
    assert [path for path, use in plan.items() if use.linear] == ["block/linear/kernel"]
    assert plan["head/kernel"].final
    config = lowrank.LoraConfig(rank=2, alpha=3)
    base, lora = lowrank.init(jax.random.key(1), params, config, plan=plan)
    lifted = lowrank.lift(fn, fallback="raise")

    def total(fn, lora):
        out = fn(lora)
        return (out**2).sum(), out

    @jax.jit
    def both(lora):
        live = lambda lora: lifted(lowrank.combine(base, lora), X)
        merged = lambda lora: fn(lowrank.merge(base, lora), X)
        differentiate = lambda fn: jax.grad(functools.partial(total, fn), has_aux=True)(lora)
        return differentiate(live), differentiate(merged)

    (grads, out), (wanted, merged) = both(noisy(lora))
    chex.assert_trees_all_close(out, merged, atol=1e-5)
    chex.assert_trees_all_close(grads, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_moving_statistics_and_dropout(kind):
    fn, params, state = lowrank.functional_with_state(model_of(kind, "train"))
    plan = lowrank.plan(fn, params, state, X)
    base, lora = lowrank.init(jax.random.key(1), params, lowrank.LoraConfig(rank=2), plan=plan)
    lifted = lowrank.lift(fn, fallback="raise")
    tx = optax.sgd(1e-2)

    @jax.jit
    def step(lora, state, opt_state, x):
        def loss(lora):
            out, new = lifted(lowrank.combine(base, lora), state, x)
            return (out**2).mean(), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), state, opt_state, value

    opt_state, first = tx.init(lora), state
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(step.__wrapped__, n=1))
    for _ in range(3):
        lora, state, opt_state, _ = counted(lora, state, opt_state, X)
    count = lambda s: np.asarray(s["block"]["drop"]["rngs"]["count"])
    assert (count(state) == count(first) + 3).all()
    assert np.not_equal(state["block"]["norm"]["mean"], first["block"]["norm"]["mean"]).all()
    assert all(np.any(leaf) for leaf in jax.tree.leaves(lora))


class WithRngs(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs=None):
        return self.down(self.drop(self.up(x), rngs=rngs))


def test_dropout_keys_may_be_arguments():
    model = nnx.merge(*drawn(lambda: WithRngs(nnx.Rngs(0))))
    fn, params = lowrank.functional(model)

    @jax.jit
    def both(params):
        make = lambda: nnx.Rngs(dropout=7)
        return fn(params, X, rngs=make()), model(X, rngs=make())

    got, want = both(params)
    chex.assert_trees_all_close(got, want, atol=1e-6)
    base, lora = lowrank.init(
        jax.random.key(1), params, lowrank.LoraConfig(rank=2, targets="up/*l")
    )

    @jax.jit
    def run(lora, key):
        rngs = nnx.Rngs(dropout=key)
        return lowrank.lift(fn)(lowrank.combine(base, lora), X, rngs=rngs)

    chex.assert_trees_all_close(run(lora, jax.random.key(7)), want, atol=1e-5)
    assert np.not_equal(run(lora, jax.random.key(8)), want).any()


TOKENS = np.asarray(X)[:3, None, None]


def test_a_decoder_with_a_cache():
    def build():
        model = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=True)
        model.init_cache((1, 3, 4))
        return model

    model = nnx.merge(*drawn(build))
    fn, params, state = lowrank.functional_with_state(model)
    base, lora = lowrank.init(
        jax.random.key(1),
        params,
        lowrank.LoraConfig(rank=2, targets="*/kernel"),
        plan=lowrank.plan(fn, params, state, TOKENS[0]),
    )
    lora = noisy(lora, scale=0.3)
    run, reference = jax.jit(lowrank.lift(fn, fallback="raise")), jax.jit(fn)
    merged = jax.jit(lowrank.merge)(base, lora)
    mine, theirs = state, state
    for token in TOKENS:
        got, mine = run(lowrank.combine(base, lora), mine, token)
        want, theirs = reference(merged, theirs, token)
        chex.assert_trees_all_close(got, want, atol=1e-5)
    assert int(mine["cache_index"]) == 3
    with pytest.raises(lowrank.StateError, match=r"cache_index \(Cache\)"):
        jax.jit(lowrank.functional(model)[0])(params, TOKENS[0])


class Twelve(nnx.Module):
    """More layers than digits: as text their numbers sort otherwise."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(12)])
        self.linear = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])

    def __call__(self, x):
        for number, (norm, linear) in enumerate(zip(self.norms, self.linear, strict=True)):
            x = jnp.sin(norm(linear(x)) * (number + 1))
        return x


def with_text(tree):
    return {str(k): with_text(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def with_lists(tree):
    if not isinstance(tree, dict):
        return tree
    inner = {key: with_lists(item) for key, item in tree.items()}
    return [inner[i] for i in range(len(inner))] if set(inner) == {*range(len(inner))} else inner


def backwards(tree):
    pairs = reversed(tree.items()) if isinstance(tree, dict) else ()
    return {k: backwards(v) for k, v in pairs} if isinstance(tree, dict) else tree


# the same paths in other containers; text is what Orbax restores without a target
CONTAINERS = {
    "text": with_text,
    "frozen text": lambda tree: flax.core.freeze(with_text(tree)),
    "lists": with_lists,
    "an order of their own": lambda tree: collections.OrderedDict(backwards(tree)),
    "nnx.State": lambda tree: nnx.State(with_text(tree)),
}


@functools.cache
def twelve():
    graphdef, params, rest = drawn(lambda: Twelve(nnx.Rngs(0)))
    rest = jax.tree.map(jnp.abs, noisy(rest, scale=0.5))
    trained = lowrank.functional_with_state(nnx.merge(graphdef, params, rest))
    model = nnx.merge(graphdef, params, rest)
    model.eval()
    return trained, lowrank.functional(model)


@pytest.mark.parametrize(("name", "jit"), [*((name, False) for name in CONTAINERS), ("text", True)])
def test_leaves_are_found_by_path_in_any_container(name, jit):
    (fn, params, state), (at_rest, _) = twelve()
    change = CONTAINERS[name]
    if jit:
        fn, at_rest = jax.jit(fn), jax.jit(at_rest)
    want, new = fn(params, state, X)
    got, other = fn(change(params), change(state), X)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    chex.assert_trees_all_equal_structs(other, change(state))
    chex.assert_trees_all_close(dict(flatten(other)[0]), dict(flatten(new)[0]), atol=1e-5)
    chex.assert_trees_all_close(at_rest(change(params), X), at_rest(params, X), atol=1e-5)


def test_other_paths_are_refused_in_any_container():
    (fn, params, state), (at_rest, _) = twelve()
    linear = params["linear"]
    twice = collections.OrderedDict({**linear, "3": linear[3]})
    for change in (with_text, lambda tree: tree):
        for wrong, words in (
            ({**params, "norms": linear}, r"norms/0/scale \(Param\): missing"),
            ({**params, "more": X}, "more: unexpected"),
            (
                {**params, "linear": {**linear, 3: {"kernel": X}}},
                r"linear/3/bias \(Param\): missing",
            ),
            ({**params, "linear": {**linear, 12: X}}, "linear/12: unexpected"),
            ({**params, "linear": twice}, "two leaves share the path"),
        ):
            wrong = wrong if "share" in words else change(wrong)
            with pytest.raises(lowrank.TreeError, match=words):
                fn(wrong, state, X)
            with pytest.raises(lowrank.TreeError, match=words):
                at_rest(wrong, X)
        with pytest.raises(lowrank.TreeError, match=r"norms/7/mean \(BatchStat\): missing"):
            fn(params, change({"norms": {**state["norms"], 7: {"var": X}}}), X)


def test_state_of_a_scan_may_have_keys_of_text():
    (fn, params, state), _ = twelve()
    step = lambda state, x: fn(params, state, x)[::-1]
    want, _ = jax.lax.scan(step, state, jnp.stack([X, 2 * X]))
    got, _ = jax.lax.scan(step, with_text(state), jnp.stack([X, 2 * X]))
    chex.assert_trees_all_close(got, with_text(want), atol=1e-6)


def test_method_by_name_and_by_function():
    model = model_of()
    by_name, params = lowrank.functional(model, method="features")
    by_function, _ = lowrank.functional(model, method=lambda m, x: m.features(x))
    chex.assert_trees_all_equal(by_name(params, X), by_function(params, X))
    chex.assert_trees_all_close(by_name(params, X), model.features(X), atol=1e-6)


def test_wrt_chooses_the_parameters():
    model = model_of(mode="train")
    wrt = nnx.Any(nnx.Param, nnx.BatchStat)
    _, params, state = lowrank.functional_with_state(model, wrt=wrt)
    assert set(params["block"]["norm"]) == {"scale", "bias", "mean", "var"}
    assert set(state["block"]) == {"drop"}


def test_a_shared_variable_is_one_leaf():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(4, 4, rngs=rngs)
            self.two = self.one

        def __call__(self, x):
            return self.two(jnp.tanh(self.one(x)))

    fn, params = lowrank.functional(Tied(nnx.Rngs(0)))
    assert sorted(params) == ["one"]
    assert lowrank.plan(fn, params, X)["one/kernel"].uses == 2


def test_an_abstract_model_has_a_plan():
    model = nnx.eval_shape(lambda: WithRngs(nnx.Rngs(0)))
    fn, params = lowrank.functional(model)
    assert lowrank.plan(fn, params, X, rngs=nnx.Rngs(0))["up/kernel"].linear


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        self.hidden = nnx.Intermediate(x.sum())
        return self.linear(x)


class Counting(Sowing):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.linear(x)


class Learning(Sowing):
    def __call__(self, x):
        self.linear.bias[...] = self.linear.bias[...] + 1
        return self.linear(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def forgotten_lift():
    fn, params = lowrank.functional(WithRngs(nnx.Rngs(0)))
    config = lowrank.LoraConfig(rank=1, targets="up/kernel")
    return fn(lowrank.combine(*lowrank.init(jax.random.key(0), params, config)), X)


def called(module, make=lowrank.functional):
    fn, *trees = make(module(nnx.Rngs(0)))
    return fn(*trees, X)


class Scalar(Sowing):
    """A variable that is no array."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.step = nnx.Variable(0)

    def __call__(self, x):
        self.step.set_value(self.step.get_value() + 1)
        return self.linear(x)


class Becoming(Scalar):
    def __call__(self, x):
        self.step.set_value(x.mean())
        return self.linear(x)


class Holding(nnx.Module):
    """Variables that hold a tree, and nothing."""

    def __init__(self, rngs):
        self.w = nnx.Param({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})
        self.nothing = nnx.Variable(None)

    def __call__(self, x, *, model=1.0, params=0.0, state=0.0):
        w = self.w.get_value()
        return model * (x @ w["kernel"] + w["bias"]) + params + state


class Filling(Scalar):
    """A variable that holds nothing till the first call."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.step = nnx.Variable(None)

    def __call__(self, x):
        self.step.set_value(x.mean())
        return self.linear(x)


REFUSED = {
    "a leaf that appears": (lambda: called(Filling), "StateError", r"step \("),
    "a leaf that appears in the state": (
        lambda: called(Filling, lowrank.functional_with_state),
        "StateError",
        r"(?s)changes the structure of variables.*- step \(",
    ),
    "a number that changes": (lambda: called(Scalar), "StateError", r"step \(Variable\)"),
    "a number that becomes an array": (lambda: called(Becoming), "StateError", r"step \(Variable"),
    "a forgotten lift": (lambda: forgotten_lift(), "LowrankError", "must be lifted"),
    "a variable that appears": (
        lambda: called(Sowing),
        "StateError",
        r"hidden \(Intermediate\): a",
    ),
    "an attribute that changes": (lambda: called(Counting), "StateError", "not an nnx.Variable"),
    "a parameter that changes": (lambda: called(Learning), "StateError", r"linear/bias \(Param\)"),
    "a parameter that changes, with state": (
        lambda: called(Learning, lowrank.functional_with_state),
        "StateError",
        r"(?s)changes parameters of the model; only other state.*linear/bias \(Param\)",
    ),
    "a Linen module": (lambda: lowrank.functional(Linen()), "TreeError", r"lift\(model.apply\)"),
    "a class": (
        lambda: lowrank.functional(Model),
        "TreeError",
        "the class Model: make an instance",
    ),
    "a function": (lambda: lowrank.functional(len), "TreeError", "lift a function of"),
    "a method that is not there": (
        lambda: lowrank.functional(model_of(), method="encode"),
        "TreeError",
        "Model has no method 'encode'",
    ),
    "a module without parameters": (
        lambda: lowrank.functional(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
        "TreeError",
        "Dropout has no parameters",
    ),
    "parameters of another model": (
        lambda: lowrank.functional(model_of())[0]({"head": {"kernel": X}, "tail": X}, X),
        "TreeError",
        r"(?s)head/bias \(Param\): missing.*tail: unexpected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, kind, words = REFUSED[case]
    with pytest.raises(getattr(lowrank, kind), match=words):
        make()


def test_what_was_sown_can_be_returned():
    method = lambda model, x: (model(x), nnx.to_pure_dict(nnx.pop(model, nnx.Intermediate)))
    fn, params = lowrank.functional(Sowing(nnx.Rngs(0)), method=method)
    out, sown = fn(params, X)
    assert out.shape == (5, 3)
    chex.assert_trees_all_close(sown["hidden"], X.sum())


def loss_of(model, x):
    return (model(x) ** 2).mean()


def adapted(kind="plain", mode="train"):
    """A module whose weights are nodes: a module is a pytree, and may stand where one does."""
    model = model_of(kind, mode)
    plan = lowrank.plan(loss_of, model, X)
    return lowrank.combine(
        *lowrank.init(jax.random.key(1), model, lowrank.LoraConfig(rank=2), plan=plan)
    )


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, nnx.value_and_grad, jax.jit])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lifted_call_of_a_module_in_training_mode_is_refused(kind, transform):
    with pytest.raises(lowrank.StateError, match=r"(?s)model.eval\(\).*block/norm/mean") as caught:
        transform(lowrank.lift(loss_of))(adapted(kind), X)
    assert "block/drop/rngs/count" in str(caught.value)
    assert "linear/kernel" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lifted_call_of_a_module_at_rest(kind):
    tree = adapted(kind, "eval")
    lifted = lowrank.lift(loss_of, fallback="raise")
    merged = lambda tree: loss_of(lowrank.merge(*lowrank.partition(tree)), X)
    got, want = jax.jit(lambda tree: (lifted(tree, X), merged(tree)))(tree)
    chex.assert_trees_all_close(got, want, rtol=1e-5)


def test_a_dict_changed_in_place_is_refused():
    def fn(p, x):
        p["calls"] = p["calls"] + 1
        return x @ p["w"]

    def growing(p, x):
        p["new"] = x
        return x @ p["w"]

    params = {"w": jnp.ones((4, 3)), "calls": jnp.array(0)}
    base, lora = lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=1, targets="w"))
    with pytest.raises(lowrank.StateError, match=r"(?s)changes its arguments.*- calls"):
        lowrank.lift(fn)(lowrank.combine(base, lora), X)
    with pytest.raises(lowrank.StateError, match="adds arrays to its arguments"):
        lowrank.lift(growing)(lowrank.combine(base, lora), X)


def test_variables_that_hold_trees_numbers_or_nothing():
    fn, params = lowrank.functional(Holding(nnx.Rngs(0)))
    assert sorted(params["w"]) == ["bias", "kernel"]
    chex.assert_trees_all_close(fn(params, X), X @ jnp.ones((4, 3)) + 1)
    # any keyword is the model's own
    chex.assert_trees_all_close(
        fn(params, X, model=0.0, params=1.0, state=2.0), jnp.full((5, 3), 3.0)
    )
    fn, params, state = lowrank.functional_with_state(Scalar(nnx.Rngs(0)))
    for count in (1, 2):
        _, state = fn(params, state, X)
        assert state["step"] == count


def test_a_model_scanned_over_another_axis():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: 1, ...: 0}))
    def make(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            axes = (nnx.StateAxes({nnx.Param: 1, ...: 0}), nnx.Carry)
            run = nnx.scan(lambda layer, x: jnp.tanh(layer(x)), in_axes=axes, out_axes=nnx.Carry)
            return run(self.layers, x)

    model = nnx.merge(*drawn(lambda: Scanned(nnx.Rngs(0))))
    fn, params = lowrank.functional(model)
    assert params["layers"]["kernel"].shape == (4, 3, 4)
    plan = lowrank.plan(fn, params, X)
    base, lora = lowrank.init(jax.random.key(1), params, lowrank.LoraConfig(rank=2), plan=plan)
    lifted = lowrank.lift(fn, fallback="raise")

    @jax.jit
    def all_three(params, lora):
        live = lifted(lowrank.combine(base, lora), X)
        return fn(params, X), live, fn(lowrank.merge(base, lora), X)

    got, live, merged = all_three(params, noisy(lora))
    chex.assert_trees_all_close(got, call(model, X), atol=1e-6)
    chex.assert_trees_all_close(live, merged, atol=1e-5)


def test_eager_code_of_a_model_with_a_jit_inside():
    class Eager(Model):
        def __call__(self, x, repeat):
            scale = 2.0 if float(x.sum()) < 1e9 else 1.0
            for _ in range(repeat):
                x = jnp.pad(super().__call__(x), ((0, 0), (0, 1)))
            return x * scale

    model = Eager(nnx.Rngs(0), "jit")
    model.eval()
    fn, params = lowrank.functional(model)
    chex.assert_trees_all_close(fn(params, X, np.int64(2)), model(X, 2), atol=1e-6)


def test_rngs_made_outside_the_step_are_refused_by_lift():
    fn, params = lowrank.functional(WithRngs(nnx.Rngs(0)))
    base, lora = lowrank.init(
        jax.random.key(1), params, lowrank.LoraConfig(rank=2, targets="up/*l")
    )
    tree, lifted, rngs = lowrank.combine(base, lora), lowrank.lift(fn), nnx.Rngs(dropout=7)
    with pytest.raises(lowrank.StateError, match="from a key inside the jitted step"):
        lifted(tree, X, rngs=rngs)  # the mask would be the same at every call
    with pytest.raises(lowrank.StateError, match=r"rngs/dropout/count"):
        jax.jit(lambda tree, x: lifted(tree, x, rngs=rngs))(tree, X)

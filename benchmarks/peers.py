"""The same small models through lowrank_jax, qwix and quax, each used as its documentation says.

Run: python benchmarks/peers.py [words of a case's name]    (two minutes; exit status always 0)

Neither peer is a dependency of lowrank_jax. An environment of their own, made in a checkout:

    python3 -m venv peers && . peers/bin/activate
    pip install -e . qwix==0.1.8 quax==0.4.6    # Python 3.11 gets JAX 0.10, 3.12 and later JAX 0.12

Factors are random, none zero. The output should equal that of the same function on the dense
weights W + s a b, and so should the gradient of every factor, to the rounding of the model's dtype.
- right: both do. Materialized: by building W + s a b (we warn; quax asks for the option).
- refuses: quax raises rather than build W + a b, as it promises without the option.
- no adapter: the base's output, no error, no warning (told: qwix's get_unused_rules() says so).
- delta x k: the output is that of W + k s a b; a doubled adapter is k = 2.
- wrong, no gradient, wrong gradient: other differences. Error: the type of what was raised.
- not meant for (what happens): the library's documentation does not offer it.

Each cell starts with JAX's caches empty, as a fresh process does. qwix's factors are made by
eval_shape of init, as its documentation does; then jax.jit traces the forward pass, and after it
the gradient. A second column takes the option that the library documents: disable_jit=True runs
JAX's inner jits and scans as Python, which unrolls a scan; allow_materialise=True allows W + a b.
quax's LoRA calls itself a tech demo, mostly for Equinox, whose linear layer is as the last case.
"""

import dataclasses
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowrank_jax as lowrank

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from models import Block, NnxStack, Tied, normal, of_nnx, variables_of

RANK, ALPHA, ABSENT = 2, 3.0, "not installed"
INSTALLED = {found.name: found.version for found in importlib.metadata.distributions()}
DENSE, RIGHT, STACKED = ((0,), (1,)), ((1,), (0,)), ((1,), (2,))  # (fan_in, fan_out)
HEADS, OUT, CONV = ((0,), (1, 2)), ((0, 1), (2,)), ((0, 1, 2), (3,))
MATMUL = "JAX jits @: qwix's factors leak from its trace, or it is cached and qwix is not asked"
REMARKS = {  # what is not right there, and why
    ("Linen Einsum", "qwix"): "it sets an attribute of the module, which Linen forbids",
    ("Linen Embed, look-up", "qwix"): "not meant for: it lists dot_general, einsum, convolution",
    ("Linen Embed tied to attend", "qwix"): "attend has an adapter, the look-up has none",
    (
        "Linen WeightNorm(Dense)",
        "qwix",
    ): "added to the normalized weight, a and b normalized too",
    ("NNX scan over layers", "qwix"): "raised while its factors are made inside nnx.scan",
    ("x @ w, a raw self.param", "qwix"): MATMUL,
    ("x @ w.T", "qwix"): MATMUL,
    ("two x @ w after an earlier x @ y", "qwix"): MATMUL,
    ("dot(w, x), on the left", "qwix"): "only a right operand is taken for a weight",
    ("dot(x, w) + dot(x, x), all 5 x 5", "qwix"): "x has the weight's shape and is taken for it",
    ("custom_vjp around dot(x, w)", "qwix"): "the forward pass is right, the gradient raises",
    ("custom_vjp around dot(x, w)", "quax"): "not meant for: its README says, not supported",
    ("a function without a module", "qwix"): "not meant for: it adapts Flax modules",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: fn(params, x), made of `module` where there is one."""

    name: str
    fn: Callable
    params: Any
    x: Any
    weights: dict[str, Any]  # path -> (fan_in, fan_out) to adapt; other axes are a stack
    module: Any = None
    before: Callable[[], Any] = lambda: None  # what the process has done earlier


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A library's answer: the output is run(tree); path + a name is a factor in the tree."""

    run: Callable
    tree: Any
    axes: dict[str, Any]
    names: tuple[str, str] = ("/a", "/b")
    scale: float = ALPHA / RANK
    told: bool = False


def flat(tree: Any) -> dict[str, Any]:
    """path -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def put(tree: Any, new: dict[str, Any]) -> Any:
    """The tree with other leaves at these paths."""
    leaves = flat(tree) | new
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in flat(tree)])


def of(name: str, module: Any, x: Any, weights: Any, **rest: Any) -> Case:
    """A Flax module as a function of its parameters."""
    if isinstance(module, nnx.Module):
        fn, params, _ = of_nnx(module)
        nnx.update(module, params)
    else:
        fn, params = module.apply, variables_of(module, x)
        weights = {f"params/{path}": axes for path, axes in weights.items()}
    return Case(name, fn, params, x, weights, module, **rest)


class Compact(nn.Module):
    """A Linen module of one function (module, x)."""

    body: Callable

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


class NnxScanned(NnxStack):
    """nnx.scan over a stack of layers, without remat."""

    def __call__(self, x):
        step = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return step(self.layers, x)


def cases() -> list[Case]:
    """The cases of the table."""
    x, tokens, rngs = normal(3, 4), jnp.arange(8) % 3, nnx.Rngs(0)
    layers = lambda axes: {"layers/up/kernel": axes, "layers/down/kernel": axes}
    projections = {f"{name}/kernel": HEADS for name in ("query", "key", "value")}
    kernel, heads, w, wt = {"kernel": DENSE}, {"kernel": HEADS}, {"w": DENSE}, {"w": RIGHT}
    parameter = lambda m, *shape: m.param("w", nn.initializers.normal(), shape)
    raw = lambda use, *shape: Compact(lambda m, x: use(x, parameter(m, *shape)))
    times = lambda name: Compact(lambda m, x: x @ parameter(m, 4, 4), name=name)
    chain = Compact(lambda _, x: times("second")(jnp.tanh(times("first")(x))))
    scan = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=3)
    scanned = Compact(lambda _, x: scan(name="layers")(x, None)[0])
    remat = Compact(lambda _, x: nn.remat(Block)(name="layers")(x)[0])
    looks_alike = raw(lambda x, w: jnp.dot(x, w) + jnp.dot(x, x), 5, 5)
    custom = jax.custom_vjp(lambda x, w: jnp.dot(x, w))
    custom.defvjp(lambda x, w: (jnp.dot(x, w), (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))
    attention, norm = nn.MultiHeadDotProductAttention(2), nn.WeightNorm(nn.Dense(5))
    earlier, chained = lambda: x @ normal(4, 4), {"first/w": DENSE, "second/w": DENSE}
    linear, params = lambda p, x: p["w"] @ x + p["b"], {"w": normal(5, 4), "b": normal(5)}
    return [
        of("Linen Dense", nn.Dense(5), x, kernel),
        of("Linen Dense, dtype=bfloat16", nn.Dense(5, dtype=jnp.bfloat16), x, kernel),
        of("Linen attention", attention, normal(2, 5, 4), projections | {"out/kernel": OUT}),
        of("Linen Einsum", nn.Einsum((4, 2, 5), "bi,iho->bho"), x, heads),
        of("Linen Conv", nn.Conv(5, (3, 2)), normal(2, 5, 6, 4), {"kernel": CONV}),
        of("Linen Embed, look-up", nn.Embed(9, 4), tokens, {"embedding": DENSE}),
        of("Linen Embed tied to attend", Tied(), tokens, {"embed/embedding": RIGHT}),
        of("Linen scan over layers", scanned, x, layers(STACKED)),
        of("Linen remat", remat, x, layers(DENSE)),
        of("Linen WeightNorm(Dense)", norm, x, {"layer_instance/kernel": DENSE}),
        of("NNX Linear", nnx.Linear(4, 5, rngs=rngs), x, kernel),
        of("NNX Einsum", nnx.Einsum("bi,iho->bho", (4, 2, 5), rngs=rngs), x, heads),
        of("NNX scan over layers", NnxScanned(rngs), x, layers(STACKED)),
        of("x @ w, a raw self.param", raw(lambda x, w: x @ w, 4, 5), x, w),
        of("x @ w.T", raw(lambda x, w: x @ w.T, 5, 4), x, wt),
        of("two x @ w after an earlier x @ y", chain, x, chained, before=earlier),
        of("dot(w, x), on the left", raw(lambda x, w: jnp.dot(w, x), 5, 3), x, wt),
        of("dot(x, w) + dot(x, x), all 5 x 5", looks_alike, normal(5, 5), w),
        of("custom_vjp around dot(x, w)", raw(custom, 4, 5), x, w),
        Case("a function without a module", linear, params, x[0], wt),
    ]


def with_lowrank_jax(case: Case) -> Adapted:
    """plan, init, combine, lift."""
    config = lowrank.LoraConfig(rank=RANK, alpha=ALPHA, targets=tuple(case.weights))
    plan = lowrank.plan(case.fn, case.params, case.x)
    base, lora = lowrank.init(jax.random.key(0), case.params, config, plan=plan)
    run = lambda lora: lowrank.lift(case.fn)(lowrank.combine(base, lora), case.x)
    return Adapted(run, lora, case.weights)


def with_qwix(case: Case, **options: Any) -> Adapted:
    """apply_lora_to_model, whose model makes factors of its own beside the weights."""
    import qwix

    provider = qwix.LoraProvider(rank=RANK, alpha=ALPHA, **options)
    if isinstance(case.module, nnx.Module):
        rngs = nnx.Rngs(0)
        fn, tree, _ = of_nnx(qwix.apply_lora_to_model(case.module, provider, case.x, rngs=rngs))
    else:
        model = qwix.apply_lora_to_model(case.module, provider)
        fn, tree = model.apply, variables_of(model, case.x)
    names, told = ("_lora_a", "_lora_b"), bool(provider.get_unused_rules())
    tree = put(tree, flat(case.params))
    return Adapted(lambda tree: fn(tree, case.x), tree, case.weights, names, told=told)


def with_quax(case: Case, **options: Any) -> Adapted:
    """LoraArray in place of a weight (a b over its last two axes), quaxify around the function."""
    import quax
    from quax.examples.lora import LoraArray

    wrap = lambda w: LoraArray(w, rank=RANK, key=jax.random.key(0), **options)
    leaves = flat(case.params)
    tree = put(case.params, {path: wrap(leaves[path]) for path in case.weights})
    axes = {path: ((w.ndim - 2,), (w.ndim - 1,)) for path, w in leaves.items()}
    return Adapted(lambda tree: quax.quaxify(case.fn)(tree, case.x), tree, axes, scale=1.0)


COLUMNS: dict[str, tuple[str, Callable, dict[str, Any]]] = {
    "lowrank_jax": ("lowrank_jax", with_lowrank_jax, {}),
    "qwix": ("qwix", with_qwix, {}),
    "qwix, disable_jit": ("qwix", with_qwix, {"disable_jit": True}),
    "quax": ("quax", with_quax, {}),
    "quax, allow_materialise": ("quax", with_quax, {"allow_materialise": True}),
}


def dense(case: Case, adapted: Adapted, factors: dict[str, Any], times: float) -> Any:
    """The parameters W + times s a b."""
    leaves = flat(case.params)
    for path in case.weights:
        w, (fan_in, fan_out) = leaves[path], adapted.axes[path]
        a, b = (factors[path + name] for name in adapted.names)
        stack = tuple(i for i in range(w.ndim) if i not in fan_in + fan_out)
        order, lead = stack + fan_in + fan_out, [w.shape[i] for i in stack]
        product = a.reshape(*lead, -1, RANK) @ b.reshape(*lead, RANK, -1)
        delta = product.reshape([w.shape[i] for i in order]).transpose(np.argsort(order))
        leaves[path] = w + times * adapted.scale * delta
    return put(case.params, leaves)


def judge(case: Case, adapted: Adapted) -> str:
    """What came, in a few words."""
    leaves = flat(adapted.tree)
    if missing := sum(path + adapted.names[0] not in leaves for path in case.weights):
        some = "" if missing == len(case.weights) else f" on {missing} of {len(case.weights)}"
        return f"no adapter{some}{' (told)' if adapted.told else ''}"
    paths = [path + name for path in case.weights for name in adapted.names]
    factors = {path: normal(*leaves[path].shape, seed=7, scale=0.5) for path in paths}
    loss = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))
    reference = lambda factors, k=1.0: jnp.float32(
        case.fn(dense(case, adapted, factors, k), case.x)
    )
    run = lambda factors: jnp.float32(adapted.run(put(adapted.tree, factors)))
    out = jax.jit(run)(factors)
    grads = jax.jit(jax.grad(lambda factors: loss(run(factors))))(factors)
    limit = 0.03 if case.fn(case.params, case.x).dtype == jnp.bfloat16 else 1e-4
    close = lambda x, y: np.abs(x - y).max() <= limit * np.abs(y).max()
    if not close(out, reference(factors)):
        tried = [k for k in (0, 0.5, 2, 3, 4) if close(out, reference(factors, k))]
        return "wrong" if not tried else f"delta x {tried[0]}" if tried[0] else "no adapter"
    want = jax.jit(jax.grad(lambda factors: loss(reference(factors))))(factors)
    if all(close(grads[path], want[path]) for path in paths):
        return "right"
    return "wrong gradient" if any(map(np.any, grads.values())) else "no gradient"


def verdict(case: Case, library: str, adapt: Callable, options: dict[str, Any]) -> str:
    """Of one cell, from empty caches."""
    jax.clear_caches()
    case.before()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = judge(case, adapt(case, **options))
        except Exception as error:
            said = "refuses" if "Refusing" in str(error) else f"error: {type(error).__name__}"
    if said == "right" and any(w.category is lowrank.MaterializeWarning for w in caught):
        return "materialized"
    outside = REMARKS.get((case.name, library), "").startswith("not meant for")
    return f"not meant for ({said})" if outside and said != "right" else said


def main() -> None:
    """Print versions, the table, and the remarks."""
    packages = ("jax", "flax", "lowrank_jax", "qwix", "quax")
    versions = ", ".join(f"{name} {INSTALLED.get(name, ABSENT)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}, {jax.default_backend()}\n")
    table, remarks = [["model", *COLUMNS], ["---"] * (1 + len(COLUMNS))], {}
    for case in (case for case in cases() if all(word in case.name for word in sys.argv[1:])):
        table.append([case.name])
        for library, adapt, options in COLUMNS.values():
            said = verdict(case, library, adapt, options) if library in INSTALLED else ABSENT
            if said == "right" and table[-1][-1] == "refuses":
                said = "materialized"  # all that the option adds
            remark = REMARKS.get((case.name, library))
            if remark and said not in ("right", ABSENT):
                said += f" [{remarks.setdefault(remark, len(remarks) + 1)}]"
            table[-1].append(said)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print("\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table))
    print("\n" + "\n".join(f"[{number}] {remark}" for remark, number in remarks.items()))


if __name__ == "__main__":
    main()

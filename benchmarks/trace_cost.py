"""What lift and the functions of trees cost before a program runs: traces, compilation, dry runs.

Run: python benchmarks/trace_cost.py plain [--layers 32] [--repeat 5]
     python benchmarks/trace_cost.py hand [--layers 10 40 80] [--repeat 5] [--compile]
     python benchmarks/trace_cost.py trees [--layers 320] [--repeat 3]

plain: tracing value_and_grad of a Flax Llama's loss with respect to all parameters, beside the
lifted model with respect to the adapters of all linears. hand: a Llama in bare jnp, its gradient
with respect to LoRA written by hand, beside the same model lifted; traced, and with --compile
lowered and compiled. trees: plan, init, combine, specs and report of the bare model, beside the
trace of the model that plan and report start with.

The jit caches are cleared before each measurement. Seconds are of the process's CPU time, which
other work on the machine disturbs less; variants are measured in turn, and figures are medians.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama

import lowrank_jax as lowrank

DIM, HEADS, KV_HEADS, HEAD, HIDDEN, VOCAB = 64, 4, 2, 16, 128, 512
LINEAR = {
    "q": (DIM, HEADS * HEAD),
    "k": (DIM, KV_HEADS * HEAD),
    "v": (DIM, KV_HEADS * HEAD),
    "o": (HEADS * HEAD, DIM),
    "gate": (DIM, HIDDEN),
    "up": (DIM, HIDDEN),
    "down": (HIDDEN, DIM),
}
CONFIG = lowrank.LoraConfig(rank=8, alpha=16, targets=[f"layers/**/{name}" for name in LINEAR])


def shapes(layers: int, scan: bool = False, remat: bool = False):
    """A small Flax Llama of many layers: its apply function, parameter shapes and tokens."""
    config = llama.LlamaConfig(
        vocab=VOCAB, dim=DIM, layers=layers, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD,
        hidden=HIDDEN, tie_embeddings=False, scan_layers=scan, remat=remat,
    )  # fmt: skip
    model = llama.Llama(config)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return model.apply, params, tokens


def loss_of(apply):
    """Mean next-token loss."""

    def loss(params, tokens):
        logits = jax.nn.log_softmax(apply(params, tokens)[:, :-1])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

    return loss


# The same model in bare jnp


def bare_shapes(layers: int):
    """Parameter shapes of the bare Llama, of its factors by hand, and tokens."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    norms = lambda: {"norm_1": array(DIM), "norm_2": array(DIM)}
    linear = lambda: {name: array(*shape) for name, shape in LINEAR.items()}
    factors = lambda: {name: (array(i, 8), array(8, o)) for name, (i, o) in LINEAR.items()}
    params = {
        "embed": array(VOCAB, DIM),
        "layers": [{**linear(), **norms()} for _ in range(layers)],
        "norm": array(DIM),
        "head": array(DIM, VOCAB),
    }
    return params, [factors() for _ in range(layers)], jax.ShapeDtypeStruct((2, 32), jnp.int32)


def rms_norm(x, gain):
    """Root mean square normalization."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def rotate(x):
    """Rotary position embedding of [batch, time, heads, HEAD]."""
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    one, two = jnp.split(x, 2, -1)
    return jnp.concatenate([one * cos - two * sin, one * sin + two * cos], -1)


def bare_llama(params, tokens, linear):
    """Logits; linear(layer number, name, weight, x) is the product of a linear layer."""
    x, (batch, time_steps) = params["embed"][tokens], tokens.shape
    mask = jnp.tril(jnp.ones((time_steps, time_steps), bool))
    for i, layer in enumerate(params["layers"]):
        use = lambda name, x, i=i, layer=layer: linear(i, name, layer[name], x)
        h = rms_norm(x, layer["norm_1"])
        q = rotate(use("q", h).reshape(batch, time_steps, HEADS, HEAD))
        k = rotate(use("k", h).reshape(batch, time_steps, KV_HEADS, HEAD))
        v = use("v", h).reshape(batch, time_steps, KV_HEADS, HEAD)
        k, v = (jnp.repeat(one, HEADS // KV_HEADS, 2) for one in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, time_steps, HEADS * HEAD)
        x = x + use("o", h)
        h = rms_norm(x, layer["norm_2"])
        x = x + use("down", jax.nn.silu(use("gate", h)) * use("up", h))
    return rms_norm(x, params["norm"]) @ params["head"]


def bare_model(params, tokens):
    """Logits of the frozen model."""
    return bare_llama(params, tokens, lambda i, name, w, x: x @ w)


def step_by_hand(factors, params, tokens):
    """Loss and gradient of LoRA of scale 2, written by hand."""

    def loss(factors):
        def linear(i, name, w, x):
            a, b = factors[i][name]
            return x @ w + 2.0 * ((x @ a) @ b)

        return loss_of(lambda params, tokens: bare_llama(params, tokens, linear))(params, tokens)

    return jax.value_and_grad(loss)(factors)


def lifted_step(apply):
    """Loss and gradient of the lifted model with respect to its adapters."""
    loss = loss_of(lowrank.lift(lambda params, tokens: apply(params, tokens), fallback="raise"))

    def step(lora, base, tokens):
        return jax.value_and_grad(lambda lora: loss(lowrank.combine(base, lora), tokens))(lora)

    return step


# Measurements


def measure(call, times: list[float]):
    """Call, append the seconds of CPU time that it took, and return its result."""
    start = time.process_time()
    out = call()
    times.append(time.process_time() - start)
    return out


def trace(step, args, times: list[float]):
    """Trace a step from cold caches."""
    jax.clear_caches()
    own = lambda *args: step(*args)
    return measure(lambda: jax.jit(own).trace(*args), times)


def compare_plain(layers: int, repeat: int) -> None:
    """Print the cost of tracing a Flax model lifted, beside the model itself."""
    for scan, remat in ((False, False), (False, True), (True, True)):
        apply, params, tokens = shapes(layers, scan, remat)
        plan = lowrank.plan(apply, params, tokens)
        config = lowrank.LoraConfig(rank=8)
        init = lambda p, plan=plan: lowrank.init(jax.random.key(0), p, config, plan=plan)
        base, lora = jax.eval_shape(init, params)
        plain, lifted = [], []
        for _ in range(repeat):
            trace(jax.value_and_grad(loss_of(apply)), (params, tokens), plain)
            trace(lifted_step(apply), (lora, base, tokens), lifted)
        one, two = map(statistics.median, (plain, lifted))
        form = ("scan" if scan else "unrolled") + ("+remat" if remat else "")
        print(
            f"{form:15} layers {layers}: plain {one:.2f} s, lifted {two:.2f} s, "
            f"ratio {two / one:.2f}"
        )


def compare_hand(layers: int, repeat: int, compiles: bool) -> None:
    """Print the cost of tracing and compiling LoRA by lift, beside LoRA by hand."""
    params, factors, tokens = bare_shapes(layers)
    plan = lowrank.plan(bare_model, params, tokens)
    init = lambda params: lowrank.init(jax.random.key(0), params, CONFIG, plan=plan)
    base, lora = jax.eval_shape(init, params)
    variants = {
        "hand": (step_by_hand, (factors, params, tokens)),
        "lifted": (lifted_step(bare_model), (lora, base, tokens)),
    }
    times = {}
    for _ in range(repeat):
        for name, (step, args) in variants.items():
            traced = trace(step, args, times.setdefault(("trace", name), []))
            if compiles:
                lowered = measure(traced.lower, times.setdefault(("lower", name), []))
                measure(lowered.compile, times.setdefault(("compile", name), []))
    for what in dict.fromkeys(what for what, _ in times):
        hand, lifted = (statistics.median(times[what, name]) for name in variants)
        print(
            f"{what:8} layers {layers}: by hand {hand:.2f} s, lifted {lifted:.2f} s, "
            f"ratio {lifted / hand:.2f}, {1000 * lifted / layers:.1f} ms a layer"
        )


def measure_trees(layers: int, repeat: int) -> None:
    """Print the cost of functions of trees, and of the trace that plan and report start with."""
    params, _, tokens = bare_shapes(layers)
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    specs = jax.tree.map(lambda leaf: jax.P(), params)
    times: dict[str, list[float]] = {}
    for _ in range(repeat):
        run = lambda name, call: measure(call, times.setdefault(name, []))
        trace(bare_model, (params, tokens), times.setdefault("trace", []))
        jax.clear_caches()
        plan = run("plan", lambda: lowrank.plan(bare_model, params, tokens))
        init = lambda plan=plan: lowrank.init(jax.random.key(0), arrays, CONFIG, plan=plan)
        init()  # compiles the initializers
        base, lora = run("init", init)
        tree = run("combine", lambda base=base, lora=lora: lowrank.combine(base, lora))
        run("specs", lambda lora=lora: lowrank.specs(lora, specs))
        jax.clear_caches()
        run("report", lambda tree=tree: lowrank.report(bare_model, tree, tokens))
    for name, values in times.items():
        print(f"{name:8} layers {layers}: {1000 * statistics.median(values):.0f} ms")


def main() -> None:
    """Measure what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("plain", "hand", "trees"))
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--repeat", type=int)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    default = {"plain": [32], "hand": [10, 40, 80], "trees": [320]}[options.what]
    repeat = options.repeat or (3 if options.what == "trees" else 5)
    for layers in options.layers or default:
        if options.what == "plain":
            compare_plain(layers, repeat)
        elif options.what == "hand":
            compare_hand(layers, repeat, options.compile)
        else:
            measure_trees(layers, repeat)


if __name__ == "__main__":
    main()

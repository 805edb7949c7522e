"""DoRA's train step and forward against LoRA's: FLOPs, memory, dense products, time.

Run on a quiet machine: python benchmarks/dora.py [--rank 16] [--repeat 15]
Counts alone: python benchmarks/dora.py --repeat 0

All seven linears of Llama-like layers are adapted (flops.py's block); 1024 tokens. "dense" is DoRA
by hand as PEFT has it, a @ b formed for the norm of every weight; benchmarks/dora_peft.py is
PEFT itself. The step is loss, gradient and AdamW over the adapters. FLOPs and temporaries are XLA's
own figures for the default device. Counted are products whose result has a weight's shape, in the
compiled step, and arrays of a weight's shape that forward makes and keeps for backward. All steps
are timed in turn within one process; printed are medians, and their ratios to LoRA's.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flops import block, dense_gradients, flops, make, model

import lowrank_jax as lowrank

TX = optax.adamw(1e-3)


def problem(layers: int, dim: int, hidden: int, vocab: int, batch: int, tokens: int, rank: int):
    """The dense parameters, the data, and name -> (forward, base, adapter)."""
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    fill = lambda s: jax.random.normal(next(keys), s.shape) * s.shape[0] ** -0.5
    params = jax.tree.map(fill, make(layers, dim, hidden, vocab))
    x = jax.random.normal(jax.random.key(1), (batch, tokens, dim))
    y = jnp.zeros((batch, tokens), jnp.int32)
    plan = lowrank.plan(model, params, x)

    def adapters(dora: bool):
        config = lowrank.LoraConfig(rank=rank, dora=dora)
        base, lora = lowrank.init(jax.random.key(2), params, config, plan=plan)
        return base, jax.tree.map(lambda v: v + 0.01, lora)

    def lifted(lora, base, x):
        return lowrank.lift(model, fallback="raise")(lowrank.combine(base, lora), x)

    def dense(lora, base, x):
        def linear(pair, x):
            w, l = pair
            change = l.scale * (l.a @ l.b)
            gain = l.magnitude / jax.lax.stop_gradient(jnp.linalg.norm(w + change, axis=0))
            same = x @ w
            return same + (gain - 1) * same + gain * l.scale * ((x @ l.a) @ l.b)

        for w, l in zip(base["layers"], lora["layers"], strict=True):
            x = block({name: (w[name], l[name]) for name in w}, x, linear)
        return x @ base["head"]

    dora = adapters(True)
    forwards = {
        "lora": (lifted, *adapters(False)),
        "dora": (lifted, *dora),
        "dora, dense": (dense, params, dora[1]),
        "dora, folded": (lifted, params, lowrank.fold_norms(*dora)),
    }
    return params, (x, y), forwards


def loss_of(forward, base, x, y):
    """lora -> the loss."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return lambda lora: cross_entropy(forward(lora, base, x), y).mean()


def train_step(forward):
    """Loss, gradient and AdamW."""

    def step(lora, state, base, x, y):
        value, gradient = jax.value_and_grad(loss_of(forward, base, x, y))(lora)
        updates, state = TX.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, value

    return jax.jit(step)


def compiled_steps(data, forwards):
    """name -> the compiled train step and its arguments; what is folded is not trained."""
    out = {}
    for name, (forward, base, lora) in forwards.items():
        if name != "dora, folded":
            arguments = (lora, TX.init(lora), base, *data)
            out[name] = train_step(forward).lower(*arguments).compile(), arguments
    return out


def compiled_forwards(data, forwards):
    """name -> the compiled forward and its arguments."""
    out = {}
    for name, (forward, base, lora) in forwards.items():
        out[name] = jax.jit(forward).lower(lora, base, data[0]).compile(), (lora, base, data[0])
    return out


def kept_for_backward(forward, base, lora, data, params) -> list:
    """Arrays of a weight's shape that forward makes and keeps; the weights themselves are given."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params["layers"])}
    shapes |= {shape[::-1] for shape in shapes}
    pullback = lambda lora, base: jax.vjp(loss_of(forward, base, *data), lora)[1]
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(pullback(*args)))(lora, base)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    given = {*map(id, jaxpr.invars), *map(id, jaxpr.constvars)}
    for equation in jaxpr.eqns:  # which XLA makes no array for
        if equation.primitive.name == "stop_gradient" and id(equation.invars[0]) in given:
            given.add(id(equation.outvars[0]))
    made = {id(v): v for v in jaxpr.outvars if id(v) not in given}
    return [v.aval for v in made.values() if v.aval.shape in shapes]


def medians(table, repeat: int):
    """name -> seconds, timed in turn."""
    times = {name: [] for name in table}
    for number in range(repeat + 1):
        for name, (compiled, arguments) in table.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    sizes = (args.layers, args.dim, args.hidden, 512, args.batch, args.tokens, args.rank)
    params, data, forwards = problem(*sizes)
    for title, compiled in (("step", compiled_steps), ("forward", compiled_forwards)):
        table = compiled(data, forwards)
        reference = flops(table["lora"][0])
        times = medians(table, args.repeat) if args.repeat else {}
        for name, (program, _) in table.items():
            dense = len(dense_gradients(program.as_text(), params))
            temporary = program.memory_analysis().temp_size_in_bytes / 2**20
            line = (
                f"{title:8}{name:13} {flops(program) / 1e9:7.2f} GFLOP, "
                f"{flops(program) / reference:.4f} of LoRA's; {temporary:6.1f} MiB; "
                f"{dense} products of a weight's shape"
            )
            if title == "step":
                forward, base, lora = forwards[name]
                line += f", {len(kept_for_backward(forward, base, lora, data, params))} kept"
            if times:
                line += f"; {times[name] * 1e3:.1f} ms, {times[name] / times['lora']:.3f} of LoRA's"
            print(line)


if __name__ == "__main__":
    main()

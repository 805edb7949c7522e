"""Time of a LoRA step's loss and gradient, against the frozen model's own forward and backward.

Run on a quiet machine: python benchmarks/step_time.py [--layers 4] [--rank 16] [--repeat 15]

Limit 1.00 is the same model's loss and its gradient with respect to the input alone: the forward
and the dx products that any adapter needs. Beside it: the adapters written by hand, and full
fine-tuning. All are timed in turn within one process; printed are medians, and their ratios to the
limit.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flops import block, make, model

import lowrank_jax as lowrank


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    shapes = make(options.layers, options.dim, options.hidden, 512)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    fill = lambda s: jax.random.normal(next(keys), s.shape) * s.shape[0] ** -0.5
    params = jax.tree.map(fill, shapes)
    x = jax.random.normal(jax.random.key(1), (options.batch, options.tokens, options.dim))
    y = jnp.zeros((options.batch, options.tokens), jnp.int32)
    plan = lowrank.plan(model, params, x)
    config = lowrank.LoraConfig(rank=options.rank)
    base, lora = lowrank.init(jax.random.key(2), params, config, plan=plan)
    lora = jax.tree.map(lambda v: v + 0.01, lora)

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def by_hand(lora, base, x):
        linear = lambda pair, x: x @ pair[0] + 2.0 * ((x @ pair[1].a) @ pair[1].b)
        for w, l in zip(base["layers"], lora["layers"], strict=True):
            x = block({name: (w[name], l[name]) for name in w}, x, linear)
        return x @ base["head"]

    lifted = lowrank.lift(model, fallback="raise")
    grad = jax.value_and_grad
    steps = {
        "frozen, dx": jax.jit(lambda l, b, x: grad(lambda x: loss(model(b, x)))(x)),
        "lifted": jax.jit(
            lambda l, b, x: grad(lambda l: loss(lifted(lowrank.combine(b, l), x)))(l)
        ),
        "by hand": jax.jit(lambda l, b, x: grad(lambda l: loss(by_hand(l, b, x)))(l)),
        "full": jax.jit(lambda l, b, x: grad(lambda b: loss(model(b, x)))(b)),
    }
    times = {name: [] for name in steps}
    for number in range(options.repeat + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(lora, base, x))
            if number:
                times[name].append(time.perf_counter() - start)
    limit = statistics.median(times["frozen, dx"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:12} {middle * 1e3:8.1f} ms, {middle / limit:.3f} of the limit")


if __name__ == "__main__":
    main()

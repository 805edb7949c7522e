"""One step of decoding a mixed batch: adapters by `select`, against copies of factors.

Run on a quiet machine: python benchmarks/mixed_batch.py [--examples 32] [--adapters 8]

The model is the projections of SmolLM2 alone, scanned over its 30 layers, for one token of each
example. Timed in turn within one process: an adapter for each example, selected inside jax.vmap;
the same with the factors gathered for each example first; one adapter for all; none. Printed are
medians, and the compiler's temporaries.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_jax as lowrank

LAYERS, DIM, HIDDEN, NARROW = 30, 576, 1536, 192
KERNELS = {
    "q": (DIM, DIM), "k": (DIM, NARROW), "v": (DIM, NARROW), "o": (DIM, DIM),
    "gate": (DIM, HIDDEN), "up": (DIM, HIDDEN), "down": (HIDDEN, DIM),
}  # fmt: skip
MIB = 2**20


def model(params: Any, x: jax.Array) -> jax.Array:
    """All projections of each layer, without attention: x [1, DIM] to [1, DIM]."""

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        narrow = x @ w["k"] + x @ w["v"]
        hidden = jax.nn.silu(x @ w["gate"]) * (x @ w["up"])
        y = jnp.tanh(x + x @ w["q"] + x @ w["o"] + hidden @ w["down"])
        return y.at[..., :NARROW].add(narrow), None

    return jax.lax.scan(layer, x, params)[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), len(KERNELS))
    draw = lambda key, shape: 0.02 * jax.random.normal(key, (LAYERS, *shape))
    params = {name: draw(key, KERNELS[name]) for key, name in zip(keys, KERNELS, strict=True)}
    plan = lowrank.plan(model, params, jnp.ones((1, DIM)))
    config = lowrank.LoraConfig(rank=options.rank)
    make = lambda seed: lowrank.init(seed, params, config, plan=plan)[1]
    many = lowrank.stack([make(seed) for seed in range(options.adapters)])
    x = jax.random.normal(jax.random.key(1), (options.examples, 1, DIM))
    index = jnp.arange(options.examples) % options.adapters
    fn = lowrank.lift(model, fallback="raise")

    def selected(params: Any, many: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        one = lambda k, x: fn(lowrank.combine(params, lowrank.select(many, k)), x)
        return jax.vmap(one)(index, x)

    def copied(params: Any, many: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        one = lambda lora, x: fn(lowrank.combine(params, lora), x)
        return jax.vmap(one)(lowrank.select(many, index), x)

    def single(params: Any, lora: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: fn(lowrank.combine(params, lora), x))(x)

    def none(params: Any, lora: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: model(params, x))(x)

    forms = {"selected": (selected, many), "copied": (copied, many)}
    forms |= {"one adapter": (single, make(0)), "no adapter": (none, make(0))}
    compiled = {
        name: (jax.jit(form).lower(params, tree, index, x).compile(), tree)
        for name, (form, tree) in forms.items()
    }
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(options.repeat):
        for name, (program, tree) in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(program(params, tree, index, x))
            times[name].append(time.perf_counter() - began)
    print(f"{options.examples} examples, {options.adapters} adapters of rank {options.rank}")
    for name, (program, _) in compiled.items():
        temporaries = program.memory_analysis().temp_size_in_bytes / MIB
        middle = statistics.median(times[name]) * 1e3
        print(f"  {name:12} {middle:7.1f} ms   temporaries {temporaries:6.1f} MiB")


if __name__ == "__main__":
    main()

"""What a call of a lifted function costs outside of a jitted step, beside the plain function's.

    python benchmarks/call_cost.py

Milliseconds a call, the median of many, lifted and plain taking turns: gradients and vmap without
jit (two inner jits; a loop), an eager call of many layers, and a jitted one. "By hand" is a jitted
function of as many arrays as the combined tree has, in plain dicts, that computes the same; nested
where the dicts are also those that the parameters have ("mlp", "kernel"), as in the combined tree.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

import lowrank_jax as lowrank


def turns(fns, rounds):
    """The median time of each, taking turns, in milliseconds."""
    found = {name: [] for name in fns}
    for fn in fns.values():
        jax.block_until_ready(fn())
    for _ in range(rounds):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            found[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


def small(rounds):
    """Gradients and vmap of a function with inner jits, and of a loop."""
    params = {"w": jnp.ones((8, 8)) / 8, "v": jnp.ones((8, 8)) / 8}
    base, lora = lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=2, targets="*"))
    one, two = jax.jit(lambda x, w: jnp.tanh(x @ w)), jax.jit(lambda x, w: x @ w)
    jits = lambda p, x: two(one(x, p["w"]), p["v"]).sum()
    loop = lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]
    x, many = jnp.ones((3, 8)), jnp.ones((4, 3, 8))
    live = {name: lowrank.lift(fn) for name, fn in (("jits", jits), ("loop", loop))}
    tree = lambda lora: lowrank.combine(base, lora)
    cases = {
        "grad, two inner jits": {
            "lifted": lambda: jax.grad(lambda l: live["jits"](tree(l), x))(lora),
            "plain": lambda: jax.grad(lambda p: jits(p, x))(params),
        },
        "vmap of a scan": {
            "lifted": lambda: jax.vmap(lambda x: live["loop"](tree(lora), x))(many),
            "plain": lambda: jax.vmap(lambda x: loop(params, x))(many),
        },
    }
    return {name: turns(fns, rounds) for name, fns in cases.items()}


def layers(count, rounds):
    """An eager call, a jitted call and combine, of many layers."""
    params = {f"layer_{i}": {"mlp": {"kernel": jnp.ones((8, 8)) / 8}} for i in range(count)}
    config = lowrank.LoraConfig(rank=2, targets="**/kernel")
    base, lora = lowrank.init(jax.random.key(0), params, config)
    x, tree = jnp.ones((1, 8)), lowrank.combine(base, lora)

    def fn(p, x):
        for i in range(count):
            x = x @ p[f"layer_{i}"]["mlp"]["kernel"]
        return x

    arrays = {
        name: {
            "w": leaf["mlp"]["kernel"],
            "a": node["mlp"]["kernel"].a,
            "b": node["mlp"]["kernel"].b,
        }
        for (name, leaf), node in zip(base.items(), lora.values(), strict=True)
    }

    @jax.jit
    def by_hand(arrays, x):
        for i in range(count):
            own = arrays[f"layer_{i}"]
            x = x @ own["w"] + 2 * (x @ own["a"]) @ own["b"]
        return x

    nested = {name: {"mlp": {"kernel": own}} for name, own in arrays.items()}

    @jax.jit
    def by_hand_nested(arrays, x):
        return by_hand({name: layer["mlp"]["kernel"] for name, layer in arrays.items()}, x)

    plain, live = jax.jit(fn), lowrank.lift(fn)
    jitted = jax.jit(live)
    fns = {
        "eager": lambda: live(tree, x),
        "jitted": lambda: jitted(tree, x),
        "by hand": lambda: by_hand(arrays, x),
        "by hand, nested": lambda: by_hand_nested(nested, x),
        "plain": lambda: plain(params, x),
        "combine": lambda: lowrank.combine(base, lora),
    }
    return {f"{count} layers": turns(fns, rounds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    for name, found in {
        **small(options.rounds),
        **layers(options.layers, options.rounds),
    }.items():
        figures = "   ".join(f"{key} {value:.2f}" for key, value in found.items())
        print(f"{name:24} {figures}")


if __name__ == "__main__":
    main()

"""What lift adds to tracing: a 32-layer unrolled Llama, forward and gradient, lifted against plain.

Run: python benchmarks/trace_cost.py [--layers 32] [--repeat 5]

Plain: make_jaxpr of value_and_grad of the loss with respect to all parameters. Lifted: the same of
the lifted model with respect to the adapters of all linears. The jit caches are cleared before each
measurement; the ratio is of medians measured in turn.
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


def shapes(layers: int, scan: bool = False, remat: bool = False):
    """A small Llama of many layers: its apply function, parameter shapes and tokens."""
    config = llama.LlamaConfig(
        vocab=512, dim=64, layers=layers, heads=4, kv_heads=2, head_dim=16, hidden=128,
        tie_embeddings=False, scan_layers=scan, remat=remat,
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


def seconds(make, args) -> float:
    """Seconds to trace, from cold caches."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.make_jaxpr(make)(*args)
    return time.perf_counter() - start


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    for scan, remat in ((False, False), (False, True), (True, True)):
        apply, params, tokens = shapes(options.layers, scan, remat)
        plan = lowrank.plan(apply, params, tokens)
        config = lowrank.LoraConfig(rank=8)
        key = jax.random.key(0)
        init = lambda p: lowrank.init(key, p, config, plan=plan)
        base, lora = jax.eval_shape(init, params)

        plain = jax.value_and_grad(loss_of(apply))
        lifted = lowrank.lift(apply, fallback="raise")

        def adapted(lora, base, tokens, lifted=lifted):
            loss = loss_of(lifted)
            return jax.value_and_grad(lambda l: loss(lowrank.combine(base, l), tokens))(lora)

        times = {"plain": [], "lifted": []}
        for _ in range(options.repeat):
            times["plain"].append(seconds(plain, (params, tokens)))
            times["lifted"].append(seconds(adapted, (lora, base, tokens)))
        medians = {name: statistics.median(values) for name, values in times.items()}
        form = ("scan" if scan else "unrolled") + ("+remat" if remat else "")
        print(
            f"{form:15} layers {options.layers}: plain {medians['plain']:.2f} s, "
            f"lifted {medians['lifted']:.2f} s, ratio {medians['lifted'] / medians['plain']:.2f}"
        )


if __name__ == "__main__":
    main()

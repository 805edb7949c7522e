"""Held-out loss of SmolLM2-135M after the main job's fine-tune, by method, rank and seed.

The base is SmolLM2-135M-Instruct decoded from Q4_1: what NF4 costs here is measured on weights that
had 4 bits before.

Run: python benchmarks/methods.py [--methods lora-4,lora-8,lora-16,dora-4] [--seeds 3]

A method is LoraConfig's and an initializer's: lora, rslora, dora, pissa, olora, orthogonal; after
the dash its rank; `nf4+` before it for a base of 4 bits, and nf4+loftq for LoftQ's, weighted by
what the layers see. The job is that of examples/finetune.py (the same windows, AdamW, 40 steps of
4 x 128 tokens, alpha twice the rank); the seed is of the factors and of the order of windows, the
same for all methods. Two to three minutes a run on two cores. Printed: nats per token on 48
held-out windows, and on as many of Python's own documentation, before and after; then means over
seeds, and their spread.
"""

import argparse
import collections
import functools
import pydoc_data.topics
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune
import frozen
import jax
import jax.numpy as jnp
import smollm2
import texts
from llama import Llama

import lowrank_jax as lowrank

NF4 = frozen.quantization("nf4")


def adapter(name: str, rank: int, seed: int, params, plan, covariances):
    """base and lora of a method."""
    quantized, name = name.startswith("nf4+"), name.removeprefix("nf4+")
    start = {
        "pissa": lambda: lowrank.initializers.pissa,
        "olora": lambda: lowrank.initializers.olora,
        "orthogonal": lambda: lowrank.initializers.orthogonal,
        "loftq": lambda: lowrank.initializers.loftq(NF4, 1, covariances()),
    }.get(name, lambda: None)()
    if start is None and name not in ("lora", "rslora", "dora"):
        raise SystemExit(f"{name!r} is no method here")
    config = lowrank.LoraConfig(rank=rank, rslora=name == "rslora", dora=name == "dora")
    if quantized and name != "loftq":
        params = lowrank.quantize(params, NF4, plan=plan)
    return lowrank.init(jax.random.key(seed), params, config, plan=plan, initializer=start)


def main() -> None:
    """Print one line for each run, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="dora-4,lora-4,lora-8,lora-16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    flags = parser.parse_args()
    pretrained = smollm2.load(smollm2.fetch())
    model, params = Llama(pretrained.config), pretrained.variables
    plan = lowrank.plan(model.apply, params, jax.ShapeDtypeStruct((4, 128), jnp.int32))
    train, held_out = texts.read_text(texts.DICTIONARY)
    cut = functools.partial(texts.windows, pretrained.tokenizer, length=128)
    other = "".join(pydoc_data.topics.topics.values())
    data = {"held out": cut(held_out)[:48], "pydoc": cut(other)[:48]}
    apply = lowrank.lift(model.apply)
    loss = jax.jit(functools.partial(finetune.next_token_loss, apply))

    @functools.cache
    def covariances():
        """What the layers see of some of the training text, as the main job measures it."""
        measure = lowrank.covariances(model.apply, lowrank.LoraConfig(), plan=plan)
        seen = frozen.loftq_windows(cut(train), 4, 0)
        return functools.reduce(
            functools.partial(jax.tree.map, jnp.add), [measure(params, tokens) for tokens in seen]
        )

    optimizer = finetune.make_optimizer(flags.learning_rate, flags.steps)
    step = finetune.make_step(apply, optimizer)
    found, before = collections.defaultdict(list), []
    for method in flags.methods.split(","):
        name, rank = method.rsplit("-", 1)
        for seed in range(flags.seeds):
            began = time.perf_counter()
            base, lora = adapter(name, int(rank), seed, params, plan, covariances)
            look = lambda base, lora: [
                finetune.mean_loss(loss, lowrank.combine(base, lora), windows, 4)
                for windows in data.values()
            ]
            before = look(base, lora) if seed == 0 else before
            state = optimizer.init(lora)
            trained = sum(leaf.size for leaf in jax.tree.leaves(lora))
            for tokens in islice(texts.batches(cut(train), 4, seed), flags.steps):
                lora, state, _ = step(base, lora, state, tokens)
            after = look(base, lora)
            found[method, trained].append(after)
            text = ", ".join(
                f"{key} {a:.3f} -> {b:.3f}" for key, a, b in zip(data, before, after, strict=True)
            )
            print(f"{method} seed {seed}: {text} ({time.perf_counter() - began:.0f} s)", flush=True)
    for (method, trained), runs in found.items():
        columns = []
        for name, values in zip(data, zip(*runs, strict=True), strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            columns.append(f"{name} {statistics.mean(values):.4f} ± {spread:.4f}")
        print(f"{method:16} {trained:>10,} trained   " + "   ".join(columns))


if __name__ == "__main__":
    main()

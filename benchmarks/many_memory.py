"""Memory of training N adapters of SmolLM2-135M in one step, and of DPO, as compilers assign it.

    python benchmarks/many_memory.py
    python benchmarks/many_memory.py --targets cpu h100 --adapters 1 2 4 8
    python benchmarks/many_memory.py --targets h100 v5e --dpo

Compiled from shapes: nothing is fetched, and nothing runs. The steps are those of
benchmarks/many.py and of examples/dpo.py: float32, 30 scanned layers, AdamW, adapters on all linear
layers, each with its own tokens; the adapters and their states are donated. `python
benchmarks/aot.py` prints how to install the compilers. Bytes are the compiler's: a context and the
workspaces of libraries come on top. For a v5e a row takes some minutes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot  # noqa: F401  # before jax
import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lowrank

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import dpo
from llama import Llama, LlamaConfig
from many import make_train

MIB = 2**20
SMOLLM2 = LlamaConfig(
    vocab=49152, dim=576, layers=30, heads=9, kv_heads=3, head_dim=64, hidden=1536
)
BASES = {  # a CPU gives each 4-bit integer a byte, unless two are packed into one
    "float32": lambda target: None,
    "nf4": lambda target: lowrank.QuantConfig(packing="uint8" if target == "cpu" else "uint4"),
}


def make_shapes(
    model: Llama, quant: lowrank.QuantConfig | None, rank: int, count: int | None
) -> tuple[Any, Any, Any]:
    """Shapes of the base, of the adapter and of its optimizer's state; of `count` adapters."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    plan = lowrank.plan(model.apply, params, tokens)
    config = lowrank.LoraConfig(rank=rank)

    def start(params: Any, keys: jax.Array) -> tuple[Any, Any, Any]:
        if quant is not None:
            params = lowrank.quantize(params, quant, plan=plan)
        make = lambda key: lowrank.init(key, params, config, plan=plan)[1]
        base = lowrank.init(keys.reshape(-1)[0], params, config, plan=plan)[0]
        over = (lambda fn: fn) if count is None else jax.vmap
        lora = over(make)(keys)
        return base, lora, over(optax.adamw(1e-3).init)(lora)

    keys = jax.eval_shape(
        lambda: jax.random.split(jax.random.key(0), () if count is None else count)
    )
    return jax.eval_shape(start, params, keys)


def report(name: str, target: str, step: Callable, args: tuple[Any, ...], **options: Any) -> None:
    """Print one row."""
    began = time.perf_counter()
    found = lowrank.estimate(step, *args, target=None if target == "cpu" else target, **options)
    groups = found.groups
    parts = (groups["base"], groups["scales"], groups["adapters"], groups["optimizer"])
    sizes = (*parts, groups["padding"], found.temporaries, found.total)
    cells = " | ".join(f"{size / MIB:,.1f}" for size in sizes)
    print(f"| {target} | {name} | {cells} |", flush=True)
    print(f"compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", nargs="+", default=["cpu", "h100", "v5e"], help="(%(default)s)")
    add("--bases", nargs="+", default=[*BASES], choices=[*BASES], help="(%(default)s)")
    add("--adapters", nargs="+", type=int, default=[1, 2, 4, 8], help="(%(default)s)")
    add("--tokens", type=int, default=128, help="of each adapter (%(default)s)")
    add("--rank", type=int, default=16, help="(%(default)s)")
    add("--dpo", action="store_true", help="the step of examples/dpo.py: two pairs of answers")
    options = parser.parse_args()
    model = Llama(SMOLLM2)
    apply = lowrank.lift(model.apply, fallback="raise")
    names = "target", "step", "base, MiB", "scales", "adapters", "optimizer", "padding"
    print(f"| {' | '.join(names)} | temporaries | total |")
    print("|---" * 9 + "|")
    for target in options.targets:
        for name in options.bases:
            shapes = lambda count, name=name, target=target: make_shapes(
                model, BASES[name](target), options.rank, count
            )
            if options.dpo:
                step = dpo.make_step(apply, optax.adamw(1e-3), 0.1)
                tokens = (2, 2, options.tokens)
                batch = tuple(jax.ShapeDtypeStruct(tokens, kind) for kind in (jnp.int32, bool))
                report(f"{name}, DPO", target, step, (*shapes(None), batch))
                continue
            for count in options.adapters:
                step = jax.vmap(make_train(apply), (None, 0, 0, 0))
                tokens = jax.ShapeDtypeStruct((count, 1, options.tokens), jnp.int32)
                args = (*shapes(count), tokens)
                report(f"{name}, {count} adapters", target, step, args, donate=(1, 2))


if __name__ == "__main__":
    main()

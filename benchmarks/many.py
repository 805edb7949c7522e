"""Training eight adapters of SmolLM2 at once, against eight steps of one adapter each.

    python benchmarks/many.py
    python benchmarks/many.py --repeat 5 --layers 8

Run on a quiet machine; it takes some minutes. Each adapter has its own 128 tokens. The two programs
run in turn within one process, for a dense base and for one in NF4; printed are medians, and the
ratio of one step of all to that many steps of one. Two rows tell where the time goes: the frozen
model's forward and backward for the tokens of all, as one batch, and for the tokens of one. The
table of memory is the compiler's: arguments and temporaries of each program. many_memory.py beside
this file tells memory for each number of adapters, and for other chips.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lowrank

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm2
from finetune import next_token_loss
from llama import Llama

MIB = 2**20


def read_model(layers: int | None) -> tuple[Llama, Any]:
    """SmolLM2, or its first layers."""
    pretrained = smollm2.load(smollm2.fetch())
    config, params = pretrained.config, pretrained.variables
    if layers is not None:
        config = config.__class__(**{**vars(config), "layers": layers})
        cut = jax.tree.map(lambda leaf: leaf[:layers], params["params"]["layers"])
        params = {"params": {**params["params"], "layers": cut}}
    return Llama(config), params


def make_train(apply: Callable) -> Callable:
    """A step of one adapter: (base, adapter, optimizer state, tokens [1, t]) -> the same, loss."""
    optimizer = optax.adamw(1e-3)

    def train(base: Any, lora: Any, state: Any, tokens: jax.Array) -> Any:
        loss = lambda lora: next_token_loss(apply, lowrank.combine(base, lora), tokens)
        value, gradients = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(gradients, state, lora)
        return optax.apply_updates(lora, updates), state, value

    return train


def make_programs(model: Llama, count: int) -> dict[str, Callable]:
    """Functions of (base, adapters, optimizer states, tokens [count, 1, t])."""
    apply = lowrank.lift(model.apply, fallback="raise")
    train = make_train(apply)

    def frozen(base: Any, lora: Any, state: Any, tokens: jax.Array) -> Any:
        """Loss and gradient with respect to the activations: what no adapter can do without."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        logits, back = jax.vjp(lambda scale: apply(scaled(base, scale), flat[:, :-1]), jnp.ones(()))
        return back(jax.nn.softmax(logits))

    def scaled(base: Any, scale: jax.Array) -> Any:
        # a gradient with respect to the first activations flows back through all layers
        table = base["params"]["embed_tokens"]["embedding"] * scale
        whole = {**base["params"], "embed_tokens": {"embedding": table}}
        return {**base, "params": whole}

    every = jax.vmap(train, (None, 0, 0, 0))
    return {
        f"{count} at once": jax.jit(every),
        "one": jax.jit(train),
        f"frozen, {count}": jax.jit(frozen),
        "frozen, one": jax.jit(frozen),
    }


def measure(model: Llama, params: Any, options: argparse.Namespace, name: str) -> None:
    """Print times and memory for one base."""
    count = options.adapters
    shape = jax.ShapeDtypeStruct((1, options.tokens), jnp.int32)
    plan = lowrank.plan(model.apply, params, shape)
    if name == "nf4":
        quant = lowrank.QuantConfig(packing="uint8")
        params = lowrank.quantize(params, quant, plan=plan)
    config = lowrank.LoraConfig(rank=options.rank)
    start = lambda key: lowrank.init(key, params, config, plan=plan)
    base, lora = start(jax.random.key(0))
    many = jax.vmap(lambda key: start(key)[1])(jax.random.split(jax.random.key(1), count))
    optimizer = optax.adamw(1e-3)
    tokens = jax.random.randint(jax.random.key(2), (count, 1, options.tokens), 0, 4096)
    all_of_them = base, many, jax.vmap(optimizer.init)(many), tokens
    one_of_them = base, lora, optimizer.init(lora), tokens[0]
    compiled, arguments = {}, {}
    for kind, program in make_programs(model, count).items():
        arguments[kind] = one_of_them if kind.endswith("one") else all_of_them
        compiled[kind] = program.lower(*arguments[kind]).compile()

    times: dict[str, list[float]] = {kind: [] for kind in compiled}
    for _ in range(options.repeat):
        for kind, program in compiled.items():
            began = time.perf_counter()
            for _ in range(count if kind.endswith("one") else 1):
                jax.block_until_ready(program(*arguments[kind]))
            times[kind].append(time.perf_counter() - began)
    print(f"\nbase {name}: seconds for {count} adapters of {options.tokens} tokens each")
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    for kind, seconds in middle.items():
        memory = compiled[kind].memory_analysis()
        print(
            f"  {kind:12} {seconds:7.2f} s   arguments {memory.argument_size_in_bytes / MIB:7.0f}"
            f" MiB   temporaries {memory.temp_size_in_bytes / MIB:7.0f} MiB"
        )
    for kind, single in ((f"{count} at once", "one"), (f"frozen, {count}", "frozen, one")):
        pairs = zip(times[kind], times[single], strict=True)
        ratios = sorted(together / apart for together, apart in pairs)
        print(
            f"  {kind} / {count} times {single}: {middle[kind] / middle[single]:.2f}"
            f" (each pass {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, help="of SmolLM2's 30")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    model, params = read_model(options.layers)
    for name in ("dense", "nf4"):
        measure(model, params, options, name)


if __name__ == "__main__":
    main()

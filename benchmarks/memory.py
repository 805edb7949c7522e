"""Memory of a LoRA train step on a dense and on a 4-bit base, as the compiler for a device says it.

    python benchmarks/memory.py --target h100
    python benchmarks/memory.py --target v5e --layers 8
    python benchmarks/memory.py --target cpu --model small

The step is loss, gradient and AdamW over rank-16 adapters on all linears of a Llama
(examples/llama.py), lifted. `aot.py` beside this file says how to make compilers for devices that
are not there, and what such figures do not prove.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import aot  # before jax
import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from llama import Llama, LlamaConfig

import lowrank_jax as lowrank

MODELS = {
    "8b": {
        "vocab": 128256,
        "dim": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "hidden": 14336,
    },
    "65b": {
        "vocab": 32000,
        "dim": 8192,
        "layers": 80,
        "heads": 64,
        "kv_heads": 64,
        "head_dim": 128,
        "hidden": 22016,
    },
    "70b": {
        "vocab": 32000,
        "dim": 8192,
        "layers": 80,
        "heads": 64,
        "kv_heads": 8,
        "head_dim": 128,
        "hidden": 28672,
    },
    "small": {
        "vocab": 1000,
        "dim": 1024,
        "layers": 4,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 64,
        "hidden": 2816,
    },
}
MODES = {  # layers scanned, rematerialized
    "scan+remat": (True, True),
    "scan": (True, False),
    "unrolled+remat": (False, True),
    "unrolled": (False, False),
}
BASES = {
    "dense": None,
    "qwix nf4": None,
    "nf4": {"double_quant": False},
    "nf4+dq": {"double_quant": True},
    "int8": {"format": "int8", "double_quant": False},
    "nf4+dq, uint8": {"double_quant": True, "packing": "uint8"},
}


def step_of(model: str, mode: str, base: str, options: argparse.Namespace) -> tuple:
    """The step and the shapes of its arguments."""
    scanned, remat = MODES[mode]
    dtype = jnp.dtype(options.dtype)
    sizes = MODELS[model] | ({"layers": options.layers} if options.layers else {})
    llama = Llama(
        LlamaConfig(
            **sizes,
            tie_embeddings=False,
            dtype=dtype,
            param_dtype=dtype,
            scan_layers=scanned,
            remat=remat,
        )
    )
    inputs = jax.ShapeDtypeStruct((options.batch, options.tokens), jnp.int32)
    make = of_qwix if base == "qwix nf4" else of_ours
    apply, frozen, lora = make(llama, inputs, base, options)
    optimizer = optax.adamw(1e-4)
    if options.optimizer_bits == 8:
        optimizer = lowrank.quantize_state(optimizer)

    def step(frozen, lora, state, tokens):
        def loss_of(lora):
            logits = apply(frozen, lora, tokens[:, :-1]).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        loss, gradients = jax.value_and_grad(loss_of)(lora)
        updates, state = optimizer.update(gradients, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    tokens = jax.ShapeDtypeStruct((options.batch, options.tokens + 1), jnp.int32)
    return step, (frozen, lora, jax.eval_shape(optimizer.init, lora), tokens)


def of_ours(llama: Llama, inputs: Any, base: str, options: argparse.Namespace) -> tuple:
    """Apply, frozen base and adapters."""
    params = jax.eval_shape(llama.init, jax.random.key(0), inputs)
    plan = lowrank.plan(llama.apply, params, inputs)
    if BASES[base] is not None:
        quant = lowrank.QuantConfig(**BASES[base])
        params = jax.eval_shape(lambda p: lowrank.quantize(p, quant, plan=plan), params)
    config = lowrank.LoraConfig(rank=options.rank)
    init = lambda p: lowrank.init(jax.random.key(0), p, config, plan=plan)
    frozen, lora = jax.eval_shape(init, params)
    lifted = lowrank.lift(llama.apply, fallback="raise")
    apply = lambda frozen, lora, tokens: lifted(lowrank.combine(frozen, lora), tokens)
    return apply, frozen, lora


def of_qwix(llama: Llama, inputs: Any, base: str, options: argparse.Namespace) -> tuple:
    """The same of qwix, whose model makes its factors in the dtype of the model."""
    import qwix

    provider = qwix.LoraProvider(
        module_path=".*_proj",
        rank=options.rank,
        alpha=2.0 * options.rank,
        weight_qtype="nf4",
        tile_size=64,
    )
    model = qwix.apply_lora_to_model(llama, provider)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    leaves, treedef = jax.tree.flatten_with_path(variables)
    is_factor = ["_lora_" in jax.tree_util.keystr(path) for path, _ in leaves]
    pick = lambda wanted: [
        leaf for (_, leaf), own in zip(leaves, is_factor, strict=True) if own == wanted
    ]

    def apply(frozen, lora, tokens):
        rest, factors = iter(frozen), iter(lora)
        both = [next(factors) if own else next(rest) for own in is_factor]
        return model.apply(jax.tree.unflatten(treedef, both), tokens)

    return apply, pick(False), pick(True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--target", choices=aot.MEMORY, default="h100")
    add("--model", choices=MODELS, default="8b")
    add("--layers", type=int, help="fewer layers than the model has")
    add("--modes", default=",".join(MODES))
    add("--bases", default="dense;nf4;nf4+dq", help="separated by semicolons")
    add("--rank", type=int, default=16)
    add("--batch", type=int, default=1)
    add("--tokens", type=int, default=1024)
    add("--dtype", default="bfloat16")
    add("--optimizer-bits", type=int, choices=(8, 32), default=32)
    add("--hlo", type=Path, help="folder for the compiled programs' text")
    options = parser.parse_args()
    print(f"{options.model}, {options.target}; GiB")
    for mode in options.modes.split(","):
        dense = None
        for base in options.bases.split(";"):
            fn, shapes = step_of(options.model, mode, base, options)
            found = aot.compiled(fn, *shapes, target=options.target, donate=(1, 2))
            dense = found.temporaries if base == "dense" else dense
            ratio = f"{found.temporaries / dense:6.3f} of dense" if dense else ""
            print(
                f"{mode:15} {base:14} arguments {found.arguments:7.3f}  "
                f"temporaries {found.temporaries:7.3f} {ratio}  total {found.total:7.3f}  "
                f"compiled in {found.seconds:.0f} s",
                flush=True,
            )
            if options.hlo and found.program:
                options.hlo.mkdir(exist_ok=True)
                name = f"{options.target}-{options.model}-{mode}-{base}".replace(" ", "")
                (options.hlo / f"{name}.txt").write_text(found.program.as_text())


if __name__ == "__main__":
    main()

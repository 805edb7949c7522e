"""The frozen base, dense or in small integers, and the memory that a step on it takes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from texts import batches

import lowrank_jax as lowrank

Tree = Any
Apply = Callable[..., Any]

FORMATS = ("none", "nf4", "fp4", "int8")  # a checkpoint knows them by their places: append only
MEASURED_BATCHES = 8  # of the training text, for LoftQ: what the layers see


def quantization(format: str) -> lowrank.QuantConfig:
    """How linear layers are kept.

    Embeddings stay dense, as QLoRA has them: a tied one is the model's last projection too. Blocks
    of 32 take 4.25 bits a weight where QLoRA's 64 take 4.13: so small a model feels the difference.
    """
    # An accelerator packs two 4-bit integers into a byte by itself, a CPU gives each a whole one.
    packing = "uint8" if jax.default_backend() == "cpu" else "uint4"
    return lowrank.QuantConfig(format=format, block_size=32, double_quant=True, packing=packing)


def start(
    key: jax.Array,
    apply: Apply,
    params: Tree,
    config: lowrank.LoraConfig,
    plan: lowrank.Plan,
    format: str,
    how: str,
    windows: Sequence[np.ndarray],
) -> tuple[Tree, Tree]:
    """Base in a format of FORMATS, and its adapter, which on a quantized base starts as `how` says.

    Deletes the dense kernels of a base that is quantized. The windows are for LoftQ.
    """
    if format == "none":
        return lowrank.init(key, params, config, plan=plan)
    quant = quantization(format)
    if how == "loftq":
        return begin(key, apply, params, config, plan, quant, windows)
    base = lowrank.quantize(params, quant, plan=plan, donate=True)
    return lowrank.init(key, base, config, plan=plan)


def loftq_windows(data: np.ndarray, batch: int, seed: int) -> list[np.ndarray]:
    """The first batches of training, on which LoftQ measures what the layers see."""
    return list(islice(batches(data, batch, seed), MEASURED_BATCHES))


def begin(
    key: jax.Array,
    apply: Apply,
    params: Tree,
    config: lowrank.LoraConfig,
    plan: lowrank.Plan,
    quant: lowrank.QuantConfig,
    windows: Sequence[np.ndarray],
) -> tuple[Tree, Tree]:
    """Quantized base and adapter by LoftQ: the adapter starts at what quantizing loses.

    What matters of it is what the inputs of each layer see, which is measured on these windows.
    Linear layers that have no adapter are quantized as they are. Deletes the dense kernels.
    """
    measure = lowrank.covariances(apply, config, plan=plan)
    seen = measure(params, windows[0])
    for tokens in windows[1:]:
        seen = jax.tree.map(jnp.add, seen, measure(params, tokens))
    if rest := [path for path, use in plan.items() if use.linear and path not in seen]:
        others = dataclasses.replace(quant, targets=rest)
        params = lowrank.quantize(params, others, plan=plan, donate=True)
    loftq = lowrank.initializers.loftq(quant, 1, seen)
    base, lora = lowrank.init(key, params, config, plan=plan, initializer=loftq)
    kept = {id(leaf) for leaf in jax.tree.leaves(base)}
    for leaf in jax.tree.leaves(params):
        if id(leaf) not in kept:
            leaf.delete()
    return base, lora


def compiled(step: Any, format: str, base: Tree, *rest: Any) -> tuple[Any, dict[str, int]]:
    """A jitted step(base, *rest) compiled, and the bytes of its temporaries by the base's format.

    On a quantized base also those of the same step on a dense one, which is compiled on shapes.
    """
    bases = {"float32": base}
    if format != "none":
        bases = {format: base, "float32": jax.eval_shape(lowrank.dequantize, base)}
    steps = [step.lower(base, *rest).compile() for base in bases.values()]
    sizes = [step.memory_analysis().temp_size_in_bytes for step in steps]
    return steps[0], dict(zip(bases, sizes, strict=True))


def memory(
    report: lowrank.Report, optimizer_bytes: int, temporaries: dict[str, int]
) -> dict[str, dict[str, float]]:
    """The bytes that one step of training holds: part -> format of the base -> bytes.

    Args:
      report: of the model with its adapter; the base's dense leaves are float32.
      optimizer_bytes: of the optimizer's state.
      temporaries: of the step, as `compiled` returns them: the compiler's own account.
    """
    own = next(iter(temporaries))
    quantized = [leaf for leaf in report.values() if leaf.format]
    linear = sum(leaf.bits * math.prod(leaf.shape) / 8 for leaf in quantized)
    dense = sum(4 * math.prod(leaf.shape) for leaf in quantized)
    base = report.memory.base + report.memory.scales
    parts = {
        "base": {own: base, "float32": base - linear + dense},
        "adapter": dict.fromkeys(temporaries, report.memory.adapters),
        "optimizer state": dict.fromkeys(temporaries, optimizer_bytes),
        "temporaries of a step": temporaries,
    }
    whole = {name: sum(part[name] for part in parts.values()) for name in temporaries}
    first = {"base, its quantized linears": {own: linear, "float32": dense}} if quantized else {}
    return first | parts | {"in all": whole}


def memory_table(rows: dict[str, dict[str, float]]) -> Table:
    """The rows of `memory` in MiB, and where there are two columns their ratio."""
    columns = list(rows["in all"])
    compared = len(columns) > 1
    table = Table("memory, MiB")
    for column in [*columns, *(["ratio"] if compared else [])]:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        held = [row[column] for column in columns]
        ratio = [f"{held[0] / held[1]:.3f}"] if compared else []
        table.add_row(name, *(f"{count / 2**20:,.1f}" for count in held), *ratio)
    return table

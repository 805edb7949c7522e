"""What is saved where adapters of one input share a product: a Llama layer and its gradient.

    python benchmarks/shared_inputs.py [--repeat 30]                    # on this CPU, with times
    python benchmarks/shared_inputs.py --target h100 --dim 4096 --hidden 14336 --dtype bfloat16
    python benchmarks/shared_inputs.py --target v5e --dim 4096 --hidden 14336 --dtype bfloat16

The gradient is with respect to the factors of all seven linears and the layer's input, as within a
deeper model. Shared and each alone, the same step is compiled twice; on the CPU both are timed in
turn, and the median of the ratios of neighbors is printed with its quartiles. For the other targets
the compiler is asked; `aot.py` beside this file says how to make it, and what it does not prove.
"""

import argparse
import contextlib
import re
import statistics
import time

import aot  # before jax
import jax
import jax.numpy as jnp
from flops import block, make

import lowrank_jax as lowrank
from lowrank_jax._operators import shared_input


@contextlib.contextmanager
def products_alone():
    """A context manager in which no product is shared."""
    own, shared_input.is_worth = shared_input.is_worth, lambda *_: False
    try:
        yield
    finally:
        shared_input.is_worth = own


def step_of(options):
    """The gradient of one layer, in a trace of its own, and the shapes of its arguments."""
    dtype = jnp.dtype(options.dtype)
    shape = lambda s: jax.ShapeDtypeStruct(s.shape, dtype)
    params = jax.tree.map(shape, make(1, options.dim, options.hidden, 8)["layers"][0])
    x = jax.ShapeDtypeStruct((options.batch, options.tokens, options.dim), dtype)
    layer = lambda params, x: block(params, x, lambda w, x: x @ w)
    plan = lowrank.plan(layer, params, x)
    config = lowrank.LoraConfig(rank=options.rank, targets="**")
    base, lora = jax.eval_shape(lambda p: lowrank.init(0, p, config, plan=plan), params)
    if options.codes:
        quant = lowrank.QuantConfig(targets="**", packing=options.codes)
        base = jax.eval_shape(lambda p: lowrank.quantize(p, quant), params)

    def loss(lora, base, x):
        out = lowrank.lift(layer, fallback="raise")(lowrank.combine(base, lora), x)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return lambda lora, base, x: jax.grad(loss, (0, 2))(lora, base, x), (lora, base, x)


def list_products(text: str) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of the result and the operands of each product in an HLO text."""
    sizes = lambda dims: tuple(map(int, filter(None, dims.split(","))))
    known = {
        name: sizes(dims) for name, dims in re.findall(r"%?([\w.-]+) = \(?\w+\[([\d,]*)\]", text)
    }
    found = []
    for line in text.splitlines():
        gemm = "__cublas" in line or "__triton" in line
        made = re.match(
            r"\s*(?:ROOT )?%?([\w.-]+) = .*? (dot|convolution|custom-call)\((.*?)\)", line
        )
        if made and (made[2] != "custom-call" or gemm):
            names = re.findall(r"%([\w.-]+)", made[3]) or re.findall(r"([\w.-]+)(?:,|$)", made[3])
            found.append(tuple(known.get(name, ()) for name in (made[1], *names[:2])))
    return found


def count_columns(products, columns: int) -> int:
    """Products one of whose arrays has an axis of this size."""
    return sum(any(columns in shape for shape in shapes) for shapes in products)


def describe(found, options) -> str:
    """One line of counts."""
    text = found.program.as_text()
    products = list_products(text)
    cost = found.program.cost_analysis() or {}
    rank = options.rank
    counts = ", ".join(
        f"{count_columns(products, columns)} of {columns}" for columns in (3 * rank, 2 * rank, rank)
    )
    figures = [
        f"{len(products)} products ({counts} columns)",
        f"{len(re.findall(r' fusion[(]', text))} fusions",
        f"{len(re.findall(r' pad[(]', text))} pads",
        f"temporaries {found.temporaries * 1024:.1f} MiB",
    ]
    if "flops" in cost:
        figures.append(f"{cost['flops'] / 1e9:.3f} GFLOP")
    if "bytes accessed" in cost:
        figures.append(f"{cost['bytes accessed'] / 1e6:.1f} MB accessed")
    if found.cycles:
        figures.append(f"{found.cycles / 1e6:.3f} Mcycles")
    return ", ".join(figures)


def compare_times(steps, shapes, repeat: int) -> str:
    """The ratio of times, shared to alone."""
    key = jax.random.key(0)
    fill = lambda s: (
        0.02 * jax.random.normal(key, s.shape, s.dtype)
        if jnp.issubdtype(s.dtype, jnp.floating)
        else jnp.zeros(s.shape, s.dtype)
    )
    arguments = jax.tree.map(fill, shapes)
    ratios = []
    for number in range(repeat + 1):
        taken = {}
        for name in sorted(steps, reverse=bool(number % 2)):
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*arguments))
            taken[name] = time.perf_counter() - start
        if number:
            ratios.append(taken["shared"] / taken["alone"])
    first, middle, last = statistics.quantiles(ratios, n=4)
    return f"time, shared of alone: {middle:.3f} ({first:.3f} to {last:.3f}), {repeat} pairs"


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=aot.MEMORY, default="cpu")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--codes", choices=("uint4", "uint8"), help="an NF4 base of this packing")
    parser.add_argument("--repeat", type=int, default=30)
    options = parser.parse_args()
    steps = {}
    for name in ("alone", "shared"):
        fn, shapes = step_of(options)
        with products_alone() if name == "alone" else contextlib.nullcontext():
            found = aot.compiled(fn, *shapes, target=options.target)
        print(f"{name:7} {describe(found, options)}", flush=True)
        steps[name] = found.program
    if options.target == "cpu":
        print(compare_times(steps, shapes, options.repeat))


if __name__ == "__main__":
    main()

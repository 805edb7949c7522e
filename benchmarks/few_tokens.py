"""Products of few tokens with one weight: what a chip reads and writes, dense and quantized.

    python benchmarks/few_tokens.py [--target h100] [--tokens 1 2 4 8 16 64]

Forward is x·W with W of [4096, 14336] bfloat16, backward g·Wᵀ, each compiled alone. MB is the sum
of the arrays that the program's instructions read and write (on TPU as the compiler counts them),
so a weight decoded to memory counts twice. LOWRANK_JAX_FEW_TOKENS=0 shows the dot at any number of
tokens. `aot.py` beside this file says how to make the compilers, and what they do not prove.
"""

import argparse
import os
import re

import aot  # before jax
import jax
import jax.numpy as jnp

import lowrank_jax as lowrank

BASES = {
    "dense": None,
    "nf4": lowrank.QuantConfig(targets="w", double_quant=False),
    "nf4, uint8": lowrank.QuantConfig(targets="w", double_quant=False, packing="uint8"),
    "nf4+dq": lowrank.QuantConfig(targets="w"),
    "int8": lowrank.QuantConfig(targets="w", format="int8", double_quant=False),
}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}  # no memory is moved
BITS = {"pred": 8, "bf16": 16}


def count_traffic(program: str) -> tuple[int, int]:
    """Bytes that the instructions of a program's entry read and write, and their number."""
    entry = program[program.index("\nENTRY") :]
    sizes, total, count = {}, 0, 0
    for name, shape, op, rest in re.findall(
        r"\n\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", entry
    ):
        sizes[name] = sum(
            BITS.get(kind, int(re.sub(r"\D", "", kind.split("e")[0]) or 0)) * count_elements(dims)
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        if op in FREE or op.endswith("-start"):
            continue
        operands = set(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
        total += sizes[name] + sum(sizes[operand] for operand in operands if operand in sizes)
        count += 1
    return total // 8, count


def count_elements(dims: str) -> int:
    """Number of elements of a shape as the compiler prints it."""
    product = 1
    for size in filter(None, dims.split(",")):
        product *= int(size)
    return product


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=aot.MEMORY, default="h100")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--fan-in", type=int, default=4096)
    parser.add_argument("--fan-out", type=int, default=14336)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    options = parser.parse_args()
    limit = os.environ.get("LOWRANK_JAX_FEW_TOKENS", "unset")
    print(f"{options.target}, LOWRANK_JAX_FEW_TOKENS {limit}; MB, temporaries MiB, instructions")
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    params = {"w": shape(options.fan_in, options.fan_out)}
    apply = lowrank.lift(lambda params, x: x @ params["w"], fallback="raise")
    for name in options.bases:
        tree = params
        if (quant := BASES[name]) is not None:
            tree = jax.eval_shape(lambda p, q=quant: lowrank.quantize(p, q), params)
        bits = lambda array: 4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize
        own = sum(array.size * bits(array) for array in jax.tree.leaves(tree)) / 8e6
        for tokens in options.tokens:
            x, ct = shape(tokens, options.fan_in), shape(tokens, options.fan_out)
            back = lambda p, ct, x=x: jax.linear_transpose(lambda x: apply(p, x), x)(ct)[0]
            row = f"{name:11} {own:6.1f} MB {tokens:3} tokens"
            for which, fn, other in (("forward", apply, x), ("backward", back, ct)):
                found = aot.compiled(fn, tree, other, target=options.target)
                moved, count = count_traffic(found.program.as_text())
                moved = (found.program.cost_analysis() or {}).get("bytes accessed", moved)
                temporaries = found.temporaries * 1024
                row += f" | {which} {moved / 1e6:6.1f} {temporaries:6.1f} {count:2}"
            print(row, flush=True)


if __name__ == "__main__":
    main()

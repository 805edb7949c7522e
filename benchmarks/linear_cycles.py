"""One linear on a v5e: estimated cycles and memory of its products, dense and quantized.

    python benchmarks/linear_cycles.py [--target v5e]

Forward is x·W of 1024 tokens and W of [4096, 14336] bfloat16, backward g·Wᵀ, each compiled alone.
`aot.py` beside this file says how to make the compiler, and what its estimates do not prove.
"""

import argparse

import aot  # before jax
import jax
import jax.numpy as jnp

import lowrank_jax as lowrank

BASES = {
    "dense": None,
    "nf4": lowrank.QuantConfig(targets="w", double_quant=False),
    "nf4+dq": lowrank.QuantConfig(targets="w"),
    "nf4+dq, uint8": lowrank.QuantConfig(targets="w", packing="uint8"),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=aot.MEMORY, default="v5e")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--fan-in", type=int, default=4096)
    parser.add_argument("--fan-out", type=int, default=14336)
    options = parser.parse_args()
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    params = {"w": shape(options.fan_in, options.fan_out)}
    x, ct = shape(options.tokens, options.fan_in), shape(options.tokens, options.fan_out)
    apply = lowrank.lift(lambda params, x: x @ params["w"], fallback="raise")
    programs = {
        "forward": (apply, x),
        "backward": (lambda p, ct: jax.linear_transpose(lambda x: apply(p, x), x)(ct)[0], ct),
    }
    for which, (fn, other) in programs.items():
        dense = None
        for name, quant in BASES.items():
            tree = params
            if quant is not None:
                tree = jax.eval_shape(lambda p, q=quant: lowrank.quantize(p, q), params)
            found = aot.compiled(fn, tree, other, target=options.target)
            accessed = (found.program.cost_analysis() or {}).get("bytes accessed", 0)
            dense = dense or found.cycles
            ratio = f"{found.cycles / dense:5.2f} of dense" if dense else ""
            print(
                f"{which:9} {name:14} {found.cycles / 1e6:6.2f} Mcycles {ratio}, temporaries "
                f"{found.temporaries * 1024:6.1f} MiB, {accessed / 1e6:7.0f} MB accessed",
                flush=True,
            )


if __name__ == "__main__":
    main()

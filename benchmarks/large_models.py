"""Memory and collectives of QLoRA on large Llamas, for each device, as the chips' compilers say.

    python benchmarks/large_models.py
    python benchmarks/large_models.py --rows 405b

Each row is `python -m lowrank_jax estimate --quantize nf4` with the flags that it prints: a step of
AdamW over rank-16 adapters on all linear layers of a scanned, rematerialized Llama, on an NF4 base
whose scales are quantized too. A mesh is DATAxMODEL: FSDP and the sequences along data, tensor
parallelism along model. Collectives are the bytes that one step brings to one device. `python
benchmarks/aot.py` prints how to install the compilers. A context and the workspaces of libraries
come on top, and no speed is known.
"""

import argparse
import shlex
import sys
import time

import aot  # before jax

from lowrank_jax._cli import estimating

ROWS = (
    "--like llama-3-8b --chip v5e",
    "--like llama-2-70b --chip h100 --tokens 512",
    "--like llama-3-70b --chip h100",
    "--like llama-3-70b --chip v5e --mesh 8x1 --batch 8",
    "--like llama-3.1-405b --chip h100 --mesh 8x1 --batch 8 --tokens 256",
    "--like llama-3.1-405b --chip h100 --mesh 8x1 --batch 8 --tokens 2048 --loss-chunk 256",
    "--like llama-3.1-405b --chip h100 --mesh 1x8 --tokens 2048",
    "--like llama-3.1-405b --chip v5p --mesh 32x1 --batch 32 --tokens 1024 --loss-chunk 256",
)
GROUPS = ("base", "scales", "adapters", "optimizer")


def estimate_row(row):
    """Return the Estimate of a row."""
    parser = argparse.ArgumentParser()
    estimating.add_arguments(parser)
    return estimating.estimate_llama(parser.parse_args([*shlex.split(row), "--quantize", "nf4"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows that contain this")
    options = parser.parse_args()
    print("| flags | " + " | ".join(GROUPS) + " | temporaries | total, GiB | collectives, GB |")
    print("|---" * (len(GROUPS) + 4) + "|")
    for row in ROWS:
        if options.rows not in row:
            continue
        start = time.perf_counter()
        found = estimate_row(row)
        sizes = [found.groups[name] for name in GROUPS] + [found.temporaries, found.total]
        cells = [f"`{row}`", *(f"{size / aot.GIB:.2f}" for size in sizes)]
        if not found.fits:
            cells[-1] += " (does not fit)"
        moved = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.collectives.items())
        print("| " + " | ".join([*cells, moved or "none"]) + " |", flush=True)
        print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What each measure saves of the memory of a QLoRA step on one H100, one added after another.

    python benchmarks/savings.py

Each row is `python -m lowrank_jax estimate --chip h100 --quantize nf4` with the flags so far: a
step of AdamW over rank-16 adapters on all linear layers of a scanned, rematerialized Llama.
`python benchmarks/aot.py` prints how to install the compiler. Bytes are the compiler's: a context
and the workspaces of libraries come on top.
"""

import argparse
import sys
import time

import aot  # noqa: F401  # before jax

from lowrank_jax._cli import estimating

MEASURES = (  # what, flags
    ("4-bit linear layers, the rest as it comes, 2048 tokens", ""),
    ("512 tokens", "--tokens 512"),
    ("AdamW's states in 8 bits", "--optimizer-bits 8"),
    ("factors in bfloat16", "--factor-dtype bfloat16"),
    ("table and head in int8", "--quantize-vocabulary int8"),
    ("table and head in NF4", "--quantize-vocabulary nf4"),
    ("the loss over chunks of 128 tokens", "--loss-chunk 128"),
)
MODELS = ("llama-3-8b", "llama-2-70b")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--measures", type=int, default=len(MEASURES), help="only the first")
    options = parser.parse_args()
    print("| model | with | base, scales | adapter | optimizer | temporaries | total, 10⁹ bytes |")
    print("|---" * 7 + "|")
    for model in options.models.split(","):
        flags = ["--like", model, "--chip", "h100", "--quantize", "nf4", "--tokens", "2048"]
        for what, more in MEASURES[: options.measures]:
            flags += more.split()
            start = time.perf_counter()
            command = argparse.ArgumentParser()
            estimating.add_arguments(command)
            found = estimating.estimate_llama(command.parse_args(flags))
            groups = found.groups
            sizes = (
                groups["base"] + groups["scales"],
                groups["adapters"],
                groups["optimizer"],
                found.temporaries,
                found.total,
            )
            cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
            print(f"| {model} | {what} | {cells} |", flush=True)
            print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

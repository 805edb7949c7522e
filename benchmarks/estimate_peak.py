"""Compare lowrank_jax.estimate with the peak memory that a process really takes on a CPU.

    python benchmarks/estimate_peak.py

Each row is a training step of a Llama (`python -m lowrank_jax estimate`) in a process of its own:
the growth of its resident memory, from before the arguments are made to the highest point of three
steps. The step is compiled before, for compilers take memory too.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

ROWS = {
    "LoRA, float32": ["--dtype", "float32"],
    "DoRA, float32": ["--dtype", "float32", "--dora"],
    "QLoRA, int8": ["--dtype", "float32", "--quantize", "int8"],
    "QLoRA, NF4": ["--dtype", "float32", "--quantize", "nf4"],
    "LoRA, no remat": ["--dtype", "float32", "--no-remat"],
}
COMMON = ["--like", "smollm2-135m", "--tokens", "256", "--batch", "2"]


def read_status(name):
    """Read a size of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


def measure(flags):
    """Return the estimated total and the measured growth, in bytes."""
    import jax

    from lowrank_jax._cli import estimating

    kept = {}

    def keep(step, *args, **options):
        kept.update(step=step, args=args, donate=options["donate"])
        return estimate(step, *args, **options)

    estimate, estimating.estimate = estimating.estimate, keep
    parser = argparse.ArgumentParser()
    estimating.add_arguments(parser)
    found = estimating.estimate_llama(parser.parse_args(flags))
    compiled = jax.jit(kept["step"], donate_argnums=kept["donate"]).lower(*kept["args"]).compile()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest point
    before = read_status("VmRSS")
    # ones, written: a page of zeros takes no memory until it is written
    make = lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype)
    base, lora, state, *batch = jax.tree.map(make, kept["args"])
    for _ in range(3):
        lora, state, loss = compiled(base, lora, state, *batch)
        loss.block_until_ready()
    return found.total, read_status("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure([*COMMON, *ROWS[options.row]])))
        return
    print(f"{'step':20} {'estimated':>10} {'measured':>10}  MB, ratio")
    for row in ROWS:
        command = [sys.executable, __file__, "--row", row]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        estimated, measured = json.loads(done.stdout.splitlines()[-1])
        sizes = f"{estimated / 1e6:10.1f} {measured / 1e6:10.1f}"
        print(f"{row:20} {sizes}  {measured / estimated:.3f}", flush=True)


if __name__ == "__main__":
    main()

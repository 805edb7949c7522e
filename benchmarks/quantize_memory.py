"""Memory that quantize takes beside its result: leaves read from disk, stacks, and donated leaves.

    python benchmarks/quantize_memory.py [--mib 128] [--leaves 8]

Each case runs in a process of its own, on CPU: the peak of anonymous memory above what was in use
before, sampled every two milliseconds. Pages of a file that is mapped are not counted: the system
takes them back at will.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

import lowrank_jax as lowrank

MIB = 2**20
WIDTH = 2048  # rows of float32 of 8 KiB
CASES = {
    "leaves on disk": "one by one",
    "a stack on disk": "all leaves are layers of one array",
    "arrays, donated": "each is deleted when its codes are there",
}


def anonymous() -> float:
    """MiB of memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc/self/status, which Linux alone has")


class Peak(threading.Thread):
    """Samples `anonymous` until it is asked for the most it saw."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = anonymous(), False
        self.start()

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def stop(self) -> float:
        """The peak, in MiB."""
        self.over = True
        self.join()
        return self.most


def write(folder: Path, shape: tuple[int, ...], name: str) -> None:
    """Normal values, a layer at a time."""
    array = np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float32, shape=shape)
    rng = np.random.default_rng(0)
    for rows in array.reshape(-1, 256, WIDTH):
        rows[:] = rng.standard_normal(rows.shape, np.float32)
    array.flush()


def run(case: str, folder: Path, mib: int, leaves: int) -> None:
    """Quantize in this process and print what it took."""
    rows = mib * MIB // 4 // WIDTH
    names = [f"{i}.npy" for i in range(1 if "stack" in case else leaves)]
    shape = (leaves, rows, WIDTH) if "stack" in case else (rows, WIDTH)
    for name in names:
        write(folder, shape, name)
    params = {name: np.load(folder / name, mmap_mode="r") for name in names}
    plan = None
    if "stack" in case:
        layers = lambda p, x: jax.lax.scan(
            lambda x, w: ((x @ w)[..., :1] + x, None), x, p[names[0]]
        )
        plan = lowrank.plan(layers, params, np.ones((1, rows), np.float32))
    if "donated" in case:
        params = {name: jax.block_until_ready(jax.numpy.array(p)) for name, p in params.items()}
    quant = lowrank.QuantConfig(targets="*", packing="uint8")
    if "donated" in case:  # compiling takes memory too; of what is on the host nothing is compiled
        lowrank.quantize({"w": params[names[0]]}, quant)
    before, peak = anonymous(), Peak()
    donate = "donated" in case
    frozen = jax.block_until_ready(lowrank.quantize(params, quant, plan=plan, donate=donate))
    most = peak.stop() - before
    result = sum(array.nbytes for array in jax.tree.leaves(frozen)) / MIB
    dense = leaves * mib
    print(
        f"{case:18} {dense:6} MiB in {leaves} of {mib}: result {result:5.0f}, peak {most:5.0f}, "
        f"so {(most - result) / mib:.2f} leaves beside it ({CASES[case]})",
        flush=True,
    )


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=128, help="of one leaf")
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--case", choices=CASES, help="in this process, this one alone")
    options = parser.parse_args()
    for case in [options.case] if options.case else CASES:
        if options.case is None:
            command = [sys.executable, __file__, "--case", case]
            sizes = ["--mib", str(options.mib), "--leaves", str(options.leaves)]
            subprocess.run([*command, *sizes], check=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            run(case, Path(folder), options.mib, options.leaves)


if __name__ == "__main__":
    main()

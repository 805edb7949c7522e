"""Make golden codes of 8-bit optimizer states, from `bitsandbytes` itself.

Made with Python 3.11 on an x86-64 CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
    python tests/golden/make_bitsandbytes_states.py

(torch is the CPU build.) The output, tests/golden/bitsandbytes_states.npz, holds for MAP signed,
which Adam8bit has for its first moments, and unsigned, for its second,

    MAP/map     float32 [256], create_dynamic_map(signed=...)
    MAP/input   float32 [n]: moments of many magnitudes, in blocks of 256, the last one short
    MAP/codes   uint8 [n]; MAP/absmax float32 [ceil(n / 256)]: quantize_blockwise, by the default
                kernel (the midpoints of CUDA's; what runs on a CPU rounds by a table)
    MAP/decoded float32 [n]: dequantize_blockwise of these
    versions    of numpy, torch and bitsandbytes
"""

import argparse
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map

SEED = 20261125
BLOCK = 256
SIZE = 5 * BLOCK + 100


def run(name: str, *args: object) -> Any:
    """Call the default kernel of an operation of bitsandbytes."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return getattr(torch.ops.bitsandbytes, name).default.redispatch(keys, *args)


def make(signed: bool) -> dict[str, np.ndarray]:
    """Quantize moments of a gradient whose entries' magnitudes span six decades."""
    rng = np.random.default_rng(SEED)
    gradient = rng.standard_normal(SIZE) * 10 ** rng.uniform(-6, 0, SIZE)
    gradient[BLOCK : 2 * BLOCK] = 0
    gradient[::7] = 0
    moments = torch.tensor(gradient if signed else gradient**2, dtype=torch.float32)
    table = create_dynamic_map(signed=signed)
    codes, absmax = run("quantize_blockwise", moments, table, BLOCK)
    decoded = run("dequantize_blockwise", codes, absmax, table, BLOCK, torch.float32)
    arrays = {"map": table, "input": moments, "codes": codes, "absmax": absmax, "decoded": decoded}
    return {name: array.numpy() for name, array in arrays.items()}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "bitsandbytes_states.npz"
    parser.add_argument("file", type=Path, nargs="?", default=default, help="output file")
    torch.set_num_threads(1)
    arrays = {
        f"{name}/{key}": array
        for name, signed in (("signed", True), ("unsigned", False))
        for key, array in make(signed).items()
    }
    versions = [f"{module.__name__} {module.__version__}" for module in (np, torch, bnb)]
    file = parser.parse_args().file
    np.savez_compressed(file, allow_pickle=False, versions=np.array(versions), **arrays)


if __name__ == "__main__":
    main()

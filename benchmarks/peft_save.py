"""Time that peft.save takes, of what safetensors takes to write and flush the same tensors.

    python benchmarks/peft_save.py [--rank 64] [--layers 32] [--rounds 7]

The adapter is on every attention projection of a Llama 7B. The two save in turn, in one process, to
one disk; printed are the fastest and the median of each, and the medians' ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import lowrank_jax as lowrank

WIDTH = 4096


def adapter(layers: int, rank: int):
    """A LowRank node for each projection."""
    rng = np.random.default_rng(0)
    values = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    node = lambda: {"kernel": lowrank.LowRank(values(WIDTH, rank), values(rank, WIDTH))}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {f"layers_{i}": {"self_attn": {name: node() for name in names}} for i in range(layers)}


def timed(call) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Save by both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rank", 64), ("layers", 32), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    lora = adapter(options.layers, options.rank)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def ours():
            config = lowrank.LoraConfig(rank=options.rank)
            lowrank.peft.save(folder / "ours", lora, config, names=lowrank.names.LLAMA)

        def theirs():
            save_file(tensors, folder / "theirs")
            with (folder / "theirs").open("rb+") as file:
                os.fsync(file.fileno())

        ours()
        tensors = load_file(folder / "ours" / "adapter_model.safetensors")
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        seconds: dict[str, list[float]] = {"peft.save": [], "safetensors": []}
        theirs()
        for _ in range(options.rounds):
            seconds["safetensors"].append(timed(theirs))
            seconds["peft.save"].append(timed(ours))
    print(f"{len(tensors)} tensors, {size:.0f} MB")
    for what, each in seconds.items():
        print(f"{what:12} at best {min(each):.2f} s, median {statistics.median(each):.2f} s")
    print(f"ratio {np.divide(*map(statistics.median, seconds.values())):.2f}")


if __name__ == "__main__":
    main()

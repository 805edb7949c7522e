"""Time and memory of checkpoint.save and restore, of what Orbax alone takes for the same arrays.

    python benchmarks/checkpoint_cost.py [--gb 1] [--rounds 5]

An adapter of float32 factors is saved and restored by lowrank.checkpoint, which verifies, flushes
and replaces, and by Orbax's StandardCheckpointer, which does not. Each call is the first in a
process of its own, after one of a few bytes; the two take turns. Extra memory is the most that the
process had resident (getrusage's ru_maxrss), less what it had before the call.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, RANK = 4096, 64
GB = 1e9


def peak() -> float:
    """GB that this process had resident at most, until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def adapter(gb: float):
    """LowRank nodes of so many GB."""
    import jax.numpy as jnp
    import numpy as np

    import lowrank_jax as lowrank

    rng = np.random.default_rng(0)
    values = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    node = lambda: lowrank.LowRank(values(WIDTH, RANK), values(RANK, WIDTH))
    return {f"layer_{i}": node() for i in range(max(1, round(gb * GB / (8 * WIDTH * RANK))))}


def lowrank_save(folder: Path, lora) -> None:
    """Save by checkpoint.save."""
    import lowrank_jax as lowrank

    lowrank.checkpoint.save(folder / "lowrank", lora=lora, config=lowrank.LoraConfig(rank=RANK))


def lowrank_restore(folder: Path):
    """Restore by checkpoint.restore."""
    import lowrank_jax as lowrank

    return lowrank.checkpoint.restore(folder / "lowrank").lora


def orbax_save(folder: Path, lora) -> None:
    """Save by Orbax alone."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", lora, force=True)


def orbax_restore(folder: Path):
    """Restore by Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shape = lambda meta: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=where)
        tree = checkpointer.metadata(folder / "orbax").item_metadata.tree
        return checkpointer.restore(folder / "orbax", jax.tree.map(shape, tree))


def step(what: str, folder: Path, gb: float) -> None:
    """One call, and what it took."""
    import jax

    save, restore = (
        globals()[what.split("_")[0] + "_save"],
        globals()[what.split("_")[0] + "_restore"],
    )
    save(folder / "warm", adapter(0))
    jax.block_until_ready(restore(folder / "warm"))
    lora = adapter(gb) if what.endswith("save") else None
    before, began = peak(), time.perf_counter()
    result = save(folder, lora) if what.endswith("save") else restore(folder)
    jax.block_until_ready(result)
    print(json.dumps([time.perf_counter() - began, peak() - before]))


def main() -> None:
    """Let both save and restore, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", nargs=2, metavar=("WHAT", "FOLDER"))
    options = parser.parse_args()
    if options.step:
        step(options.step[0], Path(options.step[1]), options.gb)
        return
    results: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for what in ("orbax_save", "lowrank_save", "orbax_restore", "lowrank_restore"):
                command = [sys.executable, __file__, "--gb", str(options.gb)]
                done = subprocess.run(
                    [*command, "--step", what, folder], check=True, capture_output=True, text=True
                )
                results.setdefault(what, []).append(json.loads(done.stdout.splitlines()[-1]))
    for call in ("save", "restore"):
        medians = []
        for who in ("orbax", "lowrank"):
            seconds, extra = zip(*results[f"{who}_{call}"], strict=True)
            medians.append(statistics.median(seconds))
            print(
                f"{call:7} {who:7} at best {min(seconds):.2f} s, median {medians[-1]:.2f} s, "
                f"extra memory {max(extra):.2f} GB"
            )
        print(f"{call:7} ratio of the medians {medians[1] / medians[0]:.2f}")


if __name__ == "__main__":
    main()

"""Memory that loading takes when a model is quantized as it is read.

    python benchmarks/load_memory.py [--gb 2] [--dtype float32 bfloat16] [--processes 2]

A Llama's linear weights are written as shards of safetensors, of random values, and read by
lowrank.huggingface.load with NF4, in a process of its own for each case, on CPU. Printed is the
most memory that the process had resident at one time, of all that it did: getrusage's ru_maxrss.
With several processes, of four devices each, every kernel is split over all devices, and each
process holds its share.
"""

import argparse
import math
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH, HIDDEN = 2048, 5632
LINEARS = {
    "self_attn": {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, 512), "v_proj": (WIDTH, 512)}
    | {"o_proj": (WIDTH, WIDTH)},
    "mlp": {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)},
}
SIZE = sum(math.prod(shape) for group in LINEARS.values() for shape in group.values())
MB = 1e6


def peak() -> float:
    """MB that this process had resident at most, until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def like(layers: int, stacked: bool, dtype: str):
    """The tree's shapes."""
    import jax

    lead = (layers,) if stacked else ()
    layer = {
        group: {
            name: {"kernel": jax.ShapeDtypeStruct((*lead, *shape), dtype)}
            for name, shape in linears.items()
        }
        for group, linears in LINEARS.items()
    }
    return {"layers": layer} if stacked else {f"layers_{i}": layer for i in range(layers)}


def write(folder: Path, layers: int, dtype: str) -> None:
    """A layer to a file, and the index."""
    import json

    import jax.numpy as jnp
    import numpy as np

    from lowrank_jax._files.safetensors import write_tensors

    rng, where = np.random.default_rng(0), {}
    for i in range(layers):
        tensors = {
            f"model.layers.{i}.{group}.{name}.weight": (
                rng.standard_normal(shape[::-1], np.float32).astype(jnp.dtype(dtype))
            )
            for group, linears in LINEARS.items()
            for name, shape in linears.items()
        }
        shard = f"model-{i + 1:05}-of-{layers:05}.safetensors"
        with open(folder / shard, "wb") as file:
            write_tensors(file, tensors)
        where |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def read(folder: Path, layers: int, stacked: bool, dtype: str, place: list[int]) -> None:
    """Load, and print what it took; place: this process, of how many, and their port."""
    import jax

    import lowrank_jax as lowrank

    own, processes, port = place
    shardings = None
    if processes > 1:
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, own)
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        split = jax.P(None, None, "data") if stacked else jax.P(None, "data")
        shardings = jax.NamedSharding(mesh, split)
    jax.devices()
    before = peak()
    frozen = lowrank.huggingface.load(
        folder,
        like(layers, stacked, dtype),
        names=lowrank.names.LLAMA,
        quant=lowrank.QuantConfig(targets="**/kernel", packing="uint8"),
        shardings=shardings,
    )
    shards = [shard for array in jax.tree.leaves(frozen) for shard in array.addressable_shards]
    result = sum(shard.data.nbytes for shard in shards) / MB
    dense = layers * SIZE * jax.numpy.dtype(dtype).itemsize / MB
    print(
        f"{dtype:8} {'stacked' if stacked else 'layers':7} {dense:5.0f} MB dense, {result:4.0f} MB "
        f"quantized{' here' if processes > 1 else ''}: peak {peak():4.0f} MB, of which "
        f"{before:4.0f} before loading",
        flush=True,
    )


def main() -> None:
    """Write each model once, and read it both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--place", nargs=3, type=int, default=[0, 1, 0], help=argparse.SUPPRESS)
    parser.add_argument("--step", nargs=3, metavar=("WHAT", "FOLDER", "LAYERS"))
    options = parser.parse_args()
    if options.step:
        what, folder, layers = options.step
        dtype = options.dtype[0]
        if what == "write":
            write(Path(folder), int(layers), dtype)
        else:
            read(Path(folder), int(layers), what == "stacked", dtype, options.place)
        return
    for dtype in options.dtype:
        layers = round(options.gb * 1e9 / SIZE / (4 if dtype == "float32" else 2))
        with tempfile.TemporaryDirectory() as folder:
            for what in ("write", "layers", "stacked"):
                step = ["--dtype", dtype, "--step", what, folder, str(layers)]
                count = 1 if what == "write" else options.processes
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                started = [
                    subprocess.Popen(
                        [sys.executable, __file__, *step, "--place", *map(str, (own, count, port))]
                    )
                    for own in range(count)
                ]
                codes = [process.wait() for process in started]
                if any(codes):
                    raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Compiles for a TPU or an H100 that is not there, and tells what the compiler says of memory.

It needs an environment of its own (Linux, x86), whose compilers come as packages;
`python benchmarks/aot.py` prints the commands that make it. Import this module before jax.

Sizes are the compiler's buffer assignment: no context, no workspace of a library, and no speed.
Autotuning of the GPU's kernels is off. Cycles are the TPU compiler's estimate, and a cost model.
"""

import dataclasses
import os
import re
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it waits for a cloud's metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else two processes cannot run at once
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
    # Autotuning times kernels on the device.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax import ConfigError
from lowrank_jax._estimate.chips import CHIPS, make_devices

INSTALL = """\
python3.13 -m venv aot && . aot/bin/activate
pip install -e '.[examples]' 'jax[tpu]'
v=$(python -c 'import jax; print(jax.__version__)')
pip install --no-deps jax-cuda13-plugin==$v jax-cuda13-pjrt==$v \\
  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-crt
pip install --no-deps qwix==0.1.8  # for the cases of qwix"""

GIB = 2**30
# Usable memory in GiB, as the compilers say it.
MEMORY = {name: chip.memory / GIB for name, chip in CHIPS.items()} | {"cpu": float("inf")}


def device(name: str) -> Any:
    """A device of the target "h100", "v5e", "v6e", "v5p" or "cpu"."""
    if name == "cpu":
        return jax.devices("cpu")[0]
    try:
        return make_devices(CHIPS[name], 1)[0]
    except ConfigError as error:
        raise SystemExit(f"{error}; or make an environment:\n{INSTALL}") from error


@dataclasses.dataclass
class Compiled:
    """What the compiler says of one program; sizes in GiB."""

    arguments: float
    temporaries: float
    total: float
    seconds: float
    program: Any = None
    error: str = ""

    @property
    def cycles(self) -> float:
        """The TPU compiler's estimate, summed over the program's instructions, each once."""
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', self.program.as_text())))


def compiled(fn: Any, *shapes: Any, target: str, donate: tuple[int, ...] = ()) -> Compiled:
    """Compile fn for arguments of these shapes; an out-of-memory error is a result too."""
    mesh = Mesh(np.array([device(target)]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(fn, in_shardings=whole, out_shardings=whole, donate_argnums=donate)
    lowered = jitted.lower(*shapes)
    start = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)G of", str(error))
        total = float(used[1]) if used else float("inf")
        seconds = time.perf_counter() - start
        return Compiled(float("nan"), float("nan"), total, seconds, error=str(error))
    memory = program.memory_analysis()
    size = lambda name: getattr(memory, name + "_size_in_bytes") / GIB
    return Compiled(
        arguments=size("argument"),
        temporaries=size("temp"),
        total=size("argument") + size("temp") + size("output") - size("alias"),
        seconds=time.perf_counter() - start,
        program=program,
    )


if __name__ == "__main__":
    print(INSTALL)

"""Accelerators that a program is compiled for without one: their memory and their devices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from lowrank_jax._errors import ConfigError

# The part of a GPU's description that its compiler reads: NVIDIA H100 80GB HBM3.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# libtpu reads these as it is loaded: no cloud's metadata server, and no lock of the one device.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Args:
      name: its name, such as "h100".
      memory: bytes that a program may use, as its compiler says it.
      grids: number of chips -> the topology that its compiler knows.
      install: the packages that hold its compiler.
      options: options of its compiler.

    >>> CHIPS["v5e"].memory / 2**30
    15.75
    """

    name: str
    memory: int
    grids: dict[int, str]
    install: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _grids(name: str, *shapes: tuple[int, ...]) -> dict[int, str]:
    """Number of chips -> name of the slice of that shape."""
    return {math.prod(shape): f"{name}:{'x'.join(map(str, shape))}" for shape in shapes}


_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
_GPUS = {count: f"1x{max(1, count // 8)}x{min(count, 8)}" for count in (1, 2, 4, 8, 16, 32, 64)}
_TPU_PACKAGES = "pip install 'jax[tpu]'"

CHIPS = {
    chip.name: chip
    for chip in (
        # autotuning would time kernels on the device
        Chip(
            "h100",
            int(79.1 * 2**30),
            _GPUS,
            "pip install 'jax[cuda13]'",
            {"xla_gpu_autotune_level": 0},
        ),
        Chip("v5e", int(15.75 * 2**30), _grids("v5e", *_SQUARES), _TPU_PACKAGES),
        Chip("v6e", int(31.25 * 2**30), _grids("v6e", *_SQUARES), _TPU_PACKAGES),
        Chip("v5p", int(95.74 * 2**30), _grids("v5p", *_CUBES), _TPU_PACKAGES),
    )
}


def find_chip(name: str) -> Chip:
    """Return the chip of this name.

    Raises:
      ConfigError: there is none.
    """
    if name not in CHIPS:
        raise ConfigError(
            f"target must be None, for the present backend, or one of {sorted(CHIPS)}, not {name!r}"
        )
    return CHIPS[name]


def make_devices(chip: Chip, count: int) -> list[Any]:
    """Return descriptions of `count` chips, which programs can be compiled for.

    Raises:
      ConfigError: the chip comes in no slice of that many, or its compiler is not installed.
    """
    # The smallest slice that holds them: TPU v5p starts at four.
    enough = [size for size in chip.grids if size >= count]
    if not enough or (count > 1 and count not in chip.grids):
        raise ConfigError(
            f"the shardings of the arguments use {count} devices, but {chip.name} comes in slices "
            f"of {[*chip.grids]}: make the mesh as large as one of them"
        )
    topology = chip.grids[min(enough)]
    try:
        if chip.name == "h100":
            found = topologies.get_topology_desc(
                chip.name, "cuda", target_config=_H100, topology=topology
            )
        else:
            with _environment(_TPU_ENVIRONMENT):
                found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # each plugin raises its own
        raise ConfigError(
            f"no compiler for {chip.name} is installed for jax {jax.__version__} "
            f"({str(error).splitlines()[0][:200]}): {chip.install}, on Linux, or estimate on a "
            "machine that has one"
        ) from error
    return list(found.devices)[:count]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set what is not set of the environment, and unset it afterwards."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

"""What a compiler says of a step: the memory of its arguments, constants, temporaries, results."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax._errors import ConfigError
from lowrank_jax._estimate.chips import Chip
from lowrank_jax._estimate.collectives import count_collectives
from lowrank_jax._estimate.placement import find_mesh, place_on_chips
from lowrank_jax._jax.equations import collect_constants
from lowrank_jax._nodes.sizes import count_device_bytes, count_packed_bytes

_TABLE = 4096  # bytes: a format's table of codes, which every program has
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled step; sizes in bytes on one device.

    Args:
      args: its arguments as shapes, with the shardings that the compiler gives them.
      sizes: bytes of each of their leaves; 0 of what is in the host's memory, or static.
      padding: what the compiler adds to them, as a TPU pads arrays to its tiles.
      constants: arrays that the step closes over, above 4 KiB each.
      temporaries: of the program.
      outputs: results that do not reuse the memory of donated arguments.
      aliased: results that do.
      devices: number of devices.
      collectives: kind and dtype -> bytes that they bring to a device.
    """

    args: tuple[Any, ...]
    sizes: list[int]
    padding: int
    constants: int
    temporaries: int
    outputs: int
    aliased: int
    devices: int
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)


def compile_step(jitted: Any, args: Sequence[Any], chip: Chip | None) -> Compilation:
    """Compile a jitted step for the present backend, or for a chip.

    Raises:
      ConfigError: the step holds devices of this machine, or the arguments have none.
    """
    args = tuple(map(_to_shapes, args))
    args = _require_devices(args) if chip is None else place_on_chips(args, chip)
    lowered, constants = _lower(jitted, args, chip)
    try:
        compiled = lowered.compile(compiler_options=chip.options if chip else None)
    except jax.errors.JaxRuntimeError as error:
        if chip is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = [_count_bytes(leaf, chip) for leaf in jax.tree.leaves(args)]
        rest = max(0, _read_exhausted(error) - sum(sizes))
        # what exceeds the arguments is not told apart; constants are a part of it
        return Compilation(args, sizes, 0, 0, rest, 0, 0, _count_devices(args))
    formats = _align(compiled, args)
    leaves, treedef = jax.tree.flatten(args)
    used = [True] * len(leaves)
    if formats is not None:
        used = [found is not None for found in formats]
        pairs = zip(leaves, formats, strict=True)
        leaves = [_with_sharding(leaf, found) for leaf, found in pairs]
    memory = compiled.memory_analysis()
    read = sum(
        count_packed_bytes(leaf)
        for leaf, is_read in zip(leaves, used, strict=True)
        if is_read and hasattr(leaf, "dtype") and not _is_in_host_memory(leaf, chip)
    )
    exact = formats is not None
    args = tuple(jax.tree.unflatten(treedef, leaves))
    return Compilation(
        args=args,
        sizes=[_count_bytes(leaf, chip) for leaf in leaves],
        padding=max(0, memory.argument_size_in_bytes - read) if exact else 0,
        constants=constants,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + (_count_unpacked(lowered, compiled, leaves) if exact else 0),
        aliased=memory.alias_size_in_bytes,
        devices=_count_devices(args),
        collectives=count_collectives(compiled.as_text()),
    )


def _to_shapes(tree: Any) -> Any:
    """Return NumPy's arrays as shapes, in the dtypes that JAX gives them: float64 is float32."""

    def to_shape(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

    return jax.tree.map(to_shape, tree)


def _require_devices(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Raise if the arguments are on a mesh without devices, which only a chip gives it."""
    if isinstance(find_mesh(args), jax.sharding.AbstractMesh):
        raise ConfigError(
            "the arguments are on an AbstractMesh, which has no devices: pass a target, or use "
            "jax.make_mesh"
        )
    return args


def _lower(jitted: Any, args: Sequence[Any], chip: Chip | None) -> tuple[Any, int]:
    """Trace and lower the step; return it, and the bytes of the arrays that it closes over."""
    mesh = find_mesh(args) if jax.sharding.get_abstract_mesh().empty else None
    context = contextlib.nullcontext()
    if isinstance(mesh, jax.sharding.Mesh):
        context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    try:
        with context:
            traced = jitted.trace(*args) if hasattr(jitted, "trace") else None
            if traced is None or not hasattr(traced, "jaxpr"):  # nnx.jit
                return jitted.lower(*args), 0
            sizes = map(count_packed_bytes, collect_constants(traced.jaxpr))
            return traced.lower(), sum(size for size in sizes if size > _TABLE)
    except ValueError as error:
        if chip is None or "device" not in str(error):
            raise
        raise ConfigError(
            f"step cannot be compiled for {chip.name}, because it holds devices of this machine "
            f"({str(error).splitlines()[0][:300]}): give the shardings to the arguments alone, and "
            "constrain arrays inside of step by their PartitionSpec"
        ) from error


def _align(compiled: Any, args: Sequence[Any]) -> list[Any] | None:
    """Return the format of each leaf of args, None for one that the program does not read.

    None in all if they cannot be told, as of nnx.jit.
    """
    if not hasattr(compiled, "input_formats"):
        return None
    is_none = lambda value: value is None
    formats = jax.tree.leaves(compiled.input_formats, is_leaf=is_none)
    given = jax.tree.leaves((tuple(args), {}), is_leaf=is_none)
    if len(formats) == len(given):
        pairs = zip(formats, given, strict=True)
        return [found for found, leaf in pairs if leaf is not None]
    # static arguments are none of the program's
    if len(formats) != sum(hasattr(leaf, "dtype") or leaf is None for leaf in given):
        return None
    rest = iter(formats)
    found = [next(rest) if hasattr(leaf, "dtype") or leaf is None else None for leaf in given]
    return [own for own, leaf in zip(found, given, strict=True) if leaf is not None]


def _count_unpacked(lowered: Any, compiled: Any, args: Sequence[Any]) -> int:
    """Count what XLA's figure leaves out of results of 4-bit integers, which a CPU does not pack.

    Donated arguments of 4 bits are taken to be reused.
    """
    count = lambda leaf: count_device_bytes(leaf) - count_packed_bytes(leaf)
    given = [leaf for leaf in args if hasattr(leaf, "dtype")]
    infos = jax.tree.leaves(lowered.args_info)
    pairs = zip(infos, given, strict=True) if len(infos) == len(given) else ()
    donated = sum(count(leaf) for info, leaf in pairs if info.donated)
    results = jax.tree.leaves(lowered.out_info)
    shardings = jax.tree.leaves(compiled.output_shardings)
    returned = (
        jax.ShapeDtypeStruct(result.shape, result.dtype, sharding=sharding)
        for result, sharding in zip(results, shardings, strict=True)
    )
    return max(0, sum(map(count, returned)) - donated)


def _with_sharding(leaf: Any, found: Any) -> Any:
    """Return a leaf as a shape with the sharding of its format; a Python number is an array."""
    if found is None:
        return leaf
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=found.sharding)


def _count_bytes(leaf: Any, chip: Chip | None) -> int:
    """Count the bytes of a leaf on one device."""
    if not hasattr(leaf, "dtype") or _is_in_host_memory(leaf, chip):
        return 0
    return count_device_bytes(leaf)


def _is_in_host_memory(leaf: Any, chip: Chip | None) -> bool:
    """Whether a leaf is in the memory of the host of an accelerator."""
    kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
    is_host = chip is None and jax.default_backend() == "cpu"  # where all memory is the host's
    return not is_host and kind in ("pinned_host", "unpinned_host")


def _count_devices(args: Sequence[Any]) -> int:
    """Count the devices that the arguments are on."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
    return max((len(own.device_set) for own in shardings if own is not None), default=1)


def _read_exhausted(error: Exception) -> int:
    """Read the total from the message of a compiler that refuses a program larger than memory."""
    # "Used 17.96G of 15.75G hbm", or "the total memory required ... (17.96G) exceeds available HBM"
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", str(error))
    if match is None:
        raise error
    return int(float(match[1]) * _UNITS[match[2]])

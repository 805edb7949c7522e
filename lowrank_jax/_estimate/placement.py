"""Arguments as shapes on the devices of a chip, sharded as they are on their own mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax._errors import ConfigError
from lowrank_jax._estimate.chips import Chip, make_devices


def place_on_chips(args: Sequence[Any], chip: Chip) -> tuple[Any, ...]:
    """Return the arguments as shapes, on a mesh of the chip that is shaped like their own.

    Arguments without a mesh are whole on each chip; those that are not arrays stay as they are.

    Raises:
      ConfigError: the arguments are on meshes of different shapes, or on several devices without
        one, or the chip has no slice of that size.
    """
    mesh = _make_mesh(args, chip)

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        own = getattr(leaf, "sharding", None)
        is_named = isinstance(own, jax.sharding.NamedSharding)
        spec = own.spec if is_named else jax.sharding.PartitionSpec()
        weak = getattr(leaf, "weak_type", False)
        kind = getattr(own, "memory_kind", None)
        kind = kind if kind == "pinned_host" else None  # the names of a CPU's are its own
        sharding = jax.sharding.NamedSharding(mesh, spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak)

    return tuple(jax.tree.map(place, arg) for arg in args)


def find_mesh(args: Sequence[Any]) -> Any:
    """Return the mesh of the first argument that is on one, or None."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
    named = (own.mesh for own in shardings if isinstance(own, jax.sharding.NamedSharding))
    return next(named, None)


def _make_mesh(args: Sequence[Any], chip: Chip) -> jax.sharding.Mesh:
    """Make a mesh of the chip's devices, shaped like the one mesh of the arguments."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(args):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            mesh = sharding.mesh
            found.setdefault((mesh.axis_names, mesh.axis_sizes, mesh.axis_types), path)
        elif sharding is not None and len(sharding.device_set) > 1:
            raise ConfigError(
                f"the argument at {jax.tree_util.keystr(path)} is on several devices by "
                f"{type(sharding).__name__}, which cannot be moved to {chip.name}: use a "
                "jax.sharding.NamedSharding"
            )
    if len(found) > 1:
        meshes = ", ".join(str(dict(zip(*key[:2], strict=True))) for key in found)
        raise ConfigError(f"the arguments are on different meshes ({meshes}): use one")
    names, sizes, types = next(iter(found), (("device",), (1,), None))
    devices = np.array(make_devices(chip, int(np.prod(sizes)))).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=types)

"""Orbax as checkpoints use it: one process, no compression, arrays read in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# arrays are restored in parts of this size: several are hashed at once, and one part is on the host
_PART_BYTES = 1 << 22
# files are of this size at most: several are hashed at once
_FILE_BYTES = 1 << 25
# what TensorStore keeps of the files while it reads: Orbax has 100 MB
_CACHE_LIMIT = {"cache_pool#ocdbt": {"total_bytes_limit": 1 << 20}}


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a new folder."""
    import orbax.checkpoint as ocp

    # Orbax refuses arrays of no elements: their shape in the manifest is all there is
    kept = {name: _to_storable(array) for name, array in arrays.items() if array.size}
    with make_checkpointer() as checkpointer:
        checkpointer.save(
            folder, ocp.args.PyTreeSave(kept, ocdbt_target_data_file_size=_FILE_BYTES)
        )


def read_arrays(
    folder: Path, sizes: Mapping[str, int], receive: Callable[[dict[str, np.ndarray]], None]
) -> None:
    """Read the arrays of these names and sizes in bytes, and hand them over part by part.

    Orbax returns every array of a restore at once, and each restore reads the metadata of the whole
    folder, so that neither one call nor a call for each part would do: the handler of the arrays
    hands each part over as soon as it is read, and lets go of it.
    """
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class Streaming(ocp.type_handlers.NumpyHandler):
        async def deserialize(self, infos, args=None):
            args = args or [ocp.RestoreArgs()] * len(infos)
            context = ts.Context(_CACHE_LIMIT, parent=infos[0].ts_context)
            for info in infos:
                info.ts_context = context
            asked = {info.name: (info, arg) for info, arg in zip(infos, args, strict=True)}
            for part in _group_by_size(sizes):
                arrays = await super().deserialize(*zip(*(asked[n] for n in part), strict=True))
                read = dict(zip(part, arrays, strict=True))
                del arrays
                receive(read)
            return [np.zeros(0)] * len(infos)

    if not sizes:
        return
    options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in sizes}
    everything = ocp.args.PyTreeRestore(
        item=dict.fromkeys(sizes, 0), restore_args=options, partial_restore=True
    )
    with make_checkpointer(Streaming()) as checkpointer:
        checkpointer.restore(folder, everything)


def _group_by_size(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in groups, of at most _PART_BYTES bytes if they have more than one."""
    part, total = [], 0
    for name, size in sizes.items():
        if part and total + size > _PART_BYTES:
            yield part
            part, total = [], 0
        part.append(name)
        total += size
    if part:
        yield part


def make_checkpointer(arrays: Any = None) -> Any:
    """Orbax's checkpointer; uncompressed, so that sizes on disk bound those in memory.

    Args:
      arrays: the type handler of NumPy arrays, or None for one that writes.
    """
    import orbax.checkpoint as ocp

    # this process works alone, whatever the others do
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    # nothing changes the arrays while they are written: Orbax need not copy them
    arrays = arrays or ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        multiprocessing_options=alone,
        type_handler_registry=registry,
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _to_storable(array: np.ndarray) -> np.ndarray:
    """An array in a dtype that TensorStore knows: it has no uint4, so one-byte items are bytes."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array

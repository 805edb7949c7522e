"""Write and read arrays by Orbax: in one process, without compression, read part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# arrays are read in parts of this size: a part is hashed in parallel, and only one is on the host
_PART_BYTES = 1 << 22
# maximal size of a file: files are hashed in parallel
_FILE_BYTES = 1 << 25
# TensorStore's cache of file contents while reading: Orbax's default is 100 MB
_CACHE_LIMIT = {"cache_pool#ocdbt": {"total_bytes_limit": 1 << 20}}


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a new folder."""
    import orbax.checkpoint as ocp

    # Orbax rejects arrays without elements: their shape and dtype in the manifest are enough
    kept = {name: _to_storable(array) for name, array in arrays.items() if array.size}
    with make_checkpointer() as checkpointer:
        checkpointer.save(
            folder, ocp.args.PyTreeSave(kept, ocdbt_target_data_file_size=_FILE_BYTES)
        )


def read_arrays(
    folder: Path, sizes: Mapping[str, int], receive: Callable[[dict[str, np.ndarray]], None]
) -> None:
    """Read arrays, given name -> bytes, and pass them to `receive` part by part."""
    import orbax.checkpoint as ocp
    import tensorstore as ts

    # One restore of all arrays holds all of them at once; one restore for each part would read
    # the whole folder's metadata each time. So there is one restore, whose type handler passes
    # each part of 4 MiB to `receive` once it is read, drops it, and returns placeholders:
    #   sizes a: 3 MiB, b: 1 MiB, c: 9 MiB, d: 1 MiB -> parts [a, b], [c], [d]

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
    """Yield the names in groups of at most _PART_BYTES in total; a larger array is alone."""
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
    """Make Orbax's checkpointer; without compression, so that sizes on disk bound those in memory.

    Args:
      arrays: the type handler of NumPy arrays; None for the default, which writes.
    """
    import orbax.checkpoint as ocp

    # this process alone takes part: it must not wait for a barrier that others never reach
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    # nothing changes the arrays while they are written, so Orbax need not copy them
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
    """View an array of one-byte items as uint8: TensorStore does not know all of them (uint4)."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array

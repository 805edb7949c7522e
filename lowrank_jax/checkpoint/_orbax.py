"""Orbax as checkpoints use it: one process, no compression, arrays read in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# arrays are restored, and files written, in parts of this size: several are hashed at once, and
# restoring keeps one part on the host
_PART = 1 << 25


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a new folder."""
    import orbax.checkpoint as ocp

    # Orbax refuses arrays of no elements: their shape in the manifest is all there is
    kept = {name: _bytes(array) for name, array in arrays.items() if array.size}
    with make_checkpointer() as checkpointer:
        checkpointer.save(folder, ocp.args.PyTreeSave(kept, ocdbt_target_data_file_size=_PART))


def read_arrays(checkpointer: Any, folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Some of the arrays of a folder."""
    import orbax.checkpoint as ocp

    if not names:
        return {}
    options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    part = ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0), restore_args=options, partial_restore=True
    )
    return checkpointer.restore(folder, part)


def parts_of_sizes(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in groups, of at most _PART bytes if they have more than one."""
    part, total = [], 0
    for name, size in sizes.items():
        if part and total + size > _PART:
            yield part
            part, total = [], 0
        part.append(name)
        total += size
    if part:
        yield part


def make_checkpointer() -> Any:
    """Orbax's checkpointer; uncompressed, so that sizes on disk bound those in memory."""
    import orbax.checkpoint as ocp

    # this process works alone, whatever the others do
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    # nothing changes the arrays while they are written: Orbax need not copy them
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        multiprocessing_options=alone,
        type_handler_registry=registry,
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array in a dtype that TensorStore knows: it has no uint4, so one-byte items are bytes."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array

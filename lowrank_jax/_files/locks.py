"""An exclusive lock on a folder, against concurrent writers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lowrank_jax._errors import CheckpointError


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder; the kernel releases it when the process dies.

    Windows and some network file systems have no such locks. Nothing is locked there.

    Raises:
      CheckpointError: another process or thread holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another save is writing to {folder}: wait for it, or save elsewhere"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        # closing alone would leave the lock to a process forked in the meantime
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)

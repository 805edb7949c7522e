"""An exclusive lock on a folder, against concurrent writers.

The `filelock` package cannot open a folder: it locks a file that it creates and leaves there, among
the files of a model that are uploaded or compared as a whole. Its lock is the same flock, which is
applied here to the folder itself, so that nothing is left. Windows has no flock: there the lock is
a file that the system deletes when its last handle is closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lowrank_jax._errors import CheckpointError

_LOCK_FILE = ".lowrank_jax.lock"  # exists on Windows only, during a save


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder; the kernel releases it when the process dies.

    Some network file systems have no locks. Nothing is locked there.

    Raises:
      CheckpointError: another process or thread holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        with _hold_lock_file(folder):
            yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _make_error(folder) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        # closing alone would leave the lock to a process forked in the meantime
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextlib.contextmanager
def _hold_lock_file(folder: Path) -> Iterator[None]:
    """Lock the folder by a file that exists only while its creator has it open."""
    path = folder / _LOCK_FILE
    # O_TEMPORARY, of Windows alone, also deletes the file of a process that dies
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_TEMPORARY", 0)
    try:
        handle = os.open(path, flags)
    except FileExistsError:
        raise _make_error(folder) from None
    try:
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # already deleted on Windows
            path.unlink()


def _make_error(folder: Path) -> CheckpointError:
    return CheckpointError(f"another save is writing to {folder}: wait for it, or save elsewhere")

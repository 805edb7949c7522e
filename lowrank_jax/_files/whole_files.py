"""Files that are whole on disk before they take their names."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def flushed(
    folder: Path, prefix: str, write: Callable[[BinaryIO], object], stack: contextlib.ExitStack
) -> Path:
    """A file of another name, whole on disk; removed by the stack unless it was renamed."""
    number, name = tempfile.mkstemp(prefix=prefix, dir=folder)
    stack.callback(Path(name).unlink, missing_ok=True)
    with open(number, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    return Path(name)


def sync(folder: Path) -> None:
    """Flush the folder's names to disk, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)

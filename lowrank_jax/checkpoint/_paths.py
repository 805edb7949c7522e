"""Resolve a checkpoint's directory, and convert errors there to CheckpointError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lowrank_jax._errors import AxesError, CheckpointError, TreeError


@contextlib.contextmanager
def checkpoint_errors(what: str, where: str = "") -> Iterator[None]:
    """Reraise errors as CheckpointError; this library's errors keep their text, after `where`."""
    try:
        yield
    except (CheckpointError, TreeError, AxesError) as error:
        if not where and isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {error})") from error


def resolve_directory(directory: str | os.PathLike) -> Path:
    """Return the directory as an absolute path, which Orbax requires."""
    text = os.fspath(directory)
    if not isinstance(text, str) or "://" in text:
        raise CheckpointError(f"{text!r} is not a path on a local or mounted file system")
    return Path(os.path.abspath(text))

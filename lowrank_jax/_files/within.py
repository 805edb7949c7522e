"""Read files of an untrusted folder: links must not leave it, and only regular files are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lowrank_jax._errors import CheckpointError


def file_within(folder: Path, name: str) -> Path:
    """Return the regular file that a name in a folder refers to, with links resolved.

    A link may point within the folder. In the cache of huggingface_hub, a link of a snapshot may
    also point to the repository's blobs: models--x/snapshots/REVISION/name -> models--x/blobs/HASH.

    Raises:
      CheckpointError: a link points elsewhere, or the file is not regular (a device, a pipe).
      OSError: the file does not exist; a link is dangling or circular.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except RuntimeError as error:  # until Python 3.12
        raise OSError(f"{path} is a circular link") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and real.parent != blobs:
        raise CheckpointError(
            f"{path} is a link out of its directory, to {real}: replace it by the file itself"
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return real


def read_within(folder: Path, name: str, limit: int) -> bytes:
    """Read a file of a folder.

    Raises:
      CheckpointError: file_within rejects it, it is larger than `limit` bytes, or not readable.
    """
    # The path may change between the check and the open: O_NOFOLLOW rejects a link put in its
    # place, O_NONBLOCK keeps a pipe from blocking, and fstat checks the file that was opened.
    path = folder / name
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(file_within(folder, name), flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            if found.st_size > limit:
                raise CheckpointError(f"{path} has {found.st_size} bytes; expected at most {limit}")
            return file.read(limit)
    except OSError as error:
        raise CheckpointError(f"{path} could not be read ({error})") from error

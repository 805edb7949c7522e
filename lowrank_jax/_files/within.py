"""Files of a folder that somebody else may have made: what a name leads to is looked at first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lowrank_jax._errors import CheckpointError


def file_within(folder: Path, name: str) -> Path:
    """The regular file that a name in a folder stands for, without links.

    A link may lead to a file within the folder; that of a snapshot in the cache of huggingface_hub
    to the blobs beside it: models--x/snapshots/REVISION/name -> models--x/blobs/HASH.

    Raises:
      CheckpointError: a link leads elsewhere, or to no regular file (a device, a pipe).
      OSError: there is none; a link leads to nothing, or in a circle.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except RuntimeError as error:  # until Python 3.12
        raise OSError(f"{path} is a link in a circle") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and real.parent != blobs:
        raise CheckpointError(
            f"{path} is a link out of its directory, to {real}: put the file itself there"
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is no regular file")
    return real


def read_within(folder: Path, name: str, limit: int) -> bytes:
    """The content of a file of a folder.

    Raises:
      CheckpointError: as file_within does, the file is larger than the limit, or not readable.
    """
    path = folder / name
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(file_within(folder, name), flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is no regular file")
            if found.st_size > limit:
                raise CheckpointError(
                    f"{path} has {found.st_size} bytes, and a file of its kind at most {limit}"
                )
            return file.read(limit)
    except OSError as error:
        raise CheckpointError(f"{path} could not be read ({error})") from error

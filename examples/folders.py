"""The folder of a run: made before the training, and never shared with something else."""

import os
from collections.abc import Callable
from pathlib import Path

from smollm2 import ExampleError

SHOWN = 3  # of the names of what is there


def find_others(folder: Path) -> list[str]:
    """Names of what a folder holds besides a checkpoint, or what a killed first save left."""
    own = lambda name: name == "manifest.json" or name.startswith(("arrays-", ".lowrank"))
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not own(name)]


def check(folder: Path) -> None:
    """Raises an error for a folder that holds something else than a run."""
    if others := find_others(folder):
        shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise ExampleError(
            f"--out {folder} holds something else than a run of this job ({shown}): pass another "
            f"--out, or --replace to rename that folder to {folder}.old first"
        )


def make(folder: Path, replace: bool, announce: Callable[[str], None]) -> None:
    """Makes the folder to save in, for it is better to fail before the training than after.

    With `replace`, what is there is renamed first, so that nothing is lost or mixed.
    """
    if replace and folder.is_dir() and any(folder.iterdir()):
        old = folder.with_name(f"{folder.name}.old")
        try:
            if old.exists():
                raise FileExistsError(None, f"{old} exists")
            folder.rename(old)
        except OSError as error:
            raise ExampleError(
                f"--replace cannot rename {folder} to {old} ({error.strerror}): pass another --out"
            ) from error
        announce(f"what {folder} held is in {old} now")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExampleError(f"--out {folder} cannot be made a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ExampleError(f"--out {folder} is not writable")

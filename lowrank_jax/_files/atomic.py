"""Atomic file replacement: write a temporary file, fsync, rename.

One rename cannot replace several files. Their old versions are therefore renamed to backups first,
entry points (files without which nothing loads) before the others, and the new ones are renamed in
the opposite order. After an error the backups are restored. A process killed in between leaves a
folder that does not load, never a mixture of two versions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.locks import lock_folder

_NEW = ".lowrank-"
_OLD = f"{_NEW}old-"
# errors of file systems that do not support fsync of a directory: there is nothing to wait for
_UNSUPPORTED_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
# larger files count as changed without a comparison: reading both costs more than a rename
_COMPARE_LIMIT = 1 << 25

Write = Callable[[BinaryIO], object]


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on disk.

    Directories are skipped where the file system does not support it or denies opening them.
    """
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in _UNSUPPORTED_FSYNC:
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and fsync the directories that name them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync(path.parent)


def write_temporary(folder: Path, write: Write) -> Path:
    """Write a temporary file and fsync it; `remove_temporary` deletes it unless it is renamed."""
    path = folder / f"{_NEW}{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def remove_temporary(folder: Path, old: bool = True) -> None:
    """Remove the temporary files of killed or failed writers; with `old`, their backups too."""
    for path in folder.glob(f"{_NEW}*"):
        if (old or not path.name.startswith(_OLD)) and not (
            path.is_dir() and not path.is_symlink()
        ):
            path.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename a file; an error is ignored if the rename took place all the same (as on NFS)."""
    own = _identify(source)
    try:
        os.replace(source, target)
    except OSError:
        with contextlib.suppress(OSError):
            if own is not None and _identify(target) == own and _identify(source) is None:
                return
        raise


def replace_files(
    folder: Path,
    writes: Mapping[str, Write],
    what: str,
    *,
    entry_points: Sequence[str],
    obsolete: Callable[[str], bool] = lambda name: False,
) -> None:
    """Replace several files of a folder as one, leaving its other files alone.

    Args:
      folder: created if missing.
      writes: name -> function that writes the content. A file whose content is unchanged is kept.
      what: what the files are, for error messages.
      entry_points: the names without which nothing loads, in the order of their removal.
      obsolete: whether an existing file that is not in `writes` is removed, given its name.

    Raises:
      CheckpointError: another process is writing to the folder, or the file system failed.
    """
    try:
        make_folder(folder)
        with lock_folder(folder):
            remove_temporary(folder)
            try:
                there = os.listdir(folder)
                if blocked := [name for name in writes if (folder / name).is_dir()]:
                    raise CheckpointError(f"{folder / blocked[0]} is a folder: remove it")
                new = {name: write_temporary(folder, write) for name, write in writes.items()}
                obsolete_names = [name for name in there if name not in writes and obsolete(name)]
                new = _select_changed(folder, new, obsolete_names, entry_points)
                commit_files(
                    folder, new, what, entry_points=entry_points, obsolete_names=obsolete_names
                )
            finally:
                with contextlib.suppress(OSError):
                    remove_temporary(folder, old=False)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written; its previous files are unchanged ({error})"
        ) from error


def commit_files(
    folder: Path,
    new: Mapping[str, Path],
    what: str,
    *,
    entry_points: Sequence[str] = (),
    obsolete_names: Iterable[str] = (),
) -> None:
    """Rename temporary files to their final names; after an error, restore the previous files.

    Args:
      folder: the folder of both.
      new: final name -> temporary file, already on disk.
      what: what the files are, for error messages.
      entry_points: see replace_files.
      obsolete_names: names to remove.

    Raises:
      CheckpointError: the file system failed. The message states what the folder holds now.
    """
    # With entry points (config.json, index.json) and one shard s1, the order of operations is:
    #   rename config.json -> backup, index.json -> backup, fsync, s1 -> backup    (removal order)
    #   rename new s1, fsync, new index.json, fsync, new config.json, fsync        (install order)
    # The fsync after the entry points are gone keeps a crash from showing an old entry point with
    # new shards; the fsync before each new entry point keeps one from naming shards that a crash
    # has lost. A single file needs no backup rename: os.replace swaps it in one step.
    names = [*new, *obsolete_names]
    removal_order = sorted(
        names, key=lambda name: (name not in entry_points, *_order_key(name, entry_points))
    )
    install_order = sorted(
        new, key=lambda name: (name in entry_points, *_order_key(name, reversed(entry_points)))
    )
    before = {name: _identify(folder / name) for name in names}
    after = {name: _identify(new[name]) if name in new else None for name in names}
    try:
        if len(names) == 1 and new:
            _link_backup(folder, names[0])
        else:
            _move_aside(folder, [name for name in removal_order if before[name]], entry_points)
        for name in install_order:
            if name in entry_points:
                fsync(folder)
            rename(new[name], folder / name)
        fsync(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _roll_back(folder, install_order, removal_order, before, after)
        if isinstance(error, OSError):
            raise _make_error(folder, what, before, after, error) from error
        raise
    with contextlib.suppress(OSError):
        remove_temporary(folder)


def _order_key(name: str, entry_points: Iterable[str]) -> tuple[int, str]:
    """Sort key: entry points in their order, then the other names."""
    order = [*entry_points]
    return order.index(name) if name in order else len(order), name


def _move_aside(folder: Path, names: list[str], entry_points: Sequence[str]) -> None:
    """Rename files to backups; fsync as soon as the last of the entry points is renamed."""
    for number, name in enumerate(names, start=1):
        rename(folder / name, folder / f"{_OLD}{name}")
        if name in entry_points and not {*names[number:]} & {*entry_points}:
            fsync(folder)


def _link_backup(folder: Path, name: str) -> None:
    """Back up a file that is about to be replaced by a hard link, where links are supported."""
    with contextlib.suppress(OSError, NotImplementedError):
        os.link(folder / name, folder / f"{_OLD}{name}", follow_symlinks=False)


def _roll_back(
    folder: Path,
    install_order: list[str],
    removal_order: list[str],
    before: Mapping[str, object],
    after: Mapping[str, object],
) -> None:
    """Undo a replacement: remove new files, entry points first, and rename backups back."""
    # A file replaced alone (one name, which existed) is not unlinked: its backup, a hard link,
    # replaces it below, so that the name never disappears.
    for name in reversed(install_order):
        is_new = _identify(folder / name) == after[name]
        if is_new and (len(removal_order) > 1 or before[name] is None):
            (folder / name).unlink()
    for name in reversed(removal_order):
        if _identify(folder / f"{_OLD}{name}") is not None:
            rename(folder / f"{_OLD}{name}", folder / name)
    with contextlib.suppress(OSError):
        fsync(folder)
    if all(_identify(folder / name) == was for name, was in before.items()):
        remove_temporary(folder)


def _make_error(
    folder: Path,
    what: str,
    before: Mapping[str, object],
    after: Mapping[str, object],
    error: OSError,
) -> CheckpointError:
    """Return the error of a failed replacement, which states what the folder holds now."""
    try:
        now = {name: _identify(folder / name) for name in before}
    except OSError:
        now = None
    if now == before:
        return CheckpointError(
            f"{folder} could not be written; its previous files are unchanged ({error})"
        )
    if now == after:
        return CheckpointError(
            f"{folder} holds the new {what}, complete, but the file system could not confirm that "
            f"it is on disk ({error}): save again, or elsewhere"
        )
    return CheckpointError(
        f"{folder} could not be written, and its previous files could not be restored ({error}): "
        f"save again, or elsewhere; the backups are called {_OLD}NAME"
    )


def _identify(path: Path) -> tuple[int, ...] | None:
    """Return what identifies a file regardless of its name; None if it does not exist."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _select_changed(
    folder: Path,
    new: Mapping[str, Path],
    obsolete_names: Sequence[str],
    entry_points: Sequence[str],
) -> dict[str, Path]:
    """Return the files whose content changed, with all entry points if one rename is not enough."""
    changed = {name: path for name, path in new.items() if not _is_unchanged(folder / name, path)}
    if len(changed) + len(obsolete_names) > 1:
        changed |= {name: new[name] for name in entry_points if name in new}
    return changed


def _is_unchanged(old: Path, new: Path) -> bool:
    """Whether a regular file exists on disk with the content of the new one."""
    try:
        found, size = os.lstat(old), new.stat().st_size
        if not stat.S_ISREG(found.st_mode) or found.st_size != size or size > _COMPARE_LIMIT:
            return False
        if old.read_bytes() != new.read_bytes():
            return False
        fsync(old)
    except OSError:
        return False
    return True

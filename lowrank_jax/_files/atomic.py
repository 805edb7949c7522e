"""Files that are whole on disk before they take their names, and several that change together.

A file is written under another name and flushed, and one rename puts it in place. Several files
have no rename in common: the old ones are set aside first, those without which nothing loads before
the others, and the new ones come in the opposite order. An error puts the old ones back; a kill in
between leaves a folder that nothing loads, never a mixture.
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
# what a file system says that cannot flush a directory: there is nothing to wait for
_UNSUPPORTED_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
# files above this size are taken for changed: comparing them costs more than replacing them
_COMPARE_LIMIT = 1 << 25

Write = Callable[[BinaryIO], object]


def fsync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk.

    A directory that the file system cannot flush, or that may not be opened, is passed over.
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
    """Make a folder and those above it where they are missing, and let their names last."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync(path.parent)


def write_temporary(folder: Path, write: Write) -> Path:
    """A file of another name, whole on disk; `clear` removes it unless it is renamed."""
    path = folder / f"{_NEW}{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def remove_temporary(folder: Path, old: bool = True) -> None:
    """Remove the files that killed or failed writers left; old: those that were set aside, too."""
    for path in folder.glob(f"{_NEW}*"):
        if (old or not path.name.startswith(_OLD)) and not (
            path.is_dir() and not path.is_symlink()
        ):
            path.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename a file; what a file system did although it reported an error, is done."""
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
    """Replace files of a folder together, and leave its others alone.

    Args:
      folder: made where missing.
      writes: name -> what writes its content. A file that is there already stays.
      what: what the files are, for errors.
      entry_points: the names without which nothing loads, in the order in which they go.
      obsolete: whether a name that is there, and not written, goes as well.

    Raises:
      CheckpointError: another process is writing there, or the file system refused.
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
            f"{folder} could not be written; what was there is as it was ({error})"
        ) from error


def commit_files(
    folder: Path,
    new: Mapping[str, Path],
    what: str,
    *,
    entry_points: Sequence[str] = (),
    obsolete_names: Iterable[str] = (),
) -> None:
    """Let files, whole on disk, take their names; where that fails, put back what was there.

    Args:
      folder: where they are.
      new: name -> the file that is to be called so.
      what: what they are, for errors.
      entry_points: as of replace_files.
      obsolete_names: names that are to go.

    Raises:
      CheckpointError: the file system refused. What it says of the folder was looked up.
    """
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
    """Where a name stands among the entry_points, or after them."""
    order = [*entry_points]
    return order.index(name) if name in order else len(order), name


def _move_aside(folder: Path, names: list[str], entry_points: Sequence[str]) -> None:
    """Take the names from old files, those of entry_points first and for good."""
    for number, name in enumerate(names, start=1):
        rename(folder / name, folder / f"{_OLD}{name}")
        if name in entry_points and not {*names[number:]} & {*entry_points}:
            fsync(folder)


def _link_backup(folder: Path, name: str) -> None:
    """Give a file that is to be replaced a second name, where the file system has links."""
    with contextlib.suppress(OSError, NotImplementedError):
        os.link(folder / name, folder / f"{_OLD}{name}", follow_symlinks=False)


def _roll_back(
    folder: Path,
    install_order: list[str],
    removal_order: list[str],
    before: Mapping[str, object],
    after: Mapping[str, object],
) -> None:
    """Undo a replacement: new files go, the entry_points first, and old ones get their names back."""
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
    """The error of a replacement, by what the folder holds now."""
    try:
        now = {name: _identify(folder / name) for name in before}
    except OSError:
        now = None
    if now == before:
        return CheckpointError(
            f"{folder} could not be written; what was there is as it was ({error})"
        )
    if now == after:
        return CheckpointError(
            f"{folder} holds the new {what}, whole, but the file system cannot confirm that it "
            f"will last ({error}): save again, or elsewhere"
        )
    return CheckpointError(
        f"{folder} could not be written, and what was there could not be put back ({error}): save "
        f"again, or elsewhere; files that were set aside are called {_OLD}NAME"
    )


def _identify(path: Path) -> tuple[int, ...] | None:
    """What tells a file from others, whatever it is called; None where there is none."""
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
    """The new files that are not there already; entry_points too, unless one rename is all there is."""
    changed = {name: path for name, path in new.items() if not _is_unchanged(folder / name, path)}
    if len(changed) + len(obsolete_names) > 1:
        changed |= {name: new[name] for name in entry_points if name in new}
    return changed


def _is_unchanged(old: Path, new: Path) -> bool:
    """Whether a plain file is there already, on disk, with the content of a new one."""
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

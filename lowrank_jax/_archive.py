"""Archives: directories of arrays whose manifest holds the hash of each file and array."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, listing
from lowrank_jax._fingerprint import sha256

# An archive is a directory: a manifest, and the one folder of arrays (Orbax's) that it names.
# checkpoint.save says why its replacement is atomic.

_FORMAT, _VERSION = "lowrank_jax.checkpoint", 1
_MANIFEST = "manifest.json"
_FOLDER = re.compile(r"arrays-[0-9a-f]{32}")
# what a small array may fall short of its size on disk: OCDBT compresses those within its index
_SLACK = 4096


def write_archive(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Replace the archive at a directory by a manifest's body and arrays, atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    _flush(directory.parent)
    with _locked(directory):
        _clean(directory)
        try:
            _commit(directory, body, arrays)
        finally:
            _clean(directory)


def _commit(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a whole new folder and manifest; the last rename makes them the archive."""
    import orbax.checkpoint as ocp

    folder = directory / f"arrays-{uuid.uuid4().hex}"
    with _checkpointer() as checkpointer:
        # Orbax refuses arrays of no elements: their shape in the manifest is all there is
        kept = {name: _bytes(array) for name, array in arrays.items() if array.size}
        checkpointer.save(folder, ocp.args.PyTreeSave(kept))
    files = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _file_hash(path)]
            _flush(path)
        _flush(Path(parent))
    described = {
        name: [list(array.shape), array.dtype.name, sha256(array)] for name, array in arrays.items()
    }
    head = {"format": _FORMAT, "version": _VERSION}
    body = {**head, **body, "arrays": described, "folder": folder.name, "files": files}
    text = json.dumps({**body, "sha256": _body_hash(body)}, indent=1, allow_nan=False)
    new = directory / f"{_MANIFEST}.new"
    new.write_text(text)
    _flush(new)
    _flush(directory)
    os.replace(new, directory / _MANIFEST)
    _flush(directory)


def has_manifest(directory: Path) -> bool:
    """Whether an archive is there."""
    return (directory / _MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The body of the manifest, of a known version and as it was written."""
    path = directory / _MANIFEST
    if not has_manifest(directory):
        why = "does not exist" if not directory.exists() else f"holds no {_MANIFEST}"
        raise CheckpointError(
            f"there is no checkpoint at {directory}: it {why}; pass the directory given to save "
            "(the first save there may have been cut off)"
        )
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a manifest of lowrank_jax.checkpoint")
        if body.get("version") != _VERSION:
            raise CheckpointError(
                f"{path} is of format version {body.get('version')!r}; this lowrank_jax reads "
                f"version {_VERSION}: use the release that wrote it, or a newer one"
            )
        if body.pop("sha256", None) == _body_hash(body):
            return body
        why = "its content is not what its sha256 says"
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{path} is damaged ({why}): restore another copy, or save anew")


def read_archive(directory: Path, body: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by name: files are verified before Orbax parses them, and arrays after."""
    import orbax.checkpoint as ocp

    folder = directory / str(body["folder"])
    if not _FOLDER.fullmatch(folder.name) or folder.parent != directory:
        raise CheckpointError(f"the manifest in {directory} names no folder of its own: {folder}")
    problems, sizes = [], 0
    for name, (size, expected) in body["files"].items():
        path = folder / name
        if ".." in path.parts or not path.resolve().is_relative_to(directory.resolve()):
            problems.append(f"{name}: outside the checkpoint's directory")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif (came := path.stat().st_size) != size:
            problems.append(f"{name}: {came} bytes, expected {size}")
        elif _file_hash(path) != expected:
            problems.append(f"{name}: its SHA-256 is not the one in the manifest")
        sizes += size
    if problems:
        raise CheckpointError(
            f"the checkpoint at {directory} is damaged: restore another copy. In {folder.name}:\n"
            + listing(problems)
        )
    described = {
        name: (tuple(shape), jnp.dtype(dtype), expected)
        for name, (shape, dtype, expected) in body["arrays"].items()
    }
    plain = lambda dtype: jnp.dtype(np.uint8) if dtype.itemsize == 1 else dtype
    claimed = {n: (s, plain(dtype)) for n, (s, dtype, _) in described.items() if 0 not in s}
    claims = sum(math.prod(shape) * dtype.itemsize for shape, dtype in claimed.values())
    with _checkpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        stored = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in stored.items()}
        # nothing is allocated for what the files cannot hold
        if stored != claimed or claims > sizes + _SLACK * len(claimed):
            raise CheckpointError(
                f"the checkpoint at {directory} is damaged: the manifest and the arrays disagree; "
                "restore another copy"
            )
        options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in claimed}
        arrays = checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=options))
    for name, (shape, dtype, expected) in described.items():
        arrays[name] = np.zeros(shape, dtype) if 0 in shape else arrays[name].view(dtype)
        if sha256(arrays[name]) != expected:
            problems.append(f"{name}: its SHA-256 is not the one in the manifest")
    if problems:
        raise CheckpointError(f"the checkpoint at {directory} is damaged:\n{listing(problems)}")
    return arrays


def _checkpointer() -> Any:
    """Orbax's checkpointer; uncompressed, so that sizes on disk bound those in memory."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array in a dtype that TensorStore knows: it has no uint4, so one-byte items are bytes."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array


def _clean(directory: Path) -> None:
    """Remove what killed or failed saves left: whatever a readable manifest does not name."""
    keep = None
    if has_manifest(directory):
        try:
            keep = read_manifest(directory).get("folder")
        except CheckpointError:
            return
    (directory / f"{_MANIFEST}.new").unlink(missing_ok=True)
    for path in directory.glob("arrays-*"):
        # Orbax writes under a name with a suffix of its own
        if path.name != keep and _FOLDER.match(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory against other writers; the kernel lets go when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another save is writing to {directory}: wait for it, or save elsewhere"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _body_hash(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest's body, in hex."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

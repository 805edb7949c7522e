"""Archives: directories of arrays whose manifest holds the hash of each file and array."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.atomic import (
    commit_files,
    fsync,
    make_folder,
    remove_temporary,
    write_temporary,
)
from lowrank_jax._files.locks import lock_folder
from lowrank_jax._trees.fingerprint import list_differences, sha256
from lowrank_jax.checkpoint._orbax import (
    make_checkpointer,
    read_arrays,
    write_arrays,
)
from lowrank_jax.checkpoint._quiet import silence_orbax

# An archive is a directory: a manifest, and the one folder of arrays (Orbax's) that it names.
# checkpoint.save says why its replacement is atomic.

_FORMAT, _VERSION = "lowrank_jax.checkpoint", 1
_MANIFEST = "manifest.json"
_ARRAYS_FOLDER = re.compile(r"arrays-[0-9a-f]{32}")
# what a small array may fall short of its size on disk: OCDBT compresses those within its index
_INLINE_SLACK = 4096


def write_archive(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Replace the archive at a directory by a manifest's body and arrays, atomically."""
    make_folder(directory)
    with lock_folder(directory):
        _remove_leftovers(directory)
        try:
            _commit(directory, body, arrays)
        finally:
            _remove_leftovers(directory)


def _commit(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a whole new folder and manifest; the last rename makes them the archive."""
    folder = directory / f"arrays-{uuid.uuid4().hex}"
    fsync(directory)  # one that fails fails before there is anything to remove
    with _make_hash_pool() as pool:
        hashes = pool.map(sha256, arrays.values())  # while Orbax writes
        with silence_orbax(folder.name):
            write_arrays(folder, arrays)
        found = _list_files(folder)
        files = dict(zip(found, pool.map(_fsync_and_hash, found.values()), strict=True))
        for parent, _, _ in os.walk(folder):
            fsync(Path(parent))
        described = {
            name: [list(array.shape), array.dtype.name, sha]
            for (name, array), sha in zip(arrays.items(), hashes, strict=True)
        }
    head = {"format": _FORMAT, "version": _VERSION}
    body = {**head, **body, "arrays": described, "folder": folder.name, "files": files}
    fsync(directory)
    text = serialize_manifest(body)
    manifest = write_temporary(directory, lambda file: file.write(text))
    commit_files(directory, {_MANIFEST: manifest}, "checkpoint")


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
        text = path.read_bytes()
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a manifest of lowrank_jax.checkpoint")
        if body.get("version") != _VERSION:
            raise CheckpointError(
                f"{path} is of format version {body.get('version')!r}; this lowrank_jax reads "
                f"version {_VERSION}: use the release that wrote it, or a newer one"
            )
        body.pop("sha256", None)
        if text == serialize_manifest(body) and _ARRAYS_FOLDER.fullmatch(body["folder"]):
            return body
        why = "its text is not what its sha256 says"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{path} is damaged ({why}): restore another copy, or save anew")


def read_archive(
    directory: Path, body: dict[str, Any], make: Callable[[str, np.ndarray], Any]
) -> dict[str, Any]:
    """What `make` makes of each array, by name: few arrays are on the host at one time.

    Files are verified before Orbax parses them, and each array before it is made into something.
    """
    folder, sizes = verify_files(directory, body)
    described = {
        name: (tuple(shape), jnp.dtype(dtype), expected)
        for name, (shape, dtype, expected) in body["arrays"].items()
    }
    plain = lambda dtype: jnp.dtype(np.uint8) if dtype.itemsize == 1 else dtype
    claimed = {n: (s, plain(dtype)) for n, (s, dtype, _) in described.items() if 0 not in s}
    claims = sum(math.prod(shape) * dtype.itemsize for shape, dtype in claimed.values())
    with silence_orbax(folder.name), make_checkpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        stored = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in stored.items()}
        problems = list_differences(_format_arrays(claimed), _format_arrays(stored))
        # nothing is allocated for what the files cannot hold
        if claims > sizes + _INLINE_SLACK * len(claimed):
            problems.append(f"files of {sizes} bytes cannot hold arrays of {claims} bytes")
        if problems:
            raise _make_damage_error(directory, problems)
    found: dict[str, Any] = {}
    with silence_orbax(folder.name), _make_hash_pool() as pool:

        def receive(read: dict[str, np.ndarray]) -> None:
            hashes = pool.map(sha256, read.values())
            for name, sha in zip(list(read), hashes, strict=True):
                _, dtype, expected = described[name]
                array = read.pop(name)
                if sha != expected:
                    problems.append(f"{name}: its SHA-256 is not the one in the manifest")
                elif not problems:
                    found[name] = make(name, array.view(dtype))

        receive(
            {n: np.zeros(shape, dtype) for n, (shape, dtype, _) in described.items() if 0 in shape}
        )
        nbytes = {name: math.prod(s) * dtype.itemsize for name, (s, dtype) in claimed.items()}
        read_arrays(folder, nbytes, receive)
    if problems:
        raise _make_damage_error(directory, problems)
    return found


def verify_files(directory: Path, body: dict[str, Any]) -> tuple[Path, int]:
    """The folder of arrays and its size, once its files are those of the manifest, byte for byte.

    Only names found in the folder are opened, never a name that the manifest gives.
    """
    folder, wanted = directory / body["folder"], body["files"]
    found = {} if folder.is_symlink() else _list_files(folder)
    problems = [f"{name}: unexpected: remove it" for name in sorted(found.keys() - wanted.keys())]
    whole: dict[str, Path] = {}
    for name, (size, _) in wanted.items():
        path = found.get(name)
        if path is None:
            problems.append(f"{name}: missing")
        elif path.is_symlink() or not path.is_file():
            problems.append(f"{name}: a link or a device: put the file itself there")
        elif (came := path.stat().st_size) != size:
            problems.append(f"{name}: {came} bytes, expected {size}")
        else:
            whole[name] = path
    with _make_hash_pool() as pool:
        for name, sha in zip(whole, pool.map(_hash_file, whole.values()), strict=True):
            if sha != wanted[name][1]:
                problems.append(f"{name}: its SHA-256 is not the one in the manifest")
    if problems:
        raise _make_damage_error(directory, problems, folder.name)
    return folder, sum(path.stat().st_size for path in found.values())


def _make_damage_error(
    directory: Path, problems: list[str], folder: str = "the arrays"
) -> CheckpointError:
    """The error of a checkpoint that is not as it was written."""
    return CheckpointError(
        f"the checkpoint at {directory} is damaged: restore another copy. In {folder}:\n"
        + list_problems(problems)
    )


def _list_files(folder: Path) -> dict[str, Path]:
    """Everything beneath a folder that is no folder, links included, by its path within."""
    walk = ((Path(parent), folders + names) for parent, folders, names in os.walk(folder))
    paths = [parent / name for parent, names in walk for name in names]
    return {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.is_symlink() or not path.is_dir()
    }


def _format_arrays(arrays: dict[str, Any]) -> dict[str, str]:
    """Shapes and dtypes of arrays, as text."""
    return {name: f"{dtype}{list(shape)}" for name, (shape, dtype) in arrays.items()}


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed or failed saves left: whatever a readable manifest does not name.

    Nothing goes where the manifest cannot be read, or may not be the one on disk.
    """
    with contextlib.suppress(OSError, CheckpointError):
        fsync(directory)
        names = os.listdir(directory)
        keep = read_manifest(directory)["folder"] if _MANIFEST in names else None
        (directory / f"{_MANIFEST}.new").unlink(missing_ok=True)  # of older releases
        remove_temporary(directory)
        for path in directory.glob("arrays-*"):
            # Orbax writes under a name with a suffix of its own
            if path.name != keep and _ARRAYS_FOLDER.match(path.name):
                _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder; TensorStore may still write into that of a failed save for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.005)


def _fsync_and_hash(path: Path) -> list[Any]:
    """Size and SHA-256 of a file that is on disk."""
    fsync(path)
    return [path.stat().st_size, _hash_file(path)]


def _make_hash_pool() -> ThreadPoolExecutor:
    """Threads that hash: hashlib releases the GIL."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))


def _hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serialize_manifest(body: dict[str, Any]) -> bytes:
    """The manifest of a body, with its SHA-256: the one text that is read back as this body."""
    sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha}, indent=1, allow_nan=False).encode()

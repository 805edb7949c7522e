"""Write and read archives: a folder of arrays with a manifest that holds all of their hashes."""

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
from lowrank_jax._files.kinds import MANIFEST, describe_other_kind
from lowrank_jax._files.locks import lock_folder
from lowrank_jax._trees.fingerprint import list_differences, sha256
from lowrank_jax.checkpoint._orbax import (
    make_checkpointer,
    read_arrays,
    write_arrays,
)
from lowrank_jax.checkpoint._quiet import silence_orbax

# An archive is a directory that holds a manifest and one Orbax folder:
#   manifest.json        {"folder": "arrays-5f..", "arrays": {name: [shape, dtype, sha256]},
#                         "files": {path: [size, sha256]}, .., "sha256": of all the above}
#   arrays-5f../         what Orbax wrote: OCDBT files, which hold the arrays
# Hashes of files are checked before Orbax parses any of them, and those of arrays after it, so
# that an error in writing or parsing is noticed too.

# Files with quantized arrays have a version of their own, which older releases refuse; all others
# keep the version that every release reads.
_FORMAT, VERSION, QUANTIZED_VERSION = "lowrank_jax.checkpoint", 1, 2
_ARRAYS_FOLDER = re.compile(r"arrays-[0-9a-f]{32}")
# OCDBT compresses small arrays within its index: by how much each may exceed its size on disk
_INLINE_SLACK = 4096


def write_archive(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Replace the archive at a directory atomically by a manifest's body and arrays."""
    make_folder(directory)
    with lock_folder(directory):
        _remove_leftovers(directory)
        try:
            _commit(directory, body, arrays)
        finally:
            _remove_leftovers(directory)


def _commit(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a new folder of arrays, then a new manifest; one rename makes them the archive."""
    # The order is what makes the replacement atomic:
    #   1. write arrays-NEW beside arrays-OLD, fsync its files, then the directories that name them
    #   2. fsync the directory, so that arrays-NEW is durable before a manifest can name it
    #   3. write the manifest to a temporary file, fsync it, rename it over manifest.json, fsync
    #   4. remove arrays-OLD (write_archive)
    # A crash before the rename in 3 leaves the old archive, a crash after it the new one.
    folder = directory / f"arrays-{uuid.uuid4().hex}"
    fsync(directory)  # if this is not supported, fail before anything has been written
    with _make_hash_pool() as pool:
        hashes = pool.map(sha256, arrays.values())  # while Orbax writes
        with silence_orbax(folder.name):
            write_arrays(folder, arrays)
        found = _list_files(folder)
        files = dict(zip(found, pool.map(_fsync_and_hash, found.values()), strict=True))
        for parent, _, _ in os.walk(folder):
            fsync(Path(parent))
        entries = {
            name: [list(array.shape), array.dtype.name, sha]
            for (name, array), sha in zip(arrays.items(), hashes, strict=True)
        }
    head = {"format": _FORMAT, "version": VERSION}
    body = {**head, **body, "arrays": entries, "folder": folder.name, "files": files}
    fsync(directory)
    text = serialize_manifest(body)
    manifest = write_temporary(directory, lambda file: file.write(text))
    commit_files(directory, {MANIFEST: manifest}, "checkpoint")


def has_manifest(directory: Path) -> bool:
    """Whether the directory holds an archive."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest's body, and verify its version and its SHA-256.

    Raises:
      CheckpointError: there is no manifest, it is of an unknown version, or it is damaged.
    """
    path = directory / MANIFEST
    if not has_manifest(directory):
        why = "does not exist" if not directory.exists() else f"holds no {MANIFEST}"
        if other := describe_other_kind(directory, "a checkpoint"):
            raise CheckpointError(f"there is no checkpoint at {directory}: {other}")
        raise CheckpointError(
            f"there is no checkpoint at {directory}: it {why}; pass the directory given to save "
            "(the first save there may not have finished)"
        )
    try:
        text = path.read_bytes()
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a manifest of lowrank_jax.checkpoint")
        if body.get("version") not in (VERSION, QUANTIZED_VERSION):
            raise CheckpointError(
                f"{path} is of format version {body.get('version')!r}; this lowrank_jax reads "
                f"versions {VERSION} and {QUANTIZED_VERSION}: use the release that wrote it, or a "
                "newer one"
            )
        body.pop("sha256", None)
        if text == serialize_manifest(body) and _ARRAYS_FOLDER.fullmatch(body["folder"]):
            return body
        why = "its text does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{path} is damaged ({why}): restore another copy, or save again")


def read_archive(
    directory: Path, body: dict[str, Any], make: Callable[[str, np.ndarray], Any]
) -> dict[str, Any]:
    """Return name -> make(name, array) of all arrays; few arrays are on the host at one time.

    Files are verified before Orbax parses them, and each array before it is passed to `make`.

    Raises:
      CheckpointError: files or arrays are missing, left over, or not the ones of the manifest.
    """
    folder, sizes = verify_files(directory, body)
    entries = {
        name: (tuple(shape), jnp.dtype(dtype), expected)
        for name, (shape, dtype, expected) in body["arrays"].items()
    }
    plain = lambda dtype: jnp.dtype(np.uint8) if dtype.itemsize == 1 else dtype
    claimed = {n: (s, plain(dtype)) for n, (s, dtype, _) in entries.items() if 0 not in s}
    claims = sum(math.prod(shape) * dtype.itemsize for shape, dtype in claimed.values())
    with silence_orbax(folder.name), make_checkpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        stored = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in stored.items()}
        problems = list_differences(_format_arrays(claimed), _format_arrays(stored))
        # a forged manifest must not cause allocations that its files cannot fill
        if claims > sizes + _INLINE_SLACK * len(claimed):
            problems.append(f"files of {sizes} bytes cannot hold arrays of {claims} bytes")
        if problems:
            raise _make_damage_error(directory, problems)
    found: dict[str, Any] = {}
    with silence_orbax(folder.name), _make_hash_pool() as pool:

        def receive(read: dict[str, np.ndarray]) -> None:
            hashes = pool.map(sha256, read.values())
            for name, sha in zip(list(read), hashes, strict=True):
                _, dtype, expected = entries[name]
                array = read.pop(name)
                if sha != expected:
                    problems.append(f"{name}: its SHA-256 is not the one in the manifest")
                elif not problems:
                    found[name] = make(name, array.view(dtype))

        receive(
            {n: np.zeros(shape, dtype) for n, (shape, dtype, _) in entries.items() if 0 in shape}
        )
        nbytes = {name: math.prod(s) * dtype.itemsize for name, (s, dtype) in claimed.items()}
        read_arrays(folder, nbytes, receive)
    if problems:
        raise _make_damage_error(directory, problems)
    return found


def verify_files(directory: Path, body: dict[str, Any]) -> tuple[Path, int]:
    """Verify the files' sizes and SHA-256; return the folder of arrays and its total size.

    Only names found in the folder are opened, never a name that the manifest gives.

    Raises:
      CheckpointError: a file is missing, unexpected, not regular, or differs from the manifest.
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
            problems.append(f"{name}: a link or a device: replace it by the file itself")
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
    """Return the error of a damaged checkpoint, with its problems listed."""
    return CheckpointError(
        f"the checkpoint at {directory} is damaged: restore another copy. In {folder}:\n"
        + list_problems(problems)
    )


def _list_files(folder: Path) -> dict[str, Path]:
    """Return relative path -> path of all files below a folder, links included."""
    walk = ((Path(parent), folders + names) for parent, folders, names in os.walk(folder))
    paths = [parent / name for parent, names in walk for name in names]
    return {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.is_symlink() or not path.is_dir()
    }


def _format_arrays(arrays: dict[str, Any]) -> dict[str, str]:
    """Format name -> (shape, dtype) as name -> text: (2, 3), float32 -> "float32[2, 3]"."""
    return {name: f"{dtype}{list(shape)}" for name, (shape, dtype) in arrays.items()}


def _remove_leftovers(directory: Path) -> None:
    """Remove the files of killed or failed saves: folders of arrays not named by the manifest.

    Nothing is removed if the manifest cannot be read, or may not be the one on disk.
    """
    with contextlib.suppress(OSError, CheckpointError):
        fsync(directory)
        names = os.listdir(directory)
        keep = read_manifest(directory)["folder"] if MANIFEST in names else None
        (directory / f"{MANIFEST}.new").unlink(missing_ok=True)  # written by older releases
        remove_temporary(directory)
        for path in directory.glob("arrays-*"):
            # match, not fullmatch: an unfinished Orbax folder has a suffix after its name
            if path.name != keep and _ARRAYS_FOLDER.match(path.name):
                _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder, with retries: after a failed save TensorStore may still write into it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.005)


def _fsync_and_hash(path: Path) -> list[Any]:
    """Fsync a file; return its size and SHA-256."""
    fsync(path)
    return [path.stat().st_size, _hash_file(path)]


def _make_hash_pool() -> ThreadPoolExecutor:
    """Make a thread pool for hashing: hashlib releases the GIL."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))


def _hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serialize_manifest(body: dict[str, Any]) -> bytes:
    """Return the manifest's text: the body with its SHA-256. Any other text is rejected."""
    sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha}, indent=1, allow_nan=False).encode()

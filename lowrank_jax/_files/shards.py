"""Read the tensors of a model's folder, one safetensors file or several shards, on demand."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lowrank_jax._errors import CheckpointError, list_first_problems, list_problems
from lowrank_jax._files.json_text import read_json_object
from lowrank_jax._files.kinds import INDEX as INDEX
from lowrank_jax._files.kinds import SINGLE as SINGLE
from lowrank_jax._files.kinds import describe_other_kind
from lowrank_jax._files.safetensors import Entry, TensorFile

_INDEX_LIMIT = 1 << 26
_FOLDERS = {"", ".", ".."}
_SEPARATOR = re.compile(f"[{re.escape('/' + os.sep + (os.altsep or ''))}]")


class Tensors(Mapping):
    """Mapping of tensor names to NumPy arrays, each read from its file at every look-up."""

    def __init__(self, files: Mapping[str, TensorFile]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def entry(self, name: str) -> Entry:
        """Return the shape and dtype of a tensor without reading it."""
        return self._files[name].entries[name]

    def is_coded(self, name: str) -> bool:
        """Whether a tensor is a 4-bit weight; those are [out, in] even in a Conv1D module."""
        return False

    def file(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self._files[name].path.name

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are equal bit for bit."""
        one, two = self.entry(name), self.entry(other)
        chunks = (self._files[key].iter_chunks(key) for key in (name, other))
        same = (one.shape, one.dtype) == (two.shape, two.dtype)
        return same and all(a == b for a, b in zip(*chunks, strict=True))


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Tensors]:
    """Open model.safetensors, or the shards that the index names.

    Raises:
      CheckpointError: neither exists, a shard or one of its tensors is missing, or a file is
        damaged.
    """
    paths, promised = _locate_files(folder)
    with contextlib.ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for path in paths:
            file = stack.enter_context(TensorFile(path))
            if twice := [name for name in file.entries if name in files]:
                raise CheckpointError(f"two shards hold {twice[0]!r}; the second is {path}")
            files |= dict.fromkeys(file.entries, file)
        if lost := sorted(promised - files.keys()):
            raise CheckpointError(
                f"{folder / INDEX} names tensors that its shards do not hold: the files are of "
                f"different models, or damaged\n{list_problems(lost)}"
            )
        yield Tensors(files)


def _locate_files(folder: Path) -> tuple[list[Path], set[str]]:
    """Return the paths of a folder's files, and the tensor names that the index lists."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], set()
    if not (folder / INDEX).is_file():
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder: pass the folder of a model, with its config.json and "
                "safetensors files"
            )
        if other := describe_other_kind(folder, "a model"):
            raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: {other}")
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} holds neither {SINGLE} nor {INDEX}"
            + (f"; {pickles[0]} is a pickle, and nothing here unpickles" if pickles else "")
            + ": save the model again, as safetensors"
        )
    where = read_json_object(folder / INDEX, _INDEX_LIMIT).get("weight_map")
    if not isinstance(where, dict) or not all(type(name) is str for name in where.values()):
        raise CheckpointError(
            f"{folder / INDEX} is not an index of shards: expected a weight_map, an object that "
            "maps tensor names to file names"
        )
    names = sorted({*where.values()})
    if outside := [name for name in names if name in _FOLDERS or _SEPARATOR.search(name)]:
        raise CheckpointError(
            f"{folder / INDEX} names files outside its folder:\n{list_problems(outside)}"
        )
    # what is printable has no lone surrogates, and file systems allow 255 bytes
    if strange := [n for n in names if not n.isprintable() or len(n.encode()) > 255]:
        raise CheckpointError(f"{folder / INDEX} has invalid file names:\n{list_problems(strange)}")
    # an index may name far more files than there are: only the first that are missing are sought
    lost = (name for name in names if not (folder / name).is_file())
    if missing := list(itertools.islice(lost, 20)):
        absent = {*names}.difference(os.listdir(folder))
        raise CheckpointError(
            f"{folder} lacks shards that its index names; fetch them again\n"
            f"{list_first_problems(missing, max(len(absent), len(missing)))}"
        )
    return [folder / name for name in names], {*where}

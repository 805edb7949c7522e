"""The tensors of a model's folder: safetensors files, of which each tensor is read when asked for.

Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.json_text import read_json_object
from lowrank_jax._files.safetensors import Entry, TensorFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_LIMIT = 1 << 26


class Tensors(Mapping):
    """name -> NumPy array, a copy of what the file holds, made at each look-up."""

    def __init__(self, files: Mapping[str, TensorFile]):
        self._locate_files = files

    def __getitem__(self, name: str) -> np.ndarray:
        return self._locate_files[name].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._locate_files

    def __iter__(self) -> Iterator[str]:
        return iter(self._locate_files)

    def __len__(self) -> int:
        return len(self._locate_files)

    def entry(self, name: str) -> Entry:
        """Shape and dtype of a tensor, of which nothing is read."""
        return self._locate_files[name].entries[name]

    def is_coded(self, name: str) -> bool:
        """Whether a tensor is a weight in 4 bits, which lies [out, in] whatever its module."""
        return False

    def file(self, name: str) -> str:
        """The name of the file that a tensor is in."""
        return self._locate_files[name].path.name

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same to the last bit."""
        one, two = self.entry(name), self.entry(other)
        chunks = (self._locate_files[key].chunks(key) for key in (name, other))
        same = (one.shape, one.dtype) == (two.shape, two.dtype)
        return same and all(a == b for a, b in zip(*chunks, strict=True))


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Tensors]:
    """The tensors of model.safetensors, or of the shards that its index names.

    Raises:
      CheckpointError: there is no such file, a shard or one of its tensors is missing, or a file is
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
    """The files of a folder, and the names of tensors that its index promises."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], set()
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} holds neither {SINGLE} nor {INDEX}"
            + (f"; {pickles[0]} is a pickle, and nothing here unpickles" if pickles else "")
            + ": save the model again, as safetensors"
        )
    where = read_json_object(folder / INDEX, _INDEX_LIMIT).get("weight_map")
    if not isinstance(where, dict) or not all(type(name) is str for name in where.values()):
        raise CheckpointError(
            f"{folder / INDEX} is no index of shards: expected a weight_map, an object that gives "
            "each tensor the name of a file"
        )
    names = sorted({*where.values()})
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise CheckpointError(
            f"{folder / INDEX} names files outside its folder:\n{list_problems(outside)}"
        )
    if strange := [name for name in names if not _is_file_name(name)]:
        raise CheckpointError(f"{folder / INDEX} names what is no file:\n{list_problems(strange)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"shards are missing of {folder}; fetch them again\n{list_problems(missing)}"
        )
    return [folder / name for name in names], {*where}


def _is_file_name(name: str) -> bool:
    """Whether a file may be called so: in printable characters, and in bytes that systems take."""
    return name.isprintable() and len(name.encode()) < 256

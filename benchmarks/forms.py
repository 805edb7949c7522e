"""What faults.py writes: the forms that an adapter or a model has on disk, each of one step."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint, huggingface, peft
from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax._files.shards import open_folder

CONFIG = lowrank.LoraConfig(rank=2, targets=("**/w",))
# what `whole` says of a folder that has no entry, so that nothing loads it
GONE = -1


@dataclasses.dataclass(frozen=True)
class Form:
    """A form on disk.

    Args:
      name: of it.
      save: (directory, step, rows) writes it.
      whole: the step of what is there; None where it is torn, GONE where it has no entry.
      orphans: how many names are there that are not of it.
    """

    name: str
    save: Callable
    whole: Callable[[Path], int | None]
    orphans: Callable[[Path], int]


def contents(step: int, rows: int = 64) -> dict:
    """What is saved at a step: every number says which."""
    fill = lambda *shape: np.full(shape, step, np.float32)
    layer = lambda: {"w": lowrank.LowRank(fill(rows, 2), fill(2, 64)), "bias": None}
    lora = {"one": layer(), "two": layer()}
    state = {"count": step, "mu": fill(rows, 2)}
    return {"lora": lora, "config": CONFIG, "opt_state": state, "step": step, "extra": [fill(2)]}


def whole(directory: Path) -> int | None:
    """The step of the checkpoint there, or None where it is torn or not there."""
    try:
        found = checkpoint.restore(directory)
    except CheckpointError as error:
        print(error)
        return None
    factors = [part for layer in found.lora.values() for part in (layer["w"].a, layer["w"].b)]
    arrays = [*factors, found.opt_state["mu"], found.opt_state["count"], found.extra["0"]]
    return found.step if all((np.asarray(a) == found.step).all() for a in arrays) else None


def entries(directory: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def orphans(directory: Path) -> int:
    """How many names are there besides the manifest and its arrays."""
    folder = json.loads((directory / "manifest.json").read_text())["folder"]
    return len({path.name for path in directory.iterdir()} - {"manifest.json", folder})


def _fill(step: int, *shape: int) -> np.ndarray:
    return np.full(shape, step, np.float32)


def _step(arrays: list[np.ndarray]) -> int | None:
    """The one number that all arrays hold."""
    found = {float(number) for array in arrays for number in np.unique(array)}
    return int(found.pop()) if len(found) == 1 else None


def _save_adapter(directory: Path, step: int, rows: int, rank: int) -> None:
    layer = lambda: {"kernel": lowrank.LowRank(_fill(step, rows, rank), _fill(step, rank, 64))}
    peft.save(directory, {"one": layer(), "two": layer()}, CONFIG)


def _adapter(directory: Path) -> int | None:
    if not (directory / "adapter_config.json").exists():
        return GONE
    with TensorFile(directory / "adapter_model.safetensors") as file:
        tensors = {name.split(".")[2]: {} for name in file.entries}
        for name in file.entries:
            tensors[name.split(".")[2]][name.split(".")[3]] = file.read(name)
    shape = lambda parts: (parts["lora_A"].shape[1], parts["lora_B"].shape[0])
    params = {name: {"kernel": np.ones(shape(parts), "f")} for name, parts in tensors.items()}
    try:
        lora = peft.load(directory, params)[1]
    except CheckpointError as error:
        print(error)
        return None
    return _step(
        [np.asarray(x) for leaf in lora.values() for x in (leaf["kernel"].a, leaf["kernel"].b)]
    )


def _save_model(directory: Path, step: int, rows: int = 64) -> None:
    params = {name: {"kernel": _fill(step, rows, 64)} for name in ("one", "two")}
    huggingface.save(directory, params, max_shard=rows * 64 * 4 + 1)


def _model(directory: Path) -> int | None:
    if not (directory / "model.safetensors.index.json").exists():
        return GONE
    try:
        with open_folder(directory) as tensors:
            return _step([*tensors.values()]) if len(tensors) == 2 else None
    except CheckpointError as error:
        print(error)
        return None


def _others(*names: str) -> Callable[[Path], int]:
    """How many files a directory has besides those."""
    return lambda directory: len({path.name for path in directory.iterdir()} - {*names})


_ADAPTER = _others("adapter_config.json", "adapter_model.safetensors")
_MODEL = _others(
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
FORMS = {
    form.name: form
    for form in (
        Form(
            "checkpoint",
            lambda directory, step, rows=64: checkpoint.save(directory, **contents(step, rows)),
            whole,
            orphans,
        ),
        Form(
            "peft",
            lambda directory, step, rows=64: _save_adapter(directory, step, rows, 2),
            _adapter,
            _ADAPTER,
        ),
        Form(
            "peft-config",
            lambda directory, step, rows=64: _save_adapter(directory, step, rows, 1 + step % 3),
            _adapter,
            _ADAPTER,
        ),
        Form("huggingface", _save_model, _model, _MODEL),
    )
}

"""Match the tensors of a PEFT file with the leaves of a tree, by name, shape and dtype.

A tensor is read only after its shape was checked. All problems are collected in one list.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax._files.torch_layout import TorchLayout, infer_layout
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._targeting.plan import Use
from lowrank_jax._trees.fingerprint import to_numpy
from lowrank_jax.names import Parameter
from lowrank_jax.peft._opening import open_adapter
from lowrank_jax.peft._parsing import AdapterConfig
from lowrank_jax.peft._tensors import FACTOR_PAIRS, PREFIX, find_tied_module, split_key

_ENOUGH, _SHOWN = 500, 19  # problems after which matching stops, and how many of these are shown


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf of params, with the torch modules that its values belong to.

    Args:
      path, leaf: the leaf.
      name: its torch parameter.
      use: its use in the plan, or None.
      modules: index in the stack -> module; without a stack, the empty index.
    """

    # A leaf [2, 4, 3] that stacks two layers, named "layers.{}.mlp.up_proj":
    #   modules = {(0,): "layers.0.mlp.up_proj", (1,): "layers.1.mlp.up_proj"}
    # A leaf [4, 3] named "lm_head": modules = {(): "lm_head"}

    path: str
    leaf: Any
    name: Parameter
    use: Use | None
    modules: dict[tuple[int, ...], str]

    def torch_layout(self) -> TorchLayout:
        """Return how the leaf maps to the torch parameter; CheckpointError if that is unknown."""
        return infer_layout(self.path, tuple(self.leaf.shape), self.name, self.use, None)

    @property
    def has_values(self) -> bool:
        """Whether the leaf is an array, neither quantized nor a shape."""
        return not isinstance(self.leaf, Quantized | jax.ShapeDtypeStruct)


def make_misfit_error(folder: Path, problems: list[str]) -> CheckpointError:
    """Make the error that lists why an adapter does not fit params."""
    return CheckpointError(
        f"the adapter at {folder} does not fit params:\n{list_problems(problems)}"
    )


@dataclasses.dataclass
class Matching:
    """The state of matching a file with the leaves of a tree.

    Args:
      folder, config, file: the adapter's folder and its two files.
      parts: module -> part -> key, of the tensors that no leaf has taken yet.
      problems: a line for each problem.
      unnamed: leaves whose stack does not fit the module's name; reported only if some tensor
        finds no leaf.
      folds: module -> (key of lora_B.bias, scale), until the bias leaf takes it.
      not_finite: keys of tensors that hold NaN or infinity.
    """

    # parts starts with all keys: "base_model.model.lm_head.lora_A.weight" is entered as
    # parts["lm_head"]["lora_A.weight"]. Leaves pop what belongs to them, so what is left at the
    # end has no leaf, which makes an unexpected tensor an error without a second pass.

    folder: Path
    config: AdapterConfig
    file: TensorFile
    parts: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    unnamed: list[str] = dataclasses.field(default_factory=list)
    folds: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    not_finite: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        for key in self.file.entries:
            if (split := split_key(key)) is None:
                self.problems.append(f"{key[:200]}: unexpected, not a key of an adapter")
            elif (twin := self.parts.setdefault(split[0], {}).setdefault(split[1], key)) != key:
                self.problems.append(f"{key[:200]}: unexpected, the same tensor as {twin[:200]}")

        if self.problems and not self.parts:  # no key is of an adapter: there is nothing to match
            raise make_misfit_error(self.folder, self.problems)
        halves = [
            f"{PREFIX}{module}.{second if first in parts else first}: missing"
            for module, parts in self.parts.items()
            for first, second in FACTOR_PAIRS.items()
            if (first in parts) != (second in parts)
        ]
        self.refuse_many(halves)

    def refuse_many(self, problems: list[str]) -> None:
        """Raise the error at once if there are so many problems that the rest adds nothing."""
        if len(problems) >= _ENOUGH:
            raise make_misfit_error(
                self.folder, [*problems[:_SHOWN], "and more: matching stopped here"]
            )

    def list_unused(self) -> list[str]:
        """Return a line for each key that no leaf took."""
        keys = [key for parts in self.parts.values() for key in parts.values()]
        keys += [key for key, _ in self.folds.values()]
        lines = [f"{k[:200]}: unexpected, no leaf of params has this name" for k in sorted(keys)]
        return [*self.unnamed, *lines] if lines else []

    def take(self, module: str, part: str) -> str | None:
        """Remove the key of a part from those that are left, and return it, or None."""
        return self.parts.get(module, {}).pop(part, None)

    def reject(self, place: Place, problem: str) -> None:
        """Note a problem with a leaf, and take all tensors that the file has for it."""
        for module in place.modules.values():
            self.parts.pop(module, None)
        self.problems.append(problem)

    def has_factors(self, module: str) -> bool:
        """Whether the file has factors for a module that no leaf has taken."""
        return any(part.startswith("lora_") for part in self.parts.get(module, {}))

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.file.entries[key].shape

    def check_tensor(self, path: str, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has the shape and a floating dtype; notes a problem if not."""
        entry = self.file.entries[key]
        if entry.shape != shape:
            self.problems.append(
                f"{key}: shape {list(entry.shape)}, expected {list(shape)} for {path!r}"
            )
        elif not jnp.issubdtype(entry.dtype, jnp.floating):
            self.problems.append(f"{key}: dtype {entry.dtype.name}, expected a floating one")
        else:
            return True
        return False

    def read(self, key: str) -> np.ndarray:
        """Read a tensor for a node; note it if it is not finite."""
        array = self.file.read(key)
        if not np.isfinite(array).all():
            self.not_finite.add(key)
        return array

    def is_equal(self, key: str, other: str, transposed: bool) -> bool:
        """Whether two tensors of the file are equal, or each the transpose of the other."""
        shape = self.shape(other)[::-1] if transposed else self.shape(other)
        if self.shape(key) != shape:
            return False
        value = self.file.read(other)
        return np.array_equal(self.file.read(key), value.T if transposed else value)

    def is_base_copy(self, place: Place, layout: TorchLayout, key: str) -> bool:
        """Whether a tensor of the file equals the leaf in the narrower of their dtypes."""
        if not place.has_values or layout.stack or self.shape(key) != layout.weight_shape:
            return False
        theirs, ours = self.file.read(key), layout.to_weights(to_numpy(place.path, place.leaf))
        narrow = min((theirs.dtype, ours.dtype), key=lambda dtype: dtype.itemsize)
        return np.array_equal(theirs.astype(narrow), ours.astype(narrow))

    def take_base(self, place: Place, layout: TorchLayout, module: str) -> None:
        """Take the frozen copy of a weight that PEFT saves with the factors of a table."""
        key = self.take(module, "base_layer.weight")
        if key is None or not self.check_tensor(place.path, key, layout.weight_shape):
            return
        if place.has_values and not layout.stack and not self.is_base_copy(place, layout, key):
            self.problems.append(
                f"{key}: the file's copy of the base is not {place.path!r} of params"
            )

    def find_tied(self, place: Place, layout: TorchLayout) -> str | None:
        """Return the module tied to a table, or None; notes a problem if names lacks one."""
        try:
            return find_tied_module(layout, place.name, place.use)
        except CheckpointError as error:
            self.problems.append(f"{place.path!r}: {error}")
            return None

    def check_tied_projection(self, place: Place, other: str) -> None:
        """Note a problem if the file may change a table without the projection tied to it."""
        if not self.config["ensure_weight_tying"]:
            self.problems.append(
                f"{place.path!r}: the file changes the table but not {other!r}, which shares its "
                "weight in params; load it onto params without weight tying, or, if these have "
                "none, pass plan=lowrank.plan(fn, params, *args)"
            )


@contextlib.contextmanager
def open_matching(folder: Path) -> Iterator[Matching]:
    """Open an adapter's folder to match its tensors with leaves.

    Raises:
      CheckpointError: see open_adapter; or the file has no tensor of an adapter.
    """
    with open_adapter(folder) as adapter:
        yield Matching(*adapter)

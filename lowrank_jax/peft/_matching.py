"""The tensors of a PEFT file as leaves of a tree take them: by name, shape and dtype.

Nothing is read before its size is known to be right; all that is wrong is in one list.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax._files.torch_layout import TorchLayout, infer_layout
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._trees.fingerprint import to_numpy
from lowrank_jax.names import Parameter
from lowrank_jax.peft._parsing import AdapterConfig
from lowrank_jax.peft._tensors import find_tied_module, split_key


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf that a file may have something for.

    Args:
      path, leaf, name, use: the leaf, what torch calls it, and how the plan says it is used.
      modules: index within the stack -> module; one empty index where nothing is stacked.
    """

    path: str
    leaf: Any
    name: Parameter
    use: Any
    modules: dict[tuple[int, ...], str]

    def torch_layout(self) -> TorchLayout:
        """How the leaf lies in torch's parameter; a CheckpointError where that is not known."""
        return infer_layout(self.path, tuple(self.leaf.shape), self.name, self.use, None)

    @property
    def has_values(self) -> bool:
        """Whether the leaf has values of its own."""
        return not isinstance(self.leaf, Quantized | jax.ShapeDtypeStruct)


@dataclasses.dataclass
class Matching:
    """A file being matched with the leaves of a tree.

    Args:
      file, config: what was saved.
      parts: module -> part -> key, less what leaves have taken.
      problems: all that is wrong.
      unnamed: leaves that no module's name fits, a problem only if some tensor finds no leaf.
      folds: module -> (key of lora_B.bias, scale), until the bias leaf takes it.
      not_finite: keys of tensors that were read and hold NaN or infinity.
    """

    file: TensorFile
    config: AdapterConfig
    parts: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    unnamed: list[str] = dataclasses.field(default_factory=list)
    folds: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    not_finite: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self):
        for key in self.file.entries:
            if (split := split_key(key)) is None:
                self.problems.append(f"{key[:200]}: unexpected, no key of an adapter")
            elif (twin := self.parts.setdefault(split[0], {}).setdefault(split[1], key)) != key:
                self.problems.append(f"{key[:200]}: unexpected, {twin[:200]} says the same")

    def list_unused(self) -> list[str]:
        """One line for each key that no leaf took."""
        keys = [key for parts in self.parts.values() for key in parts.values()]
        keys += [key for key, _ in self.folds.values()]
        lines = [f"{k[:200]}: unexpected, no leaf of params is called so" for k in sorted(keys)]
        return [*self.unnamed, *lines] if lines else []

    def take(self, module: str, part: str) -> str | None:
        """A part's key, taken from what is left."""
        return self.parts.get(module, {}).pop(part, None)

    def reject(self, place: Place, problem: str) -> None:
        """Refuse a leaf, and all that the file has for it."""
        for module in place.modules.values():
            self.parts.pop(module, None)
        self.problems.append(problem)

    def has_factors(self, module: str) -> bool:
        """Whether factors of a module are left."""
        return any(part.startswith("lora_") for part in self.parts.get(module, {}))

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.file.entries[key].shape

    def check_tensor(self, path: str, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has that shape and a floating dtype; if not, it is a problem."""
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
        """A tensor that becomes part of a node; one that is not finite is noted."""
        array = self.file.read(key)
        if not np.isfinite(array).all():
            self.not_finite.add(key)
        return array

    def is_equal(self, key: str, other: str, turned: bool) -> bool:
        """Whether two tensors of the file are one, or one the other's transpose."""
        shape = self.shape(other)[::-1] if turned else self.shape(other)
        if self.shape(key) != shape:
            return False
        value = self.file.read(other)
        return np.array_equal(self.file.read(key), value.T if turned else value)

    def is_base_copy(self, place: Place, layout: TorchLayout, key: str) -> bool:
        """Whether a tensor of the file is the leaf, as far as the coarser of the two can say."""
        if not place.has_values or layout.stack or self.shape(key) != layout.weight_shape:
            return False
        theirs, ours = self.file.read(key), layout.to_weights(to_numpy(place.path, place.leaf))
        narrow = min((theirs.dtype, ours.dtype), key=lambda dtype: dtype.itemsize)
        return np.array_equal(theirs.astype(narrow), ours.astype(narrow))

    def take_base(self, place: Place, layout: TorchLayout, module: str) -> None:
        """Take the frozen copy of a weight that PEFT keeps beside the factors of a table."""
        key = self.take(module, "base_layer.weight")
        if key is None or not self.check_tensor(place.path, key, layout.weight_shape):
            return
        if place.has_values and not layout.stack and not self.is_base_copy(place, layout, key):
            self.problems.append(
                f"{key}: the file's copy of the base is not {place.path!r} of params"
            )

    def find_tied(self, place: Place, layout: TorchLayout) -> str | None:
        """The module that shares a table's weight; where names has none, that is a problem."""
        try:
            return find_tied_module(layout, place.name, place.use)
        except CheckpointError as error:
            self.problems.append(f"{place.path!r}: {error}")
            return None

    def check_untied(self, place: Place, other: str) -> None:
        """A change of a table, and none of the projection that shares it."""
        if not self.config["ensure_weight_tying"]:
            self.problems.append(
                f"{place.path!r}: the file changes the table and not {other!r}, which shares its "
                "weight in params; load it onto params that tie nothing, or, where these do not, "
                "pass plan=lowrank.plan(fn, params, *args)"
            )

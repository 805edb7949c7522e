"""Read a prequantized model's folder, with each 4-bit weight and its state as one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.hub_config import CONFIG, CONFIG_LIMIT, parse_quantization
from lowrank_jax._files.json_text import read_json_object
from lowrank_jax._files.safetensors import Entry
from lowrank_jax._files.shards import Tensors
from lowrank_jax.bitsandbytes._quant_state import (
    SIDES,
    STATES,
    QuantState,
    check_sizes,
    check_tensors,
    make_state_error,
    read_state,
)


class StateTensors(Tensors):
    """Mapping of names to tensors, where a 4-bit weight and its state are one name.

    `weights` maps the names of 4-bit weights to their headers; `state` reads one of them.

    Raises:
      CheckpointError: a weight lacks a tensor, or a tensor of a state belongs to no weight.
    """

    def __init__(self, tensors: Tensors, folder: Path):
        self._tensors, self._folder = tensors, folder
        states: dict[str, list[str]] = {}
        for key in tensors:
            if ".quant_state." in key:
                states.setdefault(key.partition(".quant_state.")[0], []).append(key)
        state_keys = {f"{name}.{side}" for name in states for side in SIDES}
        ends = tuple(f".{side}" for side in SIDES)
        problems = [
            f"{key} does not belong to a 4-bit weight"
            for key in tensors
            if key.endswith(ends) and key not in state_keys
        ]
        self.weights: dict[str, dict[str, Any]] = {}
        for name, keys in sorted(states.items()):
            try:
                if name not in tensors:
                    raise CheckpointError(f"there is {keys[0]}, but no tensor {name!r}")
                if not {*keys} & {f"{name}.{state}" for state in STATES}:
                    raise make_state_error(name, keys)
                self.weights[name] = header = check_tensors(tensors, name)
                check_sizes(
                    header, name, {key: tensors.entry(key) for key in _list_keys(tensors, name)}
                )
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(f"{folder} is damaged:\n{list_problems(problems)}")
        own = [key for key in tensors if key not in state_keys and ".quant_state." not in key]
        self._names = dict.fromkeys(own)

    def is_coded(self, name: str) -> bool:
        """Whether a tensor is a 4-bit weight."""
        return name in self.weights

    def state(self, name: str) -> QuantState:
        """Read the codes and scales of a 4-bit weight; CheckpointError if they are not finite."""
        try:
            state = read_state(self._tensors, name)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder} is damaged: {error}") from error
        second = {} if state.second is None else {"nested_absmax": state.second[0]}
        for side, scales in {"absmax": state.absmax, **second}.items():
            if not np.isfinite(scales).all():
                raise CheckpointError(
                    f"{self._folder} is damaged: {name}.{side} holds values that are not finite: "
                    "fetch it again"
                )
        return state

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def entry(self, name: str) -> Entry:
        """Return a tensor's shape and dtype; for a 4-bit weight those of the dense weight."""
        if name not in self.weights:
            return self._tensors.entry(name)
        header = self.weights[name]
        return Entry(header["shape"], jnp.dtype(header["dtype"]), 0, 0)

    def file(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self._tensors.file(name)

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are equal bit for bit."""
        parts, others = (
            [key[len(x) :] for key in _list_keys(self._tensors, x)] for x in (name, other)
        )
        return parts == others and all(
            self._tensors.are_equal(name + part, other + part) for part in parts
        )


def _list_keys(tensors: Tensors, name: str) -> list[str]:
    """Return the key of a tensor and, for a 4-bit weight, those of its state."""
    sides = [f"{name}.{side}" for side in (*SIDES, *STATES)]
    return [key for key in (name, *sides) if key in tensors]


def refuse_other_models(folder: Path) -> None:
    """Raise CheckpointError unless config.json is that of a 4-bit bitsandbytes model."""
    path = folder / CONFIG
    quantization = parse_quantization(read_json_object(path, CONFIG_LIMIT))
    if quantization is None or not quantization.is_bitsandbytes:
        method = None if quantization is None else quantization.method
        raise CheckpointError(
            f"{path} has quant_method {method!r}, but only 'bitsandbytes' is supported: use the "
            "dense model, and lowrank.quantize it"
        )
    if not quantization.is_4bit:
        raise CheckpointError(
            f"{path} does not have load_in_4bit: 8-bit models (LLM.int8) are not supported; use "
            "the dense model, and lowrank.quantize it"
        )

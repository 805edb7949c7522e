"""PEFT's tensors: their keys, and those of a weight that two modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.torch_layout import TorchLayout
from lowrank_jax.names import Parameter

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "token_adapter.trainable_tokens_delta"
_PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
    *(MAGNITUDE, TOKENS, "base_layer.weight", "base_layer.bias"),
)


def split_key(key: str) -> tuple[str, str] | None:
    """The module a key is of and what of it, or None for a key that is not of an adapter file."""
    if not key.startswith(PREFIX):
        return None
    name = key.removeprefix(PREFIX)
    if name.endswith(f".{MAGNITUDE}.weight"):
        name = name.removesuffix(".weight")
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    module, _, part = name.rpartition(".")
    return (module, part) if module and part and not _is_factor(module) else None


def _is_factor(module: str) -> bool:
    """Whether a name goes on below a factor, as with an adapter's name left in it."""
    return any(x.startswith("lora_") for x in module.split(".")[-2:])


def find_tied_module(layout: TorchLayout, name: Parameter, use: Any) -> str | None:
    """The module that shares a table's weight and so its adapter, or None.

    Raises:
      CheckpointError: the function ties the leaf, and names has no second module for it.
    """
    if layout.kind != "lookup" or (use is not None and not use.tied):
        return None
    if use is not None and name.tied is None:
        raise CheckpointError(
            f"{name.module!r} is looked up and multiplied with: it is two modules in torch, and "
            "names gives one; give Parameter(module, tied=the other module)"
        )
    return name.tied


def to_tied_factors(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The factors of the projection that shares a table's weight, from those of the table.

    Raises:
      CheckpointError: with DoRA the two would need other magnitudes.
    """
    if MAGNITUDE in parts:
        raise CheckpointError(
            "DoRA on a table that is also a projection: PEFT normalizes the two over other axes"
        )
    first, second = parts["lora_embedding_A"], parts["lora_embedding_B"]
    return {"lora_A.weight": second.T, "lora_B.weight": first.T}

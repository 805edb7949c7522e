"""Keys of the tensors in a PEFT file, and the factors of tied modules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.torch_layout import TorchLayout
from lowrank_jax._targeting.plan import Use
from lowrank_jax.names import Parameter

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "token_adapter.trainable_tokens_delta"
_PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
    *(MAGNITUDE, TOKENS, "base_layer.weight", "base_layer.bias"),
)
# of a linear layer or convolution, and of an embedding
FACTOR_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into its module and part; None for a key that is not of an adapter file.

    >>> split_key("base_model.model.layers.0.mlp.lora_A.weight")
    ('layers.0.mlp', 'lora_A.weight')
    """
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
    """Whether a module is inside a factor, as in "mlp.lora_A.default" with an adapter's name."""
    return any(x.startswith("lora_") for x in module.split(".")[-2:])


def find_tied_module(layout: TorchLayout, name: Parameter, use: Use | None) -> str | None:
    """Return the module that shares a table's weight and thus its adapter, or None.

    Raises:
      CheckpointError: the function uses the leaf in two ways, and names has no second module.
    """
    if layout.kind != "lookup" or (use is not None and not use.tied):
        return None
    if use is not None and name.tied is None:
        raise CheckpointError(
            f"{name.module!r} is read by rows and used as a projection: it is two modules in "
            "torch, but names gives one; return Parameter(module, tied=the other module)"
        )
    return name.tied


def to_tied_factors(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the factors of a table to those of the projection that shares its weight.

    Raises:
      CheckpointError: the adapter is DoRA, for which the two need different magnitudes.
    """
    if MAGNITUDE in parts:
        raise CheckpointError(
            "DoRA on a table that is also a projection: PEFT normalizes the two over different axes"
        )
    # The table's weight [rows, d] gains (B A)^T with A [r, rows] and B [d, r]. The projection's
    # weight, [rows, d] in torch too, gains B' A' with A' [r, d] = B^T and B' [rows, r] = A^T.
    first, second = parts["lora_embedding_A"], parts["lora_embedding_B"]
    return {"lora_A.weight": second.T, "lora_B.weight": first.T}

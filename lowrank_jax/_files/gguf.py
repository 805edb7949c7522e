"""The tensors of a GGUF file, under Hugging Face's names, each decoded when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.safetensors import Tensors
from lowrank_jax._files.tensor_file import Entry

SUFFIX = ".gguf"

# Architectures -> whether the rows of q and k lie by the pairs that rope turns together.
_ROTATED = {"llama": True, "qwen2": False}
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


class GgufTensors(Tensors):
    """Hugging Face's name -> float32 array, decoded at each look-up."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(
                "reading a GGUF file needs a package: pip install 'lowrank_jax[gguf]'"
            ) from error
        self.path, self._decode = path, gguf.quants.dequantize
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise CheckpointError(f"{path} is no GGUF file, or damaged ({error})") from error
        architecture = fields.get("general.architecture")
        if architecture not in _ROTATED:
            raise CheckpointError(
                f"{path} is a model of {architecture!r}: what GGUF files of it call their tensors, "
                f"and how these lie, is known here of {sorted(_ROTATED)}; convert it to safetensors"
            )
        self._heads = {
            part: int(fields[f"{architecture}.{field}"])
            for part, field in _HEADS.items()
            if _ROTATED[architecture] and f"{architecture}.{field}" in fields
        }
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}

    @property
    def ties(self) -> bool:
        """Whether the look-up table is the last projection too: there is no other."""
        return "lm_head.weight" not in self

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        weight = self._decode(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = self._heads.get(tensor.name.split(".")[-2])
        if heads is None:
            return weight
        # the file has the two features that rotate together as neighbors, models half a head apart
        pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def entry(self, name: str) -> Entry:
        """Shape and dtype of a tensor, of which nothing is read."""
        shape: Any = tuple(int(size) for size in reversed(self._tensors[name].shape))
        return Entry(shape, np.dtype(np.float32), 0, 0)

    def file(self, name: str) -> str:
        """The name of the file."""
        return self.path.name

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same to the last bit."""
        return self[name].tobytes() == self[other].tobytes()


def _name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one keeps its own, and is refused as such."""
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, part, kind = layer.groups()
        if part in _MODULES:
            return f"model.layers.{number}.{_MODULES[part]}.{kind}"
    stem, _, kind = name.partition(".")
    return f"{_OUTSIDE[stem]}.{kind}" if stem in _OUTSIDE else name

"""Read the tensors of a GGUF file under Hugging Face's names, each dequantized on demand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.gguf_header import Header, TensorInfo, read_header
from lowrank_jax._files.safetensors import Entry
from lowrank_jax._files.shards import Tensors

SUFFIX = ".gguf"

# architecture -> whether the rows of q and k are permuted for rotary embeddings (see __getitem__)
_HAS_PAIRED_ROWS = {"llama": True, "qwen2": False}
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
_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_UNQUANTIZED = {0: np.float32, 1: np.float16}  # types that are not in blocks
_HEAD_FIELDS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def open_gguf(path: Path) -> tuple[Any, Header]:
    """Return the package gguf and the header of a file.

    Raises:
      CheckpointError: the package is not installed, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "reading a GGUF file needs a package: pip install 'lowrank_jax[gguf]'"
        ) from error
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    try:
        return gguf, read_header(path, sizes)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a GGUF file, or is damaged ({error})") from error


class GgufTensors(Tensors):
    """Mapping of Hugging Face's names to float32 arrays, dequantized at every look-up."""

    def __init__(self, path: Path):
        gguf, header = open_gguf(path)
        self.path, self._decode = path, gguf.quants.dequantize
        self._kind = gguf.GGMLQuantizationType
        self._data = header.data
        architecture = header.fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _HAS_PAIRED_ROWS:
            raise CheckpointError(
                f"{path} is a model of {architecture!r}; GGUF files are read of "
                f"{sorted(_HAS_PAIRED_ROWS)} only: convert it to safetensors"
            )
        self._tensors: dict[str, TensorInfo] = {}
        self._heads: dict[str, int] = {}
        for own, place in header.tensors.items():
            name, part = _translate_name(own)
            if name in self._tensors:
                raise CheckpointError(f"{path} has two tensors for {name!r}, one of them {own!r}")
            self._tensors[name] = place
            if _HAS_PAIRED_ROWS[architecture] and part in _HEAD_FIELDS:
                field = f"{architecture}.{_HEAD_FIELDS[part]}"
                heads = header.fields.get(field)
                if type(heads) is not int or heads < 1 or place.shape[0] % (2 * heads):
                    raise CheckpointError(
                        f"{path}: {field} is {heads!r}, but {own!r} has {place.shape[0]} rows, not "
                        "an even number for each head"
                    )
                self._heads[name] = heads

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is tied with the last projection: the file has no other."""
        return "lm_head.weight" not in self

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            with np.errstate(all="ignore"):  # scales that are not finite give weights that are not
                weight = self._decode(self._blocks(name), self._kind(self._tensors[name].type))
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"{name!r} of {self.path} cannot be dequantized ({error!r})"
            ) from error
        weight = weight.astype(np.float32)
        heads = self._heads.get(name)
        if heads is None:
            return weight
        # A rotary embedding rotates pairs of features. GGUF stores a pair as adjacent rows,
        # transformers half a head apart. With one head of 6 rows, GGUF's order of transformers'
        # rows is 0 3 1 4 2 5: [6, in] -> [1, 3, 2, in], swap to [1, 2, 3, in] -> 0 1 2 3 4 5.
        pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    def _blocks(self, name: str) -> np.ndarray:
        """Return a tensor's values [*rows, columns], or its encoded blocks [*rows, row bytes]."""
        place = self._tensors[name]
        data = self._data[place.start : place.stop]
        return data.view(_UNQUANTIZED.get(place.type, np.uint8)).reshape(*place.shape[:-1], -1)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def entry(self, name: str) -> Entry:
        """Return the shape and dtype of a tensor without reading it."""
        return Entry(self._tensors[name].shape, np.dtype(np.float32), 0, 0)

    def file(self, name: str) -> str:
        """Return the name of the GGUF file."""
        return self.path.name

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are equal bit for bit."""
        return self[name].tobytes() == self[other].tobytes()


def _translate_name(name: str) -> tuple[str, str]:
    """Return a tensor's Hugging Face name and its part of a layer ("" outside of layers).

    "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight", "attn_q". An unknown tensor
    keeps its name, so that the caller reports it.
    """
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, part, kind = layer.groups()
        if part in _MODULES:
            return f"model.layers.{number}.{_MODULES[part]}.{kind}", part
    stem, _, kind = name.partition(".")
    return (f"{_TOP_LEVEL[stem]}.{kind}" if stem in _TOP_LEVEL else name), ""

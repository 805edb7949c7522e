"""The tensors of a GGUF file, under Hugging Face's names, each decoded when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.gguf_header import TensorInfo, read_header
from lowrank_jax._files.safetensors import Entry
from lowrank_jax._files.shards import Tensors

SUFFIX = ".gguf"

# Architectures -> whether the rows of q and k lie by the pairs that rope turns together.
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
        self._kind = gguf.GGMLQuantizationType
        try:
            header = read_header(
                path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
            )
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} is no GGUF file, or damaged ({error})") from error
        self._data = header.data
        architecture = header.fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _HAS_PAIRED_ROWS:
            raise CheckpointError(
                f"{path} is a model of {architecture!r}: what GGUF files of it call their tensors, "
                f"and how these lie, is known here of {sorted(_HAS_PAIRED_ROWS)}; convert it to safetensors"
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
                        f"{path} says {field} is {heads!r}, and {own!r} has {place.shape[0]} rows: "
                        "expected a number of heads, each of an even number of rows"
                    )
                self._heads[name] = heads

    @property
    def is_tied(self) -> bool:
        """Whether the look-up table is the last projection too: there is no other."""
        return "lm_head.weight" not in self

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            with np.errstate(all="ignore"):  # scales that are not finite give numbers that are not
                weight = self._decode(self._blocks(name), self._kind(self._tensors[name].type))
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(f"{name!r} of {self.path} is not decoded ({error!r})") from error
        weight = weight.astype(np.float32)
        heads = self._heads.get(name)
        if heads is None:
            return weight
        # the file has the two features that rotate together as neighbors, models half a head apart
        pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    def _blocks(self, name: str) -> np.ndarray:
        """The numbers of a tensor, or the bytes of its blocks, [*rows, bytes of a row]."""
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
        """Shape and dtype of a tensor, of which nothing is read."""
        return Entry(self._tensors[name].shape, np.dtype(np.float32), 0, 0)

    def file(self, name: str) -> str:
        """The name of the file."""
        return self.path.name

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same to the last bit."""
        return self[name].tobytes() == self[other].tobytes()


def _translate_name(name: str) -> tuple[str, str]:
    """Hugging Face's name of a tensor, and which part of a layer it is ("" for none).

    An unknown tensor keeps its own name, and is refused as such.
    """
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, part, kind = layer.groups()
        if part in _MODULES:
            return f"model.layers.{number}.{_MODULES[part]}.{kind}", part
    stem, _, kind = name.partition(".")
    return (f"{_TOP_LEVEL[stem]}.{kind}" if stem in _TOP_LEVEL else name), ""

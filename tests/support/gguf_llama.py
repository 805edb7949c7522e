"""A tiny Llama in a GGUF file, as llama.cpp's converter would write it."""

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers

# Quantized, HIDDEN is a whole block of the down projection; the other kernels are kept flat.
DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 32, 2, 4, 2, 8, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "a n", "Ġ a", "e r"]
TOKENS = [
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]


def hub_weights(*, tied: bool, bias: bool) -> dict[str, np.ndarray]:
    """Random weights [out, in] by GGUF's names, q and k in Hugging Face's order (half-split)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    weights = {"token_embd.weight": normal(len(TOKENS), DIM), "output_norm.weight": normal(DIM)}
    if not tied:
        weights["output.weight"] = normal(len(TOKENS), DIM)
    shapes = {
        "attn_q": (HEADS * HEAD_DIM, DIM),
        "attn_k": (KV_HEADS * HEAD_DIM, DIM),
        "attn_v": (KV_HEADS * HEAD_DIM, DIM),
        "attn_output": (DIM, HEADS * HEAD_DIM),
        "ffn_gate": (HIDDEN, DIM),
        "ffn_up": (HIDDEN, DIM),
        "ffn_down": (DIM, HIDDEN),
    }
    for i in range(LAYERS):
        weights[f"blk.{i}.attn_norm.weight"] = 1 + normal(DIM)
        weights[f"blk.{i}.ffn_norm.weight"] = 1 + normal(DIM)
        for name, shape in shapes.items():
            weights[f"blk.{i}.{name}.weight"] = normal(*shape)
            if bias:
                weights[f"blk.{i}.{name}.bias"] = normal(shape[0])
    return weights


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from half-split to interleaved order, spelled out index by index."""
    half = weight.shape[0] // heads // 2
    order = [
        head * 2 * half + j + side * half
        for head in range(heads)
        for j in range(half)
        for side in (0, 1)
    ]
    return weight[order]


def write_gguf(
    path: Path, *, tied: bool = True, bias: bool = False, architecture: str = "llama"
) -> dict[str, np.ndarray]:
    """Writes the tiny model as llama.cpp's converter would; returns its weights."""
    weights = hub_weights(tied=tied, bias=bias)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(5000.0)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        writer.add_tensor(name, interleave(weight, heads[kind]) if kind in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights

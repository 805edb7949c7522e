"""Make golden files of 4-bit weights, from `bitsandbytes`, `transformers` and `peft` themselves.

Made with Python 3.11 on an x86-64 CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 bitsandbytes==0.50.2 transformers==5.23.0 peft==0.21.2 \
        safetensors==0.8.0 numpy==2.4.6
    python tests/golden/make_bitsandbytes_files.py

(torch is the CPU build.) The output folder, tests/golden/bitsandbytes_files, holds

    layers.safetensors  CASE.weight, CASE.weight.absmax, ..: `Linear4bit.state_dict()` of each case
                        below; "experts" is a parameter of three axes; "plain" was quantized where
                        torch runs without fused multiply-add, so that its nested_quant_map differs
    layers.json         for each case: its input in bitsandbytes/inputs.npz, cast to its dtype, and
                        the SHA-256 of what it decodes to, in that dtype and in its own shape;
                        versions
    llama/              a tiny Llama, prequantized (NF4, double quantization), in two shards, as
                        `save_pretrained` writes it
    lora.json           r, lora_alpha, target_modules; versions
    lora.npz            an adapter on that Llama: tokens [B, T] int32; logits [B, T, V]; loss [],
                        the mean over B * (T - 1) next tokens, in nats; adapter/KEY, KEY as in
                        peft's adapter_model.safetensors; grad/KEY, d loss / d adapter; all float32

Decoding is the default kernel's: the AVX512 one of dequantize_4bit takes the wrong absmax where a
block spans rows. The Llama runs in training mode: in evaluation the CPU repacks 4-bit weights and
computes in bfloat16. Its logits are checked against its decoded weights.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from make_bitsandbytes import run, tensor
from make_peft_llama import ALL_LINEARS, next_token_loss, randomize

SEED = 20261125
VERSIONS = {m.__name__: m.__version__ for m in (np, torch, bnb, peft, transformers, safetensors)}
INPUTS = Path(__file__).parent / "bitsandbytes" / "inputs.npz"
DOUBLE = {"compress_statistics": True}
CASES = {  # name: input, dtype, options
    "nf4": ("normal", "float32", {}),
    "nf4-double": ("scales", "float32", DOUBLE),
    "nf4-block128": ("scales", "float32", {"blocksize": 128, **DOUBLE}),
    "nf4-block32": ("normal", "float32", {"blocksize": 32}),
    "nf4-ragged": ("ragged", "float32", DOUBLE),
    "nf4-odd": ("odd", "float32", {}),
    "nf4-bfloat16": ("bfloat16", "bfloat16", DOUBLE),
    "nf4-float16": ("normal", "float16", DOUBLE),
    "nf4-kept-bfloat16": ("normal", "bfloat16", {"quant_storage": torch.bfloat16, **DOUBLE}),
    "fp4": ("ragged", "float32", {}),
    "fp4-double": ("normal", "float32", DOUBLE),
    "fp4-block4096": ("normal", "float32", {"blocksize": 4096}),
    "fp4-odd": ("odd", "bfloat16", DOUBLE),
    "fp4-kept-float16": ("normal", "float16", {"quant_storage": torch.float16}),
    "fp4-kept-float32": ("normal", "float32", {"quant_storage": torch.float32, **DOUBLE}),
}
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
}
LORA = {"r": 4, "lora_alpha": 10, "target_modules": ALL_LINEARS}


def inputs(name: str, dtype: str) -> torch.Tensor:
    """Read a weight."""
    with np.load(INPUTS, allow_pickle=False) as file:
        return tensor(file[name]).to(getattr(torch, dtype))


def linear(weight: torch.Tensor, quant_type: str, **options: object) -> dict[str, torch.Tensor]:
    """Quantize a weight as a layer, and save the layer."""
    options = {"compress_statistics": False, "quant_type": quant_type, **options}
    layer = bnb.nn.Linear4bit(*reversed(weight.shape), bias=False)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    return layer.to("cpu").state_dict()  # to() quantizes


def experts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize a parameter of three axes, as mixtures of experts have them."""
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    replace_parameter_4bit(module, "weight", compress_statistics=True, quant_type="nf4")
    return module.state_dict()


def decoded(state: dict[str, torch.Tensor]) -> str:
    """Decode by the default kernel, and hash the bytes."""
    packed = state["weight"].view(torch.uint8)
    parts = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
    quant = QuantState.from_dict(parts, device=torch.device("cpu"))
    absmax = quant.absmax
    if quant.nested:
        absmax = dequantize_blockwise(absmax, quant.state2) + quant.offset
    args = packed, absmax, quant.blocksize, quant.quant_type, quant.shape, quant.dtype
    values = run("exact", "dequantize_4bit", *args).contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def make_plain(path: Path) -> None:
    """Quantize one layer where torch has no fused multiply-add: in a process of its own."""
    safetensors.torch.save_file(linear(inputs("normal", "float32"), "nf4", **DOUBLE), path)


def make_layers(folder: Path) -> None:
    """Write every layer."""
    states = {}
    for name, (source, dtype, options) in CASES.items():
        states[name] = linear(inputs(source, dtype), name.split("-")[0], **options)
    states["experts"] = experts(inputs("normal", "float32").reshape(3, 32, 64))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "plain.safetensors"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
        subprocess.run([sys.executable, __file__, "--plain", path], check=True, env=environment)
        states["plain"] = safetensors.torch.load_file(path)
    sources = {
        name: {"input": source, "dtype": dtype} for name, (source, dtype, _) in CASES.items()
    }
    sources |= {name: {"input": "normal", "dtype": "float32"} for name in ("experts", "plain")}
    about = {name: {**sources[name], "decoded": decoded(dict(s))} for name, s in states.items()}
    arrays = {f"{name}.{key}": v.clone() for name, s in states.items() for key, v in s.items()}
    safetensors.torch.save_file(arrays, folder / "layers.safetensors")
    text = json.dumps({"layers": about, "versions": VERSIONS}, indent=1)
    (folder / "layers.json").write_text(text + "\n")


def make_llama(folder: Path) -> None:
    """Quantize a tiny Llama, all weights random, as users do, and save it in shards."""
    config = transformers.LlamaConfig(**LLAMA, dtype="float32")
    model = transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(SEED)
    for name, weight in sorted(model.state_dict().items()):
        value = rng.standard_normal(weight.shape)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * value
        elif name.endswith(".bias"):
            value = 0.2 * value
        elif not name.endswith("embed_tokens.weight"):
            value = value / weight.shape[1] ** 0.5
        weight.copy_(torch.from_numpy(value))
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        model = transformers.LlamaForCausalLM.from_pretrained(
            dense, quantization_config=quantization
        )
    model.save_pretrained(folder, max_shard_size="60KB")


def make_lora(folder: Path) -> None:
    """Run an adapter on the prequantized Llama, forward and backward."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder / "llama", attn_implementation="eager"
    )
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    rng = np.random.default_rng(SEED + 1)
    randomize(model, rng)
    tokens = torch.from_numpy(rng.integers(LLAMA["vocab_size"], size=(2, 11)))
    model.train()
    logits = model(tokens).logits
    loss = next_token_loss(logits, tokens)
    loss.backward()
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)

    adapter = peft.get_peft_model_state_dict(model)
    grads = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    arrays = {"tokens": tokens.int(), "logits": logits, "loss": loss}
    arrays |= {f"adapter/{key}": value.clone() for key, value in adapter.items()}
    arrays |= {f"grad/{key.replace('.default', '')}": value for key, value in grads.items()}
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    assert all(value.dtype in (np.float32, np.int32) for value in arrays.values())
    np.savez_compressed(folder / "lora.npz", allow_pickle=False, **arrays)
    text = json.dumps({**LORA, "versions": VERSIONS}, indent=1)
    (folder / "lora.json").write_text(text + "\n")

    dense = transformers.LlamaForCausalLM.from_pretrained(folder / "llama").dequantize()
    merged = peft.get_peft_model(dense, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    peft.set_peft_model_state_dict(merged, adapter)
    torch.testing.assert_close(merged.eval()(tokens).logits, logits, atol=1e-5, rtol=0)


def main() -> None:
    """Write every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "bitsandbytes_files"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    parser.add_argument("--plain", type=Path, help="write this one file alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plain:
        return make_plain(args.plain)
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)
    make_layers(args.folder)
    make_llama(args.folder / "llama")
    make_lora(args.folder)


if __name__ == "__main__":
    main()

"""Make golden data for LoRA on a tiny Llama, from `peft` and `transformers` themselves.

Made with Python 3.11 on a CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/make_peft_llama.py

(torch is the CPU build.) The output folder, tests/golden/peft_llama, holds

    base.json    the Llama's hyperparameters, versions
    base.npz     weights under Hugging Face names; tokens [B, T] int32; logits [B, T, V], no adapter
    CASE.json    the `LoraConfig` (the pattern tables keep their order: the first key that matches
                 wins), r and scaling of each module as peft has them, versions
    CASE.npz     logits [B, T, V]; loss [], the mean over B * (T - 1) next tokens, in nats;
                 adapter/KEY, KEY as in peft's adapter_model.safetensors: A [r, in], B [out, r];
                 grad/KEY, d loss / d adapter; merged/NAME.weight [out, in], W + scaling * B @ A

Every array but tokens is float32, every weight in PyTorch's [out, in] orientation.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

SEED = 20261120
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
}
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# alpha differs from r in every module of every case, so that a scaling left out cannot hide.
CASES = {
    "lora": {"target_modules": ALL_LINEARS, "r": 4, "lora_alpha": 10},
    "rslora": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "r": 6,
        "lora_alpha": 9,
        "use_rslora": True,
    },
    "patterns": {
        "target_modules": ALL_LINEARS,
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {
            "layers.0.self_attn.q_proj": 2,
            r"model\.layers\.1\.mlp\.(gate|up)_proj": 3,
            "k_proj|o_proj": 5,
            "proj": 7,  # matches nothing: a key begins at a dot of the path
            "q_proj": 8,  # layer 1 only: layer 0 was matched above
        },
        "alpha_pattern": {
            "v_proj": 7,
            "layers.1.self_attn.v_proj": 13,  # never reached, though more specific
            r"layers\.1\..*o_proj": 3,
            r"layers\.\d+\.mlp\.down_proj": 9,
            "layers.0.mlp.gate_proj": 11,
        },
    },
}
CONFIG_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
VERSIONS = {module.__name__: module.__version__ for module in (np, peft, torch, transformers)}


def make_llama() -> transformers.LlamaForCausalLM:
    """Make the tiny float32 Llama, all weights random: biases are not 0, norms are not 1."""
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="eager", dtype="float32")
    model = transformers.LlamaForCausalLM(config).eval()
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
    return model


def make_tokens() -> torch.Tensor:
    """Draw the tokens [B, T]."""
    rng = np.random.default_rng(SEED + 1)
    return torch.from_numpy(rng.integers(LLAMA["vocab_size"], size=(2, 11)))


def randomize(model: peft.PeftModel, rng: np.random.Generator) -> None:
    """Set A and B, both non-zero, such that scaling * B @ A is a visible fraction of W."""
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            size = weight.shape[1] ** -0.5 if ".lora_A." in name else 0.06
            weight.data.copy_(torch.from_numpy(size * rng.standard_normal(weight.shape)))


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Average the cross-entropy over B * (T - 1) next tokens."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def save(folder: Path, name: str, arrays: dict[str, torch.Tensor], about: dict) -> None:
    """Write NAME.npz and NAME.json."""
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **arrays)
    text = json.dumps({**about, "versions": VERSIONS}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")


def make_case(folder: Path, name: str, fields: dict, rng: np.random.Generator) -> None:
    """Wrap the Llama by `fields`, run it forward and backward, merge it, and save it all."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(make_llama(), config).eval()
    randomize(model, rng)
    tokens = make_tokens()
    logits = model(tokens).logits
    loss = next_token_loss(logits, tokens)
    loss.backward()

    adapter = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    grads = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    modules = {
        path: {"r": layer.r["default"], "scaling": layer.scaling["default"]}
        for path, layer in layers.items()
    }
    merged = model.merge_and_unload().state_dict()

    arrays = {"logits": logits, "loss": loss}
    arrays |= {f"adapter/{key}": value for key, value in adapter.items()}
    arrays |= {f"grad/{key.replace('.default', '')}": value for key, value in grads.items()}
    arrays |= {f"merged/{path}.weight": merged[f"{path}.weight"] for path in layers}
    about = {"target_modules": sorted(config.target_modules)}
    about |= {field: getattr(config, field) for field in CONFIG_FIELDS} | {"modules": modules}
    save(folder, name, arrays, about)


def main() -> None:
    """Write the base model and every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "peft_llama"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    # One thread and fixed algorithms: sums in one order, so that two runs agree to the byte.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    model, tokens = make_llama(), make_tokens()
    arrays = model.state_dict() | {"tokens": tokens.int(), "logits": model(tokens).logits}
    save(folder, "base", arrays, {"config": LLAMA})
    for seed, (name, fields) in enumerate(CASES.items(), start=SEED + 2):
        make_case(folder, name, fields, np.random.default_rng(seed))


if __name__ == "__main__":
    main()

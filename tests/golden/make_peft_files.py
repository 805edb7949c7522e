"""Make golden adapter files, by `peft` itself, on the tiny Llama of make_peft_llama.py and others.

Made with Python 3.11 on a CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/make_peft_files.py

(torch is the CPU build.) The output folder, tests/golden/peft_files, holds for each case

    CASE/       adapter_config.json and adapter_model.safetensors, as save_pretrained writes them
    CASE.npz    Llamas: logits [B, T, V]; loss [], the mean over B * (T - 1) next tokens, in nats;
                for cases in GRADIENTS also grad/KEY, d loss / d adapter, KEY as in the file.
                gpt2: base/NAME and merged/NAME, the weights before and after merging.
                conv, conv-dora: base/NAME, input/NAME and output/NAME of each layer

"tied" is the Llama whose lm_head is embed_tokens. Every array is float32, in PyTorch's layout.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_peft_llama import ALL_LINEARS, make_llama, make_tokens, next_token_loss

SEED = 20261124
LLAMAS = {
    "lora": {"target_modules": ALL_LINEARS, "r": 2, "lora_alpha": 5},
    "rslora-patterns": {
        "target_modules": ALL_LINEARS,
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 3, "k_proj|o_proj": 1},
        "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 9, "layers.1.self_attn.q_proj": 3},
    },
    "dora": {"target_modules": ALL_LINEARS, "r": 2, "lora_alpha": 5, "use_dora": True},
    "all-linear": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj"],
        "r": 2,
        "lora_alpha": 3,
    },
    "embeddings": {
        "target_modules": ["embed_tokens", "lm_head", "v_proj"],
        "r": 2,
        "lora_alpha": 3,
    },
    "embeddings-dora": {
        "target_modules": ["embed_tokens", "v_proj"],
        "r": 2,
        "lora_alpha": 3,
        "use_dora": True,
    },
    "lora-bias": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 2,
        "lora_alpha": 3,
        "lora_bias": True,
    },
    "bias-only": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 2,
        "lora_alpha": 3,
        "bias": "lora_only",
    },
    "bias-all": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3, "bias": "all"},
    "saved": {
        "target_modules": ["q_proj"],
        "r": 2,
        "lora_alpha": 3,
        "modules_to_save": ["lm_head", "model.norm", "input_layernorm", "embed_tokens"],
    },
    "tokens": {
        "target_modules": ["q_proj"],
        "r": 2,
        "lora_alpha": 3,
        "trainable_token_indices": [3, 17, 40],
    },
    "layers": {
        "target_modules": ["v_proj", "down_proj"],
        "r": 2,
        "lora_alpha": 3,
        "layers_to_transform": [1],
    },
    "bfloat16": {"target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 3},
    "tied": {
        "target_modules": ["embed_tokens", "lm_head"],
        "r": 2,
        "lora_alpha": 3,
        "ensure_weight_tying": True,
    },
    "tied-tokens": {
        "target_modules": ["q_proj"],
        "r": 2,
        "lora_alpha": 3,
        "trainable_token_indices": [3, 17, 40],
    },
}
GRADIENTS = ("rslora-patterns", "dora", "embeddings")


class Convolutions(torch.nn.Module):
    """One layer of each dimension, none square, each with its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Conv1d(3, 5, 3, padding=1)
        self.plane = torch.nn.Conv2d(3, 5, (3, 2), stride=2)
        self.space = torch.nn.Conv3d(3, 5, (2, 1, 3), stride=(1, 1, 2))

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Apply each layer to its input."""
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


INPUTS = {"line": (2, 3, 7), "plane": (2, 3, 7, 6), "space": (2, 3, 4, 3, 7)}


def randomize(model: torch.nn.Module, rng: np.random.Generator, trainable: bool = True) -> None:
    """Move what is trained, such that every tensor of it matters and none is an initial value."""
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad is trainable:
            noise = torch.from_numpy(rng.standard_normal(weight.shape)).float()
            factor = ".lora_" in name and "magnitude" not in name
            weight.data.copy_(0.3 * noise if factor else weight.data.float() * (1 + 0.2 * noise))


def tensors_of(model: peft.PeftModel) -> dict[str, str]:
    """Names of trained parameters -> keys in the file."""
    return {
        name: name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def save(folder: Path, name: str, model: peft.PeftModel, arrays: dict[str, torch.Tensor]) -> None:
    """Write CASE/ and CASE.npz."""
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(place) / file, target / file)
    arrays = {key: value.detach().float().numpy() for key, value in arrays.items()}
    np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **arrays)


def make_llama_case(folder: Path, name: str, fields: dict, rng: np.random.Generator) -> None:
    """Adapt the Llama, and run it forward and backward."""
    base = make_llama()
    if name.startswith("tied"):
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
        base._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    randomize(model, rng)
    if name == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16().float()
    tokens = make_tokens()
    logits = model(tokens).logits
    loss = next_token_loss(logits, tokens)
    arrays = {"logits": logits, "loss": loss}
    if name in GRADIENTS:
        loss.backward()
        weights = dict(model.named_parameters())
        arrays |= {f"grad/{key}": weights[at].grad for at, key in tensors_of(model).items()}
    if name == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    save(folder, name, model, arrays)


def make_gpt2(folder: Path, rng: np.random.Generator) -> None:
    """Adapt the Conv1D layers of a GPT-2, [in, out] in PyTorch, and merge them."""
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    base = transformers.GPT2LMHeadModel(config).eval()
    fields = {"target_modules": ["c_attn", "c_proj"], "r": 2, "lora_alpha": 3}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    randomize(model, rng)
    adapted = ("c_attn.weight", "c_proj.weight")
    before = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
        for key, value in model.state_dict().items()
        if key.replace(".base_layer", "").endswith(adapted)
    }
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        save(folder, "gpt2", model, {})
    after = model.merge_and_unload().state_dict()
    arrays = {f"base/{key}": value for key, value in before.items()}
    arrays |= {f"merged/{key}": after[key] for key in before}
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(folder / "gpt2.npz", allow_pickle=False, **arrays)


def make_convolutions(folder: Path, name: str, dora: bool, rng: np.random.Generator) -> None:
    """Adapt convolutions of one, two and three dimensions."""
    base = Convolutions().eval()
    randomize(base, rng)
    arrays = {f"base/{key}": value.clone() for key, value in base.state_dict().items()}
    config = peft.LoraConfig(target_modules=list(INPUTS), r=2, lora_alpha=3, use_dora=dora)
    model = peft.get_peft_model(base, config).eval()
    randomize(model, rng)
    inputs = {key: torch.from_numpy(rng.standard_normal(s)).float() for key, s in INPUTS.items()}
    arrays |= {f"input/{key}": value for key, value in inputs.items()}
    arrays |= {f"output/{key}": value for key, value in model(inputs).items()}
    save(folder, name, model, arrays)


def main() -> None:
    """Write every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "peft_files"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for seed, (name, fields) in enumerate(LLAMAS.items(), start=SEED):
        make_llama_case(folder, name, fields, np.random.default_rng(seed))
    make_gpt2(folder, np.random.default_rng(SEED + 100))
    make_convolutions(folder, "conv", False, np.random.default_rng(SEED + 101))
    make_convolutions(folder, "conv-dora", True, np.random.default_rng(SEED + 102))


if __name__ == "__main__":
    main()

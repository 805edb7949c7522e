"""Make golden folders of models, by `transformers` itself.

Made with Python 3.11 on a CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/make_huggingface.py

(torch is the CPU build.) The output folder, tests/golden/huggingface, holds, by save_pretrained,

    llama/       the Llama of make_peft_llama.py in shards; its logits are in peft_llama/base.npz
    tied/        the same in bfloat16, lm_head being embed_tokens, in one file
    gpt2/        a GPT-2, whose weights are [in, out], by its base model: without "transformer."
    vit/         a vision transformer, whose first layer is a convolution
    outputs.npz  tied [B, T, V] and gpt2 [B, T, V]: logits, computed in float32, of the tokens of
                 make_peft_llama.py and of tokens/gpt2 [B, T];
                 vit [B, N, D]: the sums of patch and position embeddings of pixels/vit [B, C, H, W]
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from make_peft_files import randomize
from make_peft_llama import make_llama, make_tokens

SEED = 20261125


def save(model: transformers.PreTrainedModel, folder: Path, **options: str) -> None:
    """Write a model anew."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **options)


def make_tied() -> transformers.LlamaForCausalLM:
    """Make the Llama whose projection is the look-up table, its weights rounded to bfloat16."""
    model = make_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    for weight in model.parameters():
        weight.data.copy_(weight.bfloat16().float())
    return model


def main() -> None:
    """Write every folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "huggingface"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)

    save(make_llama(), folder / "llama", max_shard_size="40KB")
    tied = make_tied()
    arrays = {"tied": tied(make_tokens()).logits}
    save(tied.bfloat16(), folder / "tied")  # this rounds the rotary frequencies, too

    config = transformers.GPT2Config(
        n_embd=12, n_layer=2, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    randomize(gpt2, rng)
    save(gpt2.transformer, folder / "gpt2")
    tokens = torch.from_numpy(rng.integers(16, size=(2, 7)))
    arrays |= {"tokens/gpt2": tokens, "gpt2": gpt2(tokens).logits}

    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        image_size=8, patch_size=4, num_channels=3, num_labels=5,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config).eval()
    randomize(vit, rng)
    save(vit, folder / "vit")
    pixels = torch.from_numpy(rng.standard_normal((2, 3, 8, 8))).float()
    arrays |= {"pixels/vit": pixels, "vit": vit.vit.embeddings(pixels)}
    arrays = {name: value.detach().numpy() for name, value in arrays.items()}
    np.savez_compressed(folder / "outputs.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()

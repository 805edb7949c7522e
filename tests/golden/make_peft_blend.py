"""Golden blends: PEFT's add_weighted_adapter on a Linear and an Embedding.

    pip install torch==2.13.0 peft==0.21.2 && python -P tests/golden/make_peft_blend.py

Three adapters of rank 4 with different alphas, random weights of either sign. For each combination
type the result's A, B and delta are written, and for dare the masks drawn.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

OUT = Path(__file__).parent / "peft_blend.npz"
ALPHAS, WEIGHTS, DENSITY, RANK = (8, 2, 5), (0.7, -0.4, 1.3), 0.6, 4
TYPES = ("cat", "svd", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


class Model(torch.nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.linear = torch.nn.Linear(6, 9, bias=False)

    def forward(self, ids):
        return self.linear(self.table(ids))


def factors(layer, name):
    """A and B of an adapter of a layer, as torch has them."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def main():
    torch.manual_seed(0)
    config = lambda alpha: LoraConfig(
        r=RANK, lora_alpha=alpha, target_modules=["table", "linear"], init_lora_weights=False
    )
    model = get_peft_model(Model(), config(ALPHAS[0]), adapter_name="0")
    for k in (1, 2):
        model.add_adapter(str(k), config(ALPHAS[k]))
    layers = {name: getattr(model.base_model.model, name) for name in ("table", "linear")}
    out = {}
    for name, layer in layers.items():
        for k in range(3):
            for factor in factors(layer, str(k)):  # LoRA's own embedding B would be all zeros
                torch.nn.init.normal_(factor)
            a, b = factors(layer, str(k))
            out |= {f"{name}/{k}/A": a, f"{name}/{k}/B": b}
    masks = []
    bernoulli = torch.bernoulli

    def record(*args, **kwargs):
        masks.append(bernoulli(*args, **kwargs))
        return masks[-1]

    for kind in TYPES:
        masks.clear()
        merge_utils.torch.bernoulli = record
        options = {} if kind in ("cat", "svd", "linear") else {"density": DENSITY}
        adapter = f"blend_{kind}"
        model.base_model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, adapter, kind, **options)
        merge_utils.torch.bernoulli = bernoulli
        for name, layer in layers.items():
            a, b = factors(layer, adapter)
            delta = layer.get_delta_weight(adapter)
            out |= {
                f"{name}/{kind}/{what}": v for what, v in (("A", a), ("B", b), ("delta", delta))
            }
        # in the order of the modules: three masks of A, three of B
        if masks:
            for j, name in enumerate(layers):
                own = masks[6 * j : 6 * j + 6]
                for what, three in (("A", own[:3]), ("B", own[3:])):
                    out[f"{name}/{kind}/mask_{what}"] = torch.stack(three)
    arrays = {name: value.detach().numpy().astype(np.float32) for name, value in out.items()}
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()

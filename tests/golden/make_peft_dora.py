"""Make golden data for DoRA, from `peft`, `transformers` and `bitsandbytes` themselves.

Made with Python 3.11 on a CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 bitsandbytes==0.50.2 transformers==5.23.0 peft==0.21.2 \
        safetensors==0.8.0 numpy==2.4.6
    python tests/golden/make_peft_dora.py

(torch is the CPU build.) The output folder, tests/golden/peft_dora, holds

    llama-CASE.json, .npz  as of make_peft_llama.py, on its base; the adapter also has
                           lora_magnitude_vector [out], gradients have peft's keys of the file
    layers.json            CASE -> options, r, alpha, scaling, and dropout's p where there is one;
                           "grouped" also says what peft's grouped convolution is; versions
    layers.npz             CASE/x, the layer's input; CASE/y, its output; CASE/probe: the loss is
                           (y * probe).sum(); CASE/weight and bias; CASE/A, B, magnitude, in peft's
                           shapes; CASE/grad.A, grad.B, grad.magnitude, and grad.x where x is real;
                           CASE/merged [out, ..], peft's merged weight; CASE/mask, what dropout
                           keeps; embed/head.KEY, the same of the head behind the table;
                           qdora/state.KEY, `Linear4bit.state_dict()`, in place of a weight

Every array is float32 (but indices and states), every weight in PyTorch's orientation. Magnitudes
lie above and below the norms, and one of each layer is negative. In "conv2d-dilated" one line of
peft is mended, its forward forgetting the dilation.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from make_peft_llama import (
    ALL_LINEARS,
    CONFIG_FIELDS,
    make_llama,
    make_tokens,
    next_token_loss,
    randomize,
)
from make_peft_llama import VERSIONS as LLAMA_VERSIONS
from torch import nn

SEED = 20261124
VERSIONS = LLAMA_VERSIONS | {"bitsandbytes": bnb.__version__}
LLAMAS = {
    "dora": {"target_modules": ALL_LINEARS, "r": 4, "lora_alpha": 10},
    "rslora": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, r"mlp\.down_proj": 6},
    },
}
LAYERS = {  # name: layer, its options, the input's shape
    "linear": (nn.Linear, {"in_features": 24, "out_features": 20}, (3, 5, 24)),
    "conv1d": (
        nn.Conv1d,
        {"in_channels": 6, "out_channels": 10, "kernel_size": 3, "stride": 2, "padding": 1},
        (2, 6, 11),
    ),
    "conv2d": (
        nn.Conv2d,
        {
            "in_channels": 5,
            "out_channels": 8,
            "kernel_size": (3, 2),
            "stride": (2, 1),
            "padding": (1, 0),
        },
        (2, 5, 9, 7),
    ),
    "conv2d-dilated": (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 7, "kernel_size": 3, "padding": 2, "dilation": (2, 3)},
        (2, 4, 9, 8),
    ),
    "grouped": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2},
        (2, 6, 5, 4),
    ),
    "qdora": (bnb.nn.Linear4bit, {"input_features": 64, "output_features": 24}, (3, 4, 64)),
}
DROPOUT = {"linear-dropout": "linear", "conv2d-dropout": "conv2d", "qdora-dropout": "qdora"}
KEEP = 0.75
CONFIG = {"r": 4, "lora_alpha": 6, "use_dora": True}


class Masked(nn.Module):
    """Dropout with a mask that is known."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale what is kept."""
        return x * self.mask / KEEP


class Table(nn.Module):
    """A table and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up, and read out."""
        return self.head(self.embed(tokens))


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Draw float32 numbers."""
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def set_magnitudes(model: nn.Module, rng: np.random.Generator) -> None:
    """Move magnitudes away from the norms they begin at, up and down, and one below zero."""
    for name, weight in sorted(model.named_parameters()):
        if "lora_magnitude_vector" in name:
            flat = weight.data.view(-1)
            change = torch.exp(0.4 * normal(rng, flat.numel()))
            assert (change > 1.1).any()
            assert (change < 0.9).any()
            flat *= change
            flat[rng.integers(flat.numel())] *= -1


def file_key(name: str) -> str:
    """The key of a parameter in peft's file."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def make_llama_case(folder: Path, name: str, fields: dict, rng: np.random.Generator) -> None:
    """Wrap the Llama by `fields`, run it forward and backward, merge it, and save it all."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **fields)
    model = peft.get_peft_model(make_llama(), config)
    start = {k: w.clone() for k, w in model.named_parameters() if "lora_magnitude_vector" in k}
    randomize(model, rng)
    for key, weight in model.named_parameters():
        if key in start:
            weight.data.copy_(start[key])
    set_magnitudes(model, rng)
    tokens = make_tokens()
    logits = model.eval()(tokens).logits
    loss = next_token_loss(logits, tokens)
    loss.backward()

    adapter = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    grads = {file_key(k): w.grad for k, w in model.named_parameters() if w.requires_grad}
    assert grads.keys() == adapter.keys()
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    modules = {
        path: {"r": layer.r["default"], "scaling": layer.scaling["default"]}
        for path, layer in layers.items()
    }
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, logits, atol=1e-5, rtol=0)

    arrays = {"logits": logits, "loss": loss}
    arrays |= {f"adapter/{key}": value for key, value in adapter.items()}
    arrays |= {f"grad/{key}": value for key, value in grads.items()}
    state = merged.state_dict()
    arrays |= {f"merged/{path}.weight": state[f"{path}.weight"] for path in layers}
    about = {"target_modules": sorted(config.target_modules)}
    about |= {field: getattr(config, field) for field in CONFIG_FIELDS} | {"modules": modules}
    write(folder / f"llama-{name}", arrays, about)


def layer_of(name: str, rng: np.random.Generator) -> nn.Module:
    """A frozen layer, its weight and bias random."""
    kind, options, _ = LAYERS[name]
    if name != "qdora":
        layer = kind(**options)
        layer.weight.data.copy_(normal(rng, *layer.weight.shape) / layer.weight[0].numel() ** 0.5)
    else:
        layer = kind(**options, compute_dtype=torch.float32, quant_type="nf4")
        weight = normal(rng, 24, 64) / 8
        kept = {"compress_statistics": True, "quant_type": "nf4"}
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kept)
        layer = layer.to("cpu")  # quantizes
    layer.bias.data.copy_(0.3 * normal(rng, *layer.bias.shape))
    return layer


def wrap(model: nn.Module, targets: list[str], rng: np.random.Generator) -> nn.Module:
    """Put DoRA on the targets, everything random; training, where the CPU keeps 4-bit codes."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **CONFIG))
    for name, weight in sorted(wrapped.named_parameters()):
        if weight.requires_grad and "magnitude" not in name:
            first = ".lora_A." in name
            size = weight[0].numel() ** -0.5 if first else 0.3
            weight.data.copy_(size * normal(rng, *weight.shape))
    set_magnitudes(wrapped, rng)
    return wrapped.train()


def factors(layer: nn.Module, of: str) -> dict[str, torch.Tensor | None]:
    """A, B and magnitude of a layer of peft, or their gradients."""
    if isinstance(layer, peft.tuners.lora.Embedding):
        pair = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    all_three = (*pair, layer.lora_magnitude_vector["default"].weight)
    named = zip(("A", "B", "magnitude"), all_three, strict=True)
    return {f"grad.{k}": w.grad for k, w in named} if of == "grad" else dict(named)


def backward(model: nn.Module, x: torch.Tensor, rng: np.random.Generator) -> dict:
    """Run forward and backward."""
    y = model(x)
    probe = normal(rng, *y.shape) / y.numel() ** 0.5  # a loss of size 1
    (y * probe).sum().backward()
    return {"x": x.detach(), "y": y, "probe": probe}


def make_layer(name: str, rng: np.random.Generator) -> tuple[dict, dict]:
    """One layer: forward, backward, merged."""
    source = DROPOUT.get(name, name)
    kind, options, shape = LAYERS[source]
    base = layer_of(source, rng)
    arrays = {"bias": base.bias.data.clone()}
    if source == "qdora":
        assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
        weight = peft.utils.integrations.dequantize_module_weight(base)
        arrays |= {f"state.{k}": v for k, v in base.state_dict().items() if k != "bias"}
        plain = nn.Linear(64, 24)
        plain.bias.data.copy_(arrays["bias"])
    else:
        weight, plain = base.weight.data.clone(), kind(**options)
        arrays["weight"] = weight
        plain.load_state_dict(base.state_dict())
    plain.weight.data.copy_(weight)
    model = wrap(nn.Sequential(base), ["0"], rng)
    layer = model.base_model.model[0]
    arrays |= {key: value.data.clone() for key, value in factors(layer, "data").items()}
    about = {key: CONFIG[key] for key in ("r", "lora_alpha")} | {
        "layer": kind.__name__,
        "options": options,
        "scaling": layer.scaling["default"],
    }
    if name == "conv2d-dilated":
        about["unmended"] = refused(lambda: model(normal(rng, *shape)))
        layer.lora_A["default"].dilation = base.dilation
    if name in DROPOUT:
        mask = torch.from_numpy(rng.random(shape) < KEEP).float()
        layer.lora_dropout["default"] = Masked(mask)
        arrays["mask"], about["p"] = mask, 1 - KEEP
    x = normal(rng, *shape).requires_grad_()
    arrays |= backward(model, x, rng) | factors(layer, "grad") | {"grad.x": x.grad}
    if name == "grouped":
        about["grouped"] = grouped(model, base, arrays, about["scaling"])
        return arrays, about

    if name in DROPOUT:
        return arrays, about

    dense = peft.get_peft_model(
        nn.Sequential(plain), peft.LoraConfig(target_modules=["0"], **CONFIG)
    )
    peft.set_peft_model_state_dict(dense, peft.get_peft_model_state_dict(model))
    merged = dense.merge_and_unload()
    arrays["merged"] = merged[0].weight
    torch.testing.assert_close(merged(x), arrays["y"], atol=1e-5, rtol=0)
    return arrays, about


def refused(call: Callable[[], object]) -> str:
    """What peft says of what it cannot do."""
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise AssertionError("peft has learned it: drop the mending")


def grouped(model: nn.Module, base: nn.Module, arrays: dict, scaling: float) -> dict:
    """What peft's grouped convolution is: checked, and in figures.

    A reads all in channels, so that the change is a kernel without groups, [out, in, ..]; the norm
    is of W + scaling * S, S the numbers of (B as [out / groups, r]) @ A poured into W's shape.
    """
    A, B, magnitude = (arrays[key] for key in ("A", "B", "magnitude"))
    groups, r = base.groups, A.shape[0]
    parts = zip(B.reshape(groups, -1, r // groups), A.reshape(groups, r // groups, -1), strict=True)
    change = scaling * torch.cat([b @ a for b, a in parts]).view(-1, *A.shape[1:])
    poured = (B.reshape(-1, r) @ A.reshape(r, -1)).view(base.weight.shape)
    norm = lambda kernel: kernel.flatten(1).norm(dim=1)
    used = norm(base.weight + scaling * poured)
    live = torch.zeros_like(change)
    block = base.weight.shape[1]
    rows = base.weight.shape[0] // groups
    inside = torch.zeros_like(change)
    for g in range(groups):
        at = slice(g * rows, (g + 1) * rows), slice(g * block, (g + 1) * block)
        live[at] = base.weight[at[0]]
        inside[at] = change[at]
    effective = live + change
    c = (magnitude.view(-1) / used).view(-1, 1, 1, 1)
    y = nn.functional.conv2d(arrays["x"], c * effective, base.bias, padding=base.padding)
    torch.testing.assert_close(y, arrays["y"], atol=1e-5, rtol=0)
    share = 1 - (norm(inside).square().sum() / norm(change).square().sum()).item()
    ratio = used / norm(effective)
    return {
        "A": list(A.shape),
        "B": list(B.shape),
        "kernel": list(base.weight.shape),
        "share_between_groups": share,  # of the squares of the change
        "norm_used_over_acting": [ratio.min().item(), ratio.max().item()],
        "merge": refused(model.merge_and_unload),
    }


def make_table(rng: np.random.Generator) -> tuple[dict, dict]:
    """A table and a head: forward, backward, merged."""
    model = Table()
    for weight in model.parameters():
        weight.data.copy_(0.5 * normal(rng, *weight.shape))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    model = wrap(model, ["embed", "head"], rng)
    embed, head = model.base_model.model.embed, model.base_model.model.head
    arrays = {"weight": start["embed.weight"]}
    arrays |= {"head.weight": start["head.weight"], "head.bias": start["head.bias"]}
    arrays |= {k: w.data.clone() for k, w in factors(embed, "data").items()}
    arrays |= {f"head.{k}": w.data.clone() for k, w in factors(head, "data").items()}
    arrays |= backward(model, torch.from_numpy(rng.integers(30, size=(3, 7))), rng)
    arrays |= factors(embed, "grad")
    arrays |= {f"head.{k}": w for k, w in factors(head, "grad").items()}
    about = {key: CONFIG[key] for key in ("r", "lora_alpha")}
    about["scaling"] = embed.scaling["default"]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(arrays["x"]), arrays["y"], atol=1e-5, rtol=0)
    arrays["x"] = arrays["x"].int()
    return arrays | {"merged": merged.embed.weight, "head.merged": merged.head.weight}, about


def write(path: Path, arrays: dict[str, torch.Tensor], about: dict) -> None:
    """Write PATH.npz and PATH.json."""
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(f"{path}.npz", allow_pickle=False, **arrays)
    Path(f"{path}.json").write_text(json.dumps({**about, "versions": VERSIONS}, indent=1) + "\n")


def main() -> None:
    """Write every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "peft_dora"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    # One thread and fixed algorithms: sums in one order, so that two runs agree to the byte.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    for seed, (name, fields) in enumerate(LLAMAS.items(), start=SEED):
        make_llama_case(folder, name, fields, np.random.default_rng(seed))
    arrays, about = {}, {}
    for seed, name in enumerate([*LAYERS, *DROPOUT, "embed"], start=SEED + 10):
        rng = np.random.default_rng(seed)
        made, said = make_table(rng) if name == "embed" else make_layer(name, rng)
        arrays |= {f"{name}/{key}": value for key, value in made.items()}
        about[name] = said
    write(folder / "layers", arrays, {"layers": about})


if __name__ == "__main__":
    main()

r"""Make golden data for initializers of the factors, from `peft` itself.

Made with Python 3.11 on a CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 attrs==26.1.0 \
        bitsandbytes==0.50.2 scipy==1.17.1
    python tests/golden/make_peft_initializers.py

(torch is the CPU build.) The output folder, tests/golden/peft_initializers, holds

    inputs.npz   W/NAME [out, in]; C/NAME [in, in], peft's covariance of its inputs, for CorDA;
                 G/NAME [out, in], peft's gradient of the loss, for LoRA-GA
    CASE.npz     A/NAME [r, in], B/NAME [out, r], base/NAME [out, in]: what peft has after init
    about.json   rank and scaling of each case, versions

NAME is "down" (in 64, out 24: whole blocks of 64 lie along a row) or "up" (in 24, out 40: blocks
straddle rows). Every array is float32, every weight in PyTorch's [out, in] orientation. The rank
is at most a quarter of each side, so that the gradient's decomposition in LoRA-GA is exact.

`peft.utils.loftq_utils.loftq_init` computes on "cuda" or "xpu" and nowhere else: the same source is
run here with "cpu" in place of "cuda".
"""

import argparse
import inspect
import json
from pathlib import Path

import bitsandbytes
import numpy as np
import peft
import torch
from peft.tuners.lora import layer
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import loftq_utils

SEED = 20261124
SIZES = {"down": (64, 24), "up": (24, 40)}
LEAST = {"r": 6, "lora_alpha": 9}  # a scaling of 1.5
UNIT = {"r": 4, "lora_alpha": 2, "use_rslora": True}  # a scaling of 1, alpha not the rank
LOFTQ = {"init_lora_weights": "loftq"}
CASES = {
    "pissa": LEAST | {"init_lora_weights": "pissa"},
    "pissa_niter_4": LEAST | {"init_lora_weights": "pissa_niter_4"},
    "olora": LEAST | {"init_lora_weights": "olora"},
    "corda_ipm": LEAST | {"init_lora_weights": "corda"},
    "corda_kpm": LEAST | {"init_lora_weights": "corda"},
    "lora_ga": LEAST | {"init_lora_weights": "lora_ga"},
    "loftq_1": UNIT | LOFTQ | {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "loftq_5": UNIT | LOFTQ | {"loftq_config": {"loftq_bits": 4, "loftq_iter": 5}},
    "loftq_5_scaled": LEAST | LOFTQ | {"loftq_config": {"loftq_bits": 4, "loftq_iter": 5}},
}
VERSIONS = {module.__name__: module.__version__ for module in (np, peft, torch, bitsandbytes)}


class Model(torch.nn.Module):
    """Two linears of unlike shapes."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(SEED)
        for name, (fan_in, fan_out) in SIZES.items():
            linear = torch.nn.Linear(fan_in, fan_out)
            linear.weight.data = torch.from_numpy(_normal(rng, fan_out, fan_in)) / fan_in**0.5
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.tanh(self.down(x)))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def make_inputs() -> torch.Tensor:
    """Draw inputs [N, 64] whose directions differ in size."""
    rng = np.random.default_rng(SEED + 1)
    return torch.from_numpy(_normal(rng, 256, 64) @ np.diag(np.linspace(2, 0.2, 64, dtype="f4")))


def prepare(name: str, model: Model, config: peft.LoraConfig) -> dict[str, torch.Tensor]:
    """What peft wants to have seen before init, and what it saw."""
    linears = {path: getattr(model, path) for path in SIZES}
    if name.startswith("corda"):
        config.corda_config = peft.tuners.lora.config.CordaConfig(
            corda_method=name.removeprefix("corda_"), prune_temporary_fields=False
        )
        preprocess_corda(model, config, run_model=lambda: model(make_inputs()))
        return {f"C/{path}": linear.covariance_matrix for path, linear in linears.items()}
    if name == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        peft.preprocess_loraga(
            model, config, lambda: model(make_inputs()).square().sum(1).mean().backward()
        )
        return {f"G/{path}": linear._peft_loraga_grad for path, linear in linears.items()}
    return {}


def save(path: Path, arrays: dict[str, torch.Tensor]) -> None:
    """Write arrays."""
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def on_cpu() -> None:
    """Let LoftQ compute on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    exec(source.replace('"cuda"', '"cpu"'), vars(loftq_utils))
    layer.loftq_init = loftq_utils.loftq_init


def main() -> None:
    """Write the inputs and every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "peft_initializers"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    # One thread and fixed algorithms: sums in one order, so that two runs agree to the byte.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    on_cpu()

    inputs = {f"W/{path}": getattr(Model(), path).weight for path in SIZES}
    cases = {}
    for name, fields in CASES.items():
        torch.manual_seed(SEED)
        model = Model()
        config = peft.LoraConfig(target_modules=list(SIZES), **fields)
        inputs |= {key: value.clone() for key, value in prepare(name, model, config).items()}
        made = peft.get_peft_model(model, config).base_model.model
        arrays = {}
        for path in SIZES:
            module = getattr(made, path)
            arrays[f"A/{path}"] = module.lora_A["default"].weight
            arrays[f"B/{path}"] = module.lora_B["default"].weight
            arrays[f"base/{path}"] = module.base_layer.weight
        save(folder / f"{name}.npz", arrays)
        cases[name] = {"rank": config.r, "scaling": made.down.scaling["default"]}
    save(folder / "inputs.npz", inputs)
    text = json.dumps({"cases": cases, "versions": VERSIONS}, indent=1)
    (folder / "about.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Check that `peft` computes with adapters saved here what this library computes with them.

Two steps, for JAX and PyTorch need not live in one environment. Where this library is installed:

    python tests/golden/check_peft_loads.py write FOLDER

and with Python 3.11 on a CPU, in a fresh virtual environment:

    pip install torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/check_peft_loads.py check FOLDER

The first writes, for each case, CASE/ by `lowrank.peft.save` and CASE.npz, the logits here; the
second loads each with `PeftModel.from_pretrained` onto the Llama of make_peft_llama.py, prints the
largest difference of the logits, and fails above 5e-5, or if peft finds a key missing or left over.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ATOL = 5e-5
ATTENTION = "**/self_attn/*/kernel"
CASES = {  # name: (scan, tied, fields of LoraConfig, initializer)
    "lora": (False, False, {"targets": "all-linear", "rank": 3, "alpha": 5}, None),
    "lora-stacked": (True, False, {"targets": "all-linear", "rank": 3, "alpha": 5}, None),
    "rslora-patterns": (
        False,
        False,
        {
            "targets": "all-linear",
            "rank": 3,
            "alpha": 5,
            "rslora": True,
            "rank_pattern": {"**/layers_0/**/q_proj/*": 2, "**/down_proj/*": 7},
            "alpha_pattern": {"**/layers_1/mlp/**": 1.7},
        },
        None,
    ),
    "dora": (True, False, {"targets": "all-linear", "rank": 3, "alpha": 5, "dora": True}, None),
    "dora-layers": (False, False, {"targets": ATTENTION, "rank": 3, "dora": True}, None),
    "embeddings": (
        True,
        False,
        {"targets": ["**/embedding", "**/lm_head/kernel"], "rank": 3},
        None,
    ),
    "tied": (True, True, {"targets": ["**/embedding", ATTENTION], "rank": 3, "alpha": 5}, None),
    "whole": (
        True,
        False,
        {
            "targets": ATTENTION,
            "rank": 3,
            "train": ["**/norm/scale", "**/*layernorm/scale", "**/lm_head/kernel", "**/embedding"],
        },
        None,
    ),
    "tied-whole": (True, True, {"targets": ATTENTION, "rank": 3, "train": "**/embedding"}, None),
    "biases": (
        True,
        False,
        {"targets": ATTENTION, "rank": 3, "train": "**/self_attn/*/bias"},
        None,
    ),
    "all-biases": (False, False, {"targets": ATTENTION, "rank": 3, "train": "**/bias"}, None),
    "bfloat16": (True, False, {"targets": "all-linear", "factor_dtype": "bfloat16"}, None),
    "pissa": (True, False, {"targets": "all-linear", "rank": 3, "alpha": 5}, "pissa"),
    "olora-dora": (False, False, {"targets": ATTENTION, "rank": 3, "dora": True}, "olora"),
}


def write(folder: Path) -> None:
    """Draw, save and run every case with this library."""
    sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1] / "examples")]
    import jax
    import jax.numpy as jnp
    import llama
    from peft_llama import flax_params, load

    import lowrank_jax as lowrank

    tensors = load("base")
    tokens = jnp.asarray(tensors["tokens"])
    jax.config.update("jax_default_matmul_precision", "highest")
    for seed, (name, (scan, tied, fields, initializer)) in enumerate(CASES.items()):
        params = jax.tree.map(jnp.asarray, flax_params(tensors, scan))
        if tied:
            del params["params"]["lm_head"]
        config = llama.LlamaConfig(
            vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48,
            tie_embeddings=tied, attention_bias=True, mlp_bias=True, scan_layers=scan,
        )  # fmt: skip
        apply = llama.Llama(config).apply
        plan = lowrank.plan(apply, params, tokens)
        config = lowrank.LoraConfig(**fields, extras={"task_type": "CAUSAL_LM"})
        make = initializer and getattr(lowrank.initializers, initializer)
        base, lora = lowrank.init(jax.random.key(seed), params, config, plan=plan, initializer=make)
        rng = np.random.default_rng(seed)
        move = lambda x, rng=rng: (x + 0.2 * rng.standard_normal(x.shape)).astype(x.dtype)
        lora = jax.tree.map(move, lora)
        original = params if initializer else None
        lowrank.peft.save(
            folder / name, lora, config,
            base=base, original=original, plan=plan, names=lowrank.names.LLAMA,
        )  # fmt: skip
        logits = lowrank.lift(apply)(lowrank.combine(base, lora), tokens)
        np.savez(folder / f"{name}.npz", logits=logits)


def check(folder: Path) -> bool:
    """Load every case with peft, and compare."""
    # peft asks whether there is such a package, and would find the folder beside this file
    sys.modules["bitsandbytes"] = None
    sys.path.insert(0, str(HERE))
    import peft
    import safetensors
    from make_peft_llama import make_llama, make_tokens

    right = True
    for name, (_, tied, _, _) in CASES.items():
        base = make_llama()
        if tied:
            base.config.tie_word_embeddings = True
            base.lm_head.weight = base.model.embed_tokens.weight
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(base, str(folder / name)).eval()
        expected = np.load(folder / f"{name}.npz")["logits"]
        logits = model(make_tokens()).logits.detach().numpy()
        with model.disable_adapter():
            moved = np.abs(model(make_tokens()).logits.detach().numpy() - logits).max()
        error = np.abs(logits - expected).max()
        keys = [str(w.message) for w in said if "missing" in str(w.message).lower()]
        theirs = peft.get_peft_model_state_dict(model)
        with safetensors.safe_open(folder / name / "adapter_model.safetensors", "np") as file:
            keys += sorted({*file.keys()} - {*theirs})
        right &= error <= ATOL and not keys
        print(f"{name}: largest difference {error:.2g}, of an effect of {moved:.2g}", *keys)
    return right


def main() -> None:
    """Do one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("write", "check"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "write":
        write(arguments.folder)
    elif not check(arguments.folder):
        sys.exit("peft does not compute with these files what was computed here")


if __name__ == "__main__":
    main()

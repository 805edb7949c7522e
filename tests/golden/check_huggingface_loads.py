"""Check that `transformers` computes with models saved here what this library computes with them.

Two steps, for JAX and PyTorch need not live in one environment. Where this library is installed:

    python tests/golden/check_huggingface_loads.py write FOLDER

and with Python 3.11 on a CPU, in a fresh virtual environment:

    pip install torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/check_huggingface_loads.py check FOLDER

The first writes, for each case, CASE/, a model with an adapter folded in, by `huggingface.save` or
`huggingface.merge`, and CASE.npz, the logits here of the adapted model; the second loads each with
`from_pretrained`, prints the largest difference of the logits, and fails above 5e-5, or if a tensor
is missing or left over.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MODELS = HERE / "huggingface"
ATOL = 5e-5
CASES = {  # name: (the model's folder, stacked layers, fields of LoraConfig, options of save)
    "lora": ("llama", False, {}, {}),
    "shards": ("llama", True, {}, {"max_shard": 20_000}),
    "dora": ("llama", True, {"dora": True}, {}),
    "tied": ("tied", True, {"targets": ["**/embedding", "**/kernel"]}, {}),
    "bfloat16": ("tied", True, {"dtype": "bfloat16"}, {}),
    "merged": ("llama", True, {"train": "**/norm/scale"}, None),  # by merge, of a checkpoint
}


def write(folder: Path) -> None:
    """Adapt, fold, save and run every case with this library."""
    sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1] / "examples")]
    import jax
    import jax.numpy as jnp
    from peft_llama import load, model, shapes

    import lowrank_jax as lowrank

    names = lowrank.names.LLAMA
    tokens = jnp.asarray(load("base")["tokens"])
    jax.config.update("jax_default_matmul_precision", "highest")
    for seed, (name, (origin, scan, fields, options)) in enumerate(CASES.items()):
        shutil.rmtree(folder / name, ignore_errors=True)
        tied, fields = origin == "tied", dict(fields)
        apply, dtype = model(scan, tied).apply, fields.pop("dtype", None)
        params = lowrank.huggingface.load(
            MODELS / origin, shapes(scan, tied), names=names, dtype=dtype
        )
        plan = lowrank.plan(apply, params, tokens)
        config = lowrank.LoraConfig(rank=3, alpha=5, **fields)
        base, lora = lowrank.init(jax.random.key(seed), params, config, plan=plan)
        rng = np.random.default_rng(seed)
        move = lambda x, rng=rng: (x + 0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
        lora = jax.tree.map(move, lora)
        merged = lowrank.merge(base, lora)
        if options is None:
            lowrank.checkpoint.save(folder / "run", lora=lora, config=config, base=base)
            lowrank.huggingface.merge(MODELS / origin, folder / "run", folder / name, names=names)
        else:
            lowrank.huggingface.save(
                folder / name, merged, names=names, like_folder=MODELS / origin, **options
            )
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), merged)
        before = apply(jax.tree.map(lambda x: x.astype(jnp.float32), params), tokens)
        np.savez(folder / f"{name}.npz", logits=apply(wide, tokens), before=before)


def check(folder: Path) -> bool:
    """Load every case with transformers, and compare."""
    sys.path.insert(0, str(HERE))
    import torch
    import transformers
    from make_peft_llama import make_tokens

    right = True
    for name in CASES:
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, output_loading_info=True, attn_implementation="eager"
        )
        kind = model.dtype
        # in float32 throughout, rotary frequencies too
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        )
        arrays = np.load(folder / f"{name}.npz")
        logits = model.eval()(make_tokens()).logits.detach().numpy()
        error = np.abs(logits - arrays["logits"]).max()
        moved = np.abs(arrays["before"] - arrays["logits"]).max()
        keys = [key for kind in ("missing_keys", "unexpected_keys") for key in said[kind]]
        right &= error <= ATOL and not keys
        print(f"{name}: largest difference {error:.2g}, of an effect of {moved:.2g}; {kind}", *keys)
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
        sys.exit("transformers does not compute with these files what was computed here")


if __name__ == "__main__":
    main()

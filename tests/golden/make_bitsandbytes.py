"""Make golden data for 4-bit blockwise quantization, from `bitsandbytes` itself.

Made with Python 3.11 on an x86-64 CPU, in a fresh virtual environment, by

    pip install torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
    python tests/golden/make_bitsandbytes.py

(torch is the CPU build.) The output folder, tests/golden/bitsandbytes, holds

    inputs.npz  NAME [...] float32, or uint16 where its bits are a bfloat16's:
                normal [96, 64]; bfloat16 [64, 65]; ragged [5, 30]; odd [3, 7]; zeros [5, 64] with
                blocks of zeros among others; short [70], zero from 64 on; extreme [8, 64], a
                magnitude a row; scales [128, 192], for double quantization; nf4_ties and fp4_ties
                [4, 128], blocks (by 64) of which hold every midpoint * absmax and its neighbors
    nf4.npz, fp4.npz
                NAME/BLOCK/packed uint8 [(n + 1) // 2]; NAME/BLOCK/absmax float32 [blocks];
                NAME/BLOCK/decoded, sha256 of the float32 bytes, code * absmax (the default kernel);
                NAME/BLOCK/values, those float32s themselves, where n <= 512
    scales.npz  CASE/absmax float32 [n]; CASE/offset []; CASE/nested_absmax; for KERNEL cpu (what
                runs on a CPU: rounds by a table of 65536) and exact (bitsandbytes' default kernel,
                the midpoints of CUDA): CASE/KERNEL/codes uint8 [n], CASE/KERNEL/absmax float32 [n]
                decoded
    state.npz   CASE/KEY, the entries of `Linear4bit.state_dict()` with prefix "layer.", CASE one of
                {nf4,fp4}-{single,double}; CASE/input names the weight in inputs.npz
    about.json  versions, the vector instructions torch found

The AVX512 kernel of dequantize_4bit takes the wrong absmax where a block spans rows (the last axis
is even and no multiple of the block), so what is decoded here is the default kernel's; this script
checks that both agree elsewhere.

nested_quant_map depends on the machine: torch.linspace with fused multiply-add (AVX2 and later)
and without differ by an ulp in 42 entries of the map. This is the fused one.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

SEED = 20261124
FORMATS = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 4096)
VERSIONS = {module.__name__: module.__version__ for module in (np, torch, bnb)}


def ties(format: str, rng: np.random.Generator) -> np.ndarray:
    """Make blocks that hold absmax, and +-2 ulps around every midpoint * absmax."""
    table = np.sort(get_4bit_type(format, "cpu").numpy())
    middles = (table[:-1] + table[1:]) / np.float32(2)
    blocks = []
    for absmax in (np.float32(1), *rng.uniform(0.01, 3, 7).astype(np.float32)):
        at = (middles * absmax).astype(np.float32).view(np.int32)
        near = np.concatenate([at + ulps for ulps in (-2, -1, 0, 1)]).astype(np.int32)
        values = near.view(np.float32)
        # FP4's midpoint of its two zeros is 0, whose neighbors are no numbers of interest
        values[~(np.abs(values) > 1e-6)] = 0
        blocks.append(np.append(np.resize(values, 63), absmax))
    return np.stack(blocks).astype(np.float32).reshape(4, 128)


def make_inputs() -> dict[str, np.ndarray]:
    """Draw the weights."""
    rng = np.random.default_rng(SEED)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    zeros = normal(5, 64)
    zeros[[1, 4]] = 0
    short = normal(70)
    short[64:] = 0
    sizes = np.array([1e-33, 1e-20, 1e-6, 1, 1e6, 1e20, 1e37, 2e37], np.float32)
    bits = torch.from_numpy(normal(64, 65) * np.float32(0.02)).bfloat16().view(torch.uint16)
    return {
        "normal": normal(96, 64) * np.float32(0.05),
        "bfloat16": bits.numpy(),
        "ragged": normal(5, 30),
        "odd": normal(3, 7),
        "zeros": zeros,
        "short": short,
        "extreme": normal(8, 64) * sizes[:, None],
        "scales": normal(128, 192) * np.float32(0.02),
        "nf4_ties": ties("nf4", rng),
        "fp4_ties": ties("fp4", rng),
    }


def tensor(array: np.ndarray) -> torch.Tensor:
    """Read an input as bitsandbytes gets it."""
    array = torch.from_numpy(array)
    return array.view(torch.bfloat16) if array.dtype == torch.uint16 else array


def run(kernel: str, name: str, *args: object) -> Any:
    """Call an operation of bitsandbytes: what a CPU runs, or the default kernel, in torch."""
    operation = getattr(torch.ops.bitsandbytes, name).default
    if kernel == "cpu":
        return operation(*args)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return operation.redispatch(keys, *args)


def make_codes(format: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantize every input by every block size."""
    arrays = {}
    for name, array in inputs.items():
        for block in BLOCKS:
            if name == "scales" and block != 64:
                continue
            weight = tensor(array)
            packed, state = quantize_4bit(weight, blocksize=block, quant_type=format)
            # float32, not the weight's own dtype: the cast is no part of the codec
            args = packed, state.absmax, block, format, state.shape, torch.float32
            values = run("exact", "dequantize_4bit", *args).numpy()
            if weight.shape[-1] % block == 0:
                assert np.array_equal(values, run("cpu", "dequantize_4bit", *args).numpy())
            digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
            key = f"{name}/{block}"
            arrays[f"{key}/packed"] = packed.numpy().reshape(-1)
            arrays[f"{key}/absmax"] = state.absmax.numpy()
            arrays[f"{key}/decoded"] = np.array(digest)
            if values.size <= 512:
                arrays[f"{key}/values"] = values
    return arrays


def make_scales(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantize scales twice over, by both kernels, as `quantize_4bit` does."""
    arrays = {}
    for name, block in (("scales", 64), ("scales", 32), ("normal", 32), ("ragged", 64)):
        _, plain = quantize_4bit(tensor(inputs[name]), blocksize=block, quant_type="nf4")
        _, state = quantize_4bit(
            tensor(inputs[name]), blocksize=block, quant_type="nf4", compress_statistics=True
        )
        case, difference = f"{name}/{block}", plain.absmax - state.offset
        arrays[f"{case}/absmax"] = plain.absmax
        arrays[f"{case}/offset"] = state.offset
        arrays[f"{case}/nested_absmax"] = state.state2.absmax
        for kernel in ("cpu", "exact"):
            codes, nested = run(kernel, "quantize_blockwise", difference, state.state2.code, 256)
            assert torch.equal(nested, state.state2.absmax)
            decoded = run(
                kernel, "dequantize_blockwise", codes, nested, state.state2.code, 256, torch.float32
            )
            arrays[f"{case}/{kernel}/codes"] = codes
            arrays[f"{case}/{kernel}/absmax"] = decoded + state.offset
        assert torch.equal(arrays[f"{case}/cpu/codes"], state.absmax)
    return {key: value.numpy() for key, value in arrays.items()}


def make_states(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Save layers as transformers does: what `Linear4bit.state_dict()` holds."""
    arrays = {}
    for format in FORMATS:
        for double, name in ((False, "ragged"), (True, "normal")):
            weight = tensor(inputs[name])
            layer = bnb.nn.Linear4bit(
                *reversed(weight.shape), bias=False, quant_type=format, compress_statistics=double
            )
            layer.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type=format, compress_statistics=double
            )
            layer = layer.to("cpu")  # this quantizes
            case = f"{format}-{'double' if double else 'single'}"
            arrays[f"{case}/input"] = np.array(name)
            for key, value in torch.nn.ModuleDict({"layer": layer}).state_dict().items():
                arrays[f"{case}/{key}"] = value.numpy()
    return arrays


def main() -> None:
    """Write every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "bitsandbytes"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    inputs = make_inputs()
    files = {"inputs": inputs, "scales": make_scales(inputs), "state": make_states(inputs)}
    files |= {format: make_codes(format, inputs) for format in FORMATS}
    for name, arrays in files.items():
        np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **arrays)
    about = {"versions": VERSIONS, "cpu": torch.backends.cpu.get_cpu_capability()}
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

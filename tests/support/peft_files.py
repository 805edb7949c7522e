"""Adapter folders that PEFT wrote (tests/golden/peft_files): reading, changing, comparing them."""

import functools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import flax_params, model
from peft_llama import load as llama_golden

import lowrank_jax as lowrank
from lowrank_jax._files.safetensors import TensorFile, write_tensors
from lowrank_jax._jax.paths import flatten
from lowrank_jax._nodes import is_node

FILES = Path(__file__).parents[1] / "golden" / "peft_files"
LLAMA = lowrank.names.LLAMA
LLAMAS = sorted(
    path.stem for path in FILES.glob("*.npz") if path.stem.partition("-")[0] not in ("gpt2", "conv")
)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
save, load = lowrank.peft.save, lowrank.peft.load


def golden(name):
    with np.load(FILES / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def tensors_of(directory):
    with TensorFile(directory / TENSORS) as file:
        return {name: file.read(name) for name in file.entries}


def config_of(directory):
    return json.loads((directory / CONFIG).read_text())


BASE = llama_golden("base")
TOKENS = BASE["tokens"]


@functools.cache
def untied(scan):
    return jax.device_put(flax_params(BASE, scan))


def params_of(scan, tied=False):
    params = jax.tree.map(lambda x: x, untied(scan))
    if tied:
        del params["params"]["lm_head"]
    return params


@functools.cache
def plan_of(scan, tied=False):
    return lowrank.plan(model(scan, tied).apply, params_of(scan, tied), TOKENS)


def nodes_of(tree):
    return dict(flatten(tree, is_leaf=is_node)[0])


def assert_same(got, want):
    """Node for node, static fields too, bit for bit."""
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal_dtypes(got, want)


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert (got[key].dtype, got[key].shape) == (array.dtype, array.shape), key
        assert got[key].tobytes() == array.tobytes(), key


def rewritten(directory, tensors=None, **fields):
    """The golden of plain LoRA, changed."""
    directory.mkdir(exist_ok=True)
    written = tensors_of(FILES / "lora")
    with (directory / TENSORS).open("wb") as file:
        write_tensors(file, tensors(written) if tensors else written)
    config = {k: v for k, v in {**config_of(FILES / "lora"), **fields}.items() if v is not ...}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


def refusal(directory, scan=False):
    with pytest.raises(lowrank.CheckpointError) as error:
        load(directory, params_of(scan), plan=plan_of(scan), names=LLAMA)
    return " ".join(str(error.value).split())


def peft_pattern(patterns, module, default):
    """peft.utils.get_pattern_key, as written there."""
    for key in patterns:
        if re.match(rf"(.*\.)?({key})$", module):
            return patterns[key]
    return default


def drawn(rng, *shape, dtype="float32"):
    return jax.device_put(rng.standard_normal(shape).astype(jnp.dtype(dtype)))


def ones(*shape):
    return np.ones(shape, np.float32)

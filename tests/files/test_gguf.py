"""GGUF files: read into a tree, or refused."""

import chex
import jax
import jax.numpy as jnp
import pytest
import smollm2
from gguf_llama import write_gguf

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_a_gguf_file(tmp_path, tied, bias, scan):
    """The same tree as the example's own reader makes, whose rope is checked by llama.cpp's."""
    gguf_model = tmp_path / "model.gguf"
    write_gguf(gguf_model, tied=tied, bias=bias)
    wanted = smollm2.load(gguf_model, scan_layers=scan).variables
    like = jax.eval_shape(lambda: wanted)
    found = lowrank.huggingface.load(gguf_model, like, names=lowrank.names.LLAMA)
    chex.assert_trees_all_equal(found, wanted)


def test_gguf_files_that_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    like = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    path.write_bytes(b"GGUF" + bytes(range(60)))
    with pytest.raises(lowrank.CheckpointError, match="is not a GGUF file, or is damaged"):
        lowrank.huggingface.load(path, like)
    write_gguf(path, architecture="gemma")
    with pytest.raises(lowrank.CheckpointError, match="is a model of 'gemma'.*'llama', 'qwen2'"):
        lowrank.huggingface.load(path, like)
    write_gguf(path)
    with pytest.raises(lowrank.CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        lowrank.huggingface.load(path, like, names=lowrank.names.LLAMA)

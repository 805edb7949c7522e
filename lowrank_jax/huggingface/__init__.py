"""Models as Hugging Face keeps them, both ways: a folder of safetensors files <-> a tree.

Source: transformers 5.23 and safetensors 0.8. Nothing is unpickled, and neither is needed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import checkpoint, peft
from lowrank_jax._checks.arguments import checked, floating_dtype
from lowrank_jax._errors import CheckpointError, TreeError
from lowrank_jax._files.gguf import SUFFIX, GgufTensors
from lowrank_jax._files.safetensors import Tensors, open_folder
from lowrank_jax._jax.paths import flatten, in_structure
from lowrank_jax._nodes import is_node, unnormed
from lowrank_jax._nodes.quantized import Axes
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._trees.quantize import axes_of_blocks, refuse_bad, targets_of
from lowrank_jax.bitsandbytes._tensors import StateTensors
from lowrank_jax.huggingface._folder import (
    beside,
    is_prequantized,
    read_config,
    refuse_quantized,
    ties,
    write_model,
)
from lowrank_jax.huggingface._leaves import Lying
from lowrank_jax.huggingface._matching import is_floating, matched
from lowrank_jax.huggingface._merging import flat, merged
from lowrank_jax.huggingface._prequantized import in_four_bits
from lowrank_jax.huggingface._reading import read_leaf, read_quantized
from lowrank_jax.huggingface._writing import in_shards, outgoing
from lowrank_jax.names import Names


@checked(CheckpointError, dtype=floating_dtype)
def load(
    folder: str | os.PathLike,
    like: Any,
    *,
    names: Names = None,
    quant: QuantConfig | None = None,
    plan: Plan | None = None,
    dtype: Any = None,
    ignore: str | Sequence[str] = (),
) -> Any:
    """Read a model's folder into a tree of parameters, quantized as it is read if so wished.

    kernel = weight.T, [in, out]; kernels of more axes are reshaped, those of convolutions OIHW ->
    HWIO; layers that a leaf stacks are stacked; all else is as it is. Where config.json ties the
    two, a projection that the folder has no tensor for is its look-up table. All is checked before
    a tensor is read; then one tensor is read at a time, and with quant encoded on the host, so that
    the peak of memory is the quantized model and that one tensor.

    Args:
      folder: with model.safetensors, or shards and their index; or a GGUF file of a Llama or Qwen2,
        whose tensors are decoded to float32 and named as Hugging Face names them (names.LLAMA).
      like: the tree, of arrays or of jax.ShapeDtypeStruct, as jax.eval_shape of a model's init
        gives it: structure, shapes, dtypes, and shardings where it has them.
      names: leaf -> module, as of lowrank.names.parameter: LLAMA or another table, say.
      quant: the leaves to quantize, and how. The result is that of lowrank.quantize. The weights
        that a folder of bitsandbytes holds in 4 bits come as Quantized leaves with or without it,
        their codes and scales the file's own, in quant's packing.
      plan: of the function that uses the parameters; quant with "all-linear" needs it, and so do
        leaves that are multiplied with from their other side (weights [out, in]).
      dtype: of the floating leaves, in place of like's.
      ignore: a glob, or several, of names of tensors that may be left over, "vision_tower.*" say.
        Buffers, as masks and rotary frequencies are, always may.

    Returns:
      The tree with jax.Arrays, and Quantized leaves. A leaf that is not floating and has a value,
      of which the folder knows nothing, stays as it is.

    Raises:
      CheckpointError: tensors are missing, unexpected, or misshapen: all of them are listed, with
        the leaves' paths. A file is damaged, or the model quantized by another method than
        bitsandbytes' in 4 bits, or otherwise than quant says.
      PatternError, AxesError, TreeError: as of quantize.

    Source: transformers 5.23, modeling_utils.py and quantizer_bnb_4bit.py; safetensors.

    >>> import tempfile
    >>> params = {"embed": {"embedding": jnp.ones((5, 4))}, "head": {"kernel": jnp.ones((4, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params)
    ...     again = load(folder, jax.eval_shape(lambda: params))
    >>> again["head"]["kernel"].shape
    (4, 3)
    """
    folder = Path(folder)
    leaves = _leaves(like, dtype)
    with _opened(folder) as (tensors, tied):
        ignored = (ignore,) if isinstance(ignore, str) else ignore
        found = matched(tensors, leaves, names, plan, ignored, tied)
        found.refuse(folder, names)
        blocks = {} if quant is None else _blocks(leaves, found.leaves, quant, plan)
        coded = in_four_bits(found.leaves, tensors, quant, blocks, folder)
        given, bad = dict(flatten(like)[0]), {}
        out = dict(given)
        for path, lying in found.leaves.items():
            dtype, sharding = leaves[path].dtype, _sharding(given[path])
            if path in coded:
                out[path] = coded[path](dtype, sharding)
            elif quant is not None and path in blocks:
                args = dtype, blocks[path], quant, sharding
                out[path], bad[path] = read_quantized(tensors, lying, *args)
            else:
                out[path] = read_leaf(tensors, lying, dtype, sharding)
    refuse_bad(bad, leaves)
    return in_structure(like, out)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Tensors, bool]]:
    """The tensors of a folder or a GGUF file, and whether a projection may be its look-up table."""
    if folder.suffix == SUFFIX and not folder.is_dir():
        if not folder.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{folder} does not exist, or is no regular file")
        tensors = GgufTensors(folder)
        yield tensors, tensors.ties
        return
    config = read_config(folder)
    prequantized = is_prequantized(folder, config)
    with open_folder(folder) as tensors:
        yield StateTensors(tensors, folder) if prequantized else tensors, ties(config)


@checked(CheckpointError)
def save(
    folder: str | os.PathLike,
    params: Any,
    *,
    names: Names = None,
    plan: Plan | None = None,
    like_folder: str | os.PathLike | None = None,
    max_shard: int = 5 * 10**9,
    dequantize: bool = False,
) -> None:
    """Write a tree of parameters as a folder that transformers loads; `load` brings the same back.

    Names and orientation are torch's, dtypes the leaves' own. What fails leaves the old model; what
    is killed the old one, the new one, or a folder that nothing loads. A lock, which dies with its
    process, keeps a second writer out.

    Args:
      folder: made where missing; the model in it is replaced.
      params: dense leaves; of an adapted model, what lowrank.merge returns.
      names: leaf -> module, as of lowrank.names.parameter: LLAMA or another table, say.
      plan: of the function that uses params; tells the axes of kernels of more than two, where
        like_folder does not.
      like_folder: the folder that the model came from. Shapes must be its own, and each of its
        tensors must have a leaf; configuration, tokenizer and the like are copied from it, the
        dtype in config.json set to that of the leaves. A link among them must lead to a file within
        like_folder, or, in the cache of huggingface_hub, to the blobs of the same repository.
        Without like_folder there are tensors alone.
      max_shard: bytes of tensors in one file; above, there are several and an index.
      dequantize: write quantized leaves as the dense weights that they stand for.

    Raises:
      CheckpointError: leaves are adapted, quantized, without a name or of a dtype that the files
        have not; or they do not fit like_folder. All of them are listed, and nothing is written.
        A file beside the tensors of like_folder is a link out of it, another process is saving
        there, or the file system refused.

    Source: transformers 5.23, modeling_utils.py; safetensors.

    >>> import tempfile
    >>> params = {"head": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.zeros(3)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params)
    ...     with open_folder(Path(folder)) as tensors:
    ...         {name: (tensors.entry(name).shape, tensors.entry(name).dtype) for name in tensors}
    {'head.bias': ((3,), dtype('float32')), 'head.weight': ((3, 4), dtype(bfloat16))}
    """
    if jax.process_count() > 1:
        raise CheckpointError("save works in a program of one process; this one has several")
    if max_shard < 1:
        raise CheckpointError(f"max_shard is {max_shard} bytes: pass 1 or more")
    leaves = {path: unnormed(leaf) for path, leaf in flatten(params, is_leaf=is_node)[0]}
    if not leaves:
        raise CheckpointError("params has no leaves: pass the tree of the model's parameters")
    origin = None if like_folder is None else Path(like_folder)
    if origin is not None and is_prequantized(origin, read_config(origin)):
        raise CheckpointError(
            f"like_folder is {origin}, whose weights are in 4 bits, and what is written is dense: "
            "name the folder of the dense model, or none"
        )
    with contextlib.nullcontext() if origin is None else open_folder(origin) as original:
        tensors = outgoing(leaves, names, plan, original, dequantize)
    kinds = {
        tensor.dtype for tensor in tensors.values() if jnp.issubdtype(tensor.dtype, jnp.floating)
    }
    dtype = kinds.pop().name if len(kinds) == 1 else None
    write_model(
        Path(folder), in_shards(tensors, max_shard), beside(origin, dtype) if origin else {}
    )


def _leaves(like: Any, dtype: Any) -> dict[str, Any]:
    """Path -> leaf of like, the floating ones without values and of the dtype wished for."""
    leaves = {}
    for path, leaf in flatten(like, is_leaf=is_node)[0]:
        if is_node(leaf) or not hasattr(leaf, "dtype"):
            raise TreeError(
                f"like holds {type(leaf).__name__} at {path!r}: give the dense tree, of arrays or "
                "of jax.ShapeDtypeStruct (jax.eval_shape of the model's init)"
            )
        if is_floating(leaf):
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype)
        leaves[path] = leaf
    return leaves


def _sharding(leaf: Any) -> Any:
    """Where a leaf of like is to lie, if it says so."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _blocks(
    leaves: dict[str, Any], found: dict[str, Lying], quant: QuantConfig, plan: Plan | None
) -> dict[str, tuple[Axes, Axes]]:
    """Path -> the axes that blocks run along and the stack axes, of the leaves to quantize."""
    blocks = {}
    for path in targets_of(leaves, quant, plan):
        layout = found[path].layout
        if plan is None and layout.kind == "dot":
            blocks[path] = layout.fan_in, layout.stack  # known from the folder and names
        else:
            blocks[path] = axes_of_blocks(path, leaves[path], plan)
    return blocks


@checked(CheckpointError)
def merge(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    names: Names = None,
) -> list[str]:
    r"""Fold an adapter into a model's folder, tensor by tensor, without the model's code.

    $W' = W + s\,B A$ in float32, cast once; with DoRA, patterns of ranks and alphas, modules saved
    whole, trained biases, rows of tables and weights that two modules share, as peft.load has them.
    Beside the adapter there is one tensor in memory at a time; the files are those of base, in
    name, order and dtype. That base is the model that the adapter was trained on is not checked:
    no file of PEFT's says.

    Args:
      base: the model's folder; its tensors may be links, and files beside them must not lead out
        of it, as like_folder of save says.
      adapter: a folder that PEFT or peft.save wrote, or one of checkpoint.save.
      folder: where the merged model comes; made where missing, the model in it is replaced.
      names: leaf -> module, for a checkpoint, as of peft.save.

    Returns:
      The names of the tensors that changed.

    Raises:
      CheckpointError: the adapter does not fit the model, or cannot be merged; all that is wrong is
        listed, and nothing is written.

    Source: LoRA, arXiv 2106.09685, section 4.1; peft 0.21.2, tuners/lora/layer.py.

    >>> import tempfile
    >>> import lowrank_jax as lowrank
    >>> params = {"head": {"kernel": jnp.ones((4, 3))}}
    >>> lora = {"head": {"kernel": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)}}
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/base", params)
    ...     lowrank.peft.save(f"{root}/adapter", lora, lowrank.LoraConfig())
    ...     merge(f"{root}/base", f"{root}/adapter", f"{root}/merged")
    ...     load(f"{root}/merged", params)["head"]["kernel"][0].tolist()
    ['head.weight']
    [2.0, 2.0, 2.0]
    """
    base, adapter, folder = Path(base), Path(adapter), Path(folder)
    if folder.resolve() in (base.resolve(), adapter.resolve()):
        raise CheckpointError(f"{folder} is one of the folders to read: name another to write to")
    if names is not None and not checkpoint.exists(adapter):
        raise CheckpointError(
            f"names is for a checkpoint's leaves: {adapter} is none, and PEFT's modules have names"
        )
    if checkpoint.exists(adapter):
        with tempfile.TemporaryDirectory() as place:
            saved = checkpoint.restore(adapter)
            peft.save(place, saved.lora, saved.config, names=names)
            return merge(base, place, folder)
    config = read_config(base)
    refuse_quantized(base, config)
    with open_folder(base) as tensors:
        found = flat(tensors, adapter, ties(config))
        _, nodes, _ = peft.load(adapter, found.leaves, plan=Plan(found.uses), names=found.names)
        nodes = {key: node for key, node in nodes.items() if node is not None}
        write_model(folder, merged(tensors, nodes, found), beside(base))
    return sorted(nodes)

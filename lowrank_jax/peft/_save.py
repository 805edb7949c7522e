"""Write an adapter in PEFT's format, as files or arrays, and fold what servers do not support."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError, TreeError
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._jax.processes import write_on_first_process
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import UNADAPTED, collect_adapters, find_adapters, is_node
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.names import Names
from lowrank_jax.peft._folder import write_folder
from lowrank_jax.peft._serving import describe_unservable, fold_into
from lowrank_jax.peft._writing import convert_adapter, keep_on_device


@check_arguments(CheckpointError)
def save(
    directory: str | os.PathLike,
    lora: PyTree,
    config: LoraConfig,
    *,
    base: PyTree = None,
    original: PyTree = None,
    plan: Plan | None = None,
    names: Names = None,
    for_serving: bool = False,
) -> None:
    r"""Save an adapter in `peft`'s format, for `PeftModel.from_pretrained` to load.

    The factors are A = a.T and B = b.T, with $\alpha$ such that the scale is the node's. Leaves of
    config.train become modules_to_save, or trained biases (bias="lora_only" or "all"); leaves of
    config.train_rows become trainable_token_indices. A tied table, one leaf in params, becomes two
    modules with the same factors. PEFT computes the same function with them, but merging in PEFT
    adds the change to the shared weight twice.

    Both files are replaced atomically: they are written under temporary names, flushed and renamed.
    An error leaves the old adapter. If the process is killed, the directory has the old adapter,
    the new one, or one without configuration, which nothing loads. A file lock, released when its
    process ends, excludes a second writer. With several processes, all of them call save, and
    process 0 writes.

    Args:
      directory: created if missing; other files in it are not changed.
      lora: the adapter: LowRank and Full nodes, with None elsewhere.
      config: its LoraConfig. `rslora` and `extras` are written; all else comes from the nodes.
      base: the frozen tree. Required with original, with trained rows, and if one leaf of a module
        is trained whole and another is not (a norm's scale and bias), since PEFT saves whole
        modules.
      original: the parameters before init. Required if the initializer changed the base (PiSSA,
        OLoRA, ...): the file then holds base + s a b - original, which has twice the rank, for use
        on the original weights, up to the rounding of base's dtype. With original=base the file is
        for the base itself, which must be saved as well.
      plan: the plan of the function that uses params; finds tied tables, and the axes of leaves
        trained whole.
      names: leaf -> module, as for lowrank.names.parameter; for instance the table LLAMA.
      for_serving: write what servers such as vLLM read. They take one rank and one scale for all
        modules and silently ignore patterns, so ranks are padded with zeros, and scales folded into
        B. DoRA, modules saved whole and biases raise an error; `servable` folds them into the base.

    Raises:
      CheckpointError: PEFT's format cannot represent a leaf, the initializer changed the base and
        original is not given, or base and original differ by more than the adapter's rank (all such
        leaves are listed, and nothing is written); another process is saving to the directory, or
        writing failed.
      TreeError: base does not fit the adapter, or original does not fit base.

    Source: peft 0.21.2, utils/save_and_load.py and tuners/lora.

    >>> import tempfile
    >>> import jax, lowrank_jax as lowrank
    >>> import jax.numpy as jnp
    >>> from lowrank_jax.peft import load
    >>> params = {"layers_0": {"attn": {"query": {"kernel": jnp.ones((4, 3))}}}}
    >>> config = lowrank.LoraConfig(rank=2, targets="**/kernel", extras={"task_type": "CAUSAL_LM"})
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora, config, names=lowrank.names.LLAMA)
    ...     _, again, found = load(directory, params, names=lowrank.names.LLAMA)
    >>> node = again["layers_0"]["attn"]["query"]["kernel"]
    >>> node.a.shape, node.scale, found.targets, found.extras["task_type"]
    ((4, 2), 2.0, ('layers_0/attn/query/kernel',), 'CAUSAL_LM')
    """
    if base is not None and original is None:
        _check_base(collect_adapters(lora), base)
    contents, text = convert_adapter(lora, config, base, original, plan, names, for_serving)
    write_on_first_process(lambda: write_folder(Path(directory), text, contents))


@check_arguments(CheckpointError)
def tensors(
    lora: PyTree,
    config: LoraConfig,
    *,
    base: PyTree = None,
    original: PyTree = None,
    plan: Plan | None = None,
    names: Names = None,
    ranks: tuple[int, ...] | None = None,
    for_serving: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Return what save writes, without files: for trainers that update a running server.

    The tensors stay on their devices, and lora may be traced:
    `jax.jit(lambda lora: tensors(lora, config)[0])` copies nothing to the host.

    Args:
      lora: the adapter.
      config: its LoraConfig.
      base: as for save.
      original: as for save; base and original must then hold values.
      plan: as for save.
      names: as for save.
      ranks: the ranks that a server takes, for instance (8, 16, 32, 64): factors are padded with
        zeros to the next of them. None: no padding.
      for_serving: as for save: one rank and one scale for all modules.

    Returns:
      (key -> array in PyTorch's layout, the fields of adapter_config.json).

    Raises:
      CheckpointError: as for save; or a rank is larger than each of ranks.
      TreeError: base does not fit the adapter, or original does not fit base.

    Source: peft 0.21.2, utils/save_and_load.py and tuners/lora.

    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> params = {"up": {"kernel": jnp.ones((4, 3))}}
    >>> config = lowrank.LoraConfig(rank=2, targets="**/kernel")
    >>> _, lora = lowrank.init(0, params, config)
    >>> arrays, fields = tensors(lora, config, ranks=(1, 8, 16))
    >>> arrays["base_model.model.up.lora_A.weight"].shape, fields["r"], fields["lora_alpha"]
    ((8, 4), 8, 16)
    """
    if base is not None and original is None:
        _check_base(collect_adapters(lora), base)
    arrays, text = convert_adapter(
        lora, config, base, original, plan, names, for_serving, ranks, keep_on_device
    )
    return arrays, json.loads(text)


@check_arguments()
def servable(base: PyTree, lora: PyTree) -> tuple[Any, Any]:
    r"""Fold the adapters that servers do not support into the base, and keep the others.

    Folded, as $W' = W_\text{eff}$, are DoRA, (IA)^3 and the other methods related to LoRA, LoRA of
    convolutions, and leaves or rows trained whole. LoRA of products and tables is kept. The
    function that base and lora represent does not change.

    Args:
      base: the frozen tree; quantized leaves become dense if an adapter is folded into them.
      lora: the adapter.

    Returns:
      (base, lora): the weights for huggingface.save, and their adapter for save(...,
      for_serving=True), with base=base, original=base if an initializer had changed the base. If no
      adapter is kept, lora has only None, and there is nothing to save.

    Raises:
      TreeError: base holds adapters or shapes without values, or lacks a leaf of the adapter, or
        has it in another shape.

    Source: LoRA, arXiv 2106.09685, section 4.1; vLLM, lora/peft_helper.py.

    >>> import lowrank_jax as lowrank
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((4, 3)), "norm": jnp.ones(3)}
    >>> config = lowrank.LoraConfig(rank=2, targets="w", train="norm")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> base, lora = servable(base, {**lora, "norm": lowrank.Full(2 * jnp.ones(3))})
    >>> base["norm"].tolist(), type(lora["w"]).__name__, lora["norm"]
    ([2.0, 2.0, 2.0], 'LowRank', None)
    """
    nodes = collect_adapters(lora)
    leaves = dict(flatten(base, is_leaf=is_node)[0])
    if adapted := find_adapters(leaves.items()):
        raise TreeError(f"base holds an adapter at {adapted[0]!r}: pass {UNADAPTED}")
    if shapes := [path for path, leaf in leaves.items() if _is_abstract(leaf)]:
        raise TreeError(
            f"base holds a ShapeDtypeStruct at {shapes[0]!r}: pass the frozen tree, of arrays"
        )
    _check_base(nodes, base)
    kept = {path: node for path, node in nodes.items() if not describe_unservable(node)}
    folded = {
        path: fold_into(leaf, nodes[path]) if path in nodes.keys() - kept.keys() else leaf
        for path, leaf in leaves.items()
    }
    return unflatten_by_path(base, folded, is_node), unflatten_by_path(base, kept, is_node)


def _check_base(nodes: dict[str, Any], base: PyTree) -> None:
    """Raise unless the base has a leaf of the same shape for each node."""
    leaves = flatten(base, is_leaf=is_node)[0]
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    if lost := [path for path, node in nodes.items() if shapes.get(path) != tuple(node.shape)]:
        raise TreeError(
            f"the adapter has {lost[0]!r} of shape {tuple(nodes[lost[0]].shape)}, and base "
            f"{shapes.get(lost[0], 'no such leaf')}: pass both results of init"
        )


def _is_abstract(leaf: PyTree) -> bool:
    """Whether a leaf is, or holds, a shape without values."""
    return any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf))

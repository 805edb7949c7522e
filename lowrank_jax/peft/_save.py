"""Write adapters as PEFT does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError, TreeError
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._nodes import collect_adapters, is_adapter, is_node
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.names import Names
from lowrank_jax.peft._folder import write_folder
from lowrank_jax.peft._serving import describe_unservable, fold_into
from lowrank_jax.peft._writing import convert_adapter


@check_arguments(CheckpointError)
def save(
    directory: str | os.PathLike,
    lora: Any,
    config: LoraConfig,
    *,
    base: Any = None,
    original: Any = None,
    plan: Plan | None = None,
    names: Names = None,
    for_serving: bool = False,
) -> None:
    r"""Save an adapter as `peft` does, for `PeftModel.from_pretrained` to load.

    A = a.T and B = b.T, with $\alpha$ such that the file's scale is the node's. Leaves of
    config.train become modules_to_save, or trained biases (bias="lora_only" or "all"), and those of
    config.train_rows trainable_token_indices. A table that the model also multiplies with, one leaf
    here, is two modules there, each with the same factors: PEFT computes the same with them, though
    merging there adds the change to the shared weight twice.

    Both files are written whole under other names and flushed before they take their places. What
    fails leaves the old adapter. A kill leaves the old one, the new one, or one without its
    configuration, which nothing loads; where the configuration stays as it was, one rename decides.
    A lock, which dies with its process, keeps a second writer out.

    Args:
      directory: made where missing; other files in it are left alone.
      lora: the adapter: LowRank and Full nodes, None elsewhere.
      config: its LoraConfig: `rslora` and `extras` are written, all else comes from the nodes.
      base: the frozen tree. Needed with original, with trained rows, and where a module has a leaf
        that is trained whole and another that is not (a norm's scale and bias), for PEFT saves
        whole modules.
      original: the parameters before init, needed where the initializer moved weight out of base
        (PiSSA, OLoRA, ...): the file then holds base + s a b - original, of twice the rank, to be
        used on the original weights; found up to the rounding of base's dtype. original=base says
        that the file is for base as it is, which is to be saved as well.
      plan: of the function that uses params; tells which tables are also multiplied with, and the
        axes of leaves trained whole.
      names: leaf -> module, as of lowrank.names.parameter: LLAMA or another table, say.
      for_serving: write what servers such as vLLM read, who take one rank and one scale for all
        modules and pass over the patterns without a word: ranks are padded with zeros, and scales
        folded into B. They have neither DoRA nor whole modules nor biases; those are refused, and
        `servable` folds them into the base.

    Raises:
      CheckpointError: PEFT cannot hold a leaf, weight was moved and original is not given, or base
        and original differ by more than an adapter can say; all such leaves are listed, and nothing
        is written. Another process is saving there, or the file system refused.

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
    if jax.process_count() > 1:
        raise CheckpointError("save works in a program of one process; this one has several")
    if base is not None and original is None:
        _check_base(collect_adapters(lora), base)
    tensors, text = convert_adapter(lora, config, base, original, plan, names, for_serving)
    write_folder(Path(directory), text, tensors)


@check_arguments()
def servable(base: Any, lora: Any) -> tuple[Any, Any]:
    r"""Fold into the base what servers have no adapter for, and leave the rest as it is.

    $W' = W_\text{eff}$ where the adapter is DoRA, (IA)^3 or another of LoRA's kin, a convolution,
    or a leaf or rows trained whole; LoRA of products and tables stays. The function is the same.

    Args:
      base: the frozen tree; quantized leaves that are folded into come back dense.
      lora: the adapter.

    Returns:
      (base, lora): the weights for huggingface.save, and an adapter on them for save(...,
      for_serving=True), with base=base, original=base where an initializer had moved weight. If
      nothing is left, lora is None in every place, and there is no adapter to save.

    Raises:
      TreeError: base holds adapters or shapes without values; the adapter has a leaf that base has
        not, or of another shape.

    Source: LoRA, arXiv 2106.09685, section 4.1; what servers take: vLLM, lora/peft_helper.py.

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
    if wrong := [path for path, leaf in leaves.items() if is_adapter(leaf) or _is_abstract(leaf)]:
        raise TreeError(
            f"base holds a {type(leaves[wrong[0]]).__name__} at {wrong[0]!r}: pass the frozen "
            "tree, of arrays (lowrank.partition takes a combined one apart)"
        )
    _check_base(nodes, base)
    kept = {path: node for path, node in nodes.items() if not describe_unservable(node)}
    folded = {
        path: fold_into(leaf, nodes[path]) if path in nodes.keys() - kept.keys() else leaf
        for path, leaf in leaves.items()
    }
    return unflatten_by_path(base, folded, is_node), unflatten_by_path(base, kept, is_node)


def _check_base(nodes: dict[str, Any], base: Any) -> None:
    """The base has a leaf of the same shape for each node."""
    leaves = flatten(base, is_leaf=is_node)[0]
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    if lost := [path for path, node in nodes.items() if shapes.get(path) != tuple(node.shape)]:
        raise TreeError(
            f"the adapter has {lost[0]!r} of shape {tuple(nodes[lost[0]].shape)}, and base "
            f"{shapes.get(lost[0], 'no such leaf')}: pass both results of init"
        )


def _is_abstract(leaf: Any) -> bool:
    """Whether a leaf has no values."""
    return any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf))

"""Adapters as `peft` saves them, both ways: adapter_config.json and adapter_model.safetensors.

Source: peft 0.21.2. Nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import checked
from lowrank_jax._errors import CheckpointError, LowrankError, TreeError, listing
from lowrank_jax._files.tensor_file import TensorFile
from lowrank_jax._files.torch_layout import known_names, misnumbered, numbered, stack_axes, use_of
from lowrank_jax._jax.paths import flatten, in_structure
from lowrank_jax._nodes import Full, LowRank, is_adapter, is_node, nodes_of, normed, unnormed
from lowrank_jax._nodes.family import Rows
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.names import Names, Parameter
from lowrank_jax.peft._config import alpha_of, extras_of
from lowrank_jax.peft._factors import match_factors
from lowrank_jax.peft._folder import CONFIG, read_config, tensors_path, write_folder
from lowrank_jax.peft._matching import Matching, Place
from lowrank_jax.peft._parsing import AdapterConfig, parse
from lowrank_jax.peft._serving import folded_into, foreign
from lowrank_jax.peft._tensors import PREFIX, TOKENS
from lowrank_jax.peft._whole import match_tokens, match_whole
from lowrank_jax.peft._writing import written


@checked(CheckpointError)
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
        _refuse_other_base(nodes_of(lora), base)
    tensors, text = written(lora, config, base, original, plan, names, for_serving)
    write_folder(Path(directory), text, tensors)


@checked()
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
    >>> params = {"w": jnp.ones((4, 3)), "norm": jnp.ones(3)}
    >>> config = lowrank.LoraConfig(rank=2, targets="w", train="norm")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> base, lora = servable(base, {**lora, "norm": lowrank.Full(2 * jnp.ones(3))})
    >>> base["norm"].tolist(), type(lora["w"]).__name__, lora["norm"]
    ([2.0, 2.0, 2.0], 'LowRank', None)
    """
    nodes = nodes_of(lora)
    leaves = dict(flatten(base, is_leaf=is_node)[0])
    if wrong := [path for path, leaf in leaves.items() if is_adapter(leaf) or _is_shape(leaf)]:
        raise TreeError(
            f"base holds a {type(leaves[wrong[0]]).__name__} at {wrong[0]!r}: pass the frozen "
            "tree, of arrays (lowrank.partition takes a combined one apart)"
        )
    _refuse_other_base(nodes, base)
    kept = {path: node for path, node in nodes.items() if not foreign(node)}
    folded = {
        path: folded_into(leaf, nodes[path]) if path in nodes.keys() - kept.keys() else leaf
        for path, leaf in leaves.items()
    }
    return in_structure(base, folded, is_node), in_structure(base, kept, is_node)


def _refuse_other_base(nodes: dict[str, Any], base: Any) -> None:
    """The base has a leaf of the same shape for each node."""
    leaves = flatten(base, is_leaf=is_node)[0]
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    if lost := [path for path, node in nodes.items() if shapes.get(path) != tuple(node.shape)]:
        raise TreeError(
            f"the adapter has {lost[0]!r} of shape {tuple(nodes[lost[0]].shape)}, and base "
            f"{shapes.get(lost[0], 'no such leaf')}: pass both results of init"
        )


def _is_shape(leaf: Any) -> bool:
    """Whether a leaf has no values."""
    return any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf))


@checked(CheckpointError)
def load(
    directory: str | os.PathLike, params: Any, *, plan: Plan | None = None, names: Names = None
) -> tuple[Any, Any, LoraConfig]:
    r"""Load an adapter that `peft` saved.

    a = A.T, b = B.T. Modules saved whole, trained biases and lora_bias (bias + s times it) come
    back as Full leaves, trained rows of a table (trainable_token_indices) as Rows.

    A leaf that stacks layers has one rank and one scale: smaller ranks are padded with zeros, and
    other scales folded into b, which is exact up to the rounding of b; layers without factors get
    zeros, which no gradient moves.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      params: the parameters it was trained on; arrays, Quantized leaves or ShapeDtypeStructs.
      plan: of the function that uses params; needed for kernels of more than two axes.
      names: leaf -> module, as of lowrank.names.parameter: LLAMA or another table, say.

    Returns:
      (base, lora, config), as init returns the first two; config names the leaves by their paths.

    Raises:
      CheckpointError: a field of the configuration is wrong, or asks for what is not supported; a
        tensor is missing, unexpected, misshapen, of another dtype or not finite: all of them are
        listed. A file is damaged or leads out of the directory. Nothing is unpickled.

    Source: peft 0.21.2, utils/save_and_load.py and tuners/lora.

    >>> import tempfile
    >>> import lowrank_jax as lowrank
    >>> lora = {"head": {"kernel": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)}}
    >>> params = {"head": {"kernel": jnp.zeros((4, 3))}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora, lowrank.LoraConfig())
    ...     base, again, config = load(directory, params)
    >>> config.rank, config.alpha, lowrank.merge(base, again)["head"]["kernel"][0].tolist()
    (2, 1, [1.0, 1.0, 1.0])
    """
    folder = Path(directory)
    text = read_config(folder)
    config = parse(text, str(folder / CONFIG))
    leaves = flatten(params, is_leaf=is_node)[0]
    floating = {
        path: unnormed(leaf)
        for path, leaf in leaves
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    with TensorFile(tensors_path(folder)) as file:
        if read_config(folder) != text:
            raise CheckpointError(f"{folder} was saved anew while it was read: load it again")
        matching = Matching(file, config)
        builds = _match(matching, floating, known_names(floating, names), plan)
        if problems := [*matching.problems, *matching.leftover()]:
            raise CheckpointError(
                f"the adapter at {folder} does not fit params:\n{listing(problems)}"
            )
        if not builds:
            raise CheckpointError(f"the adapter at {folder} holds no tensor")
        nodes = {path: build() for path, build in builds.items()}
    if matching.not_finite:
        raise CheckpointError(
            f"the adapter at {folder} holds NaN or infinity, where a model would give nothing "
            "else: save it again from a run that did not diverge, or in a dtype that its values "
            f"fit in:\n{listing(sorted(matching.not_finite))}"
        )
    base = {
        path: normed(leaf, nodes[path]) if _has_norm(leaf, nodes.get(path)) else leaf
        for path, leaf in leaves
    }
    trees = (in_structure(params, found, is_node) for found in (base, nodes))
    try:
        return *trees, _config(config, nodes)
    except LowrankError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error


def _has_norm(leaf: Any, node: Any) -> bool:
    """Whether init would give a leaf its squared norms."""
    dora = isinstance(node, LowRank) and node.magnitude is not None
    return dora and not isinstance(leaf, jax.ShapeDtypeStruct)


def _match(
    matching: Matching, leaves: dict[str, Any], named: dict[str, Parameter], plan: Plan | None
) -> dict[str, Callable[[], Any]]:
    """How to make the node of each leaf that the file has something for."""
    builds = {}
    # weights first: a bias takes what came beside the factors of its weight
    for path in sorted(named, key=lambda path: named[path].kind != "weight"):
        leaf, name = leaves[path], named[path]
        use = use_of(plan, path)
        stack = stack_axes(name, use)
        if len(stack) != name.module.count("{}") or max(stack, default=-1) >= leaf.ndim:
            matching.unnamed.append(misnumbered(path, len(stack), name))
            continue
        indices = np.ndindex(*(leaf.shape[axis] for axis in stack))
        modules = {index: numbered(name.module, index) for index in indices}
        build = _match_leaf(matching, Place(path, leaf, name, use, modules))
        if build is not None:
            builds[path] = build
    return builds


def _match_leaf(matching: Matching, place: Place) -> Callable[[], Any] | None:
    """How to make the node of a leaf, if the file has one for it."""
    modules = place.modules.values()
    if place.name.kind != "weight":
        return match_whole(matching, place)
    adapted = any(map(matching.adapts, modules))
    if place.leaf.ndim > len(stack_axes(place.name, place.use)) + 1:
        matching.problems += [
            f"{PREFIX}{module}: no factors, and target_modules names it ({place.path!r})"
            for module in modules
            if matching.config.targets(module) and not matching.adapts(module)
        ]
    tokens = any(TOKENS in matching.parts.get(module, {}) for module in modules)
    if tokens and adapted:
        return matching.drop(
            place, f"{place.path!r}: factors and trainable tokens; a leaf has one adapter"
        )
    match = match_tokens if tokens else match_factors if adapted else match_whole
    return match(matching, place)


def _config(config: AdapterConfig, nodes: dict[str, Any]) -> LoraConfig:
    """The LoraConfig of what was loaded, its patterns the leaves' own paths."""
    odd = lambda path: set(path) & set("*?") or "" in path.split("/")  # no glob of itself
    exact = lambda path: re.compile(re.escape(path)) if odd(path) else path
    lowranks = {path: node for path, node in sorted(nodes.items()) if type(node) is LowRank}
    rslora = config["use_rslora"]
    alphas = {path: alpha_of(node.scale, node.rank, rslora) for path, node in lowranks.items()}
    dtypes = {jnp.dtype(node.dtype).name for node in lowranks.values()}
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=tuple(map(exact, lowranks)),
        rank_pattern={exact(p): n.rank for p, n in lowranks.items() if n.rank != config["r"]},
        alpha_pattern={exact(p): a for p, a in alphas.items() if a != config["lora_alpha"]},
        rslora=rslora,
        dora=config["use_dora"],
        train=tuple(exact(path) for path, node in sorted(nodes.items()) if isinstance(node, Full)),
        train_rows={exact(p): n.rows for p, n in sorted(nodes.items()) if isinstance(n, Rows)},
        factor_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        extras=extras_of(config.values),
    )

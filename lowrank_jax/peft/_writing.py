"""Convert an adapter to the tensors and the configuration of PEFT's format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, LowrankError, TreeError, list_problems
from lowrank_jax._files.safetensors import DTYPES
from lowrank_jax._files.torch_layout import (
    TorchLayout,
    fill_indices,
    find_use,
    infer_layout,
    resolve_names,
    validate_name,
)
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import (
    UNADAPTED,
    Full,
    LowRank,
    as_dense,
    collect_adapters,
    find_adapters,
    is_node,
    strip_norms,
)
from lowrank_jax._nodes.family import Rows
from lowrank_jax._nodes.methods import get_label, get_method
from lowrank_jax._nodes.quantized_factors import dequantize_factors
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan, Use
from lowrank_jax._trees.fingerprint import to_numpy
from lowrank_jax.names import Names, Parameter
from lowrank_jax.peft._config import compute_alpha, to_json
from lowrank_jax.peft._difference import factorize_difference
from lowrank_jax.peft._serving import pad_to_ranks, unify_factors
from lowrank_jax.peft._tensors import MAGNITUDE, PREFIX, TOKENS, find_tied_module, to_tied_factors

Convert = Callable[[str, Any], Any]


@dataclasses.dataclass
class _AdapterContents:
    """The contents of the two files, collected leaf by leaf.

    Args:
      rslora: whether the scale is alpha / sqrt(rank).
      whole: names, with "{}", of modules whose weight is trained whole.
      bases: path -> frozen leaf, if given.
      tensors: key -> tensor in torch's layout, a NumPy array or what `convert` returns.
      scales: adapted module -> (rank, alpha).
      saved_modules: modules that are saved whole.
      biases: module -> bias, of modules of which only the bias is trained whole.
      tokens: table -> its trained rows.
      conv1d: whether a weight is [in, out] in torch.
      convert: (path, array) -> the array in the form that the tensors take.
    """

    # A leaf "layers/up" [2, 4, 3] of two layers with rank 8, named "layers.{}.up", adds
    #   tensors["base_model.model.layers.0.up.lora_A.weight"]  [8, 4]   a[0].T
    #   tensors["base_model.model.layers.0.up.lora_B.weight"]  [3, 8]   b[0].T
    #   scales["layers.0.up"] = (8, alpha)
    # and the same for layer 1.

    rslora: bool
    whole: set[str]
    bases: dict[str, Any]
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
    scales: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    saved_modules: set[str] = dataclasses.field(default_factory=set)
    biases: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    conv1d: bool = False
    convert: Convert = dataclasses.field(default_factory=lambda: to_host)

    def add_leaf(self, path: str, node: LowRank | Full, name: Parameter, use: Use | None) -> None:
        """Add one leaf, or raise if PEFT's format cannot represent it."""
        _check_supported(path, node, name)
        if isinstance(node, Rows):
            return self._add_rows(path, node, name)
        layout = infer_layout(path, tuple(node.shape), name, use, node)
        tied = find_tied_module(layout, name, use)
        self.conv1d |= name.fan_in_fan_out
        if isinstance(node, LowRank):
            return self._add_factors(path, node, name, layout, tied)
        return self._add_whole(
            layout.to_weights(self.convert(path, node.weight)), name, layout, tied
        )

    def _add_whole(
        self, weights: np.ndarray, name: Parameter, layout: TorchLayout, tied: str | None
    ) -> None:
        for index in layout.stack_indices:
            module, value = fill_indices(name.module, index), weights[index]
            if name.kind == "bias":
                value = value.reshape(-1)
            if name.kind == "bias" and name.module not in self.whole:
                self.biases[module] = value
                continue
            for owner in filter(None, (module, tied)):
                self.saved_modules.add(owner)
                self._add_tensors(owner, {name.kind: value})

    def _add_rows(self, path: str, node: Rows, name: Parameter) -> None:
        """Add the new values of trained rows: the base's rows plus their change."""
        if path not in self.bases:
            raise CheckpointError(
                f"{path!r}: PEFT saves the new values of the rows, of which the adapter has only "
                "the change: pass base"
            )
        rows = list(node.rows)
        base = to_numpy(path, as_dense(self.bases[path]))[rows]
        changed = base.astype(np.float32) + node.scale * self.convert(path, node.b)
        self.tokens[name.module] = rows
        self._add_tensors(name.module, {TOKENS: changed.astype(base.dtype)})

    def _add_factors(
        self, path: str, node: LowRank, name: Parameter, layout: TorchLayout, tied: str | None
    ) -> None:
        a, b = self.convert(path, node.a), self.convert(path, node.b)
        magnitude = None if node.magnitude is None else self.convert(path, node.magnitude)
        alpha = compute_alpha(node.scale, node.rank, self.rslora)
        for index in layout.stack_indices:
            module = fill_indices(name.module, index)
            parts = layout.to_factors(a[index], b[index])
            if magnitude is not None:
                parts[MAGNITUDE] = magnitude[index].reshape(layout.magnitude_shape)
            self.scales[module] = node.rank, alpha
            self._add_tensors(module, parts)
            if tied is not None:
                self.scales[tied] = node.rank, alpha
                self._add_tensors(tied, to_tied_factors(parts))

    def _add_tensors(self, module: str, parts: dict[str, np.ndarray]) -> None:
        for part, tensor in parts.items():
            self.tensors[f"{PREFIX}{module}.{part}"] = tensor


def convert_adapter(
    lora: PyTree,
    config: LoraConfig,
    base: PyTree,
    original: PyTree,
    plan: Plan | None,
    names: Names,
    for_serving: bool,
    ranks: Sequence[int] | None = None,
    convert: Convert | None = None,
) -> tuple[dict[str, Any], str]:
    """Return the tensors and the configuration of an adapter; one error lists all problems."""
    # the arguments are those of `save`, the ranks to pad to, and (path, array) -> the array in the
    # form that the tensors take, to_host by default
    leaves = dict(flatten(lora, is_leaf=lambda x: x is None or is_node(x))[0])
    bases = {} if base is None else dict(flatten(base, is_leaf=is_node)[0])
    for name, tree in (("base", base), ("original", original)):
        if adapted := find_adapters(flatten(tree, is_leaf=is_node)[0]):
            raise CheckpointError(f"{name} holds an adapter at {adapted[0]!r}: pass {UNADAPTED}")
    nodes = {path: dequantize_factors(node) for path, node in collect_adapters(lora).items()}
    nodes = _rebase_nodes(nodes, bases, original)
    if for_serving:
        nodes = unify_factors(nodes, ranks)
    elif ranks is not None:
        nodes = pad_to_ranks(nodes, ranks)
    named = resolve_names({**leaves, **bases}, names)
    whole = {
        name.module
        for path, name in named.items()
        if isinstance(nodes.get(path), Full) and name.kind != "bias"
    }
    rslora = config.rslora and not for_serving
    convert = convert or to_host
    writing, problems = _AdapterContents(rslora, whole, bases, convert=convert), []
    for path, node in _add_siblings(nodes, named, whole, bases).items():
        try:
            if path not in named:
                raise CheckpointError(f"{path!r}: names has no module for it")
            if node is None:
                raise CheckpointError(
                    f"{path!r}: PEFT saves whole modules, and another leaf of {named[path].module}"
                    " is trained whole: pass base, which has this leaf"
                )
            validate_name(path, named[path])
            writing.add_leaf(path, node, named[path], find_use(plan, path))
        except LowrankError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"nothing was written; PEFT's format does not support\n{list_problems(problems)}"
        )
    # PEFT wraps an adapted module, so the bias of one is at "....base_layer.bias". bias="lora_only"
    # lets PEFT load the biases of adapted modules alone, "all" those of others too.
    adapted, only = set(writing.scales), set(writing.biases)
    for module, value in writing.biases.items():
        inner = ".base_layer" if module in adapted else ""
        writing.tensors[f"{PREFIX}{module}{inner}.bias"] = value
    own = {
        "bias": ("lora_only" if only <= adapted else "all") if only else "none",
        "fan_in_fan_out": writing.conv1d,
        "modules_to_save": sorted(writing.saved_modules) or None,
        "trainable_token_indices": writing.tokens or None,
        "use_dora": _is_dora(nodes),
    }
    return writing.tensors, to_json(writing.scales, rslora, config.extras, **own)


def _is_dora(nodes: dict[str, Any]) -> bool:
    """Whether the adapters have DoRA magnitudes; raise if some do and some do not."""
    lowranks = {path: node for path, node in nodes.items() if type(node) is LowRank}
    plain = [path for path, node in lowranks.items() if node.magnitude is None]
    if plain and len(plain) < len(lowranks):
        raise CheckpointError(
            f"some adapters have a DoRA magnitude and some, such as {plain[0]!r}, have none: PEFT "
            "has one use_dora for all; save them separately"
        )
    return bool(lowranks) and not plain


def _add_siblings(
    nodes: dict[str, Any], named: dict[str, Parameter], whole: set[str], bases: dict[str, Any]
) -> dict[str, Any]:
    """Add the frozen leaves of modules that are saved whole; None for one that is not given."""
    siblings = {
        path: Full(as_dense(bases[path])) if path in bases else None
        for path, name in named.items()
        if name.module in whole and path not in nodes
    }
    return {**nodes, **siblings}


def _check_supported(path: str, node: LowRank | Full, name: Parameter) -> None:
    """Raise if PEFT's format cannot represent a node."""
    if name.kind not in ("weight", "bias"):
        raise CheckpointError(
            f"{path!r}: {name.kind} is a parameter of {name.module} other than its weight and bias,"
            " and PEFT saves only whole modules; save the merged weights (lowrank.merge)"
        )
    if isinstance(node, Full):
        return
    if not get_method(node).in_peft:
        raise CheckpointError(
            f"{path!r}: a LoRA file cannot hold {get_label(node)}; save the merged weights "
            "(lowrank.merge)"
        )
    if node.folded:
        raise CheckpointError(f"{path!r}: save the adapter before lowrank.fold_norms")
    if node.adapters:
        shape = tuple(getattr(node, node.required[0]).shape)
        raise CheckpointError(
            f"{path!r}: {node.required[0]} has shape {shape}, several adapters in one; split them "
            "and save them one by one"
        )
    if name.kind == "weight" and isinstance(node, Rows):
        return
    if not node.scale > 0:
        raise CheckpointError(f"{path!r}: scale {node.scale}, but PEFT requires alpha > 0")
    if name.kind != "weight":
        raise CheckpointError(f"{path!r}: PEFT adapts only weights, and names gives {name.key!r}")


def to_host(path: str, value: jax.typing.ArrayLike) -> np.ndarray:
    """Convert a value to a NumPy array of a dtype that the file format has."""
    array = to_numpy(path, value)
    _check_dtype(path, array.dtype)
    return array


def keep_on_device(path: str, value: jax.typing.ArrayLike) -> jax.Array:
    """Convert a value to a jax.Array of a dtype that the file format has; it may be traced."""
    array = jnp.array(value, copy=True)  # the adapter may be donated, and the tensors stay
    _check_dtype(path, array.dtype)
    return array


def _check_dtype(path: str, dtype: np.dtype) -> None:
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{path!r} is {dtype}, which the file format does not support")


def _check_base_unmodified(nodes: dict[str, Any]) -> None:
    """Raise if an initializer changed the base, and original was not given."""
    if changed := [
        path for path, node in nodes.items() if isinstance(node, LowRank) and node.base_modified
    ]:
        raise CheckpointError(
            "the initializer changed the base of the leaves below, so the file would be wrong on "
            "the original weights. Pass lowrank.peft.save base and original=params, from before "
            "init; or base=base, original=base to use the file on that base (after one iteration "
            "of LoftQ, the original, quantized); or save lowrank.merge(base, lora):\n"
            + list_problems(changed)
        )


def _rebase_nodes(nodes: dict[str, Any], bases: dict[str, Any], original: PyTree) -> dict[str, Any]:
    """Express the nodes as changes of the original, including changes by an initializer."""
    # base + s a b = original + s (a b + a0 b0), where base = original + s a0 b0. So the file has
    # a [*stack, i, r] and a0 joined to [*stack, i, 2 r], and b [*stack, r, o] and b0 joined to
    # [*stack, 2 r, o], whose product is a b + a0 b0.
    if original is None:
        _check_base_unmodified(nodes)
        return nodes
    if not bases:
        raise CheckpointError(
            "original is given without base: the file holds base plus the adapter's product, minus "
            "original; pass both results of init"
        )
    originals = dict(flatten(original, is_leaf=is_node)[0])
    if differ := sorted(originals.keys() ^ bases.keys()):
        raise TreeError(f"base and original have different structures: only one has {differ[0]!r}")
    relative, problems = dict(nodes), []
    for path, leaf in bases.items():
        old, node = originals[path], nodes.get(path)
        leaf, old = strip_norms(leaf), strip_norms(old)
        if leaf is old or isinstance(node, Full) or not hasattr(leaf, "dtype"):
            continue
        new_, old_ = to_numpy(path, as_dense(leaf)), to_numpy(path, as_dense(old))
        if np.array_equal(new_, old_):
            continue
        if node is None:
            problems.append(f"{path!r} differs between base and original but has no adapter")
            continue
        try:
            a, b = factorize_difference(path, node, new_, old_)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        xp = jnp if isinstance(node.a, jax.Array) else np
        joined = [
            xp.concatenate([node.a, a], axis=-1),
            xp.concatenate([node.b, b], axis=len(node.stack)),
        ]
        relative[path] = dataclasses.replace(node, a=joined[0], b=joined[1])
    if problems:
        raise CheckpointError(f"base is not derived from original:\n{list_problems(problems)}")
    return relative

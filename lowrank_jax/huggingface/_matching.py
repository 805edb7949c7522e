"""Match the tensors of a model's folder with the leaves of a tree, and list all problems."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.shards import Tensors
from lowrank_jax._files.torch_layout import find_use, resolve_names
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.huggingface._leaves import TensorMapping, map_leaf, name_tensors
from lowrank_jax.names import Names, Parameter, parameter

# buffers that modules register beside their parameters: masks, positions, frequencies, counters
_BUFFER = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias|num_batches_tracked)"
)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer, which a model recomputes, and not a parameter."""
    mask = name.endswith("attn.bias") and len(shape) != 4
    return bool(_BUFFER.fullmatch(name)) and not mask


@dataclasses.dataclass
class Match:
    """The matched leaves, and the problems.

    Args:
      leaves: path -> TensorMapping.
      missing, unexpected, misfits: the problems by kind: leaves without tensors, tensors without
        leaves, and tensors of the wrong shape or dtype.
    """

    leaves: dict[str, TensorMapping] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misfits: list[str] = dataclasses.field(default_factory=list)

    def refuse(self, folder: Path, names: Names) -> None:
        """Raise CheckpointError with all problems, if there are any."""
        kinds = {
            "the folder has no tensor for": self.missing,
            "the tree has no leaf for": self.unexpected,
            "these do not fit": self.misfits,
        }
        wrong = [f"{kind}\n{list_problems(lines)}" for kind, lines in kinds.items() if lines]
        if not wrong:
            return
        if names is None and self.missing and self.unexpected:
            wrong.append(
                "names maps leaves to torch's names: pass names=lowrank.names.LLAMA, or another "
                "table, mapping or function"
            )
        raise CheckpointError(f"{folder} does not fit the tree:\n" + "\n".join(wrong))


def match_tensors(
    tensors: Tensors,
    leaves: Mapping[str, Any],
    names: Names,
    plan: Plan | None,
    ignore: Sequence[str],
    tied: bool,
) -> Match:
    """Match tensors with leaves; no tensor is read, except to compare two that are tied.

    Args:
      tensors: the folder's tensors.
      leaves: path -> array or ShapeDtypeStruct.
      names: see load.
      plan: see load.
      ignore: see load.
      tied: whether the configuration ties the embedding and the output projection.
    """
    found, taken = Match(), set()
    named = _strip_missing_prefix(resolve_names(leaves, names), tensors)
    shared = _find_shared(leaves, names, named) if tied else {}
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        if path not in named:
            if not _is_kept(leaf):
                found.missing.append(f"{path!r}: names has no module for it")
            continue
        name, use = named[path], find_use(plan, path)
        if name.key not in tensors and path in shared:
            name = dataclasses.replace(name, module=shared[path])
        try:
            keys = name_tensors(path, shape, name, use)
            if lost := [key for key in keys.values() if key not in tensors]:
                if not _is_kept(leaf):
                    found.missing += [f"{key} ({path!r})" for key in lost]
                continue
        except CheckpointError as error:
            found.misfits.append(str(error))
            continue
        taken |= {*keys.values()}
        if any(map(tensors.is_coded, keys.values())):
            name = dataclasses.replace(name, fan_in_fan_out=False)
        for key in keys.values():
            entry = tensors.entry(key)
            if jnp.issubdtype(entry.dtype, jnp.floating) != is_floating(leaf):
                wanted = f"expected {jnp.dtype(leaf.dtype).name} for {path!r}"
                found.misfits.append(f"{key}: dtype {entry.dtype.name}, {wanted}")
            try:
                found.leaves[path] = map_leaf(path, shape, name, use, entry.shape)
            except CheckpointError as error:
                found.misfits.append(f"{key}: {error}")
        if name.tied is not None and (copy := f"{name.tied}.weight") in tensors:
            taken.add(copy)
            if not tensors.are_equal(copy, name.key):
                found.misfits.append(
                    f"{copy}: not {name.key}, but both are the leaf {path!r}: the model's "
                    "embeddings are not tied"
                )
    found.unexpected += [
        f"{key} {list(tensors.entry(key).shape)}"
        for key in tensors
        if key not in taken
        and not is_buffer(key, tensors.entry(key).shape)
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignore)
    ]
    return found


def is_floating(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf's dtype is floating."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_kept(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf that is not in the folder is kept: a counter or key that has a value."""
    return not is_floating(leaf) and hasattr(leaf, "__array__")


def _find_shared(
    leaves: Mapping[str, Any], names: Names, named: Mapping[str, Parameter]
) -> dict[str, str]:
    """Return projection's path -> embedding's module, of tied pairs where both are leaves."""
    tables = {}
    for path in named:
        if (name := parameter(path, names)) is not None and name.tied is not None:
            tables[name.tied] = named[path].module
    return {path: tables[name.module] for path, name in named.items() if name.module in tables}


def _strip_missing_prefix(named: dict[str, Parameter], tensors: Tensors) -> dict[str, Parameter]:
    """Remove a prefix of the names ("transformer.") that a base model's file does not have."""
    # "transformer.h.{}.ln_1" + ".weight": the file has "h.0.ln_1.weight" and no name that starts
    # with "transformer", so that the prefix is removed from all names that have it.
    heads = {key.partition(".")[0] for key in tensors}
    bare = lambda name: dataclasses.replace(name, module=name.module.partition(".")[2])
    drop = {
        head
        for name in named.values()
        if (head := name.key.partition(".")[0]) not in heads
        and bare(name).module.replace("{}", "0") + f".{name.kind}" in tensors
    }
    return {
        path: bare(name) if name.key.partition(".")[0] in drop else name
        for path, name in named.items()
    }

"""Describe what a folder or file holds: a PEFT adapter, a checkpoint, or a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_jax import checkpoint
from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.arguments import path as path_like
from lowrank_jax._cli.files import describe_gguf, describe_safetensors, format_sizes
from lowrank_jax._display.text import to_printable
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.gguf import SUFFIX
from lowrank_jax._files.hub_config import CONFIG as MODEL_CONFIG
from lowrank_jax._files.hub_config import parse_quantization
from lowrank_jax._files.kinds import INDEX, MANIFEST, SINGLE, find_kinds
from lowrank_jax._files.shards import open_folder
from lowrank_jax._jax.paths import flatten
from lowrank_jax._nodes import LowRank, is_node
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.quantized_factors import dequantize_factors
from lowrank_jax._nodes.serialization import list_array_fields
from lowrank_jax._nodes.sizes import count_packed_bytes, sum_leaves
from lowrank_jax.huggingface._folder import read_model_config
from lowrank_jax.peft._folder import CONFIG, TENSORS
from lowrank_jax.peft._opening import open_adapter
from lowrank_jax.peft._tensors import FACTOR_PAIRS, split_key

_LIST_LIMIT = 10
_PICKLES = (".bin", ".pt", ".pth")


@check_arguments(CheckpointError, place=path_like)
def describe(place: Path) -> list[str]:
    """Return lines that describe a folder or file; lines with problems start with "odd: ".

    Raises:
      CheckpointError: it is not of one of the known kinds, or is damaged.
    """
    if place.is_dir():
        return _describe_folder(place)
    if not place.exists():
        raise CheckpointError(f"{place} does not exist: pass a folder or a file")
    if place.suffix == SUFFIX:
        return describe_gguf(place)
    if place.suffix == ".safetensors":
        return describe_safetensors(place)
    raise CheckpointError(
        f"{place} is not a folder, a .gguf or a .safetensors file"
        + ("; it is a pickle, and nothing here unpickles" if place.suffix in _PICKLES else "")
    )


def _describe_folder(folder: Path) -> list[str]:
    """Describe all that a folder holds, one part after the other, and name the rest of it."""
    is_model = (folder / SINGLE).exists() or (folder / INDEX).exists()
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    lines, named = [], {CONFIG, TENSORS, MANIFEST, SINGLE, INDEX}
    if (folder / CONFIG).exists():
        lines += _describe_adapter(folder)
    if checkpoint.exists(folder):
        lines += _describe_checkpoint(folder)
        named |= {path.name for path in there if path.name.startswith("arrays-")}
    if is_model:
        lines += _describe_model(folder)
        named |= {MODEL_CONFIG, *(path.name for path in there if path.suffix == ".safetensors")}
    for path in there:
        if path.name not in named and path.suffix in (SUFFIX, ".safetensors") and path.is_file():
            lines += [f"{to_printable(path.name)}:", *describe(path)]
            named.add(path.name)
    rest = [_describe_entry(path) for path in there if path.name not in named]
    if lines:
        return lines + ([f"also in the folder: {_join(rest)}"] if rest else [])
    pickles = [path.name for path in there if path.suffix in _PICKLES]
    raise CheckpointError(
        f"{folder} holds no {CONFIG}, no {MANIFEST}, no {SINGLE} and no {INDEX}: it is not an "
        "adapter, checkpoint or model"
        + (f"; {pickles[0]} is a pickle, and nothing here unpickles" if pickles else "")
        + (f"; it holds {_join(rest)}" if rest else "; it is empty")
    )


def _describe_entry(path: Path) -> str:
    """Name a file, or a folder with the kinds of what it holds."""
    if not path.is_dir():
        return to_printable(path.name)
    kinds = find_kinds(path)
    return to_printable(f"{path.name}/") + (f" ({', '.join(kinds)})" if kinds else "")


def _describe_adapter(folder: Path) -> list[str]:
    """Describe a PEFT adapter; its tensors are read to find zero factors, infinities and NaNs."""
    with open_adapter(folder) as (_, config, file):
        lines = [
            "a PEFT adapter" + (" with DoRA" if config["use_dora"] else ""),
            f"base model: {to_printable(config['base_model_name_or_path'] or 'not named')}",
        ]
        lines.append(format_sizes(file.entries.values()))
        split = {key: split_key(key) for key in file.entries}
        parts: dict[str, dict[str, str]] = {}
        for key, of in split.items():
            if of is not None:
                parts.setdefault(of[0], {})[of[1]] = key
        ranks, whole, odd = (
            Counter(),
            [],
            [f"{to_printable(k)}: no key of an adapter" for k in split if not split[k]],
        )
        for module, named in parts.items():
            if not any(part.startswith("lora_") for part in named):
                whole.append(module)
            for first, second in FACTOR_PAIRS.items():
                if (first in named) != (second in named):
                    odd.append(f"{to_printable(module)}: has one of {first} and {second}")
                elif first in named:
                    rank = next(iter(file.entries[named[first]].shape), 0)
                    if rank == 0:
                        odd.append(f"{module}: factors of rank 0")
                        continue
                    ranks[rank, config.scale(module, rank)] += 1
                    if rank != (other := config.rank(module)):
                        odd.append(
                            f"{to_printable(module)}: rank {rank}, and {CONFIG} says {other}"
                        )
                    if not file.read(named[first]).any() or not file.read(named[second]).any():
                        odd.append(
                            f"{to_printable(module)}: a factor is 0, so that it changes nothing"
                        )
        odd += [
            f"{to_printable(key)}: not finite" for key in split if not _is_finite(file.read(key))
        ]
    lines += _format_ranks(ranks)
    lines += [f"other modules saved: {len(whole)}, {_join_names(whole)}"] if whole else []
    return lines + _format_problems(odd)


def _describe_checkpoint(folder: Path) -> list[str]:
    """Describe a checkpoint; restoring it verifies every byte."""
    found = checkpoint.restore(folder)
    nodes = dict(flatten(found.lora, is_leaf=is_node)[0])
    ranks, odd = Counter(), []
    for path, node in nodes.items():
        if isinstance(node, LowRank):
            ranks[node.rank, node.scale] += 1
        dense = [np.asarray(x) for x in jax.tree.leaves(dequantize_factors(node))]
        odd += [f"{to_printable(path)}: not finite"] if not all(map(_is_finite, dense)) else []
    dora = any(getattr(node, "magnitude", None) is not None for node in nodes.values())
    whole = [path for path, node in nodes.items() if not isinstance(node, LowRank)]
    quantized = [x for x in _list_parts(nodes.values()) if isinstance(x, Quantized)]
    arrays = jax.tree.leaves(found.lora)
    step = "no step" if found.step is None else f"step {found.step}"
    base = "not recorded" if found.fingerprint is None else repr(found.fingerprint)
    state = "with" if found.opt_state is not None else "without"
    lines = [
        f"a checkpoint of lowrank_jax{' with DoRA' if dora else ''}, {step}, {state} an optimizer",
        f"base: {base}",
        format_sizes(arrays),
        *_format_ranks(ranks),
    ]
    lines += [f"leaves trained whole: {len(whole)}, {_join_names(whole)}"] if whole else []
    if quantized:
        formats = ", ".join(sorted({part.format for part in quantized}))
        count = sum(part.size for part in quantized)
        stored = sum_leaves(count_packed_bytes, quantized)
        lines.append(
            f"quantized factors: {len(quantized)} in {formats}, {count:,} parameters in {stored:,} "
            "bytes"
        )
    return lines + _format_problems(odd)


def _list_parts(nodes: Iterable[Any]) -> list[Any]:
    """List the values of the fields of nodes that hold arrays; a quantized one is one value."""
    return [getattr(node, name) for node in nodes for name in list_array_fields(node)]


def _describe_model(folder: Path) -> list[str]:
    """Describe a Hugging Face model, dense or quantized, by its headers only."""
    config = read_model_config(folder)
    quantization = parse_quantization(config)
    kind = "a dense model"
    if quantization is not None:
        kind = f"a model quantized by {to_printable(quantization.method)}"
    names = config.get("architectures") or config.get("model_type") or "no config.json"
    names = names if isinstance(names, list) else [names]
    with open_folder(folder) as tensors:
        entries = {key: tensors.entry(key) for key in tensors}
        files = {tensors.file(key) for key in tensors}
    lines = [
        f"{kind}: {', '.join(map(to_printable, names[:_LIST_LIMIT]))}",
        format_sizes(entries.values()),
    ]
    lines.append(f"{len(files)} file{'s' * (len(files) != 1)}")
    odd = [] if config else ["there is no config.json: transformers will not load it"]
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        odd.append(f"there are both {INDEX} and {SINGLE}; only the latter is read")
    odd += [
        f"{to_printable(p.name)}: of no file of this model"
        for p in folder.glob("*.safetensors")
        if p.name not in files
    ]
    return lines + _format_problems(odd)


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype.kind in "iub" or not array.size:
        return True
    return bool(np.isfinite(array.astype(np.float32)).all())


def _format_ranks(ranks: Mapping[tuple[int, float], int]) -> list[str]:
    total = sum(ranks.values())
    pairs = [f"{n} of rank {r}, scale {s:.6g}" for (r, s), n in sorted(ranks.items())]
    return [f"adapted weights: {total}, {'; '.join(pairs)}"] if ranks else []


def _join_names(names: list[str]) -> str:
    return _join([*map(to_printable, sorted(names))])


def _join(texts: list[str]) -> str:
    left = len(texts) - _LIST_LIMIT
    return ", ".join(texts[:_LIST_LIMIT]) + (f" and {left} more" if left > 0 else "")


def _format_problems(problems: list[str]) -> list[str]:
    left = len(problems) - _LIST_LIMIT
    more = [f"odd: {left} more"] if left > 0 else []
    return [f"odd: {problem}" for problem in problems[:_LIST_LIMIT]] + more

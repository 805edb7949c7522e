"""Describe one file of tensors, by its header: GGUF or safetensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax._display.text import to_printable
from lowrank_jax._files.gguf import open_gguf
from lowrank_jax._files.safetensors import TensorFile


def describe_gguf(path: Path) -> list[str]:
    """Describe a GGUF file: architecture, name, and the types of its tensors."""
    gguf, header = open_gguf(path)
    name = header.fields.get("general.name")
    sizes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        sizes[gguf.GGMLQuantizationType(tensor.type).name] += math.prod(tensor.shape)
    total = sum(tensor.stop - tensor.start for tensor in header.tensors.values())
    architecture = header.fields.get("general.architecture", "an unnamed architecture")
    return [
        f"a GGUF file of {to_printable(architecture)}"
        + (f": {to_printable(name)}" if name else ""),
        _format_counts(len(header.tensors), sizes, total),
    ]


def describe_safetensors(path: Path) -> list[str]:
    """Describe a safetensors file: the sizes of its tensors, and the names of the first."""
    with TensorFile(path) as file:
        entries = file.entries
    shown = [f"{to_printable(name)} {[*entry.shape]}" for name, entry in [*entries.items()][:3]]
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    lines = ["a safetensors file", format_sizes(entries.values())]
    return lines + ([f"tensors: {', '.join(shown)}{more}"] if shown else [])


def format_sizes(arrays: Iterable[Any]) -> str:
    """Format the count, dtypes and bytes of arrays, or of entries with shape and dtype."""
    sizes: Counter = Counter()  # dtype -> numbers; the names of dtypes are slow to make
    count = 0
    for array in arrays:
        sizes[array.dtype] += math.prod(array.shape)
        count += 1
    total = sum(size * dtype.itemsize for dtype, size in sizes.items())
    named = Counter({np.dtype(dtype).name: size for dtype, size in sizes.items()})
    return _format_counts(count, named, total)


def _format_counts(count: int, sizes: Counter[str], total: int) -> str:
    """Format the number of tensors, the numbers in them by type, and their bytes."""
    types = ", ".join(f"{name} {size:,}" for name, size in sizes.most_common())
    return f"{count} tensors, {sum(sizes.values()):,} numbers ({types}), {total:,} bytes"

"""tabulate: a tree of parameters, adapters or both as a table of its leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_jax._checks.arguments import check_arguments, tree_of_arrays
from lowrank_jax._display.table import (
    Table,
    TableMapping,
    collapse_rows,
    format_bytes,
    format_shape,
)
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, Full, LowRank, is_node, strip_norms
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.sizes import count_bytes, sum_leaves


@check_arguments(tree=tree_of_arrays)
def tabulate(tree: PyTree) -> Mapping[str, str]:
    """Describe each leaf of a tree: a base, an adapter, a combined tree, or any tree of arrays.

    No value is read, so that shapes (jax.eval_shape) and traced arrays are described as well.

    Args:
      tree: any pytree of arrays or jax.ShapeDtypeStruct, and of nodes.

    Returns:
      A mapping from path to how the leaf is kept: its dtype, "nf4", "LoRA r=8 s=2 on bfloat16",
      "trained whole". str() of it is a table, also of shapes and bytes, where leaves that differ
      only in a number share a row; a notebook shows it as HTML.

    Raises:
      ConfigError: tree is not a tree of arrays.
      TreeError: two leaves have the same path.

    >>> import jax, jax.numpy as jnp, lowrank_jax as lowrank
    >>> params = {f"layers_{i}": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
    ...           for i in range(4)}
    >>> config = lowrank.LoraConfig(rank=4, targets="**/kernel")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> print(tabulate(lora))
    leaf                  shape  kept as         memory
    ---------------------------------------------------
    layers_{0..3}/kernel  64×32  LoRA r=4 s=2  6.00 KiB
    >>> tabulate(lowrank.combine(base, lora))["layers_0/kernel"]
    'LoRA r=4 s=2 on float32'
    """
    leaves = flatten(tree, is_leaf=is_node)[0]
    return _Leaves({path: leaf for path, leaf in leaves if is_node(leaf) or hasattr(leaf, "shape")})


class _Leaves(TableMapping):
    """Path -> how the leaf is kept, displayed as a table."""

    def __init__(self, leaves: Mapping[str, Any]):
        super().__init__({path: _describe_leaf(leaf) for path, leaf in leaves.items()})
        self._shapes = {path: _format_shape(leaf) for path, leaf in leaves.items()}
        self._bytes = {path: sum_leaves(count_bytes, leaf) for path, leaf in leaves.items()}

    def _table(self) -> Table:
        """The table, in which leaves that differ only in a number share a row."""
        rows = [
            (path, self._shapes[path], kept, str(self._bytes[path])) for path, kept in self.items()
        ]
        summed = [
            (path, shape, kept, format_bytes(int(size) * count))
            for (path, shape, kept, size), count in collapse_rows(rows)
        ]
        columns = ("leaf", "shape", "kept as", "memory")
        return Table(columns, tuple(summed), frozenset({"memory"}))


def _describe_leaf(leaf: Any) -> str:
    """Describe how a leaf is kept."""
    leaf = strip_norms(leaf)
    if isinstance(leaf, Adapted):
        return f"{_describe_leaf(leaf.delta)} on {_describe_leaf(leaf.base)}"
    if isinstance(leaf, Full):
        return "trained whole"
    if isinstance(leaf, LowRank):
        return f"{get_label(leaf)} r={leaf.rank} s={leaf.scale:.4g}"
    return leaf.format if isinstance(leaf, Quantized) else str(leaf.dtype)


def _format_shape(leaf: Any) -> str:
    """Format a leaf's shape; adapters stacked into one node are counted before it."""
    many = leaf.stacked[: leaf.adapters] if isinstance(leaf, LowRank) else ()
    return f"{format_shape(many)} adapters" if many else format_shape(leaf.shape)

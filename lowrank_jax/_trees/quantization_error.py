"""quantization_error: measures how far quantized leaves are from the dense ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._display.table import Table, TableMapping, collapse_rows, format_shape
from lowrank_jax._errors import TreeError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.processes import gather_shards
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import has_adapter, is_node, strip_norms
from lowrank_jax._nodes.quantized import Quantized, dequantize_node
from lowrank_jax._nodes.sizes import count_bits


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    r"""The error of one quantized leaf: W is the dense leaf, W' the decoded one.

    Args:
      shape: shape of the leaf.
      format: "nf4", "fp4" or "int8".
      bits: average bits per value on this device, scales included.
      relative: $\lVert W' - W \rVert_F / \lVert W \rVert_F$.
      mean: mean of $|W' - W|$.
      largest: maximum of $|W' - W|$.

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((64, 4))}
    >>> frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w", packing="uint8"))
    >>> quantization_error(params, frozen)["w"].largest
    0.0
    """

    shape: tuple[int, ...]
    format: str
    bits: float
    relative: float
    mean: float
    largest: float


class QuantizationErrors(TableMapping):
    """A mapping of path -> QuantizationError; `str`, rich and notebooks show it as a table.

    Args:
      leaves: path -> QuantizationError.

    >>> error = QuantizationError((64, 32), "nf4", 4.5, 0.09, 0.01, 0.1)
    >>> print(QuantizationErrors({"w": error}))
    leaf  shape  kept as         relative error      mean   largest
    ---------------------------------------------------------------
    w     64×32  nf4, 4.50 bits           9.00%  1.00e-02  1.00e-01
    """

    def _table(self) -> Table:
        rows = [
            (
                path,
                format_shape(leaf.shape),
                f"{leaf.format}, {leaf.bits:.2f} bits",
                f"{100 * leaf.relative:.2f}%",
                f"{leaf.mean:.2e}",
                f"{leaf.largest:.2e}",
            )
            for path, leaf in self.items()
        ]
        columns = ("leaf", "shape", "kept as", "relative error", "mean", "largest")
        merged = tuple(row for row, _ in collapse_rows(rows))
        return Table(columns, merged, frozenset(columns[3:]))


@check_arguments()
def quantization_error(dense: PyTree, frozen: PyTree) -> QuantizationErrors:
    r"""Measure the error of each quantized leaf.

    $\lVert W' - W \rVert_F / \lVert W \rVert_F$, where W' is the decoded leaf. Leaves, and the
    layers of a stack, are compared one by one, so no second dense copy of the model is needed.

    merge returns dense weights even if the base was quantized. Quantizing them again, as in the
    example, is explicit, and this function measures its error.

    Args:
      dense: the tree that was quantized; it may hold NumPy arrays (memory-mapped ones are read one
        by one).
      frozen: the tree that quantize returned for it.

    Returns:
      A mapping of path -> QuantizationError over the quantized leaves.

    Raises:
      TreeError: the trees do not fit each other (all paths that do not are listed), frozen has no
        quantized leaf, or a tree holds adapters, or shapes instead of values.

    Source: QLoRA, arXiv 2305.14314, equation 6, for W'.

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.linspace(-1, 1, 256).reshape(64, 4), "b": jnp.ones(4)}
    >>> quant = lowrank.QuantConfig(targets="w", packing="uint8")
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), lowrank.quantize(params, quant), config)
    >>> lora = jax.tree.map(lambda factor: factor * 0 + 0.1, lora)  # it was trained
    >>> merged = lowrank.merge(base, lora)
    >>> print(quantization_error(merged, lowrank.quantize(merged, quant)))
    leaf  shape  kept as         relative error      mean   largest
    ---------------------------------------------------------------
    w     64×4   nf4, 4.38 bits           7.90%  4.00e-02  8.00e-02
    """
    wanted, leaves = (
        {path: strip_norms(leaf) for path, leaf in flatten(tree, is_leaf=is_node)[0]}
        for tree in (dense, frozen)
    )
    _check_trees(wanted, leaves)
    chosen = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Quantized)}
    return QuantizationErrors(
        {path: _measure_leaf(wanted[path], leaf) for path, leaf in chosen.items()}
    )


def _check_trees(dense: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
    """Raise TreeError if the trees cannot be compared."""
    order = "the order is (dense, frozen)"
    for name, tree, wrong in (("dense", dense, is_node), ("frozen", frozen, has_adapter)):
        if nodes := [path for path, leaf in tree.items() if wrong(leaf)]:
            what = "adapters" if has_adapter(tree[nodes[0]]) else "quantized leaves"
            raise TreeError(
                f"{name} holds {what} ({nodes[0]!r}): {order}, and lowrank.merge(base, lora) folds "
                "adapters in"
            )
    chosen = [path for path, leaf in frozen.items() if isinstance(leaf, Quantized)]
    if not chosen:
        raise TreeError(f"frozen holds no quantized leaf: {order}, frozen being what quantize made")
    problems = [f"{path}: in frozen, not in dense" for path in frozen if path not in dense]
    problems += [f"{path}: in dense, not in frozen" for path in dense if path not in frozen]
    problems += [
        f"{path}: {format_shape(frozen[path].shape)} in frozen, {format_shape(shape)} in dense"
        for path in chosen
        if path in dense and (shape := jnp.shape(dense[path])) != frozen[path].shape
    ]
    if problems:
        raise TreeError(
            "frozen was not made from this dense tree: pass the one that quantize took:\n"
            + list_problems(problems)
        )
    arrays = [(path, tree[path]) for tree in (dense, frozen) for path in chosen]
    unknown = lambda leaf: jaxprs.is_tracer(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    if abstract := [path for path, leaf in arrays if any(map(unknown, jax.tree.leaves(leaf)))]:
        raise TreeError(
            f"{abstract[0]!r} has no values here (a shape, or traced by jit): quantization_error "
            "takes arrays, outside jit"
        )


def _measure_leaf(dense: jax.Array | np.ndarray, node: Quantized) -> QuantizationError:
    """Measure one leaf, layer by layer; the sums of rows are added in float64 on the host."""
    squares = norm = total = largest = 0.0
    for index in np.ndindex(node.shape[: node.stacked]):
        layer = jax.tree.map(lambda array, index=index: array[index], node)
        *sums, most = (
            np.asarray(gather_shards(part), np.float64) for part in _compare(dense[index], layer)
        )
        squares, norm, total = np.add((squares, norm, total), [part.sum() for part in sums])
        largest = np.maximum(largest, most)
    relative = math.sqrt(squares / norm) if norm else math.inf if squares else 0.0
    return QuantizationError(
        node.shape,
        node.format,
        count_bits(node),
        relative,
        float(total) / max(1, node.size),
        float(largest),
    )


@jax.jit
def _compare(dense: jax.Array, node: Quantized) -> tuple[jax.Array, ...]:
    """Return squared error, squared weight and error, each summed over rows, and the largest error.

    dense: [*fan_in, o]; the three sums lack its last axis, the largest error is a scalar.
    """
    weight = dense.astype(jnp.float32)
    error = jnp.abs(dequantize_node(node).astype(jnp.float32) - weight)
    largest = error.max(initial=0)
    # XLA's vectorized maximum on CPU drops NaN, sums do not
    largest = jnp.where(jnp.isnan(error).any(), jnp.nan, largest)
    return (*(part.sum(-1) for part in (error**2, weight**2, error)), largest)

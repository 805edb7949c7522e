"""Build Full and Rows nodes from the tensors of a PEFT file that replace a leaf or its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.torch_layout import TorchLayout
from lowrank_jax._nodes import Full, as_dense
from lowrank_jax._nodes.family import Rows
from lowrank_jax._nodes.full import make_full
from lowrank_jax._trees.fingerprint import to_numpy
from lowrank_jax.peft._matching import Matching, Place
from lowrank_jax.peft._tensors import TOKENS

Index = tuple[int, ...]


def match_whole(matching: Matching, place: Place) -> Callable[[], Full] | None:
    """Return a function that builds the node of a leaf saved whole, or None if there is none."""
    kind = place.name.kind
    keys: dict[Index, str] = {}
    folds: dict[Index, tuple[str, float]] = {}
    for index, module in place.modules.items():
        for part in (kind, f"base_layer.{kind}"):
            if key := matching.take(module, part):
                keys[index] = key
        if kind == "bias" and module in matching.folds:
            folds[index] = matching.folds.pop(module)
    if not keys and not folds:
        return None
    try:
        layout = place.torch_layout()
    except CheckpointError as error:
        return matching.reject(place, str(error))
    found = [*keys.values(), *(key for key, _ in folds.values())]
    fit = [_check_leaf_tensor(matching, place, layout, key) for key in found]
    if not all(fit):
        return None
    saved = kind != "weight" or any(map(matching.config.is_saved_whole, place.modules.values()))
    if not saved and all(matching.is_base_copy(place, layout, key) for key in found):
        return None  # frozen copies, as written by save_embedding_layers
    if folds and jnp.dtype(place.leaf.dtype).itemsize < 4:
        matching.problems.append(
            f"{place.path!r} is {place.leaf.dtype}, to which lora_bias would be rounded: cast the "
            "leaf to float32"
        )
    elif (folds or len(keys) < len(place.modules)) and not place.has_values:
        matching.problems.append(_describe_partial(place))
    if keys and (other := matching.find_tied(place, layout)):
        copy = matching.take(other, "weight")
        if copy is None:
            matching.check_tied_projection(place, other)
        elif not matching.is_equal(copy, keys[()], transposed=False):
            matching.problems.append(
                f"{copy}: differs from {keys[()]}, but {place.path!r} is one leaf"
            )
    return lambda: _build_full(matching, place, layout, keys, folds)


def _describe_partial(place: Place) -> str:
    """Describe a change of part of a leaf whose other values are not available."""
    return (
        f"{place.path!r}: the file changes a part of it, but params hold no values for the rest "
        f"({type(place.leaf).__name__}); pass dense weights"
    )


def _check_leaf_tensor(matching: Matching, place: Place, layout: TorchLayout, key: str) -> bool:
    """Whether a tensor has the leaf's shape; a bias [heads, dim] may be [heads * dim] in torch."""
    flat = (math.prod(layout.weight_shape),)
    is_flat = layout.kind == "vector" and matching.shape(key) == flat
    return matching.check_tensor(place.path, key, flat if is_flat else layout.weight_shape)


def _build_full(
    matching: Matching,
    place: Place,
    layout: TorchLayout,
    keys: Mapping[Index, str],
    folds: Mapping[Index, tuple[str, float]],
) -> Full:
    """Build a Full node of the file's values; layers that the file lacks keep the leaf's."""
    shape, dtype = layout.weight_shape, jax.dtypes.canonicalize_dtype(place.leaf.dtype)
    # weights [*stack, *torch's shape] is filled by layer. For a bias leaf [2, 3] of two layers, of
    # which the file changes layer 1: weights starts as the leaf, then weights[(1,)] becomes the
    # file's [3], or has scale * lora_B.bias added. from_weights restores the leaf's axis order.
    trained = jnp.promote_types(dtype, jnp.float32)
    if len(keys) < len(place.modules) or folds:
        weights = layout.to_weights(to_numpy(place.path, place.leaf)).astype(trained)
    else:
        weights = np.empty((*layout.get_sizes(layout.stack), *shape), trained)
    for index, key in keys.items():
        weights[index] = matching.read(key).reshape(shape)
    for index, (key, scale) in folds.items():
        change = matching.read(key).astype(weights.dtype).reshape(shape)
        weights[index] += weights.dtype.type(scale) * change
    return make_full(jnp.array(layout.from_weights(weights)), dtype)


def match_tokens(matching: Matching, place: Place) -> Callable[[], Rows] | None:
    """Return a function that builds the node of a table with trained rows, or None."""
    module = place.modules.get(())
    key = None if module is None else matching.take(module, TOKENS)
    rows = None if module is None else matching.config.token_rows(module)
    if key is None or rows is None:
        return matching.reject(
            place,
            f"{place.path!r}: trainable tokens that trainable_token_indices does not list",
        )
    size, *rest = place.leaf.shape
    if max(rows, default=0) >= size or len(set(rows)) < len(rows):
        return matching.reject(
            place,
            f"{place.path!r}: trainable_token_indices has duplicate rows, or rows above {size - 1}",
        )
    if isinstance(place.leaf, jax.ShapeDtypeStruct):
        return matching.reject(place, _describe_partial(place))
    if not matching.check_tensor(place.path, key, (len(rows), *rest)):
        return None
    return lambda: _build_rows(matching, place, key, rows)


def _build_rows(matching: Matching, place: Place, key: str, rows: list[int]) -> Rows:
    """Build a Rows node of the difference between the file's rows and the table's."""
    # rows [7, 2]: order [1, 0], ascending (2, 7). The file's rows [2, d] are put in that order, and
    # b [2, d] = file - table[[2, 7]], in float32.
    order = np.argsort(rows)
    ascending = tuple(rows[i] for i in order)
    base = to_numpy(place.path, as_dense(place.leaf)[jnp.asarray(ascending)])
    change = matching.read(key)[order].astype(np.float32) - base.astype(np.float32)
    fan_out = tuple(range(1, place.leaf.ndim))
    axes = {"fan_in": (0,), "fan_out": fan_out, "kind": "lookup"}
    size = place.leaf.shape[0]
    return Rows(b=jnp.asarray(change), **axes, rows=ascending, size=size)

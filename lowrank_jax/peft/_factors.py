"""Build LowRank nodes from the factors of a PEFT file; a stacked leaf takes those of all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.torch_layout import TorchLayout
from lowrank_jax._nodes import LowRank
from lowrank_jax.peft._matching import Matching, Place
from lowrank_jax.peft._tensors import MAGNITUDE, PREFIX

Keys = tuple[str, str, str | None]  # of A, B and magnitude


def match_factors(matching: Matching, place: Place) -> Callable[[], LowRank] | None:
    """Return a function that builds the node of a leaf, or None after noting the problems."""
    try:
        layout = place.torch_layout()
    except CheckpointError as error:
        return matching.reject(place, str(error))
    if layout.kind == "vector":
        return matching.reject(place, f"{place.path!r}: factors for a leaf that is not a matrix")
    before = len(matching.problems)
    keys, scales = {}, {}
    adapted = {i: module for i, module in place.modules.items() if matching.has_factors(module)}
    for index, module in adapted.items():
        if taken := _take_module(matching, place, layout, module):
            keys[index], scales[index] = taken
    if len(matching.problems) == before and (other := matching.find_tied(place, layout)):
        _take_tied(matching, place, layout, other, keys[()], scales[()])
    if matching.config["use_dora"] and len(adapted) < len(place.modules):
        matching.problems.append(
            f"{place.path!r}: DoRA on only some layers of a stack; load it onto params whose "
            "layers are not stacked"
        )
    if len(matching.problems) > before:
        return None
    kind = place.use.op if place.use is not None and place.use.fan_in else layout.kind
    return lambda: _build_node(matching, layout, kind, keys, scales)


def _take_module(
    matching: Matching, place: Place, layout: TorchLayout, module: str
) -> tuple[Keys, float] | None:
    """Take the keys of one module's factors; return them with its scale."""
    first, second = layout.factor_shapes(1)
    wanted = [first, second]
    wanted += [MAGNITUDE] if matching.config["use_dora"] else []
    wanted += ["lora_B.bias"] if matching.config["lora_bias"] and first == "lora_A.weight" else []
    keys = {part: matching.take(module, part) for part in wanted}
    missing = [part for part, key in keys.items() if key is None]
    matching.problems += [f"{PREFIX}{module}.{part}: missing" for part in missing]
    matching.take_base(place, layout, module)
    a, b, magnitude = keys[first], keys[second], keys.get(MAGNITUDE)
    if missing or a is None or b is None:
        return None
    shape = matching.shape(a)
    rank, expected = (shape[0] if shape else 0), matching.config.rank(module)
    if rank != expected:
        matching.problems.append(
            f"{a}: shape {list(shape)}, expected rank {expected}, as {'r'!r} or rank_pattern says"
        )
        return None
    if layout.kind == "conv" and matching.shape(b)[1:2] not in ((rank,), ()):
        matching.problems.append(
            f"{b}: shape {list(matching.shape(b))} belongs to a grouped convolution, where PEFT's "
            "adapter is not equivalent to a change of the kernel"
        )
        return None
    shapes = layout.factor_shapes(rank)
    fit = [
        matching.check_tensor(place.path, a, shapes[first]),
        matching.check_tensor(place.path, b, shapes[second]),
    ]
    if magnitude is not None:
        fit.append(matching.check_tensor(place.path, magnitude, layout.magnitude_shape))
    scale = matching.config.scale(module, rank)
    if (key := keys.get("lora_B.bias")) is not None:
        matching.folds[module] = key, scale
    return ((a, b, magnitude), scale) if all(fit) else None


def _take_tied(
    matching: Matching, place: Place, layout: TorchLayout, other: str, keys: Keys, scale: float
) -> None:
    """Take the factors of the projection tied to a table; they must be the table's, transposed."""
    a, b, magnitude = keys
    first, second = (matching.take(other, f"lora_{x}.weight") for x in "AB")
    matching.take_base(place, layout, other)
    if magnitude is not None:
        matching.problems.append(
            f"{magnitude}: DoRA on a table that is also a projection: PEFT normalizes the two over "
            "different axes"
        )
    elif first is None or second is None:
        matching.check_tied_projection(place, other)
    elif not (
        matching.is_equal(first, b, transposed=True)
        and matching.is_equal(second, a, transposed=True)
        and matching.config.scale(other, matching.shape(first)[0]) == scale
    ):
        matching.problems.append(f"{first}: differs from {a}, but {place.path!r} is one leaf")


def _build_node(
    matching: Matching,
    layout: TorchLayout,
    kind: str,
    keys: Mapping[tuple[int, ...], Keys],
    scales: Mapping[tuple[int, ...], float],
) -> LowRank:
    """Read and stack the factors; pad ranks with zeros, and fold differing scales into b.

    The node has NumPy arrays: `load` moves those of several nodes to the device in one call.
    """
    # Two layers of [4, 3], layer 0 with rank 2 and scale 1, layer 1 with rank 1 and scale 2:
    #   scale = 2, rank = 2
    #   a [2, 4, 2]    a[0] = a0, a[1] = [a1, 0]
    #   b [2, 2, 3]    b[0] = b0 * (1 / 2), b[1] = [b1; 0]
    # so that scale * a[l] @ b[l] is the product of each layer. A layer without factors has zeros.
    read = matching.read
    factors = {i: layout.from_factors(read(a), read(b)) for i, (a, b, _) in keys.items()}
    rank = max(a.shape[-1] for a, _ in factors.values())
    scale = max(scales.values())
    sizes, fan_out = layout.get_sizes(layout.stack), layout.get_sizes(layout.fan_out)
    dtypes = [_promote_dtypes({f[i].dtype for f in factors.values()}) for i in (0, 1)]
    a = np.zeros((*sizes, *layout.get_sizes(layout.fan_in), rank), dtypes[0])
    b = np.zeros((*sizes, rank, *fan_out), dtypes[1])
    for index, (part_a, part_b) in factors.items():
        r, ratio = part_a.shape[-1], b.dtype.type(scales[index] / scale)
        a[index][..., :r] = part_a
        b[index][:r] = part_b if ratio == 1 else part_b * ratio
    magnitude = None
    if magnitudes := [read(key) for *_, key in keys.values() if key is not None]:
        magnitude = np.stack(magnitudes).reshape(*sizes, *fan_out)
    axes = layout.fan_in, layout.fan_out, layout.stack
    return LowRank(a, b, magnitude, *axes, scale, kind)


def _promote_dtypes(dtypes: set[np.dtype]) -> np.dtype:
    """Promote dtypes to a common one; float64 becomes float32, unless jax_enable_x64 is set."""
    if len(dtypes) == 1:  # result_type does the same, but takes longer
        return jax.dtypes.canonicalize_dtype(dtypes.pop())
    return jnp.result_type(*dtypes)

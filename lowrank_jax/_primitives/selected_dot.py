r"""The selected_dot primitive: a product with one entry of a stack of factors, chosen by an index.

$z[\text{out}] = \sum x[\cdot]\,y_k[\cdot]$ with $y_k$ the entry k of a table of n factors. It is a
primitive so that jax.vmap over k, with one table for all examples, need not gather a copy of a
factor for each example. Its lowering rules count multiplications and memory traffic, and take the
cheapest of equal forms. All are of one meaning: an entry that is not finite makes the results of
its own examples not finite, and no others; an index that is not in the table gives NaN.

Another form sorts the rows of x by entry, for lax.ragged_dot. It is not among them: compiled for an
H100, bfloat16, fan-in and fan-out 4096, rank 16, 64 entries and 4096 rows, XLA repeats x for each
entry, in 2.0 GiB of temporaries, against 0.02 GiB of the masks and none of the gather, which it
fuses; as it does on CPU. For a v5e the masks access 0.30 GB, the sorted rows 0.82 GB, the gather
11.0 GB; sorting would pay from about 200 entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from lowrank_jax._jax.jaxprs import Primitive, ShapedArray, has_no_mesh
from lowrank_jax._primitives.bilinear import DotOptions, Labels, bilinear, product_dtype

ENTRY = "entry"  # labels the axis of a table that enumerates its factors

# Multiplications in the time in which one number is read from memory or written to it.
BALANCE = {"cpu": 24, "other": 128}


def selected_dot(
    x: jax.Array,
    table: jax.Array,
    index: jax.Array,
    xl: Labels,
    yl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> Any:
    """Multiply x and one entry of a table, and sum the labels that are not in out.

    Args:
      x: array.
      table: array; entry k is its slice k along the axis labeled ENTRY.
      index: k, integer []. Under jax.vmap each example has its own.
      xl: labels of the axes of x.
      yl: labels of the axes of table, ENTRY among them.
      out: labels of the result.
      options: of lax.dot_general.

    >>> x, table = jnp.ones((3, 4)), jnp.ones((5, 4, 2))
    >>> selected_dot(x, table, 1, ("x", "in"), (ENTRY, "in", "r"), ("x", "r")).shape
    (3, 2)
    """
    params: dict[str, Any] = {"xl": xl, "yl": yl, "il": (), "out": out, **_OPTIONS, **options}
    index = jnp.asarray(index)
    if all(map(has_no_mesh, (x, table, index))):
        return selected_dot_p.bind(x, table, index, **params)
    return _gather(x, table, index, **params)


_OPTIONS: dict[str, Any] = {"precision": None, "preferred_element_type": None}


def choose_form(
    xl: Labels, yl: Labels, il: Labels, out: Labels, sizes: dict[Any, int], balance: float
) -> str:
    """Choose the cheapest form of a product: "gather", "mask_input" or "mask_output".

    The count is in multiplications; one number read or written counts as `balance` of them. With m
    multiplications in all, E examples, n factors of f numbers each:

    - gather: m; it writes, and reads, a factor for each example: 3 E f.
    - mask_input: m n, for x is repeated n times, with zeros but at the entry of each example. It
      writes and reads n |x|, and a table without its values that are not finite: 3 n f.
    - mask_output: m n, for x is multiplied by all factors. It writes and reads n |out|, and n f.

    Args:
      xl: labels of x.
      yl: labels of the table.
      il: labels of the index.
      out: labels of the result.
      sizes: the size along each label.
      balance: multiplications in the time of one number read or written.

    >>> sizes = {"e": 64, "t": 1, "in": 512, "r": 16, ENTRY: 8}
    >>> labels = ("e", "t", "in"), (ENTRY, "in", "r"), ("e",), ("e", "t", "r")
    >>> choose_form(*labels, sizes, balance=8)
    'mask_output'
    >>> choose_form(*labels, sizes | {"t": 1024}, balance=8)  # many tokens for each copy
    'gather'
    """
    # Masks compare one index with each row of x and of the result; without that, gather.
    if not il or not {*il} <= {*xl} & {*out} or {*il} & {*yl}:
        return "gather"
    count = lambda labels: math.prod(sizes[label] for label in labels)
    n = sizes[ENTRY]
    factor, multiplies = count(yl) // max(1, n), count({*xl, *yl} - {ENTRY})
    costs = {
        "gather": multiplies + balance * 3 * count(il) * factor,
        "mask_input": multiplies * n + balance * n * (2 * count(xl) + 3 * factor),
        "mask_output": multiplies * n + balance * n * (2 * count(out) + factor),
    }
    return min(costs, key=costs.__getitem__)


def _measure(xl: Labels, x: Any, yl: Labels, table: Any, il: Labels, index: Any) -> dict[Any, int]:
    """Return the size along each label of three arrays."""
    pairs = [(xl, x), (yl, table), (il, index)]
    return {name: size for own, z in pairs for name, size in zip(own, z.shape, strict=True)}


# The forms: (x, table, index, labels, options) -> result


def _gather(
    x: jax.Array,
    table: jax.Array,
    index: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    il: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> jax.Array:
    """Gather the entry of each example, then multiply."""
    y, labels = take_entries(table, yl, index, il)
    return bilinear(x, y, xl, labels, out, **options)


def take_entries(
    table: jax.Array, yl: Labels, index: jax.Array, il: Labels = ()
) -> tuple[jax.Array, Labels]:
    """Return the entries of a table at an index of labels il, NaN outside, and their labels."""
    labels = _label_entries(yl, il)
    if shared := [label for label in il if label in yl]:
        inner = _drop(yl, shared[0]), _drop(il, shared[0])
        one = lambda table, index: take_entries(table, inner[0], index, inner[1])[0]
        return jax.vmap(one, (yl.index(shared[0]), il.index(shared[0])))(table, index), labels
    count = table.shape[yl.index(ENTRY)]
    # JAX counts a negative index from the end: make it one beyond the end
    index = index.astype(jnp.promote_types(index.dtype, jnp.int32))
    index = jnp.where(index < 0, count, index)
    front = jnp.moveaxis(table, yl.index(ENTRY), 0)
    return front.at[index].get(mode="fill", fill_value=jnp.nan), labels


def _label_entries(yl: Labels, il: Labels) -> Labels:
    """Return the labels of the entries of a table: first those that index and table share."""
    shared = [label for label in il if label in yl]
    rest = [label for label in il if label not in yl]
    return (*shared, *rest, *(label for label in yl if label not in (*il, ENTRY)))


def _mask_input(
    x: jax.Array,
    table: jax.Array,
    index: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    il: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> jax.Array:
    """Multiply x, zero but at the entry of each example, by all entries at once."""
    # x [e, t, r], table [n, r, o], index [e]: x becomes [e, t, n, r], zero for all n but index[e],
    # and one product sums over n and r. Zeros times NaN would be NaN: the table is cleaned first.
    finite = jnp.isfinite(table)
    clean = jnp.where(finite, table, 0)
    wide, labels = _spread(x, xl, index, il, table.shape[yl.index(ENTRY)])
    z = bilinear(wide, clean, labels, yl, out, **options)
    at = yl.index(ENTRY)
    sound = finite.all([axis for axis in range(table.ndim) if axis != at])
    mask = _compare(index, table.shape[at])
    return _mark(z, (mask & sound).any(-1), il, out)


def _mask_output(
    x: jax.Array,
    table: jax.Array,
    index: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    il: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> jax.Array:
    """Multiply x by all entries at once, and keep the result of each example's own."""
    # x [e, t, i], table [n, i, r], index [e]: the product is [e, t, n, r], of which a sum over n
    # keeps the entry index[e]; all others are zeros.
    count, at = table.shape[yl.index(ENTRY)], out.index(il[0])
    labels = (*out[: at + 1], ENTRY, *out[at + 1 :])
    every = bilinear(x, table, xl, yl, labels, **options)
    mask = _compare(index, count)
    kept = jnp.where(_align(mask, (*il, ENTRY), labels), every, 0)
    return _mark(kept.sum(at + 1, dtype=every.dtype), mask.any(-1), il, out)


_FORMS: dict[str, Callable[..., jax.Array]] = {
    "gather": _gather,
    "mask_input": _mask_input,
    "mask_output": _mask_output,
}


def _drop(labels: Labels, gone: Any) -> Labels:
    """Return the labels without one."""
    return tuple(label for label in labels if label != gone)


def _compare(index: jax.Array, count: int) -> jax.Array:
    """Return bool [*index.shape, count], True at the entry that each index is of."""
    index = index.astype(jnp.promote_types(index.dtype, jnp.int32))
    return index[..., None] == jnp.arange(count, dtype=index.dtype)


def _align(array: jax.Array, labels: Labels, out: Labels) -> jax.Array:
    """Transpose an array to the order of out, with axes of size 1 for the labels that it lacks."""
    own = [label for label in out if label in labels]
    array = lax.transpose(array, [labels.index(label) for label in own])
    return jnp.expand_dims(array, [i for i, label in enumerate(out) if label not in labels])


def _spread(
    x: jax.Array, xl: Labels, index: jax.Array, il: Labels, count: int
) -> tuple[jax.Array, Labels]:
    """Repeat x along a new axis ENTRY, zero but at each example's entry; return it and labels."""
    at = xl.index(il[0]) + 1
    # after all but the last label, so that a sum over ENTRY and the last is one of adjacent axes
    at = max(at, len(xl) - 1)
    labels = (*xl[:at], ENTRY, *xl[at:])
    mask = _align(_compare(index, count), (*il, ENTRY), labels)
    return jnp.where(mask, jnp.expand_dims(x, at), jnp.zeros((), x.dtype)), labels


def _mark(z: jax.Array, sound: jax.Array, il: Labels, out: Labels) -> jax.Array:
    """Replace the results of examples that are not sound by NaN."""
    return jnp.where(_align(sound, il, out), z, jnp.nan).astype(z.dtype)


# The primitive


def _lower(
    x: jax.Array, table: jax.Array, index: jax.Array, *, balance: float, **params: Any
) -> jax.Array:
    """Compute the product in the form that is cheapest for these shapes."""
    labels = params["xl"], params["yl"], params["il"]
    sizes = _measure(params["xl"], x, params["yl"], table, params["il"], index)
    form = choose_form(*labels, params["out"], sizes, balance)
    return _FORMS[form](x, table, index, **params)


def _abstract_eval(
    x: ShapedArray,
    table: ShapedArray,
    index: ShapedArray,
    *,
    xl: Labels,
    yl: Labels,
    il: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> ShapedArray:
    """Abstract evaluation: the shape and dtype of the product."""
    sizes = _measure(xl, x, yl, table, il, index)
    dtype = options.get("preferred_element_type") or product_dtype(x.dtype, table.dtype)
    return ShapedArray(tuple(sizes[label] for label in out), jnp.dtype(dtype))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """JVP rule: linear in x, and in the table."""
    x, table, index = primals
    out = selected_dot_p.bind(x, table, index, **params)
    parts = []
    if type(tangents[0]) is not ad.Zero:
        parts.append(selected_dot_p.bind(tangents[0], table, index, **params))
    if type(tangents[1]) is not ad.Zero:
        parts.append(selected_dot_p.bind(x, tangents[1], index, **params))
    return out, functools.reduce(jnp.add, parts)


def _transpose(
    ct: Any,
    x: Any,
    table: Any,
    index: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    il: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> list[Any]:
    """Transpose rule: for x the primitive with its labels exchanged; for the table a sum."""
    if type(ct) is ad.Zero:
        return [None, None, None]
    back: Any = {**options, "preferred_element_type": None}
    if ad.is_undefined_primal(x):
        value = selected_dot_p.bind(ct, table, index, xl=out, yl=yl, il=il, out=xl, **back)
        return [value.astype(x.aval.dtype), None, None]
    aval = table.aval
    labels = {"xl": xl, "yl": yl, "il": il, "out": out}
    return [None, _transpose_table(ct, x, aval, index, **labels, **back).astype(aval.dtype), None]


def _transpose_table(
    ct: jax.Array,
    x: jax.Array,
    aval: ShapedArray,
    index: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    il: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> jax.Array:
    """Return the table's cotangent: of each entry, the sum over its examples of x times ct.

    The sum over examples is of float32 or wider: one of bfloat16 stays at 256 times its terms.
    """
    labels = _label_entries(yl, il)
    options["preferred_element_type"] = jnp.promote_types(
        product_dtype(x.dtype, ct.dtype), jnp.float32
    )
    each = bilinear(x, ct, xl, out, labels, **options)
    take = lambda table: take_entries(table, yl, index, il)[0]
    return jax.linear_transpose(take, jax.ShapeDtypeStruct(aval.shape, each.dtype))(each)[0]


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], **params: Any) -> tuple[jax.Array, int]:
    """Batching rule: the mapped axis becomes one more label, as in the bilinear primitive."""
    name = ("vmapped", params["out"])
    for labels, dim in zip(("xl", "yl", "il"), dims, strict=True):
        if dim is not None:
            params[labels] = (*params[labels][:dim], name, *params[labels][dim:])
    params["out"] = (name, *params["out"])
    return selected_dot_p.bind(*args, **params), 0


selected_dot_p = Primitive("lowrank_selected_dot")
selected_dot_p.def_abstract_eval(_abstract_eval)


def _lower_for(platform: str) -> Callable[..., jax.Array]:
    """Return the lowering for a platform, "cpu" or "other"."""
    return functools.partial(_lower, balance=BALANCE[platform])


_STATIC = ("xl", "yl", "il", "out", *_OPTIONS)
selected_dot_p.def_impl(jax.jit(_lower_for("other"), static_argnames=_STATIC))
ad.primitive_jvps[selected_dot_p] = _jvp
ad.primitive_transposes[selected_dot_p] = _transpose
batching.primitive_batchers[selected_dot_p] = _batch
mlir.register_lowering(selected_dot_p, mlir.lower_fun(_lower_for("other"), multiple_results=False))
mlir.register_lowering(
    selected_dot_p, mlir.lower_fun(_lower_for("cpu"), multiple_results=False), platform="cpu"
)

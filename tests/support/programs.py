"""Random programs that lead a weight through structural operations to a product.

`program(seed)` is a leaf with an adapter, quantized or not, and a function of it: a chain of
operations in random nestings of loops, branches and transformations, ended by a product, a
convolution or a look-up. The same seed makes the same program. Sizes are few, so that axes
coincide.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import lowrank_jax as lowrank
from lowrank_jax._nodes.family import LoHa
from lowrank_jax._nodes.host import quantize_on_host
from lowrank_jax._trees.quantize import eval_quantized_shapes

SIZES = (2, 2, 3, 4, 4, 4)
KINDS = ("lora", "lora", "dora", "loha", "rows", "scaled")
FORMATS = {
    "nf4": {"format": "nf4", "double_quant": False},
    "uint8": {"format": "nf4", "packing": "uint8", "double_quant": False},
    "int8": {"format": "int8", "double_quant": False},
    "double": {"format": "nf4", "double_quant": True},
}
# Part of a program: (weight, s) -> array, s being a traced scalar of value 1 and index 1.
Fn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass
class Program:
    """One random program.

    Args:
      seed: that makes it.
      text: the steps, for messages.
      fn: ({"w": weight, maybe "v": another, joined to it}, s) -> array.
      base, lora: the frozen leaves, and their adapters or None.
      scale: of combine and merge.
      reverse: whether it has a reverse-mode derivative.
      coarse: whether the weight is rounded to bfloat16 on the way.
    """

    seed: int
    text: str
    fn: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    base: Any
    lora: Any
    scale: float
    reverse: bool
    coarse: bool


class Writer:
    """Draws one program; what it has written so far is in `text`."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.text: list[str] = []
        self.reverse, self.coarse = True, False
        self.inside: list[str] = []  # what the program is nested in here

    def say(self, *words: Any) -> None:
        self.text.append(" ".join(map(str, words)))

    def axis(self, shape: Any) -> int:
        return self.rng.randrange(len(shape))

    def numbers(self, *shape: int) -> np.ndarray:
        """Eighths between -1 and 1: products of few of them are exact in float32."""
        size = math.prod(shape)
        values = [self.rng.randint(-8, 8) / 8 for _ in range(size)]
        return np.array(values, np.float32).reshape(shape)

    # Programs: each takes the weight's shape and returns a function of (w, s).

    def program(self, shape: tuple[int, ...], steps: int, depth: int) -> Fn:
        if steps and depth and len(shape) > 1 and self.rng.random() < 0.3:
            return self.nest(shape, steps, depth)
        if steps:
            step, shape = self.step(shape)
            rest = self.program(shape, steps - 1, depth)
            return lambda w, s: rest(step(w, s), s)
        if depth and len(shape) > 2 and self.rng.random() < 0.3:
            return self.nest(shape, 0, depth)
        return self.end(shape)

    def nest(self, shape: tuple[int, ...], steps: int, depth: int) -> Fn:
        kinds = ["jit", "remat", "cond", "fori", "while"]
        kinds += [] if {"shard_map", "vmap"} & {*self.inside} else ["shard_map"]
        kinds += ["scan", "scan", "vmap", "carry", "map"] if len(shape) > 1 else []
        kind = self.rng.choice(kinds)
        axis = self.axis(shape)
        below = shape[:axis] + shape[axis + 1 :]
        if kind in ("scan", "vmap", "map"):
            self.say(kind, "over", axis)
            rest = self.within(kind, below, steps, depth)
            if kind == "vmap":
                return lambda w, s: jax.vmap(lambda w: rest(w, s), in_axes=axis)(w)
            if kind == "map":
                return lambda w, s: lax.map(lambda w: rest(w, s), jnp.moveaxis(w, axis, 0))

            def scan(w: Any, s: Any) -> Any:
                step = lambda s, w: (s, rest(w, s))
                return lax.scan(step, s, jnp.moveaxis(w, axis, 0), reverse=axis == 1)[1]

            return scan
        self.say(kind)
        rest = self.within(kind, shape, steps, depth)
        if kind == "jit":
            return lambda w, s: jax.jit(rest)(w, s)
        if kind == "remat":
            return lambda w, s: jax.checkpoint(rest)(w, s)
        if kind == "cond":
            return lambda w, s: lax.cond(s > 0, lambda w: rest(w, s), lambda w: -rest(w, s), w)
        if kind == "shard_map":
            mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
            specs = {"in_specs": (P(), P()), "out_specs": P()}
            return lambda w, s: jax.shard_map(rest, mesh=mesh, **specs)(w, s)
        if kind == "carry":  # the weight is carried by a loop that leaves it as it is

            def carry(w: Any, s: Any) -> Any:
                step = lambda carry, _: ((carry[0], carry[1]), rest(carry[0], carry[1]))
                return lax.scan(step, (w, s), None, length=2)[1].sum(0)

            return carry
        if kind == "while":
            self.reverse = False
            turn = lambda w, s: lambda state: (state[0] + 1, state[1] + rest(w, s))
            again = lambda state: state[0] < 2
        else:
            turn = lambda w, s: lambda i, total: total + rest(w, s)

        def loop(w: Any, s: Any) -> Any:
            start = jnp.zeros(jax.eval_shape(rest, w, s).shape)
            if kind == "while":
                return lax.while_loop(again, turn(w, s), (0, start))[1]
            return lax.fori_loop(0, 2, turn(w, s), start)

        return loop

    def within(self, kind: str, shape: tuple[int, ...], steps: int, depth: int) -> Fn:
        self.inside.append(kind)
        self.say("(")
        rest = self.program(shape, steps, depth - 1)
        self.say(")")
        self.inside.pop()
        return rest

    def step(self, shape: tuple[int, ...]) -> tuple[Fn, tuple[int, ...]]:
        """One operation, and the shape that it leaves."""
        while True:
            name = self.rng.choice(sorted(STEPS))
            fn = STEPS[name](self, shape)
            if fn is None:
                continue
            out = jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32), _S).shape
            if math.prod(out) and math.prod(out) <= 512 and 1 <= len(out) <= 5:
                self.say(name.removesuffix("2"), *shape, "->", *out, ";")
                return fn, out

    def end(self, shape: tuple[int, ...]) -> Fn:
        """A product, or what else ends a program."""
        names = ["dot"] * 5 + ["lookup", "elementwise", "whole"] + ["conv"] * (len(shape) > 2)
        names += ["ragged"] * (len(shape) == 3 and "vmap" not in self.inside)
        names += ["ragged_fan_in"] * (len(shape) == 2 and "vmap" not in self.inside)
        name = self.rng.choice(names)
        self.say(name, *shape)
        return getattr(self, name)(shape)

    def dot(self, shape: tuple[int, ...]) -> Fn:
        axes = [*range(len(shape))]
        self.rng.shuffle(axes)
        contracted = axes[: self.rng.randint(1, len(axes))]
        batch = [axis for axis in axes[len(contracted) :] if self.rng.random() < 0.3]
        free = [3] * self.rng.randint(0, 1)
        places = [*(shape[axis] for axis in contracted + batch), *free]
        order = [*range(len(places))]
        self.rng.shuffle(order)
        x = self.numbers(*(places[i] for i in order))
        at = lambda wanted: tuple(order.index(i) for i in wanted)
        mine = tuple(contracted), tuple(batch)
        theirs = at(range(len(contracted))), at(range(len(contracted), len(contracted + batch)))
        left = self.rng.random() < 0.5
        self.say("contracting", *contracted, "batch", *batch, "left" if left else "right")
        sides = (mine, theirs) if left else (theirs, mine)
        numbers = tuple(zip(*sides, strict=True))

        def product(w: Any, s: Any) -> Any:
            pair = (w, x * s) if left else (x * s, w)
            return lax.dot_general(*pair, numbers, preferred_element_type=jnp.float32)

        return product

    def ragged(self, shape: tuple[int, ...]) -> Fn:
        groups, fan_in, _ = shape
        x = self.numbers(5, fan_in)
        sizes = jnp.array([5 - (groups - 1), *(1 for _ in range(groups - 1))], jnp.int32)
        return lambda w, s: lax.ragged_dot(x * s, w.astype(jnp.float32), sizes)

    def ragged_fan_in(self, shape: tuple[int, ...]) -> Fn:
        """The groups are of the contracted axis, and the result has an axis of them."""
        fan_in, _ = shape
        self.reverse = False  # JAX has no transpose of it
        x, sizes = self.numbers(3, fan_in), jnp.array([1, fan_in - 1], jnp.int32)
        numbers = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ())
        return lambda w, s: lax.ragged_dot_general(x * s, w.astype(jnp.float32), sizes, numbers)

    def conv(self, shape: tuple[int, ...]) -> Fn:
        axes = [*range(len(shape))]
        self.rng.shuffle(axes)
        out_axis, in_axis, *window = axes
        n = len(window)
        groups = self.rng.choice([1, 1, shape[out_axis], 2])
        groups = groups if shape[out_axis] % groups == 0 else 1
        x = self.numbers(2, shape[in_axis] * groups, *(4 for _ in window))
        plain = tuple(range(n + 2))
        numbers = lax.ConvDimensionNumbers(plain, (out_axis, in_axis, *window), plain)
        options = {"window_strides": (1,) * n, "padding": "SAME", "feature_group_count": groups}
        self.say("groups", groups)
        return lambda w, s: lax.conv_general_dilated(
            x * s, w.astype(jnp.float32), dimension_numbers=numbers, **options
        )

    def lookup(self, shape: tuple[int, ...]) -> Fn:
        axis, mode = self.axis(shape), self.rng.choice([None, "clip", "fill"])
        ids = np.array(
            [[self.rng.randint(-shape[axis] - 1, shape[axis] + 1) for _ in "ab"] for _ in "abc"]
        )
        self.say("axis", axis, "mode", mode, "ids", ids.tolist())

        def rows(w: Any, s: Any) -> Any:
            where = (slice(None),) * axis + (jnp.asarray(ids) + (s * 0).astype(int),)
            return jnp.nan_to_num(w.at[where].get(mode=mode)) * s

        return rows

    def elementwise(self, shape: tuple[int, ...]) -> Fn:
        x = self.numbers(*shape)
        return lambda w, s: w * x * s

    def whole(self, shape: tuple[int, ...]) -> Fn:
        return lambda w, s: w  # the weight itself is the result


_S = jax.ShapeDtypeStruct((), jnp.float32)


def _transpose(draw: Writer, shape: Any) -> Fn:
    order = [*range(len(shape))]
    draw.rng.shuffle(order)
    return lambda w, s: jnp.transpose(w, order)


def _split_axis(draw: Writer, shape: Any) -> Fn | None:
    axis = draw.axis(shape)
    if shape[axis] != 4:
        return None
    return lambda w, s: w.reshape(*shape[:axis], 2, 2, *shape[axis + 1 :])


def _merge_axes(draw: Writer, shape: Any) -> Fn | None:
    if len(shape) < 2:
        return None
    axis = draw.rng.randrange(len(shape) - 1)
    merged = shape[axis] * shape[axis + 1]
    return lambda w, s: w.reshape(*shape[:axis], merged, *shape[axis + 2 :])


def _reshape(draw: Writer, shape: Any) -> Fn | None:
    size, found = math.prod(shape), []
    while size > 1:
        factors = [f for f in range(2, size + 1) if size % f == 0]
        found.append(draw.rng.choice(factors[:4]))
        size //= found[-1]
    return (lambda w, s: w.reshape(found)) if 1 < len(found) < 5 else None


def _slice(draw: Writer, shape: Any) -> Fn:
    cuts = []
    for size in shape:
        start = draw.rng.randint(0, size - 1)
        cuts.append(slice(start, draw.rng.randint(start + 1, size), draw.rng.choice([1, 1, 2])))
    chosen = draw.axis(shape)
    cuts = [cut if i == chosen else slice(None) for i, cut in enumerate(cuts)]
    return lambda w, s: w[tuple(cuts)]


def _dynamic_slice(draw: Writer, shape: Any) -> Fn:
    axis = draw.axis(shape)
    start, size = draw.rng.randint(-6, 6), draw.rng.randint(1, shape[axis])
    draw.say("start", start)
    sizes = [size if i == axis else full for i, full in enumerate(shape)]

    def cut(w: Any, s: Any) -> Any:
        starts = [(s * start).astype(jnp.int32) if i == axis else 0 for i in range(len(shape))]
        return lax.dynamic_slice(w, starts, sizes, allow_negative_indices=False)

    return cut


def _index(draw: Writer, shape: Any) -> Fn | None:
    if len(shape) < 2:
        return None
    axis, traced = draw.axis(shape), draw.rng.random() < 0.5
    number = draw.rng.randint(-6, 6) if traced else draw.rng.randrange(shape[axis])
    draw.say("number", number, "traced" * traced)
    where = lambda s: (s * number).astype(jnp.int32) if traced else number
    return lambda w, s: w[(slice(None),) * axis + (where(s),)]


def _index_under_vmap(draw: Writer, shape: Any) -> Fn | None:
    if len(shape) < 2:
        return None
    axis, ids = draw.axis(shape), np.array([draw.rng.randint(-6, 6) for _ in "ab"])
    draw.say("ids", ids)
    take = lambda w, i: w[(slice(None),) * axis + (i,)]
    return lambda w, s: jax.vmap(lambda i: take(w, i))(jnp.asarray(ids) + (s * 0).astype(int))


def _expand(draw: Writer, shape: Any) -> Fn:
    axis = draw.rng.randint(0, len(shape))
    return lambda w, s: jnp.expand_dims(w, axis)


def _squeeze(draw: Writer, shape: Any) -> Fn | None:
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    if not ones or len(shape) < 2:
        return None
    axis = draw.rng.choice(ones)
    return lambda w, s: jnp.squeeze(w, axis)


def _broadcast(draw: Writer, shape: Any) -> Fn:
    axis = draw.rng.randint(0, len(shape))
    if axis < len(shape) and shape[axis] == 1:
        return lambda w, s: jnp.broadcast_to(w, (*shape[:axis], 2, *shape[axis + 1 :]))
    return lambda w, s: jnp.repeat(jnp.expand_dims(w, axis), 2, axis)


def _broadcast_new(draw: Writer, shape: Any) -> Fn:
    axis = draw.rng.randint(0, len(shape))
    out = (*shape[:axis], 2, *shape[axis:])
    kept = tuple(i for i in range(len(out)) if i != axis)
    return lambda w, s: lax.broadcast_in_dim(w, out, kept)


def _twin(draw: Writer, shape: Any) -> Fn:
    """Another array of the same shape: the weight turned about, or one without a weight in it."""
    kind, axis, x = (
        draw.rng.choice(["same", "rev", "array"]),
        draw.axis(shape),
        draw.numbers(*shape),
    )
    draw.say("with", kind)
    return {
        "same": lambda w, s: w,
        "rev": lambda w, s: lax.rev(w, (axis,)),
        "array": lambda w, s: (x * s).astype(w.dtype),
    }[kind]


def _concatenate(draw: Writer, shape: Any) -> Fn:
    axis, twin, first = draw.axis(shape), _twin(draw, shape), draw.rng.random() < 0.5
    pair = lambda w, s: [w, twin(w, s)] if first else [twin(w, s), w]
    return lambda w, s: jnp.concatenate(pair(w, s), axis)


def _stack(draw: Writer, shape: Any) -> Fn:
    axis, twin, first = draw.rng.randint(0, len(shape)), _twin(draw, shape), draw.rng.random() < 0.5
    pair = lambda w, s: [w, twin(w, s)] if first else [twin(w, s), w]
    return lambda w, s: jnp.stack(pair(w, s), axis)


def _unstack(draw: Writer, shape: Any) -> Fn | None:
    if len(shape) < 2:
        return None
    axis = draw.axis(shape)
    which = draw.rng.randrange(shape[axis])
    return lambda w, s: jnp.unstack(w, axis=axis)[which]


def _split(draw: Writer, shape: Any) -> Fn | None:
    axis = draw.axis(shape)
    if shape[axis] < 2:
        return None
    at, which = draw.rng.randint(1, shape[axis] - 1), draw.rng.randint(0, 1)
    return lambda w, s: jnp.split(w, [at], axis)[which]


def _rev(draw: Writer, shape: Any) -> Fn:
    axis = draw.axis(shape)
    return lambda w, s: lax.rev(w, (axis,))


def _pad(draw: Writer, shape: Any) -> Fn:
    axis = draw.axis(shape)
    return lambda w, s: jnp.pad(w, [(1 if i == axis else 0, 0) for i in range(len(shape))])


def _convert(draw: Writer, shape: Any) -> Fn | None:
    if draw.rng.random() < 0.7:
        return None
    draw.coarse = True
    return lambda w, s: w.astype(jnp.bfloat16)


def _scale(draw: Writer, shape: Any) -> Fn:
    number = draw.rng.choice([0.5, -2.0, 0.1])
    return draw.rng.choice([lambda w, s: w * number, lambda w, s: -w, lambda w, s: w / 2])


def _stretch(draw: Writer, shape: Any) -> Fn:
    """Times, or divided by, numbers along one axis or two, which depend on the argument or not."""
    axes = [draw.axis(shape) for _ in range(draw.rng.randint(1, 2))]
    own = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    by = 1 + abs(draw.numbers(*own))
    constant, divide = draw.rng.random() < 0.5, draw.rng.random() < 0.3
    draw.say("along", *sorted({*axes}), "divided" * divide)
    numbers = lambda w, s: (by if constant else by * s).astype(w.dtype)
    return lambda w, s: w / numbers(w, s) if divide else w * numbers(w, s)


def _there_and_back(draw: Writer, shape: Any) -> Fn | None:
    """Beyond the range of float16, and back."""
    if draw.rng.random() < 0.7:
        return None
    draw.coarse = True
    number, cast = 2.0 ** draw.rng.choice([20, -20]), draw.rng.random() < 0.5
    draw.say("after float16" * cast)
    half = lambda w: w.astype(jnp.float16).astype(jnp.float32) if cast else w.astype(jnp.float32)
    return lambda w, s: half(w) * number * (1 / number)


def _short_loop(draw: Writer, shape: Any) -> Fn | None:
    """The carry of a loop of no step, or of one that puts the weight into it."""
    if draw.rng.random() < 0.7:
        return None
    length = draw.rng.randint(0, 1)
    draw.say("steps", length)
    x = draw.numbers(*shape)

    def loop(w: Any, s: Any) -> Any:
        start = (x * s).astype(w.dtype)
        return lax.scan(lambda _, __: (w, None), start, None, length=length)[0]

    return lambda w, s: jax.jit(loop)(w, s)


STEPS: dict[str, Callable[[Writer, Any], Fn | None]] = {
    "transpose": _transpose,
    "transpose2": _transpose,
    "split_axis": _split_axis,
    "merge_axes": _merge_axes,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "index": _index,
    "index_under_vmap": _index_under_vmap,
    "expand": _expand,
    "squeeze": _squeeze,
    "broadcast": _broadcast,
    "broadcast_new": _broadcast_new,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "rev": _rev,
    "pad": _pad,
    "convert": _convert,
    "scale": _scale,
    "stretch": _stretch,
    "there_and_back": _there_and_back,
    "short_loop": _short_loop,
}


def program(seed: int) -> Program:
    """The random program of a seed."""
    draw = Writer(seed)
    rng = draw.rng
    kind = rng.choice(KINDS)
    ndim = 2 if kind == "rows" else rng.choice([2, 2, 3, 3, 4])
    shape = tuple(rng.choice(SIZES) for _ in range(ndim))
    base, lora = {}, {}
    base["w"], lora["w"] = _leaf(draw, kind, shape)
    axis, joined = draw.axis(shape), rng.random() < 0.25
    whole = shape
    if joined:  # to another leaf, of another kind
        size = rng.choice(SIZES)
        other = (*shape[:axis], size, *shape[axis + 1 :])
        draw.say("joined along", axis, "to")
        base["v"], lora["v"] = _leaf(draw, rng.choice(KINDS[:4]), other)
        whole = (*shape[:axis], shape[axis] + size, *shape[axis + 1 :])
    then = draw.program(whole, rng.randint(1, 6), 2)
    join = lambda tree: jnp.concatenate([tree["w"], tree["v"]], axis)
    fn = lambda tree, s: then(join(tree) if joined else tree["w"], s)
    multiplier = 0.5 if kind == "scaled" else 1.0
    text = " ".join(draw.text)
    return Program(seed, text, fn, base, lora, multiplier, draw.reverse, draw.coarse)


def _leaf(draw: Writer, kind: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A frozen leaf, and its adapter or None."""
    rng = draw.rng
    form = rng.choice([None, None, *FORMATS])
    adapted = form is None or rng.random() < 0.7
    roles = ["i", "o", *(rng.choice("ios") for _ in range(len(shape) - 2))]
    if kind != "rows":
        rng.shuffle(roles)
    axes = lambda role: tuple(axis for axis, own in enumerate(roles) if own == role)
    fan_in, fan_out, stack = map(axes, "ios")
    draw.say(
        kind if adapted else "no adapter", form or "dense", "roles", "".join(roles), shape, ":"
    )
    base: Any = draw.numbers(*shape)
    if form is not None:
        along = fan_out if kind == "rows" else fan_in
        quant = lowrank.QuantConfig(targets="w", block_size=2, **FORMATS[form])
        # on the host, where nothing is compiled for one small leaf
        base, _ = quantize_on_host(base, eval_quantized_shapes(base, along, stack, quant))
    return base, _node(draw, kind, shape, fan_in, fan_out, stack) if adapted else None


def _node(draw: Writer, kind: str, shape: Any, fan_in: Any, fan_out: Any, stack: Any) -> Any:
    size = lambda axes: tuple(shape[axis] for axis in axes)
    if kind == "rows":
        config = lowrank.LoraConfig(rank=1, targets="v", train_rows={"w": [0, shape[0] - 1]})
        params = {"w": jnp.zeros(shape), "v": jnp.zeros((2, 2))}
        fresh = lowrank.init(jax.random.key(0), params, config)[1]["w"]
        return dataclasses.replace(fresh, b=draw.numbers(*fresh.b.shape))
    rank = 2 if kind == "loha" else 1
    a, b = (
        draw.numbers(*size(stack), *size(fan_in), rank),
        draw.numbers(*size(stack), rank, *size(fan_out)),
    )
    if draw.rng.random() < 0.2:  # eighths are numbers of narrow dtypes too
        dtype = draw.rng.choice([jnp.bfloat16, jnp.float16])
        a, b = a.astype(dtype), b.astype(dtype)
    magnitude = 1 + abs(draw.numbers(*size(stack), *size(fan_out))) if kind == "dora" else None
    make = LoHa if kind == "loha" else lowrank.LowRank
    return make(a, b, magnitude, fan_in, fan_out, stack, 1.5, "dot")

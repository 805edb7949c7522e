"""Adapters that reduce to low-rank products: LoHa, VeRA, (IA)^3, and trained rows of a table.

Each is a LowRank node that computes the factors from other arrays. Merging, dropout, DoRA,
sharding, checkpoints and quantized bases work as for LowRank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_jax._errors import ConfigError
from lowrank_jax._nodes.low_rank import LowRank
from lowrank_jax._nodes.seeded import seeded_uniform
from lowrank_jax._primitives.contract import RANK, Labels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoHa(LowRank):
    r"""A Hadamard product: $\Delta W = s\,(a_1 b_1) \odot (a_2 b_2)$, of rank $r^2$.

    Args:
      a: [*stack, *fan_in, 2 r], a_1 and a_2 concatenated.
      b: [*stack, 2 r, *fan_out], b_1 and b_2 concatenated.
      magnitude, fan_in, fan_out, stack, scale, kind, folded, base_modified: as for LowRank.

    Source: FedPara, arXiv 2108.06098, proposition 1; LyCORIS, arXiv 2309.14859, section 3.

    >>> node = LoHa(jnp.ones((4, 4)), jnp.ones((4, 3)))
    >>> node.rank, [factor.shape for factor in node.factors()]
    (2, [(4, 4), (4, 3)])
    """

    @property
    def rank(self) -> int:
        """r, the rank of each of the two products."""
        return self.a.shape[-1] // 2

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return factors of rank r^2: all products of pairs of columns, and of pairs of rows."""
        # The Hadamard product of two low-rank products is a low-rank product of row-wise Kronecker
        # products: sum_pq (a_p c_q)(b_p d_q). With r = 2: a_1 [4, 2] and a_2 [4, 2] are multiplied
        # as [4, 2, 1] * [4, 1, 2] and reshaped to [4, 4]; b_1 and b_2, [2, 3], as [2, 1, 3] *
        # [1, 2, 3], reshaped to [4, 3] with p outer and q inner, as in a.
        whole_a, whole_b = super().factors()
        at = whole_b.ndim - 1 - len(self.fan_out)
        (a, c), (b, d) = jnp.split(whole_a, 2, -1), jnp.split(whole_b, 2, at)
        a = (a[..., :, None] * c[..., None, :]).reshape(*a.shape[:-1], -1)
        pairs = jnp.expand_dims(b, at + 1) * jnp.expand_dims(d, at)
        return a, pairs.reshape(*b.shape[:at], -1, *b.shape[at + 1 :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VeRA(LowRank):
    r"""Two trained vectors and fixed random matrices: $\Delta W = s\,A\,\Lambda_d\,B\,\Lambda_e$.

    r + o numbers are trained. A [*fan_in, r] and B [r, *fan_out] are not stored: they are generated
    from the seed at each use, with the same numbers in every process, whatever its PRNG. Leaves of
    the same shape, and all layers of a stack, share them.

    Args:
      a: d, [*stack, r].
      b: e, [*stack, *fan_out].
      magnitude, fan_in, fan_out, stack, scale, kind, folded, base_modified: as for LowRank.
      inputs: sizes of the fan-in axes.
      seed: seed of A and B.

    Source: VeRA, arXiv 2310.11454, equation 2.

    >>> node = VeRA(jnp.ones(2), jnp.ones(3), inputs=(4,))
    >>> node.shape, [factor.shape for factor in node.factors()]
    ((4, 3), [(4, 2), (2, 3)])
    """

    inputs: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """Labels of d, along the rank, and of e, along the output features."""
        return (*self.stack, RANK), (*self.stack, *self.fan_out)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense ΔW."""
        stack = self.a.shape[:-1]
        return _assemble_shape(self, stack, self.inputs, self.b.shape[len(stack) :])

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return A with its columns multiplied by d, and B with its output features by e."""
        stacked = self.a.ndim - 1
        outputs = self.b.shape[stacked:]
        # Kaiming's uniform distribution, of variance 2 / fan_in
        draw = lambda stream, shape, fan_in: seeded_uniform(
            self.seed, stream, shape, math.sqrt(6 / fan_in)
        )
        fixed_a = draw(0, (*self.inputs, self.rank), math.prod(self.inputs))
        fixed_b = draw(1, (self.rank, *outputs), self.rank)
        # d [12, r] of a stack of 12 and fan_in [4, 8] becomes [12, 1, 1, r] and broadcasts with A
        # [4, 8, r] to [12, 4, 8, r]; e [12, o] becomes [12, 1, o] and broadcasts with B [r, o].
        d = self.a.reshape(*self.a.shape[:-1], *(1,) * len(self.inputs), self.rank)
        e = jnp.expand_dims(self.b, stacked)
        return fixed_a.astype(d.dtype) * d, fixed_b.astype(e.dtype) * e


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IA3(LowRank):
    r"""A trained factor for each output feature: $W_\text{eff} = W\,\Lambda_l$.

    It is a LowRank node of rank 0 whose folded magnitude is l.

    Args:
      a, b: None.
      magnitude: l, [*stack, *fan_out].
      fan_in, fan_out, stack, scale, kind, folded, base_modified: as for LowRank.
      inputs: sizes of the fan-in axes.

    Source: (IA)^3, arXiv 2205.05638, section 3.3.

    >>> node = IA3(magnitude=jnp.ones(3), inputs=(4,))
    >>> node, node.shape
    (IA3(shape=(4, 3), rank=0, scale=1.0, inputs=(4,), magnitude=float32[3]), (4, 3))
    """

    a: Any = None
    b: Any = None
    magnitude: Any = None
    folded: bool = dataclasses.field(default=True, metadata={"static": True})
    inputs: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    required: ClassVar[tuple[str, ...]] = ("magnitude",)

    @property
    def rank(self) -> int:
        """0: there are no factors."""
        return 0

    @property
    def dtype(self) -> Any:
        """Dtype of l."""
        return self.magnitude.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        at = self.magnitude.ndim - len(self.fan_out)
        return _assemble_shape(
            self, self.magnitude.shape[:at], self.inputs, self.magnitude.shape[at:]
        )

    def for_shape(self, shape: Sequence[int]) -> LowRank:
        """Return the adapter of a weight of this shape; a part of the fan-in has the same l."""
        if len(shape) != self.ndim:
            return super().for_shape(shape)
        fan_in, _, _ = self.axes(len(shape))
        return dataclasses.replace(self, inputs=tuple(shape[axis] for axis in fan_in))

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return factors of rank 0: arrays without elements."""
        at = self.magnitude.ndim - len(self.fan_out)
        stack, outputs = self.magnitude.shape[:at], self.magnitude.shape[at:]
        make = lambda shape: jnp.zeros(shape, self.magnitude.dtype)
        return make((*stack, *self.inputs, 0)), make((*stack, 0, *outputs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rows(LowRank):
    r"""Trained rows of a table: $\Delta W_{row_k} = b_k$, and 0 in all other rows.

    Args:
      a: None.
      b: [rows, *features].
      magnitude, fan_in, fan_out, stack, scale, kind, folded, base_modified: as for LowRank.
      rows: their indices along the first axis of the table.
      size: number of rows of the table.

    >>> node = Rows(b=jnp.ones((2, 3)), rows=(1, 7), size=9)
    >>> node.shape, node.factors()[0].shape
    ((9, 3), (9, 2))
    """

    a: Any = None
    b: Any = None
    rows: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    size: int = dataclasses.field(default=0, metadata={"static": True})

    required: ClassVar[tuple[str, ...]] = ("b",)

    @property
    def rank(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def dtype(self) -> Any:
        """Dtype of b."""
        return self.b.dtype

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """Labels of a, which is absent, and of b, whose first axis is not an axis of the table."""
        return (None,), (None, *self.fan_out)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table."""
        self.axes(self.b.ndim)  # refuses what is stacked
        return (self.size, *self.b.shape[1:])

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return one-hot vectors of the rows, [size, rows], and b."""
        rows = jnp.asarray(self.rows)
        return (jnp.arange(self.size)[:, None] == rows).astype(self.b.dtype), self.b


def _assemble_shape(
    node: LowRank, stack: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[int, ...]:
    """Assemble the shape of the weight from the sizes of its stack, fan-in and fan-out axes."""
    ndim = len(stack) + len(inputs) + len(outputs)
    fan_in, fan_out, stacked = node.axes(ndim)
    sizes = (*inputs, *outputs, *stack)
    placed = dict(zip((*fan_in, *fan_out, *stacked), sizes, strict=True))
    return tuple(placed[axis] for axis in range(ndim))


def init_rows(path: str, leaf: jax.Array, rows: tuple[int, ...], dtype: str) -> Rows:
    """Make the initial node of trained rows; its changes b are 0."""
    if wrong := [row for row in rows if not 0 <= row < leaf.shape[0]]:
        raise ConfigError(f"train_rows names row {wrong[0]} of {path!r}, which has {leaf.shape[0]}")
    if leaf.ndim < 2:
        raise ConfigError(f"train_rows names {path!r} of shape {leaf.shape}, which is not a table")
    changes = jnp.zeros((len(rows), *leaf.shape[1:]), dtype)
    fan_out = tuple(range(1, leaf.ndim))
    options = {"kind": "lookup", "rows": rows, "size": leaf.shape[0]}
    return Rows(b=changes, fan_in=(0,), fan_out=fan_out, **options)


def init_loha(key: jax.Array, leaf: jax.Array, target: Any, config: Any) -> LoHa:
    """Make the initial LoHa node: a_2 = 0, so that ΔW = 0, and the rest as in LyCORIS."""
    stack, fan_in, fan_out = get_sizes(leaf, target)
    one, two, three = jax.random.split(key, 3)
    rank = target.rank
    a = 0.1 * jax.random.normal(one, (*stack, *fan_in, rank))
    b, d = (jax.random.normal(k, (*stack, rank, *fan_out)) for k in (two, three))
    a = jnp.concatenate([a, jnp.zeros_like(a)], -1)
    b = jnp.concatenate([b, d], len(stack))
    return LoHa(
        a.astype(config.factor_dtype), b.astype(config.factor_dtype), **get_target_fields(target)
    )


def init_vera(key: jax.Array, leaf: jax.Array, target: Any, config: Any) -> VeRA:
    """Make the initial VeRA node: d = 0.1 and e = 0, as in the paper."""
    stack, fan_in, fan_out = get_sizes(leaf, target)
    d = jnp.full((*stack, target.rank), 0.1, config.factor_dtype)
    e = jnp.zeros((*stack, *fan_out), config.factor_dtype)
    return VeRA(d, e, **get_target_fields(target), inputs=fan_in, seed=config.projection_seed)


def init_ia3(key: jax.Array, leaf: jax.Array, target: Any, config: Any) -> IA3:
    """Make the initial (IA)^3 node: l = 1, so that ΔW = 0."""
    stack, fan_in, fan_out = get_sizes(leaf, target)
    return IA3(magnitude=jnp.ones((*stack, *fan_out)), **get_target_fields(target), inputs=fan_in)


def get_sizes(
    leaf: jax.Array, target: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the stack, fan-in and fan-out axes of a leaf."""
    of = lambda axes: tuple(leaf.shape[axis] for axis in axes)
    return of(target.stack), of(target.fan_in), of(target.fan_out)


def get_target_fields(target: Any) -> dict[str, Any]:
    """Return the static fields of LowRank that a Target determines."""
    return {name: getattr(target, name) for name in ("fan_in", "fan_out", "stack", "scale", "kind")}

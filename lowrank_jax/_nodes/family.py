"""Adapters that are low-rank products by another way: LoHa, VeRA, (IA)^3, and rows of a table.

Each is a LowRank node that says what its factors are; all else (merging, dropout, DoRA, sharding,
checkpoints, quantized bases) is LowRank's own.
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
      a: [*stack, *fan_in, 2 r], a_1 and a_2 side by side.
      b: [*stack, 2 r, *fan_out], likewise.
      magnitude, fan_in, fan_out, stack, scale, kind, folded, base_modified: as of LowRank.

    Source: FedPara, arXiv 2108.06098, proposition 1; LyCORIS, arXiv 2309.14859, section 3.
    """

    @property
    def rank(self) -> int:
        """r, of each of the two products."""
        return self.a.shape[-1] // 2

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """The products of columns, and of rows, by pairs: row-wise Kronecker products."""
        at = self.b.ndim - 1 - len(self.fan_out)
        (a, c), (b, d) = jnp.split(self.a, 2, -1), jnp.split(self.b, 2, at)
        a = (a[..., :, None] * c[..., None, :]).reshape(*a.shape[:-1], -1)
        pairs = jnp.expand_dims(b, at + 1) * jnp.expand_dims(d, at)
        return a, pairs.reshape(*b.shape[:at], -1, *b.shape[at + 1 :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VeRA(LowRank):
    r"""Two vectors between fixed random matrices: $\Delta W = s\,A\,\Lambda_d\,B\,\Lambda_e$.

    r + o numbers are trained. A [*fan_in, r] and B [r, *fan_out] are drawn anew from the seed
    whenever they are needed, and kept by nobody: the same numbers in every process, whatever PRNG
    it uses. Leaves of one shape, and all layers of a stack, share them.

    Args:
      a: d, [*stack, r].
      b: e, [*stack, *fan_out].
      magnitude, fan_in, fan_out, stack, scale, kind, folded, base_modified: as of LowRank.
      inputs: sizes of the fan-in axes.
      seed: of A and B.

    Source: VeRA, arXiv 2310.11454, equation 2.
    """

    inputs: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """d runs along the rank, e along the output features."""
        return (*self.stack, RANK), (*self.stack, *self.fan_out)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense delta."""
        stack = self.a.shape[:-1]
        return _assemble_shape(self, stack, self.inputs, self.b.shape[len(stack) :])

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """The random matrices, each column of A times d, each output feature of B times e."""
        stacked = self.a.ndim - 1
        outputs = self.b.shape[stacked:]
        # Kaiming's uniform distribution: of variance 2 / fan_in
        draw = lambda stream, shape, fan_in: seeded_uniform(
            self.seed, stream, shape, math.sqrt(6 / fan_in)
        )
        fixed_a = draw(0, (*self.inputs, self.rank), math.prod(self.inputs))
        fixed_b = draw(1, (self.rank, *outputs), self.rank)
        d = self.a.reshape(*self.a.shape[:-1], *(1,) * len(self.inputs), self.rank)
        e = jnp.expand_dims(self.b, stacked)
        return fixed_a.astype(d.dtype) * d, fixed_b.astype(e.dtype) * e


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IA3(LowRank):
    r"""One number for each output feature: $W_\text{eff} = W\,\Lambda_l$.

    As a LowRank node: one of rank 0 whose folded magnitude is l.

    Args:
      a, b: None.
      magnitude: l, [*stack, *fan_out].
      fan_in, fan_out, stack, scale, kind, folded, base_modified: as of LowRank.
      inputs: sizes of the fan-in axes.

    Source: (IA)^3, arXiv 2205.05638, section 3.3.
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
        """The adapter of a weight of this shape: a part of the fan-in has the same l."""
        if len(shape) != self.ndim:
            return super().for_shape(shape)
        fan_in, _, _ = self.axes(len(shape))
        return dataclasses.replace(self, inputs=tuple(shape[axis] for axis in fan_in))

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """None: arrays without elements."""
        at = self.magnitude.ndim - len(self.fan_out)
        stack, outputs = self.magnitude.shape[:at], self.magnitude.shape[at:]
        make = lambda shape: jnp.zeros(shape, self.magnitude.dtype)
        return make((*stack, *self.inputs, 0)), make((*stack, 0, *outputs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rows(LowRank):
    r"""Some rows of a table: $\Delta W_{row_k} = b_k$, and nothing elsewhere.

    Args:
      a: None.
      b: [rows, *features].
      magnitude, fan_in, fan_out, stack, scale, kind, folded, base_modified: as of LowRank.
      rows: their numbers along the table's first axis.
      size: how many rows the table has.

    Source: a product with the unit vectors of the rows.
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
        """Dtype of the changes."""
        return self.b.dtype

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """The rows themselves run along no axis."""
        return (None,), (None, *self.fan_out)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table."""
        self.axes(self.b.ndim)  # refuses what is stacked
        return (self.size, *self.b.shape[1:])

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Unit vectors, and the changes of their rows."""
        rows = jnp.asarray(self.rows)
        return (jnp.arange(self.size)[:, None] == rows).astype(self.b.dtype), self.b


def _assemble_shape(
    node: LowRank, stack: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[int, ...]:
    """Shape of the weight whose axes of each kind have these sizes."""
    ndim = len(stack) + len(inputs) + len(outputs)
    fan_in, fan_out, stacked = node.axes(ndim)
    sizes = (*inputs, *outputs, *stack)
    placed = dict(zip((*fan_in, *fan_out, *stacked), sizes, strict=True))
    return tuple(placed[axis] for axis in range(ndim))


def init_rows(path: str, leaf: Any, rows: tuple[int, ...], dtype: str) -> Rows:
    """No change at first."""
    if wrong := [row for row in rows if not 0 <= row < leaf.shape[0]]:
        raise ConfigError(f"train_rows names row {wrong[0]} of {path!r}, which has {leaf.shape[0]}")
    if leaf.ndim < 2:
        raise ConfigError(f"train_rows names {path!r} of shape {leaf.shape}, which is no table")
    changes = jnp.zeros((len(rows), *leaf.shape[1:]), dtype)
    fan_out = tuple(range(1, leaf.ndim))
    options = {"kind": "lookup", "rows": rows, "size": leaf.shape[0]}
    return Rows(b=changes, fan_in=(0,), fan_out=fan_out, **options)


def init_loha(key: Any, leaf: Any, target: Any, config: Any) -> LoHa:
    """a_2 = 0, so that nothing changes at first; the rest as in LyCORIS."""
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


def init_vera(key: Any, leaf: Any, target: Any, config: Any) -> VeRA:
    """d = 0.1 and e = 0, as in the paper."""
    stack, fan_in, fan_out = get_sizes(leaf, target)
    d = jnp.full((*stack, target.rank), 0.1, config.factor_dtype)
    e = jnp.zeros((*stack, *fan_out), config.factor_dtype)
    return VeRA(d, e, **get_target_fields(target), inputs=fan_in, seed=config.projection_seed)


def init_ia3(key: Any, leaf: Any, target: Any, config: Any) -> IA3:
    r"""l = 1, so that nothing changes at first."""
    stack, fan_in, fan_out = get_sizes(leaf, target)
    return IA3(magnitude=jnp.ones((*stack, *fan_out)), **get_target_fields(target), inputs=fan_in)


def get_sizes(leaf: Any, target: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of a leaf's stack, fan-in and fan-out axes."""
    of = lambda axes: tuple(leaf.shape[axis] for axis in axes)
    return of(target.stack), of(target.fan_in), of(target.fan_out)


def get_target_fields(target: Any) -> dict[str, Any]:
    """The static fields of a target's node."""
    return {name: getattr(target, name) for name in ("fan_in", "fan_out", "stack", "scale", "kind")}

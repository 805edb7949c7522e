"""A fixed number of slots for adapters, filled and emptied while a compiled program runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.fields import check_rank
from lowrank_jax._errors import ConfigError, LowrankError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import find_nearest_names
from lowrank_jax._jax.types import PyTree
from lowrank_jax._many.align import align
from lowrank_jax._many.equalize import fit_into, make_neutral
from lowrank_jax._many.stack import are_quantized_alike, stack_nodes
from lowrank_jax._nodes import Full, LowRank
from lowrank_jax._nodes.quantized_factors import dequantize_factors, encode_as


class Pool:
    """Slots for adapters of one base: what `pool` returns.

    It is the library's one object with state. `tree` always has the same structure, shapes and
    dtypes, so that a function compiled for it serves every adapter that is put later. Read `tree`
    anew at each call: put and drop write its buffers in place, and delete the older arrays.

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3))}
    >>> _, lora = lowrank.init(0, params, lowrank.LoraConfig(rank=2, targets="w"))
    >>> adapters = lowrank.pool(lora, slots=8)
    >>> adapters.put("french", lora)
    >>> adapters.index(["french", None]).tolist(), adapters.tree["w"].a.shape
    ([0, 8], (9, 4, 2))
    """

    def __init__(self, like: PyTree, slots: int):
        aligned, self._unflatten = align([like], decode=False)
        self._like = {path: node for path, (node,) in aligned.items()}
        self._neutral = self._fit({}, "the adapter that changes nothing")
        self._slots = slots
        self._names: dict[str, int] = {}
        # the last slot changes nothing: the adapter None
        self._tree = jax.tree.map(
            lambda array: jnp.repeat(array, slots + 1, 0), self._unflatten_stack(self._neutral)
        )

    def __repr__(self) -> str:
        return f"Pool({len(self._names)} of {self._slots} slots: {', '.join(self._names)})"

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @property
    def tree(self) -> PyTree:
        """The stack of adapters, each array [slots + 1, ...], for `select`."""
        return self._tree

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters in the pool."""
        return tuple(self._names)

    @property
    def slots(self) -> int:
        """How many adapters the pool can hold."""
        return self._slots

    def put(self, name: str, lora: PyTree) -> None:
        """Write an adapter into a free slot, or in place of the one of this name.

        Args:
          name: of the adapter, for `index`.
          lora: an adapter of the same base: of any rank up to the pool's, any scale, with or
            without any of the pool's leaves.

        Raises:
          ConfigError: the pool is full, a rank is larger than the pool's, or a leaf does not fit.
          TreeError: lora is not an adapter, or of another model.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of an adapter is text, not {name!r}")
        if any(map(jaxprs.is_tracer, jax.tree.leaves(lora))):
            raise ConfigError("put is a change of the pool, which no traced function can make")
        aligned, _ = align([self._unflatten(self._like), lora], decode=False)
        there = {path: pair[1] for path, pair in aligned.items() if pair[1] is not None}
        fitted = self._fit(there, f"adapter {name!r}")
        slot = self._names.get(name)
        if slot is None:
            taken = {*self._names.values()}
            slot = next((k for k in range(self._slots) if k not in taken), None)
        if slot is None:
            raise ConfigError(
                f"all {self._slots} slots are taken: drop an adapter first, or make a pool with "
                f"more slots (it holds {', '.join([*self._names][:20])})"
            )
        self._write(fitted, slot)
        self._names[name] = slot

    def drop(self, name: str) -> None:
        """Free the slot of an adapter, which then changes nothing.

        Args:
          name: of the adapter.

        Raises:
          ConfigError: it is not in the pool.
        """
        self._write(self._neutral, self._slot_of(name))
        del self._names[name]

    def index(self, names: str | Sequence[str | None] | None) -> jax.Array:
        """Look up the slots of adapters, for `select`.

        Args:
          names: a name, or a sequence of names, one for each example; None: no adapter.

        Returns:
          int32 [], or [len(names)].

        Raises:
          ConfigError: a name is not in the pool.
        """
        if names is None or isinstance(names, str):
            return jnp.asarray(self._slot_of(names), jnp.int32)
        return jnp.asarray(np.array([self._slot_of(name) for name in names], np.int32))

    def _slot_of(self, name: str | None) -> int:
        if name is None:
            return self._slots
        if name not in self._names:
            near = ", ".join(map(repr, find_nearest_names(str(name), self._names))) or "no adapter"
            raise ConfigError(f"adapter {name!r} is not in the pool, which holds {near}")
        return self._names[name]

    def _fit(self, nodes: dict[str, Any], what: str) -> dict[str, Any]:
        """Fit an adapter's nodes to the pool's shapes; missing nodes become neutral."""
        out, problems = {}, []
        for path in {**self._like, **nodes}:
            try:
                like, node = self._like.get(path), nodes.get(path)
                if like is None:
                    raise ConfigError("the pool has no adapter there: make it of one that has")
                if isinstance(node, Full) or isinstance(like, Full):
                    raise ConfigError("it is trained whole, which a slot cannot hold")
                out[path] = _fit_node(node, like)
            except LowrankError as error:
                problems.append(f"{path}: {error}")
        if problems:
            raise ConfigError(f"{what} does not fit into the pool:\n{list_problems(problems)}")
        return out

    def _unflatten_stack(self, nodes: dict[str, Any]) -> PyTree:
        """The stack of one adapter."""
        return self._unflatten({path: stack_nodes([node]) for path, node in nodes.items()})

    def _write(self, nodes: dict[str, Any], slot: int) -> None:
        self._tree = _write_slot(self._tree, self._unflatten(nodes), slot)


def _fit_node(node: LowRank | None, like: LowRank) -> LowRank:
    """Fit a node to a slot, in the slot's format; None becomes the adapter that changes nothing."""
    if node is not None and are_quantized_alike([node, like]):
        return node
    dense = dequantize_factors(like)
    fitted = make_neutral(dense) if node is None else fit_into(dequantize_factors(node), dense)
    return encode_as(fitted, like)


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(tree: PyTree, lora: PyTree, slot: jax.Array) -> PyTree:
    """The stack with another adapter in a slot."""
    return jax.tree.map(lambda many, one: many.at[slot].set(one), tree, lora)


@check_arguments()
def pool(lora_like: PyTree, slots: int) -> Pool:
    """Make a pool: a fixed number of slots for adapters, whose shapes never change.

    Args:
      lora_like: an adapter with every leaf, the largest ranks and the factors' dtypes of those to
        come. DoRA must be folded (`fold_norms`): without the base no unfolded magnitude changes
        nothing. Of an adapter with quantized factors (`quantize_adapter`) the slots are quantized
        in its format, and so is what is put into them.
      slots: how many adapters it can hold.

    Returns:
      An empty Pool.

    Raises:
      ConfigError: slots is not a positive integer, or a leaf is trained whole or unfolded DoRA.
      TreeError: lora_like is not an adapter.

    >>> import lowrank_jax as lowrank
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> _, lora = lowrank.init(0, params, lowrank.LoraConfig(rank=2, targets="w"))
    >>> adapters = pool(lora, slots=2)
    >>> adapters.put("one", lora)
    >>> fn = lowrank.lift(lambda p, x: x @ p["w"])
    >>> serve = jax.jit(jax.vmap(
    ...     lambda many, k, x: fn(lowrank.combine(params, lowrank.select(many, k)), x),
    ...     in_axes=(None, 0, 0),
    ... ))
    >>> serve(adapters.tree, adapters.index(["one", None]), x).shape
    (2, 3)
    """
    check_rank("slots", slots)
    return Pool(lora_like, slots)

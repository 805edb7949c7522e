"""offload_state: an optimizer's state in the memory of the host."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import jax
from jax import NamedSharding
from jax import P as PartitionSpec

from lowrank_jax._checks.arguments import check_arguments, transformation
from lowrank_jax._errors import OffloadWarning
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree

if TYPE_CHECKING:  # imported where it is used: importing the library costs what importing jax does
    import optax

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_KIND = "pinned_host"  # what JAX takes for Space.Host


@check_arguments(tx=transformation)
def offload_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep the state of any optimizer in the pinned memory of the host.

    update moves the state to the device, runs tx, and moves the new state back; under jit the
    compiler places the copies. Shardings stay as they are. Scalars stay on the device.

    It goes outermost, or inside only_adapters: around optax.MultiSteps, and around quantize_state.
    For parameters that are sharded, call init eagerly, or jit it with out_shardings. To compile
    without the devices, give the arrays of the state shardings of memory_kind="pinned_host", in
    and out.

    Args:
      tx: any Optax transformation.

    Returns:
      A transformation whose state is that of tx, in other memory. Where a device has no pinned
      host memory, init warns (OffloadWarning) and the state stays on the device.

    Source: paged optimizers, QLoRA, arXiv 2305.14314, section 3; here nothing is paged by need.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones((4, 3))}
    >>> tx = offload_state(optax.adam(1e-3))
    >>> state = tx.init(params)
    >>> state[0].mu["w"].sharding.memory_kind
    'pinned_host'
    >>> updates, state = jax.jit(tx.update)(params, state)
    >>> updates["w"].sharding.memory_kind, state[0].mu["w"].sharding.memory_kind
    ('device', 'pinned_host')
    """
    import optax

    inner: Any = optax.with_extra_args_support(tx)

    def start(params: PyTree) -> Any:
        state = inner.init(params)
        if lacking := _find_devices_without_host((params, state)):
            first = lacking[0]
            warnings.warn(
                f"the optimizer's state stays in device memory: {first} (one of {len(lacking)} "
                f"such devices) has no {_KIND!r} memory, only {sorted(_list_memory_kinds(first))}; leave "
                "offload_state away there, or filter lowrank.OffloadWarning",
                OffloadWarning,
                stacklevel=2,
            )
            return state
        return _move_state(_place_on_mesh(state, params), _HOST)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[Any, Any]:
        if _find_devices_without_host((updates, state)):
            return inner.update(updates, state, params, **extra)
        updates, state = inner.update(updates, _move_state(state, _DEVICE), params, **extra)
        return updates, _move_state(state, _HOST)

    return optax.GradientTransformationExtraArgs(start, update)


def _is_movable(leaf: Any) -> bool:
    """Whether a leaf is worth moving: counters and rates are not."""
    return isinstance(leaf, jax.Array) and leaf.ndim > 0


def _move_state(state: PyTree, space: Any) -> Any:
    """The state with its arrays in a memory."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, space) if _is_movable(leaf) else leaf, state
    )


def _list_placed_arrays(tree: PyTree) -> list[jax.Array]:
    """The arrays that lie somewhere: those not being traced."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not jaxprs.is_tracer(leaf)]


def _find_devices_without_host(tree: PyTree) -> list[Any]:
    """Devices of a tree that lack the memory; the default one stands for what is traced."""
    devices = {d for leaf in _list_placed_arrays(tree) for d in leaf.sharding.addressable_devices}
    devices = sorted(devices or jax.local_devices()[:1], key=lambda device: device.id)
    return [device for device in devices if _KIND not in _list_memory_kinds(device)]


def _list_memory_kinds(device: Any) -> list[str]:
    """The memories that a device can address."""
    return [memory.kind for memory in device.addressable_memories()]


def _place_on_mesh(state: PyTree, params: PyTree) -> Any:
    """The state with what lies nowhere yet on the parameters' mesh: host arrays are committed."""
    named = (leaf.sharding for leaf in _list_placed_arrays(params))
    mesh = next((s.mesh for s in named if isinstance(s, NamedSharding)), None)
    if mesh is None:
        return state
    whole = NamedSharding(mesh, PartitionSpec())
    loose = lambda leaf: _is_movable(leaf) and not jaxprs.is_tracer(leaf) and not leaf.committed
    return jax.tree.map(lambda leaf: jax.device_put(leaf, whole) if loose(leaf) else leaf, state)

"""offload_state: keeps the state of an optimizer in host memory."""

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

if TYPE_CHECKING:  # imported in functions: importing the library should only cost importing jax
    import optax

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_KIND = "pinned_host"  # the memory kind of Space.Host


@check_arguments(tx=transformation)
def offload_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep the state of any optimizer in pinned host memory.

    update moves the state to the device, runs tx, and moves the new state back; under jit the
    compiler schedules the copies. Shardings do not change. Scalars stay on the device.

    Use it as the outermost transformation, or inside only_adapters: around optax.MultiSteps and
    around quantize_state. For sharded parameters, call init eagerly or jit it with out_shardings.
    To compile without the devices, give the arrays of the state shardings with
    memory_kind="pinned_host", as inputs and as outputs.

    Args:
      tx: any Optax transformation.

    Returns:
      A transformation whose state is that of tx, in host memory. If a device has no pinned host
      memory, the state stays on the device.

    Warns:
      OffloadWarning: a device has no pinned host memory.

    Source: paged optimizers, QLoRA, arXiv 2305.14314, section 3; here the whole state is moved.

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
                f"such devices) has no {_KIND!r} memory, only {sorted(_list_memory_kinds(first))}; "
                "leave offload_state away there, or filter lowrank.OffloadWarning",
                OffloadWarning,
                stacklevel=2,
            )
            return state
        return _move_state(_place_on_mesh(state, params), _HOST)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: object
    ) -> tuple[Any, Any]:
        if _find_devices_without_host((updates, state)):
            return inner.update(updates, state, params, **extra)
        updates, state = inner.update(updates, _move_state(state, _DEVICE), params, **extra)
        return updates, _move_state(state, _HOST)

    return optax.GradientTransformationExtraArgs(start, update)


def _is_movable(leaf: object) -> bool:
    """Whether a leaf is moved: an array with axes, not a scalar such as a step count."""
    return isinstance(leaf, jax.Array) and leaf.ndim > 0


def _move_state(state: PyTree, space: Any) -> Any:
    """Move the arrays of the state to a memory space."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, space) if _is_movable(leaf) else leaf, state
    )


def _list_placed_arrays(tree: PyTree) -> list[jax.Array]:
    """List the arrays that are placed on devices, that is, not traced."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not jaxprs.is_tracer(leaf)]


def _find_devices_without_host(tree: PyTree) -> list[Any]:
    """Find devices of a tree without pinned host memory; the default one if all is traced."""
    devices = {d for leaf in _list_placed_arrays(tree) for d in leaf.sharding.addressable_devices}
    devices = sorted(devices or jax.local_devices()[:1], key=lambda device: device.id)
    return [device for device in devices if _KIND not in _list_memory_kinds(device)]


def _list_memory_kinds(device: Any) -> list[str]:
    """List the kinds of memory that a device can address."""
    return [memory.kind for memory in device.addressable_memories()]


def _place_on_mesh(state: PyTree, params: PyTree) -> Any:
    """Replicate uncommitted arrays of the state over the mesh of the parameters."""
    # tx.init makes some arrays without a sharding, on the default device. Moved to the host, they
    # would be committed to that device, and jit would refuse them beside arrays on the mesh.
    named = (leaf.sharding for leaf in _list_placed_arrays(params))
    mesh = next((s.mesh for s in named if isinstance(s, NamedSharding)), None)
    if mesh is None:
        return state
    whole = NamedSharding(mesh, PartitionSpec())
    loose = lambda leaf: _is_movable(leaf) and not jaxprs.is_tracer(leaf) and not leaf.committed
    return jax.tree.map(lambda leaf: jax.device_put(leaf, whole) if loose(leaf) else leaf, state)

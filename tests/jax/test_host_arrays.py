"""HostArray: the shards of one process, filled layer by layer."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax._jax.host_arrays import HostArray, allocate_aligned


def fill(array, values, axes):
    """Write a NumPy array into a HostArray, layer by layer along axes."""
    for index in np.ndindex(*(values.shape[axis] for axis in axes)):
        at = [slice(None)] * values.ndim
        for axis, number in zip(axes, index, strict=True):
            at[axis] = number
        if array.holds(axes, index):
            array.write(axes, index, values[tuple(at)])


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1), (0, 2)])
@pytest.mark.parametrize("spec", [(), ("x",), (None, "y", "x"), (("x", "y"),), ("y", None, "x")])
def test_places_what_was_written(axes, spec):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    values = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32)
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    array = HostArray(values.shape, jnp.bfloat16, sharding)
    fill(array, values, axes)
    placed = array.place()
    assert placed.sharding == sharding
    np.testing.assert_array_equal(np.asarray(placed), values.astype(jnp.bfloat16))


def test_numbers_and_whole_arrays():
    array = HostArray((), np.float32, None)
    array.write((), (), np.float32(3))
    assert array.place() == 3
    number = HostArray((), np.float32, jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P()))
    number.write((), (), np.float32(4))
    assert number.place() == 4
    whole = HostArray((2, 3), np.int32, None)
    whole.view((0,), (1,))[...] = 7
    whole.write((0,), (0,), np.arange(3))
    assert whole.to_numpy().tolist() == [[0, 1, 2], [7, 7, 7]]


class _Process:
    """The sharding of an array of 4 layers [6], of which this process has layers 2 and 3 once."""

    @staticmethod
    def addressable_devices_indices_map(shape):
        return {device: (slice(2, 4), slice(None)) for device in "ab"}


def test_only_the_shards_of_this_process_are_held():
    array = HostArray((4, 6), np.float32, _Process)
    assert [part.shape for part in array._parts.values()] == [(2, 6)]
    assert [array.holds((0,), (layer,)) for layer in range(4)] == [False, False, True, True]
    assert array.view((0,), (0,)) is None
    array.view((0,), (3,))[...] = 5
    assert array._parts[(2, 4), (0, 6)].tolist()[1] == [5] * 6
    array.write((0,), (0,), np.ones(6))  # of another process


def test_a_layer_in_several_shards_has_no_view():
    halves = types.SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {
            0: (slice(None), slice(0, 3)),
            1: (slice(None), slice(3, 6)),
        }
    )
    assert HostArray((4, 6), np.float32, halves).view((0,), (0,)) is None


def test_buffers_are_aligned():
    for dtype in (np.float32, jnp.bfloat16, jnp.uint4):
        assert allocate_aligned((3, 5), dtype).ctypes.data % 64 == 0

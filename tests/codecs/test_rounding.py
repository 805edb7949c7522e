"""round_to gives NumPy's own casts, in the wider dtype and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lowrank_jax._codecs.rounding import is_narrower, round_to

NARROW = ("float16", "bfloat16")
compiled = jax.jit(round_to, static_argnums=1)


def by_numpy(x, dtype):
    with np.errstate(over="ignore"):
        return x.astype(jnp.dtype(dtype)).astype(np.float32)


def no_subnormals(x):
    """XLA on CPU takes subnormal float32 for zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_value_of_the_narrow_dtype_and_both_sides_of_every_tie(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        values = np.sort(bits.view(jnp.dtype(dtype)).astype(np.float32))
    values = np.unique(values[np.isfinite(values)])
    middles = (values[:-1].astype(np.float64) + values[1:]).astype(np.float64) / 2
    ties = no_subnormals(middles.astype(np.float32))
    x = np.concatenate([values, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = no_subnormals(x.astype(np.float32))
    np.testing.assert_array_equal(compiled(x, dtype), no_subnormals(by_numpy(x, dtype)))


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float32, 16, elements=st.floats(width=32, allow_subnormal=False)),
    st.sampled_from(NARROW),
)
def test_any_float32(x, dtype):
    np.testing.assert_array_equal(compiled(x, dtype), no_subnormals(by_numpy(x, dtype)))


def test_a_wider_dtype_changes_nothing():
    x = jnp.float32([1.001, 1e-30])
    assert round_to(x, "float32") is x
    half = x.astype(jnp.bfloat16)
    assert round_to(half, "float32") is half
    assert [is_narrower("float16", other) for other in ("float16", "bfloat16", "float32")] == [
        *(False, True, True)
    ]

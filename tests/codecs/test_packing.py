"""4-bit codes in memory: round trips, halves of a block in a byte, bitsandbytes' bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_reference import (
    equal,
)

from lowrank_jax._codecs import packing

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("form", packing.PACKINGS)
def test_packing_round_trip(form, axis):
    codes = np.random.default_rng(6).integers(16, size=(64, 32, 6)).astype(np.uint8)
    for call in (
        lambda f, *args: f(*args),
        lambda f, *args: jax.jit(f, static_argnums=(1, 2))(*args),
    ):
        packed = call(packing.pack, codes, axis, form)
        assert packed.dtype == form
        assert packed.size == codes.size // (1 if form == "uint4" else 2)
        equal(call(packing.unpack, packed, axis, form), codes)


def test_halves_of_the_block_share_a_byte():
    codes = jnp.arange(8, dtype=jnp.uint8)[:, None]
    packed = packing.pack(codes, 0, "uint8")
    assert packed[:, 0].tolist() == [0x04, 0x15, 0x26, 0x37]


@pytest.mark.parametrize("n", [1, 2, 63, 64])
def test_bytes_of_bitsandbytes(n):
    codes = np.random.default_rng(7).integers(16, size=n).astype(np.uint8)
    for format, zero in (("nf4", 7), ("fp4", 0)):
        stored = packing.to_bnb_bytes(jnp.asarray(codes), format)
        full = [*codes.tolist(), zero]
        assert stored.tolist() == [16 * full[i] + full[i + 1] for i in range(0, n, 2)]
        equal(packing.from_bnb_bytes(stored[:, None], n), codes)

"""The dynamic map: bitsandbytes' numbers, nearest codes, and blocks along the axes."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax._codecs import dynamic

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "bitsandbytes_states.npz")
FORMS = ("signed", "unsigned")


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def paper_map(form):
    """arXiv 2110.02861 in float64: decades cut into 1, 2, .., 64 parts, or twice as many."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade * (1 if form == "signed" else 2)
        middles = 0.1 + 0.9 * (np.arange(parts) + 0.5) / parts
        values += list(10.0 ** (decade - 6) * middles)
        if form == "signed":
            values += list(-(10.0 ** (decade - 6)) * middles)
    values = np.sort(values)
    if form == "signed":
        values[0] = -1  # ours: the largest number of a block is kept, whatever its sign
    return values


def own_map(form):
    """What each code decodes to, where absmax is 1."""
    absmax = jnp.full((1,), 1.0 if form == "signed" else -1.0)
    return np.asarray(dynamic.decode_dynamic(jnp.arange(256, dtype=jnp.uint8), absmax, -1, 256))


def nearest(ratios, form):
    """The codes of ratios that are no block, zero among them."""
    ratios = jnp.asarray(ratios)
    unsigned = np.full(ratios.shape, form == "unsigned")
    return np.asarray(
        jax.jit(dynamic._find_nearest)(ratios, jnp.zeros(ratios.shape, bool), unsigned)
    )


@pytest.mark.parametrize("form", FORMS)
def test_map(form):
    own = own_map(form)
    np.testing.assert_allclose(own, paper_map(form), rtol=2e-7)
    theirs = GOLDEN[f"{form}/map"]
    first = 1 if form == "signed" else 0  # -0.993 there
    np.testing.assert_allclose(own[first:], theirs[first:], rtol=3e-7)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_those_of_bitsandbytes(form):
    x = GOLDEN[f"{form}/input"]
    codes, absmax = dynamic.encode_dynamic(jnp.asarray(x), -1, 256)
    want, blocks = GOLDEN[f"{form}/codes"].astype(int), np.arange(x.size) // 256
    chex.assert_trees_all_equal(np.abs(absmax), GOLDEN[f"{form}/absmax"])
    assert (np.asarray(absmax)[[0, 2, 3, 4, 5]] < 0).all() == (form == "unsigned")
    zeros = blocks == 1  # here always of the unsigned form
    if form == "unsigned":
        assert ((want == 0) & (x > 0)).any()
        want = np.where(x > 0, np.maximum(want, 1), want)
    chex.assert_trees_all_equal(np.asarray(codes)[~zeros], want.astype(np.uint8)[~zeros])
    decoded = np.asarray(dynamic.decode_dynamic(codes, absmax, -1, 256))
    kept = (want > 1) if form == "unsigned" else (want > 0)
    kept |= x == 0
    chex.assert_trees_all_close(decoded[kept], GOLDEN[f"{form}/decoded"][kept], rtol=4e-7)
    assert not np.asarray(codes)[zeros].any()
    assert not decoded[zeros].any()
    assert not np.signbit(decoded[zeros]).any()


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_the_nearest(form):
    own, rng = own_map(form), np.random.default_rng(0)
    uniform, decades = rng.uniform(-1, 1, 50_000), 10 ** rng.uniform(-9, 0, 50_000)
    ratios = np.concatenate([uniform, decades, -decades, own]).astype(np.float32)
    ratios = ratios if form == "signed" else np.abs(ratios)
    distance = lambda codes: np.abs(np.float64(ratios) - own[codes])
    codes, best = nearest(ratios, form).astype(int), np.zeros(ratios.size, int)
    best = np.searchsorted((paper_map(form)[1:] + paper_map(form)[:-1]) / 2, np.float64(ratios))
    assert (distance(codes) <= distance(best) + 1e-7 * np.abs(ratios)).all()
    assert (codes == best).mean() > 0.999


@pytest.mark.parametrize("form", FORMS)
def test_ties_go_to_the_lower_value(form):
    own = own_map(form)
    middles = (own[:-1] + own[1:]) / np.float32(2)
    codes = np.arange(255, dtype=np.uint8)
    chex.assert_trees_all_equal(nearest(middles, form), codes)
    chex.assert_trees_all_equal(nearest(np.nextafter(middles, np.float32(2)), form), codes + 1)
    chex.assert_trees_all_equal(nearest(np.nextafter(middles, np.float32(-2)), form), codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_decoded_is_encoded_the_same_again(dtype, sign):
    x = normal(8, 512)
    x = np.concatenate([x, x**2])
    x[:, 3] = 64 * sign
    x = x.astype(dtype)
    once = dynamic.encode_dynamic(x, -1, 256)
    decoded = dynamic.decode_dynamic(*once, -1, 256, dtype)
    assert decoded.dtype == dtype
    assert (np.asarray(decoded)[:, 3] == 64 * sign).all()
    chex.assert_trees_all_equal(dynamic.encode_dynamic(decoded, -1, 256), once)


@pytest.mark.parametrize(
    "shape",
    [
        (5, 64, 16),  # 16 rows of 16
        (3, 16, 1024),  # a quarter of a row
        (9, 700),  # 256, 256 and 188
        (4100,),  # 16 times 256, and 4
        (300, 17),  # 15 rows, no more fit
        (37, 2, 3),  # all of it
        (2, 257, 1),  # 256 and 1
    ],
)
def test_blocks_are_runs_of_elements(shape, fast_compile):
    x = normal(*shape)
    axis, size = dynamic.choose_blocks(shape, 256)

    @jax.jit
    def there_and_back(x):
        codes, absmax = dynamic.encode_dynamic(x, axis, size)
        return codes, absmax, dynamic.decode_dynamic(codes, absmax, axis, size)

    codes, absmax, decoded = there_and_back(x)
    assert codes.shape == shape
    assert codes.dtype == jnp.uint8
    assert absmax.ndim == x.ndim
    rows = np.abs(x).reshape(*shape[:axis], -1)
    run = size * int(np.prod(shape[x.ndim + axis + 1 :]))
    assert run <= 256
    starts = range(0, rows.shape[-1], run)
    want = np.stack([rows[..., i : i + run].max(-1) for i in starts], -1)
    chex.assert_trees_all_equal(np.abs(np.asarray(absmax)).reshape(want.shape), want)
    # in the unit of its own block no element is off by more than half a step of the map
    off = np.abs(np.asarray(decoded) - x)
    assert (
        off.reshape(rows.shape) <= 0.0106 * np.repeat(want, run, -1)[..., : rows.shape[-1]]
    ).all()


def test_a_positive_number_never_becomes_zero():
    x = jnp.array([[1.0, 1e-9, 1e-30, 0.0], [1e-20, 1e-37, 3e-31, 0.0], [5e-8, 0.0, 1e-40, 0.0]])
    decoded = dynamic.decode_dynamic(*dynamic.encode_dynamic(x, -1, 4), -1, 4)
    visible = np.asarray(x) > np.finfo(np.float32).tiny  # XLA reads what is less as 0
    assert ((np.asarray(decoded) > 0) == visible).all()


def test_numbers_that_are_not_finite_stay_so():
    x = np.ones((4, 256), np.float32)
    x[:3, 5] = np.nan, np.inf, -np.inf
    decoded = np.asarray(dynamic.decode_dynamic(*dynamic.encode_dynamic(x, -1, 256), -1, 256))
    assert not np.isfinite(decoded[:3]).any()
    assert (decoded[3] == 1).all()


def test_the_same_under_jit_and_vmap():
    x = normal(6, 64, 16)
    x[3:] *= np.float32(1e-20)
    x[5] = 0
    with jax.disable_jit(), jax.debug_nans(True):
        eager = dynamic.encode_dynamic(jnp.asarray(x), -2, 16)
    for run in (jax.jit, jax.vmap):
        chex.assert_trees_all_equal(run(lambda x: dynamic.encode_dynamic(x, -2, 16))(x), eager)

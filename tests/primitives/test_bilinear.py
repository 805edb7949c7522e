"""The bilinear primitive against einsum: both lowerings, derivatives, nested vmaps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax._primitives import bilinear as b

pytestmark = pytest.mark.usefixtures("fast_compile")

CASES = [
    "bti,ir->btr",
    "bti,btr->ir",
    "sbi,sir->bsr",
    "abij,jc->abic",
    "ri,bti->rbt",
    "i,i->",
    "ai,b->aib",
]
SIZES = dict(zip("abcijrst", range(2, 10), strict=True))


def operands(case, key=0):
    left, right, out = case.replace("->", ",").split(",")
    rng = np.random.default_rng(key)
    draw = lambda names: rng.standard_normal([SIZES[n] for n in names]).astype(np.float32)
    x, y = draw(left), draw(right)
    return x, y, tuple(left), tuple(right), tuple(out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lowering", [b._dot, b._flat_dot])
def test_both_lowerings_are_einsum(case, lowering):
    x, y, xl, yl, out = operands(case)
    got = jax.jit(lambda x, y: lowering(x, y, xl=xl, yl=yl, out=out, **b._OPTIONS))(x, y)
    np.testing.assert_allclose(got, np.einsum(case, x, y), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    x, y, xl, yl, out = operands(case)
    mine = lambda x, y: jnp.sin(b.bilinear(x, y, xl, yl, out)).sum()
    want = lambda x, y: jnp.sin(jnp.einsum(case, x, y)).sum()
    tangents = operands(case, key=1)[:2]
    derivatives = lambda f, x, y: (
        (jax.grad(f, (0, 1))(x, y), jax.hessian(f, 1)(x, y)),
        jax.jvp(f, (x, y), tangents)[1],
    )
    run = jax.jit(lambda x, y: [derivatives(f, x, y) for f in (mine, want)])
    (got, along), (reference, wanted) = jax.device_get(run(x, y))
    jax.tree.map(
        lambda g, r: np.testing.assert_allclose(g, r, rtol=1e-3, atol=1e-4), got, reference
    )
    np.testing.assert_allclose(along, wanted, rtol=1e-3)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 0), (-1, 1)])
def test_vmap_twice(axes):
    case = "bti,ir->btr"
    _, _, xl, yl, out = operands(case)
    mine = lambda x, y: b.bilinear(x, y, xl, yl, out)
    want = lambda x, y: jnp.einsum(case, x, y)
    size = lambda axis, base: (
        base if axis is None else tuple(np.insert(base, axis % (len(base) + 1), 3))
    )
    x, y = (np.random.default_rng(0).normal(size=size(a, size(a, s))).astype(np.float32)
            for a, s in zip(axes, [(4, 5, 6), (6, 2)], strict=True))  # fmt: skip
    twice = lambda f: jax.vmap(jax.vmap(f, axes), axes)
    got, reference = jax.jit(lambda x, y: (twice(mine)(x, y), twice(want)(x, y)))(x, y)
    np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-5)


def test_tokens_are_flattened_on_cpu_and_nowhere_else():
    x, y, xl, yl, out = operands("bti,btr->ir")
    fn = jax.jit(lambda x, y: b.bilinear(x, y, xl, yl, out))
    merged = f"tensor<{SIZES['b'] * SIZES['t']}x"
    assert merged in fn.trace(x, y).lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("tpu", "cuda"):
        assert merged not in fn.trace(x, y).lower(lowering_platforms=(platform,)).as_text()


def test_result_dtypes():
    x, y, xl, yl, out = operands("bti,ir->btr")
    x = x.astype(jnp.bfloat16)
    both = lambda x, y: (
        b.bilinear(x, y, xl, yl, out),
        b.bilinear(x, y, xl, yl, out, preferred_element_type=jnp.float32),
    )
    got, wide = jax.jit(both)(x, y.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert wide.dtype == jnp.float32
    grads = jax.grad(lambda x, y: b.bilinear(x, y, xl, yl, out).astype(jnp.float32).sum(), (0, 1))
    shapes = jax.eval_shape(grads, x, y.astype(jnp.bfloat16))
    assert [g.dtype for g in shapes] == [jnp.bfloat16] * 2

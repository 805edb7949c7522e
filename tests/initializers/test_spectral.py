"""PiSSA and OLoRA: the papers' equations in NumPy, and the exact one beside the randomized."""

import numpy as np
import pytest
from initializer_methods import (
    CLOSE,
    RANK,
    SCALE,
    SHAPES,
    assert_near,
    case,
    norm,
    normal,
    product,
    run,
    svd,
)

from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("path", ["down", "up"])
def test_randomized_pissa_is_nearer_to_the_exact_than_pefts(path):
    a, b, _, weight, rank, scale = case("pissa_niter_4", path)
    sigma = np.linalg.svd(weight, compute_uv=False)
    best = np.sqrt(np.sum(sigma[rank:] ** 2))
    lost = lambda a, b: np.linalg.norm(weight - product(a, b, scale)) / best
    our_a, our_b, _ = run(initializers.randomized_pissa(4), weight, rank, scale)
    assert 1 - CLOSE < lost(our_a, our_b) < min(1.001, lost(a, b))


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_takes_the_best_part_of_the_rank(shape):
    weight = normal(*shape)
    a, b, _ = run(initializers.pissa, weight)
    u, s, vt = svd(weight)
    assert_near(product(a, b), u[:, :RANK] * s[:RANK] @ vt[:RANK], norm(weight))
    assert_near(SCALE * a.T @ a, np.diag(s[:RANK]), norm(weight))  # shared evenly
    assert_near(SCALE * b @ b.T, np.diag(s[:RANK]), norm(weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_leading_part_of_qr(shape):
    weight = normal(*shape)
    a, b, _ = run(initializers.olora, weight)
    q, r = np.linalg.qr(weight.T.astype(np.float64))
    assert_near(product(a, b), SCALE * (q[:, :RANK] @ r[:RANK]).T, norm(weight))
    assert_near(b @ b.T, np.eye(RANK), 1)

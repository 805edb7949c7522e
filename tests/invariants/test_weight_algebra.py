"""Random programs of a weight: lifted, they are the dense programs on the merged weight.

The long form, which includes programs that fall back to a dense weight, is
`python tests/support/algebra.py --seeds 0:2000`.
"""

import pytest
from algebra import judge

from lowrank_jax import _codecs

pytestmark = pytest.mark.usefixtures("fast_compile")
TOGETHER = 20  # programs compiled as one


# 20 programs in the suite, 80 more of them slow
FIRST = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(TOGETHER, 100, TOGETHER))]


@pytest.mark.parametrize("first", FIRST)
def test_lifted_programs_are_the_dense_ones(first, monkeypatch):
    monkeypatch.setattr(_codecs.formats, "BLOCK_SIZES", (2, 32, 64))
    verdicts = judge(range(first, first + TOGETHER), TOGETHER, short=True)
    wrong = [f"seed {v.seed}: {v.wrong}\n{v.text}" for v in verdicts if v.wrong]
    assert not wrong, "\n".join(wrong)
    # programs that all fall back to dense weights would test nothing
    assert sum(not v.fallbacks for v in verdicts) >= TOGETHER // 8

"""The tables of the 4-bit formats: the paper's equation, and those of bitsandbytes' files."""

from statistics import NormalDist

import numpy as np
import pytest
from codec_reference import (
    FOUR_BITS,
    ORDERS,
    equal,
    load,
)

from lowrank_jax import _codecs as codecs
from lowrank_jax._codecs import scales

pytestmark = pytest.mark.usefixtures("strict_promotion")


def test_nf4_is_the_papers_equation():
    # arXiv 2305.14314, appendix E: quantiles of N(0, 1), 8 above zero and 7 below, over the largest
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    values = np.sort([*above, 0, *below]) / max(above)
    assert np.abs(values - codecs.FORMATS["nf4"].table).max() < 1e-6


@pytest.mark.parametrize("format", FOUR_BITS)
def test_tables_are_those_of_the_files(format):
    state, spec = load("state"), codecs.FORMATS[format]
    equal(spec.table, state[f"{format}-single/layer.weight.quant_map"])
    equal(spec.order, np.array(ORDERS[format], np.uint8))
    assert spec.zero == {"nf4": 7, "fp4": 0}[format]
    equal(scales.DYNAMIC_MAP, state[f"{format}-double/layer.weight.nested_quant_map"])

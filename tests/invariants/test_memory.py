"""Memory of a train step on a 4-bit base: the short form of benchmarks/memory.py."""

import argparse

import aot
import memory
import pytest

OPTIONS = argparse.Namespace(
    layers=None, dtype="float32", batch=1, tokens=512, rank=16, optimizer_bits=32
)


def temporaries(mode, base):
    fn, shapes = memory.step_of("small", mode, base, OPTIONS)
    return aot.compiled(fn, *shapes, target="cpu", donate=(1, 2)).temporaries


@pytest.mark.parametrize("mode", [pytest.param("unrolled", marks=pytest.mark.slow), "scan+remat"])
def test_decoding_adds_no_temporaries_on_cpu(mode):
    dense, quantized = (temporaries(mode, base) for base in ("dense", "nf4+dq, uint8"))
    assert quantized <= 1.05 * dense

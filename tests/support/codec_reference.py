"""bitsandbytes' block formats a second time, in NumPy; its golden files; inputs near every tie."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "bitsandbytes"
FOUR_BITS = ("nf4", "fp4")
FORMATS = (*FOUR_BITS, "int8")
BLOCKS = (32, 64, 128, 256, 4096)
F32 = np.float32


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def bits(x):
    return np.asarray(x, F32).view(np.uint32)


def equal(got, wanted):
    """The same dtype, shape and bits (bits, so that -0 is not 0)."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.tobytes() == wanted.tobytes(), np.argwhere(got != wanted)[:5]


def ulps(x, n):
    """The n-th float32 away from x, in magnitude."""
    return (np.asarray(x, F32).view(np.int32) + n).astype(np.int32).view(F32)


NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
TABLES = {"nf4": np.array(NF4.split(), F32), "fp4": np.array(FP4, F32) / F32(12)}
ORDERS = {"nf4": [*range(16)], "fp4": [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]}


def reference(x, format, short=False):
    """Codes and absmax of blocks [n, block]."""
    absmax = np.abs(x).max(-1)
    floor = np.maximum(absmax, F32(1e-38))
    with np.errstate(under="ignore"):
        scaled = x / floor[:, None] if short else x * (F32(1) / floor)[:, None]
        scaled = np.clip(scaled, F32(-1), F32(1))
    if format == "int8":
        return np.round(scaled * F32(127)).astype(np.int8), absmax
    values = TABLES[format][ORDERS[format]]
    middles = (values[:-1] + values[1:]) / F32(2)
    return np.array(ORDERS[format], np.uint8)[np.searchsorted(middles, scaled, "left")], absmax


def decoded(codes, absmax, format):
    if format == "int8":
        return codes.astype(F32) * (absmax * (F32(1) / F32(127)))[:, None]
    return TABLES[format][codes] * absmax[:, None]


def adversarial(format, blocks=2000, block=64, seed=0):
    """Blocks full of what lies at, and 1 or 2 ulps from, a midpoint * absmax; every magnitude."""
    rng = np.random.default_rng(seed)
    absmax = F32(2) ** rng.integers(-110, 124, blocks).astype(F32)
    absmax *= rng.choice([F32(1), ulps(1, 1), ulps(2, -1), F32(1.5)], blocks)
    absmax[::2] *= rng.uniform(1, 2, len(absmax[::2])).astype(F32)
    if format == "int8":
        middles = (np.arange(-127, 127).astype(F32) + F32(0.5)) / F32(127)
    else:
        values = np.sort(TABLES[format])
        middles = (values[:-1] + values[1:]) / F32(2)
    chosen = rng.choice(middles, (blocks, block))
    x = ulps(chosen * absmax[:, None], rng.integers(-2, 3, chosen.shape))
    x[chosen == 0] = 0  # the neighbors of 0 are subnormal
    x[np.arange(blocks), rng.integers(block, size=blocks)] = absmax * rng.choice([-1, 1], blocks)
    x[7] = 0
    return x.astype(F32)

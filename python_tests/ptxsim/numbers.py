"""16-bit floats and sums rounded once, on arrays."""

import numpy as np


def half_read(bits):
    with np.errstate(invalid="ignore"):  # signalling NaN
        return bits.view(np.float16).astype(np.float64)


def half_round(x):
    """float64 to fp16 bits, to nearest, ties to even; NaN is 0x7fff, as a device makes it."""
    with np.errstate(all="ignore"):
        out = np.asarray(x, np.float64).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), out)


def bf16_read(bits):
    with np.errstate(invalid="ignore"):  # signalling NaN
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def bf16_round(x):
    """float64 to bf16 bits: the unit in the last of 8 places, or 2^-133 below the normal numbers."""
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        _, e = np.frexp(x)
        unit = np.maximum(e - 8, -133)
        y = np.ldexp(np.rint(np.ldexp(x, -unit)), unit)
        out = (y.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), out)


def add_to_odd(x, y):
    """x + y in float64 such that rounding on to a shorter type gives what rounding the exact sum would: where bits were lost, the last one is set."""
    with np.errstate(all="ignore"):
        s = np.asarray(x + y)
        back = s - x
        lost = (x - (s - back)) + (y - back)
        bits = s.view(np.int64)
        adjust = np.isfinite(s) & (lost != 0) & (bits & 1 == 0)
        return np.where(adjust, bits + np.where((lost > 0) == (s > 0), 1, -1), bits).view(np.float64)


def fma32(a, b, c):
    """a * b + c in float32, rounded once: the product of two floats is exact in float64."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        return add_to_odd(product, c.astype(np.float64)).astype(np.float32)


def flush(x):
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)

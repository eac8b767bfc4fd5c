"""Inputs and references of the self-test kernels gemv.cu and gemm.cu, for both executors, and the means to plant a bug in them."""

import hashlib

import numpy as np

from .build import CACHE, HERE, ROOT

GEMV, GEMM, EVERY = (HERE / name for name in ("gemv.cu", "gemm.cu", "every.cu"))
PTX_HEADER = ROOT / "csrc" / "cuda" / "ptx.cuh"


def plant(source, *changes):
    """A copy of a source in which each ``(old, new)`` is done, and nothing else; ``old`` must occur once. The place hangs on the contents."""
    text = source.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {source.name}"
        text = text.replace(old, new)
    path = CACHE / "planted" / hashlib.sha256(text.encode()).hexdigest()[:16] / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(text)
    return path


class Gemm:
    """c [m, n] = a [m, k] b [n, k]^T."""

    def __init__(self, rng, m, n, k):
        self.a, self.b = rng.standard_normal((m, k)).astype(np.float16), rng.standard_normal((n, k)).astype(np.float16)
        self.c = np.full((m, n), np.nan, np.float32)
        self.want = self.a.astype(np.float64) @ self.b.astype(np.float64).T
        self.call = ("run_gemm_f16", self.a, self.b, self.c, m, n, k)

    def error(self):
        return relative(self.c, self.want)


class Gemv:
    """y [n] = W x with int4 codes, groups of 64."""

    def __init__(self, rng, n, k):
        codes, scales = rng.integers(0, 2**32, (n, k // 8), dtype=np.uint32), rng.random((n, k // 64)).astype(np.float16)
        x, self.y = rng.standard_normal(k).astype(np.float32), np.full(n, np.nan, np.float32)
        levels = (codes[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(n, k).astype(np.float64) - 8
        self.want = levels * np.repeat(scales.astype(np.float64), 64, 1) @ x
        self.call = ("run_gemv_w4", codes, scales, x, self.y, n, k)

    def error(self):
        return relative(self.y, self.want)


class Parts:
    """Sum of n floats over blocks, with a ticket."""

    def __init__(self, rng, n):
        x = rng.standard_normal(n).astype(np.float32)
        self.ticket, self.out = np.zeros(1, np.uint32), np.full(1, np.nan, np.float32)
        self.want = np.array([x.sum(dtype=np.float64)])
        self.call = ("run_sum_parts", x, np.full((n + 63) // 64, np.nan, np.float32), self.ticket, self.out, n)

    def error(self):
        assert self.ticket[0] == 0
        return float(np.abs(self.out - self.want)[0]) / 30  # of the order of the sum of the sizes


def relative(got, want):
    """Largest difference over the largest number; NaN counts as infinite."""
    d = np.abs(got - want).max() / np.abs(want).max()
    return float(d) if d == d else float("inf")

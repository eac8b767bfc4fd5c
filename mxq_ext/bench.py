"""``mxq bench`` without a checkpoint: one linear layer in each format against torch's float32 layer of the same shape.

Weights are random, since only their bytes matter for speed. Between two calls a buffer larger than the caches is written, because
in a real model a layer's weights were last read one whole forward pass ago.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import ops
from .errors import ShapeError
from .formats import Format
from .progress import SILENT, Progress
from .qtensor import QTensor

FORMATS = ("w2g64", "w2g64_asym", "w3g64", "w3g64_asym", "w4g64", "w4g64_asym", "w4g64_fz", "w8g128_asym", "nf4g64", "lut2", "lut3", "lut4",
           "fp16")
FLUSH_BYTES = 64 << 20
REPEATS = 15


def random_qtensor(fmt: Format | str, n: int, k: int, seed: int = 0) -> QTensor:
    """A QTensor [n, k] with random codes and scales, made without a quantizer."""
    fmt, rng = Format.parse(fmt), torch.Generator().manual_seed(seed)
    if fmt.kind == "float":
        return QTensor.from_float(torch.randn(n, k, generator=rng) * 0.02)
    codes = torch.randint(0, fmt.levels, (n, k), generator=rng, dtype=torch.uint8)
    if fmt.kind == "lut":
        return QTensor.from_codes(fmt, codes, table=torch.randn(n, fmt.levels, generator=rng) * 0.02)
    groups = fmt.groups(k)
    scales = torch.rand(n, groups, generator=rng) * 0.02 + 0.001
    zeros = None
    if fmt.zero == "int":
        zeros = torch.randint(0, fmt.levels, (n, groups), generator=rng)
    elif fmt.zero == "float":
        zeros = -scales * fmt.symmetric_zero
    return QTensor.from_codes(fmt, codes, scales=scales, zeros=zeros)


def seconds_per_call(call, repeats: int) -> float:
    """Median wall time of ``call()`` with cold caches, in seconds; the first call is not counted."""
    flush = torch.zeros(FLUSH_BYTES // 4)
    call()
    times = []
    for _ in range(repeats):
        flush.add_(1.0)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def linear_speed(formats: Sequence[str] = FORMATS, n: int = 4096, k: int = 4096, rows: int = 1,
                 progress: Progress = SILENT) -> dict[str, Any]:
    """Times ``ops.linear`` for x [rows, k] and W [n, k] in each format, and torch's float32 linear.

    Returns a JSON dict: the setting, and ``linear``: one entry per format with the kernel's name, microseconds per call, weight bytes
    read per second, and the factor by which it is faster than torch's float32. Raises FormatError, ShapeError.
    """
    if min(n, k, rows) < 1:
        raise ShapeError(f"bench of {rows} x {k} by {n} x {k}", "sizes must be at least 1", "give positive sizes")
    with torch.inference_mode():
        x = torch.randn(rows, k)
        weight = torch.randn(n, k)
        base = seconds_per_call(lambda: torch.nn.functional.linear(x, weight), REPEATS)
        out = [{"format": "torch float32", "kernel": "torch", "stored_bits": 32.0, "us": base * 1e6, "gb_per_s": weight.nbytes / base / 1e9,
                "speedup": 1.0}]
        for name in progress.track(list(formats), "bench"):
            q = random_qtensor(name, n, k)
            packed = ops.prepack(q)
            seconds = seconds_per_call(lambda: ops.linear(x, packed), REPEATS)  # noqa: B023  called before the loop goes on
            out.append({"format": q.format_name, "kernel": ops.explain(packed, rows), "stored_bits": q.stored_bits(), "us": seconds * 1e6,
                        "gb_per_s": q.nbytes() / seconds / 1e9, "speedup": base / seconds})
    return {"rows": rows, "n": n, "k": k, "threads": torch.get_num_threads(), "target": ops.target(), "torch": torch.__version__,
            "linear": out}

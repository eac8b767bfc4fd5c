"""``mxq bench`` without a checkpoint: one linear layer in each format against torch's float32 layer of the same shape.

Weights are random, since only their bytes matter for speed. Several copies of each take turns, so that they come from memory as
in a model, where a layer's weights were last read one whole forward pass ago.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from .errors import ShapeError
from .formats import Format
from .testing.cases import BENCH_FORMATS, random_qtensor, random_x
from .testing.timing import copies, in_turns

FLOAT = "torch float32"


def _layer(x: torch.Tensor, nbytes: int, make: Callable[[], Any], call: Callable[[torch.Tensor, Any], object]) -> Callable[[int], object]:
    """A function of the call's number that multiplies ``x`` by one of enough copies of a weight of ``nbytes``."""
    weights = [make() for _ in range(copies(nbytes))]
    return lambda i: call(x, weights[i % len(weights)])


def linear_speed(formats: Sequence[str] = BENCH_FORMATS, n: int = 4096, k: int = 4096, rows: int = 1, rounds: int = 7) -> dict[str, Any]:
    """Times ``ops.linear`` for x [rows, k] and W [n, k] in each format, and torch's float32 linear.

    Returns a JSON dict: the setting, and ``linear``: one entry per format with the kernel's name, microseconds of a call (median of
    ``rounds``), weight bytes read per second, and how many times faster than torch's float32 it is. Raises FormatError, ShapeError.
    """
    if min(n, k, rows) < 1:
        raise ShapeError(f"bench of {rows} x {k} by {n} x {k}", "sizes must be at least 1", "give positive sizes")
    x = random_x(rows, k)
    weight = torch.randn(n, k)
    described = {FLOAT: {"kernel": "torch", "nbytes": weight.nbytes}}
    layers = {FLOAT: _layer(x, weight.nbytes, weight.clone, torch.nn.functional.linear)}
    for name in dict.fromkeys(Format.parse(f).name for f in formats):
        q = random_qtensor(name, n, k)
        packed = ops.prepack(q)
        described[name] = {"kernel": ops.explain(packed, rows), "nbytes": q.nbytes()}
        layers[name] = _layer(x, packed.nbytes, packed.clone, ops.linear)
    with torch.inference_mode():
        times = in_turns(layers, rounds)
    base = times[FLOAT].median
    table = [{"format": name, "kernel": d["kernel"], "stored_bits": 8 * d["nbytes"] / (n * k), "us": times[name].median * 1e6,
              "gb_per_s": d["nbytes"] / times[name].median / 1e9, "speedup": base / times[name].median} for name, d in described.items()]
    return {"rows": rows, "n": n, "k": k, "threads": torch.get_num_threads(), "target": ops.target(), "torch": torch.__version__,
            "linear": table}

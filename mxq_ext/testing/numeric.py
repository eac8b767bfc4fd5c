"""The one measure of error and its bounds.

``error(y, ref)`` is the relative distance ``|y - ref| / |ref|`` in the Euclidean norm over the whole result: what a layer adds to the
signal as noise. It is computed in float64 and printed by whoever checks it, so that a test log shows how near the bound is.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..formats import Format

#: Half a unit in the last place of each output type: what rounding the result alone may cost at most.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: Accumulation in float32 by a few thousand terms, in units of 2**-24, for kernels that sum (code - centre) * x.
_SUM = 24
#: Float zeros add scale * code and zero * sum(x), two sums that partly cancel.
_CANCEL = 4


def error(y, ref) -> float:
    """|y - ref| / |ref|; 0 for two empty or two zero results, infinite if anything is not finite."""
    a, b = (np.asarray(v.detach().to(torch.float64) if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (y, ref))
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    distance, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return distance / norm if norm else (0.0 if distance == 0 else math.inf)


def bound(formats, dtype: torch.dtype) -> float:
    """Largest allowed :func:`error` of a linear kernel against float64, for one format or several (names or Formats) and x's type."""
    names = [formats] if isinstance(formats, (str, Format)) else list(formats)
    worst = max((_CANCEL if Format.parse(f).zero != "sym" else 1 for f in names), default=1)
    return 2.0**-24 * _SUM * worst + (ROUNDING[dtype] if dtype != torch.float32 else 0.0)


def check(y, ref, limit: float, what: str) -> float:
    """Prints the error and raises AssertionError above ``limit``."""
    e = error(y, ref)
    print(f"{what}: error {e:.2e}, bound {limit:.2e}")
    assert e <= limit, f"{what}: error {e:.3e} exceeds the bound {limit:.3e}"
    return e

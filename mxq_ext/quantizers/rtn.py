"""Round to nearest: each weight on its own, to the grid of its group's range (or of a searched, narrower one)."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import Format
from ..qtensor import QTensor
from .base import Options, need, register, with_sparse
from .grid import make_grid
from .hessian import diagonal


@dataclass
class RtnOptions(Options):
    """clip: ``"none"`` covers each group's range, ``"mse"`` searches for the range with the least error, weighted by diag(H) (or by the
    Fisher diagonal, which wins) if one is given; of one bit it is always searched. clip_power: exponent of that error (GPTQ's code has 2.4)."""

    clip: str = "none"
    clip_power: float = 2.0

    def check(self) -> None:
        need(self.clip in ("none", "mse"), "clip", self.clip, "it must be 'none' or 'mse'")
        need(0 < self.clip_power <= 4, "clip_power", self.clip_power, "it must lie in (0, 4]")


def applies(fmt: Format):
    """RTN needs a grid; a table has to be fitted first."""
    if fmt.kind != "lut":
        return None
    return f"{fmt} needs a fitted table, which rounding does not make", "use method='kmeans', or 'gptq' with a Hessian"


@register("rtn", RtnOptions, applies, sparse=True)
def run(weight, fmt, options, *, hessian=None, fisher=None, exact=None):
    """weight float32 [N, K] -> (QTensor, report)."""
    importance = fisher
    if importance is None and hessian is not None:
        importance = diagonal(hessian)
    grid = make_grid(weight, fmt, clip=options.clip, importance=importance, power=options.clip_power, exact=exact)
    return with_sparse(QTensor.from_codes(fmt, grid.encode(weight), **grid.constants()), weight, exact), {}

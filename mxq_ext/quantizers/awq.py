"""AWQ's clip search (Lin et al. 2023, arXiv 2306.00978): round to nearest within bounds on |w| that give each group the least output error.

    e_g(p) = dw_g H_gg dw_g^T,    dw_g = Q(clamp(w_g, -p max|w_g|, p max|w_g|)) - w_g,    p = 1, 0.95, ... 0.55

H_gg is the block of the second moment that belongs to the group: the mean square of the group's part of the output, exactly what the authors' code
averages over a sample of tokens. They leave queries and keys unclipped; here the method does not know what it quantizes, and every clip lowers the error
that it is judged by. The scale search that goes before it is a transform of the model (:mod:`mxq_ext.transforms.awq`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import QuantizationError
from ..formats import Format
from ..qtensor import QTensor
from .base import Options, need, register
from .grid import Grid, make_grid, spread
from .hessian import HessianFactor


@dataclass
class AwqOptions(Options):
    """steps: the bound shrinks by 1/steps of the range at a time; shrink: the most that is cut off, as a share of it."""

    steps: int = 20
    shrink: float = 0.5

    def check(self) -> None:
        need(self.steps >= 1, "steps", self.steps, "it must be an integer >= 1")
        need(0 <= self.shrink < 1, "shrink", self.shrink, "it must lie in [0, 1)")


def applies(fmt: Format):
    if fmt.nested:
        return f"AWQ clips each group for itself, and 16 groups of {fmt} share a range of scales", f"use {fmt.expanded}, or the method gptq or rtn"
    if fmt.kind != "lut":
        return None
    return f"AWQ clips ranges, and {fmt} has fitted tables", "use method='kmeans', or 'gptq' with a Hessian"


@register("awq", AwqOptions, applies)
def run(weight, fmt, options, *, hessian=None, fisher=None):
    """weight float32 [N, K] -> (QTensor, report)."""
    if hessian is None:
        raise QuantizationError(f"quantizing a weight of {weight.shape[0]} x {weight.shape[1]} to {fmt} with awq",
                                "it needs the layer's Hessian, none was given", "calibrate first, or use method='rtn'")
    h = hessian.matrix if isinstance(hessian, HessianFactor) else hessian
    cols = weight.shape[1]
    width = fmt.group or cols
    starts = range(0, cols, width)
    blocks = [h[a:a + width, a:a + width] for a in starts]
    bound = torch.cat([weight[:, a:a + width].abs().amax(1, keepdim=True) for a in starts], 1)
    best = None
    for i in range(max(1, int(options.shrink * options.steps))):
        shrunk = bound * (1 - i / options.steps)
        clipped = _clip(weight, shrunk, width)
        grid = make_grid(clipped, fmt)
        d = grid.decode(grid.encode(clipped)) - weight
        error = torch.stack([((d[:, a:a + width] @ b) * d[:, a:a + width]).sum(1) for a, b in zip(starts, blocks, strict=True)], 1)
        if best is None:
            best, chosen, scales, zeros = error, shrunk, grid.scales, grid.zeros
            continue
        better = error < best
        best, chosen, scales = torch.where(better, error, best), torch.where(better, shrunk, chosen), torch.where(better, grid.scales, scales)
        zeros = None if zeros is None else torch.where(better, grid.zeros, zeros)
    codes = Grid(fmt, cols, scales, zeros).encode(_clip(weight, chosen, width))
    return QTensor.from_codes(fmt, codes, scales=scales, zeros=zeros), {"clipped": float((chosen < bound).float().mean())}


def _clip(w, bound, width):
    """w [N, K] within +-bound [N, G] of its group."""
    limit = spread(bound, width, w.shape[1])
    return torch.maximum(torch.minimum(w, limit), -limit)

"""HQQ (Badri and Shaji 2023): zeros that minimize |W - Q|_p^p, p < 1, by half-quadratic splitting; needs no data.

    e    = shrink(W - Wr),  shrink(E) = sign(E) max(0, |E| - |E|^(p-1) / beta)      (the outliers' share of the error)
    zero = mean over the group of the zero that would map the codes onto W - e
    beta = kappa * beta

Only the zero moves; the scale stays min-max. p = 0.7, beta = 10, kappa = 1.01 as in the authors' code. Where that stops when the mean error
of the whole weight no longer falls, here each group stops on its own, so no group ends up worse than it began.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Format
from ..qtensor import QTensor
from .base import Options, need, register
from .grid import Grid, group_sum, make_grid, round_zero, spread


@dataclass
class HqqOptions(Options):
    """p: the norm; beta, kappa: the splitting's stiffness and its growth; iterations: the most that are made."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def check(self) -> None:
        need(0 < self.p <= 1, "p", self.p, "it must lie in (0, 1]")
        need(self.beta > 0, "beta", self.beta, "it must be positive")
        need(self.kappa >= 1, "kappa", self.kappa, "it must be at least 1")
        need(self.iterations >= 0, "iterations", self.iterations, "it must be an integer >= 0")


def applies(fmt: Format):
    if fmt.nested:
        return f"HQQ moves the zero of each group freely, and {fmt} stores codes of them", f"use {fmt.expanded}, or the method gptq or rtn"
    if fmt.kind == "uniform" and fmt.zero != "sym":
        return None
    return f"HQQ optimizes zero points, and {fmt} has none", "use a _fz or _asym format, or another method"


@register("hqq", HqqOptions, applies)
def run(weight, fmt, options, *, hessian=None, fisher=None):
    """weight float32 [N, K] -> (QTensor, report). Neither Hessian nor Fisher is used."""
    start = make_grid(weight, fmt, exact_constants=False)
    free = Format("uniform", fmt.bits, fmt.group, "float", fmt.scale_dtype)
    s = start.scales
    zeros, history = optimize_zeros(weight, free, s, start.offsets(), options)
    report = {"mean_abs_error": history, "warnings": []}
    if fmt.zero == "float":
        grid = Grid(fmt, weight.shape[1], s, zeros)
    else:
        rounded = Grid(fmt, weight.shape[1], s, (-zeros / s).round_().clamp_(0, fmt.levels - 1))
        # Rounding the optimum can undo what was won; then the group keeps the zero it started with.
        keep = _group_error(weight, rounded) > _group_error(weight, start)
        grid = Grid(fmt, weight.shape[1], s, torch.where(keep, start.zeros, rounded.zeros))
        report["zeros"] = "rounded to integers"
        report["warnings"].append(f"HQQ optimizes float zeros; {fmt} stores integers, so they were rounded (a _fz format keeps them)")
    return QTensor.from_codes(fmt, grid.encode(weight), **grid.constants()), report


def optimize_zeros(w, fmt, scales, zeros, options):
    """(zeros [N, G] as stored, mean |W - Wr| after each iteration, the start first); scales and start zeros float32 [N, G]."""
    cols = w.shape[1]
    width = fmt.group or cols
    counts = torch.tensor([min(width, cols - g * width) for g in range(scales.shape[1])], dtype=torch.float32)
    grid = Grid(fmt, cols, scales, round_zero(zeros, fmt))
    s = spread(scales, width, cols)
    best = _group_error(w, grid)
    history = [float(best.sum() / w.numel())]
    live = torch.ones_like(best, dtype=torch.bool)
    beta = options.beta
    for _ in range(options.iterations):
        codes = grid.encode(w)
        e = w - grid.decode(codes)
        # |E|^(p-1) is infinite at 0, where the result is 0 all the same.
        shrunk = e.sign() * (e.abs() - e.abs().clamp(min=1e-20).pow(options.p - 1) / beta).clamp_(min=0)
        ideal = w - shrunk - s * codes.float()
        fresh = Grid(fmt, cols, scales, torch.where(live, round_zero(group_sum(ideal, width) / counts, fmt), grid.zeros))
        error = _group_error(w, fresh)
        live = live & (error < best)
        if not live.any():
            break
        grid = Grid(fmt, cols, scales, torch.where(live, fresh.zeros, grid.zeros))
        best = torch.where(live, error, best)
        history.append(float(best.sum() / w.numel()))
        beta *= options.kappa
    return grid.zeros, history


def _group_error(w, grid):
    """sum |W - Wr| per group, [N, G]."""
    return group_sum((w - grid.decode(grid.encode(w))).abs(), grid.width)

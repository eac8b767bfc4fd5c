"""``sense``: model + Stats -> CostTable, by trying every candidate on every unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..errors import PlanError
from ..formats import Format
from ..progress import SILENT, Progress
from ..qtensor import QTensor
from ..stats import Stats
from ..structure import Unit, find_units
from .metrics import Context, find_metric, is_number
from .table import CostTable

Trial = Callable[[Unit, torch.Tensor, Format], QTensor]


def sense(model: nn.Module, tokens: torch.Tensor, stats: Stats, candidates: Sequence[str | Format], *, metric: str, trial: Trial,
          units: list[Unit] | None = None, seed: int = 0, progress: Progress = SILENT) -> CostTable:
    """Loss and stored bytes of every (unit, candidate).

    Args:
        model: the float model.
        tokens: calibration windows [W, T]; metrics that probe use the first few.
        stats: what ``calibrate`` saw on this model.
        candidates: formats to try, at least one.
        metric: a name of ``metrics.METRICS``.
        trial: quantizes one weight (float32 [N, K]) to one Format. Handed in, since this module knows no quantizer.
        units: the units to look at; all of them when None.

    Raises:
        PlanError: no candidates, an unknown metric, or a loss that is not finite (says where), or one too few.
    """
    formats = [Format.parse(c) for c in dict.fromkeys(Format.parse(c) for c in candidates)]
    if not formats:
        raise PlanError("sense", "there are no candidate formats", "pass at least one, such as w4g64")
    units = find_units(model) if units is None else units
    judge = find_metric(metric)(Context(model, tokens, stats, seed))
    judge.prepare(units, progress)
    modules = dict(model.named_modules())
    loss = np.zeros((len(units), len(formats)))
    nbytes = np.zeros_like(loss, dtype=np.int64)
    for u, unit in enumerate(progress.track(units, f"sense ({metric})")):
        weight = modules[unit.name].weight.detach().float()
        order = sorted(range(len(formats)), key=lambda f: formats[f].nbytes(*unit.shape))
        tried = [trial(unit, weight, formats[f]) for f in order]
        deltas = [q.dequantize() - weight for q in tried]
        losses = judge.loss(unit, weight, deltas) if unit.name in stats else judge.lookup_loss(unit, deltas)
        if len(losses) != len(order):
            raise PlanError(f"losses of {unit.name} under metric {metric}", f"it gave {len(losses)} for {len(order)} candidates", "return one for each")
        for f, q, value in zip(order, tried, losses, strict=True):
            if not is_number(value):
                raise PlanError(f"loss of {unit.name} as {formats[f]} under metric {metric}", f"it is {value}", "check the model and the calibration text")
            loss[u, f], nbytes[u, f] = value, q.nbytes()
    # Enough of the units to count and time a plan without the model.
    shapes = {u.name: {"shape": list(u.shape), "layer": u.layer, "embedding": u.kind == "embedding", "tied": list(u.tied)} for u in units}
    return CostTable([u.name for u in units], [f.name for f in formats], loss, nbytes, np.array([u.numel for u in units]),
                     meta={"metric": metric, "seed": seed, "stats": stats.meta, "shapes": shapes})

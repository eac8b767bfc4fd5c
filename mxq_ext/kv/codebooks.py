"""Codebooks from calibration, one for the keys and one for the values of each layer: KVQuant (Hooper et al. 2024, arXiv 2401.18079).

Numbers are scaled to -1 .. 1 as pages scale them, by the middle and half the range of their group, and weighted by their share in the second order of
the loss: an error e of a level moves a number by s e and the loss by 1/2 (g s e)^2, with g the gradient that reaches the number. The levels are the
weighted means of exact one-dimensional k-means over all numbers of a layer, gathered in BINS bins. Numbers that pages keep beside their codes count for
nothing: not in the range of their group, and not in the bins.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..errors import PlanError
from ..formats import PAGE
from ..plan.kv import KVPlan, KVSpec
from ..quantizers.kmeans import kmeans_table
from .cache import page_formats
from .ops import SIDES, PageFormat, outliers_of, pack_page
from .rope import Rope

BINS = 4096  #: of -1 .. 1; a bin counts with its weighted mean, so that their width only matters where a level's border falls into one

Pair = tuple[torch.Tensor, torch.Tensor]


class _Histogram:
    """Weighted numbers of -1 .. 1."""

    def __init__(self):
        self.mass, self.moment = np.zeros(BINS), np.zeros(BINS)

    def add(self, numbers: torch.Tensor, weights: torch.Tensor) -> None:
        x, w = numbers.flatten().double().numpy(), weights.flatten().double().numpy()
        place = np.clip((x + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
        self.mass += np.bincount(place, w, BINS)
        self.moment += np.bincount(place, w * x, BINS)

    def levels(self, count: int) -> tuple[float, ...]:
        """Ascending, by k-means. Equal ones where there are fewer numbers."""
        full = self.mass > 0
        if not full.any():
            return tuple(np.linspace(-1, 1, count).tolist())
        means = torch.tensor(self.moment[full] / self.mass[full])[None]
        return tuple(kmeans_table(means.float(), torch.tensor(self.mass[full])[None], count)[0].clamp(-1, 1).tolist())


def _groups(x: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """x [H, pages * 64, D] as [groups, numbers of a group]; a ragged last group of channels is padded with NaN."""
    if fmt.side == "keys":
        return x.unflatten(1, (-1, fmt.group)).transpose(2, 3).flatten(0, 2)
    group = fmt.group or fmt.head_dim
    return torch.nn.functional.pad(x, (0, -fmt.head_dim % group), value=torch.nan).unflatten(2, (-1, group)).flatten(0, 2)


def _without_outliers(x: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """x [H, pages * 64, D] float32 with a NaN for each number that its page keeps beside the codes: pages are packed to see which."""
    if not fmt.outliers:
        return x
    out = []
    for part in x.split(PAGE, 1):
        page = fmt.empty_page(len(part))
        pack_page(part[None], fmt, *page)
        index, delta = outliers_of(page[0], fmt)
        head, entry = delta.nonzero(as_tuple=True)  # one that adds nothing may be an entry that was not needed
        part = part.clone(memory_format=torch.contiguous_format)
        part.view(len(part), -1)[head, index[head, entry]] = torch.nan
        out.append(part)
    return torch.cat(out, 1)


def _add(histogram: _Histogram, x: torch.Tensor, gradient: torch.Tensor, fmt: PageFormat) -> None:
    x, gradient = (_groups(t, fmt) for t in (_without_outliers(x.float(), fmt), gradient.float()))
    there = ~x.isnan()
    least, most = x.nan_to_num(torch.inf).amin(1, keepdim=True), torch.where(there, x, -torch.inf).amax(1, keepdim=True)
    step = (most - least) / 2
    there &= step > 0
    step = step.expand_as(x)[there]
    histogram.add((x - (most + least) / 2)[there] / step, (gradient[there] * step).square())


def fit_codebooks(samples: Iterable[tuple[int, Pair, Pair]], spec: KVSpec, ropes: list[Rope | None], head_dim: int) -> KVPlan:
    """``spec`` for every layer with codebooks of its own.

    Args:
        samples: (layer, keys and values, their gradients), each [1, heads, T, D], keys after the rotary embedding, positions from 0 on:
            ``sensitivity.kv.watch_kv``.
        spec: bits of 2 to 4, and all else.
        ropes: of each layer, for a spec with pre_rope; None otherwise.

    Raises PlanError for a spec without codebooks, or where numbers or gradients are not finite.
    """
    if spec.levels is None:
        raise PlanError(f"codebooks for {spec}", "it has uniform grids", 'give it levels, for example "normal", which the codebooks replace')
    if spec.heads is not None:
        raise PlanError(f"codebooks for {spec}", "a layer's codebooks are made for one pair of bits", "leave heads out")
    formats = page_formats(spec, head_dim, "layer")
    histograms = [(_Histogram(), _Histogram()) for _ in ropes]
    for layer, states, gradients in samples:
        tokens = (states[0].shape[2] - spec.sink) // PAGE * PAGE
        for side, (x, g) in enumerate(zip(states, gradients, strict=True)):
            x, g = (t[0, :, spec.sink : spec.sink + tokens] for t in (x, g))
            if not (x.isfinite().all() and g.isfinite().all()):
                raise PlanError(f"codebooks for the {SIDES[side]} of layer {layer}", "they or their gradients are not finite",
                                "check the model and the calibration text")
            if side == 0 and ropes[layer] is not None:
                x, g = (ropes[layer].turned(t, spec.sink, back=True) for t in (x, g))
            _add(histograms[layer][side], x, g, formats[side])
    specs = [KVSpec(**spec.to_json() | {"levels": tuple(h.levels(2**f.bits) for h, f in zip(pair, formats, strict=True))}) for pair in histograms]
    return KVPlan.parse({"default": specs[0].to_json(), "layers": {i: s.to_json() for i, s in enumerate(specs)}})

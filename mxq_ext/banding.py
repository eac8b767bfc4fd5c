"""Presets whose unit is a row, a column, a tile or an element: scores -> tiles -> allocation -> bands, tiles or a sparse part -> QTensors.

    layouts, plan = choose_layouts(model, tokens, stats, preset, bits=3.5)        which lines of which weight get which format
    q = compose(weight, layouts[name], preset, hessian=..., fisher=...)           that weight, quantized so

Lines (rows or columns) are sorted by what a wider format would save and taken by tiles, the least that a kernel reads in one format. Bytes of a tile are its
share of those of a long band; what a weight pays once, and what is rounded up (permutation, tables of a band, starts of sparse rows, ranges of nested
scales), is counted exactly from the bands themselves, and the budget of the tiles is lowered until the whole fits. With the unit ``tiles`` both axes are
sorted and a tile covers rows and columns.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .errors import BudgetError, CheckpointError, PlanError
from .formats import NEST_GROUPS, Format
from .plan.knapsack import Problem
from .plan.language import Preset
from .plan.rules import METHODS, double_pointer
from .plan.schema import COL_TILE, ROW_TILE, Bands, Cut, Plan, Tiles, entry_json, spans
from .progress import SILENT, Progress
from .qtensor import QTensor, Rectangle
from .quantizers import find_method, prepare_hessian, quantize
from .sensitivity import lines
from .stats import Stats
from .stats.walk import backward_walk
from .structure import Unit, find_units

LINE_METRICS = ("column_salience", "column_error", "column_norm", "row_error", "row_taylor", "fisher_diag", "outlier_gain")
ELEMENT_METRICS = ("fisher_diag", "outlier_gain")  #: those that choose exact elements
WINDOWS = 2  #: whose gradients ``row_taylor`` reads
TOKENS = 128  #: whose outputs the double pointer compares
SHARED = NEST_GROUPS  #: tiles side by side whose columns fill up what groups share: ranges of nested scales, and bytes of streams
TILE = (512, 128)  #: rows and columns of a tile, unless the preset's solver says otherwise


@dataclass(frozen=True)
class Layout:
    """How one weight [N, K] is stored: a Format, Bands or Tiles; which line is where (int64, None: in order; of tiles the rows, and in ``cols`` the columns);
    which elements are exact (bool [N, K], or None)."""

    decision: Format | Cut
    perm: torch.Tensor | None = None
    exact: torch.Tensor | None = None
    cols: torch.Tensor | None = None

    def digest(self) -> str:
        """sha256 of everything in it, for the names of files."""
        h = hashlib.sha256(repr(entry_json(self.decision)).encode())
        for t in (self.perm, self.exact, self.cols):
            h.update(b"-" if t is None else t.contiguous().numpy().tobytes())
        return h.hexdigest()


def choose_layouts(model: nn.Module, tokens: torch.Tensor, stats: Stats, preset: Preset, *, bits: float | None = None, nbytes: int | None = None,
                   progress: Progress = SILENT) -> tuple[dict[str, Layout], Plan]:
    """The layout of every unit within a budget, and the Plan that says the same (which lines are where is in the weights, not in the plan).

    Args:
        tokens: calibration windows int64 [W, T], of which metrics that need gradients or outputs read the first.
        bits: average stored bits over all units, or ``nbytes``.

    Raises BudgetError if nothing fits, PlanError for a metric that scores no lines or candidates that do not go with the preset.
    """
    units = find_units(model)
    numel = sum(u.numel for u in units)
    budget = nbytes if nbytes is not None else math.floor(bits * numel / 8 + 1e-6)
    if preset.metric not in LINE_METRICS:
        raise PlanError(f"metric {preset.metric!r} of a preset by {preset.unit}", f"it scores whole linears; lines are scored by {', '.join(LINE_METRICS)}",
                        "choose one of those, or --set unit=linear")
    formats = sorted((Format.parse(c) for c in preset.candidates), key=lambda f: f.bits)
    if preset.unit == "tiles":
        tile_shape(preset)
    if (preset.allocator == "share") != (preset.unit == "element") or (preset.allocator == "double_pointer" and preset.unit != "cols") or \
            preset.allocator == "uniform":
        raise PlanError(f"allocator {preset.allocator} of a preset by {preset.unit}", "share goes with elements, double_pointer with cols, uniform with "
                        "linears", "replace one of the two")
    if preset.unit == "element":
        check_elements(preset)
    if preset.allocator == "share":
        layouts = _shares(model, units, stats, preset, formats, budget, progress)
    elif preset.allocator == "double_pointer":
        layouts = _pointers(model, units, tokens, stats, preset, formats, progress)
    else:
        layouts = _bands(model, units, tokens, stats, preset, formats, budget, progress)
    plan = Plan(units={name: entry_json(layout.decision) for name, layout in layouts.items()}, quantizer=preset.quantizer(), activations=preset.activations)
    total = plan.predicted_bytes(units)["total"]
    if total > budget:
        raise BudgetError(f"budget of {8 * budget / numel:.6g} stored bits ({budget:,} bytes) for {len(units)} units",
                          f"the smallest choice takes {total:,} bytes ({8 * total / numel:.4f} stored bits)", "allow as much, or replace the candidates")
    plan.meta = {"nbytes": total, "stored_bits": 8 * total / numel, "allocation": {"method": preset.allocator, "unit": preset.unit, "budget_bytes": budget}}
    return layouts, plan


# Bands ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """Tiles of one unit: line indices of each (the last may be ragged), losses float64 [C, F], bytes that they add int64 [C, F]."""

    unit: Unit
    axis: str
    lines: list[torch.Tensor]
    loss: np.ndarray
    nbytes: np.ndarray

    def layout(self, choice: np.ndarray, formats: Sequence[Format]) -> Layout:
        """Bands of rising bits; lines of a band in their own order, a ragged tile at the very end, in the widest band."""
        bits = np.array([formats[c].bits for c in choice])
        if len(self.lines) > 1 and len(self.lines[-1]) < len(self.lines[0]):
            choice = choice.copy()
            choice[-1] = choice[int(bits.argmax())]
        parts, perm = [], []
        for c in sorted(set(choice.tolist()), key=lambda c: formats[c].bits):
            own = [t for t, k in zip(self.lines, choice, strict=True) if k == c]
            perm.append(torch.cat(own).sort().values)
            parts.append((len(perm[-1]), formats[c]))
        if len(parts) == 1:
            return Layout(parts[0][1])
        return Layout(Bands(self.axis, tuple(parts), permute=True), torch.cat(perm))


def tile_of(axis: str, formats: Sequence[Format]) -> int:
    """Lines of a tile: what kernels ask of a band, and no less than a group of scales."""
    return ROW_TILE if axis == "rows" else max(COL_TILE, *(f.group for f in formats))


def tile_shape(preset: Preset) -> tuple[int, int]:
    """Rows and columns of a tile. Raises PlanError for a preset by tiles that cannot be: sizes that kernels cannot cut at, groups across tiles, a metric
    that has no value for each element."""
    limits = dict(preset.solver)
    shape = tuple(limits.get(name, default) for name, default in zip(("tile_rows", "tile_cols"), TILE, strict=True))
    for name, value, least in zip(("tile_rows", "tile_cols"), shape, (ROW_TILE, tile_of("cols", [Format.parse(c) for c in preset.candidates])), strict=True):
        if value < least or value % least:
            raise PlanError(f"{name}={value:g} of a preset by tiles", f"it is a multiple of {least}, for kernels and for the groups of its candidates",
                            f"--set solver.{name}={max(1, round(value / least)) * least}")
    if preset.metric != "fisher_diag":
        raise PlanError(f"metric {preset.metric!r} of a preset by tiles", "tiles are sorted by a value of each element, and fisher_diag is the only one",
                        "use fisher_diag, or another unit")
    return int(shape[0]), int(shape[1])


@dataclass(frozen=True)
class _Grid:
    """Tiles of one unit, its rows and columns in order of salience: losses float64 [C, F] and bytes int64 [C, F], band of rows after band of rows.

    ``nbytes`` leaves out what a rectangle rounds up (streams of zero points end with a whole byte, nested ranges are those of 16 groups), which depends on
    how many tiles it holds: no more than what is stored, and in proportion to a tile's weights, so that gain per byte is mean salience also in ragged tiles.
    """

    unit: Unit
    rows: torch.Tensor
    cols: torch.Tensor
    tile: tuple[int, int]
    loss: np.ndarray
    nbytes: np.ndarray

    @staticmethod
    def of(unit: Unit, salience: torch.Tensor, formats: Sequence[Format], tile: tuple[int, int]) -> _Grid:
        rows, cols, sums = lines.tile_sums(salience, tile)
        # An order, not a loss: fourfold per bit makes it one.
        loss = sums.reshape(-1, 1).numpy() * np.array([4.0**-f.bits for f in formats])
        nbytes = [[f.nbytes(r, SHARED * c) // SHARED for f in formats] for r in _sizes(unit.shape[0], tile[0]) for c in _sizes(unit.shape[1], tile[1])]
        return _Grid(unit, rows, cols, tile, loss, np.array(nbytes, dtype=np.int64))

    def layout(self, choice: np.ndarray, formats: Sequence[Format]) -> Layout:
        """Neighbours of one format as one rectangle, equal bands as one band; a weight of a single format is not permuted."""
        if len(set(choice.tolist())) == 1:
            return Layout(formats[choice[0]])
        heights, widths = _sizes(self.unit.shape[0], self.tile[0]), _sizes(self.unit.shape[1], self.tile[1])
        bands = [tuple(_joined((w, formats[c]) for w, c in zip(widths, row, strict=True))) for row in choice.reshape(len(heights), len(widths)).tolist()]
        tiles = Tiles(tuple(_joined(zip(heights, bands, strict=True))), permute=True)
        return Layout(tiles, self.rows if "rows" in tiles.permuted else None, cols=self.cols if "cols" in tiles.permuted else None)


def _sizes(length: int, step: int) -> list[int]:
    """``length`` in steps, the last one ragged."""
    return [min(step, length - start) for start in range(0, length, step)]


def _joined(parts: Iterable[tuple[int, object]]) -> list[tuple[int, object]]:
    """(count, value) with neighbours of equal value added up."""
    return [(sum(count for count, _ in run), value) for value, run in itertools.groupby(parts, key=lambda p: p[1])]


def _fisher(stats: Stats, unit: Unit) -> torch.Tensor:
    fisher = stats.fisher(unit.name)
    if fisher is None:
        raise CheckpointError(f"the Fisher diagonal of {unit.name}", "the statistics were collected without", "calibrate again with fisher=True")
    return fisher


def _tiles(unit: Unit, axis: str, loss: torch.Tensor, formats: Sequence[Format]) -> _Tiles:
    """``loss`` float64 [lines, F] -> tiles of lines, the least important first."""
    n, k = unit.shape
    tile = tile_of(axis, formats)
    order = torch.argsort(loss[:, 0] - loss[:, -1], stable=True)
    pieces = list(order.split(tile))
    sums = np.stack([loss[p].sum(0).numpy() for p in pieces])
    if axis == "rows":
        nbytes = [[f.nbytes(len(p), k) for f in formats] for p in pieces]
    else:
        # As a part of so many columns: alone it would pay for a range of nested scales that it shares in a band.
        nbytes = [[(f.nbytes(n, SHARED * len(p)) - f.nbytes(n, 0)) // SHARED for f in formats] for p in pieces]
    return _Tiles(unit, axis, pieces, sums, np.array(nbytes, dtype=np.int64))


def _bands(model, units, tokens, stats, preset, formats, budget: int, progress) -> dict[str, Layout]:
    products = _products(model, units, tokens, formats[0], progress) if preset.metric == "row_taylor" else {}
    modules = dict(model.named_modules())
    total, weights = budget / sum(u.numel for u in units), []
    out: dict[str, Layout] = {}
    for unit in progress.track(units, f"scores ({preset.metric})"):
        if unit.name not in stats:  # a lookup: nothing was seen that could tell its lines apart
            fits = [f for f in formats if f.nbytes(*unit.shape) <= total * unit.numel]
            out[unit.name] = Layout(max(fits or formats[:1], key=lambda f: f.bits))
            budget -= out[unit.name].decision.nbytes(*unit.shape)
            continue
        if preset.unit == "tiles":
            weights.append(_Grid.of(unit, _fisher(stats, unit), formats, tile_shape(preset)))
            continue
        weight = modules[unit.name].weight.detach().float()
        weights.append(_tiles(unit, preset.unit, line_losses(unit, weight, stats, preset, formats, products), formats))
    if preset.scope == "model":
        return out | _fill(weights, formats, preset, budget)
    left = budget / max(1, sum(t.unit.numel for t in weights))
    debt = 0.0
    for t in weights:  # what the tiles of one linear cannot spend goes to the next, so that the whole is as large as was asked for
        mine = left * t.unit.numel + debt
        layout = _fill([t], formats, preset, math.floor(mine))[t.unit.name]
        out[t.unit.name], debt = layout, mine - layout.decision.nbytes(*t.unit.shape)
    return {u.name: out[u.name] for u in units}


def line_losses(unit: Unit, weight: torch.Tensor, stats: Stats, preset: Preset, formats: Sequence[Format], products: dict) -> torch.Tensor:
    """float64 [lines, F]: what each line would lose in each candidate, by round to nearest (lut: by k-means). weight float32 [N, K]."""
    score = {"column_error": lines.column_error, "row_error": lines.row_error}.get(preset.metric)
    known = score is not None or preset.metric in ("column_norm", "column_salience", "row_taylor")
    if not known or preset.metric.partition("_")[0] != {"rows": "row", "cols": "column"}[preset.unit]:
        raise PlanError(f"metric {preset.metric!r} of a preset by {preset.unit}", "it has no loss for each candidate",
                        "use row_error, row_taylor, column_error, column_norm or column_salience, as the unit asks")
    h = stats.hessian(unit.name, "none")
    if preset.metric in ("column_norm", "column_salience"):  # an order, not a loss: fourfold per bit makes it one
        order = lines.column_norm(h).double().square() if preset.metric == "column_norm" else lines.column_salience(weight, h).double()
        return order[:, None] * torch.tensor([4.0**-f.bits for f in formats], dtype=torch.float64)
    if preset.metric == "row_taylor":  # only the narrowest loses, as in the paper
        loss = torch.zeros(unit.shape[0], len(formats), dtype=torch.float64)
        loss[:, 0] = lines.row_taylor(products[unit.name]).double()
        return loss
    return torch.stack([score(_rounded(weight, f, h) - weight, h).double() for f in formats], dim=1)


def _rounded(weight: torch.Tensor, fmt: Format, hessian: torch.Tensor | None = None) -> torch.Tensor:
    """A quick guess at the quantized weight, which scores are taken from."""
    if fmt.kind == "lut":
        return quantize(weight, fmt, method="kmeans", hessian=hessian).dequantize()
    return quantize(weight, fmt, method="rtn").dequantize()


def _products(model, units, tokens, fmt: Format, progress) -> dict[str, torch.Tensor]:
    """Unit -> <g, D> of each row for ``WINDOWS`` windows, float32 [W, N]; D by round to nearest, made anew each time: all of them would be a model."""
    modules, seen = dict(model.named_modules()), {u.name: [] for u in units}

    def keep(name, x, g):
        weight = modules[name].weight.detach().float()
        seen[name].append(lines.row_products(_rounded(weight, fmt) - weight, x, g))

    backward_walk(model, tokens[:WINDOWS], keep, progress=progress)
    return {name: torch.stack(rows) for name, rows in seen.items() if rows}


def _fill(tiles: Sequence[_Tiles | _Grid], formats: Sequence[Format], preset: Preset, budget: int) -> dict[str, Layout]:
    """The layouts of least loss whose exact bytes are within the budget; the smallest ones where nothing fits (the caller tells)."""
    loss, nbytes = np.concatenate([t.loss for t in tiles]), np.concatenate([t.nbytes for t in tiles])
    ends = np.cumsum([len(t.loss) for t in tiles])[:-1]
    least = Problem.of(loss, nbytes).smallest

    def made(inner: int) -> tuple[dict[str, Layout], int]:
        choice = METHODS[preset.allocator](loss, nbytes, max(inner, least)).choice
        found = {t.unit.name: t.layout(c, formats) for t, c in zip(tiles, np.split(choice, ends), strict=True)}
        return found, sum(found[t.unit.name].decision.nbytes(*t.unit.shape) for t in tiles)

    # Bytes rise with what the tiles may spend, but for what bands pay once: bisect, and keep the largest that fits.
    best, size = made(least)
    low, high = least, max(budget, least)
    top, spent = made(high)
    if spent <= budget:
        return top
    grain = max(1, int(np.diff(np.sort(nbytes, axis=1), axis=1).max())) // 4 + 1
    while high - low > grain:
        middle = (low + high) // 2
        found, spent = made(middle)
        if spent > budget:
            high = middle
        else:
            low = middle
            if spent >= size or size > budget:
                best, size = found, spent
    return best


# SliM-LLM -------------------------------------------------------------------------------------------------------------------------


def _pointers(model, units, tokens, stats, preset, formats, progress) -> dict[str, Layout]:
    """Column groups in their own order, one bit up and down in pairs."""
    steps = np.diff([f.bits for f in formats])
    if len(steps) != 2 or steps[0] != steps[1] or len({f.group for f in formats}) != 1 or not formats[0].group:
        raise PlanError(f"candidates {', '.join(preset.candidates)} of the double pointer", "it exchanges equal steps of bits between groups of columns",
                        "give three formats such as w2g128_asym,w3g128_asym,w4g128_asym")
    inputs, modules, out = _inputs(model, units, tokens), dict(model.named_modules()), {}
    for unit in progress.track(units, "double pointer"):
        if unit.name not in inputs:
            out[unit.name] = Layout(formats[1])
            continue
        weight, x, k = modules[unit.name].weight.detach().float(), inputs[unit.name], unit.shape[1]
        groups = list(torch.arange(k).split(formats[0].group))
        salience = lines.column_salience(weight, stats.hessian(unit.name, "none"))
        tried = [_rounded(weight, f) for f in formats]
        reference = (x @ weight.T).log_softmax(-1)

        def effect(widths, groups=groups, tried=tried, x=x, reference=reference):
            mixed = torch.cat([tried[w + 1][:, g] for w, g in zip(widths, groups, strict=True)], dim=1)
            return output_divergence((x @ mixed.T).log_softmax(-1), reference)

        widths = double_pointer([float(salience[g].sum()) for g in groups], effect)
        # A ragged group must end the widest band.
        order = sorted(range(len(groups)), key=lambda i: (len(groups[i]) < len(groups[0]), i))
        tiles = _Tiles(unit, "cols", [groups[i] for i in order], np.zeros((len(groups), 3)), np.zeros((len(groups), 3), dtype=np.int64))
        out[unit.name] = tiles.layout(widths[order] + 1, formats)
    return out


def output_divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> float:
    """KL(q || p) [tokens, N], probabilities no less than 1e-6, mean over tokens: how SliM-LLM's code compares outputs of a linear."""
    q, p = log_q.exp().clamp(min=1e-6), log_p.exp().clamp(min=1e-6)
    return float((q * (q.log() - p.log())).sum(-1).mean())


@torch.no_grad()
def _inputs(model: nn.Module, units: list[Unit], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Unit -> inputs float32 [t, K] of the first ``TOKENS`` tokens; those that read one tensor share it."""
    modules, seen, handles = dict(model.named_modules()), {}, []
    for unit in units:
        for name in (unit.name, *unit.tied):
            if isinstance(modules[name], nn.Linear):
                handles.append(modules[name].register_forward_hook(lambda m, args, out, name=unit.name: seen.update({name: args[0].detach().flatten(0, -2)})))
    try:
        model(tokens[:1, :TOKENS], use_cache=False)
    finally:
        for h in handles:
            h.remove()
    return seen


# Sparse parts -----------------------------------------------------------------------------------------------------------------------


def check_elements(preset: Preset) -> None:
    """Raises PlanError for a preset by elements whose metric scores none, or whose candidates do not go with it."""
    if preset.metric not in ELEMENT_METRICS:
        raise PlanError(f"metric {preset.metric!r} of a preset by element", f"exact elements are chosen by {' or '.join(ELEMENT_METRICS)}",
                        "use one of them, or another unit")
    if preset.method != "auto" and not find_method(preset.method).sparse:
        raise PlanError(f"method {preset.method!r} of a preset by element", "it leaves no elements out of its fit", "use gptq, kmeans, rtn or auto")
    odd = next((c for c in preset.candidates if Format.parse(c).kind != "uniform"), None)
    if preset.metric == "outlier_gain" and odd is not None:
        raise PlanError(f"candidate {odd} of a preset by outlier_gain", "the gain is that of a range with even steps, which uniform formats have",
                        "use uniform candidates, or the metric fisher_diag")


def _shares(model, units, stats, preset, formats, budget: int, progress) -> dict[str, Layout]:
    """One format for all, the widest that fits, and in sparse fp16 as large a share of the elements as is left."""
    limits, numel = dict(preset.solver), sum(u.numel for u in units)
    least, most = (limits.get(n, d) for n, d in (("least_share", 0.0005), ("most_share", 0.02)))

    def room(f: Format) -> float:
        """Bytes that are left for values, 6 each, beside ``f`` for all and the starts of all rows."""
        return budget - sum(f.nbytes(*u.shape) + 4 * (u.shape[0] + 1) for u in units)

    fits = [f for f in formats if room(f) >= 6 * least * numel]
    fmt = min(fits, key=room) if fits else max(formats, key=room)
    share = min(most, max(least, room(fmt) / (6 * numel)))
    weights = {u.name: model.get_submodule(u.name).weight.detach() for u in units}
    if preset.metric == "outlier_gain":
        masks = _gains(units, weights, stats, preset, fmt, int(share * numel), progress)
    else:
        part = limits.get("sensitive", 0.1)
        masks = {u.name: _sensitive(u, weights[u.name].float(), stats, int(share * u.numel), part) for u in progress.track(units, "sparse parts")}
    out = {}
    for unit in units:
        count = int(masks[unit.name].sum())
        out[unit.name] = Layout(Bands("rows", ((unit.shape[0], fmt),), sparse=count) if count else fmt, exact=masks[unit.name] if count else None)
    return out


def _sensitive(unit: Unit, weight: torch.Tensor, stats, count: int, part: float) -> torch.Tensor:
    """SqueezeLLM's ``count`` elements of one linear, bool [N, K]: a ``part`` of them by the Fisher diagonal, the others by how far they lie out."""
    exact = torch.zeros(unit.shape, dtype=torch.bool)
    if unit.name in stats:
        exact = lines.largest(_fisher(stats, unit), int(part * count))
    return exact | lines.largest(lines.outlier_score(weight).masked_fill_(exact, -1), count - int(exact.sum()))


def _gains(units, weights, stats, preset, fmt: Format, count: int, progress) -> dict[str, torch.Tensor]:
    """SpQR's elements of the whole model, bool [N, K] by unit: the ``count`` whose gain is the largest multiple of their linear's unit. The least of these
    multiples is the paper's relative tau, which is one for all linears.

    Only elements that still may be among them are kept while linears are scored, so that little memory is needed beside the model.
    """
    if not count:
        return {unit.name: torch.zeros(unit.shape, dtype=torch.bool) for unit in units}
    best, places, found = torch.empty(0), {}, {}
    factor = {n: v for n, v in preset.options if n in ("damp", "act_order") and v is not None}
    for unit in progress.track(units, "outliers"):
        weight = weights[unit.name].float()
        price = prepare_hessian(stats.hessian(unit.name, preset.weighting), **factor).importance() if unit.name in stats else torch.ones(unit.shape[1])
        size = lines.outlier_unit(weight, price)
        score = lines.outlier_gain(weight, price, fmt.bits, fmt.group or unit.shape[1]).flatten()
        if size > 0:
            score /= size
        fresh = score[score > (float(best[-1]) if len(best) == count else 0.0)]
        best = torch.cat([best, fresh]).topk(min(count, len(best) + len(fresh))).values
        tau = float(best[-1]) if len(best) else 0.0
        places[unit.name] = ((score >= tau) & (score > 0)).nonzero().flatten()
        found[unit.name] = score[places[unit.name]]
    spare = count - sum(int((s > tau).sum()) for s in found.values())  # for those of exactly tau
    out = {}
    for unit in units:
        score, own = found[unit.name], places[unit.name]
        equal = own[score == tau][:spare]
        spare -= len(equal)
        mask = torch.zeros(unit.numel, dtype=torch.bool)
        mask[own[score > tau]] = mask[equal] = True
        out[unit.name] = mask.view(unit.shape)
    return out


# Weights ----------------------------------------------------------------------------------------------------------------------------


def compose(weight: torch.Tensor, layout: Layout, preset: Preset, *, hessian: torch.Tensor | None = None, fisher: torch.Tensor | None = None) -> QTensor:
    """One weight float32 [N, K] in its layout.

    Row bands share the second moment. Column bands are quantized from the narrowest to the widest: with GPTQ each is rounded under what later bands
    cannot absorb of its error, the Schur complement of H, and they then take up what they can; so the widest absorb the errors of all, as GPTQ with
    columns in this order does. Tiles: the same for the rows of each pattern of columns. Exact elements: as ``quantize`` has them.
    """
    options, method, decision = dict(preset.options), preset.method, layout.decision
    if hessian is None and method in ("auto", "gptq"):  # a lookup's rows do not interact
        method, options = "auto", {}

    def part(w, fmt, **seen):
        return quantize(w.contiguous(), fmt, method=method, **{k: v for k, v in seen.items() if v is not None}, **options)

    if layout.exact is not None:
        return part(weight, decision.parts[0][1], hessian=hessian, fisher=fisher, exact=layout.exact)
    if isinstance(decision, Format):
        return part(weight, decision, hessian=hessian, fisher=fisher)
    if isinstance(decision, Tiles):
        found = _grid(weight, layout, part, hessian, fisher, feedback=method == "gptq")
        rects = [Rectangle(r0, r1, c0, c1, fmt, found[r0, c0]) for r0, r1, c0, c1, fmt in decision.rectangles(tuple(weight.shape))]
        permutations = {"perm_rows": layout.perm, "perm_cols": layout.cols}
        return _checked(weight, rects, **{name: p.int() for name, p in permutations.items() if p is not None})
    if decision.axis == "rows":
        factor = None if hessian is None else prepare_hessian(hessian)
        rects = []
        for r0, r1, c0, c1, fmt in decision.rectangles(tuple(weight.shape)):
            rows = layout.perm[r0:r1]
            q = part(weight[rows], fmt, hessian=factor, fisher=None if fisher is None else fisher[rows])
            rects.append(Rectangle(r0, r1, c0, c1, fmt, q.rectangles[0].tensors))
        return _checked(weight, rects, perm_rows=layout.perm.int())
    found = _columns(weight, layout.perm, decision.parts, part, hessian, fisher, feedback=method == "gptq")
    rects = [Rectangle(*place, tensors) for place, tensors in zip(decision.rectangles(tuple(weight.shape)), found, strict=True)]
    return _checked(weight, rects, perm_cols=layout.perm.int())


def _grid(weight, layout: Layout, part, hessian, fisher, feedback: bool) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Tensors of each rectangle by (r0, c0). Rows do not interact, so bands of one pattern of columns are quantized together."""
    row_order, col_order = (torch.arange(size) if p is None else p for size, p in zip(weight.shape, (layout.perm, layout.cols), strict=True))
    alike: dict[tuple, list[tuple[int, int]]] = {}
    for r0, r1, pattern in spans(layout.decision.bands):
        alike.setdefault(pattern, []).append((r0, r1))
    found = {}
    for pattern, bands in alike.items():
        places = sorted(spans(pattern), key=lambda p: p[2].bits)  # the order of storage is by salience, that of feedback by bits
        order = torch.cat([col_order[c0:c1] for c0, c1, _ in places])
        rows = torch.cat([row_order[r0:r1] for r0, r1 in bands])
        parts = [(c1 - c0, fmt) for c0, c1, fmt in places]
        own = _columns(weight[rows], order, parts, part, hessian, None if fisher is None else fisher[rows], feedback)
        for (c0, _, _), tensors in zip(places, own, strict=True):
            heights = [r1 - r0 for r0, r1 in bands]
            split = {name: t.split(heights) for name, t in tensors.items()}
            found |= {(r0, c0): {name: pieces[i].contiguous() for name, pieces in split.items()} for i, (r0, _) in enumerate(bands)}
    return found


def _columns(weight, perm: torch.Tensor, parts: Sequence[tuple[int, Format]], part, hessian, fisher, feedback: bool) -> list[dict[str, torch.Tensor]]:
    """Tensors of each of the ``parts``, which take the columns ``perm`` of the weight one after the other."""
    found = []
    target = weight[:, perm].clone()
    h = None if hessian is None else hessian[perm][:, perm].double()
    if feedback and len(parts) > 1:
        live = h.diagonal() > 0
        h = h + torch.diag(torch.where(live, 0.01 * h.diagonal()[live].mean() if live.any() else 1.0, 1.0))
    for c0, c1, fmt in spans(parts):
        inner = None if h is None else h[c0:c1, c0:c1]
        carry = None
        if feedback and c1 < len(perm):
            carry = torch.cholesky_solve(h[c1:, c0:c1], torch.linalg.cholesky(h[c1:, c1:]))  # [rest, band]
            inner = inner - h[c0:c1, c1:] @ carry
        own = None if fisher is None else fisher[:, perm[c0:c1]].contiguous()
        q = part(target[:, c0:c1], fmt, hessian=None if inner is None else inner.float(), fisher=own)
        found.append(q.rectangles[0].tensors)
        if carry is not None:
            target[:, c1:] -= ((q.dequantize() - target[:, c0:c1]).double() @ carry.T).float()
    return found


def _checked(weight: torch.Tensor, rects: list[Rectangle], **permutation) -> QTensor:
    q = QTensor(tuple(weight.shape), rects, **permutation)
    q.validate()
    return q

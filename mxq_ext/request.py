"""What a request for the line asks of a preset, and everything that can be refused before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from . import banding
from .errors import BudgetError, PlanError, QuantizationError
from .formats import Format
from .plan import KVPlan, KVSpec, Plan, choose, solve, solve_joint
from .plan.kv import BITS
from .plan.language import Preset
from .plan.presets import PRESETS, find_kv, find_preset
from .quantizers import find_method, make_options
from .quantizers.base import METHODS as QUANTIZERS
from .sensitivity import CostTable, KVTable
from .sensitivity.kv import SIDES
from .sensitivity.metrics import METRICS, find_metric
from .structure import Unit, find_units


def missing_parts(preset: Preset) -> list[str]:
    """What a preset needs that does not exist here, one text each; empty for one that can run."""
    out = list(preset.missing)
    if preset.method != "auto" and preset.method not in QUANTIZERS:
        out.append(f"the quantizer {preset.method}")
    if preset.metric not in (METRICS if preset.unit == "linear" else banding.LINE_METRICS):
        out.append(f"the metric {preset.metric} for the unit {preset.unit}")
    return out


def check_parts(preset: Preset, name: str | Preset | None) -> None:
    """Raises for a preset that cannot run: PlanError for what is missing by design, the error of the step for a misspelt part."""
    base = find_preset(name)
    if preset.method != base.method or base.method in QUANTIZERS:
        make_options(preset.method if preset.method != "auto" else "gptq", dict(preset.options))
    if preset.metric != base.metric and preset.unit == "linear":
        find_metric(preset.metric)
    missing = missing_parts(preset)
    if missing:
        label = name if isinstance(name, str) else "made by hand"
        raise PlanError(f"preset {label}", f"it cannot run yet, it needs {'; '.join(missing)}", "choose another (mxq presets lists them), or replace the part")


def describe_presets() -> list[dict]:
    """``mxq presets``: one dict of plain values per preset, its parts in the order of the plan language, then where it is from and what it lacks."""
    return [{"name": name, "runs": not missing_parts(p), "unit": p.unit, "candidates": list(p.candidates), "metric": p.metric, "allocator": p.allocator,
             "quantizer": p.method, "transform": p.transform, "reconstruct": p.reconstruct, "distill": p.distill,
             "activations": p.activations or "a16", "kv": p.kv or "as it is",
             "solver": dict(p.solver), "about": p.about, "source": p.source, "formula": p.formula, "departures": list(p.departures),
             "missing": missing_parts(p)}
            for name, p in PRESETS.items()]


def uniform_plan(units: list[Unit], preset: Preset, *, bits: float | None, nbytes: int | None) -> Plan:
    """The largest of the candidates that fits, for all units. Raises BudgetError if none does, or if the budget lies between two of them by more than
    the preset's tolerance, with their stored bits."""
    numel, formats = sum(u.numel for u in units), [Format.parse(c) for c in preset.candidates]
    budget = bits * numel / 8 if nbytes is None else nbytes
    sizes = sorted((sum(f.nbytes(*u.shape) for u in units), f.name) for f in formats)
    fits = [s for s in sizes if s[0] <= budget * (1 + 1e-12)]
    if not fits:
        raise BudgetError(f"budget of {8 * budget / numel:.6g} stored bits in one format",
                          f"the smallest candidate, {sizes[0][1]}, takes {8 * sizes[0][0] / numel:.4f}", "allow as much, or add a smaller candidate")
    plan = Plan.uniform(fits[-1][1], quantizer=preset.quantizer(), activations=preset.activations)
    plan.kv = None if preset.kv is None else find_kv(preset.kv)
    check_spent(preset, plan.stored_bits(units), 8 * budget / numel, [f"{name} {8 * size / numel:.4f}" for size, name in sizes])
    return plan


def check_spent(preset: Preset, stored: float, asked: float, others: Sequence[str] = ()) -> None:
    """Raises BudgetError if ``stored`` bits are less than was ``asked`` by more than the preset's tolerance."""
    if preset.tolerance is not None and asked - stored > preset.tolerance:
        listed = f" (its candidates for all units: {', '.join(others)})" if others else ""
        raise BudgetError(f"a plan of {asked:.4f} stored bits from {', '.join(preset.candidates)}",
                          f"the largest that the preset makes of it has {stored:.4f}, over {preset.tolerance:g} less{listed}",
                          f"ask for {math.ceil(stored * 1e4) / 1e4:.4f}, or raise solver.tolerance to {math.ceil((asked - stored) * 100) / 100:g}")


def check_span(units: list[Unit], preset: Preset, formats: Sequence[Format], *, bits: float | None, nbytes: int | None) -> None:
    """Raises BudgetError for a budget that no mix of the formats meets within the preset's tolerance."""
    numel = sum(u.numel for u in units)
    asked = 8 * nbytes / numel if bits is None else bits
    sizes = sorted((8 * sum(f.nbytes(*u.shape) for u in units) / numel, f.name) for f in formats)
    (least, low), (most, high) = sizes[0], sizes[-1]
    if asked < least - 1e-9 or (preset.tolerance is not None and asked - most > preset.tolerance):
        raise BudgetError(f"budget of {asked:.6g} stored bits in {preset.unit} of {', '.join(f.name for f in formats)}",
                          f"they span {least:.4f} ({low} for all units) to {most:.4f} ({high})", "ask for what lies between, or replace the candidates")


def _lossless(units: list[Unit], formats: Sequence[Format], kv: KVTable | None = None) -> CostTable:
    """A table of true bytes in which nothing costs anything: what can be solved by it fits."""
    sizes = np.array([[f.nbytes(*u.shape) for f in formats] for u in units])
    return CostTable([u.name for u in units], formats, np.zeros(sizes.shape), sizes, np.array([u.numel for u in units]), kv=kv)


def check_request(units: list[Unit], preset: Preset, plan: Plan | None, *, bits: float | None, nbytes: int | None, shared: bool = False) -> None:
    """Everything that can be wrong with a request and needs no calibration to tell. Raises and warns as the step itself would; ``shared``: the budget is that
    of a cache too."""
    make_options(preset.method if preset.method != "auto" else "gptq", dict(preset.options))
    formats = [Format.parse(c) for c in preset.candidates]
    if plan is not None:
        formats = []
        for name, decision in plan.resolve(units).items():
            if decision is not None and not isinstance(decision, Format):
                raise PlanError(f"bands of unit {name}", "the pipeline makes one format per unit", "use replace_linear(model, plan, stats)")
            formats += [decision] if decision is not None else []
    elif preset.unit == "tiles":
        banding.tile_shape(preset)
        check_span(units, preset, formats, bits=bits, nbytes=nbytes)
    elif preset.unit != "linear":
        if preset.unit == "element":
            banding.check_elements(preset)
        # Bands are counted when they are made: their bytes depend on what is seen.
    else:
        find_metric(preset.metric)
        (choose if shared else solve)(_lossless(units, formats), bits=bits, nbytes=nbytes)
    if preset.method != "auto":
        for fmt in dict.fromkeys(formats):
            bad = find_method(preset.method).applies(fmt) if fmt.kind != "float" else None
            if bad is not None:
                raise QuantizationError(f"quantizing to {fmt} with {preset.method}", *bad)


def check_joint(model: nn.Module, preset: Preset, spec: KVSpec, *, nbytes: int, context: int, batch: int) -> None:
    """Raises what planning weights and a cache would raise after calibration: ModelError for the model's attention, BudgetError for the budget."""
    from .kv.attention import check_attention  # they import transformers
    from .kv.trial import CacheTrial

    check_attention(model, KVPlan(spec))
    trial, units, formats = CacheTrial(model, spec), find_units(model), [Format.parse(c) for c in preset.candidates]
    pages = np.array([[trial.page_bytes(side, b) for b in BITS] for side in SIDES] * model.config.num_hidden_layers)
    free = KVTable(BITS, np.zeros(pages.shape), pages, trial.token_bytes, trial.settings)
    solve_joint(_lossless(units, formats, free), nbytes=nbytes, context=context, batch=batch)


def need_linear(preset: Preset, what: str) -> None:
    """Raises PlanError for presets that choose below whole linears, from the weights themselves."""
    if preset.unit != "linear" or preset.allocator == "uniform":
        raise PlanError(f"{what} for a preset by {preset.unit} and {preset.allocator}", "it needs the weights, and no costs of whole linears",
                        "use mxq quantize --preset, which plans as it goes")


def needs_fisher(preset: Preset, planned: bool = False) -> bool:
    """Whether a preset reads weight-sized Fisher diagonals, which cost a file as large as the model. ``planned``: the plan is there, and no metric is asked."""
    if preset.unit != "linear":
        return preset.metric == "fisher_diag"
    return preset.method == "kmeans" or (not planned and METRICS[preset.metric].fisher)


def needed_weightings(preset: Preset, planned: bool = False) -> tuple[str, ...]:
    """The second moments that a preset reads; each kind costs time and disk in calibration."""
    judged = METRICS[preset.metric].weightings if preset.unit == "linear" and not planned else ()
    return tuple(dict.fromkeys(("none", preset.weighting, *judged)))


def quantizer_of(plan: Plan, preset: Preset, *, method: str | None, weighting: str | None) -> Preset:
    """The preset with the quantizer that the plan names; an explicit ``method`` or ``weighting`` of the caller wins."""
    options = dict(plan.quantizer)
    named, moments = options.pop("name", preset.method), options.pop("weighting", preset.weighting)
    if not isinstance(moments, str):
        raise PlanError(f"the plan's weighting {moments!r}", "the pipeline uses one kind of second moments", "name one, or use replace_linear")
    return dataclasses.replace(preset, method=method or named, weighting=weighting or moments, options=tuple(options.items()) if method is None else ())

"""The whole line: model + text -> Stats -> CostTable -> Plan -> QTensors -> swapped model -> checkpoint.

The only module that knows every step. Each step leaves its files in a work directory, so an interrupted run goes on where it stopped::

    work/tokens.safetensors   the calibration windows
    work/stats-<kinds>/       what calibration saw                        (stats.Stats); below rotate/ or awq-<key>/ of a transformed model
    work/trials/<key>/        one quantized weight per file               (trials.Trials)
    work/cost-<key>.json      loss and bytes of each candidate            (sensitivity.CostTable)
    work/blocks/<key>/<key>/  reconstructed blocks, and how far the run is (quantizers.blocks)
    work/distill/             constants in training                       (quantizers.distill)
    work/plan.json            the formats chosen; to change them, edit it and pass it as ``--plan``
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import banding
from . import text as texts
from .errors import BudgetError, CheckpointError, ModelError, PlanError
from .fileio import load_tensors, save_tensors
from .formats import Format
from .kv_planning import make_kv_table
from .nn import quantized_modules, replace_linear
from .nn.swap import as_plan, check_modules
from .plan import KVPlan, KVSpec, Plan, solve, solve_joint
from .plan.language import Preset
from .plan.presets import find_kv, find_preset
from .plan.times import TimeTable
from .progress import SILENT, Progress
from .qtensor import QTensor
from .quantizers.blocks import BlockOptions, reconstruct_blocks
from .quantizers.distill import DistillOptions
from .quantizers.distill import distill as train_constants
from .request import check_joint, check_parts, check_request, check_spent, needed_weightings, needs_fisher, quantizer_of, uniform_plan
from .sensitivity import CostTable, sense
from .sensitivity.metrics import find_metric
from .stats import Stats, calibrate
from .stats.outputs import output_moments
from .stats.store import FILE as STATS_FILE
from .stats.store import model_fingerprint
from .structure import Unit, find_units, warn_left_out
from .transforms import rotate_residual, scale_activations
from .trials import Trials, code_hash, kept, own_code, own_quantizer, short_hash

WINDOWS = 48  #: calibration windows of LENGTH tokens
LENGTH = 512
TOKENS = "tokens.safetensors"
MOMENT_WINDOWS = 8  #: windows that the gradients at the outputs of blocks are taken on
KV_WINDOWS, KV_LENGTH = 4, 1024  #: windows that the cost of a cache is measured on
UNCALIBRATED = ("rtn", "hqq")  #: methods that read neither second moments nor Fisher diagonals: a plan for one needs no calibration


@dataclass
class Result:
    """What a run of the line made: the swapped model, and the files it was made from."""

    model: nn.Module
    plan: Plan
    table: CostTable | None
    stats: Stats | None
    stored_bits: float
    nbytes: int


# Steps ----------------------------------------------------------------------------------------------------------------------------


def calibration_tokens(model: nn.Module, tokenizer, work: Path, *, text: str | None = None, windows: int = WINDOWS, length: int = LENGTH, seed: int = 0,
                       source: str | None = None, progress: Progress = SILENT) -> torch.Tensor:
    """Calibration windows int64 [W, T], W <= ``windows`` and T ``length``, or as many as the model has positions where those are fewer: of ``text``, spread
    evenly over it; when None, half of the windows are of the built-in text and half are written by the model itself. Kept in ``work``, so that a resumed run
    sees the same.

    ``source``: fingerprint of the model before a transform, which leaves its function and so its own text alone; None: ``model`` is that.
    """
    need_tokenizer(tokenizer, "the model")
    length = min(length, texts.max_positions(model) or length)
    asked = {"model": source or model_fingerprint(model), "text": texts.text_hash(texts.calibration_text() if text is None else text),
             "self_written": str(text is None), "windows": str(windows), "length": str(length), "seed": str(seed)}
    path = work / TOKENS
    if path.exists():
        tensors, meta = load_tensors(path)
        if meta != asked:
            changed = ", ".join(k for k in asked if meta.get(k) != asked[k])
            raise CheckpointError(f"calibrating in {work}", f"it holds the windows of another run (other {changed})",
                                  "use another directory or remove this one")
        return tensors["tokens"]
    if text is None:
        own = windows // 2
        tokens = texts.spread(texts.windows(tokenizer, texts.calibration_text(), length), windows - own)
        if own:
            tokens = torch.cat([tokens, texts.self_written(model, own, length, seed=seed, progress=progress)])
    else:
        tokens = texts.spread(texts.windows(tokenizer, text, length), windows)
    save_tensors(path, {"tokens": tokens}, asked)
    return tokens


def kv_tokens(model: nn.Module, tokenizer, text: str | None = None, context: int | None = None) -> torch.Tensor:
    """Windows int64 [W, T] to measure a cache on: of ``text`` (None: the built-in one), as long as the planned context but at most KV_LENGTH, and no
    longer than the model has positions for."""
    length = min(n for n in (KV_LENGTH, context, texts.max_positions(model)) if n is not None)
    return texts.spread(texts.windows(need_tokenizer(tokenizer, "the model"), texts.calibration_text() if text is None else text, length), KV_WINDOWS)


def make_table(model: nn.Module, tokens: torch.Tensor, stats: Stats, preset: Preset, work: Path, progress: Progress = SILENT) -> CostTable:
    """The cost table of a preset, read from the work directory when it is there."""
    trials = Trials(work / "trials", model, stats, preset)
    settings = {"candidates": list(preset.candidates), "metric": [preset.metric, *own_code(find_metric(preset.metric))], "trials": trials.key}
    path = work / f"cost-{short_hash(settings)}.json"
    if path.exists():
        return CostTable.load(path)
    table = sense(model, tokens, stats, preset.candidates, metric=preset.metric, trial=trials, progress=progress)
    table.meta["quantizer"] = preset.quantizer()
    table.save(path)
    return table


def quantize_by_plan(model: nn.Module, plan: Plan, trials: Trials, progress: Progress = SILENT) -> dict[str, QTensor]:
    """QTensors of every unit that the plan does not keep in float, by name; made or read one by one."""
    modules = dict(model.named_modules())
    units = find_units(model)
    out = {}
    for unit, decision in progress.track(list(zip(units, plan.resolve(units).values(), strict=True)), "quantize"):
        if isinstance(decision, Format):
            out[unit.name] = trials(unit, modules[unit.name].weight.detach().float(), decision)
        elif decision is not None:
            raise PlanError(f"bands of unit {unit.name}", "the pipeline makes one format per unit",
                            "use replace_linear(model, plan, stats) for plans with bands")
    return out


def quantize_model(model: nn.Module, tokenizer, *, bits: float | None = None, nbytes: int | None = None, plan: Plan | str | None = None,
                   text: str | os.PathLike | None = None, preset: str | Preset | None = None, candidates=None, metric: str | None = None,
                   method: str | None = None, weighting: str | None = None, activations: str | None = None, changes: dict | None = None,
                   windows: int = WINDOWS, times: str | os.PathLike | None = None, max_ms_per_token: float | None = None,
                   stats_dir: str | os.PathLike | None = None, work: str | os.PathLike | None = None, context: int | None = None, batch: int = 1,
                   kv: KVSpec | KVPlan | str | None = None, transform: str | None = None, reconstruct: int | None = None, distill: int | None = None,
                   progress: Progress = SILENT) -> Result:
    """Calibrates, senses, plans and quantizes ``model`` in place.

    Args:
        bits: average stored bits per weight over all units, scales and tables counted; or ``nbytes``, the same as bytes; or ``plan``, a Plan,
            a plan file or a format name, which skips the search. Exactly one of the three.
        text: path of a UTF-8 text file to calibrate on; None takes the built-in text and as much written by the model itself.
        preset: a name of ``presets.PRESETS``, or a Preset; ``candidates``, ``metric``, ``method`` and ``weighting`` replace parts of it, ``changes``
            any others by name.
        activations: how the linears will read their input, ``"a16"`` or ``"a8"``; None leaves it to the plan, or to the preset.
        windows: calibration windows of 512 tokens.
        times: a time table of this machine (``mxq bench MODEL --table``): the plan's meta then says what it will take (``predicted``), and
            ``max_ms_per_token`` limits a plan of whole linears.
        stats_dir: what ``mxq calibrate`` wrote for this model; then ``text`` and ``windows`` are not used.
        work: directory of intermediate files; kept, and reused by a later call. A temporary one when None.
        context, batch: with them ``nbytes`` is a budget of the weights and of a cache of that many tokens and sequences together, and the plan has a KV
            section: more bits wherever, in weights or cache, they bring most.
        kv: how keys and values are cached, as ``replace_attention`` reads it; wins over the plan's and the preset's. With ``context`` one for all layers:
            group, residual, sink, rotate, pre_rope and outliers of the section that is planned.
        transform: a change of the float model that keeps its function: ``"rotate"`` (``transforms.rotate_residual``) or ``"awq"``
            (``transforms.scale_activations``); None: the preset's.
        reconstruct: training steps per block (``quantizers.blocks``) after the quantizer; 0 quantizes on the real inputs and trains nothing; None: the
            preset's.
        distill: steps of end-to-end training of constants and norms (``quantizers.distill``) after that; None: the preset's.

    Raises:
        BudgetError: no mix of candidates fits; says by how much.
        MxqError: any other mistake of the caller.

    After an error a model with a transform may have it already: the same function by other weights, and a head that is tied no longer.
    """
    asked = {name: value for name, value in (("bits", bits), ("nbytes", nbytes), ("plan", plan)) if value is not None}
    if len(asked) != 1:
        raise PlanError(f"quantizing with {' and '.join(f'{name}={value}' for name, value in asked.items()) or 'neither bits, nbytes nor plan'}",
                        "exactly one of the three must be given", "keep one of them" if asked else "pass for example bits=3.5")
    if context is not None and nbytes is None:
        raise BudgetError(f"quantizing for a cache of {context} tokens with {next(iter(asked))}={asked.popitem()[1]}",
                          "weights and cache have one budget in bytes", "pass it as nbytes=N")
    named = {"candidates": candidates, "metric": metric, "method": method, "weighting": weighting, "activations": activations, "transform": transform,
             "reconstruct": reconstruct, "distill": distill}
    chosen = find_preset(preset, **{**(changes or {}), **{k: v for k, v in named.items() if v is not None}})
    check_parts(chosen, preset)
    blocks = None if chosen.reconstruct is None else BlockOptions(steps=chosen.reconstruct)
    training = None if chosen.distill is None else DistillOptions(steps=chosen.distill)
    if blocks is not None and chosen.unit != "linear":
        raise PlanError(f"reconstruct={chosen.reconstruct} of a preset by {chosen.unit}", "blocks are trained in plans of whole linears",
                        "drop it, or choose a preset whose unit is linear")
    if quantized_modules(model):
        named = (getattr(model, "mxq_source", None) or {}).get("path", f"a {type(model).__name__}")
        raise ModelError(f"quantizing {named}", "the model is quantized already", "start from the float model")
    cache = None
    if kv not in (None, "none") and context is None:
        from .kv.attention import as_kv, check_attention  # they import transformers

        cache = as_kv(kv)
        check_attention(model, cache)
    if plan is not None:
        if preset is not None and not isinstance(plan, str):
            raise PlanError(f"a plan together with preset {preset!r}", "a plan names its own quantizer", "drop one of them, or pass method=")
        plan = as_plan(plan, quantizer=chosen.quantizer())
        chosen = quantizer_of(plan, chosen, method=method, weighting=weighting)
        plan = dataclasses.replace(plan, quantizer=chosen.quantizer(), activations=activations or plan.activations)
    source = model_fingerprint(model)
    if chosen.transform == "rotate":
        rotate_residual(model)  # before bytes are counted, since a head that was tied becomes a unit of its own
    units = find_units(model)
    if plan is None and chosen.allocator == "uniform":
        plan = uniform_plan(units, chosen, bits=bits, nbytes=nbytes)
    check_request(units, chosen, plan, bits=bits, nbytes=nbytes, shared=context is not None)
    floats = set() if plan is None else {name for name, decision in plan.resolve(units).items() if decision is None}
    check_modules(model, [u for u in units if u.name not in floats])
    warn_left_out(model, units)
    if context is not None:
        if chosen.unit != "linear" or chosen.allocator == "uniform" or chosen.kv is not None:
            what = f"a cache as {chosen.kv}" if chosen.kv is not None else f"weights by {chosen.unit} ({chosen.allocator})"
            raise PlanError(f"{what} and a budget for weights and cache together", "only plans of whole linears are joined with a cache, whose bits they plan",
                            "drop context, or set kv beside the weights' own budget")
        kv = _one_spec(kv)
        check_joint(model, chosen, kv, nbytes=nbytes, context=context, batch=batch)
    clock = None if times is None else TimeTable.load(times)
    if max_ms_per_token is not None and (clock is None or plan is not None or chosen.unit != "linear" or context is not None):
        raise BudgetError(f"at most {max_ms_per_token:g} ms for a token", "it needs a time table, and a search over whole linears without a cache beside them",
                          "give times=FILE, and a preset whose unit is linear")
    limit = None if max_ms_per_token is None else clock.room(max_ms_per_token)
    table = stats = None
    planned = plan is not None
    read = None if text is None else texts.read_text(text)
    if stats_dir is not None:
        stats, tokens = open_stats(stats_dir, model)
    elif reads_text(chosen, planned):
        need_tokenizer(tokenizer, "the model")
    with working_directory(work) as directory:
        if stats is None and reads_text(chosen, planned):
            tokens = calibration_tokens(model, tokenizer, directory, text=read, windows=windows, source=source, progress=progress)
            stats = calibrate_for(model, tokens, chosen, directory / "rotate" if chosen.transform == "rotate" else directory, progress, planned)
        if chosen.transform == "awq":
            formats = awq_formats(find_units(model), chosen, plan, bits=bits, nbytes=nbytes)
            scale_activations(model, stats, formats, progress=progress)
            stats = calibrate_for(model, tokens, chosen, directory / f"awq-{short_hash({n: f.name for n, f in formats.items()})}", progress, planned)
        units, layouts = find_units(model), None
        if plan is None:
            if chosen.unit != "linear":
                layouts, plan = banding.choose_layouts(model, tokens, stats, chosen, bits=bits, nbytes=nbytes, progress=progress)
            else:
                table = make_table(model, tokens, stats, chosen, directory, progress)
                table = table if limit is None else clock.fill(table)
                if context is None:
                    plan = solve(table, bits=bits, nbytes=nbytes, method=chosen.allocator, max_seconds=limit, quantizer=chosen.quantizer())
                else:
                    table.kv = make_kv_table(model, kv_tokens(model, tokenizer, read, context), kv, anchored=True, progress=progress)
                    plan = solve_joint(table, nbytes=nbytes, context=context, batch=batch, method=chosen.allocator, quantizer=chosen.quantizer())
            plan = dataclasses.replace(plan, activations=chosen.activations, kv=plan.kv if chosen.kv is None else find_kv(chosen.kv))
            if context is None and limit is None:  # under a time limit fewer bytes may be the best
                check_spent(chosen, plan.stored_bits(units), 8 * nbytes / sum(u.numel for u in units) if bits is None else bits)
        if kv is not None and context is None:
            plan = dataclasses.replace(plan, kv=cache)
        if clock is not None:
            plan.meta = plan.meta | {"predicted": clock.predict(units, plan.resolve(units))}
        plan.meta = plan.meta | {k: v for k, v in (("transform", chosen.transform), ("reconstruct", chosen.reconstruct), ("distill", chosen.distill))
                                 if v not in ("none", None)}
        plan.save(directory / "plan.json")
        width = next(model.parameters()).element_size()
        nbytes, stored = plan.predicted_bytes(units, width)["total"], plan.stored_bits(units, width)
        if layouts is not None:
            qtensors = quantize_by_layouts(model, layouts, stats, chosen, directory, progress)
        else:
            trials = Trials(directory / "trials", model, stats, chosen)
            qtensors = quantize_by_plan(model, plan, trials, progress)
            if blocks is not None:
                moments = output_moments(model, texts.spread(tokens, MOMENT_WINDOWS), progress=progress)
                qtensors = reconstruct_blocks(model, qtensors, tokens, blocks, moments=moments, directory=directory / "blocks" / trials.key,
                                              progress=progress)
        norms = {}
        if training is not None:
            qtensors, norms = train_constants(model, qtensors, tokens, training, directory=directory / "distill", progress=progress)
        replace_linear(model, plan, qtensors=qtensors, progress=SILENT)
        for name, weight in norms.items():
            model.get_parameter(name).data.copy_(weight)
    return Result(model, plan, table, stats if work is not None else None, stored, nbytes)


def _one_spec(kv: KVSpec | KVPlan | str | None) -> KVSpec:
    """The spec that all layers of a planned cache share but for their bits. Raises PlanError if they have several, or none."""
    found = find_kv(kv) if isinstance(kv, str) else KVPlan.parse(KVSpec() if kv is None else kv)
    if found is None or found.layers:
        raise PlanError(f"a budget for weights and cache together, with kv={kv}", "the bits of each layer are planned, and the rest is one spec for all",
                        "name a spec or a policy such as kivi4, or drop context")
    return found.default


def awq_formats(units: list[Unit], preset: Preset, plan: Plan | None, *, bits: float | None, nbytes: int | None) -> dict[str, Format]:
    """The format that AWQ's scales are searched for, by unit: the plan's; without a plan, of the preset's candidates the widest within the budget
    (the narrowest when none is), since the scales come before the search for formats.
    """
    if plan is not None:
        return {name: d for name, d in plan.resolve(units).items() if isinstance(d, Format)}
    total = sum(u.numel for u in units)
    budget = bits if bits is not None else 8 * nbytes / total
    by_size = sorted((8 * sum(f.nbytes(*u.shape) for u in units) / total, i, f) for i, f in enumerate(map(Format.parse, preset.candidates)))
    fitting = [f for size, _, f in by_size if size <= budget]
    return dict.fromkeys((u.name for u in units), fitting[-1] if fitting else by_size[0][2])


@contextlib.contextmanager
def working_directory(work: str | os.PathLike | None) -> Iterator[Path]:
    """The given directory, made if missing and kept unless a failure left it empty; or a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="mxq-") as path:
            yield Path(path)
    else:
        Path(work).mkdir(parents=True, exist_ok=True)
        try:
            yield Path(work)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(work).rmdir()  # if nothing was written, there is nothing to go on with
            raise


def quantize_by_layouts(model: nn.Module, layouts: dict[str, banding.Layout], stats: Stats, preset: Preset, work: Path,
                        progress: Progress = SILENT) -> dict[str, QTensor]:
    """QTensors of every unit in its layout; each kept under ``work/bands-<key>/`` as it is made, so that an interrupted run goes on."""
    modules, out = dict(model.named_modules()), {}
    code = [code_hash(), *own_quantizer(preset.method)]
    key = short_hash({"model": model_fingerprint(model), "quantizer": preset.quantizer(), "metric": preset.metric, "code": code, "stats": stats.meta})
    for name, layout in progress.track(list(layouts.items()), "quantize"):
        weight = modules[name].weight.detach().float()

        def make(name=name, layout=layout, weight=weight) -> QTensor:
            seen = {}
            if name in stats:
                fisher = stats.fisher(name) if preset.metric == "fisher_diag" else None
                seen = {"hessian": stats.hessian(name, preset.weighting), "fisher": fisher}
            return banding.compose(weight, layout, preset, **seen)

        out[name] = kept(work / f"bands-{key}" / f"{name}.{layout.digest()[:12]}.safetensors", weight, make)
    return out


def reads_text(preset: Preset, planned: bool) -> bool:
    """Whether quantizing by a preset looks at calibration text: to choose a plan, unless there is one, for the quantizer, or before or after it."""
    return (not planned or preset.method not in UNCALIBRATED or preset.reconstruct is not None or preset.distill is not None
            or preset.transform == "awq")


def kinds_for(preset: Preset, planned: bool = False) -> frozenset[str]:
    """The statistics that a preset reads: weightings, and ``fisher``; ``planned``: without those of its metric, which only chooses a plan."""
    return frozenset((*needed_weightings(preset, planned), *(("fisher",) if needs_fisher(preset, planned) else ())))


def calibrate_for(model: nn.Module, tokens: torch.Tensor, preset: Preset, work: Path, progress: Progress = SILENT, planned: bool = False) -> Stats:
    """The statistics that a preset reads, as ``kinds_for`` has them."""
    return calibrate_kinds(model, tokens, kinds_for(preset, planned), work, progress)


def calibrate_kinds(model: nn.Module, tokens: torch.Tensor, kinds: frozenset[str], work: Path, progress: Progress = SILENT) -> Stats:
    """Statistics of these kinds, in the directory ``stats-<kinds>``; where there is none but a finished one of more kinds, that one."""
    if not (work / _stats_name(kinds) / STATS_FILE).is_file():
        more = [found for d in sorted(work.glob("stats-*")) if (d / STATS_FILE).is_file() and (found := frozenset(d.name.split("-")[1:])) > kinds]
        kinds = min(more, key=len, default=kinds)
    return calibrate(model, tokens, work / _stats_name(kinds), weightings=tuple(kinds - {"fisher"}), fisher="fisher" in kinds, progress=progress)


def _stats_name(kinds: frozenset[str]) -> str:
    return "-".join(["stats", *sorted(kinds - {"fisher"}), *({"fisher"} & kinds)])


def open_stats(directory: str | os.PathLike, model: nn.Module) -> tuple[Stats, torch.Tensor]:
    """What ``mxq calibrate`` wrote: statistics, and the windows they are of. Raises CheckpointError if they are of another model."""
    stats = Stats.load(directory)
    if stats.meta["model"]["hash"] != model_fingerprint(model):
        raise CheckpointError(f"the statistics in {directory}", "they were collected on another model", "calibrate this model first")
    return stats, load_tensors(Path(directory) / TOKENS)[0]["tokens"]


def need_tokenizer(tokenizer, where):
    """The tokenizer, or a ModelError that says what is missing."""
    if tokenizer is None:
        raise ModelError(f"reading text for {where}", "there is no tokenizer beside it", "add tokenizer.json to the model's directory")
    return tokenizer


def kv_counts(plan: Plan, layers: int) -> dict[str, int]:
    """Spec name -> number of layers that cache so, most frequent first."""
    return dict(Counter(str(s or "keep") for s in plan.kv.resolve(layers)).most_common())

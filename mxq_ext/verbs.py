"""What each command of ``mxq`` does, on paths: the steps of :mod:`.pipeline` between a model's directory or file and a checkpoint, a table or a report."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from . import text as texts
from .decoding import check_sampling, end_tokens, sample
from .errors import BudgetError, CheckpointError, ModelError, MxqError, MxqWarning, PlanError
from .fileio import check_file, check_own
from .kv_planning import make_kv_table
from .pipeline import LENGTH, TOKENS, WINDOWS, calibration_tokens, kv_counts, kv_tokens, need_tokenizer, open_stats, quantize_model
from .plan import KVSpec, Plan, pareto_front, solve, solve_joint
from .plan.language import Preset
from .plan.presets import find_kv, find_preset
from .plan.times import TimeTable
from .progress import SILENT, Progress
from .request import check_parts, check_spent, need_linear, quantizer_of
from .sensitivity import CostTable, sense
from .stats import calibrate
from .stats.store import FILE as STATS_FILE
from .structure import Unit, find_units, warn_left_out
from .trials import Trials


def load(path: str | os.PathLike, kv: str | None = None) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a Hugging Face directory, a GGUF file or an mxq checkpoint.

    ``kv`` names how keys and values are cached (``plan.presets.find_kv``); None: as the model's plan says.
    """
    from .hf import load_model

    chosen = None if kv is None else find_kv(kv)
    model, tokenizer = load_model(path)
    if kv is not None:
        from .kv.attention import replace_attention

        replace_attention(model, chosen)
    return model, tokenizer


def calibrate_model(model_path, out, *, text_path=None, windows: int = WINDOWS, progress: Progress = SILENT) -> dict:
    """``mxq calibrate``: writes Stats of a model to the directory ``out`` and returns their summary. Raises CheckpointError if that holds something else."""
    check_own(out, (TOKENS, STATS_FILE), "statistics")
    text = None if text_path is None else texts.read_text(text_path)
    model, tokenizer = load(model_path)
    tokens = calibration_tokens(model, tokenizer, Path(out), text=text, windows=windows, progress=progress)
    stats = calibrate(model, tokens, out, progress=progress)
    return {"out": str(out), "text": texts.text_hash(texts.calibration_text() if text is None else text), **stats.meta}


def sense_model(model_path, stats_dir, out, *, preset: str | None = None, candidates=None, metric: str | None = None, changes: dict | None = None,
                kv: str | None = None, kv_by_head: bool = False, progress: Progress = SILENT) -> dict:
    """``mxq sense``: writes the CostTable to the JSON file ``out`` (and a CSV beside it); trials are kept beside the Stats.

    ``changes`` replace any parts of the preset, such as the quantizer (``method``) and its options; ``candidates`` and ``metric`` are two of them.

    ``kv`` names a spec whose group, residual, sink and rotate a cache would have; then the table also says what its bits cost, ``kv_by_head``: in each
    key/value head. Raises PlanError for ``kv_by_head`` without it.
    """
    if kv_by_head and kv is None:
        raise PlanError("costs of a cache by head", "no cache is named", "name one, for example kv=k4v4g64")
    spec = None if kv is None else KVSpec.named(kv)
    named = {name: value for name, value in (("candidates", candidates), ("metric", metric)) if value is not None}
    chosen = find_preset(preset, **{**(changes or {}), **named})
    _check_formats_alone(changes or {}, "a cost table")
    check_parts(chosen, preset)
    need_linear(chosen, "a cost table")
    check_file(out)
    model, tokenizer = load(model_path)
    warn_left_out(model, find_units(model))
    stats, tokens = open_stats(stats_dir, model)
    trials = Trials(Path(stats_dir) / "trials", model, stats, chosen)
    table = sense(model, tokens, stats, chosen.candidates, metric=chosen.metric, trial=trials, progress=progress)
    table.meta["quantizer"] = chosen.quantizer()
    if spec is not None:
        table.kv = make_kv_table(model, kv_tokens(model, tokenizer), spec, anchored=True, by_head=kv_by_head, progress=progress)
    table.save(out)
    table.to_csv(Path(out).with_suffix(".csv"))
    rows = [{"format": f, "loss": loss, "nbytes": size, "stored_bits": table.stored_bits(size)} for f in table.formats for loss, size in [table.uniform(f)]]
    cache = [] if table.kv is None else [{"bits": b, "loss_keys": float(table.kv.loss[::2, i].sum()), "loss_values": float(table.kv.loss[1::2, i].sum())}
                                         for i, b in enumerate(table.kv.bits)]
    return {"out": str(out), "metric": chosen.metric, "units": len(table.units), "uniform": rows} | ({"cache": cache} if cache else {})


BESIDE_FORMATS = ("transform", "reconstruct", "distill")  #: what is done to the weights before or after they have formats


def _check_formats_alone(changes: dict, what: str) -> None:
    """Raises PlanError for changes of ``BESIDE_FORMATS``."""
    if later := [part for part in BESIDE_FORMATS if part in changes]:
        raise PlanError(f"{what} with {later[0]}={changes[later[0]]}", "it is about formats, and that is done to the weights",
                        f"give it to `mxq quantize --plan`: --{later[0]} {changes[later[0]]}")


def units_of(table: CostTable) -> list[Unit]:
    """Units by the names and shapes in a cost table's meta: enough to count and time a plan, without the model."""
    places = table.meta["shapes"]
    return [Unit(u, "embedding" if places[u]["embedding"] else "linear", tuple(places[u]["shape"]), places[u]["layer"], u.rpartition(".")[2],
                 tuple(places[u]["tied"])) for u in table.units]


def plan_from_table(cost_path, out, *, bits: float | None = None, nbytes: int | None = None, preset: str | Preset | None = None, changes: dict | None = None,
                    times=None, max_ms_per_token: float | None = None, context: int | None = None, batch: int = 1, front=None) -> dict:
    """``mxq plan``: solves for a budget and writes the Plan; ``front`` names a CSV for the whole front of the weights.

    With ``context`` the budget is in bytes, and covers the weights and a cache of ``batch`` sequences of that many tokens. A ``preset`` narrows the
    table to its candidates, and gives allocator, activations and cache; ``changes`` replace its parts, or those of the table's own where no preset is named.
    The table must have been measured with its metric and its quantizer, which the plan names; a warning tells what else the preset does. ``times`` names a
    time table of this machine: then the plan's meta and the result say what the plan will take, and ``max_ms_per_token`` limits it.
    """
    changes = changes or {}
    if context is not None and find_preset(preset, **changes).kv is not None:
        raise PlanError(f"a plan for a context of {context} tokens by a preset with a cache of its own", "the cache's bits are planned, or named, not both",
                        "drop context, or the preset's kv")
    if max_ms_per_token is not None and (times is None or context is not None):
        raise BudgetError(f"a plan of at most {max_ms_per_token} ms for a token", "it needs a time table, and no budget for a cache beside it",
                          "measure one with `mxq bench MODEL --table times.json`, and give it as times=FILE")
    if context is not None and nbytes is None:
        raise BudgetError(f"a plan for a context of {context} tokens with bits={bits}", "weights and cache have one budget in bytes", "give it as nbytes=N")
    _check_formats_alone(changes, f"a plan from {cost_path}")
    table = CostTable.load(cost_path)
    metric, quantizer = table.meta.get("metric"), table.meta.get("quantizer")  # of tables of earlier versions the latter is unknown
    chosen = find_preset(preset)
    if preset is None and quantizer is not None:
        chosen = quantizer_of(Plan(quantizer=quantizer), chosen, method=None, weighting=None)
    chosen = find_preset(chosen, **changes)
    check_parts(chosen, preset)
    need_linear(chosen, "a plan from a cost table")
    named = isinstance(preset, str)
    asked, measure = (f"a plan by preset {preset} from {cost_path}", f"measure it with `mxq sense --preset {preset}`") if named else (
        f"a plan from {cost_path}", "measure it again")
    if metric != chosen.metric and (preset is not None or "metric" in changes):
        raise PlanError(asked, f"its metric is {chosen.metric}, the table's {metric}", f"{measure}, or --set metric={metric}")
    if quantizer not in (None, chosen.quantizer()):
        raise PlanError(asked, f"its quantizer is {_said(chosen.quantizer())}, and the table's losses are those of {_said(quantizer)}",
                        f"{measure}, or make the plan without, and quantize with another --method")
    if preset is not None or "candidates" in changes:
        table = table.subset(chosen.candidates)
    clock = None if times is None else TimeTable.load(times)
    if clock is not None:
        table = clock.fill(table)
    if context is None:
        limit = None if max_ms_per_token is None else clock.room(max_ms_per_token)
        plan = solve(table, bits=bits, nbytes=nbytes, method=chosen.allocator, max_seconds=limit, quantizer=chosen.quantizer())
    else:
        plan = solve_joint(table, nbytes=nbytes, context=context, batch=batch, method=chosen.allocator, quantizer=chosen.quantizer())
    plan = dataclasses.replace(plan, activations=chosen.activations, kv=plan.kv if chosen.kv is None else find_kv(chosen.kv))
    if bits is not None and max_ms_per_token is None:  # under a time limit fewer bytes may be the best
        check_spent(chosen, plan.meta["stored_bits"], bits)
    if clock is not None:
        units = units_of(table)
        plan.meta["predicted"] = clock.predict(units, plan.resolve(units))
    plan.save(out)
    if front is not None:
        from .fileio import write_text

        points = pareto_front(table)
        rows = zip(points.nbytes.tolist(), points.loss.tolist(), strict=True)
        write_text(front, "nbytes,stored_bits,loss\n" + "".join(f"{size},{table.stored_bits(size):.6f},{loss:.9g}\n" for size, loss in rows))
    if left := [f"--{part} {getattr(chosen, part)}" for part in BESIDE_FORMATS if getattr(chosen, part) not in (None, "none")]:
        warnings.warn(f"{asked}: a plan says formats alone, and the preset does more; give the rest to `mxq quantize MODEL --plan {out}`: {' '.join(left)}",
                      MxqWarning, stacklevel=2)
    shown = {"out": str(out), "formats": plan.counts(), **{k: plan.meta[k] for k in ("nbytes", "stored_bits", "loss", "predicted") if k in plan.meta}}
    return shown if context is None else shown | {"cache": kv_counts(plan, table.kv.layers), "joint": plan.meta["joint"]}


def _said(quantizer: dict) -> str:
    """A plan's ``quantizer`` section in one line."""
    return ", ".join(str(v) if k == "name" else f"{k}={v}" for k, v in quantizer.items())


def quantize_checkpoint(model_path, out, *, bits: float | None = None, nbytes: int | None = None, preset: str | Preset | None = None, text=None,
                        candidates=None, metric: str | None = None, method: str | None = None, changes: dict | None = None, windows: int = WINDOWS,
                        activations: str | None = None, uniform: str | None = None, plan=None, stats=None, work=None, overwrite: bool = False,
                        times=None, max_ms_per_token: float | None = None, transform: str | None = None, reconstruct: int | None = None,
                        distill: int | None = None, context: int | None = None, batch: int = 1, kv: str | None = None,
                        progress: Progress = SILENT) -> dict:
    """``mxq quantize``: the whole line on paths. Resumes from ``work`` (default ``<out>.work``, removed after success)."""
    out = Path(out)
    checkpoint.check_target(out, overwrite)
    model, tokenizer = load(model_path)
    directory = Path(work) if work is not None else out.with_name(out.name + ".work")
    result = quantize_model(model, tokenizer, bits=bits, nbytes=nbytes, plan=uniform if plan is None else Path(plan), text=text, preset=preset,
                            candidates=candidates, metric=metric, method=method, activations=activations, changes=changes, windows=windows, stats_dir=stats,
                            times=times, max_ms_per_token=max_ms_per_token, transform=transform, reconstruct=reconstruct,
                            distill=distill, work=directory, context=context, batch=batch, kv=kv, progress=progress)
    save_counted(result.model, out, tokenizer, result.plan, result.nbytes, overwrite=overwrite, progress=progress)
    if work is None:
        shutil.rmtree(directory)
    return {"out": str(out), "stored_bits": result.stored_bits, "predicted_bytes": result.nbytes, "bytes_on_disk": result.nbytes,
            "checkpoint_bytes": checkpoint.bytes_on_disk(out)["total"], "formats": result.plan.counts(find_units(result.model)),
            **({} if times is None else {"predicted": result.plan.meta["predicted"]}),
            **({} if context is None else {"cache": kv_counts(result.plan, result.table.kv.layers), "joint": result.plan.meta["joint"]})}


def save_counted(model: nn.Module, out: str | os.PathLike, tokenizer, plan: Plan, predicted: int, *, overwrite: bool = False,
                 progress: Progress = SILENT) -> None:
    """Writes a checkpoint. Raises CheckpointError if its units do not take the bytes that were ``predicted``."""
    checkpoint.save(model, out, tokenizer, plan, overwrite=overwrite, progress=progress)
    written = written_bytes(Path(out), plan, find_units(model))
    if written != predicted:
        raise CheckpointError(f"checkpoint {out}", f"its units take {written} bytes, the plan predicted {predicted}", "report this as a bug")


def written_bytes(directory: Path, plan: Plan, units: list[Unit]) -> int:
    """Bytes of all units of a checkpoint, those that the plan keeps in float included, counted from the headers of its files."""
    kept = [name for name, decision in plan.resolve(units).items() if decision is None]
    tensors = checkpoint.check(directory, "size").tensors
    return sum(checkpoint.bytes_on_disk(directory)["units"].values()) + sum(checkpoint.tensor_bytes(tensors[f"{name}.weight"]) for name in kept)


def evaluate_checkpoint(path, *, reference=None, text=None, windows: int = 12, length: int = LENGTH, kv: str | None = None,
                        tasks: Sequence[str] = (), include=None, task_limit: int | None = None, progress: Progress = SILENT) -> dict:
    """``mxq eval``: perplexity on held-out text (or ``text``), and against ``reference`` the KL divergence and the greedy agreement; then zero-shot ``tasks``
    with ``include`` and the limit ``task_limit`` as ``tasks.run_tasks`` has them.

    ``kv`` names how keys and values are cached meanwhile (``plan.presets.find_kv``): with none, as the model's plan says.
    """
    from .evaluate import evaluate
    from .tasks import need_lm_eval, run_tasks

    if tasks:
        need_lm_eval(f"tasks {', '.join(tasks)}")
    model, tokenizer = load(path, kv)
    held_out = texts.heldout_text("technical") if text is None else texts.read_text(text)
    texts.check_positions(model, length, "windows")
    tokens = texts.spread(texts.windows(need_tokenizer(tokenizer, path), held_out, length), windows)
    other = load(reference)[0] if reference is not None else None
    result = {"model": str(path), "text_sha256": texts.text_hash(held_out), **evaluate(model, other, tokens, progress=progress).to_dict()}
    return result | ({"tasks": run_tasks(model, tokenizer, tasks, include=include, limit=task_limit)} if tasks else {})


@torch.inference_mode()
def generate_text(path, prompt: str, *, max_new_tokens: int = 64, chat: bool | None = None, temperature: float | None = None, top_p: float = 1.0, seed: int = 0,
                  kv: str | None = None, show: Callable[[str], None] | None = None) -> dict:
    """``mxq generate``: answers or continues ``prompt``, up to a token that ends a text (the last one of the result then).

    Args:
        chat: put the prompt into the tokenizer's chat template, and return the answer alone; None does so where there is a template. Else the prompt is
            continued, and stands before what the model writes.
        temperature, top_p, seed: tokens are drawn as ``decoding.sample`` does; temperature 0 takes the most probable one each time. None is 1 where there is a
            ``top_p``, else 0.
        kv: how keys and values are cached (``plan.presets.find_kv``); None: as the model's plan says.
        show: is given the text bit by bit as it is written.

    Of the model's generation config only the end tokens count. Raises MxqError for an empty prompt and for numbers out of range, ModelError for a chat without
    a template; warns if the text may grow beyond the model's positions.
    """
    temperature = (0.0 if top_p == 1 else 1.0) if temperature is None else temperature
    check_sampling(temperature, top_p)
    model, tokenizer = load(path, kv)
    tokenizer = need_tokenizer(tokenizer, path)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ModelError(f"a chat with {path}", "its tokenizer has no chat template", "continue the prompt instead, with chat=False")
    chat = has_template if chat is None else chat
    if not prompt:
        raise MxqError("generating", "the prompt has no tokens", "pass a prompt that is not empty")
    if chat:
        said = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise MxqError("generating", "the prompt has no tokens", "pass a prompt that is not empty")
    limit = texts.max_positions(model)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        warnings.warn(f"a prompt of {ids.shape[1]} tokens and up to {max_new_tokens} new ones: the model was made for {limit} positions, and what it writes "
                      f"beyond them means nothing", MxqWarning, stacklevel=2)
    before = [] if chat else ids[0].tolist()
    written, ends, shown = [], end_tokens(model), ""

    def text() -> str:
        return tokenizer.decode([*before, *written], skip_special_tokens=True)

    for token in islice(sample(model, ids, temperature=temperature, top_p=top_p, seed=seed), max_new_tokens):
        written.append(int(token))
        if show is not None and not (now := text()).endswith("\ufffd"):  # which is half a letter
            show(now[len(shown):])
            shown = now
        if written[-1] in ends:
            break
    if show is not None:
        show(text()[len(shown):])
    return {"model": str(path), "text": text(), "new_tokens": len(written)}

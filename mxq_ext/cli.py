"""The command ``mxq``: one verb for each step of the line, and one for the whole of it.

A verb checks its arguments, calls one function of the package, and shows what that returns: as a table, or with ``--json`` as
JSON on stdout, with progress on stderr in both cases. Exit codes: 0 done, 1 a bug (with its traceback), 2 a mistake that the
user can mend (one line, no traceback), 130 interrupted.

Heavy modules are imported inside the verbs, so that ``mxq --help`` needs neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from . import __version__
from .errors import BudgetError, FormatError, MxqError, MxqWarning, PlanError
from .formats import Format
from .progress import Progress


class _Verbs(typer.core.TyperGroup):
    """The verbs, whose usage errors are one line, as all others are, instead of typer's four."""

    def main(self, *args, standalone_mode: bool = True, **extra):
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            if not standalone_mode or not isinstance(getattr(error, "exit_code", None), int) or not hasattr(error, "format_message"):
                raise
            if (context := getattr(error, "ctx", None)) is None or type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                said = error.format_message().strip().rstrip(".")
                _complain(f"{context.command_path}: {said[:1].lower()}{said[1:]}; see {context.command_path} --help", "error", "31")
            sys.exit(error.exit_code)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    name="mxq",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

#: What a user's path, disk or permission can cause; any other OSError is a bug and keeps its traceback.
_USER_ERRNO = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EEXIST}

# ---------------------------------------------------------------------------------------------------------------- plumbing


def _complain(text: str, label: str, color: str) -> None:
    """One line on stderr, colored on a terminal."""
    line = f"{label}: {' '.join(text.split())}"
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    print(line if plain else f"\033[{color}m{line}\033[0m", file=sys.stderr, flush=True)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, MxqWarning):
        _complain(str(message), "warning", "33")
    else:
        _other_warnings(message, category, filename, lineno, file, line)


_other_warnings = warnings.showwarning


def _as_typed(text: str, function: Callable[..., None]) -> str:
    """An error of the package, which names arguments of Python, as whoever typed a verb knows them: ``pass overwrite=True`` -> ``pass --overwrite``."""
    options = {}
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        for entry in getattr(hint, "__metadata__", ()):
            declared = (entry.default, *(entry.param_decls or ()))  # within Annotated, typer takes the first of the names for the default
            if long := next((text for text in declared if isinstance(text, str) and text.startswith("--")), None):
                options[name] = long.partition("/")[0]

    def option(found: re.Match) -> str:
        value = found[2].strip("'\"")
        if value == "False":
            return f"--no-{options[found[1]].removeprefix('--')}"
        return options[found[1]] + ("" if value in ("True", "") else f" {value}")

    names = "|".join(map(re.escape, options))
    return re.sub(rf"(?<![\w./-])(?<!--set )({names})=('[^']*'|\"[^\"]*\"|[^\s,;:()]*)", option, text) if names else text


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a function as a verb and turns what the user can mend into one line and exit code 2."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        warnings.showwarning = _show_warning
        try:
            function(*args, **kwargs)
        except MxqError as error:
            _complain(_as_typed(str(error), function), "error", "31")
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in _USER_ERRNO:
                raise
            _complain(f"{error.filename or 'writing'}: {os.strerror(error.errno).lower()}; check the path", "error", "31")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            resumes = function.__name__ in ("quantize", "calibrate", "sense", "compare", "demo")
            _complain("run the same command again to resume" if resumes else "nothing was written", "interrupted", "33")
            raise typer.Exit(130) from None
        finally:
            warnings.showwarning = _other_warnings

    app.command()(run)
    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mxq_ext {__version__}")
        raise typer.Exit


@app.callback()
def _about(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """Mixed-precision quantization of language models.

    model + text -> calibrate -> sense -> plan -> quantize -> eval, generate
    """


def _names(text: str | None) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user set: the defaults of the rest belong to the function that is called."""
    return {name: value for name, value in options.items() if value is not None}


def _formats(text: str | None) -> list[str] | None:
    """``"w4g64, w8"`` -> ``["w4g64", "w8"]``, each a valid name. Raises FormatError, also for no name at all."""
    if text is not None and not _names(text):
        raise FormatError(f"formats {text!r}", "no format is named", "name some with commas between them, for example w2g64_asym,w4g64,w8, or leave it out")
    return None if text is None else [Format.parse(name).name for name in _names(text)]


def _changes(settings: list[str] | None, preset: str | None) -> dict[str, Any] | None:
    """The parts that ``--set`` replaces. Raises PlanError."""
    if not settings:
        return None
    from .plan.presets import parse_changes

    return parse_changes(settings, preset)


def _plain(value: Any) -> Any:
    """JSON for what json does not know: paths, numpy and torch scalars and arrays, objects with ``to_json`` or ``to_dict``."""
    if isinstance(value, Path):
        return str(value)
    for method in ("to_json", "to_dict", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a result holds a {type(value).__name__}, which has no JSON form")


def _cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(v) for v in value)
    return str(value)


def _table(rows: list[dict[str, Any]], title: str) -> None:
    """Prints dicts of one kind as a table with the keys as headings; a number stands on the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        number = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    # A pipe has no width: keep each row on one line there.
    Console(**({} if sys.stdout.isatty() else {"width": 240}), markup=False, highlight=False).print(table)


def _show(result: dict[str, Any], title: str, as_json: bool) -> None:
    """Prints a result: single values as one table, each list of dicts as another, nested dicts under ``outer.inner``."""
    if as_json:
        print(json.dumps(result, default=_plain))
        return
    single: dict[str, Any] = {}
    tables: dict[str, list[dict[str, Any]]] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(f"{prefix}.{name}" if prefix else str(name), inner)
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            tables[prefix] = value
        else:
            single[prefix] = value

    visit("", result)
    for name, rows in tables.items():
        _table(rows, f"{title}: {name}" if single else title)
    if single:
        width = max(map(len, single))
        print("\n".join([title, *(f"  {name:<{width}}  {_cell(value)}" for name, value in single.items())]))


# ------------------------------------------------------------------------------------------------------ shared declarations

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face directory or a GGUF file; nothing is downloaded.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory written by `mxq quantize`.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where the result goes.")]
Text = Annotated[Path | None, typer.Option("--text", help="Plain UTF-8 text to use instead of the built-in one.")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="How many windows of text to use.")]
Length = Annotated[int | None, typer.Option("--length", min=2, help="Tokens in a window.")]
Bits = Annotated[float | None, typer.Option("--bits", help="Budget in stored bits per weight: scales and tables count.")]
Bytes = Annotated[int | None, typer.Option("--bytes", min=1, help="Budget in bytes on disk, instead of --bits.")]
Candidates = Annotated[str | None, typer.Option("--candidates", help="Formats to choose from, for example w2g64_asym,w3g64_asym,w4g64,w8.")]
Metric = Annotated[str | None, typer.Option("--metric", help="How the loss of a format is estimated, for example linear_kl.")]
KV = Annotated[str | None, typer.Option("--kv", help="How keys and values are cached: k4v2g64, a preset such as kivi4, a plan's file, or none.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Also zero-shot accuracy by lm-eval: pairs, cloze, cloze_literary, or tasks of lm-eval's.")]
Context = Annotated[int | None, typer.Option("--context", min=1, help="Tokens of a cache that --bytes covers too: its bits are planned with the weights'.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Sequences in that cache; 1 without it.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="A named choice for every part of the line; `mxq presets` lists them.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="PART=VALUE", help="Replace a part of the preset, for example "
                                                   "allocator=greedy or options.damp=0.02; may be given several times.")]
TimesFile = Annotated[Path | None, typer.Option("--times", help="A table by `mxq bench MODEL --table`: tells what the plan will take.")]
MaxMs = Annotated[float | None, typer.Option("--max-ms-per-token", help="With --times: a limit on the time of a token.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def _one_budget(what: str, **budgets: Any) -> None:
    """Raises BudgetError unless exactly one of the options is set."""
    options = {"nbytes": "--bytes", "uniform": "--format"}
    names = [options.get(name, f"--{name}") for name in budgets]
    found = [name for name, value in zip(names, budgets.values(), strict=True) if value is not None]
    if len(found) != 1:
        raise BudgetError(f"mxq {what}", f"exactly one of {', '.join(names)} is needed, {' and '.join(found) or 'none'} given",
                          "for example --bits 3.5" if not found else f"keep one of {', '.join(found)}")


# -------------------------------------------------------------------------------------------------------------------- verbs


@verb
def quantize(model: Model, out: Out, bits: Bits = None, nbytes: Bytes = None,
             preset: PresetName = None, changes: Changes = None,
             text: Text = None, candidates: Candidates = None, metric: Metric = None,
             method: Annotated[str | None, typer.Option("--method", help="gptq, rtn, hqq, awq or kmeans.")] = None,
             activations: Annotated[str | None, typer.Option("--activations", help="How linears read their input: a16 exactly, a8 as int8, faster.")] = None,
             windows: Windows = None,
             uniform: Annotated[str | None, typer.Option("--format", help="One format for all, instead of a budget: w4g64.")] = None,
             plan: Annotated[Path | None, typer.Option("--plan", help="A plan made by `mxq plan`, instead of a budget.")] = None,
             stats: Annotated[Path | None, typer.Option("--stats", help="A directory written by `mxq calibrate`, instead of calibrating.")] = None,
             kv: KV = None, context: Context = None, batch: Batch = None, times: TimesFile = None, max_ms_per_token: MaxMs = None,
             transform: Annotated[str | None, typer.Option("--transform", help="Change the float model first, function kept: rotate or awq.")] = None,
             reconstruct: Annotated[int | None, typer.Option("--reconstruct", help="Then train each block on its output, for that many steps (0: on the "
                                                                                   "real inputs alone).")] = None,
             distill: Annotated[int | None, typer.Option("--distill", help="Then train scales, tables and norms of the whole model on the float model's "
                                                                           "predictions, for that many steps.")] = None,
             work: Annotated[Path | None, typer.Option("--work", help="Directory of intermediate files; default OUT.work.")] = None,
             overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
             as_json: Json = False) -> None:
    """The whole line: calibrate, sense, plan and quantize MODEL, and write a checkpoint. Resumes what was interrupted."""
    _one_budget("quantize", bits=bits, nbytes=nbytes, uniform=uniform, plan=plan)
    if uniform is not None:
        uniform = Format.parse(uniform).name
    chosen = _formats(candidates)
    from . import verbs

    with Progress() as progress:
        result = verbs.quantize_checkpoint(
            model, out, overwrite=overwrite, progress=progress,
            **_given(bits=bits, nbytes=nbytes, preset=preset, changes=_changes(changes, preset), text=text, candidates=chosen, metric=metric,
                     method=method, activations=activations, windows=windows, uniform=uniform, plan=plan, stats=stats, kv=kv, context=context, batch=batch,
                     work=work, times=times, max_ms_per_token=max_ms_per_token, transform=transform, reconstruct=reconstruct,
                     distill=distill))
    _show(result, f"quantized {model} -> {out}", as_json)


@verb
def calibrate(model: Model, out: Out, text: Text = None, windows: Windows = None, as_json: Json = False) -> None:
    """Run MODEL over text and write what was seen: second moments, channel statistics, gradients."""
    from . import verbs

    with Progress() as progress:
        result = verbs.calibrate_model(model, out, progress=progress, **_given(text_path=text, windows=windows))
    _show(result, f"statistics in {out}", as_json)


@verb
def sense(model: Model, stats: Annotated[Path, typer.Argument(metavar="STATS", help="A directory written by `mxq calibrate`.")],
          out: Out, preset: PresetName = None, candidates: Candidates = None, metric: Metric = None, changes: Changes = None,
          kv: Annotated[str | None, typer.Option("--kv", help="Also measure a cache of the group, window and sink of this spec: k4v4g64_r64.")] = None,
          kv_by_head: Annotated[bool, typer.Option("--kv-by-head", help="Measure each key/value head, so that plans give each bits of its own.")] = False,
          as_json: Json = False) -> None:
    """Estimate what each candidate format costs in each unit, and write the table."""
    chosen = _formats(candidates)
    from . import verbs

    with Progress() as progress:
        result = verbs.sense_model(model, stats, out, progress=progress,
                                   **_given(preset=preset, candidates=chosen, metric=metric, changes=_changes(changes, preset), kv=kv,
                                            kv_by_head=kv_by_head or None))
    _show(result, f"cost table in {out}", as_json)


@verb
def plan(cost: Annotated[Path, typer.Argument(metavar="COST", help="A table written by `mxq sense`.")],
         out: Out, bits: Bits = None, nbytes: Bytes = None, preset: PresetName = None, changes: Changes = None,
         context: Context = None, batch: Batch = None,
         times: TimesFile = None, max_ms_per_token: MaxMs = None,
         front: Annotated[Path | None, typer.Option("--front", help="Also write the whole front of size against loss as CSV.")] = None,
         as_json: Json = False) -> None:
    """Choose a format for each unit: the least loss within a budget, exactly solved."""
    _one_budget("plan", bits=bits, nbytes=nbytes)
    from . import verbs

    result = verbs.plan_from_table(cost, out, **_given(bits=bits, nbytes=nbytes, preset=preset, changes=_changes(changes, preset), times=times,
                                                       max_ms_per_token=max_ms_per_token, context=context, batch=batch, front=front))
    _show(result, f"plan in {out}", as_json)


@verb
def presets(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One preset, with its formula, departures and what it lacks.")] = None,
            as_json: Json = False) -> None:
    """The presets: unit, candidates, metric, allocator and quantizer of each, and the paper that it is from."""
    from . import request
    from .plan.presets import find_preset

    rows = request.describe_presets()
    if name is not None:
        find_preset(name)  # raises
        _show(next(r for r in rows if r["name"] == name), f"preset {name}", as_json)
    elif as_json:
        print(json.dumps(rows, default=_plain))
    else:
        _table([{k: r[k] for k in ("name", "runs", "unit", "metric", "allocator", "quantizer", "candidates", "source")} for r in rows], "presets")


@verb
def eval(checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory written by `mxq quantize`, or a model.")],
         reference: Annotated[Path | None, typer.Option("--reference", help="The float model, for the KL divergence to it.")] = None,
         text: Text = None, windows: Windows = None, length: Length = None, kv: KV = None, tasks: Tasks = None,
         include: Annotated[Path | None, typer.Option("--include", help="A folder of tasks as lm-eval describes them.")] = None,
         task_limit: Annotated[int | None, typer.Option("--task-limit", min=1, help="The first so many documents of each task.")] = None,
         as_json: Json = False) -> None:
    """Perplexity on held-out text, and with --reference the mean KL divergence and the greedy agreement; with --tasks zero-shot accuracy."""
    from . import verbs

    with Progress() as progress:
        result = verbs.evaluate_checkpoint(checkpoint, progress=progress,
                                           **_given(reference=reference, text=text, windows=windows, length=length, kv=kv, tasks=_names(tasks) or None,
                                                    include=include, task_limit=task_limit))
    _show(result, f"evaluation of {checkpoint}", as_json)


@verb
def compare(model: Model, out: Out,
            bits: Annotated[str, typer.Option("--bits", help="Budgets in stored bits per weight.")] = "2.5,3,3.5,4",
            presets: Annotated[str, typer.Option("--presets", help="Names, or all, ours, frameworks, controls.")] = "all",
            also: Annotated[list[str] | None, typer.Option("--also", metavar="\"NAME PART=VALUE\"", help="A preset with parts replaced, for example "
                                                          "\"mxq reconstruct=50\"; may be given several times.")] = None,
            text: Text = None, windows: Windows = None,
            held_out: Annotated[list[Path] | None, typer.Option("--held-out", help="Plain UTF-8 text to measure on, instead of the built-in ones; may be given "
                                                                "several times.")] = None,
            eval_windows: Annotated[int | None, typer.Option("--eval-windows", min=1, help="How many windows of each held-out text; 12 without it.")] = None,
            length: Length = None,
            llama_cpp: Annotated[str | None, typer.Option("--llama-cpp", metavar="TYPES", help="Also llama.cpp's files of these types, for example "
                                                          "Q4_K_M,Q3_K_M, or all; needs llama-cpp-python and gguf.")] = None,
            tasks: Tasks = None,
            untimed: Annotated[bool, typer.Option("--untimed", help="Do not measure tokens per second (another run of the command does).")] = False,
            as_json: Json = False) -> None:
    """Every preset at every budget, on one model and text: quality, bytes and speed in one table. Goes on where it was stopped."""
    try:
        budgets = [float(b) for b in bits.split(",") if b.strip()]
    except ValueError:
        raise BudgetError(f"--bits {bits}", "numbers with commas between them are expected", "for example --bits 2.5,3,3.5,4") from None
    from . import compare as module

    with Progress() as progress:
        result = module.compare(model, out, bits=budgets, presets=_names(presets), timed=not untimed, llama_cpp=_names(llama_cpp), tasks=_names(tasks),
                                progress=progress,
                                **_given(also=also, text=text, windows=windows, held_out=held_out, eval_windows=eval_windows, length=length))
    if as_json:
        _show(result, "", True)
    else:
        print((out / "compare.md").read_text(encoding="utf-8"))


@verb
def generate(checkpoint: Checkpoint, prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A message, or the text to continue.")],
             max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How many tokens to write at most.")] = 64,
             chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Put PROMPT into the model's chat template and print the answer, or continue "
                                                       "PROMPT; without either, as the model has a template or not.")] = None,
             temperature: Annotated[float | None, typer.Option("--temperature", help="Draw tokens instead of taking the most probable: 1 as the model says, "
                                                               "less is closer to it.")] = None,
             top_p: Annotated[float | None, typer.Option("--top-p", help="Draw from the most probable tokens that make up this share.")] = None,
             seed: Annotated[int | None, typer.Option("--seed", help="Of the drawing; 0 without it.")] = None,
             kv: KV = None, as_json: Json = False) -> None:
    """Answer or continue PROMPT; on a terminal, as it is written."""
    from . import verbs

    shown = not as_json and sys.stdout.isatty()
    result = verbs.generate_text(checkpoint, prompt, max_new_tokens=max_new_tokens,
                                 **_given(chat=chat, temperature=temperature, top_p=top_p, seed=seed, kv=kv,
                                          show=functools.partial(print, end="", flush=True) if shown else None))
    if as_json:
        _show(result, "", True)
    else:
        print("" if shown else result["text"])


@verb
def inspect(path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory written by `mxq quantize`, or a plan.json.")],
            as_json: Json = False) -> None:
    """What is stored for each unit: format, stored bits, estimated loss; and the bit map of the model."""
    if path.suffix == ".json":
        from .plan import Plan

        plan = Plan.load(path)
        result: dict[str, Any] = {"plan": plan.to_json(), "formats": plan.counts()}
        loss = plan.meta.get("unit_loss", {})
        rows = [{"unit": name, "format": entry, "loss": loss.get(name)}
                for name, entry in {"(default)": plan.default or "keep", **plan.units}.items()]
        summary, picture = {"quantizer": plan.quantizer, "meta": {k: v for k, v in plan.meta.items() if k != "unit_loss"}}, ""
    else:
        from . import checkpoint
        from .report import bit_map_entries, bit_map_text

        result = checkpoint.inspect(path)
        loss = (result["plan"] or {}).get("meta", {}).get("unit_loss", {})
        rows = [{"unit": u["name"], "format": u["format"], "stored_bits": u["stored_bits"], "bytes": u["bytes"], "loss": loss.get(u["name"]),
                 "output_error": u["info"].get("output_error")} for u in result["units"]]
        picture = bit_map_text(bit_map_entries(result))
        summary = {"totals": result["totals"], "source": result["model"]["source"], "producer": result["producer"]}
    if as_json:
        _show(result, "", True)
        return
    _table(rows, str(path))
    if picture:
        print(f"\n{picture}\n")
    _show(summary, str(path), False)


@verb
def bench(checkpoint: Annotated[Path | None, typer.Argument(metavar="CHECKPOINT", help="A checkpoint or model; else layers.")] = None,
          formats: Annotated[str | None, typer.Option("--formats", help="Of the single layers, for example w4g64,nf4g64.")] = None,
          size: Annotated[int, typer.Option("--size", min=1, help="Of the single layers: SIZE x SIZE.")] = 4096,
          rows: Annotated[int, typer.Option("--rows", min=1, help="Of their input: 1 as in decoding, hundreds as in prefill.")] = 1,
          table: Annotated[Path | None, typer.Option("--table", help="Time every shape of the float model CHECKPOINT in every format, for `mxq plan --times`, "
                                                     "and write that here.")] = None,
          as_json: Json = False) -> None:
    """Tokens per second of CHECKPOINT; without one, a linear layer in each format against torch's float32."""
    chosen = _formats(formats)
    if table is not None:
        if checkpoint is None:
            raise PlanError(f"mxq bench --table {table}", "the model whose shapes are to be timed is missing", "write mxq bench MODEL --table FILE")
        from . import verbs
        from .bench import time_table
        from .fileio import check_file

        check_file(table)

        with Progress() as progress:
            times = time_table(verbs.load(checkpoint)[0], progress=progress, **_given(formats=chosen))
        times.save(table)
        result = {"out": str(table), "entries": len(times.us), "rest_ms": {f"{m} rows": t / 1e3 for m, t in times.rest.items()}, **times.meta}
    elif checkpoint is None:
        from .bench import linear_speed

        result = linear_speed(n=size, k=size, rows=rows, **_given(formats=chosen))
    else:
        from . import evaluate, verbs

        result = {"model": str(checkpoint), **evaluate.speed(verbs.load(checkpoint)[0])}
    _show(result, "bench", as_json)


@verb
def doctor(as_json: Json = False) -> None:
    """What is built, what is found, and what to do."""
    from . import doctor as module

    report = module.examine()
    if as_json:
        _show(report, "doctor", True)
    else:
        print("\n".join(module.lines(report)))


@verb
def demo(out: Annotated[Path, typer.Option("-o", "--out", help="Where checkpoints, tables and pictures go.")] = Path("mxq-demo"),
         quick: Annotated[bool, typer.Option("--quick", help="Fewer plans and less text: a few minutes.")] = False,
         as_json: Json = False) -> None:
    """Quantize a real model by mixed precision, compare it with uniform formats, and show where it lies."""
    from . import demo as module

    # The demo prints its tables as it goes; with --json they are progress.
    with Progress() as progress, contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = module.run_demo(out, quick, progress)
    if as_json:
        _show(result, "demo", True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the script ``mxq``; always ends in SystemExit."""
    app(arguments, prog_name="mxq")

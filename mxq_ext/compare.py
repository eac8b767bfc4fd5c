"""``mxq compare``: presets on one model with the same text, seed and stored bytes, in one table.

    out/compare.json, compare.md       every row; of each budget the best plan against the best uniform one; the bits at which quality begins to fall
    out/pareto-<text>.svg and .csv     KL against stored bits
    out/checkpoints/<row>/             what was measured: each loads with ``mxq.load``
    out/gguf/                          llama.cpp's quants of the same model, where asked for
    out/work/                          calibration and quantized weights, which rows share

A row is written down as soon as it is measured, so that a run may be stopped and go on. What is evaluated is the checkpoint as it is read back from disk.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__, checkpoint, llamacpp, pipeline, verbs
from . import text as texts
from .errors import BudgetError, CheckpointError, MxqError, PlanError, QuantizationError
from .evaluate import Reference, evaluate, speed
from .fileio import check_own, read_json, write_json, write_text
from .plan.frameworks import CONTROLS, FRAMEWORKS
from .plan.language import Preset
from .plan.presets import PRESETS, find_preset, parse_changes
from .plan.rules import METHODS
from .progress import SILENT, Progress
from .report import need_matplotlib, pareto_svg
from .request import missing_parts
from .sensitivity.metrics import METRICS
from .structure import find_units
from .tasks import need_lm_eval, run_tasks
from .testing.timing import machine
from .trials import own_code, own_quantizer, short_hash
from .verdicts import FLOAT, LLAMA_CPP, bits_at, bits_table, measured, rivals, rivals_table, rows_table, verdicts, verdicts_table

GROUPS = {"all": tuple(PRESETS), "frameworks": tuple(FRAMEWORKS), "controls": tuple(CONTROLS),
          "ours": tuple(n for n in PRESETS if n not in FRAMEWORKS and n not in CONTROLS)}
KINDS = ("technical", "literary")  #: held-out texts, unless others are named
CHECKED = 64  #: tokens whose logits must be the same to the bit after the checkpoint is read back


@dataclass(frozen=True)
class Contender:
    """A preset, perhaps with parts replaced. ``label``: its name, and the replaced parts as they were written."""

    label: str
    preset: str
    settings: tuple[str, ...] = ()

    def name(self, bits: float) -> str:
        """Of its row at a budget."""
        return f"{self.label} {bits:g}"

    def resolve(self) -> Preset:
        """The preset with its parts replaced. Raises PlanError for an unknown name or part."""
        return find_preset(self.preset, **parse_changes(self.settings, self.preset))

    @property
    def candidates(self) -> list[str]:
        return list(self.resolve().candidates)

    @property
    def parts(self) -> str:
        """What the preset is made of, and the code of what is not of this package: short, and another one where a row would be another one."""
        p = self.resolve()
        told = {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name not in ("about", "source", "formula", "departures", "missing")}
        own = [part for part in (METRICS.get(p.metric), METHODS.get(p.allocator)) if part]
        return short_hash(told | {"own": own_code(*own) + own_quantizer(p.method)})

    @property
    def family(self) -> str:
        """``controls`` for uniform formats alone, ``frameworks`` for the literature's, ``ours`` for the rest; also for those with other parts than their own,
        limits of the solver excepted."""
        own = all(s.startswith("solver.") for s in self.settings)
        return next((g for g in ("controls", "frameworks") if own and self.preset in GROUPS[g]), "ours")


def contenders(presets: Sequence[str], also: Sequence[str] = ()) -> list[Contender]:
    """``presets`` are names, or groups of them (all, ours, frameworks, controls); an entry of ``also`` is a name and settings between blanks, for example
    ``"mxq reconstruct=50"``. Raises PlanError for an unknown name or part."""
    names = list(dict.fromkeys(n for p in presets for n in GROUPS.get(p, (p,))))
    out = [Contender(n, n) for n in names]
    for entry in also:
        name, *settings = entry.split() or [""]
        out.append(Contender(" ".join([name, *settings]), name, tuple(settings)))
    for c in out:
        c.resolve()
    if not out:
        raise PlanError("a comparison of no presets", "at least one is needed", f"name some of {', '.join([*GROUPS, *PRESETS])}")
    return out


class Comparison:
    """One directory of rows; ``run`` measures what is missing."""

    def __init__(self, model_path: str | os.PathLike, out: str | os.PathLike, *, text: str | os.PathLike | None = None, windows: int = pipeline.WINDOWS,
                 held_out: Sequence[str | os.PathLike] = (), eval_windows: int = 12, length: int = pipeline.LENGTH, progress: Progress = SILENT):
        if checkpoint.is_checkpoint(model_path):
            raise PlanError(f"comparing plans for {model_path}", "it is quantized already", "pass the float model")
        check_own(out, ("compare.json",), "a comparison")
        self.path, self.out, self.text, self.windows, self.progress = str(model_path), Path(out), text, windows, progress
        self.read = None if text is None else texts.read_text(text)
        self.model, self.tokenizer = verbs.load(model_path)
        pipeline.need_tokenizer(self.tokenizer, model_path)
        found = {Path(f).stem: texts.read_text(f) for f in held_out} if held_out else {k: texts.heldout_text(k) for k in KINDS}
        if len(found) < len(held_out):
            raise MxqError(f"held-out texts {', '.join(map(str, held_out))}", "rows are named by the files' names, two of which are the same", "rename one")
        texts.check_positions(self.model, length, "windows")
        self.tokens = {k: texts.spread(texts.windows(self.tokenizer, t, length), eval_windows) for k, t in found.items()}
        calibration = "built-in, and written by the model" if self.read is None else texts.text_hash(self.read)
        setup = {"model": self.model.mxq_source["sha256"], "calibration": calibration, "calibration_windows": windows,
                 "held_out": {k: {"sha256": texts.text_hash(t), "windows": len(self.tokens[k]), "length": length} for k, t in found.items()}}
        self.file = self.out / "compare.json"
        self.record = read_json(self.file) if self.file.exists() else {"rows": []}
        if self.record.get("setup", setup) != setup:
            changed = ", ".join(k for k in setup if self.record["setup"].get(k) != setup[k])
            raise CheckpointError(f"comparison in {self.out}", f"it is of another setup (other {changed})", "name another directory, or remove this one")
        self.record |= {"setup": setup, "source": self.model.mxq_source | {"path": Path(self.path).name}}
        self.references = {k: Reference.of(self.model, t, progress) for k, t in self.tokens.items()}

    def row(self, name: str) -> dict | None:
        return next((r for r in self.record["rows"] if r["name"] == name), None)

    def keep(self, row: dict) -> None:
        """Puts a row in the place of an older one of its name, or behind the others, and writes the file."""
        rows = self.record["rows"]
        old = next((i for i, r in enumerate(rows) if r["name"] == row["name"]), len(rows))
        rows[old:old + 1] = [row]
        self.record["machine"] = machine()
        write_json(self.file, self.record)

    def run(self, bits: Sequence[float], chosen: Sequence[Contender], *, llama_cpp: Sequence[str] = (), tasks: Sequence[str] = (),
            timed: bool = True) -> dict:
        """Measures every pair of budget and contender that has no row, llama.cpp's types, then tasks and time of what has none; returns what ``compare.json``
        holds."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.row(FLOAT) is None:
            total = sum(p.numel() for p in self.model.parameters())
            self.keep({"name": FLOAT, "family": "float", "stored_bits": 32.0, "linear_bits": 32.0, "checkpoint_bytes": 4 * total, **self.quality(self.model)})
        missing = [(b, c) for b in bits for c in chosen if self.is_missing(self.row(c.name(b)), c)]
        self.calibrate([c for _, c in missing])
        for budget, contender in missing:
            row = {"name": contender.name(budget), "preset": contender.label, "family": contender.family, "bits": budget, "version": __version__,
                   "candidates": contender.candidates, "parts": contender.parts, "command": self.command(contender, budget)}
            self.add(row, lambda c=contender, b=budget: self.measure(c, b), BudgetError, PlanError)
        self.measure_llama_cpp(llama_cpp)
        self.measure_tasks(tasks)
        if timed:
            self.time()
        rows, kinds = self.record["rows"], list(self.tokens)
        self.record |= {"verdicts": verdicts(rows, kinds), "rivals": rivals(rows, kinds), "bits_at": bits_at(rows, kinds)}
        write_json(self.file, self.record)
        self.show()
        return self.record

    @staticmethod
    def is_missing(row: dict | None, contender: Contender) -> bool:
        """Whether a row is to be measured: there is none; it was refused, which another version may not; its preset has had other candidates, or parts (of
        which rows of earlier versions do not tell)."""
        return row is None or "refused" in row or row.get("candidates") != contender.candidates or row.get("parts", contender.parts) != contender.parts

    def add(self, row: dict, measure: Callable[[], dict], *refusals: type[MxqError]) -> None:
        """Completes a row and keeps it; one of ``refusals`` makes a row that says why there is no such plan or file."""
        try:
            row |= measure()
            cells = "  ".join(f"{k}: ppl {row[k]['perplexity']:.2f} KL {row[k]['kl']:.4f}" for k in self.tokens)
            note = f"{row['stored_bits']:.3f} bits  {cells}  {row['minutes']:.1f} min"
        except refusals as error:
            row["refused"] = note = str(error)
        self.keep(row)
        self.progress.note(f"{row['name']}: {note}")

    def calibrate(self, chosen: Sequence[Contender]) -> None:
        """Once for all that read statistics of the model as it is: each by itself would walk through it again for its own kinds."""
        presets = [c.resolve() for c in chosen]
        reading = [p for p in presets if p.transform != "rotate" and not missing_parts(p) and pipeline.reads_text(p, planned=p.allocator == "uniform")]
        if reading:
            kinds = frozenset().union(*map(pipeline.kinds_for, reading))
            pipeline.calibrate_kinds(self.model, self.calibration_tokens(), kinds, self.out / "work", self.progress)

    def calibration_tokens(self) -> torch.Tensor:
        return pipeline.calibration_tokens(self.model, self.tokenizer, self.out / "work", text=self.read, windows=self.windows, progress=self.progress)

    def command(self, contender: Contender, bits: float) -> str:
        """The command that measures one row again."""
        what = f"--presets {contender.preset}" if not contender.settings else f'--also "{contender.label}"'
        return f"mxq compare {Path(self.path).name} -o {self.out.name} --bits {bits:g} {what}"

    def quality(self, model) -> dict:
        return {k: evaluate(model, self.references[k], t, progress=self.progress).to_dict() for k, t in self.tokens.items()}

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / name.replace(" ", "-").replace("/", "-")

    def measure(self, contender: Contender, bits: float) -> dict:
        """Quantizes, saves, reads back, checks that this changes no bit, and evaluates what was read."""
        start, target = time.monotonic(), self.checkpoint(contender.name(bits))
        # A control is the largest uniform format that fits, however much smaller: the row says its bits.
        free = {"solver": ()} if contender.family == "controls" else {}
        result = pipeline.quantize_model(copy.deepcopy(self.model), self.tokenizer, bits=bits, text=self.text, windows=self.windows, preset=contender.preset,
                                         changes=free | parse_changes(contender.settings, contender.preset), work=self.out / "work", progress=self.progress)
        minutes = (time.monotonic() - start) / 60
        verbs.save_counted(result.model, target, self.tokenizer, result.plan, result.nbytes, overwrite=True)
        again, probe = checkpoint.load(target), next(iter(self.tokens.values()))[:1, :CHECKED]
        with torch.inference_mode():  # without a cache, so that both run module by module
            if not torch.equal(result.model(probe, use_cache=False).logits, again(probe, use_cache=False).logits):
                raise CheckpointError(f"checkpoint {target}", "its logits are not those of the model that was saved", "report this as a bug")
        units = find_units(again)
        inner = [u for u in units if u.layer >= 0]
        sizes = result.plan.predicted_bytes(units, 4)["units"]
        return {"stored_bits": result.stored_bits, "bytes": result.nbytes, "checkpoint_bytes": checkpoint.bytes_on_disk(target)["total"],
                "linear_bits": 8 * sum(sizes[u.name] for u in inner) / sum(u.numel for u in inner), "formats": result.plan.counts(units),
                "minutes": minutes, **self.quality(again)}

    def measure_llama_cpp(self, types: Sequence[str]) -> None:
        """A row for each type that has none, plain and with an importance matrix from the calibration text."""
        names = [(t, matrix, f"{LLAMA_CPP} {t}{' imatrix' if matrix else ''}") for t in types for matrix in (False, True)]
        wanted = [n for n in names if self.row(n[2]) is None]
        if not wanted:
            return
        (self.out / "gguf").mkdir(exist_ok=True)
        source = self.out / "gguf" / "float32.gguf"
        llamacpp.write_gguf(self.model, source)  # first, for it may refuse the model
        try:
            stats = pipeline.calibrate_kinds(self.model, self.calibration_tokens(), frozenset(("none",)), self.out / "work", self.progress)
            found = llamacpp.importance(self.model, stats)
            for kind, matrix, name in wanted:
                row = {"name": name, "preset": LLAMA_CPP + (" imatrix" if matrix else ""), "family": LLAMA_CPP,
                       "command": f"mxq compare {Path(self.path).name} -o {self.out.name} --llama-cpp {kind}"}
                target = self.out / "gguf" / f"{name.partition(' ')[2].replace(' ', '-')}.gguf"
                self.add(row, lambda t=target, k=kind, m=matrix: self.measure_gguf(source, t, k, found if m else None), QuantizationError)
        finally:
            source.unlink()

    def measure_gguf(self, source: Path, target: Path, kind: str, matrix: Mapping | None) -> dict:
        """Makes one of llama.cpp's files and evaluates it."""
        start = time.monotonic()
        llamacpp.quantize_gguf(source, target, kind, matrix)
        return {"minutes": (time.monotonic() - start) / 60, **llamacpp.sizes(target),
                **{k: llamacpp.evaluate_gguf(target, self.references[k], t, self.progress).to_dict() for k, t in self.tokens.items()}}

    def unfinished(self, missing: Callable[[dict], bool]) -> Iterator[tuple[dict, torch.nn.Module]]:
        """Each row that has a checkpoint, or is the float model's, and of which ``missing`` is true; and its model."""
        for row in list(self.record["rows"]):
            at = self.checkpoint(row["name"])
            if row["name"] == FLOAT or row["family"] != LLAMA_CPP and checkpoint.is_checkpoint(at):
                if missing(row):
                    yield row, self.model if row["name"] == FLOAT else checkpoint.load(at)

    def measure_tasks(self, tasks: Sequence[str]) -> None:
        """Accuracy on each task that a row does not have yet; of llama.cpp's files there is none."""
        for row, model in self.unfinished(lambda row: not set(tasks) <= set(row.get("tasks", ()))):
            left = [t for t in tasks if t not in row.get("tasks", ())]
            found = row.get("tasks", {}) | run_tasks(model, self.tokenizer, left)
            self.keep(row | {"tasks": found})
            self.progress.note(f"{row['name']}: " + "  ".join(f"{k} {v['acc']:.3f}" for k, v in found.items() if "acc" in v))

    def time(self) -> None:
        """Tokens per second of every row that has a checkpoint and no time yet."""
        for row, model in self.unfinished(lambda row: "decode_tokens_per_s" not in row):
            found = speed(model)
            self.keep(row | {k: found[k] for k in ("decode_tokens_per_s", "prefill_tokens_per_s", "threads")})
            self.progress.note(f"{row['name']}: {found['decode_tokens_per_s']:.1f} tokens/s")

    def show(self) -> None:
        """Writes the Markdown page and the pictures."""
        kinds, found = list(self.tokens), measured(self.record["rows"])
        read = "; ".join(f"{k}: {v['windows']} windows of {v['length']} tokens" for k, v in self.record["setup"]["held_out"].items())
        none = [] if found else ["No plan fits these budgets; what was refused says how many bits are needed."]
        parts = [f"# Presets on {Path(self.path).name}", *none, rows_table(self.record["rows"], kinds),
                 "The best plan within each budget against the best uniform one of no more bytes (difference per token in nats, standard error over windows):",
                 verdicts_table(self.record["verdicts"]),
                 *(["llama.cpp's files, and the best of ours that is no larger:", rivals_table(self.record["rivals"])] if self.record["rivals"] else []),
                 "Stored bits of the decoder's linears at which perplexity has risen:", bits_table(self.record["bits_at"]),
                 f"{read}. Minutes are those of the row alone: statistics, and weights that an earlier row has quantized, are shared."]
        write_text(self.out / "compare.md", "\n\n".join(parts) + "\n")
        for kind in kinds if found else ():
            points = [{"series": r["preset"], "stored_bits": r["stored_bits"], "value": r[kind]["kl"]} for r in found]
            pareto_svg(sorted(points, key=lambda p: p["series"]), self.out / f"pareto-{kind}.svg", ylabel="KL to the float model, nats per token", title=kind)


def compare(model_path: str | os.PathLike, out: str | os.PathLike, *, bits: Sequence[float], presets: Sequence[str] = ("all",), also: Sequence[str] = (),
            llama_cpp: Sequence[str] = (), tasks: Sequence[str] = (), timed: bool = True, progress: Progress = SILENT, **setup) -> dict:
    """Runs every preset at every budget; ``setup`` as :class:`Comparison` takes it. Returns what ``out/compare.json`` holds.

    Args:
        bits: budgets in stored bits per weight, scales and tables counted.
        presets, also: see :func:`contenders`.
        llama_cpp: types of llama.cpp to make and measure beside ours, ``("all",)`` for those of ``llamacpp.TYPES``.
        tasks: also the accuracy of each checkpoint on these, see ``tasks.run_tasks``.
        timed: also measure tokens per second of each checkpoint, at the end; wants a machine with nothing else to do.

    Raises PlanError and BudgetError for names and budgets that make no sense, CheckpointError if ``out`` holds a comparison of another setup, or something
    else. A preset that cannot meet a budget makes a row that says so.
    """
    chosen = contenders(presets, also)
    if not bits or not all(math.isfinite(b) and b > 0 for b in bits):
        raise BudgetError(f"budgets of {', '.join(map(str, bits)) or 'nothing'} bits", "they must be numbers above 0", "for example --bits 2.5,3,3.5,4")
    types = [t for asked in llama_cpp for t in (llamacpp.TYPES if asked == "all" else (asked,))]
    need_matplotlib(f"a comparison in {out}")
    if types:
        for package in ("gguf", "llama_cpp"):
            llamacpp.need(package)
    if tasks:
        need_lm_eval(f"tasks {', '.join(tasks)} of a comparison")
    return Comparison(model_path, out, progress=progress, **setup).run(list(dict.fromkeys(bits)), chosen, llama_cpp=types, tasks=tasks, timed=timed)

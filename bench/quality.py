"""Quality per byte on the demo's model: what each choice along the line brings, others equal.

    python bench/quality.py -o bench/results/quality.json [--work DIR] [--windows 8]

Four tables, decoder linears only (embedding and head stay float), in perplexity and KL to the float model on both held-out texts:

- weighting: GPTQ at 3 and 4 bits, group 64, under the plain, the attention-weighted and the gradient-weighted second moments, and RTN;
- metric: mixed plans at the bytes of uniform w3g64_asym, chosen by each metric from the same quantized weights;
- mixed (gradient-weighted second moments): plans at 3.0 code bits (the bytes of w3g64_asym), 3.5 and 4.0 stored bits against the best
  uniform plan within the same budget;
- domain: the same at 3 and 4 bits when half of the calibration text is of the literary text's kind (other books) instead of the model's own.

Differences are paired by window. Calibration and quantized weights are kept in DIR, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext import text as texts  # noqa: E402
from mxq_ext.evaluate import Reference, evaluate, paired  # noqa: E402
from mxq_ext.fileio import write_json  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.pipeline import LENGTH, calibration_tokens, quantize_by_plan  # noqa: E402
from mxq_ext.plan import Plan, solve  # noqa: E402
from mxq_ext.plan.allocate import budget_bytes  # noqa: E402
from mxq_ext.plan.presets import find_preset  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402
from mxq_ext.report import markdown_table  # noqa: E402
from mxq_ext.sensitivity import CostTable, sense  # noqa: E402
from mxq_ext.stats import calibrate  # noqa: E402
from mxq_ext.structure import find_units  # noqa: E402
from mxq_ext.testing.timing import machine  # noqa: E402
from mxq_ext.trials import Trials  # noqa: E402

KEEP = ("model.embed_tokens",)
UNIFORM = ("w2g64_asym", "w3g64_asym", "w4g64_asym")
CANDIDATES = (*UNIFORM, "w8g128_asym")
KINDS = ("technical", "literary")


class Bench:
    """The model, its statistics, the held-out windows, and the rows measured so far."""

    def __init__(self, work: Path, windows: int, calibration: int, progress: Progress):
        self.work, self.progress = work, progress
        self.model, self.tokenizer = load_model(demo_model_path())
        permute_model(self.model)
        tokenizer = self.tokenizer
        self.tokens = calibration_tokens(self.model, tokenizer, work, windows=calibration, progress=progress)
        self.stats = calibrate(self.model, self.tokens, work / "stats", fisher=False, progress=progress)
        self.held = {k: texts.spread(texts.windows(tokenizer, texts.heldout_text(k), LENGTH), windows) for k in KINDS}
        self.reference = {k: Reference.of(self.model, t) for k, t in self.held.items()}
        self.float = {k: evaluate(self.model, self.reference[k], t) for k, t in self.held.items()}
        self.units = [u for u in find_units(self.model) if u.name not in KEEP]
        self.rows: list[dict] = []

    def in_domain(self) -> Bench:
        """The same with half of the calibration windows from the literary text's kind."""
        other = copy.copy(self)
        other.work, half = self.work / "domain", self.tokens.shape[0] // 2
        pieces = [texts.spread(texts.windows(self.tokenizer, t, LENGTH), half) for t in (texts.calibration_text(), texts.literary_calibration_text())]
        other.tokens = torch.cat(pieces)
        other.stats = calibrate(self.model, other.tokens, other.work / "stats", weightings=("gradient",), fisher=False, progress=self.progress)
        return other

    def trials(self, **changes) -> Trials:
        return Trials(self.work / "trials", self.model, self.stats, find_preset("gradient", **changes))

    def table(self, metric: str, trials: Trials) -> CostTable:
        path = self.work / f"cost-{metric}-{trials.key}.json"
        if not path.exists():
            sense(self.model, self.tokens, self.stats, CANDIDATES, metric=metric, trial=trials, units=self.units, progress=self.progress).save(path)
        return CostTable.load(path)

    def measure(self, part: str, name: str, plan: Plan, trials: Trials) -> dict:
        """Evaluates one plan with dequantized weights in the float model, and keeps the row."""
        swapped = copy.deepcopy(self.model)
        nbytes = 0
        for unit, q in quantize_by_plan(self.model, plan, trials).items():
            swapped.get_submodule(unit).weight.data.copy_(q.dequantize())
            nbytes += q.nbytes()
        quality = {k: evaluate(swapped, self.reference[k], t) for k, t in self.held.items()}
        row = {"part": part, "name": name, "bytes": nbytes, "stored_bits": 8 * nbytes / sum(u.numel for u in self.units), "quality": quality}
        self.rows.append(row)
        cells = "  ".join(f"{k}: ppl {e.perplexity:.2f} ({e.perplexity / self.float[k].perplexity - 1:+.1%}) KL {e.kl:.4f}" for k, e in quality.items())
        self.progress.note(f"{part:10} {name:34} {row['stored_bits']:.3f} bits  {cells}")
        return row

    def uniform(self, part: str, name: str, fmt: str, **changes) -> dict:
        return self.measure(part, name, Plan.uniform(fmt, keep=KEEP), self.trials(**changes))


def mixed_plan(table: CostTable, **budget) -> Plan:
    plan = solve(table, **budget)
    return Plan(units=plan.units, default=None, quantizer=plan.quantizer, meta=plan.meta)


def run(bench: Bench, parts: list[str]) -> list[dict]:
    """All rows, and the paired differences of the mixed plans."""
    trials = bench.trials()
    uniform = {f: bench.uniform("mixed", f"uniform {f}", f) for f in UNIFORM}
    comparisons = []
    table = bench.table("fisher", trials)
    for name, budget in (("3.0 code bits", {"nbytes": uniform["w3g64_asym"]["bytes"]}), ("3.5 stored bits", {"bits": 3.5}), ("4.0 stored bits", {"bits": 4.0})):
        row = bench.measure("mixed", f"mixed, {name}", mixed_plan(table, **budget), trials)
        limit = budget_bytes(table, **budget)
        for kind in KINDS:
            rival = min((r for r in uniform.values() if r["bytes"] <= limit), key=lambda r: r["quality"][kind].kl)
            comparisons.append({"mixed": row["name"], "uniform": rival["name"], "text": kind, **paired(row["quality"][kind], rival["quality"][kind])})
    if "domain" in parts:
        other = bench.in_domain()
        rival = {f: other.uniform("domain", f"uniform {f}", f) for f in UNIFORM[1:]}["w3g64_asym"]
        row = other.measure("domain", "mixed, 3.0 code bits", mixed_plan(other.table("fisher", other.trials()), nbytes=rival["bytes"]), other.trials())
        comparisons += [{"mixed": "domain: mixed, 3.0 code bits", "uniform": rival["name"], "text": k, **paired(row["quality"][k], rival["quality"][k])}
                        for k in KINDS]
    if "weighting" in parts:
        for fmt in ("w3g64_asym", "w4g64_asym"):
            bench.uniform("weighting", f"{fmt} rtn", fmt, method="rtn")
            for weighting in ("none", "attention"):
                bench.uniform("weighting", f"{fmt} gptq, {weighting}", fmt, weighting=weighting)
    if "metric" in parts:
        for metric in ("output", "obq", "linear_kl", "anchored_kl"):
            plan = mixed_plan(bench.table(metric, trials), nbytes=uniform["w3g64_asym"]["bytes"])
            bench.measure("metric", f"mixed, 3.0 code bits, {metric}", plan, trials)
    return comparisons


def _cells(quality: dict) -> list[str]:
    return [text for k in KINDS for text in (f"{quality[k].perplexity:.2f}", f"{quality[k].kl:.4f}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--work", default="mxq-quality", help="calibration and quantized weights; kept")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of each text")
    parser.add_argument("--calibration", type=int, default=32, help="calibration windows")
    parser.add_argument("--parts", default="mixed,domain,weighting,metric")
    options = parser.parse_args()
    with Progress() as progress:
        bench = Bench(Path(options.work), options.windows, options.calibration, progress)
        comparisons = run(bench, options.parts.split(","))
    rows = [r | {"quality": {k: e.to_dict() for k, e in r["quality"].items()}} for r in bench.rows]
    source = bench.model.mxq_source | {"path": demo_model_path().name, "permuted": True}
    write_json(options.out, {"machine": machine(), "model": source, "texts": texts.describe(),
                             "float": {k: e.to_dict() for k, e in bench.float.items()}, "rows": rows, "comparisons": comparisons})
    header = ["part", "plan", "stored bits", *(f"{what} {k}" for k in KINDS for what in ("ppl", "KL"))]
    print(markdown_table(header, [[r["part"], r["name"], f"{r['stored_bits']:.3f}", *_cells(r["quality"])] for r in bench.rows]))
    for c in comparisons:
        print(f"{c['mixed']} against {c['uniform']} ({c['text']}): nll {c['nll']:+.4f} +- {c['nll_se']:.4f}, KL {c['kl']:+.4f} +- {c['kl_se']:.4f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

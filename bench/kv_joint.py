"""One byte budget for weights and cache against splits by hand, on the demo's model at a context of 4096 tokens.

    python bench/kv_joint.py -o bench/results/kv-joint.json [--work DIR] [--preset rtn] [--windows 1]

A split by hand is one format for all weights and one pair of bits for all keys and values. Its bytes are a budget, for which ``solve_joint`` mixes
formats and bits; its rivals are all splits within the budget. Of those the ``--rivals`` with the least loss by the same cost table are
measured, the split that gave the budget among them: KL to the float model on held-out windows of the whole context, which are read through the cache.
Weights are dequantized, so that only their rounding differs. Rows that the file has already are kept.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext import text as texts  # noqa: E402
from mxq_ext.errors import MxqError  # noqa: E402
from mxq_ext.evaluate import Reference, evaluate  # noqa: E402
from mxq_ext.fileio import read_json, write_json  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.kv.attention import replace_attention  # noqa: E402
from mxq_ext.kv_planning import make_kv_table  # noqa: E402
from mxq_ext.pipeline import calibrate_for, calibration_tokens, kv_counts, kv_tokens, make_table, quantize_by_plan  # noqa: E402
from mxq_ext.plan import KVPlan, KVSpec, Plan, solve_joint  # noqa: E402
from mxq_ext.plan.presets import find_preset  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402
from mxq_ext.sensitivity import CostTable, KVTable  # noqa: E402
from mxq_ext.structure import find_units  # noqa: E402
from mxq_ext.testing.timing import machine  # noqa: E402
from mxq_ext.trials import Trials  # noqa: E402

KINDS = ("technical", "literary")
PAIRS = ((2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4), (8, 4), (8, 8), (16, 16))
#: Splits by hand whose bytes are the budgets.
BUDGETS = (("w4g64_asym", (4, 4)), ("w4g64_asym", (2, 2)))


class Split:
    """A format for all weights and a pair of bits for the whole cache, with what the table says of it."""

    def __init__(self, table: CostTable, fmt: str, pair: tuple[int, int], context: int):
        key, value = (table.kv.bits.index(b) for b in pair)
        sizes = table.kv.nbytes(context)
        self.fmt, self.pair, self.name = fmt, pair, f"{fmt} + k{pair[0]}v{pair[1]}"
        weight_loss, self.weights = table.uniform(fmt)
        self.cache = int(sizes[::2, key].sum() + sizes[1::2, value].sum())
        self.loss = weight_loss + float(table.kv.loss[::2, key].sum() + table.kv.loss[1::2, value].sum())
        self.nbytes = self.weights + self.cache

    def plan(self, settings: dict, quantizer: dict) -> Plan:
        return Plan(default=self.fmt, quantizer=quantizer, kv=KVPlan(KVSpec(*self.pair, **settings)))


class Bench:
    """The model, its tables, the held-out windows and the file of rows."""

    def __init__(self, out: Path, work: Path, preset: str, context: int, windows: int, calibration: int, progress: Progress):
        self.out, self.context, self.progress, self.preset = out, context, progress, find_preset(preset)
        self.model, tokenizer = load_model(demo_model_path())
        permute_model(self.model)
        tokens = calibration_tokens(self.model, tokenizer, work, windows=calibration, progress=progress)
        stats = calibrate_for(self.model, tokens, self.preset, work, progress)
        self.trials = Trials(work / "trials", self.model, stats, self.preset)
        self.table = make_table(self.model, tokens, stats, self.preset, work, progress)
        path = work / "kv-cost.json"
        if not path.exists():
            write_json(path, make_kv_table(self.model, kv_tokens(self.model, tokenizer, context=context)[::2], anchored=True, progress=progress).to_json())
        self.table.kv = KVTable.from_json(read_json(path))
        self.held = {k: texts.spread(texts.windows(tokenizer, texts.heldout_text(k), context), windows) for k in KINDS}
        self.record = read_json(out) if out.exists() else {"rows": []}
        setup = {"preset": preset, "context": context, "windows": windows, "texts": texts.describe(), "calibration_windows": calibration,
                 "kv": self.table.kv.meta | self.table.kv.settings}
        if self.record.get("setup", setup) != setup:
            raise MxqError(f"results {out}", "they are of another setup", "name another file, or remove this one")
        self.record |= {"setup": setup, "machine": machine()}
        self.references: dict[str, Reference] = {}

    def measure(self, budget: str, name: str, plan: Plan, weights: int, cache: int, loss: float) -> None:
        """Evaluates a plan, unless its row is there for this budget or for another."""
        if any((r["budget"], r["name"]) == (budget, name) for r in self.record["rows"]):
            return
        row = {"budget": budget, "name": name, "weights_nbytes": weights, "cache_nbytes": cache, "nbytes": weights + cache, "predicted": loss,
               "formats": plan.counts(find_units(self.model)), "cache": kv_counts(plan, self.table.kv.layers)}
        done = next((r for r in self.record["rows"] if r["name"] == name and not name.startswith("joint")), None)
        if done is None:
            self.references = self.references or {k: Reference.of(self.model, t, progress=self.progress) for k, t in self.held.items()}
            swapped = copy.deepcopy(self.model)
            for unit, q in quantize_by_plan(self.model, plan, self.trials).items():
                swapped.get_submodule(unit).weight.data.copy_(q.dequantize())
            replace_attention(swapped, plan.kv)
            row |= {k: evaluate(swapped, self.references[k], t, progress=self.progress).to_dict() for k, t in self.held.items()}
        else:
            row |= {k: done[k] for k in KINDS}
        self.record["rows"].append(row)
        write_json(self.out, self.record)
        self.progress.note(f"{budget:22} {name:22} {weights / 1e6:6.1f} + {cache / 1e6:5.1f} MB  foretold {loss:.4f}  "
                           + "  ".join(f"{k}: ppl {row[k]['perplexity']:.2f} KL {row[k]['kl']:.4f}" for k in KINDS))

    def run(self, rivals: int) -> None:
        quantizer, settings = self.preset.quantizer(), self.table.kv.settings
        splits = [Split(self.table, f, p, self.context) for f in self.table.formats for p in PAIRS]
        for fmt, pair in BUDGETS:
            own = next(s for s in splits if (s.fmt, s.pair) == (fmt, pair))
            others = sorted((s for s in splits if s.nbytes <= own.nbytes and s is not own), key=lambda s: s.loss)
            plan = solve_joint(self.table, nbytes=own.nbytes, context=self.context, quantizer=quantizer)
            joint = plan.meta["joint"]
            self.measure(own.name, "joint", plan, joint["weights"]["nbytes"], joint["cache"]["nbytes"], joint["weights"]["loss"] + joint["cache"]["loss"])
            for s in [own, *others[: rivals - 1]]:
                self.measure(own.name, s.name, s.plan(settings, quantizer), s.weights, s.cache, s.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="bench/results/kv-joint.json")
    parser.add_argument("--work", default="mxq-kv-joint", help="calibration and quantized weights; kept")
    parser.add_argument("--preset", default="rtn", help="how weights are quantized, see plan/presets.py")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--calibration", type=int, default=24, help="calibration windows of 512 tokens")
    parser.add_argument("--rivals", type=int, default=3)
    options = parser.parse_args()
    with Progress() as progress:
        Bench(Path(options.out), Path(options.work), options.preset, options.context, options.windows, options.calibration, progress).run(options.rivals)


if __name__ == "__main__":
    try:
        main()
    except MxqError as error:
        raise SystemExit(f"bench: {error}") from None

"""More uniform formats beside the demo's, so that its mixed plans are held to the best uniform plan within their budget.

    python bench/rivals.py --demo mxq-demo -o bench/results/rivals.json

Goes on from the demo's work directory (same model, statistics, windows) and compares with the rows in its demo.json, paired by window.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext import text as texts  # noqa: E402
from mxq_ext.evaluate import Evaluation, Reference, evaluate, paired  # noqa: E402
from mxq_ext.fileio import read_json, write_json  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.pipeline import calibrate_for, calibration_tokens, quantize_by_plan  # noqa: E402
from mxq_ext.plan import Plan  # noqa: E402
from mxq_ext.plan.presets import find_preset  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402
from mxq_ext.structure import find_units  # noqa: E402
from mxq_ext.testing.timing import machine  # noqa: E402
from mxq_ext.trials import Trials  # noqa: E402

#: Those closest below 4.0, 3.5 and 3.0 stored bits: float minima, narrow and wide groups, tables per row, one scale per row.
FORMATS = ("w3g32_fz", "w3g64_fz", "w3g64_asym", "lut3", "w3", "w3_asym", "w2g32_fz", "w2g32_asym")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("mxq-demo"))
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    demo, work, preset = read_json(options.demo / "demo.json"), options.demo / "work", find_preset("mxq")
    model, tokenizer = load_model(demo_model_path())
    permute_model(model)
    rows = []
    with Progress() as progress:
        tokens = calibration_tokens(model, tokenizer, work, windows=demo["calibration_tokens"] // demo["length"], progress=progress)
        trials = Trials(work / "trials", model, calibrate_for(model, tokens, preset, work, progress), preset)
        units = find_units(model)
        held = {k: texts.spread(texts.windows(tokenizer, texts.heldout_text(k), demo["length"]), demo["windows"]) for k in ("technical", "literary")}
        references = {k: Reference.of(model, t) for k, t in held.items()}
        for fmt in options.formats.split(","):
            plan, swapped = Plan.uniform(fmt), copy.deepcopy(model)
            for unit, q in quantize_by_plan(model, plan, trials).items():
                swapped.get_submodule(unit).weight.data.copy_(q.dequantize())
            quality = {k: evaluate(swapped, references[k], t) for k, t in held.items()}
            row = {"name": f"uniform {fmt}", "bytes": plan.predicted_bytes(units)["total"], "stored_bits": plan.stored_bits(units)}
            against = [{"mixed": m["name"], "uniform": row["name"], "text": k, **paired(Evaluation.from_dict(m[k]), quality[k])}
                       for m in demo["rows"] if m["name"].startswith("mixed-") and float(m["name"][6:]) >= row["stored_bits"] for k in held]
            rows.append(row | {k: e.to_dict() for k, e in quality.items()} | {"against": against})
            write_json(options.out, {"machine": machine(), "rows": rows})
            progress.note(f"{row['name']} {row['stored_bits']:.3f} bits " + "  ".join(f"{k}: ppl {e.perplexity:.2f} KL {e.kl:.4f}" for k, e in quality.items()))
            for c in against[:2]:
                progress.note(f"  {c['mixed']} - it ({c['text']}): nll {c['nll']:+.4f} +- {c['nll_se']:.4f}, KL {c['kl']:+.4f} +- {c['kl_se']:.4f}")


if __name__ == "__main__":
    main()

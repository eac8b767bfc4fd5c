"""Writes docs/frameworks.md: the presets of mxq_ext/plan, with rule, source, departures and what is missing, and their measured rows where there are any.

    python docs/make_frameworks.py            writes the file
    python docs/make_frameworks.py --check    exits with 1 if it is not up to date

Rows are read from bench/results/frameworks.json, which bench/frameworks.py writes; without that file, or for presets that it does not name, the page says
that nothing was measured.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mxq_ext.plan.frameworks import CONTROLS, FRAMEWORKS  # noqa: E402
from mxq_ext.plan.language import OTHER_ALLOCATORS, TRANSFORMS, Preset  # noqa: E402
from mxq_ext.plan.presets import PRESETS  # noqa: E402
from mxq_ext.plan.rules import METHODS  # noqa: E402
from mxq_ext.report import Column, table  # noqa: E402
from mxq_ext.request import missing_parts  # noqa: E402
from mxq_ext.verdicts import LLAMA_CPP, bits_table, flat, measured, quality_columns, rivals_table, task_columns, verdicts_table  # noqa: E402

OUTPUT, RESULTS = ROOT / "docs" / "frameworks.md", ROOT / "bench" / "results" / "frameworks.json"
NOTHING: dict = {"rows": [], "verdicts": [], "rivals": [], "bits_at": []}
KINDS = ("technical", "literary")
SIZES = (Column("stored_bits", "stored bits", ".3f"), Column("mb", "checkpoint MB", ".1f"))
MINUTES = (Column("minutes", "minutes", ".1f"), Column("code", "command"))

INTRODUCTION = """# Frameworks

Methods of mixed-precision quantization as presets of one language, so that they can be compared at equal stored bytes. A preset chooses each part of the
line; `mxq presets` lists them, `mxq quantize MODEL -o OUT --preset NAME --bits 3.5` runs one, and `--set PART=VALUE` replaces a part. In Python:
`find_preset("owq", metric="column_norm")`, or any `Preset` made by hand, as `preset=` of `quantize_model`.

| part | what it says | values |
| --- | --- | --- |
| unit | what one decision covers | `linear`, `rows` and `cols` (bands of a weight), `tiles` (of both), `element` (kept exactly in sparse fp16) |
| candidates | formats that may be mixed | [formats.md](formats.md) |
| metric | what a format costs a unit | `sensitivity/metrics.py` for linears, `sensitivity/lines.py` for rows, columns, tiles and elements |
| allocator | who gets which | ALLOCATORS |
| scope | whose the budget is | `model`: one for all; `unit`: each linear's own |
| method, options, weighting | the quantizer, and the second moments it minimizes the error under | `quantizers/` |
| transform | of the float model before it is quantized, its function kept: by a Hadamard matrix, or by AWQ's scales | TRANSFORMS |
| reconstruct | steps that each decoder block is then trained for on its output | a number, or none |
| distill | steps that scales, tables and norms of the whole model are then trained for on the KL to the float model | a number, or none |
| activations, kv | how inputs are read, and keys and values cached | `a16`, `a8`; [kv.md](kv.md) |
| solver | limits: where there is a `tolerance`, a plan of fewer bits than asked by more than that is refused; ours have none, and warn | numbers |

All formats are real: every preset that runs computes with packed kernels, and stored bits count scales, tables, permutations and sparse parts of every
unit, token embedding and head included. W is [N, K], H the second moment of the input, D the quantized weight minus the float one, H^-1 = U^T U.

Parts of your own join the others by name, from Python. Files in a work directory that an earlier version of their source made are not taken again:

```python
from dataclasses import dataclass

from mxq_ext.plan.knapsack import Allocation
from mxq_ext.plan.presets import PRESETS, find_preset
from mxq_ext.plan.rules import METHODS
from mxq_ext.quantizers import quantize
from mxq_ext.quantizers.base import Options, register
from mxq_ext.sensitivity.metrics import METRICS, Metric


class MyMetric(Metric):
    weightings = ("gradient",)  # second moments to calibrate beside the plain ones; fisher = True for Fisher diagonals

    def loss(self, unit, weight, deltas):  # one number >= 0 for each D [N, K]
        h = self.context.stats.hessian(unit.name, "gradient")
        return [float(((d @ h) * d).sum()) for d in deltas]


def my_allocator(loss, nbytes, budget):  # [units, candidates] each, +inf where a candidate cannot be
    choice = nbytes.argmin(axis=1)
    rows = range(len(choice))
    total = float(loss[rows, choice].sum())
    return Allocation(choice, total, int(nbytes[rows, choice].sum()), bound=float(loss.min(axis=1).sum()), exact=False, method="mine")


@dataclass
class MyOptions(Options):
    clip: float = 1.0


@register("mine", MyOptions, lambda fmt: None)  # None, or (rule, way out) for a format that it cannot fill
def my_quantizer(weight, fmt, options, *, hessian=None, fisher=None):  # float32 [N, K] -> (QTensor, report)
    return quantize(weight.clamp(-options.clip, options.clip), fmt, method="rtn"), {}


METRICS["mine"], METHODS["mine"] = MyMetric, my_allocator
PRESETS["mine"] = find_preset("mxq", metric="mine", allocator="mine", method="mine", options={"clip": 0.5})
```

Then `quantize_model(model, tokenizer, bits=3.5, preset="mine")` runs it, and so does
`mxq_ext.compare.compare("MODEL", "compared", bits=[3, 3.5], presets=["mine", "controls"])`, beside the controls.
"""


def shown(rows: list[dict]) -> list[dict]:
    """Rows as the tables of this page read them, those that were refused left out."""
    return [{**r, "code": f"`{r['command']}`"} for r in flat(measured(rows), KINDS)]


def base_name(row: dict) -> str:
    """The preset of a row, without the parts that were replaced in it; the float model has none."""
    return row.get("preset", "-").split()[0]


def summary(rows: list[dict]) -> str:
    lines = ["| preset | unit | metric | allocator | quantizer | runs | measured |", "| --- | --- | --- | --- | --- | --- | --- |"]
    done = {base_name(r) for r in measured(rows)}
    for name, p in PRESETS.items():
        lines.append(f"| `{name}` | {p.unit} | `{p.metric}` | `{p.allocator}` | `{p.method}` | {'no' if missing_parts(p) else 'yes'} "
                     f"| {'yes' if name in done else 'not yet'} |")
    return "\n".join(lines) + "\n"


def comparison(results: dict) -> str:
    """The tables over all presets, or nothing."""
    if not measured(results["rows"]):
        return ""
    setup, rivals = results["setup"], [r for r in results["rows"] if r["family"] == LLAMA_CPP]
    texts = " and ".join(f"{v['windows']} windows of {v['length']} tokens of the {k} text" for k, v in setup["held_out"].items())
    parts = ["## Side by side",
             f"SmolLM2-135M-Instruct with shuffled channels ([reproducing.md](reproducing.md)), {setup['calibration_windows']} calibration windows, half "
             f"built-in text and half written by the model; {texts}. KL is that to the float model, in nats per token. Stored bits count embedding and head. "
             "Minutes are those of a row alone: statistics, and weights that an earlier row has quantized, are shared.",
             "The best plan within each budget beside the best uniform one of no more bytes; the difference is paired by window:",
             verdicts_table(results["verdicts"]),
             "Stored bits of the decoder's linears at which perplexity has risen by so much (between the two rows that enclose it; - where none do):",
             bits_table(results["bits_at"])]
    if rivals:
        parts += ["Files of llama.cpp, each beside the best of our checkpoints that is no larger as a whole:", rivals_table(results["rivals"]),
                  f"Ours has the lower KL in {sum(r['kl'] < 0 for r in results['rivals'])} of {len(results['rivals'])} pairs of file and text. By "
                  "llama.cpp's own logits, its files without a vocabulary. `imatrix`: with an importance matrix from the same calibration windows. The "
                  "literary text is unlike those windows, and feedback of errors fits what it saw: there the lead is the smaller one.",
                  table(shown(rivals), [Column("name", "file"), *SIZES, *quality_columns(KINDS), *MINUTES]).markdown()]
    return "\n\n".join(parts) + "\n"


def section(name: str, p: Preset, rows: list[dict]) -> str:
    missing, mine = missing_parts(p), [r for r in rows if base_name(r) == name]
    lines = [f"### {name}", "", f"{p.about[0].upper()}{p.about[1:]}.", "", f"- Source: {p.source}.", *([f"- Rule: {p.formula}."] if p.formula else []),
             f"- Candidates: {', '.join(f'`{c}`' for c in p.candidates)}; scope `{p.scope}`; activations `{p.activations or 'a16'}`; "
             f"weighting `{p.weighting}`" + (f"; options {', '.join(f'`{k}={v}`' for k, v in p.options)}" if p.options else "") + "."]
    if p.departures:
        lines += ["- Where it departs from its source:", *(f"  - {d}" for d in p.departures)]
    if missing:
        lines += ["- Cannot run yet, and is refused. It needs:", *(f"  - {m}" for m in missing)]
    lines.append("")
    if measured(mine):
        columns = [Column("preset"), Column("bits", "asked", "g"), *SIZES, *quality_columns(KINDS), *task_columns(mine),
                   Column("decode_tokens_per_s", "decode tok/s", ".1f"), *MINUTES]
        lines.append(table(shown(mine), columns).markdown())
    elif not missing:
        lines.append(f"Not measured yet. To run it: `mxq quantize MODEL -o OUT --preset {name} --bits B`.")
    lines += [line for r in mine if "refused" in r and not missing for line in ("", f"{r['bits']:g} bits were refused: {r['refused']}.")]
    return "\n".join(lines) + "\n"


def render(results: dict | None = None) -> str:
    """The page; ``results`` default to those of ``RESULTS``."""
    if results is None:
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else NOTHING
    note = "<!-- Generated from mxq_ext/plan/presets.py and frameworks.py by docs/make_frameworks.py; edit those. -->\n\n"
    allocators = ", ".join(f"`{a}`" for a in (*METHODS, *OTHER_ALLOCATORS) if a != "brute")
    rows = results["rows"]
    parts = [INTRODUCTION.replace("ALLOCATORS", allocators).replace("TRANSFORMS", ", ".join(f"`{t}`" for t in TRANSFORMS)), summary(rows), comparison(results)]
    ours = {n: p for n, p in PRESETS.items() if n not in FRAMEWORKS and n not in CONTROLS}
    for title, presets in (("## Frameworks of the literature", FRAMEWORKS), ("## Uniform controls", CONTROLS), ("## Ours", ours)):
        parts.append(title + "\n")
        parts += [section(name, p, rows) for name, p in presets.items()]
    return note + "\n".join(p for p in parts if p).rstrip() + "\n"


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv[1:]:
        if not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
            sys.exit("docs/frameworks.md is not up to date: run `python docs/make_frameworks.py`")
    else:
        OUTPUT.write_text(text, encoding="utf-8")

"""Writes docs/frameworks.md: the presets of mxq_ext/plan, with rule, source, departures and what is missing, and their measured rows where there are any.

    python docs/make_frameworks.py            writes the file
    python docs/make_frameworks.py --check    exits with 1 if it is not up to date

Rows are read from bench/results/frameworks.json, a JSON list of {"preset", "bits", "stored_bits", "bytes", "kl", "perplexity", "decode_tokens_per_s",
"command"}; without that file, or for presets that it does not name, the page says that nothing was measured.
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
from mxq_ext.request import missing_parts  # noqa: E402

OUTPUT, RESULTS = ROOT / "docs" / "frameworks.md", ROOT / "bench" / "results" / "frameworks.json"
COLUMNS = ("bits", "stored_bits", "bytes", "kl", "perplexity", "decode_tokens_per_s", "command")

INTRODUCTION = """# Frameworks

Methods of mixed-precision quantization as presets of one language, so that they can be compared at equal stored bytes. A preset chooses each part of the
line; `mxq presets` lists them, `mxq quantize MODEL -o OUT --preset NAME --bits 3.5` runs one, and `--set PART=VALUE` replaces a part. In Python:
`find_preset("owq", metric="column_norm")`, or any `Preset` made by hand, as `preset=` of `quantize_model`.

| part | what it says | values |
| --- | --- | --- |
| unit | what one decision covers | `linear`, `rows` and `cols` (bands of a weight), `element` (kept exactly in sparse fp16) |
| candidates | formats that may be mixed | [formats.md](formats.md) |
| metric | what a format costs a unit | `sensitivity/metrics.py` for linears, `sensitivity/lines.py` for rows, columns and elements |
| allocator | who gets which | ALLOCATORS |
| scope | whose the budget is | `model`: one for all; `unit`: each linear's own |
| method, options, weighting | the quantizer, and the second moments it minimizes the error under | `quantizers/` |
| transform | of the float model before it is quantized, its function kept: by a Hadamard matrix, or by AWQ's scales | TRANSFORMS |
| reconstruct | steps that each decoder block is then trained for on its output | a number, or none |
| activations, kv | how inputs are read, and keys and values cached | `a16`, `a8`; [kv.md](kv.md) |
| solver | limits: a plan of fewer bits than asked by more than `tolerance` is refused, not passed off as the other | numbers |

All formats are real: every preset that runs computes with packed kernels, and stored bits count scales, tables, permutations and sparse parts of every
unit, token embedding and head included. W is [N, K], H the second moment of the input, D the quantized weight minus the float one, H^-1 = U^T U.
"""


def summary(results: list[dict]) -> str:
    lines = ["| preset | unit | metric | allocator | quantizer | runs | measured |", "| --- | --- | --- | --- | --- | --- | --- |"]
    measured = {r["preset"] for r in results}
    for name, p in PRESETS.items():
        lines.append(f"| `{name}` | {p.unit} | `{p.metric}` | `{p.allocator}` | `{p.method}` | {'no' if missing_parts(p) else 'yes'} "
                     f"| {'yes' if name in measured else 'not yet'} |")
    return "\n".join(lines) + "\n"


def section(name: str, p: Preset, results: list[dict]) -> str:
    missing, rows = missing_parts(p), [r for r in results if r["preset"] == name]
    lines = [f"### {name}", "", f"{p.about[0].upper()}{p.about[1:]}.", "", f"- Source: {p.source}.", f"- Rule: {p.formula}.",
             f"- Candidates: {', '.join(f'`{c}`' for c in p.candidates)}; scope `{p.scope}`; activations `{p.activations or 'a16'}`; "
             f"weighting `{p.weighting}`" + (f"; options {', '.join(f'`{k}={v}`' for k, v in p.options)}" if p.options else "") + "."]
    if p.departures:
        lines += ["- Where it departs from its source:", *(f"  - {d}" for d in p.departures)]
    if missing:
        lines += ["- Cannot run yet, and is refused. It needs:", *(f"  - {m}" for m in missing)]
    lines.append("")
    if rows:
        lines += ["| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
        lines += ["| " + " | ".join(cell(r[c]) for c in COLUMNS) + " |" for r in rows]
    elif not missing:
        lines.append(f"Not measured yet. To run it: `mxq quantize MODEL -o OUT --preset {name} --bits B`.")
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    if value is None:
        return "-"
    return f"`{value}`" if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def render(results: list[dict] | None = None) -> str:
    """The page; ``results`` default to those of ``RESULTS``."""
    if results is None:
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    note = "<!-- Generated from mxq_ext/plan/presets.py and frameworks.py by docs/make_frameworks.py; edit those. -->\n\n"
    allocators = ", ".join(f"`{a}`" for a in (*METHODS, *OTHER_ALLOCATORS) if a != "brute")
    parts = [INTRODUCTION.replace("ALLOCATORS", allocators).replace("TRANSFORMS", ", ".join(f"`{t}`" for t in TRANSFORMS)), summary(results)]
    ours = {n: p for n, p in PRESETS.items() if n not in FRAMEWORKS and n not in CONTROLS}
    for title, presets in (("## Frameworks of the literature", FRAMEWORKS), ("## Uniform controls", CONTROLS), ("## Ours", ours)):
        parts.append(title + "\n")
        parts += [section(name, p, results) for name, p in presets.items()] if presets is not ours else \
            [f"- `{name}`: {p.about}. Candidates {', '.join(f'`{c}`' for c in p.candidates)}." for name, p in presets.items()]
    return note + "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv[1:]:
        if not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
            sys.exit("docs/frameworks.md is not up to date: run `python docs/make_frameworks.py`")
    else:
        OUTPUT.write_text(text, encoding="utf-8")

"""Writes the README's table from bench/results/demo.json; ``--check`` only says whether it is the one that the file gives.

    python bench/readme.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo table: begin (bench/results/demo.json) -->", "<!-- demo table: end -->"


def table(result: dict) -> str:
    """The Markdown lines between the two marks."""
    lines = ["| plan | stored bits | weights | ppl technical | KL technical | ppl literary | KL literary | decode tok/s | prefill tok/s |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in result["rows"]:
        quality = " | ".join(f"{e['perplexity']:.2f} | {e['kl']:.3f}" for e in (row["technical"], row["literary"]))
        lines.append(f"| {row['name']} | {row['stored_bits']:.2f} | {row['bytes'] / 1e6:.1f} MB | {quality} "
                     f"| {row['decode_tokens_per_s']:.0f} | {row['prefill_tokens_per_s']:.0f} |")
    m = result["machine"]
    lines += ["", f"Measured by `make demo` on {m['cores']} cores ({m['target']}, {m['threads']} threads), {result['windows']} windows of "
              f"{result['length']} tokens of each held-out text.",
              "Embedding and head are quantized and counted. KL is the divergence from the float model in nats per token."]
    return "\n".join(lines)


def main(check: bool) -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    fresh = f"{head}{BEGIN}\n{table(json.loads((ROOT / 'bench' / 'results' / 'demo.json').read_text()))}\n{END}{tail}"
    if check:
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

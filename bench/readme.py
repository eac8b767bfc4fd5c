"""Writes the measured tables of README.md and of the documents from bench/results/; ``--check`` only says whether they are current.

    python bench/readme.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("technical", "literary")


def demo_table(result: dict) -> list[str]:
    """Float, uniform and mixed plans of the demo."""
    lines = ["| plan | stored bits | weights | ppl technical | KL technical | ppl literary | KL literary | decode tok/s | prefill tok/s |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in result["rows"]:
        quality = " | ".join(f"{row[k]['perplexity']:.2f} | {row[k]['kl']:.3f}" for k in KINDS)
        lines.append(f"| {row['name']} | {row['stored_bits']:.2f} | {row['bytes'] / 1e6:.1f} MB | {quality} "
                     f"| {row['decode_tokens_per_s']:.0f} | {row['prefill_tokens_per_s']:.0f} |")
    m = result["machine"]
    return [*lines, "", f"Measured by `make demo` on {m['cores']} cores ({m['target']}, {m['threads']} threads), {result['windows']} windows of "
            f"{result['length']} tokens of each held-out text.",
            "Embedding and head are quantized and counted. KL is the divergence from the float model in nats per token."]


def quality_table(result: dict) -> list[str]:
    """One line per choice, perplexity with its rise over the float model."""
    lines = ["| part | plan | stored bits | ppl technical | KL technical | ppl literary | KL literary |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
             "| | float32 | 32 | " + " | ".join(f"{result['float'][k]['perplexity']:.2f} | 0" for k in KINDS) + " |"]
    for row in result["rows"]:
        cells = " | ".join(f"{q['perplexity']:.2f} ({q['perplexity'] / result['float'][k]['perplexity'] - 1:+.1%}) | {q['kl']:.4f}"
                           for k in KINDS for q in (row["quality"][k],))
        lines.append(f"| {row['part']} | {row['name']} | {row['stored_bits']:.2f} | {cells} |")
    lines += ["", "| mixed | against | text | nll difference | KL difference |", "| --- | --- | --- | ---: | ---: |"]
    lines += [f"| {c['mixed']} | {c['uniform']} | {c['text']} | {c['nll']:+.4f} ± {c['nll_se']:.4f} | {c['kl']:+.4f} ± {c['kl_se']:.4f} |"
              for c in result["comparisons"]]
    return lines


def speed_table(result: dict) -> list[str]:
    """M = 1, one thread: each of ours beside the fastest peer of its width; then the ratio to that peer over all M."""
    lines = []
    for n, k in dict.fromkeys((r["n"], r["k"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["n"], r["k"], r["threads"]) == (n, k, 1)]
        one = [r for r in rows if r["m"] == 1]
        if not one:
            continue
        read = one[0]["read_gb_per_s"]
        lines += ["", f"### {n} x {k}, one thread", "", f"M = 1, beside a plain read of {read:.0f} GB/s:", "",
                  "| row | MB | ms (median) | GB/s | of reading | x best peer | best peer | x torch bf16 |",
                  "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |"]
        for r in one:
            if r["ours"]:
                peer = f"{r['x_best_peer']:.2f} | {r['best_peer']}" if r["best_peer"] else "- | none"
                time = f"{r['ms']:.3f} ({r['ms_median']:.3f}) | {r['gb_per_s']:.0f} | {r['read_share']:.0%}"
                lines.append(f"| {r['name']} | {r['nbytes'] / 1e6:.2f} | {time} | {peer} | {r['x_bf16']:.2f} |")
        ms = sorted({r["m"] for r in rows})
        lines += ["", "How many times as fast as the fastest peer of the width:", "", "| row | " + " | ".join(f"M={m}" for m in ms) + " |",
                  "| --- |" + " ---: |" * len(ms)]
        for name in dict.fromkeys(r["name"] for r in rows if r["ours"] and r["best_peer"]):
            cells = {r["m"]: f"{r['x_best_peer']:.2f}" for r in rows if r["name"] == name}
            lines.append(f"| {name} | " + " | ".join(cells.get(m, "-") for m in ms) + " |")
    m = result["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    return [f"Measured on {m['cpu']}, {m['cores']} cores, target {m['target']}; peers: {peers}. "
            "Times are minima (medians in brackets) of alternating rounds.", *lines]


def attention_table(result: dict) -> list[str]:
    """One line per cache and context: time, rates, and how many times as fast as torch's attention over float caches."""
    lines = []
    for threads in dict.fromkeys(r["threads"] for r in result["rows"]):
        lines += ["", f"{threads} thread{'s' if threads > 1 else ''}:", "",
                  "| tokens | cache | MB | ms (median) | ns a token | GB/s | of reading | of multiplying | x SDPA fp32 | x SDPA bf16 |",
                  "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for r in (r for r in result["rows"] if r["threads"] == threads):
            lines.append(f"| {r['context']} | {r['name']} | {r['nbytes'] / 1e6:.1f} | {r['ms']:.3f} ({r['ms_median']:.3f}) | {r['ns_per_token']:.0f} "
                         f"| {r['gb_per_s']:.1f} | {r['read_share']:.0%} | {r['matmul_share']:.0%} | {r['x_sdpa_fp32']:.2f} | {r['x_sdpa_bf16']:.2f} |")
    m, r = result["machine"], result["rows"][0]
    return [f"Measured on {m['cpu']}, {m['cores']} cores, target {m['target']}, torch {m['torch']}: one query token, {r['heads']} heads over {r['kv_heads']} "
            f"key/value heads of {r['head_dim']} channels.", "Times are minima (medians in brackets) of alternating rounds.", *lines]


def kv_table(result: dict) -> list[str]:
    """Perplexity, divergence and bytes of each cache; then the time of a step."""
    base = next(r for r in result["rows"] if r["name"] == "no quantization")
    lines = ["| cache | bits of a number | MB | ppl technical | KL technical | ppl literary | KL literary |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in result["rows"]:
        if "failed" in r:
            lines.append(f"| {r['name']} | fails: {r['failed'].partition(':')[0]} | | | | | |")
            continue
        cells = " | ".join(f"{r[k]['perplexity']:.2f} ({r[k]['perplexity'] / base[k]['perplexity'] - 1:+.2%}) | {r[k]['kl']:.5f}" for k in KINDS)
        lines.append(f"| {r['name']} | {r['bits']:.2f} | {r['nbytes'] / 1e6:.1f} | {cells} |")
    contexts = list(dict.fromkeys(r["context"] for r in result["speed"]))
    if contexts:
        by = {(r["name"], r["context"]): r for r in result["speed"]}
        threads = result["speed"][0]["threads"]
        lines += ["", f"One decoding step of the whole model, weights in w4g64, {threads} thread{'s' if threads > 1 else ''}, milliseconds (median):", "",
                  "| cache | " + " | ".join(f"{n} tokens" for n in contexts) + " |", "| --- |" + " ---: |" * len(contexts)]
        for name in dict.fromkeys(r["name"] for r in result["speed"]):
            cells = (f"{by[name, n]['ms']:.2f} ({by[name, n]['ms_median']:.2f})" if (name, n) in by else "-" for n in contexts)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    setup, m, peers = result["setup"], result["machine"], ", ".join(f"{n} {v}" for n, v in result["peers"].items())
    others = Counter(r["machine"]["cpu"] for r in result["rows"] if r.get("machine", m)["cpu"] != m["cpu"])
    elsewhere = "".join(f", {n} rows on {cpu}" for cpu, n in others.items())
    return [*lines, "", f"{setup['windows']} windows of {setup['length']} tokens of each held-out text; {m['cpu']}{elsewhere}, target and versions in the "
            f"file; {peers}."]


def linears_table(rows: list[dict], names: dict[str, str]) -> list[str]:
    """Models whose decoder linears alone are quantized; ``names``: heading -> key of what comes before their bits."""
    lines = [f"| {' | '.join(names)} | stored bits | ppl technical | KL technical | ppl literary | KL literary |",
             f"|{' --- |' * len(names)} ---: | ---: | ---: | ---: | ---: |"]
    for r in rows:
        cells = " | ".join(f"{r['quality'][k]['perplexity']:.2f} | {r['quality'][k]['kl']:.4f}" for k in KINDS)
        lines.append(f"| {' | '.join(str(r[key]) for key in names.values())} | {r['stored_bits']:.2f} | {cells} |")
    return lines


def reconstruction_table(result: dict) -> list[str]:
    """What reconstruction and distillation bring."""
    lines = linears_table(result["rows"], {"format": "format", "made by": "made_by"})
    return [*lines, "", f"{result['windows']} windows of 512 tokens of each held-out text."]


def autoround_table(result: dict) -> list[str]:
    """AutoRound's rows."""
    lines = linears_table(result["rows"], {"bits": "bits", "steps a block": "iterations"})
    return [*lines, "", f"auto-round {result['versions']['auto-round']}, torch {result['versions']['torch']}."]


def joint_table(result: dict) -> list[str]:
    """Each budget: the joint plan and the splits by hand within it."""
    lines = ["| budget of | plan | weights MB | cache MB | KL foretold | ppl technical | KL technical | ppl literary | KL literary |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in result["rows"]:
        cells = " | ".join(f"{r[k]['perplexity']:.2f} | {r[k]['kl']:.4f}" for k in KINDS)
        lines.append(f"| {r['budget']} | {r['name']} | {r['weights_nbytes'] / 1e6:.1f} | {r['cache_nbytes'] / 1e6:.1f} | {r['predicted']:.4f} | {cells} |")
    setup = result["setup"]
    return [*lines, "", f"{setup['windows']} window{'s' if setup['windows'] > 1 else ''} of {setup['context']} tokens of each held-out text, weights by the "
            f"preset {setup['preset']}; bytes of a cache whose exact tokens are in float32."]


def files_table(result: dict) -> list[str]:
    """llama.cpp's files with an importance matrix, each beside the best of our checkpoints that is no larger."""
    pairs: dict[str, dict[str, dict]] = {}
    for r in result["rivals"]:
        if r["rival"].endswith("imatrix"):
            pairs.setdefault(r["rival"].removeprefix("llama.cpp ").removesuffix(" imatrix"), {})[r["text"]] = r
    lines = ["| llama.cpp, importance matrix | MB | KL technical | KL literary | ours, no larger | MB | KL technical | KL literary |",
             "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"]
    for name, texts in sorted(pairs.items(), key=lambda p: p[1][KINDS[0]]["rival_bytes"]):
        one = texts[KINDS[0]]
        sides = [" | ".join([f"{one[f'{side}_bytes'] / 1e6:.1f}", *(f"{texts[k][f'{side}_kl']:.4f}" for k in KINDS)]) for side in ("rival", "best")]
        lines.append(f"| {name} | {sides[0]} | {one['best']} | {sides[1]} |")
    lower, all_ = sum(r["best_kl"] < r["rival_kl"] for r in result["rivals"]), len(result["rivals"])
    return [*lines, "", "Whole checkpoints of the same model, embedding and head included; KL to the float model in nats per token. Counting the files without",
            f"an importance matrix, ours has the lower KL in {lower} of {all_} pairs of file and text. All rows: [docs/frameworks.md](docs/frameworks.md)."]


def decode_table(result: dict) -> list[str]:
    """Tokens per second of a whole model: ours with layers at once, and every peer, the fastest first."""
    ours = [r for r in result["rows"] if r["name"].startswith("mxq") and "layers" in r["name"]]
    theirs = [r for r in result["rows"] if not r["name"].startswith("mxq")]
    lines = ["| one thread, tokens a second | MB | written, bare loop | written, `model.generate` | read, 512 tokens |", "| --- | ---: | ---: | ---: | ---: |"]
    for r in sorted(ours + theirs, key=lambda r: -r["step_tokens_per_s"]["best"]):
        cells = (f"{r[key]['best']:.0f}" if key in r else "-" for key in ("step_tokens_per_s", "generate_tokens_per_s", "prefill_tokens_per_s"))
        lines.append(f"| {r['name']} | {r['nbytes'] / 1e6:.0f} | {' | '.join(cells)} |")
    m, rounds = result["machine"], result["rows"][0]["step_tokens_per_s"]["rounds"]
    return [*lines, "", f"{m['cpu']}, {m['target']}; the best of {rounds} rounds in turns, in one process."]


def times_table(result: dict) -> list[str]:
    """What a time table foretells of each plan, and what it takes."""
    lines = ["| plan | stored bits |" + "".join(f" ms a {what}, foretold | measured | error | less drift |" for what in ("token", "prompt")),
             "| --- | ---: |" + " ---: |" * 8]
    for r in result["rows"]:
        name = r["plan"] + (f" of {r['limit_ms']:.2f} ms" if "limit_ms" in r else "")
        sides = [(r["predicted"][k], r["measured"][k], r["drift"][k]) for k in ("decode_ms", "prefill_ms")]
        cells = " | ".join(f"{want:.2f} | {got:.2f} | {want / got - 1:+.1%} | {want * drift / got - 1:+.1%}" for want, got, drift in sides)
        lines.append(f"| {name} | {r['stored_bits']:.2f} | {cells} |")
    m, o = result["machine"], result["options"]
    return [*lines, "", f"{m['cpu']}, {m['target']}; threads: {o['threads']}; prompts of {o['prefill']} tokens. The machine's drift since the time "
            "table was made is that of a model of one format, measured before and after each plan."]


def widths_lines(result: dict, n: int, k: int) -> list[str]:
    """Integer mode at one shape, one thread: how many times as fast as the fastest peer of the width."""
    rows = [r for r in result["rows"] if (r["n"], r["k"], r["threads"]) == (n, k, 1) and r["ours"] and r["name"].endswith(" a8") and r["best_peer"]]
    rows = [r for r in rows if r["bits"] < 16]
    ms = sorted({r["m"] for r in rows})
    lines = [f"| {n} x {k}, one thread | ms, M=1 | of the read bandwidth | the fastest peer, M=1 | " + " | ".join(f"M={m}" for m in ms) + " |",
             "| --- | ---: | ---: | --- |" + " ---: |" * len(ms)]
    for name in dict.fromkeys(r["name"] for r in rows):
        at = {r["m"]: r for r in rows if r["name"] == name}
        lines.append(f"| {name.removesuffix(' a8')} | {at[1]['ms']:.3f} | {at[1]['read_share']:.0%} | {at[1]['best_peer']} | "
                     + " | ".join(f"{at[m]['x_best_peer']:.2f}" if m in at else "-" for m in ms) + " |")
    return lines


def widths_source(result: dict) -> list[str]:
    m, peers = result["machine"], ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    return ["", "M rows of x, inputs rounded to int8 in groups; the last columns say how many times as fast as the fastest peer of the width.",
            f"{m['cpu']}, {m['target']}; {peers}."]


def widths_table(result: dict) -> list[str]:
    """``widths_lines`` of 4096 x 4096."""
    return widths_lines(result, 4096, 4096) + widths_source(result)


def shapes_table(result: dict) -> list[str]:
    """``widths_lines`` of every shape."""
    tables = [widths_lines(result, *shape) for shape in dict.fromkeys((r["n"], r["k"]) for r in result["rows"])]
    return [line for lines in tables for line in (*lines, "")][:-1] + widths_source(result)


def gpu_table(result: dict) -> list[str]:
    """The first shape on a GPU: microseconds at one row, then how many times as fast as torch in the type of x at every number of rows up to 64."""
    n, k = next((r["n"], r["k"]) for r in result["rows"])
    rows = [r for r in result["rows"] if (r["n"], r["k"]) == (n, k) and r["m"] <= 64]
    ms = sorted({r["m"] for r in rows})
    lines = [f"| {n} x {k} | MB | us, M=1 | of the copy bandwidth | " + " | ".join(f"M={m}" for m in ms) + " |",
             "| --- | ---: | ---: | ---: |" + " ---: |" * len(ms)]
    for name in dict.fromkeys(r["name"] for r in rows):
        at = {r["m"]: r for r in rows if r["name"] == name}
        lines.append(f"| {name} | {at[1]['nbytes'] / 1e6:.0f} | {at[1]['us']:.1f} | {at[1]['copy_share']:.0%} | "
                     + " | ".join(f"{at[m]['x_torch']:.2f}" for m in ms) + " |")
    m = result["machine"]
    return [*lines, "", f"M rows of x in {result['options']['dtype']}; the last columns say how many times as fast as torch's product of weights that are not "
            f"quantized. {m['card']}, torch {m['torch']}."]


#: document -> [(file under bench/results, table)]
TABLES: dict[str, list[tuple[str, Callable[[dict], list[str]]]]] = {
    "README.md": [("demo.json", demo_table), ("frameworks.json", files_table), ("decode-cpu.json", decode_table), ("linear-cpu.json", widths_table),
                  ("linear-cuda.json", gpu_table)],
    "docs/quality.md": [("quality.json", quality_table), ("reconstruction.json", reconstruction_table), ("autoround.json", autoround_table)],
    "docs/performance.md": [("times-cpu-avx2.json", times_table), ("linear-cpu-zen4.json", shapes_table), ("linear-cpu-avx2.json", shapes_table),
                            ("decode-cpu-avx2.json", decode_table), ("linear-cpu.json", speed_table), ("attention-cpu.json", attention_table),
                            ("attention-cpu-avx2.json", attention_table)],
    "docs/kv.md": [("kv-quality.json", kv_table), ("kv-joint.json", joint_table)]}


def fresh(document: str) -> tuple[str, str]:
    """(the document as it is, the document with its tables made anew)."""
    old = text = (ROOT / document).read_text(encoding="utf-8")
    for file, table in TABLES[document]:
        begin, end = f"<!-- table: begin (bench/results/{file}) -->", "<!-- table: end -->"
        head, rest = text.split(begin)
        lines = table(json.loads((ROOT / "bench" / "results" / file).read_text(encoding="utf-8")))
        text = "\n".join([head + begin, *lines, end]) + rest.split(end, 1)[1]
    return old, text


def main(check: bool) -> int:
    stale = 0
    for document in TABLES:
        old, new = fresh(document)
        stale += old != new
        if not check:
            (ROOT / document).write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

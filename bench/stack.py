"""``--op stack``: one token through the linears of Llama-3-8B layers, under uniform and mixed plans and in torch bfloat16.

Each plan's layer is copied until its weights are larger than the caches, and every candidate runs its copies in turns with the others. Norms,
attention and embedding are left out: what is timed is what the plan decides. Rows: milliseconds per layer and the ratio to uniform w8.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mxq_ext import ops
from mxq_ext.formats import Format
from mxq_ext.testing.cases import random_qtensor
from mxq_ext.testing.timing import CYCLE_BYTES, copies, in_turns

LAYER = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
#: At most 3.04 stored bits, with the shape of what the solver chooses at 3 bits on a real model: attention finer than the MLP, some MLP parts at 2 bits.
MIXED = {"q": "w3g128_asym", "k": "w4g128_asym", "v": "w4g128_asym", "o": "w4g128_asym", "gate": "w2g128_asym", "up": "w3g128_asym", "down": "w3g128_asym"}
PLANS = {f"uniform {f}": dict.fromkeys(LAYER, f) for f in ("w8", "w8g128", "w4g128", "w3g128", "w2g128")} | {"mixed": MIXED}


def arguments(parser) -> None:
    """Options of this op."""
    parser.add_argument("--compute", default="a8", choices=ops.COMPUTES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--shrink", type=int, default=1, help="divides every size, for a quick trial")


def run(options) -> Iterator[tuple[dict, str]]:
    """Yields (results, Markdown) once."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    shapes = {name: (n // options.shrink, k // options.shrink) for name, (n, k) in LAYER.items()}
    numel, x = sum(n * k for n, k in shapes.values()), {k: torch.randn(1, k) for _, k in shapes.values()}
    calls, nbytes, kernels = {}, {}, {}
    try:
        for name, plan in PLANS.items():
            made = {part: random_qtensor(f, *shapes[part]) for part, f in plan.items()}
            nbytes[name] = sum(q.nbytes() for q in made.values())
            packed = {part: ops.prepack(q) for part, q in made.items()}
            kernels[name] = " ".join(dict.fromkeys(ops.explain(p, 1, compute=options.compute) for p in packed.values()))
            layers = [[p.clone() for p in packed.values()] for _ in range(copies(nbytes[name], CYCLE_BYTES))]
            calls[name] = lambda i, layers=layers: [ops.linear(x[p.shape[1]], p, None, options.compute) for p in layers[i % len(layers)]]
        half = [[torch.randn(n, k).to(torch.bfloat16) for n, k in shapes.values()] for _ in range(copies(2 * numel, CYCLE_BYTES))]
        narrow = {k: v.to(torch.bfloat16) for k, v in x.items()}
        nbytes["torch bf16"], kernels["torch bf16"] = 2 * numel, "torch"
        calls["torch bf16"] = lambda i: [torch.nn.functional.linear(narrow[w.shape[1]], w) for w in half[i % len(half)]]
        with torch.inference_mode():
            times = in_turns(calls, options.rounds, options.seconds)
    finally:
        torch.set_num_threads(before)
    base, slow = times["uniform w8"].minimum, times["torch bf16"].minimum
    rows = [{"name": name, "stored_bits": 8 * nbytes[name] / numel, "nbytes": nbytes[name], "ms": t.minimum * 1e3, "ms_median": t.median * 1e3,
             "gb_per_s": nbytes[name] / t.minimum / 1e9, "x_w8": base / t.minimum, "x_bf16": slow / t.minimum, "kernels": kernels[name]}
            for name, t in times.items()]
    lines = [f"\n### One token through a Llama-3-8B layer's linears, {options.threads} thread(s), {options.compute}\n",
             "| plan | stored bits | MB | ms (median) | GB/s | x uniform w8 | x torch bf16 |", "|---" * 7 + "|"]
    lines += [f"| {r['name']} | {r['stored_bits']:.3f} | {r['nbytes'] / 1e6:.1f} | {r['ms']:.2f} ({r['ms_median']:.2f}) | {r['gb_per_s']:.1f} "
              f"| {r['x_w8']:.2f} | {r['x_bf16']:.2f} |" for r in rows]
    mixed = {part: Format.parse(f).name for part, f in MIXED.items()}
    yield {"threads": options.threads, "compute": options.compute, "mixed": mixed, "rows": rows, "refused": []}, "\n".join(lines)

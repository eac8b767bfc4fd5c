"""``--op mixed``: weights of several rectangles against the sum of what their parts cost alone.

Each part is also timed as a whole weight of the same shape; ``predicted`` is the sum over parts of (bytes of the part / its speed alone). Two
weights: row bands of 2, 3, 4 and 8 bits; and column bands of 3 and 4 bits with fp16 outlier columns and 0.5 % of sparse values, whose bytes are
charged at the speed of fp16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peers import INT8_X

from mxq_ext import ops
from mxq_ext.qtensor import QTensor
from mxq_ext.testing import numeric
from mxq_ext.testing.cases import Layout, random_qtensor
from mxq_ext.testing.timing import CYCLE_BYTES, copies, in_turns


def arguments(parser) -> None:
    """Options of this op."""
    parser.add_argument("--size", type=int, default=4096, help="rows and columns, a multiple of 512")
    parser.add_argument("--m", type=int, default=1, help="rows of x")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02)


def layouts(n: int) -> list[Layout]:
    """The two mixed weights of n x n."""
    q, band = n // 4, n // 2
    rows = Layout("row bands", (n, n), tuple((i * q, (i + 1) * q, 0, n, f) for i, f in enumerate(("w2g128", "w3g128", "w4g128", "w8g128"))), rows=True)
    outliers = n - n // 32
    cols = Layout("column bands, outliers, sparse", (n, n), ((0, n, 0, band, "w3g128"), (0, n, band, outliers, "w4g128"), (0, n, outliers, n, "fp16")),
                  cols=True, sparse=n * n // 200)
    return [rows, cols]


def parts_of(q: QTensor) -> list[tuple[str, int]]:
    """(format, bytes) of each rectangle, and of the sparse part, whose values are fp16."""
    parts = [(r.format.name, r.nbytes()) for r in q.rectangles]
    return parts + ([("fp16", q.nbytes() - sum(b for _, b in parts))] if q.sparse is not None else [])


def run(options) -> Iterator[tuple[dict, str]]:
    """Yields (results, Markdown) for each compute mode."""
    before, n, m = torch.get_num_threads(), options.size, options.m
    torch.set_num_threads(options.threads)
    x, result = torch.randn(m, n, generator=torch.Generator().manual_seed(0)), {"rows": [], "refused": []}
    weights = {layout.name: layout.make() for layout in layouts(n)}
    alone = {f: random_qtensor(f, n, n) for f in dict.fromkeys(f for q in weights.values() for f, _ in parts_of(q))}
    packed = {}
    for name, q in (weights | alone).items():
        p = ops.prepack(q)
        packed[name] = [p.clone() for _ in range(copies(q.nbytes(), CYCLE_BYTES))]
    try:
        for compute in ops.COMPUTES:
            for name, q in (weights | alone).items():
                limit = numeric.bound([r.format for r in q.rectangles], x.dtype) if compute == "a16" else INT8_X
                numeric.check(ops.linear(x, packed[name][0], None, compute), x.double() @ q.dequantize().double().T, limit, f"{name} {compute}")
            calls = {name: lambda i, p=p, c=compute: ops.linear(x, p[i % len(p)], None, c) for name, p in packed.items()}
            with torch.inference_mode():
                times = in_turns(calls, options.rounds, options.seconds)
            speed = {f: q.nbytes() / times[f].minimum for f, q in alone.items()}
            lines = [f"\n### {n} x {n}, M={m}, {options.threads} thread(s), {compute}\n",
                     "| weight | MB | ms | predicted ms | ratio |", "|---|---|---|---|---|"]
            for name, q in weights.items():
                predicted = sum(nbytes / speed[f] for f, nbytes in parts_of(q))
                row = {"name": name, "compute": compute, "format": q.format_name, "nbytes": q.nbytes(), "ms": times[name].minimum * 1e3,
                       "ms_median": times[name].median * 1e3, "predicted_ms": predicted * 1e3, "ratio": times[name].minimum / predicted,
                       "alone_gb_per_s": {f: s / 1e9 for f, s in speed.items()}}
                result["rows"].append(row)
                lines.append(f"| {name} ({q.format_name}) | {q.nbytes() / 1e6:.2f} | {row['ms']:.3f} | {row['predicted_ms']:.3f} | {row['ratio']:.2f} |")
            yield result, "\n".join(lines)
    finally:
        torch.set_num_threads(before)

"""``--op linear``: y = x W^T of every format against torch's float32 and bfloat16 layers of the same shape.

To compare with another library, add its candidates to :func:`competitors`: they then take part in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as torch_linear

from mxq_ext import ops
from mxq_ext.formats import Format
from mxq_ext.testing import numeric
from mxq_ext.testing.cases import BENCH_FORMATS, random_qtensor, random_x
from mxq_ext.testing.timing import copies, in_turns

CYCLED_ROWS = 16  # up to this M a weight is read faster than it is multiplied: only then does it matter where it comes from


def arguments(parser) -> None:
    """Options of this op."""
    parser.add_argument("--formats", default=",".join(BENCH_FORMATS), help="formats, separated by commas")
    parser.add_argument("--shapes", default="4096x4096", help="NxK, separated by commas")
    parser.add_argument("--m", default="1,4,16,512", help="rows of x, separated by commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="type of x")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="seconds of each candidate in each round")


def competitors(weight: torch.Tensor, x: torch.Tensor) -> dict[str, tuple[int, Callable[[], Any], Callable[[Any], torch.Tensor], float]]:
    """Name -> (bytes of a weight, a maker of copies, the call, largest error allowed against ``weight``)."""
    single, half = x.float(), x.to(torch.bfloat16)
    return {
        "torch fp32": (4 * weight.numel(), weight.clone, lambda w: torch_linear(single, w), 1e-5),
        "torch bf16": (2 * weight.numel(), lambda: weight.to(torch.bfloat16), lambda w: torch_linear(half, w), 2e-2),
    }


def one_shape(formats: list[str], n: int, k: int, m: int, options) -> list[dict]:
    """Rows of the table for one shape and one M. Every candidate is checked before it is timed."""
    x = random_x(m, k, getattr(torch, options.dtype))
    weight = torch.randn(n, k) * 0.02
    calls, about = {}, {}

    def enter(name: str, nbytes: int, make: Callable[[], Any], call: Callable[[Any], torch.Tensor], kernel: str, exact: torch.Tensor, limit: float):
        weights = [make() for _ in range(copies(nbytes) if m <= CYCLED_ROWS else 1)]
        e = numeric.error(call(weights[0]), exact)
        if not e <= limit:
            raise SystemExit(f"bench: {name} at {n}x{k}, M={m} is wrong: error {e:.2e}, bound {limit:.2e}; it is not worth timing")
        calls[name] = lambda i: call(weights[i % len(weights)])
        about[name] = {"nbytes": nbytes, "kernel": kernel, "error": e}

    exact = x.double() @ weight.double().T
    for name, (nbytes, make, call, limit) in competitors(weight, x).items():
        enter(name, nbytes, make, call, "torch", exact, limit)
    for name in formats:
        q = random_qtensor(name, n, k)
        p = ops.prepack(q)
        enter(name, q.nbytes(), lambda p=p: ops.Packed(p.blob.clone(), p.shape, p.format_name), lambda w: ops.linear(x, w), ops.explain(p, m),
              x.double() @ q.dequantize().double().T, numeric.bound(name, x.dtype))

    with torch.inference_mode():
        times = in_turns(calls, options.rounds, options.seconds)
    rows = []
    for name, t in times.items():
        rows.append({"format": name, "n": n, "k": k, "m": m, "kernel": about[name]["kernel"], "nbytes": about[name]["nbytes"],
                     "error": about[name]["error"], "ms": t.minimum * 1e3, "ms_median": t.median * 1e3,
                     "gb_per_s": about[name]["nbytes"] / t.minimum / 1e9, "gflop_per_s": 2 * m * n * k / t.minimum / 1e9,
                     "x_fp32": times["torch fp32"].minimum / t.minimum, "x_bf16": times["torch bf16"].minimum / t.minimum})
    return rows


def run(options) -> list[dict]:
    formats = [Format.parse(f).name for f in options.formats.split(",") if f]
    rows = []
    for shape in options.shapes.split(","):
        n, k = (int(v) for v in shape.split("x"))
        for m in options.m.split(","):
            part = one_shape(formats, n, k, int(m), options)
            print(markdown(part), flush=True)
            rows += part
    return rows


def markdown(rows: list[dict]) -> str:
    """One table for one shape and M. GB/s counts the bytes on disk; both rates and ratios are of the minima."""
    r = rows[0]
    lines = [f"\n### N={r['n']} K={r['k']} M={r['m']}\n",
             "| format | kernel | MB | ms (median) | GB/s | Gflop/s | x torch fp32 | x torch bf16 | error |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['format']} | `{r['kernel']}` | {r['nbytes'] / 1e6:.2f} | {r['ms']:.3f} ({r['ms_median']:.3f}) | {r['gb_per_s']:.1f} "
                     f"| {r['gflop_per_s']:.0f} | {r['x_fp32']:.2f} | {r['x_bf16']:.2f} | {r['error']:.0e} |")
    return "\n".join(lines)

"""``--op linear``: y = x W^T of our formats, of torch's float layers and of other libraries, in turns over weights larger than the caches.

In every case each row is checked before it is timed: all copies of the weight, at up to 256 random outputs, against a float64 product with
what the weight dequantizes to. A row that is wrong or fails is not timed, and the run ends with an error that names it.
``--ladder FORMAT`` instead shows what each step of ours bought.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peers import BF16, EXACT, INT8_X, Candidate, Case, Pass, eager, load, nothing
from peers.pytorch import references
from torch.nn.functional import linear as torch_linear

from mxq_ext import ops
from mxq_ext.errors import MxqError
from mxq_ext.formats import Format
from mxq_ext.testing import numeric
from mxq_ext.testing.cases import BENCH_FORMATS, random_qtensor
from mxq_ext.testing.timing import CYCLE_BYTES, Times, copies, in_turns

#: Up to this M a weight is read faster than it is multiplied: only then does it matter where it comes from.
CYCLED_ROWS = 16
#: Above it, copies of small weights make this much, so that a graph library's cost of a call is spread as over a model's layers.
SPREAD_BYTES = 4 << 20
#: Copies in one timed pass: about as many products as a model has. In larger graphs openvino takes longer for each.
PASS = 250
#: The read bandwidth is taken from buffers of about the size of a weight.
READ_BYTES = 8 << 20
SHAPES = {"llama3-8b": "4096x4096,14336x4096,4096x14336,1024x4096", "smollm2": "1536x576,576x1536,576x576,192x576"}
FIRST_STEP, READING = "dequantize, then torch", "reading"


def arguments(parser) -> None:
    """Options of this op."""
    parser.add_argument("--formats", default="all", help=f"our formats, separated by commas; all is {','.join(BENCH_FORMATS)}")
    parser.add_argument("--compute", default=",".join(ops.COMPUTES), help="how ours treat x, separated by commas: a16 in float, a8 rounded to int8")
    parser.add_argument("--ladder", metavar="FORMAT", help="instead of formats and peers: dequantizing at each call, then every target, of this format")
    parser.add_argument("--peers", default="all", help="libraries to compare with, separated by commas, or all, or none")
    parser.add_argument("--shapes", default="4096x4096", help=f"NxK or a set of them ({', '.join(SHAPES)}), separated by commas")
    parser.add_argument("--m", default="1,4,16,64,512", help="rows of x, separated by commas")
    parser.add_argument("--threads", default="1", help="thread counts, separated by commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="type of x of ours; a peer gets its fastest")
    parser.add_argument("--cycle", type=int, default=CYCLE_BYTES >> 20, help="MiB that the copies of a weight fill, more than the caches")
    parser.add_argument("--busy", type=int, default=0, help="processes that spin meanwhile: what is left when the machine is shared")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="seconds of each candidate in each round")


# ----------------------------------------------------------------------------------------------------------------- options


def positive(text: str, what: str) -> list[int]:
    """``1,16`` as numbers."""
    parts = text.split(",")
    if bad := [p for p in parts if not p.isdecimal() or int(p) < 1]:
        raise MxqError(f"--{what} {text}", f"{bad[0]!r} is no whole number above 0", f"write --{what} 1 or --{what} 1,2")
    return [int(p) for p in parts]


def shapes(text: str) -> list[tuple[int, int]]:
    """``4096x4096,smollm2`` as (N, K) pairs."""
    out = []
    for part in ",".join(SHAPES.get(p, p) for p in text.split(",")).split(","):
        n, _, k = part.partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise MxqError(f"shape {part!r}", "a shape is NxK with whole numbers above 0", f"write 4096x4096, or one of {', '.join(SHAPES)}")
        out.append((int(n), int(k)))
    return out


def computes(text: str) -> list[str]:
    wanted = text.split(",")
    if bad := [c for c in wanted if c not in ops.COMPUTES]:
        raise MxqError(f"--compute {bad[0]}", f"this build computes in {', '.join(ops.COMPUTES)}", "choose one of those")
    return wanted


# -------------------------------------------------------------------------------------------------------------- candidates


def ours(case: Case, name: str, wanted: list[str], dtype: torch.dtype, target: str | None = None) -> Iterator[Candidate]:
    """One format in each way to compute; with a ``target`` on that instruction set instead of the current one."""
    q = random_qtensor(name, case.n, case.k)
    p, dense = ops.prepack(q), q.dequantize()[case.sample]
    turn_to = (lambda: ops.set_target(target)) if target else nothing
    for compute in wanted:
        def kernel(m: int, compute: str = compute) -> str:
            turn_to()
            return ops.explain(p, m, dtype, compute)

        yield Candidate(" ".join([name, compute] + [target] * bool(target)), Format.parse(name).bits, q.nbytes(),
                        INT8_X if compute == "a8" else numeric.bound(name, dtype), dense,
                        eager(p.clone, lambda x, w, compute=compute: ops.linear(x, w, None, compute), turn_to),
                        dtype, kernel, ours=True)


def ladder(case: Case, name: str, wanted: list[str], dtype: torch.dtype) -> Iterator[Candidate]:
    """The steps of one format, slowest first."""
    q = random_qtensor(name, case.n, case.k)
    # one copy: it mostly reads what it has just written, wherever the codes came from
    yield Candidate(FIRST_STEP, Format.parse(name).bits, q.nbytes(), EXACT if dtype == torch.float32 else BF16, q.dequantize()[case.sample],
                    eager(lambda: q, lambda x, w: torch_linear(x, w.dequantize(x.dtype)), most=1), dtype, ours=True)
    for target in ops.targets():
        yield from ours(case, name, wanted, dtype, target)


# ------------------------------------------------------------------------------------------------------------------ timing


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """That many other processes keep a core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


class Reading:
    """Summing buffers of ``cycle`` bytes in all: the bandwidth that the weights' bytes are compared with, in the same rounds as they."""

    def __init__(self, cycle: int):
        self.buffers = [torch.ones(READ_BYTES // 8, dtype=torch.int64) for _ in range(copies(READ_BYTES, cycle))]
        self.nbytes = READ_BYTES * len(self.buffers)

    def run(self) -> None:
        for b in self.buffers:
            b.sum()


@contextmanager
def explained(asked: str) -> Iterator[None]:
    """Turns whatever a library raises into a sentence, without the folders in it: the other rows are still wanted."""
    try:
        yield
    except MxqError:
        raise
    except Exception as failure:
        said = " ".join(re.sub(r"\S*/", "", word) for word in str(failure).split())[:300]
        raise MxqError(asked, f"it fails with {type(failure).__name__} ({said})", "it is not timed") from failure


def checked(c: Candidate, case: Case, x: torch.Tensor, threads: int, cycle: int) -> tuple[list[Pass], float]:
    """(passes of equally many copies, the largest error among them). Raises MxqError if that exceeds the limit or anything fails."""
    asked = f"{c.name} at {case.n}x{case.k}, M={len(x)}, threads={threads}"
    with explained(asked):
        x = x.to(c.dtype)
        exact = x.double() @ c.dense.double().T
        count = copies(c.nbytes, cycle if len(x) <= CYCLED_ROWS else SPREAD_BYTES)
        parts = -(-count // PASS)
        passes = [c.bind(x, -(-count // parts), threads) for _ in range(parts)]
        for p in passes:
            p.run()
        error = max(numeric.error(y[:, case.sample], exact) for p in passes for y in p.outputs())
    if not error <= c.limit:
        raise MxqError(asked, f"it is wrong, error {error:.2e} above {c.limit:.2e}", "it is not timed")
    return passes, error


def refuse(error: MxqError, refused: list[str]) -> None:
    """Says it now and keeps it for the end."""
    print(f"error: {error}", flush=True)
    refused.append(str(error))


def one_case(candidates: list[Candidate], case: Case, m: int, threads: int, options) -> tuple[list[dict], list[str]]:
    """(rows, sentences about candidates that could not be timed) of one shape, M and number of threads."""
    torch.set_num_threads(threads)
    # Without the outlier channels of testing.cases: they would raise the rounding of x to int8, which nobody is judged by here, to 10 %.
    x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m))
    reading = Reading(options.cycle << 20)
    passes, errors, refused = {}, {}, []
    with torch.inference_mode():
        for c in candidates:
            try:
                passes[c.name], errors[c.name] = checked(c, case, x, threads, options.cycle << 20)
            except MxqError as error:
                refuse(error, refused)
        calls = {name: lambda i, p=p: p[i % len(p)].run() for name, p in (passes | {READING: [reading]}).items()}
        turns = in_turns(calls, options.rounds, options.seconds)
    read = reading.nbytes / turns[READING].minimum
    times = {name: Times(turns[name].minimum / p[0].count, turns[name].median / p[0].count, turns[name].rounds) for name, p in passes.items()}
    return table([c for c in candidates if c.name in times], times, errors, case, m, threads, read), refused


def table(candidates: list[Candidate], times: dict[str, Times], errors: dict[str, float], case: Case, m: int, threads: int, read: float) -> list[dict]:
    """Rows with rates and ratios, which are of the minima; ``read`` is in bytes a second."""
    seconds = {c.name: times[c.name].minimum for c in candidates}

    def faster(other: str | None, than: Candidate) -> float | None:
        return seconds[other] / seconds[than.name] if other in seconds else None

    rows = []
    for c in candidates:
        best = min((p.name for p in candidates if p.bits == c.bits and not p.ours), key=seconds.get, default=None)
        rows.append({"name": c.name, "ours": c.ours, "bits": c.bits, "n": case.n, "k": case.k, "m": m, "threads": threads, "kernel": c.kernel(m),
                     "nbytes": c.nbytes, "error": errors[c.name], "limit": c.limit, "ms": seconds[c.name] * 1e3, "ms_median": times[c.name].median * 1e3,
                     "gb_per_s": c.nbytes / seconds[c.name] / 1e9, "read_gb_per_s": read / 1e9, "read_share": c.nbytes / seconds[c.name] / read,
                     "best_peer": best, "x_best_peer": faster(best, c), "x_bf16": faster("torch bf16", c), "x_first_step": faster(FIRST_STEP, c)})
    return rows


def run(options) -> Iterator[tuple[dict, str]]:
    """Yields (results so far, Markdown of what is new) after each case."""
    names = list(BENCH_FORMATS) if options.formats == "all" else [Format.parse(f).name for f in options.formats.split(",") if f]
    ms, threads, wanted, pairs = positive(options.m, "m"), positive(options.threads, "threads"), computes(options.compute), shapes(options.shapes)
    dtype, target, before = getattr(torch, options.dtype), ops.target(), torch.get_num_threads()
    modules, versions = load("none" if options.ladder else options.peers)
    result = {"peers": versions, "rows": [], "refused": []}
    try:
        for n, k in pairs:
            torch.set_num_threads(max(threads))
            case = Case.random(n, k)
            candidates = list(references(case))
            for module in modules:
                try:
                    with explained(f"{module.__name__} at {n}x{k}"):
                        candidates += module.candidates(case)
                except MxqError as error:
                    refuse(error, result["refused"])
            for name in [options.ladder] if options.ladder else names:
                candidates += (ladder if options.ladder else ours)(case, Format.parse(name).name, wanted, dtype)
            if not options.ladder:
                candidates.sort(key=lambda c: -c.bits)
            for m in ms:
                for t in threads:
                    with spinning(options.busy):
                        rows, refused = one_case(candidates, case, m, t, options)
                    result["rows"] += rows
                    result["refused"] += refused
                    yield result, markdown(rows)
        yield result, summary(result["rows"])
    finally:
        ops.set_target(target)
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------------- tables


def _lines(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def markdown(rows: list[dict]) -> str:
    """One table for one case. MB and GB/s count codes, scales, zeros and tables."""
    ratios = {"x best peer": "x_best_peer", "x torch bf16": "x_bf16", "x first step": "x_first_step"}
    ratios = {head: key for head, key in ratios.items() if any(r[key] for r in [r for r in rows if r["ours"]] or rows)}
    head = ["row", "bits", "kernel", "MB", "ms", "(median)", "GB/s", "of reading", *ratios, "error"]
    body = [[r["name"], str(r["bits"]), r["kernel"] and f"`{r['kernel']}`", f"{r['nbytes'] / 1e6:.3f}", f"{r['ms']:.4f}", f"({r['ms_median']:.4f})",
             f"{r['gb_per_s']:.1f}", f"{r['read_share']:.0%}", *(f"{r[key]:.2f}" if r[key] else "-" for key in ratios.values()), f"{r['error']:.0e}"]
            for r in rows]
    r = rows[0]
    title = f"### N={r['n']} K={r['k']} M={r['m']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}, reading {r['read_gb_per_s']:.1f} GB/s"
    return f"\n{title}\n\n{_lines(head, body)}"


def summary(rows: list[dict]) -> str:
    """Of each width, the fastest of ours against the fastest peer: how many times as fast, and which they are."""
    cases: dict[tuple, dict[int, str]] = {}
    for r in sorted((r for r in rows if r["ours"] and r["x_best_peer"]), key=lambda r: r["x_best_peer"]):  # the fastest comes last and stays
        case = cases.setdefault((f"{r['n']} x {r['k']}", str(r["threads"]), str(r["bits"])), {})
        case[r["m"]] = f"{r['x_best_peer']:.2f} ({r['name']}; {r['best_peer']})"
    if not cases:
        return ""
    ms, order = sorted({r["m"] for r in rows}), {f"{r['n']} x {r['k']}": i for i, r in enumerate(rows)}
    body = [[*case, *(cells.get(m, "-") for m in ms)]
            for case, cells in sorted(cases.items(), key=lambda item: (order[item[0][0]], int(item[0][1]), -int(item[0][2])))]
    return "\n### Fastest of ours against the fastest peer of its width\n\n" + _lines(["N x K", "threads", "bits", *(f"M={m}" for m in ms)], body)

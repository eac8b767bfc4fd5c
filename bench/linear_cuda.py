"""``--op linear --device cuda``: y = x W^T of our formats, of torch's layer and of other libraries on one GPU, in microseconds by CUDA graphs.

A candidate's copies of the weight fill ``--cycle`` MiB, more than any second-level cache, and one graph multiplies by each of them once: so weights come from
memory, and what the host takes to launch is not measured. All copies are checked, at up to 256 random outputs, as the graph computed them, against a float64
product with what the weight dequantizes to; a row that is wrong or fails is not timed, and the run ends with an error that names it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from linear import SHAPES, _lines, explained, positive, refuse, shapes
from peers import Candidate, Case, gpu
from torch.nn.functional import linear as torch_linear

from mxq_ext import _native, cuda, ops
from mxq_ext.errors import MxqError
from mxq_ext.formats import Format
from mxq_ext.testing import numeric
from mxq_ext.testing.cases import BENCH_FORMATS, random_qtensor
from mxq_ext.testing.timing import Times, copies

REFERENCE, COPYING = "torch", "copying"
SMI = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def arguments(parser) -> None:
    """Options of this op on this device."""
    parser.add_argument("--formats", default="all", help=f"our formats, separated by commas; all is {','.join(BENCH_FORMATS)}")
    parser.add_argument("--peers", default="all", help=f"libraries to compare with ({', '.join(gpu.LIBRARIES)}), separated by commas, or all, or none")
    parser.add_argument("--shapes", default="llama3-8b", help=f"NxK or a set of them ({', '.join(SHAPES)}), separated by commas")
    parser.add_argument("--m", default="1,8,16,64,512", help="rows of x, separated by commas")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"], help="type of x and of torch's weight")
    parser.add_argument("--cycle", type=int, default=256, help="MiB that the copies of a weight fill, more than the caches")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="seconds of each candidate in each round")


# ------------------------------------------------------------------------------------------------------------------ the device


def check_device() -> None:
    """Raises MxqError where there is nothing to measure on."""
    asked, fix = "bench --device cuda", "run `mxq doctor` on a machine with an NVIDIA GPU, or measure with --device cpu"
    if isinstance(_native.cuda, _native.Missing):
        raise MxqError(asked, "the CUDA kernels were not built", fix)
    if not torch.cuda.is_available():
        raise MxqError(asked, "torch sees no CUDA device", fix)
    cuda.runtime(torch.device("cuda", torch.cuda.current_device()))  # raises for a device without kernels


def smi(run: Callable[..., Any] = subprocess.run) -> dict[str, str | None]:
    """Card, driver and clocks (MHz) as nvidia-smi tells; None where it cannot."""
    try:
        done = run(["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits", "-i", str(torch.cuda.current_device())],
                   capture_output=True, text=True, timeout=20)
        values = [v.strip() for v in done.stdout.splitlines()[0].split(",")] if done.returncode == 0 and done.stdout else []
    except (OSError, subprocess.TimeoutExpired):
        values = []
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) else dict.fromkeys(SMI)


def where() -> dict:
    """What the numbers depend on, beside the host."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"card": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count, "memory_gib": round(p.total_memory / 2**30, 1),
            "built_for": _native.cuda.archs, "torch_cuda": torch.version.cuda} | {f"smi_{k}": v for k, v in smi().items()}


class Clock:
    """Graphs and their times on the current device."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """A function that replays what ``run`` launches. Raises what cannot be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # what is set up at the first call must not be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, replay: Callable[[], object], times: int) -> float:
        """Of one replay, over ``times`` in a row, on the device's own clock."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times


# ------------------------------------------------------------------------------------------------------------------ candidates


class Pass:
    """One product with each copy of a weight; keeps the results, which a graph writes anew in each replay."""

    def __init__(self, x: torch.Tensor, weights: list, call: Callable[[torch.Tensor, Any], torch.Tensor]):
        self.x, self.weights, self.call, self.count, self.results = x, weights, call, len(weights), []

    def run(self) -> None:
        self.results = [self.call(self.x, w) for w in self.weights]


def bound(make: Callable[[], Any], call: Callable[[torch.Tensor, Any], torch.Tensor]):
    """The ``bind`` of a Candidate; ``make()`` is a weight with memory of its own."""
    return lambda x, count, threads: Pass(x, [make() for _ in range(count)], call)


def ours(case: Case, name: str, dtype: torch.dtype, device: torch.device) -> Candidate:
    q = random_qtensor(name, case.n, case.k)
    p = ops.pack(q, device)

    def copy() -> cuda.CudaPacked:
        return cuda.CudaPacked(p.blob.clone(), p.head, p.shape, p.format_name, p.meta)

    return Candidate(name, Format.parse(name).bits, q.nbytes(), numeric.bound(name, dtype), q.dequantize()[case.sample], bound(copy, ops.linear), dtype,
                     lambda m: ops.explain(p, m, dtype), ours=True)


def reference(case: Case, dtype: torch.dtype, device: torch.device) -> Candidate:
    w = case.weight.to(device, dtype)
    return Candidate(f"{REFERENCE} {str(dtype)[6:]}", 16, w.nbytes, 1e-2, w[case.sample.to(device)].float().cpu(), bound(w.clone, torch_linear), dtype)


# ------------------------------------------------------------------------------------------------------------------ timing


def captured(c: Candidate, case: Case, x: torch.Tensor, cycle: int, device: torch.device, clock: Clock) -> tuple[Pass, Callable[[], object], float]:
    """(pass, its graph, the largest error of what the graph computed). Raises MxqError if that exceeds the limit or anything fails."""
    asked = f"{c.name} at {case.n}x{case.k}, M={len(x)}"
    with explained(asked):
        x = x.to(c.dtype)
        exact, sample = x.double() @ c.dense.double().T, case.sample.to(device)
        p = c.bind(x.to(device), copies(c.nbytes, cycle), 1)
        replay = clock.capture(p.run)
        for y in p.results:
            y.fill_(float("nan"))
        replay()
        error = max(numeric.error(y[:, sample].cpu(), exact) for y in p.results)
    if not error <= c.limit:
        raise MxqError(asked, f"it is wrong, error {error:.2e} above {c.limit:.2e}", "it is not timed")
    return p, replay, error


def in_turns(graphs: dict[str, Callable[[], object]], rounds: int, seconds: float, clock: Clock) -> dict[str, Times]:
    """Seconds of one replay of each graph, in an order that rotates: clocks and temperature drift."""
    names = list(graphs)
    repeats = {name: max(1, round(seconds / clock.seconds(graphs[name], 1))) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(clock.seconds(graphs[name], repeats[name]))
    return {name: Times(min(t), sorted(t)[rounds // 2], rounds) for name, t in times.items()}


def copy_buffers(cycle: int, device: torch.device) -> Pass:
    """A copy on the device of ``cycle`` bytes, which are read and written: the bandwidth that weights are held to."""
    source, to = (torch.empty(cycle, dtype=torch.uint8, device=device).fill_(i) for i in range(2))
    return Pass(source, [to], lambda x, w: w.copy_(x))


def table(candidates: list[Candidate], times: dict[str, Times], checks: dict[str, tuple[int, float]], case: Case, m: int, copy: float) -> list[dict]:
    """Rows; times are of one product, ``checks`` are (copies, error), ``copy`` is bytes read and written a second. Rates and ratios are of the minima."""
    base = next((times[c.name].minimum for c in candidates if c.name.startswith(REFERENCE + " ") and not c.ours), None)
    rows = []
    for c in candidates:
        t, (count, error) = times[c.name], checks[c.name]
        best = min((times[p.name].minimum for p in candidates if p.bits == c.bits and not p.ours), default=None)
        rate = c.nbytes / t.minimum
        rows.append({"name": c.name, "ours": c.ours, "bits": c.bits, "n": case.n, "k": case.k, "m": m, "kernel": c.kernel(m), "nbytes": c.nbytes,
                     "copies": count, "error": error, "limit": c.limit, "us": t.minimum * 1e6, "us_median": t.median * 1e6,
                     "gb_per_s": rate / 1e9, "copy_gb_per_s": copy / 1e9,
                     "copy_share": rate / copy, "x_torch": base and base / t.minimum, "x_best_peer": best and best / t.minimum})
    return rows


def markdown(rows: list[dict]) -> str:
    """One table for one case. MB and GB/s count codes, scales, zeros and tables."""
    head = ["row", "bits", "kernel", "MB", "us", "(median)", "GB/s", "of copying", "x torch", "x best peer", "error"]
    body = [[r["name"], str(r["bits"]), r["kernel"] and f"`{r['kernel']}`", f"{r['nbytes'] / 1e6:.3f}", f"{r['us']:.2f}", f"({r['us_median']:.2f})",
             f"{r['gb_per_s']:.0f}", f"{r['copy_share']:.0%}", *(f"{r[key]:.2f}" if r[key] else "-" for key in ("x_torch", "x_best_peer")), f"{r['error']:.0e}"]
            for r in rows]
    r = rows[0]
    return f"\n### N={r['n']} K={r['k']} M={r['m']}, copying {r['copy_gb_per_s']:.0f} GB/s\n\n{_lines(head, body)}"


def run(options, clock: Clock | None = None) -> Iterator[tuple[dict, str]]:
    """Yields (results so far, Markdown of what is new) after each case."""
    names = list(BENCH_FORMATS) if options.formats == "all" else [f for f in options.formats.split(",") if f]
    names, ms, pairs, dtype = [Format.parse(f).name for f in names], positive(options.m, "m"), shapes(options.shapes), getattr(torch, options.dtype)
    modules, versions = gpu.load(options.peers)
    clock, cycle = clock or Clock(), options.cycle << 20
    device = torch.device("cuda", torch.cuda.current_device())
    result = {"peers": versions, "rows": [], "refused": []}
    for n, k in pairs:
        case = Case.random(n, k)
        candidates = [reference(case, dtype, device)]
        for name, make in modules.items():
            try:
                with explained(f"{name} at {n}x{k}"):
                    candidates += make(case, dtype, device, bound)
            except MxqError as error:
                refuse(error, result["refused"])
        candidates += [ours(case, name, dtype, device) for name in names]
        for m in ms:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            with torch.inference_mode():
                checks, graphs, passes = {}, {}, {COPYING: copy_buffers(cycle, device)}
                graphs[COPYING] = clock.capture(passes[COPYING].run)
                for c in candidates:
                    try:
                        passes[c.name], graphs[c.name], error = captured(c, case, x, cycle, device, clock)
                        checks[c.name] = passes[c.name].count, error
                    except MxqError as error:
                        refuse(error, result["refused"])
                turns = in_turns(graphs, options.rounds, options.seconds, clock)
            times = {name: Times(t.minimum / passes[name].count, t.median / passes[name].count, t.rounds) for name, t in turns.items()}
            rows = table([c for c in candidates if c.name in checks], times, checks, case, m, 2 * cycle / times[COPYING].minimum)
            result["rows"] += rows
            result["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            yield result, markdown(rows)

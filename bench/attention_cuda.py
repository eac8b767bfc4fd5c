"""``--op attention --device cuda``: one token's attention over a cache of a given length on one GPU, in microseconds by CUDA graphs.

Ours reads packed pages and the newest tokens in the model's type; beside it, torch's SDPA and FlashInfer (where it is installed) read a cache of that type.
As for linears, the copies of a cache fill ``--cycle`` MiB and one graph attends over each once, with what ``linear_cuda`` captures and times; what a graph
computed is checked against a float64 product with what the cache dequantizes to, for two key/value heads, before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from attention import HEADS_CHECKED, SHORT, Candidate, bit_pairs, cache_arguments, check_heads, checked, floats, ours, tokens_like
from linear import _lines, explained, positive, refuse
from linear_cuda import COPYING, Clock, Pass, check_device, copy_buffers, in_turns, where
from peers import BF16, gpu

from mxq_ext.errors import MxqError
from mxq_ext.kv import cuda as kv_cuda
from mxq_ext.testing.timing import Times, copies

__all__ = ["arguments", "check_device", "run", "where"]  # what bench/run.py asks a module for


def arguments(parser) -> None:
    """Options of this op on this device."""
    cache_arguments(parser)
    parser.add_argument("--peers", default="all", help=f"libraries to compare with ({', '.join(PEERS)}), separated by commas, or all, or none")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"], help="type of the query, of the newest tokens and of torch's cache")
    parser.add_argument("--cycle", type=int, default=256, help="MiB that the copies of a cache fill, more than the caches")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="seconds of each candidate in each round")


def flashinfer(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, options) -> Iterator[Candidate]:
    """Its decoding kernel for one sequence, over a cache [Hkv, N, D]."""
    from flashinfer import single_decode_with_kv_cache

    nbytes = k.nbytes + v.nbytes
    count = copies(nbytes, options.cycle << 20)
    caches = [(k[0].clone(), v[0].clone()) for _ in range(count)]

    def call(i: int) -> torch.Tensor:
        return single_decode_with_kv_cache(q[0, :, 0], *caches[i % count], kv_layout="HND")[None, :, None]

    yield Candidate(f"flashinfer {SHORT[k.dtype]}", None, nbytes, count, BF16, tuple(x[:, :HEADS_CHECKED].float().cpu() for x in (k, v)), caches, call)


#: Library, which is also its module's name, -> its candidates.
PEERS: dict[str, Callable] = {"flashinfer": flashinfer}


def captured(c: Candidate, q: torch.Tensor, heads: int, clock: Clock) -> tuple[Pass, Callable[[], object], float]:
    """(pass, its graph, the largest error of what the graph computed). Raises MxqError if that exceeds the limit or anything fails."""
    with explained(f"attention {c.name} over {c.heads[0].shape[2]} tokens"):
        p = Pass(q, list(range(c.count)), lambda q, i: c.call(i))
        replay = clock.capture(p.run)
        for y in p.results:
            y.fill_(float("nan"))
        replay()
        return p, replay, checked(c, q, heads, p.results)


def table(candidates: list[Candidate], times: dict[str, Times], checks: dict[str, float], kernels: dict[str, str], n: int, copy: float, options) -> list[dict]:
    """Rows; times are of one token. Of SDPA's two forms the faster one stays. ``copy`` is bytes read and written a second; rates and ratios are of the
    minima, and of the bytes of the cache."""
    forms = sorted((c.name for c in candidates if c.name.startswith("sdpa")), key=lambda name: times[name].minimum)
    base = times[forms[0]].minimum if forms else None
    best = min((times[c.name].minimum for c in candidates if c.pair is None), default=None)
    rows = []
    for c in candidates:
        if c.name in forms[1:]:
            continue
        t = times[c.name]
        rate = c.nbytes / t.minimum
        rows.append({"name": c.name, "ours": c.pair is not None, "key": c.pair and c.pair[0], "value": c.pair and c.pair[1], "context": n,
                     "head_dim": options.head_dim, "kv_heads": options.kv_heads, "heads": options.heads, "kernel": kernels.get(c.name, ""),
                     "nbytes": c.nbytes, "copies": c.count, "error": checks[c.name], "limit": c.limit, "us": t.minimum * 1e6, "us_median": t.median * 1e6,
                     "gb_per_s": rate / 1e9, "copy_gb_per_s": copy / 1e9, "copy_share": rate / copy,
                     "x_sdpa": base and base / t.minimum, "x_best_float": best and best / t.minimum})
    return rows


def markdown(rows: list[dict]) -> str:
    """One table for one context. MB and GB/s count codes, scales, zeros and the newest tokens in float."""
    head = ["cache", "kernel", "MB", "us", "(median)", "GB/s", "of copying", "x sdpa", "x best float", "error"]
    body = [[r["name"], r["kernel"] and f"`{r['kernel']}`", f"{r['nbytes'] / 1e6:.2f}", f"{r['us']:.2f}", f"({r['us_median']:.2f})", f"{r['gb_per_s']:.0f}",
             f"{r['copy_share']:.0%}", *(f"{r[key]:.2f}" if r[key] else "-" for key in ("x_sdpa", "x_best_float")), f"{r['error']:.0e}"] for r in rows]
    r = rows[0]
    title = f"### {r['context']} tokens, {r['heads']} heads over {r['kv_heads']} of {r['head_dim']}, copying {r['copy_gb_per_s']:.0f} GB/s"
    return f"\n{title}\n\n{_lines(head, body)}"


def run(options, clock: Clock | None = None) -> Iterator[tuple[dict, str]]:
    """Yields (results so far, Markdown of what is new) after each context."""
    contexts, pairs, dtype = positive(options.contexts, "contexts"), bit_pairs(options.pairs), getattr(torch, options.dtype)
    check_heads(options)
    modules, versions = gpu.load(options.peers, PEERS)
    clock, cycle = clock or Clock(), options.cycle << 20
    device = torch.device("cuda", torch.cuda.current_device())
    result = {"peers": versions, "rows": [], "refused": []}
    q = torch.randn(1, options.heads, 1, options.head_dim, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    with torch.inference_mode():
        for n in contexts:
            k, v = (tokens_like(options.kv_heads, n, options.head_dim, seed).to(device, dtype) for seed in (1, 2))
            makers = {"sdpa": lambda k=k, v=v: floats(dtype, k, v, q, options)}
            makers |= {name: lambda make=make, k=k, v=v: make(k, v, q, options) for name, make in modules.items()}
            makers |= {f"k{p[0]}v{p[1]}": lambda p=p, k=k, v=v: [ours(p, k, v, q, options)] for p in pairs}
            candidates, checks, kernels, passes = [], {}, {}, {COPYING: copy_buffers(cycle, device)}
            graphs = {COPYING: clock.capture(passes[COPYING].run)}
            for name, make in makers.items():
                try:
                    with explained(f"{name} over {n} tokens"):
                        for c in make():
                            passes[c.name], graphs[c.name], checks[c.name] = captured(c, q, options.kv_heads, clock)
                            candidates.append(c)
                            if c.pair is not None:
                                pages, *tail = c.caches[0]
                                kernels[c.name] = kv_cuda.explain(q, pages, None, None, *tail)[0]
                except MxqError as error:
                    refuse(error, result["refused"])
            turns = in_turns(graphs, options.rounds, options.seconds, clock)
            times = {name: Times(t.minimum / passes[name].count, t.median / passes[name].count, t.rounds) for name, t in turns.items()}
            rows = table(candidates, times, checks, kernels, n, 2 * cycle / times[COPYING].minimum, options)
            if not rows:
                raise MxqError(f"attention over {n} tokens", "nothing could be timed", "see the errors above")
            result["rows"] += rows
            result["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            yield result, markdown(rows)

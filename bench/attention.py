"""``--op attention``: one token's attention over a cache of a given length, ours over packed pages and torch's SDPA over float caches, in turns.

Each cache is copied until all its copies are larger than the CPU's caches, as the layers of a model are. SDPA gets each cache in two forms of the
same call, query heads that share keys and values (``enable_gqa``) and the same heads as rows of one query; its faster form counts. Before
anything is timed, the output over every copy is checked against a float64 product with what the cache dequantizes to, for two key/value heads.

Two floors are measured in the same rounds: reading memory (GB/s), and multiplying (GFLOP/s of a float32 matrix product in torch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from linear import Reading, _lines, positive
from peers import BF16, EXACT
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mxq_ext.errors import MxqError
from mxq_ext.formats import PAGE
from mxq_ext.kv import device, ops, reference
from mxq_ext.plan.kv import BITS
from mxq_ext.testing import numeric
from mxq_ext.testing.timing import CYCLE_BYTES, Times, copies, in_turns

#: Newest tokens that stay in the model's type, as by default in a plan.
RESIDUAL = 64
READING, MULTIPLYING, HEADS_CHECKED = "reading", "multiplying", 2
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Size of the matrix product that shows how fast the CPU multiplies.
SQUARE = 512


def cache_arguments(parser) -> None:
    """Options that say which caches, on every device."""
    parser.add_argument("--pairs", default="16/16,8/8,4/4,4/2,3/3,2/2", help="bits of keys / bits of values, separated by commas")
    parser.add_argument("--contexts", default="1024,4096,16384,65536", help="tokens in the cache, separated by commas")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32, help="query heads, a multiple of --kv-heads")
    parser.add_argument("--group", type=int, default=64)


def arguments(parser) -> None:
    """Options of this op."""
    cache_arguments(parser)
    parser.add_argument("--threads", default="1", help="thread counts, separated by commas")
    parser.add_argument("--cycle", type=int, default=CYCLE_BYTES >> 20, help="MiB that the copies of a cache fill, more than the caches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.05, help="seconds of each candidate in each round")


@dataclass
class Candidate:
    """One way to attend: ``call(i)`` reads copy i of ``caches``; ``heads`` are the first key and value heads in float on the CPU, [1, HEADS_CHECKED, N, D]
    each."""

    name: str
    pair: tuple[int, int] | None
    nbytes: int
    count: int
    limit: float
    heads: tuple[torch.Tensor, torch.Tensor]
    caches: list[tuple]
    call: Callable[[int], torch.Tensor]


def bit_pairs(text: str) -> list[tuple[int, int]]:
    """``4/2,2/2`` as pairs."""
    out = []
    for part in text.split(","):
        pair = part.split("/")
        if len(pair) != 2 or not all(p.isdecimal() and int(p) in BITS for p in pair):
            raise MxqError(f"--pairs {part}", f"a pair is two of {', '.join(map(str, BITS))} with a slash between", "write for example 4/2")
        out.append((int(pair[0]), int(pair[1])))
    return out


def check_heads(options) -> None:
    """Raises MxqError for query heads that key heads do not divide."""
    if options.heads % options.kv_heads:
        raise MxqError(f"--heads {options.heads}", f"it must be a multiple of --kv-heads, {options.kv_heads}", "choose another number")


def tokens_like(heads: int, n: int, d: int, seed: int) -> torch.Tensor:
    """float32 [1, heads, n, d] like keys: channels of different size and offset."""
    g = torch.Generator().manual_seed(seed)
    channel = torch.randn(d, generator=g)
    return torch.randn(1, heads, n, d, generator=g) * (0.2 + channel.abs()) + channel


def ours(pair: tuple[int, int], k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, options) -> Candidate:
    """Pages of all tokens but the newest, which are in float, as a cache has them after its last page was made; where k, v and q are."""
    _, heads, n, d = k.shape
    table = device.table(ops.PageFormat("keys", pair[0], min(options.group, PAGE), d),
                         ops.PageFormat("values", pair[1], ops.value_group(d, options.group), d), heads, k.device)
    pages = max(0, (n - RESIDUAL) // PAGE)
    for p in range(pages):
        page = []
        for x, fmt in ((k, table.key), (v, table.value)):
            made = fmt.empty_page(heads, k.device)
            device.pack_page(x[:, :, PAGE * p : PAGE * (p + 1)], fmt, *made)
            page += made
        table.append(*page)
    tail = [x[:, :, PAGE * pages :].contiguous() for x in (k, v)]
    first = []
    for x, fmt, side in ((tail[0], table.key, 0), (tail[1], table.value, 1)):
        whole = [device.unpack_page(*table[p][2 * side : 2 * side + 2], fmt)[:, :HEADS_CHECKED] for p in range(pages)]
        first.append(torch.cat([*whole, x[:, :HEADS_CHECKED]], 2).cpu())
    nbytes = table.nbytes() + sum(t.nbytes for t in tail)
    count = copies(nbytes, options.cycle << 20)
    caches = [(table, *tail)] + [(copy.deepcopy(table), *(t.clone() for t in tail)) for _ in range(count - 1)]

    def call(i: int) -> torch.Tensor:
        pages, tail_k, tail_v = caches[i % count]
        return device.attend(q, pages, tail_k=tail_k, tail_v=tail_v)

    return Candidate(f"k{pair[0]}v{pair[1]}", pair, nbytes, count, numeric.bound("w4g64_fz", q.dtype), tuple(first), caches, call)


def floats(dtype: torch.dtype, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, options) -> Iterator[Candidate]:
    """SDPA over a cache of ``dtype``, in both forms."""
    k, v, q = (x.to(dtype) for x in (k, v, q))
    nbytes, name = k.nbytes + v.nbytes, SHORT[dtype]
    count, (_, heads, _, d) = copies(nbytes, options.cycle << 20), k.shape
    caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(count - 1)]
    rows = q.reshape(1, heads, q.shape[1] // heads, d)
    first = tuple(x[:, :HEADS_CHECKED].float().cpu() for x in (k, v))
    limit = EXACT if dtype == torch.float32 else BF16
    yield Candidate(f"sdpa {name}, shared heads", None, nbytes, count, limit, first, caches, lambda i: sdpa(q, *caches[i % count], enable_gqa=True))
    yield Candidate(f"sdpa {name}, rows", None, nbytes, count, limit, first, caches, lambda i: sdpa(rows, *caches[i % count]).reshape(q.shape))


def checked(c: Candidate, q: torch.Tensor, heads: int, results: list[torch.Tensor] | None = None) -> float:
    """The largest error over all copies, or of ``results`` of them. Raises MxqError above the limit."""
    group = q.shape[1] // heads
    part = q[:, : group * min(HEADS_CHECKED, heads)].cpu()
    exact = reference.attend(part.double().numpy(), *(x.double().numpy() for x in c.heads))
    error = max(numeric.error(y[:, : part.shape[1]].cpu(), exact) for y in (results or map(c.call, range(c.count))))
    if not error <= c.limit:
        raise MxqError(f"attention {c.name} over {c.heads[0].shape[2]} tokens", f"it is wrong, error {error:.2e} above {c.limit:.2e}", "it is not timed")
    return error


def one_context(n: int, threads: list[int], pairs: list[tuple[int, int]], options) -> Iterator[list[dict]]:
    """Rows of one context length, for each number of threads."""
    d, heads = options.head_dim, options.kv_heads
    k, v = (tokens_like(heads, n, d, seed) for seed in (1, 2))
    q = torch.randn(1, options.heads, 1, d, generator=torch.Generator().manual_seed(3))
    candidates = [*floats(torch.float32, k, v, q, options), *floats(torch.bfloat16, k, v, q, options), *(ours(p, k, v, q, options) for p in pairs)]
    del k, v
    errors = {c.name: checked(c, q.bfloat16() if "bf16" in c.name else q, heads) for c in candidates}
    reading, square = Reading(options.cycle << 20), torch.randn(SQUARE, SQUARE)
    for t in threads:
        torch.set_num_threads(t)
        calls = {c.name: c.call for c in candidates} | {READING: lambda i: reading.run(), MULTIPLYING: lambda i: square @ square}
        times = in_turns(calls, options.rounds, options.seconds)
        yield table(candidates, times, errors, reading.nbytes / times[READING].minimum, 2 * SQUARE**3 / times[MULTIPLYING].minimum, n, t, options)


def table(candidates: list[Candidate], times: dict[str, Times], errors: dict[str, float], read: float, flops: float, n: int, threads: int,
          options) -> list[dict]:
    """Rows with rates and ratios, which are of the minima. Of SDPA's two forms the faster one stays. ``read`` and ``flops`` are per second."""
    work = 4 * options.heads * options.head_dim * n
    best = {kind: min((c.name for c in candidates if c.name.startswith(f"sdpa {kind}")), key=lambda name: times[name].minimum) for kind in ("fp32", "bf16")}
    rows = []
    for c in candidates:
        if c.pair is None and c.name not in best.values():
            continue
        seconds = times[c.name].minimum
        rows.append({"name": c.name, "ours": c.pair is not None, "key": c.pair and c.pair[0], "value": c.pair and c.pair[1], "context": n,
                     "threads": threads, "head_dim": options.head_dim, "kv_heads": options.kv_heads, "heads": options.heads, "nbytes": c.nbytes,
                     "error": errors[c.name], "limit": c.limit, "ms": seconds * 1e3, "ms_median": times[c.name].median * 1e3, "ns_per_token": seconds / n * 1e9,
                     "gb_per_s": c.nbytes / seconds / 1e9, "read_gb_per_s": read / 1e9, "read_share": c.nbytes / seconds / read,
                     "gflop_per_s": work / seconds / 1e9, "matmul_gflop_per_s": flops / 1e9, "matmul_share": work / seconds / flops,
                     **{f"x_sdpa_{kind}": times[name].minimum / seconds for kind, name in best.items()},
                     **{f"x_sdpa_{kind}_median": times[name].median / times[c.name].median for kind, name in best.items()}})
    return rows


def run(options) -> Iterator[tuple[dict, str]]:
    """Yields (results so far, Markdown of what is new) after each context and number of threads."""
    contexts, threads, pairs = positive(options.contexts, "contexts"), positive(options.threads, "threads"), bit_pairs(options.pairs)
    check_heads(options)
    before, result = torch.get_num_threads(), {"rows": [], "refused": []}
    try:
        with torch.inference_mode():
            for n in contexts:
                torch.set_num_threads(max(threads))
                for rows in one_context(n, threads, pairs, options):
                    result["rows"] += rows
                    yield result, markdown(rows)
    finally:
        torch.set_num_threads(before)


def markdown(rows: list[dict]) -> str:
    """One table for one context. MB and GB/s count codes, scales, zeros and the newest tokens in float."""
    head = ["cache", "MB", "ms", "(median)", "ns a token", "GB/s", "of reading", "of multiplying", "x sdpa fp32", "x sdpa bf16", "error"]
    body = [[r["name"], f"{r['nbytes'] / 1e6:.2f}", f"{r['ms']:.3f}", f"({r['ms_median']:.3f})", f"{r['ns_per_token']:.1f}", f"{r['gb_per_s']:.1f}",
             f"{r['read_share']:.0%}", f"{r['matmul_share']:.0%}", f"{r['x_sdpa_fp32']:.2f}", f"{r['x_sdpa_bf16']:.2f}", f"{r['error']:.0e}"] for r in rows]
    r = rows[0]
    title = f"### {r['context']} tokens, {r['heads']} heads over {r['kv_heads']} of {r['head_dim']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
    return f"\n{title}, reading {r['read_gb_per_s']:.1f} GB/s, multiplying {r['matmul_gflop_per_s']:.0f} GFLOP/s\n\n{_lines(head, body)}"

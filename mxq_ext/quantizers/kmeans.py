"""Weighted k-means in one dimension, exact, for all rows at once: the tables of the lut formats.

SqueezeLLM (Kim et al. 2023, arXiv 2306.07629) minimizes sum_j F_j (w_j - table[code_j])^2 per output row with Lloyd's iteration. In one
dimension clusters are intervals of the sorted values, so dynamic programming finds the optimum (Wang and Song 2011, Ckmeans.1d.dp):

    best_m(j) = max_{i<j} best_{m-1}(i) + S(i, j)^2 / W(i, j)       over the first j values; S, W = sums of F w and of F in [i, j)

(the sum of F w^2 is constant, so minimizing the error is maximizing S^2 / W). The optimal i is monotone in j and in m, so divide and
conquer needs O(k n log n) evaluations. Here each of its levels is evaluated for all rows in a few numpy operations over one ragged array.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ..formats import Format
from ..qtensor import QTensor
from .base import Options, check_half, register, with_sparse
from .grid import without
from .hessian import diagonal

_CHUNK = 1 << 15  # weights per chunk of rows: the ragged arrays stay in the cache


@dataclass
class KmeansOptions(Options):
    """k-means has none: the optimum is unique but for ties."""


def applies(fmt: Format):
    if fmt.kind == "lut":
        return None
    return f"k-means makes tables, and {fmt} has none", "use a lut format (lut2, lut3, lut4), or another method"


@register("kmeans", KmeansOptions, applies, sparse=True)
def run(weight, fmt, options, *, hessian=None, fisher=None, exact=None):
    """weight float32 [N, K] -> (QTensor, report). Weighted by the Fisher diagonal, else by diag(H), else evenly."""
    if fisher is not None:
        importance, by = fisher, "fisher"
    elif hessian is not None:
        importance, by = diagonal(hessian), "hessian"
    else:
        importance, by = None, "none"
    table = kmeans_table_without(weight, importance, exact, fmt.levels)
    check_half(table, fmt, "table entry")
    table = table.half()
    return with_sparse(QTensor.from_codes(fmt, table_codes(weight, table.float()), table=table), weight, exact), {"weighted_by": by}


def kmeans_table_without(w: torch.Tensor, importance: torch.Tensor | None, exact: torch.Tensor | None, levels: int) -> torch.Tensor:
    """:func:`kmeans_table` of all but the elements that a sparse part will hold (bool [N, K], or None), which pull no entry however large they are."""
    return kmeans_table(*((w, importance) if exact is None else without(w, importance, exact, w.shape[1])), levels)


def table_codes(w: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Nearest entries, uint8 [N, K], of w float32 [N, K] in ascending tables float32 [N, L]; a tie takes the lower code."""
    middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
    return torch.searchsorted(middles, w.contiguous()).to(torch.uint8)


def kmeans_table(w: torch.Tensor, importance: torch.Tensor | None, levels: int) -> torch.Tensor:
    """Optimal tables float32 [N, levels], ascending, of w float32 [N, K] under importance [N, K] or [K] >= 0 (None: even).

    Weights of importance zero count 1e-9 of the mean, so that they still get the nearest table once all else is served. A row with fewer
    distinct values than levels repeats entries.
    """
    n, k = w.shape
    f = torch.ones(1, k) if importance is None else importance.reshape(-1, k)
    f = f.double()
    mean = f.mean(1, keepdim=True)
    f = torch.where(mean > 0, f / mean, torch.ones((), dtype=f.dtype)) + 1e-9
    f = f.expand(n, k).numpy()
    x = w.double().numpy()
    step = max(1, _CHUNK // k)
    chunks = [(x[r : r + step], f[r : r + step]) for r in range(0, n, step)]
    workers = max(1, torch.get_num_threads())
    if workers == 1 or len(chunks) == 1:
        tables = [_table(*c, levels) for c in chunks]
    else:
        with ThreadPoolExecutor(workers) as pool:
            tables = list(pool.map(lambda c: _table(*c, levels), chunks))
    return torch.from_numpy(np.concatenate(tables)).float()


def _table(x, f, levels):
    """Optimal centres float64 [R, levels], ascending, for float64 x, f [R, n]."""
    rows, n = x.shape
    order = np.argsort(x, 1, kind="stable")
    x, f = np.take_along_axis(x, order, 1), np.take_along_axis(f, order, 1)
    centre = (x * f).sum(1, keepdims=True) / f.sum(1, keepdims=True)
    weight, moment = np.zeros((rows, n + 1)), np.zeros((rows, n + 1))
    np.cumsum(f, 1, out=weight[:, 1:])
    np.cumsum((x - centre) * f, 1, out=moment[:, 1:])  # centred, so that S^2 / W does not cancel
    best = np.zeros((rows, n + 1))
    best[:, 1:] = moment[:, 1:] ** 2 / weight[:, 1:]
    starts = [np.zeros((rows, n + 1), np.int64)]  # starts[m][:, j]: where the last of m+1 clusters over the first j values begins
    for m in range(1, levels):
        best, start = _layer(best, moment, weight, starts[-1], last=m == levels - 1)
        starts.append(start)
    end = np.full((rows, 1), n)
    table = np.empty((rows, levels))
    for m in range(levels - 1, -1, -1):
        begin = np.take_along_axis(starts[m], end, 1)
        s = np.take_along_axis(moment, end, 1) - np.take_along_axis(moment, begin, 1)
        w = np.take_along_axis(weight, end, 1) - np.take_along_axis(weight, begin, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            c = s / w
        # No values left: fewer distinct values than levels; repeat the entry above.
        table[:, m : m + 1] = np.where(end > begin, c, table[:, m + 1 : m + 2] if m + 1 < levels else 0.0)
        end = begin
    return np.sort(table + centre, 1)


def _layer(best, moment, weight, floor, last):
    """One more cluster: (best_m, starts_m), both [R, n+1]; ``floor`` = starts_{m-1}, a lower bound. ``last`` needs only j = n."""
    rows, size = best.shape
    n = size - 1
    start = np.zeros((rows, size), np.int64)
    new = np.zeros((rows, size))
    base = (np.arange(rows) * size)[:, None]
    flat_best, flat_moment, flat_weight = best.ravel(), moment.ravel(), weight.ravel()

    def solve(js, low, high):
        """Columns js [M], ranges low, high [R, M] (both inclusive) of candidate starts."""
        length = (high - low + 1).ravel()
        first = np.cumsum(length) - length
        index = np.arange(int(length.sum())) + np.repeat((low + base).ravel() - first, length)
        s = np.repeat(moment[:, js].ravel(), length)
        s -= flat_moment[index]
        w = np.repeat(weight[:, js].ravel(), length)
        w -= flat_weight[index]
        s *= s
        s /= w
        s += flat_best[index]
        top = np.maximum.reduceat(s, first)
        hits = np.flatnonzero(s == np.repeat(top, length))
        where = index[hits[np.searchsorted(hits, first)]]
        start[:, js] = where.reshape(rows, -1) - base
        new[:, js] = top.reshape(rows, -1)

    solve(np.array([n]), np.minimum(floor[:, n:], n - 1), np.full((rows, 1), n - 1))
    if last:
        return new, start
    half = 1 << (n.bit_length() - 1)
    while half:
        js = np.arange(half, n, 2 * half)
        if js.size:
            low = np.maximum(start[:, js - half], floor[:, js])
            high = np.minimum(start[:, np.minimum(js + half, n)], js - 1)
            solve(js, np.minimum(low, high), high)
        half //= 2
    return new, start

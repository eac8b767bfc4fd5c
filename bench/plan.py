"""Seconds to solve the plan of a model of 100 billion weights and more, and to make its whole front: linears, and linears in column bands.

    python bench/run.py --op plan --out none

The tables are synthetic (losses that fall fourfold per bit around a log-normal sensitivity): allocation depends on their size, not on a model.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from mxq_ext.formats import Format
from mxq_ext.plan import choose, pareto_front
from mxq_ext.sensitivity.table import CostTable

FORMATS = ("w2g64", "w2g32_asym", "w3g128", "w3g64", "w4g128", "w4g64", "nf4g32", "w8")
SHAPES = [(12288, 12288)] * 4 + [(49152, 12288)] * 2 + [(12288, 49152)]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=lambda text: [float(b) for b in text.split(",")], default=[2.5, 3.0, 3.5, 4.0], help="budgets in stored bits")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")


def synthetic(linears: int = 600, bands: int = 1, seed: int = 0) -> CostTable:
    """``linears`` x 8 candidates; with ``bands``, each linear is cut into so many groups of columns with sensitivities of their own.

    ``seconds`` are proportional to the bytes, with noise: as a memory-bound kernel would take.
    """
    rng = np.random.default_rng(seed)
    shapes = list(itertools.islice(itertools.cycle(SHAPES), linears))
    numel = np.repeat([n * (k // bands) for n, k in shapes], bands)
    nbytes = np.repeat([[Format.parse(f).nbytes(n, k // bands) for f in FORMATS] for n, k in shapes], bands, axis=0)
    sensitivity = np.repeat(rng.lognormal(0, 1.5, (linears, 1)), bands, axis=0) * rng.lognormal(0, 1, (linears * bands, 1)) * numel[:, None] / 1e8
    loss = sensitivity * 4.0 ** (-8 * nbytes / numel[:, None]) * rng.lognormal(0, 0.1, nbytes.shape)
    seconds = nbytes / 2e11 * rng.lognormal(0, 0.2, (1, len(FORMATS)))
    return CostTable([f"layers.{i // bands}.band{i % bands}" for i in range(linears * bands)], list(FORMATS), loss, nbytes, numel, seconds)


def timed(call: Callable[[], object], rounds: int) -> tuple[float, object]:
    """(median seconds of ``rounds`` calls, the last result)."""
    times, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def run(options: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Yields (results so far, Markdown of the newest)."""
    rows = []
    for name, table in (("600 linears", synthetic()), ("600 linears x 64 column bands", synthetic(bands=64))):
        lines = [f"\n{name}, {len(FORMATS)} candidates, {int(table.numel.sum()) / 1e9:.0f} billion weights", "",
                 "| what | seconds | exact | loss over its bound |", "| --- | ---: | --- | ---: |"]

        def add(what, seconds, exact=None, gap=None, name=name, lines=lines):
            rows.append({"table": name, "what": what, "seconds": seconds, "exact": exact, "gap": gap})
            cells = ["-" if exact is None else "yes" if exact else "no", "-" if gap is None else f"{gap:.1e}"]
            lines.append(f"| {what} | {seconds:.3f} | {cells[0]} | {cells[1]} |")

        for bits in options.bits:
            for method in ("dp", "lagrangian"):
                seconds, a = timed(lambda: choose(table, bits=bits, method=method), options.rounds)  # noqa: B023
                add(f"{method}, {bits} bits", seconds, a.exact, a.gap / a.loss)
        seconds, front = timed(lambda: pareto_front(table), options.rounds)  # noqa: B023
        add(f"whole front, {len(front):,} points", seconds)
        if len(table.units) <= 1000:
            free = choose(table, bits=options.bits[-1])
            limit = 0.9 * float(table.seconds[np.arange(len(table.units)), free.choice].sum())
            seconds, a = timed(lambda: choose(table, bits=options.bits[-1], max_seconds=limit), options.rounds)  # noqa: B023
            add(f"integer program, {options.bits[-1]} bits and 90 % of that plan's time", seconds, a.exact, a.gap / a.loss)
        yield {"rows": rows, "refused": []}, "\n".join(lines)

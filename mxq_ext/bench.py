"""``mxq bench`` without a checkpoint: one linear layer in each format against torch's float32 layer of the same shape; and ``--table``, the times of
all shapes of a model in all formats, from which plans foretell theirs.

Weights are random, since only their bytes matter for speed. Several copies of each take turns, so that they come from memory as
in a model, where a layer's weights were last read one whole forward pass ago.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from .errors import ShapeError
from .evaluate import speed
from .formats import Format
from .nn import replace_linear
from .plan import Plan
from .plan.language import DEFAULT_CANDIDATES
from .plan.times import TimeTable, is_head, is_lookup
from .progress import SILENT, Progress
from .structure import find_units
from .testing.cases import BENCH_FORMATS, random_qtensor, random_x
from .testing.timing import copies, in_turns, machine

FLOAT = "torch float32"


def _layer(x: torch.Tensor, nbytes: int, make: Callable[[], Any], call: Callable[[torch.Tensor, Any], object]) -> Callable[[int], object]:
    """A function of the call's number that multiplies ``x`` by one of enough copies of a weight of ``nbytes``."""
    weights = [make() for _ in range(copies(nbytes))]
    return lambda i: call(x, weights[i % len(weights)])


def linear_speed(formats: Sequence[str] = BENCH_FORMATS, n: int = 4096, k: int = 4096, rows: int = 1, rounds: int = 7) -> dict[str, Any]:
    """Times ``ops.linear`` for x [rows, k] and W [n, k] in each format, and torch's float32 linear.

    Returns a JSON dict: the setting, and ``linear``: one entry per format with the kernel's name, microseconds of a call (median of
    ``rounds``), weight bytes read per second (of nested formats those that kernels read), and how many times faster
    than torch's float32 it is. Raises FormatError, ShapeError.
    """
    if min(n, k, rows) < 1:
        raise ShapeError(f"bench of {rows} x {k} by {n} x {k}", "sizes must be at least 1", "give positive sizes")
    x = random_x(rows, k)
    weight = torch.randn(n, k)
    described = {FLOAT: {"kernel": "torch", "nbytes": weight.nbytes, "read": weight.nbytes}}
    layers = {FLOAT: _layer(x, weight.nbytes, weight.clone, torch.nn.functional.linear)}
    for name in dict.fromkeys(Format.parse(f).name for f in formats):
        q = random_qtensor(name, n, k)
        packed = ops.prepack(q)
        described[name] = {"kernel": ops.explain(packed, rows), "nbytes": q.nbytes(), "read": q.expanded().nbytes()}
        layers[name] = _layer(x, packed.nbytes, packed.clone, ops.linear)
    with torch.inference_mode():
        times = in_turns(layers, rounds)
    base = times[FLOAT].median
    table = [{"format": name, "kernel": d["kernel"], "stored_bits": 8 * d["nbytes"] / (n * k), "us": times[name].median * 1e6,
              "gb_per_s": d["read"] / times[name].median / 1e9, "speedup": base / times[name].median} for name, d in described.items()]
    return {"rows": rows, "n": n, "k": k, "threads": torch.get_num_threads(), "target": ops.target(), "torch": torch.__version__,
            "linear": table}


#: Formats of a time table when nothing is asked for: the default candidates, and what ``REFERENCE`` needs.
TABLE_FORMATS = (*DEFAULT_CANDIDATES, "w2g128_asym", "w4g64", "w8")
#: The models whose whole time says what all but the linears takes: a narrow and a wide one, whose linears take shares that differ.
REFERENCE = ("w2g64_asym", "w8g128_asym")


def product_times(shapes: dict[tuple[int, int], Sequence[int]], formats: Sequence[str], rounds: int = 5, progress: Progress = SILENT) -> dict:
    """(N, K, format, rows) -> microseconds of ``ops.linear`` for x [rows, K], less what a call of a 32 x 32 weight takes: the product alone.

    ``shapes``: (N, K) -> rows to time. Medians; all formats of a shape take turns.
    """
    small = ops.prepack(random_qtensor("w4g32", 32, 32))
    names, out = [Format.parse(f).name for f in dict.fromkeys(formats)], {}
    with torch.inference_mode():
        for (n, k), all_rows in progress.track(list(shapes.items()), "products"):
            packed = {name: ops.prepack(random_qtensor(name, n, k)) for name in names}
            for rows in all_rows:
                x, y = random_x(rows, k), random_x(rows, 32)
                layers = {name: _layer(x, p.nbytes, p.clone, ops.linear) for name, p in packed.items()}
                times = in_turns(layers | {"": lambda i, y=y: ops.linear(y, small)}, rounds)
                # The median over rounds of a round's middle call: the fastest call is what a quiet machine could do, and plans are for this one.
                out |= {(n, k, name, rows): max(0.0, times[name].median - times[""].median) * 1e6 for name in names}
    return out


def time_table(model: torch.nn.Module, formats: Sequence[str] = TABLE_FORMATS, *, prefill: int = 512, rounds: int = 5,
               progress: Progress = SILENT) -> TimeTable:
    """The times of every shape of ``model``, for a decoded token and for a prompt of ``prefill`` tokens, and of the rest of it.

    The rest is the mean over the formats of ``REFERENCE`` of what the model quantized to it (round to nearest) takes, less its linears. ``model`` is
    a float model, which is left as it is; copies are quantized one after the other.
    """
    units = [u for u in find_units(model) if not is_lookup(u)]
    shapes: dict[tuple[int, int], tuple[int, ...]] = {}
    for u in units:
        shapes[u.shape] = tuple(sorted({*shapes.get(u.shape, ()), 1, *(() if is_head(u) else (prefill,))}))
    us = product_times(shapes, [*formats, *REFERENCE], rounds, progress)
    table = TimeTable(us, {1: 0.0, prefill: 0.0})
    rest: dict[int, list[float]] = {1: [], prefill: []}
    for fmt in progress.track(REFERENCE, "whole models"):
        plan = Plan.uniform(fmt, quantizer={"name": "rtn"})
        whole = speed(replace_linear(copy.deepcopy(model), plan, fuse="auto"), prefill=prefill)
        alone = table.predict(units, plan.resolve(units))
        rest[1].append(1e6 / whole["decode_tokens_per_s"] - 1e3 * alone["decode_ms"])
        rest[prefill].append(1e6 * prefill / whole["prefill_tokens_per_s"] - 1e3 * alone["prefill_ms"])
    meta = {"machine": machine(), "target": ops.target(), "threads": torch.get_num_threads(), "rounds": rounds, "reference": list(REFERENCE),
            "rest_us": {str(m): r for m, r in rest.items()}}
    return TimeTable(us, {m: max(0.0, sum(r) / len(r)) for m, r in rest.items()}, meta)

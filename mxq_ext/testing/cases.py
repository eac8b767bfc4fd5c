"""The one list of cases: formats, shapes, rows of x and types that tests compare and benchmarks time.

A new format or layout is added here once and is then covered by the packing tests, by every CPU target, and by ``bench/run.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import GROUPS, NEST_BITS, NESTED_BITS, UNIFORM_BITS, Format
from ..qtensor import QTensor, Rectangle, Sparse

#: Every uniform format, zero kind and scale type once, and every other format.
FORMATS = (
    "w1g32_fz", "w1g64_fz", "w1g128_fz", "w1_fz", "w1g64_fz_bf16",
    *(f"w{bits}{group}{zero}" for bits in UNIFORM_BITS[1:] for group in ("g32", "g64", "g128", "") for zero in ("", "_asym", "_fz")),
    *(f"w{bits}g64{zero}_bf16" for bits in UNIFORM_BITS[1:] for zero in ("", "_asym", "_fz")),
    "nf4g32", "nf4g64", "nf4g128", "nf4", "nf4g64_bf16", "lut2", "lut3", "lut4", "fp16",
)
#: Formats that are stored so and read in their expanded form: they go through packing, never through the sweeps over kernels.
NESTED = tuple(f"w{bits}g{group}_nest" for bits in NESTED_BITS for group in GROUPS)
#: What a benchmark shows when nothing is asked for.
BENCH_FORMATS = ("w1g128_fz", "w2g128", "w3g128", "w4g128", "w4g64_asym", "w5g128", "w6g128", "w8", "nf4g64", "lut2", "lut3", "lut4", "fp16")

#: (N, K): single weights, ragged groups, less than a lane, odd multiples, widths of small models, a lut stripe and its tails.
SHAPES = ((1, 1), (3, 31), (16, 32), (17, 33), (31, 64), (33, 100), (47, 191), (64, 576), (5, 1000), (18, 1519))
#: Rows of x: every micro-kernel, both sides of the gemv/gemm border, and more than one block.
ROWS = (*range(1, 18), 20, 25, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_rectangle(fmt: Format | str, r0: int, r1: int, c0: int, c1: int, generator: torch.Generator) -> Rectangle:
    """A rectangle of random codes and random scales, zeros or tables of both signs, including the extreme codes."""
    fmt = Format.parse(fmt)
    n, k = r1 - r0, c1 - c0
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[fmt.scale_dtype]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if fmt.kind == "float":
        return Rectangle(r0, r1, c0, c1, fmt, {"values": normal(n, k).half()})
    t = {"codes": _random_stream(n, k, fmt.bits, generator)}
    groups = fmt.groups(k)
    if fmt.nested:
        spans = fmt.tensor_shapes(n, k)["scale_steps"][0]
        t |= {what: _random_stream(n, groups, NEST_BITS, generator) for what in ("scales", "zeros")}
        t |= {"scale_steps": (normal(*spans) * 0.02).half(), "scale_starts": (normal(*spans) * 0.1).half()}
        return Rectangle(r0, r1, c0, c1, fmt, t | {"zero_steps": (normal(*spans) * 0.2).half(), "zero_starts": normal(*spans).half()})
    if fmt.kind == "lut":
        t["table"] = normal(n, fmt.levels).half()
    else:
        t["scales"] = (normal(n, groups) * 0.1).to(half)
    if fmt.zero == "int":
        t["zeros"] = _random_stream(n, groups, fmt.bits, generator)
    elif fmt.zero == "float":
        t["zeros"] = normal(n, groups).to(half)
    return Rectangle(r0, r1, c0, c1, fmt, t)


def _random_stream(rows: int, count: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    """Random bytes with the bits behind the last code cleared: random codes without any packer having been at work."""
    width = -(-count * bits // 8)
    out = torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)
    if spare := width * 8 - count * bits:
        out[:, -1] &= (1 << (8 - spare)) - 1
    return out


def random_qtensor(fmt: Format | str, n: int, k: int, seed: int = 0) -> QTensor:
    """One rectangle of random content."""
    g = torch.Generator().manual_seed(seed)
    return QTensor((n, k), [random_rectangle(fmt, 0, n, 0, k, g)])


@dataclass(frozen=True)
class Layout:
    """A weight of several rectangles: (r0, r1, c0, c1, format) each, with permutations and a sparse part or without."""

    name: str
    shape: tuple[int, int]
    rectangles: tuple[tuple[int, int, int, int, str], ...]
    rows: bool = False
    cols: bool = False
    sparse: int = 0  # values

    def make(self, seed: int = 0) -> QTensor:
        g = torch.Generator().manual_seed(seed)
        n, k = self.shape
        rects = [random_rectangle(f, r0, r1, c0, c1, g) for r0, r1, c0, c1, f in self.rectangles]
        perm_rows = torch.randperm(n, generator=g).int() if self.rows else None
        perm_cols = torch.randperm(k, generator=g).int() if self.cols else None
        sparse = None
        if self.sparse:
            place = torch.randperm(n * k, generator=g)[: self.sparse].sort().values
            counts = torch.bincount(place // k, minlength=n)
            rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
            sparse = Sparse(rowptr, (place % k).int(), torch.randn(self.sparse, generator=g).half())
        q = QTensor(self.shape, rects, perm_rows, perm_cols, sparse)
        q.validate(self.name)
        return q


LAYOUTS = (
    Layout("row-bands", (50, 100), ((0, 32, 0, 100, "w3g64_asym"), (32, 50, 0, 100, "w8")), rows=True),
    Layout("column-bands", (40, 200), ((0, 40, 0, 128, "w2g64"), (0, 40, 128, 192, "w4g32_fz"), (0, 40, 192, 200, "fp16")), cols=True),
    Layout("lut-and-outliers", (37, 600), ((0, 37, 0, 600, "lut3"),), sparse=90),
    Layout("lut-and-nf4", (37, 160), ((0, 37, 0, 96, "lut4"), (0, 37, 96, 160, "nf4g32")), rows=True, cols=True, sparse=5),
    Layout("pinwheel", (48, 90), ((0, 20, 0, 50, "w4g32"), (0, 33, 50, 90, "lut2"), (20, 48, 0, 30, "w8g64_asym"), (33, 48, 30, 90, "w3"),
                                  (20, 33, 30, 50, "fp16")), rows=True, cols=True, sparse=40),
    Layout("five-six-and-one", (40, 150), ((0, 24, 0, 150, "w5g64_asym"), (24, 40, 0, 70, "w6g32"), (24, 40, 70, 150, "w1g64_fz")), rows=True, sparse=20),
    Layout("one-row-and-column", (1, 33), ((0, 1, 0, 1, "fp16"), (0, 1, 1, 33, "w2g32_asym")), cols=True),
)


#: Mixed with others, permuted, and with a sparse part.
NESTED_LAYOUT = Layout("nested", (40, 700), ((0, 24, 0, 640, "w3g32_nest"), (0, 24, 640, 700, "w8"), (24, 40, 0, 700, "w4g64_nest")), rows=True, cols=True,
                       sparse=50)


def random_x(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Inputs [m, k] of a layer: normal, with a few channels ten times larger, as transformers have them."""
    g = torch.Generator().manual_seed(seed + 7919)
    x = torch.randn(m, k, generator=g)
    if k > 8:
        x[:, torch.randint(0, k, (1 + k // 100,), generator=g)] *= 10
    return x.to(dtype)

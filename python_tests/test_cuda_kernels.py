"""Every CUDA kernel, executed: on the CPU thread for thread (docs/cuda-testing.md), and on the device too where there is one.

What they are held to: ``dequant`` gives the bits of ``QTensor.dequantize()``; x = identity gives back the weights, bit for bit; whole numbers with scales
that are powers of two give exact sums; random inputs stay within 1e-3 (fp16) and 8e-3 (bf16) of float64, and within float32's rounding where the output is
float32.
"""

from types import SimpleNamespace

import cuda_tools
import numpy as np
import pytest
import torch
from cuda_tools import error

from mxq_ext import cuda, reference
from mxq_ext.errors import NativeError
from mxq_ext.formats import NF4_LEVELS, UNIFORM_BITS, Format
from mxq_ext.qtensor import QTensor, Rectangle
from mxq_ext.testing import cases

HALVES = (torch.float16, torch.bfloat16)
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: One format of each decoder and zero point.
KERNELS = ("w1g32_fz", "w2g64", "w3g128_asym", "w4g32_fz", "w5g64_asym", "w6g128_fz", "w6g32_asym", "w8", "w8g64_asym_bf16", "lut2", "lut3", "lut4", "nf4g64",
           "fp16")


@pytest.fixture(params=cuda_tools.backends())
def bench(request):
    return cuda_tools.bench(request.param)


def as_multiplied(q: QTensor) -> torch.Tensor:
    """float64 [N, K]: the weight as mv and mm know it, which is the weight itself but for nf4, whose levels they round to fp16."""
    levels = torch.tensor(NF4_LEVELS).half().float()
    parts = torch.zeros(q.shape, dtype=torch.float64)
    for r in q.rectangles:
        part = r.dequantize().double()
        if r.format.kind == "nf":
            width = r.format.group or r.shape[1]
            part = r.tensors["scales"].double().repeat_interleave(width, 1)[:, : r.shape[1]] * levels[r.codes().long()].double()
        parts[r.r0 : r.r1, r.c0 : r.c1] = part
    if q.perm_rows is not None:
        parts = torch.empty_like(parts).index_copy_(0, q.perm_rows.long(), parts)
    if q.perm_cols is not None:
        parts = torch.empty_like(parts).index_copy_(1, q.perm_cols.long(), parts)
    return parts if q.sparse is None else parts + q.sparse.dense(*q.shape).double()


def sums_bound(q: QTensor, dtype: torch.dtype) -> float:
    """Bound of a random case: float32 sums, then the output's rounding. Float zeros cancel."""
    return 1e-5 if dtype == torch.float32 else BOUND[dtype]


# ----------------------------------------------------------------------------------------------------------------- dequant


@pytest.mark.parametrize("fmt", cases.FORMATS)
def test_dequant_is_bit_equal(bench, fmt):
    for seed, (n, k) in enumerate(((1, 1), (17, 33), (33, 100), (5, 700), (18, 1104))):  # the last: rows of whole runs of 16 bytes, more than a block takes
        q = cases.random_qtensor(fmt, n, k, seed)
        p, w = bench.pack(q), q.dequantize()
        for dtype in (torch.float32, *HALVES):
            assert torch.equal(bench.dequantize(p, dtype), w.to(dtype)), (n, k, dtype)


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: layout.name)
def test_dequant_of_layouts_is_bit_equal(bench, layout):
    q = layout.make(7)
    p, w = bench.pack(q), q.dequantize()
    assert np.allclose(w.numpy(), reference.dequantize(q), rtol=2e-7, atol=1e-30)  # the formulas of the document, without any of our tensors
    for dtype in (torch.float32, *HALVES):
        assert torch.equal(bench.dequantize(p, dtype), w.to(dtype)), dtype


# ------------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("path", ("scalar", "mv", "mm"))
@pytest.mark.parametrize("fmt", cases.FORMATS)
def test_identity_gives_the_weights(bench, fmt, path):
    n, k = 19, 84
    q = cases.random_qtensor(fmt, n, k, 3)
    p = bench.pack(q)
    w = (q.dequantize().double() if path == "scalar" else as_multiplied(q)).float()
    rows = 13 if path == "mv" else k
    for dtype in HALVES if path != "scalar" else (torch.float32,):
        eye = torch.eye(k, dtype=dtype)
        for first in range(0, k, rows):
            x = eye[first : first + rows]
            for y_dtype in (dtype, torch.float32):
                (y,) = bench.linear(x, [(p, None)], y_dtype, path)
                assert torch.equal(y, w[:, first : first + rows].T.to(y_dtype)), (dtype, y_dtype, first)


def whole_numbers(fmt: str, n: int, k: int) -> QTensor:
    """A weight of the format whose scales, zeros and table entries make every product a whole number times 2^-4."""
    q = cases.random_qtensor(fmt, n, k, 11)
    g = torch.Generator().manual_seed(12)
    for r in q.rectangles:
        for name, t in r.tensors.items():
            if name == "scales":
                t.copy_(2.0 ** torch.randint(-4, 1, t.shape, generator=g))
            elif name in ("table", "values") or (name == "zeros" and t.is_floating_point()):
                t.copy_(torch.randint(-8, 8, t.shape, generator=g) / 4)
    return q


@pytest.mark.parametrize("path", ("mv", "mm"))
@pytest.mark.parametrize("fmt", [f for f in KERNELS if not f.startswith("nf4")])
def test_whole_numbers_are_exact(bench, fmt, path):
    n, k, m = 21, 530, 11
    q = whole_numbers(fmt, n, k)
    p = bench.pack(q)
    x = torch.randint(-8, 9, (m, k), generator=torch.Generator().manual_seed(13))
    expected = x.double() @ q.dequantize().double().T
    for dtype in HALVES:
        (y,) = bench.linear(x.to(dtype), [(p, None)], torch.float32, path)
        assert torch.equal(y.double(), expected), dtype


@pytest.mark.parametrize("bits", UNIFORM_BITS[1:])
def test_every_code_and_zero_point(bench, bits):
    """Each code with each integer zero point, in both rows of a lane and in each place among its words: q - z. mv decodes as mm does."""
    count = 1 << bits
    rows = torch.arange(max(2 * count, 16))
    zeros = (rows // 16 * 8 + rows % 8) % count
    for shift in (32 * i + j for i in range(max(count // 32, 1)) for j in range(8)):
        codes = ((torch.arange(64) + shift) % count).expand(len(rows), 64)  # the four lanes of a row have codes 8 apart
        p = bench.pack(QTensor.from_codes(f"w{bits}_asym", codes, scales=torch.ones(len(rows), 1), zeros=zeros[:, None]))
        (y,) = bench.linear(torch.eye(64).half(), [(p, None)], torch.float32, "mm")
        assert torch.equal(y.T, (codes - zeros[:, None]).float()), shift


def test_both_codes_of_one_bit_in_every_place(bench):
    """The bits of the place's own number, one after another and inverted, so that no two places are alike; each row with a scale and a zero of its own."""
    places, rows = torch.arange(16 * 64).view(16, 64), torch.arange(16.0)[:, None]
    scales, zeros = 2.0 ** (rows % 5 - 2), rows / 4 - 1.75
    for b in range(10):
        for inverted in (0, 1):
            codes = places >> b & 1 ^ inverted
            p = bench.pack(QTensor.from_codes("w1_fz", codes, scales=scales, zeros=zeros))
            (y,) = bench.linear(torch.eye(64).half(), [(p, None)], torch.float32, "mm")
            assert torch.equal(y.T, scales * codes + zeros), (b, inverted)


# ------------------------------------------------------------------------------------------------------------------ random


@pytest.mark.parametrize("fmt", cases.FORMATS)
def test_mv_every_format(bench, fmt):
    """All rows from 1 to 17 (17 is mm's), both types, with bias and without, over the formats in turn."""
    index = cases.FORMATS.index(fmt)
    for i, (n, k) in enumerate(((17, 33), (33, 700))):
        q = cases.random_qtensor(fmt, n, k, index)
        p, w = bench.pack(q), as_multiplied(q)
        for j in range(4):
            m, dtype = 1 + (5 * index + 4 * i + j) % 16, HALVES[(index + j) % 2]
            x = cases.random_x(m, k, dtype, seed=m)
            bias = torch.randn(n, generator=torch.Generator().manual_seed(m)).to((torch.float32, *HALVES)[j % 3]) if j % 2 else None
            expected = x.double() @ w.T + (0 if bias is None else bias.double())
            for y_dtype in (dtype, torch.float32):
                (y,) = bench.linear(x, [(p, bias)], y_dtype, "mv")
                assert error(y, expected) <= sums_bound(q, y_dtype), (n, k, m, dtype, y_dtype)


@pytest.mark.parametrize("m", range(1, 18))
def test_every_number_of_rows(bench, m):
    for fmt in ("w4g64_asym", "lut3", "w2g32_fz"):
        q = cases.random_qtensor(fmt, 20, 200, m)
        p, w = bench.pack(q), as_multiplied(q)
        for dtype in HALVES:
            x = cases.random_x(m, 200, dtype, seed=m)
            (y,) = bench.linear(x, [(p, None)], torch.float32)  # the path that is chosen: mv up to 16, then mm
            assert error(y, x.double() @ w.T) <= 1e-5, (fmt, dtype)


@pytest.mark.parametrize("fmt", cases.FORMATS)
def test_mm_every_format(bench, fmt):
    index = cases.FORMATS.index(fmt)
    n, k = ((17, 33), (70, 330), (33, 580))[index % 3]
    q = cases.random_qtensor(fmt, n, k, index)
    p, w = bench.pack(q), as_multiplied(q)
    for m, dtype, y_dtype in ((17 + index % 16, torch.float16, torch.float16), (33 + index % 37, torch.bfloat16, torch.float32)):  # 32, 64 and more in a block
        x, bias = cases.random_x(m, k, dtype, seed=m), torch.randn(n, generator=torch.Generator().manual_seed(m))
        (y,) = bench.linear(x, [(p, bias)], y_dtype, "mm")
        assert error(y, x.double() @ w.T + bias.double()) <= sums_bound(q, y_dtype), (n, k, m, dtype)


@pytest.mark.parametrize("fmt", KERNELS)
def test_scalar(bench, fmt):
    q = cases.random_qtensor(fmt, 18, 150, 1)
    p, w = bench.pack(q), q.dequantize().double()
    for dtype in (torch.float32, *HALVES):
        x, bias = cases.random_x(3, 150, dtype), torch.randn(18, generator=torch.Generator().manual_seed(0)).to(dtype)
        for y_dtype in (dtype, torch.float32):
            (y,) = bench.linear(x, [(p, bias)], y_dtype, "scalar")
            assert error(y, x.double() @ w.T + bias.double()) <= sums_bound(q, y_dtype), (dtype, y_dtype)


def test_big_is_dequant_and_a_product_of_torch(bench):
    q = cases.random_qtensor("w4g64", 24, 96)
    p, w = bench.pack(q), q.dequantize()
    x = cases.random_x(300, 96, torch.bfloat16)
    (y,) = bench.linear(x, [(p, None)])
    assert error(y, x.double() @ w.double().T) <= BOUND[torch.bfloat16] and bench.runtime.explain(x, [(p, None)])[0].startswith("big_")


@pytest.mark.parametrize("layout", (cases.Layout("plain", (50, 100), ((0, 50, 0, 100, "w4g32"),)), *cases.LAYOUTS), ids=lambda layout: layout.name)
@pytest.mark.parametrize("rows", (16, 32, 1000))
def test_big_holds_only_a_piece_of_the_weight(bench, monkeypatch, layout, rows):
    """Pieces of 16 and 32 stored rows, across bands and under every permutation, and all at once. The product must not depend on them but by rounding."""
    q = layout.make(1)
    p, (n, k) = bench.pack(q), q.shape
    monkeypatch.setattr(cuda, "BIG_BYTES", rows * k * 4)
    pieces, dequantize = [], bench.runtime.library.dequantize
    monkeypatch.setattr(bench.runtime, "library", SimpleNamespace(**{name: getattr(bench.runtime.library, name) for name in ("explain", "error_text")},
                                                                  dequantize=lambda *a: pieces.append(a[4:6]) or dequantize(*a)))
    for m, bias in ((3, None), (2, torch.randn(n, generator=torch.Generator().manual_seed(2)))):
        x = cases.random_x(m, k, torch.float32, seed=m)
        (y,) = bench.linear(x, [(p, bias)], path="big")
        assert error(y, x.double() @ q.dequantize().double().T + (0 if bias is None else bias.double())) <= 1e-5
    assert pieces == 2 * [(begin, min(rows, n - begin)) for begin in range(0, n, rows)]


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: layout.name)
def test_rows_by_id_are_bit_equal(bench, layout):
    q = layout.make(9)
    p, w, n = bench.pack(q), q.dequantize(), q.shape[0]
    ids = torch.randint(0, n, (7,), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, *HALVES):
        assert torch.equal(bench.embedding(ids, p, dtype), w[ids].to(dtype)), dtype
    outside = bench.embedding(torch.tensor([-1, n, 0]), p, torch.float32)
    assert outside[:2].isnan().all() and torch.equal(outside[2], w[0])


@pytest.mark.parametrize("fmt", KERNELS)
def test_rows_by_id_of_every_format(bench, fmt):
    q = cases.random_qtensor(fmt, 18, 300, 4)
    ids = torch.tensor([17, 0, 5, 5])
    assert torch.equal(bench.embedding(ids, bench.pack(q), torch.float32), q.dequantize()[ids])


# ----------------------------------------------------------------------------------------------- layouts, parts and splits


@pytest.mark.parametrize("forced", ({}, {"splits": 2, "warps": 2, "blocks": 2, "batch": 1}, {"splits": 3, "warps": 8, "blocks": 1, "batch": 2},
                                    {"warps": 1, "blocks": 1, "batch": 3}),
                         ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "chosen")
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_in_one_launch(bench, layout, forced):
    q = layout.make(3)
    p, w, (n, k) = bench.pack(q), as_multiplied(q), q.shape
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1))
    for m, dtype in ((1, torch.float16), (7, torch.bfloat16), (13, torch.float16), (19, torch.bfloat16), (33, torch.float16)):
        path = "mv" if m <= 16 else "mm"
        x = cases.random_x(m, k, dtype, seed=m)
        use = forced if path == "mv" else {k: v for k, v in forced.items() if k == "splits"}
        (y,) = bench.linear(x, [(p, bias)], torch.float32, path, **use)
        assert error(y, x.double() @ w.T + bias.double()) <= 1e-5, (path, m, dtype)
    x = cases.random_x(2, k, torch.float32)
    (y,) = bench.linear(x, [(p, bias)], path="scalar")
    assert error(y, x.double() @ q.dequantize().double().T + bias.double()) <= 1e-5


@pytest.mark.parametrize("path, m", (("scalar", 2), ("mv", 5), ("mm", 18)))
def test_several_weights_read_one_x(bench, path, m):
    """q, k and v of different widths; in the second set the first is cut into bands, in the third each reads x in an order of its own."""
    k = 130
    for names in (("w2g64", "lut3", "w4g32_asym"), ("bands", "w8", "nf4"), ("columns", "columns", "w3g64_fz")):
        qs = []
        for i, name in enumerate(names):
            rects = {"bands": ((0, 20, 0, k, "w3"), (20, 37, 0, k, "w8g32")), "columns": ((0, 37, 0, 64, "w4g64"), (0, 37, 64, k, "fp16"))}.get(name)
            qs.append(cases.Layout(name, (37, k), rects, cols=name == "columns", sparse=9).make(i) if rects else cases.random_qtensor(name, 16 * i + 9, k, i))
        x = cases.random_x(m, k, torch.bfloat16)
        ys = bench.linear(x, [(bench.pack(q), None) for q in qs], torch.float32, path)
        for q, y in zip(qs, ys, strict=True):
            w = q.dequantize().double() if path == "scalar" else as_multiplied(q)
            assert error(y, x.double() @ w.T) <= 1e-5, q.format_name


def test_more_parts_and_pieces_than_one_launch_holds(bench):
    """12 bands, then 9 bands of 3 pieces: several launches, one result."""
    bands = cases.Layout("bands", (40, 70), tuple((a, b, 0, 70, ("w2", "w4g32", "lut2")[i % 3])
                                                  for i, (a, b) in enumerate(zip(range(0, 40, 3), [*range(3, 40, 3), 40], strict=True))), rows=True)
    tiles = tuple((4 * i, 4 * i + 4, 64 * j, 64 * j + 64, ("w4g64", "w8", "fp16")[(i + j) % 3]) for i in range(9) for j in range(3))
    grid = cases.Layout("grid", (36, 192), tiles, cols=True, sparse=30)
    for layout in (bands, grid):
        q = layout.make()
        p = bench.pack(q)
        for path, m in (("mv", 3), ("mm", 17)):
            x = cases.random_x(m, q.shape[1], torch.float16)
            (y,) = bench.linear(x, [(p, None)], torch.float32, path)
            assert error(y, x.double() @ as_multiplied(q).T) <= 1e-5, (layout.name, path)


def test_more_pieces_than_a_launch_holds_are_left_to_scalar(bench):
    q = cases.Layout("stripes", (5, 100), tuple((0, 5, 4 * i, 4 * i + 4, "w4g32") for i in range(25))).make()
    p = bench.pack(q)
    x = cases.random_x(2, 100, torch.float16)
    with pytest.raises(NativeError, match="at most 24 rectangles side by side, this weight has 25"):
        bench.linear(x, [(p, None)], path="mv")
    (y,) = bench.linear(x, [(p, None)], torch.float32)
    assert error(y, x.double() @ q.dequantize().double().T) <= 1e-5 and bench.runtime.explain(x, [(p, None)])[0].startswith("scalar_")


@pytest.mark.parametrize("m", (0, 1, 16, 40, 200))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_weights_without_rows_or_columns(bench, m, dtype):
    """Alone, and beside one that has both; where there are no columns the bias is what is left."""
    no_rows, no_columns, whole = QTensor((0, 64), []), QTensor((3, 0), []), cases.random_qtensor("w4g64", 18, 64)
    x, bias = cases.random_x(m, 64, dtype), torch.randn(3)
    (y,) = bench.linear(x, [(bench.pack(no_rows), None)])
    assert y.shape == (m, 0)
    y, other = bench.linear(x, [(bench.pack(no_rows), None), (bench.pack(whole), None)], torch.float32)
    assert y.shape == (m, 0) and error(other, x.double() @ whole.dequantize().double().T) <= (1e-3 if m > 128 and dtype == torch.float16 else 1e-5)
    p = bench.pack(no_columns)
    for b, expected in ((None, torch.zeros(3)), (bias, bias)):
        assert torch.equal(bench.linear(x[:, :0], [(p, b)], torch.float32)[0], expected.expand(m, 3))
    assert bench.dequantize(bench.pack(no_rows), torch.float16).shape == (0, 64) and bench.dequantize(p, torch.float16).shape == (3, 0)


def test_mm_reads_x_itself_where_it_can(bench):
    """fp16 in the order of the weight and in rows of whole 16 bytes is not staged: the same bits as from rows that are not aligned, which are."""
    grid = cases.Layout("grid", (40, 448), ((0, 40, 0, 64, "w4g64"), (0, 40, 64, 256, "w8"), (0, 40, 256, 448, "lut3")))
    for q in (cases.random_qtensor("w4g64_asym", 70, 576), grid.make()):
        p, k = bench.pack(q), q.shape[1]
        wide = cases.random_x(40, k + 16, torch.float16)
        aligned, shifted = torch.zeros(40, k + 64, dtype=torch.float16), torch.zeros(40, k + 67, dtype=torch.float16)
        aligned[:, 8 : 8 + k], shifted[:, 3 : 3 + k] = wide[:, :k], wide[:, :k]
        for m in (19, 40):
            views = aligned[:m, 8 : 8 + k], shifted[:m, 3 : 3 + k]
            ys = [bench.linear(x, [(p, None)], torch.float32, "mm")[0] for x in views]
            assert torch.equal(*ys) and error(ys[0], views[0].double() @ as_multiplied(q).T) <= 1e-5


def test_strides_offsets_and_empty_inputs(bench):
    q = cases.random_qtensor("w4g64", 20, 70)
    p, w = bench.pack(q), q.dequantize().double()
    wide = cases.random_x(9, 100, torch.float16)
    for x in (wide[:, 3:73], wide[1::2, 16:86], wide[:0, :70]):  # not aligned, every second row, none
        (y,) = bench.linear(x, [(p, None)], torch.float32)
        assert y.shape == (x.shape[0], 20) and (not y.numel() or error(y, x.double() @ w.T) <= 1e-5)


# ------------------------------------------------------------------------------------------------------------ odd numbers


@pytest.mark.parametrize("path", ("mv", "mm"))
def test_bf16_rows_of_any_size(bench, path):
    """Rows of x around 2^-130, 2^-40, 1 and 2^100 in one call: each has a power of two of its own. A row of zeros gives zeros."""
    q = cases.random_qtensor("w4g64", 16, 128)
    p, w = bench.pack(q), q.dequantize().double()
    x = cases.random_x(6, 128, torch.float32) * torch.tensor([2.0**-124, 2.0**-40, 1, 2.0**100, 0, 2.0**-10])[:, None]
    x = x.to(torch.bfloat16)
    (y,) = bench.linear(x, [(p, None)], torch.float32, path)
    for i in range(6):
        assert error(y[i] * 2.0 ** (20 if i == 0 else 0), x[i].double() @ w.T * 2.0 ** (20 if i == 0 else 0)) <= 1e-5, i


@pytest.mark.parametrize("path", ("scalar", "mv", "mm"))
def test_not_finite_inputs_show(bench, path):
    q = cases.random_qtensor("w4g64", 16, 128)
    p = bench.pack(q)
    for dtype in HALVES:
        for bad in (float("nan"), float("inf")):
            x = cases.random_x(3, 128, dtype)
            x[1, 77] = bad
            (y,) = bench.linear(x, [(p, None)], torch.float32, path)
            assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any(), (dtype, bad)


def test_large_sums_need_float32(bench):
    """Sums far beyond fp16's range, in the middle and in the end: they come out in float32, and as infinities in fp16."""
    k = 1024
    fmt = Format.parse("w8")
    codes = torch.full((16, k), 255, dtype=torch.uint8)
    q = QTensor((16, k), [Rectangle(0, 16, 0, k, fmt, {"codes": codes, "scales": torch.full((16, 1), 4.0).half()})])
    x = torch.full((2, k), 100.0, dtype=torch.float16)
    p = bench.pack(q)
    for path in ("mv", "mm"):
        assert bench.linear(x, [(p, None)], torch.float32, path)[0].eq(127 * 4 * 100.0 * k).all()
        assert bench.linear(x, [(p, None)], torch.float16, path)[0].isinf().all()


# ------------------------------------------------------------------------------------------------ the same bits, always


def test_splits_and_runs_give_the_same_bits(bench):
    q = cases.random_qtensor("w3g64", 40, 1030)
    p, x = bench.pack(q), cases.random_x(4, 1030, torch.bfloat16)
    for path, forced in (("mv", {}), ("mv", {"splits": 3, "blocks": 1}), ("mm", {"splits": 2})):
        first, second = (bench.linear(x, [(p, None)], torch.float32, path, **forced)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_rows_do_not_see_each_other(bench):
    """A row's result does not depend on the rows beside it, as long as the same kernel configuration computes it."""
    q = cases.random_qtensor("w4g64", 20, 200)
    p, x = bench.pack(q), cases.random_x(8, 200, torch.float16)
    (all_rows,) = bench.linear(x, [(p, None)], torch.float32, "mv")
    for i in range(8):
        assert torch.equal(bench.linear(x[i : i + 1], [(p, None)], torch.float32, "mv")[0][0], all_rows[i])

"""The linear and embedding kernels: every format, shape, type and CPU target against the plain loops, and those against the document."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import poison_memory
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mxq_ext import _native, ops, reference
from mxq_ext.qtensor import QTensor
from mxq_ext.testing import cases, numeric

TARGETS = ops.targets()
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch, ops)


def formats_of(q: QTensor) -> list[str]:
    return [r.format.name for r in q.rectangles]


# ---------------------------------------------------------------------------------------------------- kernels against the twin


@pytest.mark.parametrize("name", cases.FORMATS)
def test_every_format_and_shape_against_float64(name, target):
    """All results of a format are one vector: alone, the few outputs of the smallest shapes may cancel to almost nothing."""
    results, exact = [], []
    for i, (n, k) in enumerate(cases.SHAPES):
        q = cases.random_qtensor(name, n, k, seed=i)
        p, w = ops.prepack(q), q.dequantize().double()
        bias = torch.randn(n)
        for m in cases.ROWS if i in (5, 7) else (1, 2, 5, 8, 9, 17, 29):
            x = cases.random_x(m, k, seed=m)
            results.append(ops.linear(x, p, bias).flatten())
            exact.append((x.double() @ w.T + bias.double()).flatten())
            assert n * m == 1 or numeric.error(results[-1], exact[-1]) < 1e-3, (n, k, m)
    numeric.check(torch.cat(results), torch.cat(exact), numeric.bound(name, torch.float32), f"{name} {target}")


@pytest.mark.parametrize("name", cases.FORMATS)
def test_identity_gives_the_weights_bit_for_bit(name, target):
    """Each row of x is one-hot, so that nothing is added up: whatever the blocks and the path, no bit may differ."""
    for i, (n, k) in enumerate(cases.SHAPES):
        q = cases.random_qtensor(name, n, k, seed=50 + i)
        p, w = ops.prepack(q), q.dequantize()
        eye = torch.eye(k)
        assert torch.equal(ops.linear(eye, p), w.T), (n, k)
        for m in (1, 2, 3, 4, 7, 8, 9, 13, 18, 23):
            rows = torch.randperm(k)[:m]
            assert torch.equal(ops.linear(eye[rows], p), w.T[rows]), (n, k, m)


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda v: v.name)
def test_layouts(layout, target):
    q = layout.make(seed=3)
    n, k = q.shape
    p, w = ops.prepack(q), q.dequantize()
    assert torch.equal(ops.linear(torch.eye(k), p), w.T)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for m in cases.ROWS:
        assert torch.equal(ops.linear(torch.eye(k)[:m], p), w.T[:m])
        x = cases.random_x(m, k)
        exact = x.double() @ w.double().T + bias.double()
        limit = numeric.bound(formats_of(q), x.dtype) * (8 if n == 1 else 1)  # few outputs may cancel
        numeric.check(ops.linear(x, p, bias), exact, limit, f"{layout.name} m={m} {target}")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["w2g32_fz", "w3g64_asym", "w4g64_bf16", "w8", "nf4g64", "lut3", "fp16"])
def test_types_against_the_twin(name, dtype, target):
    q = cases.random_qtensor(name, 33, 577)
    p = ops.prepack(q)
    for m in (1, 3, 8, 12, 19, 33):
        x = cases.random_x(m, 577, dtype)
        for bias in (None, torch.randn(33), torch.randn(33).to(dtype)):
            y, ref = ops.linear(x, p, bias), ops.linear_ref(x, p, bias)
            assert y.dtype == ref.dtype == dtype
            # Both round to dtype: values that lie near a border may go different ways.
            numeric.check(y, ref, 2 * numeric.bound(name, dtype), f"{name} {dtype} m={m} {target}")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_identity_rounds_like_torch(dtype, target):
    q = cases.random_qtensor("w4g32_fz", 40, 70)
    want = q.dequantize().T.to(dtype)
    assert torch.equal(ops.linear(torch.eye(70, dtype=dtype), ops.prepack(q)), want)
    assert torch.equal(ops.linear(torch.eye(70, dtype=dtype)[:5], ops.prepack(q)), want[:5])


def test_rounding_of_outputs_at_every_border(target):
    """fp16 and bf16 results from subnormal to overflow, infinities and NaN, through a 1 x 1 weight of one."""
    p = ops.prepack(QTensor.from_float(torch.ones(16, 1)))
    bits = torch.cat([torch.arange(0, 1 << 32, 104729, dtype=torch.int64), (torch.arange(-40, 40)[:, None] * 4096 + torch.arange(-2, 3)).flatten() + 0x38800000,
                      torch.arange(0x477FE000, 0x47800010, 37), torch.tensor([0x7F800000, 0xFF800000, 0x7FC00000, 0x33000000, 0x33000001, 0x7F7FFFFF])])
    for dtype in (torch.float16, torch.bfloat16):
        # x is float32 and y must be dtype: kernels give y x's type, so the value comes in as the bias.
        values = (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)
        values = torch.nn.functional.pad(values, (0, -len(values) % 16)).reshape(-1, 16)
        y = torch.stack([ops.linear(torch.zeros(1, 1, dtype=dtype), p, v)[0] for v in values[:400]] + [
            ops.linear(torch.zeros(1, 1, dtype=dtype), p, v)[0] for v in values[-60:]])
        want = torch.cat([values[:400], values[-60:]]).to(dtype)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(0.5), want.nan_to_num(0.5))


def test_large_m_takes_several_passes(target):
    """More rows than one pass holds, on a weight of two bands with a ragged last tile."""
    q = cases.LAYOUTS[0].make()
    p, w = ops.prepack(q), q.dequantize().double()
    x = cases.random_x(1100, 100)
    numeric.check(ops.linear(x, p), x.double() @ w.T, numeric.bound(formats_of(q), torch.float32), f"m=1100 {target}")
    assert torch.equal(ops.linear(x, p)[600:700], ops.linear(x, p)[600:700])


# ------------------------------------------------------------------------------------------------------ integer activations

#: Formats whose results do not depend on how many rows of x there are: both kernels round in the same places.
ROW_LANES = [f for f in cases.FORMATS if not f.startswith(("lut", "fp16"))]


@pytest.mark.parametrize("name", cases.FORMATS)
def test_a8_of_every_format_and_shape_against_the_twin(name, target):
    results, twin = [], []
    for i, (n, k) in enumerate(cases.SHAPES):
        q = cases.random_qtensor(name, n, k, seed=i)
        p, bias = ops.prepack(q), torch.randn(n)
        for m in cases.ROWS if i in (5, 7) else (1, 2, 5, 8, 9, 17, 29):
            x = cases.random_x(m, k, seed=m)
            results.append(ops.linear(x, p, bias, "a8").flatten())
            twin.append(ops.linear_ref(x, q, bias, "a8").flatten())
    numeric.check(torch.cat(results), torch.cat(twin), numeric.bound(name, torch.float32), f"{name} a8 {target}")


@pytest.mark.parametrize("k", (65536, 65538))
def test_sparse_columns_on_both_sides_of_16_bits(k, target):
    """Columns of the sparse part are stored in 16 bits up to a width of 65536, in 32 beyond; the last column counts."""
    q = cases.Layout("wide", (19, k), ((0, 19, 0, k, "w2g128"),), sparse=900).make()
    q.sparse.cols[0], q.sparse.cols[-1] = 0, k - 1
    p, w = ops.prepack(q), q.dequantize().double()
    for m in (1, 3, 18):
        x = cases.random_x(m, k, seed=m)
        numeric.check(ops.linear(x, p), x.double() @ w.T, 1e-5, f"{k} {m} {target}")  # sums of 65536 products in float32
    last = torch.zeros(1, k)
    last[0, -1] = 1
    assert torch.equal(ops.linear(last, p)[0], q.dequantize()[:, -1])


@pytest.mark.parametrize("name", [f for f in ROW_LANES if not f.startswith("nf4") and "_fz" not in f])
def test_a8_identity_gives_the_weights(name, target):
    """One-hot rows of 127 are their own int8 codes with a unit of 1: the scales times whole numbers come out to the last bit."""
    for i, (n, k) in enumerate(cases.SHAPES):
        q = cases.random_qtensor(name, n, k, seed=90 + i)
        p, w = ops.prepack(q), q.dequantize()
        eye = torch.eye(k) * 127
        for rows in (eye, eye[torch.randperm(k)[:1]], eye[:7]):
            assert torch.equal(ops.linear(rows, p, None, "a8"), (rows @ w.T)), (n, k, len(rows))


@pytest.mark.parametrize("name", ROW_LANES)
def test_a8_rows_do_not_depend_on_their_neighbours(name, target):
    q = cases.random_qtensor(name, 70, 300)
    p, x = ops.prepack(q), cases.random_x(33, 300)
    whole = ops.linear(x, p, None, "a8")
    for m in (1, 2, 3, 4, 5, 8, 9, 16):
        assert torch.equal(ops.linear(x[3 : 3 + m], p, None, "a8"), whole[3 : 3 + m]), m


@pytest.mark.parametrize("name", ROW_LANES)
def test_a8_is_the_same_on_every_target(name):
    """Integer sums are exact, and each group is added by one fused operation wherever there is one; the scalar target rounds twice."""
    q = cases.random_qtensor(name, 50, 200)
    p, before, results = ops.prepack(q), ops.target(), {}
    for t in TARGETS:
        ops.set_target(t)
        results[t] = [ops.linear(cases.random_x(m, 200), p, None, "a8") for m in (1, 3, 20)]
    ops.set_target(before)
    fast = [results[t] for t in TARGETS if t != "scalar"]
    for other in fast[1:]:
        assert all(torch.equal(a, b) for a, b in zip(fast[0], other, strict=True))
    for a, b in zip(results["scalar"], results[TARGETS[-1]], strict=True):
        numeric.check(a, b, numeric.bound(name, torch.float32), name)


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda v: v.name)
def test_a8_of_layouts_against_the_twin(layout, target):
    """Mixed rectangles: int8 and float kernels add to the same outputs; fp16 parts and the sparse part see x unrounded."""
    q = layout.make(seed=3)
    n, k = q.shape
    p = ops.prepack(q)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1))
    for m in cases.ROWS:
        for dtype in cases.DTYPES:
            x = cases.random_x(m, k, dtype)
            limit = numeric.bound(formats_of(q), dtype) * (2 if dtype != torch.float32 else 8 if n == 1 else 1)
            numeric.check(ops.linear(x, p, bias, "a8"), ops.linear_ref(x, q, bias, "a8"), limit, f"{layout.name} a8 m={m} {target}")


@pytest.mark.parametrize("name", ["w2g32_asym", "w3_fz", "w4g64", "w8", "w8g128_fz_bf16", "nf4g64", "nf4", "lut2", "lut3", "lut4", "fp16"])
def test_a8_twin_against_the_document(name):
    q = cases.random_qtensor(name, 7, 150)
    for dtype in cases.DTYPES:
        x, bias = cases.random_x(3, 150, dtype), torch.randn(7)
        limit = 2.0**-22 + (0 if dtype == torch.float32 else numeric.ROUNDING[dtype])
        numeric.check(ops.linear_ref(x, q, bias, "a8"), reference.linear(x, q, bias, "a8"), limit, f"{name} {dtype}")


def test_a8_twin_of_layouts_against_the_document():
    for layout in cases.LAYOUTS:
        q = layout.make()
        x = cases.random_x(2, q.shape[1])
        numeric.check(ops.linear_ref(x, q, None, "a8"), reference.linear(x, q, None, "a8"), 2.0**-22, layout.name)


@pytest.mark.parametrize("name", ["w2g64", "w4g32_asym", "w8", "nf4g64", "lut4"])
def test_a8_accuracy_is_what_the_document_says(name):
    """Normal inputs with some outlying channels, M = 1 and 40: the rounding costs at most 2 % of the output's norm."""
    q = cases.random_qtensor(name, 64, 576)
    for m in (1, 40):
        x = cases.random_x(m, 576)
        e = numeric.error(ops.linear(x, ops.prepack(q), None, "a8"), ops.linear(x, ops.prepack(q)))
        assert 1e-4 < e < 2e-2, e


def test_a8_of_extreme_inputs(target):
    """Zero rows and rows below 2^-100 give the bias; infinities and NaN stay visible; the largest floats do not overflow on the way."""
    p = ops.prepack(cases.random_qtensor("w4g32", 20, 45))
    bias = torch.arange(20.0)
    for m in (1, 12):
        x = torch.zeros(m, 45)
        assert torch.equal(ops.linear(x, p, bias, "a8"), bias.expand(m, 20))
        assert torch.equal(ops.linear(x + 1e-38, p, bias, "a8"), bias.expand(m, 20))
        x = torch.ones(m, 45)
        x[0, 3] = float("inf")
        y = ops.linear(x, p, None, "a8")
        assert not y[0].isfinite().any() and y[1:].isfinite().all()
        x[0, 3], x[0, 4] = float("nan"), float("inf")
        assert not ops.linear(x, p, None, "a8")[0].isfinite().any()
        x[0] = 3e37
        numeric.check(ops.linear(x, p, None, "a8")[0], ops.linear_ref(x, p, None, "a8")[0], 1e-5, "large")


@pytest.mark.parametrize("name", ["w1g64_fz", "w3g64_asym", "w4g32", "w6", "w8", "nf4g64", "lut2", "lut4"])
def test_a8_of_a_group_that_is_not_finite(name, target):
    """Its codes are 0 and its unit is infinite or NaN, here and in the twin: no sum of codes beyond int32, of which anything may come, an infinity of either
    sign among others."""
    q = cases.random_qtensor(name, 20, 300)
    p = ops.prepack(q)
    for m in (1, 3, 12):
        x = cases.random_x(m, 300)
        x[0, 40], x[m - 1, 299] = float("inf"), -float("inf")
        y, want = ops.linear(x, p, None, "a8"), ops.linear_ref(x, q, None, "a8")
        assert y[[0, m - 1]].isnan().all() and torch.equal(y.isnan(), want.isnan())


def test_a8_does_not_depend_on_threads(target, threads):
    weights = [ops.prepack(q) for q in (cases.random_qtensor("w3g64_asym", 900, 700), cases.random_qtensor("lut4", 500, 1100), cases.LAYOUTS[4].make())]
    for p in weights:
        for m in (1, 3, 8, 9, 40, 600):
            x = cases.random_x(m, p.shape[1])
            threads(1)
            one = ops.linear(x, p, None, "a8")
            for t in (2, 5):
                threads(t)
                assert torch.equal(ops.linear(x, p, None, "a8"), one), (m, t)


# ------------------------------------------------------------------------------------------------------- the twin itself


@pytest.mark.parametrize("name", ["w2g32_asym", "w3_fz", "w4g64", "w8g128_fz_bf16", "nf4g64", "lut2", "lut3", "lut4", "fp16"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_twin_against_the_document(name, dtype):
    q = cases.random_qtensor(name, 7, 150)
    x, bias = cases.random_x(3, 150, dtype), torch.randn(7)
    limit = 2.0**-23 + (0 if dtype == torch.float32 else numeric.ROUNDING[dtype])
    numeric.check(ops.linear_ref(x, q, bias), reference.linear(x, q, bias), limit, f"{name} {dtype}")
    numeric.check(ops.linear_ref(x, ops.prepack(q)), reference.linear(x, q), limit, f"{name} {dtype} packed")


def test_twin_of_layouts_against_the_document():
    for layout in cases.LAYOUTS:
        q = layout.make()
        x = cases.random_x(2, q.shape[1])
        numeric.check(ops.linear_ref(x, q), reference.linear(x, q), 2.0**-22, layout.name)
        numeric.check(ops.dequantize_ref(q), reference.dequantize(q), 2.0**-23, layout.name)


# ------------------------------------------------------------------------------------------------------- shapes and strides


def test_input_shapes_and_strides(target):
    n, k = 20, 45
    q = cases.random_qtensor("w4g32", n, k)
    p, w = ops.prepack(q), q.dequantize()

    def near(y, x):
        assert y.shape == (*x.shape[:-1], n) and y.is_contiguous()
        assert numeric.error(y, x.double() @ w.double().T) < 1e-6

    wide = torch.randn(6, 2 * k)
    near(ops.linear(wide[:, :k], p), wide[:, :k])          # rows at a distance: read in place
    near(ops.linear(wide[::2, k:], p), wide[::2, k:])
    near(ops.linear(wide[:, ::2], p), wide[:, ::2])        # columns at a distance: copied
    columns = torch.randn(k, 6).T
    near(ops.linear(columns, p), columns)
    near(ops.linear(wide[:1, :k].expand(5, k), p), wide[:1, :k].expand(5, k))
    near(ops.linear(wide[0, :k], p), wide[0, :k])          # one dimension
    cube = torch.randn(2, 3, k)
    near(ops.linear(cube, p), cube)
    near(ops.linear(cube.transpose(0, 1), p), cube.transpose(0, 1))
    strided_bias = torch.randn(2 * n)[::2]
    assert torch.equal(ops.linear(cube, p, strided_bias), ops.linear(cube, p, strided_bias.clone()))


def test_empty_inputs_and_weights(target):
    p = ops.prepack(cases.random_qtensor("w4g32", 20, 45))
    assert ops.linear(torch.empty(0, 45), p).shape == (0, 20)
    assert ops.linear(torch.empty(3, 0, 45), p).shape == (3, 0, 20)
    assert ops.embedding(torch.empty(0, dtype=torch.int64), p).shape == (0, 45)
    assert ops.linear(torch.randn(3, 5), ops.prepack(QTensor((0, 5), []))).shape == (3, 0)
    bias = torch.randn(4)
    nothing = ops.prepack(QTensor((4, 0), []))
    assert torch.equal(ops.linear(torch.empty(3, 0), nothing, bias), bias.expand(3, 4))
    assert torch.equal(ops.linear(torch.empty(30, 0), nothing), torch.zeros(30, 4))


def test_not_finite_values_stay_visible(target):
    p = ops.prepack(cases.random_qtensor("w4g32", 20, 45))
    x = torch.ones(2, 45)
    x[1, 3] = float("inf")
    y = ops.linear(x, p)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


# --------------------------------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_embedding(dtype):
    for q in (cases.random_qtensor("w4g64_asym", 50, 100), cases.random_qtensor("lut3", 50, 530), cases.LAYOUTS[4].make(), cases.LAYOUTS[0].make()):
        p, w = ops.prepack(q), q.dequantize().to(dtype)
        ids = torch.randint(0, q.shape[0], (2, 7))
        for i in (ids, ids.int(), ids.T, ids[0, 0]):
            assert torch.equal(ops.embedding(i, p, dtype), w[i.long()])
            assert torch.equal(ops.embedding_ref(i, p, dtype), w[i.long()])


# ----------------------------------------------------------------------------------------------------- threads and processes


def test_result_does_not_depend_on_threads(target, threads):
    weights = [ops.prepack(q) for q in (cases.random_qtensor("w3g64_asym", 900, 700), cases.random_qtensor("lut4", 500, 1100), cases.LAYOUTS[4].make())]
    for p in weights:
        for m in (1, 3, 8, 9, 17, 40, 600):
            x = cases.random_x(m, p.shape[1])
            threads(1)
            one = ops.linear(x, p)
            for t in (2, 3, 5):
                threads(t)
                for _ in range(3):
                    assert torch.equal(ops.linear(x, p), one), (m, t)
    ids = torch.arange(900).repeat(2)
    threads(1)
    one = ops.embedding(ids, weights[0])
    threads(4)
    assert torch.equal(ops.embedding(ids, weights[0]), one)


def test_several_python_threads_at_once(threads):
    threads(2)
    p = ops.prepack(cases.random_qtensor("w4g64", 700, 600))
    inputs = [cases.random_x(m, 600, seed=m) for m in (1, 4, 17, 70)]
    want = [ops.linear(x, p) for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(60) if not torch.equal(ops.linear(inputs[i], p), want[i]))

    workers = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def _in_child(connection, p, x):
    torch.set_num_threads(3)
    connection.send_bytes(b"".join(ops.linear(x, p).numpy().tobytes() for _ in range(5)))


def test_fork_after_the_pool_was_used(threads):
    threads(3)
    p = ops.prepack(cases.random_qtensor("w4g64", 900, 600))
    x = cases.random_x(4, 600)
    want = ops.linear(x, p).numpy().tobytes()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(there, p, x))
    child.start()
    assert here.poll(30), "the forked child hangs"
    assert here.recv_bytes() == want * 5
    child.join()
    assert ops.linear(x, p).numpy().tobytes() == want


# ------------------------------------------------------------------------------------------------- torch.library and autograd


@pytest.fixture
def plain_memory(poisoned_memory, monkeypatch):
    """The tracers of torch look into tensors that they make: no poison for them."""
    monkeypatch.undo()


def test_opcheck(plain_memory):
    p = ops.prepack(cases.random_qtensor("w4g32_asym", 20, 45))
    for x, bias in ((torch.randn(3, 45), None), (torch.randn(2, 3, 45), torch.randn(20)), (torch.randn(45, dtype=torch.float32), None)):
        torch.library.opcheck(torch.ops.mxq_ext.linear, (x, p.blob, 20, bias))
    torch.library.opcheck(torch.ops.mxq_ext.linear, (torch.randn(3, 45, requires_grad=True), p.blob, 20, torch.randn(20, requires_grad=True)))
    torch.library.opcheck(torch.ops.mxq_ext.embedding, (torch.tensor([[3, 0], [19, 3]]), p.blob, 20, 45, torch.bfloat16))


class Layer(torch.nn.Module):
    def __init__(self, p, bias):
        super().__init__()
        self.packed, self.bias = p, bias

    def forward(self, ids):
        x = ops.embedding(ids, self.packed)
        return ops.linear(x, self.packed, self.bias).relu()


def test_compile_fullgraph(plain_memory):
    p = ops.prepack(cases.random_qtensor("w4g32", 45, 45))
    layer = Layer(p, torch.randn(45))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for ids in (torch.tensor([1, 4]), torch.tensor([[1, 4, 44], [0, 2, 3]])):
        assert torch.equal(compiled(ids), layer(ids))


def test_fake_agrees_with_real_and_meta_works(plain_memory):
    p = ops.prepack(cases.random_qtensor("w4g32", 20, 45))
    y = ops.linear(torch.empty(2, 3, 45, device="meta", dtype=torch.bfloat16), ops.Packed(p.blob.to("meta"), p.shape, p.format_name))
    assert y.is_meta and y.shape == (2, 3, 20) and y.dtype == torch.bfloat16
    e = ops.embedding(torch.empty(4, dtype=torch.int64, device="meta"), ops.Packed(p.blob.to("meta"), p.shape, p.format_name), torch.float16)
    assert e.is_meta and e.shape == (4, 45) and e.dtype == torch.float16


def test_fake_tensors_and_other_classes_go_through_the_registered_ops(plain_memory):
    """A FakeTensor says that it is on the CPU, and has no memory; a class of tensors may watch what is called with them."""
    p, seen = ops.prepack(cases.random_qtensor("w4g32", 20, 45)), []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    with FakeTensorMode(allow_non_fake_inputs=True):
        y, e = ops.linear(torch.empty(3, 45), p, torch.empty(20)), ops.embedding(torch.empty(4, dtype=torch.int64), p)
    assert (type(y), y.shape, type(e), e.shape) == (FakeTensor, (3, 20), FakeTensor, (4, 45))
    x = torch.randn(3, 45)
    assert torch.equal(ops.linear(x.as_subclass(Watching), p).as_subclass(torch.Tensor), ops.linear(x, p)) and "mxq_ext.linear" in seen


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", [torch.jit.trace, lambda f, x: make_fx(f)(x)], ids=["jit", "fx"])
def test_recorded_calls_compute(plain_memory, record):
    """Tracers see what torch is called with: of a direct call of native code only the allocation of its result."""
    p, ids = ops.prepack(cases.random_qtensor("w4g32", 20, 45)), torch.tensor([1, 4])
    linear, lookup = record(lambda x: ops.linear(x, p), torch.randn(3, 45)), record(lambda i: ops.embedding(i, p), ids)
    x = torch.randn(3, 45)
    assert torch.equal(linear(x), ops.linear(x, p)) and torch.equal(lookup(ids + 1), ops.embedding(ids + 1, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(plain_memory, dtype):
    q = cases.LAYOUTS[1].make()
    n, k = q.shape
    p = ops.prepack(q)
    x, bias = torch.randn(2, 5, k, dtype=dtype, requires_grad=True), torch.randn(n, requires_grad=True)
    dy = torch.randn(2, 5, n, dtype=dtype)
    ops.linear(x, p, bias).backward(dy)
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    numeric.check(x.grad, dy.double() @ q.dequantize().double(), limit, "dx")
    numeric.check(bias.grad, dy.double().sum((0, 1)), limit, "dbias")
    assert x.grad.dtype == dtype and bias.grad.dtype == torch.float32
    with torch.no_grad():
        assert not ops.linear(x, p, bias).requires_grad


# ---------------------------------------------------------------------------------------------------- choice of the kernel


def run(code: str, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MXQ_")} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_explain_names_the_kernel(target):
    p = ops.prepack(cases.random_qtensor("w4g64", 16, 64))
    assert ops.explain(p, 1, torch.float32) == ops.explain(p, 16) == f"gemv_w4g64_a16__{target}"
    assert ops.explain(p, 17, torch.bfloat16) == f"gemm_w4g64_a16__{target}"
    assert ops.explain(ops.prepack(cases.LAYOUTS[1].make()), 1) == f"gemv_w2g64+w4g32_fz+fp16_a16__{target}"
    half = ops.prepack(QTensor.from_float(torch.ones(4, 8)))
    assert ops.explain(half, 9, compute="a8") == ops.explain(half, 9) == f"gemv_fp16_a16__{target}"
    assert torch.equal(ops.linear(torch.ones(12, 8), half, None, "a8"), torch.full((12, 4), 8.0))
    many = "gemv" if target == "avx2" else "gemm"  # AVX2 unpacks codes anew for every 4 rows of x
    assert ops.explain(p, 8, compute="a8") == f"gemv_w4g64_a8__{target}" and ops.explain(p, 9, compute="a8") == f"{many}_w4g64_a8__{target}"
    lut = ops.prepack(cases.random_qtensor("lut4", 16, 64))
    assert ops.explain(lut, 8, compute="a8") == f"gemv_lut4_a8__{target}" and ops.explain(lut, 9, compute="a8") == f"{many}_lut4_a8__{target}"
    w8, first = ops.prepack(cases.random_qtensor("w8", 16, 64)), 3 if target == "avx512vnni" else 9  # only VNNI multiplies unsigned bytes
    assert ops.explain(w8, first - 1, compute="a8") == f"gemv_w8_a8__{target}" and ops.explain(w8, first, compute="a8") == f"{many}_w8_a8__{target}"


@pytest.mark.parametrize("fmt", ["w3g128", "w4g32", "w6g64", "w8", "nf4g64", "lut3"])
def test_more_rows_of_x_than_the_l2_cache_holds(target, fmt):
    # 40 rows of 8192 columns: gemv, where it serves so many rows, takes 8 blocks of 4 at a time. What a row gives does not depend on those beside it.
    p, x = ops.prepack(cases.random_qtensor(fmt, 37, 8192)), torch.randn(41, 8192, generator=torch.Generator().manual_seed(5))
    y = ops.linear(x, p, compute="a8")
    numeric.check(y, ops.linear_ref(x, p, compute="a8"), 1e-5, fmt)
    if target != "scalar" and fmt != "lut3":
        assert torch.equal(y[[0, 33, 40]], ops.linear(x[[0, 33, 40]], p, compute="a8"))


def test_targets_are_listed_slowest_first():
    assert TARGETS == [t for t in ("scalar", "avx2", "avx512", "avx512vnni") if t in TARGETS] and TARGETS[0] == "scalar"
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
    assert ("avx2" in TARGETS) == {"avx2", "fma", "f16c"}.issubset(flags)
    assert ("avx512" in TARGETS) == {"avx512f", "avx512dq", "avx512bw", "avx512vl"}.issubset(flags)


def test_the_environment_chooses_the_target_and_prints_the_kernel():
    code = ("import torch; from mxq_ext import ops; from mxq_ext.testing.cases import random_qtensor\n"
            "p = ops.prepack(random_qtensor('w3g32', 20, 40))\n"
            "for m in (1, 1, 17): ops.linear(torch.ones(m, 40), p)\n"
            "torch.ops.mxq_ext.linear(torch.ones(2, 40), p.blob, 20, None); print(ops.target())")
    done = run(code, MXQ_CPU_TARGET="scalar", MXQ_PRINT_CONFIG="1")
    assert done.stdout == "scalar\n", done.stderr
    assert done.stderr.splitlines() == [f"mxq_ext: linear M={m} N=20 K=40: {op}_w3g32_a16__scalar" for m, op in ((1, "gemv"), (17, "gemm"), (2, "gemv"))]
    done = run(code)
    assert done.stdout == f"{TARGETS[-1]}\n" and done.stderr == ""


def test_scalar_code_uses_no_newer_instructions():
    """The file for old CPUs must not contain what only new ones know, whatever was inlined or shared at link time."""
    from shutil import which

    if which("objdump") is None or "avx2" not in TARGETS:
        pytest.skip("needs objdump and an x86-64 build")
    text = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", _native.cpu.__file__], capture_output=True, text=True).stdout
    function, guilty = "", set()
    for line in text.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif ("%ymm" in line or "%zmm" in line or "\tv" in line) and not any(f"mxq::{t}::" in function for t in ("avx2", "avx512", "avx512vnni")):
            guilty.add(function)
    assert "mxq::scalar::" in text and not guilty, json.dumps(sorted(guilty)[:5])

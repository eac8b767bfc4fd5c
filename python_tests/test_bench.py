"""``mxq bench``: the random weights are valid, the kernel named is the one that runs, and the numbers are consistent."""

import pytest
import torch

from mxq_ext import bench, ops
from mxq_ext.errors import FormatError, ShapeError
from mxq_ext.formats import Format


@pytest.mark.parametrize("name", bench.FORMATS)
def test_random_qtensor(name):
    q = bench.random_qtensor(name, 16, 72)
    q.validate()
    w = q.dequantize()
    assert q.format_name == name and q.nbytes() == Format.parse(name).nbytes(16, 72)
    assert torch.isfinite(w).all() and w.std() > 0
    assert torch.equal(w, bench.random_qtensor(name, 16, 72).dequantize())


def test_linear_speed(monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "FLUSH_BYTES", 1 << 16)
    result = bench.linear_speed(["w4g64", "lut3"], n=96, k=128, rows=2)
    base, w4, lut = result["linear"]
    assert (base["format"], w4["format"], lut["format"]) == ("torch float32", "w4g64", "lut3")
    assert w4["kernel"] == ops.kernel_name("w4g64", 2)
    assert w4["stored_bits"] == 4.25
    for row in result["linear"]:
        assert row["us"] > 0 and row["speedup"] == pytest.approx(base["us"] / row["us"])
        assert row["gb_per_s"] == pytest.approx(row["stored_bits"] / 8 * 96 * 128 / row["us"] / 1e3)


def test_seconds_per_call_is_a_median_without_the_first_call(monkeypatch):
    clock = iter([0, 5, 10, 11, 20, 23])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    assert bench.seconds_per_call(lambda: calls.append(1), repeats=3) == 3
    assert len(calls) == 4


def test_mistakes():
    with pytest.raises(ShapeError, match="sizes must be at least 1"):
        bench.linear_speed(n=0)
    with pytest.raises(FormatError):
        bench.linear_speed(["w5"], n=8, k=8)

"""``mxq bench``: the kernel named is the one that runs, copies outgrow the caches, and the numbers are consistent."""

import pytest
import torch

from mxq_ext import bench, ops
from mxq_ext.errors import FormatError, ShapeError
from mxq_ext.testing import cases, timing


def test_linear_speed():
    result = bench.linear_speed(["w4g64", "lut3"], n=96, k=128, rows=2, rounds=1)
    base, w4, lut = result["linear"]
    assert (base["format"], w4["format"], lut["format"]) == (bench.FLOAT, "w4g64", "lut3")
    assert w4["kernel"] == ops.explain(ops.prepack(cases.random_qtensor("w4g64", 32, 64)), 2)
    assert (base["stored_bits"], w4["stored_bits"]) == (32, 4.25)
    for row in result["linear"]:
        assert row["us"] > 0 and row["speedup"] == pytest.approx(base["us"] / row["us"])
        assert row["gb_per_s"] == pytest.approx(row["stored_bits"] / 8 * 96 * 128 / row["us"] / 1e3)
    nested = bench.linear_speed(["w3g32_nest"], n=96, k=1024, rounds=1)["linear"][1]
    assert nested["stored_bits"] == 3.3125 and nested["gb_per_s"] == pytest.approx(4 / 8 * 96 * 1024 / nested["us"] / 1e3)  # read as w3g32_fz


def test_what_is_timed_is_the_linear(monkeypatch):
    """Every candidate multiplies the same x by its weight, and successive calls use different copies."""
    seen = {}
    monkeypatch.setattr(bench, "copies", lambda nbytes: 2)

    def one_call(layers, rounds):
        for name, layer in layers.items():
            seen[name] = layer(0), layer(1)
        return {name: timing.Times(1.0, 1.0, 1) for name in layers}

    monkeypatch.setattr(bench, "in_turns", one_call)
    bench.linear_speed(["w3g64_asym"], n=24, k=64, rows=3)
    expected = bench.random_x(3, 64) @ bench.random_qtensor("w3g64_asym", 24, 64).dequantize().T
    for y in seen["w3g64_asym"]:
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(*seen[bench.FLOAT]) and seen[bench.FLOAT][0].shape == (3, 24)


def test_mistakes():
    with pytest.raises(ShapeError, match="sizes must be at least 1"):
        bench.linear_speed(n=0)
    with pytest.raises(FormatError):
        bench.linear_speed(["w7"], n=8, k=8)

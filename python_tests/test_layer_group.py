"""Several linears in one parallel section: the bits of each alone, whatever their formats, on every instruction set."""

import pytest
import torch

from mxq_ext import _native, ops
from mxq_ext.testing.cases import random_qtensor, random_x


def group(x, packed, biases, computes, threads):
    """linear_group on poisoned outputs."""
    out = [torch.full((x.shape[0], p.shape[0]), float("nan"), dtype=x.dtype) for p in packed]
    items = [(p.blob.data_ptr(), 0 if b is None else b.data_ptr(), 0 if b is None else ops.TYPES[b.dtype], c == "a8", y.data_ptr())
             for p, b, c, y in zip(packed, biases, computes, out, strict=True)]
    _native.cpu.linear_group(items, x.data_ptr(), x.stride(0), ops.TYPES[x.dtype], x.shape[0], threads)
    return out


GROUPS = [("w4g32", "w4g32", "w4g32"), ("w4g64_asym", "w3g32_asym", "w8"), ("lut4", "fp16"), ("nf4g64", "w2g64_asym", "w4g64", "w4g64")]


@pytest.mark.parametrize("formats", GROUPS, ids="-".join)
@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_a_group_gives_the_bits_of_each_linear_alone(target, formats, rows):
    k, sizes = 300, (333, 77, 500, 16)
    packed = [ops.prepack(random_qtensor(f, n, k)) for f, n in zip(formats, sizes, strict=False)]
    for dtype in (torch.float32, torch.bfloat16):
        x = random_x(rows, k).to(dtype)
        biases = [None if i % 2 else torch.randn(p.shape[0]) for i, p in enumerate(packed)]
        for computes in (["a16"] * 4, ["a8"] * 4, ["a8", "a16", "a8", "a16"]):
            want = [ops.linear(x, p, b, c) for p, b, c in zip(packed, biases, computes, strict=False)]
            for threads in (1, 2, 5):
                for y, w in zip(group(x, packed, biases, computes[: len(packed)], threads), want, strict=True):
                    assert torch.equal(y, w)

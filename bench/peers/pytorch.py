"""torch's own layers: float ones, to which everything is compared, and its int8 and int4 kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from . import BF16, EXACT, Candidate, Case, eager


def references(case: Case) -> Iterator[Candidate]:
    """The float32 and the bfloat16 layer."""
    for name, dtype, limit in (("torch fp32", torch.float32, EXACT), ("torch bf16", torch.bfloat16, BF16)):
        w = case.weight.to(dtype)
        yield Candidate(name, 8 * w.itemsize, w.nbytes, limit, w[case.sample].float(), eager(w.clone, linear), dtype)


def candidates(case: Case) -> Iterator[Candidate]:
    """int8 of both engines as ``quantize_dynamic`` calls them, and int4 by the operator that its own int4 layers use."""
    n, k = case.n, case.k
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "deprecated in favour of torchao", whose eager int8 on CPUs takes 25 times as long
        q = torch.quantize_per_channel(case.weight, case.weight.abs().amax(1).double() / 127, torch.zeros(n, dtype=torch.long), 0, torch.qint8)
    for engine in ("fbgemm", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            # 7 bits and one scale for all of x, torch's default, cost up to 2.5 %
            yield Candidate(f"torch int8 dynamic {engine}", 8, n * k + 4 * n, 5e-2, q.dequantize()[case.sample], eager(
                lambda engine=engine: _prepack(q, engine), lambda x, w: torch.ops.quantized.linear_dynamic(x, w, True)))
    if case.group and n % 16 == 0:
        yield _int4(case, case.group)


def _prepack(q: torch.Tensor, engine: str):
    """The engine is chosen here for good: the packed weight knows it."""
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        return torch.ops.quantized.linear_prepack(q, None)
    finally:
        torch.backends.quantized.engine = before


def _int4(case: Case, group: int) -> Candidate:
    """W = (code - 8) scale + zero in bfloat16. With x in float32 the operator takes a slow path."""
    n, k = case.n, case.k
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.int32)
    scales = torch.rand(k // group, n, generator=g) * 0.01 + 0.001
    both = torch.stack([scales, torch.randn(k // group, n, generator=g) * 0.01], 2).to(torch.bfloat16)
    scale, zero = (t.T[case.sample].float().repeat_interleave(group, 1) for t in both.unbind(2))
    return Candidate(f"torch int4pack g{group}", 4, n * k // 2 + both.nbytes, BF16, (codes[case.sample] - 8) * scale + zero, eager(
        lambda: (torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), both.clone()),
        lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], group, w[1])), torch.bfloat16)

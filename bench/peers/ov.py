"""openvino's compressed matrix product: x is rounded to int8 in groups of 32 by default, except with nf4."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op

from mxq_ext.formats import NF4_LEVELS

from . import EXACT, INT8_X, Candidate, Case
from .grouped import Grouped


def candidates(case: Case) -> Iterator[Candidate]:
    for kind, bits in (("u8", 8), ("u4", 4), ("nf4", 4), ("u2", 2)) if case.group else ():
        w = Grouped(case, bits, np.float32(NF4_LEVELS) if kind == "nf4" else None)
        zeros = 0 if kind == "nf4" else w.scales.size * bits // 8
        yield Candidate(f"openvino {kind} g{w.group}", bits, w.codes.nbytes + w.scales.nbytes + zeros,
                        EXACT if kind == "nf4" else INT8_X, w.dense,
                        lambda x, count, threads, w=w, kind=kind: Graph(w, kind, x, count, threads))


class Graph:
    """One compiled model with a product for each copy. x has a fixed shape, which is up to a fifth faster than a free M."""

    def __init__(self, w: Grouped, kind: str, x: torch.Tensor, count: int, threads: int):
        self.count, self.keep = count, [x.numpy()]
        entry = op.parameter(list(x.shape), np.float32)
        results = [op.result(op.matmul(entry, self._weight(w, kind, i), False, True)) for i in range(count)]
        model = ov.Core().compile_model(ov.Model(results, [entry]), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False})
        self.request = model.create_infer_request()
        self.request.set_input_tensor(ov.Tensor(self.keep[0], shared_memory=True))

    def _constant(self, bytes_: np.ndarray, shape: list[int], kind: str):
        self.keep.append(bytes_)  # the constant may only point at numpy's memory
        return op.convert(op.constant(ov.Tensor(bytes_, ov.Shape(shape), getattr(ov.Type, kind))), np.float16)

    def _weight(self, w: Grouped, kind: str, number: int):
        """The pattern that the compiler keeps packed: ((codes - zeros) * scales), regrouped to [n, k]."""
        codes, scales = w.copy(number)
        groups = w.k // w.group
        f = self._constant(codes, [w.n, groups, w.group], kind)
        if kind != "nf4":
            byte = sum(w.middle << shift for shift in range(0, 8, w.bits))
            f = op.subtract(f, self._constant(np.full(-(-w.n * groups * w.bits // 8), byte, np.uint8), [w.n, groups, 1], kind))
        f = op.multiply(f, op.constant(scales[:, :, None]))
        return op.convert(op.reshape(f, np.array([w.n, w.k]), False), np.float32)

    def run(self) -> None:
        self.request.infer()

    def outputs(self) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(self.request.get_output_tensor(i).data) for i in range(self.count))

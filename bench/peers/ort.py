"""onnxruntime's MatMulNBits with accuracy_level 4 (x rounded to int8). Level 0, the default, is up to a hundred times slower."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from . import INT8_X, Candidate, Case
from .grouped import Grouped

onnxruntime.set_default_logger_severity(4)


def candidates(case: Case) -> Iterator[Candidate]:
    for bits in (8, 4, 2) if case.group else ():
        w = Grouped(case, bits)
        nbytes = w.codes.nbytes + 4 * w.scales.size  # float32 scales; the middle code is zero without being stored
        yield Candidate(f"onnxruntime {bits}b g{w.group}", bits, nbytes, INT8_X, w.dense, lambda x, count, threads, w=w: Graph(w, x, count, threads))


class Graph:
    """One session with a node for each copy."""

    def __init__(self, w: Grouped, x: torch.Tensor, count: int, threads: int):
        self.count, self.x = count, x.numpy()
        nodes, constants, results = [], [], []
        for i in range(count):
            codes, scales = w.copy(i)
            constants += [numpy_helper.from_array(codes.reshape(w.n, w.k // w.group, -1), f"w{i}"),
                          numpy_helper.from_array(scales.astype(np.float32), f"s{i}")]
            nodes.append(helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", K=w.k, N=w.n, bits=w.bits,
                                          block_size=w.group, accuracy_level=4))
            results.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [len(x), w.n]))
        graph = helper.make_graph(nodes, "copies", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))], results, constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)  # versions that every onnxruntime since 2024 reads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads stay in the way of whoever is timed next
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()  # spares the copies of x and y that run() makes
        self.binding.bind_cpu_input("x", self.x)
        self.y = [np.empty((len(x), w.n), np.float32) for _ in range(count)]
        for i, y in enumerate(self.y):
            self.binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> Iterator[torch.Tensor]:
        return map(torch.from_numpy, self.y)

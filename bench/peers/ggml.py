"""ggml, the kernels of llama.cpp, by ctypes on the libraries inside llama-cpp-python. x is rounded to int8 in blocks of 32 or 256.

ggml wants K in whole blocks, 32 or 256 columns by type: for other K there is no candidate (llama.cpp then takes a wider type).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from . import INT8_X, Candidate, Case

#: (type, bits, interleaved): llama.cpp interleaves eight rows at load where it can, which helps one row of x and harms many in Q4_K and Q2_K.
TYPES = (("Q8_0", 8, False), ("Q6_K", 6, False), ("Q5_K", 5, False), ("Q4_0", 4, True), ("Q4_K", 4, True), ("Q4_K", 4, False), ("Q3_K", 3, False),
         ("IQ3_S", 3, False), ("Q2_K", 2, False), ("TQ2_0", 2, False))


class Init(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Library:
    """The functions used here, under their names without ``ggml_``."""

    BASE = {  # name -> (result, arguments); ggml.h, ggml-alloc.h, ggml-backend.h
        "init": (c_void_p, Init), "free": (None, c_void_p), "log_set": (None, c_void_p, c_void_p),
        "new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64), "mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
        "new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool), "build_forward_expand": (None, c_void_p, c_void_p),
        "quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        "backend_get_default_buffer_type": (c_void_p, c_void_p), "backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
        "backend_buffer_free": (None, c_void_p), "backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
        "backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t), "backend_graph_compute": (c_int, c_void_p, c_void_p),
        "backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p), "backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
        "backend_buft_name": (c_char_p, c_void_p),
    }
    CPU = {"backend_cpu_init": (c_void_p,), "backend_cpu_set_n_threads": (None, c_void_p, c_int), "backend_cpu_reg": (c_void_p,)}

    def __init__(self):
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ModuleNotFoundError("no ggml", name="llama_cpp")
        folder = Path(spec.origin).parent / "lib"
        for file, functions in (("libggml-base.so", self.BASE), ("libggml-cpu.so", self.CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in functions.items():
                f = getattr(library, f"ggml_{name}")
                f.restype, f.argtypes = result, arguments
                setattr(self, name, f)
        self._silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)  # it reports every repacked tensor
        self.log_set(ctypes.cast(self._silent, c_void_p), None)
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_get_default_buffer_type(self.backend)
        self.interleaved = self._interleaved()

    def _interleaved(self) -> int | None:
        """The buffer type that interleaves rows, or None in a build without it."""
        register = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        if address is None:
            return None
        types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(register, 0))
        for t in types or ():
            if t is None:
                return None
            if self.backend_buft_name(t) == b"CPU_REPACK":
                return t
        return None


lib = Library()


def candidates(case: Case) -> Iterator[Candidate]:
    for name, bits, interleaved in TYPES:
        kind = GGMLQuantizationType[name]
        if case.k % GGML_QUANT_SIZES[kind][0] or (interleaved and (lib.interleaved is None or case.n % 8)):
            continue
        rows = _rows(case, kind)
        yield Candidate(f"ggml {name}{' interleaved' if interleaved else ''}", bits, rows.nbytes, INT8_X,
                        torch.from_numpy(dequantize(rows[case.sample.numpy()], kind)).float(),
                        lambda x, count, threads, a=(rows, kind, case.k, interleaved): Graph(*a, x, count, threads))


def _rows(case: Case, kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes [n, bytes of a row]. 64 rows are quantized and drawn from at random: some types take a minute for a large weight."""
    block, size = GGML_QUANT_SIZES[kind]
    some = np.ascontiguousarray(case.weight[:64].numpy())
    out, importance = np.empty((len(some), case.k // block * size), np.uint8), np.ones(case.k, np.float32)
    lib.quantize_chunk(kind, some.ctypes.data, out.ctypes.data, 0, *some.shape, importance.ctypes.data)
    return out[np.random.default_rng(0).integers(0, len(out), case.n)]


class Graph:
    """One graph with a product for each copy."""

    def __init__(self, rows: np.ndarray, kind: int, k: int, interleaved: bool, x: torch.Tensor, count: int, threads: int):
        self.count, self.threads, self.shape, self.buffers = count, threads, (len(x), len(rows)), []
        room = (1 << 20) + 4096 * count  # tensors without their data, and the graph
        self.contexts = [lib.init(Init(room, None, True)) for _ in range(2)]
        weights = [lib.new_tensor_2d(self.contexts[0], kind, k, len(rows)) for _ in range(count)]
        entry = lib.new_tensor_2d(self.contexts[1], GGMLQuantizationType.F32, k, len(x))
        self.y = [lib.mul_mat(self.contexts[1], w, entry) for w in weights]
        self.graph = lib.new_graph_custom(self.contexts[1], 2 * count + 16, False)
        for y in self.y:
            lib.build_forward_expand(self.graph, y)
        self.buffers = [lib.backend_alloc_ctx_tensors_from_buft(c, b)
                        for c, b in zip(self.contexts, (lib.interleaved if interleaved else lib.plain, lib.plain), strict=True)]
        if None in self.buffers:
            raise MemoryError(f"ggml cannot allocate {count} copies of {rows.nbytes} bytes")
        for w in weights:
            lib.backend_tensor_set(w, rows.ctypes.data, 0, rows.nbytes)
        lib.backend_tensor_set(entry, x.data_ptr(), 0, x.nbytes)

    def run(self) -> None:
        lib.backend_cpu_set_n_threads(lib.backend, self.threads)
        if status := lib.backend_graph_compute(lib.backend, self.graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def outputs(self) -> Iterator[torch.Tensor]:
        out = torch.empty(self.shape)
        for y in self.y:
            lib.backend_tensor_get(y, out.data_ptr(), 0, out.nbytes)
            yield out

    def __del__(self):
        for buffer in self.buffers:
            lib.backend_buffer_free(buffer)
        for context in self.contexts:
            lib.free(context)

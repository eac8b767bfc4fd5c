"""The CUDA kernels for tests: compiled for the CPU, and, where there is a GPU and the module is built, on the device. One interface for both."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import numpy as np
import pytest
import simt
import torch

from mxq_ext import _native, cuda
from mxq_ext.qtensor import QTensor

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.name != "device.cu")  # device.cu asks the machine
HOST = [ROOT / "csrc" / "cuda" / f"{name}.cpp" for name in ("api", "attention", "dispatch", "launch", "layer", "prepack")] + [
    ROOT / "csrc" / "cpu" / "parallel.cpp", *(ROOT / "python_tests" / f"cuda_flat{part}.cpp" for part in ("", "_attention", "_layer"))]


@functools.cache
def library(mode: str = os.environ.get("SIMT_MODE", "plain"), only: tuple[str, ...] = ()) -> simt.Library:
    """The sources of the CUDA module, compiled for the CPU; all, or of the kernels only those files."""
    if reason := simt.missing_tool("g++"):
        pytest.skip(reason)
    stubs = [ROOT / "python_tests" / "cuda_stubs.cpp"] * bool(only)
    return simt.Library([*(p for p in KERNELS if not only or p.stem in only), *HOST, *stubs], mode)


class Functions:
    """The functions of csrc/bind_cuda.cpp, of the library that runs on the CPU. ``options``: see ``simt.Library.configure``."""

    def __init__(self, lib: simt.Library, **options):
        self.native = lib.native = lib.native or simt.library.Native(lib.path)
        self.options = simt.library.DEFAULTS | options
        self.message = ""

    def _call(self, name: str, *args):
        function = getattr(self.native.dll, f"mxq_cuda_{name}")
        function.restype = ctypes.c_int64
        self.native.dll.simt_configure(*(int(self.options[k]) for k in simt.library.DEFAULTS), 0)
        value = function(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in args))
        self.message = self.native.dll.simt_take_error().decode()
        assert not self.message, self.message
        return value

    def blob_sizes(self, weight):
        nbytes, head = ctypes.c_int64(), ctypes.c_int64()
        self._call("blob_sizes", weight, ctypes.byref(nbytes), ctypes.byref(head))
        return nbytes.value, head.value

    def prepack(self, *args):
        self._call("prepack", *args)

    def unpack(self, *args):
        self._call("unpack", *args)

    def workspace_nbytes(self, call):
        return self._call("workspace_nbytes", call)

    def linear(self, call):
        return self._call("linear", call)

    def dequantize(self, *args):
        return self._call("dequantize", *args)

    def embedding(self, *args):
        return self._call("embedding", *args)

    def explain(self, call):
        text = ctypes.create_string_buffer(1024)
        return self._call("explain", call, text, len(text)), text.value.decode()

    def kernel_name(self, call, name):
        text = ctypes.create_string_buffer(1024)
        self._call("kernel_name", call, name.encode(), text, len(text))
        return text.value.decode()

    def kv_workspace_nbytes(self, call):
        return self._call("kv_workspace_nbytes", call)

    def kv_attend(self, call):
        return self._call("kv_attend", call)

    def kv_pack(self, fmt, x, batch, heads, codes, params, stream):
        return self._call("kv_pack", fmt, x, ctypes.c_int64(batch), ctypes.c_int64(heads), codes, params, stream)

    def kv_explain(self, call):
        name, text = (ctypes.create_string_buffer(1024) for _ in range(2))
        ok = self._call("kv_explain", call, name, text, ctypes.c_int64(1024))
        return bool(ok), name.value.decode(), text.value.decode()

    def layers_workspace_nbytes(self, call):
        return self._call("layers_workspace_nbytes", call)

    def run_layers(self, call):
        return self._call("run_layers", call)

    def layouts(self):
        text = ctypes.create_string_buffer(self._call("layouts", None, ctypes.c_int64(0)) + 1)
        self._call("layouts", text, ctypes.c_int64(len(text)))
        return text.value.decode()

    def error_text(self, code):
        return f"code {code}"


class Bench:
    """Weights, inputs and kernels on one device; results come back to the CPU."""

    def __init__(self, runtime: cuda.Runtime, device: str):
        self.runtime, self.device = runtime, torch.device(device)

    def pack(self, q: QTensor) -> cuda.CudaPacked:
        return self.runtime.pack(q, self.device)

    def dequantize(self, p, dtype):
        return self.runtime.dequantize(p, dtype, stream=0).cpu()

    def embedding(self, ids, p, dtype):
        return poisoned(self.runtime.embedding, ids.to(self.device), p, dtype, stream=0).cpu()

    def linear(self, x, weights, dtype=None, path="auto", **forced):
        """As ``Runtime.linear``; every output lies in a larger tensor of NaN, which must stay NaN around it."""
        dtype = dtype or x.dtype
        rooms = [torch.full((x.shape[0] + 2, p.shape[0] + 5), float("nan"), dtype=dtype, device=self.device) for p, _ in weights]
        views = [room[1:-1, 2:-3] for room in rooms]
        placed = [(p, None if b is None else b.to(self.device)) for p, b in weights]
        poisoned(self.runtime.linear, x.to(self.device), placed, dtype, path, out=views, stream=0, **forced)
        for room, view in zip(rooms, views, strict=True):
            count = int(room.isnan().sum())
            assert count == room.numel() - view.numel() + int(view.isnan().sum()), f"{path} wrote outside of its output"
        return [view.cpu() for view in views]


def poisoned(function, *args, **kwargs):
    """Calls ``function`` with a torch.empty that gives memory full of NaN (0xFF bytes)."""
    empty = torch.empty

    def full(*a, **k):
        t = empty(*a, **k)
        t.view(torch.uint8).fill_(255) if t.numel() else None
        return t

    torch.empty = full
    try:
        return function(*args, **kwargs)
    finally:
        torch.empty = empty


def backends() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() and not isinstance(_native.cuda, _native.Missing) else [])


@functools.cache
def bench(backend: str) -> Bench:
    return Bench(cuda.Runtime(Functions(library())), "cpu") if backend == "cpu" else Bench(cuda.runtime(torch.device("cuda")), "cuda")


@contextlib.contextmanager
def nothing_waits():
    """On a real device: whatever makes the host wait for it is an error meanwhile."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def raw(t: torch.Tensor) -> np.ndarray:
    """A copy of the bytes of a tensor, as native code is given them; one that is empty has an address all the same."""
    return t.contiguous().view(torch.uint8).reshape(-1).numpy().copy() if t.numel() else np.zeros(16, np.uint8)


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """|y - reference| / |reference|, infinite if anything is not finite."""
    if not y.isfinite().all():
        return float("inf")
    norm = float(reference.norm())
    return float((y.double() - reference).norm()) / norm if norm else float(y.double().norm())

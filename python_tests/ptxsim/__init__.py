"""Executes the PTX that nvcc really emitted, with numpy, on a machine without a GPU.

    module = Module(compile_ptx("csrc/cuda/mv_w4.cu", "sm_80"))
    module.launch("mv<1, .*4>", grid=8, block=256, args=[params_bytes], shared=4096, memory=[weights, x, y])

It is the only check of the asm bodies of ptx.cuh, which the fibers of ``simt`` never run. docs/cuda-testing.md says what it catches and what it cannot.
"""

from .compile import compile_ptx
from .machine import Module
from .parse import PtxError

__all__ = ["Module", "PtxError", "compile_ptx"]

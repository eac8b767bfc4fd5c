"""Runs CUDA kernels on the CPU: compiles ``.cu`` files with g++ against ``simt_machine.hpp`` and calls their host functions with numpy arrays.

    lib = Library(["csrc/cuda/mv.cu"])
    lib.configure(seed=4, lazy=False)
    lib.call("mxq_mv", weights, x, y, n, k)        # arrays go as pointers; SimtError with the kernel's file and line if the launch failed
    Library(["csrc/cuda/mv.cu"], mode="tsan")      # the same calls in a child process under ThreadSanitizer

docs/cuda-testing.md says what this catches and what it cannot.
"""

from .build import MODES, build, missing_tool
from .library import Library, SimtError, run_python

__all__ = ["MODES", "Library", "SimtError", "build", "missing_tool", "run_python"]

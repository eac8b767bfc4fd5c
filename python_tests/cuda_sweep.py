"""The CUDA kernels over the whole list of cases, in many schedules and under the sanitizers. A part of it runs in the suite; the whole:

    python python_tests/cuda_sweep.py schedules     every case in every schedule: right, and the same bits
    python python_tests/cuda_sweep.py asan          every kernel under AddressSanitizer and UndefinedBehaviorSanitizer
    python python_tests/cuda_sweep.py tsan          every kernel under ThreadSanitizer
    python python_tests/cuda_sweep.py device        every case twice on this machine's GPU: right, and the same bits; a few for compute-sanitizer by --few
    ... --part 0/4                                  a quarter of the cases

Ends with 0 if nothing was found, and says how many cases, calls, and pairs of a kernel and a case there were. Line coverage is measured by
``cuda_coverage.py``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import cuda_tools  # noqa: E402
import simt  # noqa: E402

from mxq_ext import cuda  # noqa: E402
from mxq_ext.qtensor import TYPES, QTensor  # noqa: E402
from mxq_ext.testing import cases  # noqa: E402

SCHEDULES = [{"seed": seed, "lazy": lazy, "workers": workers} for seed in (0, 2, 3, 7) for lazy, workers in ((True, 1), (False, 2))]
WORKSPACE = 1 << 18
HALVES = (torch.float16, torch.bfloat16)
#: Largest relative error of the norm, by the type of the result.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: The same on a device: tensor cores cut off what is below the largest summand's 24 bits, product by product, where the fibers round a sum once.
DEVICE_LIMIT = 1e-4
#: nf4 levels are rounded to fp16 by mv and mm.
NF_LIMIT = 1e-3
#: Of one decoder each, for the sanitizers.
DECODERS = ("w1g64_fz", "w2g32_asym", "w3g64_fz", "w4g128", "w5g64_asym", "w6g32", "w8", "lut2", "lut3", "lut4", "nf4g64", "fp16")


SANITIZERS = ("asan", "tsan")
#: Copies that land late and early: the moment decides which thread a copy races with.
SANITIZED = [{}, {"seed": 7, "lazy": False, "workers": 2}]


@dataclass(frozen=True)
class Case:
    """One call of the library: y = x W^T + bias (path scalar, mv or mm), all rows (dequant) or some (lookup)."""

    weight: str  # a format, or the name of a layout
    n: int
    k: int
    path: str
    m: int = 0
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    splits: int = 0
    bias: bool = False

    def __str__(self) -> str:
        return " ".join([self.weight, f"{self.n}x{self.k}", self.path, f"M={self.m}", str(self.dtype)[6:], str(self.result)[6:], f"splits={self.splits}"])


LAYOUTS = {layout.name: layout for layout in cases.LAYOUTS}


@functools.lru_cache(4)
def weight(name: str, n: int, k: int) -> tuple[QTensor, torch.Tensor]:
    """(the weight, what it dequantizes to)."""
    q = LAYOUTS[name].make(3) if name in LAYOUTS else cases.random_qtensor(name, n, k, n + k)
    return q, q.dequantize()


@functools.lru_cache(4)
def packed(name: str, n: int, k: int, where: str) -> cuda.CudaPacked:
    return cuda_tools.bench(where).pack(weight(name, n, k)[0])


def product(c: Case) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(x, bias or None, x W^T + bias in float64)."""
    x = cases.random_x(c.m, c.k, c.dtype, seed=c.m)
    bias = torch.randn(c.n, generator=torch.Generator().manual_seed(c.m)).half() if c.bias else None
    return x, bias, x.double() @ weight(c.weight, c.n, c.k)[1].double().T + (bias.double() if c.bias else 0)


def forced(c: Case) -> dict[str, int]:
    """What a call asks for in place of the configuration: a block with all row blocks, one or several of them at a time, for some of the numbers of rows."""
    return {"blocks": int(c.path == "mv" and c.m % 4 > 1), "batch": int(c.path == "mv" and c.m % 8 > 3), "splits": c.splits}


def arguments(c: Case) -> tuple[list, np.ndarray, torch.Tensor]:
    """(arguments of the library's function, its output, full of 0xff, which is NaN; what that should become, in float64)."""
    dense, blob = weight(c.weight, c.n, c.k)[1], packed(c.weight, c.n, c.k, "cpu").blob.numpy()
    generator = torch.Generator().manual_seed(c.m)
    rows = {"dequant": c.n, "lookup": 5}.get(c.path, c.m)
    columns = c.k if c.path in ("dequant", "lookup") else c.n
    out = np.full(rows * columns * c.result.itemsize, 255, np.uint8)
    if c.path == "dequant":
        return ["flat_dequantize", blob, out, TYPES[c.result], 0, c.n], out, dense.double()
    if c.path == "lookup":
        ids = torch.randint(0, c.n, (rows,), generator=generator)
        return ["flat_embedding", blob, ids.numpy(), rows, out, TYPES[c.result]], out, dense[ids].double()
    x, bias, expected = product(c)
    call = ["flat_linear", blob, None, None, out, None, None, cuda_tools.raw(bias) if c.bias else None, None, None, cuda_tools.raw(x), c.k,
            TYPES[c.dtype], TYPES[c.result], TYPES[torch.float16], c.m, np.full(WORKSPACE, 255, np.uint8), WORKSPACE, cuda.PATHS[c.path], 0,
            *forced(c).values()]
    return call, out, expected


def run(library: simt.Library, c: Case, **schedule) -> bytes:
    """The result's bytes. AssertionError if it is wrong."""
    call, out, expected = arguments(c)
    library.configure(**schedule).call(*call)
    check(c, torch.from_numpy(out).view(c.result).reshape(expected.shape), expected, str(schedule))
    return out.tobytes()


def check(c: Case, y: torch.Tensor, expected: torch.Tensor, where: str, least: float = 0.0) -> None:
    """AssertionError if ``y`` is not what a case should give."""
    if c.path in ("dequant", "lookup"):
        assert torch.equal(y.double(), expected.to(torch.float32).to(c.result).double()), f"{c} {where}"
    else:
        limit = max(least, LIMITS[c.result], NF_LIMIT if "nf4" in weight(c.weight, c.n, c.k)[0].format_name else 0)
        error = cuda_tools.error(y, expected)
        assert error <= limit, f"{c} {where}: error {error:.1e}"


def every_case() -> Iterator[Case]:
    """All formats on all paths: 1 to 17 rows of x and more, both 16-bit types, results of both widths, odd sizes, whole and split columns; all layouts."""
    shapes = ((19, 100), (33, 330), (5, 577))
    for i, name in enumerate((*cases.FORMATS, *LAYOUTS)):
        n, k = LAYOUTS[name].shape if name in LAYOUTS else shapes[i % 3]
        for dtype in (torch.float32, *HALVES):
            yield Case(name, n, k, "dequant", result=dtype)
            yield Case(name, n, k, "scalar", 1 + i % 3, dtype, dtype, bias=True)
        yield Case(name, n, k, "lookup")
        for m in (*range(1, 18), 33):
            for j, dtype in enumerate(HALVES):
                path, wide = "mv" if m <= 16 else "mm", (i + m + j) % 2
                yield Case(name, n, k, path, m, dtype, torch.float32 if wide else dtype, 2 if k > 256 and (m + j) % 3 == 0 else 0, bool(m % 2))


def one_of_each() -> Iterator[Case]:
    """Few cases that run every kernel: for the sanitizers, which are slow."""
    for i, name in enumerate(DECODERS):
        for path, m in (("mv", 1 + i % 8), ("mv", 9 + i % 8), ("mm", 17 + i), ("mm", 33 + i)):
            yield Case(name, 18, 330, path, m, HALVES[i % 2], torch.float32, (0, 2)[i % 2], True)
    for name in LAYOUTS:
        n, k = LAYOUTS[name].shape
        yield from (Case(name, n, k, "mv", m, torch.float16) for m in (3, 11))
        yield from (Case(name, n, k, "mm", m, torch.bfloat16) for m in (18, 34))
        yield from (Case(name, n, k, "scalar", 2), Case(name, n, k, "dequant"), Case(name, n, k, "lookup"))


def on_device(c: Case) -> torch.Tensor:
    """The result of a case on the GPU, between NaN that must stay. AssertionError if it is wrong."""
    gpu = cuda_tools.bench("cuda")
    dense, p = weight(c.weight, c.n, c.k)[1], packed(c.weight, c.n, c.k, "cuda")
    if c.path == "dequant":
        y, expected = gpu.dequantize(p, c.result), dense.double()
    elif c.path == "lookup":
        ids = torch.randint(0, c.n, (5,), generator=torch.Generator().manual_seed(c.m))
        y, expected = gpu.embedding(ids, p, c.result), dense[ids].double()
    else:
        x, bias, expected = product(c)
        y = gpu.linear(x, [(p, bias)], c.result, c.path, **forced(c))[0]
    check(c, y, expected, "on the device", DEVICE_LIMIT)
    return y


def sweep_device(chosen: list[Case]) -> str:
    """Runs the cases twice on the GPU; says how many there were. AssertionError for a wrong result and for other bits."""
    start = time.monotonic()
    for c in chosen:
        first, second = on_device(c), on_device(c)
        assert first.view(torch.uint8).equal(second.view(torch.uint8)), f"{c}: other bits in a second call"
    return f"{len(chosen)} cases, {2 * len(chosen)} calls on {torch.cuda.get_device_name()}, {time.monotonic() - start:.0f} s: nothing found"


def kernels_of(c: Case) -> set[str]:
    """Mangled names of what a case launches."""
    return {launch.kernel for launch in cuda_tools.library().record(*arguments(c)[0])}


def sweep(library: simt.Library, chosen: list[Case], schedules: list[dict]) -> str:
    """Runs the cases in all schedules; says how much that was. AssertionError for a wrong result, for other bits, and for what a sanitizer reports."""
    start, pairs = time.monotonic(), set()
    for c in chosen:
        pairs |= {(kernel, c) for kernel in kernels_of(c)}
        first = run(library, c, **schedules[0])
        for schedule in schedules[1:]:
            assert run(library, c, **schedule) == first, f"{c}: other bits in the schedule {schedule}"
    return (f"{len(chosen)} cases, {len(chosen) * len(schedules)} calls, {len(pairs)} pairs of a kernel and a case, {len({k for k, _ in pairs})} kernels, "
            f"{time.monotonic() - start:.0f} s: nothing found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schedules", *SANITIZERS, "device"])
    parser.add_argument("--few", action="store_true", help="device: the cases that the sanitizers of the CPU get")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from the i-th on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    if options.what == "device":
        chosen = list(one_of_each() if options.few else every_case())[part::parts]
        return print(f"device {options.part}: {sweep_device(chosen)}")
    if options.what in SANITIZERS:
        chosen, schedules, library = one_of_each(), SANITIZED, cuda_tools.library(options.what)
    else:
        chosen, schedules, library = every_case(), SCHEDULES, cuda_tools.library()
    print(f"{options.what} {options.part}: {sweep(library, list(chosen)[part::parts], schedules)}")


if __name__ == "__main__":
    main()

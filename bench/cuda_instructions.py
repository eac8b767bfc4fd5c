"""Instructions a weight of the CUDA kernels, counted by running their PTX on the CPU, beside what a GPU can afford at the speed of its memory.

    python bench/cuda_instructions.py             prints the table
    python bench/cuda_instructions.py --write     puts it into docs/cuda.md

One block multiplies a small weight and one of twice its size: by one row of x in fp16 (``mv``, twice the rows), or by 64 rows (``mm``, twice the columns).
What the second run takes more, over the weights that it has more, is the cost of the inner loop with all that belongs to it: loads, addresses, group ends,
sums of rows. Lane instructions, so that a warp's counts 32. PTX is not machine code: the assembler merges some instructions and splits others. Needs nvcc and
g++, no GPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]  # the executors are test tools

import cuda_tools  # noqa: E402
import ptxsim  # noqa: E402
from cuda_budget import DOCUMENT, replace  # noqa: E402

from mxq_ext.formats import Format  # noqa: E402
from mxq_ext.testing import cases  # noqa: E402

FORMATS = ("w1g128_fz", "w2g128", "w3g128", "w4g128", "w5g128", "w6g128", "w8g128", "lut2", "lut3", "lut4", "nf4g64", "fp16")
#: path -> (rows, columns) of the two weights.
SIZES = {"mv": ((128, 2048), (256, 2048)), "mm": ((16, 2048), (16, 4096))}
#: name -> bytes/s of its memory, SMs, clock in Hz: data sheets. An SM starts 128 lane instructions a cycle.
GPUS = {"A100": (2.0e12, 108, 1.41e9), "H100": (3.35e12, 132, 1.755e9), "H200": (4.8e12, 132, 1.83e9)}
PATHS = {"mv": (2, 1), "mm": (3, 64)}  #: number of the path, rows of x


def issued(module: ptxsim.Module, fmt: str, n: int, k: int, path: str) -> int:
    """Warp instructions of the kernel itself for one product of [n, k]."""
    number, m = PATHS[path]
    q = cases.random_qtensor(fmt, n, k)
    blob, x = cuda_tools.raw(cuda_tools.bench("cpu").pack(q).blob), cuda_tools.raw(cases.random_x(m, k, torch.float16))
    y, workspace = np.zeros((m, n), np.float32), np.zeros(1 << 20, np.uint8)
    call = ("flat_linear", blob, None, None, y, None, None, None, None, None, x, k, 2, 0, 0, m, workspace, workspace.size, number, 0, int(path == "mv"), 0, 1)
    (launch,) = cuda_tools.library().record(*call)
    start = module.issued()
    module.launch(launch.kernel, launch.grid, launch.block, launch.args, launch.shared, [blob, x, y, workspace])
    return module.issued() - start


def instructions(fmt: str, path: str, arch: str = "sm_80") -> float:
    """Lane instructions a weight."""
    name = Format.parse(fmt)
    kind = "nf4" if fmt.startswith("nf4") else fmt if not fmt.startswith("w") else f"w{name.bits}"
    module = ptxsim.Module(ptxsim.compile_ptx(ROOT / "csrc" / "cuda" / f"{path}_{kind}.cu", arch))
    (small, large), sizes = (issued(module, fmt, n, k, path) for n, k in SIZES[path]), [n * k for n, k in SIZES[path]]
    return 32 * (large - small) / (sizes[1] - sizes[0])


def affordable(fmt: str, gpu: str) -> float:
    """Lane instructions that all SMs start in the time in which memory brings one weight, scales included."""
    bandwidth, sms, clock = GPUS[gpu]
    q = cases.random_qtensor(fmt, *SIZES["mm"][1])
    return 128 * sms * clock / bandwidth * q.nbytes() / (q.shape[0] * q.shape[1])


def table() -> str:
    """Markdown."""
    lines = ["| format | `mv`, 1 row of x | `mm`, 64 rows of x | " + " | ".join(f"{g} affords" for g in GPUS) + " |", "| --- " * (3 + len(GPUS)) + "|"]
    for fmt in FORMATS:
        counts = [f"{instructions(fmt, path):.2f}" for path in PATHS]
        lines.append(f"| `{fmt}` | {' | '.join(counts)} | " + " | ".join(f"{affordable(fmt, g):.2f}" for g in GPUS) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update docs/cuda.md")
    result = table()
    print(result, end="")
    if parser.parse_args().write:
        DOCUMENT.write_text(replace(DOCUMENT.read_text(encoding="utf-8"), result, "instructions"), encoding="utf-8")

"""Registers, spills and shared memory of every CUDA kernel, from the assembler's own report. Needs nvcc, no GPU.

    python bench/cuda_budget.py             prints the table
    python bench/cuda_budget.py --write     puts it into docs/cuda.md

The build keeps that report (build/ptxas) of the architectures that it was for; what it lacks, or is older than the sources, is compiled here.
Blocks per SM are what registers and threads allow (64 Ki registers and 64 warps an SM); shared memory of mv depends on the call and may allow fewer.
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout wins over an installed package

from mxq_ext.doctor import find_nvcc  # noqa: E402

DOCUMENT, REPORTS = ROOT / "docs" / "cuda.md", ROOT / "build" / "ptxas"
ARCHS = ("sm_80", "sm_90")
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--threads", "0"]
SOURCES = sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.name != "device.cu")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; bytes where nothing else is said."""

    source: str
    kernel: str
    threads: int
    arch: str
    registers: int
    spills: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks that fit an SM by registers (given out by 8 a thread, 256 a warp) and warps."""
        warps = self.threads // 32
        return min(65536 // (-(-self.registers // 8) * 8 * 32 * warps), 64 // warps)


def kernel_name(mangled: str, source: str) -> str:
    """``mv_w4<1>`` or ``mm_w4<8>`` of a mangled template, the plain name of other kernels."""
    if m := re.search(r"cuda2m[vm]ILi(\d)E", mangled):
        return f"{source}<{m[1]}>"
    length, name = re.search(r"_cu_[0-9a-f]{8}(\d+)([a-z_]+)", mangled).groups()
    return name[: int(length)]


def threads_of(source: str, kernel: str) -> int:
    """Most threads of a block, as csrc/cuda/shape.h and attention.h have them."""
    if source.startswith("mv_"):
        return 256 if "mixed" in source else 384 if kernel.endswith("<2>") else 512
    if kernel == "attend_merge":
        return 512
    return 128 if source in ("attention", "dequant") or (source.startswith("mm_") and source != "mm_stage") else 256


def kept_report(source: Path, folder: Path = REPORTS) -> str:
    """What the build kept of ``source``; nothing if a file of csrc, or setup.py, is newer, or the compiler warned."""
    report, sources = folder / f"{source.stem}.txt", [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if not report.exists() or report.stat().st_mtime <= max(p.stat().st_mtime for p in sources):
        return ""
    text = report.read_text(encoding="utf-8")
    return "" if "warning" in text else text


def compiled_report(source: Path, archs: list[str]) -> str:
    """Raises RuntimeError with the compiler's words; a warning is an error."""
    codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [find_nvcc(), *FLAGS, *codes, "-Xptxas", "-v", "-c", str(source), "-o", f"{folder}/x.o"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or "warning" in done.stdout:
        raise RuntimeError(f"{source.name}:\n{done.stdout[-4000:]}")
    return done.stdout


@functools.cache
def usages_of(source: Path) -> list[Usage]:
    """Of every kernel of one file on every architecture of ``ARCHS``."""
    kept = parsed(source, kept_report(source))
    lacking = [a for a in ARCHS if a not in {u.arch for u in kept}]
    return [u for u in kept if u.arch in ARCHS] + (parsed(source, compiled_report(source, lacking)) if lacking else [])


def parsed(source: Path, report: str) -> list[Usage]:
    """The usages that a report of the assembler's tells."""
    out = []
    for part in report.split("Compiling entry function '")[1:]:
        mangled, arch = re.match(r"(\S+)' for '(sm_\d+)'", part).groups()
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        name = kernel_name(mangled, source.stem)
        out.append(Usage(source.stem, name, threads_of(source.stem, name), arch, int(re.search(r"Used (\d+) registers", part)[1]), stores + loads,
                         int(shared[1]) if shared else 0))
    return out


def examine(sources=SOURCES, jobs: int = 2) -> list[Usage]:
    """Usage of every kernel in ``sources`` on every architecture of ``ARCHS``."""
    order = sorted(sources, key=lambda p: "mixed" not in p.name)  # the longest first
    with ThreadPoolExecutor(jobs) as pool:
        found = [u for part in pool.map(usages_of, order) for u in part]
    return sorted(found, key=lambda u: (u.source, u.kernel, u.arch))


def table(usages: list[Usage]) -> str:
    head = "| kernel | threads | " + " | ".join(f"registers {a} | blocks an SM" for a in ARCHS) + " | spilled bytes |"
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for name in dict.fromkeys(u.kernel for u in usages):
        of = {u.arch: u for u in usages if u.kernel == name}
        cells = " | ".join(f"{of[a].registers} | {of[a].blocks}" for a in ARCHS)
        lines.append(f"| `{name}` | {of[ARCHS[0]].threads} | {cells} | {sum(u.spills for u in of.values())} |")
    return "\n".join(lines) + "\n"


def replace(document: str, new: str, name: str = "budget") -> str:
    """The document with ``new`` between the comments of that name."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + new + m[2], document, flags=re.S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update docs/cuda.md")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if not find_nvcc():
        sys.exit("cuda_budget: nvcc is not found; `pip install '.[cuda-build]'` brings one")
    result = table(examine(jobs=arguments.jobs))
    print(result, end="")
    if arguments.write:
        DOCUMENT.write_text(replace(DOCUMENT.read_text(encoding="utf-8"), result), encoding="utf-8")

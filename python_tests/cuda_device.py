"""Everything that a machine with a GPU can say of the CUDA kernels, in a few minutes: the tests that need one, the whole list of cases, and compute-sanitizer.

    python python_tests/cuda_device.py -o DIR [--jobs 8] [--only memcheck,racecheck]

Each step leaves DIR/<step>.txt, and its line says whether it held; the exit status is 1 if one did not. Steps: tests, cases, and compute-sanitizer's memcheck,
racecheck and synccheck over a few cases of every kernel.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "synccheck")
FILES = ("test_cuda_kernels.py", "test_cuda_attention.py", "test_cuda_kv_cache.py", "test_cuda_ops.py", "test_cuda_nn.py", "test_bench_cuda.py")
#: Ids of the tests that need a device.
NEED_IT = "[cuda or -cuda] or -cuda- or on_a_device or on_the_device"
#: compute-sanitizer's exit status where it has found something; it has 0 otherwise, whatever the program's was.
FOUND = 99


def steps(jobs: int) -> dict[str, list[list[str]]]:
    """Step -> commands that may run side by side."""
    python, sweep = sys.executable, str(HERE / "cuda_sweep.py")
    parts = [f"{i}/{jobs}" for i in range(jobs)]
    return {"tests": [[python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / f) for f in FILES), "-k", NEED_IT]],
            "cases": [[python, sweep, "device", "--part", p] for p in parts],
            **{tool: [["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), python, sweep, "device", "--few", "--part", p] for p in parts]
               for tool in TOOLS}}


def run_step(name: str, commands: list[list[str]], out: Path) -> bool:
    """Runs the commands side by side, writes what they said, and prints a line. Whether all ended with 0 and said so themselves."""
    def run(command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=HERE.parent)

    start = time.monotonic()
    with ThreadPoolExecutor(len(commands)) as pool:
        done = list(pool.map(run, commands))
    (out / f"{name}.txt").write_text("\n".join(f"$ {' '.join(c)}\n{d.stdout}exit status {d.returncode}" for c, d in zip(commands, done, strict=True)) + "\n")
    held = all(d.returncode == 0 and (name == "tests" or "nothing found" in d.stdout) for d in done)
    print(f"{name}: {'held' if held else 'FAILED'}, {len(commands)} processes, {time.monotonic() - start:.0f} s", flush=True)
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8, help="processes of a step that share the device")
    parser.add_argument("--only", default="", help="some of the steps, with commas between them")
    options = parser.parse_args()
    chosen = {n: c for n, c in steps(options.jobs).items() if not options.only or n in options.only.split(",")}
    if missing := [n for n in options.only.split(",") if n and n not in chosen]:
        parser.error(f"there is no step {missing[0]}: {', '.join(steps(1))}")
    if set(chosen) & set(TOOLS) and not shutil.which("compute-sanitizer"):
        parser.error("compute-sanitizer is not in PATH; it comes with the CUDA toolkit. --only tests,cases goes without")
    options.out.mkdir(parents=True, exist_ok=True)
    return int(not all([run_step(name, commands, options.out) for name, commands in chosen.items()]))  # a list: every step runs, whatever came before


if __name__ == "__main__":
    sys.exit(main())

"""Compiles kernels for the CPU. An object is made anew only when the source, a header that it includes, or the command has changed."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mxq_ext.doctor import find_nvcc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simt"

#: fp contraction is off: a product and a sum round twice unless the kernel says fma, so that results do not hang on the compiler.
FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-fno-strict-aliasing", "-fno-gnu-unique", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
         "-Wno-unknown-pragmas", "-Wno-unused-function"]
#: mode -> (flags of the kernels, flags of the scheduler, which is never instrumented, libraries to load before Python)
MODES = {
    "plain": (["-O2"], ["-O2"], []),
    "debug": (["-O0", "-g"], ["-O0", "-g"], []),
    "ucontext": (["-O2"], ["-O2", "-DSIMT_UCONTEXT"], []),
    "asan": (["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"], ["-O2", "-DSIMT_ASAN"], ["asan", "ubsan"]),
    "tsan": (["-O1", "-g", "-fsanitize=thread"], ["-O2", "-DSIMT_TSAN"], ["tsan"]),
    "gcov": (["-O0", "--coverage"], ["-O2", "-DSIMT_GCOV"], []),
}
LINK = {"asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"], "gcov": ["--coverage"]}


def missing_tool(name: str) -> str | None:
    """Why a test that needs ``g++``, ``nvcc`` or ``gcov`` cannot run here; None if it can."""
    return None if (find_nvcc() if name == "nvcc" else shutil.which(name)) else f"{name} is not in PATH"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(command: list[str], what: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{what} does not compile:\n{done.stdout[-6000:]}\n{' '.join(command)}")


def cached(command: list[str], source: Path, product: str) -> Path:
    """Runs a compiler, which gets ``-o product`` and writes down what it has read; or returns what the same command made of the same files before.

    Each product has a folder of its own under ``build/simt``. Beside it a manifest has the digests of all files that the compiler read, but for
    the system's.
    """
    key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:16]
    manifest = CACHE / f"{key}.json"
    try:
        known = json.loads(manifest.read_text())
        if all(digest(Path(p)) == d for p, d in known["files"].items()) and Path(known["product"]).exists():
            return Path(known["product"])
    except (OSError, ValueError, KeyError):
        pass
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=CACHE))  # where it stays: gcov's data goes to the place of the compilation
    run([*command, "-o", product, "-MMD", "-MF", "x.d"], source.name, folder)
    names = re.sub(r"\\\n", " ", (folder / "x.d").read_text()).split(":", 1)[1].split()
    files = {str(p.resolve()): digest(p) for p in map(Path, names)}
    part = manifest.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"files": files, "product": str(folder / product)}))
    part.rename(manifest)
    return folder / product


def build(sources, mode: str = "plain", include=(), defines=()) -> Path:
    """Shared library of the sources, in ``build/simt``.

    Args:
        sources: ``.cu`` files.
        mode: a key of ``MODES``.
        include: folders to search before csrc/cuda.
        defines: ``NAME`` or ``NAME=value``.

    Raises:
        RuntimeError: with the compiler's words.
    """
    kernels, machine, _ = MODES[mode]
    paths = [f"-I{Path(p).resolve()}" for p in (*include, ROOT / "csrc" / "cuda", ROOT / "csrc", HERE)]
    jobs = [(Path(s).resolve(), [*FLAGS, *kernels, *paths, *(f"-D{d}" for d in defines)]) for s in sources]
    jobs.append((HERE / "simt_machine.cpp", [*FLAGS, *machine, *paths[-1:]]))
    with ThreadPoolExecutor(min(len(jobs), len(os.sched_getaffinity(0)))) as pool:
        objects = [str(o) for o in pool.map(lambda job: cached(["g++", *job[1], "-x", "c++", "-c", str(job[0])], job[0], "x.o"), jobs)]
    out = CACHE / f"{mode}-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:20]}.so"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")
        run(["g++", "-shared", "-pthread", *LINK.get(mode, []), *objects, "-o", str(part)], "the library")
        part.rename(out)
    return out

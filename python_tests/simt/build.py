"""Compiles kernels for the CPU. An object is made anew only when the source, a header it includes, or the command has changed."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    return None if shutil.which(name) else f"{name} is not in PATH"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} does not compile:\n{done.stdout[-6000:]}\n{' '.join(command)}")


def compile_one(source: Path, flags: list[str]) -> Path:
    """Object file of one source. Its manifest has the digests of all files that the compiler read, but for the system's."""
    command = ["g++", *flags, "-x", "c++", "-c", str(source)]
    key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:16]
    manifest = CACHE / f"{key}.json"
    try:
        known = json.loads(manifest.read_text())
        if all(digest(Path(p)) == d for p, d in known["files"].items()) and Path(known["object"]).exists():
            return Path(known["object"])
    except (OSError, ValueError):
        pass
    CACHE.mkdir(parents=True, exist_ok=True)
    work = CACHE / f"{key}.{os.getpid()}"
    work.mkdir(exist_ok=True)
    # The final name is part of the command: gcov finds its notes by it.
    run([*command, "-o", str(work / "x.o"), "-MMD", "-MF", str(work / "x.d")], source.name)
    names = re.sub(r"\\\n", " ", (work / "x.d").read_text()).split(":", 1)[1].split()
    files = {str(Path(n).resolve()): digest(Path(n)) for n in names}
    final = CACHE / f"{key}-{hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]}"
    if final.exists():
        shutil.rmtree(work)
    else:
        work.rename(final)
    manifest.write_text(json.dumps({"files": files, "object": str(final / "x.o"), "source": str(source)}))
    return final / "x.o"


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
        objects = [str(o) for o in pool.map(lambda job: compile_one(*job), jobs)]
    out = CACHE / f"{mode}-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:20]}.so"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")
        run(["g++", "-shared", "-pthread", *LINK.get(mode, []), *objects, "-o", str(part)], "the library")
        part.rename(out)
    return out

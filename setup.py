"""Builds ``mxq_ext._cpu``, the torch-free native module; everything else about the package is in pyproject.toml.

setuptools knows one set of flags per extension, but each CPU target needs its own, so the compilation is a ninja file written here.
A binary built on any machine runs on every machine of its architecture: the targets are chosen at run time.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MEMORY_PER_JOB = 1 << 30  # the target files are templates: g++ takes some 0.6 GB for the largest
MACHINE = platform.machine().lower()

AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
#: CPU target -> compiler flags of its source file. Only that file may use the instructions, see csrc/formats.h.
X86_TARGETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
}
TARGETS = {"scalar": []} | (X86_TARGETS if MACHINE in ("x86_64", "amd64") else {})
NATIVE = ("attention", "attention_ref", "embedding", "layer", "linear", "linear_group", "parallel", "prepack", "reference", "targets")
COMMON = ["bind_cpu.cpp", *(f"cpu/{name}.cpp" for name in NATIVE)]
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-unused-function",
         "-Wno-ignored-attributes", "-Wno-psabi", "-Wno-maybe-uninitialized",
         "-ffp-contract=off"]  # a*b+c rounds twice unless a kernel says fma: results must not depend on the compiler's mood


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return None


def job_count() -> tuple[int, str]:
    """Parallel compilers, and why so many. ``MAX_JOBS`` overrides."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"])), "MAX_JOBS"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory()
    if memory is None:
        return cores, f"{cores} cores"
    return max(1, min(cores, memory // MEMORY_PER_JOB)), f"{cores} cores, {memory / 2**30:.1f} GiB free at 1 GiB a compiler"


def find_compiler() -> str:
    for name in filter(None, [os.environ.get("CXX"), "g++", "clang++", "c++"]):
        if shutil.which(name.split()[0]):
            return name
    raise SystemExit("mxq_ext: no C++ compiler found (tried $CXX, g++, clang++, c++); install one, for example `apt install g++`")


def find_ninja() -> str:
    try:
        import ninja
        path = Path(ninja.BIN_DIR) / "ninja"
        if path.exists():
            return str(path)
    except ImportError:
        pass
    if path := shutil.which("ninja"):
        return path
    raise SystemExit("mxq_ext: ninja is missing; run `pip install ninja` (a build requirement, `pip install .` brings it by itself)")


def cuda_line() -> str:
    nvcc = shutil.which("nvcc")
    return f"nvcc found at {nvcc}" if nvcc else "nvcc not found"


def first_error(output: str) -> str:
    """The compiler's own first error with the lines that explain it; all of the output if there is none."""
    lines = output.splitlines()
    for i, line in enumerate(lines):
        if re.search(r"(fatal error|error):|undefined reference|cannot find", line):
            return "\n".join(lines[i : i + 8])
    return output[-4000:]


class NinjaBuild(build_ext):
    """Compiles the one extension with ninja; ``pip install .``, ``pip install -e .`` and ``build_ext --inplace`` all end here."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler, (jobs, why) = find_compiler(), job_count()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"])]
        self.write_ninja(temp / "build.ninja", compiler, list(dict.fromkeys(includes)), output)

        print(f"mxq_ext: building {output.name} with {compiler}, {jobs} jobs ({why})")
        print(f"mxq_ext: CPU targets {', '.join(TARGETS)}: all there are for {MACHINE}; the fastest that the CPU has is chosen at run time")
        print(f"mxq_ext: CUDA: {cuda_line()}; this version has no CUDA kernels yet, so nothing is built for it", flush=True)
        run = subprocess.run([find_ninja(), "-C", str(temp), "-j", str(jobs), *(["-v"] if self.verbose > 1 else [])],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            (temp / "build.log").write_text(run.stdout)
            raise SystemExit(f"mxq_ext: the compiler stopped with\n\n{first_error(run.stdout)}\n\nfull output: {temp / 'build.log'}")
        sys.stdout.write(run.stdout)

    def write_ninja(self, path: Path, compiler: str, includes: list[str], output: Path) -> None:
        def escape(p: object) -> str:
            return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        flags = " ".join(FLAGS)
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {compiler} {flags} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {compiler} -shared -pthread $in -o $out",
            "  description = link $out",
        ]
        objects = []
        for source in COMMON:
            objects.append((source, " ".join(escape(i) for i in includes) if source.startswith("bind") else ""))
        objects += [(f"cpu/target_{name}.cpp", " ".join(extra)) for name, extra in TARGETS.items()]
        # The longest compilations first, so that they do not run alone at the end.
        for source, extra in reversed(objects):
            lines += [f"build {source.replace('/', '_')}.o: compile {escape(ROOT / 'csrc' / source)}", f"  extra = {extra}"]
        linked = " ".join(source.replace("/", "_") + ".o" for source, _ in objects)
        lines += [f"build {escape(output)}: link {linked}", f"default {escape(output)}", ""]
        path.write_text("\n".join(lines))


setup(ext_modules=[Extension("mxq_ext._cpu", [f"csrc/{s}" for s in COMMON])], cmdclass={"build_ext": NinjaBuild})

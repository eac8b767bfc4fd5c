"""Builds the torch-free native modules; everything else about the package is in pyproject.toml.

``mxq_ext._cpu`` is always built. ``mxq_ext._cuda`` is built where nvcc is found, whether or not the machine has a GPU: a compiler decides, a
device is never asked for. Both are ninja files written here, since setuptools knows one set of flags per extension.
A binary built on any machine runs on every machine of its architecture: the CPU targets are chosen at run time.
"""

import os
import platform
import re
import shlex
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

#: What a wheel is for: one binary per capability, and PTX of the newest for what comes later.
CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
CUDA_SOURCES = ("bind_cuda.cpp", "cpu/parallel.cpp", *(f"cuda/{p.name}" for p in sorted((ROOT / "csrc" / "cuda").glob("*.c*")) if p.suffix in (".cu", ".cpp")))
CUDA_MEMORY_PER_JOB = 2 << 30
PTXAS_REPORTS = ROOT / "build" / "ptxas"  # what the assembler says of each kernel; bench/cuda_budget.py reads it
# No --use_fast_math: it flushes subnormals and rounds divisions, so that results would differ from the reference.
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]

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


def job_count(memory_per_job: int = MEMORY_PER_JOB) -> tuple[int, str]:
    """Parallel compilers, and why so many. ``MAX_JOBS`` overrides."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"])), "MAX_JOBS"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory()
    if memory is None:
        return cores, f"{cores} cores"
    return max(1, min(cores, memory // memory_per_job)), f"{cores} cores, {memory / 2**30:.1f} GiB free at {memory_per_job >> 30} GiB a compiler"


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


def find_nvcc() -> tuple[str | None, str]:
    """(nvcc, where it came from), or (None, why the CUDA module is not built)."""
    if os.environ.get("MXQ_CUDA") == "0":
        return None, "not built, MXQ_CUDA=0"
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        nvcc = Path(home) / "bin" / "nvcc"
        return (str(nvcc), "CUDA_HOME") if nvcc.exists() else (None, f"not built, there is no {nvcc}, which CUDA_HOME asks for")
    if nvcc := shutil.which("nvcc"):
        return nvcc, "PATH"
    # The wheels of the extra [cuda-build]. A build that pip isolates does not have the environment's own packages in sys.path.
    for folder in (*sys.path, sysconfig.get_paths()["purelib"]):
        nvcc = Path(folder) / "nvidia" / "cu13" / "bin" / "nvcc"
        if nvcc.exists():
            return str(nvcc), "nvidia-cuda-nvcc"
    return None, "not built, nvcc is neither in CUDA_HOME nor in PATH nor in site-packages (pip install '.[cuda-build]' brings it)"


def compression(nvcc: str) -> list[str]:
    """The flag for the smallest binary, where nvcc has it (12.8 and later). It takes no time, and three quarters of the bytes away."""
    return ["--compress-mode=size"] if "--compress-mode" in subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout else []


def gpus_here() -> list[str]:
    """Capabilities of this machine's GPUs, as the driver's tool tells them; none without it."""
    if not (tool := shutil.which("nvidia-smi")):
        return []
    try:
        told = subprocess.run([tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"mxq_ext: {tool} does not say which GPUs there are: {error}", flush=True)
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", told, re.M)), key=float)


def cuda_archs(nvcc: str) -> list[str]:
    """Capabilities to compile for, such as ``["7.5", "9.0", "12.0+PTX"]``: ``MXQ_CUDA_ARCHS``, or all of ours that this nvcc knows.

    ``MXQ_CUDA_ARCHS=native`` are those of the GPUs here, from 7.5 on, which the kernels need. If this nvcc does not know one of them, the newest other one gets
    PTX as well; without any it is 8.0+PTX.
    """
    known = re.findall(r"compute_(\d+)\b", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout)
    asked = os.environ.get("MXQ_CUDA_ARCHS")
    if asked == "native":
        here = [a for a in gpus_here() if float(a) >= 7.5]
        mine = [a for a in here if a.replace(".", "") in known]
        if not mine:
            return ["8.0+PTX"]
        return [*mine[:-1], mine[-1] + "+PTX"] if mine != here else mine
    archs = re.split(r"[;, ]+", asked.strip()) if asked else [a for a in CUDA_ARCHS if a.removesuffix("+PTX").replace(".", "") in known]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d(\+PTX)?", arch) or arch.removesuffix("+PTX").replace(".", "") not in known:
            raise SystemExit(f"mxq_ext: MXQ_CUDA_ARCHS={asked!r} has {arch!r}, which {nvcc} does not know; it knows "
                             + " ".join(f"{a[:-1]}.{a[-1]}" for a in known) + ", each with +PTX or without; or native alone")
    return archs


def first_error(output: str) -> str:
    """The compiler's own first error with the lines that explain it; all of the output if there is none."""
    lines = output.splitlines()
    for i, line in enumerate(lines):
        if re.search(r"(error|fatal)\s*:|undefined reference|cannot find", line):
            return "\n".join(lines[i : i + 8])
    return output[-4000:]


def escape(p: object) -> str:
    return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles the extensions with ninja; ``pip install .``, ``pip install -e .`` and ``build_ext --inplace`` all end here."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        temp.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("._cuda"):
            jobs, why = job_count(CUDA_MEMORY_PER_JOB)
            print(f"mxq_ext: building {output.name} with {NVCC} (from {NVCC_SOURCE}), {jobs} jobs ({why})")
            archs = cuda_archs(NVCC)
            print(f"mxq_ext: CUDA capabilities {' '.join(archs)} (MXQ_CUDA_ARCHS chooses others, MXQ_CUDA=0 leaves the module out)", flush=True)
            self.write_cuda_ninja(temp / "build.ninja", compiler, archs, output)
        else:
            jobs, why = job_count()
            self.write_ninja(temp / "build.ninja", compiler, output)
            print(f"mxq_ext: building {output.name} with {compiler}, {jobs} jobs ({why})")
            print(f"mxq_ext: CPU targets {', '.join(TARGETS)}: all there are for {MACHINE}; the fastest that the CPU has is chosen at run time")
            print(f"mxq_ext: CUDA module {NVCC_SOURCE if NVCC is None else 'follows'}", flush=True)
        self.run_ninja(temp, jobs)

    def run_ninja(self, temp: Path, jobs: int) -> None:
        """Shows each step as it begins; on failure the compiler's first error."""
        command = [find_ninja(), "-C", str(temp), "-j", str(jobs), *(["-v"] if self.verbose > 1 else [])]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as run:
            for line in run.stdout:
                lines.append(line)
                if re.match(r"\[\d+/\d+\]|ninja:", line):
                    sys.stdout.write(line)
                    sys.stdout.flush()
        if run.returncode:
            (temp / "build.log").write_text("".join(lines))
            raise SystemExit(f"mxq_ext: the compiler stopped with\n\n{first_error(''.join(lines))}\n\nfull output: {temp / 'build.log'}")
        sys.stdout.write("".join(line for line in lines if "warning" in line))

    @staticmethod
    def binding_flags() -> str:
        import pybind11

        includes = (pybind11.get_include(), sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"])
        return " ".join(escape(f"-I{p}") for p in dict.fromkeys(includes))

    def write_cuda_ninja(self, path: Path, compiler: str, archs: list[str], output: Path) -> None:
        static = Path(NVCC).resolve().parents[1] / "lib"  # where the wheels keep the runtime, and their nvcc does not look by itself
        codes = []
        for arch in archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            codes.append(f"-gencode=arch=compute_{number},code=[{f'compute_{number},' if arch.endswith('+PTX') else ''}sm_{number}]")
        names = " ".join(archs)
        nvcc, flags = escape(shlex.quote(NVCC)), " ".join([*NVCC_FLAGS, *compression(NVCC), *codes, "-Xptxas=-v"])
        lines = [
            "ninja_required_version = 1.5",
            "rule host",
            f"  command = {compiler} {' '.join(FLAGS)} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule nvcc",
            # The report is as old as what was compiled, and replaced as a whole; what is shown are warnings, or all of it if nvcc fails.
            f"  command = touch $out.begun; {nvcc} -ccbin {compiler} {flags} -MMD -MF $out.d -c $in -o $out > $out.ptxas 2>&1 "
            "|| { cat $out.ptxas; exit 1; }; grep warning $out.ptxas; touch -r $out.begun $out.ptxas; mv $out.ptxas $report.$$$$ && mv $report.$$$$ $report",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = compile $in for {names}",
            "rule link",
            f"  command = {nvcc} -ccbin {compiler} -shared -cudart=static -L{escape(shlex.quote(str(static)))} -Xcompiler=-pthread $in -o $out",
            "  description = link $out",
        ]
        PTXAS_REPORTS.mkdir(parents=True, exist_ok=True)
        objects = []
        # The longest compilation first, so that it does not run alone at the end.
        for source in sorted(CUDA_SOURCES, key=lambda s: (s != "cuda/mv_mixed.cu", not s.endswith(".cu"))):
            objects.append(source.replace("/", "_") + ".o")
            lines.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'host'} {escape(ROOT / 'csrc' / source)}")
            if source.endswith(".cu"):
                lines.append(f"  report = {escape(shlex.quote(str(PTXAS_REPORTS / f'{Path(source).stem}.txt')))}")
            if source.startswith("bind"):
                lines.append(f"  extra = {self.binding_flags()} '-DMXQ_CUDA_ARCH_NAMES=\"{names}\"'")
        lines += [f"build {escape(output)}: link {' '.join(objects)}", f"default {escape(output)}", ""]
        path.write_text("\n".join(lines))

    def write_ninja(self, path: Path, compiler: str, output: Path) -> None:
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
            objects.append((source, self.binding_flags() if source.startswith("bind") else ""))
        objects += [(f"cpu/target_{name}.cpp", " ".join(extra)) for name, extra in TARGETS.items()]
        # The longest compilations first, so that they do not run alone at the end.
        for source, extra in reversed(objects):
            lines += [f"build {source.replace('/', '_')}.o: compile {escape(ROOT / 'csrc' / source)}", f"  extra = {extra}"]
        linked = " ".join(source.replace("/", "_") + ".o" for source, _ in objects)
        lines += [f"build {escape(output)}: link {linked}", f"default {escape(output)}", ""]
        path.write_text("\n".join(lines))


NVCC, NVCC_SOURCE = find_nvcc()
EXTENSIONS = [Extension("mxq_ext._cpu", [f"csrc/{s}" for s in COMMON])]
if NVCC:
    EXTENSIONS.append(Extension("mxq_ext._cuda", [f"csrc/{s}" for s in CUDA_SOURCES]))
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": NinjaBuild})

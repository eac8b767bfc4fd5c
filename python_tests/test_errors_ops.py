"""What the ops, the loader and the environment refuse, and that each message says what was asked, which rule failed and what to do."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxq_ext import _native, env, ops
from mxq_ext.errors import MxqWarning, NativeError, ShapeError
from mxq_ext.testing import cases, numeric

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packed():
    return ops.prepack(cases.random_qtensor("w4g32", 20, 45))


def refused(error, call, *parts):
    with pytest.raises(error) as e:
        call()
    for part in (e.value.asked, e.value.rule, e.value.fix, *parts):
        assert part in str(e.value)


@pytest.mark.parametrize("path", ["direct", "registered", "meta"])
def test_linear(packed, path):
    def call(x, bias=None):
        if path == "meta":
            p = ops.Packed(packed.blob.to("meta"), packed.shape, packed.format_name)
            return lambda: ops.linear(x.to("meta"), p, None if bias is None else bias.to("meta"))
        if path == "registered":
            return lambda: torch.ops.mxq_ext.linear(x, packed.blob, 20, bias)
        return lambda: ops.linear(x, packed, bias)

    asked = "linear of x (2, 45) float64 by a weight of 20 x 45"
    refused(ShapeError, call(torch.randn(2, 45).double()), asked, "x must be float32, bfloat16 or float16, it is float64", "convert it")
    refused(ShapeError, call(torch.randn(2, 45), torch.randn(19)), "bias must be a float vector of 20 on", "it is float32 (19,) on")
    refused(ShapeError, call(torch.randn(2, 45), torch.randn(1, 20)), "it is float32 (1, 20) on", "reshape, convert or move it")
    refused(ShapeError, call(torch.randn(2, 45), torch.ones(20, dtype=torch.int32)), "it is int32 (20,) on")
    if path != "meta":  # the registered op learns K from x on meta, where there is no packed weight to ask
        refused(ShapeError, call(torch.randn(2, 44)), "45" if path == "direct" else "the packed weight is 20 x 45", "which layer this weight belongs to")
    refused(ShapeError, call(torch.tensor(1.0)), "the last dimension of x must be", "it is absent")


def test_devices(packed):
    class Elsewhere:
        """A tensor on a device that this machine need not have."""

        is_cpu = is_meta = False
        shape, dtype, device, requires_grad = (2, 45), torch.float32, "cuda:0", False

    refused(ShapeError, lambda: ops.check_linear(Elsewhere(), 20, 45, None), "the kernels run on the CPU, x is on cuda:0", "move x and the module to the CPU")
    ids = Elsewhere()
    ids.dtype = torch.int64
    refused(ShapeError, lambda: ops.check_embedding(ids, 20, 45, torch.float32), "ids are on cuda:0")
    refused(ShapeError, lambda: ops.linear(torch.randn(2, 45), packed, torch.empty(20, device="meta")), "on meta", "move it")


def test_embedding(packed):
    refused(ShapeError, lambda: ops.embedding(torch.tensor([0, 20]), packed), "ids must lie in 0..19, found 0..20", "check the tokenizer's vocabulary")
    refused(ShapeError, lambda: ops.embedding(torch.tensor([-1]), packed), "found -1..-1")
    refused(ShapeError, lambda: ops.embedding(torch.tensor([1.0]), packed), "ids must be int64 or int32, they are float32", "convert them")
    refused(ShapeError, lambda: ops.embedding(torch.tensor([1]), packed, torch.float64), "asked for float64")
    refused(ShapeError, lambda: torch.ops.mxq_ext.embedding(torch.tensor([1]), packed.blob, 21, 45, torch.float32), "the packed weight is 20 x 45")
    with pytest.raises(ShapeError, match="found 0..20"):
        ops.embedding_ref(torch.tensor([0, 20]), packed)


def test_registered_ops_trust_no_bytes(packed):
    x = torch.randn(2, 45)
    refused(NativeError, lambda: torch.ops.mxq_ext.linear(x, torch.zeros(4096, dtype=torch.uint8), 20, None), "packed weight of 4096 bytes",
            "make it again with ops.prepack()")
    refused(NativeError, lambda: torch.ops.mxq_ext.linear(x, packed.blob[:-1], 20, None), "no prepacked weight of this version")
    refused(NativeError, lambda: torch.ops.mxq_ext.linear(x, packed.blob.short(), 20, None), "it must be a contiguous uint8 vector on the CPU")
    refused(ShapeError, lambda: torch.ops.mxq_ext.linear(x, packed.blob, 19, None), "the packed weight is 20 x 45")


def test_explain(packed):
    refused(ShapeError, lambda: ops.explain(packed, 1, torch.float64), "kernel for x of float64")


def test_targets():
    before = ops.target()
    refused(NativeError, lambda: ops.set_target("sse9"), "CPU target 'sse9'", f"this CPU and build can use {', '.join(ops.targets())}", "MXQ_CPU_TARGET")
    assert ops.target() == before


def run(code: str, **environment) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MXQ_")} | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)


def test_a_wrong_target_in_the_environment_is_reported_on_use():
    done = run("from mxq_ext import ops\ntry: ops.target()\nexcept Exception as e: print(type(e).__name__, e)", MXQ_CPU_TARGET="mmx")
    assert done.stdout == f"NativeError CPU target 'mmx': this CPU and build can use {', '.join(ops.targets())}; " \
                          "set MXQ_CPU_TARGET to one of them, or unset it\n", done.stderr


@pytest.mark.parametrize("cause,rule", [(ModuleNotFoundError("No module named 'mxq_ext._cpu'"), "the compiled extension mxq_ext._cpu was not built"),
                                        (ImportError("undefined symbol: xyz"), "the extension does not load (undefined symbol: xyz)")])
def test_a_missing_extension_explains_itself_on_use(monkeypatch, cause, rule):
    real = importlib.import_module

    def fail(name, *args):
        if name == "mxq_ext._cpu":
            raise cause
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", fail)
    missing = _native._load()
    assert not hasattr(missing, "__file__")
    monkeypatch.setattr(_native, "cpu", missing)
    refused(NativeError, ops.targets, "native function targets", rule, "pip install .", "mxq doctor")
    refused(NativeError, lambda: ops.prepack(cases.random_qtensor("w4", 2, 2)), rule)
    refused(NativeError, lambda: ops.set_target("scalar"), rule)


def test_environment_table():
    names = [name for name, _ in env.table()]
    assert names == sorted(names) and {"MXQ_CPU_TARGET", "MXQ_PRINT_CONFIG", "MXQ_STRICT"} <= set(names)
    assert all("default" in meaning for _, meaning in env.table())
    with pytest.raises(AssertionError):
        env.get("MXQ_UNKNOWN")


def test_every_variable_that_the_package_reads_is_in_the_table():
    import re

    found = {m for path in (ROOT / "mxq_ext").rglob("*.py") for m in re.findall(r"""["'](MXQ_[A-Z_]+)["']""", path.read_text(encoding="utf-8"))}
    assert found == {name for name, _ in env.table()}


def test_fallbacks_warn_and_are_errors_when_strict(monkeypatch):
    with pytest.warns(MxqWarning, match="linear on a toaster: it has no vectors; plain loops are used"):
        env.fallback("linear on a toaster", "it has no vectors", "plain loops are used")
    monkeypatch.setenv("MXQ_STRICT", "1")
    refused(NativeError, lambda: env.fallback("linear on a toaster", "it has no vectors", "plain loops"), "unset MXQ_STRICT", "plain loops")
    monkeypatch.setenv("MXQ_STRICT", "0")
    assert not env.flag("MXQ_STRICT")


def test_the_measure_of_error(capsys):
    a = torch.tensor([3.0, 4.0])
    assert numeric.error(a, a) == 0 and numeric.error(a * 1.01, a) == pytest.approx(0.01)
    assert numeric.error(torch.zeros(0), torch.zeros(0)) == 0 and numeric.error(torch.zeros(2), torch.zeros(2)) == 0
    assert numeric.error(a, torch.zeros(2)) == numeric.error(torch.tensor([float("nan"), 1.0]), a) == float("inf")
    with pytest.raises(ValueError, match="shapes differ"):
        numeric.error(a, a[:1])
    with pytest.raises(AssertionError, match="x: error 1.0"):
        numeric.check(a * 2, a, 0.5, "x")
    assert "x: error 1.00e+00, bound 5.00e-01" in capsys.readouterr().out

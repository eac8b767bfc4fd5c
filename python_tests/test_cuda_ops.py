"""ops.linear with weights that are packed for CUDA, as far as it can be tested without a GPU: kernels on the CPU executor, devices played by stand-ins."""

import contextlib
import re
from types import SimpleNamespace

import cuda_tools
import pytest
import torch

from mxq_ext import _native, cuda, doctor, ops
from mxq_ext.errors import NativeError, ShapeError
from mxq_ext.testing import cases


@pytest.fixture
def packed():
    q = cases.random_qtensor("w4g64_asym", 20, 100)
    return q, cuda_tools.bench("cpu").pack(q)


def test_any_shape_of_x(packed):
    q, p = packed
    r, w, bias = cuda_tools.bench("cpu").runtime, q.dequantize().double(), torch.randn(20, generator=torch.Generator().manual_seed(0)).half()
    wide = cases.random_x(12, 200, torch.float16)
    for x in (wide[0, :100], wide[:, 50:150].reshape(3, 4, 100), wide.T[:100].T, wide[:, ::2], wide[:0, :100].reshape(0, 5, 100)):
        y = cuda.linear_on(r, x, p, bias, 0)
        assert y.shape == (*x.shape[:-1], 20) and y.dtype == x.dtype
        assert not y.numel() or cuda_tools.error(y, x.double() @ w.T + bias.double()) <= 1e-3


def test_the_current_stream_and_device_are_used(packed, monkeypatch):
    q, p = packed
    seen, entered = [], []
    functions = cuda_tools.bench("cpu").runtime.library
    spy = SimpleNamespace(**{n: getattr(functions, n) for n in ("explain", "workspace_nbytes", "error_text")},
                          linear=lambda address: seen.append(cuda.LinearCall.from_address(address).stream) or functions.linear(address))

    @contextlib.contextmanager
    def device(d):
        entered.append(d)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4711))
    monkeypatch.setattr(cuda, "runtime", lambda d: cuda.Runtime(spy))
    x = cases.random_x(2, 100, torch.float16)
    y = cuda.linear(x, p, None)
    assert seen == [4711] and entered == [x.device]
    assert cuda_tools.error(y, x.double() @ q.dequantize().double().T) <= 1e-3


def test_failed_launches_are_errors_with_the_reason(packed):
    functions = cuda_tools.bench("cpu").runtime.library
    broken = SimpleNamespace(explain=functions.explain, workspace_nbytes=functions.workspace_nbytes, linear=lambda address: 98,
                             error_text=lambda code: f"words for {code}")
    with pytest.raises(NativeError, match=r"linear of x \(2, 100\).*words for 98"):
        cuda.Runtime(broken).linear(cases.random_x(2, 100, torch.float16), [(packed[1], None)])


def test_shapes_without_computing(packed):
    _, p = packed
    x = torch.empty(3, 5, 100, dtype=torch.bfloat16, device="meta")
    y = ops.linear(x, p)
    assert y.shape == (3, 5, 20) and y.dtype == torch.bfloat16 and y.is_meta
    with pytest.raises(ShapeError, match="the last dimension of x must be 99"):
        ops.check_linear(x, 20, 99, None, "cuda")


def test_refusals(packed):
    _, p = packed
    x = cases.random_x(2, 100, torch.float16)
    with pytest.raises(ShapeError, match="the weight is packed for cuda, x is on cpu"):
        ops.linear(x, p)
    with pytest.raises(NativeError, match="the CUDA kernels read x as it is"):
        ops.linear(x, p, compute="a8")
    with pytest.raises(NativeError, match="there are a16 and a8"):
        ops.linear(x, p, compute="a4")
    with pytest.raises(NativeError, match="forward only"):
        ops.linear(x.requires_grad_(), p)


def test_bytes_are_checked_before_they_are_trusted(packed):
    _, p = packed
    assert cuda.CudaPacked.of(p.blob, p.head, (20, 100)).shape == (20, 100)
    with pytest.raises(ShapeError, match="linear of 20 x 101: .*20 x 100"):
        cuda.CudaPacked.of(p.blob, p.head, (20, 101))
    for blob, head in ((p.blob[:-1], p.head), (p.blob, p.head[:-8]), (p.blob, torch.zeros_like(p.head)), (p.blob, p.head[:16])):
        with pytest.raises(NativeError, match="no weight packed for CUDA"):
            cuda.CudaPacked.of(blob, head, (20, 100))


def test_a_missing_module_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(_native, "cuda", _native.Missing(ModuleNotFoundError("no _cuda"), "_cuda", _native._BUILD_CUDA))
    cuda.runtime.cache_clear()
    with pytest.raises(NativeError, match=r"mxq_ext._cuda was not built.*cuda-build"):
        cuda.runtime(torch.device("cuda", 0))
    state = "no CUDA kernels: the compiled extension mxq_ext._cuda was not built"
    assert doctor._cuda() == {"built": False, "archs": None, "devices": 0, "driver": None, "state": state}


@pytest.mark.parametrize("answer, words", (
    ((0, 35, 0, 13000), "built for 8.0 9.0+PTX with CUDA 13.0; this machine has no NVIDIA driver"),
    ((0, 100, 12040, 13000), r"the driver knows CUDA 12.4, but no device can be used \(no device\)"),
    ((2, 0, 13010, 13000), "the driver knows CUDA 13.1 and sees 2 devices"),
    ((1, 0, 13010, 13000), "sees 1 device$"),
))
def test_doctor_in_words(monkeypatch, answer, words):
    monkeypatch.setattr(_native, "cuda", SimpleNamespace(devices=lambda: answer, archs="8.0 9.0+PTX", error_text=lambda code: "no device"))
    report = doctor.examine()
    assert report["cuda"]["devices"] == answer[0]
    assert re.search(words.replace("+", r"\+"), report["cuda"]["state"])
    assert any(line.startswith("cuda") and "models compute on the CPU" in line for line in doctor.lines(report))


@pytest.mark.skipif(isinstance(_native.cuda, _native.Missing), reason="mxq_ext._cuda is not built")
def test_the_built_module():
    """Its host code is the code that the tests above ran; without a driver it says what is missing."""
    r, mine = cuda.Runtime(_native.cuda, 80, 108), cuda_tools.bench("cpu").runtime
    x = cases.random_x(3, 200, torch.float16)
    for layout in cases.LAYOUTS[:2]:
        q = layout.make()
        p = r.pack(q)
        assert torch.equal(p.blob, mine.pack(q).blob)
        assert all(torch.equal(a, b) for a, b in zip(r.unpack(p).to_tensors().values(), q.to_tensors().values(), strict=True))
    assert r.explain(x, [(p, None)]) == cuda.Runtime(mine.library, 80, 108).explain(x, [(p, None)])
    count, code, driver, built = _native.cuda.devices()
    assert built >= 12000 and re.fullmatch(r"\d+\.\d(\+PTX)?( \d+\.\d(\+PTX)?)*", _native.cuda.archs)
    if not driver:
        assert count == 0 and code
        with pytest.raises(NativeError, match="driver"):
            r.linear(x, [(p, None)])

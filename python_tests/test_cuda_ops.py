"""ops.linear with weights that are packed for CUDA, as far as it can be tested without a GPU: kernels on the CPU executor, devices played by stand-ins."""

import contextlib
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import cuda_tools
import pytest
import torch

from mxq_ext import _native, cuda, doctor, ops
from mxq_ext.errors import NativeError, ShapeError
from mxq_ext.kv import cuda as kv_cuda
from mxq_ext.nn import fused_cuda
from mxq_ext.testing import cases


@pytest.fixture
def packed():
    q = cases.random_qtensor("w4g64_asym", 20, 100)
    return q, cuda_tools.bench("cpu").pack(q)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The registered CUDA ops also for tensors in host memory, with the kernels of the executor."""
    runtime = cuda_tools.bench("cpu").runtime
    monkeypatch.setattr(cuda, "_on", lambda device: contextlib.nullcontext((runtime, 0)))
    library = torch.library.Library("mxq_ext", "IMPL")
    library.impl("linear_cuda", ops._op_linear_cuda, "CPU")
    library.impl("embedding_cuda", ops._op_embedding_cuda, "CPU")
    yield
    library._destroy()


def test_any_shape_of_x(packed, on_the_cpu):
    q, p = packed
    w, bias = q.dequantize().double(), torch.randn(20, generator=torch.Generator().manual_seed(0)).half()
    wide = cases.random_x(12, 200, torch.float16)
    for x in (wide[0, :100], wide[:, 50:150].reshape(3, 4, 100), wide.T[:100].T, wide[:, ::2], wide[:0, :100].reshape(0, 5, 100)):
        y = cuda.linear(x, p, bias)
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
        cuda.Runtime(broken).linear(cases.random_x(2, 100, torch.float16), [(packed[1], None)], stream=0)


def test_shapes_without_computing(packed):
    _, p = packed
    x = torch.empty(3, 5, 100, dtype=torch.bfloat16, device="meta")
    y = ops.linear(x, p)
    assert y.shape == (3, 5, 20) and y.dtype == torch.bfloat16 and y.is_meta
    ids = torch.empty(3, 5, dtype=torch.int64, device="meta")
    rows = ops.embedding(ids, p, torch.bfloat16)
    assert rows.shape == (3, 5, 100) and rows.dtype == torch.bfloat16 and rows.is_meta
    with pytest.raises(ShapeError, match="the last dimension of x must be 99"):
        ops.check_linear(x, 20, 99, None, p.blob.device)


def test_refusals(packed):
    _, p = packed
    x = cases.random_x(2, 100, torch.float16)
    elsewhere = cuda.CudaPacked(p.blob.to("meta"), p.head, p.shape, p.format_name, p.meta)
    with pytest.raises(ShapeError, match="the weight is packed for meta, x is on cpu"):
        ops.linear(x, elsewhere)
    with pytest.raises(ShapeError, match="the table is packed for meta, ids are on cpu"):
        ops.embedding(torch.tensor([0]), elsewhere)
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
    room = torch.empty(p.blob.numel() + 24, dtype=torch.uint8)
    start = 8 - room.data_ptr() % 16
    askew = room[start % 16 : start % 16 + p.blob.numel()].copy_(p.blob)
    with pytest.raises(NativeError, match="packed weight at address 0x.*8: the kernels read it by 16 bytes"):
        cuda.CudaPacked.of(askew, p.head, (20, 100))


#: What opcheck looks at; "test_autograd_registration" would want a derivative of linear_cuda, which has none and says so.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_registered_ops(packed, on_the_cpu):
    q, p = packed
    for shape, dtype in (((3, 100), torch.float16), ((2, 5, 100), torch.bfloat16), ((100,), torch.float32)):
        x = cases.random_x(10, 100, dtype)[: math.prod(shape[:-1])].reshape(shape)
        for bias in (None, torch.randn(20)):
            torch.library.opcheck(torch.ops.mxq_ext.linear_cuda.default, (x, p.blob, p.head, 20, bias), test_utils=CHECKS)
    for ids in (torch.tensor([[0, 19], [3, 3]]), torch.tensor([4], dtype=torch.int32)):
        torch.library.opcheck(torch.ops.mxq_ext.embedding_cuda.default, (ids, p.blob, p.head, 20, 100, torch.float16), test_utils=CHECKS)
        assert torch.equal(torch.ops.mxq_ext.embedding_cuda(ids, p.blob, p.head, 20, 100, torch.float32), q.dequantize()[ids.long()])


def test_compiled_code_calls_the_registered_ops(packed, on_the_cpu):
    q, p = packed
    step = torch.compile(lambda ids: ops.linear(ops.embedding(ids, p, torch.float16) * 2, p), backend="aot_eager", fullgraph=True)
    ids = torch.tensor([1, 7, 19])
    x = q.dequantize()[ids].half() * 2
    assert cuda_tools.error(step(ids), x.double() @ q.dequantize().double().T) <= 1e-3


@pytest.mark.parametrize("archs, has, has_not", (
    ("8.0", ((8, 0), (8, 6), (8, 9)), ((7, 5), (9, 0), (12, 0))),
    ("7.5 8.6 9.0+PTX", ((7, 5), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)), ((7, 0), (8, 0))),
))
def test_devices_that_a_build_serves(archs, has, has_not):
    assert all(cuda.without_kernels(archs, c) is None for c in has)
    for major, minor in has_not:
        assert cuda.without_kernels(archs, (major, minor)) == f"the device has compute capability {major}.{minor}, and the kernels were built for {archs}"


def test_every_struct_is_that_of_the_library():
    """Field for field: a library and a package of two versions would hand each other other numbers, and nobody would see it."""
    assert cuda_tools.bench("cpu").runtime.layouts == cuda._LAYOUTS | kv_cuda._LAYOUTS | fused_cuda._LAYOUTS


@pytest.mark.parametrize("told", (None, lambda right: right.replace(" warps=", " warps_k="), lambda right: right.replace("stream=64", "stream=72")))
def test_a_module_of_another_version_is_refused(monkeypatch, told):
    """One that does not tell its structs, one that calls a field something else, one that has it elsewhere."""
    right = cuda_tools.Functions(cuda_tools.library()).layouts()
    module = SimpleNamespace(archs="8.0", **({} if told is None else {"layouts": lambda: told(right)}))
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(name="Some GPU", major=8, minor=0, multi_processor_count=80))
    cuda.runtime.cache_clear()
    structs = "LinearCall, Output, RectDesc, WeightDesc" if told is None else "LinearCall"
    with pytest.raises(NativeError, match=f"is of another version of this package, it has other fields in {structs}; build it again"):
        cuda.runtime(torch.device("cuda", 0))
    module.layouts = lambda: right
    assert cuda.runtime(torch.device("cuda", 0)).library is module
    cuda.runtime.cache_clear()


@pytest.mark.parametrize("capability, fix", (((7, 0), "keep the model on the CPU: there are kernels for compute capability 7.5 and later"),
                                             ((9, 0), r"build them for it: MXQ_CUDA_ARCHS=9.0 pip install \.")))
def test_a_device_without_kernels_is_named(monkeypatch, capability, fix):
    device = SimpleNamespace(name="Some GPU", major=capability[0], minor=capability[1], multi_processor_count=80)
    monkeypatch.setattr(_native, "cuda", SimpleNamespace(archs="8.0", devices=lambda: (1, 0, 13000, 13000), error_text=str))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: device)
    cuda.runtime.cache_clear()
    asked = rf"CUDA kernels on cuda:0 \(Some GPU\): the device has compute capability {capability[0]}.{capability[1]}, and the kernels were built for 8.0; "
    with pytest.raises(NativeError, match=asked + fix):
        cuda.runtime(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((8, 6), capability)[i])
    assert doctor._cuda()["state"].endswith(f"; NOT usable is device 1: the device has compute capability {capability[0]}.{capability[1]}, "
                                            "and the kernels were built for 8.0")


def test_decisions_are_printed_once(packed, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "runtime", lambda device: cuda_tools.bench("cpu").runtime)
    monkeypatch.setattr(cuda, "_on", lambda device: contextlib.nullcontext((cuda_tools.bench("cpu").runtime, 0)))
    monkeypatch.setattr(ops, "_PRINT", True)
    monkeypatch.setattr(ops, "_printed", set())
    for _ in range(2):
        ops.linear(cases.random_x(2, 100, torch.float16), packed[1])
    assert re.fullmatch(r"mxq_ext: linear mv_w4g64_asym_a16__sm80: M=2 N=20 K=100 x=float16: .* blocks of .*\n", capsys.readouterr().err)


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
    assert any(line.startswith("cuda") and "a model computes where model.to(device) puts it" in line for line in doctor.lines(report))


BUILT = pytest.mark.skipif(isinstance(_native.cuda, _native.Missing), reason="mxq_ext._cuda is not built: nvcc was not found when the package was built")


@BUILT
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_built_module_is_imported_and_explained():
    """In a process of its own, where nothing of CUDA has been looked at before."""
    code = "import mxq_ext; from mxq_ext import _native, doctor; print(_native.cuda.archs); print(*doctor.lines(doctor.examine()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    archs, *report = done.stdout.splitlines()
    (line,) = [line for line in report if line.startswith("cuda ")]
    assert f"CUDA kernels built for {archs} with CUDA" in line and ("this machine has no NVIDIA driver" in line or "no device can be used" in line)
    assert "torch sees no CUDA device" in line


@BUILT
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
            r.linear(x, [(p, None)], stream=0)

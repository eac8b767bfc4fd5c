"""The native ops: what goes in and out, the checks, and their registration with ``torch.library``.

    prepack(QTensor) -> Packed          once at load: the canonical tensors in the order in which the kernels read them
    pack(QTensor, device)               the same for a device, which may be a GPU (cuda.py)
    linear(x, packed, bias)             x W^T + bias
    embedding(ids, packed, dtype)       rows of W
    dequantize(packed)                  W itself

Each op has a plain-loop twin (``linear_ref`` and so on) that reads the canonical layout and accumulates in double precision.
Checks live in the ``check_*`` functions, which the real and the fake (shape-only) paths both call; native code trusts them.
Unless something watches (:func:`watched`), the functions call native code directly for plain tensors, because a registered op costs more than a small layer.
"""

from __future__ import annotations

import math
import sys

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _native, cuda, env
from ._native import set_target  # noqa: F401  (public: ops.set_target)
from .errors import NativeError, ShapeError
from .formats import Format, kernel_format
from .qtensor import TYPES, QTensor, Rectangle, Sparse

#: How a linear reads x: exactly, with float32 products and sums; or rounded to int8 by groups, with exact integer sums (docs/formats.md).
COMPUTES = ("a16", "a8")
#: Classes of tensors whose memory native code may take for what it is. A FakeTensor, say, has none.
PLAIN = (torch.Tensor, torch.nn.Parameter)
_WHICH = "check which layer this weight belongs to"


class Packed:
    """A weight [N, K] in the layout of the CPU kernels.

    Attributes:
        blob: uint8 [nbytes], one block that describes itself (csrc/blob.h); it may be copied, pickled and shared like any tensor.
        shape: (N, K).
        format_name: as :attr:`QTensor.format_name`.
        nested: as :meth:`QTensor.nested`: the blob holds the expanded weight, and this is what the stored one has in its place.
    """

    __slots__ = ("blob", "shape", "format_name", "nested")

    def __init__(self, blob: torch.Tensor, shape: tuple[int, int], format_name: str, nested: dict[int, dict[str, torch.Tensor]] | None = None):
        self.blob, self.shape, self.format_name, self.nested = blob, tuple(shape), format_name, nested or {}

    @staticmethod
    def from_blob(blob: torch.Tensor) -> Packed:
        """A Packed around bytes that :func:`prepack` made (of a nested weight: of its expanded form). Raises NativeError if they are something else."""
        d = _describe(blob)
        return Packed(blob, (d["n"], d["k"]), d["format_name"])

    @property
    def nbytes(self) -> int:
        """Bytes in memory (padding, header and ``nested`` included; the bytes on disk are ``QTensor.nbytes()``)."""
        return self.blob.numel() + sum(t.numel() * t.element_size() for part in self.nested.values() for t in part.values())

    def clone(self) -> Packed:
        """The same weight in memory of its own."""
        return Packed(self.blob.clone(), self.shape, self.format_name, {i: {n: t.clone() for n, t in part.items()} for i, part in self.nested.items()})

    def __repr__(self) -> str:
        return f"Packed({self.shape[0]} x {self.shape[1]}, {self.format_name}, {self.nbytes} bytes)"

    def __getstate__(self):
        return self.blob, self.shape, self.format_name, self.nested

    def __setstate__(self, state):
        self.blob, self.shape, self.format_name, self.nested = state


# ------------------------------------------------------------------------------------------------------------------ prepack


def _pointer(t: torch.Tensor | None) -> int:
    return 0 if t is None or t.is_meta else t.data_ptr()


def _rectangle_tuple(r: Rectangle) -> tuple:
    t = r.tensors
    codes, scales = t.get("codes", t.get("values")), t.get("scales", t.get("table"))
    return r.r0, r.r1, r.c0, r.c1, r.format.native, _pointer(codes), _pointer(scales), _pointer(t.get("zeros"))


def _canonical(q: QTensor) -> tuple[tuple, QTensor]:
    """(what native code takes, a QTensor that keeps the memory behind its pointers alive). Nested scales and zeros are expanded."""
    whole = q.expanded().contiguous()
    s = whole.sparse
    args = (*whole.shape, [_rectangle_tuple(r) for r in whole.rectangles], _pointer(whole.perm_rows), _pointer(whole.perm_cols),
            *((0, 0, 0, 0) if s is None else (_pointer(s.rowptr), _pointer(s.cols), _pointer(s.values), s.values.numel())))
    return args, whole


def prepack(q: QTensor) -> Packed:
    """Brings a weight into the layout of the CPU kernels. Lossless; :func:`unpack` is the inverse. Nested scales and zeros are expanded for the kernels,
    and kept beside as they are stored.

    Validates ``q`` first (ShapeError), since native code trusts its index tensors. Runs on all torch threads.
    """
    q.validate()
    tensors = list(q.to_tensors().values())
    bad = next((t for t in tensors if t.device.type != "cpu"), None)
    if bad is not None:
        raise ShapeError(f"packing a weight of {q.shape[0]} x {q.shape[1]}", f"the kernels run on the CPU, its tensors are on {bad.device}",
                         "move them to the CPU, or load them first if the device is meta")
    args, keep = _canonical(q)
    blob = torch.empty(_native.cpu.blob_nbytes(args), dtype=torch.uint8)
    _native.cpu.prepack(args, blob.data_ptr(), torch.get_num_threads())
    del keep
    return Packed(blob, q.shape, q.format_name, q.nested())


def _check_blob(blob: torch.Tensor) -> None:
    if blob.device.type != "cpu" or blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous():
        raise NativeError(f"packed weight as {str(blob.dtype)[6:]} {tuple(blob.shape)} on {blob.device}",
                          "it must be a contiguous uint8 vector on the CPU", "use the blob of ops.prepack() unchanged")


def _describe(blob: torch.Tensor) -> dict:
    _check_blob(blob)
    try:
        return _native.cpu.describe(blob.data_ptr(), blob.numel())
    except ValueError as error:
        raise NativeError(f"packed weight of {blob.numel()} bytes", str(error), "make it again with ops.prepack()") from None


def pack(q: QTensor, device: torch.device) -> Packed | cuda.CudaPacked:
    """The weight as the kernels of that device read it: :func:`prepack`, or ``cuda.pack``. Raises NativeError where there are no kernels."""
    if device.type == "cpu":
        return prepack(q)
    if device.type == "cuda":
        return cuda.pack(q, device)
    raise NativeError(f"packing a weight of {q.shape[0]} x {q.shape[1]} for {device}", "there are kernels for CPUs and for CUDA devices",
                      "keep the model on the CPU")


def unpack(p: Packed | cuda.CudaPacked) -> QTensor:
    """The QTensor that was packed, bit for bit (without its ``info``), on the CPU."""
    if isinstance(p, cuda.CudaPacked):
        return cuda.unpack(p)
    d = _describe(p.blob)
    rects, args = [], []
    for r0, r1, c0, c1, name in d["rectangles"]:
        fmt = Format.parse(name)
        tensors = {n: torch.empty(shape, dtype=getattr(torch, dtype)) for n, (shape, dtype) in fmt.tensor_shapes(r1 - r0, c1 - c0).items()}
        rects.append(Rectangle(r0, r1, c0, c1, fmt, tensors))
        args.append(_rectangle_tuple(rects[-1]))
    _native.cpu.unpack(p.blob.data_ptr(), args, torch.get_num_threads())

    def vector(name, dtype, count):
        return p.blob[d[name] : d[name] + count * dtype.itemsize].clone().view(dtype) if d[name] else None

    n, k, nnz = d["n"], d["k"], d["nnz"]
    sparse = None
    if d["rowptr"]:
        sparse = Sparse(vector("rowptr", torch.int32, n + 1), vector("cols", torch.int32, nnz), vector("values", torch.float16, nnz))
    return QTensor((n, k), rects, vector("perm_rows", torch.int32, n), vector("perm_cols", torch.int32, k), sparse).with_nested(p.nested)


# ------------------------------------------------------------------------------------------------------------------- checks


def _is_bias(bias: torch.Tensor | None, x: torch.Tensor, n: int) -> bool:
    return bias is None or (bias.dim() == 1 and bias.shape[0] == n and bias.dtype in TYPES and bias.device == x.device)


def check_compute(compute: str) -> None:
    """Raises NativeError for a mode that does not exist."""
    if compute not in COMPUTES:
        raise NativeError(f"compute mode {compute!r}", f"there are {' and '.join(COMPUTES)}", "choose one of them")


def check_linear(x: torch.Tensor, n: int, k: int, bias: torch.Tensor | None, device: torch.device | None = None) -> None:
    """Rules of :func:`linear` for x [..., K], a weight [N, K] packed for ``device`` (None: the CPU kernels), and bias [N]. Raises ShapeError."""
    # All rules at once first: this runs before every call of a kernel that may take ten microseconds.
    here = (x.is_cpu if device is None else x.device == device) or x.is_meta
    if here and x.dtype in TYPES and x.dim() and x.shape[-1] == k and _is_bias(bias, x, n):
        return
    asked = f"linear of x {tuple(x.shape)} {str(x.dtype)[6:]} by a weight of {n} x {k}"
    if not here:
        where = "the kernels run on the CPU" if device is None else f"the weight is packed for {device}"
        raise ShapeError(asked, f"{where}, x is on {x.device}", "move x and the module to the " + ("CPU" if device is None else "same device"))
    if x.dtype not in TYPES:
        raise ShapeError(asked, f"x must be float32, bfloat16 or float16, it is {str(x.dtype)[6:]}", "convert it")
    if not x.dim() or x.shape[-1] != k:
        raise ShapeError(asked, f"the last dimension of x must be {k}, it is {x.shape[-1] if x.dim() else 'absent'}", _WHICH)
    have = f"{str(bias.dtype)[6:]} {tuple(bias.shape)} on {bias.device}"
    raise ShapeError(asked, f"bias must be a float vector of {n} on {x.device}, it is {have}", "reshape, convert or move it")


def check_embedding(ids: torch.Tensor, n: int, k: int, dtype: torch.dtype, values: bool = True, device: torch.device | None = None) -> None:
    """Rules of :func:`embedding` for ids [...] and a weight [N, K] packed for ``device``; ``values`` also checks the range. Raises ShapeError."""
    asked = f"embedding of ids {tuple(ids.shape)} {str(ids.dtype)[6:]} in a table of {n} x {k}"
    if ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(asked, f"ids must be int64 or int32, they are {str(ids.dtype)[6:]}", "convert them")
    if dtype not in TYPES:
        raise ShapeError(asked, f"the result must be float32, bfloat16 or float16, asked for {str(dtype)[6:]}", "choose one of those")
    if not ((ids.is_cpu if device is None else ids.device == device) or ids.is_meta):
        where, to = ("the kernels run on the CPU", "CPU") if device is None else (f"the table is packed for {device}", "same device")
        raise ShapeError(asked, f"{where}, ids are on {ids.device}", f"move ids and the module to the {to}")
    if values and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= n:
            raise ShapeError(asked, f"ids must lie in 0..{n - 1}, found {low}..{high}", "check the tokenizer's vocabulary")


# ------------------------------------------------------------------------------------------------------------------- linear


def watched() -> bool:
    """Whether what torch is called with is compiled, traced or seen by a dispatch mode. What native code does would be missing there, and its result be memory
    that nobody writes to: only registered ops are seen."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


def _linear(x: torch.Tensor, blob: torch.Tensor, n: int, k: int, bias: torch.Tensor | None, compute: str, name: str | None = None) -> torch.Tensor:
    """The native call. Only this function and its twins below hand pointers over."""
    check_linear(x, n, k, bias)
    if x.dim() == 2 and x.stride(1) == 1:  # rows at any distance are fine
        rows, stride = x.shape[0], x.stride(0)
        y = x.new_empty(rows, n)
    else:
        x = x.contiguous()
        *outer, _ = x.shape
        rows, stride = math.prod(outer), k
        y = x.new_empty(*outer, n)
    if not rows or not n:
        return y
    pointer = bias_type = 0
    if bias is not None:
        bias = bias.contiguous()
        pointer, bias_type = bias.data_ptr(), TYPES[bias.dtype]
    if _PRINT:
        _print_config(blob, n, k, rows, name, compute)
    _native.cpu.linear(blob.data_ptr(), x.data_ptr(), stride, TYPES[x.dtype], rows, y.data_ptr(), pointer, bias_type, compute == "a8",
                       torch.get_num_threads())
    return y


def linear(x: torch.Tensor, p: Packed | cuda.CudaPacked, bias: torch.Tensor | None = None, compute: str = "a16") -> torch.Tensor:
    """``x W^T + bias`` in float32 accumulation.

    Args:
        x: [..., K], float32, bfloat16 or float16, any strides (rows of unit stride are not copied).
        p: weight [N, K]; packed for CUDA (``cuda.Runtime.pack``) if x is on a GPU, where ``compute`` must be ``"a16"`` and nothing may need a gradient.
        bias: [N] of any of these types, added in float32.
        compute: ``"a16"`` multiplies x as it is. ``"a8"`` rounds x to int8 by groups of columns first (docs/formats.md), several times
            faster; the result then differs by 0.5 to 2 % of its norm, the more the more single channels stand out.

    Returns:
        [..., N] of x's dtype. The result depends neither on the number of threads nor on what ran before. Not finite weights or
        inputs give not finite outputs, but perhaps NaN where floating-point layers would give an infinity.

    Gradients flow to x (through the dequantized weight) and to bias. Raises ShapeError, and NativeError without the extension.
    """
    if isinstance(p, cuda.CudaPacked):
        return _cuda_linear(x, p, bias, compute)
    differentiate = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    plain = type(x) in PLAIN and (bias is None or type(bias) in PLAIN)
    if differentiate or not plain or watched() or x.is_meta:
        return torch.ops.mxq_ext.linear(x, p.blob, p.shape[0], bias, compute)
    check_compute(compute)
    n, k = p.shape
    return _linear(x, p.blob, n, k, bias, compute, p.format_name)


def _cuda_linear(x: torch.Tensor, p: cuda.CudaPacked, bias: torch.Tensor | None, compute: str) -> torch.Tensor:
    if compute != "a16":
        check_compute(compute)
        raise NativeError(f"compute mode {compute!r} on a GPU", "the CUDA kernels read x as it is", "use compute=\"a16\"")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise NativeError("gradients through a weight that is packed for CUDA", "the CUDA kernels compute forward only",
                          "run under torch.no_grad(), or keep the layer on the CPU, whose kernels have a backward")
    if watched() or x.is_meta:
        return torch.ops.mxq_ext.linear_cuda(x, p.blob, p.head, p.shape[0], bias)
    check_linear(x, *p.shape, bias, p.blob.device)
    if _PRINT:
        _print_once(*cuda.explain(p, x.shape[:-1].numel(), x.dtype))
    return cuda.linear(x, p, bias)


def linear_ref(x: torch.Tensor, p: Packed | QTensor, bias: torch.Tensor | None = None, compute: str = "a16") -> torch.Tensor:
    """The twin of :func:`linear`: plain loops over the canonical layout, double accumulation."""
    check_compute(compute)
    q = unpack(p) if isinstance(p, Packed) else p
    n, k = q.shape
    check_linear(x, n, k, bias)
    args, keep = _canonical(q)
    rows, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
    bias = None if bias is None else bias.contiguous()
    _native.cpu.ref_linear(args, rows.data_ptr(), k, TYPES[x.dtype], x.shape[:-1].numel(), y.data_ptr(), _pointer(bias),
                           0 if bias is None else TYPES[bias.dtype], compute == "a8")
    del keep
    return y


# ---------------------------------------------------------------------------------------------------------------- embedding


def _embedding(ids: torch.Tensor, blob: torch.Tensor, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    check_embedding(ids, n, k, dtype)
    flat = ids.to(torch.int64).contiguous()
    y = torch.empty(*ids.shape, k, dtype=dtype)
    if y.numel():
        _native.cpu.embedding(blob.data_ptr(), flat.data_ptr(), flat.numel(), y.data_ptr(), TYPES[dtype], torch.get_num_threads())
    return y


def embedding(ids: torch.Tensor, p: Packed | cuda.CudaPacked, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows ``ids`` [...] (int64 or int32) of the weight [N, K]: [..., K] of ``dtype``.

    Raises ShapeError for an id out of range; on a GPU, whose host would have to wait for the ids, such a row is NaN.
    """
    if isinstance(p, cuda.CudaPacked):
        if watched() or ids.is_meta:
            return torch.ops.mxq_ext.embedding_cuda(ids, p.blob, p.head, p.shape[0], p.shape[1], dtype)
        check_embedding(ids, *p.shape, dtype, values=False, device=p.blob.device)
        return cuda.embedding(ids, p, dtype)
    if watched() or ids.is_meta or type(ids) not in PLAIN:
        return torch.ops.mxq_ext.embedding(ids, p.blob, p.shape[0], p.shape[1], dtype)
    return _embedding(ids, p.blob, *p.shape, dtype)


def embedding_ref(ids: torch.Tensor, p: Packed | QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The twin of :func:`embedding`."""
    q = unpack(p) if isinstance(p, Packed) else p
    n, k = q.shape
    check_embedding(ids, n, k, dtype)
    args, keep = _canonical(q)
    flat, y = ids.to(torch.int64).contiguous(), torch.empty(*ids.shape, k, dtype=dtype)
    _native.cpu.ref_embedding(args, flat.data_ptr(), flat.numel(), y.data_ptr(), TYPES[dtype])
    del keep
    return y


def dequantize(p: Packed | cuda.CudaPacked) -> torch.Tensor:
    """The weight, float32 [N, K] in original order, on its device: the bits of ``QTensor.dequantize()``."""
    return cuda.dequantize(p) if isinstance(p, cuda.CudaPacked) else _dequantize(p.blob, *p.shape)


def _dequantize(blob: torch.Tensor, n: int, k: int) -> torch.Tensor:
    y = torch.empty(n, k)
    if y.numel():
        _native.cpu.embedding(blob.data_ptr(), 0, n, y.data_ptr(), 0, torch.get_num_threads())
    return y


def dequantize_ref(p: Packed | QTensor) -> torch.Tensor:
    """The twin of :func:`dequantize`."""
    q = unpack(p) if isinstance(p, Packed) else p
    args, keep = _canonical(q)
    y = torch.empty(*q.shape)
    _native.cpu.ref_dequantize(args, y.data_ptr())
    del keep
    return y


# --------------------------------------------------------------------------------------------------------- kernels by name


def targets() -> list[str]:
    """Instruction sets that this CPU and build can use, slowest first."""
    return _native.cpu.targets()


def target() -> str:
    """The instruction set in use (``MXQ_CPU_TARGET`` or :func:`set_target` choose another)."""
    return _native.cpu.target()


def _kernel_name(blob: torch.Tensor, format_name: str, rows: int, compute: str) -> str:
    format_name = kernel_format(format_name)
    # fp16 is always a16: there is nothing to multiply in integers.
    if format_name.removesuffix("+sparse") == "fp16":
        compute = "a16"
    return f"{'gemm' if _native.cpu.uses_gemm(blob.data_ptr(), rows, compute == 'a8') else 'gemv'}_{format_name}_{compute}__{target()}"


def explain(p: Packed | cuda.CudaPacked, m: int, dtype: torch.dtype = torch.float32, compute: str = "a16") -> str:
    """Name of the kernel that computes ``m`` rows of x: ``<op>_<format>_<compute>__<target>``, for example ``gemv_w4g64_a16__avx512``.

    ``dtype`` is x's; all float types share one kernel (they are converted to float32 once per call), so that it must only be one of them.
    """
    if dtype not in TYPES:
        raise ShapeError(f"kernel for x of {str(dtype)[6:]}", "x must be float32, bfloat16 or float16", "choose one of those")
    check_compute(compute)
    return cuda.explain(p, m, dtype)[0] if isinstance(p, cuda.CudaPacked) else _kernel_name(p.blob, p.format_name, m, compute)


_PRINT = env.flag("MXQ_PRINT_CONFIG")
_printed: set = set()


def _print_config(blob: torch.Tensor, n: int, k: int, rows: int, name: str | None, compute: str) -> None:
    name = name or _describe(blob)["format_name"]
    _print_once(f"M={rows} N={n} K={k}", _kernel_name(blob, name, rows, compute))


def _print_once(*decision: str) -> None:
    if decision not in _printed:
        _printed.add(decision)
        print(f"mxq_ext: linear {': '.join(decision)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ torch.library

_library = torch.library.Library("mxq_ext", "DEF")
_library.define("linear(Tensor x, Tensor blob, int n, Tensor? bias, str compute='a16') -> Tensor")
_library.define("linear_cuda(Tensor x, Tensor blob, Tensor head, int n, Tensor? bias) -> Tensor")
_library.define("embedding(Tensor ids, Tensor blob, int n, int k, ScalarType dtype) -> Tensor")
_library.define("embedding_cuda(Tensor ids, Tensor blob, Tensor head, int n, int k, ScalarType dtype) -> Tensor")


def _trusted(blob: torch.Tensor, n: int, k: int, op: str) -> None:
    """A registered op can be called by anyone with anything: the blob must say the same as the arguments."""
    _check_blob(blob)
    try:
        have = _native.cpu.shape(blob.data_ptr(), blob.numel())
    except ValueError as error:
        raise NativeError(f"mxq_ext::{op} with a packed weight of {blob.numel()} bytes", str(error),
                          "make it again with ops.prepack()") from None
    if have != (n, k):
        raise ShapeError(f"mxq_ext::{op} of {n} x {k}", f"the packed weight is {have[0]} x {have[1]}", _WHICH)


def _op_linear(x, blob, n, bias, compute="a16"):
    check_compute(compute)
    k = x.shape[-1] if x.dim() else -1
    if x.dim():
        _trusted(blob, n, k, "linear")
    return _linear(x, blob, n, k, bias, compute)


def _fake_linear(x, blob, n, bias, compute="a16"):
    check_compute(compute)
    check_linear(x, n, x.shape[-1] if x.dim() else -1, bias)
    return x.new_empty(*x.shape[:-1], n)


def _op_linear_cuda(x, blob, head, n, bias):
    check_linear(x, n, x.shape[-1] if x.dim() else -1, bias, blob.device)
    return cuda.linear(x, cuda.CudaPacked.of(blob, head, (n, x.shape[-1])), bias)


def _fake_linear_cuda(x, blob, head, n, bias):
    check_linear(x, n, x.shape[-1] if x.dim() else -1, bias, blob.device)
    return x.new_empty(*x.shape[:-1], n)


def _op_embedding_cuda(ids, blob, head, n, k, dtype):
    check_embedding(ids, n, k, dtype, values=False, device=blob.device)
    return cuda.embedding(ids, cuda.CudaPacked.of(blob, head, (n, k)), dtype)


def _fake_embedding_cuda(ids, blob, head, n, k, dtype):
    check_embedding(ids, n, k, dtype, values=False, device=blob.device)
    return ids.new_empty(*ids.shape, k, dtype=dtype)


def _op_embedding(ids, blob, n, k, dtype):
    _trusted(blob, n, k, "embedding")
    return _embedding(ids, blob, n, k, dtype)


def _fake_embedding(ids, blob, n, k, dtype):
    check_embedding(ids, n, k, dtype, values=False)
    return ids.new_empty(*ids.shape, k, dtype=dtype)


def _linear_setup(ctx, inputs, output):
    x, blob, n, bias, _ = inputs
    ctx.save_for_backward(blob)
    ctx.shape, ctx.bias_dtype = (n, x.shape[-1]), None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    """dx = dy W, also where x was rounded (straight through); dbias = sum of dy. The weight is packed and has no gradient."""
    (blob,) = ctx.saved_tensors
    n, k = ctx.shape
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        every = torch.arange(n, dtype=torch.int64)
        dx = (grad.float() @ torch.ops.mxq_ext.embedding(every, blob, n, k, torch.float32)).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        dbias = grad.reshape(-1, n).float().sum(0).to(ctx.bias_dtype)
    return dx, None, None, dbias, None


_library.impl("linear", _op_linear, "CPU")
_library.impl("linear_cuda", _op_linear_cuda, "CUDA")
_library.impl("embedding", _op_embedding, "CPU")
_library.impl("embedding_cuda", _op_embedding_cuda, "CUDA")
torch.library.register_fake("mxq_ext::linear", _fake_linear, lib=_library)
torch.library.register_fake("mxq_ext::linear_cuda", _fake_linear_cuda, lib=_library)
torch.library.register_fake("mxq_ext::embedding", _fake_embedding, lib=_library)
torch.library.register_fake("mxq_ext::embedding_cuda", _fake_embedding_cuda, lib=_library)
torch.library.register_autograd("mxq_ext::linear", _linear_backward, setup_context=_linear_setup, lib=_library)

"""Weights in the layout of the CUDA kernels, and calls of these kernels.

    pack(QTensor, device) -> CudaPacked      once: the canonical tensors in the order in which the kernels read them (csrc/cuda_layout.h)
    linear(x, [(packed, bias), ...])         x W^T + bias of one weight, or of several that read the same x (q, k and v) in one launch
    dequantize(packed, dtype)                W itself
    embedding(ids, packed, dtype)            rows of W

The native library takes addresses of plain structs (csrc/cuda/prepack.h, csrc/cuda/launch.h), which are mirrored here for ctypes. It allocates nothing,
waits for nothing, and works on the stream that it is given. A :class:`Runtime` is such a library with a device; tests make one whose device is the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from . import _native
from .errors import NativeError, ShapeError
from .formats import Format, kernel_format
from .qtensor import TYPES, QTensor, Rectangle, Sparse

#: Most bytes of the dequantized piece of a weight on the path ``big``: most layers are one piece, which is little beside a model.
BIG_BYTES = 128 << 20

#: Ways to compute (csrc/cuda/dispatch.h, enum Path). ``big`` is dequant and a matrix product of torch; ``auto`` chooses by the number of rows.
PATHS = {"auto": 0, "scalar": 1, "mv": 2, "mm": 3, "big": 4}


def _struct(name: str, *fields: str) -> type[ctypes.Structure]:
    """A struct of 8-byte integers."""
    return type(name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int64) for f in fields]})


RectDesc = _struct("RectDesc", "r0", "r1", "c0", "c1", "kind", "bits", "zero", "bf16", "group", "codes", "scales", "zeros")
WeightDesc = _struct("WeightDesc", "n", "k", "rect_count", "nnz", "rects", "perm_rows", "perm_cols", "rowptr", "cols", "values")
Output = _struct("Output", "head", "blob", "y", "bias", "ldy", "bias_type")
LinearCall = _struct("LinearCall", "x", "ldx", "x_type", "y_type", "m", "outputs", "output", "workspace", "stream", "path", "capability", "sms",
                     "warps", "blocks", "batch", "splits")


def layout(struct: type[ctypes.Structure]) -> str:
    """Where the fields of a struct are, as ``layouts()`` of the native library says it (csrc/cuda/api.h)."""
    places = (f"{name}={getattr(struct, name).offset}" for name, _ in struct._fields_)
    return " ".join([struct.__name__, *places, f"sizeof={ctypes.sizeof(struct)}"])


_LAYOUTS = frozenset(map(layout, (RectDesc, WeightDesc, Output, LinearCall)))


@dataclass
class CudaPacked:
    """A weight [N, K] in the layout of the CUDA kernels.

    Attributes:
        blob: uint8 [nbytes] on the device; it describes itself.
        head: uint8, the first bytes of the blob in host memory, from which launches are planned.
        shape: (N, K).
        format_name: as :attr:`QTensor.format_name`.
        meta: ``QTensor.meta()``.
        nested: as :meth:`QTensor.nested`, in host memory: the blob holds the expanded weight.
    """

    blob: torch.Tensor
    head: torch.Tensor
    shape: tuple[int, int]
    format_name: str
    meta: dict
    nested: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(blob: torch.Tensor, head: torch.Tensor, shape: tuple[int, int]) -> CudaPacked:
        """Around a blob and its head, for launches alone: without what only people and :meth:`Runtime.unpack` read. Raises NativeError for other bytes."""
        fields = _head_offsets(head) if head.numel() >= 8 * len(_HEAD_FIELDS) else {}
        if fields.get("magic") != _MAGIC or fields["nbytes"] != blob.numel() or fields["head_nbytes"] != head.numel():
            raise NativeError(f"packed weight of {blob.numel()} bytes with a head of {head.numel()}",
                              "these bytes are no weight packed for CUDA by this version", "make them again with Runtime.pack()")
        if blob.data_ptr() % 16 or not blob.is_contiguous():
            raise NativeError(f"packed weight at address {blob.data_ptr():#x}", "the kernels read it by 16 bytes, contiguous and from a multiple of that on",
                              "pass the tensor that Runtime.pack() made, or a clone")
        n, k = fields["n_k"] & 0xFFFFFFFF, fields["n_k"] >> 32
        if (n, k) != tuple(shape):
            raise ShapeError(f"linear of {shape[0]} x {shape[1]}", f"the packed weight is {n} x {k}", "check which layer this weight belongs to")
        return CudaPacked(blob, head, (n, k), "", {})

    @property
    def nbytes(self) -> int:
        """Bytes of device memory (padding and head included)."""
        return self.blob.numel()

    def __repr__(self) -> str:
        return f"CudaPacked({self.shape[0]} x {self.shape[1]}, {self.format_name}, {self.nbytes} bytes on {self.blob.device})"


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rect_desc(r: Rectangle) -> ctypes.Structure:
    t = r.tensors
    return RectDesc(r.r0, r.r1, r.c0, r.c1, *r.format.native, _address(t.get("codes", t.get("values"))), _address(t.get("scales", t.get("table"))),
                    _address(t.get("zeros")))


def _weight_desc(q: QTensor) -> tuple[ctypes.Structure, list]:
    """(what native code takes, what must stay alive meanwhile). Nested scales and zeros are expanded."""
    whole = q.expanded().contiguous()
    array = (RectDesc * max(1, len(whole.rectangles)))(*map(_rect_desc, whole.rectangles))
    s = whole.sparse
    sparse = (None,) * 3 if s is None else (s.rowptr, s.cols, s.values)
    desc = WeightDesc(*q.shape, len(whole.rectangles), 0 if s is None else s.values.numel(), ctypes.addressof(array),
                      *map(_address, (whole.perm_rows, whole.perm_cols, *sparse)))
    return desc, [whole, array]


class Runtime:
    """A native library (``mxq_ext._cuda``, or the same sources compiled for the CPU by the tests) and what is known about its device.

    Args:
        library: functions of csrc/bind_cuda.cpp.
        capability: 10 * major + minor of the compute capability; 0 for unknown.
        sms: number of streaming multiprocessors; 0 for unknown.
    """

    def __init__(self, library, capability: int = 0, sms: int = 0):
        self.library, self.capability, self.sms = library, capability, sms

    @functools.cached_property
    def layouts(self) -> frozenset[str]:
        """The structs that the library reads, as :func:`layout` says them; empty if it does not tell."""
        return frozenset(self.library.layouts().split("; ") if hasattr(self.library, "layouts") else ())

    def check_layouts(self, needed: frozenset[str]) -> None:
        """Raises NativeError if the library would read structs of these layouts as something else."""
        if other := needed - self.layouts:
            names = ", ".join(sorted(text.partition(" ")[0] for text in other))
            raise NativeError("CUDA kernels", f"the compiled module is of another version of this package, it has other fields in {names}",
                              "build it again with `pip install --force-reinstall --no-deps .` in the source folder")

    # ------------------------------------------------------------------------------------------------------------- weights

    def pack(self, q: QTensor, device: torch.device | str = "cpu") -> CudaPacked:
        """Brings a weight into the layout of the CUDA kernels. Lossless; :meth:`unpack` is the inverse. Raises ShapeError for an invalid weight."""
        q.validate()
        if (bad := next((t for t in q.to_tensors().values() if t.device.type != "cpu"), None)) is not None:
            raise ShapeError(f"packing a weight of {q.shape[0]} x {q.shape[1]} for CUDA", f"it is packed on the host, its tensors are on {bad.device}",
                             "move them to the CPU first")
        desc, keep = _weight_desc(q)
        nbytes, head_nbytes = self.library.blob_sizes(ctypes.addressof(desc))
        blob = torch.empty(nbytes, dtype=torch.uint8)
        self.library.prepack(ctypes.addressof(desc), blob.data_ptr(), torch.get_num_threads())
        del keep
        return CudaPacked(blob.to(device), blob[:head_nbytes].clone(), tuple(q.shape), q.format_name, q.meta(), q.nested())

    def unpack(self, p: CudaPacked) -> QTensor:
        """The QTensor that :meth:`pack` was given, bit for bit (without its ``info``). Copies the blob to the host."""
        blob = p.blob.cpu()
        rects = []
        for i, (r0, r1, c0, c1, name) in enumerate(p.meta["rectangles"]):
            fmt = Format.parse(name).expanded
            tensors = {n: torch.empty(shape, dtype=getattr(torch, dtype)) for n, (shape, dtype) in fmt.tensor_shapes(r1 - r0, c1 - c0).items()}
            rects.append(Rectangle(r0, r1, c0, c1, fmt, tensors))
            desc = _rect_desc(rects[-1])
            self.library.unpack(blob.data_ptr(), i, ctypes.addressof(desc), torch.get_num_threads())
        n, k = p.shape
        at = _head_offsets(p.head)

        def vector(name, dtype, count):
            return blob[at[name] : at[name] + count * dtype.itemsize].clone().view(dtype) if at[name] else None

        sparse = None
        if at["rowptr"]:
            sparse = Sparse(vector("rowptr", torch.int32, n + 1), vector("cols", torch.int32, at["nnz"]), vector("values", torch.float16, at["nnz"]))
        return QTensor((n, k), rects, vector("perm_rows", torch.int32, n), vector("perm_cols", torch.int32, k), sparse).with_nested(p.nested)

    # ------------------------------------------------------------------------------------------------------------- kernels

    def call(self, x: torch.Tensor, weights: list, outputs: list, path: str = "auto", *, stream: int,
             **forced: int) -> tuple[ctypes.Structure, list]:
        """A LinearCall and what must live as long as it.

        Args:
            x: [m, k], unit column stride.
            weights: (CudaPacked, bias or None) each.
            outputs: y [m, n] of unit column stride for each weight, all of one dtype; or None to ask about the call alone.
            path: a key of ``PATHS``.
            stream: address of a CUDA stream of the device that is current. There is no default: a launch on the legacy stream would neither wait for torch's
                other streams nor be part of a graph that is captured.
            forced: ``warps``, ``blocks``, ``batch``, ``splits`` in place of what the configuration has; the tests' way into every branch.
        """
        array = (Output * len(weights))()
        for o, (p, bias), y in zip(array, weights, outputs, strict=True):
            o.head, o.blob = p.head.data_ptr(), p.blob.data_ptr()
            o.bias, o.bias_type = _address(bias), 0 if bias is None else TYPES[bias.dtype]
            if y is not None:
                o.y, o.ldy = y.data_ptr(), y.stride(0)
        y_type = TYPES[x.dtype if outputs[0] is None else outputs[0].dtype]
        call = LinearCall(x=x.data_ptr(), ldx=x.stride(0), x_type=TYPES[x.dtype], y_type=y_type, m=x.shape[0], outputs=len(weights),
                          output=ctypes.addressof(array), stream=stream, path=PATHS[path], capability=self.capability, sms=self.sms, **forced)
        return call, [array, x, weights, outputs]

    def linear(self, x: torch.Tensor, weights: list, dtype: torch.dtype | None = None, path: str = "auto", out: list | None = None, *, stream: int,
               **forced: int) -> list[torch.Tensor]:
        """``x W^T + bias`` for each of ``weights``, which all read x, in as few launches as there can be.

        Shapes are not checked (``ops.linear`` does that).

        Args:
            x: [m, k], float32, bfloat16 or float16; rows at any distance, unit column stride.
            weights: (CudaPacked [n, k], bias [n] or None) each.
            dtype: of the results; x's own if None. float32 is what the kernels accumulate in.
            out: where to, [m, n] each with unit column stride; allocated if None.
            path, stream, forced: as for :meth:`call`.

        Returns:
            [m, n] each. The order of all sums is fixed by shapes and device, so equal calls give equal bits. Raises NativeError where there is no kernel.
        """
        dtype = dtype or x.dtype
        out = out or [torch.empty(x.shape[0], p.shape[0], dtype=dtype, device=x.device) for p, _ in weights]
        if not x.shape[1]:
            for y, (_, bias) in zip(out, weights, strict=True):
                y.copy_(y.new_zeros(()) if bias is None else bias)
        used = [(y, w) for y, w in zip(out, weights, strict=True) if y.numel() and x.shape[1]]
        if not used:
            return out
        self._linear(x, [w for _, w in used], [y for y, _ in used], path, stream, forced)
        return out

    def _linear(self, x: torch.Tensor, weights: list, out: list, path: str, stream: int, forced: dict[str, int]) -> None:
        """:meth:`linear` of what is not empty."""
        call, keep = self.call(x, weights, out, path, stream=stream, **forced)
        address = ctypes.addressof(call)
        taken, text = self.library.explain(address)
        if not taken:
            raise NativeError(f"linear of x {tuple(x.shape)} on the path {path!r}", text, "choose another path, or \"auto\"")
        if taken == PATHS["big"]:
            for y, (p, bias) in zip(out, weights, strict=True):
                self._big(x, p, bias, y, stream)
            return
        # From torch's allocator, which keeps it for this stream until the kernels are done, also in a captured graph.
        workspace = torch.empty(self.library.workspace_nbytes(address), dtype=torch.uint8, device=x.device)
        call.workspace = workspace.data_ptr()
        self.run(self.library.linear(address), f"linear of x {tuple(x.shape)}")
        del keep

    def _big(self, x: torch.Tensor, p: CudaPacked, bias: torch.Tensor | None, y: torch.Tensor, stream: int) -> None:
        """y = x W^T + bias by torch's matrix product with one piece of W after the other, so that no weight is whole in the type of x."""
        n, k = p.shape
        rows = min(n, max(16, BIG_BYTES // max(1, k * x.element_size()) // 16 * 16))
        head = _head_offsets(p.head)
        at, columns = head["perm_rows"], head["perm_cols"]
        order = p.blob[at : at + 4 * n].view(torch.int32).long() if at and rows < n else None  # of stored rows; all at once come in original order
        if columns:  # x has fewer numbers to reorder than W, whose columns then are neighbours
            x = x.index_select(1, p.blob[columns : columns + 4 * k].view(torch.int32))
        room = torch.empty(rows, k, dtype=x.dtype, device=x.device)
        for begin in range(0, n, rows):
            w = room[: min(rows, n - begin)]
            self._dequantize(p, w, begin, stream, stored_columns=True)
            place = slice(begin, begin + w.shape[0]) if order is None else order[begin : begin + w.shape[0]]
            with torch.no_grad():
                b = None if bias is None else bias[place].to(x.dtype)
                if order is not None or y.dtype != x.dtype:
                    y[:, place] = torch.nn.functional.linear(x, w, b).to(y.dtype)
                elif b is None:  # where it belongs at once
                    torch.mm(x, w.T, out=y[:, place])
                else:
                    torch.addmm(b, x, w.T, out=y[:, place])

    def explain(self, x: torch.Tensor, weights: list, path: str = "auto") -> tuple[str, str]:
        """(name of the kernel of the first weight, all decisions in a line); the name is empty where there is no kernel, and the line says why."""
        call, keep = self.call(x, weights, [None] * len(weights), path, stream=0)  # nothing is launched
        taken, text = self.library.explain(ctypes.addressof(call))
        name = self.library.kernel_name(ctypes.addressof(call), "+".join(dict.fromkeys(kernel_format(p.format_name) for p, _ in weights))) if taken else ""
        del keep
        return name, text

    def run(self, code: int, what: str) -> None:
        """Raises NativeError for a launch that failed."""
        if code:
            raise NativeError(what, f"the launch failed: {self.library.error_text(code)}", "run `mxq doctor`, and again with CUDA_LAUNCH_BLOCKING=1")

    def dequantize(self, p: CudaPacked, dtype: torch.dtype = torch.float32, *, stream: int) -> torch.Tensor:
        """The weight [N, K] in original order: the bits of ``QTensor.dequantize()``, rounded once more for 16-bit types."""
        out = torch.empty(p.shape, dtype=dtype, device=p.blob.device)
        self._dequantize(p, out, 0, stream)
        return out

    def _dequantize(self, p: CudaPacked, out: torch.Tensor, begin: int, stream: int, stored_columns: bool = False) -> None:
        """Stored rows from ``begin`` on into out [rows, K], in stored order, or in original order if they are all; columns in original or in stored order."""
        if out.numel():
            self.run(self.library.dequantize(p.head.data_ptr(), p.blob.data_ptr(), out.data_ptr(), TYPES[out.dtype], begin, out.shape[0], int(stored_columns),
                                             stream), f"dequantizing {p}")

    def embedding(self, ids: torch.Tensor, p: CudaPacked, dtype: torch.dtype = torch.float32, *, stream: int) -> torch.Tensor:
        """Rows ``ids`` (int64 [count]) of the weight: [count, K], the bits of :meth:`dequantize`. NaN for an id out of range, which the host cannot see."""
        out = torch.empty(ids.numel(), p.shape[1], dtype=dtype, device=p.blob.device)
        if out.numel():
            address = p.head.data_ptr(), p.blob.data_ptr(), ids.data_ptr()
            self.run(self.library.embedding(*address, ids.numel(), out.data_ptr(), TYPES[dtype], stream), f"embedding of {ids.numel()} ids in {p}")
        return out


_MAGIC = 0x314455435851584D  # csrc/cuda_layout.h, CUDA_MAGIC
_HEAD_FIELDS = ("magic", "nbytes", "head_nbytes", "n_k", "bands_pieces", "rects", "bands", "pieces", "off_rects", "perm_rows", "row_of", "perm_cols", "col_of",
                "rowptr", "cols", "values", "nnz")


def _head_offsets(head: torch.Tensor) -> dict[str, int]:
    """The 8-byte fields of CudaHead (csrc/cuda_layout.h)."""
    return dict(zip(_HEAD_FIELDS, head[: 8 * len(_HEAD_FIELDS)].view(torch.int64).tolist(), strict=True))


def without_kernels(archs: str, capability: tuple[int, int]) -> str | None:
    """Why a device of that compute capability has no kernels in a build for ``archs`` (``"8.0 9.0+PTX"``); None if it has.

    Binaries run on devices of the same major number and a minor one that is not less; PTX is compiled by the driver for whatever is newer.
    """
    for arch in archs.split():
        major, minor = map(int, arch.removesuffix("+PTX").split("."))
        if (major == capability[0] and minor <= capability[1]) or (arch.endswith("+PTX") and (major, minor) <= capability):
            return None
    return f"the device has compute capability {capability[0]}.{capability[1]}, and the kernels were built for {archs}"


@functools.cache
def runtime(device: torch.device) -> Runtime:
    """The runtime of a CUDA device. Raises NativeError if the CUDA kernels were not built, not for this device, or by another version of this package."""
    if isinstance(_native.cuda, _native.Missing):
        _native.cuda.linear()  # raises, with the reason
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    if reason := without_kernels(_native.cuda.archs, capability):
        fix = "keep the model on the CPU: there are kernels for compute capability 7.5 and later"
        if capability >= (7, 5):
            fix = f"build them for it: MXQ_CUDA_ARCHS={capability[0]}.{capability[1]} pip install ."
        raise NativeError(f"CUDA kernels on {device} ({properties.name})", reason, fix)
    out = Runtime(_native.cuda, 10 * capability[0] + capability[1], properties.multi_processor_count)
    out.check_layouts(_LAYOUTS)
    return out


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[tuple[Runtime, int]]:
    """(runtime, current stream) of a device, which is the current one meanwhile, as launches need it."""
    with torch.cuda.device(device):
        yield runtime(device), torch.cuda.current_stream().cuda_stream


def pack(q: QTensor, device: torch.device) -> CudaPacked:
    """:meth:`Runtime.pack` for a CUDA device. Raises NativeError if there are no kernels for it."""
    return runtime(device).pack(q, device)


def unpack(p: CudaPacked) -> QTensor:
    """:meth:`Runtime.unpack`."""
    return runtime(p.blob.device).unpack(p)


def linear(x: torch.Tensor, p: CudaPacked, bias: torch.Tensor | None) -> torch.Tensor:
    """``x W^T + bias`` of x [..., K] on the current stream of its device: [..., N] of x's dtype."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: there may be no columns
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    with _on(x.device) as (r, stream):
        (y,) = r.linear(rows, [(p, None if bias is None else bias.contiguous())], stream=stream)
    return y.reshape(*x.shape[:-1], p.shape[0])


def dequantize(p: CudaPacked, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W [N, K] on the current stream of its device."""
    with _on(p.blob.device) as (r, stream):
        return r.dequantize(p, dtype, stream=stream)


def embedding(ids: torch.Tensor, p: CudaPacked, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``ids`` [...] of W on the current stream of its device: [..., K] of ``dtype``; NaN for an id out of range."""
    with _on(p.blob.device) as (r, stream):
        return r.embedding(ids.to(torch.int64).reshape(-1).contiguous(), p, dtype, stream=stream).reshape(*ids.shape, p.shape[1])


def explain(p: CudaPacked, m: int, dtype: torch.dtype) -> tuple[str, str]:
    """:meth:`Runtime.explain` for ``m`` rows of x of ``dtype``."""
    return runtime(p.blob.device).explain(torch.empty(m, p.shape[1], dtype=dtype, device="meta"), [(p, None)])

"""Attention over the packed KV cache on a GPU: calls of the kernels of csrc/cuda/attention.cu and csrc/cuda/kv_pack.cu.

    pack_page(x, format, codes, params)     64 tokens of keys or values, quantized: the very bytes of :func:`ops.pack_page`
    unpack_page(codes, params, format)      what they stand for, as :func:`ops.unpack_page`; by operations of torch, for it is rarely asked for
    attend(q, pages, ...)                   as :func:`ops.attend`, over :class:`CudaPages`

Pages are those of the CPU, byte for byte, so a cache moves by copying. The native library takes addresses of plain structs (csrc/cuda/attention.h), which
are mirrored here for ctypes; it allocates nothing, waits for nothing, and works on the stream that it is given.
"""

from __future__ import annotations

import ctypes

import torch

from .. import cuda
from ..errors import FormatError, NativeError, ShapeError
from ..formats import PAGE
from ..qtensor import TYPES
from . import codes as page_codes
from . import ops
from .ops import PageFormat, PageMix, PageTable
from .rope import RopeTables

PageDesc = cuda._struct("PageDesc", "side", "bits", "group", "head")
Rows = cuda._struct("Rows", "data", "type", "tokens", "batch", "head", "token")


def desc_of(fmt: PageFormat) -> PageDesc:
    """A format of pages that a GPU may hold, as native code takes it: there are no outliers there."""
    return PageDesc(*fmt.native[:4])


class AttendCall(ctypes.Structure):
    """csrc/cuda/attention.h, struct AttendCall."""

    _fields_ = [
        ("key", PageDesc), ("value", PageDesc), *((n, ctypes.c_int64) for n in ("batch", "q_heads", "kv_heads", "queries")),
        *((n, Rows) for n in ("q", "out", "sink_k", "sink_v", "tail_k", "tail_v")),
        *((n, ctypes.c_int64) for n in ("pages", "page_count", "counts")), ("scale", ctypes.c_double), ("cap", ctypes.c_double),
        *((n, ctypes.c_int64) for n in ("causal", "window", "mask", "mask_batch", "mask_query", "workspace", "stream", "capability", "sms", "splits")),
        ("bandwidth", ctypes.c_double),
    ]


_LAYOUTS = frozenset(map(cuda.layout, (PageDesc, Rows, AttendCall)))


def check_format(fmt: PageFormat) -> None:
    """Raises FormatError for pages that only the CPU kernels read."""
    if fmt.levels is not None:
        raise FormatError(f"a KV page of {fmt.bits}-bit {fmt.side} with a codebook on a GPU", "the CUDA kernels read uniform grids and float16",
                          "keep the model on the CPU, or choose a cache without codebooks")
    if fmt.outliers:
        raise FormatError(f"a KV page of {fmt.bits}-bit {fmt.side} with {fmt.outliers} outliers on a GPU", "the CUDA kernels read codes alone",
                          "keep the model on the CPU, or choose a cache without outliers")


def check_formats(key: PageFormat, value: PageFormat, *, pre_rope: bool, mixed: bool) -> None:
    """Raises FormatError for a cache that only the CPU kernels read."""
    for fmt in (key, value):
        check_format(fmt)
    if pre_rope:
        raise FormatError("a KV cache of keys before the rotary embedding on a GPU", "the CUDA kernels read keys as the query meets them",
                          "keep the model on the CPU, or choose a cache of keys behind the embedding")
    if mixed:
        raise FormatError("a KV cache of pages in two widths on a GPU", "the CUDA kernels read pages of one format and do not tell how much a query saw",
                          "keep the model on the CPU, or choose one pair of bits for all tokens")


class CudaPages(PageTable):
    """The pages of one layer in the memory of a GPU, in order, as :func:`attend` reads them.

    Addresses of new pages are written on the current stream of the first call that reads them. Before several streams read a table, call :meth:`note` on the
    stream that made its pages, and let the others wait for that one. MxqCache neither reserves nor counts: ``of``, ``reserve`` and ``counts`` are for callers
    who capture attention in a CUDA graph by themselves.

    Args:
        key, value: formats of the two sides.
        heads: B * Hkv heads of each page.
        device: where the pages are.
        rope, mix: as :class:`PageTable` has them; there are no kernels for either.

    Raises FormatError if the sides do not go together, or for a cache that the CUDA kernels do not read.
    """

    __slots__ = ("device", "room")

    def __init__(self, key: PageFormat, value: PageFormat, heads: int, device: torch.device | str, rope: RopeTables | None = None,
                 mix: PageMix | None = None):
        self.device = torch.empty(0, device=device).device  # with its index
        self.room = 0  #: the most pages that there may be, see :meth:`reserve`; 0: any number
        check_formats(key, value, pre_rope=rope is not None, mixed=mix is not None)
        super().__init__(key, value, heads)

    @classmethod
    def of(cls, pages: PageTable, device: torch.device | str) -> CudaPages:
        """A copy of the pages of another table on ``device``, as they are. Raises FormatError."""
        table = cls(pages.key, pages.value, pages.heads, device, pages.rope, pages.mix)
        for i in range(len(pages)):
            table.append(*(t.to(table.device) for t in pages[i]))
        return table

    def append(self, *page: torch.Tensor) -> None:
        """Adds a page on the table's device, see :meth:`PageTable.append`; the kernels read it by 16 bytes. Raises ShapeError."""
        if self.room and len(self) == self.room:
            raise ShapeError(f"page {len(self)} of a KV cache of {self.heads} heads", f"room for {self.room} pages was reserved, and captured launches "
                             "read the addresses of pages where that is", "reserve more, and capture again")
        if odd := [i for i, t in enumerate(page) if t.data_ptr() % 16]:
            rule = f"its tensors must lie at multiples of 16 bytes, tensor {odd[0]} does not"
            raise ShapeError(f"page {len(self)} of a KV cache of {self.heads} heads", rule, "allocate it with PageFormat.empty_page()")
        super().append(*page)

    def note(self) -> None:
        """See :meth:`PageTable.note`. Raises ShapeError while a graph is captured, if there is anything to write."""
        if len(self) > self._noted and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ShapeError(f"attention over {len(self)} pages in a CUDA graph", f"{len(self) - self._noted} of them are new, and each replay "
                             "would write their addresses again", "call note() before the capture")
        super().note()

    def reserve(self, pages: int) -> None:
        """Makes room for the addresses of so many pages, or of as many as there are. Until the next call of this, they stay where they are then, and there
        can be no more pages."""
        self.room = max(pages, len(self), 1)
        if self.room > len(self._pointers):
            self._make_room(self.room)

    def __reduce__(self):
        return _pages_of, (self.key, self.value, self.heads, self._pages, torch.empty(0, device=self.device))


def _pages_of(key: PageFormat, value: PageFormat, heads: int, pages: list, place: torch.Tensor) -> PageTable:
    """``place`` is a tensor and no device, so that it moves along with the pages where a file is read for another device, or for the CPU."""
    table = PageTable(key, value, heads) if place.is_cpu else CudaPages(key, value, heads, place.device)
    for page in pages:
        table.append(*page)
    return table


def _aligned(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t`` if the kernels can read its channels 16 bytes at a time, else a copy."""
    if t is None:
        return None
    steps = [stride * t.element_size() for stride, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]
    return t if t.stride(3) == 1 and not any(at % 16 for at in (t.data_ptr(), *steps)) else t.clone(memory_format=torch.contiguous_format)


class Kernels:
    """The kernels for the KV cache of a native library.

    Args:
        runtime: the library and what is known about its device.
        bandwidth: bytes a second that a copy reaches on the device, for the bound in :meth:`explain`; 0 leaves that out.

    Raises NativeError if the library has no such kernels, or reads calls of another version of this package.
    """

    def __init__(self, runtime: cuda.Runtime, bandwidth: float = 0.0):
        runtime.check_layouts(_LAYOUTS)
        self.runtime, self.bandwidth = runtime, bandwidth

    def pack_page(self, x: torch.Tensor, fmt: PageFormat, codes: torch.Tensor, params: torch.Tensor, *, stream: int) -> None:
        """As :func:`ops.pack_page`, all tensors on the device, which is the current one: the same bytes. Raises ShapeError, FormatError, NativeError."""
        check_format(fmt)
        x = ops._check_pack(x, fmt, codes, params, x.device)
        if x.numel():
            desc, rows = desc_of(fmt), Rows(*ops._rows(x))
            code = self.runtime.library.kv_pack(ctypes.addressof(desc), ctypes.addressof(rows), x.shape[0], x.shape[1], codes.data_ptr(), params.data_ptr(),
                                                stream)
            self.runtime.run(code, f"packing a page of {fmt.side} of {tuple(x.shape)}")

    @staticmethod
    def _check_counts(counts: torch.Tensor, pages: CudaPages, tail_k: torch.Tensor | None) -> None:
        """Raises ShapeError."""
        if not (isinstance(counts, torch.Tensor) and counts.device == pages.device and counts.dtype == torch.int32 and counts.shape == (2,)
                and counts.is_contiguous()):
            said = ops._say(counts) if isinstance(counts, torch.Tensor) else repr(counts)
            raise ShapeError(f"attention with counts {said}", f"they must be a contiguous int32 tensor (2,) on {ops._place(pages.device)}",
                             "write the numbers of pages and of tokens of the tail into one")
        if tail_k is None:
            raise ShapeError("attention with counts and no tail", "the tail must be there with all the room that it has, however many of its tokens count",
                             "pass tail_k and tail_v in full")
        if not pages.room:
            raise ShapeError("attention with counts over a table that grows", "its addresses move when their room is full, and a captured launch reads them "
                             "where they were", "call reserve() with the most pages that there may be")

    def call(self, q: torch.Tensor, pages: CudaPages, sink_k=None, sink_v=None, tail_k=None, tail_v=None, *, scale: float | None = None, causal: bool = True,
             window: int = 0, softcap: float = 0.0, mask: torch.Tensor | None = None, out: torch.Tensor | None = None, stream: int = 0,
             splits: int = 0, counts: torch.Tensor | None = None) -> tuple[AttendCall, torch.Tensor, list]:
        """(what native code takes, the result's tensor, what must live as long); see :meth:`attend`. New pages are not noted here. Raises ShapeError."""
        parts = {"sink_k": sink_k, "sink_v": sink_v, "tail_k": tail_k, "tail_v": tail_v}
        if counts is not None:
            self._check_counts(counts, pages, tail_k)
        most = None if counts is None else pages.room
        ops._check_attend(q, pages, parts, mask, window, softcap, out, device=pages.device, most_pages=most)
        batch, heads, queries, d = q.shape
        if out is None:
            out = q.new_empty(batch, queries, heads, d).transpose(1, 2)
        q = q if q.stride(3) == 1 else q.contiguous()
        parts = {name: _aligned(t) for name, t in parts.items()}
        mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
        call = AttendCall(key=desc_of(pages.key), value=desc_of(pages.value),
                          batch=batch, q_heads=heads, kv_heads=pages.heads // batch, queries=queries,
                          q=Rows(*ops._rows(q)), out=Rows(out.data_ptr(), TYPES[out.dtype], queries, *out.stride()[:3]),
                          **{name: Rows(*ops._rows(t)) for name, t in parts.items()}, pages=pages.address, page_count=len(pages) if most is None else most,
                          scale=d**-0.5 if scale is None else float(scale), cap=softcap, causal=causal, window=window, stream=stream,
                          capability=self.runtime.capability, sms=self.runtime.sms, splits=splits, bandwidth=self.bandwidth)
        if counts is not None:
            call.counts = counts.data_ptr()
        if mask is not None:
            call.mask, call.mask_batch, call.mask_query = mask.data_ptr(), mask.stride(0), mask.stride(1) if mask.dim() == 3 else 0
        return call, out, [q, parts, mask, counts, pages]

    def attend(self, q: torch.Tensor, pages: CudaPages, *parts, stream: int, **options) -> torch.Tensor:
        """As :func:`ops.attend`, all tensors on the device, which is the current one.

        Products are exact in fp16 codes times vectors of 22 bits, sums and softmax are float32; the order of all sums depends on shapes and device alone.

        Args:
            stream: address of a CUDA stream. There is no default: a launch on the legacy stream would run once, and be missing from a graph that is captured.
            parts, options: as there, and ``splits``: blocks that share the keys, in place of what the configuration has; ``counts``: int32 [2] on the device,
                how many pages and tokens of the tail there are. Then ``tail_k`` and ``tail_v`` are as long as they may get, ``mask`` is as wide as the keys
                may get with the ``pages.room`` pages that :meth:`CudaPages.reserve` made room for, and what is captured in a graph serves every length up to
                that. Nobody checks that there are no more tokens in the tail.

        Raises ShapeError, NativeError.
        """
        pages.note()
        call, out, keep = self.call(q, pages, *parts, stream=stream, **options)
        if not q.numel():
            return out
        library, asked, address = self.runtime.library, f"attention of q {tuple(q.shape)} over {len(pages)} pages", ctypes.addressof(call)
        # From torch's allocator, which keeps it for this stream until the kernels are done, also in a captured graph.
        workspace = torch.empty(library.kv_workspace_nbytes(address), dtype=torch.uint8, device=q.device)
        call.workspace = workspace.data_ptr()
        code = library.kv_attend(address)
        if code < 0:
            raise NativeError(asked, library.kv_explain(address)[2], "keep the model on the CPU")
        self.runtime.run(code, asked)
        del keep
        return out

    def explain(self, q: torch.Tensor, pages: CudaPages, *parts, **options) -> tuple[str, str]:
        """(name of the kernel, all decisions in a line); the name is empty where there is no kernel, and the line says why."""
        call, _, keep = self.call(q, pages, *parts, **options)
        _, name, text = self.runtime.library.kv_explain(ctypes.addressof(call))
        del keep
        return name, text


def check_device(device: torch.device) -> None:
    """Raises NativeError if there are no kernels for a CUDA device."""
    Kernels(cuda.runtime(device))


def pack_page(x: torch.Tensor, fmt: PageFormat, codes: torch.Tensor, params: torch.Tensor) -> None:
    """:meth:`Kernels.pack_page` on the current stream of x's device."""
    with cuda._on(x.device) as (runtime, stream):
        Kernels(runtime).pack_page(x, fmt, codes, params, stream=stream)


def unpack_page(codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As :func:`ops.unpack_page`, on the device of the page, and the same bits. Raises ShapeError, FormatError."""
    check_format(fmt)
    heads = ops._check_unpack(codes, params, fmt, batch, dtype, codes.device)
    return page_codes.numbers(codes, params, fmt).view(batch, heads // batch, PAGE, fmt.head_dim).to(dtype)


def explain(q: torch.Tensor, pages: CudaPages, *parts, **options) -> tuple[str, str]:
    """:meth:`Kernels.explain` on the pages' device."""
    return Kernels(cuda.runtime(pages.device)).explain(q, pages, *parts, **options)


def attend(q: torch.Tensor, pages: CudaPages, *parts, **options) -> torch.Tensor:
    """:meth:`Kernels.attend` on the current stream of the pages' device."""
    with cuda._on(pages.device) as (runtime, stream):
        return Kernels(runtime).attend(q, pages, *parts, stream=stream, **options)

"""Whole layers on a GPU: one native call launches all kernels of a token (csrc/cuda/layer.cpp), and after a few tokens a CUDA graph replays them.

One new token of each sequence over an MxqCache of uniform pages; whatever else a model is asked for goes through its modules. What changes from token to token
lies in device memory (:class:`CudaRows`), so the call says the same until something moves: the table of pages when its room doubles, everything after a crop
into pages or a reordering. The host counts tokens along, packs a full tail between two calls as ever, and waits for nothing.
"""

from __future__ import annotations

import ctypes
import operator

import torch
from transformers.cache_utils import Cache, DynamicCache

from .. import cuda, ops
from ..cuda import CudaPacked
from ..errors import ModelError, NativeError
from ..formats import PAGE
from ..kv.cache import MxqCache, MxqCacheLayer, tail_room
from ..kv.cuda import PageDesc, Rows, desc_of
from ..kv.ops import _rows
from . import fused_cache
from .fused_graph import Repeated
from .fused_weights import NativeWeights

MOST_SEQUENCES = 16  #: that the linear kernels take at once from packed weights
#: Reasons for which nobody expects speed: the prompt of every text, a cache in float, the first tokens of a cache.
PROMPT, FLOAT, BEGINNING = "several tokens at once on a GPU", "a cache in float on a GPU", "the first tokens of a cache on a GPU"
EXPECTED = (PROMPT, FLOAT, BEGINNING)
#: Settings of a KVSpec that are followed: a budget is, since it halves pages between two calls.
_FOLLOWED = {"key", "value", "group", "residual", "sink", "budget"}

LayerLinear = cuda._struct("LayerLinear", "head", "blob", "bias", "bias_type")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class LayerDesc(ctypes.Structure):
    """csrc/cuda/layer.h, struct LayerDesc."""

    _fields_ = [*((n, ctypes.c_int64) for n in ("attention_norm", "mlp_norm", "q_norm", "k_norm")), *((n, LayerLinear) for n in _LINEARS),
                ("scale", ctypes.c_double), ("window", ctypes.c_int64), ("key", PageDesc), ("value", PageDesc),
                *((n, Rows) for n in ("sink_k", "sink_v", "tail_k", "tail_v")), *((n, ctypes.c_int64) for n in ("pages", "page_room", "counts"))]


class LayersCall(ctypes.Structure):
    """csrc/cuda/layer.h, struct LayersCall."""

    _fields_ = [*((n, ctypes.c_int64) for n in ("layer", "layers", "x", "type", "batch", "hidden", "q_heads", "kv_heads", "dim", "inner")),
                ("eps", ctypes.c_double),
                *((n, ctypes.c_int64) for n in ("final_norm", "cos", "sin", "positions", "position", "mask", "mask_batch", "workspace", "stream", "capability",
                                                "sms"))]


_LAYOUTS = frozenset(map(cuda.layout, (LayerLinear, LayerDesc, LayersCall)))


class CudaWeights(NativeWeights):
    """As NativeWeights, for native code on a GPU. Raises ModelError, also for a compiled module without this code.

    Attributes:
        layers: a LayerDesc each, without the cache.
        final_norm: address.
    """

    def _make(self, final_norm: int, layers: list[tuple]) -> None:
        try:
            cuda.runtime(self.place).check_layouts(_LAYOUTS)
        except NativeError as e:
            raise ModelError(e.asked, e.rule, e.fix) from e
        self.final_norm = final_norm
        self.layers = [LayerDesc(*norms, *linears, scale, window) for *norms, scale, window, linears in layers]

    def _native(self, packed: CudaPacked, bias: tuple[int, int], compute: str) -> LayerLinear:
        if compute != "a16":
            raise ModelError("native weights of the layers", f"a linear has compute={compute!r}, the CUDA kernels read x as it is", 'set it to "a16"')
        return LayerLinear(packed.head.data_ptr(), packed.blob.data_ptr(), *bias)


def unsuited(tokens: torch.Tensor, cache: Cache | None) -> str | None:
    """Why tokens [B, T] or [B, T, hidden] on a GPU must go through the modules, whatever the model; or None."""
    if tokens.shape[1] != 1:
        return PROMPT
    if cache is None or type(cache) is DynamicCache:
        return FLOAT
    if tokens.shape[0] > MOST_SEQUENCES:
        return f"a batch of {tokens.shape[0]} on a GPU, native layers take {MOST_SEQUENCES}"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def unfit(cache: Cache, layers: int, place: torch.device) -> str | None:
    """What stands against a cache for native layers on the device ``place``, or None."""
    if why := fused_cache.unfit(cache, layers, (MxqCache,)):
        return why
    for i, layer in enumerate(cache.layers):
        if type(layer) is not MxqCacheLayer:
            return f"layer {i} of the cache is a {type(layer).__name__}, on a GPU native layers read packed pages"
        if why := fused_cache.unfit_layer(i, layer, place, _FOLLOWED):
            return why
    return None


class CudaRows:
    """What native layers on a GPU need of one cache, and memory for a token of each sequence: all that a call reads and writes stays where it is.

    Args:
        cache: of which :func:`unfit` says nothing.
        shape: batch, key/value heads, head dimension, dtype.
        weights: of the model.
    """

    def __init__(self, cache: MxqCache, shape: tuple[int, int, int, torch.dtype], weights: CudaWeights):
        self.layers, self.shape, self.weights, self.place = list(cache.layers), shape, weights, weights.place
        (batch, _, dim, dtype), count, runtime = shape, len(self.layers), cuda.runtime(weights.place)
        with torch.inference_mode(False):  # or nothing could be written outside of that mode later
            self.x = torch.empty(batch, weights.hidden, dtype=dtype, device=self.place)
            self.state = torch.empty(2 * count + batch, dtype=torch.int32, device=self.place)  # counts of each layer, then positions
            self.angles = tuple(torch.empty(batch, dim, dtype=dtype, device=self.place) for _ in range(2))  # cos and sin where there is no table
        self.mask: torch.Tensor | None = None  # bool [batch, the most keys]
        self.workspace: torch.Tensor | None = None
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None  # cos and sin of the last call
        self.seen: list[tuple] = [(None,) * 4] * count
        self.descs = (LayerDesc * count)(*weights.layers)
        self.call = LayersCall(layer=ctypes.addressof(self.descs), layers=count, x=self.x.data_ptr(), type=ops.TYPES[dtype], batch=batch, hidden=weights.hidden,
                               q_heads=weights.heads, kv_heads=weights.kv_heads, dim=dim, inner=weights.inner, eps=weights.epsilon,
                               final_norm=weights.final_norm, position=self.state.data_ptr() + 8 * count, capability=runtime.capability, sms=runtime.sms)
        self.library, self.run = runtime.library, runtime.run
        self.repeated = Repeated()

    def unchanged(self, cache: Cache) -> bool:
        """Whether ``cache`` still has the layers that these rows are of, on the same device."""
        if len(self.layers) != len(cache.layers) or not all(map(operator.is_, self.layers, cache.layers)):
            return False
        return not any(fused_cache.elsewhere(x, self.place) for x in self.layers)

    def unready(self) -> str | None:
        """Why the next token must go through the modules, or None."""
        for i, layer in enumerate(self.layers):
            if not layer.is_initialized or layer.sink_tokens < layer.spec.sink:
                return BEGINNING
            if (layer.batch, layer.heads, layer.dim, layer.dtype) != self.shape:
                return f"layer {i} of the cache has batch {layer.batch}, {layer.heads} heads of dimension {layer.dim} in {str(layer.dtype)[6:]}"
            if layer.waiting is not None:
                return f"layer {i} of the cache waits for its attention"
        return None

    def step(self, x: torch.Tensor, past: int, mask: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, position: int | None) -> torch.Tensor:
        """All layers and the final norm on a token of each sequence, x [B, 1, hidden] behind ``past`` others, which go into the cache; the result is like x.

        Args:
            mask: [B, past + 1] of numbers or booleans, or None.
            cos, sin: [positions, D], with the row ``position`` that all sequences have; or, if that is None, [B or 1, D], the very angles of each sequence.
        """
        batch = self.shape[0]
        with cuda._on(self.place) as (_, stream):
            self.x.copy_(x[:, 0])
            if position is None:
                for mine, given in zip(self.angles, (cos, sin), strict=True):
                    mine.copy_(given)
                cos, sin = self.angles
            moved = self._note_cache()
            moved |= self._note_mask(past + 1, mask)
            self.table = cos, sin  # which a graph reads
            moved |= self._put(cos=cos.data_ptr(), sin=sin.data_ptr(), positions=cos.shape[0])
            if moved:
                self._make_workspace()
                self.repeated.moved()
            numbers = [n for layer in self.layers for n in (len(layer.pages), layer.tail_tokens + 1)]
            numbers += range(batch) if position is None else [position] * batch
            # From pinned memory nothing waits for the device, and torch's allocator keeps it until the copy was made.
            self.state.copy_(torch.tensor(numbers, dtype=torch.int32, pin_memory=True), non_blocking=True)
            self.repeated(self._launch, stream)
            for layer in self.layers:
                layer.tail_tokens += 1
                layer._pack_full_tail()
            return self.x[:, None].clone()

    def _launch(self, stream: int) -> None:
        self.call.stream = stream
        self.run(self.library.run_layers(ctypes.addressof(self.call)), f"{len(self.layers)} decoder layers of {self.shape[0]} tokens")

    def _put(self, **fields: int) -> bool:
        """Sets fields of the call; returns whether any was another one."""
        moved = any(getattr(self.call, name) != value for name, value in fields.items())
        for name, value in fields.items():
            setattr(self.call, name, value)
        return moved

    def _note_cache(self) -> bool:
        """Writes down where the layers' tokens are, of those that have moved; returns whether any has."""
        moved = False
        for i, layer in enumerate(self.layers):
            pages = layer.pages
            pages.note()
            tail, table, *room = self.seen[i]
            if tail is not layer.tail or table is not pages or room != [pages.address, pages.capacity]:
                desc, moved = self.descs[i], True
                desc.key, desc.value = desc_of(pages.key), desc_of(pages.value)
                for name, t in zip(("sink_k", "sink_v", "tail_k", "tail_v"), (*layer.sink, *layer.tail), strict=True):
                    setattr(desc, name, Rows(*_rows(t)))
                desc.pages, desc.page_room, desc.counts = pages.address, pages.capacity, self.state.data_ptr() + 8 * i
                self.seen[i] = (layer.tail, pages, pages.address, pages.capacity)
        return moved

    def _note_mask(self, keys: int, mask: torch.Tensor | None) -> bool:
        """Brings the mask of so many keys to where the kernels read it; returns whether that is another place."""
        if mask is None:
            return self._put(mask=0, mask_batch=0)
        if self.mask is None or self.mask.shape[1] < keys:
            most = max(x.spec.sink + PAGE * x.pages.capacity + tail_room(x.spec) for x in self.layers)
            with torch.inference_mode(False):
                self.mask = torch.empty(self.shape[0], most, dtype=torch.bool, device=self.place)
        self.mask[:, :keys].copy_(mask)
        return self._put(mask=self.mask.data_ptr(), mask_batch=self.mask.shape[1])

    def _make_workspace(self) -> None:
        need = self.library.layers_workspace_nbytes(ctypes.addressof(self.call))
        if self.workspace is None or self.workspace.numel() < need:
            with torch.inference_mode(False):
                self.workspace = torch.empty(need, dtype=torch.uint8, device=self.place)
            self.call.workspace = self.workspace.data_ptr()

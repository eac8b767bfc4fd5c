"""What native layers need of a cache: memory to append to, and where everything lies.

Two kinds of layers can be read and written without Python in between:

- :class:`~mxq_ext.kv.cache.MxqCacheLayer`, as it is: its tail has room, and packing a full one is done between two calls;
- :class:`RoomyLayer`, which takes the place of transformers' DynamicLayer and DynamicSlidingWindowLayer in a DynamicCache. It holds the same
  tokens and answers as they do, but in buffers with room behind the tokens, so that a token more is no copy of all others.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Collection
from dataclasses import fields

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ModelError
from ..formats import PAGE
from ..kv.cache import MxqCache, MxqCacheLayer
from ..kv.ops import CPU
from ..plan.kv import KVSpec

ROOM = 256  #: tokens of room in a fresh buffer; a full one is replaced by one with room for half as many tokens again
FIELDS = 27  #: numbers of a ``LayerCache`` (csrc/cpu/layer.h)
#: Settings of a KVSpec that native layers follow; any other one must have its default.
_FOLLOWED = {"key", "value", "group", "residual", "sink", "pre_rope", "levels", "outliers"}


class RoomyLayer(DynamicLayer):
    """A DynamicLayer whose ``keys`` and ``values`` [B, Hkv, n, D] are views of buffers [B, Hkv, capacity, D].

    With a ``window`` it keeps at least the newest window - 1 tokens, as DynamicSlidingWindowLayer does, and lets older ones go when a buffer is
    replaced; ``dropped`` counts them.
    """

    def __init__(self, window: int = 0):
        self.window, self.dropped, self.tokens = window, 0, 0
        self.is_sliding = window > 0
        self.record_past = False  # then nothing is dropped
        super().__init__()

    @staticmethod
    def of(layer: DynamicLayer) -> RoomyLayer:
        """A layer with the tokens of ``layer``, whose tensors it takes over."""
        out = RoomyLayer(getattr(layer, "sliding_window", 0))
        if layer.is_initialized:
            out.dtype, out.device, out.is_initialized = layer.keys.dtype, layer.device, True
            out.keys, out.values = layer.keys, layer.values
            out.dropped = layer.get_seq_length() - out.tokens
        out.record_past = getattr(layer, "record_past", False)
        return out

    def _take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        # The buffers end where the tokens do: what others still see of the old ones is never written again.
        self.k, self.v, self.tokens = keys, values, keys.shape[2]

    @property
    def keys(self) -> torch.Tensor | None:
        return self._view(self.k)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self.k = value
        self.tokens = value.shape[2] if value is not None and value.dim() == 4 else 0

    @property
    def values(self) -> torch.Tensor | None:
        return self._view(self.v)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self.v = value

    def _view(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        return buffer if buffer is None or buffer.dim() != 4 else buffer[:, :, : self.tokens]

    def reserve(self, batch: int, heads: int, more: int, dim: int, dtype: torch.dtype) -> None:
        """Makes room for ``more`` tokens behind the others. Raises ModelError if they are of another shape or dtype than these."""
        if not self.is_initialized:
            self.device, self.is_initialized, self.tokens = torch.device("cpu"), True, 0
            self.k = self.v = torch.empty(batch, heads, 0, dim, dtype=dtype)
        if self.k.dim() != 4:  # begun without a token
            self.k = self.v = torch.empty(batch, heads, 0, dim, dtype=dtype)
        for have in (self.k, self.v):
            if (*have.shape[:2], have.shape[3], have.dtype) != (batch, heads, dim, dtype):
                raise ModelError(f"a cache of {have.shape[0]} sequences, {have.shape[1]} heads of {have.shape[3]}, {str(have.dtype)[6:]}",
                                 f"the new tokens have {batch}, {heads}, {dim}, {str(dtype)[6:]}", "use a new cache")
        if self.tokens + more <= self.k.shape[2] and self.k.stride() == self.v.stride() and self.k.stride(3) == 1:
            return
        kept = min(self.tokens, self.window - 1) if self.window and not self.record_past else self.tokens
        capacity = kept + more + max(ROOM, (kept + more) // 2)
        with torch.inference_mode(False), torch.no_grad():  # or nothing could be appended outside of that mode later
            for name in ("k", "v"):
                old = getattr(self, name)
                new = torch.empty(batch, heads, capacity, dim, dtype=dtype)
                new[:, :, :kept] = old[:, :, self.tokens - kept : self.tokens]
                setattr(self, name, new)
        self.dropped += self.tokens - kept
        self.tokens = kept

    def get_seq_length(self) -> int:
        return self.dropped + self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers 5.0 hands over positions instead of their number
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.tokens + new, self.dropped

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.dropped = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest ``-tokens_to_remove`` tokens away; beyond a sliding window there is no way back further than what is kept."""
        gone = abs(tokens_to_remove) if tokens_to_remove <= 0 else 0
        if self.dropped and self.tokens - gone < self.window - 1:
            raise ModelError(f"crop({tokens_to_remove}) of a sliding window of {self.window} tokens", f"only the newest {self.tokens} tokens are kept",
                             "call activate_past_recording() on the cache before it fills the window")
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of the tokens that are to go")  # as DynamicLayer does
        if gone and self.is_initialized:
            self._take(self.keys[:, :, :-gone], self.values[:, :, :-gone])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens as DynamicLayer does, with a copy of all others: for calls that go through the modules."""
        if self.tokens:
            key_states, value_states = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self.device, self.is_initialized = key_states.device, True
        self._take(key_states, value_states)
        return key_states, value_states

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.tokens:
            self.k, self.v = (x.index_select(0, beam_idx) for x in (self.k, self.v))  # the room goes along

    def activate_past_recording(self) -> None:
        """From now on no token is dropped."""
        self.record_past = True

    def __repr__(self) -> str:
        return f"RoomyLayer({self.get_seq_length()} tokens{f', window {self.window}' * (self.window > 0)})"


def adopt(cache: Cache, layers: int) -> str | None:
    """Prepares a cache for a model with so many layers, all native, in place. Returns what stands against it, or None."""
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if plain and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # made without a config: it grows by layers as they are used
        cache.layers.extend(RoomyLayer() for _ in range(layers - len(cache.layers)))
    if why := unfit(cache, layers, (DynamicCache, MxqCache)):
        return why
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if layer.is_initialized and layer.keys.device.type != "cpu":
                return f"the cache is on {layer.keys.device}"
            cache.layers[i] = RoomyLayer.of(layer)
        elif type(layer) is MxqCacheLayer:
            if why := unfit_layer(i, layer, CPU, _FOLLOWED):
                return why
        elif type(layer) is not RoomyLayer:
            return f"layer {i} of the cache is a {type(layer).__name__}"
    return None


def unfit(cache: Cache, layers: int, kinds: tuple[type, ...]) -> str | None:
    """What stands against a cache as a whole for a model with so many layers, all native, whose native code knows caches of these ``kinds``; or None."""
    if type(cache) not in kinds:
        return f"a {type(cache).__name__} is in use"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    if len(cache.layers) != layers:
        return f"the cache has {len(cache.layers)} layers, the model {layers}"
    return None


def unfit_layer(i: int, layer: MxqCacheLayer, place: torch.device, followed: Collection[str]) -> str | None:
    """What stands against packed layer ``i`` for native code on the device ``place`` that follows these settings of a KVSpec; or None."""
    if odd := _odd(layer.spec, followed):
        return f"layer {i} of the cache has {odd}"
    if layer.waiting is not None:
        return f"layer {i} of the cache waits for its attention"
    if elsewhere(layer, place):
        return f"the cache is on {layer.device}"
    return None


def elsewhere(layer: MxqCacheLayer, place: torch.device) -> bool:
    """Whether the tokens of a packed layer are on another device."""
    return layer.is_initialized and layer.device != place


def _odd(spec: KVSpec, followed: Collection[str]) -> str | None:
    """A setting of ``spec`` that is not among those that native layers follow."""
    for f in fields(spec):
        if f.name not in followed and getattr(spec, f.name) != f.default:
            return f"{f.name}={getattr(spec, f.name)!r}"
    return None


class CacheRows:
    """The ``LayerCache`` structs of one cache, and what they were made from, so that only what has changed since is written again."""

    place = CPU

    def __init__(self, cache: Cache, shape: tuple[int, int, int, torch.dtype]):
        self.layers = list(cache.layers)
        self.shape = shape  # batch, key/value heads, head dimension, dtype
        self.rows = array("q", bytes(8 * FIELDS * len(self.layers)))
        self.address = self.rows.buffer_info()[0]
        self.seen: list[tuple] = [(None,) * 5 if type(x) is MxqCacheLayer else (None,) * 3 for x in self.layers]
        self.packed = [x for x in self.layers if type(x) is MxqCacheLayer]

    def unchanged(self, cache: Cache) -> bool:
        """Whether ``cache`` still has the layers that these rows are of, on the CPU."""
        if len(self.layers) != len(cache.layers) or not all(map(operator.is_, self.layers, cache.layers)):
            return False
        return not any(elsewhere(x, CPU) for x in self.packed)  # a cache that was reset may begin again elsewhere

    def prepare(self, tokens: int) -> int:
        """Brings every row up to date and reserves room; returns how many of ``tokens`` can be appended in one call."""
        room = tokens
        for i, layer in enumerate(self.layers):
            if type(layer) is RoomyLayer:
                # It must have room for all tokens: packed layers are what cuts a call into several.
                k, v, have = self.seen[i]
                if layer.k is not k or layer.v is not v or layer.tokens != have or have + tokens > k.shape[2]:
                    layer.reserve(*self.shape[:2], tokens, *self.shape[2:])
                    self._write_roomy(i, layer)
            else:
                room = min(room, self._prepare_packed(i, layer))
        return room

    def _prepare_packed(self, i: int, layer: MxqCacheLayer) -> int:
        """The same for one packed layer, which is ready for as many tokens as its sink, or else its tail, has room for."""
        if not layer.is_initialized:
            batch, heads, dim, dtype = self.shape
            layer.lazy_initialization(like := torch.empty(batch, heads, 0, dim, dtype=dtype), like)
        into_sink = layer.sink_tokens < layer.spec.sink
        tail, pages, *counts = self.seen[i]
        if layer.tail is not tail or layer.pages is not pages or [len(pages), layer.sink_tokens, layer.tail_tokens] != counts:
            self._write_packed(i, layer, into_sink)
        return layer.spec.sink - layer.sink_tokens if into_sink else layer.spec.residual + PAGE - layer.tail_tokens

    def advance(self, tokens: int) -> None:
        """After a native call that appended ``tokens`` tokens to every layer, and counted them in the rows."""
        for i, layer in enumerate(self.layers):
            if type(layer) is RoomyLayer:
                layer.tokens += tokens
                self.seen[i] = (layer.k, layer.v, layer.tokens)
            elif layer.sink_tokens < layer.spec.sink:
                layer.sink_tokens += tokens
            else:
                layer.tail_tokens += tokens
                self.seen[i] = (layer.tail, layer.pages, len(layer.pages), layer.sink_tokens, layer.tail_tokens)
                layer._pack_full_tail()

    def _write_roomy(self, i: int, layer: RoomyLayer) -> None:
        k, v = layer.k, layer.v
        tail = (k.data_ptr(), v.data_ptr(), *k.stride()[:3], layer.tokens)
        self.rows[i * FIELDS : (i + 1) * FIELDS] = array("q", (16, PAGE, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, *tail, 0, layer.dropped, *(0,) * 7))
        self.seen[i] = (k, v, layer.tokens)

    def _write_packed(self, i: int, layer: MxqCacheLayer, into_sink: bool) -> None:
        pages = layer.pages
        sink, tail = ((k.data_ptr(), v.data_ptr(), *k.stride()[:3], n) for (k, v), n in ((layer.sink, layer.sink_tokens), (layer.tail, layer.tail_tokens)))
        self.rows[i * FIELDS : (i + 1) * FIELDS] = array("q", (pages.key.bits, pages.key.group, pages.value.bits, pages.value.group,
                                                               pages.pointers if len(pages) else 0, len(pages), *sink, *tail, int(into_sink), 0,
                                                               *pages.reading, pages.key.outliers, pages.value.outliers))
        self.seen[i] = (layer.tail, pages, len(pages), layer.sink_tokens, layer.tail_tokens)


def float_rows(keys: torch.Tensor, values: torch.Tensor) -> array:
    """One row: an empty float layer whose buffers are ``keys`` and ``values`` [B, Hkv, tokens, D], of equal strides."""
    return array("q", (16, PAGE, 16, 0, *(0,) * 8, keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], 0, 0, 0, *(0,) * 7))

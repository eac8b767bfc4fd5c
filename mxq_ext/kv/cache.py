"""MxqCache: the cache of transformers with keys and values in packed pages.

One layer holds, in the order of positions::

    sink                 the first tokens, in the model's dtype              [B, Hkv, sink, D]
    pages                64 tokens each, quantized (docs/formats.md)         kv.ops.PageTable
    tail                 the newest tokens, in the model's dtype             [B, Hkv, residual + 64, D], filled from the left

A token enters the tail (the sink while that has room). When the tail is full, its oldest 64 tokens become a page, so the newest
``residual`` tokens or more are always exact. Pages are separate tensors that are never moved: appending allocates one page at most.
All of it is on the device of the first tokens, the CPU or a GPU (``kv.device``).
With bits by token (``KVSpec.mixed``) a tail is ``residual`` + 64 tokens for each page of a round, which are made together: the tokens that
queries looked at most (``kv.salience``) fill the round's first pages. The order of tokens in pages does not matter to attention, but to masks, which
are put into it, and to a crop, which takes it back.
With bits by head (``KVSpec.heads``) there is a table of pages for each pair of bits (``kv.heads``), and everything that a layer holds has its heads in
the order of the pairs: heads are brought into it as they come, those of queries too, and those of outputs back. Nothing is copied for that where the
order is the model's own.

``update`` stores nothing: it hands the new tokens back under a mark, and the attention function (``kv.attention``) that finds the mark
reads this layer and appends. A model whose attention does not go that way would silently attend to the new tokens alone; here the
next call finds the tokens of the last one still waiting, and raises.
"""

from __future__ import annotations

import functools
import os

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .. import _native
from ..errors import FormatError, ModelError, NativeError, PlanError, ShapeError
from ..formats import PAGE
from ..plan.kv import KVPlan, KVSpec
from ..plan.presets import find_kv
from ..plan.schema import Plan
from . import device, ops, salience
from .heads import HeadPages, attend, kinds_of, parts_of
from .rope import Rope, rope_of
from .shrink import HALF, shrink_page, shrunk

_ORDER = torch.int16  # of tokens in a round
MARK = "mxq_cache_layer"  #: attribute of the keys that ``update`` returns: the layer that they wait for


def need_native() -> None:
    """Raises NativeError if the compiled extension is missing or older than the packed cache: there is no slower way."""
    if not hasattr(_native.cpu, "kv_attend") or not hasattr(_native.cpu, "OUTLIER_BYTES"):
        raise NativeError("a quantized KV cache", "the compiled extension has no kernels for it", "build it again with `pip install .` in the source folder")
    if isinstance(_native.cpu, _native.Missing):
        _native.cpu.kv_attend()


def page_formats(spec: KVSpec, head_dim: int, layer: str, place: torch.device = ops.CPU) -> tuple[ops.PageFormat, ops.PageFormat]:
    """Formats of a layer's pages of keys and of values on the device ``place``; of a spec with bits by head, those of one of its ``parts``.

    Raises FormatError, which names the layer, for head dimensions that do not go and for what the device's kernels do not read; NativeError without kernels.
    """
    try:
        outliers = [ops.outlier_count(spec.outliers, bits, head_dim) for bits in (spec.key, spec.value)]
        key = ops.PageFormat("keys", spec.key, min(spec.group, PAGE), head_dim, spec.codebook(0), outliers[0])
        value = ops.PageFormat("values", spec.value, ops.value_group(head_dim, spec.group), head_dim, spec.codebook(1), outliers[1])
        device.check(place, key, value, pre_rope=spec.pre_rope, mixed=spec.mixed is not None)
    except FormatError as e:
        raise FormatError(f"{layer}: {e.asked}", e.rule, e.fix) from None
    if spec.rotate and head_dim & (head_dim - 1):
        raise FormatError(f"{layer}: rotated keys and values of head dimension {head_dim}", "a Hadamard matrix needs a power of two",
                          'leave "rotate" out for this model')
    return key, value


def page_mix(spec: KVSpec, head_dim: int, layer: str) -> ops.PageMix | None:
    """How pages of salient and of other tokens take turns; None where all tokens are alike. Raises FormatError as :func:`page_formats` does."""
    if spec.mixed is None:
        return None
    return ops.PageMix(*page_formats(spec.low, head_dim, layer), spec.mixed.high, spec.mixed.pages)


def check_heads(spec: KVSpec, heads: int, layer: str) -> None:
    """Raises PlanError if a spec with bits by head is not one for a layer of so many key/value heads."""
    if spec.heads is not None and len(spec.heads) != heads:
        raise PlanError(f"{layer}: a KV cache of {spec}", f"it has bits for {len(spec.heads)} heads, the layer has {heads} key/value heads",
                        "name each of them once, 0 for the first")


def cache_nbytes(spec: KVSpec, tokens: int, heads: int, head_dim: int, *, batch: int = 1, float_bytes: int = 2) -> int:
    """Bytes of one layer that has read ``tokens`` tokens: what :meth:`MxqCacheLayer.nbytes` will count.

    ``heads`` are key/value heads, ``float_bytes`` those of the model's dtype. The buffers of sink and tail count in full.
    Raises PlanError for a spec with bits for another number of heads.
    """
    check_heads(spec, heads, "layer")
    if spec.heads is not None:
        shares = zip(spec.parts, spec.pairs.values(), strict=True)
        return sum(cache_nbytes(part, tokens, len(share), head_dim, batch=batch, float_bytes=float_bytes) for part, share in shares)
    key, value = page_formats(spec, head_dim, "layer")
    room = tail_room(spec)
    rounds = max(0, (tokens - spec.sink - spec.residual) // (room - spec.residual))
    while spec.budget is not None and _shrinks(spec.budget, key, value, rounds * batch * heads):
        key, value = _halved(key, value)
    exact = 2 * (spec.sink + room) * head_dim * float_bytes
    mix = page_mix(spec, head_dim, "layer")
    if mix is None:
        return batch * heads * (rounds * (key.page_bytes + value.page_bytes) + exact)
    each = mix.high * (key.page_bytes + value.page_bytes) + (mix.round - mix.high) * (mix.key.page_bytes + mix.value.page_bytes)
    return batch * (heads * (rounds * each + exact) + rounds * mix.round * PAGE * _ORDER.itemsize) + salience.Salience.nbytes(batch, room)


def tail_room(spec: KVSpec) -> int:
    """Tokens that a tail takes until pages are made."""
    return spec.residual + PAGE * spec.round_pages


def _shrinks(budget: int, key: ops.PageFormat, value: ops.PageFormat, pages: int) -> bool:
    """Whether that many pages (of all heads) in these formats are over the budget and can be halved."""
    return pages * (key.page_bytes + value.page_bytes) > budget and (key.bits in HALF or value.bits in HALF)


def _halved(*formats: ops.PageFormat) -> tuple[ops.PageFormat, ...]:
    """Each at half its bits; 2 bits stay."""
    return tuple(shrunk(f) if f.bits in HALF else f for f in formats)


@functools.lru_cache
def _signs(dim: int, place: torch.device) -> torch.Tensor:
    """float32 [dim, dim] of 1 and -1 on a device: symmetric, and by dim**-0.5 its own inverse."""
    h = torch.ones(1, 1, device=place)
    while h.shape[0] < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] with its channels multiplied by the Hadamard matrix, in x's dtype.

    What torch is told about products does not matter to channels of 16 bits: these are exact in TF32, as signs are, and autocast is off. The factor follows.
    """
    dim = x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        y = x.float() @ _signs(dim, x.device)
    return (y * dim**-0.5).to(x.dtype)


class MxqCacheLayer(CacheLayerMixin):
    """Keys and values of one decoder layer; see the head of this file.

    Args:
        spec: bits, groups, and how many tokens stay exact.
        name: what errors call the layer.
        rope: the angles of the layer's rotary embedding, for a ``spec`` with pre_rope.
    """

    is_sliding = False  # windows are a matter of the mask: all tokens are kept, so that a crop can always go back
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # shapes are taken from the first keys

    def __init__(self, spec: KVSpec, name: str = "layer", rope: Rope | None = None):
        super().__init__()
        if spec.pre_rope and rope is None:
            raise ModelError(f"{name} of a cache with pre_rope", "the angles of its rotary embedding are not known",
                             "make the cache by MxqCache(model.config, ...)")
        self.spec, self.name, self.rope = spec, name, rope if spec.pre_rope else None
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = False
        self.pages: ops.PageTable | HeadPages | None = None
        self.sink: tuple[torch.Tensor, torch.Tensor] | None = None
        self.tail: tuple[torch.Tensor, torch.Tensor] | None = None
        self.sink_tokens = self.tail_tokens = 0
        self.waiting: tuple[torch.Tensor, torch.Tensor] | None = None  # given out by update, not yet read by attention
        self.mix: ops.PageMix | None = None
        self.shares: list[int] = []  # key/value heads of each pair of bits
        self.head_order: tuple[torch.Tensor, torch.Tensor] | None = None  # which of the model's heads is kept where, and its inverse; None: as they come
        self.orders: list[torch.Tensor] = []  # [B, tokens of a round] of each round of mixed pages: which of its tokens lies where
        self.salience: salience.Salience | None = None

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.is_initialized:
            self.device = self.tail[0].device  # it may be another one now: torch.load has map_location
            if self.pages.device != self.device:  # a table without pages stays where it was
                self.pages = self._table(kinds_of(self.pages))

    def __repr__(self) -> str:
        return f"MxqCacheLayer({self.spec}, {self.get_seq_length()} tokens, {self.nbytes()} bytes)"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates sink and tail for keys and values like these, [B, Hkv, any, D]."""
        batch, heads, _, dim = key_states.shape
        check_heads(self.spec, heads, self.name)
        kinds = [page_formats(part, dim, self.name, key_states.device) for part in self.spec.parts]
        self.mix = page_mix(self.spec, dim, self.name)
        self.batch, self.heads, self.dim, self.dtype, self.device = batch, heads, dim, key_states.dtype, key_states.device
        groups = [range(heads)] if self.spec.heads is None else list(self.spec.pairs.values())
        self.shares, order = [len(g) for g in groups], [head for g in groups for head in g]
        self.pages = self._table(kinds)
        with torch.inference_mode(False):  # or nothing could be appended outside of that mode later
            if order != list(range(heads)):
                forth = torch.tensor(order)
                self.head_order = self._here(forth), self._here(forth.argsort())
            self.sink, self.tail = (tuple(key_states.new_empty(batch, heads, tokens, dim) for _ in range(2))
                                    for tokens in (self.spec.sink, tail_room(self.spec)))
            if self.mix is not None:
                self.salience = salience.Salience(batch, tail_room(self.spec))
        self.is_initialized = True

    # -- what transformers calls ----------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new tokens [B, Hkv, t, D] and returns them marked, for the attention function to read with the rest of this layer.

        Raises ModelError if the tokens of the last call were never read, ShapeError if these do not go with those before.
        """
        self.check_read()
        self._check(key_states, value_states)
        self.waiting = tuple(x.detach() if x.requires_grad else x for x in (key_states, value_states))  # what is returned keeps its gradient
        marked = key_states.view_as(key_states)
        setattr(marked, MARK, self)
        return marked, value_states

    def check_read(self) -> None:
        """Raises ModelError if attention did not read what the last ``update`` handed out."""
        if self.waiting is not None:
            raise ModelError(f"{self.name} of a model with an MxqCache",
                             "its attention did not read the packed cache: the keys that the cache returned never came to it as they were",
                             "call mxq_ext.replace_attention(model, plan) first, and reset the cache after an error")

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.sink_tokens + PAGE * len(self.pages) + self.tail_tokens + (0 if self.waiting is None else self.waiting[0].shape[2])

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # transformers 5.0 hands over positions instead of their number
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name in transformers 5.0
        return -1

    def reset(self) -> None:
        """Empties the layer and gives its memory back."""
        self._forget()

    def crop(self, tokens: int) -> None:
        """Takes the newest tokens away: -tokens of them, or, for a positive number, all but the first ``tokens``.

        A crop that ends within a page moves what is left of it to the tail, as it was stored: those tokens were rounded once and
        may be rounded again.
        """
        length = self.get_seq_length()
        gone = min(length, -tokens if tokens <= 0 else max(0, length - tokens))
        self.check_read()
        if not gone:
            return
        of_tail = min(gone, self.tail_tokens)
        self.tail_tokens -= of_tail
        gone -= of_tail
        packed, step = PAGE * len(self.pages), self.spec.round_pages
        if of_pages := min(gone, packed):
            whole, left = divmod(packed - of_pages, PAGE * step)  # rounds
            if left:
                for x, states in zip(self.tail, self._round(whole), strict=True):
                    x[:, :, :left] = states[:, :, :left]
                self.tail_tokens = left
            pages = [self.pages[i] for i in range(whole * step)]
            self.pages, self.orders = self._table(kinds_of(self.pages)), self.orders[:whole]
            for page in pages:
                self.pages.append(*page)
        if self.salience is not None:
            self.salience.forget(0 if of_pages else self.tail_tokens)
        self.sink_tokens -= gone - of_pages

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._gather(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized and repeats != 1:
            self._gather(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._gather(torch.arange(self.batch, device=indices.device)[indices])  # a mask of booleans works too, and on a GPU is waited for

    def offload(self) -> None:
        raise ModelError(f"offloading {self.name}", "a packed cache stays where attention reads it", "leave offloading out")

    prefetch = offload

    # -- what attention calls -------------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores tokens [B, Hkv, t, D] behind the others. Beyond what was there it allocates pages alone, one at a time."""
        self.check_read()
        self._check(keys, values)
        self._append(keys, values)

    def attend(self, query: torch.Tensor, *, scale: float, mask: torch.Tensor | None, causal: bool, window: int, softcap: float) -> torch.Tensor:
        """Appends the waiting tokens and attends with their queries [B, Hq, t, D]: out [B, t, Hq, D] of the query's dtype.

        A query sees all tokens up to its own, in the form in which the cache keeps them then: tokens are appended no faster than the tail
        takes them, so that one call with many tokens gives what many calls with few would.

        Args:
            mask: bool [B, keys] or [B, t, keys] over all tokens, the new ones included; or None.
            causal, window, softcap: as :func:`kv.ops.attend` has them.
        """
        keys, values = self.waiting
        batch, heads, tokens, dim = query.shape
        if window and self.mix is not None:
            raise ModelError(f"{self.name} with a sliding window of {window} tokens and {self.spec}", "its pages hold tokens out of their order",
                             "leave mixed out")
        out = query.new_empty(batch, tokens, heads, dim)
        query = self._of_queries(self._turned(query), 1, 0)
        done, past = 0, self.get_seq_length() - tokens
        while done < tokens:
            stop = done + self._take(keys, values, done)
            seen = None if mask is None else (mask if mask.dim() == 2 else mask[:, done:stop])[..., : past + stop]
            part = query[:, :, done:stop]
            probes = self._probes(past + done, stop - done)
            lse = None if probes is None else part.new_empty(part.shape[:3], dtype=torch.float32)
            attend(part, self.pages, *self._exact(self.sink, self.sink_tokens), *self._exact(self.tail, self.tail_tokens), scale=scale,
                   causal=causal, window=window, softcap=softcap, mask=self._in_order_of_pages(seen), out=out[:, done:stop].transpose(1, 2),
                   **({} if lse is None else {"lse": lse}))
            if probes is not None:
                self._observe(part, lse, probes, seen, scale, softcap)
            self._pack_full_tail()
            done = stop
        self.waiting = None
        return self._turned(self._of_queries(out, 2, 1))  # the matrix is its own inverse

    def store(self, query: torch.Tensor | None = None, *, scale: float = 1.0, seen: torch.Tensor | None = None, softcap: float = 0.0) -> None:
        """Appends the waiting tokens, the first of this layer, which attention has read by itself.

        With the query [B, Hq, t, D] that did, and ``seen`` bool [B or 1, 1, t, t] or None for causal attention, mixed pages know which of them are salient.
        """
        keys, values = self.waiting
        weights = None
        if self.mix is not None and query is not None:
            with torch.no_grad():
                weights = salience.weights_of_prompt(query, keys, seen, scale=scale, softcap=softcap)
        self._append(keys, values, weights)
        self.waiting = None

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer holds."""
        if not self.is_initialized:
            return []
        extra = [] if self.salience is None else self.salience.tensors()
        return [*self.sink, *self.tail, *(t for i in range(len(self.pages)) for t in self.pages[i]), *self.orders, *extra]

    def nbytes(self) -> int:
        """Bytes of all tensors that the layer holds, on whatever device; the room in sink and tail that is not filled yet counts too.

        Addresses of pages, 32 bytes for those of all heads (of each pair of bits), and the order of the heads do not count on any device.
        """
        if not self.is_initialized:
            return 0
        extra = [] if self.salience is None else self.salience.tensors()
        return self.pages.nbytes() + sum(t.nbytes for t in (*self.sink, *self.tail, *self.orders, *extra))

    # -- inside ---------------------------------------------------------------------------------------------------------------

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        asked = f"{self.name}: keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        if keys.shape != values.shape or keys.dim() != 4 or keys.dtype != values.dtype:
            raise ShapeError(asked, "a packed cache needs both of one shape [batch, heads, tokens, head dimension] and one dtype",
                             "keep this layer in float")
        if not device.serves(keys.device) or values.device != keys.device:
            places = " and ".join(dict.fromkeys(str(x.device) for x in (keys, values)))
            raise ShapeError(asked, f"a packed cache is on the CPU or on a GPU, they are on {places}", "move the model to one of them")
        if self.is_initialized and keys.device != self.device:
            raise ShapeError(asked, f"the cache was begun on {self.device}, they are on {keys.device}", "move the model back, or reset the cache")
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        want = self.batch, self.heads, self.dim, self.dtype
        if (have := (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype)) != want:
            said = [f"batch {b}, {h} heads of dimension {d} in {str(t)[6:]}" for b, h, d, t in (want, have)]
            raise ShapeError(asked, f"the cache was begun with {said[0]}, these have {said[1]}", "reset the cache, or use a new one")

    def _table(self, kinds: list[tuple[ops.PageFormat, ops.PageFormat]]) -> ops.PageTable | HeadPages:
        """No pages yet, with the formats of keys and of values of each pair of bits."""
        turns = None if self.rope is None else self.rope.tables(self.spec.sink)
        tables = [device.table(*kind, self.batch * share, self.device, turns, self.mix) for kind, share in zip(kinds, self.shares, strict=True)]
        return tables[0] if len(tables) == 1 else HeadPages(tables, self.shares)

    def _here(self, index: torch.Tensor) -> torch.Tensor:
        """Indices on the layer's device; from pinned memory, as the addresses of pages are, see PageTable.note."""
        return index.pin_memory().to(self.device, non_blocking=True) if index.is_cpu and self.device.type == "cuda" else index.to(self.device)

    def _of_queries(self, x: torch.Tensor, dim: int, back: int) -> torch.Tensor:
        """x with the query heads along ``dim`` in the order in which the layer keeps those that they read (``back`` 0), or in the model's again (1)."""
        if self.head_order is None:
            return x
        return x.unflatten(dim, (self.heads, -1)).index_select(dim, self.head_order[back]).flatten(dim, dim + 1)

    def _page_start(self, page: int) -> int:
        """Position of a page's first token."""
        return self.spec.sink + PAGE * page

    def _append(self, keys: torch.Tensor, values: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """``weights``: what queries gave to these tokens, as ``salience.weights_of_prompt`` has it, for mixed pages."""
        done, tokens, room = 0, keys.shape[2], tail_room(self.spec)
        while done < tokens:
            if self.sink_tokens < self.spec.sink or self.tail_tokens or tokens - done < room:
                at, into_sink = self.tail_tokens, self.sink_tokens < self.spec.sink
                count = self._take(keys, values, done)
                if weights is not None and not into_sink:
                    self.salience.add(at, *(x[..., done : done + count] for x in weights))
                self._pack_full_tail()
            else:  # more than the empty tail may hold: its first round need not go through it
                count = room - self.spec.residual
                if weights is not None:
                    self.salience.add(0, *(x[..., done : done + count] for x in weights))
                self._pack_round(*(self._kept(x[:, :, done : done + count]) for x in (keys, values)))
            done += count

    @staticmethod
    def _exact(buffers: tuple[torch.Tensor, torch.Tensor], tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (buffers[0][:, :, :tokens], buffers[1][:, :, :tokens]) if tokens else (None, None)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return rotated(x) if self.spec.rotate else x

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """New keys or values [B, Hkv, t, D] as the layer keeps them."""
        return self._turned(x if self.head_order is None else x.index_select(1, self.head_order[0]))

    def _take(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> int:
        """Copies as many of the tokens from ``start`` on as the sink, or else the tail, has room for; returns how many."""
        into_sink = self.sink_tokens < self.spec.sink
        buffers, at = (self.sink, self.sink_tokens) if into_sink else (self.tail, self.tail_tokens)
        count = min(buffers[0].shape[2] - at, keys.shape[2] - start)
        for x, buffer in zip((keys, values), buffers, strict=True):
            buffer[:, :, at : at + count] = self._kept(x[:, :, start : start + count])
        if into_sink:
            self.sink_tokens += count
        else:
            self.tail_tokens += count
        return count

    def _pack_full_tail(self) -> None:
        if self.tail_tokens == tail_room(self.spec):
            gone = self.tail_tokens - self.spec.residual
            self._pack_round(*(x[:, :, :gone] for x in self.tail))
            for x in self.tail:
                for i in range(0, self.spec.residual, gone):  # as many at a time, so that source and target never overlap
                    part = x[:, :, i + gone : min(i + 2 * gone, self.tail_tokens)]
                    x[:, :, i : i + part.shape[2]] = part
            self.tail_tokens -= gone

    def _shrink(self) -> None:
        """Halves the bits of all pages, page by page, each old one gone when the new one is there."""
        formats = self.pages.key, self.pages.value
        pages = [self.pages[i] for i in reversed(range(len(self.pages)))]
        self.pages = self._table([_halved(*formats)])
        while pages:
            codes_and_params = pages.pop()
            sides = [codes_and_params[:2], codes_and_params[2:]]
            new = [shrink_page(*side, f) if f.bits in HALF else side for side, f in zip(sides, formats, strict=True)]
            self.pages.append(*new[0], *new[1])

    def _pack_round(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes pages of as many tokens as a round has; of mixed pages in the order of their salience, which is that of the tail's first tokens."""
        if self.mix is None:
            return self._pack(keys, values)
        count = keys.shape[2]
        rank = self.salience.score(count, self.spec.mixed.accumulated).argsort(dim=1, descending=True, stable=True)
        salient = PAGE * self.mix.high
        order = torch.cat([rank[:, :salient].sort(1).values, rank[:, salient:].sort(1).values], 1)
        for i in range(0, count, PAGE):
            part = order[:, None, i : i + PAGE, None].expand(-1, self.heads, -1, self.dim)
            self._pack(*(x.gather(2, part) for x in (keys, values)))
        self.orders.append(order.to(_ORDER))
        self.salience.drop(count)

    def _round(self, index: int) -> list[torch.Tensor]:
        """Keys and values of a round in the order of their positions, as they were stored."""
        step, out = self.spec.round_pages, []
        for side in (0, 1):
            pages = range(index * step, (index + 1) * step)
            x = torch.cat([torch.cat([device.unpack_page(*table[i][2 * side : 2 * side + 2], table.formats(i)[side], self.batch)
                                      for _, table in parts_of(self.pages)], 1) for i in pages], 2)
            if side == 0 and self.rope is not None:
                x = self.rope.turned(x, self._page_start(index))
            if self.mix is not None:
                x = torch.empty_like(x).scatter_(2, self.orders[index].long()[:, None, :, None].expand_as(x), x)
            out.append(x)
        return out

    def _in_order_of_pages(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask over all tokens [B, tokens] or [B, t, tokens] in the order in which pages hold them."""
        if mask is None or not self.orders:
            return mask
        count = PAGE * self.spec.round_pages
        place = torch.arange(mask.shape[-1]).repeat(self.batch, 1)
        for i, order in enumerate(self.orders):
            start = self.sink_tokens + count * i
            place[:, start : start + count] = start + order
        return mask.gather(-1, place if mask.dim() == 2 else place[:, None].expand(mask.shape))

    def _probes(self, first: int, count: int) -> torch.Tensor | None:
        """Which of ``count`` queries, the first at position ``first``, say how salient the tail's tokens are; their own are its last ones. None: none."""
        if self.mix is None or not self.tail_tokens:
            return None
        newest = self.tail_tokens - (tail_room(self.spec) - salience.PERIOD)
        probes = salience.probes_of(first, count, min(count, max(0, newest)))
        return probes if len(probes) else None

    def _observe(self, query: torch.Tensor, lse: torch.Tensor, probes: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float) -> None:
        if mask is not None:
            mask = mask[..., mask.shape[-1] - self.tail_tokens :]
            mask = mask if mask.dim() == 2 else mask[:, probes]
        places = self.tail_tokens - query.shape[2] + probes
        weights = salience.weights_over_tail(query[:, :, probes], self.tail[0][:, :, : self.tail_tokens], lse[:, :, probes], places, scale=scale,
                                             softcap=softcap, mask=mask)
        self.salience.add(0, *weights)

    def _pack(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantizes [B, Hkv, 64, D] of each side into a new page at the end. Where that would go over the budget, the others shrink first."""
        while self.spec.budget is not None and _shrinks(self.spec.budget, self.pages.key, self.pages.value, (len(self.pages) + 1) * self.pages.heads):
            self._shrink()
        if self.rope is not None:
            keys = self.rope.turned(keys, self._page_start(len(self.pages)), back=True)
        page = []
        for heads, table in parts_of(self.pages):
            for x, fmt in zip((keys, values), table.formats(len(table)), strict=True):
                codes, params = fmt.empty_page(table.heads, self.device)
                device.pack_page(x[:, heads], fmt, codes, params)
                page += [codes, params]
        self.pages.append(*page)

    def _gather(self, index: torch.Tensor) -> None:
        """Makes sequences ``index`` of the batch the new batch. Page by page, and each old page goes when the new one is there."""
        self.check_read()
        index = index.to(torch.int64)
        if not self.is_initialized or (index.is_cpu and torch.equal(index, torch.arange(self.batch))):  # what lies on a GPU is not waited for
            return
        index = self._here(index)
        old, self.batch = self.batch, index.shape[0]
        pages = [self.pages[i] for i in reversed(range(len(self.pages)))]
        self.pages, shares = self._table(kinds_of(self.pages)), [share for share in self.shares for _ in range(4)]  # of the tensors of a page
        while pages:
            self.pages.append(*(t.view(old, share, *t.shape[1:]).index_select(0, index).flatten(0, 1) for t, share in zip(pages.pop(), shares, strict=True)))
        with torch.inference_mode(False):
            self.sink, self.tail = (tuple(x.index_select(0, index) for x in part) for part in (self.sink, self.tail))
            self.orders = [x.index_select(0, index) for x in self.orders]
            if self.salience is not None:
                self.salience.select(index)


class MxqCache(Cache):
    """The cache of a model with quantized keys and values: ``model.generate(..., past_key_values=MxqCache(model.config, plan.kv))``.

    The model's attention must have been replaced (``replace_attention``), which also makes ``generate`` use such a cache by itself.

    Args:
        config: the model's.
        kv: a :class:`KVPlan` or its JSON form, a :class:`KVSpec` for all layers, or a Plan that has a KV section.

    Layers that the plan leaves in float are layers of transformers' DynamicCache. Raises PlanError if the plan does not fit the model (its layers at once, bits
    by head for another number of heads at the first tokens), ModelError for pre_rope in a layer whose rotary embedding does not allow it.
    """

    def __init__(self, config, kv: KVPlan | KVSpec | Plan | dict):
        need_native()
        self.kv = as_kv(kv)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[DynamicLayer() if s is None else MxqCacheLayer(s, f"decoder layer {i}", rope_of(config, i) if s.pre_rope else None)
                                 for i, s in enumerate(self.kv.resolve(layers))])

    def nbytes(self) -> int:
        """Bytes of all tensors in the cache."""
        return sum(x.nbytes() if isinstance(x, MxqCacheLayer) else _storage(x) for x in self.layers)

    def check_read(self) -> None:
        """Raises ModelError if a layer's packed store did not reach attention in the last call of the model."""
        for layer in self.layers:
            if isinstance(layer, MxqCacheLayer):
                layer.check_read()


def _storage(layer: DynamicLayer) -> int:
    # what its tensors keep alive: after a crop they are views of more
    return sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values) if t is not None)


def as_kv(kv: KVPlan | KVSpec | Plan | dict | str | os.PathLike) -> KVPlan:
    """A KVPlan of anything that describes one, names and files as ``find_kv`` reads them. Raises PlanError if it quantizes nothing."""
    out = find_kv(kv) if isinstance(kv, str | os.PathLike) else KVPlan.parse(kv.kv if isinstance(kv, Plan) else kv)
    if out is None:
        raise PlanError("a quantized KV cache", "the plan has no KV section", "make one, for example with Plan.for_kv(key=4, value=4)")
    return out

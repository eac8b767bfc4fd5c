"""Whole layers in one native call: a model of the Llama family decodes a token without Python between its modules.

``fuse_layers(model, "layer")`` puts a :class:`LayerPath` in front of the decoder's own forward. It hands the embedded tokens to native code
(csrc/cpu/layer.cpp), which runs all decoder layers and the final norm with the kernels of this package and appends to the cache. Embedding and head
stay modules. The numbers are those of the modules but for the order of some sums: activations are rounded to the model's dtype where they are.
On a GPU that is so for a token at a time over packed pages (``fused_cuda``).

What native code does not cover goes through the modules, as if nothing had been replaced: training, gradients, torch.compile, calls without a cache,
hooks on modules inside, attention weights and hidden states, masks other than [batch, tokens], other kinds of caches. Such calls are counted by their
reason (``path.fallbacks``, in ``repr(model)``), and the first of each reason warns if it was a call that asked for speed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .. import _native, env
from ..decoding import CACHE_NAMES
from ..errors import ModelError, NativeError
from ..formats import PAGE
from ..kv.attention import NAME as PACKED_ATTENTION
from ..kv.cache import MxqCacheLayer
from ..kv.ops import CPU
from ..ops import PLAIN, watched
from ..structure import decoder_blocks
from . import fused_cuda
from .fused_cache import FIELDS, CacheRows, adopt, float_rows
from .fused_cuda import CudaRows, CudaWeights
from .fused_model import Family, recognise
from .fused_weights import NativeWeights

MODES = ("layer", "auto")
ATTENTION = ("eager", "sdpa", PACKED_ATTENTION)  #: implementations that compute what native code does
CHILD = "mxq_layers"  #: name under which the decoder holds its LayerPath
#: Rotary embeddings whose angles depend on the position alone, so that a table of them may be kept.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_TABLE = 1 << 17  #: positions beyond these get angles of their own, not a table
#: Reasons for which a call goes through the modules without a warning: nobody expects speed there.
_EXPECTED = ("training", "a gradient is needed", "no cache", "another device or tensor class", *fused_cuda.EXPECTED)
_CAPTURING = "transformers.utils.output_capturing"  # its hooks stay on modules and do nothing unless a call asks for their output


def fuse_layers(model: nn.Module, fuse: str | None) -> nn.Module:
    """Chooses how the decoder layers of a quantized model are run, in place, and returns the model.

    Args:
        model: of the Llama, Mistral, Qwen2 or Qwen3 classes of transformers, with every linear of its layers quantized.
        fuse: ``"layer"``: native code wherever it covers the call. ``"auto"``: the same if the model is of that kind, else its modules; ``repr(model)``
            says which. None: its modules.

    Raises:
        ModelError: ``"layer"`` for a model that native code does not know, with what stands against it; another ``fuse``.
        NativeError: without the compiled extension.
    """
    _check_mode(fuse)
    for module in model.modules():
        if isinstance(module._modules.get(CHILD), LayerPath):
            module._modules.pop(CHILD).detach()
    if fuse is None:
        return model
    try:
        family = _able(model)
    except (ModelError, NativeError) as refusal:
        if fuse == "layer":
            raise
        with contextlib.suppress(ModelError):  # a model without decoder blocks has no place to say it
            prefix, _ = decoder_blocks(model)
            model.get_submodule(prefix.rpartition(".")[0]).add_module(CHILD, LayerPath(None, refusal.rule))
        return model
    path = LayerPath(family)
    family.decoder.add_module(CHILD, path)
    family.decoder.__dict__["forward"] = path  # of the instance: the class's own stays reachable. As an attribute it would become a submodule twice
    return model


@contextlib.contextmanager
def through_modules(model: nn.Module) -> Iterator[None]:
    """Meanwhile the layers of ``model`` run module by module, for those who watch modules inside; such calls are not counted."""
    paths = [m for m in model.modules() if isinstance(m, LayerPath)]
    before = [p.paused for p in paths]
    for p in paths:
        p.paused = True
    try:
        yield
    finally:
        for p, paused in zip(paths, before, strict=True):
            p.paused = paused


def check_fuse(model: nn.Module, fuse: str | None, planned: Collection[str]) -> None:
    """Raises if ``fuse_layers`` would once the linears ``planned`` are quantized. Changes nothing."""
    _check_mode(fuse)
    if fuse == "layer":
        _able(model, planned)


def _check_mode(fuse: str | None) -> None:
    if fuse is not None and fuse not in MODES:
        raise ModelError(f"fuse={fuse!r}", f"there are {', '.join(map(repr, MODES))} and None", "choose one of them")


def _able(model: nn.Module, planned: Collection[str] = ()) -> Family:
    need_native()
    family = recognise(model, planned)
    if "forward" in vars(family.decoder):
        raise ModelError(f"whole-layer decoding of {type(model).__name__}", "the decoder's forward is wrapped already", "remove the wrapper first")
    return family


def need_native() -> None:
    """Raises NativeError if the compiled extension is missing or older than whole layers."""
    if not hasattr(_native.cpu, "run_layers"):
        raise NativeError("whole-layer decoding", "the compiled extension has no kernels for it", "build it again with `pip install .` in the source folder")
    if isinstance(_native.cpu, _native.Missing):
        _native.cpu.run_layers()


@functools.cache
def _arguments(decoder: type) -> tuple[str, ...]:
    """Names of the arguments of a decoder's forward, in their order."""
    return tuple(inspect.signature(decoder.forward).parameters)[1:]


def _are_positions(positions: torch.Tensor, batch: int, tokens: int, place: torch.device) -> bool:
    return positions.device == place and not positions.is_floating_point() and tuple(positions.shape) in ((batch, tokens), (1, tokens))


class LayerPath(nn.Module):
    """Stands in for the forward of a decoder. It has no parameters: they stay where they are, and native code is told anew when they change.

    Attributes:
        family: what was recognised; None where the modules run in any case, for the reason ``refused``.
        native: calls that went to native code.
        fallbacks: reason -> calls that went through the modules.
        paused: every call goes through the modules, see :func:`through_modules`.
    """

    def __init__(self, family: Family | None, refused: str | None = None):
        super().__init__()
        self.__dict__["family"] = family  # not a submodule: the decoder holds this module, not the other way round
        self.refused, self.native, self.fallbacks, self.paused = refused, 0, Counter(), False
        self._forget()

    def _forget(self) -> None:
        self.weights: NativeWeights | None = None
        self.rows: tuple[weakref.ref, CacheRows | CudaRows] | None = None  # of the cache of the last call
        self.angles: tuple | None = None
        self.hooks_seen, self.hooks_in_way = -1, True

    def __getstate__(self):
        # Addresses do not survive a copy.
        return {**self.__dict__, "weights": None, "rows": None, "angles": None, "hooks_seen": -1, "hooks_in_way": True}

    def detach(self) -> None:
        """Gives the decoder its own forward back."""
        if self.family is not None:
            self.family.decoder.__dict__.pop("forward", None)

    def extra_repr(self) -> str:
        if self.family is None:
            return f"modules: {self.refused}"
        text = f"native, {len(self.family.windows)} layers of {self.family.name} in one call"
        return text + "".join(f"; {count} calls through modules: {why}" for why, count in self.fallbacks.items())

    @property
    def __signature__(self) -> inspect.Signature:
        # of the forward that it stands in for: the names of arguments are asked of it
        own = inspect.signature(type(self).forward if self.family is None else type(self.family.decoder).forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def _plain(self, *args, **kwargs):
        decoder = self.family.decoder
        return type(decoder).forward(decoder, *args, **kwargs)

    # -- a call ---------------------------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        if watched() or self.paused:
            return self._plain(*args, **kwargs)
        decoder = self.family.decoder
        names = _arguments(type(decoder))
        call = dict(zip(names, args, strict=False)) | kwargs
        cache = next((c for name in CACHE_NAMES if (c := call.pop(name, None)) is not None), None)
        ids, embeds, mask, positions = (call.pop(name, None) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"))
        known = cache is not None and self.rows is not None and self.rows[0]() is cache and self.rows[1].unchanged(cache)
        why = self._obstacle(ids, embeds, mask, cache, call, look=not known)
        if why is None and (not known or self.rows is None):
            if self.weights.place == CPU:
                cache = DynamicCache(config=decoder.config) if cache is None else cache
                why = adopt(cache, len(self.family.windows))
            else:
                why = fused_cuda.unfit(cache, len(self.family.windows), self.weights.place)
        if why is None:
            x = decoder.embed_tokens(ids) if embeds is None else embeds.clone(memory_format=torch.contiguous_format)
            past, w = cache.layers[0].get_seq_length(), self.weights
            if x.dtype != w.dtype or x.shape[2] != w.hidden:
                why = f"the tokens are {str(x.dtype)[6:]} of {x.shape[2]} channels, the layers {str(w.dtype)[6:]} of {w.hidden}"
            elif mask is not None and mask.shape != (x.shape[0], past + x.shape[1]):
                why = f"the mask is {tuple(mask.shape)} and not [batch, tokens] of all tokens"
            elif positions is not None and not _are_positions(positions, *x.shape[:2], x.device):
                why = f"position_ids are {tuple(positions.shape)} on {positions.device} and not [batch, tokens]"
            elif w.place != CPU:
                why = self._rows(cache, x.shape[0]).unready()
        if why is not None:
            self._note(why)
            return self._plain(*args, **kwargs)
        self.native += 1
        with torch.no_grad():
            x = self._run(x, cache, past, mask, positions) if w.place == CPU else self._run_on_gpu(x, cache, past, mask, positions)
        return BaseModelOutputWithPast(last_hidden_state=x, **{next(n for n in CACHE_NAMES if n in names): cache})

    def _note(self, why: str) -> None:
        self.fallbacks[why] += 1
        if self.fallbacks[why] == 1 and why not in _EXPECTED:
            env.fallback(f"whole-layer decoding of {self.family.name}", why, "such calls go through the modules")

    def _obstacle(self, ids, embeds, mask, cache: Cache | None, call: dict, look: bool) -> str | None:
        """Why a call must go through the modules, or None. ``look``: a new sequence, all modules are looked at. Nothing changes but what is remembered."""
        decoder, tokens = self.family.decoder, ids if embeds is None else embeds
        config = decoder.config
        if decoder.training:
            return "training"
        if (ids is None) == (embeds is None) or tokens.dim() != (2 if embeds is None else 3) or not tokens.numel():
            return "input_ids or inputs_embeds are not a batch of tokens"
        place = tokens.device
        if type(tokens) not in PLAIN or place.type not in ("cpu", "cuda"):
            return "another device or tensor class"
        if not (config.use_cache if (use := call.pop("use_cache", None)) is None else use):
            return "no cache"
        if place != CPU and (why := fused_cuda.unsuited(tokens, cache)):
            return why
        for name in ("output_attentions", "output_hidden_states"):
            if call.pop(name, None) or getattr(config, name, False):
                return f"{name} is asked for"
        if not (getattr(config, "return_dict", True) if (as_dict := call.pop("return_dict", None)) is None else as_dict):
            return "return_dict is False"
        call.pop("cache_position", None)  # of transformers before 5.24; positions and cache say the same
        if extra := [name for name, value in call.items() if value is not None and not (name == "is_causal" and value is True)]:
            return f"argument {extra[0]}"
        if config._attn_implementation not in ATTENTION:
            return f"attention is {config._attn_implementation}"
        if torch.is_autocast_enabled(place.type):
            return "autocast"
        if mask is not None and (type(mask) not in PLAIN or mask.dim() != 2 or mask.device != place or mask.is_floating_point()):
            return "a mask that is not [batch, tokens] of yes and no"
        if why := self._hooks(look) or self._refresh(look, place):
            return why
        if torch.is_grad_enabled() and (embeds is not None and embeds.requires_grad or any(p.requires_grad for p in decoder.parameters())):
            return "a gradient is needed"
        return None

    def _hooks(self, look: bool) -> str | None:
        """Hooks and wrapped forwards of the modules that native code would pass by."""
        decoder = self.family.decoder
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "hooks on all modules"
        if look or self.hooks_in_way or self.hooks_seen != RemovableHandle.next_id:  # counts all hooks that were ever registered
            self.hooks_seen = RemovableHandle.next_id
            self.hooks_in_way = any(
                "forward" in m.__dict__ or any(h.__module__ != _CAPTURING for hooks in (m._forward_hooks, m._forward_pre_hooks) for h in hooks.values())
                for part in (decoder.layers, decoder.norm, decoder.rotary_emb) for m in part.modules())
        return "hooks or wrapped forwards of modules inside" if self.hooks_in_way else None

    def _refresh(self, look: bool, place: torch.device) -> str | None:
        """Brings the native weights up to date with the modules, for tokens on the device ``place``. Returns why that is impossible, or None."""
        if self.weights is None or self.weights.place != place or not self.weights.current(look):
            self.weights = self.rows = None
            try:
                recognise(self.family.decoder)
                self.weights = (NativeWeights if place == CPU else CudaWeights)(self.family, place)
            except ModelError as refusal:
                return refusal.rule
        return None

    # -- running --------------------------------------------------------------------------------------------------------------

    def _run(self, x: torch.Tensor, cache: Cache, past: int, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """All layers and the final norm on x [B, T, hidden], in place. ``past`` tokens are in the cache."""
        batch, tokens, _ = x.shape
        rows = self._rows(cache, batch)
        seen = None if mask is None or bool(mask.all()) else mask.to(torch.bool).contiguous()
        step = _Step(self, x, positions, past, seen)
        if rows.packed and not past and tokens > min(s.sink + s.residual + PAGE for layer in rows.layers if (s := getattr(layer, "spec", None))):
            self._run_exactly(x, rows, step)
            return x
        done = 0
        while done < tokens:
            count = rows.prepare(tokens - done)
            step(done, done + count, rows.address, 0, len(rows.layers), True)
            rows.advance(count)
            done += count
        return x

    def _run_on_gpu(self, x: torch.Tensor, cache: Cache, past: int, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """The same for one token of each sequence, x [B, 1, hidden], on a GPU; the result is another tensor. Given positions, which may not be read here, have
        angles of their own, from the model's module."""
        table = self._table(x, past + 1) if positions is None and past < _TABLE else None
        if table is not None:
            return self._rows(cache, x.shape[0]).step(x, past, mask, *table, past)
        positions = torch.full((1, 1), past, device=x.device) if positions is None else positions
        cos, sin = self.family.decoder.rotary_emb(x, position_ids=positions)
        return self._rows(cache, x.shape[0]).step(x, past, mask, cos[:, 0], sin[:, 0], None)

    def _run_exactly(self, x: torch.Tensor, rows: CacheRows, step: _Step) -> None:
        """The first tokens of an empty packed cache, more than it keeps in float: they attend to each other exactly and are packed then."""
        tokens, (batch, heads, dim, dtype) = x.shape[1], rows.shape
        rows.prepare(tokens)
        for i, layer in enumerate(rows.layers):
            finish = i + 1 == len(rows.layers)
            if isinstance(layer, MxqCacheLayer):
                keys, values = (torch.empty(batch, heads, tokens, dim, dtype=dtype) for _ in range(2))
                row = float_rows(keys, values)
                step(0, tokens, row.buffer_info()[0], i, i + 1, finish)
                layer.append(keys, values)
            else:
                step(0, tokens, rows.address + 8 * FIELDS * i, i, i + 1, finish)
                layer.tokens += tokens

    def _rows(self, cache: Cache, batch: int) -> CacheRows | CudaRows:
        w = self.weights
        shape = (batch, w.kv_heads, w.dim, w.dtype)
        if self.rows is None or self.rows[0]() is not cache or self.rows[1].shape != shape or not self.rows[1].unchanged(cache):
            self.rows = (weakref.ref(cache, self._let_go), CacheRows(cache, shape) if w.place == CPU else CudaRows(cache, shape, w))
        return self.rows[1]

    def _let_go(self, dead: weakref.ref) -> None:
        """The layers of a cache that is no more are not kept until the next one comes."""
        if self.rows is not None and self.rows[0] is dead:
            self.rows = None

    def _table(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin [positions, dim] of at least ``count`` positions; None where they depend on more than the position."""
        rotary = self.family.decoder.rotary_emb
        if rotary.rope_type not in _STATIC_ROPE:
            return None
        frequencies, dtype = rotary.inv_freq, x.dtype
        key = (frequencies.data_ptr(), 0 if frequencies.is_inference() else frequencies._version, rotary.attention_scaling, dtype)
        if self.angles is None or self.angles[0] != key or self.angles[1].shape[0] < count:
            with torch.inference_mode(False), torch.no_grad():
                size = max(256, 2 * count)
                cos, sin = rotary(torch.empty(1, dtype=dtype, device=x.device), position_ids=torch.arange(size, device=x.device)[None])
                self.angles = (key, cos[0].contiguous(), sin[0].contiguous(), frequencies)
        return self.angles[1:3]


class _Step:
    """The arguments that all native calls for one call of the model share."""

    def __init__(self, path: LayerPath, x: torch.Tensor, positions: torch.Tensor | None, past: int, seen: torch.Tensor | None):
        self.path, self.x, self.seen, tokens = path, x, seen, x.shape[1]
        if positions is None:
            positions = torch.arange(past, past + tokens)[None]
        self.positions = positions.to(torch.int64).contiguous()
        self.table = path._table(x, 1)
        if self.table is None:
            self.each_token()

    def each_token(self) -> None:
        """Angles of these very tokens, from the model's own module."""
        positions = self.positions
        cos, sin = self.path.family.decoder.rotary_emb(self.x, position_ids=positions)
        self.table = cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous()
        self.positions = torch.arange(positions.numel()).view(positions.shape)

    def __call__(self, start: int, stop: int, caches: int, first: int, last: int, finish: bool) -> None:
        """Layers first .. last-1 on tokens start .. stop-1, the caches' rows at address ``caches``."""
        path, (batch, tokens, _) = self.path, self.x.shape
        part = self.x[:, start:stop].contiguous()  # a copy only if it is a part of several sequences
        for _ in range(3):
            cos, sin = self.table
            need = _native.cpu.run_layers(path.weights.stack, part.data_ptr(), batch, stop - start, caches, first, last, finish, cos.data_ptr(), sin.data_ptr(),
                                          cos.shape[0], self.positions.data_ptr() + 8 * start, tokens if self.positions.shape[0] > 1 else 0,
                                          0 if self.seen is None else self.seen.data_ptr(), 0 if self.seen is None else self.seen.shape[1],
                                          torch.get_num_threads())
            if need == 0:
                break
            if 0 < need <= _TABLE:
                self.table = path._table(self.x, need)
            else:  # negative positions are in no table, and one for far ones would be large
                self.each_token()
        if part.data_ptr() != self.x[:, start:stop].data_ptr():
            self.x[:, start:stop] = part

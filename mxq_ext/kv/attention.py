"""replace_attention: makes a model keep its keys and values in packed pages, and attend over them as they are.

transformers looks an attention function and a mask function up by one name. Ours, ``mxq_kv``, finds the packed layer by a mark on the
keys that the cache returned (``kv.cache``). Three hooks do the rest:

- ``generate`` gets an MxqCache where it would make a DynamicCache,
- so does a call of the model itself that asks for a cache and brings none; one with another kind of cache is refused,
- after each call, no layer may be left whose new tokens attention did not read.

The first tokens of an empty cache attend to each other exactly, before they are packed (torch's SDPA). Whatever comes later attends to
what the cache keeps. So a model is measured with its quantized cache by giving it the first token alone, then all the others.
"""

from __future__ import annotations

import dataclasses
import os
import types

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..decoding import CACHE_NAMES, cache_name
from ..errors import ModelError
from ..plan.kv import KVPlan, KVSpec
from ..plan.schema import Plan
from ..structure import decoder_blocks
from . import device
from .cache import MARK, MxqCache, MxqCacheLayer, as_kv, check_heads, need_native, page_formats, page_mix
from .ops import CPU
from .rope import check_rope, rope_of

NAME = "mxq_kv"  #: of the attention function and of its mask, in transformers
_WINDOW, _FULL, _DENSE = "mxq_window", "mxq_full", "mxq_dense"  # what our masks carry
_KNOWN_LAYERS = ("full_attention", "sliding_attention")


# -- masks ----------------------------------------------------------------------------------------------------------------------


def mask(batch_size: int, kv_length: int, q_length: int | None = None, kv_offset: int = 0, mask_function=None, attention_mask=None,
         local_size: int | None = None, **kwargs) -> torch.Tensor:
    """The mask of one forward, as transformers asks for it: never None, so that attention can tell that it came.

    Causal attention: bool [B, keys], the keys that are no padding. So too for one query with a sliding window, which the tensor carries.
    Anything else: bool [B, 1, queries, keys], as SDPA takes it.

    It lies where the model computes. A mask of one query is not read here, so a token waits for nothing; whether that of several hides anything is
    read once for all layers, since SDPA is faster without one, and on a GPU is waited for. transformers 5.0 says on the device which position a query has,
    so that there a window, too, is waited for.
    """
    from transformers import masking_utils

    positions = None
    if q_length is None:  # transformers 5.0 gives the positions of the queries, where the model computes
        positions = kwargs["cache_position"]
        q_length = positions.shape[0]
    place = _place(attention_mask, kwargs)
    window = 0
    if mask_function is not masking_utils.causal_mask_function:
        last = torch.as_tensor(kwargs.get("q_offset", 0)) + q_length - 1 if positions is None else positions[-1].cpu()
        keys = torch.arange(kv_length) + kv_offset
        expected = keys <= last if local_size is None else (keys <= last) & (keys > last - local_size)
        zero = torch.zeros((), dtype=torch.int64)
        if q_length > 1 or local_size is None or kwargs.get("use_vmap") or not torch.equal(mask_function(zero, zero, last, keys).expand(kv_length), expected):
            sizes = {"kv_length": kv_length, "kv_offset": kv_offset, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            sizes |= {} if "cache_position" in kwargs else {"q_length": q_length, "device": place}
            return masking_utils.sdpa_mask(batch_size=batch_size, mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
                                           **kwargs | sizes)
        window = local_size
    out = torch.ones(1, 1, dtype=torch.bool, device=place).expand(batch_size, kv_length)
    if attention_mask is not None:  # what it does not reach is padding, as transformers has it
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        out = nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    setattr(out, _WINDOW, window)
    looks = out.is_cpu or q_length > 1
    setattr(out, _FULL, attention_mask is None or (looks and bool(out.all())))
    return out


def _place(attention_mask: torch.Tensor | None, kwargs: dict) -> torch.device:
    """Where the model computes whose mask is asked for."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    known = attention_mask if attention_mask is not None else kwargs.get("cache_position")  # of transformers that does not say it
    return CPU if known is None else known.device


def _dense(seen: torch.Tensor, queries: int) -> torch.Tensor | None:
    """Our mask as SDPA takes it, bool [B, 1, queries, keys]; None for causal attention that is known to be without padding."""
    if seen.dim() != 2:
        return seen
    keys, window = seen.shape[1], getattr(seen, _WINDOW)
    if getattr(seen, _FULL) and not window and queries in (1, keys):
        return None
    if (out := getattr(seen, _DENSE, None)) is None:  # made once for all layers
        key = torch.arange(keys, device=seen.device)
        position = key[keys - queries :, None]
        allowed = key <= position
        if window:
            allowed &= key > position - window
        out = allowed & seen[:, None, None, :]
        setattr(seen, _DENSE, out)
    return out


# -- attention ------------------------------------------------------------------------------------------------------------------


def attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
              dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, **kwargs) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer: query [B, Hq, t, D] over the layer that ``key`` is marked with; [B, t, Hq, D], no weights.

    Keys without a mark belong to a layer that the plan leaves in float, or to a call without a cache. Raises ModelError.
    """
    layer: MxqCacheLayer | None = getattr(key, MARK, None)
    asked = f"attention of layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__}) with a packed KV cache"
    for name in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ModelError(asked, f"it has {name}, which is not supported", "keep the cache of this model in float")
    if kwargs.get("output_attentions"):
        raise ModelError(asked, "attention weights are never formed", "leave output_attentions out")
    if attention_mask is None or (attention_mask.dim() == 2 and not hasattr(attention_mask, _WINDOW)) or attention_mask.dim() not in (2, 4):
        said = "none" if attention_mask is None else f"{str(attention_mask.dtype)[6:]} {tuple(attention_mask.shape)}"
        raise ModelError(asked, f"the mask that belongs to it did not come along (found {said})", "pass attention_mask as [batch, tokens], or none")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer is None or layer.get_seq_length() == key.shape[2]:  # all keys are here
        seen = _dense(attention_mask, query.shape[2])
        out = _exact(module, query, key, value, seen, dropout, scaling, softcap)
        if layer is not None:
            seen = seen if seen is None or seen.dtype == torch.bool or layer.mix is None else _boolean(seen, asked)[:, None]
            layer.store(query, scale=scaling, seen=seen, softcap=softcap or 0.0)
        return out, None
    if dropout:
        raise ModelError(asked, f"dropout {dropout} in training is not supported", "call model.eval()")
    options = {"scale": scaling, "softcap": softcap or 0.0}
    with torch.no_grad():
        if attention_mask.dim() == 2:
            out = layer.attend(query, mask=None if getattr(attention_mask, _FULL) else attention_mask, causal=True, window=getattr(attention_mask, _WINDOW),
                               **options)
        else:
            seen = _boolean(attention_mask, asked).expand(query.shape[0], -1, -1)
            out = layer.attend(query, mask=seen, causal=False, window=0, **options)
    return (_NoGradient.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out), None


def _boolean(dense: torch.Tensor, asked: str) -> torch.Tensor:
    """A dense mask [batch, 1, queries, keys] as bool [batch, queries, keys]. Numbers may be those that add nothing, or all but -inf,
    which is looked at: on a GPU, booleans are what nothing waits for."""
    seen = dense[:, 0] if dense.dtype == torch.bool else dense[:, 0] == 0
    if dense.shape[1] != 1 or (dense.dtype != torch.bool and (dense[:, 0] > -1e4).ne(seen).any()):
        raise ModelError(asked, f"the mask must say yes or no for all heads alike, it is {str(dense.dtype)[6:]} {tuple(dense.shape)} with other values",
                         "pass attention_mask as [batch, tokens], or as booleans [batch, 1, queries, keys]")
    return seen


def _exact(module: nn.Module, query, key, value, seen: torch.Tensor | None, dropout: float, scaling: float, softcap: float | None) -> torch.Tensor:
    """Attention over keys and values in float, as transformers would do it."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if not softcap:
        return sdpa_attention_forward(module, query, key, value, seen, dropout=dropout, scaling=scaling)[0]
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if seen is None and query.shape[2] > 1:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
    if seen is not None:
        # a query that sees nothing (padding) gets the mean instead of NaN, which would spread to those that do
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min) if seen.dtype == torch.bool else scores + seen
    weights = nn.functional.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2)


class _NoGradient(torch.autograd.Function):
    """Lets a result through that depends on ``inputs`` in a way that nobody can differentiate, and says so to whoever tries."""

    @staticmethod
    def forward(ctx, out, *inputs):
        return out

    @staticmethod
    def backward(ctx, *grads):
        raise ModelError("gradients through attention over a packed KV cache", "there are none", "pass use_cache=False to differentiate a model")


# -- the swap -------------------------------------------------------------------------------------------------------------------


def check_attention(model: nn.Module, kv: KVPlan) -> None:
    """Raises if ``replace_attention`` would: ModelError, FormatError that name the layer, PlanError, NativeError. Changes nothing."""
    from transformers import PreTrainedModel

    need_native()
    asked = f"a quantized KV cache for {type(model).__name__}"
    if not isinstance(model, PreTrainedModel):
        raise ModelError(asked, "it is no model of transformers", "use a decoder-only model of transformers")
    config = model.config
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False) or config.get_text_config(decoder=True) is not config:
        raise ModelError(asked, "it is not a plain decoder of text", "use a decoder-only model such as Llama or Qwen")
    prefix, blocks = decoder_blocks(model)
    specs = kv.resolve(config.num_hidden_layers)
    if len(blocks) != len(specs):
        raise ModelError(asked, f"config.num_hidden_layers is {len(specs)}, {prefix} has {len(blocks)}", "correct the config")
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise ModelError(f"{asked}, layer {prefix}.0 ({type(blocks[0]).__name__})", "its attention does not go through transformers' AttentionInterface",
                         "keep the cache of this model in float")
    kind = "chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * len(specs)
    if odd := [i for i, kind in enumerate(kinds[: len(specs)]) if kind not in _KNOWN_LAYERS]:
        raise ModelError(f"{asked}, layer {prefix}.{odd[0]}", f"it is of type {kinds[odd[0]]}, pages hold those of {' and '.join(_KNOWN_LAYERS)}",
                         "keep the cache of this model in float")
    sharing = getattr(config, "kv_sharing_modes", None) or []
    if shared := [i for i, mode in enumerate(sharing) if mode] or ([len(specs) - n] if (n := getattr(config, "num_kv_shared_layers", 0) or 0) else []):
        raise ModelError(f"{asked}, layer {prefix}.{shared[0]}", "it shares keys and values with another layer", "keep the cache of this model in float")
    places = {p.device for p in model.parameters()} - {torch.device("meta")} or {CPU}
    if len(places) > 1 or not all(map(device.serves, places)):
        raise ModelError(asked, f"pages and masks of a model are on the CPU or on one GPU, its parameters are on {' and '.join(sorted(map(str, places)))}",
                         "move the model to one of them")
    place = places.pop()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    heads = getattr(config, "num_key_value_heads", None)
    for i, spec in enumerate(specs):
        if spec is not None:
            if isinstance(heads, int):  # else the cache says it at the first tokens
                check_heads(spec, heads, f"layer {prefix}.{i}")
            for part in spec.parts:
                page_formats(part, dim, f"layer {prefix}.{i}", place)
            page_mix(spec, dim, f"layer {prefix}.{i}")
            if spec.mixed is not None and (kinds[i] == "sliding_attention" or (window and not getattr(config, "layer_types", None))):
                raise ModelError(f"{asked}, layer {prefix}.{i}", f"it has a sliding window, pages of {spec.mixed.name} hold tokens out of their order",
                                 "leave mixed out for this layer")
            if spec.pre_rope:
                rope_of(config, i)
                check_rope(blocks[i], i)


def replace_attention(model: nn.Module, plan: Plan | KVPlan | KVSpec | dict | str | os.PathLike | None) -> nn.Module:
    """Makes the model keep keys and values in packed pages by the KV section of ``plan``, in place, and returns it.

    From then on ``generate``, and calls of the model that ask for a cache, use a fresh MxqCache with nothing else to pass. An explicit one
    works too: ``past_key_values=MxqCache(model.config, plan.kv)``. Weights are not touched. None takes all of it back.

    Args:
        model: a decoder-only model of transformers on the CPU or on one GPU, quantized or not; it may be moved between sequences.
        plan: a Plan with a KV section, the section itself (KVPlan or its JSON), a KVSpec for all layers, or what the command's ``--kv`` takes: the name of a
            spec (``"k4v2g64"``) or of a policy (``"kivi4"``), a plan's file, or ``"none"``.

    Raises:
        PlanError: no KV section, or one that names a layer beyond the model's, or bits by head for another number of key/value heads.
        ModelError, FormatError: models that cannot be served, with the layer and the reason.
        NativeError: without the compiled extension, or on a GPU without kernels.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    kv = None if plan is None or plan == "none" else as_kv(plan)
    if kv is not None:
        check_attention(model, kv)
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
    prefix, _ = decoder_blocks(model)
    decoder = model.get_submodule(prefix.rpartition(".")[0])  # the module that would make a DynamicCache
    if not hasattr(decoder, "mxq_kv"):
        decoder.register_forward_pre_hook(_bring_cache, with_kwargs=True)
        decoder.register_forward_hook(_check_cache, with_kwargs=True)
    if getattr(decoder, "mxq_kv", None) is None and kv is not None:
        model.mxq_attention_before = model.config._attn_implementation
    decoder.mxq_kv = model.mxq_kv = kv
    if isinstance(getattr(model, "mxq_plan", None), Plan):
        model.mxq_plan = dataclasses.replace(model.mxq_plan, kv=kv)
    if kv is not None:
        model.set_attn_implementation(NAME)
        if hasattr(model, "_prepare_cache_for_generation"):
            model._prepare_cache_for_generation = types.MethodType(_prepare_cache_for_generation, model)
    elif model.config._attn_implementation == NAME:
        model.set_attn_implementation(model.mxq_attention_before)
        model.__dict__.pop("_prepare_cache_for_generation", None)
    return model


def _given(args, kwargs) -> object:
    """The cache that a call brings, or None."""
    return next((c for n in CACHE_NAMES if (c := kwargs.get(n)) is not None), next((a for a in args if isinstance(a, Cache)), None))


def _bring_cache(decoder: nn.Module, args: tuple, kwargs: dict):
    """Before each call: the cache is ours, or the call wants none."""
    if decoder.mxq_kv is None:
        return None
    cache = _given(args, kwargs)
    if cache is None:
        use = kwargs.get("use_cache")
        if not (decoder.config.use_cache if use is None else use) or (decoder.training and getattr(decoder, "gradient_checkpointing", False)):
            return None
        return args, {n: v for n, v in kwargs.items() if n not in CACHE_NAMES} | {cache_name(decoder.forward): MxqCache(decoder.config, decoder.mxq_kv)}
    _need_ours(decoder, cache)
    cache.check_read()
    return None


def _need_ours(module: nn.Module, cache: object) -> None:
    if not isinstance(cache, MxqCache):
        raise ModelError(f"{type(module).__name__} with a {type(cache).__name__}", "its plan keeps keys and values in packed pages",
                         "leave the cache out, pass MxqCache(model.config, model.mxq_kv), or call replace_attention(model, None)")


def _check_cache(decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
    """After each call."""
    if isinstance(cache := _given(args, kwargs), MxqCache):
        cache.check_read()


def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
    """GenerationMixin's, with an MxqCache where it would make one of its own."""
    if (cache := _given((), model_kwargs)) is not None:
        _need_ours(self, cache)
    elif generation_config.use_cache is not False:
        own = getattr(self.generation_config, "cache_implementation", None)  # what came with the model, nobody asked for
        if generation_config.cache_implementation not in (None, "dynamic", own):
            raise ModelError(f"generate with cache_implementation={generation_config.cache_implementation!r}", "the model's plan has a cache of its own",
                             "leave cache_implementation out, or call replace_attention(model, None)")
        generation_config.cache_implementation = None
        model_kwargs[cache_name(self.forward)] = MxqCache(self.config, self.mxq_kv)
    return type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)

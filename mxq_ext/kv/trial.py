"""What a packed cache would do to keys and values, for those who plan: ``sensitivity.sense_kv`` tries widths with it."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..errors import ModelError, PlanError
from ..formats import PAGE
from ..plan.kv import KVSpec
from . import ops
from .cache import need_native, page_formats, rotated
from .rope import rope_of


class CacheTrial:
    """Packs and reads back, with the formats and kernels of the cache itself.

    Args:
        model: whose keys and values; its config gives heads and head dimension, its parameters the dtype of exact tokens.
        spec: group, residual, sink, rotate, pre_rope and outliers of all candidates; its bits do not matter.

    Raises NativeError without the compiled extension, FormatError for a head dimension that pages cannot hold, PlanError for codebooks, ModelError for
    pre_rope if there is no rotary embedding that all layers share.
    """

    def __init__(self, model: nn.Module, spec: KVSpec):
        need_native()
        config = model.config.get_text_config(decoder=True)
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.spec = spec
        if spec.levels is not None:
            raise PlanError(f"trying widths of {spec}", "codebooks belong to one width, candidates have uniform grids", "leave levels out")
        if spec.mixed is not None:
            raise PlanError(f"trying widths of {spec}", "widths are tried for all tokens of a layer alike", "leave mixed out")
        if spec.heads is not None:
            raise PlanError(f"trying widths of {spec}", "widths are tried for all heads alike, and measured for each of them where that is asked for",
                            "leave heads out")
        self.settings = {name: getattr(spec, name) for name in ("group", "residual", "sink", "rotate")} | ({"pre_rope": True} if spec.pre_rope else {})
        self.settings |= {"outliers": spec.outliers} if spec.outliers else {}
        ropes = {rope_of(config, i) for i in range(config.num_hidden_layers)} if spec.pre_rope else {None}
        if len(ropes) > 1:
            raise ModelError(f"trying widths of {spec} on {type(model).__name__}", "its layers differ in their rotary embeddings", "leave pre_rope out")
        self.rope = ropes.pop()
        self.token_bytes = self.heads * self.dim * next(model.parameters()).element_size()
        page_formats(spec, self.dim, "layer")

    def _format(self, side: str, bits: int) -> ops.PageFormat:
        pair = page_formats(dataclasses.replace(self.spec, key=bits, value=bits), self.dim, "layer")
        return pair[ops.SIDES.index(side)]

    def page_bytes(self, side: str, bits: int) -> int:
        """Bytes of a page of one sequence, all heads."""
        return self.heads * self._format(side, bits).page_bytes

    def round_trip(self, side: str, bits: int, x: torch.Tensor) -> torch.Tensor:
        """x [B, heads, T, D] of a float dtype as the cache gives it back: each 64 tokens from the sink on, as long as they are whole, from a page."""
        fmt, out = self._format(side, bits), x.clone()
        for start in range(self.spec.sink, x.shape[2] - PAGE + 1, PAGE):
            part = x[:, :, start : start + PAGE]
            page = fmt.empty_page(x.shape[0] * x.shape[1])
            rope = self.rope if side == "keys" else None
            if rope is not None:
                part = rope.turned(part, start, back=True)
            ops.pack_page(rotated(part) if self.spec.rotate else part, fmt, *page)
            read = ops.unpack_page(*page, fmt, x.shape[0], x.dtype if rope is None else torch.float32)
            if rope is not None:
                read = rope.turned(read, start)
            out[:, :, start : start + PAGE] = rotated(read) if self.spec.rotate else read
        return out

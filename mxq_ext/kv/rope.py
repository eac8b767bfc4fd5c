"""Keys before their rotary embedding (``KVSpec.pre_rope``, as in KVQuant, Hooper et al. 2024, arXiv 2401.18079).

The embedding turns the channels c and c + half of a head by position * frequencies[c]. A channel's mean then moves with the position, and a scale that
64 tokens of the channel share must span all of the circle. Before the embedding it stays where it is.

A cache gets keys from transformers after the embedding. The turn is orthogonal, so the cache takes it back when it packs a page, by the angles of the
model's config at the index of each token in the cache, and kernels turn keys anew by the same angles while they read. What is read is
R(i) dequantize(quantize(R(i)^T k)): the right key up to its rounding, whatever turn the model itself made. So

- an attention factor (yarn) stays in the keys, where it scales a channel as a whole;
- left padding, or positions of any other origin, turns all keys of a sequence by one constant angle a pair of channels, which a scale a channel does not mind;
- nothing in the model is hooked, and rounding of the model's own angles does no harm.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ModelError
from ..formats import PAGE

#: Rotary embeddings whose angles depend on the position alone. Those of ``dynamic`` and ``longrope`` change with the length of the text.
STATIC = ("default", "linear", "llama3", "yarn", "proportional")
_FIX = "leave pre_rope out for this model, or keep this layer in float"


@dataclass(frozen=True)
class Rope:
    """The angles of one layer: at position i, channels c < half and c + half of a head are turned by ``i * frequencies[c]``; those from 2 half on stay."""

    frequencies: tuple[float, ...]

    @property
    def half(self) -> int:
        return len(self.frequencies)

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [*positions, half], from float64 angles."""
        angles = positions.double()[..., None] * torch.tensor(self.frequencies, dtype=torch.float64)
        return angles.cos().float(), angles.sin().float()

    def turned(self, x: torch.Tensor, start: int, back: bool = False) -> torch.Tensor:
        """x [..., tokens, D] of positions ``start``, ``start + 1``, ..., turned (``back``: turned back), in float32."""
        cos, sin = _of_range(self, start, x.shape[-2])
        a, b, rest = x.float().split([self.half, self.half, x.shape[-1] - 2 * self.half], -1)
        if back:
            sin = -sin
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def tables(self, start: int) -> RopeTables:
        """What kernels turn pages with whose first token has position ``start``; one for all caches with these angles."""
        return _tables(self, start)


@functools.lru_cache(maxsize=16)  # all layers pack the same page at a time
def _of_range(rope: Rope, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        return rope.cos_sin(torch.arange(start, start + count))


@functools.lru_cache(maxsize=64)
def _tables(rope: Rope, start: int) -> RopeTables:
    return RopeTables(rope, start)


class RopeTables:
    """cos and sin for kernels (csrc/cpu/attention.h, ``Turns``). They are constants of the model's config, one copy for all layers and sequences.

    Attributes:
        tokens: float32 [4, half, 2, 16]: of the place of a token in its page, 16 tokens beside each other.
    """

    def __init__(self, rope: Rope, start: int):
        self.rope, self.start = rope, start
        with torch.inference_mode(False):
            cos, sin = (x.view(PAGE // 16, 16, rope.half).transpose(1, 2) for x in rope.cos_sin(torch.arange(PAGE)))
            self.tokens = torch.stack([cos, sin], 2).contiguous()
            self._pages = torch.empty(0, 2, rope.half)

    def pages(self, count: int) -> torch.Tensor:
        """float32 [count or more, 2, half]: of the first token of each page. The tensor is replaced, never changed, when more are asked for."""
        if len(self._pages) < count:
            with torch.inference_mode(False):
                positions = self.start + PAGE * torch.arange(max(16, 2 * count))
                self._pages = torch.stack(self.rope.cos_sin(positions), 1).contiguous()
        return self._pages

    def __reduce__(self):
        return _tables, (self.rope, self.start)


def rope_of(config, layer: int) -> Rope:
    """The angles of a decoder layer by the model's config. Raises ModelError, which names the layer, where there are none or they change with the length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config.get_text_config(decoder=True)
    asked = f"keys before the rotary embedding (pre_rope) in decoder layer {layer} of {config.model_type}"
    parameters, kind = getattr(config, "rope_parameters", None), None
    if parameters and "rope_type" not in parameters:  # a set for each type of layer
        kind = config.layer_types[layer]
        parameters = parameters.get(kind)
    plain = getattr(config, "no_rope_layers", None)  # 0 marks a layer without
    if not parameters or (plain and not plain[layer]):
        raise ModelError(asked, "the layer has no rotary embedding", _FIX)
    if (name := parameters["rope_type"]) not in STATIC:
        raise ModelError(asked, f"the angles of {name!r} change with the length of the text; those of {', '.join(STATIC)} do not", _FIX)
    if name == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float) / turned))
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[name](config, None, **({} if kind is None else {"layer_type": kind}))
    return Rope(tuple(frequencies.tolist()))


def check_rope(block: nn.Module, layer: int) -> None:
    """Raises ModelError if a decoder block does not turn the channels that :class:`Rope` pairs: then pages would hold no keys before the embedding."""
    halves = getattr(sys.modules[type(block).__module__], "rotate_half", None)
    x = torch.arange(4.0)
    if halves is None or not torch.equal(halves(x), torch.tensor([-2.0, -3.0, 0.0, 1.0])):
        raise ModelError(f"keys before the rotary embedding (pre_rope) in decoder layer {layer} ({type(block).__name__})",
                         "its embedding does not pair the two halves of a head's channels", _FIX)

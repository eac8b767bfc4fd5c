"""Feeding a model token by token with a cache; shared by what writes text and by what measures speed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn

#: The argument of a forward that takes a cache: its name since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(forward) -> str:
    """The one of ``CACHE_NAMES`` that a forward takes; the older one if it takes neither."""
    return CACHE_NAMES[0] if CACHE_NAMES[0] in inspect.signature(forward).parameters else CACHE_NAMES[1]


class Decoder:
    """A model with a cache, fed step by step; ``step`` takes ids [B, t] and returns the logits [B, V] of the last position."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.name = cache_name(model.forward)
        self.cache = None  # the first step makes it: the model knows best which kind it needs
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(ids, use_cache=True, **{self.name: self.cache}, **self.options)
        self.cache = getattr(out, self.name)
        return out.logits[:, -1]


def greedy(model: nn.Module, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Without end the most probable next token of each sequence, int64 [B], after the prompt ``ids`` [B, T] and those before it.

    One forward and one argmax a token. What ``model.generate`` does beside (masks, processors, criteria) takes 1.4 ms a token, the layers and the head of
    a model of 135M parameters in 4 bits 5 (bench/results/decode-cpu.md).
    """
    decoder = Decoder(model)
    while True:
        with torch.no_grad():  # not around the yield: the mode would be the caller's meanwhile
            ids = decoder.step(ids).argmax(-1, keepdim=True)
        yield ids[:, 0]


def end_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config."""
    tokens = model.generation_config.eos_token_id
    return frozenset() if tokens is None else frozenset([tokens] if isinstance(tokens, int) else tokens)

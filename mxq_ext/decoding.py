"""Feeding a model token by token with a cache; shared by what writes text and by what measures speed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import nn

from .errors import MxqError

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


def sample(model: nn.Module, ids: torch.Tensor, *, temperature: float, top_p: float = 1.0, seed: int = 0) -> Iterator[torch.Tensor]:
    """Without end a next token of each sequence, int64 [B], drawn from softmax(logits / temperature) over the fewest tokens that make up ``top_p`` of it.

    Temperature 0 is :func:`greedy`. The same seed gives the same tokens. Raises MxqError as :func:`check_sampling` does.
    """
    check_sampling(temperature, top_p)
    if temperature == 0:
        yield from greedy(model, ids)
    decoder, generator = Decoder(model), torch.Generator().manual_seed(seed)
    while True:
        with torch.no_grad():
            probability = torch.softmax(decoder.step(ids).float().cpu() / temperature, dim=-1)
            ordered, order = probability.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # what comes before it is enough; the first always stays
            ids = order.gather(-1, torch.multinomial(ordered, 1, generator=generator)).to(ids.device)
        yield ids[:, 0]


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises MxqError for numbers that :func:`sample` cannot draw by."""
    if not 0 <= temperature < math.inf:
        raise MxqError(f"sampling with temperature={temperature:g}", "it is a finite number, 0 for the most probable token, or more",
                       "pass for example temperature=0.7")
    if not 0 < top_p <= 1:
        raise MxqError(f"sampling with top_p={top_p:g}", "it is a share of the probability, above 0 and at most 1", "pass for example top_p=0.9")


def end_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config."""
    tokens = model.generation_config.eos_token_id
    return frozenset() if tokens is None else frozenset([tokens] if isinstance(tokens, int) else tokens)

"""Feeding a model token by token with a cache; shared by what writes text and by what measures speed."""

from __future__ import annotations

import inspect

import torch
from torch import nn


class Decoder:
    """A model with a cache, fed step by step; ``step`` takes ids [B, t] and returns the logits [B, V] of the last position."""

    def __init__(self, model: nn.Module):
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5
        self.cache = None  # the first step makes it: the model knows best which kind it needs
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(ids, use_cache=True, **{self.name: self.cache}, **self.options)
        self.cache = getattr(out, self.name)
        return out.logits[:, -1]

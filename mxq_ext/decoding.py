"""Feeding a model token by token with a cache; shared by what writes text and by what measures speed."""

from __future__ import annotations

import inspect

import torch
from torch import nn


class Decoder:
    """A model with a cache, fed step by step; ``step`` takes ids [B, t] and returns the logits [B, V] of the last position."""

    def __init__(self, model: nn.Module):
        from transformers import DynamicCache

        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5
        self.cache = DynamicCache(config=model.config)
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=True, **{self.name: self.cache}, **self.options).logits[:, -1]

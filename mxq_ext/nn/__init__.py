"""Modules that compute with packed weights, and the function that puts them into a model."""

from .embedding import QuantEmbedding
from .linear import Held, QuantLinear, QuantModule
from .swap import fuse_layers, quantized_modules, replace_linear, set_compute

__all__ = ["Held", "QuantEmbedding", "QuantLinear", "QuantModule", "fuse_layers", "quantized_modules", "replace_linear", "set_compute"]

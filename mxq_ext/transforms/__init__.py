"""Transforms: changes of a float model that leave its function alone and make its weights easier to quantize."""

from .awq import scale_activations
from .hadamard import hadamard, random_rotation
from .rotate import rotate_residual

__all__ = ["hadamard", "random_rotation", "rotate_residual", "scale_activations"]

"""Quantizers: weight + Format (+ Hessian or Fisher diagonal) -> QTensor.

    q = quantize(weight, "w3g64_asym", method="gptq", hessian=prepare_hessian(h))
    q.info["output_error"]
"""

from . import awq, gptq, hqq, kmeans, rtn  # noqa: F401  (each registers itself)
from .base import METHODS, default_method, find_method, make_options, quantize
from .hessian import HessianFactor, prepare_hessian

__all__ = ["METHODS", "HessianFactor", "default_method", "find_method", "make_options", "prepare_hessian", "quantize"]

"""mxq_ext: mixed-precision quantization of Hugging Face language models, with packed CPU kernels.

    import mxq_ext as mxq

    plan = mxq.Plan.uniform("w4g64")
    mxq.replace_linear(model, plan)
    mxq.save(model, "out/")
    model = mxq.load("out/")

Every public name is loaded on first use (PEP 562), so that importing the package costs neither torch nor transformers.
After it, transformers' own ``from_pretrained`` reads checkpoints too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import _plugin

if TYPE_CHECKING:  # the same table once more, for editors and type checkers
    from .checkpoint import load, save
    from .errors import (
        BudgetError,
        CheckpointError,
        FormatError,
        ModelError,
        MxqError,
        MxqWarning,
        NativeError,
        PlanError,
        QuantizationError,
        ShapeError,
    )
    from .formats import Format
    from .kv.attention import replace_attention
    from .kv.cache import MxqCache
    from .nn import QuantEmbedding, QuantLinear, replace_linear
    from .pipeline import quantize_model
    from .plan import KVSpec, Plan
    from .qtensor import QTensor

__version__ = "0.1.0"

__all__ = ["BudgetError", "CheckpointError", "Format", "FormatError", "KVSpec", "ModelError", "MxqCache", "MxqError", "MxqWarning",
           "NativeError", "Plan", "PlanError", "QTensor", "QuantEmbedding", "QuantLinear", "QuantizationError", "ShapeError", "__version__",
           "load", "quantize_model", "replace_attention", "replace_linear", "save"]

#: Public name -> the module that defines it; the errors, which are not listed, come from ``errors``.
_HOME = {
    "Format": "formats",
    "KVSpec": "plan",
    "MxqCache": "kv.cache",
    "Plan": "plan",
    "QTensor": "qtensor",
    "QuantEmbedding": "nn",
    "QuantLinear": "nn",
    "load": "checkpoint",
    "quantize_model": "pipeline",
    "replace_attention": "kv.attention",
    "replace_linear": "nn",
    "save": "checkpoint",
}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_plugin.install()  # last: where transformers is loaded already, it imports modules of ours

"""Teaches transformers to read mxq checkpoints as soon as both packages are there, without importing either for the other's sake."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder

#: Holds transformers' registry of quantizers; ``mxq_ext.hf`` enters ours in it when it is imported.
_REGISTRY = "transformers.quantizers"


class _AfterRegistry(MetaPathFinder):
    """Finds nothing itself: lets the others find the registry, and imports ``mxq_ext.hf`` right after the registry's own code has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                importlib.import_module("mxq_ext.hf")

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """``AutoModelForCausalLM.from_pretrained`` reads our checkpoints from now on: at once if transformers' registry is loaded, else when it will be."""
    if _REGISTRY in sys.modules:
        importlib.import_module("mxq_ext.hf")
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())

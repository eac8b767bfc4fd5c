"""Sensitivity: model + Stats -> CostTable.

    table = sense(model, tokens, stats, ["w2g64_asym", "w4g64_asym"], metric="fisher", trial=...)
    table.save("cost.json")

Names load on first use: a Plan needs the CostTable only, not the metrics and what they import.
"""

from importlib import import_module

_WHERE = {"CostTable": "table", "KVTable": "table", "METRICS": "metrics", "sense": "sense", "sense_kv": "kv"}
__all__ = ["METRICS", "CostTable", "KVTable", "sense", "sense_kv"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value  # the submodule of the same name would shadow it otherwise
    return value

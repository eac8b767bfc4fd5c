"""Every environment variable that the package reads, in one table; ``mxq doctor`` prints it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

from .errors import MxqWarning, NativeError


@dataclass(frozen=True)
class Variable:
    """One variable: its name, what holds when it is not set, and what it does."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("MXQ_CPU_TARGET", "the fastest that the CPU has", "instruction set of the kernels: scalar, avx2, avx512 or avx512vnni"),
    Variable("MXQ_CUDA_GRAPH", "1", "0 launches the kernels of a token's layers on a GPU one by one instead of replaying a CUDA graph of them"),
    Variable("MXQ_PRINT_CONFIG", "0", "1 prints the kernel chosen, once per shape, number of rows and format, to stderr"),
    Variable("MXQ_STRICT", "0", "1 turns the warning about a fallback into an error"),
)
_KNOWN = {v.name for v in VARIABLES}


def get(name: str) -> str:
    """Value of a variable of the table, ``""`` when it is not set."""
    assert name in _KNOWN, name
    return os.environ.get(name, "")


def flag(name: str) -> bool:
    """Whether a variable is set to anything but nothing or 0."""
    return get(name) not in ("", "0")


def table() -> list[tuple[str, str]]:
    """(name, meaning with the default) of each variable."""
    return [(v.name, f"{v.meaning} (default: {v.default})") for v in VARIABLES]


def fallback(asked: str, rule: str, taken: str) -> None:
    """Says that something slower or less exact was done than asked for: warns, or raises NativeError under ``MXQ_STRICT=1``."""
    if flag("MXQ_STRICT"):
        raise NativeError(asked, rule, f"unset MXQ_STRICT to go on with: {taken}")
    warnings.warn(f"{asked}: {rule}; {taken}", MxqWarning, stacklevel=3)

"""Other libraries' layers as candidates of ``bench/run.py --op linear``, each by its fastest way in.

One module per library with ``candidates(case)``: what the library can do for a weight of that shape. A library that is not installed is
left out by :func:`load`. ``third_party/peers.txt`` pins the versions that the published numbers are from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any, Protocol

import torch

from mxq_ext.errors import MxqError

#: Library -> (module here, the distribution whose version is kept with the numbers).
LIBRARIES = {"torch": ("pytorch", "torch"), "onnxruntime": ("ort", "onnxruntime"), "openvino": ("ov", "openvino"),
             "bitsandbytes": ("bnb", "bitsandbytes"), "ggml": ("ggml", "llama-cpp-python")}
#: Largest error (mxq_ext.testing.numeric.error) by what the library rounds on its way, for normal x. Int8 rounding of x, a scale for each
#: 32 to K values, costs 0.5 to 0.9 %; a layout that was read wrongly costs tens of percent.
INT8_X, BF16, EXACT = 2e-2, 1e-2, 1e-5


@dataclass(frozen=True)
class Case:
    """The shape of a weight, a float32 weight [n, k] for libraries that quantize themselves, and the rows of it that checks look at."""

    n: int
    k: int
    weight: torch.Tensor
    sample: torch.Tensor

    @staticmethod
    def random(n: int, k: int, most: int = 256) -> Case:
        """A normal weight, and at most ``most`` of its rows drawn at random, so that a check costs little beside the timing."""
        g = torch.Generator().manual_seed(0)
        rows = torch.randperm(n, generator=g)
        return Case(n, k, torch.randn(n, k, generator=g) * 0.02, rows[rows != n // 2][:most].sort().values)

    @property
    def mark(self) -> int:
        """The row in which copies of a weight may differ: no check looks at it."""
        return self.n // 2

    @property
    def group(self) -> int | None:
        """Columns for a scale: 128, with which every library is fastest, or the largest part of that which divides K."""
        return next((g for g in (128, 64, 32) if self.k % g == 0), None)


class Pass(Protocol):
    """Several copies of one weight, ready to be multiplied by the same x."""

    count: int  # copies

    def run(self) -> object:
        """y = x W^T by each copy once. This is what is timed, so that a graph's own cost is spread over its nodes as in a model."""

    def outputs(self) -> Iterator[torch.Tensor]:
        """y [M, N] of each copy as of the last run."""


class Eager:
    """A Pass of plain calls. ``first`` runs before them and sets what all of them depend on."""

    def __init__(self, x: torch.Tensor, weights: list, call: Callable[[torch.Tensor, Any], torch.Tensor], first: Callable[[], None]):
        self.x, self.weights, self.call, self.first, self.count = x, weights, call, first, len(weights)

    def run(self) -> None:
        self.first()
        for w in self.weights:
            self.call(self.x, w)

    def outputs(self) -> Iterator[torch.Tensor]:
        self.first()
        for w in self.weights:
            yield self.call(self.x, w)


def nothing() -> None:
    pass


def eager(make: Callable[[], Any], call: Callable[[torch.Tensor, Any], torch.Tensor], first: Callable[[], None] = nothing, most: int | None = None):
    """The ``bind`` of a library of plain calls on ``torch.set_num_threads`` threads.

    ``make()`` is a weight with memory of its own; at most ``most`` of them are made.
    """
    return lambda x, count, threads: Eager(x, [make() for _ in range(min(count, most or count))], call, first)


@dataclass(frozen=True)
class Candidate:
    """Something that multiplies by a weight.

    Attributes:
        name: library first.
        bits: width of the codes; candidates of one width are compared with each other.
        nbytes: codes, scales, zeros and tables of one weight as the library keeps them.
        limit: largest error allowed against a float64 product with ``dense``.
        dense: [len(case.sample), K], what those rows dequantize to.
        bind: (x [M, K] of ``dtype``, copies, threads) -> Pass.
        dtype: the type of x that the library is fastest with.
        kernel: M -> name of the kernel, as far as the library tells.
        ours: what others are peers of.
    """

    name: str
    bits: int
    nbytes: int
    limit: float
    dense: torch.Tensor
    bind: Callable[[torch.Tensor, int, int], Pass]
    dtype: torch.dtype = torch.float32
    kernel: Callable[[int], str] = lambda m: ""
    ours: bool = False


def load(names: str) -> tuple[list[ModuleType], dict[str, str]]:
    """(modules, their versions) of ``all``, ``none`` or a list with commas. Says in one line about each what is not there."""
    wanted = {"all": list(LIBRARIES), "none": []}.get(names, [n for n in names.split(",") if n])
    if unknown := [n for n in wanted if n not in LIBRARIES]:
        raise MxqError(f"peer {unknown[0]!r}", f"the peers are {', '.join(LIBRARIES)}", "name some of those, all or none")
    modules, versions = [], {}
    for name in wanted:
        module, distribution = LIBRARIES[name]
        try:
            modules.append(importlib.import_module(f"{__name__}.{module}"))
            versions[name] = version(distribution)
        except ModuleNotFoundError as error:
            print(f"peer {name} is skipped: {error.name} is not installed (pip install -r third_party/peers.txt)")
        except (ImportError, OSError, AttributeError) as error:  # another build, another version
            print(f"peer {name} is skipped: it does not load ({error})")
    return modules, versions

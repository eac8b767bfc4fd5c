"""Where a packed cache lies, and what that changes: the functions of ``kv.ops`` for pages on the CPU, those of ``kv.cuda`` for pages on a GPU.

The first tokens of a cache decide. Everything else in a cache is operations of torch, which go where its tensors are, and numbers of the host: how many
tokens there are is never asked of a device.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import cuda, ops
from .ops import CPU, PageFormat, PageMix, PageTable
from .rope import RopeTables

_PLACES: dict[str, ModuleType] = {"cpu": ops, "cuda": cuda}


def serves(device: torch.device) -> bool:
    """Whether pages can lie on a device of that type."""
    return device.type in _PLACES


def check(device: torch.device, key: PageFormat, value: PageFormat, *, pre_rope: bool, mixed: bool) -> None:
    """Raises FormatError for a cache that the kernels of a device do not read, NativeError where there are no kernels."""
    if device != CPU:
        cuda.check_formats(key, value, pre_rope=pre_rope, mixed=mixed)
        cuda.check_device(device)


def table(key: PageFormat, value: PageFormat, heads: int, device: torch.device, rope: RopeTables | None = None, mix: PageMix | None = None) -> PageTable:
    """A table of no pages on ``device``, see :class:`PageTable`. Raises FormatError."""
    return PageTable(key, value, heads, rope, mix) if device == CPU else cuda.CudaPages(key, value, heads, device, rope, mix)


def pack_page(x: torch.Tensor, fmt: PageFormat, codes: torch.Tensor, params: torch.Tensor) -> None:
    """:func:`ops.pack_page` where x is."""
    _PLACES[x.device.type].pack_page(x, fmt, codes, params)


def unpack_page(codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """:func:`ops.unpack_page` where the page is."""
    return _PLACES[codes.device.type].unpack_page(codes, params, fmt, batch, dtype)


def attend(q: torch.Tensor, pages: PageTable, *parts: torch.Tensor | None, **options) -> torch.Tensor:
    """:func:`ops.attend` where the pages are. There is no ``lse`` on a GPU."""
    return _PLACES[pages.device.type].attend(q, pages, *parts, **options)

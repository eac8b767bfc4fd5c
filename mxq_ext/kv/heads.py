"""Pages of a layer whose key/value heads differ in bits: a table of pages for each pair of bits, and attention over all of them.

The heads of a pair are neighbours: a layer brings its heads into the order of :attr:`KVSpec.pairs` when it keeps them (``kv.cache``), so that sinks, tails,
queries and outputs of a pair are slices, and nothing is copied for attention over a part of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ShapeError
from . import device
from .ops import PageFormat, PageTable


class HeadPages:
    """One table for each pair of bits, all of as many pages. Answers as a :class:`PageTable` does where a cache does not need to tell them apart.

    Args:
        tables: at least one, on one device.
        heads: key/value heads of a sequence in each table; they follow each other in this order.
    """

    def __init__(self, tables: Sequence[PageTable], heads: Sequence[int]):
        self.tables, self.heads = tuple(tables), tuple(heads)

    @property
    def device(self) -> torch.device:
        return self.tables[0].device

    @property
    def parts(self) -> list[tuple[slice, PageTable]]:
        """(its key/value heads, table) of each pair."""
        stops = [sum(self.heads[: i + 1]) for i in range(len(self.heads))]
        return [(slice(stop - n, stop), table) for stop, n, table in zip(stops, self.heads, self.tables, strict=True)]

    @property
    def kinds(self) -> list[tuple[PageFormat, PageFormat]]:
        """Formats of keys and of values of each table."""
        return [(table.key, table.value) for table in self.tables]

    def __len__(self) -> int:
        return len(self.tables[0])

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        """(k_codes, k_params, v_codes, v_params) of page ``i`` of every table, one after the other."""
        return tuple(t for table in self.tables for t in table[i])

    def append(self, *page: torch.Tensor) -> None:
        """Adds a page to every table: tensors as ``[i]`` gives them. Raises ShapeError."""
        for i, table in enumerate(self.tables):
            table.append(*page[4 * i : 4 * i + 4])

    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(table.nbytes() for table in self.tables)


def parts_of(pages: PageTable | HeadPages) -> list[tuple[slice, PageTable]]:
    """(key/value heads, table) of each pair of bits."""
    return pages.parts if isinstance(pages, HeadPages) else [(slice(None), pages)]


def kinds_of(pages: PageTable | HeadPages) -> list[tuple[PageFormat, PageFormat]]:
    """Formats of keys and of values of each pair of bits."""
    return pages.kinds if isinstance(pages, HeadPages) else [(pages.key, pages.value)]


def attend(q: torch.Tensor, pages: PageTable | HeadPages, *exact: torch.Tensor | None, out: torch.Tensor, **options) -> None:
    """:func:`ops.attend` where the pages are, into ``out``. Over several tables by groups of heads: q [B, Hq, Tq, D], ``out`` like it, and the sink and tail in
    ``exact`` [B, Hkv, n, D] have their heads in the order of the tables. Raises ShapeError."""
    if not isinstance(pages, HeadPages):
        device.attend(q, pages, *exact, out=out, **options)
        return
    ratio, rest = divmod(q.shape[1], sum(pages.heads))
    if rest or not ratio:
        raise ShapeError(f"attention of {q.shape[1]} query heads over {len(pages)} pages of {sum(pages.heads)} heads in {len(pages.tables)} pairs of bits",
                         "the key/value heads must divide the query heads", "check which layer this cache belongs to")
    for heads, table in pages.parts:
        rows = slice(ratio * heads.start, ratio * heads.stop)
        device.attend(q[:, rows], table, *(None if t is None else t[:, heads] for t in exact), out=out[:, rows], **options)

"""Native ops on a packed KV cache: pages of 64 tokens are packed once and read by attention as they are.

    pack_page(x, format, codes, params)        64 tokens of keys or values, quantized (docs/formats.md, "KV cache pages")
    unpack_page(codes, params, format)         what they stand for
    attend(q, pages, sink_k, sink_v, tail_k, tail_v, ...)   softmax(q K^T) V over sink tokens, pages and tail, in this order

Each has a plain-loop twin (``pack_page_ref`` and so on), and ``reference.py`` says the same in numpy float64. Everything is checked here,
native code trusts it. Nothing here needs a gradient: inputs that require one are read as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import _native
from ..errors import FormatError, ShapeError
from ..formats import PAGE
from ..ops import TYPES
from ..plan.kv import BITS
from .rope import RopeTables

SIDES = ("keys", "values")
KEY_GROUPS = (32, 64)  #: tokens that share a channel's scale
VALUE_GROUPS = (0, 32, 64, 128)  #: channels that share a token's scale; 0: the whole head
MAX_HEAD = 512
LEVEL_BITS = (2, 3, 4)  #: code bits that a codebook may have
OUTLIER_STEP = 16  #: outliers of a page come in so many, which with their indices fill a cache line
OUTLIER_BYTES = 4  #: of one: uint16 index and fp16 delta
CPU = torch.device("cpu")


def value_group(head_dim: int, group: int) -> int:
    """The group of values nearest to what a spec asks for: ``group`` channels where they divide the head, else the whole head (0)."""
    return group if group in VALUE_GROUPS and group < head_dim and head_dim % max(group, 1) == 0 else 0


def outlier_count(share: float, bits: int, head_dim: int) -> int:
    """Outliers of a page for a spec's share of its numbers: the nearest multiple of :data:`OUTLIER_STEP` that is not 0; none for 16 bits, where every number
    has as many."""
    return 0 if not share or bits == 16 else OUTLIER_STEP * max(1, round(share * PAGE * head_dim / OUTLIER_STEP))


@dataclass(frozen=True)
class PageFormat:
    """How the pages of one side are stored.

    Attributes:
        side: ``"keys"`` (a scale for each channel) or ``"values"`` (a scale for each token).
        bits: 2, 3, 4, 8 or 16 (fp16 numbers, no scales).
        group: tokens that share a channel's scale for keys: 32 or 64. Channels that share a token's scale for values: 32, 64, 128, or 0 for
            the whole head; the last group may be ragged.
        head_dim: channels D, a multiple of 16 up to 512.
        levels: a codebook, 2^bits ascending numbers that float16 holds, within -1 .. 1; None: codes are numbers.
        outliers: numbers of a page that are kept beside their codes, those furthest from the mean of their group: a multiple of 16, up to an eighth of all.

    Raises FormatError.
    """

    side: str
    bits: int
    group: int
    head_dim: int
    levels: tuple[float, ...] | None = None
    outliers: int = 0

    def __post_init__(self):
        asked = f"a KV page of {self.bits}-bit {self.side}, group {self.group}, head dimension {self.head_dim}"
        if self.side not in SIDES:
            raise FormatError(asked, f"there are pages of {' and '.join(SIDES)}", "choose one of them")
        if self.bits not in BITS:
            raise FormatError(asked, f"bits must be one of {', '.join(map(str, BITS))}, found {self.bits!r}", "choose one of them")
        groups = KEY_GROUPS if self.side == "keys" else VALUE_GROUPS
        if self.group not in groups:
            raise FormatError(asked, f"the group of {self.side} must be one of {', '.join(map(str, groups))}, found {self.group!r}", "choose one of them")
        if not isinstance(self.head_dim, int) or self.head_dim not in range(16, MAX_HEAD + 1, 16):
            raise FormatError(asked, f"the head dimension must be a multiple of 16 up to {MAX_HEAD}, found {self.head_dim!r}",
                              "keep the cache of this model in floating point")
        if self.levels is not None and (self.bits not in LEVEL_BITS or len(self.levels) != 2**self.bits):
            raise FormatError(asked, f"a codebook has 2^bits levels at {', '.join(map(str, LEVEL_BITS))} bits, found {len(self.levels)}", "leave levels out")
        most = 0 if self.bits == 16 else PAGE * self.head_dim // 8
        if not isinstance(self.outliers, int) or self.outliers not in range(0, most + 1, OUTLIER_STEP):
            raise FormatError(asked, f"the outliers of a page must be a multiple of {OUTLIER_STEP} up to {most}, found {self.outliers!r}", "leave outliers out")

    @property
    def rows(self) -> int:
        return PAGE if self.side == "keys" else self.head_dim

    @property
    def columns(self) -> int:
        return self.head_dim if self.side == "keys" else PAGE

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one head's page, and of the outliers behind them."""
        columns = self.columns if self.bits == 16 else -(-self.columns // 32) * 32
        return -(-self.rows // 16) * 16 * columns * self.bits // 8 + OUTLIER_BYTES * self.outliers

    @property
    def params_shape(self) -> tuple[int, int, int]:
        """(groups, 2, columns) of fp16: scales, then zeros. No groups for 16 bits."""
        groups = 0 if self.bits == 16 else -(-self.rows // (self.group or self.rows))
        return groups, 2, self.columns

    @property
    def page_bytes(self) -> int:
        """Bytes of one head's page, params and outliers included."""
        groups, two, columns = self.params_shape
        return self.code_bytes + 2 * groups * two * columns

    def empty_page(self, heads: int, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (codes uint8 [heads, code_bytes], params fp16 [heads, *params_shape]) of one page of ``heads`` = B * Hkv heads."""
        return (torch.empty(heads, self.code_bytes, dtype=torch.uint8, device=device),
                torch.empty(heads, *self.params_shape, dtype=torch.float16, device=device))

    @cached_property
    def native(self) -> tuple[int, int, int, int, int]:
        """The format as native code takes it, without its codebook."""
        return SIDES.index(self.side), self.bits, self.group, self.head_dim, self.outliers

    @property
    def levels_pointer(self) -> int:
        """Address of the codebook, float32 [2^bits]; 0 for none."""
        return 0 if self.levels is None else _codebook(self.levels).data_ptr()


_codebooks: dict[tuple[float, ...], torch.Tensor] = {}  # for good: pages of these formats hold their addresses


def _codebook(levels: tuple[float, ...]) -> torch.Tensor:
    # Not functools.cache: of two threads that meet here, one would get a tensor that the other one's replaces.
    have = _codebooks.get(levels)
    return _codebooks.setdefault(levels, torch.tensor(levels, dtype=torch.float32)) if have is None else have


def _rows(t: torch.Tensor | None) -> tuple[int, ...]:
    """[B, H, tokens, D] as native code takes it: address, type, tokens, strides of batch, head and token."""
    return (0,) * 6 if t is None or not t.shape[2] else (t.data_ptr(), TYPES[t.dtype], t.shape[2], *t.stride()[:3])


def _say(t) -> str:
    return f"{str(t.dtype)[6:]} {tuple(t.shape)} on {t.device}" if isinstance(t, torch.Tensor) else type(t).__name__


def _place(device: torch.device) -> str:
    return "the CPU" if device == CPU else str(device)


def _page_rule(fmt: PageFormat, heads: int, codes, params, device: torch.device) -> str | None:
    """What is wrong with a page of ``heads`` heads, or None."""
    for name, t, shape, dtype in (("codes", codes, (heads, fmt.code_bytes), torch.uint8), ("params", params, (heads, *fmt.params_shape), torch.float16)):
        if not isinstance(t, torch.Tensor) or tuple(t.shape) != shape or t.dtype != dtype or t.device != device or not t.is_contiguous():
            return f"{name} must be a contiguous {str(dtype)[6:]} tensor of {shape} on {_place(device)}, it is {_say(t)}"
    return None


def _check_page(asked: str, fmt: PageFormat, heads: int, codes, params, device: torch.device = CPU) -> None:
    rule = _page_rule(fmt, heads, codes, params, device)
    if rule:
        raise ShapeError(asked, rule, "allocate it with PageFormat.empty_page()")


# --------------------------------------------------------------------------------------------------------------- pack, unpack


def _check_pack(x: torch.Tensor, fmt: PageFormat, codes: torch.Tensor, params: torch.Tensor, device: torch.device = CPU) -> torch.Tensor:
    asked = f"packing a page of {fmt.side} of {_say(x)}"
    if x.device != device or x.dtype not in TYPES:
        raise ShapeError(asked, f"numbers must be float32, bfloat16 or float16 on {_place(device)}", "convert or move them")
    if x.dim() != 4 or x.shape[2] != PAGE or x.shape[3] != fmt.head_dim:
        raise ShapeError(asked, f"the shape must be [batch, heads, {PAGE}, {fmt.head_dim}]", "pack exactly one page of every head at a time")
    _check_page(asked, fmt, x.shape[0] * x.shape[1], codes, params, device)
    return x if x.stride(3) == 1 else x.contiguous()


def pack_page(x: torch.Tensor, fmt: PageFormat, codes: torch.Tensor, params: torch.Tensor) -> None:
    """Quantizes 64 tokens of every head into ``codes`` and ``params``, round to nearest between smallest and largest (docs/formats.md).

    Args:
        x: [B, Hkv, 64, D], float32, bfloat16 or float16; any strides (channels of unit stride are not copied).
        fmt: the page's format.
        codes, params: the page, as :meth:`PageFormat.empty_page` of B * Hkv heads; overwritten.

    The result is the same to the bit on every CPU target and for any number of threads. Raises ShapeError.
    """
    x = _check_pack(x, fmt, codes, params)
    if x.numel():
        _native.cpu.kv_pack(fmt.native, _rows(x), x.shape[0], x.shape[1], codes.data_ptr(), params.data_ptr(), fmt.levels_pointer,
                            torch.get_num_threads())


def pack_page_ref(x: torch.Tensor, fmt: PageFormat, codes: torch.Tensor, params: torch.Tensor) -> None:
    """The twin of :func:`pack_page`."""
    x = _check_pack(x, fmt, codes, params)
    _native.cpu.kv_pack_ref(fmt.native, _rows(x), x.shape[0], x.shape[1], codes.data_ptr(), params.data_ptr(), fmt.levels_pointer)


def _check_unpack(codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat, batch: int, dtype: torch.dtype, device: torch.device = CPU) -> int:
    """Raises ShapeError; returns the number of heads."""
    asked = f"unpacking a page of {_say(codes)} as {fmt.bits}-bit {fmt.side}"
    if dtype not in TYPES:
        raise ShapeError(asked, f"the result must be float32, bfloat16 or float16, asked for {str(dtype)[6:]}", "choose one of those")
    heads = codes.shape[0] if codes.dim() else -1
    _check_page(asked, fmt, heads, codes, params, device)
    if batch < 1 or heads % batch:
        raise ShapeError(asked, f"the batch must divide the {heads} heads, it is {batch}", "give the batch that the page was packed with")
    return heads


def _unpack(native, codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat, batch: int, dtype: torch.dtype, *threads: int) -> torch.Tensor:
    heads = _check_unpack(codes, params, fmt, batch, dtype)
    out = torch.empty(batch, heads // batch, PAGE, fmt.head_dim, dtype=dtype)
    native(fmt.native, codes.data_ptr(), params.data_ptr(), fmt.levels_pointer, heads, out.data_ptr(), TYPES[dtype], *threads)
    return out


def unpack_page(codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a page stands for: [batch, heads / batch, 64, D] of ``dtype``; the float32 numbers round once, in the sum. Raises ShapeError."""
    return _unpack(_native.cpu.kv_unpack, codes, params, fmt, batch, dtype, torch.get_num_threads())


def unpack_page_ref(codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The twin of :func:`unpack_page`."""
    return _unpack(_native.cpu.kv_unpack_ref, codes, params, fmt, batch, dtype)


def outliers_of(codes: torch.Tensor, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The outliers of a page: their places in a page [64, D], int64 [heads, outliers], ascending, and what they add to what the codes stand for there, float16
    [heads, outliers]; entries that the page did not need have 0 for both."""
    both = codes[:, fmt.code_bytes - OUTLIER_BYTES * fmt.outliers :].contiguous()
    index, delta = both.view(torch.int16).view(-1, 2, fmt.outliers).unbind(1)
    index = index.long() & 0xFFFF
    return index // MAX_HEAD * fmt.head_dim + index % MAX_HEAD, delta.contiguous().view(torch.float16)


# ----------------------------------------------------------------------------------------------------------------- page table


@dataclass(frozen=True)
class PageMix:
    """Pages of two kinds: of each ``round`` pages the first ``high`` have the formats of their table, the others ``key`` and ``value``."""

    key: PageFormat
    value: PageFormat
    high: int
    round: int

    @property
    def native(self) -> tuple:
        return self.key.native, self.value.native, self.key.levels_pointer, self.value.levels_pointer, self.high, self.round


class PageTable:
    """The pages of one layer in order, as :func:`attend` reads them. Keeps their tensors alive. ``kv.device.table`` makes the kind that a device needs.

    Appending costs a few microseconds whatever the length; anything else (crop, reorder) is a new table over new or old tensors.
    """

    __slots__ = ("key", "value", "heads", "rope", "mix", "_pages", "_pointers", "_noted", "_turns")
    device = CPU  # of all pages

    def __init__(self, key: PageFormat, value: PageFormat, heads: int, rope: RopeTables | None = None, mix: PageMix | None = None):
        """A table of no pages, each to hold ``heads`` = B * Hkv heads; with ``rope``, keys are those before the rotary embedding; with ``mix``, some pages have
        other formats.

        Raises FormatError if the formats do not go together, or the embedding turns more channels than a head has.
        """
        for k, v in ((key, value), *(((mix.key, mix.value),) if mix else ())):
            if (k.side, v.side) != SIDES or {k.head_dim, v.head_dim} != {key.head_dim}:
                raise FormatError(f"a KV cache of {k} and {v}", "it needs keys and values of one head dimension", "give them in this order")
        if rope is not None and 2 * rope.rope.half > key.head_dim:
            raise FormatError(f"a KV cache of {key}", f"the rotary embedding turns {2 * rope.rope.half} channels, a head has {key.head_dim}",
                              "check the model's config")
        self.key, self.value, self.heads, self.rope, self.mix = key, value, heads, rope, mix
        self._pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._pointers, self._noted = self._room(8), 0  # addresses of the first ``_noted`` pages
        self._turns: torch.Tensor | None = None  # of the pages; what is held here does not go when the tables grow

    def _room(self, pages: int) -> torch.Tensor:
        with torch.inference_mode(False):  # or nothing could be noted outside of that mode later
            return torch.empty(pages, 4, dtype=torch.int64, device=self.device)

    def _make_room(self, pages: int) -> None:
        old, self._pointers = self._pointers, self._room(pages)
        self._pointers[: self._noted] = old[: self._noted]

    def append(self, k_codes: torch.Tensor, k_params: torch.Tensor, v_codes: torch.Tensor, v_params: torch.Tensor) -> None:
        """Adds a page: codes uint8 [heads, code_bytes] and params fp16 [heads, *params_shape] of both sides. Raises ShapeError."""
        asked = f"page {len(self._pages)} of a KV cache of {self.heads} heads"
        n = len(self._pages)
        key, value = self.formats(n)
        _check_page(f"{asked}, keys", key, self.heads, k_codes, k_params, self.device)
        _check_page(f"{asked}, values", value, self.heads, v_codes, v_params, self.device)
        self._pages.append((k_codes, k_params, v_codes, v_params))
        if self.rope is not None:
            self._turns = self.rope.pages(n + 1)

    def __reduce__(self):
        """Copies and pickles are built anew: the addresses are those of the copied tensors."""
        return _table_of, (self.key, self.value, self.heads, self._pages, self.rope, self.mix)

    def __len__(self) -> int:
        return len(self._pages)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(k_codes, k_params, v_codes, v_params) of page ``i``."""
        return self._pages[i]

    def formats(self, i: int) -> tuple[PageFormat, PageFormat]:
        """Of the keys and the values of page ``i``."""
        mix = self.mix
        return (self.key, self.value) if mix is None or i % mix.round < mix.high else (mix.key, mix.value)

    def nbytes(self) -> int:
        """Bytes of all pages."""
        if self.mix is None:
            return len(self._pages) * self.heads * (self.key.page_bytes + self.value.page_bytes)
        return self.heads * sum(f.page_bytes for i in range(len(self._pages)) for f in self.formats(i))

    @property
    def pointers(self) -> int:
        """Address of int64 [pages][4] where the pages are, for native code; after :meth:`note`."""
        self.note()
        return self.address

    @property
    def address(self) -> int:
        """:attr:`pointers` as of the last :meth:`note`."""
        return self._pointers.data_ptr()

    @property
    def capacity(self) -> int:
        """Pages whose addresses fit where :attr:`address` is."""
        return len(self._pointers)

    def note(self) -> None:
        """Writes the addresses of pages that are new since the last time to where native code reads them, in room that doubles when it is full."""
        n, done = len(self._pages), self._noted
        if done == n:
            return
        if n > len(self._pointers):
            self._make_room(max(n, 2 * len(self._pointers)))
        # From pinned memory nothing waits for a device, and torch's allocator keeps it until the copy was made.
        addresses = torch.tensor([[t.data_ptr() for t in page] for page in self._pages[done:]], pin_memory=self.device.type == "cuda")
        self._pointers[done:n].copy_(addresses, non_blocking=True)
        self._noted = n

    @property
    def reading(self) -> tuple[int, int, int, int, int]:
        """What native code reads pages with beside their formats: addresses of the codebooks of keys and of values, of the turns of pages and of tokens (see
        ``RopeTables``), and half the channels that are turned; 0 for none."""
        turns = (0, 0, 0) if self._turns is None else (self._turns.data_ptr(), self.rope.tokens.data_ptr(), self.rope.rope.half)
        return self.key.levels_pointer, self.value.levels_pointer, *turns


def _table_of(key: PageFormat, value: PageFormat, heads: int, pages: list, rope: RopeTables | None, mix: PageMix | None) -> PageTable:
    if elsewhere := {str(t.device) for page in pages for t in page if not t.is_cpu}:
        raise ShapeError(f"a KV cache that was saved on the CPU, read for {' and '.join(sorted(elsewhere))}", "its table of pages stays one of the CPU",
                         'read it with map_location="cpu"')
    table = PageTable(key, value, heads, rope, mix)
    for page in pages:
        table.append(*page)
    return table


# --------------------------------------------------------------------------------------------------------------------- attend


def _check_attend(q: torch.Tensor, pages: PageTable, parts: dict[str, torch.Tensor | None], mask, window: int, softcap: float, out, lse=None,
                  device: torch.device = CPU, most_pages: int | None = None) -> int:
    """Raises ShapeError; returns the number of key tokens, with ``most_pages`` the most that there may be.

    Runs before every call of a kernel that may take ten microseconds: no text is made in vain.
    """
    d = pages.key.head_dim

    def refuse(rule: str, fix: str):
        raise ShapeError(f"attention of q {_say(q)} over {len(pages)} pages of {pages.heads} heads of dimension {d}", rule, fix)

    if q.device != device or q.dtype not in TYPES:
        refuse(f"q must be float32, bfloat16 or float16 on {_place(device)}", "convert or move it")
    if q.dim() != 4 or q.shape[3] != d:
        refuse(f"q must have the shape [batch, heads, tokens, {d}]", "check which layer this cache belongs to")
    batch, hq, tq, _ = q.shape
    hkv = pages.heads // batch if batch else 0
    if not hkv or pages.heads % batch or not hq or hq % hkv:
        refuse(f"{pages.heads} key/value heads of {batch} sequences must divide {hq} query heads a sequence", "check batch size and heads of the cache")
    total = PAGE * (len(pages) if most_pages is None else most_pages)
    for part in ("sink", "tail"):
        k, v = parts[f"{part}_k"], parts[f"{part}_v"]
        for name, t in ((f"{part}_k", k), (f"{part}_v", v)):
            if t is not None and not (t.device == device and t.dtype in TYPES and t.dim() == 4 and t.shape[:2] == (batch, hkv) and t.shape[3] == d):
                refuse(f"{name} must be a float tensor of [{batch}, {hkv}, tokens, {d}] on {_place(device)}, it is {_say(t)}",
                       "keep it in the model's own type and shape")
        if k is None and v is None:
            continue
        if k is None or v is None or k.shape[2] != v.shape[2] or k.dtype != v.dtype:
            refuse(f"{part}_k and {part}_v must be of one length and type, they are {_say(k)} and {_say(v)}", "append to both")
        total += k.shape[2]
    if mask is not None and not (mask.device == device and mask.dtype == torch.bool and tuple(mask.shape) in ((batch, total), (batch, tq, total))):
        refuse(f"the mask must be bool [{batch}, {total}] or [{batch}, {tq}, {total}] on {_place(device)}, it is {_say(mask)}",
               "True marks the keys that may be seen")
    if window < 0:
        refuse(f"the window must be at least 1, or 0 for none, it is {window}", "pass 0 for full attention")
    if not 0 <= softcap < math.inf:
        refuse(f"softcap must be positive, or 0 for none, it is {softcap}", "pass 0 for no cap")
    if out is not None and not (out.device == device and out.shape == q.shape and out.dtype == q.dtype and out.stride(3) == 1):
        refuse(f"out must be like q with channels of unit stride, it is {_say(out)}", "leave it out")
    if lse is not None and not (lse.is_cpu and lse.dtype == torch.float32 and lse.shape == q.shape[:3] and lse.is_contiguous()):
        refuse(f"lse must be a contiguous float32 tensor of {tuple(q.shape[:3])} on the CPU, it is {_say(lse)}", "leave it out")
    return total


def _attend(native, q, pages, sink_k, sink_v, tail_k, tail_v, scale, causal, window, softcap, mask, out, lse, *threads):
    parts = {"sink_k": sink_k, "sink_v": sink_v, "tail_k": tail_k, "tail_v": tail_v}
    total = _check_attend(q, pages, parts, mask, window, softcap, out, lse)
    if out is None:
        batch, hq, tq, d = q.shape
        out = q.new_empty(batch, tq, hq, d).transpose(1, 2)
    if not q.numel():
        return out
    # Copies of what has no unit stride live until the call is over.
    q, *parts = [t if t is None or t.stride(3) == 1 else t.contiguous() for t in (q, sink_k, sink_v, tail_k, tail_v)]
    visible = (0, 0, 0)
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        visible = mask.data_ptr(), mask.stride(0), mask.stride(1) if mask.dim() == 3 else 0
    native(pages.key.native, pages.value.native, (*q.shape[:3], 0 if lse is None else lse.data_ptr()), _rows(q), _rows(out),
           (pages.pointers, len(pages), pages.heads, *pages.reading, () if pages.mix is None else pages.mix.native),
           *map(_rows, parts), total, q.shape[3] ** -0.5 if scale is None else float(scale), causal, window, softcap, visible, *threads)
    return out


def attend(q: torch.Tensor, pages: PageTable, sink_k: torch.Tensor | None = None, sink_v: torch.Tensor | None = None,
           tail_k: torch.Tensor | None = None, tail_v: torch.Tensor | None = None, *, scale: float | None = None, causal: bool = True,
           window: int = 0, softcap: float = 0.0, mask: torch.Tensor | None = None, out: torch.Tensor | None = None,
           lse: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q over a cache: sink tokens, then the pages, then the tail, in this order of positions.

    Args:
        q: [B, Hq, Tq, D] of float32, bfloat16 or float16. Hq is a multiple of the cache's Hkv; query head h reads key/value head h // (Hq / Hkv).
        pages: the packed part, of B * Hkv heads.
        sink_k, sink_v: [B, Hkv, S, D], the tokens before the pages, in any float type and strides (channels of unit stride are not copied); or None.
        tail_k, tail_v: [B, Hkv, T, D], the tokens behind them; or None.
        scale: factor of the scores, 1 / sqrt(D) by default.
        causal: query i sees keys up to position total - Tq + i, where total = S + 64 * pages + T. False: all keys.
        window: query at position p (as above) sees only keys after p - window; 0: no window. Also without ``causal``.
        softcap: scores become softcap * tanh(score / softcap); 0: none.
        mask: bool [B, total], the keys that may be seen (left padding), or [B, Tq, total]; or None.
        out: where the result goes, [B, Hq, Tq, D] of q's type with any strides but unit ones along D.
        lse: float32 [B, Hq, Tq], where the logarithm of each query's sum of exponentials goes (-inf if it sees no key); or None.

    Returns:
        ``out``, or a fresh [B, Hq, Tq, D] view of memory in the order [B, Tq, Hq, D]. Products, sums and softmax are float32, and the order of
        all sums depends on the shapes alone: not on the number of threads. A query that sees no key gives zeros. Raises ShapeError.
    """
    return _attend(_native.cpu.kv_attend, q, pages, sink_k, sink_v, tail_k, tail_v, scale, causal, window, softcap, mask, out, lse, torch.get_num_threads())


def attend_ref(q: torch.Tensor, pages: PageTable, sink_k: torch.Tensor | None = None, sink_v: torch.Tensor | None = None,
               tail_k: torch.Tensor | None = None, tail_v: torch.Tensor | None = None, *, scale: float | None = None, causal: bool = True,
               window: int = 0, softcap: float = 0.0, mask: torch.Tensor | None = None, out: torch.Tensor | None = None,
               lse: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of :func:`attend`: plain loops over the packed codes, double accumulation."""
    return _attend(_native.cpu.kv_attend_ref, q, pages, sink_k, sink_v, tail_k, tail_v, scale, causal, window, softcap, mask, out, lse)

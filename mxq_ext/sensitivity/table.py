"""CostTable: what each candidate Format would cost each unit, in loss and in bytes, and KVTable, the same for cached keys and values.

The file between ``sense`` and ``plan`` holds the first, with the second in it where that was measured.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import FormatError, PlanError
from ..fileio import read_json, write_json, write_text
from ..formats import PAGE, Format

VERSION = 1
KEEP = "keep"  #: a candidate beside the Formats: the unit stays in float

_FIX = "measure the table again"


@dataclass
class KVTable:
    """Loss estimate and bytes of the keys and the values of L layers under C widths; of each of their H heads, where they were measured by head.

    Attributes:
        bits: candidate widths, int [C].
        loss: float64 [2 L, C]; row 2 i is the keys of layer i, row 2 i + 1 its values; unit as ``meta["metric"]`` says. By head [2 L H, C], with
            i = layer * H + head.
        page_bytes: int64, as ``loss``, a page of one sequence, all heads of the row.
        token_bytes: of one exact token, one side of one layer, all heads of a row.
        settings: group, residual, sink, rotate: what all candidates have in common; and pre_rope and outliers where there are.
        meta: metric, seed, windows; plain JSON.
        heads: H; None: rows are of all heads of a layer.

    Raises PlanError if shapes or values do not fit.
    """

    bits: tuple[int, ...]
    loss: np.ndarray
    page_bytes: np.ndarray
    token_bytes: int
    settings: dict
    meta: dict = field(default_factory=dict)
    heads: int | None = None

    SETTINGS = ("group", "residual", "sink", "rotate")

    def __post_init__(self):
        def need(ok, rule):
            if not ok:
                raise PlanError("KV cost table", rule, _FIX)

        try:
            self.bits, self.token_bytes = tuple(int(b) for b in self.bits), int(self.token_bytes)
            self.loss, self.page_bytes = np.asarray(self.loss, np.float64), np.asarray(self.page_bytes, np.int64)
        except (TypeError, ValueError, OverflowError) as e:
            raise PlanError("KV cost table", f"its values are no numbers ({e})", _FIX) from None
        need(self.heads is None or (type(self.heads) is int and self.heads > 0), f"heads must be their number, it is {self.heads!r}")
        need(self.bits and self.loss.ndim == 2 and self.loss.shape[0] % (2 * (self.heads or 1)) == 0
             and self.loss.shape == self.page_bytes.shape == (len(self.loss), len(self.bits)),
             f"loss {self.loss.shape} and page_bytes {self.page_bytes.shape} must be [2 layers{'' if self.heads is None else f' x {self.heads} heads'}, "
             f"{len(self.bits)} widths]")
        need(len(self.loss) and np.isfinite(self.loss).all() and (self.loss >= 0).all(), "losses must be finite and not negative")
        need((self.page_bytes > 0).all() and self.token_bytes > 0, "bytes must be positive")
        need(isinstance(self.settings, dict) and set(self.settings) - {"pre_rope", "outliers"} == set(self.SETTINGS),
             f"its settings are {', '.join(self.SETTINGS)}")

    @property
    def layers(self) -> int:
        return len(self.loss) // (2 * (self.heads or 1))

    def nbytes(self, context: int, batch: int = 1) -> np.ndarray:
        """int64, as ``loss``: bytes of ``batch`` sequences of ``context`` tokens, the buffers of exact tokens in full, as the cache will count them."""
        if context < 1 or batch < 1:
            raise PlanError(f"a cache of {context} tokens and {batch} sequences", "both must be at least 1", "pass the longest context that is to be served")
        sink, residual = self.settings["sink"], self.settings["residual"]
        pages = max(0, (context - sink - residual) // PAGE)
        return batch * (pages * self.page_bytes + (sink + residual + PAGE) * self.token_bytes)

    def to_json(self) -> dict:
        return {"bits": list(self.bits), "loss": self.loss.tolist(), "page_bytes": self.page_bytes.tolist(), "token_bytes": self.token_bytes,
                "settings": self.settings, "meta": self.meta} | ({} if self.heads is None else {"heads": self.heads})

    @staticmethod
    def from_json(obj: object) -> KVTable:
        """Inverse of :meth:`to_json`. Raises PlanError."""
        want = ("bits", "loss", "page_bytes", "token_bytes", "settings", "meta")
        if not isinstance(obj, dict) or set(obj) - {"heads"} != set(want):
            raise PlanError("KV cost table", f"it must be an object of {', '.join(want)}, and heads where it is by head", _FIX)
        return KVTable(**obj)


@dataclass
class CostTable:
    """Loss estimate, stored bytes and measured time of U units under F candidates.

    Attributes:
        units: unit names, in model order.
        formats: candidate names (canonical format names, or ``keep``).
        loss: float64 [U, F], estimated rise of the end loss in the unit that ``meta["metric"]`` names; +inf marks an impossible pair.
        nbytes: int64 [U, F], exact bytes on disk.
        numel: int64 [U], weights of the unit.
        seconds: float64 [U, F] measured time, or None.
        meta: model and text hash, metric, versions; plain JSON.
        kv: the same for cached keys and values, where it was measured.

    Arrays of any kind that numpy understands are accepted (CPU tensors too). Raises PlanError if shapes, names or values do not fit.
    """

    units: list[str]
    formats: list[str]
    loss: np.ndarray
    nbytes: np.ndarray
    numel: np.ndarray
    seconds: np.ndarray | None = None
    meta: dict = field(default_factory=dict)
    kv: KVTable | None = None

    def __post_init__(self):
        self.units = list(self.units)
        try:
            self.formats = [f if f == KEEP else Format.parse(f).name for f in self.formats]
        except (FormatError, TypeError) as e:
            raise PlanError("cost table", f"its candidates must be formats or 'keep' ({e})", _FIX) from None
        nbytes, numel = np.asarray(self.nbytes), np.asarray(self.numel)
        for what, a in (("nbytes", nbytes), ("numel", numel)):
            if a.size and not (np.issubdtype(a.dtype, np.integer) or np.array_equal(a, np.floor(a))):
                raise PlanError("cost table", f"{what} must be whole numbers, found {a.dtype}", _FIX)
        self.loss, self.nbytes, self.numel = np.asarray(self.loss, np.float64), nbytes.astype(np.int64), numel.astype(np.int64)
        if self.seconds is not None:
            self.seconds = np.asarray(self.seconds, np.float64)
        self._check()

    def _check(self) -> None:
        u, f = len(self.units), len(self.formats)

        def need(ok, rule):
            if not ok:
                raise PlanError(f"cost table of {u} units x {f} formats", rule, _FIX)

        need(u and f, "it needs at least one unit and one format")
        for what, names in (("unit", self.units), ("format", self.formats)):
            need(all(isinstance(n, str) and n for n in names), f"every {what} needs a name")
            twice = [n for i, n in enumerate(names) if n in names[:i]] if len(set(names)) < len(names) else []
            need(not twice, f"{what} {twice[0] if twice else ''} is listed twice")
        for what, array, shape in (("loss", self.loss, (u, f)), ("nbytes", self.nbytes, (u, f)), ("numel", self.numel, (u,)),
                                   ("seconds", self.seconds, (u, f))):
            need(array is None or array.shape == shape, f"{what} must have shape {shape}, it has {None if array is None else array.shape}")
        bad = np.isnan(self.loss) | (self.loss == -np.inf)
        if bad.any():
            i, j = np.argwhere(bad)[0]
            need(False,
                 f"loss of {self.units[i]} as {self.formats[j]} is {self.loss[i, j]}; losses are finite, or +inf for an impossible pair")
        dead = ~np.isfinite(self.loss).any(axis=1)
        need(not dead.any(), f"unit {self.units[int(dead.argmax())]} has no possible format")
        need((self.nbytes >= 0).all(), "bytes must not be negative")
        need((self.numel > 0).all(), "every unit has at least one weight")
        need(isinstance(self.meta, dict), f"meta must be an object, found {type(self.meta).__name__}")

    # -- reading values --------------------------------------------------------------------------------------------------------

    @property
    def possible(self) -> np.ndarray:
        """bool [U, F]: which pairs may be chosen."""
        return np.isfinite(self.loss)

    def column(self, fmt: str | Format) -> int:
        """Index of a candidate. Raises PlanError with the candidates there are."""
        name = fmt if fmt == KEEP else Format.parse(fmt).name
        if name not in self.formats:
            raise PlanError(f"format {name} of a cost table", f"its candidates are {', '.join(self.formats)}",
                            "choose one of them, or measure the table with it")
        return self.formats.index(name)

    def uniform(self, fmt: str | Format) -> tuple[float, int]:
        """(loss, bytes) of one format for every unit; the loss is inf if some unit cannot have it."""
        j = self.column(fmt)
        return math.fsum(self.loss[:, j]), int(self.nbytes[:, j].sum())

    def total(self, choice: Sequence[int] | np.ndarray) -> tuple[float, int]:
        """(loss, bytes) of one candidate index per unit, int [U]."""
        choice = np.asarray(choice)
        if choice.shape != (len(self.units),) or not np.issubdtype(choice.dtype,
                                                                   np.integer) or (choice < 0).any() or (choice >= len(self.formats)).any():
            raise PlanError(f"choice of shape {choice.shape} in a cost table",
                            f"{len(self.units)} indices in 0..{len(self.formats) - 1} are expected",
                            "pass the choice of an allocation on this very table")
        rows = np.arange(len(self.units))
        return math.fsum(self.loss[rows, choice]), int(self.nbytes[rows, choice].sum())

    def stored_bits(self, nbytes: int) -> float:
        """Average stored bits per weight that ``nbytes`` in all amount to."""
        return 8 * nbytes / int(self.numel.sum())

    def subset(self, formats: Sequence[str | Format]) -> CostTable:
        """The same units with these candidates only, in this order."""
        j = [self.column(f) for f in formats]
        return CostTable(self.units, [self.formats[i] for i in j], self.loss[:, j], self.nbytes[:, j], self.numel,
                         None if self.seconds is None else self.seconds[:, j], dict(self.meta), self.kv)

    # -- files -----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON atomically. Values survive bit for bit; +inf is written as null, since JSON has no infinity."""
        def rows(a):
            return None if a is None else [[v if math.isfinite(v) else None for v in row] for row in a.tolist()]

        write_json(path, {"mxq_cost_table": VERSION, "units": self.units, "formats": self.formats, "numel": self.numel.tolist(),
                          "nbytes": self.nbytes.tolist(), "loss": rows(self.loss), "seconds": rows(self.seconds), "meta": self.meta}
                   | ({} if self.kv is None else {"kv": self.kv.to_json()}))

    @staticmethod
    def load(path: str | os.PathLike) -> CostTable:
        """Reads what :meth:`save` wrote. Raises CheckpointError if the file is unreadable, PlanError if it is no valid table."""
        obj = read_json(path)
        if obj.get("mxq_cost_table") != VERSION:
            raise PlanError(f"cost table {path} of version {obj.get('mxq_cost_table')!r}", f"this mxq_ext reads version {VERSION}", _FIX)
        want = ("mxq_cost_table", "units", "formats", "numel", "nbytes", "loss", "seconds", "meta")
        kv = obj.pop("kv", None)
        if set(obj) != set(want):
            raise PlanError(f"cost table {path} with keys {', '.join(obj)}", f"it must have exactly the keys {', '.join(want)}", _FIX)

        def array(key, none):
            try:
                return np.array([[none if v is None else v for v in row] for row in obj[key]], dtype=np.float64)
            except (TypeError, ValueError) as e:
                raise PlanError(f"cost table {path}", f"{key} is no rectangular list of numbers ({e})", _FIX) from None

        try:
            ints = {k: np.array(obj[k], dtype=np.int64) for k in ("nbytes", "numel")}
        except (TypeError, ValueError, OverflowError) as e:
            raise PlanError(f"cost table {path}", f"nbytes and numel must be lists of whole numbers ({e})", _FIX) from None
        return CostTable(obj["units"], obj["formats"], array("loss", np.inf), ints["nbytes"], ints["numel"],
                         None if obj["seconds"] is None else array("seconds", np.nan), obj["meta"], None if kv is None else KVTable.from_json(kv))

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per (unit, format) for spreadsheets: unit, format, loss, nbytes, stored_bits, seconds (empty if unknown)."""
        out = io.StringIO()
        w = csv.writer(out, lineterminator="\n")
        w.writerow(["unit", "format", "loss", "nbytes", "stored_bits", "seconds"])
        for i, unit in enumerate(self.units):
            for j, fmt in enumerate(self.formats):
                seconds = "" if self.seconds is None else float(self.seconds[i, j])
                w.writerow([unit, fmt, float(self.loss[i, j]), int(self.nbytes[i, j]), 8 * int(self.nbytes[i, j]) / int(self.numel[i]),
                            seconds])
        write_text(path, out.getvalue())

"""QTensor: one quantized weight as it is stored, whatever framework produced it.

A weight [N, K] is an optional row and column permutation, a list of rectangles that tile it, and an optional sparse fp16 part
that is added to them. Uniform layers are one rectangle; row bands, column bands and outlier columns are several.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .errors import ShapeError
from .formats import NEST_BITS, NEST_GROUPS, NF4_LEVELS, Format
from .pack import pack_codes, unpack_codes

#: Types of activations and outputs, as native code counts them (csrc/cpu/linear.h and csrc/cuda/params.h, enum Type).
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ROWS = 1024


def nested_value(step: torch.Tensor, start: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The nested scale or zero of a code: float32 whose value is one of fp16. All float32 (the code too), of shapes that broadcast."""
    return (step * code + start).half().float()


def nested_codes(values: torch.Tensor, steps: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, G] whose nested values lie nearest to ``values`` float32 [N, G], by ranges ``steps``, ``starts`` float32 [N, S]; ties take the lower.

    By comparison with all of them: so a value that a code stands for gets a code of that value, however far fp16 spreads or merges them.
    """
    if len(values) > _ROWS:  # by rows, since what is compared is eight times as large
        return torch.cat([nested_codes(*part) for part in zip(*(t.split(_ROWS) for t in (values, steps, starts)), strict=True)])
    offered = nested_value(steps[..., None], starts[..., None], torch.arange(1 << NEST_BITS, dtype=torch.float32))  # [N, S, codes]
    offered = offered.repeat_interleave(NEST_GROUPS, dim=1)[:, : values.shape[1]]
    return (offered - values[..., None]).abs().argmin(-1).to(torch.uint8)


@dataclass
class Rectangle:
    """Rows r0:r1 and columns c0:c1 of the permuted weight, in one Format.

    ``tensors`` holds what ``format.tensor_shapes(r1-r0, c1-c0)`` lists. Groups are counted from c0.
    """

    r0: int
    r1: int
    c0: int
    c1: int
    format: Format
    tensors: dict[str, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.r1 - self.r0, self.c1 - self.c0

    def codes(self) -> torch.Tensor:
        """Unpacked codes, uint8 [rows, cols]."""
        return unpack_codes(self.tensors["codes"], self.format.bits, self.c1 - self.c0)

    def scales(self) -> torch.Tensor:
        """Scales of a uniform or nf format as float32 [rows, groups]."""
        return self._nested("scale") if self.format.nested else self.tensors["scales"].float()

    def _nested(self, what: str) -> torch.Tensor:
        """``"scale"`` or ``"zero"``: the values that its codes stand for."""
        codes = unpack_codes(self.tensors[f"{what}s"], NEST_BITS, self.format.groups(self.shape[1])).float()
        step, start = (self.tensors[f"{what}_{part}"].float().repeat_interleave(NEST_GROUPS, dim=1)[:, : codes.shape[1]] for part in ("steps", "starts"))
        return nested_value(step, start, codes)

    def zeros(self) -> torch.Tensor:
        """Zero points as float32 [rows, groups] (the constant of the format when it is symmetric)."""
        rows, cols = self.shape
        g = self.format.groups(cols)
        if self.format.nested:
            return self._nested("zero")
        if self.format.zero == "sym":
            return torch.full((rows, g), float(self.format.symmetric_zero))
        if self.format.zero == "int":
            return unpack_codes(self.tensors["zeros"], self.format.bits, g).float()
        return self.tensors["zeros"].float()

    def dequantize(self) -> torch.Tensor:
        """The weights, float32 [rows, cols].

        uniform: ``s * (q - z)``, float zero: ``s * q + z``, nf: ``s * level[q]``, lut: ``table[row, q]``. With 16-bit scales the
        first is exact in float32 and the others round once, so kernels can be held to these bits.
        """
        f = self.format
        if f.kind == "float":
            return self.tensors["values"].float()
        q = self.codes()
        if f.kind == "lut":
            return torch.gather(self.tensors["table"].float(), 1, q.long())
        rows, cols = self.shape
        width = f.group or max(cols, 1)

        def spread(t):
            return t.repeat_interleave(width, dim=1)[:, :cols]

        s = spread(self.scales())
        if f.kind == "nf":
            return s * torch.tensor(NF4_LEVELS, dtype=torch.float32)[q.long()]
        z = spread(self.zeros())
        return s * q.float() + z if f.zero == "float" else s * (q.float() - z)

    def expanded(self) -> Rectangle:
        """The same weights in :attr:`Format.expanded`; itself where nothing is nested."""
        if not self.format.nested:
            return self
        tensors = {"codes": self.tensors["codes"], "scales": self.scales().half(), "zeros": self.zeros().half()}
        return Rectangle(self.r0, self.r1, self.c0, self.c1, self.format.expanded, tensors)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass
class Sparse:
    """fp16 values added to the dense part, by rows (CSR), in the coordinates of the original weight.

    rowptr int32 [N+1], cols int32 [nnz] ascending within a row, values float16 [nnz].
    """

    rowptr: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.rowptr, self.cols, self.values))

    def dense(self, n: int, k: int) -> torch.Tensor:
        out = torch.zeros(n, k)
        rows = torch.repeat_interleave(torch.arange(n), (self.rowptr[1:] - self.rowptr[:-1]).long())
        out[rows, self.cols.long()] = self.values.float()
        return out


@dataclass
class QTensor:
    """A quantized weight [N, K].

    ``perm_rows[i]`` (``perm_cols[j]``), int32, is the original row (column) that sits at row i (column j) of the rectangles.
    """

    shape: tuple[int, int]
    rectangles: list[Rectangle]
    perm_rows: torch.Tensor | None = None
    perm_cols: torch.Tensor | None = None
    sparse: Sparse | None = None
    info: dict = field(default_factory=dict)  #: what the quantizer reports (method, damping, error); not needed to dequantize

    @staticmethod
    def from_codes(fmt: Format | str, codes: torch.Tensor, *, scales=None, zeros=None, table=None, perm_rows=None, perm_cols=None, **ranges) -> QTensor:
        """One rectangle from codes [N, K] and float scales / zeros [N, groups] or table [N, 2**bits], rounded to their stored types.

        ``ranges``: of a nested format also scale_steps, scale_starts, zero_steps, zero_starts, float [N, ceil(groups / NEST_GROUPS)].
        """
        fmt = Format.parse(fmt)
        n, k = codes.shape
        half = torch.bfloat16 if fmt.scale_dtype == "bf16" else torch.float16
        t = {"codes": pack_codes(codes, fmt.bits)}
        if table is not None:
            t["table"] = table.to(torch.float16).contiguous()
        if fmt.nested:
            ranges = {name: r.to(half).contiguous() for name, r in ranges.items()}
            for what, values in (("scale", scales), ("zero", zeros)):
                t[f"{what}s"] = pack_codes(nested_codes(values, ranges[f"{what}_steps"].float(), ranges[f"{what}_starts"].float()), NEST_BITS)
            t |= ranges
        elif scales is not None:
            t["scales"] = scales.to(half).contiguous()
        if fmt.zero == "int":
            t["zeros"] = pack_codes(zeros.round().to(torch.int64), fmt.bits)
        elif fmt.zero == "float" and not fmt.nested:
            t["zeros"] = zeros.to(half).contiguous()
        q = QTensor((n, k), [Rectangle(0, n, 0, k, fmt, t)], perm_rows, perm_cols)
        q.validate()
        return q

    @staticmethod
    def from_float(weight: torch.Tensor) -> QTensor:
        """One fp16 rectangle that holds ``weight`` [N, K] rounded to half precision."""
        n, k = weight.shape
        return QTensor((n, k), [Rectangle(0, n, 0, k, Format.parse("fp16"), {"values": weight.to(torch.float16).contiguous()})])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole weight [N, K] in original row and column order."""
        n, k = self.shape
        w = torch.zeros(n, k)
        for r in self.rectangles:
            w[r.r0 : r.r1, r.c0 : r.c1] = r.dequantize()
        if self.perm_rows is not None:
            w = torch.empty_like(w).index_copy_(0, self.perm_rows.long(), w)
        if self.perm_cols is not None:
            w = torch.empty_like(w).index_copy_(1, self.perm_cols.long(), w)
        if self.sparse is not None:
            w += self.sparse.dense(n, k)
        return w.to(dtype)

    @property
    def format_name(self) -> str:
        """The format when there is one, else for example ``"w3g64+w8"``, with ``+sparse`` for a sparse part."""
        names = list(dict.fromkeys(r.format.name for r in self.rectangles))
        return "+".join(names + (["sparse"] if self.sparse is not None else []))

    def nbytes(self) -> int:
        """Bytes on disk: every tensor of :meth:`to_tensors`."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    def stored_bits(self) -> float:
        return 8 * self.nbytes() / max(1, self.shape[0] * self.shape[1])

    def to_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All stored tensors, named ``<prefix>r<i>.<tensor>``, ``<prefix>perm_rows``, ``<prefix>sparse.values`` and so on."""
        out = {f"{prefix}r{i}.{name}": t for i, r in enumerate(self.rectangles) for name, t in r.tensors.items()}
        if self.perm_rows is not None:
            out[f"{prefix}perm_rows"] = self.perm_rows
        if self.perm_cols is not None:
            out[f"{prefix}perm_cols"] = self.perm_cols
        if self.sparse is not None:
            out |= {f"{prefix}sparse.{f}": getattr(self.sparse, f) for f in ("rowptr", "cols", "values")}
        return out

    def meta(self) -> dict:
        """What is needed beside :meth:`to_tensors` to rebuild it; plain JSON."""
        return {"shape": list(self.shape), "rectangles": [[r.r0, r.r1, r.c0, r.c1, r.format.name] for r in self.rectangles],
                "perm_rows": self.perm_rows is not None, "perm_cols": self.perm_cols is not None, "sparse": self.sparse is not None}

    @staticmethod
    def from_tensors(meta: dict, tensors: dict[str, torch.Tensor], prefix: str = "") -> QTensor:
        """Inverse of :meth:`to_tensors` and :meth:`meta`. Everything is validated; raises ShapeError."""
        def get(name):
            if prefix + name not in tensors:
                raise ShapeError(f"weight {prefix.rstrip('.') or '(unnamed)'}", f"tensor {prefix + name} is missing", "quantize and save the model again")
            return tensors[prefix + name]

        rects = []
        for i, (r0, r1, c0, c1, name) in enumerate(meta["rectangles"]):
            fmt = Format.parse(name)
            rects.append(Rectangle(r0, r1, c0, c1, fmt, {n: get(f"r{i}.{n}") for n in fmt.tensor_shapes(r1 - r0, c1 - c0)}))
        q = QTensor(tuple(meta["shape"]), rects, get("perm_rows") if meta["perm_rows"] else None, get("perm_cols") if meta["perm_cols"] else None,
                    Sparse(get("sparse.rowptr"), get("sparse.cols"), get("sparse.values")) if meta["sparse"] else None)
        q.validate(prefix.rstrip("."))
        return q

    def expanded(self) -> QTensor:
        """The same weight with nothing nested, as kernels read it; itself where nothing is. Bit for bit the same when dequantized."""
        if not any(r.format.nested for r in self.rectangles):
            return self
        return QTensor(self.shape, [r.expanded() for r in self.rectangles], self.perm_rows, self.perm_cols, self.sparse, self.info)

    def nested(self) -> dict[int, dict[str, torch.Tensor]]:
        """What :meth:`expanded` loses: copies of all tensors but the codes of nested rectangles, by the rectangle's index. Empty where nothing is nested."""
        return {i: {name: t.clone() for name, t in r.tensors.items() if name != "codes"} for i, r in enumerate(self.rectangles) if r.format.nested}

    def with_nested(self, nested: dict[int, dict[str, torch.Tensor]]) -> QTensor:
        """Inverse of :meth:`expanded`, of what :meth:`nested` gave: the weight as it is stored."""
        rects = [Rectangle(r.r0, r.r1, r.c0, r.c1, replace(r.format, nested=True), {"codes": r.tensors["codes"], **nested[i]}) if i in nested else r
                 for i, r in enumerate(self.rectangles)]
        return QTensor(self.shape, rects, self.perm_rows, self.perm_cols, self.sparse, self.info)

    def contiguous(self) -> QTensor:
        """The same weight with every tensor contiguous, as native code reads them; tensors that are so already are shared. Without ``info``."""
        return QTensor(self.shape, [Rectangle(r.r0, r.r1, r.c0, r.c1, r.format, {n: t.contiguous() for n, t in r.tensors.items()}) for r in self.rectangles],
                       *(None if p is None else p.contiguous() for p in (self.perm_rows, self.perm_cols)),
                       None if self.sparse is None else Sparse(*(getattr(self.sparse, f).contiguous() for f in ("rowptr", "cols", "values"))))

    def validate(self, name: str = "QTensor") -> None:
        """Checks shapes, dtypes, tiling, permutations and index ranges, so that native code may trust them. Raises ShapeError."""
        n, k = self.shape

        def need(ok, rule, fix="quantize the weight again"):
            if not ok:
                raise ShapeError(f"{name} of {n} x {k}", rule, fix)

        need(n >= 0 and k >= 0 and (self.rectangles or n * k == 0), "a weight needs at least one rectangle")
        need(sum(r.shape[0] * r.shape[1] for r in self.rectangles) == n * k, "the rectangles must cover every weight exactly once")
        for i, r in enumerate(self.rectangles):
            need(0 <= r.r0 < r.r1 <= n and 0 <= r.c0 < r.c1 <= k, f"rectangle {i} [{r.r0}:{r.r1}, {r.c0}:{r.c1}] lies outside the weight")
            for o in self.rectangles[:i]:
                need(r.r1 <= o.r0 or o.r1 <= r.r0 or r.c1 <= o.c0 or o.c1 <= r.c0, f"rectangle {i} overlaps another")
            want = r.format.tensor_shapes(*r.shape)
            need(set(want) == set(r.tensors), f"rectangle {i} ({r.format}) must have tensors {sorted(want)}, it has {sorted(r.tensors)}")
            for t, (shape, dtype) in want.items():
                have = r.tensors[t]
                need(tuple(have.shape) == shape and str(have.dtype) == f"torch.{dtype}",
                     f"rectangle {i} ({r.format}): {t} must be {dtype} {shape}, it is {str(have.dtype)[6:]} {tuple(have.shape)}")
        for what, perm, size in (("perm_rows", self.perm_rows, n), ("perm_cols", self.perm_cols, k)):
            if perm is not None:
                need(perm.dtype == torch.int32 and tuple(perm.shape) == (size,), f"{what} must be int32 of {size} entries")
                if not perm.is_meta:
                    need(torch.equal(perm.long().sort().values, torch.arange(size)), f"{what} is not a permutation of 0..{size - 1}")
        if (s := self.sparse) is not None:
            need(s.rowptr.dtype == torch.int32 and tuple(s.rowptr.shape) == (n + 1,), f"sparse.rowptr must be int32 of {n + 1} entries")
            need(s.cols.dtype == torch.int32 and s.values.dtype == torch.float16 and s.cols.shape == s.values.shape and s.cols.dim() == 1,
                 "sparse.cols (int32) and sparse.values (float16) must be vectors of one length")
            if not s.rowptr.is_meta:
                d = s.rowptr.long().diff()  # int32 differences would wrap, and a fall of more than 2^31 pass for a rise
                rises = int(s.rowptr[0]) == 0 and int(s.rowptr[-1]) == s.cols.numel() and bool((d >= 0).all())
                need(rises, "sparse.rowptr must rise from 0 to the value count")
                need(s.cols.numel() == 0 or (int(s.cols.min()) >= 0 and int(s.cols.max()) < k), f"sparse.cols must lie in 0..{k - 1}")
                places = torch.repeat_interleave(torch.arange(n), d) * k + s.cols
                need(bool((places.diff() > 0).all()), "sparse.cols must ascend within a row")  # two values of one place: kernels add them, dense() takes one

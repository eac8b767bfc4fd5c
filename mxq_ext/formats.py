"""Number formats of weights: their names, their bytes, and the formula that turns codes back into weights.

This file and ``csrc/formats.h`` say the same thing twice, once for each language; ``python_tests/test_formats.py`` compares
them. The grammar of the names::

    w<bits>[g<group>][_asym|_fz][_bf16]    uniform, bits 1 to 6, 8      w4g64  w3g64_asym  w8
    nf4g<group>[_bf16]                     NormalFloat levels            nf4g64
    lut<bits>                              k-means table per output row  lut3
    fp16                                   plain half precision

No ``g`` means one group per row. Without a suffix a uniform format is symmetric (the zero point is the constant
``2**(bits-1)``); ``_asym`` stores an integer zero point of ``bits`` bits per group, ``_fz`` a float minimum per group. One bit goes with ``_fz`` only.
The last group of a row may be ragged: it simply covers fewer columns.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from .errors import FormatError

UNIFORM_BITS = (1, 2, 3, 4, 5, 6, 8)
LUT_BITS = (2, 3, 4)
GROUPS = (32, 64, 128)
PAGE = 64  #: tokens of a page of the KV cache, the amount that is quantized at a time

#: The 16 NormalFloat levels (QLoRA, Dettmers et al. 2023, appendix E): quantiles of N(0, 1) scaled to [-1, 1] with an exact zero.
#: Index = code. Values are float32; the stored scale is the group's absolute maximum.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_NAME = re.compile(r"(?:w(?P<w>\d+)|lut(?P<lut>\d+)|nf(?P<nf>\d+)|(?P<fp>fp16))(?:g(?P<g>\d+))?(?P<suffix>(?:_[a-z0-9]+)*)")


@dataclass(frozen=True)
class Format:
    """How a rectangle of weights is stored.

    Attributes:
        kind: ``"uniform"``, ``"nf"``, ``"lut"`` or ``"float"``.
        bits: code bits per weight (16 for ``fp16``).
        group: columns that share one scale; 0 means the whole row.
        zero: ``"sym"``, ``"int"`` or ``"float"``; only uniform formats have the last two.
        scale_dtype: ``"fp16"`` or ``"bf16"``, the type of scales and of float zeros.
    """

    kind: str
    bits: int
    group: int = 0
    zero: str = "sym"
    scale_dtype: str = "fp16"

    def __post_init__(self):
        legal = {"uniform": UNIFORM_BITS, "nf": (4,), "lut": LUT_BITS, "float": (16,)}
        if self.kind not in legal:
            raise FormatError(f"format kind {self.kind!r}", f"must be one of {', '.join(legal)}", "use Format.parse('w4g64')")
        if self.bits not in legal[self.kind]:
            raise FormatError(f"{self.kind} format of {self.bits} bits", f"bits must be one of {legal[self.kind]}", "choose one of those")
        grouped = self.kind in ("uniform", "nf")
        if self.group != 0 and (not grouped or self.group not in GROUPS):
            rule = f"group must be one of {GROUPS} or absent (whole row)" if grouped else f"{self.kind} formats have no groups"
            raise FormatError(f"group {self.group} for a {self.kind} format", rule, "change or drop the g part of the name")
        if self.kind == "uniform" and self.bits == 1 and self.zero != "float":
            raise FormatError(f"zero point {self.zero!r} for a format of 1 bit",
                              "its two levels need a float zero: weights by their sign are a zero of -a and a scale of 2a",
                              f"write w1{f'g{self.group}' if self.group else ''}_fz")
        if self.zero not in ("sym", "int", "float") or (self.zero != "sym" and self.kind != "uniform"):
            raise FormatError(f"zero point {self.zero!r} for a {self.kind} format", "only uniform formats have int or float zeros", "drop the suffix")
        if self.scale_dtype not in ("fp16", "bf16") or (self.scale_dtype == "bf16" and not grouped):
            raise FormatError(f"scale dtype {self.scale_dtype!r} for a {self.kind} format", "scales are fp16 or bf16, and only of grouped formats",
                              "drop the suffix")

    @staticmethod
    @functools.cache
    def parse(name: str | Format) -> Format:
        """Format of a name such as ``"w3g64_asym"``; a Format is returned as it is. Raises FormatError with the grammar."""
        if isinstance(name, Format):
            return name
        m = _NAME.fullmatch(name)
        fix = "names look like w4g64, w3g64_asym, w4g32_fz, w8, nf4g64, lut3, fp16"
        if not m:
            raise FormatError(f"format {name!r}", "the name does not follow the grammar", fix)
        zero, scale = "sym", "fp16"
        for s in filter(None, m["suffix"].split("_")):
            if s in ("sym", "asym", "fz"):
                zero = {"sym": "sym", "asym": "int", "fz": "float"}[s]
            elif s in ("bf16", "fp16"):
                scale = s
            else:
                raise FormatError(f"format {name!r}", f"suffix _{s} is unknown (sym, asym, fz, bf16)", fix)
        group = int(m["g"] or 0)
        if m["fp"]:
            return Format("float", 16, group, zero, scale)
        for kind, key in (("uniform", "w"), ("lut", "lut"), ("nf", "nf")):
            if m[key]:
                return Format(kind, int(m[key]), group, zero, scale)
        raise AssertionError(name)

    @property
    def name(self) -> str:
        """Canonical name: ``Format.parse(f.name) == f``."""
        if self.kind == "float":
            return "fp16"
        head = {"uniform": "w", "nf": "nf", "lut": "lut"}[self.kind] + str(self.bits)
        group = f"g{self.group}" if self.group else ""
        zero = {"sym": "", "int": "_asym", "float": "_fz"}[self.zero]
        return head + group + zero + ("_bf16" if self.scale_dtype == "bf16" else "")

    def __str__(self) -> str:
        return self.name

    @property
    def native(self) -> tuple[int, int, int, int, int]:
        """(kind, bits, zero, bf16, group) as native code counts them (csrc/formats.h, struct Format)."""
        kinds, zeros = ("uniform", "nf", "lut", "float"), ("sym", "int", "float")
        return kinds.index(self.kind), self.bits, zeros.index(self.zero), int(self.scale_dtype == "bf16"), self.group

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def symmetric_zero(self) -> int:
        """The constant zero point of a symmetric uniform format."""
        return 1 << (self.bits - 1)

    def groups(self, cols: int) -> int:
        """Groups in a row of ``cols`` columns, a ragged last one included."""
        if self.kind not in ("uniform", "nf"):
            return 0
        return math.ceil(cols / self.group) if self.group else 1

    def tensor_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, int], str]]:
        """Shape and dtype name of every stored tensor of a [rows, cols] rectangle, in storage order.

        ``codes`` and integer ``zeros`` are bit streams: row after row, each row padded to a whole byte, the code of column j at
        bits ``[j*bits, (j+1)*bits)`` of its row, least significant bit first.
        """
        half = {"fp16": "float16", "bf16": "bfloat16"}[self.scale_dtype]
        if self.kind == "float":
            return {"values": ((rows, cols), "float16")}
        out = {"codes": ((rows, math.ceil(cols * self.bits / 8)), "uint8")}
        g = self.groups(cols)
        if self.kind == "lut":
            out["table"] = ((rows, self.levels), "float16")
        else:
            out["scales"] = ((rows, g), half)
        if self.zero == "int":
            out["zeros"] = ((rows, math.ceil(g * self.bits / 8)), "uint8")
        elif self.zero == "float":
            out["zeros"] = ((rows, g), half)
        return out

    def nbytes(self, rows: int, cols: int) -> int:
        """Exact bytes on disk of a [rows, cols] rectangle: codes, scales, zeros and tables."""
        return sum(r * c * (1 if dtype == "uint8" else 2) for (r, c), dtype in self.tensor_shapes(rows, cols).values())

    def stored_bits(self, rows: int, cols: int) -> float:
        """Bits per weight that :meth:`nbytes` amounts to."""
        return 8 * self.nbytes(rows, cols) / (rows * cols)

"""Number formats of weights: their names, their bytes, and the formula that turns codes back into weights.

This file and ``csrc/formats.h`` say the same thing twice, once for each language; ``python_tests/test_formats.py`` compares
them. The nested formats are told here alone: native code is given their expanded form. The grammar of the names::

    w<bits>[g<group>][_asym|_fz][_bf16]    uniform, bits 1 to 6, 8      w4g64  w3g64_asym  w8
    w<bits>g<group>_nest                   uniform, bits 2 to 4, with quantized scales and zeros   w3g32_nest
    nf4g<group>[_bf16]                     NormalFloat levels            nf4g64
    lut<bits>                              k-means table per output row  lut3
    fp16                                   plain half precision

No ``g`` means one group per row. Without a suffix a uniform format is symmetric (the zero point is the constant
``2**(bits-1)``); ``_asym`` stores an integer zero point of ``bits`` bits per group, ``_fz`` a float minimum per group. One bit goes with ``_fz`` only.
``_nest`` is ``_fz`` on disk with fewer bytes: scales and minima are codes of 3 bits themselves, in ranges that 16 neighbouring groups of a row share.
The last group of a row may be ragged: it simply covers fewer columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass

from .errors import FormatError

UNIFORM_BITS = (1, 2, 3, 4, 5, 6, 8)
LUT_BITS = (2, 3, 4)
GROUPS = (32, 64, 128)
NESTED_BITS = (2, 3, 4)
NEST_BITS = 3  #: of a nested scale, and of a nested zero
NEST_GROUPS = 16  #: neighbouring groups of a row that share a range of scales and one of zeros
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
        nested: scales and float zeros are stored as codes of ``NEST_BITS`` bits over ``NEST_GROUPS`` groups.
    """

    kind: str
    bits: int
    group: int = 0
    zero: str = "sym"
    scale_dtype: str = "fp16"
    nested: bool = False

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
        if self.nested and not (self.kind == "uniform" and self.bits in NESTED_BITS and self.group and (self.zero, self.scale_dtype) == ("float", "fp16")):
            raise FormatError(f"nested scales for {dataclasses.replace(self, nested=False)}",
                              f"they are those of uniform formats of {', '.join(map(str, NESTED_BITS))} bits with groups, float zeros and fp16 ranges",
                              "write for example w3g32_nest")

    @staticmethod
    @functools.cache
    def parse(name: str | Format) -> Format:
        """Format of a name such as ``"w3g64_asym"``; a Format is returned as it is. Raises FormatError with the grammar."""
        if isinstance(name, Format):
            return name
        m = _NAME.fullmatch(name)
        fix = "names look like w4g64, w3g64_asym, w4g32_fz, w3g32_nest, w8, nf4g64, lut3, fp16"
        if not m:
            raise FormatError(f"format {name!r}", "the name does not follow the grammar", fix)
        zero, scale, nested = "sym", "fp16", False
        suffixes = m["suffix"].split("_")[1:]
        if len(suffixes) > 2 or len({s in ("bf16", "fp16") for s in suffixes}) < len(suffixes):
            raise FormatError(f"format {name!r}", "it has one suffix for its zeros (sym, asym, fz, nest) and one for the type of its scales (bf16, fp16)", fix)
        for s in suffixes:
            if s in ("sym", "asym", "fz", "nest"):
                zero, nested = {"sym": "sym", "asym": "int", "fz": "float", "nest": "float"}[s], s == "nest"
            elif s in ("bf16", "fp16"):
                scale = s
            else:
                raise FormatError(f"format {name!r}", f"suffix _{s} is unknown (sym, asym, fz, nest, bf16)", fix)
        group = int(m["g"] or 0)
        if m["fp"]:
            return Format("float", 16, group, zero, scale, nested)
        for kind, key in (("uniform", "w"), ("lut", "lut"), ("nf", "nf")):
            if m[key]:
                return Format(kind, int(m[key]), group, zero, scale, nested)
        raise AssertionError(name)

    @property
    def name(self) -> str:
        """Canonical name: ``Format.parse(f.name) == f``."""
        if self.kind == "float":
            return "fp16"
        head = {"uniform": "w", "nf": "nf", "lut": "lut"}[self.kind] + str(self.bits)
        group = f"g{self.group}" if self.group else ""
        zero = "_nest" if self.nested else {"sym": "", "int": "_asym", "float": "_fz"}[self.zero]
        return head + group + zero + ("_bf16" if self.scale_dtype == "bf16" else "")

    def __str__(self) -> str:
        return self.name

    @property
    def expanded(self) -> Format:
        """The format that kernels read a weight of this one in: with each scale and zero as it is (``_fz``) where they are nested, else the format itself."""
        return dataclasses.replace(self, nested=False)

    @property
    def native(self) -> tuple[int, int, int, int, int]:
        """(kind, bits, zero, bf16, group) as native code counts them (csrc/formats.h, struct Format). Raises FormatError for a nested one, which it does
        not know."""
        if self.nested:
            raise FormatError(f"format {self} in native code", "kernels read scales and zeros that are expanded", "pass QTensor.expanded()")
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
        bits ``[j*bits, (j+1)*bits)`` of its row, least significant bit first. Nested ``scales`` and ``zeros`` are such streams of one code per group;
        of each ``NEST_GROUPS`` groups the value of code c is ``steps * c + starts``, rounded to float32 and then to fp16.
        """
        half = {"fp16": "float16", "bf16": "bfloat16"}[self.scale_dtype]
        if self.kind == "float":
            return {"values": ((rows, cols), "float16")}
        out = {"codes": ((rows, math.ceil(cols * self.bits / 8)), "uint8")}
        g = self.groups(cols)
        if self.nested:
            stream, ranges = ((rows, math.ceil(g * NEST_BITS / 8)), "uint8"), ((rows, math.ceil(g / NEST_GROUPS)), half)
            return out | {"scales": stream, "zeros": stream} | dict.fromkeys(("scale_steps", "scale_starts", "zero_steps", "zero_starts"), ranges)
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


def kernel_format(name: str) -> str:
    """What kernels read of a weight whose :attr:`QTensor.format_name` is ``name``: the same with every nested format in its expanded form."""
    return "+".join(dict.fromkeys(n if n == "sparse" else Format.parse(n).expanded.name for n in name.split("+")))

"""A quantized weight whose codes and constants can move: what block-wise reconstruction trains.

Codes come from *latents*, one float per weight in units of codes, by rounding to the nearest code that exists. A gradient with respect to the
weights goes straight through the rounding (Bengio et al. 2013, arXiv 1308.3432), and only its sign is used (SignRound: Cheng et al. 2023,
arXiv 2309.05516):

    latent -= rate * sign(dL/dW * ds)          ds: how the weight moves with its code, +1 or -1
    scale   = start * (1 + a),  a -= rate * sign(sum over the group of dL/dW * u)       u: what the scale multiplies
    zero    : a float zero moves the same way, in steps of the group's starting scale
    table   : an entry moves by the sum of dL/dW over the weights that read it, in units of the row's mean gap
    nested  : scales and zeros stay: each is one of 8 values, and steps that small would round to none

A latent starts where the float weight lies, but no further than MARGIN from the code that it was given: the starting codes are GPTQ's, which are worth
more than the nearest ones, and a code that could as well be its neighbour changes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..formats import NF4_LEVELS, Format
from ..pack import pack_codes
from ..qtensor import QTensor, Rectangle
from .grid import LEVELS, Grid, round_scale, round_zero, spread

#: How far from its code a latent may start. With 0.49, just short of the next code, gradients of a few windows flip codes at random wherever GPTQ has
#: moved the target away from the weight, and what its sweep had balanced is lost.
MARGIN = 0.25
#: Formats with more code bits are left as they are: their rounding errors are far below those of the others, and a scale's smallest useful move shifts
#: large codes by more than that (w6g32 on a quadratic: 0.155 to 0.161 by steps that take 5 bits and fewer down).
MOST_BITS = 5


class LearnedWeight:
    """One QTensor in training.

    Args:
        weight: the float weight [N, K] that ``start`` approximates.
        start: any QTensor; permutations are followed, a sparse part and rectangles of fp16 or more than five bits stay as they are.

    ``value()`` is the weight at the moment, ``step(gradient, rounding, scale)`` moves it, ``qtensor()`` is the result, whose dequantized
    weight equals ``value()`` bit by bit.
    """

    def __init__(self, weight: torch.Tensor, start: QTensor):
        self.start = start
        w = weight.detach().float()
        if start.sparse is not None:
            w = w - start.sparse.dense(*start.shape)
        w = self._permuted(w)
        self.parts = [_Learned(w[r.r0:r.r1, r.c0:r.c1], r) if _learnable(r.format) else _Fixed(r) for r in start.rectangles]

    @property
    def learnable(self) -> bool:
        return any(isinstance(p, _Learned) for p in self.parts)

    def _permuted(self, t: torch.Tensor) -> torch.Tensor:
        for dim, perm in ((0, self.start.perm_rows), (1, self.start.perm_cols)):
            if perm is not None:
                t = t.index_select(dim, perm.long())
        return t

    def value(self) -> torch.Tensor:
        """float32 [N, K], in the original order of rows and columns."""
        if len(self.parts) == 1 and self.start.perm_rows is None and self.start.perm_cols is None and self.start.sparse is None:
            return self.parts[0].value()
        out = torch.empty(self.start.shape)
        for r, part in zip(self.start.rectangles, self.parts, strict=True):
            out[r.r0:r.r1, r.c0:r.c1] = part.value()
        for dim, perm in ((0, self.start.perm_rows), (1, self.start.perm_cols)):
            if perm is not None:
                out = torch.empty_like(out).index_copy_(dim, perm.long(), out)
        return out if self.start.sparse is None else out.add_(self.start.sparse.dense(*self.start.shape))

    def step(self, gradient: torch.Tensor, rounding: float, scale: float) -> None:
        """One step against ``gradient`` = dL/dW [N, K]: latents by ``rounding`` codes, constants by ``scale`` of their size."""
        gradient = self._permuted(gradient)
        for r, part in zip(self.start.rectangles, self.parts, strict=True):
            part.step(gradient[r.r0:r.r1, r.c0:r.c1], rounding, scale)

    def slopes(self, gradient: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """dL/dW [N, K] -> for each rectangle that can move, the derivatives of L along its constants (``move`` takes as many steps)."""
        gradient = self._permuted(gradient)
        return [p.slopes(gradient[r.r0:r.r1, r.c0:r.c1]) for r, p in zip(self.start.rectangles, self.parts, strict=True) if isinstance(p, _Learned)]

    def move(self, steps: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Moves the constants of each rectangle that can; codes stay."""
        for part, step in zip((p for p in self.parts if isinstance(p, _Learned)), steps, strict=True):
            part.move(step)

    def constants(self) -> list[dict[str, torch.Tensor]]:
        """How far the constants of each rectangle that can move have moved, in the units of ``move``: the tensors themselves."""
        return [p.constants() for p in self.parts if isinstance(p, _Learned)]

    def qtensor(self) -> QTensor:
        """The weight as it is stored; ``info`` is that of the start."""
        rectangles = [Rectangle(r.r0, r.r1, r.c0, r.c1, r.format, part.tensors()) for r, part in zip(self.start.rectangles, self.parts, strict=True)]
        q = QTensor(self.start.shape, rectangles, self.start.perm_rows, self.start.perm_cols, self.start.sparse, dict(self.start.info))
        q.validate()
        return q


def _learnable(fmt: Format) -> bool:
    return fmt.kind != "float" and fmt.bits <= MOST_BITS


class _Fixed:
    """A rectangle that does not move."""

    def __init__(self, rectangle: Rectangle):
        self.rectangle, self._value = rectangle, rectangle.dequantize()

    def value(self):
        return self._value

    def step(self, gradient, rounding, scale):
        pass

    def tensors(self):
        return self.rectangle.tensors


class _Learned:
    """A rectangle [R, C] of a uniform, nf or lut format. Latents float32 [R, C]; constants are kept exact in their stored type."""

    def __init__(self, w: torch.Tensor, rectangle: Rectangle):
        self.fmt, self.cols = rectangle.format, w.shape[1]
        self.width = self.fmt.group or self.cols
        codes, self.start_tensors = rectangle.codes(), rectangle.tensors
        if self.fmt.kind == "lut":
            table = rectangle.tensors["table"].float()
            order = torch.sort(table, dim=1, stable=True).indices
            codes = torch.gather(torch.argsort(order, 1), 1, codes.long())
            self.table = self.start = torch.gather(table, 1, order)
            gap = (self.table[:, -1:] - self.table[:, :1]) / (self.fmt.levels - 1)
            self.unit = torch.where(gap > 0, gap, torch.ones_like(gap))
            unit, self.sign = self.unit, None
        else:
            self.scales = self.start = rectangle.scales()
            self.zeros = None if self.fmt.kind == "nf" else rectangle.zeros()
            self.start_zeros = self.zeros
            unit = spread(self.scales, self.width, self.cols)
            if self.fmt.kind == "nf":
                unit = unit * ((NF4_LEVELS[-1] - NF4_LEVELS[0]) / (self.fmt.levels - 1))
            # Symmetric grids may have negative scales; then a higher code is a smaller weight.
            self.sign = unit.sign() if bool((self.scales < 0).any()) else None
        self.moved = torch.zeros_like(self.start)
        self.moved_zeros = torch.zeros_like(self.start)
        away = (w - self._decode(codes)) / unit
        self.latent = codes.float() + away.clamp_(-MARGIN, MARGIN)

    def codes(self) -> torch.Tensor:
        """Whole numbers, float32 [R, C]."""
        return self.latent.round().clamp_(0, self.fmt.levels - 1)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        if self.fmt.kind == "lut":
            return torch.gather(self.table, 1, codes.long())
        return Grid(self.fmt, self.cols, self.scales, self.zeros).decode(codes)

    def value(self) -> torch.Tensor:
        return self._decode(self.codes())

    def step(self, gradient: torch.Tensor, rounding: float, scale: float) -> None:
        codes = self.codes()
        if scale:
            self.move({name: slope.sign_().mul_(-scale) for name, slope in self.slopes(gradient, codes).items()})
        direction = gradient.sign() if self.sign is None else gradient.sign().mul_(self.sign)
        self.latent.sub_(direction, alpha=rounding).clamp_(-0.5, self.fmt.levels - 0.5)

    def slopes(self, gradient: torch.Tensor, codes: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """dL/dW [R, C] -> the derivative of L with respect to the moves of each kind of constants, in the units of :meth:`move`."""
        if self.fmt.nested:
            return {}
        codes = self.codes() if codes is None else codes
        if self.fmt.kind == "lut":
            return {"table": torch.zeros_like(self.table).scatter_add_(1, codes.long(), gradient).mul_(self.unit)}
        if self.fmt.kind == "nf":
            units = LEVELS[codes.long()]
        else:
            units = codes if self.fmt.zero == "float" else codes - spread(self.zeros, self.width, self.cols)
        out = {"scales": self._group_sum(gradient * units).mul_(self.start)}
        return out if self.fmt.zero != "float" else out | {"zeros": self._group_sum(gradient).mul_(self.start.abs())}

    def move(self, steps: Mapping[str, torch.Tensor]) -> None:
        """Moves constants: scales by a part of their starting size, float zeros by one of the scale's, entries of a table by one of their row's mean gap."""
        if self.fmt.kind == "lut":
            self.moved.add_(steps["table"])
            # A row's order must survive, since latents count entries: entries that would cross meet instead.
            self.table = torch.cummax((self.start + self.moved * self.unit).half().float(), 1).values
        if self.fmt.kind == "lut" or self.fmt.nested:
            return
        self.moved.add_(steps["scales"])
        self.scales = round_scale(self.start * (1 + self.moved.clamp_(-0.5, 0.5)), self.fmt)
        if self.fmt.zero == "float":
            self.moved_zeros.add_(steps["zeros"])
            self.zeros = round_zero(self.start_zeros + self.moved_zeros * self.start.abs(), self.fmt)

    def constants(self) -> dict[str, torch.Tensor]:
        """What :meth:`move` adds to."""
        if self.fmt.nested:
            return {}
        if self.fmt.kind == "lut":
            return {"table": self.moved}
        return {"scales": self.moved} if self.fmt.zero != "float" else {"scales": self.moved, "zeros": self.moved_zeros}

    def _group_sum(self, t):
        """[R, C] -> sums over groups [R, G]; the last group may be ragged."""
        return torch.nn.functional.pad(t, (0, -self.cols % self.width)).view(t.shape[0], -1, self.width).sum(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        half = torch.bfloat16 if self.fmt.scale_dtype == "bf16" else torch.float16
        out = dict(self.start_tensors) | {"codes": pack_codes(self.codes().to(torch.uint8), self.fmt.bits)}
        if self.fmt.kind == "lut":
            return out | {"table": self.table.half()}
        if self.fmt.nested:
            return out
        out["scales"] = self.scales.to(half).contiguous()
        if self.fmt.zero == "float":
            out["zeros"] = self.zeros.to(half).contiguous()
        return out

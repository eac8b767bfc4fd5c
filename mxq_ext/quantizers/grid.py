"""Where the codes of a group lie: from weights to the scale and zero that are stored, by range or by search.

    uniform   value = s * q + o,       o = -s * z (sym, int; exact in float32) or the float zero itself
    nf        value = s * level[q]

Scales and zeros are rounded to their stored 16-bit type *before* a code is computed, so a quantizer works with exactly the
numbers that the kernels will read. A symmetric grid uses all codes -2^(b-1) .. 2^(b-1)-1; its scale may be negative, which
puts the longer end on the side of the larger weights (as llama.cpp's Q4_0 does).

The search ("clip") shrinks the range of each group by the factors of a list and keeps the one with the least
sum_j h_j |w_j - Q(w_j)|^p, h an importance per column (GPTQ, OWQ and SliM-LLM use h = 1, p = 2.4; AWQ searches on outputs).

Nested scales and zeros (SpQR's second level) come from those of a float-zero grid: over 16 groups of a row the range of the scales is cut into 7 equal steps,
each group takes one of the 8 scales, and the zero that keeps the middle of its range in place; the zeros are then cut in the same way. The search tries all 8
scales of a group, and the zeros next to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import NEST_BITS, NEST_GROUPS, NF4_LEVELS, Format
from ..qtensor import nested_codes, nested_value
from .base import check_half

LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float32)
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2

_CHUNK = 1 << 15  # weights searched at a time: a handful of float32 buffers of this size stay in the L2 cache

#: Smallest shrink factor worth trying, by code bits: coarser grids clip more.
SMALLEST = {1: 0.10, 2: 0.30, 3: 0.45, 4: 0.60, 5: 0.72, 6: 0.82, 8: 0.90}


@dataclass
class Grid:
    """Scales and zeros of a weight [N, K] in a uniform or nf format.

    scales float32 [N, G], never zero; zeros float32 [N, G]: zero points 0 .. 2^b-1 (sym, int), additive (float), None (nf).
    All values are exact in the stored 16-bit type; in a nested format they are those of some code, in the ranges ``scale_range`` and ``zero_range``.
    """

    fmt: Format
    cols: int
    scales: torch.Tensor
    zeros: torch.Tensor | None
    scale_range: NestRange | None = None
    zero_range: NestRange | None = None

    @property
    def width(self) -> int:
        """Columns per group."""
        return self.fmt.group or self.cols

    def offsets(self) -> torch.Tensor:
        """o [N, G] of ``value = s * q + o``."""
        return offsets(self.fmt, self.scales, self.zeros)

    def constants(self) -> dict[str, torch.Tensor]:
        """What ``QTensor.from_codes`` stores beside the codes, by its names."""
        out = {"scales": self.scales} if self.zeros is None else {"scales": self.scales, "zeros": self.zeros}
        for what, r in (("scale", self.scale_range), ("zero", self.zero_range)):
            out |= {} if r is None else {f"{what}_steps": r.steps, f"{what}_starts": r.starts}
        return out

    def replace(self, g: int, fresh: Grid) -> None:
        """The groups from g on become those of ``fresh``, in place. In a nested format these are all that share a range."""
        for mine, new in ((self.scales, fresh.scales), (self.zeros, fresh.zeros)):
            if mine is not None:
                mine[:, g : g + new.shape[1]] = new
        for mine, new in ((self.scale_range, fresh.scale_range), (self.zero_range, fresh.zero_range)):
            if mine is not None:
                mine.steps[:, g // NEST_GROUPS], mine.starts[:, g // NEST_GROUPS] = new.steps[:, 0], new.starts[:, 0]

    def store_scale(self, s: torch.Tensor, g: int) -> torch.Tensor:
        """Scales float32 [N] of group g as the format can store them."""
        return round_scale(s, self.fmt) if self.scale_range is None else self.scale_range.nearest(s, g)

    def store_zero(self, z: torch.Tensor, g: int) -> torch.Tensor:
        """Float zeros float32 [N] of group g as the format can store them."""
        return round_zero(z, self.fmt) if self.zero_range is None else self.zero_range.nearest(z, g)

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        """Nearest codes of w [N, K], uint8; ties are decided by the same float32 operations everywhere, so always alike."""
        o, inv = spread(self.offsets(), self.width, self.cols), spread(1 / self.scales, self.width, self.cols)
        return nearest(self.fmt, w, inv, o).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights float32 [N, K] of codes [N, K], bit-equal to what QTensor.dequantize returns."""
        s, o = spread(self.scales, self.width, self.cols), spread(self.offsets(), self.width, self.cols)
        return s * LEVELS[codes.long()] if self.fmt.kind == "nf" else torch.addcmul(o, s, codes.float())

    def units(self, codes: torch.Tensor) -> torch.Tensor:
        """u float32 [N, K] such that the weight is ``s * u`` (+ the float zero): what a scale multiplies."""
        if self.fmt.kind == "nf":
            return LEVELS[codes.long()]
        return codes.float() if self.fmt.zero == "float" else codes.float() - spread(self.zeros, self.width, self.cols)


@dataclass
class NestRange:
    """The values that nested scales, or nested zeros, can have: ``starts + c * steps`` for codes c, both float32 [N, S] for S times 16 groups."""

    steps: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def of(values: torch.Tensor, fmt: Format, positive: bool) -> NestRange:
        """From the least to the largest of each 16 ``values`` float32 [N, G]; ``positive`` for scales, whose start must not round to zero."""
        ends = _runs(values)
        starts = (round_scale if positive else round_zero)(ends.amin(-1), fmt)
        return NestRange(((ends.amax(-1) - starts) / ((1 << NEST_BITS) - 1)).clamp_(min=0).half().float(), starts)

    def value(self, codes: torch.Tensor) -> torch.Tensor:
        """Values float32 [N, G] of codes [N, G]."""
        return nested_value(*(spread(t, NEST_GROUPS, codes.shape[1]) for t in (self.steps, self.starts)), codes.float())

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [N, G] of the values nearest to ``values``."""
        return nested_codes(values, self.steps, self.starts)

    def nearest(self, values: torch.Tensor, g: int) -> torch.Tensor:
        """Of group g alone: the values float32 [N] nearest to ``values`` [N]."""
        own = NestRange(self.steps[:, g // NEST_GROUPS, None], self.starts[:, g // NEST_GROUPS, None])
        return own.value(own.codes(values[:, None]))[:, 0]


def _runs(values: torch.Tensor) -> torch.Tensor:
    """[N, G] -> [N, S, 16], those that share a range; the last value fills up the last."""
    return torch.nn.functional.pad(values[None], (0, -values.shape[1] % NEST_GROUPS), mode="replicate")[0].unflatten(1, (-1, NEST_GROUPS))


def spread(t: torch.Tensor, width: int, cols: int) -> torch.Tensor:
    """[N, G] per group -> [N, cols] per column; the last group may be ragged."""
    return t.repeat_interleave(width, dim=1)[:, :cols]


def group_sum(t: torch.Tensor, width: int) -> torch.Tensor:
    """[N, K] -> sums over groups [N, G]; the last group may be ragged."""
    return torch.nn.functional.pad(t, (0, -t.shape[1] % width)).unflatten(1, (-1, width)).sum(-1)


def offsets(fmt: Format, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    if fmt.kind == "nf":
        return torch.zeros_like(scales)
    return zeros if fmt.zero == "float" else -scales * zeros


def nearest(fmt: Format, w: torch.Tensor, inv: torch.Tensor, o: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Nearest codes as float32, shape of w; ``inv`` = 1/s and ``o`` broadcast against it. The middle of two nf levels takes the lower."""
    t = torch.sub(w, o, out=out).mul_(inv)
    if fmt.kind == "nf":
        return t.copy_(torch.bucketize(t, MIDDLES))
    return t.round_().clamp_(0, fmt.levels - 1)


def round_scale(s: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Scales as they are stored, in float32: never zero, never infinite.

    fp16 below 2^-14 has fixed spacing 2^-24; there magnitudes are rounded up, because rounding down could cut off a quarter of the range
    (a scale of 1.4 * 2^-24) or all of it (0.4 * 2^-24). An exact zero (a group of zeros) becomes 1.
    """
    check_half(s, fmt, "scale")
    if fmt.scale_dtype == "bf16":
        # Below float32's normal range 1/s would overflow.
        r = s.to(torch.bfloat16).float()
        r = torch.where(r.isinf(), s.sign() * torch.finfo(torch.bfloat16).max, r)
        r = torch.where(r.abs() < 2.0**-120, s.sign() * 2.0**-120, r)
    else:
        r = s.to(torch.float16).float()
        r = torch.where(s.abs() < 2.0**-14, s.sign() * torch.ceil(s.abs() * 2.0**24) * 2.0**-24, r)
    return torch.where(s == 0, torch.ones_like(s), r)


def round_zero(z: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Float zeros as they are stored, in float32."""
    check_half(z, fmt, "float zero")
    return z.to(torch.bfloat16 if fmt.scale_dtype == "bf16" else torch.float16).float()


def make_grid(w: torch.Tensor, fmt: Format, *, clip: str = "none", importance: torch.Tensor | None = None, power: float = 2.0,
              steps: int = 8, exact_constants: bool = True, exact: torch.Tensor | None = None) -> Grid:
    """Scales and zeros for a weight.

    Args:
        w: float32 [N, K].
        fmt: a uniform or nf format.
        clip: ``"none"`` covers the range of each group; ``"mse"`` searches ``steps`` shrink factors (1 is among them), with the zero points
            next to the natural one (int) or both signs (sym), for the least weighted error, then improves the winner by one
            least-squares step. Eight factors give what 16 or 32 do. One bit is always searched: of two levels none should lie at the range's ends.
        importance: float32 [K] or [N, K], >= 0: h of the search. None: all 1. A group whose h are all 0 counts as all 1.
        power: p of the search.
        exact_constants: a group of one repeated value gets s = |value| (s = 1, zero = value in float-zero formats), exact if the value is
            a 16-bit number. Off for quantizers whose weights move away from the constant before they are coded. In nested formats, whose zeros
            are codes, no value is exact, and such groups take what the others of their range need.
        exact: bool [N, K]: elements that are kept elsewhere. They count nothing: the mean of their group's others stands for them, or 0.
    """
    n, k = w.shape
    clip = "mse" if fmt.bits == 1 else clip
    h = importance if importance is None or importance.dim() == 2 else importance[None, :]
    if exact is not None:
        w, h = without(w, h, exact, fmt.group or k)
    parts = [_grid_of_groups(x, fmt, clip, hx, power, steps, exact_constants and not fmt.nested) for x, hx in _groups(w, h, fmt)]
    scales = torch.cat([p[0] for p in parts], 1)
    zeros = None if fmt.kind == "nf" else torch.cat([p[1] for p in parts], 1)
    return Grid(fmt, k, *_nest(w, h, fmt, scales, zeros, clip, power)) if fmt.nested else Grid(fmt, k, scales, zeros)


def without(w: torch.Tensor, h: torch.Tensor | None, exact: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] with the mean of its group's others (0 where there are none) in the place of each exact element, and h [N, K], [K] or None with 0 there."""
    kept = (~exact).float()
    mean = group_sum(w * kept, width) / group_sum(kept, width).clamp(min=1)
    h = torch.ones_like(w) if h is None else h.expand(w.shape)
    return torch.where(exact, spread(mean, width, w.shape[1]), w), h.masked_fill(exact, 0.0)


def _groups(w, h, fmt):
    """(x [N, groups, width], h of that shape, its rows perhaps 1, or None) of the whole groups of w [N, K], and of the ragged last one; what exists of the
    two. A group whose h are all 0 gets ones."""
    n, k = w.shape
    width = fmt.group or k
    full = k // width * width
    for a, b in ((0, full), (full, k)):
        if b > a:
            cols = min(width, b - a)
            hx = None if h is None else h[:, a:b].reshape(h.shape[0], -1, cols)
            if hx is not None:
                hx = torch.where((hx > 0).any(-1, keepdim=True), hx, torch.ones((), dtype=hx.dtype))
            yield w[:, a:b].reshape(n, -1, cols).contiguous(), hx


def _nest(w, h, fmt, scales, zeros, clip, power):
    """(scales, zeros, scale range, zero range) of a nested format from those [N, G] of a float-zero grid, in chunks of rows."""
    step = max(1, _CHUNK // w.shape[1])
    found = [_nest_rows(w[r : r + step], h if h is None or h.shape[0] == 1 else h[r : r + step], fmt, scales[r : r + step], zeros[r : r + step], clip, power)
             for r in range(0, w.shape[0], step)]
    s, z, *ranges = (torch.cat(t) for t in zip(*found, strict=True))
    return s, z, NestRange(*ranges[:2]), NestRange(*ranges[2:])


def _nest_rows(w, h, fmt, s, z, clip, power):
    """(scales, zeros [N, G], scale steps, scale starts, zero steps, zero starts [N, S])."""
    groups = list(_groups(w, h, fmt))
    scratch = [(torch.empty_like(x), torch.empty_like(x)) for x, _ in groups]
    lo, hi = (torch.cat([end(x, -1) for x, _ in groups], 1) for end in (torch.amin, torch.amax))
    # Zeros follow scales so that what lies at ``half``, in codes, stays in place: the middle of a range. A group of one value has it at a code, and takes
    # any scale: the least of those that share its range, so that it widens none; where all are such, that of the largest value.
    flat = lo == hi
    half = torch.where(flat, float(fmt.levels // 2), (fmt.levels - 1) / 2)
    middle = torch.where(flat, lo, z + s * half)
    others, largest = _runs(s.masked_fill(flat, torch.inf)).amin(-1), _runs(lo.abs()).amax(-1)
    others = torch.where(others.isinf(), torch.where(largest > 0, largest, 1.0), others)
    s = torch.where(flat, spread(others, NEST_GROUPS, s.shape[1]), s)

    def loss(scales, zeros):
        cuts = (0, groups[0][0].shape[1], scales.shape[1])
        return torch.cat([_loss(x, fmt, scales[:, a:b], zeros[:, a:b], hx, power, *buf)
                          for (x, hx), buf, a, b in zip(groups, scratch, cuts, cuts[1:], strict=False)], 1)

    def least(options):
        """Of pairs (scales, zeros), the first one of least loss in each group."""
        best, (s, z) = None, options[0]
        for cs, cz in options:
            error = loss(cs, cz)
            better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
            best, s, z = error if best is None else torch.where(better, error, best), torch.where(better, cs, s), torch.where(better, cz, z)
        return s, z

    scale_range = NestRange.of(s, fmt, positive=True)
    every = [scale_range.value(torch.full_like(s, c)) for c in range(1 << NEST_BITS)]
    s = scale_range.value(scale_range.codes(s)) if clip == "none" else least([(c, round_zero(middle - c * half, fmt)) for c in every])[0]
    z = middle - s * half
    zero_range = NestRange.of(z, fmt, positive=False)
    codes = zero_range.codes(z).float()
    z = zero_range.value(codes)
    if clip != "none":
        s, z = least([(s, zero_range.value((codes + shift).clamp(0, (1 << NEST_BITS) - 1))) for shift in (0, -1, 1)])
        s, z = least([(c, z) for c in every])
    return s, z, scale_range.steps, scale_range.starts, zero_range.steps, zero_range.starts


def _grid_of_groups(x, fmt, clip, h, power, steps, exact_constants):
    """(scales, zeros) [N, G] for groups x [N, G, width], in chunks of rows."""
    step = max(1, _CHUNK // (x.shape[1] * x.shape[2]))
    out = [_grid_of_chunk(x[r : r + step], fmt, clip, h if h is None or h.shape[0] == 1 else h[r : r + step], power, steps, exact_constants)
           for r in range(0, x.shape[0], step)]
    return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out])


def _grid_of_chunk(x, fmt, clip, h, power, steps, exact_constants):
    lo, hi = x.amin(-1), x.amax(-1)
    ends = (lo, hi)
    if fmt.bits == 1:  # what lies between the two levels parts the weights: the middle of the range may have most of them on one side
        mean = x.mean(-1)
        span = torch.maximum(hi - mean, mean - lo)
        ends = (mean - span, mean + span)
    candidates = list(_candidates(*ends, fmt, _factors(fmt, steps) if clip != "none" else [1.0]))
    s, z = candidates[0]
    if clip != "none":
        buf = (torch.empty_like(x), torch.empty_like(x))
        best = _loss(x, fmt, s, z, h, power, *buf)
        for cs, cz in candidates[1:]:
            loss = _loss(x, fmt, cs, cz, h, power, *buf)
            better = loss < best
            best, s, z = torch.where(better, loss, best), torch.where(better, cs, s), torch.where(better, cz, z)
        for _ in range(4 if fmt.bits == 1 else 1):  # of two levels each step moves both to the means of their weights, as k-means does
            cs, cz = _least_squares(x, fmt, s, z, h)
            loss = _loss(x, fmt, cs, cz, h, power, *buf)
            better = loss < best
            best, s, z = torch.where(better, loss, best), torch.where(better, cs, s), torch.where(better, cz, z)
    elif len(candidates) > 1:
        # A symmetric range can be covered with either sign: the smaller step wins.
        cs, cz = candidates[1]
        better = cs.abs() < s.abs()
        s, z = torch.where(better, cs, s), torch.where(better, cz, z)
    if exact_constants:
        s, z = _constants(lo, hi, fmt, s, z)
    return s, z


def _factors(fmt: Format, steps: int) -> list[float]:
    least = SMALLEST[fmt.bits]
    return [1 - i * (1 - least) / max(1, steps - 1) for i in range(steps)]


def _candidates(lo, hi, fmt, factors):
    """Yields (s, z) [N, G] as stored, for each shrink factor (and sign or zero point); the first one covers the whole range."""
    top = fmt.levels - 1
    none = torch.zeros_like(lo)
    if fmt.kind == "nf":
        m = torch.maximum(hi, -lo)
        for p in factors:
            yield round_scale(p * m, fmt), none
    elif fmt.zero == "sym":
        long, short = fmt.symmetric_zero, fmt.symmetric_zero - 1
        z = torch.full_like(lo, long)
        plus = torch.maximum(-lo / long, hi / short).clamp_(min=0)
        minus = torch.maximum(hi / long, -lo / short).clamp_(min=0)
        for p in factors:
            yield round_scale(p * plus, fmt), z
            yield round_scale(-p * minus, fmt), z
    elif fmt.zero == "int":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        # The neighbours of the natural zero point pay at few bits: rounding -lo/s to an integer wastes up to half a step at one end.
        shifts = (0, -1, 1) if len(factors) > 1 and fmt.bits < 8 else (0,)
        for p in factors:
            s = round_scale(p * (hi / top - lo / top), fmt)
            z = (-p * lo / s).round_()
            for shift in shifts:
                yield s, (z + shift).clamp_(0, top)
    else:
        for p in factors:
            z = round_zero((lo + hi) / 2 - p * (hi / 2 - lo / 2), fmt)
            far = (lo + hi) / 2 + p * (hi / 2 - lo / 2)
            yield round_scale((far - z).clamp_(min=0) / top, fmt), z


def _loss(x, fmt, s, z, h, power, t, q):
    """sum_j h_j |x_j - Q(x_j)|^p, [N, G]; t and q are scratch like x."""
    o, inv = offsets(fmt, s, z)[..., None], (1 / s)[..., None]
    torch.sub(x, o, out=t).mul_(inv)
    if fmt.kind == "nf":
        q.copy_(LEVELS[torch.bucketize(t, MIDDLES)])
    else:
        torch.round(t, out=q).clamp_(0, fmt.levels - 1)
    t.sub_(q)
    if power == 2.0:
        t.square_()
    else:
        t.abs_().pow_(power)
    if h is not None:
        t.mul_(h)
    return t.sum(-1).mul_(s.abs() ** power)


def _least_squares(x, fmt, s, z, h):
    """(s, z) that minimize sum h (x - s u - o)^2 for the codes of the given grid, rounded; float zeros move along with the scale."""
    o, inv = offsets(fmt, s, z)[..., None], (1 / s)[..., None]
    q = nearest(fmt, x, inv, o)
    h = torch.ones((), dtype=x.dtype) if h is None else h
    if fmt.kind == "nf":
        u = LEVELS[q.long()]
    else:
        u = q if fmt.zero == "float" else q - z[..., None]
    hu = h * u
    if fmt.zero == "float":
        total = h.expand_as(x).sum(-1)
        mx, mu = (h * x).sum(-1) / total, hu.sum(-1) / total
        var = (hu * (u - mu[..., None])).sum(-1)
        new = torch.where(var > 0, (hu * (x - mx[..., None])).sum(-1) / var, s)
        new = round_scale(torch.where(new > 0, new, s), fmt)
        return new, round_zero(mx - new * mu, fmt)
    den = (hu * u).sum(-1)
    new = torch.where(den > 0, (hu * x).sum(-1) / den, s)
    return round_scale(torch.where(new * s > 0, new, s), fmt), z


def _constants(lo, hi, fmt, s, z):
    """Groups of one repeated value, exact when it is a 16-bit number."""
    same = (lo == hi) & (lo != 0)
    if not same.any():
        return s, z
    if fmt.zero == "float":
        return torch.where(same, torch.ones_like(s), s), torch.where(same, round_zero(torch.where(same, lo, z), fmt), z)
    # sym: code z +- 1 under a scale of either sign; int: code 1 above the zero point 0, or code 0 below the zero point 1; nf: the level 1.
    c = round_scale(torch.where(same, lo.abs(), s), fmt)
    s = torch.where(same, c, s)
    return s, torch.where(same, (lo < 0).float(), z) if fmt.zero == "int" else z

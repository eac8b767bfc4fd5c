"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding with error feedback under the layer's Hessian, then repair.

Column after column, each is rounded from ``target_j = W_j + sum_{i<j} (W_i - Q_i) V_ij`` (see :mod:`.hessian`); the sum over
finished blocks is one matrix product per block of 128, the sum inside a block one vector-matrix product per column. The layout
is transposed, so that a column of W is contiguous.

Order and groups. With ``act_order`` the columns go by falling H_jj and scales are fixed beforehand from the original weights,
in original column order: groups stay contiguous on disk and no permutation has to be stored. Without it, columns go from left
to right and each group's scale is fitted when the group is reached, to the targets of its columns at that moment. Either search
weighs the error of column j by D_j, its price in tr(dW H dW^T) once later columns have absorbed what they can; this beats the
usual diag(H) clearly (docstring of :class:`GptqOptions`).

Two repairs lower tr(dW H dW^T) further and never raise it: ``cd_passes`` sweeps of coordinate descent over the codes (QuantEase,
Behdin et al. 2023, arXiv 2309.01885), then ``refit``, which solves for the scales (and float zeros) of the final codes.

Nested scales: without ``act_order`` the groups that share a range are fitted together, when the first of them is reached; ``refit`` chooses among the values
that the range offers.

Exact elements (a sparse part, as in SpQR, Dettmers et al. 2023) take the target itself in place of the nearest code: no error is left there to be passed on,
and what other columns have left is made good. They count nothing in the fit of scales, and the repairs move them freely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import QuantizationError
from ..formats import NEST_GROUPS, Format
from ..qtensor import QTensor
from .base import Options, check_half, need, register, with_sparse
from .grid import LEVELS, Grid, make_grid, nearest
from .hessian import HessianFactor, prepare_hessian
from .kmeans import kmeans_table_without

BLOCK = 128
_ROWS = 4096  # rows at a time (they do not interact), so that the embedding of a large vocabulary needs little memory


@dataclass
class GptqOptions(Options):
    """Options of GPTQ.

    damp: share of the mean diagonal that is added to H. act_order: columns by falling H_jj. None takes 0.01 and True, or what the
    given HessianFactor was made with.
    clip: ``"mse"`` searches each group's range, ``"none"`` covers it (one bit is always searched); clip_power: exponent of the search's error.
    cd_passes, refit: the repairs, see the module; both work for tables too.

    The defaults were chosen on 20 linear layers of a 135M Llama (Hessians of 4096 tokens; group 64, integer zeros). Geometric mean of
    tr(dW H dW^T) on *other* tokens, for 2 / 3 / 4 bits, relative to act-order alone: no act-order 1.59 / 1.25 / 1.22; clip with diag(H)
    0.67 / 0.85 / 0.95; refit on top of that 0.66 / 0.83 / 0.94; with D in place of diag(H) 0.63 / 0.79 / 0.86. On half of the layers: zero
    points next to the natural one take off another 3.5 / 1.6 / 0.8 percent, one pass of coordinate descent 1.8 / 0.6 / 0.8 percent.
    """

    damp: float | None = None
    act_order: bool | None = None
    clip: str = "mse"
    clip_power: float = 2.0
    cd_passes: int = 1
    refit: bool = True

    def check(self) -> None:
        need(self.damp is None or self.damp > 0, "damp", self.damp, "it must be positive")
        need(self.clip in ("none", "mse"), "clip", self.clip, "it must be 'none' or 'mse'")
        need(0 < self.clip_power <= 4, "clip_power", self.clip_power, "it must lie in (0, 4]")
        need(0 <= self.cd_passes <= 100, "cd_passes", self.cd_passes, "it must be an integer in 0..100")


@register("gptq", GptqOptions, lambda fmt: None, sparse=True)
def run(weight, fmt, options, *, hessian=None, fisher=None, exact=None):
    """weight float32 [N, K], exact bool [N, K] or None -> (QTensor, report). ``fisher`` is not used: H says more."""
    factor = _factor(weight, fmt, options, hessian)
    solve = _lut if fmt.kind == "lut" else _grids
    pieces = weight.split(_ROWS)
    masks = [None] * len(pieces) if exact is None else exact.split(_ROWS)
    parts = [solve(w, fmt, options, factor, mask) for w, mask in zip(pieces, masks, strict=True)]
    tensors = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    target = tensors.pop("target", None)
    report = {"damp": factor.damp, "damp_retries": factor.retries, "dead_columns": factor.dead, "warnings": list(factor.warnings)}
    return with_sparse(QTensor.from_codes(fmt, tensors.pop("codes"), **tensors), target, exact), report


def _factor(weight, fmt, options, hessian) -> HessianFactor:
    """The factor to use; refuses options that contradict a given one."""
    if hessian is None:
        raise QuantizationError(f"quantizing a weight of {weight.shape[0]} x {weight.shape[1]} to {fmt} with gptq",
                                "it needs the layer's Hessian, none was given",
                                "calibrate first, or use method='rtn' (or 'auto', which chooses)")
    if not isinstance(hessian, HessianFactor):
        return prepare_hessian(hessian, 0.01 if options.damp is None else options.damp, options.act_order is not False)
    for name, have in (("damp", hessian.asked_damp), ("act_order", hessian.act_order)):
        asked = getattr(options, name)
        if asked is not None and asked != have:
            raise QuantizationError(f"quantizing to {fmt} with {name}={asked}", f"the given HessianFactor was made with {name}={have}",
                                    f"drop the option, or call prepare_hessian with {name}={asked}")
    return hessian


def _grids(w, fmt: Format, options, factor, exact):
    """Codes, scales, zeros (and the target of exact elements) of some rows in a uniform or nf format."""
    importance = factor.importance()

    def search(x, columns):
        # GPTQ moves weights, so a group that starts out constant does not stay so.
        return make_grid(x, fmt, clip=options.clip, importance=importance[columns], power=options.clip_power, exact_constants=False,
                         exact=None if exact is None else exact[:, columns])

    grid = search(w, slice(None))
    rounder, free = _GridRounder(grid, factor.order), None if exact is None else _Exact(exact)
    fitted = NEST_GROUPS if fmt.nested else 1  # groups that are fitted at a time
    before = None if factor.act_order or not fmt.group else lambda g, a, b, x: rounder.replace(g * fitted, search(x, slice(a, b)))
    q = feedback_sweep(w, factor, _around(rounder, free, factor.order), BLOCK if before is None else fmt.group * fitted, before)
    codes, h = q.to(torch.uint8), factor.damped()
    if options.cd_passes:
        codes = coordinate_descent(w, h, codes, _around(_GridRounder(grid, None), free, None), options.cd_passes)
    if options.refit:
        refit_scales(w, h, codes, grid, exact=free)
    return {"codes": codes, **grid.constants()} | ({} if free is None else {"target": free.target})


def _lut(w, fmt: Format, options, factor, exact):
    """Codes and table (and the target of exact elements) of some rows: tables by weighted k-means, then error feedback with the tables fixed."""
    table = kmeans_table_without(w, factor.importance(), exact, fmt.levels)
    check_half(table, fmt, "table entry")
    table, free = table.half().float(), None if exact is None else _Exact(exact)
    codes, h = feedback_sweep(w, factor, _around(_TableRounder(table), free, factor.order)).to(torch.uint8), factor.damped()
    if options.cd_passes:
        codes = coordinate_descent(w, h, codes, _around(_TableRounder(table), free, None), options.cd_passes)
    if options.refit:
        table, codes = refit_table(w, h, codes, table, exact=free)
    return {"codes": codes, "table": table} | ({} if free is None else {"target": free.target})


class _GridRounder:
    """Rounds columns of W (given as rows, [N]) with a Grid. ``order[t]`` is the column of step t."""

    def __init__(self, grid: Grid, order):
        self.grid = grid
        self.max = grid.fmt.levels - 1
        self.group = [j // grid.width for j in (range(grid.cols) if order is None else order.tolist())]
        # Contiguous rows [G, N], as views made once: making a view costs as much as the arithmetic on 576 numbers.
        self.rows = list(zip(*(t.T.contiguous().unbind(0) for t in (grid.scales, 1 / grid.scales, grid.offsets())), strict=True))

    def replace(self, g: int, fresh: Grid) -> None:
        """The groups from g on get those of ``fresh``, here and in the grid."""
        self.grid.replace(g, fresh)
        for i in range(fresh.scales.shape[1]):
            for mine, new in zip(self.rows[g + i], (fresh.scales, 1 / fresh.scales, fresh.offsets()), strict=True):
                mine.copy_(new[:, i])

    def __call__(self, t: int, x, code, value) -> None:
        """x float32 [N] -> code (float32 [N]) and value (float32 [N]), both written in place."""
        s, inv, o = self.rows[self.group[t]]
        if self.grid.fmt.kind == "nf":
            nearest(self.grid.fmt, x, inv, o, out=code)
            torch.mul(LEVELS[code.long()], s, out=value)
        else:
            torch.sub(x, o, out=code)
            code.mul_(inv).round_().clamp_(0, self.max)
            torch.addcmul(o, s, code, out=value)

    def decode(self, codes):
        """Weights float32 [N, K] of codes uint8 [N, K]."""
        return self.grid.decode(codes)


class _TableRounder:
    """Rounds columns with one ascending table per row, float32 [N, L]; a tie takes the lower entry."""

    def __init__(self, table):
        self.middles = ((table[:, 1:] + table[:, :-1]) / 2).T.contiguous()
        self.table = table

    def __call__(self, t: int, x, code, value) -> None:
        index = (x > self.middles).sum(0)
        code.copy_(index)
        torch.gather(self.table, 1, index[:, None], out=value[:, None])

    def decode(self, codes):
        return torch.gather(self.table, 1, codes.long())


class _Exact:
    """Elements of W [N, K] that a sparse part will hold: where (bool [N, K]), which rows of each column that is, and ``target`` float32 [N, K], the weight
    that is wanted there at last."""

    def __init__(self, where):
        self.where, self.target = where, torch.zeros(where.shape)
        self.rows = where.T.nonzero()[:, 1].split(where.sum(0).tolist())

    def into(self, values):
        """``values`` [N, K] with the targets at their places."""
        return torch.where(self.where, self.target, values)


class _ExactRounder:
    """Another rounder, but exact elements keep the value that they should be rounded from, as fp16 can add it to that of the code."""

    def __init__(self, rounder, exact: _Exact, order):
        self.rounder, self.exact = rounder, exact
        self.columns = range(exact.where.shape[1]) if order is None else order.tolist()

    def __call__(self, t: int, x, code, value) -> None:
        self.rounder(t, x, code, value)
        j = self.columns[t]
        own = self.exact.rows[j]
        if len(own):
            kept = value[own] + (x[own] - value[own]).half().float()
            value[own] = self.exact.target[own, j] = kept

    def decode(self, codes):
        """Weights float32 [N, K] of codes uint8 [N, K], with the exact ones as they are now."""
        return self.exact.into(self.rounder.decode(codes))


def _around(rounder, exact: _Exact | None, order):
    return rounder if exact is None else _ExactRounder(rounder, exact, order)


def feedback_sweep(w, factor: HessianFactor, rounder, block: int = BLOCK, before=None):
    """One pass of rounding with feedback: codes float32 [N, K] in original column order.

    ``before(g, a, b, x)`` is called at the start of block g, columns a:b, with the targets x [N, b-a] that these columns have then.
    """
    n, k = w.shape
    target = (w.T if factor.order is None else w.T[factor.order]).contiguous()  # becomes the targets, block by block
    lost = torch.zeros(k, n)  # W - Q
    codes = torch.empty(k, n)
    value = torch.empty(n)
    v = factor.feedback
    for a in range(0, k, block):
        b = min(a + block, k)
        original = target[a:b].clone()
        if a:
            target[a:b].addmm_(v[a:b, :a], lost[:a])
        if before is not None:
            before(a // block, a, b, target[a:b].T)
        rows, done = lost[a:b].unbind(0), lost[a:b].T
        for i, (x, w0, code) in enumerate(zip(target[a:b].unbind(0), original.unbind(0), codes[a:b].unbind(0), strict=True)):
            if i:
                x.addmv_(done[:, :i], v[a + i, a : a + i])
            rounder(a + i, x, code, value)
            torch.sub(w0, value, out=rows[i])
    if factor.order is not None:
        codes = torch.empty_like(codes).index_copy_(0, factor.order, codes)
    return codes.T


def coordinate_descent(w, h, codes, rounder, passes: int, block: int = BLOCK):
    """Sweeps over the columns from left to right, each rounded anew given all others; codes uint8 [N, K], h float32 [K, K].

    The best value of column j is ``Q_j - (dW H)_j / H_jj``; the nearest one on the grid is the exact minimum over the codes of that
    column, so tr(dW H dW^T) never rises. Stops early when a pass changes nothing.
    """
    n, k = w.shape
    c = codes.T.float().contiguous()
    current = rounder.decode(codes).T.contiguous()
    delta = current - w.T
    fresh, scratch = torch.empty(n), torch.empty(n)
    inverse = (1 / h.diagonal()).tolist()
    for _ in range(passes):
        before = c.clone()
        for a in range(0, k, block):
            b = min(a + block, k)
            gradient = h[a:b] @ delta
            moved = torch.zeros(b - a, n)
            for i, g in enumerate(gradient.unbind(0)):
                j = a + i
                if i:
                    g.addmv_(moved[:i].T, h[j, a:j])
                torch.sub(current[j], g, alpha=inverse[j], out=scratch)
                rounder(j, scratch, c[j], fresh)
                torch.sub(fresh, current[j], out=moved[i])
                current[j] = fresh
            delta[a:b] += moved
        if torch.equal(before, c):
            break
    return c.T.to(torch.uint8)


def refit_scales(w, h, codes, grid: Grid, sweeps: int = 1, exact: _Exact | None = None) -> None:
    """Solves for the scales (and float zeros) of fixed codes, in place: coordinate descent over groups under H.

    With r = W - What and u the unit values of group g: ``s_g += (u H r) / (u H u)``, rounded to 16 bits, in the rows where the exact
    change of the error, ds^2 (u H u) - 2 ds (u H r), is negative. A float zero takes the same step along the vector of ones. Exact elements do not move
    with them: there u and ones are 0.
    """
    n, k = w.shape
    u, now = grid.units(codes), grid.decode(codes)
    if exact is not None:
        u, now, free = u.masked_fill(exact.where, 0.0), exact.into(now), (~exact.where).float()
    r = (w - now) @ h  # kept equal to (W - What) H
    for _ in range(sweeps):
        for g in range(grid.scales.shape[1]):
            a, b = g * grid.width, min(k, (g + 1) * grid.width)
            mine, uh = u[:, a:b], u[:, a:b] @ h[a:b]
            curvature, slope = (uh[:, a:b] * mine).sum(1), (r[:, a:b] * mine).sum(1)
            _step(grid.scales[:, g], curvature, slope, uh, r, lambda s, g=g: grid.store_scale(s, g), keep_sign=True)
            if grid.fmt.zero == "float":
                if exact is None:
                    ones = h[a:b].sum(0)
                    curvature, slope, ones = ones[a:b].sum().expand(n), r[:, a:b].sum(1), ones.expand(n, k)
                else:
                    ones = free[:, a:b] @ h[a:b]
                    curvature, slope = (ones[:, a:b] * free[:, a:b]).sum(1), (r[:, a:b] * free[:, a:b]).sum(1)
                _step(grid.zeros[:, g], curvature, slope, ones, r, lambda z, g=g: grid.store_zero(z, g))


def refit_table(w, h, codes, table, exact: _Exact | None = None):
    """The same for tables [N, L], one step per level. Returns (table, codes), the table ascending and the codes renumbered to match."""
    table = table.clone()
    now = torch.gather(table, 1, codes.long())
    r = (w - (now if exact is None else exact.into(now))) @ h
    for level in range(table.shape[1]):
        u = (codes == level).float() if exact is None else ((codes == level) & ~exact.where).float()
        uh = u @ h
        _step(table[:, level], (uh * u).sum(1), (r * u).sum(1), uh, r, lambda t: t.half().float())
    order = torch.sort(table, dim=1, stable=True).indices
    return torch.gather(table, 1, order), torch.gather(torch.argsort(order, 1), 1, codes.long()).to(torch.uint8)


def _step(values, curvature, slope, direction, r, rounding, keep_sign: bool = False) -> None:
    """values [N] (a view, written in place) move to their rounded optimum where that lowers the error; r follows along ``direction``."""
    new = torch.where(curvature > 0, values + slope / curvature, values)
    if keep_sign:
        new = torch.where(new * values > 0, new, values)
    d = rounding(new) - values
    d = torch.where(d * (d * curvature - 2 * slope) < 0, d, torch.zeros_like(d))
    values += d
    r.sub_(d[:, None] * direction)

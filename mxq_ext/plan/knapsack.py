"""Multiple-choice knapsack on plain arrays: one candidate per unit, least total loss, at most ``budget`` bytes.

    minimize sum_u loss[u, c_u]   subject to   sum_u nbytes[u, c_u] <= budget

Five methods with one signature, ``(loss float [U, F], nbytes int [U, F], budget int) -> Allocation``; +inf marks a candidate that
cannot be chosen:

========== ============ ======================================================================================================
dp         exact        dynamic programming over bytes, with bounds (the default; milliseconds to seconds)
milp       exact        scipy's HiGHS: independent of everything else here, so it serves as the check
lagrangian within a gap the linear relaxation's break point, then filled greedily (microseconds per unit)
greedy     within a gap best loss drop per byte first, as SKIM (Bai et al. 2024) does
brute      exact        every combination; for tests
========== ============ ======================================================================================================

The relaxation is the backbone. On a unit's lower convex hull of (bytes, loss), each step to the next candidate has a gain, loss
saved per byte. Taking the steps of all units by falling gain walks along the convex hull of the whole Pareto front (Sinha and
Zoltners 1979), and the straight line between two neighbours of that walk is a lower bound on any choice of that size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, MxqError, PlanError

#: Losses are sums of float64: two that differ by less than this share are equal, and "exact" means exact up to it.
TOLERANCE = 1e-12
#: Dynamic programming keeps at most this many states per unit before it gives up exactness (and says so).
MAX_STATES = 1 << 15
#: Units that dynamic programming searches first, before all, when more are undecided.
CORE = 256
#: Largest number of combinations that :func:`brute` walks through.
MAX_BRUTE = 1 << 21


@dataclass(frozen=True)
class Allocation:
    """One candidate per unit, and what is known about its quality.

    Attributes:
        choice: int64 [U], index of the chosen candidate.
        loss: total loss, nbytes: total bytes.
        bound: no choice within the budget has a smaller loss than this.
        exact: ``loss`` is the optimum (up to ``TOLERANCE``, relative).
        method: which method found it.
    """

    choice: np.ndarray
    loss: float
    nbytes: int
    bound: float
    exact: bool
    method: str

    @property
    def gap(self) -> float:
        """How much better the optimum could be at most; 0 when exact."""
        return 0.0 if self.exact else max(0.0, self.loss - self.bound)


@dataclass(frozen=True)
class Item:
    """The undominated candidates of one unit: bytes rise strictly, losses fall strictly, the last loss is 0 (see ``Problem.offset``)."""

    index: np.ndarray  # int64 [c], column in the caller's table
    nbytes: np.ndarray  # int64 [c]
    loss: np.ndarray  # float64 [c]

    def take(self, keep: np.ndarray) -> Item:
        return Item(self.index[keep], self.nbytes[keep], self.loss[keep])


@dataclass(frozen=True)
class Problem:
    """A knapsack without its dominated candidates, losses shifted so that the best of each unit is 0."""

    items: list[Item]
    loss: np.ndarray  # float64 [U, F], as the caller gave it
    nbytes: np.ndarray  # int64 [U, F]
    offset: float  # sum of what was subtracted from the losses

    @staticmethod
    def of(loss, nbytes) -> Problem:
        """Checks the arrays and drops what no optimum needs. Raises PlanError for malformed arrays."""
        loss, nbytes = np.asarray(loss, np.float64), np.asarray(nbytes)
        asked = f"allocation of loss {loss.shape} and bytes {nbytes.shape}"
        if loss.ndim != 2 or loss.shape != nbytes.shape or 0 in loss.shape:
            raise PlanError(asked, "both must be [units, candidates] of one shape, with at least one of each",
                            "pass loss and nbytes of one cost table")
        if not np.issubdtype(nbytes.dtype, np.integer) or (nbytes < 0).any():
            raise PlanError(asked, f"bytes must be non-negative integers, found {nbytes.dtype} with minimum {nbytes.min()}",
                            "count bytes exactly")
        if np.isnan(loss).any() or (loss == -np.inf).any():
            raise PlanError(asked, "a loss is NaN or -inf", "losses are finite, or +inf for a candidate that cannot be chosen")
        if not np.isfinite(loss).any(axis=1).all():
            raise PlanError(asked, f"unit {int(np.argmin(np.isfinite(loss).any(axis=1)))} has no candidate of finite loss",
                            "allow it at least one")
        nbytes = nbytes.astype(np.int64)
        # All units at once: a model in column bands has tens of thousands of them.
        order = np.lexsort((loss, nbytes), axis=1)  # by bytes, then by loss
        m, sorted_loss = np.take_along_axis(nbytes, order, 1), np.take_along_axis(loss, order, 1)
        before = np.concatenate((np.full((len(loss), 1), np.inf), np.minimum.accumulate(sorted_loss, axis=1)[:, :-1]), axis=1)
        better = sorted_loss < before  # keep only what is better than everything that is no larger; +inf never is
        lowest = sorted_loss.min(axis=1)
        shifted = sorted_loss - lowest[:, None]
        items = [Item(o[k], x[k], y[k]) for o, x, y, k in zip(order, m, shifted, better, strict=True)]
        return Problem(items, loss, nbytes, math.fsum(lowest))

    @property
    def smallest(self) -> int:
        """Bytes of the smallest possible choice."""
        return sum(int(i.nbytes[0]) for i in self.items)

    def seconds(self, seconds) -> np.ndarray:
        """``seconds`` float64 [U, F] with +inf where a candidate cannot be chosen: the losses of a plan that is to be fast."""
        return np.where(np.isfinite(self.loss), seconds, np.inf)

    def require(self, budget: int) -> int:
        """``budget`` as an int. Raises BudgetError, with the shortfall, if even the smallest choice is larger."""
        budget, least = int(budget), self.smallest
        if budget < least:
            raise BudgetError(f"budget of {budget:,} bytes for {len(self.items)} units",
                              f"the smallest possible choice takes {least:,} bytes, {least - budget:,} more",
                              f"allow {least:,} bytes, or add smaller candidates")
        return budget

    def allocation(self, positions, bound: float, method: str, exact: bool | None = None) -> Allocation:
        """Result from one position per item; ``bound`` in shifted losses. ``exact=None``: decided by whether the bound is met."""
        choice = np.array([i.index[p] for i, p in zip(self.items, positions, strict=True)], dtype=np.int64)
        rows = np.arange(len(choice))
        loss = math.fsum(self.loss[rows, choice])
        shifted = math.fsum(i.loss[p] for i, p in zip(self.items, positions, strict=True))
        exact = bound >= shifted - TOLERANCE * max(shifted, abs(loss)) if exact is None else exact
        return Allocation(choice, loss, int(self.nbytes[rows, choice].sum()), loss if exact else min(loss, bound + self.offset), exact,
                          method)


class Steps:
    """The hull steps of a list of items by falling gain, and the relaxation that they make up.

    Step k turns item ``item[k]`` from candidate ``start[k]`` to ``stop[k]``, for ``dm[k]`` more bytes and ``ds[k]`` less loss (both
    positive). Every prefix of the steps is a valid choice, because gains fall strictly within an item.
    """

    def __init__(self, items: list[Item]):
        m, s, count = _padded(items)
        rows, at, last = np.arange(len(items)), np.zeros(len(items), dtype=np.int64), np.full(len(items), np.inf)
        found: list[tuple[np.ndarray, ...]] = []
        # Around the hulls of all items together: from each one's candidate to the later one of the best gain, the farthest of equals.
        for _ in range(m.shape[1] - 1):
            later = (np.arange(m.shape[1]) > at[:, None]) & (np.arange(m.shape[1]) < count[:, None])
            dm, ds = m - m[rows, at][:, None], s[rows, at][:, None] - s
            gain = np.where(later, ds / np.where(later, dm, 1), -1.0)
            stop = gain.shape[1] - 1 - gain[:, ::-1].argmax(axis=1)
            live = np.flatnonzero(gain[rows, stop] > 0)
            if not len(live):
                break
            stop = stop[live]
            # Rounding could make a later gain of an item exceed an earlier one by a unit in the last place: the order must hold.
            last[live] = np.minimum(last[live], gain[live, stop])
            found.append((last[live], live, at[live], stop, dm[live, stop], ds[live, stop]))
            at[live] = stop
        columns = [np.concatenate([f[k] for f in found]) if found else np.empty(0) for k in range(6)]
        order = np.argsort(-columns[0], kind="stable")  # stable, so the steps of an item stay in order
        self.gain, self.ds = (columns[k][order].astype(np.float64) for k in (0, 5))
        self.item, self.start, self.stop, self.dm = (columns[k][order].astype(np.int64) for k in (1, 2, 3, 4))
        self.base = int(m[:, 0].sum()) if len(items) else 0

    def relaxation(self, mask: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(extra bytes, loss) after 0, 1, 2, ... steps, of all items or of those whose steps ``mask`` picks.

        The least loss at x extra bytes is at least ``np.interp(x, *relaxation)``. Losses are summed from the last step backwards: in
        that direction all terms are positive and nothing cancels, however large the loss at the smallest choice may be.
        """
        dm, ds = self.dm[mask], self.ds[mask]
        return np.concatenate(([0], np.cumsum(dm))), np.concatenate((np.cumsum(ds[::-1])[::-1], [0.0]))

    def positions(self, count: int, items: int, mask: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Candidate position per item, int64 [items], after the first ``count`` steps (of those that ``mask`` picks)."""
        out = np.zeros(items, dtype=np.int64)
        out[self.item[mask][:count]] = self.stop[mask][:count]  # later steps overwrite earlier ones of the same item
        return out


def _padded(items: list[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes int64 [U, W], losses float64 [U, W], candidates of each int64 [U]); a row is filled up with its last candidate."""
    count = np.array([len(i.index) for i in items], dtype=np.int64)
    if not len(items):
        return np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1)), count
    ends = np.cumsum(count)
    flat = (ends - count)[:, None] + np.minimum(np.arange(count.max()), count[:, None] - 1)
    return np.concatenate([i.nbytes for i in items])[flat], np.concatenate([i.loss for i in items])[flat], count


def _loss(items: list[Item], positions) -> float:
    return math.fsum(i.loss[p] for i, p in zip(items, positions, strict=True))


def _fill(items: list[Item], steps: Steps, budget: int) -> np.ndarray:
    """Feasible positions, int64 [U]: hull steps by falling gain while they fit, then whatever still fits, best loss drop first."""
    positions = np.zeros(len(items), dtype=np.int64)
    room, blocked = budget - steps.base, np.zeros(len(items), dtype=bool)
    for u, stop, dm in zip(steps.item.tolist(), steps.stop.tolist(), steps.dm.tolist(), strict=True):
        if dm <= room and not blocked[u]:
            positions[u], room = stop, room - dm
        else:
            blocked[u] = True  # the later steps of this item start from the one that was not taken
    m, s, count = _padded(items)
    rows = np.arange(len(items))
    while True:
        # The largest candidate that fits is the best that fits: losses fall with bytes.
        best = np.minimum((m <= (m[rows, positions] + room)[:, None]).sum(axis=1), count) - 1
        drop = s[rows, positions] - s[rows, best]
        u = int(drop.argmax())
        if drop[u] <= 0:
            return positions
        room -= int(m[u, best[u]] - m[u, positions[u]])
        positions[u] = best[u]


def lagrangian(loss, nbytes, budget: int) -> Allocation:
    """The relaxation's break point, filled greedily. Off by at most one unit's step; ``bound`` is the relaxation's."""
    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    steps = Steps(p.items)
    bound = float(np.interp(budget - steps.base, *steps.relaxation()))
    return p.allocation(_fill(p.items, steps, budget), bound, "lagrangian")


def greedy(loss, nbytes, budget: int) -> Allocation:
    """From the smallest choice on, always the upgrade that fits and saves most loss per byte, until none fits.

    Unlike :func:`lagrangian` it may jump over candidates, and it judges by what still fits; neither is better in general.
    """
    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    width = max(len(i.index) for i in p.items)
    m = np.full((len(p.items), width), np.iinfo(np.int64).max // 2)  # padding never fits
    s = np.zeros((len(p.items), width))
    for u, item in enumerate(p.items):
        m[u, : len(item.index)], s[u, : len(item.index)] = item.nbytes, item.loss
    rows, positions = np.arange(len(p.items)), np.zeros(len(p.items), dtype=np.int64)
    room = budget - p.smallest
    dm, ds = m - m[:, :1], s[:, :1] - s
    while True:
        gain = np.where((dm > 0) & (dm <= room), ds / np.maximum(dm, 1), -1.0)
        u, c = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[u, c] < 0:
            break
        room -= int(dm[u, c])
        positions[u] = c
        dm[u], ds[u] = m[u] - m[u, c], s[u, c] - s[u]
    assert room == budget - int(m[rows, positions].sum())
    steps = Steps(p.items)
    return p.allocation(positions, float(np.interp(budget - steps.base, *steps.relaxation())), "greedy")


def _fix(items: list[Item], steps: Steps, budget: int, best: float) -> list[np.ndarray]:
    """Per item, the positions that a choice better than ``best`` may use.

    With a multiplier on bytes the reduced cost of a candidate is how far its ``loss + multiplier * bytes`` lies above its unit's least; any
    choice that uses the candidate loses at least the Lagrangian bound plus that. The multiplier is the gain at which the relaxation's
    budget ends.
    """
    extra, least = steps.relaxation()
    room = budget - steps.base
    k = int(np.searchsorted(extra, room, side="right")) - 1
    multiplier = steps.gain[k] if k < len(steps.gain) else 0.0
    bound = float(np.interp(room, extra, least))
    m, s, count = _padded(items)
    cost = s + multiplier * (m - m[:, :1])
    alive = (bound + (cost - cost.min(axis=1, keepdims=True)) < best * (1 - TOLERANCE)) & (np.arange(m.shape[1]) < count[:, None])
    return [np.flatnonzero(row) for row in alive]


def _core(items: list[Item], steps: Steps, budget: int, size: int = CORE) -> list[Item]:
    """The items with all but those of the ``size`` steps around the relaxation's break held where the relaxation has them.

    A change of an item near the break costs least per byte. What is found among these is nearly always so close to the optimum that reduced
    costs then decide almost all other items (Pisinger's core).
    """
    k = int(np.searchsorted(steps.relaxation()[0], budget - steps.base, side="right")) - 1
    held = steps.positions(k, len(items))
    free = set(steps.item[max(0, k - size // 2) : k + size // 2].tolist())
    return [i if u in free else i.take(held[u : u + 1]) for u, i in enumerate(items)]


def dp(loss, nbytes, budget: int, *, max_states: int = MAX_STATES) -> Allocation:
    """Exact: dynamic programming over bytes that visits only totals which can still lead to something better.

    After r units the state of a partial choice is (bytes, loss). Of two states the one that is both larger and worse is dropped. A
    state is also dropped if the relaxation of the remaining units cannot take it below the best choice known so far, and the same
    walk along the hull completes each state to a whole choice, which is how that best one keeps improving. Before that, candidates
    are removed by dominance and by Lagrangian reduced cost (Pisinger 1995). Totals are exact integers, never rounded to a grid: that
    bytes come in multiples of some step is used in one place only, to round the budget down to a total that can be reached.

    If more than ``max_states`` states survive a unit, those with the best bounds go on. The best bound among the dropped then limits
    what may have been missed: ``exact`` is False unless the result meets it, and ``bound`` and ``gap`` say how far off it can be.
    """
    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    # Every reachable total is the smallest one plus a multiple of the common step, so the budget may be one as well.
    step = int(np.gcd.reduce(np.concatenate([i.nbytes - i.nbytes[0] for i in p.items])))
    budget = p.smallest + ((budget - p.smallest) // step * step if step else 0)

    steps = Steps(p.items)
    best = _fill(p.items, steps, budget)
    best_loss = _loss(p.items, best)
    kept = _fix(p.items, steps, budget, best_loss)
    if sum(len(k) > 1 for k in kept) > CORE:
        core = _core(p.items, steps, budget)
        found, _ = _search(core, budget, best_loss, max_states)
        if found is not None:
            best = np.array([int(np.flatnonzero(i.index == c.index[f])[0]) for i, c, f in zip(p.items, core, found, strict=True)])
            best_loss = _loss(p.items, best)
            kept = _fix(p.items, steps, budget, best_loss)
    if any(len(k) == 0 for k in kept):  # some unit has no candidate left that could improve on `best`, so nothing does
        return p.allocation(best, best_loss, "dp", True)
    found, missed = _search([i.take(k) for i, k in zip(p.items, kept, strict=True)], budget, best_loss, max_states)
    if found is not None:
        best = [int(k[f]) for k, f in zip(kept, found, strict=True)]
        best_loss = _loss(p.items, best)
    return p.allocation(best, min(best_loss, missed), "dp")


def _search(items: list[Item], budget: int, limit: float, max_states: int) -> tuple[np.ndarray | None, float]:
    """Best positions [U] of loss below ``limit``, or None if there are none; and the smallest bound of any state that was given up."""
    # Units with one candidate are part of the state to start from. Among the others, units of large steps come first: while there are few
    # states, the hull walk over the small ones completes each to almost exactly the budget, so that good choices are known early.
    free = sorted((u for u, i in enumerate(items) if len(i.index) > 1), key=lambda u: -int(items[u].nbytes[-1] - items[u].nbytes[0]))
    walk = [Item(items[u].index, items[u].nbytes, items[u].loss - items[u].loss[-1]) for u in free]
    nbytes = np.array([sum(int(i.nbytes[0]) for i in items if len(i.index) == 1)])
    loss = np.array([math.fsum(i.loss[-1] for i in items)])  # the relaxation takes the last loss of every unit to be 0
    steps, rest = Steps(walk), sum(int(i.nbytes[0]) for i in walk)
    history: list[np.ndarray] = []  # per unit: for every state, parent state * candidates + candidate
    found, missed = None, math.inf

    for t, item in enumerate(walk):
        rest -= int(item.nbytes[0])
        extra, least = steps.relaxation(steps.item > t)
        m, s = (nbytes[:, None] + item.nbytes).ravel(), (loss[:, None] + item.loss).ravel()
        room = budget - rest - m
        origin = np.flatnonzero(room >= 0)
        m, s, room = m[origin], s[origin], room[origin]
        if len(origin):
            count = np.searchsorted(extra, room, side="right") - 1
            whole = s + least[count]
            w = int(whole.argmin())
            if whole[w] < limit * (1 - TOLERANCE):
                limit, found = float(whole[w]), (t, int(origin[w]), int(count[w]))
        bound = s + np.interp(room, extra, least)
        alive = np.flatnonzero(bound < limit * (1 - TOLERANCE))
        alive = alive[np.lexsort((s[alive], m[alive]))]  # by bytes, then by loss
        before = np.concatenate(([np.inf], np.minimum.accumulate(s[alive])[:-1]))
        alive = alive[s[alive] < before]  # better than every state that is no larger
        if len(alive) > max_states:
            rank = np.argpartition(bound[alive], max_states)
            missed = min(missed, float(bound[alive[rank[max_states:]]].min()))
            alive = alive[np.sort(rank[:max_states])]
        nbytes, loss = m[alive], s[alive]
        history.append(origin[alive].astype(np.int32 if len(bound) < 2**31 else np.int64))
        if not len(alive):
            break

    if found is None:
        return None, missed
    t, flat, count = found
    chosen = steps.positions(count, len(walk), steps.item > t)
    for u in range(t, -1, -1):
        parent, chosen[u] = divmod(flat, len(walk[u].index))
        flat = int(history[u - 1][parent]) if u else 0
    positions = np.zeros(len(items), dtype=np.int64)
    positions[free] = chosen
    return positions, missed


def milp(loss, nbytes, budget: int, *, seconds=None, max_seconds: float | None = None, time_limit: float | None = None, gap: float = 0.0) -> Allocation:
    """scipy's HiGHS on the integer program, from the unreduced table: a check of :func:`dp` that shares none of its reasoning.

    Args:
        seconds: float [U, F] >= 0, and ``max_seconds``: a second constraint, ``sum_u seconds[u, c_u] <= max_seconds``.
        time_limit: seconds that HiGHS may take; gap: relative gap at which it may stop.

    Bytes are counted from the smallest candidate in units of their common step, which is exact. HiGHS itself works with tolerances:
    if its rounded solution exceeds a limit it runs again with less, and the result is not called exact. Raises BudgetError if no choice is
    within both limits, with the least time that the bytes allow; MxqError if HiGHS finds no solution (within ``time_limit``, when given).
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as highs
    from scipy.sparse import csr_array

    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    possible = np.isfinite(p.loss)
    unit, column = np.nonzero(possible)
    lowest = np.where(possible, p.nbytes, np.iinfo(np.int64).max).min(axis=1)
    m, s = (p.nbytes - lowest[:, None])[possible], (p.loss - np.where(possible, p.loss, np.inf).min(axis=1, keepdims=True))[possible]
    t = None if seconds is None else _seconds(p, seconds, max_seconds)[possible]
    step = max(1, int(np.gcd.reduce(m)))
    # HiGHS stops at an absolute gap of 1e-6: losses are scaled so that this is a millionth of a millionth of the largest.
    scale = 1e6 / s.max() if s.max() > 0 else 1.0
    one = csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(len(p.loss), len(unit)))
    room, ticks, bound, clean = (budget - int(lowest.sum())) // step, 1.0, -math.inf, True
    while True:
        limits = [LinearConstraint(one, 1, 1), LinearConstraint(csr_array(m[None, :] / step), -np.inf, room)]
        if t is not None:
            limits.append(LinearConstraint(csr_array(t[None, :] / max_seconds), -np.inf, ticks))
        options = {"mip_rel_gap": gap} | ({} if time_limit is None else {"time_limit": time_limit})
        r = highs(s * scale, constraints=limits, integrality=np.ones(len(s)), bounds=Bounds(0, 1), options=options)
        if r.x is None:
            if r.status == 2 and t is not None:
                fast = milp(p.seconds(seconds), p.nbytes, budget)  # the least time within the same bytes
                if fast.loss > max_seconds:
                    raise BudgetError(f"{budget:,} bytes and {1e3 * max_seconds:.6g} ms for {len(p.loss)} units",
                                      f"the fastest choice of that size takes {1e3 * fast.loss:.6g} ms", "allow more time, fewer bytes, or faster candidates")
            raise MxqError(f"milp allocation of {len(p.loss)} units x {p.loss.shape[1]} candidates",
                           f"HiGHS gave no solution ({r.message})", "use method='dp'" if t is None else "allow a little more time or bytes")
        bound = float(r.mip_dual_bound) / scale if clean else bound
        picked = np.flatnonzero(r.x > 0.5)
        over = int(m[picked].sum()) - (budget - int(lowest.sum()))
        late = 0.0 if t is None else math.fsum(t[picked]) / max_seconds - 1
        if over <= 0 and late <= 0:
            break
        room, ticks, clean = room - max(0, -(-over // step)), ticks - max(0.0, 2 * late), False
    choice = np.empty(len(p.loss), dtype=np.int64)
    choice[unit[picked]] = column[picked]
    rows = np.arange(len(choice))
    total, least = math.fsum(p.loss[rows, choice]), math.fsum(np.where(possible, p.loss, np.inf).min(axis=1))
    exact = clean and r.status == 0 and gap == 0
    return Allocation(choice, total, int(p.nbytes[rows, choice].sum()), total if exact else min(total, least + bound), exact, "milp")


def _seconds(p: Problem, seconds, max_seconds: float | None) -> np.ndarray:
    """Checked times float64 [U, F]. Raises PlanError, BudgetError."""
    times = np.asarray(seconds, np.float64)
    if times.shape != p.loss.shape or not (times[np.isfinite(p.loss)] >= 0).all() or not np.isfinite(times[np.isfinite(p.loss)]).all():
        raise PlanError(f"times {times.shape} of {p.loss.shape} candidates", "each candidate that may be chosen needs a finite time >= 0",
                        "measure the missing ones with `mxq bench --table`")
    if max_seconds is None or not (math.isfinite(max_seconds) and max_seconds > 0):
        raise BudgetError(f"a time limit of {max_seconds}", "it is a positive number of seconds", "pass for example max_seconds=0.01")
    return times


def brute(loss, nbytes, budget: int) -> Allocation:
    """Every combination, the smaller of equally good ones. Raises PlanError beyond ``MAX_BRUTE`` combinations."""
    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    if p.loss.size and p.loss.shape[1] ** len(p.loss) > MAX_BRUTE:
        raise PlanError(f"brute force over {p.loss.shape[1]}^{len(p.loss)} combinations", f"at most {MAX_BRUTE:,} are tried",
                        "use method='dp'")
    m, s = np.zeros(1, dtype=np.int64), np.zeros(1)
    for mu, su in zip(p.nbytes, p.loss, strict=True):
        m, s = np.add.outer(m, mu).ravel(), np.add.outer(s, su).ravel()
    s = np.where(m <= budget, s, np.inf)
    best = int(np.lexsort((m, s))[0])
    choice = np.array(np.unravel_index(best, (p.loss.shape[1],) * len(p.loss)), dtype=np.int64)
    loss = math.fsum(p.loss[np.arange(len(choice)), choice])
    return Allocation(choice, loss, int(m[best]), loss, True, "brute")


METHODS = {"dp": dp, "milp": milp, "lagrangian": lagrangian, "greedy": greedy, "brute": brute}


class Hull:
    """The vertices of the Pareto front's lower convex hull, smallest first; choices are made when they are asked for.

    Attributes:
        nbytes: int64 [P], loss: float64 [P]. Steps of equal gain are separate points, so that the front is as fine as the relaxation is exact.
    """

    def __init__(self, loss, nbytes):
        self._problem = p = Problem.of(loss, nbytes)
        self._steps = steps = Steps(p.items)
        extra, least = steps.relaxation()
        self.nbytes, self.loss = steps.base + extra, least + p.offset

    def __len__(self) -> int:
        return len(self.nbytes)

    def choice(self, k: int) -> np.ndarray:
        """int64 [U]: candidate of each unit at point ``k``."""
        positions = self._steps.positions(range(len(self))[k], len(self._problem.items))
        return np.array([i.index[p] for i, p in zip(self._problem.items, positions, strict=True)], dtype=np.int64)


def full_front(loss, nbytes, max_states: int = MAX_STATES) -> list[tuple[int, float, np.ndarray]]:
    """(bytes, loss, choice [U]) of every Pareto-optimal choice, smallest first: the value function of the dynamic program.

    Raises PlanError once more than ``max_states`` partial choices are undominated; on a real table only few formats or units allow it.
    """
    p = Problem.of(loss, nbytes)
    m, s, history = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for u, item in enumerate(p.items):
        m, s = (m[:, None] + item.nbytes).ravel(), (s[:, None] + item.loss).ravel()
        alive = np.lexsort((s, m))
        before = np.concatenate(([np.inf], np.minimum.accumulate(s[alive])[:-1]))
        alive = alive[s[alive] < before]
        if len(alive) > max_states:
            raise PlanError(f"exact Pareto front of {len(p.items)} units",
                            f"after {u + 1} units there are {len(alive):,} undominated choices, over {max_states:,}",
                            "use the hull points (exact=False), or solve for the budgets of interest")
        history.append(alive)
        m, s = m[alive], s[alive]
    at, choice = np.arange(len(m)), np.empty((len(m), len(p.items)), dtype=np.int64)
    for u in range(len(p.items) - 1, -1, -1):
        at, c = np.divmod(history[u][at], len(p.items[u].index))
        choice[:, u] = p.items[u].index[c]
    return [(int(a), float(b) + p.offset, row) for a, b, row in zip(m, s, choice, strict=True)]

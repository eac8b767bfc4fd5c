"""CostTable + budget -> Plan, and the whole Pareto front: the knapsack of ``knapsack.py`` in the words of units and formats.

    plan = solve(table, bits=3.5)                      exact, from the average stored bits over all units of the table
    for point in pareto_front(table): ...              every trade between bytes and loss on the hull, in one call
    plan_of(table, point.choice)

Constraints: ``groups`` are lists of units that must share one format (q, k and v that share an input permutation, say);
``allowed`` narrows the candidates of single units or patterns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, MxqWarning, PlanError
from ..sensitivity.table import CostTable
from . import knapsack
from .knapsack import Allocation
from .rules import METHODS
from .schema import PATTERN, Plan, closest, compile_pattern

#: Relative gap at which HiGHS stops where it has two constraints: proving the last hundredth of a per cent takes minutes.
TIMED_GAP = 1e-4

Groups = Sequence[Sequence[str]]
Allowed = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class FrontPoint:
    """One point of the Pareto front: total bytes, total loss, and the candidate index of every unit, int64 [U]."""

    nbytes: int
    loss: float
    choice: np.ndarray


@dataclass(frozen=True)
class _Merged:
    """The table as the knapsack sees it: one row per unit or tie group."""

    loss: np.ndarray  # float64 [G, F]
    nbytes: np.ndarray  # int64 [G, F]
    row: np.ndarray  # int64 [U], which row decides for a unit
    seconds: np.ndarray | None  # float64 [G, F]


def _merge(table: CostTable, groups: Groups | None, allowed: Allowed | None) -> _Merged:
    """Applies the constraints. Raises PlanError for unknown names, overlapping groups, and constraints that leave nothing."""
    where = {n: i for i, n in enumerate(table.units)}

    def index(name, what):
        if name not in where:
            raise PlanError(f"{what} {name!r}", f"no unit of the cost table ({len(where)} units) has such a name",
                            closest(str(name), table.units))
        return where[name]

    loss = table.loss.copy()
    for name, formats in (allowed or {}).items():
        if isinstance(formats, str):
            raise PlanError(f"allowed formats of {name!r}: {formats!r}", "a list of formats is expected, found one string",
                            f"write [{formats!r}]")
        if name.startswith(PATTERN):
            pattern = compile_pattern(name)
            rows = [i for n, i in where.items() if pattern.fullmatch(n)]
            if not rows:
                raise PlanError(f"allowed formats of {name!r}", f"the pattern matches none of {len(where)} units",
                                closest(name, table.units))
        else:
            rows = [index(name, "allowed formats of")]
        banned = np.ones(len(table.formats), dtype=bool)
        banned[[table.column(f) for f in formats]] = False
        loss[np.ix_(rows, np.flatnonzero(banned))] = np.inf
        for i in rows:
            if not np.isfinite(loss[i]).any():
                raise PlanError(f"unit {table.units[i]}",
                                f"the allowed formats ({', '.join(formats) or 'none'}) leave it no possible candidate",
                                f"allow one of {', '.join(f for f, ok in zip(table.formats, table.possible[i], strict=True) if ok)}")

    leader, grouped = np.arange(len(where)), set()
    for number, group in enumerate(groups or ()):
        members = [index(n, f"group {number}:") for n in group]
        for i in members:
            if i in grouped:
                raise PlanError(f"group {number}: {table.units[i]!r}", "the unit is in two groups, or twice in one",
                                "list every unit once; merge groups that overlap")
            grouped.add(i)
        for i in members[1:]:
            leader[i] = members[0]
        if members and not np.isfinite(loss[members].sum(axis=0)).any():
            raise PlanError(f"group {number} ({', '.join(group)})", "no format is possible for all of its units",
                            "allow a common format, or split the group")
    leaders, row = np.unique(leader, return_inverse=True)
    merged_loss, merged_bytes = np.zeros((len(leaders), len(table.formats))), np.zeros((len(leaders), len(table.formats)), dtype=np.int64)
    np.add.at(merged_loss, row, loss)
    np.add.at(merged_bytes, row, table.nbytes)
    seconds = None
    if table.seconds is not None:
        seconds = np.zeros_like(merged_loss)
        np.add.at(seconds, row, table.seconds)
    return _Merged(merged_loss, merged_bytes, row, seconds)


def budget_bytes(table: CostTable, bits: float | None = None, nbytes: int | None = None) -> int:
    """The budget in bytes: ``nbytes``, or the floor of ``bits * weights / 8``.

    Raises BudgetError unless exactly one of the two is given, and is positive.
    """
    if (bits is None) == (nbytes is None):
        raise BudgetError(f"budget bits={bits}, nbytes={nbytes}", "exactly one of the two must be given",
                          "pass bits=3.5 (average stored bits) or nbytes=...")
    given = bits if nbytes is None else nbytes
    if isinstance(given, bool) or not isinstance(given, int | float | np.number) or not math.isfinite(given) or given <= 0:
        raise BudgetError(f"budget of {given!r} {'stored bits' if nbytes is None else 'bytes'}", "a budget is a positive, finite number",
                          "pass for example bits=3.5")
    if nbytes is not None:
        return int(nbytes)
    exact = float(bits) * int(table.numel.sum()) / 8
    # stored_bits() of a choice, given back as a budget, must allow that very choice whatever way its last bit was rounded.
    return round(exact) if abs(exact - round(exact)) <= 4 * np.spacing(exact) else math.floor(exact)


def warn_surplus(budget: int, most: int, said: Callable[[int], str]) -> None:
    """Warns if the largest candidates, of ``most`` bytes, leave over a hundredth of ``budget`` unused; always from this line, so that each is told once."""
    if budget > 1.01 * most:
        warnings.warn(f"a budget of {said(budget)}: the largest candidates take {said(most)}, and the rest stays unused; ask for less, or add a wider one",
                      MxqWarning, stacklevel=1)


def choose(table: CostTable, *, bits: float | None = None, nbytes: int | None = None, method: str = "dp", groups: Groups | None = None,
           allowed: Allowed | None = None, max_seconds: float | None = None) -> Allocation:
    """Best candidate per unit within a budget, with the proof of how good it is; see :class:`Allocation`.

    Args:
        bits: average stored bits over all units of the table; or ``nbytes``: total bytes.
        method: ``dp`` (exact, default), ``milp`` (exact, HiGHS), ``lagrangian``, ``greedy``, ``threshold``, ``nsga2``, ``brute``.
        groups: lists of unit names that must share one format.
        allowed: unit name or ``re:`` pattern -> candidates that it may take.
        max_seconds: also, the table's ``seconds`` must sum to at most this. The integer program decides then, whatever ``method`` says of an exact one.

    Raises BudgetError if nothing fits (with the shortfall in bytes and the smallest feasible stored bits), PlanError for unknown names.
    """
    if method not in METHODS:
        raise PlanError(f"allocation method {method!r}", f"the methods are {', '.join(METHODS)}", "use the default, dp")
    if max_seconds is not None and (table.seconds is None or method not in ("dp", "milp")):
        rule = "the cost table holds no times" if table.seconds is None else f"{method} knows one constraint only"
        raise PlanError(f"a plan of at most {1e3 * max_seconds:.6g} ms by {method}", rule, "measure times with `mxq bench --table`, and use the method milp")
    merged = _merge(table, groups, allowed)
    budget = budget_bytes(table, bits, nbytes)
    least = knapsack.Problem.of(merged.loss, merged.nbytes).smallest
    if budget < least:
        constrained = " under these constraints" if groups or allowed else ""
        asked_bits = table.stored_bits(budget) if bits is None else bits
        raise BudgetError(f"budget of {asked_bits:.6g} stored bits ({budget:,} bytes) for {len(table.units)} units",
                          f"the smallest choice of {', '.join(table.formats)}{constrained} takes {least:,} bytes, {least - budget:,} more",
                          f"allow at least {math.ceil(table.stored_bits(least) * 1e4) / 1e4:.4f} stored bits, or add a smaller candidate")
    if max_seconds is None:
        a = METHODS[method](merged.loss, merged.nbytes, budget)
    else:
        a = knapsack.milp(merged.loss, merged.nbytes, budget, seconds=merged.seconds, max_seconds=max_seconds, gap=TIMED_GAP)
    return Allocation(a.choice[merged.row], a.loss, a.nbytes, a.bound, a.exact, a.method)


def plan_of(table: CostTable, choice: Sequence[int] | np.ndarray, *, quantizer: dict | None = None, meta: dict | None = None) -> Plan:
    """The Plan that names every unit of the table.

    Its meta states the ``loss``, ``nbytes`` and ``stored_bits`` that the table predicts, and ``unit_loss`` by unit; ``meta`` comes on top.
    """
    loss, nbytes = table.total(choice)
    predicted = {"loss": loss, "nbytes": nbytes, "stored_bits": table.stored_bits(nbytes),
                 "unit_loss": {n: float(table.loss[u, c]) for u, (n, c) in enumerate(zip(table.units, choice, strict=True))}}
    units = {n: table.formats[c] for n, c in zip(table.units, choice, strict=True)}
    return Plan(units=units, meta=predicted | (meta or {}), **({} if quantizer is None else {"quantizer": quantizer}))


def solve(table: CostTable, *, bits: float | None = None, nbytes: int | None = None, method: str = "dp", groups: Groups | None = None,
          allowed: Allowed | None = None, max_seconds: float | None = None, quantizer: dict | None = None, meta: dict | None = None) -> Plan:
    """The Plan of :func:`choose`. Its meta has, beside those of :func:`plan_of`, ``allocation``: method, budget_bytes, bits, exact, gap.

    Warns of a budget that no choice of candidates can use up.
    """
    a = choose(table, bits=bits, nbytes=nbytes, method=method, groups=groups, allowed=allowed, max_seconds=max_seconds)
    most = int(np.where(np.isfinite(table.loss), table.nbytes, 0).max(1).sum())
    warn_surplus(budget_bytes(table, bits, nbytes), most, lambda size: f"{table.stored_bits(size):.6g} stored bits")
    how = {"method": a.method, "budget_bytes": budget_bytes(table, bits, nbytes), "bits": None if bits is None else float(bits),
           "exact": a.exact, "gap": a.gap}
    return plan_of(table, a.choice, quantizer=quantizer, meta={"allocation": how} | (meta or {}))


class Front(Sequence):
    """The hull of the trade between bytes and loss as a sequence of :class:`FrontPoint`, smallest first.

    Attributes:
        nbytes: int64 [P], loss: float64 [P]; rising and falling strictly. A point's choice is made when the point is taken out, so that a model in
            tens of thousands of bands has its front at once.
    """

    def __init__(self, hull: knapsack.Hull, row: np.ndarray):
        self.nbytes, self.loss, self._hull, self._row = hull.nbytes, hull.loss, hull, row

    def __len__(self) -> int:
        return len(self._hull)

    def __getitem__(self, k):
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        k = range(len(self))[k]
        return FrontPoint(int(self.nbytes[k]), float(self.loss[k]), self._hull.choice(k)[self._row])

    def within(self, nbytes: int) -> FrontPoint | None:
        """The best point of at most ``nbytes``, None if there is none."""
        k = int(np.searchsorted(self.nbytes, nbytes, side="right")) - 1
        return None if k < 0 else self[k]


def pareto_front(table: CostTable, *, exact: bool = False, groups: Groups | None = None,
                 allowed: Allowed | None = None) -> Sequence[FrontPoint]:
    """The trade between bytes and loss, smallest first; bytes rise and losses fall strictly.

    By default a :class:`Front`, the vertices of the front's convex hull: each is optimal for its own size, and between two of them at most one
    unit's step can be gained. ``exact=True`` lists every Pareto-optimal choice, and raises PlanError where those are too many.
    """
    merged = _merge(table, groups, allowed)
    if not exact:
        return Front(knapsack.Hull(merged.loss, merged.nbytes), merged.row)
    return [FrontPoint(m, s, choice[merged.row]) for m, s, choice in knapsack.full_front(merged.loss, merged.nbytes)]

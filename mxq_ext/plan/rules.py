"""The allocation rules of the literature beside the exact solvers of ``knapsack.py``, and the one table of all of them.

========== ============================================================================================================================
threshold  two widths next to the budget; the units of the largest gain per byte get the wider one (MixLLM, SFMP, CMPQ, PB-LLM). No search
nsga2      the genetic algorithm of KVTuner (Deb et al. 2002), on (loss, bytes), by pymoo: ``pip install mxq_ext[nsga]``
========== ============================================================================================================================

:func:`double_pointer` is SliM-LLM's search inside one layer. It asks for the true effect of each try, so it has a function instead of a table.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import BudgetError, MxqError, PlanError
from . import knapsack
from .knapsack import Allocation, Problem, Steps


def threshold(loss, nbytes, budget: int) -> Allocation:
    """All units get the widest candidate that fits for all; then units move to the next candidate by falling gain per byte, while they fit.

    Candidates are columns of the table in the order of their total bytes, those that some unit cannot have left out. With units of equal cost that
    is the quantile rule: importance above the (1 - p) quantile gets the wider width, p the share that the budget pays for; and it is then optimal
    for two widths. Raises BudgetError if no candidate fits for all units, PlanError if none is possible for all of them.
    """
    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    whole = np.flatnonzero(np.isfinite(p.loss).all(axis=0))
    if not len(whole):
        raise PlanError(f"threshold rule on {len(p.loss)} units", "no candidate is possible for all of them", "use another allocator, such as dp")
    size = p.nbytes.sum(axis=0)
    whole = whole[np.argsort(size[whole], kind="stable")]
    least = int(size[whole[0]])
    if least > budget:  # the smallest candidate of each unit may still fit, but that is no threshold
        raise BudgetError(f"budget of {budget:,} bytes for {len(p.loss)} units in one candidate",
                          f"the smallest for all of them takes {least:,} bytes, {least - budget:,} more", f"allow {least:,} bytes, or use dp")
    low = [c for c in whole if size[c] <= budget][-1]
    choice = np.full(len(p.loss), low)
    wider = [c for c in whole if size[c] > size[low]]
    if wider:
        high = wider[0]
        dm, ds = p.nbytes[:, high] - p.nbytes[:, low], p.loss[:, low] - p.loss[:, high]
        room = budget - int(size[low])
        for u in np.argsort(-ds / np.maximum(dm, 1), kind="stable"):
            if ds[u] > 0 and dm[u] <= room:
                choice[u], room = high, room - int(dm[u])
    return _result(p, choice, budget, "threshold")


def _result(p: Problem, choice: np.ndarray, budget: int, method: str) -> Allocation:
    """The Allocation of candidate indices int64 [U]; how far it may be from the optimum is what the relaxation says."""
    rows, steps = np.arange(len(choice)), Steps(p.items)
    bound = float(np.interp(budget - steps.base, *steps.relaxation())) + p.offset
    loss = float(p.loss[rows, choice].sum())
    exact = bound >= loss - knapsack.TOLERANCE * max(abs(loss), loss - p.offset)
    return Allocation(choice.astype(np.int64), loss, int(p.nbytes[rows, choice].sum()), min(bound, loss), exact, method)


def nsga2(loss, nbytes, budget: int, *, population: int = 100, generations: int = 200, seed: int = 0) -> Allocation:
    """NSGA-II over the candidates of each unit: objectives (loss, bytes), bytes at most ``budget``; the best feasible member of the last population.

    The first population is random but for the smallest choice, so that something always fits. For comparison with KVTuner and AMQ, which search so:
    the exact solver is faster and never worse. Raises MxqError without pymoo, BudgetError if nothing fits.
    """
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem as Search
        from pymoo.operators.crossover.ux import UniformCrossover
        from pymoo.operators.mutation.pm import PolynomialMutation
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.optimize import minimize
    except ImportError as e:
        raise MxqError("allocation method 'nsga2'", f"it needs pymoo, which cannot be imported ({e})",
                       "pip install 'mxq_ext[nsga]', or use dp, which is exact") from None
    p = Problem.of(loss, nbytes)
    budget = p.require(budget)
    # A gene counts the undominated candidates of its unit from the smallest on, so that neighbours are alike.
    m, s, count = knapsack._padded(p.items)
    rows = np.arange(len(m))

    class Choices(Search):
        def __init__(self):
            super().__init__(n_var=len(m), n_obj=2, n_ieq_constr=1, xl=np.zeros(len(m)), xu=np.maximum(count - 1, 0), vtype=int)

        def _evaluate(self, genes, out, *args, **kwargs):
            genes = np.asarray(genes, dtype=np.int64)
            size = m[rows, genes].sum(axis=1)
            out["F"] = np.column_stack((s[rows, genes].sum(axis=1), size / budget if budget else size))
            out["G"] = ((size - budget) / max(budget, 1))[:, None]

    first = np.random.default_rng(seed).integers(0, count, (population, len(m)))
    first[0] = 0
    algorithm = NSGA2(pop_size=population, sampling=first, crossover=UniformCrossover(repair=RoundingRepair()),
                      mutation=PolynomialMutation(vtype=float, repair=RoundingRepair()), eliminate_duplicates=True)
    last = minimize(Choices(), algorithm, ("n_gen", generations), seed=seed).pop
    genes = np.asarray(last.get("X"), dtype=np.int64)
    genes = np.concatenate((genes, np.zeros((1, len(m)), dtype=np.int64)))  # what the search began with is never lost
    fits = m[rows, genes].sum(axis=1) <= budget
    best = genes[fits][s[rows, genes[fits]].sum(axis=1).argmin()]
    return _result(p, np.array([i.index[g] for i, g in zip(p.items, best, strict=True)]), budget, "nsga2")


def double_pointer(salience, effect: Callable[[np.ndarray], float]) -> np.ndarray:
    """SliM-LLM's widths of the column groups of one layer: int64 [G] of -1, 0 and 1, as many of -1 as of 1.

    The i groups of the least ``salience`` [G] lose a bit, the i of the largest gain one, for i = 0, 1, ... while groups are left; the i of the least
    ``effect(widths)`` wins (in the paper the KL divergence of the layer's output), the smaller of equals. i = 0, which the authors' code leaves out,
    is tried too: a layer in which no exchange helps stays uniform.
    """
    order = np.argsort(np.asarray(salience, np.float64), kind="stable")
    best, least = None, np.inf
    for i in range(len(order) // 2 + 1):
        widths = np.zeros(len(order), dtype=np.int64)
        widths[order[:i]], widths[order[len(order) - i :]] = -1, 1
        value = effect(widths)
        if best is None or value < least:
            best, least = widths, value
    return best


#: name -> (loss [U, F], nbytes [U, F], budget) -> Allocation
METHODS = knapsack.METHODS | {"threshold": threshold, "nsga2": nsga2}

"""The allocation rules of the literature, and the integer program with a time limit, against every combination."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_allocate import big_table, problems

from mxq_ext.errors import BudgetError, MxqError, PlanError
from mxq_ext.plan import choose, knapsack, pareto_front
from mxq_ext.plan.rules import METHODS, double_pointer, nsga2, threshold
from mxq_ext.sensitivity.table import CostTable


@pytest.fixture
def bench_plan():
    """bench/plan.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_plan", Path(__file__).parents[1] / "bench" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_pymoo = pytest.mark.skipif(importlib.util.find_spec("pymoo") is None, reason="pymoo is not installed: pip install 'mxq_ext[nsga]'")


def everything(loss, nbytes):
    """(choices [C, U], losses [C], bytes [C]) of all combinations."""
    choices = np.array(list(itertools.product(range(loss.shape[1]), repeat=len(loss))))
    rows = np.arange(len(loss))
    return choices, loss[rows, choices].sum(axis=1), nbytes[rows, choices].sum(axis=1)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(2, 3), st.integers(1, 50), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_threshold_is_optimal_for_units_of_equal_cost(units, width, step, share, seed):
    """Among the two candidates around the budget, which is all that the rule looks at."""
    rng = np.random.default_rng(seed)
    nbytes = np.tile(np.sort(rng.choice(np.arange(1, 9), width, replace=False)) * step, (units, 1))
    loss = np.sort(rng.lognormal(0, 2, (units, width)), axis=1)[:, ::-1].copy()
    low, high = int(nbytes[:, 0].sum()), int(nbytes[:, -1].sum())
    budget = low + int(share * (high - low))
    a = threshold(loss, nbytes, budget)
    sizes = nbytes.sum(axis=0)
    c = max(i for i in range(width) if sizes[i] <= budget)
    pair = loss[:, c : c + 2], nbytes[:, c : c + 2]
    _, losses, total = everything(*pair)
    assert a.nbytes <= budget and a.loss == pytest.approx(losses[total <= budget].min(), rel=1e-9)
    _, losses, total = everything(loss, nbytes)
    assert a.bound <= losses[total <= budget].min() * (1 + 1e-9) and (not a.exact or a.loss <= losses[total <= budget].min() * (1 + 1e-9))


def test_threshold_with_nothing_to_threshold():
    with pytest.raises(BudgetError, match="takes 20 bytes"):  # 3 + 3 bytes would fit, but not one candidate for both units
        threshold(np.array([[1.0, 0.5], [1.0, 0.5]]), np.array([[3, 17], [17, 3]]), 19)
    with pytest.raises(PlanError, match="no candidate is possible for all"):
        threshold(np.array([[1.0, math.inf], [math.inf, 0.5]]), np.array([[1, 2], [1, 2]]), 9)


@settings(max_examples=120, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_the_integer_program_keeps_two_limits(problem, seed, share):
    loss, nbytes, budget = problem
    seconds = np.random.default_rng(seed).uniform(0.1, 3.0, loss.shape)
    _, losses, total = everything(loss, nbytes)
    times = everything(seconds, nbytes)[1]
    possible = np.isfinite(losses) & (total <= budget)
    assume(possible.any())
    limit = float(np.quantile(times[possible], share)) * (1 + 1e-9)
    a = knapsack.milp(loss, nbytes, budget, seconds=seconds, max_seconds=limit)
    rows = np.arange(len(loss))
    assert a.nbytes <= budget and seconds[rows, a.choice].sum() <= limit * (1 + 1e-9)
    want = losses[possible & (times <= limit)].min()
    assert a.loss == pytest.approx(want, rel=1e-6, abs=1e-6 * max(1.0, np.abs(loss[np.isfinite(loss)]).max()))


def test_a_time_that_cannot_be_kept_names_the_least():
    loss, nbytes, seconds = np.array([[2.0, 1.0]] * 3), np.array([[10, 20]] * 3), np.array([[4e-3, 1e-3]] * 3)
    with pytest.raises(BudgetError, match="the fastest choice of that size takes 9 ms"):  # one of three can be the fast, large one
        knapsack.milp(loss, nbytes, 45, seconds=seconds, max_seconds=8e-3)
    assert knapsack.milp(loss, nbytes, 45, seconds=seconds, max_seconds=9.1e-3).nbytes == 40
    for bad in (None, 0.0, math.nan):
        with pytest.raises(BudgetError, match="positive number of seconds"):
            knapsack.milp(loss, nbytes, 45, seconds=seconds, max_seconds=bad)
    with pytest.raises(PlanError, match="finite time"):
        knapsack.milp(loss, nbytes, 45, seconds=seconds * math.nan, max_seconds=1.0)


def test_choose_with_a_time_limit_and_groups():
    table = CostTable(["a", "b", "c"], ["w2g64", "w4g64", "w8"], np.array([[9.0, 3, 1]] * 3), np.array([[10, 20, 40]] * 3), np.array([40] * 3),
                      seconds=np.array([[1.0, 2, 1]] * 3))
    groups = [["a", "b"]]
    a = choose(table, nbytes=100, groups=groups, max_seconds=3.0)
    assert a.choice[0] == a.choice[1] and table.seconds[np.arange(3), a.choice].sum() <= 3.0
    best = min(table.total(c)[0] for c in itertools.product(range(3), repeat=3)
               if c[0] == c[1] and table.total(c)[1] <= 100 and sum(table.seconds[u, k] for u, k in enumerate(c)) <= 3.0)
    assert a.loss == pytest.approx(best)
    with pytest.raises(PlanError, match="greedy knows one constraint only"):
        choose(table, nbytes=100, method="greedy", max_seconds=3.0)
    table.seconds = None
    with pytest.raises(PlanError, match="holds no times"):
        choose(table, nbytes=100, max_seconds=3.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.floats(0.3, 3.0), st.integers(0, 2**32 - 1))
def test_double_pointer_is_the_best_balanced_exchange(groups, decay, seed):
    """For an effect that is a sum of salience x a falling convex function of the bits, no balanced assignment is better."""
    salience = np.random.default_rng(seed).lognormal(0, 2, groups)

    def effect(widths):
        return float((salience * np.exp(-decay * widths)).sum())

    got = double_pointer(salience, effect)
    assert (got == 1).sum() == (got == -1).sum()
    best = min(effect(np.array(w)) for w in itertools.product((-1, 0, 1), repeat=groups) if w.count(1) == w.count(-1))
    assert effect(got) == pytest.approx(best, rel=1e-12)


def test_double_pointer_follows_the_measured_effect():
    """Salience gives the order only: how many groups change places is the effect's to say."""
    salience = np.array([5.0, 1.0, 3.0, 4.0, 2.0])
    asked = []

    def effect(widths):
        asked.append(widths.tolist())
        return abs(int((widths == 1).sum()) - 1)

    assert double_pointer(salience, effect).tolist() == [1, -1, 0, 0, 0]
    assert asked == [[0, 0, 0, 0, 0], [1, -1, 0, 0, 0], [1, -1, 0, 1, -1]]


@needs_pymoo
@settings(max_examples=15, deadline=None)
@given(problems(), st.integers(0, 1000))
def test_nsga2_finds_small_optima(problem, seed):
    loss, nbytes, budget = problem
    a, best = nsga2(loss, nbytes, budget, population=60, generations=25, seed=seed), knapsack.brute(loss, nbytes, budget)
    assert a.nbytes <= budget and a.bound <= best.loss + 1e-9 and a.loss >= best.loss - 1e-9
    assert a.loss == pytest.approx(best.loss, rel=1e-6, abs=1e-6)


@needs_pymoo
def test_nsga2_improves_on_where_it_starts():
    rng = np.random.default_rng(0)
    nbytes = np.sort(rng.integers(1, 1000, (30, 5)), axis=1)
    loss = np.sort(rng.lognormal(0, 1, (30, 5)), axis=1)[:, ::-1].copy()
    budget = int(nbytes[:, 2].sum())
    a, b = nsga2(loss, nbytes, budget, generations=5), nsga2(loss, nbytes, budget, generations=80)
    exact = knapsack.dp(loss, nbytes, budget)
    assert loss[:, 0].sum() > a.loss > b.loss >= exact.loss and b.loss < 1.25 * exact.loss


def test_nsga2_without_pymoo_says_how_to_get_it(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "pymoo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(MxqError, match=r"pip install 'mxq_ext\[nsga\]'"):
        nsga2(np.ones((2, 2)), np.ones((2, 2), dtype=np.int64), 5)


def test_every_method_is_reached_by_name():
    table = big_table(7)
    for name in set(METHODS) - {"nsga2"}:
        a = choose(table, bits=3.3, method=name)
        assert a.method == name and a.nbytes <= 3.3 * table.numel.sum() / 8
    with pytest.raises(PlanError, match="threshold"):
        choose(table, bits=3.3, method="simplex")


@settings(max_examples=80, deadline=None)
@given(problems())
def test_every_point_of_the_sweep_is_optimal_for_its_own_size(problem):
    loss, nbytes, _ = problem
    hull, rows = knapsack.Hull(loss, nbytes), np.arange(len(loss))
    for k in range(len(hull)):
        choice, best = hull.choice(k), knapsack.brute(loss, nbytes, int(hull.nbytes[k]))
        assert hull.loss[k] == pytest.approx(best.loss, rel=1e-9, abs=1e-9) == pytest.approx(float(loss[rows, choice].sum()), rel=1e-9, abs=1e-9)
        assert int(nbytes[rows, choice].sum()) == hull.nbytes[k]


def test_the_front_makes_choices_when_asked():
    table = big_table(9)
    front = pareto_front(table)
    assert len(front) == len(front.nbytes) == len(front.loss) and (np.diff(front.nbytes) > 0).all() and (np.diff(front.loss) < 0).all()
    for k in (0, 5, -1):
        loss, nbytes = table.total(front[k].choice)
        assert loss == pytest.approx(front.loss[k], rel=1e-9) and nbytes == front.nbytes[k] == front[k].nbytes
    assert [p.nbytes for p in front[2:6]] == front.nbytes[2:6].tolist()
    budget = int(front.nbytes[7]) + 1
    assert front.within(budget).nbytes == front.nbytes[7] and front.within(int(front.nbytes[0]) - 1) is None


@pytest.mark.parametrize(("bands", "method"), [(1, "dp"), (1, "milp with a time limit"), (64, "dp"), (64, "lagrangian")])
def test_a_hundred_billion_weights_in_linears_and_in_column_bands(bench_plan, bands, method):
    """600 linears, and 600 x 64 column bands, by 8 candidates; on an idle core a plan takes 0.02 to 1 s and a front 0.3 s, here with room for a busy one."""
    table = bench_plan.synthetic(bands=bands)
    limit = None
    if "time" in method:
        limit = 0.9 * float(table.seconds[np.arange(len(table.units)), choose(table, bits=3.5).choice].sum())
    seconds, a = bench_plan.timed(lambda: choose(table, bits=3.5, method=method.split()[0], max_seconds=limit), 1)
    assert seconds < 10 and a.nbytes <= 3.5 * table.numel.sum() / 8 and a.gap <= 2e-4 * a.loss
    assert method != "dp" or a.exact
    if limit is not None:
        assert table.seconds[np.arange(len(table.units)), a.choice].sum() <= limit * (1 + 1e-9)
    seconds, front = bench_plan.timed(lambda: pareto_front(table), 1)
    assert seconds < 20 and (np.diff(front.nbytes) > 0).all()
    point = front.within(int(3.5 * table.numel.sum() / 8))
    if limit is None:
        assert a.loss <= point.loss < a.loss * 1.01

"""The knapsack against every combination, against HiGHS, and against the clock; budgets, constraints and the front."""

import itertools
import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxq_ext.errors import BudgetError, MxqError, MxqWarning, PlanError
from mxq_ext.formats import Format
from mxq_ext.plan import choose, knapsack, pareto_front, plan_of, solve
from mxq_ext.plan.allocate import budget_bytes
from mxq_ext.sensitivity.table import CostTable

BIG = ("w2g64", "w2g32_asym", "w3g128", "w3g64", "w4g128", "w4g64", "nf4g32", "w8")


def big_table(units=600, seed=0):
    """A model of 206 billion weights (hidden 12288), with losses that fall fourfold per bit around a log-normal sensitivity."""
    rng = np.random.default_rng(seed)
    shapes = list(itertools.islice(itertools.cycle([(12288, 12288)] * 4 + [(49152, 12288)] * 2 + [(12288, 49152)]), units))
    numel = np.array([n * k for n, k in shapes])
    nbytes = np.array([[Format.parse(f).nbytes(*s) for f in BIG] for s in shapes])
    sensitivity = rng.lognormal(0, 1.5, (units, 1)) * numel[:, None] / 1e8
    loss = sensitivity * 4.0 ** (-8 * nbytes / numel[:, None]) * rng.lognormal(0, 0.1, nbytes.shape)
    return CostTable([f"model.layers.{i // 7}.m{i % 7}" for i in range(units)], list(BIG), loss, nbytes, numel)


def by_hand(loss, nbytes, budget):
    """Least loss by a plain walk over all combinations; None if nothing fits."""
    best = None
    for choice in itertools.product(*(range(len(row)) for row in loss)):
        m = sum(int(nbytes[u][c]) for u, c in enumerate(choice))
        s = math.fsum(loss[u][c] for u, c in enumerate(choice))
        if m <= budget and math.isfinite(s) and (best is None or s < best):
            best = s
    return best


@st.composite
def problems(draw):
    u, f = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    unit = draw(st.sampled_from([1, 3, 64]))
    # Few distinct values on purpose: ties, dominated and duplicate candidates and rising losses must all occur.
    sizes = st.integers(0, draw(st.sampled_from([3, 12, 1000])))
    losses = st.one_of(st.integers(-2, 8).map(float), st.floats(0, 10, allow_nan=False), st.just(math.inf))
    nbytes = np.array(draw(st.lists(st.lists(sizes, min_size=f, max_size=f), min_size=u, max_size=u)), dtype=np.int64) * unit
    loss = np.array(draw(st.lists(st.lists(losses, min_size=f, max_size=f), min_size=u, max_size=u)))
    for row in range(u):
        if not np.isfinite(loss[row]).any():
            loss[row, draw(st.integers(0, f - 1))] = 1.0
    low = int(np.where(np.isfinite(loss), nbytes, 1 << 40).min(axis=1).sum())
    high = int(nbytes.max(axis=1).sum())
    return loss, nbytes, draw(st.integers(low, max(low, high) + 2))


def check(a, loss, nbytes, budget):
    rows = np.arange(len(loss))
    assert a.nbytes == nbytes[rows, a.choice].sum() <= budget
    assert a.loss == pytest.approx(loss[rows, a.choice].sum(), abs=1e-9)
    assert a.bound <= a.loss and a.gap >= 0 and (not a.exact or a.gap == 0)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_dp_equals_every_combination(problem):
    loss, nbytes, budget = problem
    best = by_hand(loss, nbytes, budget)
    for method in (knapsack.dp, knapsack.brute):
        a = method(loss, nbytes, budget)
        check(a, loss, nbytes, budget)
        assert a.exact and a.loss == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_heuristics_stay_within_their_bounds(problem):
    loss, nbytes, budget = problem
    best = by_hand(loss, nbytes, budget)
    for method in (knapsack.lagrangian, knapsack.greedy, lambda *p: knapsack.dp(*p, max_states=1)):
        a = method(loss, nbytes, budget)
        check(a, loss, nbytes, budget)
        assert a.bound <= best + 1e-9 <= a.loss + 2e-9
        assert not a.exact or a.loss == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["random", "convex", "correlated", "lattice"])
def test_dp_equals_highs(kind, seed):
    rng = np.random.default_rng(seed)
    u, f = 30, 6
    nbytes = np.sort(rng.integers(1, 10**6, (u, f)), axis=1)
    loss = {"random": lambda: rng.random((u, f)), "convex": lambda: rng.lognormal(0, 2, (u, 1)) * 4.0 ** (-8e-6 * nbytes),
            "correlated": lambda: 1.2 - nbytes / 1e6 + rng.uniform(-0.1, 0.1, (u, f)), "lattice": lambda: rng.random((u, f))}[kind]()
    if kind == "lattice":
        nbytes = rng.integers(1, 9, (u, f)) * 4096 + 17
    budget = int(np.quantile(nbytes, 0.2 + 0.08 * seed, axis=1).sum())
    a, h = knapsack.dp(loss, nbytes, budget), knapsack.milp(loss, nbytes, budget)
    check(a, loss, nbytes, budget)
    check(h, loss, nbytes, budget)
    assert a.exact and a.loss == pytest.approx(h.loss, rel=1e-9, abs=1e-12)
    assert knapsack.lagrangian(loss, nbytes, budget).bound <= a.loss + 1e-12
    assert min(knapsack.lagrangian(loss, nbytes, budget).loss, knapsack.greedy(loss, nbytes, budget).loss) >= a.loss - 1e-12


@pytest.mark.parametrize("bits", [2.3, 3.0, 3.7, 4.25, 7.0])
def test_hundred_billion_weights_in_seconds(bits):
    table = big_table()
    start = time.perf_counter()
    a = choose(table, bits=bits)
    assert time.perf_counter() - start < 10
    assert a.exact and a.nbytes <= bits * table.numel.sum() / 8
    fill = choose(table, bits=bits, method="lagrangian")
    # The relaxation proves from outside how good it is: with 600 units the optimum lies within a thousandth of its bound.
    assert fill.bound <= a.loss <= fill.loss and a.loss - fill.bound < 1e-3 * a.loss


def test_whole_front_of_a_hundred_billion_weights():
    table = big_table()
    start = time.perf_counter()
    front = pareto_front(table)
    assert time.perf_counter() - start < 10 and len(front) > 2000
    assert front[0].nbytes == table.nbytes.min(axis=1).sum()
    assert front[-1].loss == pytest.approx(table.loss.min(axis=1).sum())
    for a, b in itertools.pairwise(front):
        assert a.nbytes < b.nbytes and a.loss > b.loss
    for p in front[::331]:
        assert table.total(p.choice) == (pytest.approx(p.loss, rel=1e-9), p.nbytes)
        assert choose(table, nbytes=p.nbytes).loss == pytest.approx(p.loss, rel=1e-9)  # a vertex is the optimum of its own size


def test_more_states_than_allowed_is_said_not_hidden():
    rng = np.random.default_rng(0)
    nbytes = np.sort(rng.integers(1, 10**11, (60, 8)), axis=1)
    loss = (10**11 - nbytes).astype(float)  # subset sum: every total is Pareto-optimal, the worst that there is
    budget = int(nbytes.mean(axis=1).sum())
    a = knapsack.dp(loss, nbytes, budget, max_states=16)
    check(a, loss, nbytes, budget)
    assert not a.exact and a.loss >= a.bound >= loss.min(axis=1).sum() and a.gap == a.loss - a.bound > 0
    assert knapsack.dp(loss, nbytes, budget).loss <= a.loss


def test_an_enormous_loss_at_the_smallest_choice_costs_no_accuracy():
    nbytes = np.tile([1, 2, 3, 4], (8, 1)) * 1000
    loss = np.array([1e12, 3e-6, 2e-6, 1e-6]) * np.arange(1, 9)[:, None] ** 1.5
    for budget in range(16000, 33000, 1000):
        assert knapsack.dp(loss, nbytes, budget).loss == pytest.approx(knapsack.brute(loss, nbytes, budget).loss, rel=1e-12)


# -- budgets ----------------------------------------------------------------------------------------------------------------------


def small_table(units=4):
    formats = ["w2g64", "w3g64", "w4g64", "w8"]
    nbytes = np.array([[Format.parse(f).nbytes(64, 64 * (u + 1)) for f in formats] for u in range(units)])
    loss = np.array([[8.0, 3.0, 1.0, 0.0]]) * np.array([[u + 1.0] for u in range(units)])
    numel = [64 * 64 * (u + 1) for u in range(units)]
    return CostTable([f"model.layers.{u}.mlp.up_proj" for u in range(units)], formats, loss, nbytes, numel)


@pytest.mark.parametrize("fmt", ["w2g64", "w3g64", "w4g64", "w8"])
def test_the_stored_bits_of_a_uniform_plan_are_a_budget_for_it(fmt):
    table = small_table()
    loss, nbytes = table.uniform(fmt)
    bits = table.stored_bits(nbytes)
    assert budget_bytes(table, bits=bits) == nbytes
    assert choose(table, bits=bits).loss <= loss
    assert budget_bytes(table, bits=bits - 1e-9) == nbytes - 1


def test_stored_bits_given_back_as_a_budget_lose_no_byte():
    rng = np.random.default_rng(0)
    rounded_down = 0
    for _ in range(2000):
        numel, nbytes = int(rng.integers(10**8, 10**11)), int(rng.integers(10**7, 10**11))
        table = CostTable(["a"], ["w4g64"], [[0.0]], [[nbytes]], [numel])
        assert budget_bytes(table, bits=table.stored_bits(nbytes)) == nbytes
        rounded_down += math.floor(table.stored_bits(nbytes) * numel / 8) < nbytes
    assert rounded_down > 0  # the plain floor does lose one for some of them


def test_highs_solution_over_the_budget_is_not_passed_on(monkeypatch):
    import scipy.optimize

    real, rooms = scipy.optimize.milp, []

    def tolerant(c, *, constraints, **kwargs):
        """HiGHS as if its tolerances allowed one step more than the budget, the first time."""
        one, weight = constraints
        rooms.append(float(np.max(weight.ub)))
        return real(c, constraints=[one, scipy.optimize.LinearConstraint(weight.A, -np.inf, weight.ub + (len(rooms) == 1))], **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", tolerant)
    loss, nbytes = np.array([[5.0, 3.0, 0.0], [5.0, 2.0, 0.0]]), np.array([[1, 2, 3], [1, 2, 3]])
    a = knapsack.milp(loss, nbytes, 3)  # one step more would allow 4 bytes
    assert rooms == [1.0, 0.0] and a.nbytes <= 3 and not a.exact and a.bound <= 7.0 <= a.loss


def test_a_budget_above_all_candidates_is_told():
    table = big_table(units=3)
    most = table.stored_bits(int(table.nbytes.max(1).sum()))
    with pytest.warns(MxqWarning, match=f"a budget of 99 stored bits: the largest candidates take {most:.6g} stored bits, and the rest stays unused"):
        plan = solve(table, bits=99)
    assert plan.meta["stored_bits"] <= most
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(table, bits=most)


def test_infeasible_budget_says_by_how_much():
    table = small_table()
    least = int(table.nbytes.min(axis=1).sum())
    with pytest.raises(BudgetError) as e:
        solve(table, bits=1.5)
    short = least - int(1.5 * 40960 / 8)
    text = str(e.value)
    assert "budget of 1.5 stored bits (7,680 bytes) for 4 units" in text
    assert f"takes {least:,} bytes, {short:,} more" in text and "w2g64" in text
    bits = float(text.split("allow at least ")[1].split()[0])
    assert choose(table, bits=bits).nbytes == least  # the advice works
    with pytest.raises(BudgetError, match=r"1 more"):
        solve(table, nbytes=least - 1)
    with pytest.raises(BudgetError, match=r"takes 3 bytes, 1 more.*allow 3 bytes"):
        knapsack.dp(np.zeros((1, 1)), np.array([[3]]), 2)


@pytest.mark.parametrize("budget", [{}, {"bits": 3.0, "nbytes": 10**6}, {"bits": 0}, {"bits": -1.0}, {"bits": math.nan}, {"bits": math.inf},
                                    {"nbytes": 0}, {"bits": "3"}, {"bits": True}])
def test_senseless_budgets(budget):
    with pytest.raises(BudgetError):
        solve(small_table(), **budget)


@pytest.mark.parametrize(("loss", "nbytes", "rule"), [
    (np.zeros((2, 2)), np.zeros((2, 3), int), "one shape"), (np.zeros(3), np.zeros(3, int), "one shape"),
    (np.zeros((0, 2)), np.zeros((0, 2), int), "at least one"), (np.zeros((1, 1)), np.zeros((1, 1)), "integers"),
    (np.zeros((1, 1)), np.array([[-1]]), "non-negative"), (np.array([[np.nan]]), np.array([[1]]), "NaN"),
    (np.array([[0.0], [np.inf]]), np.ones((2, 1), int), "unit 1 has no candidate")])
def test_malformed_arrays(loss, nbytes, rule):
    with pytest.raises(PlanError, match=rule):
        knapsack.dp(loss, nbytes, 100)


def test_too_large_for_brute_and_no_time_for_highs():
    with pytest.raises(PlanError, match="8\\^600"):
        choose(big_table(), bits=4, method="brute")
    with pytest.raises(PlanError, match="methods are dp, milp"):
        choose(small_table(), bits=4, method="annealing")
    rng = np.random.default_rng(0)
    with pytest.raises(MxqError, match="no solution"):
        knapsack.milp(rng.random((400, 20)), rng.integers(1, 10**9, (400, 20)), 10**11, time_limit=0.0)


# -- constraints and plans -----------------------------------------------------------------------------------------------------


def constrained_by_hand(table, budget, groups, allowed):
    best, rank = math.inf, {n: i for i, n in enumerate(table.units)}
    for choice in itertools.product(range(len(table.formats)), repeat=len(table.units)):
        split = any(len({choice[rank[n]] for n in g}) > 1 for g in groups)
        if split or any(table.formats[choice[rank[n]]] not in f for n, f in allowed.items()):
            continue
        loss, nbytes = table.total(np.array(choice))
        if nbytes <= budget:
            best = min(best, loss)
    return best


@pytest.mark.parametrize("bits", [2.9, 3.5, 4.1, 5.5, 8.25])
@pytest.mark.parametrize("method", ["dp", "milp"])
def test_groups_and_allowed_formats(bits, method):
    table = small_table()
    a, b, c, d = table.units
    groups, allowed = [[a, c]], {d: ["w3g64", "w8"]}
    got = choose(table, bits=bits, groups=groups, allowed=allowed, method=method)
    assert got.choice[0] == got.choice[2] and table.formats[got.choice[3]] in ("w3g64", "w8")
    assert table.total(got.choice) == (pytest.approx(got.loss), got.nbytes)
    assert got.loss == pytest.approx(constrained_by_hand(table, budget_bytes(table, bits=bits), groups, allowed))


def test_constraints_hold_along_the_front():
    table = small_table()
    front = pareto_front(table, groups=[table.units[:2]], allowed={"re:.*layers\\.[23].*": ["w4g64", "w8"]})
    assert len(front) > 3
    for p in front:
        assert p.choice[0] == p.choice[1] and set(p.choice[2:]) <= {2, 3}
    # An upgrade by two formats takes one step where the one between is not on the hull.
    assert {int(p.choice[3]) for p in front} == {2, 3}


@pytest.mark.parametrize(("kwargs", "rule"), [
    ({"groups": [["model.layers.0.mlp.up_porj"]]}, "did you mean model.layers.0.mlp.up_proj"),
    ({"groups": [["model.layers.0.mlp.up_proj"] * 2]}, "twice in one"),
    ({"groups": [["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]]}, "in two groups"),
    ({"allowed": {"re:.*down": ["w8"]}}, "matches none of 4 units"),
    ({"allowed": {"model.layers.0.mlp.up_proj": "w8"}}, "found one string"),
    ({"allowed": {"model.layers.0.mlp.up_proj": []}}, "allow one of w2g64, w3g64, w4g64, w8"),
    ({"allowed": {"model.layers.0.mlp.up_proj": ["w4g32"]}}, "its candidates are w2g64"),
    ({"groups": [["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]],
      "allowed": {"model.layers.0.mlp.up_proj": ["w2g64"], "model.layers.1.mlp.up_proj": ["w8"]}}, "no format is possible for all"),
])
def test_constraints_that_cannot_hold(kwargs, rule):
    with pytest.raises(PlanError, match=rule):
        choose(small_table(), bits=4, **kwargs)


def test_infeasible_under_constraints_names_them():
    with pytest.raises(BudgetError, match="under these constraints takes"):
        choose(small_table(), bits=3, allowed={"re:.*": ["w8"]})


def test_solve_gives_a_plan_that_says_how_it_was_found():
    table = small_table()
    plan = solve(table, bits=3.5, quantizer={"name": "rtn"}, meta={"note": "n"})
    a = choose(table, bits=3.5)
    assert plan.units == {n: table.formats[c] for n, c in zip(table.units, a.choice, strict=True)} and plan.default is None
    assert plan.quantizer == {"name": "rtn"} and plan.meta["note"] == "n"
    assert (plan.meta["loss"], plan.meta["nbytes"]) == table.total(a.choice) and plan.meta["stored_bits"] <= 3.5
    assert plan.meta["allocation"] == {"method": "dp", "budget_bytes": 17920, "bits": 3.5, "exact": True, "gap": 0.0}
    with pytest.raises(PlanError, match="4 indices in 0..3"):
        plan_of(table, [0, 1, 2, 4])


def test_exact_front_is_every_pareto_optimum():
    table = small_table()
    totals = {}
    for choice in itertools.product(range(4), repeat=4):
        loss, nbytes = table.total(np.array(choice))
        totals[nbytes] = min(loss, totals.get(nbytes, math.inf))
    optimal = [(m, s) for m, s in sorted(totals.items()) if all(s < t for n, t in totals.items() if n < m)]
    exact, hull = pareto_front(table, exact=True), pareto_front(table)
    assert [p.nbytes for p in exact] == [m for m, _ in optimal] and [p.loss for p in exact] == pytest.approx([s for _, s in optimal])
    assert {(p.nbytes, round(p.loss, 9)) for p in hull} <= {(p.nbytes, round(p.loss, 9)) for p in exact} and len(hull) < len(exact)
    for p in exact:
        assert table.total(p.choice) == (pytest.approx(p.loss), p.nbytes)
    with pytest.raises(PlanError, match="undominated choices, over 32,768"):
        nbytes = np.random.default_rng(0).integers(0, 10**9, (40, 4))
        knapsack.full_front(1e9 - nbytes, nbytes)  # every total is optimal for its size


def test_greedy_jumps_where_the_walk_would_stall():
    # From 1 byte the upgrade to 2 bytes saves most per byte only until 4 bytes no longer fits: both must end feasible and maximal.
    loss, nbytes = np.array([[10.0, 4.0, 0.0], [9.0, 8.0, 1.0]]), np.array([[1, 2, 4], [1, 2, 3]])
    for budget in range(2, 8):
        a = knapsack.greedy(loss, nbytes, budget)
        check(a, loss, nbytes, budget)
        room = budget - a.nbytes
        for u, c in enumerate(a.choice):  # no single upgrade that still fits is left over
            better = (nbytes[u] <= nbytes[u, c] + room) & (loss[u] < loss[u, c])
            assert not better.any()

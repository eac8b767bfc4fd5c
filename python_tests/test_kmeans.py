"""Exact weighted k-means: against brute force on tiny rows, an O(k n^2) program on longer ones, and Lloyd's iteration."""

import itertools

import numpy as np
import pytest
import torch

from mxq_ext.quantizers import quantize
from mxq_ext.quantizers.kmeans import kmeans_table, table_codes


def cost(w, f, table):
    """sum f (w - nearest entry)^2 per row, float64."""
    d = (w.double()[:, :, None] - table.double()[:, None, :]).square().amin(-1)
    return (d * f.double().expand_as(w)).sum(1)


def optimum(w, f, levels):
    """Least cost of one row by the textbook dynamic program over all interval starts, float64."""
    order = np.argsort(w, kind="stable")
    x, f = w[order].astype(np.float64), f[order].astype(np.float64)
    n = len(x)
    within = np.zeros((n + 1, n + 1))
    for i in range(n):
        for j in range(i + 1, n + 1):
            part, weight = x[i:j], f[i:j]
            within[i, j] = (weight * (part - (part * weight).sum() / weight.sum()) ** 2).sum()
    best = within[0].copy()
    for _ in range(levels - 1):
        best = np.array([min(best[i] + within[i, j] for i in range(j + 1)) for j in range(n + 1)])
    return best[n]


def lloyd(w, f, levels, rounds=100):
    """SqueezeLLM's way: quantile start, then Lloyd's iteration."""
    table = torch.quantile(w.double(), torch.linspace(0, 1, levels, dtype=torch.float64), dim=1).T.contiguous()
    for _ in range(rounds):
        codes = (w.double()[:, :, None] - table[:, None, :]).abs().argmin(-1)
        mass = torch.zeros_like(table).scatter_add_(1, codes, f.double().expand_as(w).contiguous())
        sums = torch.zeros_like(table).scatter_add_(1, codes, (f * w).double())
        table = torch.where(mass > 0, sums / mass.clamp(min=1e-300), table).sort(1).values
    return table


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [4, 8])
def test_equals_every_partition_on_tiny_rows(levels, weighted):
    g = torch.Generator().manual_seed(levels)
    n = levels + 4
    w, f = torch.randn(6, n, generator=g), torch.rand(6, n, generator=g) ** 3 if weighted else torch.ones(6, n)
    got = cost(w, f, kmeans_table(w, f if weighted else None, levels))
    for r in range(6):
        order = w[r].argsort()
        x, h = w[r][order].double(), f[r][order].double()
        best = min(
            sum(float((h[a:b] * (x[a:b] - (h[a:b] * x[a:b]).sum() / h[a:b].sum()) ** 2).sum()) for a, b in itertools.pairwise((0, *cut, n)))
            for cut in itertools.combinations(range(1, n), levels - 1))
        assert float(got[r]) == pytest.approx(best, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("n", [16, 17, 31, 63, 64, 65, 97])
@pytest.mark.parametrize("kind", ["normal", "heavy", "lumps"])
def test_equals_the_quadratic_program(n, kind):
    g = torch.Generator().manual_seed(n)
    w = torch.randn(3, n, generator=g)
    if kind == "heavy":
        w = w.sign() * w.abs() ** 4
    if kind == "lumps":
        w = (w * 3).round() / 3  # many equal values
    f = torch.rand(3, n, generator=g) ** (6 if kind == "heavy" else 1) + 1e-6
    for levels in (4, 8, 16):
        got = cost(w, f, kmeans_table(w, f, levels))
        want = [optimum(w[r].numpy(), f[r].numpy(), levels) for r in range(3)]
        assert got.numpy() == pytest.approx(np.array(want), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_never_worse_than_lloyd_and_a_fixed_point_of_it(levels):
    g = torch.Generator().manual_seed(7)
    w, f = torch.randn(24, 300, generator=g), torch.rand(24, 300, generator=g) ** 2
    exact = kmeans_table(w, f, levels)
    a, b = cost(w, f, exact), cost(w, f, lloyd(w, f, levels))
    print(f"{levels} levels: Lloyd from quantiles is {float((b / a).mean()) - 1:.2%} above the optimum")
    assert (a <= b * (1 + 1e-6)).all() and float(a.sum()) < float(b.sum())
    codes = table_codes(w, exact).long()
    for level in range(levels):
        mask = (codes == level) * f
        centre = (mask * w).sum(1) / mask.sum(1)
        assert torch.allclose(centre, exact[:, level], atol=1e-4)


def test_tables_ascend_and_codes_are_nearest_with_ties_to_the_lower():
    g = torch.Generator().manual_seed(3)
    w = torch.randn(9, 130, generator=g)
    q = quantize(w, "lut3", method="kmeans")
    r = q.rectangles[0]
    table = r.tensors["table"].float()
    assert (table[:, 1:] >= table[:, :-1]).all() and r.tensors["table"].dtype == torch.float16
    d = (w[:, :, None] - table[:, None, :]).abs()
    assert torch.allclose((q.dequantize() - w).abs(), d.amin(-1), atol=1e-7)
    assert table_codes(torch.tensor([[0.5, 1.0, 1.5]]), torch.tensor([[0.0, 1.0, 2.0, 2.0]])).tolist() == [[0, 1, 1]]


def test_fewer_values_than_levels_are_exact():
    w = torch.tensor([[1.0, -2.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.25, 8.0]])
    for name in ("lut2", "lut3", "lut4"):
        q = quantize(w, name, method="kmeans")
        assert torch.equal(q.dequantize(), w)
        assert torch.isfinite(q.rectangles[0].tensors["table"]).all()
    one = quantize(torch.tensor([[3.0]]), "lut4", method="kmeans")
    assert one.dequantize().item() == 3.0


def test_weights_decide_and_zero_weights_still_find_a_place():
    w = torch.tensor([[0.0, 0.1, 0.2, 10.0, 20.0, 30.0]])
    f = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    q = quantize(w, "lut2", method="kmeans", fisher=f)
    assert torch.allclose(q.dequantize()[0, :4], w[0, :4], atol=1e-2), "what counts is served first"
    assert q.info["weighted_by"] == "fisher"
    nothing = quantize(w, "lut2", method="kmeans", fisher=f * 0)
    assert torch.equal(nothing.dequantize(), quantize(w, "lut2", method="kmeans").dequantize())
    assert nothing.info["weighted_by"] == "fisher"


def test_hessian_diagonal_is_the_fallback_weighting():
    g = torch.Generator().manual_seed(5)
    w, d = torch.randn(6, 80, generator=g), torch.rand(80, generator=g) ** 4
    q = quantize(w, "lut3", method="kmeans", hessian=torch.diag(d))
    assert q.info["weighted_by"] == "hessian"
    plain = quantize(w, "lut3", method="kmeans").dequantize()
    assert float(((q.dequantize() - w).square() * d).sum()) < float(((plain - w).square() * d).sum())


def test_threads_do_not_change_the_tables():
    g = torch.Generator().manual_seed(6)
    w = torch.randn(200, 400, generator=g)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kmeans_table(w, None, 8)
        torch.set_num_threads(2)
        assert torch.equal(one, kmeans_table(w, None, 8))
    finally:
        torch.set_num_threads(before)

"""Scores of rows, columns, tiles and elements against plain loops."""

import pytest
import torch

from mxq_ext.sensitivity import lines


@pytest.fixture
def layer():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(40, 9, generator=g) @ torch.randn(9, 9, generator=g)
    return torch.randn(6, 9, generator=g), 0.1 * torch.randn(6, 9, generator=g), x, x.T @ x / 40


def test_column_salience_is_that_of_the_columns_not_yet_fixed(layer):
    """U_jj^2 = [(H_{j:,j:})^-1]_jj, each inverse taken by itself; a dead column counts as if its input had unit power."""
    weight, _, _, h = layer
    h[:, 4] = h[4, :] = 0
    damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(9, dtype=torch.float64)
    damped[4, 4] = 1
    want = [float(weight[:, j].double().square().sum() / torch.linalg.inv(damped[j:, j:])[0, 0]) for j in range(9)]
    assert lines.column_salience(weight, h).tolist() == pytest.approx(want, rel=1e-5)


def test_errors_of_columns_and_rows_are_those_of_the_outputs(layer):
    weight, delta, x, h = layer
    y = x.double() @ delta.double().T
    assert lines.row_error(delta, h).tolist() == pytest.approx(y.square().mean(0).tolist(), rel=1e-4)
    alone = [float((x[:, j : j + 1] @ delta[:, j : j + 1].T).square().sum(1).mean()) for j in range(9)]  # the error of one column alone
    assert lines.column_error(delta, h).tolist() == pytest.approx(alone, rel=1e-4)
    assert lines.column_norm(h).tolist() == pytest.approx([float(x[:, j].norm()) / 40**0.5 for j in range(9)], rel=1e-4)


def test_row_taylor_is_first_and_second_order_with_the_whole_fisher(layer):
    _, delta, x, _ = layer
    gradients = [torch.randn(40, 6, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    products = torch.stack([lines.row_products(delta, x, g) for g in gradients])
    weight_gradients = torch.stack([g.T @ x for g in gradients]).double()  # [windows, N, K]
    for i in range(6):
        d, g = delta[i].double(), weight_gradients[:, i]
        fisher = sum(torch.outer(w, w) for w in g) / 3
        assert float(lines.row_taylor(products)[i]) == pytest.approx(abs(float(g.mean(0) @ d + 0.5 * d @ fisher @ d)), rel=1e-3)


def test_tiles_are_summed_in_the_order_of_the_sums_of_rows_and_columns():
    f = torch.rand(7, 10, generator=torch.Generator().manual_seed(2))
    rows, cols, sums = lines.tile_sums(f, (3, 4))
    assert rows.tolist() == sorted(range(7), key=lambda i: float(f[i].sum())) and cols.tolist() == sorted(range(10), key=lambda j: float(f[:, j].sum()))
    want = [[sum(float(f[i, j]) for i in rows[a : a + 3] for j in cols[b : b + 4]) for b in (0, 4, 8)] for a in (0, 3, 6)]
    assert sums.dtype == torch.float64 and [row.tolist() for row in sums] == [pytest.approx(row) for row in want]


def test_outliers_lie_beyond_the_quartiles():
    w = torch.arange(1.0, 101.0).view(10, 10)
    score = lines.outlier_score(w)
    assert float(score[0, 0]) == pytest.approx((25.75 - 1) / 49.5) and float(score[9, 9]) == pytest.approx((100 - 75.25) / 49.5)
    assert (score[3:7] == 0).all()
    w[4, 4] = -1000
    mask = lines.largest(lines.outlier_score(w), 3)
    assert mask.sum() == 3 and mask[4, 4] and mask[0, 0] and mask[9, 9]
    assert torch.isfinite(lines.outlier_score(torch.zeros(3, 3))).all() and lines.largest(w, 0).sum() == 0


def test_leaving_one_out_saves_what_a_new_fit_saves():
    w = torch.randn(5, 75, generator=torch.Generator().manual_seed(3))
    w[0, 3], w[1, 40:42] = 9.0, -7.0  # an outlier, and two alike at one end
    w[2, :32] = 0.5
    price = torch.rand(75, generator=torch.Generator().manual_seed(4))

    def error(x, p):
        step = (x.max() - x.min()) / 7
        q = x if step == 0 else ((x - x.min()) / step).round() * step + x.min()
        return float((p * (q - x).square()).sum())

    got = lines.outlier_gain(w, price, 3, 32)
    for i in range(5):
        for j in range(75):
            own = slice(j // 32 * 32, min(75, j // 32 * 32 + 32))
            x, p, keep = w[i, own].double(), price[own].double(), torch.arange(75)[own] != j
            assert float(got[i, j]) == pytest.approx(error(x, p) - error(x[keep], p[keep]), rel=1e-3, abs=1e-4)
    assert int(got[0].argmax()) == 3 and float(got[2, :32].abs().max()) == 0
    assert lines.outlier_gain(w[:, :65], price[:65], 3, 32)[:, 64].abs().max() == 0, "a group of one loses nothing"
    assert lines.outlier_unit(w, price) == pytest.approx(sum(float(w[:, j].var() * price[j]) for j in range(75)) / 75, rel=1e-4)

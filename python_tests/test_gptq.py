"""GPTQ: the factor against the paper's inverse, the sweep against a plain transcription of the paper, and the repairs."""

import pytest
import torch

from mxq_ext.errors import QuantizationError, ShapeError
from mxq_ext.formats import Format
from mxq_ext.quantizers import HessianFactor, gptq, prepare_hessian, quantize
from mxq_ext.quantizers.grid import make_grid

PLAIN = {"clip": "none", "refit": False, "cd_passes": 0}  # the paper's algorithm and nothing else


def correlated(n: int, k: int, seed: int):
    """A weight [n, k] and the second moment [k, k] of inputs with a few strong directions and uneven channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, max(1, k // 4), generator=g)
    x = torch.randn(8 * k, mix.shape[1], generator=g) @ mix.T / mix.shape[1] ** 0.5 + 0.4 * torch.randn(8 * k, k, generator=g)
    x = x * torch.exp(0.7 * torch.randn(k, generator=g))
    return 0.05 * torch.randn(n, k, generator=g), x.T @ x / (8 * k)


def output_error(w, restored, h):
    d, w, h = (restored - w).double(), w.double(), h.double()
    return float(torch.trace(d @ h @ d.T) / torch.trace(w @ h @ w.T))


def paper(w, h, damp, order, quantize_column):
    """Frantar et al. 2023 as written: U from the Cholesky factor of the inverse, updates pushed to all later columns. float64."""
    w, h = w.double()[:, order].clone(), h.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    q = torch.empty_like(w)
    for t in range(w.shape[1]):
        q[:, t] = quantize_column(int(order[t]), w[:, t])
        w[:, t + 1 :] -= torch.outer((w[:, t] - q[:, t]) / u[t, t], u[t, t + 1 :])
    out = torch.empty_like(q)
    out[:, order] = q
    return out.float()


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_is_the_paper_s_inverse(act_order):
    _, h = correlated(1, 41, 0)
    f = prepare_hessian(h, 0.01, act_order)
    order = f.order if act_order else torch.arange(41)
    if act_order:
        assert (h.diagonal()[order][1:] <= h.diagonal()[order][:-1]).all()
    hd = (h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(41, dtype=torch.float64))[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(hd), upper=True)
    for j in range(41):
        left = torch.linalg.inv(hd[j:, j:])[0, 0]
        assert float(u[j, j] ** 2) == pytest.approx(float(left), rel=1e-8), "U_jj^2 = [(H_{j:,j:})^-1]_jj"
        assert 1 / float(f.price[j]) == pytest.approx(float(left), rel=1e-4)
    v = f.feedback.T.double()
    assert torch.allclose(v @ torch.diag(f.price.double()) @ v.T, hd, rtol=1e-4, atol=1e-5 * float(hd.abs().max()))
    assert torch.equal(torch.diag(f.feedback), torch.ones(41)) and float(f.feedback.triu(1).abs().max()) == 0
    assert torch.allclose(f.damped()[order][:, order].double(), hd, rtol=1e-5)


@pytest.mark.parametrize("name", ["w2", "w3g32", "w4g32_asym", "w4g64_fz", "w8", "nf4g32", "w3g32_nest"])
@pytest.mark.parametrize("k", [97, 300])  # within a block of 128 and across blocks
def test_matches_a_plain_transcription_of_the_paper(name, k):
    w, h = correlated(6, k, 1)
    fmt = Format.parse(name)
    grid = make_grid(w, fmt, exact_constants=False)
    levels = torch.stack([grid.decode(torch.full_like(w, c, dtype=torch.uint8)) for c in range(fmt.levels)]).double()

    def column(j, x):
        return levels[(levels[:, :, j] - x).abs().argmin(0), torch.arange(6), j]

    order = torch.sort(h.diagonal(), descending=True, stable=True).indices
    want = paper(w, h, 0.01, order, column)
    got = quantize(w, name, hessian=h, act_order=True, **PLAIN).dequantize()
    same = float((got == want).float().mean())
    print(f"{name} K={k}: {same:.2%} of the weights equal the transcription")
    # A near tie falls the other way in float32 now and then, and then moves the later columns of its row.
    assert same > 0.9
    assert output_error(w, got, h) == pytest.approx(output_error(w, want, h), rel=0.05)


@pytest.mark.parametrize("name", ["w2g32_asym", "w3g64", "w4_fz", "w8", "nf4g32", "w3g32_nest"])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_rtn_exactly_when_inputs_are_uncorrelated(name, act_order):
    w, _ = correlated(7, 150, 2)
    h = torch.diag(torch.rand(150, generator=torch.Generator().manual_seed(0)) + 0.1)
    w[:, 149] += 0.01  # the ragged group must not be one repeated value: RTN has a rule of its own for that
    a = quantize(w, name, hessian=h, act_order=act_order, **PLAIN)
    b = quantize(w, name, method="rtn", clip="none")
    for key, t in a.to_tensors().items():
        assert torch.equal(t, b.to_tensors()[key])


@pytest.mark.parametrize("name", ["w2g32_asym", "w3g32", "w4g32_fz", "nf4g32", "lut3", "w3g32_nest"])
def test_beats_rounding_on_correlated_inputs(name):
    ratios = []
    for seed in range(5):
        w, h = correlated(16, 128, seed)
        rtn = quantize(w, name, method="kmeans" if name == "lut3" else "rtn", hessian=h).info["output_error"]
        ratios.append(quantize(w, name, hessian=h, **PLAIN).info["output_error"] / rtn)
    print(name, [f"{r:.3f}" for r in ratios])
    assert sum(ratios) / len(ratios) < 0.75


@pytest.mark.parametrize("name", ["w2g32_asym", "w3g32", "w3g32_asym", "w4g32_fz", "w2g32_nest", "nf4g32", "lut2", "lut4", "w4"])
def test_each_refinement_lowers_the_error(name):
    w, h = correlated(16, 160, 9)
    # Heavy tails: clipping matters.
    w = w * torch.exp(0.5 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    f = prepare_hessian(h)
    damped = f.damped()

    def run(**options):
        q = quantize(w, name, hessian=f, **({"clip": "mse", "refit": False, "cd_passes": 0} | options))
        return output_error(w, q.dequantize(), damped)

    base, swept, refit, both = run(), run(cd_passes=1), run(refit=True), run(refit=True, cd_passes=3)
    print(f"{name}: gptq {base:.5f}, one pass {swept:.5f}, refit {refit:.5f}, both {both:.5f}")
    assert swept < base and refit < base and both < swept
    if not name.startswith("lut"):
        assert base < run(clip="none")


def test_coordinate_descent_ends_where_no_single_code_can_improve():
    w, h = correlated(4, 40, 3)
    fmt = Format.parse("w2g32_asym")
    f = prepare_hessian(h)
    grid = make_grid(w, fmt)
    codes = gptq.coordinate_descent(w, f.damped(), grid.encode(w), gptq._GridRounder(grid, None), passes=100)
    start = output_error(w, grid.decode(codes), f.damped())
    for row in range(4):
        for j in range(40):
            for c in range(4):
                other = codes.clone()
                other[row, j] = c
                assert output_error(w, grid.decode(other), f.damped()) >= start * (1 - 1e-5)


def test_refit_finds_the_least_squares_scale_of_a_single_group():
    w, h = correlated(5, 32, 4)
    f = prepare_hessian(h)
    fmt = Format.parse("w3g32_asym")
    grid = make_grid(w, fmt)
    codes = grid.encode(w)
    u = grid.units(codes).double()
    hd = f.damped().double()
    want = ((w.double() @ hd) * u).sum(1) / ((u @ hd) * u).sum(1)
    gptq.refit_scales(w, f.damped(), codes, grid)
    assert torch.allclose(grid.scales[:, 0].double(), want, rtol=2.0**-10)


@pytest.mark.parametrize("name", ["w3g32_asym", "w4g32_fz", "nf4g32", "w4g32_bf16"])
def test_refit_never_raises_the_error_of_a_row(name):
    """Scales of a few times 2^-24, the spacing of small fp16 numbers: the rounded optimum is often worse than what was there."""
    w, h = correlated(64, 64, 13)
    w = w / w.abs().amax(1, keepdim=True) * torch.linspace(1e-6, 2e-5, 64)[:, None]
    h = prepare_hessian(h).damped()
    grid = make_grid(w, Format.parse(name), clip="mse")
    codes = grid.encode(w)

    def rows():
        d = (grid.decode(codes) - w).double()
        return ((d @ h.double()) * d).sum(1)

    before, scales = rows(), grid.scales.clone()
    gptq.refit_scales(w, h, codes, grid)
    after = rows()
    assert (after <= before * (1 + 1e-4)).all() and float(after.sum()) < float(before.sum())
    assert not torch.equal(scales, grid.scales)
    half = torch.bfloat16 if "bf16" in name else torch.float16
    assert torch.equal(grid.scales, grid.scales.to(half).float()), "scales are stored numbers"


def test_the_search_weighs_columns_by_their_price():
    w, h = correlated(8, 96, 14)
    h[7] = h[:, 7] = 0
    for act_order in (False, True):
        f = prepare_hessian(h, act_order=act_order)
        price, order = f.importance(), f.order if act_order else torch.arange(96)
        assert torch.equal(price[order], torch.where(order == 7, 0.0, f.price)), "a dead column has none"
    grid = make_grid(w, Format.parse("w2g32_asym"), clip="mse", importance=price, exact_constants=False)
    q = quantize(w, "w2g32_asym", hessian=f, cd_passes=0, refit=False)
    assert torch.equal(q.rectangles[0].tensors["scales"].float(), grid.scales)
    assert not torch.equal(grid.scales, make_grid(w, Format.parse("w2g32_asym"), clip="mse", exact_constants=False).scales)


@pytest.mark.parametrize("act_order", [False, True])
def test_float_zeros_and_tables_reach_zero_error_when_it_is_possible(act_order):
    """A weight that lies on a grid is returned exactly."""
    _, h = correlated(1, 64, 5)
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (6, 64), generator=g)
    codes[:, 0], codes[:, 1], codes[:, 32], codes[:, 33] = 0, 15, 0, 15
    w = 0.25 * codes - 1.5
    for name in ("w4g32_fz", "w4g32_asym", "lut4"):
        q = quantize(w, name, hessian=h, act_order=act_order)
        assert torch.equal(q.dequantize(), w), name
        assert q.info["output_error"] == 0


def test_groups_are_refitted_when_reached_without_act_order():
    w, h = correlated(8, 128, 6)
    moving = quantize(w, "w3g32_asym", hessian=h, act_order=False, **PLAIN)
    first = make_grid(w, Format.parse("w3g32_asym"), exact_constants=False).scales
    scales = moving.rectangles[0].tensors["scales"].float()
    assert torch.equal(scales[:, 0], first[:, 0]), "nothing has moved yet in the first group"
    assert not torch.equal(scales[:, 1:], first[:, 1:])
    fixed = quantize(w, "w3g32_asym", hessian=h, act_order=True, **PLAIN)
    assert torch.equal(fixed.rectangles[0].tensors["scales"].float(), first)
    assert fixed.perm_cols is None, "static groups need no permutation on disk"


def test_groups_that_share_a_range_are_refitted_together():
    """Sixteen groups of 32 columns, then one and a half: without act-order the second range is fitted to weights that have moved."""
    w, h = correlated(8, 560, 6)
    fmt = Format.parse("w3g32_nest")
    first = make_grid(w, fmt, exact_constants=False)
    moving = quantize(w, fmt, hessian=h, act_order=False, **PLAIN).rectangles[0]
    assert torch.equal(moving.scales()[:, :16], first.scales[:, :16]) and torch.equal(moving.zeros()[:, :16], first.zeros[:, :16])
    assert not torch.equal(moving.tensors["scale_steps"][:, 1].float(), first.scale_range.steps[:, 1])
    fixed = quantize(w, fmt, hessian=h, act_order=True, **PLAIN).rectangles[0]
    assert torch.equal(fixed.scales(), first.scales) and torch.equal(fixed.zeros(), first.zeros)


def test_refit_of_nested_scales_takes_what_their_range_offers():
    w, h = correlated(16, 96, 13)
    h = prepare_hessian(h).damped()
    grid = make_grid(w, Format.parse("w3g32_nest"), clip="none")
    codes, before = grid.encode(w), grid.scales.clone()
    error = output_error(w, grid.decode(codes), h)
    gptq.refit_scales(w, h, codes, grid)
    assert output_error(w, grid.decode(codes), h) < error and not torch.equal(grid.scales, before)
    for values, r in ((grid.scales, grid.scale_range), (grid.zeros, grid.zero_range)):
        assert torch.equal(r.value(r.codes(values)), values)


@pytest.mark.parametrize(("name", "act_order"), [("w3g32_asym", True), ("w3g32_nest", True), ("w3", False), ("lut3", False), ("lut3", True)])
def test_exact_elements_pass_no_error_on(name, act_order):
    """The transcription of the paper, in which an exact element is its target; then the repairs, which may only help."""
    w, h = correlated(6, 97, 2)
    exact = torch.rand(w.shape, generator=torch.Generator().manual_seed(5)) < 0.04
    exact[0, 11] = True
    w[0, 11] = 3.0
    fmt, factor = Format.parse(name), prepare_hessian(h, act_order=act_order)
    # Levels that were found before any feedback, so that the transcription needs no fit of its own.
    if fmt.kind == "lut":
        table = gptq._lut(w, fmt, gptq.GptqOptions(**PLAIN), factor, exact)["table"]
        levels = table.T[:, :, None].expand(-1, -1, 97).double()
    else:
        grid = make_grid(w, fmt, importance=factor.importance(), exact_constants=False, exact=exact)
        levels = torch.stack([grid.decode(torch.full_like(w, c, dtype=torch.uint8)) for c in range(fmt.levels)]).double()
    order = factor.order if act_order else torch.arange(97)

    def column(j, x):
        return torch.where(exact[:, j], x, levels[(levels[:, :, j] - x).abs().argmin(0), torch.arange(6), j])

    want = paper(w, h, 0.01, order, column)
    q = quantize(w, name, hessian=factor, exact=exact, **PLAIN)
    same = float(((q.dequantize() - want).abs() <= 1e-5 + 2.0**-10 * want.abs()).float().mean())
    print(f"{name}: {same:.2%} of the weights equal the transcription")
    assert same > 0.9 and output_error(w, q.dequantize(), h) == pytest.approx(output_error(w, want, h), rel=0.05)
    assert torch.equal(exact.sum(1).int(), q.sparse.rowptr[1:] - q.sparse.rowptr[:-1])


@pytest.mark.parametrize("name", ["w3g32_asym", "w4g32_fz", "w3g32_nest", "nf4g32", "lut3"])
def test_exact_elements_are_repaired_with_the_others(name):
    w, h = correlated(16, 160, 9)
    exact = torch.rand(w.shape, generator=torch.Generator().manual_seed(6)) < 0.03
    w[exact] *= 8
    f = prepare_hessian(h)

    def run(**options):
        return output_error(w, quantize(w, name, hessian=f, exact=exact, **({"refit": False, "cd_passes": 0} | options)).dequantize(), f.damped())

    base, swept, refit, both = run(), run(cd_passes=1), run(refit=True), run(cd_passes=3, refit=True)
    plain = output_error(w, quantize(w, name, hessian=f).dequantize(), f.damped())
    print(f"{name}: {base:.5f}, one pass {swept:.5f}, refit {refit:.5f}, both {both:.5f}; none exact {plain:.5f}")
    assert swept < base and both < swept < plain
    assert refit <= base if Format.parse(name).nested else refit < base  # eight scales to choose from may hold no better one


def test_one_factor_serves_many_weights_and_formats():
    w, h = correlated(8, 96, 7)
    f = prepare_hessian(h, 0.05, act_order=False)
    for name in ("w2g32_asym", "w4", "lut3", "nf4g32"):
        a = quantize(w, name, hessian=f)
        b = quantize(w, name, hessian=h, damp=0.05, act_order=False)
        assert torch.equal(a.dequantize(), b.dequantize())
        assert a.info["damp"] == 0.05 and a.info["output_error"] == pytest.approx(b.info["output_error"], rel=1e-6)
    with pytest.raises(QuantizationError, match="with act_order=True: the given HessianFactor was made with act_order=False"):
        quantize(w, "w4", hessian=f, act_order=True)
    with pytest.raises(QuantizationError, match="with damp=0.01: the given HessianFactor was made with damp=0.05"):
        quantize(w, "w4", hessian=f, damp=0.01)
    with pytest.raises(ShapeError, match="its Hessian must be 95 x 95, it is 96 x 96"):
        quantize(w[:, 1:], "w4", hessian=f)


def test_damping_is_retried_and_reported():
    w, h = correlated(4, 64, 8)
    h = h / h.diagonal().sqrt() / h.diagonal().sqrt()[:, None]
    h = h - (torch.linalg.eigvalsh(h).min() + 0.05) * torch.eye(64)  # the smallest eigenvalue is now -0.05
    assert float(h.diagonal().min()) > 0
    q = quantize(w, "w4g32_asym", hessian=h)
    assert q.info["damp"] == pytest.approx(0.1) and q.info["damp_retries"] == 1
    assert q.info["warnings"] == ["the Hessian is not positive definite with 0.01 of its mean diagonal as damping; took 0.1"]
    assert q.info["output_error"] < 0.05
    f = prepare_hessian(h)
    assert quantize(w, "w4g32_asym", hessian=f, damp=0.01).info["damp_retries"] == 1, "the damping that was asked for counts"
    clean = quantize(w, "w4g32_asym", hessian=correlated(4, 64, 8)[1])
    assert clean.info["damp"] == 0.01 and clean.info["damp_retries"] == 0 and clean.info["warnings"] == []


def test_hopeless_hessians_are_refused_with_advice():
    h = torch.eye(8)
    h[0, 1] = h[1, 0] = 1e3
    with pytest.raises(QuantizationError, match=r"8 x 8: it is not positive definite even with 10 of its mean.*calibrate this unit again"):
        prepare_hessian(h)
    with pytest.raises(QuantizationError, match="least entry is -1"):
        prepare_hessian(-torch.eye(3))
    with pytest.raises(QuantizationError, match="9 of its 9 values are NaN"):
        prepare_hessian(torch.full((3, 3), float("nan")))
    with pytest.raises(QuantizationError, match="damp must be a positive fraction"):
        prepare_hessian(torch.eye(3), damp=0.0)
    for bad in (torch.ones(3, 4), torch.ones(3), torch.ones(0, 0)):
        with pytest.raises(ShapeError, match="square matrix"):
            prepare_hessian(bad)


@pytest.mark.parametrize("name", ["w3g32_asym", "w4g32_fz", "w3g32_nest", "lut3", "nf4g32", "w4"])
def test_dead_columns_are_rounded_to_nearest_and_touch_nothing(name):
    w, h = correlated(6, 96, 10)
    dead = torch.arange(96) % 5 == 0
    h[dead] = 0
    h[:, dead] = 0
    q = quantize(w, name, hessian=h)
    assert q.info["dead_columns"] == int(dead.sum())
    x = q.dequantize()
    assert torch.isfinite(x).all() and q.info["output_error"] < 0.1
    assert float((x[:, dead] - w[:, dead]).square().mean() / w[:, dead].square().mean()) < 0.35, "kept, not zeroed"
    nothing = quantize(w, name, hessian=torch.zeros(96, 96))
    assert nothing.info["weight_error"] < 0.1 and nothing.info["output_error"] == 0
    rank_one = quantize(w, name, hessian=torch.ones(96, 96))
    assert torch.isfinite(rank_one.dequantize()).all()


def test_many_rows_in_pieces_equal_one_piece(monkeypatch):
    w, h = correlated(11, 64, 11)
    whole = {n: quantize(w, n, hessian=h).to_tensors() for n in ("w3g32_asym", "lut2")}
    monkeypatch.setattr(gptq, "_ROWS", 4)
    for name, tensors in whole.items():
        pieces = quantize(w, name, hessian=h).to_tensors()
        same = float((pieces["r0.codes"] == tensors["r0.codes"]).float().mean())
        assert same > 0.97, "a matrix product may round differently for another number of rows, no more"


def test_the_factor_is_not_changed_by_use():
    w, h = correlated(5, 64, 12)
    f = prepare_hessian(h)
    copy = HessianFactor(f.matrix.clone(), f.order.clone(), f.feedback.clone(), f.price.clone(), f.damp, f.asked_damp, f.retries, f.dead)
    before = w.clone()
    quantize(w, "w3g32_asym", hessian=f)
    quantize(w, "lut3", hessian=f)
    assert torch.equal(w, before)
    assert all(torch.equal(getattr(f, n), getattr(copy, n)) for n in ("matrix", "order", "feedback", "price"))

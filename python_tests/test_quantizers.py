"""The entry ``quantize``, the grids, RTN and HQQ. GPTQ and k-means have files of their own."""

import pytest
import torch

from mxq_ext.errors import QuantizationError, ShapeError
from mxq_ext.formats import NF4_LEVELS, UNIFORM_BITS, Format
from mxq_ext.quantizers import METHODS, default_method, find_method, make_options, prepare_hessian, quantize
from mxq_ext.quantizers.grid import make_grid, round_scale
from mxq_ext.quantizers.hqq import optimize_zeros

FORMATS = [f"w{b}{g}{z}" for b in UNIFORM_BITS[1:] for g in ("", "g32", "g64") for z in ("", "_asym", "_fz")] + ["w1_fz", "w1g32_fz",
    "w2g32_nest", "w3g32_nest", "w4g64_nest", "w3g32_asym_bf16", "w4g64_bf16", "w4g32_fz_bf16", "nf4", "nf4g32", "nf4g64_bf16", "lut2", "lut3", "lut4"]


def random_case(n: int, k: int, seed: int = 0):
    """A weight [n, k], a well-conditioned correlated Hessian [k, k] and a Fisher diagonal [n, k]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=g) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=g) / k**0.5)
    return torch.randn(n, k, generator=g) * 0.05, x.T @ x / (4 * k), torch.rand(n, k, generator=g)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(5, 97), (1, 1), (3, 33)], ids=str)
def test_every_method_fills_every_format_it_applies_to(name, shape):
    w, h, f = random_case(*shape)
    fmt = Format.parse(name)
    ran = 0
    for method, entry in METHODS.items():
        if entry.applies(fmt) is not None:
            with pytest.raises(QuantizationError, match=f"quantizing to {name} with {method}"):
                quantize(w, name, method=method, hessian=h, fisher=f)
            continue
        q = quantize(w, name, method=method, hessian=h, fisher=f)
        q.validate()
        ran += 1
        assert q.format_name == fmt.name
        assert q.nbytes() == fmt.nbytes(*shape)
        d = (q.dequantize() - w).double()
        # The reported errors are those of the stored bytes, recomputed here in float64.
        assert q.info["weight_error"] == pytest.approx(float(d.square().sum() / w.double().square().sum()), rel=1e-4, abs=1e-12)
        hd, wd = h.double(), w.double()
        want = float(torch.trace(d @ hd @ d.T) / torch.trace(wd @ hd @ wd.T))
        assert q.info["output_error"] == pytest.approx(want, rel=2e-3, abs=1e-9)
        assert q.info["method"] == method and q.info["seconds"] > 0
        if fmt.bits == 8:
            assert q.info["output_error"] < 1e-3
        elif shape == (5, 97):
            assert q.info["output_error"] < {1: 0.45, 2: 0.6, 3: 0.25, 4: 0.08, 5: 0.005, 6: 0.0015}[fmt.bits]
        again = quantize(w, name, method=method, hessian=h, fisher=f)
        for key, t in q.to_tensors().items():
            assert torch.equal(t, again.to_tensors()[key]), f"{method} is not deterministic in {key}"
    assert ran >= 2


def test_fp16_is_plain_rounding_whatever_the_method():
    w, h, _ = random_case(3, 17)
    for method in METHODS:
        q = quantize(w, "fp16", method=method, hessian=h)
        assert torch.equal(q.dequantize(), w.half().float()) and q.info["method"] == "round"
    with pytest.raises(QuantizationError, match="a weight of 1e\\+06 exceeds fp16"):
        quantize(w + 1e6, "fp16", method="rtn")


def test_auto_and_the_registry():
    assert default_method("w4g64", True) == "gptq"
    assert default_method("w4g64", False) == "rtn"
    assert default_method("lut3", False) == "kmeans"
    w, h, _ = random_case(4, 32)
    assert quantize(w, "lut3", method="auto").info["method"] == "kmeans"
    assert quantize(w, "lut3", method="auto", hessian=h).info["method"] == "gptq"
    with pytest.raises(QuantizationError, match=r"'gtpq'.*gptq, hqq, kmeans, rtn and auto.*did you mean 'gptq'"):
        find_method("gtpq")
    with pytest.raises(QuantizationError, match=r"option 'percdamp' of method gptq.*damp=None.*act_order=None.*clip='mse'"):
        make_options("gptq", {"percdamp": 0.01})
    with pytest.raises(QuantizationError, match="none at all"):
        make_options("kmeans", {"bits": 3})


@pytest.mark.parametrize(("method", "option", "value"), [
    ("rtn", "clip", "l2"), ("rtn", "clip_power", 0.0), ("gptq", "clip", True), ("gptq", "clip_power", 9.0), ("gptq", "damp", -1.0),
    ("gptq", "cd_passes", 1.5), ("hqq", "p", 1.5), ("hqq", "beta", 0.0), ("hqq", "kappa", 0.9), ("hqq", "iterations", -1),
    ("gptq", "damp", "abc"), ("gptq", "damp", float("nan")), ("gptq", "damp", True), ("gptq", "act_order", "maybe"), ("gptq", "clip_power", "abc"),
    ("gptq", "clip_power", None), ("gptq", "clip", 3), ("gptq", "cd_passes", True), ("rtn", "clip_power", "2"), ("awq", "steps", 2.0), ("hqq", "p", "x")])
def test_bad_option_values_name_the_option(method, option, value):
    with pytest.raises(QuantizationError, match=f"option {option}="):
        make_options(method, {option: value})


def test_malformed_input_is_refused_in_words():
    w, h, f = random_case(4, 32)
    bad = w.clone()
    bad[2, 5] = float("nan")
    bad[3, 1] = float("inf")
    for method in ("rtn", "gptq", "hqq"):
        with pytest.raises(QuantizationError, match=r"2 of 128 values are NaN or infinite, the first at \[2, 5\] = nan"):
            quantize(bad, "w4g32_asym", method=method, hessian=h)
    for x in (w[0], w[:0], torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 32, device="meta")):
        with pytest.raises(ShapeError, match="quantizing a weight of shape"):
            quantize(x, "w4g32", method="rtn")
    with pytest.raises(ShapeError, match="Hessian must be 32 x 32, it is 31 x 31"):
        quantize(w, "w4g32", hessian=h[1:, 1:])
    with pytest.raises(QuantizationError, match="1 of the Hessian's 1024 values are NaN"):
        quantize(w, "w4g32", method="rtn", hessian=torch.where(torch.arange(1024).view(32, 32) == 7, float("nan"), h))
    with pytest.raises(ShapeError, match="Fisher diagonal must have the same shape"):
        quantize(w, "lut3", method="kmeans", fisher=f[1:])
    with pytest.raises(QuantizationError, match="Fisher diagonal must be finite and >= 0"):
        quantize(w, "lut3", method="kmeans", fisher=-f)
    with pytest.raises(QuantizationError, match="needs the layer's Hessian"):
        quantize(w, "w4g32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_and_stride_is_computed_in_float32(dtype):
    w, _, _ = random_case(6, 70)
    w = w.to(dtype)
    strided = torch.empty(70, 6, dtype=dtype).T.copy_(w)
    a, b = quantize(strided, "w3g32_asym", method="rtn"), quantize(w.float(), "w3g32_asym", method="rtn")
    assert torch.equal(a.dequantize(), b.dequantize())


# Grids


@pytest.mark.parametrize("name", ["w2", "w3g32", "w4g32", "w8", "w2g32_asym", "w3_asym", "w8_asym", "w2_fz", "w4g32_fz", "nf4g32", "w3g32_nest"])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_codes_are_the_nearest_of_all_levels_by_brute_force(name, clip):
    w, _, _ = random_case(7, 75, seed=3)
    fmt = Format.parse(name)
    grid = make_grid(w, fmt, clip=clip)
    q = quantize(w, name, method="rtn", clip=clip)
    levels = torch.stack([grid.decode(torch.full_like(w, c, dtype=torch.uint8)) for c in range(fmt.levels)])
    best = (levels - w).abs().amin(0)
    assert torch.equal(grid.decode(grid.encode(w)), q.dequantize())
    # float32 rounding may pick the other one of two levels that are equally near
    assert torch.allclose((q.dequantize() - w).abs(), best, atol=1e-7)


@pytest.mark.parametrize("name", ["w2", "w3g32", "w4g32_asym", "w8_asym", "w3_fz", "w8"])
def test_a_grid_without_clipping_covers_the_range(name):
    w, _, _ = random_case(7, 75, seed=4)
    q = quantize(w, name, method="rtn")
    r = q.rectangles[0]
    step = r.tensors["scales"].float().abs().repeat_interleave(r.format.group or 75, 1)[:, :75]
    # half a step, and what the 16-bit rounding of scale and zero may add at the ends
    assert ((q.dequantize() - w).abs() <= 0.5 * step + w.abs().max() * 2.0**-9).all()


def test_symmetric_grids_use_every_code_and_either_sign():
    w = torch.tensor([[-4.0, 1.0, 0.0, 3.0], [4.0, 1.0, 0.0, -3.0]])
    r = quantize(w, "w3", method="rtn").rectangles[0]
    assert r.tensors["scales"].flatten().tolist() == [1.0, -1.0]
    assert r.codes().tolist() == [[0, 5, 4, 7], [0, 3, 4, 7]]
    assert torch.equal(r.dequantize(), w)


def test_integer_zero_points_stay_in_range_for_one_sided_groups():
    w = torch.tensor([[3.0, 4.0, 5.0, 6.0], [-3.0, -4.0, -5.0, -6.0]])
    r = quantize(w, "w4_asym", method="rtn").rectangles[0]
    assert r.zeros().flatten().tolist() == [0.0, 15.0]
    assert torch.allclose(r.dequantize(), w, atol=0.21)


@pytest.mark.parametrize(("name", "method"), [
    (name, method) for name in ("w2g32", "w3g32_asym", "w4g32_fz", "nf4g32", "w8", "w4g32_asym_bf16") for method in ("rtn", "hqq", "gptq")
    if METHODS[method].applies(Format.parse(name)) is None])
def test_groups_of_one_value_and_of_zeros(name, method):
    w = torch.zeros(4, 65)  # zeros; 1.5; -0.375; a ragged group of one column
    w[1], w[2], w[3, 64] = 1.5, -0.375, 0.3
    x = quantize(w, name, method=method, hessian=torch.eye(65)).dequantize()
    assert torch.isfinite(x).all()
    assert torch.equal(x[0], w[0]), "zeros are exact"
    if method == "rtn":
        assert torch.equal(x[1:3], w[1:3]), "a repeated 16-bit number is exact"
        assert x[3, 64] == pytest.approx(0.3, rel=2.0**-8)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nested_groups_of_one_value(method):
    w = 0.05 * torch.randn(5, 600, generator=torch.Generator().manual_seed(0))
    w[0], w[1], w[2, :512] = 0.0, -0.375, 0.3  # a whole row; all groups that share a range, others beyond
    w[3, 32:64], w[4, 599] = 0.0, 9.0  # one group among others; nothing but an outlier in the last
    x = quantize(w, "w3g32_nest", method=method, hessian=torch.eye(600)).dequantize()
    assert torch.equal(x[0], w[0]), "a row of zeros is exact"
    assert torch.allclose(x[1], w[1], rtol=2.0**-8) and torch.allclose(x[2, :512], w[2, :512], rtol=2.0**-8)
    step = 0.3 / 7  # about the range of a group
    assert float((x[3] - w[3]).abs().max()) < step and float((x[4, :512] - w[4, :512]).abs().max()) < step


def plain_nested(rows, bits, group):
    """SpQR's two levels by min and max, in Python numbers: the weights of each row."""
    def half(v):
        return float(torch.tensor(v).half())

    def level(values):
        low = half(min(values))
        step = half((max(values) - low) / 7)
        offered = [half(step * c + low) for c in range(8)]
        return [min(offered, key=lambda o: abs(o - v)) for v in values]

    out = []
    for row in rows:
        parts = [row[a : a + group] for a in range(0, len(row), group)]
        starts = [half(min(p)) for p in parts]
        scales = [half((max(p) - z) / (2**bits - 1)) for p, z in zip(parts, starts, strict=True)]
        middles = [z + s * (2**bits - 1) / 2 for z, s in zip(starts, scales, strict=True)]
        scales = sum((level(scales[a : a + 16]) for a in range(0, len(scales), 16)), [])
        zeros = [m - s * (2**bits - 1) / 2 for m, s in zip(middles, scales, strict=True)]
        zeros = sum((level(zeros[a : a + 16]) for a in range(0, len(zeros), 16)), [])
        codes = [[min(2**bits - 1, max(0, round((v - z) / s))) for v in p] for p, s, z in zip(parts, scales, zeros, strict=True)]
        out.append([s * c + z for p, s, z in zip(codes, scales, zeros, strict=True) for c in p])
    return torch.tensor(out)


@pytest.mark.parametrize("name", ["w2g64_nest", "w3g32_nest", "w4g32_nest"])
def test_nested_grids_equal_a_plain_transcription(name):
    w, fmt = random_case(6, 1100, seed=8)[0], Format.parse(name)  # more than one range a row, the last ragged in groups and in columns
    got, want = quantize(w, name, method="rtn").dequantize(), plain_nested(w.tolist(), fmt.bits, fmt.group)
    # A near tie may fall the other way in float32.
    assert float(((got - want).abs() <= 1e-6).float().mean()) > 0.99
    found = quantize(w, name, method="rtn", clip="mse")
    wide = quantize(w, fmt.expanded, method="rtn", clip="mse").info["weight_error"]
    assert found.info["weight_error"] < quantize(w, name, method="rtn").info["weight_error"] and found.info["weight_error"] < 1.2 * wide


def test_elements_left_out_count_nothing_in_the_fit():
    w, h, f = random_case(6, 100, seed=9)
    exact = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.05
    exact[0, :32] = True  # a whole group
    loud = torch.where(exact, 5e4 * w.sign(), w)  # ranges and tables see none of it, even squared
    for name, method in (("w3g32_nest", "rtn"), ("w3g32_asym", "rtn"), ("nf4g32", "rtn"), ("lut3", "kmeans"), ("fp16", "rtn")):
        for x in (w, loud):
            q = quantize(x, name, method=method, exact=exact)
            assert q.format_name == f"{name}+sparse" and q.sparse.values.numel() == int(exact.sum())
            assert torch.allclose(q.dequantize()[exact], x[exact], rtol=2.0**-10, atol=1e-3)
        rest = [(quantize(x, name, method=method, exact=exact).dequantize() - x)[~exact] for x in (w, loud)]
        assert torch.allclose(*rest, atol=1e-6), "what is left out does not change the others"
    assert quantize(w, "w3g32", method="rtn", exact=torch.zeros_like(exact)).sparse.values.numel() == 0
    with pytest.raises(QuantizationError, match="hqq and exact elements: methods that leave elements out are gptq, kmeans, rtn"):
        quantize(w, "w3g32_fz", method="hqq", exact=exact)
    with pytest.raises(ShapeError, match=r"a bool mask of the same shape, it is float32 \(6, 100\)"):
        quantize(w, "w3g32_fz", method="rtn", exact=exact.float())
    for method, size in (("rtn", r"1e\+06"), ("gptq", "inf")):
        with pytest.raises(QuantizationError, match=rf"to w3g32_bf16 with exact elements: a sparse value of {size} exceeds .* leave it out of the exact"):
            quantize(torch.where(exact, torch.full_like(w, 1e6), w), "w3g32_bf16", method=method, hessian=h, exact=exact)


def test_methods_that_move_groups_one_by_one_refuse_nested_formats():
    w, h, _ = random_case(4, 64)
    for method, rule in (("hqq", "moves the zero of each group freely"), ("awq", "16 groups of w3g32_nest share a range")):
        with pytest.raises(QuantizationError, match=f"{rule}.*use w3g32_fz, or the method gptq or rtn"):
            quantize(w, "w3g32_nest", method=method, hessian=h)
    with pytest.raises(QuantizationError, match="use w3g32_fz_bf16"):
        quantize(w * 1e8, "w3g32_nest", method="rtn")


@pytest.mark.parametrize("name", ["w4g32", "w4g32_asym", "w4g32_fz", "nf4g32", "w3g32_asym", "w4g32_bf16", "w8_asym"])
@pytest.mark.parametrize("size", [1e-30, 3e-8, 2e-7, 1e-6, 1e-4, 3e4])
def test_scales_near_the_ends_of_fp16(name, size):
    w = random_case(6, 64, seed=5)[0]
    w = w / w.abs().max() * size
    for clip in ("none", "mse"):
        q = quantize(w, name, method="rtn", clip=clip)
        r = q.rectangles[0]
        assert torch.isfinite(q.dequantize()).all() and (r.tensors["scales"] != 0).all()
        # Never worse than storing zeros, up to the spacing of the 16-bit numbers.
        assert (q.dequantize() - w).abs().max() <= max(size, 2.0**-24)
    if size >= 1e-4:
        assert q.info["weight_error"] < 0.05


def test_a_scale_too_large_for_fp16_is_refused_and_fits_bf16():
    w = random_case(6, 64)[0] * 1e8
    for name in ("w4g32", "w4g32_asym", "w2g32_fz", "nf4g32"):
        with pytest.raises(QuantizationError, match="exceeds fp16's largest value 65504; use its _bf16 variant"):
            quantize(w, name, method="rtn")
        assert quantize(w, name + "_bf16", method="rtn").info["weight_error"] < 0.4
    with pytest.raises(QuantizationError, match="table entry.*exceeds fp16.*w8_bf16"):
        quantize(w, "lut3", method="kmeans")
    assert quantize(torch.full((2, 40), 1e30), "w8_bf16", method="rtn").info["weight_error"] < 1e-4
    with pytest.raises(QuantizationError, match="magnitudes up to 3e\\+38 overflow float32"):
        quantize(torch.full((2, 40), 3e38), "w8_bf16", method="rtn")


def test_stored_scales_are_never_zero():
    fmt = Format.parse("w4g32")
    s = round_scale(torch.tensor([0.0, 1e-40, -1e-9, 2.0**-24, 1.4 * 2.0**-24, 0.1]), fmt)
    assert s.tolist() == [1.0, 2.0**-24, -(2.0**-24), 2.0**-24, 2.0**-23, float(torch.tensor(0.1).half())]


@pytest.mark.parametrize("name", ["w2g32", "w2g32_asym", "w3g32_fz", "nf4g32", "w4", "w8_asym"])
def test_the_search_lowers_the_error_that_it_minimizes(name):
    w, _, f = random_case(8, 75, seed=6)
    fmt = Format.parse(name)
    h = f[0] ** 4

    def group_errors(grid, power):
        e = (w - grid.decode(grid.encode(w))).abs().pow(power) * h
        pad = torch.nn.functional.pad(e, (0, -75 % (fmt.group or 75)))
        return pad.view(8, -1, fmt.group or 75).sum(-1)

    for power in (2.0, 2.4):
        options = {"importance": h, "power": power, "exact_constants": False}
        plain, found = (group_errors(make_grid(w, fmt, clip=c, **options), power) for c in ("none", "mse"))
        assert (found <= plain * (1 + 1e-5) + 1e-12).all()
        assert found.sum() < plain.sum() * (0.999 if fmt.bits < 8 else 1)
    # and the importance is heeded: columns of weight 0 do not count
    h0 = torch.ones(75)
    h0[::2] = 0
    a = make_grid(w, fmt, clip="mse", importance=h0)
    b = make_grid(torch.where(torch.arange(75) % 2 == 0, w * 1e-3, w), fmt, clip="mse", importance=h0)
    ea, eb = (float(((w - g.decode(g.encode(w))).square() * h0).sum()) for g in (a, b))
    assert ea == pytest.approx(eb, rel=0.3)


def test_nf4_ties_take_the_lower_code():
    lv = torch.tensor(NF4_LEVELS)
    mid = ((lv[1:] + lv[:-1]) / 2)[None]
    w = torch.cat([mid, torch.ones(1, 1)], 1)
    assert quantize(w, "nf4", method="rtn").rectangles[0].codes()[0, :15].tolist() == list(range(15))


def test_rtn_prefers_fisher_over_the_hessian():
    w, h, f = random_case(8, 96, seed=8)
    base = quantize(w, "w2g32_asym", method="rtn", clip="mse")
    weighted = quantize(w, "w2g32_asym", method="rtn", clip="mse", hessian=h, fisher=f**4)

    def loss(q):
        return float(((q.dequantize() - w).square() * f**4).sum())

    assert loss(weighted) < loss(base)
    shared = quantize(w, "w2g32_asym", method="rtn", clip="mse", hessian=prepare_hessian(h))
    assert torch.equal(shared.dequantize(), quantize(w, "w2g32_asym", method="rtn", clip="mse", hessian=h).dequantize())


# HQQ


@pytest.mark.parametrize("name", ["w2g32_fz", "w3g64_fz", "w4g32_fz", "w4_fz_bf16"])
def test_hqq_never_lets_the_mean_error_rise(name):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(16, 160, generator=g) * torch.exp(torch.randn(16, 160, generator=g))  # heavy tails, what HQQ is for
    q = quantize(w, name, method="hqq")
    history = q.info["mean_abs_error"]
    print(name, history)
    assert len(history) > 1 and all(a >= b for a, b in zip(history, history[1:], strict=False))
    assert history[-1] < history[0]
    assert float((q.dequantize() - w).abs().mean()) == pytest.approx(history[-1], rel=1e-4)
    assert float((q.dequantize() - w).abs().mean()) < float((quantize(w, name, method="hqq", iterations=0).dequantize() - w).abs().mean())


def test_hqq_step_is_the_paper_formula():
    """One iteration in the authors' convention: s the inverse scale, Wq = round(W s + z), Wr = (Wq - z) / s."""
    g = torch.Generator().manual_seed(2)
    w = torch.randn(40, 64, generator=g) * torch.exp(torch.randn(40, 64, generator=g))
    scale, first = torch.full((40, 1), 0.75), torch.full((40, 1), -1.5)
    s, z = 1 / scale, -first / scale

    def shrink(e, beta=2.0, p=0.7):
        return e.sign() * torch.relu(e.abs() - e.abs().clamp(min=1e-20) ** (p - 1) / beta)

    wq = (w * s + z).round().clamp(0, 3)
    error = w - (wq - z) / s
    z1 = (wq - (w - shrink(error)) * s).mean(1, keepdim=True)
    want = (-z1 / s).half().float()
    fresh = (w - ((w * s - want * s).round().clamp(0, 3) + want * s) / s).abs().sum(1, keepdim=True)
    better = fresh < error.abs().sum(1, keepdim=True)
    assert 0 < int(better.sum()) < 40, "both cases are exercised"
    zeros, history = optimize_zeros(w, Format.parse("w2_fz"), scale, first, make_options("hqq", {"iterations": 1, "beta": 2.0}))
    assert torch.allclose(zeros, torch.where(better, want, first), atol=2e-3)
    assert len(history) == 2


def test_hqq_rounds_integer_zeros_and_says_so():
    w, _, _ = random_case(8, 96)
    q = quantize(w, "w3g32_asym", method="hqq")
    assert q.info["zeros"] == "rounded to integers"
    assert "they were rounded" in q.info["warnings"][0]
    start = quantize(w, "w3g32_asym", method="hqq", iterations=0)
    assert float((q.dequantize() - w).abs().mean()) <= float((start.dequantize() - w).abs().mean()) * (1 + 1e-6)
    with pytest.raises(QuantizationError, match="HQQ optimizes zero points, and w4g32 has none; use a _fz or _asym format"):
        quantize(w, "w4g32", method="hqq")

"""AWQ: the clip search and the scale search against plain loops over tokens, and a folded model that computes the same."""

import copy

import pytest
import torch
from conftest import make_sharp_model
from test_transforms import uneven

from mxq_ext.errors import CheckpointError, ModelError, QuantizationError
from mxq_ext.quantizers import quantize
from mxq_ext.stats import calibrate
from mxq_ext.structure import find_units
from mxq_ext.transforms import scale_activations
from mxq_ext.transforms.awq import EXPONENTS, scale_groups


def plain_asym(w, bits, bound):
    """Round to nearest of one group [width] clamped to +-bound: integer zero point, fp16 scale, range with 0 in it. Plain numbers."""
    x = [max(-bound, min(bound, v)) for v in w]
    lo, hi, top = min(0.0, *x), max(0.0, *x), 2**bits - 1
    s = float(torch.tensor((hi - lo) / top).half()) or 1.0
    z = min(top, max(0, round(-lo / s)))
    return [s * (min(top, max(0, round(v / s) + z)) - z) for v in x]


@pytest.mark.parametrize("bits, cols", [(2, 96), (3, 80), (4, 64)])
def test_clip_search_equals_a_plain_loop_over_tokens(bits, cols):
    g = torch.Generator().manual_seed(bits)
    w = (0.05 * torch.randn(5, cols, generator=g)).half().float()
    x = torch.randn(70, cols, generator=g) * torch.exp(torch.randn(cols, generator=g))
    q = quantize(w, f"w{bits}g32_asym", method="awq", hessian=x.T @ x / 70)
    got, clipped = q.dequantize(), 0
    for n in range(5):
        for a in range(0, cols, 32):
            part, tokens = w[n, a:a + 32], x[:, a:a + 32]
            errors = []
            for i in range(10):
                restored = torch.tensor(plain_asym(part.tolist(), bits, float(part.abs().max()) * (1 - i / 20)))
                errors.append(float((tokens @ (restored - part)).square().mean()))
            have = float((tokens @ (got[n, a:a + 32] - part)).square().mean())
            assert have == pytest.approx(min(errors), rel=2e-3)
            clipped += errors[0] > min(errors)
    assert clipped and q.info["clipped"] > 0, "some group gains by clipping"


def test_clip_search_needs_moments_and_a_grid():
    w = torch.randn(4, 64)
    with pytest.raises(QuantizationError, match="with awq.*calibrate first"):
        quantize(w, "w4g64", method="awq")
    with pytest.raises(QuantizationError, match="fitted tables"):
        quantize(w, "lut3", method="awq", hessian=torch.eye(64))
    with pytest.raises(QuantizationError, match="shrink"):
        quantize(w, "w4g64", method="awq", hessian=torch.eye(64), shrink=1.0)
    full = quantize(w, "w4g64", method="awq", hessian=torch.eye(64), shrink=0.0)
    assert torch.equal(full.dequantize(), quantize(w, "w4g64", method="rtn").dequantize()), "without clipping it is round to nearest"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model with uneven channels, its tokens and statistics, a format for each linear of the blocks)."""
    model = uneven(make_sharp_model())
    tokens = torch.randint(0, 257, (4, 48), generator=torch.Generator().manual_seed(2))
    stats = calibrate(model, tokens, tmp_path_factory.mktemp("stats"), weightings=("attention",), fisher=False)
    return model, tokens, stats, {u.name: "w3g32_asym" for u in find_units(model) if u.layer >= 0}


def test_scaled_model_computes_the_same(case):
    model, tokens, stats, formats = case
    scaled = copy.deepcopy(model)
    chosen = scale_activations(scaled, stats, formats)
    before, after = model(tokens).logits, scaled(tokens).logits
    print(f"largest logit {before.abs().max():.3g}, largest difference {(after - before).abs().max():.3g}; {chosen}")
    assert torch.allclose(after, before, rtol=1e-3, atol=2e-4 * float(before.abs().max()))
    assert len(chosen) == 8 and {n.rpartition(".")[2] for n in chosen} == {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"}
    assert sum(e > 0 for e in chosen.values()) > 4, "most groups gain by scaling"


def inputs(model, tokens, name):
    """What a module reads, [tokens, K]."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(a[0].flatten(0, -2)))
    model(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("group", range(4))
def test_scales_are_the_best_of_a_plain_search(case, group):
    model, tokens, stats, formats = case
    g = scale_groups(model)[group]
    chosen = scale_activations(copy.deepcopy(model), stats, {n: formats[n] for n in g.readers})
    assert list(chosen) == [g.producer]
    x = inputs(model, tokens, g.readers[0])
    mean = x.abs().mean(0)
    if g.producer.endswith("v_proj"):  # query heads 0 and 1 read the values of KV head 0, heads 2 and 3 those of head 1
        pooled = mean.view(2, 2, 16).mean(1)
        mean = pooled.repeat_interleave(2, 0).flatten()
    losses = []
    for i in range(EXPONENTS):
        s = mean.pow(i / EXPONENTS).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        loss = 0.0
        for name in g.readers:
            w = model.get_submodule(name).weight
            restored = quantize(w * s, formats[name], method="rtn").dequantize() / s
            loss += float((x @ (restored - w).T).square().sum())
        losses.append(loss)
    assert losses[round(chosen[g.producer] * EXPONENTS)] <= min(losses) * 1.001
    assert min(losses) < losses[0]


def test_scaling_lowers_the_error_of_rounding(case):
    model, tokens, stats, formats = case
    scaled = copy.deepcopy(model)
    scale_activations(scaled, stats, formats)
    reference, errors = model(tokens).logits, []
    for m in (model, scaled):
        rounded = copy.deepcopy(m)
        for name, fmt in formats.items():
            weight = rounded.get_submodule(name).weight
            weight.data.copy_(quantize(weight, fmt, method="rtn").dequantize())
        errors.append(float((rounded(tokens).logits - reference).square().mean()))
    print(errors)
    assert errors[1] < errors[0]


def test_float_groups_are_left_alone_and_bad_requests_refused(case):
    model, tokens, stats, formats = case
    other = copy.deepcopy(model)
    assert scale_activations(other, stats, {"model.layers.0.mlp.up_proj": "fp16"}) == {}
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    with pytest.raises(QuantizationError, match="model.layers.0.mlp.up_proj in lut3"):
        scale_activations(other, stats, {"model.layers.0.mlp.up_proj": "lut3"})
    with pytest.raises(CheckpointError, match="gradient"):
        scale_activations(other, stats, formats, weighting="gradient")
    other.config.model_type = "opt"
    with pytest.raises(ModelError, match="scaling"):
        scale_activations(other, stats, formats)

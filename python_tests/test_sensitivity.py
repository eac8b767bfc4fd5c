"""Metrics against independent computations, and the table that ``sense`` makes of them."""

import math

import pytest
import torch
from conftest import make_model

from mxq_ext.errors import MxqError, PlanError
from mxq_ext.formats import Format
from mxq_ext.quantizers import quantize
from mxq_ext.sensitivity import METRICS, sense
from mxq_ext.sensitivity.metrics import Context, find_metric
from mxq_ext.sensitivity.probes import KLProbe, energy, noise_slope
from mxq_ext.stats import calibrate
from mxq_ext.structure import find_units


def rtn(unit, weight, fmt):
    return quantize(weight, fmt, method="auto")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    model = make_model(seed=3)
    for p in model.parameters():  # a random Llama is almost linear; larger weights make its losses matter
        p.data.mul_(3.0)
    tokens = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    stats = calibrate(model, tokens, tmp_path_factory.mktemp("stats"), fisher=True, fisher_windows=3)
    return model, tokens, stats, find_units(model)


def kl_by_hand(model, name, delta, tokens):
    with torch.no_grad():
        before = torch.log_softmax(model(tokens).logits, -1)
        module = model.get_submodule(name)
        old = module.weight.data.clone()
        module.weight.data += delta
        after = torch.log_softmax(model(tokens).logits, -1)
        module.weight.data.copy_(old)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_probe_equals_two_whole_forwards(setting, name):
    model, tokens, _, units = setting
    unit = next(u for u in units if u.name == name)
    delta = 0.05 * torch.randn(unit.shape, generator=torch.Generator().manual_seed(1))
    before = model.get_submodule(name).weight.clone()
    assert KLProbe(model, tokens).kl(unit, delta) == pytest.approx(kl_by_hand(model, name, delta, tokens), rel=1e-4)
    assert torch.equal(before, model.get_submodule(name).weight)


def test_probe_of_an_untied_head(tmp_path):
    model = make_model(tied=False, seed=5)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(2))
    unit = next(u for u in find_units(model) if u.name == "lm_head")
    delta = 0.2 * torch.randn(unit.shape, generator=torch.Generator().manual_seed(3))
    assert KLProbe(model, tokens).kl(unit, delta) == pytest.approx(kl_by_hand(model, "lm_head", delta, tokens), rel=1e-4)


def test_energy_is_the_mean_squared_output():
    x, d = torch.randn(50, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    h = x.T @ x / 50
    assert energy(d.float(), h.float()) == pytest.approx(float((x @ d.T).square().sum(1).mean()), rel=1e-5)
    with pytest.raises(MxqError, match="positive semidefinite"):
        energy(torch.eye(2), torch.diag(torch.tensor([1.0, -5.0])))


def test_fisher_metric_predicts_the_measured_kl(setting):
    """Second order at small noise, summed over all linears: within a factor of two of the measured KL (its channels share a mean)."""
    model, tokens, stats, units = setting
    probe, metric = KLProbe(model, tokens), METRICS["fisher"](Context(model, tokens, stats))
    predicted = measured = 0.0
    for i, unit in enumerate(u for u in units if u.kind == "linear"):
        w = model.get_submodule(unit.name).weight.detach()
        delta = 0.02 * w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(i))
        predicted += metric.loss(unit, w, [delta])[0]
        measured += probe.kl(unit, delta)
    assert 0.5 < predicted / measured < 2.0


def test_first_order_equals_autograd_on_the_same_labels(setting):
    model, tokens, stats, units = setting
    from mxq_ext.stats.walk import sample_labels, window_uniform

    metric = METRICS["first_order"](Context(model, tokens, stats))
    from mxq_ext.progress import SILENT

    metric.prepare(units, SILENT)
    unit = next(u for u in units if u.role == "o_proj")
    delta = torch.randn(unit.shape, generator=torch.Generator().manual_seed(9))
    want = []
    for w in range(metric.WINDOWS):
        logits = model(tokens[w:w + 1]).logits[0]
        labels = sample_labels(logits.detach(), window_uniform(0, w, tokens.shape[1]))
        weight = model.get_submodule(unit.name).weight
        g = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), weight)[0]
        want.append(abs(float((g * delta).sum())) / tokens.shape[1])
    assert metric.loss(unit, model.get_submodule(unit.name).weight, [delta])[0] == pytest.approx(sum(want) / len(want), rel=0.02)


def test_obq_equals_the_explicit_inverse(setting):
    model, tokens, stats, units = setting
    unit = next(u for u in units if u.role == "k_proj")
    delta = torch.randn(unit.shape, generator=torch.Generator().manual_seed(4))
    h = stats.hessian(unit.name, "none").double()
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64))
    want = float((delta.double().square() / inverse.diagonal()).sum())
    assert METRICS["obq"](Context(model, tokens, stats)).loss(unit, delta, [delta])[0] == pytest.approx(want, rel=1e-3)


def outputs(model, name, tokens):
    """Inputs [t, K] of a linear over all windows, by a hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("role", ["q_proj", "down_proj"])
def test_output_and_activation_equal_sums_over_the_inputs(setting, role):
    model, tokens, stats, units = setting
    unit = next(u for u in units if u.role == role)
    delta = torch.randn(unit.shape, generator=torch.Generator().manual_seed(8))
    x = outputs(model, unit.name, tokens).double()
    weight = model.get_submodule(unit.name).weight
    got = {m: METRICS[m](Context(model, tokens, stats)).loss(unit, weight, [delta])[0] for m in ("output", "activation")}
    assert got["output"] == pytest.approx(float((x @ delta.double().T).square().sum(1).mean()), rel=1e-4)
    assert got["activation"] == pytest.approx(sum(float(x[:, j].square().mean() * delta[:, j].double().square().sum()) for j in range(x.shape[1])), rel=1e-4)


def test_fisher_diagonal_equals_squared_gradients_of_windows(setting):
    from mxq_ext.stats.walk import sample_labels, window_uniform

    model, tokens, stats, units = setting
    unit = next(u for u in units if u.role == "v_proj")
    weight = model.get_submodule(unit.name).weight
    delta = torch.randn(unit.shape, generator=torch.Generator().manual_seed(6))
    total = torch.zeros(unit.shape)
    for w in range(len(tokens)):
        logits = model(tokens[w : w + 1]).logits[0]
        labels = sample_labels(logits.detach(), window_uniform(0, w, tokens.shape[1]))
        total += torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), weight)[0].square() / len(tokens)
    want = 0.5 * float((total * delta.square()).sum()) / tokens.shape[1]
    assert METRICS["fisher_diag"](Context(model, tokens, stats)).loss(unit, weight, [delta])[0] == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(("alone", "probes", "tolerance"), [(True, 60, 0.2), (False, 240, 0.3)])
def test_hutchinson_estimates_the_trace_of_the_hessian_of_the_kl(setting, alone, probes, tolerance):
    """Against the exact trace of one layer's Gauss-Newton matrix: sum over tokens of |J^T (diag p - p p^T)^(1/2)|^2, row by row of the Jacobian."""
    from mxq_ext.progress import SILENT

    model, tokens, stats, units = setting
    unit = next(u for u in units if u.role == "v_proj" and u.layer == 1)
    weight = model.get_submodule(unit.name).weight
    window = tokens[:1, :4]

    class Many(METRICS["hutchinson"]):
        PROBES, TOKENS = probes, 4

    metric = Many(Context(model, window, stats))
    metric.prepare([unit] if alone else units, SILENT)
    logits = model(window).logits[0]
    p = logits.detach().double().softmax(-1)
    exact = 0.0
    for t in range(4):
        rows = torch.stack([torch.autograd.grad(logits[t, v], weight, retain_graph=True)[0].flatten() for v in range(logits.shape[1])]).double()
        exact += float((p[t] * rows.square().sum(1)).sum() - (p[t] @ rows).square().sum())
    assert metric.trace[unit.name] * 4 == pytest.approx(exact, rel=tolerance)
    delta = torch.randn(unit.shape)
    assert metric.loss(unit, weight, [delta])[0] == pytest.approx(0.5 * metric.trace[unit.name] / weight.numel() * float(delta.square().sum()), rel=1e-5)
    assert all(q.requires_grad for q in model.parameters())  # as before


def test_kl_slope_is_the_loss_of_its_own_noise(setting):
    """linear_kl of a candidate whose error is the probe's own noise, at its size: the KL that two whole forwards measure."""
    from mxq_ext.progress import SILENT

    model, tokens, stats, units = setting
    metric = METRICS["linear_kl"](Context(model, tokens, stats, seed=4))
    metric.prepare(units, SILENT)
    place = [u.name for u in units if u.name in stats].index("model.layers.1.mlp.up_proj")
    unit = next(u for u in units if u.name == "model.layers.1.mlp.up_proj")
    weight, h = model.get_submodule(unit.name).weight.detach(), stats.hessian(unit.name)
    noise = torch.randn(unit.shape, generator=torch.Generator().manual_seed(4 + place))
    noise *= (metric.SIZE * energy(weight, h) / energy(noise, h)) ** 0.5
    want = kl_by_hand(model, unit.name, noise, tokens[: metric.WINDOWS])
    assert metric.loss(unit, weight, [noise])[0] == pytest.approx(want, rel=2e-3)


def test_fisher_diagonal_needs_its_statistics(tmp_path):
    model = make_model()
    tokens = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    stats = calibrate(model, tokens, tmp_path, fisher=False)
    unit = find_units(model)[1]
    with pytest.raises(PlanError, match="calibrate with fisher=True"):
        METRICS["fisher_diag"](Context(model, tokens, stats)).loss(unit, torch.zeros(unit.shape), [torch.zeros(unit.shape)])


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_sense_orders_the_widths(setting, metric):
    """Every metric charges less for more bits, summed over units, and bytes are those of the QTensors."""
    model, tokens, stats, units = setting
    table = sense(model, tokens, stats, ["w4g32_asym", "w2g32_asym", "w8"], metric=metric, trial=rtn)
    assert table.formats == ["w4g32_asym", "w2g32_asym", "w8"] and table.units == [u.name for u in units]
    w4, w2, w8 = (table.uniform(f)[0] for f in table.formats)
    assert w2 > w4 > w8 >= 0
    for u, unit in enumerate(units):
        assert [int(b) for b in table.nbytes[u]] == [Format.parse(f).nbytes(*unit.shape) for f in table.formats]


def test_anchored_kl_measures_its_coarsest_candidate(setting):
    model, tokens, stats, units = setting
    table = sense(model, tokens, stats, ["w2g32_asym", "w4g32_asym"], metric="anchored_kl", trial=rtn)
    unit = next(u for u in units if u.role == "up_proj")
    w = model.get_submodule(unit.name).weight.detach()
    delta = quantize(w, "w2g32_asym", method="auto").dequantize() - w
    want = kl_by_hand(model, unit.name, delta, tokens[:1])
    assert table.loss[table.units.index(unit.name), 0] == pytest.approx(want, rel=1e-3)


def test_noise_slope_is_flat_in_the_linear_regime(setting):
    model, tokens, stats, units = setting
    unit = next(u for u in units if u.role == "down_proj")
    w, h, probe = model.get_submodule(unit.name).weight.detach(), stats.hessian(unit.name), KLProbe(model, tokens)
    a, b = (noise_slope(probe, unit, w, h, size=s, seed=0) for s in (1e-3, 4e-3))
    assert a > 0 and a == pytest.approx(b, rel=0.25)


def test_refusals(setting):
    model, tokens, stats, _ = setting
    with pytest.raises(PlanError, match="choose one of .*fisher"):
        find_metric("hessian")
    with pytest.raises(PlanError, match="no candidate"):
        sense(model, tokens, stats, [], metric="output", trial=rtn)

    class Broken(METRICS["output"]):
        def loss(self, unit, weight, deltas):
            return [math.nan for _ in deltas]

    METRICS["broken"] = Broken
    try:
        with pytest.raises(PlanError, match="it is nan"):
            sense(model, tokens, stats, ["w8"], metric="broken", trial=rtn)
    finally:
        del METRICS["broken"]


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_an_untied_embedding_has_a_price(tmp_path, metric):
    """It is no layer with an input, so no statistics exist; it is priced by what the text looks up, in nats where the metric is."""
    model = make_model(tied=False, seed=2)
    for p in model.parameters():
        p.data.mul_(3.0)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    stats = calibrate(model, tokens, tmp_path, fisher=True, fisher_windows=2)
    table = sense(model, tokens, stats, ["w2g32_asym", "w4g32_asym"], metric=metric, trial=rtn)
    row = table.loss[table.units.index("model.embed_tokens")]
    w = model.model.embed_tokens.weight.detach()
    delta = quantize(w, "w2g32_asym", method="auto").dequantize() - w
    if metric in ("output", "obq", "activation"):
        want = float(torch.nn.functional.embedding(tokens, delta).square().sum(-1).mean())
    else:
        want = kl_by_hand(model, "model.embed_tokens", delta, tokens[:1])
    assert row[0] == pytest.approx(want, rel=1e-3) and row[0] > row[1] > 0

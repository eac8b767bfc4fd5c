"""End-to-end training of constants and norms: its derivatives, what it leaves alone, that it helps, and that it can be stopped."""

import copy
import json

import pytest
import torch
from conftest import make_sharp_model

from mxq_ext.errors import QuantizationError
from mxq_ext.evaluate import Reference, evaluate
from mxq_ext.fileio import load_tensors
from mxq_ext.progress import Progress
from mxq_ext.quantizers import distill as module
from mxq_ext.quantizers import quantize
from mxq_ext.quantizers.distill import DistillOptions, _Distillation, distill
from mxq_ext.quantizers.learned import LearnedWeight
from mxq_ext.stats.walk import capture_calls, final_hidden, frozen
from mxq_ext.structure import find_units

TINY = {"precision": "float32", "batch": 2}


@pytest.fixture(scope="module")
def model():
    return make_sharp_model()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 257, (8, 24), generator=torch.Generator().manual_seed(1))


def start_of(model, fmt="w2g32_asym", keep=()):
    method = "kmeans" if fmt.startswith("lut") else "rtn"
    return {u.name: quantize(model.get_submodule(u.name).weight.detach(), fmt, method=method) for u in find_units(model) if u.name not in keep}


def swapped(model, qtensors, norms=None):
    out = copy.deepcopy(model)
    for name, q in qtensors.items():
        out.get_submodule(name).weight.data = q.dequantize()
    for name, p in (norms or {}).items():
        out.get_parameter(name).data.copy_(p)
    return out


@pytest.mark.parametrize("fmt", ["w3g32_asym", "w2g32", "w4g32_fz", "nf4g32", "lut3", "w3"])
def test_slopes_are_derivatives_of_the_weight_along_its_constants(fmt):
    g = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(6, 70, generator=g)
    learned, gradient = LearnedWeight(w, quantize(w, fmt, method="kmeans" if fmt.startswith("lut") else "rtn")), torch.randn(6, 70, generator=g)
    slopes, base = learned.slopes(gradient), learned.value().double()
    for kind, slope in slopes[0].items():
        moved = copy.deepcopy(learned)
        size = 1 / 16  # far above the rounding of half precision; the weight is linear in its constants
        step = {k: torch.zeros_like(t) for k, t in slopes[0].items()}
        step[kind] = size * slope.sign()  # so that nothing cancels in the sum
        if kind == "table":  # entries of a row that meet would not be free
            step[kind] *= 0.25
        moved.move([step])
        change = ((moved.value().double() - base) * gradient).sum()
        assert change == pytest.approx(float((slope * step[kind]).sum()), rel=2e-2, abs=2e-4)
        assert torch.equal(moved.qtensor().dequantize(), moved.value())


def test_the_gradient_is_that_of_the_whole_models_kl(model, tokens):
    """Against one backward pass of torch through the whole student."""
    run = _Distillation(model, start_of(model), tokens, DistillOptions(steps=1, **TINY), None, module.SILENT)
    slopes, norms = {}, {n: torch.zeros_like(p) for n, p in run.norms.items()}
    with frozen(run.student), frozen(model):
        calls, target = capture_calls(run.student, tokens), final_hidden(model, tokens[3:4])
        loss = run._backward(3, calls, target, slopes, norms)
    whole = copy.deepcopy(run.student).requires_grad_(True)
    logp = torch.log_softmax(model(tokens[3:4], use_cache=False).logits, -1)
    logq = torch.log_softmax(whole(tokens[3:4], use_cache=False).logits, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    kl.backward()
    assert loss == pytest.approx(kl.item(), rel=1e-5)
    assert set(norms) == {n for n, p in whole.named_parameters() if p.dim() == 1}
    for n, g in norms.items():
        assert torch.allclose(g, whole.get_parameter(n).grad, rtol=1e-3, atol=1e-6 * float(g.abs().max() + 1))
    for n, found in slopes.items():
        expected = run.learned[n].slopes(whole.get_submodule(n).weight.grad)
        assert torch.allclose(found[0]["scales"], expected[0]["scales"], rtol=1e-3, atol=1e-5)
    assert len(slopes) == 14


@pytest.mark.parametrize("fmt, share", [("w2g32_asym", 0.95), ("lut2", 0.95), ("w3g32_fz", 0.98)])
def test_training_lowers_the_divergence_on_text_it_has_not_seen(model, tokens, fmt, share):
    start = start_of(model, fmt)
    qtensors, norms = distill(model, start, tokens, DistillOptions(steps=30, rate=5e-3, norms=5e-3, **TINY))
    unseen = torch.randint(0, 257, (8, 24), generator=torch.Generator().manual_seed(2))
    reference = Reference.of(model, unseen)
    before, after = (evaluate(swapped(model, *parts), reference, unseen).kl for parts in ((start,), (qtensors, norms)))
    assert after < share * before
    told = qtensors["model.layers.0.mlp.up_proj"].info
    reference = Reference.of(model, tokens)  # of so few windows all are judged by, before and after
    for key, parts in (("distill_kl_start", (start,)), ("distill_kl_end", (qtensors, norms))):
        assert told[key] == pytest.approx(evaluate(swapped(model, *parts), reference, tokens).kl, rel=0.05)
    assert told["distill_kl_end"] < told["distill_kl_start"]


def test_what_became_worse_is_not_kept(model, tokens, monkeypatch, capsys):
    start = start_of(model)
    step = _Distillation._step

    def spoil(self, *args):
        step(self, *args)
        for weight in self.modules.values():
            if hasattr(weight, "weight"):
                weight.weight.data = weight.weight.data * 1.5

    monkeypatch.setattr(_Distillation, "_step", spoil)
    out, norms = distill(model, start, tokens, DistillOptions(steps=1, **TINY), progress=Progress())
    assert all(torch.equal(out[n].dequantize(), q.dequantize()) for n, q in start.items())
    assert norms and all(torch.equal(w, model.get_parameter(n)) for n, w in norms.items())
    info = out["model.layers.0.mlp.up_proj"].info
    assert info["distill_kl_end"] == info["distill_kl_start"] and "distill_kl_end" not in start["model.layers.0.mlp.up_proj"].info
    assert "which is worse: the weights stay as they were" in capsys.readouterr().err


def test_codes_bytes_and_what_lies_outside_of_the_blocks_stay(model, tokens):
    start = start_of(model)
    before = copy.deepcopy(model.state_dict())
    qtensors, norms = distill(model, start, tokens, DistillOptions(steps=2, norms=0, **TINY))
    assert norms == {} and all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    for name, q in qtensors.items():
        assert q.nbytes() == start[name].nbytes() and torch.equal(q.rectangles[0].tensors["codes"], start[name].rectangles[0].tensors["codes"])
        assert torch.equal(q.dequantize(), start[name].dequantize()) is ("layers" not in name)


@pytest.mark.parametrize("fmt", ["w8g32", "w3g32_nest"])
def test_formats_whose_constants_stay_are_refused_alone(model, tokens, fmt):
    wide = start_of(model, fmt)
    with pytest.raises(QuantizationError, match="five bits or fewer"):
        distill(model, wide, tokens, DistillOptions(steps=1, **TINY))
    one = "model.layers.1.mlp.down_proj"
    mixed = wide | {one: quantize(model.get_submodule(one).weight.detach(), "w3g32", method="rtn")}
    out, _ = distill(model, mixed, tokens, DistillOptions(steps=2, **TINY))
    assert {n for n in out if not torch.equal(out[n].dequantize(), mixed[n].dequantize())} == {one}


def test_a_stopped_run_ends_with_the_same_bits(model, tokens, tmp_path, monkeypatch):
    start, options = start_of(model), DistillOptions(steps=11, **TINY)
    whole, norms = distill(model, start, tokens, options, directory=tmp_path / "a")
    once = _Distillation._step
    monkeypatch.setattr(_Distillation, "_step", lambda self, step, *args: 1 / 0 if step == 9 else once(self, step, *args))
    with pytest.raises(ZeroDivisionError):
        distill(model, start, tokens, options, directory=tmp_path / "b")
    monkeypatch.setattr(_Distillation, "_step", once)
    (state,) = (tmp_path / "b").iterdir()
    assert load_tensors(state)[1]["steps"] == "8" and len(json.loads(load_tensors(state)[1]["losses"])) == 8
    again, more = distill(model, start, tokens, options, directory=tmp_path / "b")
    assert all(torch.equal(whole[n].dequantize(), again[n].dequantize()) and whole[n].info == again[n].info for n in whole)
    assert all(torch.equal(norms[n], more[n]) for n in norms)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"norms": 1.0}, {"precision": "half"}])
def test_bad_options_are_refused(bad):
    with pytest.raises(QuantizationError, match=next(iter(bad))):
        DistillOptions(**bad)

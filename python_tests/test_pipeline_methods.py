"""Transforms and reconstruction as parts of the whole line, on tiny models."""

import copy
import json

import pytest
import torch
from conftest import make_sharp_model, make_tokenizer
from typer.testing import CliRunner

from mxq_ext import checkpoint, pipeline, verbs
from mxq_ext import text as texts
from mxq_ext.cli import app
from mxq_ext.errors import ModelError, PlanError, QuantizationError
from mxq_ext.evaluate import evaluate
from mxq_ext.formats import Format
from mxq_ext.plan import Plan
from mxq_ext.plan.presets import find_preset
from mxq_ext.structure import find_units

TEXT = " ".join(f"It is a truth, number {i * i}, that a test needs a text." for i in range(120))
TOKENS = torch.randint(0, 257, (4, 60), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    make_sharp_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    (path / "calib.txt").write_text(TEXT)
    return path


def error(model):
    with torch.no_grad():
        return float((model(TOKENS).logits - make_sharp_model()(TOKENS).logits).square().mean())


def run(source, plan="w3g32_asym", **options):
    options = {"text": source / "calib.txt", "windows": 8} | options
    return pipeline.quantize_model(make_sharp_model(), make_tokenizer(), plan=plan, **options)


@pytest.mark.parametrize("steps", [0, 10])
def test_reconstruction_lowers_the_error_on_other_text(source, tmp_path, steps):
    plan = Plan(default="w3g32_asym", units={"re:.*down_proj": "lut3", "model.layers.0.mlp.up_proj": "w2g32_asym", "model.embed_tokens": "keep"})
    plain, better = run(source, plan), run(source, plan, reconstruct=steps, work=tmp_path)
    print(f"{error(plain.model):.4f} -> {error(better.model):.4f}")
    assert error(better.model) < error(plain.model)
    assert better.nbytes == plain.nbytes and better.plan.units == plain.plan.units
    again = run(source, plan, reconstruct=steps, work=tmp_path)
    assert torch.equal(again.model(TOKENS).logits, better.model(TOKENS).logits), "read from the work directory"


def test_distillation_comes_last_and_is_saved_with_its_norms(source, tmp_path):
    plan = Plan(default="w2g32_asym", units={"re:.*down_proj": "lut3", "model.embed_tokens": "keep"})
    plain, better = run(source, plan), run(source, plan, distill=20, work=tmp_path / "work")
    assert better.nbytes == plain.nbytes and better.plan.units == plain.plan.units and better.plan.meta["distill"] == 20
    assert not torch.equal(better.model.model.norm.weight, plain.model.model.norm.weight)
    tokens = texts.windows(make_tokenizer(), " ".join(f"Such a text, {i ** 3} in number, is needed by a truth." for i in range(40)), 64)
    assert evaluate(better.model, make_sharp_model(), tokens).kl < evaluate(plain.model, make_sharp_model(), tokens).kl
    checkpoint.save(better.model, tmp_path / "q", plan=better.plan)
    again = checkpoint.load(tmp_path / "q", fuse=None)
    assert torch.equal(again(TOKENS).logits, better.model(TOKENS).logits)


def test_a_uniform_preset_counts_the_head_that_rotation_unties(source):
    tied, one = make_sharp_model(), Format.parse("w4g128_asym")
    nbytes = sum(one.nbytes(*u.shape) for u in find_units(tied))  # enough for the tied model in w4, too little for the untied one
    kept = run(source, None, nbytes=nbytes, preset="uniform_rtn", changes={"solver": ()})
    turned = run(source, None, nbytes=nbytes, preset="uniform_rtn", changes={"solver": ()}, transform="rotate")
    assert kept.nbytes <= nbytes and turned.nbytes <= nbytes and len(find_units(turned.model)) == len(find_units(kept.model)) + 1


@pytest.mark.parametrize("transform, method", [("rotate", "gptq"), ("rotate", "awq"), ("awq", "awq"), ("awq", "gptq")])
def test_a_transformed_model_is_quantized_and_loads_again(source, tmp_path, transform, method):
    report = verbs.quantize_checkpoint(source / "model", tmp_path / "q", uniform="w8g32", text=source / "calib.txt", windows=2,
                                          transform=transform, method=method)
    model = checkpoint.load(tmp_path / "q")
    assert report["predicted_bytes"] == report["bytes_on_disk"]
    names = [u.name for u in find_units(model) if u.layer < 0]
    assert names == (["model.embed_tokens", "lm_head"] if transform == "rotate" else ["model.embed_tokens"])
    assert error(model) < 1e-2 * float(make_sharp_model()(TOKENS).logits.square().mean()), "what is left is rounding to 8 bits"


def test_awq_without_a_plan_searches_for_the_widest_candidate_within_the_budget():
    units, preset = find_units(make_sharp_model()), find_preset(None, candidates=["w8", "w2g32_asym", "w4g32_asym", "w3g32_asym"])
    found = lambda **budget: {f.name for f in pipeline.awq_formats(units, preset, None, **{"bits": None, "nbytes": None} | budget).values()}  # noqa: E731
    assert found(bits=4.3) == {"w3g32_asym"} and found(bits=1.0) == {"w2g32_asym"} and found(bits=9.0) == {"w8"}
    total = sum(u.numel for u in units)
    assert found(nbytes=int(total * 5 / 8)) == {"w4g32_asym"}
    plan = Plan(default="w4g32", units={"model.layers.0.mlp.up_proj": "keep"})
    by_plan = pipeline.awq_formats(units, preset, plan, bits=None, nbytes=None)
    assert "model.layers.0.mlp.up_proj" not in by_plan and set(by_plan.values()) == {Format.parse("w4g32")}


def test_a_budget_with_a_transform(source):
    result = pipeline.quantize_model(make_sharp_model(), make_tokenizer(), bits=4.25, candidates=["w2g32_asym", "w4g32_asym", "w8"], text=source / "calib.txt",
                                     windows=2, transform="awq", reconstruct=0)
    assert 4.0 < result.stored_bits <= 4.25


def test_mistakes_are_told_before_calibration(source):
    for options, kind, match in (({"transform": "smooth"}, PlanError, "it is one of none, rotate, awq"), ({"reconstruct": -1}, QuantizationError, "steps=-1"),
                                 ({"distill": 0}, QuantizationError, "steps=0")):
        with pytest.raises(kind, match=match):
            run(source, text=source / "missing.txt", **options)
    model = copy.deepcopy(make_sharp_model())
    model.config.model_type = "gpt_neox"
    with pytest.raises(ModelError, match="rotating"):
        pipeline.quantize_model(model, make_tokenizer(), plan="w8", transform="rotate")


def test_the_command_passes_them_on(source, tmp_path):
    arguments = ["quantize", str(source / "model"), "-o", str(tmp_path / "q"), "--format", "w3g32_asym", "--text", str(source / "calib.txt"), "--windows", "2",
                 "--transform", "rotate", "--reconstruct", "1", "--distill", "2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "q" / "mxq_manifest.json").read_text())
    info = manifest["units"]["model.layers.1.mlp.up_proj"]["info"]
    assert {"block_error_start", "block_error_requantized", "block_error_trained", "distill_kl_end"} <= set(info)
    assert "lm_head" in manifest["units"]

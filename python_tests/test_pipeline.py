"""The whole line on tiny models: budgets, resuming, killing, and the same steps one by one through files."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice

import pytest
import torch
from conftest import make_model, make_sharp_model, make_tokenizer

from mxq_ext import checkpoint, pipeline, trials, verbs
from mxq_ext.checkpoint import load
from mxq_ext.decoding import end_tokens, greedy
from mxq_ext.errors import BudgetError, CheckpointError, ModelError, MxqError, MxqWarning, PlanError
from mxq_ext.nn import QuantEmbedding, QuantLinear, replace_linear
from mxq_ext.plan import Plan
from mxq_ext.plan.presets import PRESETS, find_kv, find_preset
from mxq_ext.structure import find_units

CANDIDATES = ["w2g32_asym", "w3g32_asym", "w4g32_asym", "w8"]
TEXT = "It is a truth that a test needs a text, and any text will do for a model whose weights are random numbers. " * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    make_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    (path / "calib.txt").write_text(TEXT)
    return path


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def run(source, out, **options):
    options = {"text": source / "calib.txt", "candidates": CANDIDATES, "windows": 3} | options
    return verbs.quantize_checkpoint(source / "model", out, **options)


def test_a_budget_is_kept_and_its_bytes_are_on_disk(source, tmp_path):
    report = run(source, tmp_path / "q", bits=4.25)
    assert 4.0 < report["stored_bits"] <= 4.25
    assert report["predicted_bytes"] == report["bytes_on_disk"]
    assert not (tmp_path / "q.work").exists()
    model = checkpoint.load(tmp_path / "q")
    units = find_units(model)
    assert all(isinstance(model.get_submodule(u.name), (QuantLinear, QuantEmbedding)) for u in units)
    assert sum(model.get_submodule(u.name).qtensor().nbytes() for u in units) == report["bytes_on_disk"]


def test_more_bytes_mean_less_loss(source, tmp_path):
    tokenizer = make_tokenizer()
    losses = []
    for bits in (3.0, 4.0, 5.0):
        result = pipeline.quantize_model(make_model(), tokenizer, bits=bits, text=source / "calib.txt", candidates=CANDIDATES, windows=3, work=tmp_path)
        units = find_units(result.model)
        choice = [result.table.column(result.plan.resolve(units)[u.name]) for u in units]
        losses.append(result.table.total(choice)[0])
        assert result.stored_bits <= bits
    assert losses[0] > losses[1] > losses[2]
    assert torch.isfinite(result.model(torch.arange(16)[None]).logits).all()


def test_infeasible_budget_says_by_how_much(source, tmp_path):
    with pytest.raises(BudgetError, match="bytes"):
        run(source, tmp_path / "q", bits=1.0)
    assert not (tmp_path / "q").exists()


def test_exactly_one_budget():
    with pytest.raises(PlanError, match="exactly one"):
        pipeline.quantize_model(make_model(), make_tokenizer(), bits=3, nbytes=10)


def test_uniform_plan_and_plan_file(source, tmp_path):
    run(source, tmp_path / "a", uniform="w4g32_asym")
    plan = tmp_path / "plan.json"
    Plan.uniform("w4g32_asym").save(plan)
    run(source, tmp_path / "b", plan=plan)
    assert torch.equal(logits(checkpoint.load(tmp_path / "a")), logits(checkpoint.load(tmp_path / "b")))


def test_a_plan_without_calibration_needs_no_text(source, tmp_path):
    """RTN reads no statistics, so none are collected; an explicit method wins over the plan's."""
    a = pipeline.quantize_model(make_model(), None, plan=Plan.uniform("w4g32_asym", quantizer={"name": "rtn"}), work=tmp_path / "work")
    b = pipeline.quantize_model(make_model(), None, plan="w4g32_asym", method="rtn")
    assert not list((tmp_path / "work").glob("stats*")) and a.stats is None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(a.model(ids).logits, b.model(ids).logits)
    with pytest.raises(PlanError, match="layers.0"):
        pipeline.quantize_model(make_model(), None, plan=Plan(units={"model.layers.0.mlp.gate": "w8"}))


def test_existing_output_is_refused(source, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is no mxq checkpoint"):
            run(source, tmp_path / "q", bits=4, overwrite=overwrite)
    assert not (tmp_path / "q.work").exists()


def test_each_step_through_files(source, tmp_path):
    stats, cost, plan, front = tmp_path / "stats", tmp_path / "cost.json", tmp_path / "plan.json", tmp_path / "front.csv"
    verbs.calibrate_model(source / "model", stats, text_path=source / "calib.txt", windows=3)
    report = verbs.sense_model(source / "model", stats, cost, candidates=CANDIDATES)
    assert [r["format"] for r in report["uniform"]] == CANDIDATES and (tmp_path / "cost.csv").exists()
    report = verbs.plan_from_table(cost, plan, bits=3.9, front=front)
    units = find_units(make_model())
    assert Plan.load(plan).stored_bits(units) <= 3.9 and sum(report["formats"].values()) == len(units)
    lines = front.read_text().splitlines()
    sizes = [int(line.split(",")[0]) for line in lines[1:]]
    losses = [float(line.split(",")[2]) for line in lines[1:]]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    run(source, tmp_path / "q", plan=plan, stats=stats, text=None)
    assert not list((tmp_path / "q").parent.glob("q.work"))
    # The steps one by one and the whole line agree.
    whole = pipeline.quantize_model(make_model(), make_tokenizer(), bits=3.9, text=source / "calib.txt", candidates=CANDIDATES, windows=3)
    assert whole.plan.resolve(units) == Plan.load(plan).resolve(units)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(whole.model(ids).logits, checkpoint.load(tmp_path / "q", fuse=None)(ids).logits)  # the same way through the layers


def test_sense_refuses_statistics_of_another_model(source, tmp_path):
    make_model(seed=7).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    verbs.calibrate_model(tmp_path / "other", tmp_path / "stats", text_path=source / "calib.txt", windows=2)
    with pytest.raises(CheckpointError, match="another model"):
        verbs.sense_model(source / "model", tmp_path / "stats", tmp_path / "cost.json", candidates=CANDIDATES)


def test_evaluate_and_generate_on_paths(source, tmp_path, monkeypatch):
    run(source, tmp_path / "q", bits=8)
    (tmp_path / "held.txt").write_text(TEXT[::-1])
    report = verbs.evaluate_checkpoint(tmp_path / "q", reference=source / "model", text=tmp_path / "held.txt", windows=2, length=64)
    assert report["perplexity"] > 1 and 0 <= report["kl"] < 1
    model, tokenizer = load(tmp_path / "q"), make_tokenizer()
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, ids.shape[1]:].tolist()
    assert [int(t) for t in islice(greedy(model, ids), 6)] == expected
    for tokens, ends in ((None, ()), (7, (7,)), ([7, 3], (3, 7))):
        model.generation_config.eos_token_id = tokens
        assert sorted(end_tokens(model)) == list(ends)
    monkeypatch.setattr(verbs, "end_tokens", lambda model: {expected[3]})
    assert verbs.generate_text(tmp_path / "q", "hello", max_new_tokens=6)["new_tokens"] == expected.index(expected[3]) + 1
    assert verbs.generate_text(tmp_path / "q", "hello", max_new_tokens=1)["new_tokens"] == 1
    with pytest.raises(MxqError, match="prompt"):
        verbs.generate_text(tmp_path / "q", "")
    with pytest.raises(ModelError, match=r"windows of 600 tokens: the model was made for 512 positions .*; ask for 512 at most"):
        verbs.evaluate_checkpoint(tmp_path / "q", windows=1, length=600)
    with pytest.warns(MxqWarning, match="5 tokens and up to 600 new ones: the model was made for 512 positions"):
        verbs.generate_text(tmp_path / "q", "hello", max_new_tokens=600)


def test_generating_in_other_ways(source, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    checkpoint.save(replace_linear(make_sharp_model(), "w8"), tmp_path / "q", tokenizer)
    path, some = tmp_path / "q", {"max_new_tokens": 12}
    monkeypatch.setattr(verbs, "end_tokens", lambda model: frozenset())
    plain, shown = verbs.generate_text(path, "hello", **some), []
    assert verbs.generate_text(path, "hello", show=shown.append, **some) == plain and "".join(shown) == plain["text"] and len(shown) > 1
    drawn = [verbs.generate_text(path, "hello", temperature=2.0, seed=seed, **some)["text"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != plain["text"]
    assert verbs.generate_text(path, "hello", temperature=1.0, top_p=1e-9, **some) == plain  # the most probable token alone
    assert verbs.generate_text(path, "hello", kv="k2v2_r0", **some)["new_tokens"] == 12
    with pytest.raises(ModelError, match="no chat template; continue the prompt instead"):
        verbs.generate_text(path, "hello", chat=True)
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(MxqError, match="sampling with"):
            verbs.generate_text(path, "hello", **bad)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    path = checkpoint.save(checkpoint.load(path), tmp_path / "chat", tokenizer)
    asked = []
    monkeypatch.setattr(verbs, "sample", lambda model, ids, **how: asked.append(tokenizer.decode(ids[0])) or iter([torch.tensor([72]), torch.tensor([105])]))
    for chat in (None, True, False):
        said = verbs.generate_text(path, "hello", chat=chat)["text"]
        assert said.startswith("hello") == (chat is False)
    assert asked == ["<user>hello<answer>"] * 2 + ["hello"]


def test_late_mistakes_leave_nothing_behind(source, tmp_path):
    (tmp_path / "folder").mkdir()
    for wrong, match in (({"text": tmp_path / "no.txt"}, "no.txt: there is no such file; check the path"),
                         ({"text": tmp_path / "folder"}, "folder: it is a directory; name a file in it"),
                         ({"stats": tmp_path / "nowhere"}, "nowhere"), ({"candidates": []}, "at least one format is needed"),
                         ({"text": source / "short.txt"}, "the text has")):
        (source / "short.txt").write_text("too short")
        with pytest.raises(MxqError, match=match):
            run(source, tmp_path / "q", bits=4, **wrong)
        assert not (tmp_path / "q.work").exists()


def test_a_cache_beside_the_weights(source, tmp_path):
    for name, budget in (("a", {"bits": 8}), ("b", {"uniform": "w4g32_asym"})):
        run(source, tmp_path / name, kv="kivi4", **budget)
        assert checkpoint.load(tmp_path / name).mxq_kv == find_kv("kivi4")
    plan = Plan.uniform("w4g32_asym", quantizer={"name": "rtn"})
    plan.kv = find_kv("k4v4")
    assert pipeline.quantize_model(make_model(), None, plan=plan).plan.kv == plan.kv
    assert pipeline.quantize_model(make_model(), None, plan=plan, kv="none").plan.kv is None
    with pytest.raises(PlanError, match="did you mean 'kivi4'"):
        pipeline.quantize_model(make_model(), None, plan=plan, kv="kivi")


def test_windows_are_no_longer_than_the_model_has_positions(source, tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    model.config.max_position_embeddings = 100
    for name, text in (("own", None), ("given", TEXT)):
        assert pipeline.calibration_tokens(model, tokenizer, tmp_path / name, text=text, windows=2).shape == (2, 100)
    assert pipeline.kv_tokens(model, tokenizer).shape == (4, 100) and pipeline.kv_tokens(model, tokenizer, context=60).shape == (4, 60)
    assert pipeline.kv_tokens(make_model(), tokenizer, context=9000).shape == (4, 512)


def test_budgets_that_are_none_or_many():
    with pytest.raises(PlanError, match="neither bits, nbytes nor plan: exactly one of the three must be given; pass for example bits=3.5"):
        pipeline.quantize_model(make_model(), None)
    with pytest.raises(PlanError, match="bits=3 and nbytes=10: exactly one of the three must be given; keep one of them"):
        pipeline.quantize_model(make_model(), None, bits=3, nbytes=10)
    with pytest.raises(ModelError, match="quantizing a LlamaForCausalLM: the model is quantized already"):
        pipeline.quantize_model(replace_linear(make_model(), "w8"), None, bits=3)


def test_trials_are_made_once(source, tmp_path, monkeypatch):
    work = tmp_path / "work"
    run(source, tmp_path / "a", bits=4, work=work)
    assert len(list((work / "trials").rglob("*.safetensors"))) == len(CANDIDATES) * len(find_units(make_model()))

    def refuse(*args, **kwargs):
        raise AssertionError("quantized again")

    monkeypatch.setattr(trials, "quantize", refuse)
    run(source, tmp_path / "b", bits=4, work=work)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "a")(ids).logits, checkpoint.load(tmp_path / "b")(ids).logits)


def test_killed_at_any_moment_leaves_nothing_and_resumes(source, tmp_path):
    """SIGKILL after growing delays: never a file under the final name before the run is whole; the last start ends the job."""
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from mxq_ext import verbs
        verbs.quantize_checkpoint({str(source / 'model')!r}, {str(tmp_path / 'q')!r}, bits=4.0, text={str(source / 'calib.txt')!r},
                                  candidates={CANDIDATES!r}, windows=3)
    """)
    killed = 0
    marks = ["stats-attention-gradient-none/calibrate.json", "stats-attention-gradient-none/stats.json", "trials", "plan.json"]
    for mark in marks:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "q.work" / mark).exists():
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        if process.returncode != 0:
            assert not (tmp_path / "q").exists()
    assert killed >= 2, "every run ended before it could be killed"
    if not (tmp_path / "q").exists():
        assert (tmp_path / "q.work" / "stats-attention-gradient-none").exists()
        subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)
    manifest = json.loads((tmp_path / "q" / "plan.json").read_text())
    assert manifest["mxq_plan"] == 1
    run(source, tmp_path / "fresh", bits=4.0)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "q")(ids).logits, checkpoint.load(tmp_path / "fresh")(ids).logits)


def test_a_work_directory_serves_one_model_at_a_time(tmp_path):
    """Without statistics nothing but the weights tells two models apart; even one changed weight must be seen."""
    plan = Plan.uniform("w8", quantizer={"name": "rtn"})
    fresh = {}
    for seed in (0, 1):
        fresh[seed] = logits(pipeline.quantize_model(make_model(seed=seed), None, plan=plan).model)
        assert torch.equal(logits(pipeline.quantize_model(make_model(seed=seed), None, plan=plan, work=tmp_path).model), fresh[seed])
    assert not torch.equal(fresh[0], fresh[1])
    edited = make_model()
    edited.model.layers[1].mlp.up_proj.weight.data[5, 7] += 100
    assert not torch.equal(logits(pipeline.quantize_model(edited, None, plan=plan, work=tmp_path).model), fresh[0])


def test_kept_units_count_their_bytes(source, tmp_path):
    plan = tmp_path / "plan.json"
    Plan(default="w4g32_asym", units={"model.embed_tokens": "keep"}).save(plan)
    report = run(source, tmp_path / "q", plan=plan, method="rtn")
    assert report["predicted_bytes"] == report["bytes_on_disk"] > 4 * 257 * 64
    assert Plan.load(tmp_path / "q" / "plan.json").quantizer["name"] == "rtn"


@pytest.mark.parametrize("options, match", [
    ({"bits": 4, "metric": "fishr"}, "fishr"), ({"bits": 4, "method": "gptqq"}, "gptqq"), ({"bits": 4, "method": "kmeans"}, "kmeans"),
    ({"bits": 1.0}, "bytes"), ({"uniform": "lut3", "method": "rtn"}, "lut3"),
])
def test_mistakes_are_told_before_calibration(source, tmp_path, options, match):
    with pytest.raises(MxqError, match=match):
        run(source, tmp_path / "q", **options)
    assert not (tmp_path / "q.work").exists()


def test_what_is_wrong_with_a_model_is_told_before_calibration(source, tmp_path):
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ModelError, match=r"the model's model.layers.1.mlp.up_proj.weight holds values that are NaN"):
        pipeline.quantize_model(model, make_tokenizer(), bits=4, text=source / "calib.txt", windows=2, work=tmp_path)
    model.model.layers[1].mlp.up_proj = Doubling(64, 96, bias=False)
    (tmp_path / pipeline.TOKENS).unlink()
    with pytest.raises(ModelError, match="Doubling computes more"):
        pipeline.quantize_model(model, make_tokenizer(), bits=4, text=source / "calib.txt", windows=2, work=tmp_path)
    assert not list(tmp_path.iterdir())
    model = make_model()
    model.model.layers[1].mlp.experts = torch.nn.Parameter(torch.zeros(4, 64, 64))
    with pytest.warns(MxqWarning, match="16,384 of the .* weights in the blocks of a LlamaForCausalLM"), pytest.raises(MxqError, match="cannot|no such file"):
        pipeline.quantize_model(model, make_tokenizer(), bits=4, text=tmp_path / "none.txt")


def test_a_model_without_tokenizer_or_quantized_already(source, tmp_path):
    make_model().save_pretrained(tmp_path / "bare")
    verbs.quantize_checkpoint(tmp_path / "bare", tmp_path / "q", uniform="w8", method="rtn")
    for call in (lambda: verbs.generate_text(tmp_path / "q", "hi"), lambda: verbs.evaluate_checkpoint(tmp_path / "q", text=source / "calib.txt")):
        with pytest.raises(MxqError, match="no tokenizer"):
            call()
    with pytest.raises(MxqError, match="quantized already"):
        verbs.quantize_checkpoint(tmp_path / "q", tmp_path / "again", uniform="w4", method="rtn")
    with pytest.raises(PlanError, match="names its own quantizer"):
        pipeline.quantize_model(make_model(), None, plan=Plan.uniform("w8"), preset="rtn")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", sorted(n for n, p in PRESETS.items() if p.unit == "linear" and p.source == "ours"))
def test_every_preset_runs(source, tmp_path, name, tied):
    if not tied:
        make_model(tied=False).save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "calib.txt").write_text(TEXT)
        source = tmp_path
    report = run(source, tmp_path / "q", bits=5.0, preset=name, candidates=["lut2", "lut4", "w8"] if name == "lut" else ["w2g32_asym", "w4g32_asym", "w8"])
    assert report["predicted_bytes"] == report["bytes_on_disk"]


def test_preset_refusals():
    with pytest.raises(PlanError, match="did you mean 'linear_kl'"):
        find_preset("linear_lk")
    assert find_preset("rtn", candidates=["w4g64_sym"]).candidates == ("w4g64",)

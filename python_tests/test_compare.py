"""``mxq compare`` on a tiny model: rows, refusals, resuming, and the arithmetic of its verdicts."""

import importlib.util
import json
import math

import pytest
import torch
from conftest import make_model, make_sharp_model, make_tokenizer

from mxq_ext import checkpoint, pipeline, verbs
from mxq_ext import text as texts
from mxq_ext.compare import Comparison, compare, contenders
from mxq_ext.errors import BudgetError, CheckpointError, PlanError
from mxq_ext.evaluate import evaluate
from mxq_ext.plan.presets import PRESETS, find_preset
from mxq_ext.verdicts import FLOAT, bits_at, verdicts

LACKING = 'owq missing=["a_lucky_hand"]'
SETUP = {"windows": 4, "eval_windows": 2, "length": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    make_sharp_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    (path / "calibration.txt").write_text(texts.calibration_text()[:20_000])
    (path / "held.txt").write_text(texts.heldout_text()[:4_000])
    setup = SETUP | {"text": path / "calibration.txt", "held_out": [path / "held.txt"]}
    presets, also = ["rtn", "uniform_rtn", "spqr"], ["mxq transform=rotate", "uniform_awq solver.tolerance=1", LACKING]
    result = compare(path / "model", path / "out", bits=[4.6, 5.2], presets=presets, also=also, **setup)
    return path, setup, result


def rows_of(result):
    return {r["name"]: r for r in result["rows"]}


def test_every_pair_has_a_row_and_refusals_say_why(run):
    _, _, result = run
    rows = rows_of(result)
    assert list(rows) == [FLOAT, *(f"{p} {b}" for b in ("4.6", "5.2") for p in ("rtn", "uniform_rtn", "spqr", "mxq transform=rotate",
                                                                               "uniform_awq solver.tolerance=1", LACKING))]
    assert "cannot run yet, it needs a_lucky_hand" in rows[f"{LACKING} 4.6"]["refused"]
    assert "the smallest choice takes" in rows["spqr 4.6"]["refused"] and "refused" not in rows["spqr 5.2"]
    assert rows["uniform_rtn 5.2"]["stored_bits"] < 5.1  # a control is taken as it is; elsewhere this budget lies between two of its formats
    assert {r["family"] for r in result["rows"]} == {"float", "ours", "controls", "frameworks"}
    for r in result["rows"]:
        if "refused" not in r and r["name"] != FLOAT:
            assert 0 < r["stored_bits"] <= r["bits"] and r["held"]["kl"] > 0 and r["decode_tokens_per_s"] > 0 and r["minutes"] > 0
            assert r["checkpoint_bytes"] > r["bytes"]


def test_rows_that_are_measured_again(run):
    row, (preset,) = rows_of(run[2])["rtn 4.6"], contenders(["rtn"])
    assert not Comparison.is_missing(row, preset)
    assert all(Comparison.is_missing(r, preset) for r in (None, row | {"refused": "no"}, row | {"candidates": row["candidates"][1:]}))
    assert not Comparison.is_missing({k: v for k, v in row.items() if k != "parts"}, preset)  # of an earlier version
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "rtn", find_preset("rtn", allocator="greedy"))
        assert Comparison.is_missing(row, preset)
        patch.setitem(PRESETS, "rtn", find_preset("rtn", allocator="dp"))
        assert not Comparison.is_missing(row, preset)


def test_the_checkpoint_of_a_row_is_what_was_measured(run):
    path, _, result = run
    row = rows_of(result)["rtn 4.6"]
    model = checkpoint.load(path / "out" / "checkpoints" / "rtn-4.6")
    tokens = texts.spread(texts.windows(make_tokenizer(), (path / "held.txt").read_text(), 64), 2)
    again = evaluate(model, verbs.load(path / "model")[0], tokens)
    assert again.nll_windows == row["held"]["nll_windows"] and again.kl_windows == pytest.approx(row["held"]["kl_windows"], rel=1e-6)
    assert checkpoint.bytes_on_disk(path / "out" / "checkpoints" / "rtn-4.6")["total"] == row["checkpoint_bytes"]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_is_measured_beside_ours(tmp_path):
    make_model(hidden=256, intermediate=256, layers=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "held.txt").write_text(texts.heldout_text()[:4_000])
    setup = SETUP | {"text": tmp_path / "held.txt", "held_out": [tmp_path / "held.txt"], "llama_cpp": ["Q8_0", "Q3_K_M"], "timed": False}
    result = compare(tmp_path / "model", tmp_path / "out", bits=[3.6], presets=["rtn"], **setup)
    rows = rows_of(result)
    assert list(rows) == [FLOAT, "rtn 3.6", *(f"llama.cpp {t}{m}" for t in ("Q8_0", "Q3_K_M") for m in ("", " imatrix"))]
    assert 0 < rows["llama.cpp Q8_0"]["held"]["kl"] < rows["llama.cpp Q3_K_M"]["held"]["kl"] != rows["llama.cpp Q3_K_M imatrix"]["held"]["kl"]
    assert {r["rival"] for r in result["rivals"]} >= {"llama.cpp Q8_0"} and all(r["best_bytes"] <= r["rival_bytes"] for r in result["rivals"])
    assert "llama.cpp Q3_K_M imatrix" in (tmp_path / "out" / "compare.md").read_text()
    assert compare(tmp_path / "model", tmp_path / "out", bits=[3.6], presets=["rtn"], **setup)["rows"] == json.loads(json.dumps(result["rows"]))


def test_what_was_measured_is_not_measured_again(run, monkeypatch):
    path, setup, result = run
    asked = []
    monkeypatch.setattr(pipeline, "quantize_model", lambda model, tokenizer, **kwargs: asked.append((kwargs["preset"], kwargs["bits"])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # only the missing row is tried
        compare(path / "model", path / "out", bits=[4.6, 5.5], presets=["rtn"], timed=False, **setup)
    assert asked == [("rtn", 5.5)]
    kept = json.loads((path / "out" / "compare.json").read_text())
    assert kept["rows"] == json.loads(json.dumps(result["rows"]))


def test_all_rows_share_one_calibration(run):
    path, _, _ = run
    # rtn needs what mxq does, uniform_awq the plain moments alone, and again of the model that it has scaled for a budget; a rotated model is another one, too.
    work = path / "out" / "work"
    assert [p.name for p in work.glob("stats-*")] == ["stats-attention-gradient-none"]
    assert sorted(p.parent.name.partition("-")[0] for p in work.glob("*/stats-*")) == ["awq", "awq", "rotate"]


def test_another_setup_is_refused(run):
    path, setup, _ = run
    with pytest.raises(CheckpointError, match="other held_out"):
        compare(path / "model", path / "out", bits=[4.6], presets=["rtn"], **(setup | {"length": 32}))


def test_pages_and_pictures(run):
    path, _, result = run
    page = (path / "out" / "compare.md").read_text()
    for r in result["rows"]:
        assert r["name"] in page
    assert f"{rows_of(result)['rtn 4.6']['held']['kl']:.4f}" in page
    points = (path / "out" / "pareto-held.csv").read_text().splitlines()
    assert len(points) == 1 + sum("refused" not in r for r in result["rows"]) - 1
    assert (path / "out" / "pareto-held.svg").read_text().lstrip().startswith("<?xml")


def test_verdicts_pair_the_best_within_a_budget(run):
    _, _, result = run
    rows = rows_of(result)
    found = {v["bits"]: v for v in result["verdicts"]}
    within = [r for r in result["rows"] if r["name"] != FLOAT and "refused" not in r and r["stored_bits"] <= 4.6]
    best = min((r for r in within if r["family"] != "controls"), key=lambda r: r["held"]["kl"])
    control = min((r for r in within if r["family"] == "controls"), key=lambda r: r["held"]["kl"])
    assert (found[4.6]["best"], found[4.6]["control"]) == (best["name"], control["name"])
    assert found[4.6]["kl"] == pytest.approx(best["held"]["kl"] - control["held"]["kl"])
    assert rows[found[5.2]["control"]]["stored_bits"] <= 5.2


def test_bits_at_a_rise_are_read_between_two_rows():
    def row(name, bits, ppl, family="ours"):
        return {"name": name, "family": family, "linear_bits": bits, "stored_bits": bits, "t": {"perplexity": ppl}}

    rows = [row(FLOAT, 32, 10.0, "float"), row("a", 2.0, 14.0), row("b", 3.0, 11.0), row("worse", 3.5, 12.0), row("c", 4.0, 10.25)]
    found = bits_at(rows, ["t"], rises=(0.05, 0.2, 0.01))[0]
    assert found["5%"] == pytest.approx(3 + math.log(0.1 / 0.05) / math.log(0.1 / 0.025))
    assert found["20%"] == pytest.approx(2 + math.log(0.4 / 0.2) / math.log(0.4 / 0.1))
    assert found["1%"] is None
    assert verdicts(rows, ["t"]) == []


def test_budgets_that_nothing_fits_make_a_page_too(run, tmp_path):
    path, setup, _ = run
    result = compare(path / "model", tmp_path / "out", bits=[0.5], presets=["rtn"], timed=False, **setup)
    page = (tmp_path / "out" / "compare.md").read_text()
    assert [("refused" in r) for r in result["rows"]] == [False, True] and "No plan fits these budgets" in page and "allow at least" in page
    assert not list((tmp_path / "out").glob("pareto-*"))


def test_a_directory_of_something_else_is_left_alone(run):
    path, setup, _ = run
    for out in (path / "model", path / "out" / "checkpoints" / "rtn-4.6"):
        with pytest.raises(CheckpointError, match="the directory holds something else .* choose another directory"):
            compare(path / "model", out, bits=[4], presets=["rtn"], **setup)
        with pytest.raises(CheckpointError, match="writing statistics to .* holds something else"):
            verbs.calibrate_model(path / "model", out)
    with pytest.raises(CheckpointError, match="exists and is no directory"):
        verbs.calibrate_model(path / "model", path / "held.txt")


def test_names_and_settings():
    found = contenders(["controls"], ["mxq reconstruct=2 allocator=greedy", "nf4"])
    assert [c.label for c in found][-2:] == ["mxq reconstruct=2 allocator=greedy", "nf4"]
    assert found[0].family == "controls" and found[-2].family == "ours" and found[-2].settings == ("reconstruct=2", "allocator=greedy")
    with pytest.raises(PlanError, match="did you mean 'slim_llm'"):
        contenders(["slim_lm"])
    with pytest.raises(PlanError, match="did you mean 'allocator'"):
        contenders([], ["mxq alocator=dp"])
    with pytest.raises(PlanError, match="no presets"):
        contenders([])
    with pytest.raises(BudgetError, match="above 0"):
        compare("nowhere", "out", bits=[3, -1])


def test_a_quantized_model_is_no_subject(run):
    path, setup, _ = run
    with pytest.raises(PlanError, match="quantized already"):
        compare(path / "out" / "checkpoints" / "rtn-4.6", path / "other", bits=[4], **setup)
    assert not (path / "other").exists() and torch.is_grad_enabled()

"""Time tables: what is looked up, what is foretold, what a limit does, and how they are measured."""

import json

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

from mxq_ext import bench, verbs
from mxq_ext.errors import BudgetError, MxqError, PlanError
from mxq_ext.formats import Format
from mxq_ext.plan import Bands, Plan
from mxq_ext.plan.times import TimeTable
from mxq_ext.sensitivity.table import CostTable
from mxq_ext.structure import find_units
from mxq_ext.testing.timing import Times

FORMATS = ["w2g32_asym", "w4g32_asym", "w8g32"]
TEXT = "Time is what a plan takes when it runs, and a text is what a test needs. " * 60


def synthetic(units, prefill=64, seed=0):
    """Times that follow no bytes: w8 is the fastest, as it may be where kernels differ."""
    rng = np.random.default_rng(seed)
    factor = {"w2g32_asym": 2.0, "w4g32_asym": 1.0, "w8g32": 0.5}
    us = {(*u.shape, f, m): factor[f] * u.numel * (m**0.5) / 1e3 * rng.uniform(0.9, 1.1) for u in units for f in FORMATS for m in (1, prefill)}
    return TimeTable(us, {1: 100.0, prefill: 3000.0})


@pytest.mark.parametrize("tied", [True, False])
def test_a_prediction_is_the_sum_of_the_linears_and_the_rest(tied):
    units = find_units(make_model(tied=tied))
    times = synthetic(units)
    plan = Plan(default="w4g32_asym", units={r"re:.*down_proj": "w8g32", r"re:.*\.0\.mlp\.up_proj": {"rows": [[32, "w2g32_asym"], [64, "w8g32"]]}})
    got = times.predict(units, plan.resolve(units))
    for rows, name in ((1, "decode"), (64, "prefill")):
        total = times.rest[rows]
        for u in units:
            if u.name == "model.embed_tokens" and not tied:
                continue  # a lookup
            m = 1 if u.layer < 0 else rows  # only the last position has logits
            if u.name.endswith("0.mlp.up_proj"):
                total += times.us[*u.shape, "w2g32_asym", m] * 32 / 96 + times.us[*u.shape, "w8g32", m] * 64 / 96
            else:
                total += times.us[*u.shape, "w8g32" if "down_proj" in u.name else "w4g32_asym", m]
        assert got[f"{name}_ms"] == pytest.approx(total / 1e3) and got[f"{name}_tokens_per_s"] == pytest.approx(1e6 * rows / total)
    assert got["prefill"] == 64


def test_files_and_refusals(tmp_path):
    units = find_units(make_model())
    times = synthetic(units)
    times.save(tmp_path / "t.json")
    again = TimeTable.load(tmp_path / "t.json")
    assert again.us == times.us and again.rest == times.rest
    with pytest.raises(PlanError, match="the table has w2g32_asym, w4g32_asym, w8g32 of that shape"):
        again.of((64, 64), Format.parse("nf4g64"), 1)
    with pytest.raises(PlanError, match="no times of that shape"):
        again.of((5, 7), Format.parse("w8g32"), 1)
    with pytest.raises(BudgetError, match="all but the linears takes 0.1 ms"):
        again.room(0.09)
    assert again.room(1.1) == pytest.approx(1e-3)
    record = json.loads((tmp_path / "t.json").read_text())
    for broken in (record | {"mxq_times": 9}, record | {"us": [[1, 2, "w8"]]}, record | {"us": []}, record | {"us": [[1, 2, "w8", 1, -1.0]]},
                   record | {"rest": {"1": float("inf")}}, {k: v for k, v in record.items() if k != "rest"}):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(MxqError):
            TimeTable.load(tmp_path / "broken.json")
    bands = Bands("rows", ((32, Format.parse("w2g32_asym")), (32, Format.parse("w8g32"))))
    assert again.of((64, 64), bands, 1) == pytest.approx((again.us[64, 64, "w2g32_asym", 1] + again.us[64, 64, "w8g32", 1]) / 2)
    with pytest.raises(PlanError, match="shapes of its units"):
        again.fill(CostTable(["a"], ["w8g32"], [[1.0]], [[1]], [1]))


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    """A cost table of the tiny model by `mxq sense`, and a synthetic time table of its shapes."""
    path = tmp_path_factory.mktemp("cost")
    make_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(TEXT)
    verbs.calibrate_model(path / "model", path / "stats", text_path=path / "text.txt", windows=2)
    verbs.sense_model(path / "model", path / "stats", path / "cost.json", candidates=FORMATS)
    synthetic(find_units(make_model())).save(path / "times.json")
    return path


def test_a_plan_under_a_time_limit(cost):
    """Meets bytes and time; a smaller limit gives up loss, not the limit; one that is too small names the least."""
    units = find_units(make_model())
    free = verbs.plan_from_table(cost / "cost.json", cost / "free.json", bits=4.6, times=cost / "times.json")
    assert free["predicted"]["decode_ms"] == pytest.approx(
        TimeTable.load(cost / "times.json").predict(units, Plan.load(cost / "free.json").resolve(units))["decode_ms"])
    losses = [free["loss"]]
    for share in (0.99, 0.97):
        limit = share * free["predicted"]["decode_ms"]
        got = verbs.plan_from_table(cost / "cost.json", cost / "limited.json", bits=4.6, times=cost / "times.json", max_ms_per_token=limit)
        assert got["predicted"]["decode_ms"] <= limit * (1 + 1e-9) and got["stored_bits"] <= 4.6
        losses.append(got["loss"])
    assert losses[0] < losses[1] <= losses[2]
    with pytest.raises(BudgetError, match="the fastest choice of that size takes"):
        verbs.plan_from_table(cost / "cost.json", cost / "limited.json", bits=4.6, times=cost / "times.json", max_ms_per_token=0.15)
    with pytest.raises(BudgetError, match="needs a time table"):
        verbs.plan_from_table(cost / "cost.json", cost / "limited.json", bits=4.6, max_ms_per_token=1.0)


def test_quantize_under_a_time_limit(cost, tmp_path):
    def run(out, **options):
        return verbs.quantize_checkpoint(cost / "model", tmp_path / out, candidates=FORMATS, stats=cost / "stats", work=tmp_path / "work",
                                            times=cost / "times.json", **options)

    free = run("a", bits=4.6)
    limit = 0.98 * free["predicted"]["decode_ms"]
    got = run("b", bits=4.6, max_ms_per_token=limit)
    assert got["predicted"]["decode_ms"] <= limit * (1 + 1e-9) and got["bytes_on_disk"] <= 4.6 * free["bytes_on_disk"] / free["stored_bits"]
    assert Plan.load(tmp_path / "b" / "plan.json").meta["predicted"] == got["predicted"]
    for options in ({"uniform": "w8g32"}, {"bits": 4.6, "preset": "mixllm"}):
        with pytest.raises(BudgetError, match="a search over whole linears"):
            run("c", max_ms_per_token=limit, **options)


def test_product_times_are_medians_less_the_call(monkeypatch):
    asked = []

    def fake(layers, rounds):
        asked.append((sorted(layers), rounds, [tuple(layers[n](0).shape) for n in layers]))
        return {n: Times(1e-9, {"": 5e-6, "w4g32": 25e-6, "w8": 4e-6}[n], rounds) for n in layers}

    monkeypatch.setattr(bench, "in_turns", fake)
    monkeypatch.setattr(bench, "copies", lambda nbytes: 1)
    got = bench.product_times({(48, 64): (1, 3)}, ["w4g32", "w8", "w4g32"], rounds=2)
    assert got == {(48, 64, f, m): pytest.approx(t) for m in (1, 3) for f, t in (("w4g32", 20.0), ("w8", 0.0))}
    assert asked[1] == (["", "w4g32", "w8"], 2, [(3, 48), (3, 48), (3, 32)])


def test_a_time_table_covers_a_model(monkeypatch, tmp_path):
    """Every linear of every block for both numbers of rows, the head for one; the rest is what whole models take beyond their linears."""
    monkeypatch.setattr(bench, "copies", lambda nbytes: 1)
    monkeypatch.setattr(bench, "product_times",
                        lambda shapes, formats, rounds, progress: {(*s, f, m): 1.0 for s, ms in shapes.items() for f in formats for m in ms})
    monkeypatch.setattr(bench, "speed", lambda model, prefill: {"decode_tokens_per_s": 1e6 / 115.0, "prefill_tokens_per_s": prefill * 1e6 / 1015.0})
    model = make_model(tied=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    times = bench.time_table(model, ["w4g32"], prefill=16)
    assert set(times.us) == {(n, k, f, m) for n, k in [(64, 64), (32, 64), (96, 64), (64, 96)] for f in ("w4g32", *bench.REFERENCE) for m in (1, 16)} \
        | {(257, 64, f, 1) for f in ("w4g32", *bench.REFERENCE)}
    assert times.rest == {1: pytest.approx(100.0), 16: pytest.approx(1000.0)}  # 14 linears and the head take a microsecond each
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    times.save(tmp_path / "times.json")
    assert TimeTable.load(tmp_path / "times.json").prefill == 16

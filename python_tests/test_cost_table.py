"""CostTable: what it refuses, what survives a file, and its sums."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from mxq_ext.errors import CheckpointError, PlanError
from mxq_ext.sensitivity.table import CostTable

UNITS, FORMATS = ["a.q", "a.k", "a.v"], ["w2g64", "w4g64", "keep"]


def make(**changes):
    fields = {"units": UNITS, "formats": FORMATS, "loss": [[0.3, 0.1, 0.0], [math.inf, 1 / 3, 1e-300], [2.0, -0.5, 7e22]],
              "nbytes": [[10, 20, 64], [11, 22, 65], [12, 24, 66]], "numel": [32, 32, 33], "seconds": None, "meta": {"metric": "fisher"}}
    return CostTable(**(fields | changes))


@pytest.mark.parametrize("seconds", [None, [[0.5, 0.25, 0.1], [1.0, math.nan, 1e-9], [3.0, 2.0, 1.0]]])
def test_json_survives_bit_for_bit(tmp_path, seconds):
    table = make(seconds=seconds)
    table.save(tmp_path / "cost.json")
    again = CostTable.load(tmp_path / "cost.json")
    assert (again.units, again.formats, again.meta) == (UNITS, FORMATS, {"metric": "fisher"})
    assert again.loss.tobytes() == table.loss.tobytes() and again.loss.dtype == np.float64
    assert np.array_equal(again.nbytes, table.nbytes) and np.array_equal(again.numel, table.numel) and again.nbytes.dtype == np.int64
    assert again.seconds is None if seconds is None else np.array_equal(again.seconds, table.seconds, equal_nan=True)
    # Strict JSON, which other languages read: no NaN or Infinity.
    json.loads((tmp_path / "cost.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_csv(tmp_path):
    make(seconds=np.full((3, 3), 0.5)).to_csv(tmp_path / "cost.csv")
    rows = list(csv.DictReader((tmp_path / "cost.csv").open()))
    assert len(rows) == 9 and list(rows[0]) == ["unit", "format", "loss", "nbytes", "stored_bits", "seconds"]
    assert (rows[4]["unit"], rows[4]["format"], float(rows[4]["loss"]), int(rows[4]["nbytes"])) == ("a.k", "w4g64", 1 / 3, 22)
    assert float(rows[4]["stored_bits"]) == 8 * 22 / 32 and rows[3]["loss"] == "inf" and rows[0]["seconds"] == "0.5"
    make().to_csv(tmp_path / "cost.csv")
    assert list(csv.DictReader((tmp_path / "cost.csv").open()))[0]["seconds"] == ""


def test_tensors_and_format_spellings_are_accepted():
    table = make(loss=torch.zeros(3, 3), nbytes=torch.ones(3, 3, dtype=torch.int32), numel=torch.tensor([1.0, 2.0, 3.0]),
                 formats=["w2g64_sym", "w4g64", "keep"])
    assert table.loss.dtype == np.float64 and table.numel.tolist() == [1, 2, 3] and table.formats == FORMATS


def test_sums():
    table = make()
    assert table.uniform("w4g64") == (pytest.approx(0.1 + 1 / 3 - 0.5), 66)
    assert table.uniform("w2g64") == (math.inf, 33)
    assert table.total([0, 1, 2]) == (0.3 + 1 / 3 + 7e22, 98)
    assert table.stored_bits(97) == 8.0
    assert table.possible.sum() == 8 and not table.possible[1, 0]
    for choice in ([0, 1], [0, 1, 3], [0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(PlanError, match=r"3 indices in 0\.\.2"):
            table.total(choice)


def test_subset_reorders():
    table = make(seconds=np.arange(9.0).reshape(3, 3)).subset(["keep", "w4g64_sym"])
    assert table.formats == ["keep", "w4g64"] and table.nbytes[0].tolist() == [64, 20] and table.seconds[2].tolist() == [8.0, 7.0]
    with pytest.raises(PlanError, match="format w8 of a cost table: its candidates are w2g64, w4g64, keep"):
        make().subset(["w8"])
    with pytest.raises(PlanError, match="unit a.k has no possible format"):
        make().subset(["w2g64"])


@pytest.mark.parametrize(("changes", "rule"), [
    ({"units": []}, "at least one unit"),
    ({"units": ["a", "b", "a"]}, "unit a is listed twice"),
    ({"units": ["a", "b", 3]}, "every unit needs a name"),
    ({"formats": ["w2g64", "w2g64_sym", "w8"]}, "format w2g64 is listed twice"),
    ({"formats": ["w2g64", "q4_k", "w8"]}, "q4_k"),
    ({"formats": ["w2g64", None, "w8"]}, "must be formats"),
    ({"loss": [[0.0, 1.0]]}, r"loss must have shape \(3, 3\), it has \(1, 2\)"),
    ({"seconds": [[0.0]]}, "seconds must have shape"),
    ({"numel": [1, 2]}, "numel must have shape"),
    ({"numel": [1, 0, 2]}, "at least one weight"),
    ({"nbytes": -np.ones((3, 3), int)}, "must not be negative"),
    ({"nbytes": np.full((3, 3), 1.5)}, "nbytes must be whole numbers"),
    ({"loss": [[0, 1, 2], [3, math.nan, 4], [0, 0, 0]]}, "loss of a.k as w4g64 is nan"),
    ({"loss": [[0, 1, 2], [3, 1, 4], [0, 0, -math.inf]]}, "loss of a.v as keep is -inf"),
    ({"loss": [[0, 1, 2], [math.inf] * 3, [0, 0, 0]]}, "unit a.k has no possible format"),
    ({"meta": []}, "meta must be an object"),
])
def test_refusals(changes, rule):
    with pytest.raises(PlanError, match=rule):
        make(**changes)


@pytest.mark.parametrize(("edit", "rule"), [
    (lambda o: o.update(mxq_cost_table=2), "of version 2: this mxq_ext reads version 1"),
    (lambda o: o.pop("mxq_cost_table"), "of version None"),
    (lambda o: o.pop("numel"), "exactly the keys"),
    (lambda o: o.update(extra=1), "exactly the keys"),
    (lambda o: o["loss"][1].pop(), "loss is no rectangular list"),
    (lambda o: o["loss"][1].__setitem__(0, "much"), "loss is no rectangular list"),
    (lambda o: o["nbytes"][1].__setitem__(0, "much"), "lists of whole numbers"),
    (lambda o: o["nbytes"][1].__setitem__(0, 1 << 70), "lists of whole numbers"),
    (lambda o: o["units"].pop(), "loss must have shape"),
    (lambda o: o["loss"].__setitem__(0, [None] * 3), "unit a.q has no possible format"),
])
def test_edited_files_are_refused(tmp_path, edit, rule):
    make().save(tmp_path / "cost.json")
    obj = json.loads((tmp_path / "cost.json").read_text())
    edit(obj)
    (tmp_path / "cost.json").write_text(json.dumps(obj))
    with pytest.raises(PlanError, match=rule):
        CostTable.load(tmp_path / "cost.json")


def test_cut_file(tmp_path):
    make().save(tmp_path / "cost.json")
    text = (tmp_path / "cost.json").read_text()
    (tmp_path / "cost.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        CostTable.load(tmp_path / "cost.json")

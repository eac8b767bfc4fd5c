"""The demo on a tiny model: every part of it but the model itself."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer

from mxq_ext import checkpoint, demo
from mxq_ext.errors import CheckpointError
from mxq_ext.progress import SILENT


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    make_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_model_path", lambda: path / "model")
        result = demo.run_demo(path / "out", quick=True, progress=SILENT)
    return path / "out", result


def test_rows_are_ordered_as_their_bytes(shown):
    _, result = shown
    rows = {r["name"]: r for r in result["rows"]}
    assert list(rows) == ["float32", *(f"uniform {f}" for f in demo.UNIFORM), "mixed-3.5", "a8: mixed-3.5", "mixed-2.5"]
    assert rows["float32"]["technical"]["kl"] == 0
    assert 0 < rows["uniform w8g128_asym"]["technical"]["kl"] < rows["uniform w3g128_asym"]["technical"]["kl"] < rows["uniform w2g64_asym"]["technical"]["kl"]
    assert rows["a8: mixed-3.5"]["bytes"] == rows["mixed-3.5"]["bytes"] and rows["a8: mixed-3.5"]["technical"] != rows["mixed-3.5"]["technical"]
    for name in ("mixed-3.5", "mixed-2.5"):
        assert rows[name]["stored_bits"] <= float(name[-3:]) and sum(rows[name]["formats"].values()) == 15
    assert all(r["decode_tokens_per_s"] > 0 and r["prefill_tokens_per_s"] > 0 for r in rows.values())


def test_what_is_left_on_disk(shown):
    out, result = shown
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "bits.svg").read_text().lstrip().startswith("<?xml")
    assert sorted(p.name for p in out.iterdir()) == ["bits.svg", "demo.json", "mixed-3.5", "work-quick"]
    kept = next(r for r in result["rows"] if r["name"] == demo.KEPT)
    assert sum(checkpoint.bytes_on_disk(out / demo.KEPT)["units"].values()) == kept["bytes"]
    assert torch.isfinite(checkpoint.load(out / demo.KEPT)(torch.arange(8)[None]).logits).all()


def test_comparisons_are_against_no_larger_plans(shown):
    _, result = shown
    bits = {r["name"]: r["stored_bits"] for r in result["rows"]}
    assert result["comparisons"] and {c["text"] for c in result["comparisons"]} == {"technical", "literary"}
    for c in result["comparisons"]:
        kl = {r["name"]: r[c["text"]]["kl"] for r in result["rows"]}
        fits = [n for n in bits if n.startswith("uniform") and bits[n] <= float(c["mixed"][6:])]
        assert c["uniform"] == min(fits, key=kl.get)
        nll = {r["name"]: r[c["text"]]["nll"] for r in result["rows"]}
        assert c["nll"] == pytest.approx(nll[c["mixed"]] - nll[c["uniform"]], abs=1e-9)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"writing a demonstration to .*: the directory holds something else \(mine.txt\)"):
        demo.run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

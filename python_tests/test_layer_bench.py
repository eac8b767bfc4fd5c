"""bench/run.py --op decode: every way through the same model, with its numbers kept."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_every_candidate_has_its_numbers(bench, tiny_dir, tmp_path, capsys):
    sizes = ["--new", "3", "--prefill", "9", "--rounds", "2"]
    bench.main(["--op", "decode", "--model", str(tiny_dir), "--plan", "w4g32", *sizes, "--out", str(tmp_path / "d.json")])
    kept = json.loads((tmp_path / "d.json").read_text())
    names = [row["name"] for row in kept["rows"]]
    ours = [f"mxq w4g32 {way} {compute}" for way in ("modules", "layers") for compute in ("a16", "a8")]
    assert names == ["transformers bf16", "torch int8 dynamic", *ours] and kept["new"] == 3
    for row in kept["rows"]:
        for what in ("generate", "step", "prefill"):
            speed = row[f"{what}_tokens_per_s"]
            assert speed["rounds"] == 2 and speed["best"] >= speed["median"] > 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)


def test_a_gguf_needs_llama_cpp(bench, tiny_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(SystemExit, match="--gguf needs the package llama-cpp-python"):
        bench.main(["--op", "decode", "--model", str(tiny_dir), "--plan", "w4g32", "--gguf", "x.gguf", "--out", "none"])

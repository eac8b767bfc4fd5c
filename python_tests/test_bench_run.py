"""bench/run.py: checks before it times, prints a table, keeps numbers with the machine they are from."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from mxq_ext import ops

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """bench/run.py as a module; the thread count, the target and sys.path come back."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "bench" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, threads = ops.target(), torch.get_num_threads()
    yield module
    ops.set_target(before)
    torch.set_num_threads(threads)


TINY = ["--op", "linear", "--formats", "w4g32,lut3", "--shapes", "33x70", "--m", "1,17", "--rounds", "1", "--seconds", "0.001"]


def test_table_and_json(bench, tmp_path, capsys):
    out = tmp_path / "linear.json"
    bench.main([*TINY, "--target", "scalar", "--out", str(out)])
    text = capsys.readouterr().out
    assert "### N=33 K=70 M=1" in text and "| w4g32 | `gemv_w4g32_a16__scalar` |" in text and "| lut3 | `gemm_lut3_a16__scalar` |" in text
    kept = json.loads(out.read_text())
    assert kept["op"] == "linear" and kept["machine"]["torch"] == torch.__version__ and kept["machine"]["target"] == "scalar"
    assert [(r["format"], r["m"]) for r in kept["rows"]] == [(f, m) for m in (1, 17) for f in ("torch fp32", "torch bf16", "w4g32", "lut3")]
    assert all(r["ms"] > 0 and r["ms_median"] >= r["ms"] and r["error"] < 0.02 for r in kept["rows"])


def test_wrong_results_are_not_timed(bench, monkeypatch):
    monkeypatch.setattr(ops, "linear", lambda x, p, bias=None: torch.zeros(*x.shape[:-1], p.shape[0]))
    with pytest.raises(SystemExit, match="w4g32 at 33x70, M=1 is wrong: error 1.00e[+]00"):
        bench.main(TINY)


def test_mistakes_end_without_a_traceback(bench):
    with pytest.raises(SystemExit, match="bench: uniform format of 5 bits"):
        bench.main(["--formats", "w5"])
    with pytest.raises(SystemExit, match="CPU target 'sse9'"):
        bench.main(["--target", "sse9"])

"""bench/run.py: checks before it times, prints tables, keeps numbers with the machine they are from."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mxq_ext import ops

ROOT = Path(__file__).parents[1]


@pytest.fixture
def linear(bench):
    import linear

    return linear


@pytest.fixture
def measure(bench, tmp_path):
    """Runs with tiny numbers and these arguments; gives the JSON that it writes."""

    def run(*args: str) -> dict:
        out = tmp_path / "linear.json"
        tiny = ["--shapes", "33x70", "--m", "1", "--peers", "none", "--compute", "a16", "--cycle", "1", "--rounds", "1", "--seconds", "0.001"]
        try:
            bench.main(["--op", "linear", "--device", "cpu", "--formats", "w4g32", "--out", str(out), *tiny, *args])
        finally:
            kept = json.loads(out.read_text()) if out.exists() else None
            run.kept = kept
        return kept

    return run


def test_tables_and_json(measure, tmp_path, capsys):
    kept = measure("--formats", "w4g32,lut3", "--m", "1,33", "--threads", "1,2", "--target", "scalar")
    text = capsys.readouterr().out
    assert "### N=33 K=70 M=1, 1 thread, reading " in text and "### N=33 K=70 M=33, 2 threads, reading " in text
    assert "| w4g32 a16 | 4 | `gemv_w4g32_a16__scalar` |" in text and "| lut3 a16 | 3 | `gemm_lut3_a16__scalar` |" in text
    assert (tmp_path / "linear.md").read_text().strip() in text
    assert kept["machine"]["torch"] == torch.__version__ and kept["machine"]["target"] == "scalar" and kept["options"]["op"] == "linear"
    names = ["torch fp32", "torch bf16", "w4g32 a16", "lut3 a16"]
    assert [(r["m"], r["threads"], r["name"]) for r in kept["rows"]] == [(m, t, n) for m in (1, 33) for t in (1, 2) for n in names]
    assert all(r["ms_median"] >= r["ms"] > 0 and r["error"] <= r["limit"] <= 0.01 for r in kept["rows"])
    assert kept["refused"] == [] and kept["peers"] == {}


def test_results_hold_no_path(measure, tmp_path):
    """--out is absolute here, and neither it nor the checkout or the interpreter may appear."""
    measure()
    for file in tmp_path.iterdir():
        assert not [p for p in (tmp_path, ROOT, Path(sys.prefix), Path.home()) if str(p) in file.read_text()]


def test_rates_and_ratios(measure, capsys):
    kept = measure("--formats", "w8,w4g32,w3g64", "--shapes", "64x256", "--peers", "torch")
    rows = {r["name"]: r for r in kept["rows"]}
    int8 = [r for r in rows.values() if r["bits"] == 8 and not r["ours"]]
    best = min(int8, key=lambda r: r["ms"])
    ours = rows["w8 a16"]
    assert ours["best_peer"] == best["name"] and ours["x_best_peer"] == pytest.approx(best["ms"] / ours["ms"])
    assert all(r["x_bf16"] == pytest.approx(rows["torch bf16"]["ms"] / r["ms"]) for r in rows.values())
    assert all(r["gb_per_s"] == pytest.approx(r["nbytes"] / r["ms"] / 1e6) for r in rows.values())
    assert all(r["read_share"] == pytest.approx(r["gb_per_s"] / r["read_gb_per_s"]) for r in rows.values())
    assert rows["torch int4pack g128"]["nbytes"] == 64 * 256 // 2 + 64 * 2 * 4
    assert rows["w3g64 a16"]["best_peer"] is None and rows["w3g64 a16"]["x_best_peer"] is None  # torch has no 3 bits
    assert kept["peers"] == {"torch": torch.__version__}
    assert f"| 64 x 256 | 1 | 8 | {ours['x_best_peer']:.2f} (w8 a16; {best['name']}) |" in capsys.readouterr().out


def test_int8_activations(measure, linear):
    kept = measure("--formats", "w4g64", "--shapes", "64x256", "--compute", "a16,a8")
    exact, rounded = (r for r in kept["rows"] if r["ours"])
    assert (exact["name"], rounded["name"]) == ("w4g64 a16", "w4g64 a8") and "_a8__" in rounded["kernel"]
    assert exact["error"] < 1e-5 < rounded["error"] < 0.02


def test_ladder(measure):
    before = ops.target()
    rows = measure("--ladder", "w4g32")["rows"]
    assert [r["name"] for r in rows] == ["torch fp32", "torch bf16", "dequantize, then torch", *(f"w4g32 a16 {t}" for t in ops.targets())]
    assert [r["kernel"] for r in rows[3:]] == [f"gemv_w4g32_a16__{t}" for t in ops.targets()]
    assert all(r["x_first_step"] == pytest.approx(rows[2]["ms"] / r["ms"]) for r in rows)
    assert ops.target() == before


def test_a_missing_peer_is_one_line(measure, linear, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "peers.ort", raising=False)
    kept = measure("--peers", "onnxruntime,torch")
    assert capsys.readouterr().out.count("peer onnxruntime is skipped: onnxruntime is not installed (pip install -r third_party/peers.txt)\n") == 1
    assert list(kept["peers"]) == ["torch"] and "torch int8 dynamic fbgemm" in [r["name"] for r in kept["rows"]]


def test_wrong_results_are_not_timed(measure, monkeypatch):
    monkeypatch.setattr(ops, "linear", lambda x, p, *_: torch.zeros(*x.shape[:-1], p.shape[0]))
    with pytest.raises(SystemExit, match="1 rows could not be timed, the first: w4g32 a16 at 33x70, M=1, threads=1: it is wrong, error 1.00e[+]00 above 1"):
        measure()
    assert [r["name"] for r in measure.kept["rows"]] == ["torch fp32", "torch bf16"] and len(measure.kept["refused"]) == 1


def test_peers_that_are_wrong_or_fail_leave_the_others(measure, linear, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no such kernel\nin /home/someone/kernels.cc:7")

    def candidates(case):
        good = next(linear.references(case))
        yield dataclasses.replace(good, name="shifted", dense=good.dense.roll(1, 0))
        yield dataclasses.replace(good, name="failing", bind=fail)
        yield dataclasses.replace(good, name="fine")

    modules = [SimpleNamespace(__name__="a library", candidates=candidates), SimpleNamespace(__name__="another", candidates=fail)]
    monkeypatch.setattr(linear, "load", lambda names: (modules, {}))
    with pytest.raises(SystemExit, match="3 rows could not be timed"):
        measure()
    assert "fine" in [r["name"] for r in measure.kept["rows"]]
    text = capsys.readouterr().out
    assert "error: another at 33x70: it fails with RuntimeError (no such kernel in kernels.cc:7); it is not timed" in text
    assert "error: failing at 33x70, M=1, threads=1: it fails with RuntimeError (no such kernel in kernels.cc:7); it is not timed" in text
    assert "error: shifted at 33x70, M=1, threads=1: it is wrong, error 1" in text


def test_every_copy_is_checked(linear):
    """A copy that a library loses or mixes up would be timed as if it were right."""
    case = linear.Case.random(40, 64)
    makes = iter([case.weight, case.weight, torch.zeros_like(case.weight)])
    c = dataclasses.replace(next(linear.references(case)), bind=linear.eager(lambda: next(makes), torch.nn.functional.linear))
    with pytest.raises(linear.MxqError, match="it is wrong, error 1.00e[+]00"):
        linear.checked(c, case, torch.randn(1, 64), 1, 3 * c.nbytes)


def test_sets_of_shapes(linear):
    assert linear.shapes("llama3-8b,2x3")[::4] == [(4096, 4096), (2, 3)]
    assert linear.shapes("smollm2") == [(1536, 576), (576, 1536), (576, 576), (192, 576)]


def test_peers_are_pinned(linear):
    from peers import LIBRARIES

    pinned = {line.split("==")[0] for line in (ROOT / "third_party" / "peers.txt").read_text().splitlines() if "==" in line and line[0] != "#"}
    assert pinned >= {distribution for _, distribution in LIBRARIES.values()}


@pytest.mark.parametrize("args, message", [
    (["--formats", "w7"], "bench: uniform format of 7 bits"),
    (["--target", "sse9"], "bench: CPU target 'sse9'"),
    (["--shapes", "4096"], "bench: shape '4096': a shape is NxK with whole numbers above 0; write 4096x4096, or one of llama3-8b, smollm2"),
    (["--m", "1,0"], "bench: --m 1,0: '0' is no whole number above 0"),
    (["--threads", "two"], "bench: --threads two: 'two' is no whole number above 0"),
    (["--peers", "tinygrad"], "bench: peer 'tinygrad': the peers are torch, onnxruntime, "),
    (["--compute", "a4"], "bench: --compute a4: this build computes in a16"),
])
def test_mistakes_end_without_a_traceback(measure, args, message):
    with pytest.raises(SystemExit) as error:
        measure(*args)
    assert str(error.value).startswith(message) and measure.kept is None


def test_mixed_weights_against_their_parts(bench, tmp_path, capsys):
    out = tmp_path / "mixed.json"
    bench.main(["--op", "mixed", "--size", "512", "--rounds", "1", "--seconds", "0.001", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["name"], r["compute"]) for r in rows] == [(n, c) for c in ops.COMPUTES for n in ("row bands", "column bands, outliers, sparse")]
    assert all(r["ratio"] == pytest.approx(r["ms"] / r["predicted_ms"]) for r in rows) and "w2g128+w3g128+w4g128+w8g128" in capsys.readouterr().out


def test_stack_of_layers(bench, tmp_path):
    out = tmp_path / "stack.json"
    bench.main(["--op", "stack", "--shrink", "32", "--rounds", "1", "--seconds", "0.001", "--out", str(out)])
    rows = {r["name"]: r for r in json.loads(out.read_text())["rows"]}
    assert rows["mixed"]["stored_bits"] < 3.04 + 0.2 and rows["uniform w8"]["x_w8"] == 1 and rows["torch bf16"]["x_bf16"] == 1
    assert rows["mixed"]["x_w8"] == pytest.approx(rows["uniform w8"]["ms"] / rows["mixed"]["ms"])


def attend(bench, tmp_path, *args):
    out = tmp_path / "attention.json"
    tiny = ["--pairs", "4/2,16/3", "--head-dim", "32", "--kv-heads", "3", "--heads", "6", "--cycle", "1", "--rounds", "1", "--seconds", "0.001"]
    bench.main(["--op", "attention", "--contexts", "70,200", "--out", str(out), *tiny, *args])
    return json.loads(out.read_text())["rows"]


def test_attention_beside_sdpa(bench, tmp_path, capsys):
    rows = attend(bench, tmp_path)
    assert [(r["context"], r["key"], r["value"]) for r in rows] == [(n, *p) for n in (70, 200) for p in ((None, None), (None, None), (4, 2), (16, 3))]
    for r in rows:
        peers = {kind: next(p for p in rows if p["context"] == r["context"] and p["name"].startswith(f"sdpa {kind}")) for kind in ("fp32", "bf16")}
        assert all(r[f"x_sdpa_{kind}"] == pytest.approx(p["ms"] / r["ms"]) for kind, p in peers.items())
        assert r["gb_per_s"] == pytest.approx(r["nbytes"] / r["ms"] / 1e6) and r["read_share"] == pytest.approx(r["gb_per_s"] / r["read_gb_per_s"])
        assert r["gflop_per_s"] == pytest.approx(4 * 6 * 32 * r["context"] / r["ms"] / 1e6) and 0 <= r["error"] <= r["limit"] <= 0.01
    # 200 tokens: two pages, 72 newest in float32
    assert rows[6]["nbytes"] == 3 * (2 * 64 * 32 * (4.5 + 2 + 32 / 32) / 8 + 2 * 72 * 32 * 4) and rows[4]["nbytes"] == 2 * 3 * 200 * 32 * 4
    text = capsys.readouterr().out
    assert "### 200 tokens, 6 heads over 3 of 32, 1 thread, reading " in text and "| k4v2 | " in text


def test_wrong_attention_is_not_timed(bench, tmp_path, monkeypatch):
    from mxq_ext.kv import ops as kv_ops

    monkeypatch.setattr(kv_ops, "attend", lambda q, *a, **k: torch.zeros_like(q))
    with pytest.raises(SystemExit, match="bench: attention k4v2 over 70 tokens: it is wrong, error 1.00e[+]00 above"):
        attend(bench, tmp_path)


@pytest.mark.parametrize("args, message", [
    (["--pairs", "4/5"], "bench: --pairs 4/5: a pair is two of 2, 3, 4, 8, 16 with a slash between; write for example 4/2"),
    (["--heads", "7"], "bench: --heads 7: it must be a multiple of --kv-heads, 3"),
])
def test_mistakes_in_attention_options(bench, tmp_path, args, message):
    with pytest.raises(SystemExit) as error:
        attend(bench, tmp_path, *args)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["attention-cpu.json", "attention-cpu-avx2.json"])
def test_published_attention_results_hold_what_is_claimed(name):
    """Four bits: faster than torch over both float caches from 4096 tokens on, and linear in the context."""
    rows = json.loads((ROOT / "bench" / "results" / name).read_text())["rows"]
    assert {r["context"] for r in rows} == {1024, 4096, 16384, 65536}
    assert all((r["head_dim"], r["kv_heads"]) == (128, 8) and r["error"] <= r["limit"] for r in rows)
    four = {r["context"]: r for r in rows if (r["key"], r["value"], r["threads"]) == (4, 4, 1)}
    for n in (4096, 16384, 65536):
        assert min(four[n]["x_sdpa_fp32"], four[n]["x_sdpa_bf16"], four[n]["x_sdpa_fp32_median"], four[n]["x_sdpa_bf16_median"]) > 1
        assert four[n]["ns_per_token"] == pytest.approx(four[65536]["ns_per_token"], rel=0.15)

"""bench/run.py --device cuda, without a GPU: the harness runs on the pretended device with a clock of its own, so that no time here means anything."""

import json
import sys
from types import SimpleNamespace

import pretend_gpu
import pytest
import torch

from mxq_ext import _native, cuda, ops
from mxq_ext.testing.timing import Times


@pytest.fixture
def linear_cuda(bench):
    import linear_cuda

    return linear_cuda


@pytest.fixture
def attention_cuda(bench):
    import attention_cuda

    return attention_cuda


class Clock:
    """Says that a replay takes as many microseconds as it makes products."""

    def __init__(self):
        self.replays = 0

    def capture(self, run):
        run()
        return run

    def seconds(self, replay, times):
        for _ in range(times):
            replay()
        self.replays += times
        return len(replay.__self__.weights) * 1e-6


def on_the_pretended_device(bench, module, op, tiny, monkeypatch, tmp_path):
    """A function that runs ``--op`` with ``module``, small unless told otherwise, and gives the JSON that is written, which it keeps as ``kept``."""
    monkeypatch.setattr(module, "check_device", lambda: None)
    monkeypatch.setattr(module, "where", lambda: {"card": "none"})
    monkeypatch.setattr(module, "Clock", Clock)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    out = tmp_path / "cuda.json"

    def run(*args):
        few = ["--peers", "none", "--cycle", "1", "--rounds", "3", "--seconds", "2e-6"]
        with pretend_gpu.pretend_gpu(monkeypatch):
            try:
                bench.main(["--op", op, "--device", "cuda", "--out", str(out), *few, *tiny, *args])
            finally:
                run.kept = json.loads(out.read_text()) if out.exists() else None
        return run.kept

    return run


@pytest.fixture
def measure(bench, linear_cuda, monkeypatch, tmp_path):
    return on_the_pretended_device(bench, linear_cuda, "linear", ["--shapes", "40x128", "--m", "1", "--formats", "w4g64"], monkeypatch, tmp_path)


def test_tables_and_json(measure, monkeypatch, capsys):
    monkeypatch.setattr("linear_cuda.copies", lambda nbytes, cycle: 3)
    kept = measure("--formats", "w4g64,lut3", "--m", "1,20")
    text = capsys.readouterr().out
    assert kept["machine"]["card"] == "none" and kept["machine"]["torch"] == torch.__version__ and kept["options"]["cycle"] == 1
    assert [(r["m"], r["name"]) for r in kept["rows"]] == [(m, n) for m in (1, 20) for n in ("torch float16", "w4g64", "lut3")]
    for r in kept["rows"]:
        assert r["us"] == r["us_median"] == pytest.approx(1) and r["copies"] == 3 and 0 < r["error"] <= r["limit"] < 0.011
        assert r["gb_per_s"] == pytest.approx(r["nbytes"] / 1e3) and r["copy_gb_per_s"] == pytest.approx(2 * 2**20 / 1e3)
        assert r["copy_share"] == pytest.approx(r["gb_per_s"] / r["copy_gb_per_s"]) and r["x_torch"] == pytest.approx(1)
    assert "### N=40 K=128 M=20, copying 2097 GB/s" in text and "| w4g64 | 4 | `mv_w4g64_a16__sm80` |" in text and "| `mm_lut3_a16__sm80` |" in text


def test_copies_fill_the_cycle(measure):
    (_, row) = measure()["rows"]
    assert row["nbytes"] * (row["copies"] - 1) < 1 << 20 <= row["nbytes"] * row["copies"]


def test_what_a_graph_computes_is_checked(measure, monkeypatch):
    """Not what came out before it was captured: results are NaN until the replay writes them."""
    monkeypatch.setattr("linear_cuda.copies", lambda nbytes, cycle: 2)

    class Stuck(Clock):
        def capture(self, run):
            run()
            return lambda: None if run.__self__.call is ops.linear else run()

        def seconds(self, replay, times):
            return 1e-6

    monkeypatch.setattr("linear_cuda.Clock", Stuck)
    with pytest.raises(SystemExit, match="1 rows could not be timed, the first: w4g64 at 40x128, M=1: it is wrong, error inf above"):
        measure()
    assert [r["name"] for r in measure.kept["rows"]] == ["torch float16"]


def test_peers(measure, linear_cuda, monkeypatch, capsys):
    def good(case, dtype, device, bound):
        w = case.weight.to(device, dtype)
        twice = bound(w.clone, lambda x, w: 2 * torch.nn.functional.linear(x, w))
        yield linear_cuda.Candidate("twice", 4, w.nbytes, 1e-2, 2 * case.weight[case.sample], twice, dtype)

    def bad(case, dtype, device, bound):
        raise TypeError("pack() takes 3 arguments")

    monkeypatch.setattr("linear_cuda.copies", lambda nbytes, cycle: 1)
    monkeypatch.setattr(linear_cuda.gpu, "load", lambda names: ({"good": good, "bad": bad}, {"good": "1", "bad": "2"}))
    with pytest.raises(SystemExit, match=r"1 rows could not be timed, the first: bad at 40x128: it fails with TypeError \(pack\(\) takes 3 arguments\)"):
        measure("--peers", "all")
    rows = {r["name"]: r for r in measure.kept["rows"]}
    assert rows["w4g64"]["x_best_peer"] == pytest.approx(1) and rows["torch float16"]["x_best_peer"] == pytest.approx(1)
    assert measure.kept["peers"]["good"] == "1"


def test_ratios(linear_cuda):
    case = linear_cuda.Case.random(8, 32)
    made = {"torch float16": (16, 40e-6, False), "w4": (4, 10e-6, True), "theirs": (4, 15e-6, False), "other": (4, 30e-6, False), "w3": (3, 8e-6, True)}
    candidates = [linear_cuda.Candidate(name, bits, 1000 * bits, 1e-3, case.weight, None, ours=ours) for name, (bits, _, ours) in made.items()]
    times = {name: Times(t, 2 * t, 3) for name, (_, t, _) in made.items()}
    rows = {r["name"]: r for r in linear_cuda.table(candidates, times, dict.fromkeys(made, (5, 1e-4)), case, 2, 1e12)}
    assert rows["w4"]["x_torch"] == pytest.approx(4) and rows["w4"]["x_best_peer"] == pytest.approx(1.5) and rows["w3"]["x_best_peer"] is None
    assert rows["w4"]["us"] == pytest.approx(10) and rows["w4"]["us_median"] == pytest.approx(20)
    assert rows["w4"]["gb_per_s"] == pytest.approx(0.4) and rows["w4"]["copy_share"] == pytest.approx(0.4e9 / 1e12)


def test_turns_rotate_and_give_each_its_seconds(linear_cuda):
    order = []

    class Slow(Clock):
        def seconds(self, replay, times):
            order.append((replay(), times))
            return {"a": 0.01, "b": 0.1}[replay()]

    times = linear_cuda.in_turns({"a": lambda: "a", "b": lambda: "b"}, 2, 0.05, Slow())
    assert order == [("a", 1), ("b", 1), ("a", 5), ("b", 1), ("b", 1), ("a", 5)] and times["a"] == Times(0.01, 0.01, 2)


def test_clocks_as_nvidia_smi_tells_them(linear_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    asked = []

    def answer(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=0, stdout="NVIDIA H100, 580.1, 1980, 2619, 1980, 2619, 700.00, 31\n")

    assert linear_cuda.smi(answer) == dict(zip(linear_cuda.SMI, ["NVIDIA H100", "580.1", "1980", "2619", "1980", "2619", "700.00", "31"], strict=True))
    assert asked[0][:1] + asked[0][-2:] == ["nvidia-smi", "-i", "1"]

    def missing(*args, **kwargs):
        raise FileNotFoundError(2, "nvidia-smi")

    for run in (missing, lambda *a, **k: SimpleNamespace(returncode=9, stdout=""), lambda *a, **k: SimpleNamespace(returncode=0, stdout="odd\n")):
        assert linear_cuda.smi(run) == dict.fromkeys(linear_cuda.SMI)


@pytest.fixture
def attend(bench, attention_cuda, monkeypatch, tmp_path):
    tiny = ["--contexts", "70,200", "--pairs", "4/2,16/3", "--head-dim", "32", "--kv-heads", "3", "--heads", "6"]
    return on_the_pretended_device(bench, attention_cuda, "attention", tiny, monkeypatch, tmp_path)


@pytest.fixture
def three_copies(monkeypatch, bench):
    monkeypatch.setattr("attention.copies", lambda nbytes, cycle: 3)


def test_attention_beside_sdpa(attend, three_copies, capsys):
    kept = attend()
    text = capsys.readouterr().out
    assert kept["machine"]["card"] == "none" and kept["options"]["contexts"] == "70,200" and kept["refused"] == []
    rows = kept["rows"]
    assert [(r["context"], r["key"], r["value"]) for r in rows] == [(n, *p) for n in (70, 200) for p in ((None, None), (4, 2), (16, 3))]
    for r in rows:
        assert r["us"] == r["us_median"] == pytest.approx(1) and r["copies"] == 3 and 0 < r["error"] <= r["limit"] < 0.011
        assert r["gb_per_s"] == pytest.approx(r["nbytes"] / 1e3) and r["copy_share"] == pytest.approx(r["gb_per_s"] / r["copy_gb_per_s"])
        assert r["copy_gb_per_s"] == pytest.approx(2 * 2**20 / 1e3) and r["x_sdpa"] == r["x_best_float"] == pytest.approx(1)
    # 200 tokens: two pages, 72 newest in fp16
    assert rows[4]["nbytes"] == 3 * (2 * 64 * 32 * (4.5 + 2 + 32 / 32) / 8 + 2 * 72 * 32 * 2) and rows[3]["nbytes"] == 2 * 3 * 200 * 32 * 2
    assert "### 200 tokens, 6 heads over 3 of 32, copying 2097 GB/s" in text and "| k4v2 | `attend_k4v2_d32__sm80` |" in text


def test_copies_of_a_cache_fill_the_cycle(attend):
    for r in attend("--contexts", "200", "--pairs", "2/2")["rows"]:
        assert r["nbytes"] * (r["copies"] - 1) < 1 << 20 <= r["nbytes"] * r["copies"]


def test_wrong_attention_and_peers_that_fail_are_not_timed(attend, attention_cuda, three_copies, monkeypatch):
    def good(k, v, q, options):
        yield attention_cuda.Candidate("theirs", None, k.nbytes, 2, 1e-2, tuple(x[:, :2].float().cpu() for x in (k, v)), [],
                                       lambda i: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    def bad(k, v, q, options):
        raise TypeError("decode() takes 3 arguments")

    monkeypatch.setattr(attention_cuda.gpu, "load", lambda names, libraries: ({"good": good, "bad": bad}, {"good": "1", "bad": "2"}))
    monkeypatch.setattr(attention_cuda.kv_cuda, "attend", lambda q, *a, **k: torch.zeros_like(q))
    with pytest.raises(SystemExit, match=r"3 rows could not be timed, the first: bad over 70 tokens: it fails with TypeError \(decode\(\) takes 3 arguments"):
        attend("--contexts", "70", "--peers", "all")
    assert [r["name"] for r in attend.kept["rows"]][1:] == ["theirs"] and attend.kept["peers"] == {"good": "1", "bad": "2"}
    assert "attention k4v2 over 70 tokens: it is wrong, error 1.00e+00 above" in attend.kept["refused"][1]


def test_ratios_of_attention(attention_cuda):
    none = (torch.zeros(1, 2, 100, 32),) * 2
    made = {"sdpa fp16, shared heads": (None, 40e-6), "sdpa fp16, rows": (None, 20e-6), "flashinfer fp16": (None, 16e-6), "k4v4": ((4, 4), 8e-6)}
    candidates = [attention_cuda.Candidate(name, p, 1000, 5, 1e-3, none, [], None) for name, (p, _) in made.items()]
    times = {name: Times(t, 2 * t, 3) for name, (_, t) in made.items()}
    options = SimpleNamespace(head_dim=32, kv_heads=2, heads=4)
    rows = {r["name"]: r for r in attention_cuda.table(candidates, times, dict.fromkeys(made, 1e-4), {"k4v4": "attend_k4v4"}, 100, 1e9, options)}
    assert list(rows) == ["sdpa fp16, rows", "flashinfer fp16", "k4v4"] and rows["k4v4"]["kernel"] == "attend_k4v4"
    assert rows["k4v4"]["x_sdpa"] == pytest.approx(2.5) and rows["k4v4"]["x_best_float"] == pytest.approx(2)
    assert rows["k4v4"]["us_median"] == pytest.approx(16) and rows["k4v4"]["copy_share"] == pytest.approx(0.125)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused(bench, linear_cuda, monkeypatch, tmp_path):
    refused = "bench: bench --device cuda: {}; run `mxq doctor` on a machine with an NVIDIA GPU, or measure with --device cpu"
    for module, why in ((_native.Missing(ModuleNotFoundError("no"), "_cuda"), "the CUDA kernels were not built"),
                        (SimpleNamespace(archs="8.0"), "torch sees no CUDA device")):
        monkeypatch.setattr(_native, "cuda", module)
        for op in ("linear", "attention"):
            with pytest.raises(SystemExit) as error:
                bench.main(["--op", op, "--device", "cuda", "--out", str(tmp_path / "x.json")])
            assert str(error.value) == refused.format(why) and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="bench: --op stack --device cuda: on a GPU there is attention, linear; measure with --device cpu"):
        bench.main(["--op", "stack", "--device", "cuda"])


def test_a_missing_peer_is_one_line(linear_cuda, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gemlite", None)
    assert linear_cuda.gpu.load("gemlite") == ({}, {}) and capsys.readouterr().out.startswith("peer gemlite is skipped: it is not installed")
    assert linear_cuda.gpu.load("none") == ({}, {})
    with pytest.raises(linear_cuda.MxqError, match="peer 'tinygrad': the peers on a GPU are bitsandbytes, torchao, marlin, vllm, gptqmodel, gemlite"):
        linear_cuda.gpu.load("tinygrad")


@pytest.mark.skipif(not torch.cuda.is_available() or isinstance(_native.cuda, _native.Missing), reason="needs a GPU and the CUDA module")
def test_attention_on_the_device(bench, tmp_path):
    out = tmp_path / "cuda.json"
    bench.main(["--op", "attention", "--device", "cuda", "--contexts", "1024,4096", "--peers", "none", "--cycle", "8", "--rounds", "2", "--seconds", "0.002",
                "--out", str(out)])
    kept = json.loads(out.read_text())
    assert kept["refused"] == [] and len(kept["rows"]) == 14 and all(r["us"] > 0 for r in kept["rows"])


@pytest.mark.skipif(not torch.cuda.is_available() or isinstance(_native.cuda, _native.Missing), reason="needs a GPU and the CUDA module")
def test_on_the_device(bench, tmp_path):
    """Graphs are captured and replayed, and every row is right; how fast is not looked at."""
    out = tmp_path / "cuda.json"
    bench.main(["--op", "linear", "--device", "cuda", "--shapes", "256x512", "--m", "1,40,300", "--peers", "none", "--cycle", "8", "--rounds", "2", "--seconds",
                "0.002", "--out", str(out)])
    kept = json.loads(out.read_text())
    assert kept["refused"] == [] and all(r["us"] > 0 for r in kept["rows"])
    assert {r["kernel"].split("_")[0] for r in kept["rows"] if r["ours"]} == {"mv", "mm", "big"}
    assert kept["machine"]["card"] and cuda.without_kernels(kept["machine"]["built_for"], torch.cuda.get_device_capability()) is None

"""The command line: what each verb hands to the pipeline, what it prints, and how it fails."""

import contextlib
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mxq_ext import __version__, cli
from mxq_ext.errors import BudgetError, CheckpointError, ModelError, MxqWarning
from mxq_ext.plan import Plan

VERBS = ["quantize", "calibrate", "sense", "plan", "presets", "eval", "generate", "inspect", "bench", "doctor", "demo"]
ROOT = Path(__file__).parents[1]


def run(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture
def record(monkeypatch):
    """record("pipeline.f", result): replaces f by a stand-in that accepts only what the real f accepts, and keeps the arguments."""

    def patch(path, result=None, error=None):
        module_name, _, name = path.rpartition(".")
        module = importlib.import_module(f"mxq_ext.{module_name}")
        signature = inspect.signature(getattr(module, name))
        seen = {}

        def stand_in(*args, **kwargs):
            seen.update(signature.bind(*args, **kwargs).arguments)
            if error is not None:
                raise error
            return result

        monkeypatch.setattr(module, name, stand_in)
        return seen

    return patch


def without(seen, *names):
    return {k: v for k, v in seen.items() if k not in names}


# ------------------------------------------------------------------------------------------------- what reaches the pipeline


def test_quantize_passes_what_was_given_and_nothing_else(record):
    seen = record("verbs.quantize_checkpoint", {"stored_bits": 3.5, "bytes": 12345})
    done = run("quantize", "m", "-o", "out", "--bits", "3.5")
    assert done.exit_code == 0, done.output
    assert without(seen, "progress") == {"model_path": Path("m"), "out": Path("out"), "bits": 3.5, "overwrite": False}
    assert "stored_bits  3.5" in done.stdout and "12,345" in done.stdout


def test_parts_of_a_preset_reach_the_pipeline(record):
    seen = record("verbs.quantize_checkpoint", {})
    done = run("quantize", "m", "-o", "out", "--bits", 3, "--preset", "owq", "--set", "allocator=greedy", "--set", "options.damp=0.05")
    assert done.exit_code == 0, done.output
    assert seen["changes"] == {"allocator": "greedy", "options": (("clip_power", 2.4), ("damp", 0.05))} and seen["preset"] == "owq"
    seen = record("verbs.plan_from_table", {})
    done = run("plan", "c.json", "-o", "p.json", "--bits", 3, "--preset", "llm_mq", "--set", "allocator=milp", "--times", "t.json", "--max-ms-per-token", 7.5)
    assert done.exit_code == 0, done.output
    assert without(seen, "cost_path", "out") == {"bits": 3.0, "preset": "llm_mq", "changes": {"allocator": "milp"}, "times": Path("t.json"),
                                                 "max_ms_per_token": 7.5}
    seen = record("verbs.sense_model", {})
    assert run("sense", "m", "s", "-o", "c.json", "--preset", "llm_mq").exit_code == 0 and seen["preset"] == "llm_mq"


def test_presets_are_listed():
    rows = json.loads(run("presets", "--json").stdout)
    assert {"mxq", "slim_llm", "uniform_rtn"} <= {r["name"] for r in rows} and all(r["source"] for r in rows)
    text = run("presets").stdout
    assert "slim_llm" in text and "double_pointer" in text
    one = json.loads(run("presets", "spqr", "--json").stdout)
    assert one["runs"] is True and one["missing"] == [] and one["candidates"] == ["w3g32_nest", "w4g32_nest"]
    assert run("presets", "spqt").exit_code != 0


def test_a_time_table_is_written(record, tmp_path):
    from mxq_ext.plan.times import TimeTable

    record("verbs.load", ("model", None))
    seen = record("bench.time_table", TimeTable({(8, 8, "w8", 1): 3.0}, {1: 2000.0}, {"threads": 1}))
    done = run("bench", "m", "--table", tmp_path / "t.json", "--formats", "w8,w4g64", "--json")
    assert done.exit_code == 0, done.output
    assert seen["model"] == "model" and seen["formats"] == ["w8", "w4g64"] and json.loads(done.stdout)["rest_ms"] == {"1 rows": 2.0}
    assert TimeTable.load(tmp_path / "t.json").us == {(8, 8, "w8", 1): 3.0}
    assert run("bench", "--table", tmp_path / "t.json").exit_code != 0


def test_quantize_passes_every_option(record):
    seen = record("verbs.quantize_checkpoint", {})
    done = run("quantize", "m", "-o", "out", "--bytes", 1000, "--preset", "p", "--text", "t.txt", "--candidates", "w4g64,w2g64_asym",
               "--metric", "obq", "--method", "rtn", "--windows", 8, "--work", "w", "--overwrite")
    assert done.exit_code == 0, done.output
    assert without(seen, "progress") == {
        "model_path": Path("m"), "out": Path("out"), "nbytes": 1000, "preset": "p", "text": Path("t.txt"),
        "candidates": ["w4g64", "w2g64_asym"], "metric": "obq", "method": "rtn", "windows": 8, "work": Path("w"), "overwrite": True}


@pytest.mark.parametrize("option, value, name, expected", [
    ("--format", "w4g64_sym", "uniform", "w4g64"), ("--plan", "plan.json", "plan", Path("plan.json")), ("--bytes", 10, "nbytes", 10)])
def test_quantize_takes_one_of_four_budgets(record, option, value, name, expected):
    seen = record("verbs.quantize_checkpoint", {})
    assert run("quantize", "m", "-o", "o", option, value).exit_code == 0
    assert seen[name] == expected


def test_calibrate(record):
    seen = record("verbs.calibrate_model")
    assert run("calibrate", "m", "-o", "stats", "--text", "t", "--windows", 4).exit_code == 0
    assert without(seen, "progress") == {"model_path": Path("m"), "out": Path("stats"), "text_path": Path("t"), "windows": 4}


def test_sense(record):
    seen = record("verbs.sense_model")
    assert run("sense", "m", "stats", "-o", "cost.json", "--candidates", "w8", "--metric", "linear_kl").exit_code == 0
    assert without(seen, "progress") == {
        "model_path": Path("m"), "stats_dir": Path("stats"), "out": Path("cost.json"), "candidates": ["w8"], "metric": "linear_kl"}
    assert run("sense", "m", "stats", "-o", "cost.json", "--kv", "k4v4", "--kv-by-head").exit_code == 0
    assert (seen["kv"], seen["kv_by_head"]) == ("k4v4", True)
    assert run("sense", "m", "stats", "-o", "cost.json", "--set", "method=rtn").exit_code == 0 and seen["changes"] == {"method": "rtn"}


def test_plan(record):
    seen = record("verbs.plan_from_table")
    assert run("plan", "cost.json", "-o", "plan.json", "--bits", 3, "--front", "front.csv").exit_code == 0
    assert seen == {"cost_path": Path("cost.json"), "out": Path("plan.json"), "bits": 3.0, "front": Path("front.csv")}


def test_eval(record):
    seen = record("verbs.evaluate_checkpoint", {"perplexity": 20.5, "kl": 0.25})
    done = run("eval", "q", "--reference", "m", "--windows", 2, "--length", 64)
    assert without(seen, "progress") == {"path": Path("q"), "reference": Path("m"), "windows": 2, "length": 64}
    assert "perplexity  20.5" in done.stdout
    seen.clear()
    run("eval", "q", "--tasks", "pairs, blimp", "--include", "folder", "--task-limit", 5)
    assert without(seen, "progress") == {"path": Path("q"), "tasks": ["pairs", "blimp"], "include": Path("folder"), "task_limit": 5}


def test_demo(record):
    seen = record("demo.run_demo", {"rows": [{"name": "float"}]})
    done = run("demo", "-o", "d", "--quick", "--json")
    assert (seen["out"], seen["quick"]) == (Path("d"), True)
    assert json.loads(done.stdout) == {"rows": [{"name": "float"}]}


# ------------------------------------------------------------------------------------------------------- on a real directory


def test_every_step_on_a_tiny_model(tiny_dir, tmp_path, monkeypatch):
    """The verbs hand files to each other: what one writes is what the next one reads."""
    monkeypatch.chdir(tmp_path)

    def result(*args):
        done = run(*args, "--json")
        assert done.exit_code == 0, (done.stderr, done.exception)
        return json.loads(done.stdout)

    assert result("calibrate", tiny_dir, "-o", "stats", "--windows", 4)["out"] == "stats"
    sensed = result("sense", tiny_dir, "stats", "-o", "cost.json", "--candidates", "w2g64_asym,w4g64_asym,w8")
    assert [row["format"] for row in sensed["uniform"]] == ["w2g64_asym", "w4g64_asym", "w8"] and Path("cost.csv").exists()
    planned = result("plan", "cost.json", "-o", "plan.json", "--bits", 4, "--front", "front.csv")
    assert planned["stored_bits"] <= 4 and Path("front.csv").read_text().startswith("nbytes,stored_bits,loss\n")
    made = result("quantize", tiny_dir, "-o", "out", "--plan", "plan.json", "--windows", 4)
    assert made["predicted_bytes"] == planned["nbytes"] == made["bytes_on_disk"]

    looked = result("inspect", "out")
    formats = json.loads(Path("plan.json").read_text())["units"]
    assert {u["name"]: u["format"] for u in looked["units"]} == formats
    assert result("inspect", "plan.json")["plan"]["units"] == formats
    text = run("inspect", "out").stdout
    row = next(line for line in text.splitlines() if line.startswith("model.layers.1.mlp.down_proj"))
    loss = looked["plan"]["meta"]["unit_loss"]["model.layers.1.mlp.down_proj"]
    assert formats["model.layers.1.mlp.down_proj"] in row and f"{loss:.4g}" in row
    assert "q_proj" in text and "totals.stored_bits" in text  # bit map and summary
    assert "model.layers.1.mlp.down_proj" in run("inspect", "plan.json").stdout

    scored = result("eval", "out", "--reference", tiny_dir, "--windows", 2, "--length", 32)
    assert scored["kl"] > 0 and scored["perplexity"] > 1 and scored["windows"] == 2
    written = result("generate", "out", "Hello", "--max-new-tokens", 3)
    assert written["text"].startswith("Hello") and written["new_tokens"] <= 3
    assert run("generate", "out", "Hello", "--max-new-tokens", 3).stdout == written["text"] + "\n"
    assert result("bench", "out")["decode_tokens_per_s"] > 0


def test_bench_of_layers():
    done = run("bench", "--size", 64, "--formats", "w4g64")
    assert done.exit_code == 0 and "gemv_w4g64_a16__" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("args, message", [
    (["quantize", "m", "-o", "o"], "mxq quantize: exactly one of --bits, --bytes, --format, --plan is needed, none given"),
    (["quantize", "m", "-o", "o", "--bits", "3", "--format", "w8"], "--bits and --format given; keep one of --bits, --format"),
    (["plan", "c", "-o", "o"], "exactly one of --bits, --bytes is needed"),
    (["quantize", "m", "-o", "o", "--format", "w7"], "bits must be one of (1, 2, 3, 4, 5, 6, 8)"),
    (["sense", "m", "s", "-o", "o", "--candidates", ","], "no format is named; name some with commas between them"),
    (["sense", "m", "s", "-o", "o", "--candidates", "w4g64,x"], "format 'x': the name does not follow the grammar"),
    (["plan", "nowhere.json", "-o", "o", "--bits", "3"], "nowhere.json: there is no such file; check the path"),
    (["inspect", "nowhere.json"], "nowhere.json: there is no such file; check the path"),
    (["inspect", "nowhere"], "nowhere"),
    (["eval", "nowhere"], "nowhere"),
    (["generate", "nowhere", "Hello"], "nowhere"),
    (["bench", "nowhere"], "nowhere"),
    (["quantize", "nowhere", "-o", "o", "--bits", "3"], "nowhere"),
    (["calibrate", "nowhere", "-o", "o"], "nowhere"),
])
def test_a_mistake_is_one_line_and_exit_code_2(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code == 2, (done.output, done.exception)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_was_cut_short(tmp_path):
    path = tmp_path / "plan.json"
    Plan.uniform("w4g64").save(path)
    path.write_text(path.read_text()[:-20])
    done = run("inspect", path)
    assert done.exit_code == 2 and "it is not valid JSON" in done.stderr


@pytest.mark.parametrize("error, line", [
    (ModelError("model x", "broken\nin two lines", "fix it"), "error: model x: broken in two lines; fix it"),
    (FileNotFoundError(2, "No such file or directory", "text.txt"), "error: text.txt: no such file or directory; check the path"),
    (PermissionError(13, "Permission denied", "out"), "error: out: permission denied; check the path"),
    (OSError(28, "No space left on device"), "error: writing: no space left on device; check the path"),
])
def test_errors_of_the_pipeline(record, error, line):
    record("verbs.calibrate_model", error=error)
    done = run("calibrate", "m", "-o", "s")
    assert (done.exit_code, done.stderr.strip()) == (2, line)


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no errno: a bug")])
def test_a_bug_keeps_its_traceback(record, error):
    record("verbs.calibrate_model", error=error)
    done = run("calibrate", "m", "-o", "s")
    assert done.exit_code == 1 and done.exception is error


def test_interrupt(record):
    record("verbs.calibrate_model", error=KeyboardInterrupt())
    done = run("calibrate", "m", "-o", "s")
    assert (done.exit_code, done.stderr.strip()) == (130, "interrupted: run the same command again to resume")


def test_errors_are_red_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli._complain("text", "error", "31")
    monkeypatch.setenv("NO_COLOR", "1")
    cli._complain("text", "error", "31")
    assert capsys.readouterr().err == "\033[31merror: text\033[0m\nerror: text\n"


def test_warnings_of_mxq_are_one_line_and_others_stay(record, monkeypatch):
    shown = []
    monkeypatch.setattr(cli, "_other_warnings", lambda message, *rest: shown.append(str(message)))
    module = importlib.import_module("mxq_ext.verbs")

    def calibrate_model(*args, **kwargs):
        warnings.warn("slow kernel", MxqWarning, stacklevel=1)
        warnings.warn("old api", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(module, "calibrate_model", calibrate_model)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = run("calibrate", "m", "-o", "s")
    assert "warning: slow kernel" in done.stderr.splitlines()
    assert shown == ["old api"]


@pytest.mark.parametrize("args, line", [
    (["nope"], "error: mxq: no such command 'nope'; see mxq --help"),
    (["quantize"], "error: mxq quantize: missing argument 'MODEL'; see mxq quantize --help"),
    (["plan", "x", "-o", "y", "--bits", "many"], "error: mxq plan: invalid value for '--bits'"),
])
def test_usage_errors_are_one_line_and_exit_code_2(args, line):
    with pytest.raises(SystemExit) as done, contextlib.redirect_stderr(io.StringIO()) as said:
        cli.main(args)
    assert done.value.code == 2 and said.getvalue().startswith(line) and said.getvalue().count("\n") == 1


def test_no_arguments_are_a_question(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([])
    assert done.value.code == 2 and "Commands:" in "".join(capsys.readouterr())


def test_version():
    done = run("--version")
    assert (done.exit_code, done.stdout.strip()) == (0, f"mxq_ext {__version__}")


@pytest.mark.parametrize("verb, error, line", [
    ("quantize", CheckpointError("saving to out/bits=3", "a checkpoint is there already", "pass overwrite=True, or choose another directory"),
     "error: saving to out/bits=3: a checkpoint is there already; pass --overwrite, or choose another directory"),
    ("quantize", BudgetError("quantizing for a cache of 9 tokens with bits=3", "weights and cache have one budget in bytes", "pass it as nbytes=N"),
     "error: quantizing for a cache of 9 tokens with --bits 3: weights and cache have one budget in bytes; pass it as --bytes N"),
    ("quantize", ModelError("a", "needs statistics", "use method='rtn', or --set metric=fisher and solver.tolerance=1"),
     "error: a: needs statistics; use --method rtn, or --set metric=fisher and solver.tolerance=1"),
    ("generate", ModelError("a", "b", "continue the prompt instead, with chat=False"), "error: a: b; continue the prompt instead, with --no-chat"),
    ("generate", ModelError("a", "no text with bits=3", "pass temperature=0.7"), "error: a: no text with bits=3; pass --temperature 0.7"),
])
def test_errors_name_the_options_of_their_verb(record, verb, error, line):
    record({"quantize": "verbs.quantize_checkpoint", "generate": "verbs.generate_text"}[verb], error=error)
    done = run(*{"quantize": ["quantize", "m", "-o", "out", "--bits", 3], "generate": ["generate", "m", "hi"]}[verb])
    assert (done.exit_code, done.stderr.strip()) == (2, line)


def test_generate_passes_what_was_given(record):
    seen = record("verbs.generate_text", {"text": "said"})
    assert run("generate", "q", "hi").stdout == "said\n" and without(seen, "max_new_tokens") == {"path": Path("q"), "prompt": "hi"}
    assert run("generate", "q", "hi", "--no-chat", "--temperature", 0.7, "--top-p", 0.9, "--seed", 3, "--kv", "kivi4").exit_code == 0
    assert without(seen, "max_new_tokens", "path", "prompt") == {"chat": False, "temperature": 0.7, "top_p": 0.9, "seed": 3, "kv": "kivi4"}


def test_quantize_names_a_cache(record):
    seen = record("verbs.quantize_checkpoint", {})
    assert run("quantize", "m", "-o", "out", "--bits", 3, "--kv", "kivi4").exit_code == 0 and seen["kv"] == "kivi4"


def test_a_table_needs_a_file_before_anything_is_measured(record, tmp_path):
    record("verbs.load", error=AssertionError("too late"))
    (tmp_path / "file").touch()
    for table, rule in ((tmp_path, "it is a directory; name a file in it"), (tmp_path / "file" / "t.json", "is no directory")):
        done = run("bench", "m", "--table", table)
        assert done.exit_code == 2 and rule in done.stderr


def test_inspect_says_what_a_float_model_is(tiny_dir):
    done = run("inspect", tiny_dir)
    assert done.exit_code == 2 and "it is a model that is not quantized, and no mxq checkpoint; make one of a float model with mxq quantize" in done.stderr


# -------------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb):
    done = run(verb, "--help")
    assert done.exit_code == 0 and "--json" in done.stdout


def test_help_is_instant_and_lists_the_verbs():
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    seconds = []
    for _ in range(3):
        start = os.times().children_user
        done = subprocess.run([sys.executable, "-m", "mxq_ext", "--help"], capture_output=True, text=True, env=env, cwd=ROOT)
        seconds.append(os.times().children_user - start)  # of the processor: others may be using it, too
        assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert min(seconds) < 0.5


def test_module_without_arguments_is_the_doctor():
    done = subprocess.run([sys.executable, "-m", "mxq_ext"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("mxq_ext")


# ----------------------------------------------------------------------------------------------------------------- results


def test_json_of_paths_arrays_and_objects(capsys):
    import numpy as np
    import torch

    cli._show({"path": Path("a"), "array": np.arange(2), "scalar": torch.tensor(1.5), "plan": Plan.uniform("w8")}, "", True)
    out = json.loads(capsys.readouterr().out)
    assert (out["path"], out["array"], out["scalar"], out["plan"]["default"]) == ("a", [0, 1], 1.5, "w8")
    with pytest.raises(TypeError, match="a result holds a object"):
        cli._show({"x": object()}, "", True)


def test_tables(capsys):
    units = [{"name": "a", "stored_bits": 4.25}, {"name": "b", "stored_bits": None}]
    cli._show({"total": {"bytes": 123456, "ok": True}, "units": units}, "T", False)
    out = capsys.readouterr().out
    assert "T: units" in out and "stored bits" in out and "4.25" in out and "-" in out
    assert "total.bytes  123,456" in out and "total.ok     yes" in out


@pytest.mark.parametrize("value, text", [(None, "-"), (False, "no"), (9999, "9999"), (12345, "12,345"), (0.123456, "0.1235"),
                                         (123456.7, "123,457"), ([1, 2.5], "1, 2.5"), ("x", "x")])
def test_cells(value, text):
    assert cli._cell(value) == text


def test_doctor():
    done = run("doctor")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) >= 10
    assert json.loads(run("doctor", "--json").stdout)["advice"] == done.stdout.splitlines()[-1]

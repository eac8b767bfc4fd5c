"""The one command for a machine with a GPU: its steps name what there is, and its verdict is that of its commands."""

import subprocess
import sys

import cuda_device
import cuda_sweep
import pytest

SAY = [sys.executable, "-c"]


def test_steps_name_what_there_is():
    found = cuda_device.steps(3)
    assert list(found) == ["tests", "cases", "memcheck", "racecheck", "synccheck"]
    assert all((cuda_device.HERE / f).exists() for f in cuda_device.FILES)
    for commands in list(found.values())[1:]:
        assert [c[-1] for c in commands] == ["0/3", "1/3", "2/3"] and all(c[c.index("device") - 1] == str(cuda_device.HERE / "cuda_sweep.py") for c in commands)
    assert len(list(cuda_sweep.one_of_each())) > 3


@pytest.mark.parametrize("programs, held", ((["print('nothing found')"] * 2, True), (["print('nothing found')", "print('0 cases')"], False),
                                            (["print('nothing found')", "print('nothing found'); raise SystemExit(99)"], False)))
def test_a_step_holds_if_all_of_its_commands_say_so(tmp_path, capsys, programs, held):
    assert cuda_device.run_step("cases", [[*SAY, p] for p in programs], tmp_path) is held
    assert capsys.readouterr().out.startswith(f"cases: {'held' if held else 'FAILED'}, 2 processes")
    written = (tmp_path / "cases.txt").read_text()
    assert written.count("exit status") == 2 and all(p in written for p in programs)


def test_a_step_that_is_none_and_a_tool_that_is_missing(tmp_path, monkeypatch, capsys):
    for arguments, message in ((["--only", "tests,luck"], "there is no step luck: tests, cases"), ([], "compute-sanitizer is not in PATH")):
        monkeypatch.setattr(sys, "argv", ["cuda_device.py", "-o", str(tmp_path), *arguments])
        monkeypatch.setattr(cuda_device.shutil, "which", lambda name: None)
        with pytest.raises(SystemExit) as stop:
            cuda_device.main()
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_expression_selects_tests():
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", str(cuda_device.HERE / "test_bench_cuda.py"), "-k", cuda_device.NEED_IT],
                          capture_output=True, text=True, cwd=cuda_device.HERE.parent)
    assert "test_on_the_device" in done.stdout and done.returncode == 0

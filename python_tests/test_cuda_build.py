"""What nvcc makes of the CUDA kernels: no spills, and the numbers that docs/cuda.md shows. Rules of the sources that hold everywhere."""

import importlib.util
import os
import re
import runpy
import sys

import cuda_tools
import pytest
import simt

spec = importlib.util.spec_from_file_location("cuda_budget", cuda_tools.ROOT / "bench" / "cuda_budget.py")
cuda_budget = sys.modules["cuda_budget"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_budget)

DOCUMENT = (cuda_tools.ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([a-z_0-9<>]+)` \| (.*) \|$", DOCUMENT[DOCUMENT.index("| kernel | threads |") :], re.M))
QUICK = ("mv_w4", "mv_w5", "mv_lut4", "mm_w3", "mm_stage", "reduce", "layer")


def check(sources):
    if reason := simt.missing_tool("nvcc"):
        pytest.skip(reason)
    usages = cuda_budget.examine(sources)
    spilled = [u for u in usages if u.spills]
    assert not spilled
    for line in cuda_budget.table(usages).splitlines()[2:]:
        name, rest = re.fullmatch(r"\| `(.+?)` \| (.*) \|", line).groups()
        assert ROWS[name] == rest, f"{name} has changed: python bench/cuda_budget.py --write"
    return {u.kernel for u in usages}


def test_registers_and_spills_of_some_kernels():
    """The hungriest inner loops; the others are compiled in the slow test."""
    check([p for p in cuda_budget.SOURCES if p.stem in QUICK])


@pytest.mark.slow
def test_registers_and_spills_of_all_kernels():
    assert check(cuda_budget.SOURCES) == set(ROWS)


def test_every_source_is_in_the_table():
    for path in cuda_budget.SOURCES:
        kernels = re.findall(r"^__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", path.read_text(encoding="utf-8"), re.M)
        names = kernels or [f"{path.stem}<{tiles}>" for tiles in ((1, 2) if path.stem.startswith("mv_") else (4, 8)[: 1 + (path.stem != "mm_mixed")])]
        assert set(names) <= set(ROWS), path.name


def test_kernel_names_of_mangled_ones():
    name = cuda_budget.kernel_name
    assert name("_ZN3mxq4cuda2mvILi2EJNS0_7UniformILi4EEEEEEvNS0_6ParamsE", "mv_w4") == "mv_w4<2>"
    assert name("_ZN3mxq4cuda2mmILi8EJNS0_7UniformILi4EEEEEEvNS0_6ParamsE", "mm_w4") == "mm_w4<8>"
    assert name("_ZN3mxq4cuda40_GLOBAL__N__ad8a0774_8_plain_cu_f343b4a010add_valuesEPKhPvi", "plain") == "add_values"


def test_instructions_live_in_one_header():
    """Elsewhere the CPU executor and the device would see different code."""
    for path in (cuda_tools.ROOT / "csrc" / "cuda").iterdir():
        if path.name not in ("ptx.cuh", "simt.hpp"):
            text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            assert not re.search(r"\basm\b|__CUDA_ARCH__|cuda_fp16|cuda_bf16", text), path.name


def report_of(*archs, name="_ZN3mxq4cuda2mvILi2EJNS0_7UniformILi4EEEEEEvNS0_6ParamsE"):
    return "".join(f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for '{arch}'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {8 * i} bytes spill stores, {4 * i} bytes spill loads
ptxas info    : Used {96 + i} registers, used 1 barriers, 2048 bytes smem
""" for i, arch in enumerate(archs))


@pytest.mark.parametrize("newer", ("csrc/cuda/mv_w4.cu", "csrc/cuda/ptx.cuh", "csrc/formats.h", "setup.py"))
def test_a_report_that_the_build_kept_is_taken_while_it_is_newer_than_all_sources(tmp_path, monkeypatch, newer):
    monkeypatch.setattr(cuda_budget, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    sources = [tmp_path / name for name in ("csrc/cuda/mv_w4.cu", "csrc/cuda/ptx.cuh", "csrc/formats.h", "setup.py")]
    for path in sources:
        path.write_text("")
        os.utime(path, (1000, 1000))
    assert cuda_budget.kept_report(sources[0], tmp_path) == ""
    report = tmp_path / "mv_w4.txt"
    report.write_text(report_of("sm_80"))
    os.utime(report, (1001, 1001))
    assert cuda_budget.kept_report(sources[0], tmp_path) == report_of("sm_80")
    os.utime(tmp_path / newer, (1002, 1002))
    assert cuda_budget.kept_report(sources[0], tmp_path) == ""
    report.write_text("mv_w4.cu(1): warning: the assembler was told less\n" + report_of("sm_80"))  # now the newest
    assert cuda_budget.kept_report(sources[0], tmp_path) == ""


def test_only_architectures_without_a_report_are_compiled(monkeypatch):
    source, asked = cuda_tools.ROOT / "csrc" / "cuda" / "mv_w4.cu", []

    def compile_for(source, archs):
        asked.append(archs)
        return report_of(*archs)

    monkeypatch.setattr(cuda_budget, "compiled_report", compile_for)
    usage = cuda_budget.Usage
    for kept, compiled in ((("sm_75", "sm_80"), ["sm_90"]), (("sm_75", "sm_80", "sm_90"), None), ((), ["sm_80", "sm_90"])):
        monkeypatch.setattr(cuda_budget, "kept_report", lambda _, kept=kept: report_of(*kept))
        found = cuda_budget.usages_of.__wrapped__(source)
        assert [u.arch for u in found] == ["sm_80", "sm_90"] and asked == ([compiled] if compiled else [])
        asked.clear()
    assert found[1] == usage("mv_w4", "mv_w4<2>", 384, "sm_90", 97, 12, 2048)


@pytest.fixture
def build_script(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(cuda_tools.ROOT / "setup.py"))


@pytest.mark.parametrize("told, archs", (("9.0\n8.6\n9.0\n", ["8.6", "9.0"]), ("12.0\n", ["12.0"]), ("6.1\n", ["8.0+PTX"]), ("7.0\n7.5\n", ["7.5"]),
                                         ("12.1\n8.6\n7.5\n", ["7.5", "8.6+PTX"]), ("12.1\n", ["8.0+PTX"]),
                                         ('Field "compute_cap" is not a valid field to query.\n', ["8.0+PTX"]), (None, ["8.0+PTX"])))
def test_native_is_what_the_gpus_are_and_the_compiler_knows(build_script, tmp_path, monkeypatch, told, archs):
    for name, says in (("nvcc", "".join(f"compute_{a}\n" for a in (50, 61, 70, 75, 80, 86, 90, 120))), ("nvidia-smi", told)):
        if says is not None:
            tool = tmp_path / name
            tool.write_text(f"#!{sys.executable}\nprint({says!r}, end='')\n")
            tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MXQ_CUDA_ARCHS", "native")
    assert build_script["cuda_archs"](str(tmp_path / "nvcc")) == archs


def test_capabilities_that_the_compiler_does_not_know_are_refused(build_script, tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!{sys.executable}\nprint('compute_80')\nprint('compute_90')\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("MXQ_CUDA_ARCHS", raising=False)
    assert build_script["cuda_archs"](str(nvcc)) == ["8.0", "9.0"]
    monkeypatch.setenv("MXQ_CUDA_ARCHS", "8.0;9.0+PTX")
    assert build_script["cuda_archs"](str(nvcc)) == ["8.0", "9.0+PTX"]
    for wrong in ("8.6", "80", "natives"):
        monkeypatch.setenv("MXQ_CUDA_ARCHS", wrong)
        told = rf"MXQ_CUDA_ARCHS='{wrong}' has '{wrong}', which .* does not know; it knows 8.0 9.0, each with \+PTX or without; or native alone"
        with pytest.raises(SystemExit, match=told):
            build_script["cuda_archs"](str(nvcc))


def test_what_the_build_keeps_of_the_assembler(build_script, tmp_path, monkeypatch, capsys):
    """In folders whose names the shell would take apart, with a compiler that does as it is told."""
    root, nvcc = tmp_path / "a check'out (1)", tmp_path / "a tool kit" / "nvcc"
    for folder in (root, nvcc.parent, tmp_path / "temp"):
        folder.mkdir()
    monkeypatch.setitem(build_script["NinjaBuild"].write_cuda_ninja.__globals__, "PTXAS_REPORTS", root)
    monkeypatch.setitem(build_script["NinjaBuild"].write_cuda_ninja.__globals__, "NVCC", str(nvcc))
    build = build_script["NinjaBuild"].__new__(build_script["NinjaBuild"])
    build.verbose, build.binding_flags = 0, lambda: ""

    def compiler(says, status=0):
        nvcc.write_text(f"""#!{sys.executable}
import sys
from pathlib import Path
if "--help" not in sys.argv:
    product = sys.argv[sys.argv.index("-o") + 1]
    Path(product).write_text("")
    Path(product + ".d").write_text(product + ":")
    print({says!r})
    sys.exit({status})
""")
        nvcc.chmod(0o755)

    def run():
        build.write_cuda_ninja(tmp_path / "temp" / "build.ninja", "true", ["8.0"], tmp_path / "all.so")
        text = (tmp_path / "temp" / "build.ninja").read_text()
        (tmp_path / "temp" / "build.ninja").write_text(re.sub(r"^default .*", "default cuda_mv_w4.cu.o", text, flags=re.M))
        build.run_ninja(tmp_path / "temp", 1)

    def again():
        (tmp_path / "temp" / "cuda_mv_w4.cu.o").unlink()

    compiler(report_of("sm_80"))
    run()
    assert {p.name: p.read_text() for p in root.iterdir()} == {"mv_w4.txt": report_of("sm_80") + "\n"}
    assert "registers" not in capsys.readouterr().out
    again()
    compiler("nvcc error   : 'cicc' died due to signal 9", 1)
    with pytest.raises(SystemExit, match="nvcc error   : 'cicc' died due to signal 9"):
        run()
    assert {p.name: p.read_text() for p in root.iterdir()} == {"mv_w4.txt": report_of("sm_80") + "\n"}
    again()
    compiler("mv_w4.cu(7): warning: spills\n" + report_of("sm_80", "sm_90"))
    run()
    assert (root / "mv_w4.txt").read_text().count("Compiling") == 2
    assert [line for line in capsys.readouterr().out.splitlines() if "warning" in line] == ["mv_w4.cu(7): warning: spills"]

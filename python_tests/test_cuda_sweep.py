"""A part of the sweep over all cases, schedules and sanitizers; docs/cuda-testing.md says how to run the whole."""

import cuda_sweep
import cuda_tools
import pytest
import simt

pytestmark = pytest.mark.skipif(simt.missing_tool("g++") is not None, reason=str(simt.missing_tool("g++")))

#: Every 47th case: in turns all paths, types and numbers of rows.
PART = list(cuda_sweep.every_case())[::47]
#: Compiled for the sanitizers, which takes a while: both matrix kernels of one format, and all that is common to formats.
SANITIZED = ("mv_w3", "mm_w3", "mm_stage", "dequant", "plain", "reduce")


def test_schedules_give_the_same_right_bits():
    print(cuda_sweep.sweep(cuda_tools.library(), PART, cuda_sweep.SCHEDULES))
    assert {c.path for c in PART} == {"scalar", "mv", "mm", "dequant", "lookup"}
    assert {s["lazy"] for s in cuda_sweep.SCHEDULES} == {True, False} and {s["workers"] for s in cuda_sweep.SCHEDULES} == {1, 2}


@pytest.mark.parametrize("mode", cuda_sweep.SANITIZERS)
def test_sanitizers_find_nothing(mode):
    chosen = [c for c in cuda_sweep.one_of_each() if c.weight.startswith("w3") or (c.weight == "pinwheel" and c.path in ("scalar", "dequant", "lookup"))]
    print(cuda_sweep.sweep(cuda_tools.library(mode, SANITIZED), chosen, cuda_sweep.SANITIZED))


def test_the_list_is_whole():
    """Every format and layout on every path, with 1 to 17 rows of x and more, of both types; the sanitizers' cases launch every kernel there is."""
    found = set(cuda_sweep.every_case())
    for name in (*cuda_sweep.cases.FORMATS, *cuda_sweep.LAYOUTS):
        mine = [c for c in found if c.weight == name]
        for dtype in cuda_sweep.HALVES:
            assert {c.m for c in mine if c.dtype == dtype and c.path in ("mv", "mm")} == {*range(1, 18), 33}
        assert {c.result for c in mine if c.path == "dequant"} == set(cuda_sweep.LIMITS) and any(c.path == "lookup" for c in mine)
    kernels = set().union(*map(cuda_sweep.kernels_of, cuda_sweep.one_of_each()))
    # mv for 8 and 16 rows of 13 decoders, mm for 32 of them and for 64 of 12, stage, reduce, dequant, add_values, lookup, lookup_values, scalar
    assert len(kernels) == 58


def test_a_wrong_result_is_noticed(monkeypatch):
    """The sweep itself: an output that a kernel leaves alone is NaN, and other bits in another schedule are an error."""
    case = cuda_sweep.Case("w3g64", 18, 330, "mv", 3, cuda_sweep.torch.float16)
    library = cuda_tools.library()
    monkeypatch.setattr(library, "call", lambda *args: None)
    with pytest.raises(AssertionError, match="w3g64 18x330 mv M=3 .*error inf"):
        cuda_sweep.sweep(library, [case], [{}])
    monkeypatch.undo()
    outputs = iter((b"1", b"2"))
    monkeypatch.setattr(cuda_sweep, "run", lambda *args, **schedule: next(outputs))
    with pytest.raises(AssertionError, match="other bits in the schedule {'seed': 2}"):
        cuda_sweep.sweep(library, [case], [{}, {"seed": 2}])

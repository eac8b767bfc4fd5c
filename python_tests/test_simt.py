"""The executor that runs kernels on fibers: right kernels come out right in every schedule and clean under the sanitizers, and planted bugs are caught."""

import re
import shutil

import numpy as np
import pytest
from simt import Library, SimtError, build, missing_tool, run_python
from simt.build import CACHE, ROOT
from simt.selftest import EVERY, GEMM, GEMV, Gemm, Gemv, Parts, plant

pytestmark = pytest.mark.skipif(missing_tool("g++") is not None, reason=str(missing_tool("g++")))

RIGHT = 1e-5
SCHEDULES = [{"seed": seed, "lazy": lazy, "workers": workers} for seed in (0, 1, 2, 3, 4, 11) for lazy in (True, False) for workers in (1, 2)]
REFILL = ("    __syncthreads();  // MARK: refill\n", "")
FILLED = ("    __syncthreads();  // MARK: filled\n", "")
SUMS = ("  __syncthreads();  // MARK: sums\n", "")


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture(scope="module")
def plain():
    return Library([GEMM, GEMV])


def at(source, text, offset=0):
    """A pattern for the place of a line of a source, as messages name it."""
    lines = [i for i, line in enumerate(source.read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, lines
    return rf"{source.stem}\.cu:{lines[0] + offset}"


def cases(rng):
    return [Gemm(rng, 50, 70, 136), Gemv(rng, 7, 640), Parts(rng, 1000)]


def run(library, case, **options):
    library.configure(**options).call(*case.call)
    return case.error()


# ---------------------------------------------------------------------------------------------------------------- right kernels


@pytest.mark.parametrize("m, n, k", [(1, 1, 8), (1, 33, 32), (31, 32, 40), (33, 65, 96), (64, 64, 256)])
def test_gemm(plain, rng, m, n, k):
    assert run(plain, Gemm(rng, m, n, k)) < RIGHT
    assert plain.stats["mma"] == ((m + 31) // 32) * ((n + 31) // 32) * ((k + 31) // 32) * 16
    assert plain.stats["ldmatrix_phases"] == plain.stats["mma"] // 4 * (4 + 4 * 2) and plain.stats["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("n, k", [(1, 64), (7, 128), (33, 1984)])
def test_gemv(plain, rng, n, k):
    assert run(plain, Gemv(rng, n, k)) < RIGHT


@pytest.mark.parametrize("which", range(3), ids=["gemm", "gemv", "parts"])
def test_every_schedule_gives_the_same_bits(plain, rng, which):
    case = cases(rng)[which]
    outputs = []
    for options in SCHEDULES:
        assert run(plain, case, **options) < RIGHT, options
        outputs.append([a.tobytes() for a in case.call if isinstance(a, np.ndarray)])
    assert all(o == outputs[0] for o in outputs)


def test_portable_fibers(rng):
    library = Library([GEMM, GEMV], "ucontext")
    for case in cases(rng):
        for options in ({}, {"seed": 7, "lazy": False, "workers": 2}):
            assert run(library, case, **options) < RIGHT


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_right_kernels_are_clean(rng, mode):
    library = Library([GEMM, GEMV], mode)
    for options in ({}, {"lazy": False, "workers": 2}, {"seed": 5, "lazy": False}):
        for case in (Gemm(rng, 33, 40, 72), Gemv(rng, 3, 192), Parts(rng, 200)):
            assert run(library, case, **options) < RIGHT


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizer_in_a_process_of_ones_own(mode, tmp_path):
    """With torch, as tests of whole host functions need it."""
    script = tmp_path / "case.py"
    script.write_text("""
import sys
import numpy as np
if sys.argv[3] == "torch":
    import torch
    torch.ones(1000, 1000).mm(torch.ones(1000, 1000))
from simt import Library
from simt.selftest import Gemv
case = Gemv(np.random.default_rng(), 2, 128)
Library([sys.argv[1]], sys.argv[2], isolated=False).call(*case.call)
print(case.error() < 1e-5)
""")
    assert run_python(mode, script, GEMV, mode, "torch") == "True\n"
    with pytest.raises(SimtError, match=r"data race[\s\S]*gemv\.cu" if mode == "tsan" else "out of bounds"):
        run_python(mode, script, plant(GEMV, SUMS if mode == "tsan" else ("i < WARPS; i++) all", "i <= WARPS; i++) all")), mode, "without")


# ---------------------------------------------------------------------------------------------------------------- planted bugs


def test_missing_barrier(rng):
    source = plant(GEMV, SUMS)
    library = Library([source])
    for seed in (0, 2):
        assert run(library, Gemv(rng, 3, 640), seed=seed) == np.inf, seed  # the sums of other warps are still NaN
    for seed in (1, 3):
        assert run(library, Gemv(rng, 3, 640), seed=seed) < RIGHT  # the thread that adds comes last
    with pytest.raises(SimtError, match=r"data race[\s\S]*gemv\.cu:\d+"):
        run(Library([source], "tsan"), Gemv(rng, 3, 640))


def test_missing_barrier_behind_the_copies(rng):
    library = Library([plant(GEMM, FILLED)])
    for seed in range(6):
        assert run(library, Gemm(rng, 32, 32, 64), seed=seed) > RIGHT, seed


def test_barrier_missing_only_before_a_buffer_is_refilled(rng):
    source = plant(GEMM, REFILL)
    # lock step hides it ...
    assert run(Library([source]), Gemm(rng, 32, 32, 160), seed=0) < RIGHT
    # ... a schedule that lets one warp run ahead does not, if the copy lands early
    assert max(run(Library([source]), Gemm(rng, 32, 32, 160), seed=seed, lazy=False) for seed in (2, 3)) > RIGHT
    # and what the schedule is makes no difference to the sanitizer
    with pytest.raises(SimtError, match=r"data race[\s\S]*gemm\.cu:\d+"):
        run(Library([source], "tsan"), Gemm(rng, 32, 32, 160), seed=0, lazy=False)


def test_weak_wait_for_copies(rng):
    library = Library([plant(GEMM, ("cp_async_wait<1>();  // MARK: wait", "cp_async_wait<2>();"))])
    assert run(library, Gemm(rng, 32, 32, 160), lazy=False) < RIGHT  # a device that is quick enough hides it
    assert run(library, Gemm(rng, 32, 32, 160), lazy=True) == np.inf


def test_shared_read_out_of_bounds(rng):
    source = plant(GEMV, ("for (int i = 0; i < WARPS; i++) all", "for (int i = 0; i <= WARPS; i++) all"))
    with pytest.raises(SimtError, match=at(source, "i <= WARPS") + r":\d+: runtime error: index 4 out of bounds for type 'float \[4\]'"):
        run(Library([source], "asan"), Gemv(rng, 3, 640))
    source = plant(GEMM, ("left, now + place(16 * warp", "left, now + (lane == 3 ? reinterpret_cast<uint32_t*>(tiles)[2048] : 0) + place(16 * warp"))
    with pytest.raises(SimtError, match=r"AddressSanitizer: use-after-poison[\s\S]*" + at(source, "[2048]")):  # behind the dynamic part
        run(Library([source], "asan"), Gemm(rng, 32, 32, 64))


def test_global_write_out_of_bounds(rng):
    source = plant(GEMV, ("    y[row] = all;", "    y[row + 1] = all;"))
    with pytest.raises(SimtError, match=r"heap-buffer-overflow[\s\S]*" + at(source, "y[row + 1]")):
        run(Library([source], "asan"), Gemv(rng, 3000, 64))


def test_unaligned_vector_access(rng):
    source = plant(GEMV, ("sum += scale * (static_cast<float>(w >> (4 * i) & 15) - 8.0f) * x[8 * word + i];",
                          "sum += reinterpret_cast<const float4*>(x + 1)[0].x * w * scale;"))
    with pytest.raises(SimtError, match=at(source, "float4") + r":\d+: runtime error: .*misaligned address"):
        run(Library([source], "asan"), Gemv(rng, 3, 640))


def test_wrong_shuffle_mask(rng):
    right, site = "sum += __shfl_xor_sync(0xffffffffu, sum, bits);", at(GEMV, "__shfl")
    half = plant(GEMV, (right, "if (lane < 16) " + right))
    with pytest.raises(SimtError, match=site + ": __shfl_xor_sync with mask 0xffffffff waits for ever in warp 0: lane 16 waits in __syncthreads at"):
        run(Library([half]), Gemv(rng, 1, 640))
    short = plant(GEMV, (right, right.replace("0xffffffffu", "lane < 16 ? 0xffffu : 0xffff0000u")))
    with pytest.raises(SimtError, match=site + r": __shfl_xor_sync: lane 0 reads lane 16, which is not in the mask 0x0000ffff .*gemv_w4, block \(0, 0, 0\)"):
        run(Library([short]), Gemv(rng, 1, 640))
    other = plant(GEMV, (right, "sum += __shfl_xor_sync(0xffffu, sum, 1);"))
    with pytest.raises(SimtError, match="lane 16 is not in its own mask 0x0000ffff"):
        run(Library([other]), Gemv(rng, 1, 640))


def test_early_return_before_a_barrier(rng):
    source = plant(GEMV, SUMS[:1] + ("  if (threadIdx.x == 70) return;\n" + SUMS[0],))
    library = Library([source])
    for seed in (0, 1, 2, 3, 8):
        with pytest.raises(SimtError, match=at(source, "MARK: sums") + r": __syncthreads: threads 0-69, 71-127 wait, but threads 70 have returned"):
            run(library, Gemv(rng, 1, 640), seed=seed)
    assert run(library, Gemv(rng, 1, 640), strict=False) < RIGHT  # as hardware takes it


def test_divergent_barrier(rng):
    source = plant(GEMV, SUMS[:1] + ("  if (warp & 1) __syncthreads(); else __syncthreads();\n",))
    here = at(source, "warp & 1")
    with pytest.raises(SimtError, match=here + ": divergent barrier: thread 0 waits in __syncthreads here, thread 32 in __syncthreads at .*" + here):
        run(Library([source]), Gemv(rng, 1, 640))


def test_shared_memory_of_a_neighbour_lane_needs_syncwarp(rng):
    old = "  if (lane == 0) sums[warp] = sum;\n"
    new = "  if (lane == 1) sums[warp] = sum;\n{}  if (lane == 0) sums[warp] += 0.0f;\n"
    with pytest.raises(SimtError, match=r"data race[\s\S]*" + at(GEMV, "if (lane == 0)")):
        run(Library([plant(GEMV, (old, new.format("")))], "tsan"), Gemv(rng, 1, 640))
    assert run(Library([plant(GEMV, (old, new.format("  __syncwarp();\n")))], "tsan"), Gemv(rng, 1, 640)) < RIGHT


def test_ticket_without_a_fence(rng):
    """What other blocks wrote is read without the fence that publishes it: no schedule shows it, the sanitizer does, on one worker too."""
    source = plant(GEMV, ("    __threadfence();  // MARK: publish\n", ""))
    assert run(Library([source]), Parts(rng, 300), workers=2) < RIGHT
    with pytest.raises(SimtError, match=r"data race[\s\S]*gemv\.cu:\d+"):
        run(Library([source], "tsan"), Parts(rng, 300))


def test_tile_without_swizzle_is_counted(rng):
    library = Library([plant(GEMM, ("(chunk ^ (row >> 1 & 3))", "chunk"))])
    assert run(library, Gemm(rng, 32, 32, 64)) < RIGHT
    assert library.stats["ldmatrix_conflicts"] == 3 * library.stats["ldmatrix_phases"]  # rows are 64 bytes: 8 of them use 2 of 8 places


TO = "ptx::cp_async_16(tile + place(row, chunk),"


@pytest.mark.parametrize("old, new, message", [
    (TO, TO.replace("tile", "tile + 4"), "cp_async_16: the address in shared memory is not a multiple of 16"),
    (TO, TO.replace("tile", "tile + 4096"), "16 bytes that are not all in the block's shared memory"),
    ("in ? 16 : 0", "in ? 17 : 0", "17 bytes to take of 16"),
    ("? from + static_cast", "? from + 1 + static_cast", "the address in global memory is not a multiple of 16"),
    ("now + place(16 * warp", "now + 4 + place(16 * warp", "ldmatrix_x4: the address in shared memory is not a multiple of 16"),
])
def test_bad_copies(old, new, message, rng):
    with pytest.raises(SimtError, match=r"gemm\.cu:\d+: .*" + message):
        run(Library([plant(GEMM, (old, new))]), Gemm(rng, 32, 32, 64))


def test_kernel_that_writes_anywhere_takes_only_its_own_process(rng):
    library = Library([plant(GEMV, ("    y[row] = all;", "    y[(static_cast<size_t>(row) + 1) << 44] = all;"))], isolated=True)
    for _ in range(2):
        with pytest.raises(SimtError, match="the process that ran run_gemv_w4 ended with -11"):
            run(library, Gemv(rng, 1, 640))


# ---------------------------------------------------------------------------------------------------------------- launches


def test_launch_that_the_device_cannot_have(plain, rng):
    with pytest.raises(SimtError, match=at(GEMM, "return MXQ_LAUNCH") + r": 8192 bytes of dynamic shared memory, the device has 8000 \[kernel gemm_f16\]"):
        run(plain, Gemm(rng, 8, 8, 8), max_shared=8000)
    with pytest.raises(SimtError, match=r"grid \(0, 1, 1\) of blocks \(128, 1, 1\) cannot be launched"):
        plain.configure().call("run_gemv_w4", None, None, None, None, 0, 64)
    with pytest.raises(SimtError, match="shared array sums: 16 bytes of shared memory in all, the device has 15"):
        run(plain, Gemv(rng, 1, 64), max_shared=15)
    assert run(plain, Gemv(rng, 1, 64)) < RIGHT  # nothing of it stays


def test_arguments(plain):
    with pytest.raises(ValueError, match="only contiguous"):
        plain.call("run_gemv_w4", np.zeros((4, 4))[:, ::2])
    with pytest.raises(ValueError, match="does not fit an int"):
        plain.call("run_gemv_w4", 1 << 31)
    with pytest.raises(TypeError, match="no option"):
        plain.configure(sead=1)


# ---------------------------------------------------------------------------------------------------------------- building


def test_nothing_is_compiled_twice():
    first = build([GEMV])
    before = {p: p.stat().st_mtime_ns for p in CACHE.iterdir()}
    assert build([GEMV]) == first
    assert {p: p.stat().st_mtime_ns for p in CACHE.iterdir()} == before


def test_a_changed_header_is_noticed(tmp_path):
    source, header = tmp_path / "a.cu", tmp_path / "a.cuh"
    source.write_text('#include "a.cuh"\nextern "C" int run() { return VALUE; }\n')
    for value in (0, 7, 0):
        header.write_text(f"#define VALUE {value}\n")
        library = Library([source])
        if value:
            with pytest.raises(SimtError, match="run returned 7"):
                library.call("run")
        else:
            library.call("run")


def test_compiler_errors_are_shown(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text('#include "ptx.cuh"\n__global__ void k() { __shared__ int x[3]; }\n')
    with pytest.raises(RuntimeError, match=r"bad.cu does not compile:[\s\S]*SIMT_shared_memory_is_declared_by_MXQ_SHARED"):
        build([source])


@pytest.mark.skipif(shutil.which("gcov") is None, reason="gcov is not in PATH")
def test_coverage(rng):
    library = Library([GEMV], "gcov")
    assert run(library, Gemv(rng, 3, 128)) < RIGHT
    counts = library.coverage()[str(GEMV)]
    lines = GEMV.read_text().splitlines()
    assert counts[lines.index("    y[row] = all;") + 1] >= 3
    assert counts[lines.index("    out[0] = sum;") + 1] == 0  # the other kernel did not run


# ---------------------------------------------------------------------------------------------------------------- the rule of one header


def test_asm_and_architecture_occur_in_one_file_only():
    folder = ROOT / "csrc" / "cuda"
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "ptx.cuh"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.search(r"\b(__)?asm(__)?\b|__CUDA_ARCH__|\bcuda_(fp16|bf16)\.h\b", line.split("//")[0])
            assert not found, f"{path.name}:{number} has {found[0]!r}: only ptx.cuh may, since no executor would check it here"


def test_every_function_of_the_header_has_a_self_test():
    names = set(re.findall(r"^MXQ_PTX [\w ]+? (\w+)\(", (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text(), re.M))
    assert len(names) > 40
    used = set(re.findall(r"\bptx::(\w+)", EVERY.read_text()))
    assert names - {"shared_address"} == used  # which is no instruction, but the argument of some

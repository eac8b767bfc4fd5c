"""The interpreter of PTX: numbers and instructions against independent ones, every instruction of ptx.cuh, and the bugs that only it can see."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptxsim import Module, PtxError, compile_ptx, numbers
from simt import Library, missing_tool
from simt.build import ROOT
from simt.selftest import EVERY, GEMM, GEMV, PTX_HEADER, Gemm, Gemv, Parts, plant

pytestmark = pytest.mark.no_cover
needs_nvcc = pytest.mark.skipif(missing_tool("nvcc") is not None, reason=f"PTX comes from nvcc: {missing_tool('nvcc')}")
ARCHS = ["sm_75", "sm_80", "sm_90"]
RIGHT = 1e-5


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture(scope="module")
def every():
    """The modules of every.cu by architecture, made once so that ``executed`` can look back on all tests."""
    return {arch: Module(compile_ptx(EVERY, arch)) for arch in ARCHS}


@pytest.fixture(scope="module")
def shim():
    return Library([EVERY, GEMM, GEMV])


def replay(module, shim, case):
    module.replay(shim.record(*case.call), [a for a in case.call if isinstance(a, np.ndarray)])
    return case.error()


# ---------------------------------------------------------------------------------------------------------------- exact numbers


def exact(value: Fraction, bits: int, least: int) -> float:
    """A number with ``bits`` significant bits, but none below 2^least, next to ``value``, ties to even; without overflow."""
    if value == 0:
        return 0.0
    sign, value = (-1, -value) if value < 0 else (1, value)
    e = value.numerator.bit_length() - value.denominator.bit_length()
    e -= Fraction(2) ** e > value
    unit = Fraction(2) ** max(e - bits + 1, least)
    return sign * float(round(value / unit) * unit)


KINDS = {"f16": (numbers.half_read, numbers.half_round, 11, -24, 65520.0), "bf16": (numbers.bf16_read, numbers.bf16_round, 8, -133, 2.0**128 * (1 - 2.0**-9))}


def small_reference(kind, compute_exact, compute_float, *operands):
    """Bits of a result on fp16 or bf16: by rational numbers where all is finite, else by what IEEE says of infinities and NaN."""
    read, _, bits, least, overflow = KINDS[kind]
    out = []
    for words in zip(*operands, strict=True):
        x = [float(read(np.array(w, np.uint16).reshape(1))[0]) for w in words]
        with np.errstate(all="ignore"):
            rough = compute_float(*map(np.float64, x))
        if np.isnan(rough):
            out.append(0x7FFF)
            continue
        if np.isfinite(x).all():
            value = compute_exact(*map(Fraction, x))
            near = exact(value, bits, least)
            rough = near if near else np.copysign(0.0, rough if value == 0 else 1 if value > 0 else -1)
        if abs(rough) >= overflow:
            rough = np.copysign(np.inf, rough)
        single = np.float32(rough)
        out.append(int(single.astype(np.float16).view(np.uint16)) if kind == "f16" else int(single.view(np.uint32)) >> 16)
    return np.array(out, np.uint16)


def small_operands(rng, n):
    """Random words, and many that are equal to others but for the exponent, so that sums cancel and ties occur."""
    words = rng.integers(0, 1 << 16, (3, n), dtype=np.uint16)
    words[:, : n // 4] &= 0xFC80  # few bits: ties
    words[2, n // 2 :] = (words[0, n // 2 :] ^ 0x8000) + rng.integers(0, 3, n - n // 2, dtype=np.uint16)
    special = np.array([0, 0x8000, 1, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00, 0xBC00, 0x7F80, 0xFF80, 0x7F7F, 0x0080], np.uint16)
    grid = np.stack(np.meshgrid(special, special, special)).reshape(3, -1)
    return [np.concatenate([w, g]) for w, g in zip(words, grid, strict=True)]


#: (on rational numbers, on floats)
ARITHMETIC = {
    "fma": (lambda a, b, c: a * b + c,) * 2,
    "add": (lambda a, b: a + b,) * 2,
    "sub": (lambda a, b: a - b,) * 2,
    "mul": (lambda a, b: a * b,) * 2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_of_small_floats(rng, kind):
    _, rounded, *_ = KINDS[kind]
    x = np.concatenate([np.ldexp(rng.standard_normal(4000), rng.integers(-140, 20, 4000)), [np.inf, -np.inf, np.nan, 65519.99, 65520, 0.0, -0.0]])
    read = KINDS[kind][0]
    values = read(np.arange(0x0100, 0x7B00, 37, dtype=np.uint16))
    x = np.concatenate([x, values, (values + read(np.arange(0x0101, 0x7B01, 37, dtype=np.uint16))) / 2])  # and the middle between neighbours
    got = rounded(x)
    _, _, bits, least, overflow = KINDS[kind]
    for value, word in zip(x, got, strict=True):
        if np.isnan(value):
            assert word == 0x7FFF
            continue
        near = value if np.isinf(value) else exact(Fraction(value), bits, least)
        near = np.copysign(np.inf if abs(near) >= overflow else abs(near), value)
        back = float(read(np.array([word], np.uint16))[0])
        assert back == near and np.signbit(back) == np.signbit(near), (value, back, near)


def test_fma32_rounds_once(rng):
    a, b = (np.ldexp(rng.standard_normal(3000), rng.integers(-30, 30, 3000)).astype(np.float32) for _ in range(2))
    c = (-a.astype(np.float64) * b * (1 + rng.integers(-2, 3, 3000) * 2.0**-24)).astype(np.float32)
    c[::3] = np.ldexp(rng.standard_normal(1000), rng.integers(-60, 60, 1000)).astype(np.float32)
    for x, y, z, got in zip(a, b, c, numbers.fma32(a, b, c), strict=True):
        assert got == exact(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), 24, -149)


# ---------------------------------------------------------------------------------------------------------------- whole kernels


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(arch, rng, shim):
    module = Module(compile_ptx(GEMM, arch))
    for m, n, k in ((33, 40, 72), (1, 1, 8)):
        assert replay(module, shim, Gemm(rng, m, n, k)) < RIGHT
    assert all(conflicts == 0 for _, conflicts in module.banks.values()) and any(phases for phases, _ in module.banks.values())
    module = Module(compile_ptx(GEMV, arch))
    assert replay(module, shim, Gemv(rng, 3, 640)) < RIGHT
    assert replay(module, shim, Parts(rng, 1000)) < RIGHT


@needs_nvcc
def test_both_executors_agree_bit_for_bit_on_whole_numbers(rng, shim):
    """Sums of small integers are exact in any order, so nothing but the same products can give the same bits."""
    first, second = Gemm(rng, 33, 40, 72), Gemm(rng, 33, 40, 72)
    for x in (first.a, first.b):
        x[...] = rng.integers(-8, 9, x.shape)
    second.a[...], second.b[...] = first.a, first.b
    shim.configure().call(*first.call)
    replay(Module(compile_ptx(GEMM)), shim, second)
    np.testing.assert_array_equal(first.c, first.a.astype(np.float32) @ first.b.astype(np.float32).T)
    np.testing.assert_array_equal(first.c, second.c)


@needs_nvcc
def test_names_of_templates_in_unnamed_namespaces(rng, shim, every):
    x, out = rng.integers(0, 1 << 32, 100, dtype=np.uint32), np.zeros(100, np.uint32)
    for factor in (3, 5):
        every["sm_80"].replay(shim.record("run_scale", x, out, 100, factor), [x, out])
        np.testing.assert_array_equal(out, factor * x)
    with pytest.raises(KeyError, match="2 kernels match 'scale'"):
        every["sm_80"].find("scale")
    assert "scale" in every["sm_80"].find(r"scale<\(?(int\))?3>")


@needs_nvcc
def test_memory_behind_pointers(rng):
    """A torch tensor by its storage, anything else by address and size; and nothing that was not named."""
    module = Module(compile_ptx(EVERY))
    x, out = torch.arange(64, dtype=torch.int32), np.zeros(64, np.uint32)
    args = [b"".join([int(x[8:].data_ptr()).to_bytes(8, "little")]), out.ctypes.data, 40]
    for memory in ([x[8:], out], [(x.data_ptr(), 256), (out.ctypes.data, 256)], [x, x[8:], out, out[3:]]):
        out[:] = 0
        module.launch(r"scale<\(?(int\))?3>", 1, 64, args, memory=memory)
        np.testing.assert_array_equal(out, np.r_[3 * np.arange(8, 48), np.zeros(24)])
    with pytest.raises(PtxError, match="every.cu.*or in no array at all|is in no array"):
        module.launch(r"scale<\(?(int\))?3>", 1, 64, args, memory=[x])


@needs_nvcc
def test_the_example_of_the_documentation_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cuda-testing.md").read_text(), re.S)
    scope = {}
    exec(example, scope)
    first, *_ = capsys.readouterr().out.split()
    assert float(first) < 1e-4 and scope["module"].mma == scope["fibers"].stats["mma"] > 0


# ---------------------------------------------------------------------------------------------------------------- every instruction


FLOAT_ROWS = {11, 13, 15, 16, 17, 18}  # results of words() that are floats


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_words(arch, rng, shim, every):
    low, high = small_operands(rng, 600), small_operands(rng, 600)
    a, b, c = (x.astype(np.uint32) | y[::-1].astype(np.uint32) << np.uint32(16) for x, y in zip(low, high, strict=True))
    n = len(a)
    a[:300] = (rng.standard_normal(300) * 10.0 ** rng.integers(-9, 12, 300)).astype(np.float32).view(np.uint32)
    a[300:304] = np.array([np.inf, -np.inf, 3e9, -3e9], np.float32).view(np.uint32)
    out, same = (np.full((24, n), 0xDEAD, np.uint32) for _ in range(2))
    shim.configure().call("run_words", a, b, c, out, n)
    every[arch].replay(shim.record("run_words", a, b, c, same, n), [a, b, c, same])
    for row in range(24):
        if row in FLOAT_ROWS:
            np.testing.assert_array_equal(out[row].view(np.float32), same[row].view(np.float32), err_msg=str(row))
        elif row == 21:
            np.testing.assert_allclose(out[row].view(np.float32), same[row].view(np.float32), rtol=1e-6)
        else:
            np.testing.assert_array_equal(out[row], same[row], err_msg=f"row {row}")

    want = {}
    bits = lambda f: sum((f(x >> i & 1, y >> i & 1, z >> i & 1) & 1).astype(np.uint32) << np.uint32(i) for i in range(32))  # noqa: E731
    x, y, z = (v.astype(np.int64) for v in (a, b, c))
    want[0], want[1], want[2] = bits(lambda p, q, r: p & q | r), bits(lambda p, q, r: (p & q) ^ r), bits(lambda p, q, r: ~(p | q | r))

    def permute(sel):
        eight = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], 1)
        pick = np.array([[s >> 4 * i & 15 for i in range(4)] for s in sel.tolist()])
        byte = np.take_along_axis(eight, pick & 7, 1)
        return np.where(pick & 8, np.where(byte & 0x80, 255, 0), byte).astype(np.uint8).copy().view(np.uint32)[:, 0]

    want[3], want[4] = permute(c), permute(np.full(n, 0x5140))
    quads = [v.view(t).reshape(n, 4).astype(np.int64) for v, t in ((a, np.int8), (a, np.uint8), (b, np.int8))]
    want[5], want[6] = ((z + (q * quads[2]).sum(1)).astype(np.uint64).astype(np.uint32) for q in quads[:2])
    for row, op in ((7, "fma"), (8, "add"), (9, "sub"), (10, "mul")):
        parts = [small_reference("f16", *ARITHMETIC[op], *(v.view(np.uint16)[i::2] for v in (a, b, c)[: 3 if op == "fma" else 2])) for i in range(2)]
        want[row] = parts[0] | parts[1].astype(np.uint32) << np.uint32(16)
    with np.errstate(all="ignore"):
        f, g = a.view(np.float32), b.view(np.float32)
        halves = a.view(np.float16).astype(np.float32)
        want[11] = want[15] = halves[::2].copy().view(np.uint32)
        want[16] = halves[1::2].copy().view(np.uint32)
        want[13] = want[17] = a << np.uint32(16)
        want[18] = a & np.uint32(0xFFFF0000)
        canonical = lambda v, r: np.where(np.isnan(v), np.uint16(0x7FFF), r).astype(np.uint32)  # noqa: E731
        half = lambda v: canonical(v, v.astype(np.float16).view(np.uint16))  # noqa: E731
        want[12], want[19] = half(f), half(f) | half(g) << np.uint32(16)
        bf16 = lambda v: canonical(v, torch.from_numpy(v.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16))  # noqa: E731
        want[14], want[20] = bf16(f), bf16(f) | bf16(g) << np.uint32(16)
        want[23] = np.where(np.isnan(f), 0, np.clip(np.rint(f.astype(np.float64)), -(2**31), 2**31 - 1)).astype(np.int32).view(np.uint32)
    want[22] = ((y << 32 | x).astype(np.uint64) >> (z & 31).astype(np.uint64)).astype(np.uint32)
    for row, w in want.items():
        if row in FLOAT_ROWS:
            np.testing.assert_array_equal(out[row].view(np.float32), w.view(np.float32), err_msg=str(row))
        else:
            np.testing.assert_array_equal(out[row], w, err_msg=f"row {row}")
    np.testing.assert_allclose(out[21].view(np.float32), np.exp2((a & 0xFFFF) / 512 - 64), rtol=1e-6)
    assert set(want) | {21} == set(range(24))


@needs_nvcc
def test_packed_bf16(rng, shim, every):
    low, high = small_operands(rng, 600), small_operands(rng, 600)
    a, b, c = (x.astype(np.uint32) | y[::-1].astype(np.uint32) << np.uint32(16) for x, y in zip(low, high, strict=True))
    n = len(a)
    want = []
    for op in ("fma", "add", "sub", "mul"):
        parts = [small_reference("bf16", *ARITHMETIC[op], *(v.view(np.uint16)[i::2] for v in (a, b, c)[: 3 if op == "fma" else 2])) for i in range(2)]
        want.append(parts[0] | parts[1].astype(np.uint32) << np.uint32(16))
    for go in (lambda o: shim.configure().call("run_bf16_words", a, b, c, o, n),
               lambda o: every["sm_80"].replay(shim.record("run_bf16_words", a, b, c, o, n), [a, b, c, o]),
               lambda o: every["sm_90"].replay(shim.record("run_bf16_words", a, b, c, o, n), [a, b, c, o])):
        out = np.full((4, n), 0xDEAD, np.uint32)
        go(out)
        np.testing.assert_array_equal(out, np.stack(want))
    with pytest.raises(PtxError, match="trap"):
        every["sm_75"].replay(shim.record("run_bf16_words", a, b, c, out, n), [a, b, c, out])


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["half_k8", "half_k16", "bf16_k16", "byte_k32"])
def test_products(arch, name, rng, shim, every):
    if name == "byte_k32":
        a, b = rng.integers(-128, 128, (16, 32), dtype=np.int8), rng.integers(-128, 128, (8, 32), dtype=np.int8)
        c = rng.integers(-(1 << 31), 1 << 31, (16, 8)).astype(np.int32)  # some sums wrap
        want = (a.astype(np.int64) @ b.astype(np.int64).T + c).astype(np.int32)
    else:
        k = 8 if name == "half_k8" else 16
        a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, k), (8, k), (16, 8)))
        a[3] *= np.float32(2.0**-17)  # subnormal halves
        if name == "bf16_k16":
            a, b = (v.view(np.uint32) >> np.uint32(16) << np.uint32(16) for v in (a, b))
            want = a.view(np.float32).astype(np.float64) @ b.view(np.float32).astype(np.float64).T + c
            a, b = ((v >> np.uint32(16)).astype(np.uint16) for v in (a, b))
        else:
            a, b = a.astype(np.float16), b.astype(np.float16)
            want = a.astype(np.float64) @ b.astype(np.float64).T + c
    out, same = np.full_like(c, 77), np.full_like(c, 77)
    launches = shim.record(f"run_{name}", a, b, c, same)
    shim.configure().call(f"run_{name}", a, b, c, out)
    tolerance = 1e-6 if c.dtype == np.float32 else 0
    np.testing.assert_allclose(out, want, rtol=tolerance, atol=tolerance)
    if arch == "sm_75" and name == "bf16_k16":
        with pytest.raises(PtxError, match="trap"):
            every[arch].replay(launches, [a, b, c, same])
    else:
        every[arch].replay(launches, [a, b, c, same])
        np.testing.assert_allclose(same, want, rtol=tolerance, atol=tolerance)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("take", [0, 5, 16])
def test_matrices(arch, take, rng, shim, every):
    if arch == "sm_75" and take == 5:
        pytest.skip("sm_75 copies all or nothing")
    data = rng.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
    held = data.copy()
    held[3, 7].view(np.uint8)[take:] = 0
    pairs = lambda m: m.reshape(-1, 32, 2).copy().view(np.uint32)[..., 0]  # noqa: E731
    want = np.concatenate([pairs(held[:n]) for n in (1, 2, 4)] + [pairs(held[:n].transpose(0, 2, 1)) for n in (1, 2, 4)])
    for go in (lambda o: shim.configure().call("run_matrices", data, o, take), lambda o: shim.configure(seed=9, lazy=False).call("run_matrices", data, o, take),
               lambda o: every[arch].replay(shim.record("run_matrices", data, o, take), [data, o])):
        out = np.full((14, 32), 0xDEAD, np.uint32)
        go(out)
        np.testing.assert_array_equal(out, want)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_loads_and_talk_and_wandering_lanes(arch, rng, shim, every):
    n = 77
    in4, in8, in16 = (rng.integers(0, 1 << 32, (n, w), dtype=np.uint32) for w in (1, 2, 4))
    words = rng.integers(0, 1 << 32, 64, dtype=np.uint32)
    words[[3, 40]] = 0, 0xFFFFFFFF
    steps = rng.integers(0, 1 << 32, 300, dtype=np.uint32)
    out = [[np.full((n, 7), 7, np.uint32), np.full((10, 64), 7, np.uint32), np.zeros(4, np.uint32), np.full(300, 7, np.uint32)] for _ in range(2)]
    for (a, b, cells, d), go in zip(out, (lambda *v: shim.configure(seed=6).call(*v),
                                          lambda *v: every[arch].replay(shim.record(*v), [x for x in v if isinstance(x, np.ndarray)])), strict=True):
        go("run_loads", in4, in8, in16, a, n)
        go("run_talk", words, b, cells)
        go("run_wander", steps, d, 300)
    np.testing.assert_array_equal(out[0][0], np.concatenate([in4, in8, in16], 1))
    for mine, other in zip(*out, strict=True):
        np.testing.assert_array_equal(mine, other)
    lane, talk = np.arange(64) % 32, out[0][1]
    base = np.arange(64) // 32 * 32
    np.testing.assert_array_equal(talk[0], words[base + (words & 31)])
    np.testing.assert_array_equal(talk[1], words[base + (lane ^ 5)])
    np.testing.assert_array_equal(talk[2], words[base + np.where(lane % 16 >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(talk[3], words[base + np.where(lane % 8 == 0, lane + 7, lane)])
    odd = (words & 1).reshape(2, 32)
    np.testing.assert_array_equal(talk[4], np.repeat([sum(int(o) << i for i, o in enumerate(w)) for w in odd], 32))
    high = (words > 0xF0000000).reshape(2, 32)
    np.testing.assert_array_equal(talk[5], np.repeat(high.any(1) + 2 * (words < 0xF0000000).reshape(2, 32).all(1), 32))
    np.testing.assert_array_equal(talk[6], words[base + (lane ^ np.where(lane < 16, 1, 2))])
    assert (talk[7] == odd.sum()).all() and (talk[8] == 1 + 2 * int((words > 0x00100000).all())).all()
    count = [(int(w).bit_count(), 32 - int(w).bit_length(), int(f"{int(w):032b}"[::-1], 2) >> 27) for w in words]
    np.testing.assert_array_equal(talk[9], [p + 100 * z + 10000 * r for p, z, r in count])
    low = int((words & 255).sum())
    assert out[0][2].tolist() == [low, int(words.max()), int(np.bitwise_or.reduce(words)), int(np.float32(low).view(np.uint32))]


@needs_nvcc
def test_every_instruction_of_the_header_is_executed(shim):
    """By the self-test kernels, on one architecture or another."""
    written = set(re.findall(r'asm(?: volatile)?\("([a-z][^; ]*)', PTX_HEADER.read_text()))
    assert len(written) >= 30
    word, number, half = np.zeros(512, np.uint32), np.zeros(512, np.float32), np.zeros(512, np.uint16)
    calls = [("words", word, word, word, word, 16), ("bf16_words", word, word, word, word, 16), ("half_k8", word, word, number, number),
             ("half_k16", word, word, number, number), ("bf16_k16", word, word, number, number), ("byte_k32", word, word, word.view(np.int32), word),
             ("matrices", half, word, 16), ("loads", word, word, word, word, 16)]
    ran = set()
    for arch in ARCHS:
        module = Module(compile_ptx(EVERY, arch))
        for name, *args in calls:
            if arch != "sm_75" or "bf16" not in name:
                module.replay(shim.record(f"run_{name}", *args), [a for a in args if isinstance(a, np.ndarray)])
        ran |= module.executed()
    assert written - ran == {"trap"}


# ---------------------------------------------------------------------------------------------------------------- bugs


@needs_nvcc
def test_swapped_operands_in_the_asm_of_mma(rng, shim):
    """The fibers never see the asm: they give the right result with the wrong header, and only the interpreter shows it."""
    words = "m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
    header = plant(PTX_HEADER, (words + "{%4, %5, %6, %7}", words + "{%4, %6, %5, %7}"))
    wrong = Library([GEMM], include=[header.parent])
    case = Gemm(rng, 32, 32, 64)
    wrong.call(*case.call)
    assert case.error() < RIGHT
    assert replay(Module(compile_ptx(GEMM, include=[header.parent])), shim, case) > 0.1


SHUFFLE = "sum += __shfl_xor_sync(0xffffffffu, sum, bits);"
COPY = "tile + place(row, chunk), in"
PLANTED = {
    "shared read": (GEMV, "i < WARPS; i++) all", "i <= WARPS; i++) all", "4 bytes at shared address .*belong to no shared variable"),
    "global write": (GEMV, "y[row] = all;", "y[row + 9] = all;", r"gemv.cu:26, PTX line .*(in no array|which has)"),
    "early return": (GEMV, "  __syncthreads();  // MARK: sums", "  if (threadIdx.x == 70) return;\n  __syncthreads();", "threads 70 to 70 .*have returned"),
    "half a warp": (GEMV, SHUFFLE, "if (lane < 16) " + SHUFFLE, "waits for lanes that never come"),
    "mask": (GEMV, SHUFFLE, SHUFFLE.replace("0xffffffffu", "0xffffu"), "member mask 0x0000ffff"),
    "alignment": (GEMM, COPY, "4 + " + COPY, r"gemm.cu:\d+ > ptx.cuh:\d+, PTX line \d+: cp.async.*is not aligned"),
    "take": (GEMM, "in ? 16 : 0", "in ? 17 : 0", "cp.async takes 17 of 16 bytes"),
}


@needs_nvcc
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug, rng, shim):
    source, old, new, message = PLANTED[bug]
    module = Module(compile_ptx(plant(source, (old, new))))
    with pytest.raises(PtxError, match=message):
        replay(module, shim, Gemv(rng, 3, 640) if source == GEMV else Gemm(rng, 32, 32, 64))


@needs_nvcc
def test_weak_wait_and_early_copies(rng, shim):
    module = Module(compile_ptx(plant(GEMM, ("cp_async_wait<1>();  // MARK: wait", "cp_async_wait<2>();"))))
    case = Gemm(rng, 32, 32, 160)
    (one,) = shim.record(*case.call)
    arrays = [case.a, case.b, case.c]
    module.launch(one.kernel, one.grid, one.block, one.args, one.shared, arrays, lazy=True)
    assert case.error() == np.inf
    module.launch(one.kernel, one.grid, one.block, one.args, one.shared, arrays, lazy=False)
    assert case.error() < RIGHT


@needs_nvcc
def test_bank_conflicts_by_line(rng, shim):
    module = Module(compile_ptx(plant(GEMM, ("(chunk ^ (row >> 1 & 3))", "chunk"))))
    assert replay(module, shim, Gemm(rng, 32, 32, 64)) < RIGHT
    loads = {line: v for line, v in module.banks.items() if "ptx.cuh" in line}
    assert loads and all(conflicts == 3 * phases for phases, conflicts in loads.values())


# ---------------------------------------------------------------------------------------------------------------- the language


TEMPLATE = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{{
\t.reg .pred %p<4>;
\t.reg .b32 %r<8>;
\t.reg .f32 %f<4>;
\t.reg .b64 %rd<4>;
\tld.param.u64 %rd1, [k_param_0];
{body}
\tret;
}}
"""


def run_text(body, threads=32):
    out = np.zeros(threads, np.uint32)
    Module(TEMPLATE.format(body=body)).launch("k", 1, threads, [out])
    return out


STORE = "mul.lo.u32 %r5, %r1, 4;\ncvt.u64.u32 %rd2, %r5;\nadd.u64 %rd3, %rd1, %rd2;\nst.global.u32 [%rd3], %r2;"


def test_lanes_that_wait_are_met_by_others_that_come_from_behind():
    """The compiler put a block that goes back in the text behind the shuffle that it goes to."""
    body = """mov.u32 %r1, %tid.x;
setp.lt.u32 %p1, %r1, 8;
@%p1 bra $WAIT;
bra.uni $BEHIND;
$BEFORE:
add.u32 %r1, %r1, 100;
$WAIT:
shfl.sync.bfly.b32 %r2|%p2, %r1, 8, 31, -1;
bra.uni $END;
$BEHIND:
add.u32 %r1, %r1, 1000;
bra.uni $BEFORE;
$END:
mov.u32 %r1, %tid.x;
""" + STORE
    lane = np.arange(32) ^ 8
    assert np.array_equal(run_text(body), lane + 1100 * (lane >= 8))


OPERATION = """.version 9.0
.target sm_80
.address_size 64
.global .align 4 .b8 table[16] = {{1, 2, 3, 4, 5, 6, 7, 8}};
.visible .entry k(.param .u64 k_param_0)
{{
\t.reg .pred %p<4>;
\t.reg .b16 %h<4>;
\t.reg .b32 %r<8>;
\t.reg .f32 %f<4>;
\t.reg .b64 %rd<8>;
\t.local .align 8 .b8 depot[16];
\t.shared .align 8 .b8 tile[1024];
\tld.param.u64 %rd1, [k_param_0];
\tmov.u32 %r7, %tid.x;
\tmul.wide.u32 %rd2, %r7, 16;
\tadd.s64 %rd1, %rd1, %rd2;
\tld.global.v2.u32 {{%r1, %r2}}, [%rd1];
\tld.global.u32 %r3, [%rd1+8];
\tmov.b32 %f1, %r1;
\tmov.b32 %f2, %r2;
{body}
\tst.global.u32 [%rd1+12], %r4;
\tret;
}}
"""


def signed(x):
    return x - (1 << 32) if x >> 31 else x


def truncated(x, y):
    """Quotient towards zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def field(x, start, length, sign):
    """bfe: the field with zeros, or copies of its uppermost bit that exists, above it."""
    start, length = start & 255, length & 255
    if length == 0:
        return 0
    bits = [(x >> i & 1) if i < 32 else ((x >> 31) if sign else 0) for i in range(start, start + length)]
    value = sum(b << i for i, b in enumerate(bits))
    return value | (-(bits[-1] & sign) << length)


def number(x):
    return float(np.array(x, np.uint32).view(np.float32))


def integer(f, way, low, high):
    """cvt of a float: NaN is 0, and what does not fit is the nearest that does."""
    return 0 if f != f else low if f == -math.inf else high if f == math.inf else min(max(int(way(f)), low), high)


#: PTX -> what %r4 is, in Python's integers, for words a, b, c in %r1 to %r3 (and a, b as floats in %f1, %f2)
OPERATIONS = {
    "bfe.u32 %r4, %r1, %r2, %r3;": lambda a, b, c: field(a, b, c, 0),
    "bfe.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: field(a, b, c, 1),
    "bfi.b32 %r4, %r1, %r2, 5, 9;": lambda a, b, c: b & ~(511 << 5) | (a & 511) << 5,
    "bfi.b32 %r4, %r1, %r2, 28, 9;": lambda a, b, c: b & (1 << 28) - 1 | a << 28,
    "bfi.b32 %r4, %r1, %r2, 3, 0;": lambda a, b, c: b,
    "shf.l.wrap.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "shl.b32 %r4, %r1, %r3;": lambda a, b, c: a << min(c, 32),
    "shr.u32 %r4, %r1, %r3;": lambda a, b, c: a >> min(c, 32),
    "shr.s32 %r4, %r1, %r3;": lambda a, b, c: signed(a) >> min(c, 31),
    "mul.hi.u32 %r4, %r1, %r2;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r4, %r1, %r2;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.hi.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: (signed(a) * signed(b) >> 32) + c,
    "mul.wide.s32 %rd3, %r1, %r2;\nmad.wide.s32 %rd3, %r2, %r3, %rd3;\nshr.u64 %rd3, %rd3, 20;\ncvt.u32.u64 %r4, %rd3;":
        lambda a, b, c: ((signed(a) * signed(b) + signed(b) * signed(c)) & (1 << 64) - 1) >> 20,
    "cvt.s64.s32 %rd3, %r1;\ncvt.u64.u32 %rd4, %r2;\nmul.hi.s64 %rd3, %rd3, 0x7123456789ABCDEF;\nmul.hi.u64 %rd4, %rd4, %rd3;\nxor.b64 %rd3, %rd3, %rd4;\n"
    "cvt.u32.u64 %r4, %rd3;": lambda a, b, c: (h := signed(a) * 0x7123456789ABCDEF >> 64) ^ (b * (h & (1 << 64) - 1) >> 64),
    "or.b32 %r2, %r2, 1;\ndiv.s32 %r4, %r1, %r2;": lambda a, b, c: truncated(signed(a), signed(b | 1)),
    "or.b32 %r2, %r2, 1;\nrem.s32 %r4, %r1, %r2;": lambda a, b, c: signed(a) - truncated(signed(a), signed(b | 1)) * signed(b | 1),
    "or.b32 %r3, %r3, 1;\nrem.u32 %r4, %r1, %r3;": lambda a, b, c: a % (c | 1),
    "min.s32 %r4, %r1, %r2;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r4, %r1, %r2;": lambda a, b, c: max(a, b),
    "abs.s32 %r4, %r1;": lambda a, b, c: abs(signed(a)),
    "neg.s32 %r4, %r1;": lambda a, b, c: -signed(a),
    "not.b32 %r4, %r1;": lambda a, b, c: ~a,
    "cvt.s16.s32 %h1, %r1;\ncvt.s32.s16 %r4, %h1;": lambda a, b, c: (a & 0x7FFF) - (a & 0x8000),
    "cvt.sat.u8.s32 %r4, %r1;": lambda a, b, c: min(max(signed(a), 0), 255),
    "cvt.rzi.s32.f32 %r4, %f1;": lambda a, b, c: integer(number(a), math.trunc, -(1 << 31), (1 << 31) - 1),
    "cvt.rmi.u32.f32 %r4, %f1;": lambda a, b, c: integer(number(a), math.floor, 0, (1 << 32) - 1),
    "cvt.rpi.s16.f32 %h1, %f1;\ncvt.s32.s16 %r4, %h1;": lambda a, b, c: integer(number(a), math.ceil, -(1 << 15), (1 << 15) - 1),
    "setp.lt.s32 %p1, %r1, %r2;\nsetp.gt.or.u32 %p2|%p3, %r2, %r3, %p1;\nselp.b32 %r4, 1, 2, %p2;\n@%p3 add.u32 %r4, %r4, 4;":
        lambda a, b, c: (1 if b > c or signed(a) < signed(b) else 2) + 4 * (b <= c or signed(a) < signed(b)),
    "setp.ltu.f32 %p1, %f1, %f2;\nsetp.num.f32 %p2, %f1, %f2;\nselp.b32 %r4, 1, 2, %p1;\n@!%p2 add.u32 %r4, %r4, 4;":
        lambda a, b, c: (2 if number(a) >= number(b) else 1) + 4 * (number(a) != number(a) or number(b) != number(b)),
    "min.f32 %f3, %f1, %f2;\nsetp.eq.f32 %p1, %f3, %f1;\nselp.b32 %r4, 1, 2, %p1;":
        lambda a, b, c: 1 if number(a) == number(a) and not number(b) < number(a) else 2,
    "redux.sync.xor.b32 %r4, %r1, -1;\nredux.sync.xor.b32 %r5, %r1, -1;\nxor.b32 %r4, %r4, %r5;": lambda a, b, c: 0,
    "st.local.u32 [depot+4], %r1;\nmov.u64 %rd3, depot;\ncvta.local.u64 %rd4, %rd3;\nld.u32 %r4, [%rd4+4];": lambda a, b, c: a,
    "mul.lo.u32 %r5, %r7, 4;\nmov.u32 %r6, tile;\nadd.u32 %r5, %r5, %r6;\nst.shared.u32 [%r5], %r2;\ncvt.u64.u32 %rd3, %r5;\ncvta.shared.u64 %rd4, %rd3;\n"
    "ld.s8 %r4, [%rd4+3];": lambda a, b, c: (b >> 24 & 127) - (b >> 24 & 128),
    "and.b32 %r5, %r1, 3;\ncvt.u64.u32 %rd3, %r5;\nmov.u64 %rd4, table;\nadd.s64 %rd4, %rd4, %rd3;\nld.global.u8 %r4, [%rd4+4];": lambda a, b, c: 5 + (a & 3),
    "and.b32 %r5, %r1, 1;\n$T: .branchtargets $A, $B;\nbrx.idx %r5, $T;\n$A: mov.u32 %r4, %r2;\nbra.uni $C;\n$B: mov.u32 %r4, %r3;\n$C:":
        lambda a, b, c: c if a & 1 else b,
}


@pytest.mark.parametrize("body", OPERATIONS)
def test_operations(body, rng):
    """Instructions that nvcc may choose for a kernel, against Python's integers."""
    words = rng.integers(0, 1 << 32, (256, 4), dtype=np.uint32)
    words[64:, 2] %= 70                                                 # shift counts
    words[64:128, 1] %= 40
    words[128:192, 0] = (rng.standard_normal(64) * 10.0 ** rng.integers(-1, 11, 64)).astype(np.float32).view(np.uint32)
    words[192:200, 0] = np.array([np.nan, np.inf, -np.inf, 0.5, 1.5, -0.5, 2.0**31, -(2.0**31)], np.float32).view(np.uint32)
    words[200:208, :2] = words[200:208, :1]
    got = words.copy()
    Module(OPERATION.format(body=body)).launch("k", 1, 256, [got])
    for (a, b, c, _), r in zip(words.tolist(), got[:, 3].tolist(), strict=True):
        assert r == OPERATIONS[body](a, b, c) & 0xFFFFFFFF, (hex(a), hex(b), hex(c))
    np.testing.assert_array_equal(got[:, :3], words[:, :3])


@pytest.mark.parametrize("body, message", [
    ("frobnicate.b32 %r1, %r2;", "PTX line 11: frobnicate.b32 %r1, %r2;: instruction frobnicate is not known"),
    ("add.sat.s32 %r1, %r2, %r3;", r"PTX line 11: .*\['sat'\] of an integer add is not known"),
    ("add.rz.f32 %f1, %f2, %f3;", r"rounding \['rz'\] of add is not known"),
    ("ld.global.L3::x.u32 %r1, [%rd1];", "modifier .L3::x of ld is not known"),
    ("add.s32 %r1, %r2;", "2 operands, 3 expected"),
    ("add.s32 %r9, %r2, %r3;", "%r9 is not a register"),
    ("add.s32 %r1, %rd1, foo;", "'foo' is neither a register nor a number"),
    ("mov.u32 %rd1, %r1;\nmov.u64 %r1, %rd1;", "%r1 of type b32 cannot take a u64"),
    ("bar.sync 1;", "only barrier 0 of all threads"),
    ("bra $L_nowhere;", r"no label \$L_nowhere"),
    ("call.uni f, ();", r"PTX line 11: .*"),
    ("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};", "mma.sync.aligned.m16n8k4.* is not known"),
])
def test_unknown_things_are_errors_that_name_the_line(body, message):
    with pytest.raises(PtxError, match=message):
        run_text(body)


def test_division_by_zero_and_endless_loops():
    with pytest.raises(PtxError, match="division by zero"):
        run_text("mov.u32 %r1, %tid.x;\ndiv.u32 %r2, %r1, %r1;")
    with pytest.raises(PtxError, match="1000 instructions and no end"):
        Module(TEMPLATE.format(body="$L: bra $L;")).launch("k", 1, 32, [np.zeros(1, np.uint32)], limit=1000)


def test_divergent_loops_meet_again():
    """Collatz steps of tid + 1: each lane leaves its loop at its own time, and all go on together, as the count of lanes at the shuffle shows."""
    body = "mov.u32 %r1, %tid.x;\nadd.u32 %r3, %r1, 1;\nmov.u32 %r2, 0;\n$L1: setp.eq.u32 %p1, %r3, 1;\n@%p1 bra $L3;\nadd.u32 %r2, %r2, 1;\n" \
           "and.b32 %r4, %r3, 1;\nsetp.eq.u32 %p2, %r4, 0;\n@!%p2 bra $L2;\nshr.u32 %r3, %r3, 1;\nbra $L1;\n$L2: mad.lo.u32 %r3, %r3, 3, 1;\nbra $L1;\n" \
           "$L3: shfl.sync.bfly.b32 %r6, %r2, 0, 31, -1;\n" + STORE

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    np.testing.assert_array_equal(run_text(body), [steps(n) for n in range(1, 33)])


def test_scopes_and_vectors():
    body = "mov.u32 %r1, %tid.x;\n{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %r1; mov.b32 %r2, {hi, lo}; }\n" \
           "{ .reg .b32 lo; mov.b32 lo, 7; add.u32 %r2, %r2, lo; }\n"
    np.testing.assert_array_equal(run_text(body + STORE), (np.arange(32) << 16) + 7)


def test_launches_are_checked(rng):
    module = Module(TEMPLATE.format(body=""))
    with pytest.raises(PtxError, match="1 parameters, 2 given"):
        module.launch("k", 1, 32, [np.zeros(1), 3])
    with pytest.raises(PtxError, match="has 8 bytes, 4 given"):
        module.launch("k", 1, 32, [b"1234"])
    with pytest.raises(PtxError, match="cannot be launched"):
        module.launch("k", 1, 1025, [None])
    with pytest.raises(PtxError, match="not contiguous"):
        module.launch("k", 1, 32, [np.zeros((4, 4))[:, 1:]])
    with pytest.raises(PtxError, match="cannot be written"):
        frozen = np.zeros(32, np.uint32)
        frozen.flags.writeable = False
        Module(TEMPLATE.format(body="mov.u32 %r1, %tid.x;\nmov.u32 %r2, 1;\n" + STORE)).launch("k", 1, 32, [frozen])

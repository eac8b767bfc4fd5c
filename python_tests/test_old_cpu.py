"""The native module on a CPU without AVX, emulated by qemu-user (Debian: ``apt install qemu-user``); skipped where that is missing."""

import shutil
import subprocess
import sys
import textwrap

import pytest

from mxq_ext import _native

# No numpy and no torch: their own wheels ask for newer CPUs. Weights are bytes, formats as csrc/formats.h numbers them.
SCRIPT = textwrap.dedent("""
    import array, ctypes, importlib.util, random, sys
    spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    assert cpu.targets() == ["scalar"], cpu.targets()
    rng, n, k = random.Random(0), 20, 100

    def half(count, low, high):
        import struct
        return ctypes.create_string_buffer(struct.pack(f"<{count}e", *(rng.uniform(low, high) for _ in range(count))), 2 * count)

    def address(buffer):
        return buffer.buffer_info()[0] if isinstance(buffer, array.array) else ctypes.addressof(buffer)

    x = array.array("f", (rng.gauss(0, 1) for _ in range(20 * k)))
    for fmt in [(0, 2, 0, 0, 32), (0, 3, 1, 0, 64), (0, 4, 2, 0, 0), (0, 8, 0, 0, 64), (1, 4, 0, 0, 32), (2, 3, 0, 0, 0), (3, 16, 0, 0, 0)]:
        code_bytes, scale_bytes, zero_bytes = cpu.canonical_row_bytes(fmt, k)
        codes = half(n * k, -1, 1) if fmt[0] == 3 else ctypes.create_string_buffer(rng.randbytes(n * code_bytes), n * code_bytes)
        if fmt[0] != 3 and code_bytes * 8 > k * fmt[1]:  # the bits after a row's last code are zero
            for row in range(n):
                last = (row + 1) * code_bytes - 1
                codes[last] = codes.raw[last] & (1 << (8 - (code_bytes * 8 - k * fmt[1]))) - 1
        scales = half(max(1, n * scale_bytes // 2), 0.01, 0.1)
        size = max(1, n * zero_bytes)
        zeros = half(size, 0, 1) if fmt[2] == 2 else ctypes.create_string_buffer(rng.randbytes(size), size)
        weight = (n, k, [(0, n, 0, k, fmt, address(codes), address(scales), address(zeros))], 0, 0, 0, 0, 0, 0)
        blob = ctypes.create_string_buffer(cpu.blob_nbytes(weight))
        cpu.prepack(weight, ctypes.addressof(blob), 2)
        for rows in (1, 3, 20):
            for a8 in (False, True):
                y, want = (array.array("f", bytes(4 * rows * n)) for _ in range(2))
                cpu.linear(ctypes.addressof(blob), address(x), k, 0, rows, address(y), 0, 0, a8, 2)
                cpu.ref_linear(weight, address(x), k, 0, rows, address(want), 0, 0, a8)
                norm = sum(v * v for v in want) ** 0.5
                error = sum((a - b) ** 2 for a, b in zip(y, want)) ** 0.5 / norm
                assert norm > 0 and error < 6e-6, (fmt, rows, a8, error)
    print("scalar agrees")
""")


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user, which emulates the old CPU")
def test_kernels_run_on_a_cpu_without_avx():
    command = ["qemu-x86_64", "-cpu", "qemu64", sys.executable, "-S", "-c", SCRIPT, _native.cpu.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip() == "scalar agrees", done.stderr

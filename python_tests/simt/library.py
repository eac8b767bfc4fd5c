"""Calls the host functions of a compiled library, in this process or, for the sanitizers, in a child that has their runtime loaded first."""

import ctypes
import functools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import HERE, MODES, build

COUNTERS = ("blocks", "switches", "barriers", "collectives", "mma", "ldmatrix_phases", "ldmatrix_conflicts", "cp_async")
DEFAULTS = {"seed": 0, "lazy": True, "workers": 1, "strict": True, "max_shared": 227 * 1024}

#: Stack frames between the scheduler and the kernel, which explain nothing.
FRAMES = re.compile(r"^\s*#\d+ .*(std::|simt::launch<|simt::entry|<null>)")


class SimtError(AssertionError):
    """A kernel did what a device forbids, or a sanitizer has something to report; the text names file and line of the kernel."""


def convert(value):
    """A Python value as the C argument it stands for."""
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError(f"array of shape {value.shape} with strides {value.strides}: only contiguous ones can be passed")
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, bool | int):
        if not -(1 << 31) <= value < 1 << 31:
            raise ValueError(f"{value} does not fit an int: pass ctypes.c_int64({value})")
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if value is None:
        return ctypes.c_void_p(None)
    return value  # a ctypes object


@dataclass
class Launch:
    """A launch that was not run: what ``ptxsim.Module.launch`` needs to run it."""

    kernel: str         # mangled name
    grid: tuple
    block: tuple
    shared: int
    args: list[bytes]


class Native:
    """A library loaded into this process."""

    def __init__(self, path):
        self.path, self.dll = path, ctypes.CDLL(str(path))
        self.dll.simt_take_error.restype = ctypes.c_char_p
        self.dll.simt_take_record.restype = ctypes.c_void_p

    def call(self, name, options, args, record=False):
        """(what the function returned, message of a failed launch, counters)"""
        self.dll.simt_configure(*(int(options[k]) for k in DEFAULTS), int(record))
        code = getattr(self.dll, name)(*map(convert, args))
        counts = (ctypes.c_uint64 * len(COUNTERS))()
        self.dll.simt_take_stats(counts)
        return code, self.dll.simt_take_error().decode(), dict(zip(COUNTERS, counts, strict=True))

    def launches(self):
        """list of Launch: what was recorded since the last time."""
        size = ctypes.c_size_t()
        data = ctypes.string_at(self.dll.simt_take_record(ctypes.byref(size)), size.value)
        names, out, at = self.symbols, [], 0
        while at < len(data):
            kernel, *numbers, count = struct.unpack_from("<9Q", data, at)
            at += 72
            args = []
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", data, at)
                args.append(data[at + 8 : at + 8 + length])
                at += 8 + length
            out.append(Launch(names[kernel], tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], args))
        return out

    @functools.cached_property
    def symbols(self):
        """{address in this process: mangled name} of the library's functions."""
        table = {}
        for line in subprocess.run(["nm", str(self.path)], check=True, capture_output=True, text=True).stdout.splitlines():
            parts = line.split()
            if len(parts) == 3 and parts[1] in "tTwWuV":
                table[parts[2]] = int(parts[0], 16)
        here = ctypes.cast(self.dll.simt_configure, ctypes.c_void_p).value
        return {address - table["simt_configure"] + here: name for name, address in table.items()}


class Library:
    """The kernels of some sources, ready to be called.

    Args:
        sources, include, defines: see ``build``.
        mode: "plain", "debug" (-O0), "ucontext" (the portable fibers), "gcov", or "asan" (AddressSanitizer and UndefinedBehaviorSanitizer) and "tsan"
            (ThreadSanitizer), which run in a child process.
        isolated: run in a child process (True), so that a kernel that writes anywhere cannot take the tests with it, or in this one (False).
            Left out: the sanitizers in a child.
    """

    def __init__(self, sources, mode="plain", include=(), defines=(), isolated=None):
        self.mode = mode
        self.path = build(sources, mode, include, defines)
        self.isolated = bool(MODES[mode][2]) if isolated is None else isolated
        self.options = dict(DEFAULTS)
        self.stats = {}
        self.native = self.child = None

    def configure(self, **options):
        """Options of the calls that follow; what is not named goes back to its default.

        seed: order of the threads: 0 and 1 lock step, up and down; 2 and 3 one warp as far as it gets, up and down; from 4 on random.
        lazy: cp.async lands at the last legal moment (True) or at once.
        workers: OS threads that share the blocks.
        strict: a thread that has returned must not be missing at a later barrier.
        max_shared: bytes of shared memory that a block can have.
        """
        if unknown := set(options) - set(DEFAULTS):
            raise TypeError(f"no option {sorted(unknown)}; there are {list(DEFAULTS)}")
        self.options = DEFAULTS | options
        return self

    def call(self, name, *args):
        """Calls an ``extern "C" int`` function of the library. numpy arrays go as pointers and are written in place, int, float and None as such,
        anything else as a ctypes object. The counters of its launches are in ``stats`` afterwards.

        Raises:
            SimtError: the function did not return 0, or a sanitizer stopped it.
        """
        if not self.isolated:
            self.native = self.native or Native(self.path)
            code, message, self.stats = self.native.call(name, self.options, args)
        else:
            self.child = self.child or Child(self.path, self.mode)
            try:
                code, message, self.stats, arrays = self.child.call(name, self.options, args)
            except SimtError:
                self.child = None
                raise
            for mine, new in zip((a for a in args if isinstance(a, np.ndarray)), arrays, strict=True):
                mine[...] = new
        if code or message:
            raise SimtError(message or f"{name} returned {code}")

    def record(self, name, *args):
        """Calls a host function whose launches are written down and not run: so that another executor runs what the host code decided.

        Returns:
            list of Launch, in order.
        """
        if self.isolated:
            raise ValueError("launches are recorded in the process of the caller: their arguments are addresses")
        self.native = self.native or Native(self.path)
        code, message, _ = self.native.call(name, self.options, args, record=True)
        if code or message:
            raise SimtError(message or f"{name} returned {code}")
        return self.native.launches()

    def coverage(self):
        """{source file: {line: times run}} of what was called so far, in mode "gcov"."""
        if self.mode != "gcov":
            raise ValueError(f'coverage needs mode "gcov", this library has "{self.mode}"')
        self.native.dll.simt_dump_coverage()
        lines = {}
        for notes in sorted({str(p) for p in _gcda_files(self.path)}):
            out = subprocess.run(["gcov", "--json-format", "--stdout", notes], check=True, capture_output=True, cwd=tempfile.gettempdir()).stdout
            for part in out.splitlines():
                for file in json.loads(part)["files"]:
                    counts = lines.setdefault(str(Path(file["file"]).resolve()), {})
                    for line in file["lines"]:
                        counts[line["line_number"]] = counts.get(line["line_number"], 0) + line["count"]
        return lines


def environment(mode):
    """Of a Python process that can load a library of this mode: the sanitizer's runtime must come before everything else."""
    names = [subprocess.run(["g++", f"-print-file-name=lib{n}.so"], check=True, capture_output=True, text=True).stdout.strip() for n in MODES[mode][2]]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_PRELOAD": " ".join(names),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1",  # Python and its libraries are none of ours
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }


def shorten(report):
    """What a sanitizer wrote, without the frames between scheduler and kernel."""
    return "\n".join(line for line in report.decode(errors="replace").splitlines() if not FRAMES.search(line))[:6000]


def run_python(mode, *arguments, timeout=300):
    """Runs ``python`` with arguments in a process that can load libraries of a sanitizer's mode into itself: for tests whose calls pass structs
    with pointers, which cannot be sent to a child. There, ``Library(..., isolated=False)``.

    Returns:
        what it wrote to stdout.

    Raises:
        SimtError: it did not end with 0; the text has what it wrote to stderr.
    """
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment(mode), capture_output=True, timeout=timeout)
    if done.returncode:
        raise SimtError(f"python {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout.decode()[-3000:]}{shorten(done.stderr)}")
    return done.stdout.decode()


class Child:
    """A Python process with the sanitizer's runtime, which calls the library for us and dies of what the sanitizer reports."""

    def __init__(self, path, mode):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, "-m", "simt.child", str(path)], env=environment(mode), stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)

    def call(self, name, options, args):
        try:
            write(self.process.stdin, (name, options, [_portable(a) for a in args]))
            return read(self.process.stdout)
        except (EOFError, BrokenPipeError):
            code = self.process.wait()
            self.errors.seek(0)
            raise SimtError(f"the process that ran {name} ended with {code}:\n{shorten(self.errors.read())}") from None

    def __del__(self):
        process = getattr(self, "process", None)
        if process:
            process.stdin.close()
            process.wait()
            process.stdout.close()
            self.errors.close()


def _portable(value):
    return ("ctypes", type(value).__name__, value.value) if isinstance(value, ctypes._SimpleCData) else value


def write(stream, value):
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def read(stream):
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def _gcda_files(library):
    return [p for p in library.parent.glob("*/x.gcda")]

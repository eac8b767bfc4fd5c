"""Attention over the packed KV cache on CUDA, executed: on the CPU thread for thread (docs/cuda-testing.md), and on the device too where there is one.

Packed pages are held to the plain loops of the CPU, bit for bit; attention to float64 over what ``kv.reference`` reads from the pages.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
from types import SimpleNamespace

import cuda_tools
import numpy as np
import ptxsim
import pytest
import simt
import torch
from test_kv_ops import numbers, peculiar

from mxq_ext import _native, cuda
from mxq_ext.errors import FormatError, NativeError, ShapeError
from mxq_ext.kv import cuda as kv_cuda
from mxq_ext.kv import ops, reference
from mxq_ext.kv.ops import PageFormat, PageMix, PageTable
from mxq_ext.kv.rope import Rope, RopeTables
from mxq_ext.testing import numeric

PAIRS = list(itertools.product(ops.BITS, ops.BITS))
HEADS = (64, 80, 96, 128, 256)
#: Tokens of the sink, pages, tokens of the tail: 1, 63, 64, 65, 200 and more keys.
LENGTHS = ((0, 0, 1), (0, 0, 63), (0, 1, 0), (1, 1, 0), (8, 2, 64), (0, 0, 65), (70, 1, 66), (3, 2, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Of float32 results: sums of a few hundred terms, those of codes and of zeros apart.
LIMIT = numeric.bound("w4g64_fz", torch.float32)
FOLDER = cuda_tools.ROOT / "csrc" / "cuda"
FLAT = cuda_tools.ROOT / "python_tests" / "cuda_flat_attention.cpp"
SOURCES = [FOLDER / "attention.cu", FOLDER / "kv_pack.cu", FOLDER / "attention.cpp", FOLDER / "dispatch.cpp", FLAT]


class Bench:
    """The kernels of one device, for tensors of the CPU."""

    def __init__(self, backend: str, **options):
        self.device = torch.device(backend)
        runtime = cuda.runtime(torch.device("cuda", 0)) if backend == "cuda" else cuda.Runtime(cuda_tools.Functions(cuda_tools.library(), **options))
        self.kernels = kv_cuda.Kernels(runtime)

    def move(self, t):
        return t.to(self.device) if isinstance(t, torch.Tensor) else t

    def pack_page(self, x, fmt):
        page = [torch.full_like(t, 0x5A) for t in fmt.empty_page(x.shape[0] * x.shape[1])]
        codes, params = map(self.move, page)
        self.kernels.pack_page(self.move(x), fmt, codes, params, stream=0)
        return codes.cpu(), params.cpu()

    def attend(self, q, args, **options):
        """The result lies in a larger tensor of NaN, which must stay NaN around it."""
        pages, *parts = args
        b, h, t, d = q.shape
        room = torch.full((b, t + 2, h, d + 16), float("nan"), dtype=q.dtype, device=self.device)
        out = room[:, 1:-1, :, 16:].transpose(1, 2)
        table = kv_cuda.CudaPages.of(pages, self.device)
        options = {name: self.move(v) for name, v in options.items()}
        got = cuda_tools.poisoned(self.kernels.attend, self.move(q), table, *map(self.move, parts), out=out, stream=0, **options)
        assert got is out and int(room.isnan().sum()) == room.numel() - out.numel() + int(out.isnan().sum()), "it wrote outside of its output"
        return out.cpu()


@pytest.fixture(params=cuda_tools.backends())
def bench(request):
    return Bench(request.param)


def formats(key_bits, value_bits, d, key_group=64, value_group=64):
    return PageFormat("keys", key_bits, key_group, d), PageFormat("values", value_bits, value_group, d)


def meaning(fmt, codes, params):
    """What a page stands for, float64 [heads, 64, D]."""
    return torch.from_numpy(np.stack([reference.unpack(c.numpy().tobytes(), p.numpy(), fmt) for c, p in zip(codes, params, strict=True)]))


def cache(key, value, heads, sink, pages, tail, *, batch=1, dtype=torch.float32, seed=0, change=lambda x: x):
    """(table, sink_k, sink_v, tail_k, tail_v) and the same keys and values in float64, [B, Hkv, total, D]. ``change``: of the numbers that are packed."""
    d = key.head_dim
    table = PageTable(key, value, batch * heads)
    parts = [numbers(batch, heads, n, d, seed=seed + i).to(dtype) for i, n in enumerate((sink, sink, tail, tail))]
    whole = [parts[0].double()], [parts[1].double()]
    for p in range(pages):
        page = []
        for side, fmt in enumerate((key, value)):
            codes, params = fmt.empty_page(batch * heads)
            ops.pack_page_ref(change(numbers(batch, heads, 64, d, seed=seed + 10 + 2 * p + side)), fmt, codes, params)
            page += [codes, params]
            whole[side].append(meaning(fmt, codes, params).reshape(batch, heads, 64, d))
        table.append(*page)
    return (table, *parts), *(torch.cat([*side, part.double()], 2).numpy() for side, part in zip(whole, parts[2:], strict=True))


# ----------------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("bits", ops.BITS)
def test_pages_are_packed_to_the_same_bits(bench, bits):
    for d, (side, groups) in itertools.product((16, 48, *HEADS), (("keys", ops.KEY_GROUPS), ("values", ops.VALUE_GROUPS))):
        for i, group in enumerate(groups):
            fmt = PageFormat(side, bits, group, d)
            x = (peculiar(d) if i % 2 else numbers(2, 2, 64, d, seed=d)).to(DTYPES[(i + d // 16) % 3])
            want = fmt.empty_page(x.shape[0] * x.shape[1])
            ops.pack_page_ref(x, fmt, *want)
            codes, params = bench.pack_page(x, fmt)
            assert torch.equal(codes, want[0]) and torch.equal(params.view(torch.int16), want[1].view(torch.int16)), (fmt, x.dtype)


def test_any_strides_are_packed_like_copies(bench):
    wide = numbers(2, 64, 3, 160)
    for side in ops.SIDES:
        fmt = PageFormat(side, 3, 32, 80)
        for x in (wide[..., 80:].transpose(1, 2), wide[..., ::2].transpose(1, 2), numbers(1, 3, 64, 80).expand(2, 3, 64, 80)):
            for a, b in zip(bench.pack_page(x, fmt), bench.pack_page(x.contiguous(), fmt), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ------------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("key_bits, value_bits", PAIRS)
def test_every_pair_of_bits(bench, key_bits, value_bits):
    """Each pair with each head dimension; lengths, ratios of heads, numbers of queries, groups and types in turn."""
    for i, d in enumerate(HEADS):
        turn = i + PAIRS.index((key_bits, value_bits))
        key, value = formats(key_bits, value_bits, d, (64, 32)[turn % 2], (0, 32, 64, 128)[turn % 4])
        lengths, ratio = LENGTHS[(turn + i) % len(LENGTHS)], (1, 3, 4, 8, 7)[turn % 5]
        args, k, v = cache(key, value, 2 if d < 128 else 1, *lengths, dtype=DTYPES[turn % 3], seed=turn)
        q = numbers(1, ratio * k.shape[1], (1, 1, 2, 5)[turn % 4], d, seed=99)
        q = q[:, :, -k.shape[2] :]  # no more queries than keys
        numeric.check(bench.attend(q, args), reference.attend(q.numpy(), k, v), LIMIT, f"k{key_bits}v{value_bits} D={d} {lengths} x{ratio}")


@pytest.mark.parametrize("capability, warps", ((75, (4, 4, 4)), (80, (4, 4, 4)), (90, (4, 2, 4))))
def test_copies_and_none(capability, warps):
    """Blocks of fewer warps where copies of chunks in shared memory are large; without copies where they are too large or the device has none."""
    for i, (bits, d) in enumerate((((3, 4), 80), ((16, 16), 128), ((16, 8), 256))):
        args, k, v = cache(*formats(*bits, d), 1, 20, 3, 40, dtype=DTYPES[2 - i], seed=i)
        q = numbers(1, 3, (2, 1, 3)[i], d, seed=9)
        bench = Bench("cpu")
        bench.kernels.runtime.capability = capability
        _, text = bench.kernels.explain(q, kv_cuda.CudaPages.of(args[0], "cpu"), *args[1:])
        assert f" and {warps[i]} warps, " in text
        for splits in (0, 1):
            numeric.check(bench.attend(q, args, splits=splits), reference.attend(q.numpy(), k, v), LIMIT, f"{capability} {bits} {d}")


OPTIONS = ({}, {"causal": False}, {"window": 1}, {"window": 70}, {"window": 40, "causal": False}, {"softcap": 3.0}, {"softcap": 30.0, "window": 90},
           {"scale": 0.3})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_and_rows(bench, options):
    """Numbers of rows: less than a block, one block of four and of eight, several. All keys on one block, and split."""
    for i, (queries, ratio) in enumerate(((1, 1), (2, 2), (3, 3), (9, 1), (5, 4))):
        d = (64, 80, 128)[i % 3]
        args, k, v = cache(*formats((2, 4, 16)[i % 3], (8, 3, 4)[i % 3], d), 2, 3, 2, 17, batch=2, seed=i, dtype=DTYPES[i % 3])
        q = numbers(2, 2 * ratio, queries, d, seed=50 + i)
        want = reference.attend(q.numpy(), k, v, **options)
        for splits in (0, 1, 2):
            numeric.check(bench.attend(q, args, splits=splits, **options), want, LIMIT, f"{queries} queries, {ratio} heads, {splits} splits")


def test_masks(bench):
    """Left padding of a batch, and a mask of its own for each query, with and without the causal one; a query that sees nothing gives zeros."""
    args, k, v = cache(*formats(4, 2, 64), 2, 3, 2, 30, batch=3)
    q, total = numbers(3, 4, 5, 64, seed=7), k.shape[2]
    padding = torch.arange(total) >= torch.tensor([0, 20, 90])[:, None]
    free = torch.rand(3, 5, total, generator=torch.Generator().manual_seed(1)) < 0.3
    free[1, 2] = False
    wide = torch.zeros(3, 5, 2 * total, dtype=torch.bool)
    wide[..., ::2] = free  # not of unit stride
    for mask, causal in itertools.product((padding, free, wide[..., ::2]), (True, False)):
        got = bench.attend(q, args, mask=mask, causal=causal)
        numeric.check(got, reference.attend(q.numpy(), k, v, causal=causal, mask=mask.numpy()), LIMIT, f"{tuple(mask.shape)} {causal}")
    assert not bench.attend(q, args, mask=free)[1, :, 2].any()


def test_types_and_strides(bench):
    """Any type of queries over any type of sink and tail; views with strides, some of which start at odd places."""
    key, value = formats(4, 4, 80)
    wide = numbers(2, 9, 8, 200, seed=8)
    for i, (q_type, part_type) in enumerate(itertools.product(DTYPES, DTYPES)):
        (table, *_), k, v = cache(key, value, 3, 0, 1, 0, batch=2, seed=i)
        parts = [wide[:, :n, j : j + 3, 3 * j : 3 * j + 80].transpose(1, 2).to(part_type) for j, n in enumerate((5, 5, 9, 9), start=i % 2)]
        parts[0] = torch.cat([parts[0][..., :1], parts[0]], 3)[..., 1:]  # odd strides
        q = wide[:, 3:6, :6, 100:180].transpose(1, 2).to(q_type)
        k, v = (np.concatenate([parts[j].double().numpy(), x, parts[2 + j].double().numpy()], 2) for j, x in enumerate((k, v)))
        limit = LIMIT + (q_type != torch.float32) * numeric.ROUNDING[q_type]
        numeric.check(bench.attend(q, (table, *parts)), reference.attend(q.double().numpy(), k, v), limit, f"{q_type} {part_type}")


@pytest.mark.parametrize("bits", ops.BITS)
def test_numbers_of_any_size(bench, bits):
    """Queries, and keys and values of channels, from 2^-40 to 2^40: each row has powers of two of its own; scores stay small by way of ``scale``."""
    d = 64
    for size in (2.0**-12, 1.0, 2.0**12):
        args, k, v = cache(*formats(bits, bits, d), 1, 5, 1, 6, change=lambda x, size=size: x * size, seed=bits)
        for big in (2.0**-40, 1.0, 2.0**40):
            q = numbers(1, 3, 1, d, seed=4) * big * torch.tensor([1.0, 2.0**-20, 2.0**-3])[:, None, None]
            got = bench.attend(q, args, scale=1 / (big * size * 64))
            want = reference.attend(q.numpy(), k, v, scale=1 / (big * size * 64))
            for row in range(3):
                numeric.check(got[0, row], want[0, row], LIMIT, f"{size} {big} {row}")


def test_not_finite_numbers_show_and_hidden_ones_do_not(bench):
    for bits, bad in itertools.product((3, 16), (float("nan"), float("inf"))):
        for part, fmt in ((1, None), (0, formats(bits, bits, 64))):
            def spoil(x, bad=bad):
                x[0, 0, 9, 3] = bad
                return x

            args, k, v = cache(*formats(bits, bits, 64), 2, 4, 1, 4, change=spoil if fmt else lambda x: x)
            if part:
                args[part][0, 0, 1, 5] = bad
            got = bench.attend(numbers(1, 4, 1, 64, seed=2), args)
            assert not got[0, :2].isfinite().all(-1).any() and got[0, 2:].isfinite().all(), (bits, bad, part)
    # A token of values that is not finite has such a scale; where it is hidden, nothing of it is seen.
    (table, *parts), k, v = cache(*formats(4, 4, 64), 1, 0, 1, 4)
    table[0][3][:, :, :, 9] = float("nan")
    mask = torch.ones(1, 68, dtype=torch.bool)
    mask[0, 9] = False
    q = numbers(1, 2, 1, 64, seed=2)
    numeric.check(bench.attend(q, (table, *parts), mask=mask), reference.attend(q.numpy(), k, v, mask=mask.numpy()), LIMIT, "hidden")


def test_empty_results(bench):
    args, *_ = cache(*formats(4, 4, 64), 1, 0, 1, 3)
    q = numbers(1, 2, 1, 64)
    assert bench.attend(q[:, :, :0], args).shape == (1, 2, 0, 64)
    assert not bench.attend(q, args, mask=torch.zeros(1, 67, dtype=torch.bool)).any()


# ------------------------------------------------------------------------------------------------------ the same bits, always


def test_schedules_and_splits_give_the_same_bits(bench):
    args, k, v = cache(*formats(3, 4, 80, 32, 32), 1, 70, 5, 20)
    q = numbers(1, 5, 2, 80)
    for splits in (1, 3):
        first = bench.attend(q, args, splits=splits)
        schedules = [Bench("cpu", seed=s, lazy=lazy, workers=w) for s, lazy, w in ((2, True, 1), (3, False, 2), (7, False, 2))]
        for other in [bench] * 2 if bench.device.type == "cuda" else schedules:
            assert torch.equal(other.attend(q, args, splits=splits), first)


def test_pages_move_as_they_are(bench):
    """Tables grow, copies and pickles point at their own pages, and a copy on the device gives what its source does."""
    key, value = formats(2, 4, 64)
    args, k, v = cache(key, value, 1, 0, 66, 0, seed=5)
    q = numbers(1, 2, 1, 64)
    got = bench.attend(q, args)
    numeric.check(got, reference.attend(q.numpy(), k, v), LIMIT, "66 pages")
    moved = copy.deepcopy(kv_cuda.CudaPages.of(args[0], bench.device))
    assert isinstance(moved, kv_cuda.CudaPages) == (bench.device.type == "cuda")
    assert moved.device == moved[0][0].device and moved[0][0].data_ptr() != args[0][0][0].data_ptr()
    assert torch.equal(bench.kernels.attend(bench.move(q), moved, stream=0).cpu(), got) and moved.nbytes() == args[0].nbytes()


@pytest.mark.parametrize("window, queries, masked", ((0, 1, False), (100, 3, False), (0, 2, True)))
def test_one_call_serves_every_length(bench, window, queries, masked):
    """The same struct, as a captured graph has it: pages and tokens come, and it is told by two numbers in the memory of the device."""
    key, value = formats(4, 3, 64)
    (table, *parts), k, v = cache(key, value, 2, 3, 11, 70)
    sink_k, sink_v, tail_k, tail_v = map(bench.move, parts)
    q, pages, counts = bench.move(numbers(1, 4, queries, 64, seed=3)), kv_cuda.CudaPages(key, value, 2, bench.device), torch.zeros(2, dtype=torch.int32)
    pages.reserve(12)
    assert pages.room == 12
    there, most = bench.move(counts), 3 + 64 * 12 + 70
    seen = torch.rand(1, most, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    options = {"window": window, "counts": there, "splits": 3}
    call, out, keep = bench.kernels.call(q, pages, sink_k, sink_v, tail_k, tail_v, mask=None if seen is None else bench.move(seen), **options)
    library, address = bench.kernels.runtime.library, ctypes.addressof(call)
    workspace = torch.empty(library.kv_workspace_nbytes(address), dtype=torch.uint8, device=bench.device)
    call.workspace = workspace.data_ptr()
    for held, tail in ((0, 1), (0, 70), (1, 6), (2, 1), (9, 63), (11, 0), (11, 70)):
        for i in range(len(pages), held):
            pages.append(*map(bench.move, table[i]))
        pages.note()
        assert pages.pointers == call.pages and pages.room == 12, "the table has not moved"
        there.copy_(torch.tensor([held, tail]))
        assert library.kv_attend(address) == 0
        end = 3 + 64 * held
        whole = [np.concatenate([x[:, :, :end], x[:, :, 3 + 64 * 11 :][:, :, :tail]], 2) for x in (k, v)]
        mask = None if seen is None else seen[:, : end + tail]
        want = reference.attend(q.cpu().numpy(), *whole, window=window, mask=None if mask is None else mask.numpy())
        numeric.check(out.cpu(), want, LIMIT, f"{held} pages, {tail} tokens")
        cut = [None if tail == 0 else t[:, :, :tail] for t in (tail_k, tail_v)]
        alone = bench.kernels.attend(q, pages, sink_k, sink_v, *cut, window=window, mask=None if mask is None else bench.move(mask), splits=3,
                                     stream=0)
        if held > 8 and not window:  # there, too, three blocks share the chunks
            assert torch.equal(alone, out)
    pages.append(*map(bench.move, table[0]))
    with pytest.raises(ShapeError, match="page 12 of a KV cache of 2 heads: room for 12 pages was reserved, .*; reserve more, and capture again"):
        pages.append(*map(bench.move, table[0]))
    pages.reserve(24)
    pages.append(*map(bench.move, table[0]))
    pages.note()
    assert pages.pointers != call.pages
    text = bench.kernels.explain(q, pages, sink_k, sink_v, tail_k, tail_v, **options | {"mask": None})[1]
    most += 64 * 12
    assert text.startswith(f"{most} keys, ") and text.endswith(f"; {(2 if window else 24) * 2 * 4096} bytes of pages")
    del keep


def test_counts_over_two_sequences(bench):
    """As callers ask for it, without a number of splits: what the configuration has for the most keys that there may be."""
    key, value = formats(4, 3, 64)
    for pages, tail, room in ((2, 5, 9), (0, 12, 3), (3, 0, 40)):
        (table, *parts), k, v = cache(key, value, 2, 3, pages, 12, batch=2, seed=tail)
        there = kv_cuda.CudaPages.of(table, bench.device)
        there.reserve(room)
        for x in parts[2:]:
            x[:, :, tail:] = float("nan")
        k, v = (x[:, :, : 3 + 64 * pages + tail] for x in (k, v))
        q, counts = numbers(2, 4, 2, 64, seed=room), bench.move(torch.tensor([pages, tail], dtype=torch.int32))
        for call in (functools.partial(bench.kernels.attend, stream=0), kv_cuda.attend)[: 1 + (bench.device.type == "cuda")]:
            got = call(bench.move(q), there, *map(bench.move, parts), counts=counts)
            numeric.check(got.cpu(), reference.attend(q.numpy(), k, v), LIMIT, f"{pages} pages of {room}, {tail} tokens")


def test_counts_that_are_refused(bench):
    (table, *parts), *_ = cache(*formats(4, 4, 64), 2, 0, 1, 3)
    q, parts, pages = bench.move(numbers(1, 2, 1, 64)), [*map(bench.move, parts)], kv_cuda.CudaPages.of(table, bench.device)
    counts = torch.zeros(2, dtype=torch.int32, device=bench.device)
    attend = functools.partial(bench.kernels.attend, q, pages, stream=0)
    with pytest.raises(ShapeError, match="with counts over a table that grows: .*; call reserve"):
        attend(*parts, counts=counts)
    pages.reserve(2)
    gaps = torch.zeros(4, dtype=torch.int32, device=bench.device)[::2]
    for bad, said in ((counts.long(), r"int64 \(2,\)"), (counts[:1], r"int32 \(1,\)"), ((1, 3), r"\(1, 3\)"), (gaps, r"int32 \(2,\)")):
        with pytest.raises(ShapeError, match=rf"attention with counts {said}.*: they must be a contiguous int32 tensor \(2,\) on .*; write"):
            attend(*parts, counts=bad)
    with pytest.raises(ShapeError, match="attention with counts and no tail: .*; pass tail_k and tail_v in full"):
        attend(*parts[:2], counts=counts)
    with pytest.raises(ShapeError, match=r"the mask must be bool \[1, 131\]"):
        attend(*parts, counts=counts, mask=counts[:1].bool()[None])


def test_a_stream_has_to_be_given(bench):
    (table, *parts), *_ = cache(*formats(4, 4, 64), 1, 0, 1, 3)
    with pytest.raises(TypeError, match="'stream'"):
        bench.kernels.attend(numbers(1, 2, 1, 64), table, *parts)
    with pytest.raises(TypeError, match="'stream'"):
        bench.kernels.pack_page(numbers(1, 1, 64, 64), table.key, *table[0][:2])


# --------------------------------------------------------------------------------------------------- dispatch and refusals


def explain(capability=80, sms=108, bandwidth=0.0, pages=2, queries=1, ratio=4, d=128, bits=(4, 2), heads=8, tail=64, **options):
    kernels = kv_cuda.Kernels(cuda.Runtime(cuda_tools.Functions(cuda_tools.library()), capability, sms), bandwidth)
    table = kv_cuda.CudaPages(*formats(*bits, d), heads, "cpu")
    page = [t for fmt in (table.key, table.value) for t in fmt.empty_page(heads)]
    for _ in range(pages):
        table.append(*page)
    t = torch.empty(1, heads, tail, d, dtype=torch.float16)
    return kernels.explain(torch.empty(1, heads * ratio, queries, d, dtype=torch.float16), table, None, None, t, t, **options)


def test_configuration_in_words():
    name, text = explain(pages=64, bandwidth=1.8e12)
    assert name == "attend_k4v2_d128__sm80"
    assert text == ("4160 keys, 4 rows of queries (4 heads) on each of 8 key/value heads: 8 x 1 x 17 blocks of 4 rows and 4 warps, 4 chunks each; "
                    "3670016 bytes of pages, at least 2.04 us at 1800 GB/s")
    name, text = explain(75, 40, queries=3, d=256, window=64)
    assert name == "attend_k4v2_d256__sm75"
    assert text == ("192 keys, 12 rows of queries (4 heads) on each of 8 key/value heads: 8 x 2 x 2 blocks of 8 rows and 4 warps, 3 chunks each; "
                    "114688 bytes of pages")


def test_pages_counted_are_those_that_are_read():
    for window, pages in ((0, 10), (64, 0), (65, 1), (300, 4)):
        _, text = explain(pages=10, window=window)
        assert f"{pages * 8 * (4608 + 2560)} bytes of pages" in text


@pytest.mark.parametrize("capability, sms", ((75, 40), (80, 108), (89, 128), (90, 132), (0, 0)))
def test_splits_fill_the_device_and_do_not_exceed_the_keys(capability, sms):
    for pages, queries, heads in itertools.product((0, 1, 7, 100, 1000), (1, 9), (1, 8)):
        _, text = explain(capability, sms, pages=pages, queries=queries, heads=heads, d=64)
        pairs, blocks, splits = map(int, text.split(": ")[1].split(" blocks")[0].split(" x "))
        assert (pairs, blocks) == (heads, 1 if queries == 1 else 5) and 1 <= splits <= max(1, -(-(pages + 4) // 4)) and splits <= 128
        if pages == 1000 and heads == 8:
            assert 2 * pairs * blocks * splits >= 3 * (sms or 108)
    assert explain(0, 0, pages=50) == explain(86, 108, pages=50)  # the SMs of an A100, and no more shared memory than all but the oldest have


def test_refusals():
    assert explain(70, 80) == ("", "there are kernels for compute capability 7.5 and later, this device has 7.0")
    q, (table, *parts), *_ = numbers(1, 2, 1, 64), *cache(*formats(4, 4, 64), 1, 0, 1, 3)
    pages = kv_cuda.CudaPages.of(table, "cpu")
    old = kv_cuda.Kernels(cuda.Runtime(cuda_tools.Functions(cuda_tools.library()), 70, 80))
    with pytest.raises(NativeError, match=r"attention of q \(1, 2, 1, 64\) over 1 pages.*this device has 7.0"):
        old.attend(q, pages, *parts, stream=0)
    with pytest.raises(ShapeError, match="q must be float32, bfloat16 or float16 on the CPU"):
        old.attend(q.to("meta"), pages, *parts, stream=0)
    with pytest.raises(ShapeError, match="codes must be a contiguous uint8 tensor of .* on meta"):
        kv_cuda.CudaPages(*formats(4, 4, 64), 1, "meta").append(*table[0])
    with pytest.raises(ShapeError, match="multiples of 16 bytes, tensor 0 does not"):
        shifted = torch.empty(table[0][0].numel() + 1, dtype=torch.uint8)[1:].view_as(table[0][0])
        kv_cuda.CudaPages(*formats(4, 4, 64), 1, "cpu").append(shifted, *table[0][1:])
    with pytest.raises(ShapeError, match="the shape must be"):
        old.pack_page(numbers(1, 1, 63, 64), table.key, *table[0][:2], stream=0)

    turned = PageTable(*formats(4, 4, 64), 1, rope=RopeTables(Rope((1.0, 0.5)), 0))
    with pytest.raises(FormatError, match="keys before the rotary embedding on a GPU"):
        kv_cuda.CudaPages.of(turned, "cpu")
    with pytest.raises(FormatError, match="pages in two widths on a GPU"):
        kv_cuda.CudaPages.of(PageTable(*formats(4, 4, 64), 1, mix=PageMix(*formats(2, 2, 64), 1, 2)), "cpu")
    codebook = PageFormat("keys", 2, 64, 64, (-1.0, 0.0, 0.5, 1.0))
    with pytest.raises(FormatError, match="2-bit keys with a codebook on a GPU"):
        kv_cuda.CudaPages(codebook, formats(2, 2, 64)[1], 1, "cpu")
    with pytest.raises(FormatError, match="2-bit keys with a codebook on a GPU"):
        old.pack_page(numbers(1, 1, 64, 64), codebook, *codebook.empty_page(1), stream=0)


@pytest.mark.skipif(isinstance(_native.cuda, _native.Missing), reason="mxq_ext._cuda is not built")
def test_the_built_module():
    """Its host code is the code that the tests above ran."""
    args, *_ = cache(*formats(4, 2, 64), 2, 0, 9, 3)
    q, table = numbers(1, 4, 1, 64), kv_cuda.CudaPages.of(args[0], "cpu")
    functions = cuda_tools.Functions(cuda_tools.library()), _native.cuda
    mine, built = (kv_cuda.Kernels(cuda.Runtime(f, 80, 108), 2e12).explain(q, table, *args[1:]) for f in functions)
    assert built == mine and mine[0]


def test_a_module_of_another_version_is_refused():
    """One without these kernels, and one whose calls had a number of keys where counts are now."""
    functions = cuda_tools.Functions(cuda_tools.library())
    for library, structs in ((object(), "AttendCall, PageDesc, Rows"),
                             (SimpleNamespace(layouts=lambda: functions.layouts().replace(" counts=", " total=")), "AttendCall")):
        with pytest.raises(NativeError, match=f"is of another version of this package, it has other fields in {structs}; build it again"):
            kv_cuda.Kernels(cuda.Runtime(library))


def test_the_current_stream_and_device_are_used(monkeypatch):
    (table, *parts), k, v = cache(*formats(4, 3, 64), 1, 0, 5, 3)
    q, pages, x = numbers(1, 2, 1, 64), kv_cuda.CudaPages.of(table, "cpu"), numbers(1, 1, 64, 64)
    functions, seen, entered = cuda_tools.Functions(cuda_tools.library()), [], []
    attend, pack = functions.kv_attend, functions.kv_pack
    functions.kv_attend = lambda address: seen.append(kv_cuda.AttendCall.from_address(address).stream) or attend(address)
    functions.kv_pack = lambda *args: seen.append(args[-1]) or pack(*args[:-1], 0)

    @contextlib.contextmanager
    def device(d):
        entered.append(d)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4711))
    monkeypatch.setattr(cuda, "runtime", lambda d: cuda.Runtime(functions))
    numeric.check(kv_cuda.attend(q, pages, *parts, softcap=9.0), reference.attend(q.numpy(), k, v, softcap=9.0), LIMIT, "on a stream")
    page = table.key.empty_page(1)
    kv_cuda.pack_page(x, table.key, *page)
    want = table.key.empty_page(1)
    ops.pack_page_ref(x, table.key, *want)
    assert torch.equal(page[0], want[0]) and seen == [4711, 4711] and entered == [q.device, x.device]


def test_failed_launches_are_errors_with_the_reason():
    functions = cuda_tools.Functions(cuda_tools.library())
    functions.kv_attend = functions.kv_pack = lambda *a: 98
    kernels = kv_cuda.Kernels(cuda.Runtime(functions))
    (table, *parts), *_ = cache(*formats(4, 4, 64), 1, 0, 1, 3)
    with pytest.raises(NativeError, match="attention of q .* the launch failed: code 98"):
        kernels.attend(numbers(1, 2, 1, 64), kv_cuda.CudaPages.of(table, "cpu"), *parts, stream=0)
    with pytest.raises(NativeError, match="packing a page of keys .* the launch failed: code 98"):
        kernels.pack_page(numbers(1, 1, 64, 64), table.key, *table[0][:2], stream=0)


# --------------------------------------------------------------------------- sanitizers, and the instructions that nvcc emits


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def flat(bits, d, q_heads, kv_heads, queries, sink, pages, tail, *, dtype=torch.float16, splits=1, window=0, softcap=0.0, masked=False, counted=False):
    """(arguments of flat_attend, the arrays among them, the result's array, float64 attention)"""
    key, value = formats(*bits, d, 32 if d == 80 else 64)
    args, k, v = cache(key, value, kv_heads, sink, pages, tail, dtype=dtype)
    counts = np.array([pages, tail], np.int32) if counted else None
    if counted:  # room for 3 tokens and 2 pages more, whose addresses nobody may read
        args = (*args[:3], *(torch.cat([t, torch.full_like(t[:, :, :1], float("nan")).expand(-1, -1, 3, -1)], 2) for t in args[3:]))
    q = numbers(1, q_heads, queries, d, seed=9).to(dtype)
    mask = torch.rand(1, queries, k.shape[2], generator=torch.Generator().manual_seed(2)) < 0.8 if masked else None
    want = reference.attend(q.double().numpy(), k, v, scale=0.125, window=window, softcap=softcap, mask=None if mask is None else mask.numpy())

    raw = cuda_tools.raw
    parts = [raw(torch.stack([args[0][i][j] for i in range(pages)])) for j in range(4)]
    out, workspace, table = raw(torch.full_like(q, float("nan"))), np.full(1 << 15, 255, np.uint8), np.zeros(4 * (pages + 2), np.int64)
    arrays = [raw(q), out, *(raw(t) for t in args[1:]), *parts, table, None if mask is None else raw(mask), counts, workspace]
    sizes = (TYPES[dtype], d, key.bits, key.group, value.bits, value.group, q_heads, kv_heads, queries, sink, pages + 2 * counted, tail + 3 * counted, window,
             ctypes.c_float(softcap), splits)
    return ("flat_attend", *arrays, workspace.size, *sizes), [a for a in arrays if a is not None], out, want


def result(out, want, dtype):
    got = torch.from_numpy(out).view(dtype).reshape(want.shape)
    limit = LIMIT + (dtype != torch.float32) * numeric.ROUNDING[dtype]
    numeric.check(got, want, limit, str(dtype))


#: Small, and together through every decoder and type.
SMALL = (dict(bits=(3, 2), d=80, q_heads=5, kv_heads=1, queries=1, sink=1, pages=1, tail=5, dtype=torch.float32, splits=2, softcap=20.0),
         dict(bits=(16, 4), d=64, q_heads=2, kv_heads=1, queries=2, sink=0, pages=1, tail=3, dtype=torch.bfloat16, window=60, masked=True),
         dict(bits=(8, 16), d=64, q_heads=2, kv_heads=2, queries=1, sink=3, pages=1, tail=0),
         dict(bits=(2, 8), d=48, q_heads=1, kv_heads=1, queries=2, sink=0, pages=2, tail=0),
         dict(bits=(4, 4), d=64, q_heads=2, kv_heads=1, queries=1, sink=2, pages=1, tail=6, splits=3, window=50, counted=True),
         dict(bits=(4, 3), d=64, q_heads=4, kv_heads=1, queries=2, sink=0, pages=1, tail=1))


@pytest.mark.parametrize("mode", ("asan", "tsan"))
def test_sanitizers(mode):
    if reason := simt.missing_tool("g++"):
        pytest.skip(reason)
    library = simt.Library(SOURCES, mode)
    for case in SMALL:
        for options in ({}, {"seed": 5, "workers": 2}):
            call, _, out, want = flat(**case)
            library.configure(**options).call(*call)
            result(out, want, case.get("dtype", torch.float16))
    for bits, side in itertools.product(ops.BITS, ops.SIDES):
        fmt, x = PageFormat(side, bits, 32, 48), numbers(1, 2, 64, 48)
        want = fmt.empty_page(2)
        ops.pack_page_ref(x, fmt, *want)
        codes, params = np.full(want[0].shape, 255, np.uint8), np.full((*want[1].shape, 2), 255, np.uint8)
        library.configure().call("flat_pack", x.numpy(), codes, params if params.size else np.zeros(2, np.uint8), 0, ops.SIDES.index(side), bits, 32, 48, 2)
        assert np.array_equal(codes, want[0].numpy()) and params.tobytes() == want[1].numpy().tobytes(), fmt


@functools.cache
def ptx(source, arch):
    return ptxsim.Module(ptxsim.compile_ptx(FOLDER / f"{source}.cu", arch))


def interpret(source, arch, call, arrays, kernels):
    launches = simt.Library(SOURCES).record(*call)
    assert [next(k for k in kernels if k in launch.kernel) for launch in launches] == list(kernels)
    for launch in launches:
        ptx(source, arch).launch(launch.kernel, launch.grid, launch.block, launch.args, launch.shared, arrays)


@pytest.mark.no_cover
@pytest.mark.parametrize("case, arch", (*((i, "sm_80") for i in range(len(SMALL))), pytest.param(len(SMALL) - 1, "sm_75", marks=pytest.mark.slow)))
def test_instructions(case, arch):
    """The PTX of both kernels of attention and of the merge; sm_75 has products of half the depth."""
    if reason := simt.missing_tool("nvcc"):
        pytest.skip(reason)
    call, arrays, out, want = flat(**SMALL[case])
    kernels = ("attend_eight" if SMALL[case]["q_heads"] // SMALL[case]["kv_heads"] * SMALL[case]["queries"] > 4 else "attend_four",)
    interpret("attention", arch, call, arrays, kernels + ("attend_merge",) * (SMALL[case].get("splits", 1) > 1))
    result(out, want, SMALL[case].get("dtype", torch.float16))


@pytest.mark.no_cover
@pytest.mark.parametrize("side, bits", (("keys", 3), ("values", 4), ("values", 16)))
def test_instructions_of_packing(side, bits):
    if reason := simt.missing_tool("nvcc"):
        pytest.skip(reason)
    fmt, x = PageFormat(side, bits, 32, 48), numbers(1, 1, 64, 48)
    want = fmt.empty_page(1)
    ops.pack_page_ref(x, fmt, *want)
    codes, params, source = np.full(want[0].shape, 255, np.uint8), np.full(max(2, 2 * want[1].numel()), 255, np.uint8), x.numpy()
    interpret("kv_pack", "sm_80", ("flat_pack", source, codes, params, 0, ops.SIDES.index(side), bits, 32, 48, 1), [source, codes, params], ("kv_pack",))
    assert np.array_equal(codes, want[0].numpy()) and (bits == 16 or params.tobytes() == want[1].numpy().tobytes())

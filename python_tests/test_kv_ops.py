"""The KV cache ops: every pair of bits, head dimension and CPU target against the plain loops, those against numpy, pages bit for bit."""

import copy
import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import poison_memory

from mxq_ext import _native
from mxq_ext.errors import FormatError, ShapeError
from mxq_ext.kv import ops, reference
from mxq_ext.kv.ops import PageFormat, PageTable
from mxq_ext.testing import numeric

PAIRS = list(itertools.product(ops.BITS, ops.BITS))
HEADS = (64, 80, 96, 128, 256)
#: Tokens of the sink, pages, tokens of the tail.
LENGTHS = ((0, 0, 5), (0, 1, 0), (3, 2, 17), (0, 1, 71), (70, 1, 1), (1, 3, 16), (0, 9, 33))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Keys and values have float zeros.
LIMIT = numeric.bound("w4g64_fz", torch.float32)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch, ops)


def numbers(*shape, seed=0) -> torch.Tensor:
    """Like keys: channels of very different size and offset."""
    g = torch.Generator().manual_seed(seed)
    channel = torch.randn(shape[-1], generator=g)
    return torch.randn(shape, generator=g) * (0.2 + channel.abs()) + channel


def heavy(*shape, seed=0) -> torch.Tensor:
    """The same with heavy tails: one number in a hundred is far from the others of its channel."""
    g = torch.Generator().manual_seed(seed)
    far = torch.rand(shape, generator=g) < 0.01
    return numbers(*shape, seed=seed) + 20 * far * torch.randn(shape, generator=g)


def packed(x, fmt, pack=None):
    page = fmt.empty_page(x.shape[0] * x.shape[1])
    (pack or ops.pack_page)(x, fmt, *page)
    return page


def cache(key, value, batch, heads, sink, pages, tail, seed=0, dtype=torch.float32):
    """(table, sink_k, sink_v, tail_k, tail_v) and the same keys and values dequantized, [B, Hkv, total, D] float32."""
    d = key.head_dim
    table, k, v = PageTable(key, value, batch * heads), [], []
    sink_k, sink_v, tail_k, tail_v = (numbers(batch, heads, n, d, seed=seed + i).to(dtype) for i, n in enumerate((sink, sink, tail, tail)))
    for p in range(pages):
        k.append(packed(numbers(batch, heads, 64, d, seed=seed + 10 + 2 * p), key))
        v.append(packed(numbers(batch, heads, 64, d, seed=seed + 11 + 2 * p), value))
        table.append(*k[-1], *v[-1])
    whole_k = torch.cat([sink_k.float(), *(ops.unpack_page_ref(*p, key, batch) for p in k), tail_k.float()], 2)
    whole_v = torch.cat([sink_v.float(), *(ops.unpack_page_ref(*p, value, batch) for p in v), tail_v.float()], 2)
    return (table, sink_k, sink_v, tail_k, tail_v), whole_k, whole_v


def formats(key_bits, value_bits, d, key_group=64, value_group=64):
    return PageFormat("keys", key_bits, key_group, d), PageFormat("values", value_bits, value_group, d)


# ------------------------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("bits", ops.BITS)
def test_pages_are_what_the_document_says(bits):
    """The twin against a plain reading of the drawings; the numbers round once."""
    for (side, groups), d in itertools.product((("keys", ops.KEY_GROUPS), ("values", ops.VALUE_GROUPS)), (16, 80, 128)):
        for group in groups:
            fmt = PageFormat(side, bits, group, d)
            x = numbers(1, 2, 64, d, seed=d)
            codes, params = packed(x, fmt, ops.pack_page_ref)
            values = ops.unpack_page_ref(codes, params, fmt)
            for h in range(2):
                want_codes, want_params = reference.pack(x[0, h].numpy(), fmt)
                assert codes[h].numpy().tobytes() == want_codes and params[h].numpy().tobytes() == want_params.tobytes(), fmt
                assert np.array_equal(values[0, h].numpy(), reference.unpack(want_codes, want_params, fmt).astype(np.float32)), fmt


def peculiar(d) -> torch.Tensor:
    """Pages with everything that rounding can meet: constants, zeros of both signs, tiny, huge, infinite and NaN numbers."""
    x = numbers(1, 8, 64, d, seed=3)
    x[0, 1] = 0.1
    x[0, 2] = torch.where(x[0, 2] > 0, 0.0, -0.0)
    x[0, 3] *= 1e-7
    x[0, 4] *= 1e6
    x[0, 5, 7, 3], x[0, 5, 40, 9] = float("inf"), -float("inf")
    x[0, 6, 33, 5] = float("nan")
    x[0, 6, 34, 6] = -float("nan")
    x[0, 7] = torch.where(x[0, 7] > 0, 3e38, -3e38)
    return x


def check_document(x, fmt):
    """The twin's pages of x [1, H, 64, D], and what it reads of them, are those of reference.py to the bit."""
    codes, params = packed(x, fmt, ops.pack_page_ref)
    values = ops.unpack_page_ref(codes, params, fmt)
    for h in range(x.shape[1]):
        want_codes, want_params = reference.pack(x[0, h].numpy(), fmt)
        assert codes[h].numpy().tobytes() == want_codes and params[h].numpy().tobytes() == want_params.tobytes(), (fmt, h)
        want = reference.unpack(want_codes, want_params, fmt).astype(np.float32)
        assert np.array_equal(values[0, h].numpy(), want, equal_nan=True), (fmt, h)


def check_packing(bits, heads, levels=None, outliers=0):
    """Pages of every side and group, of heads of these dimensions: the fast kernels write and read the same bits as the twin."""
    for d, (side, groups) in itertools.product(heads, (("keys", ops.KEY_GROUPS), ("values", ops.VALUE_GROUPS))):
        for i, group in enumerate(groups):
            fmt = PageFormat(side, bits, group, d, levels, outliers)
            x = (peculiar(d) if i else numbers(2, 4, 64, d, seed=d)).to(DTYPES[(i + d // 16) % 3])
            codes, params = packed(x, fmt)
            want_codes, want_params = packed(x, fmt, ops.pack_page_ref)
            assert torch.equal(codes, want_codes) and torch.equal(params.view(torch.int16), want_params.view(torch.int16)), (fmt, x.dtype)
            for dtype in DTYPES:
                got, want = ops.unpack_page(codes, params, fmt, 1, dtype), ops.unpack_page_ref(codes, params, fmt, 1, dtype)
                assert got.dtype == dtype and torch.equal(got.nan_to_num(5, 6, 7), want.nan_to_num(5, 6, 7)), (fmt, dtype)


@pytest.mark.parametrize("bits", ops.BITS)
def test_packing_is_the_same_to_the_bit(bits, target):
    check_packing(bits, (16, 48, 64, 80, 96, 128, 256))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_pages_with_outliers_are_what_the_document_says(bits):
    for (side, groups), (d, outliers) in itertools.product((("keys", ops.KEY_GROUPS), ("values", (0, 64))), ((16, 16), (16, 128), (80, 48))):
        for group in groups:
            fmt, x = PageFormat(side, bits, group, d, None, outliers), torch.cat([peculiar(d), heavy(1, 2, 64, d)], 1)
            check_document(x, fmt)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_packing_outliers_is_the_same_to_the_bit(bits, target):
    check_packing(bits, (16, 80, 128), outliers=32)
    check_packing(bits, (64,), outliers=512)  # an eighth of all: some groups have nothing left


def test_outliers_are_the_furthest_numbers_and_leave_the_scales_alone():
    x = numbers(1, 1, 64, 64)
    far = {(3, 7): 60.0, (50, 7): -45.0, (20, 31): 80.0}
    for (t, d), v in far.items():
        x[0, 0, t, d] = v
    for side, bits in itertools.product(ops.SIDES, (2, 4)):
        fmt, plain = PageFormat(side, bits, 64 if side == "keys" else 0, 64, None, 16), PageFormat(side, bits, 64 if side == "keys" else 0, 64)
        page, y = packed(x, fmt), packed(x, plain)
        index, delta = ops.outliers_of(page[0], fmt)
        assert index.shape == delta.shape == (1, 16) and torch.equal(index, index.sort(1).values) and {64 * t + d for t, d in far} <= set(index[0].tolist())
        read = ops.unpack_page(*page, fmt)
        for t, d in ((i // 64, i % 64) for i in index[0].tolist()):
            assert abs(read[0, 0, t, d] - x[0, 0, t, d]) <= abs(x[0, 0, t, d]) * 2**-10
        step, wide = page[1][0, 0, 0].max(), y[1][0, 0, 0].max()
        assert step < wide / 3 and (read - x).square().mean() < (ops.unpack_page(*y, plain) - x).square().mean() / 2
        calm = torch.full((1, 1, 64, 64), 1.5)
        index, delta = ops.outliers_of(packed(calm, fmt)[0], fmt)
        assert not index.any() and not delta.any() and torch.equal(ops.unpack_page(*packed(calm, fmt), fmt), calm)


def test_outliers_make_heavy_tails_harmless():
    x = heavy(1, 4, 64, 128)
    for side, bits in itertools.product(ops.SIDES, (2, 3, 4, 8)):
        error = [float((ops.unpack_page(*packed(x, fmt), fmt) - x).square().mean())
                 for fmt in (PageFormat(side, bits, 64, 128, None, outliers) for outliers in (0, 80, 160))]
        assert error[2] < error[1] < error[0] / 4, (side, bits, error)


def test_error_of_a_page_is_half_a_step():
    for bits, side in itertools.product((2, 3, 4, 8), ops.SIDES):
        fmt = PageFormat(side, bits, 32, 64)
        x = numbers(1, 3, 64, 64)
        y = ops.unpack_page(*packed(x, fmt), fmt, 1)
        groups = x.reshape(1, 3, 2, 32, 64) if side == "keys" else x.reshape(1, 3, 64, 2, 32)
        axis = 3 if side == "keys" else 4
        step = ((groups.amax(axis, keepdim=True) - groups.amin(axis, keepdim=True)) / (2**bits - 1)).expand_as(groups).reshape(x.shape)
        slack = x.abs() * 2**-10 + step * 2**bits * 2**-11  # z and s are fp16
        assert ((x - y).abs() <= step / 2 + slack).all()


def test_numbers_that_are_not_finite_stay_visible_and_others_do_not_become_so():
    x = peculiar(64)
    for bits, side in itertools.product(ops.BITS, ops.SIDES):
        fmt = PageFormat(side, bits, 32, 64)
        y = ops.unpack_page(*packed(x, fmt), fmt, 1)
        assert y[0, [0, 1, 2, 3, 4, 7]].isfinite().all()
        assert not y[0, 5, 7, 3].isfinite() and not y[0, 5, 40, 9].isfinite() and y[0, 6, 33, 5].isnan() and y[0, 6, 34, 6].isnan()
    constant = ops.unpack_page(*packed(x, formats(2, 2, 64)[0]), formats(2, 2, 64)[0], 1)[0, 1]
    assert torch.equal(constant, torch.full_like(constant, 0.1).half().float())


def test_any_strides_are_packed_like_copies():
    for side in ops.SIDES:
        fmt = PageFormat(side, 3, 32, 80)
        wide = numbers(2, 64, 3, 160)
        for x in (wide[..., 80:].transpose(1, 2), wide[..., ::2].transpose(1, 2), numbers(1, 3, 64, 80).expand(2, 3, 64, 80)):
            for a, b in zip(packed(x, fmt), packed(x.clone(memory_format=torch.contiguous_format), fmt), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_sizes_are_those_of_the_header():
    for side, bits, d in itertools.product(ops.SIDES, ops.BITS, range(16, 513, 16)):
        for group in ops.KEY_GROUPS if side == "keys" else ops.VALUE_GROUPS:
            fmt = PageFormat(side, bits, group, d)
            assert (fmt.code_bytes, np.prod(fmt.params_shape)) == _native.cpu.kv_page(fmt.native)
            codes, params = fmt.empty_page(3)
            assert codes.nbytes + params.nbytes == 3 * fmt.page_bytes
            if bits < 16:
                sparse = PageFormat(side, bits, group, d, None, 16)
                assert sparse.page_bytes == fmt.page_bytes + 64 and (sparse.code_bytes, np.prod(sparse.params_shape)) == _native.cpu.kv_page(sparse.native)
    assert PageFormat("keys", 2, 64, 128).page_bytes == PageFormat("values", 2, 64, 128).page_bytes == 2560
    assert [ops.value_group(d, g) for d, g in ((128, 64), (128, 128), (80, 64), (96, 32), (64, 128), (256, 128))] == [64, 0, 0, 32, 0, 128]


# ---------------------------------------------------------------------------------------------------------------- attention


@functools.cache
def pair_cases(key_bits, value_bits):
    """For one pair of bits: arguments and the twin's results, over all head dimensions and ratios of heads, lengths in turn."""
    out = []
    for i, (d, ratio) in enumerate(itertools.product(HEADS, (1, 3, 4))):
        for j in (0, 3) if d < 128 else (0,):
            sink, pages, tail = LENGTHS[(i + j + key_bits + value_bits) % len(LENGTHS)]
            key, value = formats(key_bits, value_bits, d, (64, 32)[i % 2], (0, 32, 64, 128)[(i + j) % 4])
            heads = 1 if d == 256 else 2
            args, *_ = cache(key, value, 1, heads, sink, pages, tail, seed=i)
            q = numbers(1, heads * ratio, (1, 1, 2, 1, 5)[(i + j) % 5], d, seed=99)
            out.append((q, args, ops.attend_ref(q, *args)))
    return out


@pytest.mark.parametrize("key_bits, value_bits", PAIRS)
def test_every_pair_of_bits_against_the_twin(key_bits, value_bits, target):
    got, want = [], []
    for q, args, exact in pair_cases(key_bits, value_bits):
        got.append(ops.attend(q, *args).flatten())
        want.append(exact.flatten())
        assert numeric.error(got[-1], want[-1]) < 10 * LIMIT, (q.shape, args[0].key, args[0].value, len(args[0]))
    numeric.check(torch.cat(got), torch.cat(want), LIMIT, f"{key_bits}/{value_bits} {target}")


@pytest.mark.parametrize("key_bits, value_bits", PAIRS)
def test_the_twin_is_attention_over_the_dequantized_cache(key_bits, value_bits):
    for i, d in enumerate(HEADS[: 3 if key_bits + value_bits > 8 else 5]):
        key, value = formats(key_bits, value_bits, d)
        args, k, v = cache(key, value, 1, 1, *LENGTHS[(i + key_bits) % len(LENGTHS)])
        q = numbers(1, 3, 2, d)
        numeric.check(ops.attend_ref(q, *args), reference.attend(q.numpy(), k.numpy(), v.numpy()), numeric.ROUNDING[torch.float32],
                      f"{key_bits}/{value_bits} D={d}")


#: Queries of one sequence, query heads of a key/value head: through registers, through blocks of registers, through panels in one block and in several.
ROWS = ((1, 1), (2, 3), (7, 2), (4, 4), (17, 1), (23, 3), (50, 4))
OPTIONS = ({}, {"causal": False}, {"window": 1}, {"window": 70}, {"window": 40, "causal": False}, {"softcap": 3.0}, {"softcap": 30.0, "window": 90},
           {"scale": 0.3})


@functools.cache
def row_cases():
    out = []
    for i, ((queries, ratio), options) in enumerate(itertools.product(ROWS, OPTIONS)):
        bits = ops.BITS[i % 5], ops.BITS[(i // 5 + 2) % 5]
        d = (64, 80, 48, 128, 16)[i % 5]
        key, value = formats(*bits, d, (64, 32)[i % 2], (64, 32, 0)[i % 3])
        args, k, v = cache(key, value, 2, 1, *((3, 2, 30), (0, 1, 100), (66, 0, 20), (0, 3, 0))[(i // len(OPTIONS) + i) % 4], seed=i)
        q = numbers(2, ratio, queries, d, seed=i) * (3 if "softcap" in options else 1)
        mask = torch.ones(2, k.shape[2], dtype=torch.bool)
        if i % 3 == 1:  # left padding, over a whole page and more
            mask[0, : (5, 75)[i % 2]] = False
        if i % 3 == 2:  # any mask for each query
            mask = torch.rand(2, queries, k.shape[2], generator=torch.Generator().manual_seed(i)) < 0.7
        options = options | ({"mask": mask} if i % 3 else {})
        exact = reference.attend(q.numpy(), k.numpy(), v.numpy(), **{n: o.numpy() if n == "mask" else o for n, o in options.items()})
        out.append((q, args, options, exact))
    return out


def test_queries_masks_windows_and_caps(target):
    got, want = [], []
    for q, args, options, exact in row_cases():
        y = ops.attend(q, *args, **options)
        assert numeric.error(y, exact) < 10 * LIMIT, (q.shape, args[0].key, args[0].value, {n: o for n, o in options.items() if n != "mask"})
        got.append(y.flatten())
        want.append(torch.from_numpy(exact).flatten())
    numeric.check(torch.cat(got), torch.cat(want), LIMIT, f"rows {target}")


def test_the_twin_knows_masks_windows_and_caps():
    for q, args, options, exact in row_cases():
        numeric.check(ops.attend_ref(q, *args, **options), exact, 2 * numeric.ROUNDING[torch.float32], f"{tuple(q.shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype, target):
    """Query, sink and tail in each type, the result rounded to the query's."""
    for queries, other in itertools.product((1, 9), DTYPES):
        args, k, v = cache(*formats(4, 3, 80, 64, 0), 1, 2, 5, 1, 21, dtype=other)
        q = numbers(1, 6, queries, 80).to(dtype)
        y = ops.attend(q, *args)
        assert y.dtype == dtype
        exact = reference.attend(q.float().numpy(), k.numpy(), v.numpy())
        numeric.check(y, exact, LIMIT + (numeric.ROUNDING[dtype] if dtype != torch.float32 else 0), f"{dtype} over {other} {target}")


def test_16_bits_are_the_ordinary_cache(target):
    """Half precision numbers survive packing, and attention over them is that of torch."""
    k, v, q = (numbers(2, 2, n, 64, seed=n).half().float() for n in (128, 129, 3))
    v = v[:, :, :128]
    key, value = formats(16, 16, 64)
    table = PageTable(key, value, 4)
    for t in (0, 64):
        pages = packed(k[:, :, t : t + 64], key), packed(v[:, :, t : t + 64], value)
        assert torch.equal(ops.unpack_page(*pages[0], key, 2), k[:, :, t : t + 64]) and torch.equal(ops.unpack_page(*pages[1], value, 2), v[:, :, t : t + 64])
        table.append(*pages[0], *pages[1])
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), torch.ones(3, 128, dtype=torch.bool).tril(125))
    numeric.check(ops.attend(q, table), exact, LIMIT, target)


def test_any_strides(target):
    args, k, v = cache(*formats(4, 4, 64), 2, 3, 4, 1, 20)
    q = numbers(2, 6, 5, 64)
    want = ops.attend(q, *args)

    def strided(t):  # heads and tokens exchanged, rows at a distance
        room = torch.zeros(t.shape[0], t.shape[2], t.shape[1], t.shape[3] + 16)
        room[..., : t.shape[3]] = t.transpose(1, 2)
        return room[..., : t.shape[3]].transpose(1, 2)

    def scattered(t):  # channels at a distance: copied
        return torch.stack([t, t], -1)[..., 0]

    for f in (strided, scattered):
        assert torch.equal(ops.attend(f(q), args[0], *(f(t) for t in args[1:])), want)
    for out in (torch.zeros(2, 5, 6, 64).transpose(1, 2), torch.zeros(2, 6, 5, 96)[..., 32:]):
        assert ops.attend(q, *args, out=out) is out and torch.equal(out, want)
    mask = torch.rand(2, 5, k.shape[2]) < 0.5
    sparse = torch.stack([mask, ~mask], -1)[..., 0]
    assert torch.equal(ops.attend(q, *args, mask=sparse), ops.attend(q, *args, mask=mask))
    one = mask[:1].expand(2, 5, k.shape[2])
    assert torch.equal(ops.attend(q, *args, mask=one), ops.attend(q, *args, mask=one.clone()))


def test_queries_that_see_nothing_are_zero(target):
    for pages, tail in ((0, 3), (2, 0), (1, 70)):
        args, k, _ = cache(*formats(3, 4, 64), 2, 1, 0, pages, tail)
        n = k.shape[2]
        mask = torch.ones(2, n, dtype=torch.bool)
        mask[1] = False
        for queries in (1, 3, 40):
            y = ops.attend(numbers(2, 2, queries, 64), *args, mask=mask, causal=False)
            assert not y[1].any() and y[0].isfinite().all() and y[0].any()
        early = ops.attend(numbers(2, 2, n + 5, 64), *args)  # five queries before the first key
        assert not early[:, :, :5].any() and early[:, :, 5:].any(-1).all()
    table = PageTable(*formats(3, 4, 64), 2)
    assert not ops.attend(numbers(2, 2, 1, 64), table).any() and not ops.attend_ref(numbers(2, 2, 1, 64), table).any()
    assert ops.attend(numbers(2, 2, 0, 64), table).shape == (2, 2, 0, 64)


def test_hidden_pages_are_not_read(target):
    """What a mask or a window hides may hold anything, NaN too; what is seen is not hushed up."""
    key, value = formats(4, 4, 64)
    table, x = PageTable(key, value, 1), numbers(1, 1, 64, 64)
    bad = torch.full_like(x, float("nan"))
    for part in (bad, x):
        table.append(*packed(part, key), *packed(part, value))
    mask = torch.ones(1, 128, dtype=torch.bool)
    mask[:, :64] = False
    q = numbers(1, 2, 1, 64)
    assert ops.attend(q, table, mask=mask).isfinite().all() and ops.attend(q, table, window=64).isfinite().all()
    assert ops.attend(q, table).isnan().all()
    assert ops.attend(torch.full_like(q, float("inf")), table, window=64).isnan().all()


def test_scores_of_any_size(target):
    """Softmax by its largest score: scores of thousands do not overflow, and a page of much larger scores takes over."""
    args, k, v = cache(*formats(8, 8, 64), 1, 1, 0, 20, 9)
    for size in (1e-6, 30.0, 3e3):
        for queries in (1, 30):
            q = numbers(1, 2, queries, 64) * size
            y, exact = ops.attend(q, *args), reference.attend(q.numpy(), k.numpy(), v.numpy())
            numeric.check(y, exact, LIMIT * max(1.0, size / 3), f"{size} {target}")  # a score's own rounding grows with it
    args, k, v = cache(*formats(8, 8, 64), 1, 1, 0, 1, 0)
    q = -100 * k.mean(2, keepdim=True).repeat(1, 2, 1, 1)  # all of them far below 0
    assert (q @ k.transpose(2, 3)).max() < -1000
    numeric.check(ops.attend(q, *args), reference.attend(q.numpy(), k.numpy(), v.numpy()), 1000 * LIMIT, target)


def test_result_does_not_depend_on_threads(target, threads):
    args, *_ = cache(*formats(4, 2, 64), 1, 2, 5, 34, 40)  # long enough for several runs of pages
    for queries, options in ((1, {}), (4, {}), (1, {"window": 700}), (40, {"softcap": 5.0})):
        q = numbers(1, 6, queries, 64)
        threads(1)
        one = ops.attend(q, *args, **options)
        for t in (2, 3, 5):
            threads(t)
            assert all(torch.equal(ops.attend(q, *args, **options), one) for _ in range(3)), (queries, t)
    x = numbers(2, 9, 64, 256)
    for fmt in formats(3, 3, 256):
        threads(1)
        alone = packed(x, fmt)
        threads(4)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(alone, packed(x, fmt), strict=True))


def test_long_caches_are_summed_in_runs(target):
    args, k, v = cache(*formats(4, 4, 16), 1, 1, 7, 70, 3)
    for queries, window in itertools.product((1, 20), (0, 64 * 30 + 2, 64 * 30 + 3, 64 * 30 + 4, 64 * 30 + 5)):
        q = numbers(1, 2, queries, 16)
        exact = reference.attend(q.numpy(), k.numpy(), v.numpy(), window=window)
        numeric.check(ops.attend(q, *args, window=window), exact, LIMIT, f"{queries} queries, window {window}, {target}")


def test_what_an_earlier_call_left_in_memory_does_not_matter(target):
    """80 channels are padded to 96: the padding of the queries must be zero and not what was there."""
    dirty, *_ = cache(*formats(4, 4, 128), 1, 1, 0, 1, 3)
    for bits in ops.BITS:
        args, *_ = cache(*formats(bits, bits, 80), 1, 1, 0, 2, 3)
        for queries in (1, 20):
            ops.attend(torch.full((1, 2, queries, 128), float("nan")), *dirty)
            assert ops.attend(numbers(1, 2, queries, 80), *args).isfinite().all()


# ------------------------------------------------------------------------------------------------------- tables and refusals


def test_a_table_keeps_its_pages_and_copies_are_their_own():
    args, k, v = cache(*formats(4, 4, 64), 1, 2, 0, 20, 3)
    table, q = args[0], numbers(1, 2, 1, 64)
    want = ops.attend(q, *args)
    assert len(table) == 20 and table.nbytes() == sum(t.nbytes for i in range(20) for t in table[i])
    deep, shallow, pickled = copy.deepcopy(table), copy.copy(table), pickle.loads(pickle.dumps(table))
    assert deep[3][0].data_ptr() != table[3][0].data_ptr() and shallow[3][0] is table[3][0]
    for i in range(20):
        for t in table[i]:
            t.view(torch.uint8).zero_()
    for t in (deep, pickled):
        assert torch.equal(ops.attend(q, t, *args[1:]), want)
    assert not torch.equal(ops.attend(q, shallow, *args[1:]), want)
    shallow.append(*deep[0])
    assert len(shallow) == 21 and len(table) == 20


@pytest.mark.parametrize("arguments, rule", [
    (("key", 4, 64, 64), "there are pages of keys and values"),
    (("keys", 5, 64, 64), "bits must be one of 2, 3, 4, 8, 16, found 5"),
    (("keys", 4, 128, 64), "the group of keys must be one of 32, 64, found 128"),
    (("values", 4, 16, 64), "the group of values must be one of 0, 32, 64, 128, found 16"),
    (("values", 4, 64, 72), "a multiple of 16 up to 512, found 72"),
    (("values", 4, 64, 528), "found 528"),
    (("values", 4, 64, 0), "found 0"),
    (("values", 4, 64, 64.0), "found 64.0"),
])
def test_formats_that_do_not_exist(arguments, rule):
    with pytest.raises(FormatError, match=rule):
        PageFormat(*arguments)


def test_numbers_of_outliers():
    assert [ops.outlier_count(0.01, 4, d) for d in (16, 64, 80, 96, 128, 256, 512)] == [16, 48, 48, 64, 80, 160, 320]
    assert [ops.outlier_count(share, b, 64) for share, b in ((0.0, 4), (0.01, 16), (0.001, 2), (0.1, 8))] == [0, 0, 16, 416]
    for bits, outliers, most in ((4, 8, 512), (4, 528, 512), (4, -16, 512), (4, 16.0, 512), (16, 16, 0)):
        with pytest.raises(FormatError, match=f"the outliers of a page must be a multiple of 16 up to {most}, found {outliers}; leave outliers out"):
            PageFormat("keys", bits, 64, 64, None, outliers)


def test_pages_that_do_not_fit_are_refused():
    key, value = formats(4, 4, 64)
    x, page = numbers(1, 2, 64, 64), key.empty_page(2)
    for bad, rule in ((x[:, :, :63], r"the shape must be \[batch, heads, 64, 64\]"), (x[0], "the shape must be"), (x.double(), "must be float32, bfloat16"),
                      (x.to("meta"), "on the CPU"), (numbers(1, 3, 64, 64), r"codes must be a contiguous uint8 tensor of \(3, 2048\)")):
        for f in (ops.pack_page, ops.pack_page_ref):
            with pytest.raises(ShapeError, match=rule):
                f(bad, key, *page)
    codes, params = page
    for a, b, rule in ((codes.short(), params, "it is int16"), (codes, params.float(), "params must be a contiguous float16"),
                       (codes, params[:1], "params must be"),
                       (codes.repeat(1, 2)[:, ::2], params, "contiguous"), (codes, None, "it is NoneType")):
        with pytest.raises(ShapeError, match=rule):
            ops.pack_page(x, key, a, b)
        with pytest.raises(ShapeError, match=rule):
            ops.unpack_page(a, b, key)
        with pytest.raises(ShapeError, match=rule):
            PageTable(key, value, 2).append(a, b, *value.empty_page(2))
    with pytest.raises(ShapeError, match="the batch must divide the 2 heads, it is 3"):
        ops.unpack_page(*page, key, 3)
    with pytest.raises(ShapeError, match="asked for float64"):
        ops.unpack_page(*page, key, 1, torch.float64)
    with pytest.raises(FormatError, match="keys and values of one head dimension"):
        PageTable(key, PageFormat("values", 4, 64, 80), 2)
    with pytest.raises(FormatError, match="give them in this order"):
        PageTable(value, key, 2)


def test_attention_that_makes_no_sense_is_refused():
    (table, *parts), k, _ = cache(*formats(4, 4, 64), 1, 2, 3, 1, 5)
    q, n = numbers(1, 4, 2, 64), 72
    for bad, rule in ((q.double(), "q must be float32"), (q[0], r"q must have the shape \[batch, heads, tokens, 64\]"), (numbers(1, 4, 2, 80), "q must have"),
                      (numbers(1, 3, 2, 64), "2 key/value heads of 1 sequences must divide 3 query heads"), (numbers(3, 4, 2, 64), "of 3 sequences"),
                      (numbers(1, 0, 2, 64), "0 query heads"), (q.to("meta"), "on the CPU")):
        for f in (ops.attend, ops.attend_ref):
            with pytest.raises(ShapeError, match=rule):
                f(bad, table, *parts)
    for i, name in enumerate(("sink_k", "sink_v", "tail_k", "tail_v")):
        for bad, rule in ((numbers(1, 3, 3, 64), name), (parts[i].double(), name), (parts[i][0], name), (None, "of one length and type"),
                          (numbers(1, 2, 9, 64), "of one length and type"), (parts[i].half(), "of one length and type")):
            with pytest.raises(ShapeError, match=rule):
                ops.attend(q, table, *(bad if j == i else p for j, p in enumerate(parts)))
    for options, rule in (({"window": -1}, "the window must be at least 1"), ({"softcap": -2.0}, "softcap must be positive"),
                          ({"softcap": float("nan")}, "softcap"),
                          ({"mask": torch.ones(1, n)}, "the mask must be bool"),
                          ({"mask": torch.ones(1, n - 1, dtype=torch.bool)}, rf"\[1, {n}\] or \[1, 2, {n}\]"),
                          ({"out": torch.zeros(1, 4, 2, 64).half()}, "out must be like q"), ({"out": torch.zeros(1, 4, 64, 2).transpose(2, 3)}, "unit stride")):
        with pytest.raises(ShapeError, match=rule):
            ops.attend(q, table, *parts, **options)
    with pytest.raises(ShapeError) as error:
        ops.attend(numbers(1, 3, 2, 64), table, *parts)
    assert "attention of q float32 (1, 3, 2, 64) on cpu over 1 pages of 2 heads of dimension 64" in str(error.value)
    assert str(error.value).endswith("check batch size and heads of the cache")

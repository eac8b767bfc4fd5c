"""Codebooks and keys before their rotary embedding, at the level of pages: bit for bit, and attention on every CPU target against numpy."""

import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import poison_memory
from test_kv_ops import LENGTHS, LIMIT, OPTIONS, ROWS, check_document, check_packing, heavy, numbers, packed, peculiar

from mxq_ext.errors import FormatError
from mxq_ext.kv import ops, reference
from mxq_ext.kv.ops import PageFormat, PageTable
from mxq_ext.kv.rope import Rope
from mxq_ext.plan.kv import NORMAL_LEVELS, KVSpec
from mxq_ext.quantizers.kmeans import kmeans_table
from mxq_ext.testing import numeric


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch, ops)


def levels(bits, seed=0):
    """Levels that no grid has: unequal steps, not symmetric, two of them equal."""
    found = sorted(np.random.default_rng(seed + bits).uniform(-1, 1, 2**bits))
    found[1] = found[0]
    return tuple(float(x) for x in np.float16(found))


def rope(half, seed=0):
    return Rope(tuple(np.random.default_rng(seed).uniform(1e-4, 1.5, half).astype(np.float32).tolist()))


def formats(key, value, d, groups=(64, 64), books=(True, True), outliers=(0, 0)):
    """Formats of both sides; ``books``: which have a codebook, where the bits allow one."""
    made = [levels(b, i) if book and b in ops.LEVEL_BITS else None for i, (b, book) in enumerate(zip((key, value), books, strict=True))]
    return PageFormat("keys", key, groups[0], d, made[0], outliers[0]), PageFormat("values", value, groups[1], d, made[1], outliers[1])


def cache(key, value, turns, batch, heads, sink, pages, tail, seed=0, dtype=torch.float32):
    """Arguments of attend, and the keys and values that they stand for, [B, Hkv, total, D] float64: dequantized by numpy, turned by numpy."""
    d = key.head_dim
    table = PageTable(key, value, batch * heads, None if turns is None else turns.tables(sink))
    parts = [numbers(batch, heads, n, d, seed=seed + i).to(dtype) for i, n in enumerate((sink, sink, tail, tail))]
    whole = [[parts[0].double().numpy()], [parts[1].double().numpy()]]
    for p in range(pages):
        sides = [packed((heavy if fmt.outliers else numbers)(batch, heads, 64, d, seed=seed + 10 + 2 * p + i), fmt) for i, fmt in enumerate((key, value))]
        table.append(*sides[0], *sides[1])
        for i, (fmt, (codes, params)) in enumerate(zip((key, value), sides, strict=True)):
            x = np.stack([reference.unpack(codes[h].numpy().tobytes(), params[h].numpy(), fmt) for h in range(batch * heads)])
            x = reference.turn(x, sink + 64 * p, turns.frequencies) if turns is not None and i == 0 else x
            whole[i].append(x.reshape(batch, heads, 64, d))
    for i in range(2):
        whole[i].append(parts[2 + i].double().numpy())
    return (table, *parts), *(np.concatenate(w, 2) for w in whole)


# ------------------------------------------------------------------------------------------------------------------ pages


def test_threads_that_meet_get_one_codebook(monkeypatch):
    """Native code keeps its address, so that of two that are made at the same time none may go."""
    fmt, both, make = PageFormat("keys", 3, 64, 32, levels(3, seed=99)), threading.Barrier(2, timeout=30), torch.tensor

    def tensor(*args, **kwargs):
        both.wait()
        return make(*args, **kwargs)

    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        addresses = list(pool.map(lambda _: fmt.levels_pointer, range(2)))
    assert set(addresses) == {fmt.levels_pointer}


@pytest.mark.parametrize("bits", ops.LEVEL_BITS)
def test_pages_are_what_the_document_says(bits):
    for (side, groups), d in itertools.product((("keys", ops.KEY_GROUPS), ("values", ops.VALUE_GROUPS)), (16, 80, 128)):
        for group in groups:
            fmt, x = PageFormat(side, bits, group, d, levels(bits), 32 * (group == 64)), peculiar(d)
            check_document(x, fmt)


@pytest.mark.parametrize("bits", ops.LEVEL_BITS)
def test_packing_is_the_same_to_the_bit(bits, target):
    check_packing(bits, (16, 48, 64, 80, 128, 256), levels(bits))
    check_packing(bits, (48, 64), levels(bits), outliers=48)


def test_every_number_gets_the_nearest_level():
    for bits, side in itertools.product(ops.LEVEL_BITS, ops.SIDES):
        fmt = PageFormat(side, bits, 32, 64, levels(bits))
        x = numbers(1, 1, 64, 64)
        codes, params = packed(x, fmt)
        read = ops.unpack_page(codes, params, fmt)[0, 0].double()
        s, z = (params[0, :, i].double().repeat_interleave(32, 0) for i in (0, 1))  # [rows, columns]
        s, z = (s, z) if side == "keys" else (s.T, z.T)
        every = s[..., None] * torch.tensor(fmt.levels, dtype=torch.float64) + z[..., None]
        best = (every - x[0, 0].double()[..., None]).abs().amin(-1)
        assert ((read - x[0, 0]).abs() <= best + 1e-5 * s + 1e-6).all()


@pytest.mark.parametrize("bits", NORMAL_LEVELS)
def test_normal_levels_are_the_best_for_normal_numbers(bits):
    x = np.random.default_rng(bits).standard_normal((30000, 64))
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    y, weight = (2 * x - high - low) / (high - low), np.broadcast_to((high - low) ** 2, x.shape)
    edge = np.minimum((y + 1) * 2000, 3999).astype(int).ravel()
    mass, moment = np.bincount(edge, weight.ravel(), 4000), np.bincount(edge, (weight * y).ravel(), 4000)
    full = mass > 0
    table = kmeans_table(torch.tensor((moment[full] / mass[full])[None]).float(), torch.tensor(mass[full][None]), 2**bits)[0].numpy()
    assert np.abs(np.abs(table) - np.abs(NORMAL_LEVELS[bits])).max() < 0.01

    def error(grid):
        return float((weight * np.abs(y[..., None] - np.asarray(grid)).min(-1) ** 2).mean())

    gain = error(NORMAL_LEVELS[bits]) / error(np.linspace(-1, 1, 2**bits))
    assert gain == pytest.approx({2: 0.56, 3: 0.77, 4: 0.84}[bits], abs=0.01)


def test_codebooks_that_do_not_fit_are_refused():
    for bits, count, side in ((4, 8, "keys"), (8, 256, "values"), (16, 4, "keys")):
        with pytest.raises(FormatError, match="a codebook has 2\\^bits levels at 2, 3, 4 bits"):
            PageFormat(side, bits, 64, 64, tuple(np.linspace(-1, 1, count)))


# ---------------------------------------------------------------------------------------------------------------- attention


#: (bits of keys, of values, which sides have codebooks, half the channels that are turned by head dimension; 0: none)
BOOKS = [*((k, v, books) for k, v in itertools.product(ops.LEVEL_BITS, ops.LEVEL_BITS) for books in ((True, True),)),
         (4, 2, (True, False)), (3, 3, (False, True)), (4, 8, (True, False)), (16, 3, (False, True))]


def turned_cases(turned, seed):
    for i, (queries, ratio) in enumerate(ROWS):
        d = (64, 80, 48, 128, 16)[(i + seed) % 5]
        half = (d // 2, d // 2 - 3, d // 4, 1)[(i + seed) % 4] if turned else 0
        yield i, queries, ratio, d, rope(half, i) if half else None


def check_attention(key_bits, value_bits, books, outliers, turned, what):
    """Kernels and twin against numpy, which dequantizes, turns and attends in float64."""
    got, twin, want = [], [], []
    for i, queries, ratio, d, turns in turned_cases(turned, key_bits + value_bits):
        if any(outliers):
            d = 64 if d < max(outliers) // 8 else 256 if d == 128 else d
        key, value = formats(key_bits, value_bits, d, ((64, 32)[i % 2], (0, 32, 64, 128)[i % 4]), books, outliers)
        args, k, v = cache(key, value, turns, 1 + i % 2, 1 + i % 3 // 2, *LENGTHS[(i + key_bits) % len(LENGTHS)], seed=i)
        q = numbers(k.shape[0], k.shape[1] * ratio, queries, d, seed=50 + i)
        options = OPTIONS[(i + value_bits) % len(OPTIONS)]
        want.append(reference.attend(q.numpy(), k, v, **options).ravel())
        got.append(ops.attend(q, *args, **options).flatten())
        twin.append(ops.attend_ref(q, *args, **options).flatten())
        assert numeric.error(got[-1], want[-1]) < 10 * LIMIT, (q.shape, key, value, options)
    numeric.check(torch.cat(got), np.concatenate(want), LIMIT, what)
    numeric.check(torch.cat(twin), np.concatenate(want), LIMIT, f"{key_bits}/{value_bits} twin")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("key_bits, value_bits, books", [*BOOKS, *((b, b, (False, False)) for b in ops.BITS)])
def test_attention_is_that_over_the_dequantized_cache(key_bits, value_bits, books, turned, target):
    if not turned and books == (False, False):
        pytest.skip("the ordinary cache: test_kv_ops.py")
    check_attention(key_bits, value_bits, books, (0, 0), turned, f"{key_bits}/{value_bits} {target}")


#: (bits of keys, of values, whether there are codebooks, outliers of keys and of values)
SPARSE = [(2, 3, True, (48, 48)), (3, 2, True, (16, 0)), (4, 4, False, (0, 80)), (8, 2, False, (128, 64)), (4, 16, True, (64, 0))]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("key_bits, value_bits, book, outliers", SPARSE)
def test_attention_with_outliers_is_that_over_the_dequantized_cache(key_bits, value_bits, book, outliers, turned, target):
    check_attention(key_bits, value_bits, (book, book), outliers, turned, f"{key_bits}/{value_bits} with {outliers} outliers {target}")


def test_far_positions(target):
    """Angles of far pages come from float64: their error does not grow with the position."""
    key, value = formats(8, 8, 64)
    turns, sink = rope(32), 1_000_003
    table = PageTable(key, value, 1, turns.tables(sink))
    x = numbers(1, 1, 64, 64)
    page = packed(x, key)
    table.append(*page, *packed(x, value))
    k = reference.turn(reference.unpack(page[0][0].numpy().tobytes(), page[1][0].numpy(), key), sink, turns.frequencies)
    q = numbers(1, 3, 2, 64, seed=1)
    v = ops.unpack_page_ref(*table[0][2:], value).double().numpy()
    numeric.check(ops.attend(q, table, causal=False), reference.attend(q.numpy(), k[None, None], v, causal=False), LIMIT, target)


def test_turning_back_is_the_inverse_and_moves_no_other_channel():
    turns, x = rope(20), numbers(2, 3, 70, 48)
    there = turns.turned(x, 11)
    np.testing.assert_allclose(there.numpy(), reference.turn(x.double().numpy(), 11, turns.frequencies), atol=1e-5)
    torch.testing.assert_close(turns.turned(there, 11, back=True), x, rtol=0, atol=1e-5)
    assert torch.equal(there[..., 40:], x[..., 40:]) and not torch.equal(there[..., :40], x[..., :40])
    half = x.half()
    assert turns.turned(half, 0).dtype == torch.float32


def test_result_does_not_depend_on_threads(target, threads):
    args, *_ = cache(*formats(3, 2, 64, outliers=(48, 48)), rope(32), 1, 2, 5, 34, 40)
    for queries in (1, 4, 40):
        q = numbers(1, 6, queries, 64)
        threads(1)
        one = ops.attend(q, *args)
        for t in (2, 5):
            threads(t)
            assert torch.equal(ops.attend(q, *args), one)


def test_what_an_earlier_call_left_in_memory_does_not_matter(target):
    dirty, *_ = cache(*formats(4, 4, 128), rope(64), 1, 1, 0, 1, 3)
    for bits in ops.BITS:
        args, *_ = cache(*formats(bits, bits, 80), rope(13), 1, 1, 0, 2, 3)
        for queries in (1, 20):
            ops.attend(torch.full((1, 2, queries, 128), float("nan")), *dirty)
            assert ops.attend(numbers(1, 2, queries, 80), *args).isfinite().all()


def test_copies_of_a_table_read_the_same():
    args, *_ = cache(*formats(3, 4, 64), rope(32), 1, 2, 7, 20, 3)
    q = numbers(1, 4, 1, 64)
    want = ops.attend(q, *args)
    for other in (copy.deepcopy(args[0]), pickle.loads(pickle.dumps(args[0]))):
        assert torch.equal(ops.attend(q, other, *args[1:]), want) and other.rope is args[0].rope
    assert not torch.equal(ops.attend(q, PageTable(args[0].key, args[0].value, 2), *args[1:]), want)


def test_the_tables_of_a_cache_stay_when_another_one_grows():
    turns = rope(32, seed=77)
    args, *_ = cache(*formats(4, 4, 64), turns, 1, 1, 0, 3, 5)
    q = numbers(1, 1, 1, 64)
    want, before = ops.attend(q, *args), args[0].reading
    turns.tables(0).pages(500)
    assert torch.equal(ops.attend(q, *args), want) and args[0].reading == before


def test_an_embedding_wider_than_the_head_is_refused():
    with pytest.raises(FormatError, match="turns 96 channels, a head has 64"):
        PageTable(*formats(4, 4, 64), 1, rope(48).tables(0))


def test_memory_of_a_page_is_that_of_the_uniform_one():
    for bits in ops.LEVEL_BITS:
        assert all(a.page_bytes == b.page_bytes for a, b in zip(formats(bits, bits, 64), formats(bits, bits, 64, books=(False, False)), strict=True))
    assert KVSpec(4, 2, levels="normal").codebook(1) == tuple(np.float16(NORMAL_LEVELS[2]).astype(float))

"""Bit streams and the kernel layout: Python, C++ and a plain reading of the document agree bit for bit."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxq_ext import _native, ops, reference
from mxq_ext.errors import NativeError, ShapeError
from mxq_ext.formats import UNIFORM_BITS, Format
from mxq_ext.ops import Packed
from mxq_ext.pack import pack_codes, unpack_codes
from mxq_ext.qtensor import QTensor, Rectangle, Sparse, nested_codes, nested_value
from mxq_ext.testing.cases import FORMATS, LAYOUTS, NESTED, NESTED_LAYOUT, SHAPES, random_qtensor, random_x


def same(a: QTensor, b: QTensor) -> bool:
    ta, tb = a.to_tensors(), b.to_tensors()
    return a.meta() == b.meta() and list(ta) == list(tb) and all(
        ta[n].dtype == tb[n].dtype and torch.equal(ta[n].contiguous().view(torch.uint8), tb[n].contiguous().view(torch.uint8)) for n in ta)


@given(st.sampled_from(UNIFORM_BITS), st.integers(0, 5), st.integers(0, 70), st.randoms())
def test_stream_is_what_the_document_says(bits, rows, cols, random):
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(cols)] for _ in range(rows)], dtype=torch.int64).reshape(rows, cols)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and [bytes(row.tolist()) for row in packed] == [reference.write_stream(row.tolist(), bits) for row in codes]
    assert torch.equal(unpack_codes(packed, bits, cols), codes.to(torch.uint8))
    assert [reference.read_stream(bytes(row.tolist()), bits, cols) for row in packed] == codes.tolist()


def test_stream_drawn_by_hand():
    # 3 bits, codes 1 2 3 4 5 6 7 0, least significant bit first: 100 010 11|0 001 101 0|11 111 000
    assert pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 3).tolist() == [[0b11010001, 0b01011000, 0b00011111]]
    assert pack_codes(torch.tensor([[1, 2]]), 4).tolist() == [[0x21]]
    assert pack_codes(torch.tensor([[3, 0, 1]]), 2).tolist() == [[0b010011]]


def test_large_matrices_are_packed_in_parts():
    codes = torch.randint(0, 8, (3000, 1601))
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, 1601), codes.to(torch.uint8))


def test_codes_out_of_range_and_wrong_widths_are_refused():
    with pytest.raises(ShapeError, match=r"codes must be in 0\.\.7, found 0\.\.8"):
        pack_codes(torch.tensor([[0, 8]]), 3)
    with pytest.raises(ShapeError, match=r"found -1\.\.0"):
        pack_codes(torch.tensor([[0, -1]]), 3)
    with pytest.raises(ShapeError, match="a row must have 3 bytes, it has 2"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 3, 8)


@pytest.mark.parametrize("name", FORMATS)
def test_prepack_unpack_and_dequantize(name):
    for i, (n, k) in enumerate(SHAPES):
        q = random_qtensor(name, n, k, seed=i)
        p = ops.prepack(q)
        assert p.shape == (n, k) and p.format_name == name and p.nbytes == p.blob.numel()
        assert same(ops.unpack(p), q), (n, k)
        w = q.dequantize()
        for values in (ops.dequantize(p), ops.dequantize_ref(p), ops.dequantize_ref(q)):
            assert torch.equal(values, w), (n, k)


@pytest.mark.parametrize("name", [*FORMATS, *NESTED])
def test_dequantize_is_the_document_rounded_once(name):
    for n, k in ((3, 31), (2, 161)):
        q = random_qtensor(name, n, k, seed=n)
        assert np.array_equal(q.dequantize().numpy(), reference.dequantize(q).astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: v.name)
def test_layouts(layout):
    q = layout.make()
    p = ops.prepack(q)
    assert same(ops.unpack(p), q) and p.format_name == q.format_name
    w = q.dequantize()
    assert torch.equal(ops.dequantize(p), w) and torch.equal(ops.dequantize_ref(p), w)
    # The float32 sum of a dense and a sparse value rounds once more.
    assert np.allclose(w.numpy(), reference.dequantize(q), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_weight_is_stored_as_it_is_and_computed_as_its_expanded_form(name):
    for i, (n, k) in enumerate((*SHAPES, (3, 32 * 16 + 1), (2, 2100))):
        q = random_qtensor(name, n, k, seed=i)
        wide = q.expanded()
        assert wide.format_name == name.replace("_nest", "_fz") and wide.expanded() is wide and wide.nested() == {}
        assert np.array_equal(q.dequantize().numpy(), wide.dequantize().numpy())
        p, plain = ops.prepack(q), ops.prepack(wide)
        assert same(ops.unpack(p), q) and same(QTensor.from_tensors(q.meta(), q.to_tensors()), q), (n, k)
        assert torch.equal(p.blob, plain.blob) and p.format_name == name and p.nbytes > plain.nbytes
        for values in (ops.dequantize(p), ops.dequantize_ref(p), ops.dequantize_ref(q), ops.embedding(torch.arange(n), p)):
            assert torch.equal(values, q.dequantize()), (n, k)
        x = random_x(3, k, seed=i)
        for mode in ("a16", "a8"):
            assert torch.equal(ops.linear(x, p, compute=mode), ops.linear(x, plain, compute=mode))
            assert torch.equal(ops.linear_ref(x, q, compute=mode), ops.linear_ref(x, wide, compute=mode))
        assert ops.explain(p, 1) == ops.explain(plain, 1)


def test_a_nested_weight_among_others_survives_copies_and_files():
    q = NESTED_LAYOUT.make()
    p = ops.prepack(q)
    assert p.format_name == q.format_name == "w3g32_nest+w8+w4g64_nest+sparse" and set(p.nested) == {0, 2}
    assert np.allclose(q.dequantize().numpy(), reference.dequantize(q), rtol=1e-6, atol=1e-7)
    for other in (p, p.clone(), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert same(ops.unpack(other), q) and torch.equal(ops.dequantize(other), q.dequantize()) and other.nbytes == p.nbytes
    q.rectangles[0].tensors["scale_steps"].zero_()
    assert not torch.equal(ops.unpack(p).rectangles[0].tensors["scale_steps"], q.rectangles[0].tensors["scale_steps"]), "what is packed is its own"
    assert same(ops.unpack(Packed.from_blob(p.blob)), ops.unpack(p).expanded())  # the bytes of the kernels alone know no nesting
    del q.rectangles[0].tensors["zero_starts"]
    with pytest.raises(ShapeError, match=r"must have tensors \['codes', 'scale_starts'.*'zero_starts'"):
        ops.prepack(q)


def test_codes_of_nested_values_are_found_again_where_fp16_merges_them():
    """Steps below fp16's spacing, steps of zero, and values that no code has."""
    starts = torch.tensor([[0.1, 1.0], [2.0**-24, 60000.0]])
    steps = torch.tensor([[1e-5, 0.0], [2.0**-24, 700.0]])
    codes = torch.randint(0, 8, (2, 21), generator=torch.Generator().manual_seed(0))
    wide = [t.repeat_interleave(16, 1)[:, :21] for t in (steps, starts)]
    values = nested_value(*wide, codes.float())
    found = nested_codes(values, steps, starts)
    assert torch.equal(nested_value(*wide, found.float()), values) and torch.equal(found[1, :16].long(), codes[1, :16])
    many = [t.repeat(1500, 1) for t in (values, steps, starts)]
    assert torch.equal(nested_codes(*many), found.repeat(1500, 1)), "many rows are taken in parts"
    assert nested_codes(torch.tensor([[0.0, 0.24, 0.26, 9.0]]), torch.tensor([[0.5]]), torch.zeros(1, 1)).tolist() == [[0, 0, 1, 7]]


def stripe(words: list[int], bits: int) -> list[int]:
    """The 32 codes of one lane of a stripe, by the drawing in docs/formats.md."""
    field = [[word >> 8 * k & 255 for k in range(4)] for word in words]  # [word][byte]
    if bits in (5, 6):  # one whole quad a word; the bits above them, from the highest on, make the others
        high = [[byte >> bits for byte in word] for word in field]
        codes = [byte & ((1 << bits) - 1) for word in field for byte in word]
        if bits == 6:
            return codes + [16 * high[w][k] + 4 * high[w + 1][k] + high[w + 2][k] for w in (0, 3) for k in range(4)]
        codes += [4 * high[w][k] + high[w + 3][k] % 4 for w in (0, 1) for k in range(4)]
        return codes + [4 * high[2][k] + 2 * (high[3][k] >> 2) + (high[4][k] >> 2) for k in range(4)]
    if bits != 3:
        per = 8 // bits
        return [field[i // per][k] >> bits * (i % per) & ((1 << bits) - 1) for i in range(8) for k in range(4)]
    codes = [field[i // 2][k] >> 3 * (i % 2) & 7 for i in range(6) for k in range(4)]
    codes += [field[0][k] >> 6 | (field[1][k] >> 6 & 1) << 2 for k in range(4)]
    return codes + [field[2][k] >> 6 | (field[1][k] >> 7) << 2 for k in range(4)]


@pytest.mark.parametrize("name", ["w1_fz", "w2", "w3", "w4", "w5", "w6", "w8", "nf4", "lut2", "lut3", "lut4"])
def test_prepacked_codes_are_what_the_document_says(name):
    """Finds the stripes of a one-tile weight in the blob's bytes by value: their place is the blob's own business, their form is not."""
    fmt = Format.parse(name)
    bits = fmt.bits
    n, k = (1, 512) if fmt.kind == "lut" else (16, 32)
    q = random_qtensor(name, n, k, seed=5)
    codes = q.rectangles[0].codes().long()
    if fmt.kind == "uniform" and bits < 8:
        codes = codes ^ (1 << (bits - 1))
    if fmt.kind == "lut":  # column 64*i + 4*lane + k is code 4*i + k
        codes = codes.reshape(8, 16, 4).transpose(0, 1).reshape(16, 32)
    raw = ops.prepack(q).blob.numpy().tobytes()
    found = False
    for offset in range(0, len(raw) - 64 * bits + 1, 64):
        words = np.frombuffer(raw, "<u4", 16 * bits, offset).reshape(bits, 16)
        found |= all(stripe([int(w) for w in words[:, lane]], bits) == codes[lane].tolist() for lane in range(16))
    assert found


def test_views_are_packed_like_copies():
    q = random_qtensor("w4g32_asym", 9, 70)
    wide = {n: torch.cat([t, t], 1)[:, : t.shape[1]] for n, t in q.rectangles[0].tensors.items()}
    assert not wide["codes"].is_contiguous()
    assert torch.equal(ops.prepack(QTensor(q.shape, [Rectangle(0, 9, 0, 70, q.rectangles[0].format, wide)])).blob, ops.prepack(q).blob)


def test_packing_does_not_depend_on_threads():
    q = LAYOUTS[4].make()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.prepack(q).blob
        torch.set_num_threads(3)
        assert torch.equal(ops.prepack(q).blob, one)
    finally:
        torch.set_num_threads(threads)


def _through_process(connection):
    p = connection.recv()
    connection.send(ops.dequantize(p).numpy().tobytes())  # plain bytes: a tensor would need this process to stay alive


def test_a_packed_weight_can_be_copied_pickled_and_shared():
    p = ops.prepack(LAYOUTS[3].make())
    want = ops.dequantize(p)
    shifted = torch.cat([torch.zeros(5, dtype=torch.uint8), p.blob])[5:]  # unaligned
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), Packed.from_blob(p.blob.clone().share_memory_()), Packed.from_blob(shifted)):
        assert (other.shape, other.format_name, other.nbytes) == (p.shape, p.format_name, p.nbytes)
        assert torch.equal(ops.dequantize(other), want)
        assert torch.equal(ops.linear(torch.eye(p.shape[1]), other), want.T)
    assert repr(p) == f"Packed(37 x 160, lut4+nf4g32+sparse, {p.nbytes} bytes)"
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_through_process, args=(there,))
    process.start()
    here.send(p)
    assert here.recv() == want.numpy().tobytes()
    process.join()


def test_the_size_of_a_blob_is_counted_in_64_bits():
    """The size depends on the shape alone: no memory is touched, and there is no weight of so many rows or columns here."""
    n = 1 << 30
    assert _native.cpu.blob_nbytes((n, 1, [], 64, 0, 0, 0, 0, 0)) > 8 * n and _native.cpu.blob_nbytes((1, n, [], 0, 64, 0, 0, 0, 0)) > 4 * n


def test_empty_weights():
    for n, k in ((0, 5), (4, 0), (0, 0)):
        p = ops.prepack(QTensor((n, k), []))
        assert ops.unpack(p).shape == (n, k) and ops.dequantize(p).shape == (n, k)


def test_sparse_rows_are_refused_that_only_seem_to_rise():
    """In int32 each difference of these is positive. Native code would take them for rows of 2^31 values."""
    q = random_qtensor("w4g32", 4, 40)
    q.sparse = Sparse(torch.tensor([0, 2**31 - 1, -(2**31), -1, 5], dtype=torch.int32), torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.float16))
    with pytest.raises(ShapeError, match="sparse.rowptr must rise"):
        ops.prepack(q)


@pytest.mark.parametrize("cols", [(3, 3), (5, 2)])
def test_sparse_columns_ascend_within_a_row(cols):
    """Of two values in one place kernels read the sum, dequantize() the latter."""
    q = random_qtensor("w4g32", 2, 40)
    q.sparse = Sparse(torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([*cols, 1], dtype=torch.int32), torch.ones(3, dtype=torch.float16))
    with pytest.raises(ShapeError, match="sparse.cols must ascend within a row"):
        ops.prepack(q)
    q.sparse.cols[:2] = torch.tensor([2, 5])
    assert torch.equal(ops.dequantize(ops.prepack(q)), q.dequantize())


def test_other_bytes_are_refused():
    p = ops.prepack(random_qtensor("w4g32", 4, 40))
    for blob in (p.blob[:-64], torch.zeros_like(p.blob), p.blob[:16]):
        with pytest.raises(NativeError, match=r"no prepacked weight of this version; make it again with ops.prepack\(\)"):
            Packed.from_blob(blob)
    with pytest.raises(NativeError, match="it must be a contiguous uint8 vector on the CPU"):
        Packed.from_blob(p.blob.float())
    with pytest.raises(ShapeError, match="the kernels run on the CPU, its tensors are on meta"):
        q = random_qtensor("w4g32", 4, 40).rectangles[0]
        ops.prepack(QTensor((4, 40), [Rectangle(0, 4, 0, 40, q.format, {n: t.to("meta") for n, t in q.tensors.items()})]))


def test_invalid_weights_are_refused_before_native_code_sees_them():
    q = LAYOUTS[4].make()
    q.perm_cols[0] = 10**6
    with pytest.raises(ShapeError, match="perm_cols is not a permutation"):
        ops.prepack(q)
    q = LAYOUTS[4].make()
    q.sparse.cols[0] = 90
    with pytest.raises(ShapeError, match="sparse.cols must lie in 0..89"):
        ops.prepack(q)


def test_half_precision_conversions_match_torch():
    """All 65536 halves in, and floats around every rounding border out."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).reshape(256, 256)
    q = QTensor((256, 256), [Rectangle(0, 256, 0, 256, Format.parse("fp16"), {"values": every})])
    args, keep = ops._canonical(q)
    blob = torch.empty(_native.cpu.blob_nbytes(args), dtype=torch.uint8)
    _native.cpu.prepack(args, blob.data_ptr(), 1)
    p = Packed(blob, (256, 256), "fp16")
    w = ops.dequantize(p)
    assert torch.equal(w.isnan(), every.isnan()) and torch.equal(w.nan_to_num(7.0), every.float().nan_to_num(7.0))
    ids = torch.arange(256)
    assert torch.equal(ops.embedding(ids, p, torch.float16).nan_to_num(7.0), every.nan_to_num(7.0))
    assert torch.equal(ops.embedding(ids, p, torch.bfloat16).nan_to_num(7.0), every.to(torch.bfloat16).nan_to_num(7.0))
    del keep

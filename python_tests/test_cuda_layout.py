"""The CUDA packer: held to a second packer in numpy, bit for bit, and to its own inverse."""

import cuda_numpy
import cuda_tools
import pytest
import torch

from mxq_ext.errors import ShapeError
from mxq_ext.testing import cases

#: Less than a tile, one and a bit, a full super-tile with a tail, and row blocks with one row in the last.
SHAPES = ((3, 31), (17, 65), (5, 577))


def check(q):
    runtime = cuda_tools.bench("cpu").runtime
    p = runtime.pack(q)
    expected, _ = cuda_numpy.pack(q)
    head = cuda_numpy.head_nbytes(q)
    assert p.head.numel() == head and p.nbytes == head + len(expected), "the size can be foretold"
    assert p.blob[head:].numpy().tobytes() == expected
    assert torch.equal(p.blob[:head], p.head)
    before, after = q.to_tensors(), runtime.unpack(p).to_tensors()
    assert before.keys() == after.keys()
    for name, t in before.items():
        assert t.shape == after[name].shape and t.dtype == after[name].dtype
        assert t.numel() == 0 or torch.equal(t.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("fmt", cases.FORMATS)
def test_formats(fmt):
    for seed, (n, k) in enumerate(SHAPES):
        check(cases.random_qtensor(fmt, n, k, seed))


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: layout.name)
def test_layouts(layout):
    check(layout.make(5))


def test_nested_weights_are_laid_out_as_their_expanded_form():
    runtime = cuda_tools.bench("cpu").runtime
    for q in (*(cases.random_qtensor(f, 37, 1100) for f in ("w2g128_nest", "w3g32_nest")), cases.NESTED_LAYOUT.make()):
        p, plain = runtime.pack(q), runtime.pack(q.expanded())
        assert torch.equal(p.blob, plain.blob) and torch.equal(p.head, plain.head) and p.format_name == q.format_name
        back = runtime.unpack(p)
        assert back.meta() == q.meta() and all(torch.equal(t, back.to_tensors()[n]) for n, t in q.to_tensors().items())


def test_no_bits_are_wasted_on_whole_tiles():
    """The codes of a weight of whole row blocks and tiles take exactly `bits` bits each."""
    for fmt, bits in (("w1g128_fz", 1), ("w2g128", 2), ("w3g128", 3), ("w4g128", 4), ("w5g128", 5), ("w6g128", 6), ("w8", 8), ("lut3", 3), ("nf4g64", 4),
                      ("fp16", 16)):
        q = cases.random_qtensor(fmt, 32, 320)
        _, pieces = cuda_numpy.pack(q)
        assert 8 * len(pieces[0][1]["codes"]) == bits * 32 * 320


def test_threads_make_no_difference(threads):
    q = cases.random_qtensor("w3g64_asym", 100, 300)
    runtime = cuda_tools.bench("cpu").runtime
    threads(1)
    one = runtime.pack(q).blob
    threads(3)
    assert torch.equal(one, runtime.pack(q).blob)


def test_invalid_weights_are_refused():
    q = cases.LAYOUTS[0].make()
    q.perm_rows[0] = q.perm_rows[1]
    with pytest.raises(ShapeError, match="permutation"):
        cuda_tools.bench("cpu").runtime.pack(q)

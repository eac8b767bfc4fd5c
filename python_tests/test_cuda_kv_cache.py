"""MxqCache on a GPU that is none (pretend_gpu): it keeps what the cache on the CPU keeps, to the bit, and a model reads from it what it reads there."""

import contextlib
import copy
import itertools

import cuda_tools
import pretend_gpu as gpu
import pytest
import torch
from conftest import make_model
from test_kv_attention import CACHE, build, padded, prompt, using
from test_kv_cache import SPECS as ANYWHERE
from test_kv_cache import numbers, pages
from test_kv_heads import SPECS as BY_HEAD
from test_kv_heads import head_states
from transformers import masking_utils

import mxq_ext as mxq
from mxq_ext import _native, cuda
from mxq_ext.errors import FormatError, ModelError, NativeError, ShapeError
from mxq_ext.kv import attention as kv_attention
from mxq_ext.kv import codes as page_codes
from mxq_ext.kv import cuda as kv_cuda
from mxq_ext.kv import device, ops
from mxq_ext.kv.attention import replace_attention
from mxq_ext.kv.cache import MxqCache, MxqCacheLayer, cache_nbytes, page_formats
from mxq_ext.kv.cuda import CudaPages
from mxq_ext.plan import KVSpec, Plan
from mxq_ext.plan.kv import Mixed

SPECS = [s for s in ANYWHERE if not s.outliers]  #: those that there are kernels for
#: What the kernels of both places make of one cache differs by their roundings.
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture
def launches(monkeypatch):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved parameter is a new one, see test_cuda_nn
    with gpu.pretend_gpu(monkeypatch) as launched:
        yield launched
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def on_gpu(*tensors):
    """Copies that nothing waits for, so that what is waited for later is what a test is about."""
    return [t.pin_memory().to("cuda", non_blocking=True) for t in tensors]


def same(there: MxqCacheLayer, here: MxqCacheLayer) -> bool:
    """Whether a layer on the GPU keeps what one on the CPU does, and all of it there. Bit for bit, but for rotated numbers: a product's rounding depends on its
    shape, and is another on the CPU if memory lies otherwise. Of their pages, which say the number of each byte, a few codes are others."""
    assert all(t.device == gpu.DEVICE for t in there.tensors()) and isinstance(there.pages, CudaPages)
    assert there.nbytes() == here.nbytes() == sum(t.nbytes for t in there.tensors()) and there.get_seq_length() == here.get_seq_length()
    parts = [[*(t for p in pages(x) for t in p), *(t[:, :, : x.sink_tokens] for t in x.sink), *(t[:, :, : x.tail_tokens] for t in x.tail)]
             for x in (there, here)]
    if len(parts[0]) != len(parts[1]):
        return False
    pairs = [(a.cpu(), b) for a, b in zip(*parts, strict=True)]
    if not here.spec.rotate:
        return all(torch.equal(a, b) for a, b in pairs)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    unequal, count = (sum(f(a, b) for a, b in pairs if a.dtype == torch.uint8) for f in (lambda a, b: int((a != b).sum()), lambda a, b: a.numel()))
    return unequal <= 1e-3 * count and all(torch.allclose(a.float(), b.float(), rtol=2e-3, atol=1e-4) for a, b in pairs if a.dtype != torch.uint8)


def pair(spec, *states):
    """(layer on the GPU, layer on the CPU) of the same tokens."""
    out = MxqCacheLayer(spec, "decoder layer 3"), MxqCacheLayer(spec)
    out[0].append(*on_gpu(*states))
    out[1].append(*states)
    return out


def test_the_pretended_gpu_is_as_strict_as_one(launches):
    x, y = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    (index,) = on_gpu(torch.tensor([1]))
    for mixed in (lambda: x + y, lambda: torch.cat([y, x]), lambda: y.index_select(0, torch.tensor([0])), lambda: y.masked_fill(x > 0, 0.0), lambda: x[index]):
        with pytest.raises(AssertionError, match="of tensors on cpu and cuda:0"):
            mixed()
    assert (y + torch.tensor(1.0)).device == y[index].device == y[torch.tensor(1)].device == gpu.DEVICE
    y.copy_(x.pin_memory(), non_blocking=True)
    y[:1], y[index], y[0, 0] = y[1:], y[:1].clone(), 3.0
    assert not launches.waits

    def fill(t, index, value):
        t[index] = value

    host, mask = torch.tensor([1]), y > 0
    for why, *waiting in (("__bool__", lambda: bool(y.all())), ("tolist", y.tolist), ("where", lambda: torch.where(mask)), ("cpu", y.cpu, lambda: y.to("cpu")),
                          (gpu.FROM_HOST, lambda: x.to("cuda"), lambda: x.to("cuda", non_blocking=True), lambda: x.pin_memory().to("cuda"), x.cuda),
                          (gpu.FROM_HOST, lambda: y.copy_(x), lambda: y.copy_(x, non_blocking=True), lambda: fill(y, slice(2), x)),
                          (gpu.FROM_HOST, lambda: torch.tensor([1, 2], device="cuda")), (gpu.TO_HOST, lambda: x.copy_(y), lambda: fill(x, slice(2), y)),
                          (gpu.BY_MASK, lambda: y[mask], lambda: fill(y, mask, 0.0)),
                          (gpu.BY_HOST, lambda: y[host], lambda: y[:, [0, 2]], lambda: fill(y, host, 0.0))):
        for wait in waiting:
            wait()
        assert launches.waits == [why] * len(waiting)
        launches.waits.clear()


# -- pages ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ops.BITS)
def test_pages_are_read_to_the_same_bits(launches, bits):
    for d, (side, groups), kind in itertools.product((16, 48, 80, 128), (("keys", ops.KEY_GROUPS), ("values", ops.VALUE_GROUPS)), (torch.float32, torch.half)):
        for group in groups:
            fmt = ops.PageFormat(side, bits, group, d)
            x = torch.randn(2, 3, 64, d, generator=torch.Generator().manual_seed(d)) * 3 + 1
            x[0, 0, 5, 7], x[1, 2, 9] = float("nan"), 0.0
            page = fmt.empty_page(6)
            ops.pack_page(x, fmt, *page)
            have = device.unpack_page(*on_gpu(*page), fmt, 2, kind)
            want = ops.unpack_page(*page, fmt, 2, kind)
            assert have.device == gpu.DEVICE and have.dtype == kind and torch.equal(have.cpu().nan_to_num(7.5), want.nan_to_num(7.5)), fmt
            if bits in (2, 4, 8):
                assert torch.equal(page_codes.packed(page_codes.codes_of(page[0], bits), bits), page[0]), fmt
    with pytest.raises(ShapeError, match=r"the batch must divide the 6 heads, it is 4"):
        device.unpack_page(*on_gpu(*page), fmt, 4)


# -- one layer --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_how_tokens_come_does_not_matter(launches, spec):
    k, v = numbers(300)
    whole, here = pair(spec, k, v)
    assert not launches.waits
    assert same(whole, here)
    launches.waits.clear()
    for sizes in ([1] * 300, [200, 1, 99]):
        other, twin, start = MxqCacheLayer(spec), MxqCacheLayer(spec), 0
        for n in sizes:
            part = [x[:, :, start : start + n] for x in (k, v)]
            other.append(*on_gpu(*part))
            twin.append(*part)
            start += n
        assert not launches.waits and same(other, twin)
        launches.waits.clear()
    assert set(launches.names) == {"kv_pack"} and set(launches) == {gpu.STREAM}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attention_is_that_of_the_cpu(launches, spec):
    (k, v), g = numbers(230), torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 230, 32, generator=g)
    padding = torch.ones(2, 230, dtype=torch.bool)
    padding[1, :9] = False
    for window, softcap in ((0, 0.0), (50, 5.0)):
        outs = []
        for move in (on_gpu, lambda *x: x):
            layer, out = MxqCacheLayer(spec), []
            layer.append(*move(k[:, :, :100], v[:, :, :100]))
            for start, n in ((100, 1), (101, 60), (161, 69)):
                layer.update(*move(k[:, :, start : start + n], v[:, :, start : start + n]))
                (mask,) = move(padding[:, : start + n])
                out.append(layer.attend(*move(q[:, :, start : start + n]), scale=0.2, mask=mask, causal=True, window=window, softcap=softcap))
            outs.append(torch.cat(out, 1))
        assert outs[0].device == gpu.DEVICE and not launches.waits
        torch.testing.assert_close(outs[0].cpu(), outs[1], **CLOSE | ({"atol": 1e-2} if spec.rotate else {}))
        launches.waits.clear()
    assert set(launches.names) == {"kv_pack", "kv_attend"} and set(launches) == {gpu.STREAM}


@pytest.mark.parametrize("spec", BY_HEAD[:4], ids=str)
def test_bits_by_head(launches, spec):
    (k, v), g = numbers(330, heads=4), torch.Generator().manual_seed(1)
    q = torch.randn(2, 8, 330, 32, generator=g)
    padding = torch.ones(2, 330, dtype=torch.bool)
    padding[1, :9] = False
    layers, outs = [], []
    for move in (on_gpu, lambda *x: x):
        layer, out = MxqCacheLayer(spec), []
        layer.append(*move(k[:, :, :100], v[:, :, :100]))
        for start, n in ((100, 1), (101, 60), (161, 169)):
            layer.update(*move(k[:, :, start : start + n], v[:, :, start : start + n]))
            (mask,) = move(padding[:, : start + n])
            out.append(layer.attend(*move(q[:, :, start : start + n]), scale=0.2, mask=mask, causal=True, window=0, softcap=0.0))
        layer.reorder_cache(*move(torch.tensor([1, 1])))
        layers.append(layer)
        outs.append(torch.cat(out, 1))
    assert not launches.waits and set(launches.names) == {"kv_pack", "kv_attend"} and set(launches) == {gpu.STREAM}
    torch.testing.assert_close(outs[0].cpu(), outs[1], **CLOSE | ({"atol": 1e-2} if spec.rotate else {}))
    there, here = layers
    for gone in (0, 90):
        there.crop(-gone)
        here.crop(-gone)
        assert all(t.device == gpu.DEVICE for t in there.tensors()) and all(isinstance(table, CudaPages) for table in there.pages.tables)
        assert there.nbytes() == here.nbytes() == sum(t.nbytes for t in there.tensors())
        if not spec.rotate:  # a product's rounding depends on its shape
            assert all(torch.equal(a.cpu(), b) for x, y in zip(head_states(there), head_states(here), strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sink_and_tail_have_the_models_dtype(launches, dtype):
    there, here = pair(KVSpec(8, 8, sink=3), *numbers(150, dtype=dtype))
    assert same(there, here) and there.tail[0].dtype == there.sink[0].dtype == dtype


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_crop(launches, spec):
    k, v = numbers(300)
    for gone in (0, 30, 128, 200, 299, 300):
        there, here = pair(spec, k, v)
        for layer in (there, here):
            layer.crop(-gone)
        assert not launches.waits and same(there, here)
        launches.waits.clear()
        there.append(*on_gpu(*numbers(70)))
        here.append(*numbers(70))
        assert there.get_seq_length() == 370 - gone and same(there, here)
        launches.waits.clear()


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_batches_are_gathered(launches, spec):
    k, v = numbers(200, batch=3)
    for change, waits in ((lambda x, move: x.reorder_cache(*move(torch.tensor([2, 2, 0]))), False),
                          (lambda x, move: x.reorder_cache(torch.tensor([0, 2, 1], dtype=torch.int32)), False),
                          (lambda x, move: x.batch_repeat_interleave(2), False),
                          (lambda x, move: x.batch_select_indices(*move(torch.tensor([1, -1]))), False),
                          (lambda x, move: x.batch_select_indices(*move(torch.tensor([True, False, True]))), True)):
        there, here = pair(spec, k, v)
        change(there, on_gpu)
        assert bool(launches.waits) == waits
        change(here, lambda *x: x)
        assert same(there, here)
        there.append(*on_gpu(*numbers(70, batch=there.batch)))
        here.append(*numbers(70, batch=here.batch))
        assert same(there, here)
        launches.waits.clear()
    before = there.tensors()
    there.reorder_cache(torch.arange(there.batch))
    assert all(a is b for a, b in zip(before, there.tensors(), strict=True))


def test_a_budget_shrinks_pages_where_they_are(launches):
    """16 to 8 bits by the kernel, 8 to 4 and 4 to 2 by operations of torch."""
    for dim in (32, 80):
        key, value = page_formats(KVSpec(8, 8, group=32), dim, "layer")
        spec = KVSpec(16, 16, group=32, residual=0, budget=3 * 6 * (key.page_bytes + value.page_bytes))
        there, here, held = MxqCacheLayer(spec), MxqCacheLayer(spec), []
        for i in range(9):
            states = numbers(64, dim=dim, seed=i)
            there.append(*on_gpu(*states))
            here.append(*states)
            held.append(there.pages.key.bits)
        assert not launches.waits and set(held) == {16, 8, 4, 2} and same(there, here)
        assert there.nbytes() == cache_nbytes(spec, 9 * 64, heads=3, head_dim=dim, batch=2, float_bytes=4)
        launches.waits.clear()


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_bytes_are_as_predicted(launches, spec):
    for tokens in (1, 64, 200, 331):
        there, here = pair(spec, *numbers(tokens, batch=1, heads=2, dim=80, dtype=torch.float16))
        assert there.nbytes() == sum(t.untyped_storage().nbytes() for t in there.tensors()) == cache_nbytes(spec, tokens, heads=2, head_dim=80)
    there.reset()
    assert there.nbytes() == 0 and there.tensors() == []


def test_tables_grow_and_copies_stand_by_themselves(launches):
    k, v = numbers(64 * 21, batch=1, heads=1)
    there, here = pair(KVSpec(4, 4, residual=0), k, v)
    other = copy.deepcopy(there)
    for t in there.tensors():
        t.fill_(7)
    assert len(other.pages) == 21 and same(other, here)
    q, outs = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1)), []
    for layer, move in ((other, on_gpu), (here, lambda *x: x)):
        layer.update(*move(k[:, :, :1], v[:, :, :1]))
        outs.append(layer.attend(*move(q), scale=1.0, mask=None, causal=True, window=0, softcap=0.0).cpu())
    torch.testing.assert_close(*outs, **CLOSE)


def test_a_layer_that_was_on_the_gpu_is_read_elsewhere(launches):
    """As torch.load makes it with map_location: all tensors are somewhere else, and everything around them is as it was saved."""
    for tokens in (5, 200):
        there, here = pair(KVSpec(4, 4, residual=0, sink=2), *numbers(tokens))
        make, (*formats, held, place) = there.pages.__reduce__()
        state = {name: tuple(t.cpu() for t in getattr(there, name)) for name in ("sink", "tail")}
        moved = MxqCacheLayer.__new__(MxqCacheLayer)
        moved.__setstate__(vars(there) | state | {"pages": make(*formats, [[t.cpu() for t in page] for page in held], place.cpu())})
        assert moved.device == moved.pages.device == torch.device("cpu") and not isinstance(moved.pages, CudaPages)
        for layer in (moved, here):
            layer.append(*numbers(100, seed=1))
        assert len(moved.pages) == len(here.pages) > 0 and all(torch.equal(a, b) for p, q in zip(pages(moved), pages(here), strict=True)
                                                               for a, b in zip(p, q, strict=True))
    there, here = pair(KVSpec(4, 4, residual=0), *numbers(5))  # nothing of it is in pages, so that it may go the other way
    moved.__setstate__(vars(here) | {name: getattr(there, name) for name in ("sink", "tail")})
    moved.append(*on_gpu(*numbers(100, seed=1)))
    here.append(*numbers(100, seed=1))
    assert same(moved, here)
    make, (*formats, held, rope, mix) = here.pages.__reduce__()
    with pytest.raises(ShapeError, match='a KV cache that was saved on the CPU, read for cuda:0: .*; read it with map_location="cpu"'):
        make(*formats, [on_gpu(*page) for page in held], rope, mix)


def test_addresses_are_written_before_a_graph_is_captured(launches):
    """And by those who read pages, not by those who ask what would be launched."""
    there, _ = pair(KVSpec(4, 4, residual=0), *numbers(64))
    q, table = torch.randn(2, 6, 1, 32, device="cuda"), there.pages
    assert kv_cuda.explain(q, table)[0] and table._noted == 0
    launches.capturing = True
    with pytest.raises(ShapeError, match=r"attention over 1 pages in a CUDA graph: 1 of them are new, .*; call note\(\) before the capture"):
        kv_cuda.attend(q, table)
    launches.capturing = False
    table.note()
    launches.capturing = True
    out = kv_cuda.attend(q, table)
    assert launches[-1] == gpu.STREAM and not launches.waits and out.isfinite().all()


def test_inference_mode_may_begin_a_cache(launches):
    k, v = on_gpu(*numbers(500))
    q = torch.randn(2, 6, 1, 32, device="cuda")
    with torch.inference_mode():
        layer = MxqCacheLayer(KVSpec(residual=0))
        layer.append(k[:, :, :100], v[:, :, :100])
        layer.update(k[:, :, 100:101], v[:, :, 100:101])
        layer.attend(q, scale=1.0, mask=None, causal=True, window=0, softcap=0.0)
    layer.append(k[:, :, 101:], v[:, :, 101:])
    layer.update(k[:, :, :1], v[:, :, :1])
    assert layer.attend(q, scale=1.0, mask=None, causal=True, window=0, softcap=0.0).isfinite().all()


# -- on a real device -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available() or isinstance(_native.cuda, _native.Missing), reason="needs a GPU and the CUDA module")
@pytest.mark.parametrize("beside", (False, True), ids=("current stream", "side stream"))
@pytest.mark.parametrize("spec", [*SPECS, KVSpec(8, 8, residual=10, budget=60000)], ids=str)
def test_on_a_device(spec, beside):
    """A prompt, single tokens, a crop into a page, other beams and more tokens: what the CPU keeps, and no call that waits."""
    (k, v), q = numbers(300), torch.randn(2, 6, 300, 32, generator=torch.Generator().manual_seed(1))
    with torch.cuda.stream(torch.cuda.Stream() if beside else torch.cuda.current_stream()):
        layers = there, here = pair(spec, k[:, :, :130], v[:, :, :130])
        states = on_gpu(k, v, q), (k, v, q)
        outs = [[], []]
        for i, guard in enumerate((cuda_tools.nothing_waits, contextlib.nullcontext)):
            with guard():
                for n in range(130, 300):
                    new, options = [x[:, :, n : n + 1] for x in states[i]], {"scale": 0.2, "mask": None, "causal": True, "window": 0, "softcap": 0.0}
                    layers[i].update(*new[:2])
                    outs[i].append(layers[i].attend(new[2], **options))
        torch.testing.assert_close(torch.cat(outs[0], 1).cpu(), torch.cat(outs[1], 1), **CLOSE | ({"atol": 1e-2} if spec.rotate else {}))
        assert same(there, here)
        for i, guard in enumerate((cuda_tools.nothing_waits, contextlib.nullcontext)):
            with guard():
                layers[i].crop(-150)
                layers[i].reorder_cache(torch.tensor([1, 1]))
                layers[i].append(*states[i][:2])
        assert there.get_seq_length() == 450 and same(there, here)


# -- models -----------------------------------------------------------------------------------------------------------------------


SPEC = KVSpec(4, 4, residual=10)


@pytest.fixture(params=["llama", "qwen2", "mistral", "gemma2"])
def models(request, launches):
    """A model with packed pages on the CPU, and its copy on the GPU. Windows, where there are any, are shorter than the texts."""
    here = replace_attention(build(request.param), SPEC)
    return copy.deepcopy(here).to("cuda"), here


def generated(model, inputs, **options):
    moved = {name: x.to(model.device) for name, x in inputs.items()}
    return model.generate(**moved, do_sample=False, **options).cpu()


def test_text_is_the_same(models, launches):
    there, here = models
    for inputs, options in (({"input_ids": prompt()}, {"max_new_tokens": 100}), (padded(), {"max_new_tokens": 30}),
                            (padded(2), {"max_new_tokens": 25, "num_beams": 3, "num_return_sequences": 2})):
        want = generated(here, inputs, **options)
        assert torch.equal(generated(there, inputs, **options), want) and len(set(want[0, -99:].tolist())) > 5
    assert {"kv_pack", "kv_attend"} == set(launches.names)


def test_logits_are_the_same_in_pieces(models):
    """A left-padded batch, then a crop and another continuation."""
    batch, caches = padded(2, 230), [MxqCache(m.config, SPEC) for m in models]
    rows, start = batch["attention_mask"].bool(), 0
    positions = (rows.cumsum(1) - 1).clamp(min=0)

    def close(start, n):
        have, want = (m(*(x.to(m.device) for x in (batch["input_ids"][:, start : start + n], batch["attention_mask"][:, : start + n],
                                                   positions[:, start : start + n])), **using(c)).logits.cpu()[rows[:, start : start + n]]
                      for m, c in zip(models, caches, strict=True))
        assert (have - want).norm() < 1e-4 * want.norm()

    for n in (70, 1, 3, 100, 1, 55):
        close(start, n)
        start += n
    for cache in caches:
        cache.crop(-110)
    close(120, 40)
    assert caches[0].nbytes() == caches[1].nbytes() and all(t.device == gpu.DEVICE for layer in caches[0].layers for t in layer.tensors())


@pytest.fixture
def llama(launches):
    here = replace_attention(build("llama"), SPEC)
    return copy.deepcopy(here).to("cuda"), here


def test_a_token_waits_for_nothing(models, launches):
    """Neither with a mask of padding nor without one; a prompt waits once at most, to see whether its mask hides anything."""
    model, batch = models[0], {n: x.to("cuda") for n, x in padded(2, 120).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, more = MxqCache(model.config, SPEC), torch.ones(2, 1, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        launches.waits.clear()  # the model and its inputs were moved
        model(ids, attention_mask=mask, **using(cache))
        assert launches.waits == ["__bool__"] * (model.config.model_type != "mistral")  # whose layers all have windows, so that the mask is dense
        launches.waits.clear()
        for n in range(1, 20):
            model(ids[:, :1], attention_mask=torch.cat([mask, more.expand(2, n)], 1), **using(cache))
        model(ids[:, :1], **using(cache))
    assert not launches.waits and len(cache.layers[0].pages) == 2


def test_layers_that_stay_in_float(launches):
    here = replace_attention(build("mistral"), Plan.for_kv(4, 4, residual=10, layers={0: "keep"}))
    there = copy.deepcopy(here).to("cuda")
    want = generated(here, padded(), max_new_tokens=30)
    assert torch.equal(generated(there, padded(), max_new_tokens=30), want) and "kv_attend" in launches.names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(launches, dtype):
    here = replace_attention(build("llama", dtype), SPEC)
    there, logits = copy.deepcopy(here).to("cuda"), []
    for model in (here, there):
        cache = MxqCache(model.config, SPEC)
        logits.append([model(prompt(2, 250).to(model.device)[:, a:b], **using(cache)).logits.cpu().float() for a, b in ((0, 100), (100, 101), (101, 250))])
        assert all(layer.tail[0].dtype == dtype for layer in cache.layers)
    assert all((b - a).norm() < 0.02 * a.norm() for a, b in zip(*logits, strict=True))


def test_assisted_generation_and_pieces_of_a_prompt(llama):
    inputs = {"input_ids": prompt(1, 100)}
    want = generated(llama[1], inputs, max_new_tokens=40)
    assert torch.equal(generated(llama[0], inputs, max_new_tokens=40, prefill_chunk_size=30), generated(llama[1], inputs, max_new_tokens=40,
                                                                                                        prefill_chunk_size=30))
    assert torch.equal(generated(llama[0], inputs, max_new_tokens=40), want)


def test_masks_of_other_shapes(llama):
    """Dense masks of the caller's, as booleans and as numbers."""
    ids, new = prompt(1, 100), prompt(1, 4, seed=5)
    dense = torch.ones(1, 1, 4, 104, dtype=torch.bool).tril(100)
    dense[..., 3:50] = False
    numbers = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    logits = []
    for model, mask in ((llama[1], dense), (llama[0], dense), (llama[0], numbers)):
        cache = MxqCache(model.config, SPEC)
        model(ids.to(model.device), **using(cache))
        logits.append(model(new.to(model.device), attention_mask=mask.to(model.device), **using(cache)).logits.cpu())
    assert (logits[1] - logits[0]).norm() < 1e-4 * logits[0].norm() and torch.equal(logits[1], logits[2])


def test_the_mask_lies_where_the_model_computes(launches):
    """As transformers asks for it now, and as 5.0 did, which said positions and no device."""
    causal, padding = masking_utils.causal_mask_function, torch.ones(2, 9, dtype=torch.bool, device="cuda")
    launches.waits.clear()
    one = kv_attention.mask(2, 9, mask_function=causal, attention_mask=padding, cache_position=torch.arange(8, 9, device="cuda"))
    assert one.device == gpu.DEVICE and not launches.waits, "a token of a causal layer waits for nothing"
    now = kv_attention.mask(2, 9, 3, q_offset=6, mask_function=causal, device=gpu.DEVICE)
    then = kv_attention.mask(2, 9, mask_function=causal, attention_mask=padding, cache_position=torch.arange(6, 9, device="cuda"))
    bare = kv_attention.mask(2, 9, 1, q_offset=8, mask_function=causal, attention_mask=padding)
    window = kv_attention.mask(2, 9, 1, q_offset=8, mask_function=masking_utils.sliding_window_causal_mask_function(4), local_size=4, device=gpu.DEVICE)
    for mask in (now, then, bare, window):
        assert mask.device == gpu.DEVICE and tuple(mask.shape) == (2, 9)
    assert [getattr(m, kv_attention._FULL) for m in (now, then, bare, window)] == [True, True, False, True] and getattr(window, kv_attention._WINDOW) == 4
    dense = kv_attention._dense(window, 1)
    assert dense.device == gpu.DEVICE and dense[0, 0, 0].tolist() == [False] * 5 + [True] * 4
    assert kv_attention.mask(2, 9, 1, q_offset=8, mask_function=causal).device == torch.device("cpu")


def test_a_quantized_model_and_its_checkpoint(launches, tmp_path):
    model = mxq.replace_linear(make_model(), Plan(default="w8", kv={"key": 8, "value": 4, "sink": 2}))
    inputs = {"input_ids": prompt(1, 120)}
    want = generated(model, inputs, max_new_tokens=30)
    mxq.save(model, tmp_path / "out")
    loaded = mxq.load(tmp_path / "out").to("cuda")
    have = loaded.generate(inputs["input_ids"].to("cuda"), max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    cache = have.get(CACHE)
    assert torch.equal(have.sequences.cpu(), want) and cache.layers[0].device == gpu.DEVICE and cache.layers[0].spec == KVSpec(8, 4, sink=2)
    assert {"linear", "kv_pack", "run_layers"} <= set(launches.names)
    assert torch.equal(generated(loaded.to("cpu"), inputs, max_new_tokens=30), want)  # between sequences a model may move


# -- refusals ---------------------------------------------------------------------------------------------------------------------


LEVELS = ((-1.0, 0.0, 0.5, 1.0),) * 2
REFUSED = [(KVSpec(pre_rope=True), "keys before the rotary embedding on a GPU: .*; keep the model on the CPU, or choose a cache of keys behind the embedding"),
           (KVSpec(2, 2, levels=LEVELS), "a KV page of 2-bit keys with a codebook on a GPU: the CUDA kernels read uniform grids and float16; keep the model"),
           (KVSpec(outliers=0.01), "a KV page of 4-bit keys with 16 outliers on a GPU: the CUDA kernels read codes alone; keep the model on the CPU"),
           (KVSpec(mixed=Mixed()), "pages in two widths on a GPU: .*; keep the model on the CPU, or choose one pair of bits for all tokens")]


@pytest.mark.parametrize("spec, text", REFUSED, ids=["pre_rope", "levels", "outliers", "mixed"])
def test_what_has_no_kernel_is_refused(launches, spec, text):
    here = replace_attention(build("llama"), spec)
    there = copy.deepcopy(here).to("cuda")
    with pytest.raises(FormatError, match="decoder layer 0: .*" + text):  # at the first use of a model that was moved,
        there(prompt().to("cuda"))
    with pytest.raises(FormatError, match="layer model.layers.0: .*" + text):  # or before, if it is there already
        replace_attention(there, spec)
    assert here(prompt()).logits.isfinite().all()
    key, value = page_formats(KVSpec(2, 2), 32, "layer", gpu.DEVICE)
    assert (key.bits, value.bits) == (2, 2) and not launches


def test_a_device_without_kernels(launches, monkeypatch):
    def refuse(place):
        raise NativeError(f"CUDA kernels on {place}", "the kernels were built for 9.0", "build them for it")

    model, layer = build("llama").to("cuda"), MxqCacheLayer(SPEC)
    with monkeypatch.context() as patch:  # undone before the pretended device is, or that one's functions would come back
        patch.setattr(cuda, "runtime", refuse)
        with pytest.raises(NativeError, match="CUDA kernels on cuda:0: the kernels were built for 9.0"):
            replace_attention(model, SPEC)
        with pytest.raises(NativeError, match="CUDA kernels on cuda:0"):
            layer.append(*on_gpu(*numbers(3)))
    assert layer.get_seq_length() == layer.nbytes() == 0


def test_a_cache_stays_where_it_began(llama):
    there, here = llama
    cache = MxqCache(there.config, SPEC)
    there(prompt().to("cuda"), **using(cache))
    with pytest.raises(ShapeError, match=r"decoder layer 0: .*the cache was begun on cuda:0, they are on cpu; move the model back, or reset the cache"):
        here(prompt(), **using(cache))
    fused = mxq.replace_linear(build("llama"), Plan(default="w8", kv={"key": 4}), fuse="layer")  # nor do native layers read it
    with pytest.warns(mxq.errors.MxqWarning, match="the cache is on cuda:0"), pytest.raises(ShapeError, match="the cache was begun on cuda:0"):
        fused(prompt(), **using(cache))
    cache.reset()
    here(prompt(), **using(cache))
    with pytest.raises(ShapeError, match=r"the cache was begun on cpu, they are on cuda:0"):
        there(prompt().to("cuda"), **using(cache))
    with pytest.raises(ShapeError, match=r"a packed cache is on the CPU or on a GPU, they are on cuda:0 and cpu"):
        MxqCacheLayer(SPEC).append(numbers(3)[0].to("cuda"), numbers(3)[1])


def test_native_layers_leave_a_cache_that_began_again_elsewhere(launches):
    model = mxq.replace_linear(build("llama"), Plan(default="w8", kv={"key": 4}), fuse="layer")
    cache = MxqCache(model.config, model.mxq_kv)
    model(prompt(), **using(cache))
    cache.reset()
    for layer in cache.layers:
        layer.append(*on_gpu(*numbers(20, batch=1, heads=2, dim=16)))
    with pytest.warns(mxq.errors.MxqWarning, match="the cache is on cuda:0"), pytest.raises(ShapeError, match="the cache was begun on cuda:0"):
        model(prompt(), **using(cache))


def test_a_model_on_two_devices_is_refused(launches):
    model = build("llama")
    model.lm_head.to("cuda")
    with pytest.raises(ModelError, match="pages and masks of a model are on the CPU or on one GPU, its parameters are on cpu and cuda:0; move the model"):
        replace_attention(model, SPEC)

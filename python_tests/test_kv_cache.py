"""MxqCacheLayer and MxqCache by themselves: what is kept where, in how many bytes, and what cropping and reordering leave."""

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch
from conftest import make_model
from torch.profiler import ProfilerActivity, profile

from mxq_ext import _native
from mxq_ext.errors import FormatError, ModelError, NativeError, PlanError, ShapeError
from mxq_ext.kv import ops
from mxq_ext.kv import reference as numpy_pages
from mxq_ext.kv.cache import MARK, MxqCache, MxqCacheLayer, cache_nbytes, page_formats, rotated
from mxq_ext.kv.shrink import shrink_codes, shrink_page, shrunk
from mxq_ext.plan import KVPlan, KVSpec, Plan

SPECS = [KVSpec(4, 2, residual=0), KVSpec(3, 8, group=32, residual=32, sink=5), KVSpec(2, 3, residual=100), KVSpec(16, 4, sink=70, rotate=True),
         KVSpec(16, 16, residual=10), KVSpec(3, 2, residual=0, sink=3, outliers=0.02), KVSpec(4, 16, residual=20, rotate=True, outliers=0.01)]


def numbers(tokens, batch=2, heads=3, dim=32, dtype=torch.float32, seed=0):
    """Keys and values [batch, heads, tokens, dim] that float16 holds exactly, in the strides that models give them."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, dim, generator=g).half().to(dtype).transpose(1, 2) for _ in range(2)]


def filled(spec, *states, name="layer"):
    layer = MxqCacheLayer(spec, name)
    layer.append(*states)
    return layer


def pages(layer):
    return [layer.pages[i] for i in range(len(layer.pages))]


def contents(layer):
    """Keys and values [B, Hkv, tokens, D] as the layer keeps them."""
    out = []
    for side, fmt in enumerate((layer.pages.key, layer.pages.value)):
        unpacked = [ops.unpack_page(p[2 * side], p[2 * side + 1], fmt, layer.batch, layer.dtype) for p in pages(layer)]
        out.append(torch.cat([layer.sink[side][:, :, : layer.sink_tokens], *unpacked, layer.tail[side][:, :, : layer.tail_tokens]], 2))
    return out


def same(a, b):
    """Whether two layers keep the same, bit for bit; but for a code here and there if rotated, for a product rounds as its shape makes it."""
    if a.spec.rotate:
        return all(((x - y).abs() > 1e-5).float().mean() < 1e-3 for x, y in zip(contents(a), contents(b), strict=True))
    parts = [[*(t for p in pages(x) for t in p), *(t[:, :, : x.sink_tokens] for t in x.sink), *(t[:, :, : x.tail_tokens] for t in x.tail)] for x in (a, b)]
    return len(parts[0]) == len(parts[1]) and all(torch.equal(s, t) for s, t in zip(*parts, strict=True))


# -- appending --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_how_tokens_come_does_not_matter(spec):
    k, v = numbers(300)
    whole = filled(spec, k, v)
    assert whole.get_seq_length() == 300 and whole.sink_tokens == spec.sink and spec.residual <= whole.tail_tokens < spec.residual + 64
    for sizes in ([1] * 300, [7] * 43, [200, 1, 99], [63, 65, 172]):
        other, start = MxqCacheLayer(spec), 0
        for n in sizes:
            other.append(k[:, :, start : start + n], v[:, :, start : start + n])
            start += n
            assert other.get_seq_length() == min(start, 300)
        assert same(whole, other)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sink_and_newest_tokens_are_exact_and_pages_are_close(spec):
    k, v = numbers(300)
    layer = filled(spec, k, v)
    exact = spec.sink + 64 * len(layer.pages)
    for have, want, bits in zip(contents(layer), (k, v), (spec.key, spec.value), strict=True):
        if spec.rotate:
            error = (have.norm() / want.norm() - 1).abs()
            assert error < 2.0**-bits and not torch.equal(have, want)
            continue
        assert torch.equal(have[:, :, : spec.sink], want[:, :, : spec.sink]) and torch.equal(have[:, :, exact:], want[:, :, exact:])
        assert (have - want).abs().max() <= (0 if bits == 16 else 8 / (2**bits - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tail_has_the_models_dtype(dtype):
    k, v = numbers(150, dtype=dtype)
    layer = filled(KVSpec(8, 8), k, v)
    assert layer.tail[0].dtype == layer.dtype == dtype and len(layer.pages) == 1
    assert torch.equal(contents(layer)[0][:, :, 64:], k[:, :, 64:])


def test_what_update_hands_out_is_marked_and_must_be_read():
    k, v = numbers(5)
    layer = MxqCacheLayer(KVSpec(), "decoder layer 3")
    keys, values = layer.update(k, v, 0, cache_kwargs=None)
    assert torch.equal(keys, k) and values is v and getattr(keys, MARK) is layer and not hasattr(k, MARK)
    assert layer.get_seq_length() == 5
    for call in (lambda: layer.update(k, v), lambda: layer.crop(-1), lambda: layer.reorder_cache(torch.tensor([1, 0])), lambda: layer.append(k, v)):
        with pytest.raises(ModelError, match=r"decoder layer 3 of a model with an MxqCache: its attention did not read the packed cache.*replace_attention"):
            call()
    layer.store()
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0) == layer.get_mask_sizes(torch.arange(3))
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    layer.update(k, v)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes() == 0


def test_values_without_gradient_are_kept():
    k, v = (x.requires_grad_() for x in numbers(200))
    layer = MxqCacheLayer(KVSpec())
    keys, _ = layer.update(k, v)
    assert keys.requires_grad
    layer.store()
    assert not any(t.requires_grad for t in layer.tensors())


def test_inference_mode_may_begin_a_cache():
    k, v = numbers(100)
    with torch.inference_mode():
        layer = filled(KVSpec(), k, v)
        layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.append(k, v)
    assert same(layer, filled(KVSpec(), *(torch.cat([x, x], 2) for x in (k, v))))


# -- attention --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_many_queries_at_once_are_many_single_ones(spec):
    (k, v), g = numbers(330), torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 330, 32, generator=g)
    padding = torch.ones(2, 330, dtype=torch.bool)
    padding[1, :9] = False
    layers, outs = [], []
    for step in (1, 50, 300):
        layer, out = filled(spec, k[:, :, :30], v[:, :, :30]), []
        for i in range(30, 330, step):
            layer.update(k[:, :, i : i + step], v[:, :, i : i + step])
            out.append(layer.attend(q[:, :, i : i + step], scale=0.2, mask=padding[:, : i + step], causal=True, window=0, softcap=0.0))
        layers.append(layer)
        outs.append(torch.cat(out, 1))
    assert outs[0].shape == (2, 300, 6, 32)
    for layer, out in zip(layers[1:], outs[1:], strict=True):
        assert same(layers[0], layer)
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-2 if spec.rotate else 1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attention_is_that_over_the_contents(spec):
    k, v = numbers(250)
    layer = filled(spec, k[:, :, :-1], v[:, :, :-1])
    q = torch.randn(2, 6, 1, 32, generator=torch.Generator().manual_seed(1))
    layer.update(k[:, :, -1:], v[:, :, -1:])
    before = filled(spec, k[:, :, :-1], v[:, :, :-1])
    kept = [torch.cat([old, (x[:, :, -1:] if not spec.rotate else _hadamard(x[:, :, -1:]))], 2) for old, x in zip(contents(before), (k, v), strict=True)]
    want = torch.nn.functional.scaled_dot_product_attention(_hadamard(q) if spec.rotate else q, *(x.repeat_interleave(2, 1) for x in kept))
    have = layer.attend(q, scale=32**-0.5, mask=None, causal=True, window=0, softcap=0.0)
    torch.testing.assert_close(have.transpose(1, 2), _hadamard(want) if spec.rotate else want, rtol=1e-4, atol=1e-5)


def test_attention_does_not_depend_on_threads():
    k, v = numbers(700)
    q, outs, before = torch.randn(2, 6, 1, 32, generator=torch.Generator().manual_seed(1)), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            layer = filled(KVSpec(3, 4, residual=0, sink=4), k, v)
            layer.update(k[:, :, :1], v[:, :, :1])
            outs.append(layer.attend(q, scale=1.0, mask=None, causal=True, window=0, softcap=0.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotation_is_not_a_matter_of_what_torch_is_told_about_products(dtype):
    x = torch.randn(2, 3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = rotated(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert want.dtype == dtype and torch.equal(rotated(x), want)
    torch.testing.assert_close(want, _hadamard(x.float()).to(dtype))


def _hadamard(x):
    """By the fast transform, unlike the product in the cache."""
    y, step = x.clone(), 1
    while step < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return y * x.shape[-1] ** -0.5


# -- cropping, reordering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 30, 40, 100, 128, 200, 262, 263, 299, 300, 1000])
@pytest.mark.parametrize("spec", [KVSpec(16, 16, residual=10, sink=37), KVSpec(16, 16, residual=0), KVSpec(16, 16, residual=90, sink=2)], ids=str)
def test_crop_leaves_the_first_tokens(spec, gone):
    k, v = numbers(300)
    layer, left = filled(spec, k, v), max(0, 300 - gone)
    layer.crop(-gone)
    assert layer.get_seq_length() == left
    for have, want in zip(contents(layer), (k, v), strict=True):
        assert torch.equal(have, want[:, :, :left])
    layer.append(k[:, :, left:], v[:, :, left:])  # and it goes on as if nothing had been
    for have, want in zip(contents(layer), (k, v), strict=True):
        assert torch.equal(have, want)


def test_crop_to_a_length_as_transformers_5_0_asks():
    layer = filled(KVSpec(16, 16), *numbers(300))
    layer.crop(400)
    assert layer.get_seq_length() == 300
    layer.crop(70)
    assert layer.get_seq_length() == 70 and len(layer.pages) == 1 and layer.tail_tokens == 6


def test_crop_keeps_the_stored_form_of_a_page():
    spec = KVSpec(2, 2, residual=0)
    layer = filled(spec, *numbers(130))
    before = contents(layer)
    layer.crop(-20)
    assert len(layer.pages) == 1 and layer.tail_tokens == 46
    for have, want in zip(contents(layer), before, strict=True):
        assert torch.equal(have, want[:, :, :110])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_batches_are_gathered(spec):
    k, v = numbers(200, batch=3)
    for change, index in ((lambda x: x.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
                          (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
                          (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
                          (lambda x: x.batch_select_indices(torch.tensor([True, False, True])), [0, 2])):
        layer = filled(spec, k, v)
        change(layer)
        assert same(layer, filled(spec, k[index], v[index]))
        assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in layer.tensors())
        layer.append(*numbers(70, batch=len(index)))
        assert layer.get_seq_length() == 270
    layer = filled(spec, k, v)
    same_tensors = layer.tensors()
    layer.reorder_cache(torch.arange(3))
    assert all(a is b for a, b in zip(same_tensors, layer.tensors(), strict=True))  # nothing to do, nothing done


def test_an_empty_layer_can_be_reordered():
    layer = MxqCacheLayer(KVSpec())
    layer.reorder_cache(torch.tensor([0, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.crop(-3)
    assert layer.get_seq_length() == layer.nbytes() == 0 and layer.tensors() == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_stands_by_itself(copied):
    k, v = numbers(200)
    layer = filled(KVSpec(4, 4), k, v)
    other, want = copied(layer), filled(KVSpec(4, 4), k, v)
    for t in layer.tensors():
        t.fill_(7)
    del layer
    assert same(other, want)
    q, outs = torch.randn(2, 3, 1, 32, generator=torch.Generator().manual_seed(1)), []
    for x in (other, want):
        x.update(k[:, :, :1], v[:, :, :1])
        outs.append(x.attend(q, scale=1.0, mask=None, causal=True, window=0, softcap=0.0))
    assert torch.equal(*outs)


# -- memory -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("spec", SPECS[:3] + SPECS[4:6], ids=str)
def test_bytes_are_those_of_the_tensors_and_as_predicted(spec, dim, dtype):
    for tokens in (1, 63, 64, 128, 200, 331):
        layer = filled(spec, *numbers(tokens, batch=1, heads=2, dim=dim, dtype=dtype))
        assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in layer.tensors())
        assert layer.nbytes() == cache_nbytes(spec, tokens, heads=2, head_dim=dim, float_bytes=dtype.itemsize)


def test_two_bits_of_4096_tokens_are_a_fifth_of_fp16():
    layer = filled(KVSpec(2, 2), *numbers(4096, batch=1, heads=1, dim=64, dtype=torch.float16))
    assert layer.nbytes() <= 0.2 * (2 * 4096 * 64 * 2)


def peak(call):
    """Bytes allocated by torch while ``call`` ran, at most at once, and at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    now = most = 0
    for event in sorted((e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


@pytest.mark.parametrize("tokens", [1, 64, 200])
@pytest.mark.parametrize("spec", [KVSpec(2, 2), KVSpec(4, 8, sink=4)], ids=str)
def test_appending_never_needs_more_than_a_page_beyond_what_stays(spec, tokens):
    k, v = numbers(500, batch=1, heads=4, dim=128, dtype=torch.bfloat16)
    layer = filled(spec, k[:, :, :60], v[:, :, :60])
    page = layer.heads * (layer.pages.key.page_bytes + layer.pages.value.page_bytes)
    for start in range(60, 500 - tokens, tokens):
        before = layer.nbytes()
        most, now = peak(lambda i=start: layer.append(k[:, :, i : i + tokens], v[:, :, i : i + tokens]))
        grown = layer.nbytes() - before
        assert grown <= now <= grown + 4096  # a page's address is noted, too
        assert most <= grown + page + 4096


def test_reordering_gives_old_pages_back_as_new_ones_come(monkeypatch):
    layer = filled(KVSpec(4, 4), *numbers(1000))
    old, alive, append = [weakref.ref(p[0]) for p in pages(layer)], [], ops.PageTable.append
    monkeypatch.setattr(ops.PageTable, "append", lambda *args: (append(*args), alive.append(sum(r() is not None for r in old))))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert len(alive) == len(old) == 14 and all(left <= len(old) - i for i, left in enumerate(alive))


# -- the cache, refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config():
    return make_model().config


def test_one_layer_for_each_of_the_model(config):
    plan = Plan.for_kv(key=4, value=2, layers={1: {"key": 8, "value": 8, "sink": 3}})
    for cache in (MxqCache(config, plan), MxqCache(config, plan.kv), MxqCache(config, plan.kv.to_json())):
        assert [x.spec.name for x in cache.layers] == ["k4v2g64", "k8v8g64_s3"] and cache.is_sliding == [False, False]
        assert not cache.is_compileable and all(layer.is_croppable for layer in cache.layers)
    assert [x.spec for x in MxqCache(config, KVSpec(3, 3)).layers] == [KVSpec(3, 3)] * 2
    cache = MxqCache(config, Plan.for_kv(layers={0: "keep"}))
    assert [type(x).__name__ for x in cache.layers] == ["DynamicLayer", "MxqCacheLayer"]
    k, v = numbers(100, batch=1, dim=16)
    cache.update(k, v, 0)
    cache.layers[1].append(k, v)
    assert cache.nbytes() == k.nbytes + v.nbytes + cache.layers[1].nbytes() and cache.get_seq_length() == 100
    assert "k4v4g64, 100 tokens" in repr(cache)
    cache.crop(-10)
    assert cache.get_seq_length(1) == 90
    cache.reset()
    assert cache.nbytes() == 0


def test_refusals(config):
    with pytest.raises(PlanError, match="a quantized KV cache: the plan has no KV section; make one, for example with Plan.for_kv"):
        MxqCache(config, Plan.uniform("w4g64"))
    with pytest.raises(PlanError, match="kv: layer 2: the model has the layers 0 to 1"):
        MxqCache(config, Plan.for_kv(layers={2: "keep"}))
    k, v = numbers(4, dim=24)
    with pytest.raises(FormatError, match="layer 0: a KV page of 4-bit keys.*multiple of 16"):
        MxqCacheLayer(KVSpec(), "layer 0").append(k, v)
    k, v = numbers(4, dim=80)
    with pytest.raises(FormatError, match="rotated keys and values of head dimension 80: a Hadamard matrix needs a power of two"):
        MxqCacheLayer(KVSpec(rotate=True)).append(k, v)
    layer = filled(KVSpec(), *numbers(4), name="layer 7")
    with pytest.raises(ShapeError, match=r"layer 7: keys .*the cache was begun with batch 2, 3 heads of dimension 32 in float32, these have batch 1, .*reset"):
        layer.append(*numbers(4, batch=1))
    with pytest.raises(ShapeError, match="both of one shape"):
        layer.append(numbers(4)[0], numbers(5)[0])
    with pytest.raises(ShapeError, match="a packed cache is on the CPU or on a GPU, they are on meta; move the model"):
        layer.append(*(x.to("meta") for x in numbers(4)))
    with pytest.raises(ModelError, match="a packed cache stays where attention reads it"):
        layer.offload()


def test_outliers_on_a_gpu_are_refused():
    for spec, side in ((KVSpec(4, 16, outliers=0.01), "keys"), (KVSpec(16, 2, outliers=0.01), "values")):
        rule = "the CUDA kernels read codes alone; keep the model on the CPU, or choose a cache without outliers"
        with pytest.raises(FormatError, match=f"layer 5: a KV page of .-bit {side} with 48 outliers on a GPU: {rule}"):
            page_formats(spec, 64, "layer 5", torch.device("cuda"))
    assert [f.outliers for f in page_formats(KVSpec(4, 16, outliers=0.01), 64, "layer")] == [48, 0]


def test_without_kernels_there_is_no_cache(config, monkeypatch):
    monkeypatch.setattr(_native, "cpu", _native.Missing(ModuleNotFoundError("no _cpu")))
    with pytest.raises(NativeError, match="was not built"):
        MxqCache(config, KVSpec())
    monkeypatch.setattr(_native, "cpu", object())
    with pytest.raises(NativeError, match="a quantized KV cache: the compiled extension has no kernels for it; build it again"):
        MxqCache(config, KVSpec())


# -- the plan's section --------------------------------------------------------------------------------------------------------------


def test_section_of_a_plan(tmp_path):
    assert Plan().kv is None and Plan(kv={"default": None, "layers": {"0": "keep"}}).kv is None
    plan = Plan.for_kv(key=4, value=2, sink=4)
    assert plan.default is None and plan.kv == KVPlan(KVSpec(4, 2, sink=4)) and str(plan.kv) == "k4v2g64_s4"
    assert plan.to_json()["kv"] == {"key": 4, "value": 2, "group": 64, "residual": 64, "sink": 4, "rotate": False}
    mixed = Plan(default="w4g64", kv={"default": {"key": 4}, "layers": {"10": {"key": 4}, "3": "keep", "2": {"value": 8, "rotate": True}}})
    assert list(mixed.kv.layers) == [2, 3] and mixed.kv.spec(10) == KVSpec() and mixed.kv.spec(3) is None
    assert mixed.to_json()["kv"]["layers"]["3"] == "keep" and str(mixed.kv) == "k4v4g64, 2: k4v8g64_rot, 3: keep"
    for p in (plan, mixed, Plan(kv={"default": None, "layers": {"1": {"key": 2}}})):
        p.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == p
    assert mixed.kv.resolve(4) == [KVSpec(), KVSpec(), KVSpec(4, 8, rotate=True), None]


def test_differences_of_two_sections():
    a, b = Plan.for_kv(key=4, value=4, layers={1: "keep"}), Plan.for_kv(key=4, value=2, layers={1: "keep", 2: {"key": 4, "value": 4}})
    assert a.diff(a) == [] and [row[0] for row in a.diff(b)] == ["kv.default"]
    assert a.diff(Plan()) == [("kv.default", KVSpec().to_json(), "keep")]
    assert [row[0] for row in Plan().diff(Plan(kv={"layers": {"3": {}}}))] == ["kv.3"]


@pytest.mark.parametrize(("kv", "text"), [
    ({"k": 4}, "plan: kv: key 'k': a spec has the keys key, value, group, residual, sink, rotate, budget, pre_rope, levels, mixed, heads, "
                 "outliers; write for example"),
    (44, "plan: kv 44: an object with bits of keys and values is expected, found int"),
    ({"key": 5}, "plan: kv: key 5: it must be one of 2, 3, 4, 8, 16; choose"),
    ({"key": True}, "key True"),
    ({"value": 0}, "value 0"),
    ({"group": 48}, "group 48: it must be one of 32, 64, 128"),
    ({"residual": -1}, "residual -1: it is a number of tokens, 0 or more"),
    ({"sink": 1.5}, "sink 1.5"),
    ({"rotate": 1}, "rotate 1: it must be true or false"),
    ({"default": {}, "layer": {}}, "plan: kv: key 'layer': beside default and layers there are no others"),
    ({"default": {}, "layers": []}, "layers \\[\\]: an object of layer -> spec is expected, found list"),
    ({"default": {}, "layers": {"-1": {}}}, "plan: kv: layer '-1': layers are named by their index"),
    ({"default": {}, "layers": {"01": {}}}, "layer '01'"),
    ({"default": {}, "layers": {"1": {"key": 7}}}, "plan: kv: layer 1: key 7: it must be one of"),
    ({"default": {"bits": 4}}, "plan: kv: default: key 'bits'"),
])
def test_sections_that_are_refused(kv, text):
    with pytest.raises(PlanError, match=text):
        Plan.from_json({"mxq_plan": 1, "kv": kv})


# -- a byte budget --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_shrinking_codes_rounds_to_nearest(bits):
    """All codes: the integer formula against rounding the quotient; the ends stay the ends."""
    q, step = torch.arange(2**bits), 2 ** (bits // 2) + 1
    got = shrink_codes(q, bits)
    assert got.tolist() == [int(v / step + 0.5) for v in range(2**bits)] and (got[0], got[-1]) == (0, 2 ** (bits // 2) - 1)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("bits, group, dim", [(8, 32, 80), (4, 32, 80), (8, 64, 64), (4, 64, 128), (16, 64, 80)])
def test_shrunk_pages_hold_the_shrunk_codes(side, bits, group, dim):
    """numpy reads the page before and after; between them lies the formula alone."""
    group = 0 if side == "values" and dim % group else group
    fmt = ops.PageFormat(side, bits, group, dim)
    x = torch.randn(2, 3, 64, dim, generator=torch.Generator().manual_seed(bits)) * 2 + 1
    page = fmt.empty_page(6)
    ops.pack_page(x, fmt, *page)
    codes, params = shrink_page(*page, fmt)
    half = shrunk(fmt)
    assert codes.shape == (6, half.code_bytes) and params.shape == (6, *half.params_shape)
    for h in range(6):
        new = numpy_pages.unpack(codes[h].numpy().tobytes(), params[h].numpy(), half)
        old = numpy_pages.unpack(page[0][h].numpy().tobytes(), page[1][h].numpy(), fmt)
        if bits == 16:
            want_codes, want_params = numpy_pages.pack(old.astype("float32"), half)
            assert codes[h].numpy().tobytes() == want_codes and params[h].numpy().tobytes() == want_params.tobytes()
            continue
        s, z = params[h, :, 0].double().numpy(), params[h, :, 1].double().numpy()
        before = page[1][h].double().numpy()
        where = np.arange(64 if side == "keys" else dim) // (group or dim)
        q = np.rint(((old if side == "keys" else old.T) - before[where, 1]) / before[where, 0])
        want = s[where] * np.floor(q / (2 ** (bits // 2) + 1) + 0.5) + z[where]
        assert np.abs((new if side == "keys" else new.T) - want).max() < 1e-9 * np.abs(want).max()
        assert np.abs(s / before[:, 0] / (2 ** (bits // 2) + 1) - 1).max() < 2**-10 and np.array_equal(z, before[:, 1])
        again, _ = numpy_pages.pack(new.astype("float32"), half)  # padding included
        assert len(again) == codes.shape[1]


def test_a_budget_halves_the_bits_as_often_as_needed():
    batch, heads, dim = 2, 2, 32
    each = {b: batch * heads * sum(ops.PageFormat(side, b, 64 if side == "keys" else 0, dim).page_bytes for side in ops.SIDES) for b in (16, 8, 4, 2)}
    spec = KVSpec(16, 16, residual=0, budget=3 * each[8])
    layer, held = MxqCacheLayer(spec), []
    for i in range(40):
        layer.append(*torch.randn(2, batch, heads, 64, dim))
        bits, pages = layer.pages.key.bits, len(layer.pages)
        held.append(bits)
        assert bits == layer.pages.value.bits and pages == i + 1
        assert layer.pages.nbytes() == pages * each[bits] and (layer.pages.nbytes() <= spec.budget or bits == 2)
        assert layer.nbytes() == sum(t.nbytes for t in layer.tensors()) == cache_nbytes(spec, 64 * pages, heads, dim, batch=batch, float_bytes=4)
    assert held == sorted(held, reverse=True) and set(held) == {16, 8, 4, 2} and held.index(4) == 3
    layer.crop(64 * 3 + 5)
    assert len(layer.pages) == 3 and layer.pages.key.bits == 2
    layer.reset()
    layer.append(*torch.randn(2, batch, heads, 64, dim))
    assert layer.pages.key.bits == 16, "a new sequence begins anew"


def test_budget_of_unequal_sides_and_bad_budgets():
    layer = MxqCacheLayer(KVSpec(8, 2, residual=0, budget=1))
    layer.append(*torch.randn(2, 1, 1, 64, 32))
    assert (layer.pages.key.bits, layer.pages.value.bits) == (2, 2)
    spec = KVSpec(8, 4, budget=12345)
    assert KVSpec.named(spec.name) == spec == KVSpec.parse(spec.to_json()) and "budget" not in KVSpec().to_json()
    for bad in ({"budget": 0}, {"budget": True}, {"key": 3, "budget": 100}):
        with pytest.raises(PlanError, match="kv spec: budget"):
            KVSpec(**bad)
    with pytest.raises(FormatError, match="shrinking 8-bit keys with 16 outliers: what outliers add belongs to the codes as they are; leave outliers out"):
        shrunk(ops.PageFormat("keys", 8, 64, 32, None, 16))

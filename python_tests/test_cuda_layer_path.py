"""Whole-layer decoding on a GPU that is none (pretend_gpu): the text of the modules, by one native call a token, then by a graph of it; and on a real one."""

import contextlib
import copy
import gc
import itertools
import warnings
import weakref

import cuda_tools
import pretend_gpu as gpu
import pytest
import torch
from test_layer_path import CACHE, build, padded, path_of, prompt

import mxq_ext as mxq
from mxq_ext import _native, cuda
from mxq_ext.decoding import greedy
from mxq_ext.errors import MxqWarning, NativeError
from mxq_ext.kv.cache import MxqCache
from mxq_ext.nn import fuse_layers, fused_cuda, fused_graph, set_compute
from mxq_ext.plan import KVSpec, Plan

SPEC = KVSpec(4, 2, residual=0)  # pages from the first tokens on


@pytest.fixture
def launches(monkeypatch, new_parameters):
    with gpu.pretend_gpu(monkeypatch) as launched:
        yield launched


def moved(x):
    return x.pin_memory().to("cuda", non_blocking=True)


def model_on_gpu(family="llama_gqa", kv=SPEC, **options):
    return build(family, kv=kv, **options).to("cuda")


def both(f, family="llama", kv=SPEC, **options):
    """(f(model) through its modules on the CPU, f(model) through native code on the GPU, the model there)."""
    here = build(family, kv=kv, **options)
    there = fuse_layers(copy.deepcopy(here).to("cuda"), "layer")
    return f(here), f(there), there


def generated(model, inputs, **options):
    place = moved if model.device.type == "cuda" else lambda x: x
    return model.generate(**{n: place(x) for n, x in inputs.items()}, do_sample=False, **options).cpu()


CROPPED = KVSpec(16, 16, residual=30, sink=3)


def fallbacks(model):
    return dict(path_of(model).fallbacks)


# -- the same text ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, spec, tokens", [
    ("llama", SPEC, 135), ("qwen2_window", KVSpec(8, 8, residual=10), 80), ("qwen3", KVSpec(16, 16, group=32, residual=0, sink=5), 80),
    ("mistral_window", KVSpec(8, 4, residual=10, sink=3), 80)], ids=str)
def test_text_is_that_of_the_modules(launches, family, spec, tokens):
    """Over the ends of pages; only the prompt goes through the modules, and nearly all others are replayed."""
    want, have, model = both(lambda m: generated(m, {"input_ids": prompt()}, max_new_tokens=tokens), family, spec)
    assert torch.equal(have, want) and len(set(want[0, 20:].tolist())) > 5
    assert path_of(model).native == tokens - 1 and fallbacks(model) == {fused_cuda.PROMPT: 1}
    assert launches.captures == 1 and launches.replays == tokens - 1 - fused_graph.STEADY and set(launches) == {gpu.STREAM}


@pytest.mark.parametrize("family, tokens", [("llama", 135), ("qwen3", 60), ("mistral_window", 60), ("dynamic_rope", 30)])
def test_a_left_padded_batch(launches, family, tokens):
    want, have, model = both(lambda m: generated(m, padded(), max_new_tokens=tokens), family)
    assert torch.equal(have, want)
    assert path_of(model).native == tokens - 1 and fallbacks(model) == {fused_cuda.PROMPT: 1} and launches.replays == tokens - 1 - fused_graph.STEADY


def test_a_bare_loop_waits_for_nothing(launches):
    """Neither mask nor positions: cos and sin come from a table, which grows; between two tokens there is nothing but native launches, embedding and head."""
    steps = []

    def run(m):
        tokens, out = greedy(m, prompt(1, 127) if m.device.type == "cpu" else moved(prompt(1, 127))), []
        for _ in range(145):
            out.append(next(tokens))
            steps.append((list(launches.names), list(launches.waits)))
            launches.names.clear()
            launches.waits.clear()
        return torch.stack(out).cpu()

    want, have, model = both(run)
    assert torch.equal(have, want) and path_of(model).native == 144
    once, again, packing = ("embedding", "run_layers"), ("embedding", "replay"), ("kv_pack",) * 4  # of both sides of two layers
    assert {(*names, *waits) for names, waits in steps[-143:]} == {once, again, again + packing}
    assert launches.captures == 2, "one graph, and one for a longer table"


def test_beams_move_the_cache_and_are_not_captured(launches):
    want, have, model = both(lambda m: generated(m, padded(), num_beams=3, max_new_tokens=30, num_return_sequences=2), kv=KVSpec(8, 4, residual=20))
    assert torch.equal(have, want) and path_of(model).native == 29 and launches.captures == 0


def test_assisted_generation_crops(launches):
    want, have, model = both(lambda m: generated(m, {"input_ids": prompt(1, 60)}, max_new_tokens=30, prompt_lookup_num_tokens=3))
    assert torch.equal(have, want) and set(fallbacks(model)) == {fused_cuda.PROMPT}


@torch.no_grad()
@pytest.mark.parametrize("family, spec", [("llama", CROPPED), ("mistral_window", CROPPED), ("llama", KVSpec(16, 16, residual=0, budget=20000))], ids=str)
def test_logits_after_crops_reorderings_and_smaller_pages(launches, family, spec):
    """What moves the cache between two tokens: the tail, a page, other sequences, a prompt in between, and pages that are halved on the way."""
    def run(m):
        out, cache, ids = [], MxqCache(m.config, m.mxq_kv), everywhere[m.device.type]

        def feed(start, stop, step=1, rows=None):
            part = ids if rows is None else ids[rows]
            for i in range(start, stop, step):
                out.append(m(part[:, i : i + step], use_cache=True, **{CACHE: cache}).logits[:, -1].cpu())

        feed(0, 100, 100)
        feed(100, 130)
        cache.crop(-9)
        feed(60, 75)
        cache.crop(-80)
        feed(10, 30)
        feed(40, 110, 35)
        cache.batch_repeat_interleave(2)
        feed(30, 45, rows=[0, 0, 1, 1])
        cache.batch_select_indices(torch.tensor([3, 0]))
        feed(60, 90)
        return torch.cat(out), [len(x.pages) for x in cache.layers], cache.layers[0].pages.key.bits, cache.nbytes()

    everywhere = {"cpu": prompt(2, 130), "cuda": moved(prompt(2, 130))}
    (want, *counts), (have, *others), model = both(run, family, spec)
    assert (have - want).norm() < 1e-3 * want.norm() and counts == others
    assert path_of(model).native > 100 and launches.captures > 2 and set(fallbacks(model)) == {fused_cuda.PROMPT}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_rounds_where_the_modules_do(launches, family, dtype):
    def run(m):
        cache = MxqCache(m.config, m.mxq_kv)
        return torch.cat([m(ids[:, i : i + 1].to(m.device), use_cache=True, **{CACHE: cache}).logits.cpu() for i in range(20)], 1)

    ids, spec = prompt(3, 20), KVSpec(16, 16, residual=0)
    exact = run(build(family, kv=spec))
    model = model_on_gpu(family, spec, dtype=dtype)
    want, have = run(fuse_layers(model, None)), run(fuse_layers(model, "layer"))
    assert path_of(model).native == 19
    noise, difference = (want - exact).norm() / exact.norm(), (have - want).float().norm() / exact.norm()
    assert have.dtype == dtype and 0 < noise and difference < noise / 3, f"difference {difference:.2e}, rounding {noise:.2e}"


@torch.no_grad()
def test_every_schedule_gives_the_same_bits(monkeypatch, new_parameters):
    """Whatever order threads run in, and where launches may be early."""
    ids, logits = prompt(2, 4), []
    for capability, schedule in ((80, {}), (80, {"seed": 3, "workers": 2}), (80, {"seed": 7, "lazy": False}), (90, {"seed": 2})):
        with gpu.pretend_gpu(monkeypatch, capability, **schedule):
            model = fuse_layers(model_on_gpu("qwen3", KVSpec(4, 4, residual=0), dtype=torch.float16), "layer")
            cache = MxqCache(model.config, model.mxq_kv)
            logits.append(torch.cat([model(moved(ids[:, i : i + 1]), use_cache=True, **{CACHE: cache}).logits.cpu() for i in range(4)]))
            assert path_of(model).native == 3
    assert all(torch.equal(x, logits[0]) for x in logits[:3]) and (logits[3] - logits[0]).norm() < 1e-2 * logits[0].norm()


# -- what a graph needs -------------------------------------------------------------------------------------------------------------


def test_the_same_call_serves_one_token_after_the_other(launches, monkeypatch):
    """Counts, positions, mask and x are in device memory: what the host says changes when the table's room does, at 8 pages of each head, and no other time."""
    monkeypatch.setenv("MXQ_CUDA_GRAPH", "0")
    model = model_on_gpu("llama", KVSpec(4, 4, residual=0))
    fuse_layers(model, "layer")
    for inputs, tokens in (({"input_ids": prompt()}, 60), (padded(2, 40), 40)):  # over the end of a page
        generated(model, inputs, max_new_tokens=tokens)
        assert launches.captures == 0 and len(launches.calls) == tokens - 1 and len(set(launches.calls)) == 1
        launches.calls.clear()
    generated(model, {"input_ids": prompt(1, 64 * 8 + 50)}, max_new_tokens=20)  # the ninth page comes on the way
    assert len(launches.calls) == 19 and len(set(launches.calls)) == 2 and launches.calls[12] == launches.calls[0] != launches.calls[14]


def test_a_graph_is_captured_when_calls_are_steady(launches):
    model = model_on_gpu("llama")
    fuse_layers(model, "layer")
    tokens = greedy(model, moved(prompt()))
    for i in range(1, 30):
        next(tokens)
        assert (launches.captures, launches.replays) == ((0, 0) if i < 2 + fused_graph.STEADY else (1, i - 1 - fused_graph.STEADY))
    rows = path_of(model).rows[1]
    path_of(model).rows[0]().crop(-5)  # of the tail: the graph serves on
    next(tokens)
    assert rows is path_of(model).rows[1] and launches.captures == 1
    model.model.layers[0].input_layernorm.weight = torch.nn.Parameter(moved(torch.ones(72)), requires_grad=False)
    before = launches.replays
    next(tokens)
    assert rows is not path_of(model).rows[1] and launches.replays == before, "other weights, other rows"


def test_changes_of_the_model_reach_native_code(launches):
    """While a graph of the old weights is there."""
    everywhere = {"cpu": prompt(2, 30), "cuda": moved(prompt(2, 30))}

    def replaced(m):
        m.model.layers[1].mlp.up_proj = copy.deepcopy(m.model.layers[0].mlp.up_proj)

    @torch.no_grad()
    def run(m, change):
        cache, out = MxqCache(m.config, m.mxq_kv), []
        for i in range(30):
            if i == 15:
                change(m)
            out.append(m(everywhere[m.device.type][:, i : i + 1], use_cache=True, **{CACHE: cache}).logits.cpu())
        return torch.cat(out, 1)

    for change in (replaced, lambda m: m.model.layers[0].input_layernorm.weight.mul_(3)):
        want, have, model = both(lambda m, c=change: run(m, c))
        assert (have - want).norm() < 1e-3 * want.norm() and path_of(model).native == 29 and launches.captures
        launches.captures = 0


def test_a_cache_that_is_gone_takes_its_memory_along(launches):
    model = model_on_gpu("llama")
    fuse_layers(model, "layer")
    out = model(moved(prompt()), use_cache=True)
    out = model(moved(prompt(1, 1)), use_cache=True, **{CACHE: out[CACHE]})
    layer = weakref.ref(out[CACHE].layers[0])
    assert path_of(model).rows is not None and path_of(model).native == 1
    gc.disable()
    try:
        del out
        assert layer() is None and path_of(model).rows is None
    finally:
        gc.enable()


# -- calls that native code does not cover --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_calls_that_nobody_expects_to_be_fast_are_counted_quietly(launches):
    model, one = model_on_gpu("llama", KVSpec(4, 4, sink=3)), moved(prompt(1, 1))
    fuse_layers(model, "layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MxqWarning)
        cache = MxqCache(model.config, model.mxq_kv)
        for _ in range(5):  # the first token, and those of the sink
            model(one, use_cache=True, **{CACHE: cache})
        assert path_of(model).native == 2 and fallbacks(model) == {fused_cuda.BEGINNING: 3}
        model(moved(prompt()), use_cache=True, **{CACHE: cache})
        cache.crop(2)
        model(one, use_cache=True, **{CACHE: cache})
        assert path_of(model).native == 2 and fallbacks(model) == {fused_cuda.BEGINNING: 4, fused_cuda.PROMPT: 1}
        plain = build("llama").to("cuda")
        fuse_layers(plain, "layer")
        want, have = (list(itertools.islice(greedy(m, ids), 10)) for m, ids in ((build("llama"), prompt()), (plain, moved(prompt()))))
        assert torch.equal(torch.cat(have).cpu(), torch.cat(want))
        assert path_of(plain).native == 0 and set(fallbacks(plain)) == {fused_cuda.PROMPT, fused_cuda.FLOAT}


@torch.no_grad()
def test_other_calls_warn_once_and_are_counted(launches, monkeypatch):
    ids = moved(prompt(1, 1))

    def begun(model, batch=1):
        fuse_layers(model, "layer")
        return model(moved(prompt(batch, 9)), use_cache=True)[CACHE]

    many = model_on_gpu("llama")
    mixed = model_on_gpu("llama", Plan.for_kv(4, 4, layers={1: "keep"}).kv)
    a8 = model_on_gpu("llama")
    dense = torch.ones(1, 1, 1, 10, dtype=torch.bool, device="cuda")
    cases = [(many, 17, {}, "a batch of 17 on a GPU, native layers take 16"), (model_on_gpu("llama"), 1, {"attention_mask": dense}, "a mask that is not"),
             (model_on_gpu("llama"), 1, {"output_hidden_states": True}, "output_hidden_states is asked for"),
             (mixed, 1, {}, "layer 1 of the cache is a DynamicLayer, on a GPU native layers read packed pages")]
    for model, batch, options, said in cases:
        cache = begun(model, batch)
        with pytest.warns(MxqWarning, match="whole-layer decoding of Llama") as caught:
            model(ids.expand(batch, 1), use_cache=True, **{CACHE: cache}, **options)
        assert any(said in str(w.message) for w in caught) and path_of(model).native == 0
        assert [said in why for why in fallbacks(model)].count(True) == 1 and said in repr(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", MxqWarning)
            model(ids.expand(batch, 1), use_cache=True, **{CACHE: cache})  # the second time it is only counted
    cache = begun(a8)
    set_compute(a8, "a8")
    with pytest.warns(MxqWarning, match="the CUDA kernels read x as it is"), pytest.raises(NativeError, match="the CUDA kernels read x as it is"):
        a8(ids, use_cache=True, **{CACHE: cache})
    monkeypatch.setenv("MXQ_STRICT", "1")
    model = cases[1][0]
    cache = begun(model)
    with pytest.raises(NativeError, match="MXQ_STRICT"):
        model(ids, use_cache=True, attention_mask=dense, **{CACHE: cache})


@torch.no_grad()
def test_an_older_module_goes_through_the_modules(launches, monkeypatch):
    model = model_on_gpu("llama")
    fuse_layers(model, "layer")
    cache = model(moved(prompt()), use_cache=True)[CACHE]
    runtime = cuda.runtime(gpu.DEVICE)
    monkeypatch.setitem(runtime.__dict__, "layouts", runtime.layouts - fused_cuda._LAYOUTS)
    with pytest.warns(MxqWarning, match="is of another version of this package, it has other fields in LayerDesc, LayerLinear, LayersCall"):
        model(moved(prompt(1, 1)), use_cache=True, **{CACHE: cache})


@torch.no_grad()
def test_a_model_moves_between_sequences(launches):
    model = build("llama", kv=SPEC, fuse="layer")
    cache = MxqCache(model.config, model.mxq_kv)

    def run(ids):
        model(ids, use_cache=True, **{CACHE: cache})
        out = [model(ids[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits.cpu() for i in range(3)]
        cache.reset()
        return torch.cat(out)

    want, native = run(prompt()), path_of(model).native
    model.to("cuda")
    have = run(moved(prompt()))
    assert (have - want).norm() < 1e-3 * want.norm() and path_of(model).native == native + 3
    model.to("cpu")
    assert torch.equal(run(prompt()), want) and path_of(model).native == 2 * native + 3


def test_a_checkpoint_decodes_natively_by_itself(launches, tmp_path):
    model = build("llama", kv=KVSpec(8, 4, sink=2))
    want = model.generate(prompt(), max_new_tokens=30, do_sample=False)
    mxq.save(model, tmp_path / "out")
    loaded = mxq.load(tmp_path / "out").to("cuda")
    assert torch.equal(generated(loaded, {"input_ids": prompt()}, max_new_tokens=30), want)
    assert path_of(loaded).native == 29 and fallbacks(loaded) == {fused_cuda.PROMPT: 1}


# -- on a real device -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available() or isinstance(_native.cuda, _native.Missing), reason="needs a GPU and the CUDA module")
@pytest.mark.parametrize("graph", ["0", "1"], ids=["launches", "graph"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window"])
@torch.no_grad()
def test_on_a_device(family, graph, monkeypatch):
    """Logits in float16 of 150 tokens of a left-padded batch, with a crop on the way, beside those of the modules; and no call that waits but the captures."""
    monkeypatch.setenv("MXQ_CUDA_GRAPH", graph)
    model, batch = model_on_gpu(family, KVSpec(16, 16, residual=10), dtype=torch.float16), {n: x.to("cuda") for n, x in padded(3, 190).items()}

    def run(m):
        cache, out = MxqCache(m.config, m.mxq_kv), []
        for i in range(150):
            if i == 110:
                cache.crop(-3)
            past, new = cache.get_seq_length(), batch["input_ids"][:, :40] if i == 0 else batch["input_ids"][:, 39 + i : 40 + i]
            with cuda_tools.nothing_waits() if graph == "0" and i else contextlib.nullcontext():
                out.append(m(new, attention_mask=batch["attention_mask"][:, : past + new.shape[1]], use_cache=True, **{CACHE: cache}).logits[:, -1])
        caches.append(cache)  # or the rows would go with it
        return torch.stack(out).float().cpu()

    caches = []
    want = run(fuse_layers(model, None))
    have = run(fuse_layers(model, "layer"))
    assert path_of(model).native == 149 and (have - want).norm() < 0.02 * want.norm()
    assert (path_of(model).rows[1].repeated.graph is not None) == (graph == "1")

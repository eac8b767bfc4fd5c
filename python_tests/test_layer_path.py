"""fuse="layer": a model whose layers run in native code writes what its modules write, says which way a call went, and refuses what it does not know."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from conftest import make_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

import mxq_ext as mxq
from mxq_ext.decoding import cache_name
from mxq_ext.errors import ModelError, MxqWarning, NativeError
from mxq_ext.evaluate import greedy
from mxq_ext.kv.cache import MxqCache
from mxq_ext.nn import fuse_layers, set_compute
from mxq_ext.nn.fused_cache import RoomyLayer
from mxq_ext.plan import KVSpec, Plan

VOCAB, LENGTH = 97, 300
#: Sizes that no vector divides, and two layers of unlike formats.
BASE = dict(vocab_size=VOCAB, hidden_size=72, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
#: A text can only be the same where no two tokens ever come within rounding of each other, and int8 rounds coarsely: these seeds are such.
SEEDS = {"llama": 6, "llama_gqa": 7, "yarn": 6, "qwen2": 6}
FAMILIES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4, "head_dim": 48, "attention_bias": True, "mlp_bias": True}),
    "llama_gqa": ("LlamaConfig", {"head_dim": 80}),
    "llama3_rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "yarn": ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}}),
    "dynamic_rope": ("LlamaConfig", {"max_position_embeddings": 64,
                                     "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_window": ("MistralConfig", {"sliding_window": 70}),
}
PLAN = {"default": "w4g32", "units": {"model.layers.1.mlp.up_proj": "w8", "model.layers.0.self_attn.k_proj": "w3g32_asym", "lm_head": "keep"}}
CACHE = cache_name(transformers.LlamaForCausalLM.forward)


def build(family, kv=None, dtype=torch.float32, compute="a16", seed=None, fuse=None):
    """A random quantized model that writes a text of many tokens."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**BASE | values)
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS.get(family, 5) if seed is None else seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for n, p in model.named_parameters():
            if p.dim() > 1:
                p.data.normal_(0, 1 if "embed" in n or "lm_head" in n else 0.2)
            else:
                p.data.add_(torch.randn_like(p) * 0.1)
    plan = Plan(units=PLAN["units"], default=PLAN["default"], kv=kv)
    mxq.replace_linear(model, plan, fuse=fuse)
    set_compute(model, compute)
    return model.to(dtype)


def prompt(batch=1, tokens=20, seed=1):
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(batch=3, tokens=40):
    """A left-padded batch: ids and attention mask."""
    ids, mask = prompt(batch, tokens), torch.ones(batch, tokens, dtype=torch.int64)
    for i in range(1, batch):
        mask[i, : 7 * i] = ids[i, : 7 * i] = 0
    return {"input_ids": ids, "attention_mask": mask}


def path_of(model):
    return model.model.mxq_layers


def both(model, f):
    """f(model) through the modules and through native code, which must have taken every call but those that ``f`` makes it refuse."""
    fuse_layers(model, None)
    want = f(model)
    fuse_layers(model, "layer")
    have = f(model)
    assert path_of(model).native > 0
    return want, have


# -- the same text ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_greedy_tokens_are_the_same(family, compute):
    model = build(family, compute=compute)
    want, have = both(model, lambda m: m.generate(prompt(), max_new_tokens=200, do_sample=False))
    assert torch.equal(have, want) and len(set(want[0, 20:].tolist())) > 5
    assert path_of(model).native == 200 and not path_of(model).fallbacks


@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize("family", ["llama", "llama3_rope", "dynamic_rope", "qwen2_window", "qwen3", "mistral_window"])
def test_left_padded_batches_are_the_same(family, compute):
    model = build(family, compute=compute)
    want, have = both(model, lambda m: m.generate(**padded(), max_new_tokens=200, do_sample=False))
    assert torch.equal(have, want)
    assert not path_of(model).fallbacks


@pytest.mark.parametrize("spec", [KVSpec(4, 2), KVSpec(8, 8, group=32, residual=10), KVSpec(16, 16, residual=0, sink=5)], ids=str)
@pytest.mark.parametrize("family", ["llama_gqa", "qwen2_window", "qwen3", "mistral_window"])
def test_packed_caches_give_the_same_text(family, spec):
    """With prompts shorter and longer than what stays in float, so that both ways into the pages are taken."""
    model = build(family, kv=spec)
    for tokens in (5, 150):
        want, have = both(model, lambda m, n=tokens: m.generate(prompt(tokens=n), max_new_tokens=140, do_sample=False, return_dict_in_generate=True))
        assert torch.equal(have.sequences, want.sequences)
        caches = [x[CACHE] for x in (want, have)]
        assert all(isinstance(c, MxqCache) for c in caches) and [len(x.pages) for x in caches[0].layers] == [len(x.pages) for x in caches[1].layers]
    want, have = both(model, lambda m: m.generate(**padded(tokens=90), max_new_tokens=100, do_sample=False))
    assert torch.equal(have, want) and not path_of(model).fallbacks


def test_a_plan_that_leaves_one_layer_of_the_cache_in_float():
    model = build("llama", kv={"default": {"key": 4, "value": 4, "residual": 0}, "layers": {"1": "keep"}})
    for tokens in (5, 150):
        want, have = both(model, lambda m, n=tokens: m.generate(prompt(tokens=n), max_new_tokens=100, do_sample=False))
        assert torch.equal(have, want) and not path_of(model).fallbacks


@pytest.mark.parametrize("kv", [None, KVSpec(8, 4, residual=20)], ids=["float", "packed"])
def test_beam_search_is_the_same(kv):
    model = build("llama_gqa", kv=kv)
    want, have = both(model, lambda m: m.generate(**padded(), num_beams=3, max_new_tokens=90, do_sample=False, num_return_sequences=2))
    assert torch.equal(have, want) and not path_of(model).fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_rounds_where_the_modules_do(family, dtype):
    """Text may part where two tokens are nearly as likely, so logits are compared: they differ by what roundings in another order do. The first
    token goes alone, because all others then go through the same attention kernel in both cases (SDPA rounds probabilities too)."""
    def run(m):
        first = m(ids[:, :1], use_cache=True)
        return m(ids[:, 1:], use_cache=True, **{CACHE: first[CACHE]}).logits

    model, ids = build(family, dtype=dtype, kv=KVSpec(16, 16)), prompt(2, 60)
    want, have = both(model, run)
    exact = run(build(family, kv=KVSpec(16, 16)))
    noise, difference = (want - exact).norm() / exact.norm(), (have - want).float().norm() / exact.norm()
    assert have.dtype == dtype and 0 < noise and difference < noise / 3, f"difference {difference:.2e}, rounding {noise:.2e}"


@torch.no_grad()
@pytest.mark.parametrize("kv", [None, KVSpec(16, 16, residual=30, sink=3)], ids=["float", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_logits_after_crops_and_in_chunks(family, kv):
    def run(model):
        out, cache = [], None
        for start, stop in ((0, 30), (30, 31), (31, 95), (95, 97)):
            step = model(ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = step[CACHE]
            out.append(step.logits)
        cache.crop(-9)
        out.append(model(ids[:, 40:47], use_cache=True, **{CACHE: cache}).logits)
        cache.batch_repeat_interleave(2)
        out.append(model(ids[:, 50:51].repeat_interleave(2, 0), use_cache=True, **{CACHE: cache}).logits[::2])
        cache.batch_select_indices(torch.tensor([3, 0]))
        out.append(model(ids[:, 60:62], use_cache=True, **{CACHE: cache}).logits)
        return torch.cat(out, 1)

    ids = prompt(2, 97)
    model = build(family, kv=kv)
    if family == "mistral_window" and kv is None:
        model.config.sliding_window = 200  # transformers' own window cannot go back
    want, have = both(model, run)
    torch.testing.assert_close(have, want, rtol=5e-3, atol=5e-3)
    assert not path_of(model).fallbacks


@torch.no_grad()
def test_a_cache_goes_from_modules_to_native_code_and_back():
    model = build("mistral_window")
    ids = prompt(1, 120)
    whole = model(ids, use_cache=True).logits
    cache, out = DynamicCache(config=model.config), []
    for i in range(12):
        fuse_layers(model, "layer" if i % 3 else None)
        out.append(model(ids[:, 10 * i : 10 * i + 10], use_cache=True, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-3, atol=1e-3)
    assert all(isinstance(layer, RoomyLayer) for layer in cache.layers) and cache.get_seq_length() == 120


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_a_cache_made_without_a_config(family):
    ids, model = prompt(2, 90), build(family)

    def run(m):
        cache = DynamicCache()
        return torch.cat([m(part, use_cache=True, **{CACHE: cache}).logits for part in ids.split([60, 1, 29], 1)], 1)

    want, have = both(model, run)
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)
    with pytest.warns(MxqWarning, match="the cache has 1 layers, the model 2"), pytest.raises(Exception):  # noqa: B017 (transformers' own)
        model(ids, use_cache=True, **{CACHE: DynamicCache(config=build(family).config.__class__(**BASE | {"num_hidden_layers": 1}))})


@torch.no_grad()
def test_embeddings_positions_and_threads():
    model = build("qwen2")
    ids, positions = prompt(2, 30), torch.arange(30).expand(2, -1) * 3 % 71
    embeds = model.get_input_embeddings()(ids)
    before = torch.get_num_threads()
    far = {"input_ids": ids, "position_ids": positions[:1] + 200_000}
    for options in (far, {"inputs_embeds": embeds}, {"input_ids": ids, "position_ids": positions}, {"input_ids": ids, "position_ids": positions - 20}):
        kept = embeds.clone()
        want, have = both(model, lambda m, o=options: m(**o, use_cache=True).logits)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(embeds, kept)
    try:
        torch.set_num_threads(1)
        one = model(ids, use_cache=True).logits
        torch.set_num_threads(3)
        assert torch.equal(model(ids, use_cache=True).logits, one)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_every_instruction_set(target):
    model = build("llama")
    want, have = both(model, lambda m: m(prompt(2, 21), use_cache=True).logits)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


# -- calls that native code does not cover --------------------------------------------------------------------------------------------


def fallbacks(model, f):
    """(result, reasons) of a call of a fused model; it must be that of the modules, and warn unless nobody would expect speed."""
    want = f(fuse_layers(model, None))
    fuse_layers(model, "layer")
    have = f(model)
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    assert path_of(model).native == 0
    return list(path_of(model).fallbacks)


def test_expected_calls_go_through_the_modules_quietly():
    model, ids = build("llama"), prompt(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MxqWarning)
        assert fallbacks(model, lambda m: m(ids, use_cache=False).logits) == ["no cache"]
        assert fallbacks(model.train(), lambda m: m(ids, use_cache=True).logits) == ["training"]
        model.eval()
        embeds = torch.randn(1, 5, 72, requires_grad=True)
        assert fallbacks(model, lambda m: torch.autograd.grad(m(inputs_embeds=embeds, use_cache=True).logits.sum(), embeds)[0]) == ["a gradient is needed"]
        model.model.norm.weight.requires_grad_(True)
        assert fallbacks(model, lambda m: m(ids, use_cache=True).logits) == ["a gradient is needed"]


def test_other_calls_warn_once_and_are_counted(monkeypatch):
    model, ids = build("llama"), prompt(2, 9)
    dense = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()

    def static(m):
        return m(ids, use_cache=True, **{CACHE: StaticCache(config=m.config, max_cache_len=20)}).logits

    def hooked(m):
        seen = []
        handle = m.model.layers[1].mlp.register_forward_hook(lambda *a: seen.append(1))
        out = m(ids, use_cache=True).logits
        handle.remove()
        assert seen == [1]
        return out

    def in_autocast(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(ids, use_cache=True).logits

    def short_mask(m):
        cache = DynamicCache(config=m.config)
        for i in range(2):
            cache.update(*(torch.zeros(2, 4, 3, 48) for _ in range(2)), i)
        return m(ids[:, :1], use_cache=True, attention_mask=torch.ones(2, 2, dtype=torch.int64), position_ids=torch.tensor([[3]]), **{CACHE: cache}).logits

    cases = [("hidden_states is asked", lambda m: m(ids, use_cache=True, output_hidden_states=True).hidden_states[1]),
             ("a mask that is not", lambda m: m(ids, use_cache=True, attention_mask=dense).logits), ("StaticCache", static), ("hooks", hooked),
             ("the mask is (2, 2)", short_mask), ("autocast", in_autocast)]

    for said, call in cases:
        with pytest.warns(MxqWarning, match="whole-layer decoding of Llama") as caught, torch.no_grad():
            reasons = fallbacks(model, call)
        assert len(reasons) == 1 and said in reasons[0] and sum(issubclass(w.category, MxqWarning) for w in caught) == 1
        assert reasons[0] in repr(model) and "1 calls through modules" in repr(model)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", MxqWarning)
            call(model)  # the second time it is only counted
        assert path_of(model).fallbacks[reasons[0]] == 2
    monkeypatch.setenv("MXQ_STRICT", "1")
    fuse_layers(model, "layer")
    with pytest.raises(NativeError, match="MXQ_STRICT"), torch.no_grad():
        model(ids, use_cache=True, attention_mask=dense)


@torch.no_grad()
def test_hidden_states_do_not_end_the_native_path():
    """transformers leaves its hooks on the layers after the first call that asked for their output."""
    model = build("llama", fuse="layer")
    with pytest.warns(MxqWarning, match="output_hidden_states"):
        model(prompt(), use_cache=True, output_hidden_states=True)
    model(prompt(), use_cache=True)
    assert path_of(model).native == 1


@torch.no_grad()
def test_compiled_models_compile_their_modules():
    model = build("llama", fuse="layer")
    want = model(prompt(), use_cache=False).logits
    have = torch.compile(model, backend="eager", fullgraph=False)(prompt(), use_cache=False).logits
    torch.testing.assert_close(have, want)


@torch.no_grad()
def test_modules_run_where_something_watches():
    """A dispatch mode, as tracers and counters are, would see nothing of native code but its buffers."""
    model = build("llama", fuse="layer")
    with FlopCounterMode(display=False):
        have = model(prompt(), use_cache=True).logits
    assert path_of(model).native == 0
    torch.testing.assert_close(have, model(prompt(), use_cache=True).logits, rtol=1e-3, atol=1e-3)


# -- what changes under way -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("between", [False, True], ids=["new_sequence", "same_sequence"])
def test_changes_of_the_model_reach_native_code(between):
    model, ids = build("llama", fuse="layer"), prompt(2, 9)

    def replaced(m):
        m.model.layers[1].mlp.up_proj = copy.deepcopy(m.model.layers[0].mlp.up_proj)

    changes = [lambda m: m.load_state_dict(build("llama", seed=8).state_dict()), lambda m: m.model.layers[0].input_layernorm.weight.mul_(3), replaced,
               lambda m: set_compute(m, "a8")]
    for change in changes:
        first = model(ids, use_cache=True)
        change(model)
        cache = first[CACHE] if between else None
        have = model(ids[:, :4], use_cache=True, **{CACHE: cache}).logits
        if between:
            cache.crop(-4)
        fuse_layers(model, None)
        want = model(ids[:, :4], use_cache=True, **{CACHE: cache}).logits
        path_of_old_weights = first.logits[:, :4]
        fuse_layers(model, "layer")
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)
        assert between or not torch.allclose(path_of_old_weights, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_native_code_follows_weights_whose_memory_is_shared_later():
    """share_memory() frees the bytes that native code has the address of; the modules have no norm among them whose address would tell."""
    model = build("llama_gqa", fuse="layer")
    want, weights = model(prompt(), use_cache=True).logits, path_of(model).weights
    model.model.layers[1].self_attn.o_proj.share_memory()
    assert not weights.current(False)
    assert torch.equal(model(prompt(), use_cache=True).logits, want) and path_of(model).weights.current(False)


@torch.no_grad()
def test_casts_copies_and_pickles_stay_native():
    model = build("llama", fuse="layer")
    want = model(prompt(), use_cache=True).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(prompt(), use_cache=True).logits, want, rtol=0, atol=0)
        assert path_of(other).native == path_of(model).native + 1 and path_of(other) is not path_of(model)
    half = model.to(torch.bfloat16)(prompt(), use_cache=True).logits
    assert half.dtype == torch.bfloat16 and path_of(model).native == 2
    assert 0 < (half.float() - want).norm() < 0.03 * want.norm()
    assert torch.equal(model.to(torch.float32)(prompt(), use_cache=True).logits, model(prompt(), use_cache=True).logits)


# -- which models -----------------------------------------------------------------------------------------------------------------------


def test_refusals_name_the_reason_and_leave_the_model_alone():
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**BASE)).eval()
    with pytest.raises(ModelError, match="GemmaModel, native code knows Llama"):
        mxq.replace_linear(gemma, Plan(units={"model.embed_tokens": "keep"}, default="w4g32"), fuse="layer")
    assert isinstance(gemma.model.layers[0].mlp.up_proj, nn.Linear)
    odd = Plan(units={"model.layers.1.mlp.up_proj": "keep"}, default="w4g32")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj is not quantized \(Linear\)"):
        mxq.replace_linear(make_model(), odd, fuse="layer")
    with pytest.raises(ModelError, match="fuse='all'"):
        mxq.replace_linear(make_model(), "w4g32", fuse="all")
    with pytest.raises(ModelError, match="multiple of 16"):
        mxq.replace_linear(transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | {"head_dim": 24})).eval(), "w4g32", fuse="layer")
    with pytest.raises(ModelError, match="activation is gelu"):
        mxq.replace_linear(transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, hidden_act="gelu")).eval(), "w4g32", fuse="layer")


def test_auto_says_which_way_it_went(tmp_path):
    model = mxq.replace_linear(make_model(), "w4g32", fuse="auto")
    assert "LayerPath(native, 2 layers of Llama in one call)" in repr(model)
    kept = mxq.replace_linear(make_model(), Plan(units={"model.layers.0.mlp.up_proj": "keep"}, default="w4g32"), fuse="auto")
    assert "LayerPath(modules: model.layers.0.mlp.up_proj is not quantized" in repr(kept)
    assert "LayerPath" not in repr(mxq.replace_linear(make_model(), "w4g32"))
    assert "LayerPath" not in repr(fuse_layers(model, None)) and "forward" not in vars(model.model)
    mxq.save(kept, tmp_path / "kept")
    mxq.save(model, tmp_path / "whole")
    assert "modules:" in repr(mxq.load(tmp_path / "kept")) and "native," in repr(mxq.load(tmp_path / "whole"))
    assert "LayerPath" not in repr(mxq.load(tmp_path / "whole", fuse=None))
    with pytest.raises(ModelError, match="not quantized"):
        mxq.load(tmp_path / "kept", fuse="layer")
    loaded = mxq.load(tmp_path / "whole")
    assert torch.equal(greedy(loaded, prompt()[0], 20), greedy(model, prompt()[0], 20)) and path_of(loaded).native == 20

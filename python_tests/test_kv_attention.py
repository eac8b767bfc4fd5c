"""replace_attention: models that generate with packed pages write what they write with transformers' own cache, or are refused."""

import copy

import pytest
import torch
import transformers
from conftest import make_model
from transformers import DynamicCache

import mxq_ext as mxq
from mxq_ext.decoding import cache_name
from mxq_ext.errors import FormatError, ModelError, PlanError
from mxq_ext.evaluate import greedy
from mxq_ext.kv import attention as kv_attention
from mxq_ext.kv.attention import NAME, replace_attention
from mxq_ext.kv.cache import MxqCache, MxqCacheLayer
from mxq_ext.plan import KVSpec, Plan

#: Pages from the first tokens on: hardly a residual, so that 16 bits are what decides.
EXACT = KVSpec(16, 16, residual=10)
VOCAB, LENGTH = 97, 300
_ROPE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, pad_token_id=0)
_GPT2 = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=None, eos_token_id=None, pad_token_id=0)
_OPT = dict(vocab_size=VOCAB, hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, pad_token_id=0)
#: Name -> (class of its config, its values, standard deviations of projections and of embeddings, seed). The sequences outgrow all windows.
#: fp16 rounds keys and values, so a text can only be the same where no two tokens ever come within 0.1 % of each other; and with the
#: wrong deviations a random model repeats one token forever. These weights are among those that do neither.
FAMILIES = {
    "llama": ("LlamaConfig", _ROPE, 0.2, 1, 1),
    "llama_mha": ("LlamaConfig", _ROPE | {"num_key_value_heads": 4, "head_dim": 80}, 0.2, 1, 2),
    "qwen2": ("Qwen2Config", _ROPE, 0.2, 1, 3),
    "qwen2_window": ("Qwen2Config", _ROPE | {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}, 0.2, 1, 3),
    "qwen3": ("Qwen3Config", _ROPE | {"head_dim": 32}, 0.2, 1, 1),
    "mistral": ("MistralConfig", _ROPE | {"sliding_window": 70}, 0.2, 1, 3),
    "gemma": ("GemmaConfig", _ROPE | {"head_dim": 16}, 0.2, 0.02, 1),
    "gemma2": ("Gemma2Config", _ROPE | {"head_dim": 16, "sliding_window": 50, "attn_logit_softcapping": 20.0}, 0.3, 0.02, 1),
    "gemma3": ("Gemma3TextConfig", _ROPE | {"head_dim": 16, "sliding_window": 50}, 0.2, 0.005, 0),
    "phi": ("PhiConfig", _ROPE, 0.2, 1, 1),
    "phi3": ("Phi3Config", _ROPE, 0.2, 1, 1),
    "gpt2": ("GPT2Config", _GPT2, 0.2, 0.05, 0),
    "opt": ("OPTConfig", _OPT, 0.3, 0.05, 1),
}


def build(family, dtype=torch.float32, seed=None):
    """A random model that writes a text of many tokens."""
    name, values, wide, embedding, own = FAMILIES[family]
    config = getattr(transformers, name)(**values)
    with torch.random.fork_rng():
        torch.manual_seed(own if seed is None else seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for n, p in model.named_parameters():
            if p.dim() > 1:
                p.data.normal_(0, embedding if any(x in n for x in ("embed", "wte", "wpe", "lm_head")) else wide)
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # SDPA has no such cap, and before transformers 5.24 left it out without a word
    return model.to(dtype).requires_grad_(False)


def prompt(batch=1, tokens=20, seed=1):
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(batch=3, tokens=90):
    """A left-padded batch: (ids, attention mask)."""
    ids, mask = prompt(batch, tokens), torch.ones(batch, tokens, dtype=torch.int64)
    for i in range(1, batch):
        mask[i, : 13 * i] = ids[i, : 13 * i] = 0
    return {"input_ids": ids, "attention_mask": mask}


#: The argument that takes a cache was renamed in transformers 5.24.
CACHE = cache_name(transformers.LlamaForCausalLM.forward)


def cache_of(output):
    return output.get(CACHE)


def using(cache):
    return {CACHE: cache}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A model, and the same with packed pages of 16 bits."""
    model = build(request.param)
    return model, replace_attention(copy.deepcopy(model), EXACT)


# -- the same text at 16 bits ---------------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_same(pair):
    model, packed = pair
    want = model.generate(prompt(), max_new_tokens=200, do_sample=False)
    have = packed.generate(prompt(), max_new_tokens=200, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(have.sequences, want) and len(set(want[0, 20:].tolist())) > 5
    cache = cache_of(have)
    assert isinstance(cache, MxqCache) and all(len(layer.pages) == 3 and layer.get_seq_length() == 219 for layer in cache.layers)


def test_left_padded_batches_and_beams_are_the_same(pair):
    model, packed = pair
    for options in ({"do_sample": False, "max_new_tokens": 100}, {"num_beams": 3, "do_sample": False, "max_new_tokens": 40, "num_return_sequences": 2}):
        want = model.generate(**padded(), **options)
        assert torch.equal(packed.generate(**padded(), **options), want)


def test_logits_are_the_same_in_chunks_of_any_size(pair):
    model, packed = pair
    batch = padded(2, 230)
    caches = [DynamicCache(config=model.config), MxqCache(packed.config, EXACT)]
    start, rows = 0, batch["attention_mask"].bool()
    for n in (70, 1, 3, 100, 1, 55):
        want, have = (m(batch["input_ids"][:, start : start + n], attention_mask=batch["attention_mask"][:, : start + n], **using(cache),
                        position_ids=(rows.cumsum(1) - 1).clamp(min=0)[:, start : start + n]).logits[rows[:, start : start + n]]
                      for m, cache in zip(pair, caches, strict=True))
        assert (have - want).norm() < 2e-3 * want.norm()  # fp16 rounds keys and values by 2^-11
        start += n


# -- what else a cache must do ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def packed(llama):
    return replace_attention(copy.deepcopy(llama), EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = build("llama", dtype)
    packed = replace_attention(copy.deepcopy(model), EXACT)
    ids, caches = prompt(2, 250), (DynamicCache(config=model.config), MxqCache(model.config, EXACT))
    for start, n in ((0, 100), (100, 1), (101, 149)):
        want, have = (m(ids[:, start : start + n], **using(c)).logits.float() for m, c in zip((model, packed), caches, strict=True))
        assert (have - want).norm() < 0.02 * want.norm()
    assert caches[1].layers[0].tail[0].dtype == dtype


def test_an_explicit_cache_and_its_reuse(llama, packed):
    def write(model, ids, **options):  # with a mask, for generate takes the token 0 for padding without one
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, **options)

    ids, cache = prompt(1, 150), MxqCache(packed.config, EXACT)
    first = write(llama, ids)
    assert torch.equal(write(packed, ids, **using(cache)), first) and cache.get_seq_length() == 169
    longer = torch.cat([first, prompt(1, 30, seed=2)], 1)  # a second turn goes on with the same cache, and a copy goes its own way
    again, want = copy.deepcopy(cache), write(llama, longer)
    for c in (cache, again):
        assert torch.equal(write(packed, longer, **using(c)), want)
    cache.reset()
    assert torch.equal(write(packed, longer, past_key_values=cache), want)  # by its old name, too


def test_crop_and_another_continuation(llama, packed):
    ids, cache = prompt(1, 200), MxqCache(packed.config, EXACT)
    packed(ids, **using(cache))
    for kept in (170, 128, 100, 1):
        cache.crop(kept - cache.get_seq_length())
        tail = prompt(1, 30, seed=kept)
        have = packed(tail, **using(cache)).logits
        want = llama(torch.cat([ids[:, :kept], tail], 1)).logits[:, kept:]
        assert (have - want).norm() < 2e-3 * want.norm()
        cache.crop(kept - cache.get_seq_length())


def test_batch_select_and_repeat(llama, packed):
    ids, cache = prompt(3, 150), MxqCache(packed.config, EXACT)
    packed(ids, **using(cache))
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    new = prompt(4, 5, seed=3)
    have, want = packed(new, **using(cache)).logits, llama(torch.cat([ids[[2, 2, 0, 0]], new], 1)).logits[:, 150:]
    assert (have - want).norm() < 2e-3 * want.norm()


def test_assisted_and_sampled_generation(llama, packed):
    ids = prompt(1, 100)
    want = llama.generate(ids, max_new_tokens=60, do_sample=False)
    assert torch.equal(packed.generate(ids, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=3), want)
    assert torch.equal(packed.generate(ids, max_new_tokens=60, do_sample=False, assistant_model=build("llama", seed=5)), want)
    assert torch.equal(packed.generate(ids, max_new_tokens=60, do_sample=False, prefill_chunk_size=30), want)
    texts = []
    for model in (llama, packed):
        torch.manual_seed(0)
        texts.append(model.generate(ids, max_new_tokens=40, do_sample=True, num_return_sequences=3))
    assert torch.equal(*texts)


def test_calls_of_the_model_bring_a_cache_by_themselves(llama, packed):
    ids = prompt(1, 150)
    out = packed(ids)
    assert isinstance(cache_of(out), MxqCache) and torch.equal(out.logits, llama(ids).logits)
    none = packed(ids, use_cache=False)
    assert cache_of(none) is None and torch.equal(none.logits, out.logits)
    assert torch.equal(greedy(packed, ids[0], 30), greedy(llama, ids[0], 30))
    assert isinstance(cache_of(packed.model(ids)), MxqCache)  # the decoder alone, too
    assert torch.equal(packed.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False), llama.generate(ids, max_new_tokens=5, do_sample=False))


def test_fewer_bits_are_worse_and_layers_can_stay(llama):
    ids = prompt(1, 250)
    want = llama(ids).logits[:, 1:]
    errors = {}
    for name, kv in {"8": KVSpec(8, 8, residual=0), "4": KVSpec(4, 4, residual=0), "2": KVSpec(2, 2, residual=0), "2, window": KVSpec(2, 2, residual=64),
                     "first kept": Plan.for_kv(2, 2, residual=0, layers={0: "keep"}), "all kept but": Plan(kv={"layers": {"1": KVSpec(16, 16)}})}.items():
        model = replace_attention(copy.deepcopy(llama), kv)
        cache = MxqCache(model.config, kv)
        model(ids[:, :1], **using(cache))  # exact, and alone: all others read what the cache keeps
        errors[name] = ((model(ids[:, 1:], **using(cache)).logits - want).norm() / want.norm()).item()
    assert 0 < errors["all kept but"] < 1e-3 and errors["8"] < 0.1 * errors["2"] and errors["8"] < errors["4"] < errors["2"]
    assert errors["2, window"] < errors["2"] and errors["first kept"] < errors["2"]


def test_rotation_leaves_16_bits_as_they_are_and_helps_outliers():
    model, ids = build("qwen3"), prompt(1, 250)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[5] *= 20
    want, errors = model(ids).logits[:, 1:], []
    for spec in (KVSpec(16, 16, residual=0, rotate=True), KVSpec(16, 3, residual=0, rotate=True), KVSpec(16, 3, residual=0)):
        turned = replace_attention(copy.deepcopy(model), spec)
        cache = MxqCache(model.config, spec)
        turned(ids[:, :1], **using(cache))
        errors.append(((turned(ids[:, 1:], **using(cache)).logits - want).norm() / want.norm()).item())
    assert errors[0] < 2e-3 and errors[1] < errors[2]


def test_masks_of_other_shapes(llama, packed):
    """A dense mask of the caller's."""
    ids, new = prompt(1, 100), prompt(1, 4, seed=5)
    dense = torch.ones(1, 1, 4, 104, dtype=torch.bool).tril(100)
    dense[..., 3:50] = False
    numbers = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    logits = []
    for model, cache, mask in ((llama, DynamicCache(config=llama.config), dense), (packed, MxqCache(packed.config, EXACT), dense),
                               (packed, MxqCache(packed.config, EXACT), numbers)):
        model(ids, **using(cache))
        logits.append(model(new, attention_mask=mask, **using(cache)).logits)
    assert (logits[1] - logits[0]).norm() < 2e-3 * logits[0].norm() and torch.equal(logits[1], logits[2])
    cache = MxqCache(packed.config, EXACT)
    packed(ids, **using(cache))
    with pytest.raises(ModelError, match=r"layer 0 \(LlamaAttention\) with a packed KV cache: the mask must say yes or no for all heads alike, it is float32"):
        packed(new, attention_mask=numbers * 1e-38, **using(cache))


# -- the swap ----------------------------------------------------------------------------------------------------------------------------


def test_back_and_forth(llama):
    model, ids = copy.deepcopy(llama), prompt(1, 100)
    before = model.config._attn_implementation
    assert replace_attention(model, Plan.for_kv(4, 4)) is model and model.config._attn_implementation == NAME
    other = copy.deepcopy(model)
    replace_attention(model, KVSpec(2, 2))  # once more, with something else
    assert cache_of(model(ids)).layers[0].spec == KVSpec(2, 2) and cache_of(other(ids)).layers[0].spec == KVSpec(4, 4)
    spec = cache_of(other.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)).layers[0].spec
    assert spec == KVSpec(4, 4)
    replace_attention(model, None)
    assert model.config._attn_implementation == before and type(cache_of(model(ids))) is DynamicCache
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), llama.generate(ids, max_new_tokens=9, do_sample=False))
    replace_attention(model, EXACT)
    assert isinstance(cache_of(model(ids)), MxqCache)
    assert sum(h is kv_attention._bring_cache for h in model.model._forward_pre_hooks.values()) == 1


def test_through_a_plan_and_a_checkpoint(tmp_path):
    model, ids = make_model(), prompt(1, 150)
    plan = Plan(default="w8", kv={"key": 8, "value": 4, "sink": 2})
    mxq.replace_linear(model, plan)
    assert model.mxq_plan.kv == plan.kv
    want = model.generate(ids, max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
    assert cache_of(want).layers[1].spec == KVSpec(8, 4, sink=2)
    mxq.save(model, tmp_path / "out")
    from mxq_ext import hf  # noqa: F401  (it registers the checkpoint's kind with transformers)

    for loaded in (mxq.load(tmp_path / "out"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert loaded.mxq_plan == plan and loaded.config._attn_implementation == NAME
        assert torch.equal(loaded.generate(ids, max_new_tokens=60, do_sample=False), want.sequences)
    assert "mxq_kv" not in (tmp_path / "out" / "config.json").read_text()
    assert mxq.replace_attention(loaded, KVSpec(2, 2)).mxq_plan.kv.default == KVSpec(2, 2)
    mxq.save(loaded, tmp_path / "other")
    assert mxq.load(tmp_path / "other").mxq_plan.kv.default == KVSpec(2, 2)


def test_a_quantized_model_without_a_plan_keeps_its_section(tmp_path):
    model = mxq.replace_linear(make_model(), "w4g64")
    model.mxq_plan = None
    replace_attention(model, KVSpec(4, 2))
    mxq.save(model, tmp_path / "out")
    assert Plan.load(tmp_path / "out" / "plan.json").kv.default == KVSpec(4, 2)


def test_nothing_is_replaced_if_the_section_does_not_fit():
    model = make_model()
    for kv, error in (({"layers": {"5": {}}}, PlanError), ({"key": 4, "rotate": True}, FormatError)):
        model.config.head_dim = 48 if error is FormatError else 16
        with pytest.raises(error, match="layer (5|model.layers.0)"):
            mxq.replace_linear(model, Plan(default="w8", kv=kv))
    assert not any("Quant" in type(m).__name__ for m in model.modules()) and model.config._attn_implementation == "sdpa"


def test_public_names():
    assert mxq.MxqCache is MxqCache and mxq.replace_attention is replace_attention and mxq.KVSpec is KVSpec


# -- refusals -----------------------------------------------------------------------------------------------------------------------------


def test_other_caches_are_refused(packed):
    ids = prompt()
    text = r"with a DynamicCache: its plan keeps keys and values in packed pages; leave the cache out, pass MxqCache\(model.config, model.mxq_kv\)"
    with pytest.raises(ModelError, match="LlamaModel " + text):
        packed(ids, **using(DynamicCache(config=packed.config)))
    with pytest.raises(ModelError, match="LlamaForCausalLM " + text):
        packed.generate(ids, **using(DynamicCache(config=packed.config)), max_new_tokens=2)
    with pytest.raises(ModelError, match="cache_implementation='static': the model's plan has a cache of its own"):
        packed.generate(ids, cache_implementation="static", max_new_tokens=2)
    assert packed.generate(ids, cache_implementation="dynamic", max_new_tokens=2).shape[1] == 22


def test_a_cache_without_the_attention_is_found_out(llama):
    ids, cache = prompt(), MxqCache(llama.config, EXACT)
    llama(ids, **using(cache))  # right by itself: these tokens see each other only
    with pytest.raises(ModelError, match="decoder layer 0 of a model with an MxqCache: its attention did not read the packed cache"):
        llama(ids, **using(cache))


def test_keys_that_lose_their_mark_are_found_out_at_the_first_call(llama, monkeypatch):
    model = replace_attention(copy.deepcopy(llama), EXACT)
    update = MxqCacheLayer.update
    monkeypatch.setattr(MxqCacheLayer, "update", lambda *args, **kwargs: tuple(x.clone() for x in update(*args, **kwargs)))
    with pytest.raises(ModelError, match="decoder layer 0 .* did not read the packed cache"):
        model(prompt())
    with pytest.raises(ModelError, match="did not read"):
        model.generate(prompt(), max_new_tokens=3)


def test_a_mask_that_does_not_come_along(packed, llama):
    cache = MxqCache(packed.config, EXACT)
    with pytest.raises(ModelError, match=r"layer 0 .*: the mask that belongs to it did not come along \(found none\)"):
        x, layer = torch.zeros(1, 1, 64), packed.model.layers[0]
        layer.self_attn(x, packed.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.int64)), None, cache)


def test_what_has_no_kernel_is_refused(packed):
    module, q = packed.model.layers[0].self_attn, torch.zeros(1, 4, 1, 16)
    seen = kv_attention.mask(1, 1, 1, mask_function=transformers.masking_utils.causal_mask_function)
    for extra, text in (({"s_aux": q}, "it has s_aux"), ({"position_bias": q}, "it has position_bias"), ({"output_attentions": True}, "never formed")):
        with pytest.raises(ModelError, match=text):
            kv_attention.attention(module, q, q, q, seen, **extra)
    cache = MxqCache(packed.config, EXACT)
    packed(prompt(), **using(cache))
    model = copy.deepcopy(packed).train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match="dropout 0.1 in training is not supported; call model.eval"):
        model(prompt(), **using(cache))


def test_gradients_end_where_the_pages_begin(llama):
    model = replace_attention(copy.deepcopy(llama), EXACT).requires_grad_(True)
    ids, cache = prompt(1, 100), MxqCache(model.config, EXACT)
    first = model(ids, **using(cache)).logits
    first.sum().backward()  # a first call is exact, and can be differentiated
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    second = model(ids, **using(cache)).logits
    with pytest.raises(ModelError, match="gradients through attention over a packed KV cache: there are none; pass use_cache=False"):
        second.sum().backward()


def refused(config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError) as e:
        replace_attention(model, EXACT)
    return str(e.value)


def test_models_that_are_refused():
    few = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
    bloom = refused(transformers.BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=2))
    assert "for BloomForCausalLM, layer transformer.h.0 (BloomBlock): its attention does not go through transformers' AttentionInterface" in bloom
    hybrid = refused(transformers.Lfm2Config(**few, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                                             layer_types=["full_attention", "conv"]))
    assert "layer model.layers.1: it is of type conv, pages hold those of full_attention and sliding_attention" in hybrid
    crossed = refused(transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True))
    assert "GPT2LMHeadModel: it is not a plain decoder of text" in crossed
    with pytest.raises(ModelError, match="Linear: it is no model of transformers"):
        replace_attention(torch.nn.Linear(3, 3), EXACT)
    with pytest.raises(PlanError, match="the plan has no KV section"):
        replace_attention(make_model(), Plan.uniform("w4"))
    model = make_model()
    model.config.head_dim = 24
    with pytest.raises(FormatError, match="layer model.layers.0: a KV page of 16-bit keys.*24.*multiple of 16"):
        replace_attention(model, EXACT)


@pytest.mark.slow
def test_compiled_models(llama, packed):
    """The cache and its attention are no part of the graphs, and are read all the same."""
    ids, cache, compiled = prompt(1, 150), MxqCache(packed.config, EXACT), torch.compile(packed, backend="eager")
    for start, n in ((0, 100), (100, 1), (101, 49)):
        have = compiled(ids[:, start : start + n], **using(cache)).logits
    want = llama(ids).logits[:, 101:]
    assert (have - want).norm() < 2e-3 * want.norm()
    torch.compiler.reset()

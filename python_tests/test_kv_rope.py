"""pre_rope in a cache layer, a cache and a model: what pages hold, and that nothing else changes."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model, make_sharp_model
from test_kv_cache import filled, numbers

import mxq_ext as mxq
from mxq_ext.errors import ModelError, MxqError, PlanError
from mxq_ext.evaluate import evaluate
from mxq_ext.kv import ops, reference
from mxq_ext.kv.attention import replace_attention
from mxq_ext.kv.cache import MxqCache, MxqCacheLayer, cache_nbytes
from mxq_ext.kv.rope import Rope, check_rope, rope_of
from mxq_ext.plan import KVPlan, KVSpec

ROPE = Rope(tuple(np.float32(10000.0) ** -(np.arange(0, 24, 2, dtype=np.float32) / 24)))  # of 32 channels 24 are turned
SPECS = [KVSpec(4, 2, residual=0, pre_rope=True), KVSpec(3, 8, group=32, residual=32, sink=5, pre_rope=True),
         KVSpec(2, 3, residual=100, sink=70, pre_rope=True, levels="normal"), KVSpec(16, 16, residual=10, pre_rope=True),
         KVSpec(4, 4, residual=0, levels=(tuple(np.linspace(-1, 0.5, 16)), tuple(np.linspace(-0.25, 1, 16)))),
         KVSpec(3, 4, residual=20, sink=4, pre_rope=True, levels="normal", outliers=0.01)]


def made(spec, *states):
    layer = MxqCacheLayer(spec, "layer", ROPE)
    layer.append(*states)
    return layer


def contents(layer):
    """Keys and values [B, Hkv, tokens, D] float64 as attention reads them, by numpy from the stored bytes."""
    out = []
    for side, fmt in enumerate((layer.pages.key, layer.pages.value)):
        parts = [layer.sink[side][:, :, : layer.sink_tokens].double().numpy()]
        for i in range(len(layer.pages)):
            codes, params = layer.pages[i][2 * side : 2 * side + 2]
            x = np.stack([reference.unpack(codes[h].numpy().tobytes(), params[h].numpy(), fmt) for h in range(layer.pages.heads)])
            if side == 0 and layer.spec.pre_rope:
                x = reference.turn(x, layer.spec.sink + 64 * i, ROPE.frequencies)
            parts.append(x.reshape(layer.batch, layer.heads, 64, layer.dim))
        out.append(np.concatenate([*parts, layer.tail[side][:, :, : layer.tail_tokens].double().numpy()], 2))
    return out


def attended(layer, q, mask=None):
    k, v = numbers(q.shape[2], batch=q.shape[0], seed=5)
    layer.update(k, v)
    return layer.attend(q, scale=0.2, mask=mask, causal=True, window=0, softcap=0.0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attention_is_that_over_what_the_pages_hold(spec, target):
    k, v = numbers(330)
    layer, q = made(spec, k, v), torch.randn(2, 6, 1, 32, generator=torch.Generator().manual_seed(1))
    new = numbers(1, seed=5)
    keys, values = (np.concatenate([x, y.double().numpy()], 2) for x, y in zip(contents(layer), new, strict=True))
    want = reference.attend(q.numpy(), keys, values, scale=0.2)
    np.testing.assert_allclose(attended(layer, q).transpose(1, 2).numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pages_are_those_of_the_keys_before_the_embedding(spec):
    """Keys of known numbers, turned in float64: pages hold the numbers' own codes; what is read is close to the turned keys."""
    k, v = numbers(300)
    turned = torch.from_numpy(reference.turn(k.double().numpy(), 0, ROPE.frequencies)).float() if spec.pre_rope else k
    layer, plain = made(spec, turned, v), filled(KVSpec(**spec.to_json() | {"pre_rope": False}), k, v)
    assert len(layer.pages) == len(plain.pages) > 1
    for a, b in zip((layer.pages[i] for i in range(len(layer.pages))), (plain.pages[i] for i in range(len(plain.pages))), strict=True):
        read = [ops.unpack_page(*x[:2], layer.pages.key) for x in (a, b)]
        # a turn there and back rounds: a number between two codes may take the other one
        assert ((read[0] - read[1]).abs() > 1e-2).float().mean() < 1e-2 and torch.equal(a[2], b[2])
    error = np.abs(contents(layer)[0] - turned.double().numpy())
    assert error.max() <= (2e-3 if spec.key == 16 else 2.2 if isinstance(spec.levels, tuple) else 2 * 8 / (2**spec.key - 1))
    assert error[:, :, : spec.sink].max(initial=0) == 0


def test_a_mean_that_turns_costs_nothing_before_the_embedding():
    """Keys with channels of large mean: after the embedding a scale must span the circle, before it the spread alone."""
    spread = torch.randn(1, 2, 512, 32, generator=torch.Generator().manual_seed(3)) * 0.1
    before = (spread + 4 * torch.randn(32, generator=torch.Generator().manual_seed(4))).double().numpy()
    k = torch.from_numpy(reference.turn(before, 0, ROPE.frequencies)).float()
    errors = {}
    for pre in (False, True):
        layer = made(KVSpec(4, 4, residual=0, pre_rope=pre), k, torch.randn(1, 2, 512, 32))
        errors[pre] = float(np.square(contents(layer)[0] - k.double().numpy()).mean())
    assert errors[True] < errors[False] / 20


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_how_tokens_come_does_not_matter(spec):
    k, v = numbers(300)
    whole = contents(made(spec, k, v))
    for sizes in ([1] * 300, [63, 65, 172]):
        layer, start = MxqCacheLayer(spec, "layer", ROPE), 0
        for n in sizes:
            layer.append(k[:, :, start : start + n], v[:, :, start : start + n])
            start += n
        assert all(np.array_equal(a, b) for a, b in zip(contents(layer), whole, strict=True))


@pytest.mark.parametrize("gone", [1, 40, 64, 100, 200, 290, 300])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_crop_keeps_what_was_read(spec, gone):
    layer = made(spec, *numbers(300))
    before = contents(layer)
    layer.crop(-gone)
    assert layer.get_seq_length() == 300 - gone
    for have, want in zip(contents(layer), before, strict=True):
        np.testing.assert_allclose(have, want[:, :, : 300 - gone], rtol=1e-5, atol=1e-5)
    layer.append(*numbers(90, seed=2))
    assert layer.get_seq_length() == 390 - gone and len(layer.pages) >= max(0, 390 - gone - spec.sink - spec.residual) // 64
    want = [np.concatenate([x[:, :, : 300 - gone], y.double().numpy()], 2) for x, y in zip(before, numbers(90, seed=2), strict=True)]
    for have, exact in zip(contents(layer), want, strict=True):
        assert np.square(have - exact).mean() < (1e-6 if spec.key == spec.value == 16 else 0.3) * np.square(exact).mean()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_batches_copies_and_bytes(spec):
    k, v = numbers(200, batch=3)
    layer = made(spec, k, v)
    q = torch.randn(3, 6, 2, 32, generator=torch.Generator().manual_seed(1))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(attended(other, q), attended(copy.deepcopy(layer), q))
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    want = contents(made(spec, k[[2, 2, 0]], v[[2, 2, 0]]))
    assert all(np.array_equal(a, b) for a, b in zip(contents(layer), want, strict=True))
    layer.batch_repeat_interleave(2)
    assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in layer.tensors()) == cache_nbytes(spec, 200, 3, 32, batch=6, float_bytes=4)
    assert layer.nbytes() == filled(KVSpec(**spec.to_json() | {"pre_rope": False}), *numbers(200, batch=6)).nbytes()


def test_pages_shrink_before_the_embedding_too():
    k, v = numbers(500, batch=1)
    layer = made(KVSpec(8, 8, residual=0, pre_rope=True, budget=1), k, v)
    assert layer.pages.key.bits == layer.pages.value.bits == 2
    assert np.abs(contents(layer)[0] - k.double().numpy()).max() < 3


# -- angles -----------------------------------------------------------------------------------------------------------------------


BASE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=None, pad_token_id=0)
SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "linear": ("LlamaConfig", {"rope_parameters": SCALED | {"rope_type": "linear"}}),
    "yarn": ("LlamaConfig", {"rope_parameters": SCALED | {"rope_type": "yarn"}}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": 150}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("PhiConfig", {}),
}


def family(name):
    cls, values = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, cls)(**BASE | values)).eval()
    for n, p in model.named_parameters():
        if p.dim() == 2 and ("q_proj" in n or "k_proj" in n):
            p.data.mul_(8)
        if n.endswith("k_proj.bias"):
            p.data.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_in_pages_are_those_of_the_projection(name):
    """Pages of 16 bits hold what k_proj, and a norm behind it, gave: the angles, their pairs and positions are the model's own."""
    model, seen = family(name), {}
    replace_attention(model, KVSpec(16, 16, residual=0, sink=3, pre_rope=True))
    for i, block in enumerate(model.model.layers):
        attn = block.self_attn
        source = getattr(attn, "k_norm", attn.k_proj)
        source.register_forward_hook(lambda m, a, out, i=i: seen.setdefault(i, out))
    ids = torch.randint(1, 97, (1, 140), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(ids).past_key_values
    for i, layer in enumerate(cache.layers):
        want = seen[i] if seen[i].dim() == 4 else seen[i].unflatten(-1, (-1, layer.dim))
        want = want if want.shape[1] == layer.heads else want.transpose(1, 2)
        scale = getattr(model.model.rotary_emb, "attention_scaling", 1.0)
        for page in range(2):
            have = ops.unpack_page(*layer.pages[page][:2], layer.pages.key)
            torch.testing.assert_close(have, scale * want[:, :, 3 + 64 * page : 67 + 64 * page], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_writes_the_same_with_exact_pages(name):
    """16 bits before the embedding, padded batches and beams: the same tokens as with the cache of transformers."""
    model = family(name)
    ids = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :30] = ids[1, :30] = 0
    options = [dict(do_sample=False, max_new_tokens=60), dict(num_beams=3, do_sample=False, max_new_tokens=20)]
    want = [model.generate(ids, attention_mask=mask, **o) for o in options]
    replace_attention(model, KVSpec(16, 16, residual=0, sink=2, pre_rope=True))
    assert all(torch.equal(model.generate(ids, attention_mask=mask, **o), w) for o, w in zip(options, want, strict=True))


@pytest.mark.parametrize("config, rule", [
    (transformers.GPT2Config(), "decoder layer 1 of gpt2: the layer has no rotary embedding"),
    (transformers.LlamaConfig(**BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
     "the angles of 'dynamic' change with the length"),
    (transformers.SmolLM3Config(**BASE, no_rope_layers=[1, 0]), "decoder layer 1 of smollm3: the layer has no rotary embedding"),
])
def test_layers_without_fixed_angles_are_refused(config, rule):
    with pytest.raises(ModelError, match=rule):
        rope_of(config, 1)
    with pytest.raises(MxqError):
        MxqCache(config, KVPlan(None, {1: KVSpec(pre_rope=True)}))


def test_other_pairs_of_channels_are_refused():
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**BASE))
    with pytest.raises(ModelError, match="decoder layer 0 .CohereDecoderLayer.: its embedding does not pair the two halves"):
        replace_attention(model, KVSpec(pre_rope=True))
    check_rope(make_model().model.layers[0], 0)
    with pytest.raises(ModelError, match="layer of a cache with pre_rope: the angles of its rotary embedding are not known"):
        MxqCacheLayer(KVSpec(pre_rope=True))


# -- whole layers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [KVSpec(4, 3, residual=0, sink=4, pre_rope=True, levels="normal"), KVSpec(8, 4, residual=20, pre_rope=True),
                                  KVSpec(3, 3, residual=0, levels="normal"), KVSpec(3, 2, residual=0, sink=4, pre_rope=True, levels="normal", outliers=0.05),
                                  KVSpec(4, 8, residual=0, outliers=0.02)], ids=str)
def test_native_layers_read_the_same_pages(spec):
    model = make_sharp_model()
    mxq.replace_linear(model, mxq.Plan(default="w8g32", kv=spec), fuse="layer")
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(1))
    outs = {}
    for fuse in (None, "layer"):
        mxq.nn.fuse_layers(model, fuse)
        with torch.no_grad():
            cache = model(ids[:, :70]).past_key_values
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70, 100)]
            steps += [model(torch.full((2, 1), i), past_key_values=cache).logits for i in range(120)]
        outs[fuse] = torch.cat(steps, 1), cache
    path = model.model.mxq_layers
    assert path.native == 151 and not path.fallbacks
    torch.testing.assert_close(outs["layer"][0], outs[None][0], rtol=0, atol=2e-2)
    assert len(outs["layer"][1].layers[0].pages) == len(outs[None][1].layers[0].pages) > 1
    assert outs["layer"][1].nbytes() == outs[None][1].nbytes()


# -- the spec ------------------------------------------------------------------------------------------------------------------------


def test_names_and_json():
    for spec in (*SPECS[:4], SPECS[5], KVSpec(3, 3, pre_rope=True), KVSpec(8, 2, outliers=0.0125),
                 KVSpec(2, 4, residual=0, sink=4, levels="normal"), KVSpec(4, 4, budget=10**6, pre_rope=True)):
        assert KVSpec.named(spec.name) == spec == KVSpec.parse(spec.to_json()), spec
    assert KVSpec(3, 3, residual=0, sink=4, pre_rope=True, levels="normal").name == "k3v3g64_r0_s4_pre_normal"
    assert KVSpec(3, 3, residual=0, sink=4, pre_rope=True, levels="normal", outliers=0.01).name == "k3v3g64_r0_s4_pre_normal_o0.01"
    book = SPECS[4]
    assert KVSpec.parse(book.to_json()) == book and book.name == "k4v4g64_r0_book" and KVPlan.parse(KVPlan(book).to_json()) == KVPlan(book)
    assert all(x == float(np.float16(x)) for side in book.levels for x in side)
    assert not {"pre_rope", "levels", "outliers"} & set(KVSpec().to_json()) and SPECS[5].to_json()["outliers"] == 0.01
    with pytest.raises(PlanError, match="codebooks of its own are in the plan's file"):
        KVSpec.named(book.name)


@pytest.mark.parametrize(("values", "rule"), [
    ({"outliers": 0.2}, "outliers 0.2: it is a share of the numbers, 0.001 to 0.1, or 0 for none; write for example 0.01"),
    ({"outliers": 1e-4}, "outliers 0.0001: it is a share"),
    ({"outliers": True}, "outliers True: it is a share"),
    ({"outliers": "1%"}, "outliers '1%': it is a share"),
    ({"outliers": 0.01, "budget": 10**6}, "outliers 0.01: pages are halved from their codes alone.*; leave outliers or budget out"),
    ({"outliers": 0.01, "mixed": {"key": 2}}, "outliers 0.01: pages of tokens in two widths have no room for outliers; leave outliers or mixed out"),
    ({"pre_rope": 1}, "pre_rope 1: it must be true or false"),
    ({"pre_rope": True, "rotate": True}, "the Hadamard matrix of rotate mixes the channels"),
    ({"levels": "nf4"}, "levels 'nf4': it is 'normal', or the levels of keys and those of values"),
    ({"levels": "normal", "key": 8}, "codebooks have 2, 3 or 4 bits, the spec 8 for keys and 4 for values"),
    ({"levels": "normal", "budget": 100}, "pages are halved from codes of uniform grids"),
    ({"levels": [[0.0] * 16, [0.0] * 15]}, "levels of values .*: 4 bits have 16 ascending levels within -1 .. 1"),
    ({"levels": [[0.0] * 15 + [1.5], [0.0] * 16]}, "levels of keys"),
    ({"levels": [[0.5] + [0.0] * 15, [0.0] * 16]}, "levels of keys"),
    ({"levels": [["a"] * 16, [0.0] * 16]}, "levels of keys"),
])
def test_specs_that_are_refused(values, rule):
    with pytest.raises(PlanError, match=rule):
        KVSpec.parse(values)


# -- evaluation -----------------------------------------------------------------------------------------------------------------------


def test_the_exact_form_before_the_embedding_evaluates_as_the_model():
    model, tokens = make_sharp_model(), torch.randint(0, 257, (2, 300), generator=torch.Generator().manual_seed(3))
    exact = evaluate(replace_attention(make_sharp_model(), KVSpec(16, 16, residual=0, pre_rope=True)), model, tokens)
    coarse = evaluate(replace_attention(make_sharp_model(), KVSpec(2, 2, residual=0, pre_rope=True)), model, tokens)
    assert exact.kl < 1e-4 < coarse.kl

"""Bits by head: the plan's spelling, and layers whose heads are kept in different pages, beside a layer for each head and numpy's float64."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from test_kv_attention import CACHE, EXACT, LENGTH, VOCAB, build, padded, prompt
from test_kv_attention import cache_of as cache_in
from test_kv_cache import numbers
from test_kv_rope import ROPE

import mxq_ext as mxq
from mxq_ext.errors import MxqWarning, PlanError, ShapeError
from mxq_ext.evaluate import evaluate
from mxq_ext.kv import codebooks, heads, reference
from mxq_ext.kv.attention import replace_attention
from mxq_ext.kv.cache import MxqCache, MxqCacheLayer, cache_nbytes
from mxq_ext.kv.trial import CacheTrial
from mxq_ext.nn.fused import fuse_layers
from mxq_ext.plan import KVPlan, KVSpec, Plan

APART = ((8, 4), (2, 16), (2, 16), (8, 4))
SPECS = [KVSpec(heads=((4, 2), (4, 2), (8, 3), (8, 3)), residual=0), KVSpec(heads=APART, group=32, residual=30, sink=5),
         KVSpec(heads=((16, 2), (3, 8), (16, 2), (4, 4)), residual=100, sink=70), KVSpec(heads=APART[::-1], residual=10, rotate=True),
         KVSpec(heads=((4, 2), (3, 3), (4, 2), (4, 3)), residual=20, sink=3, pre_rope=True), KVSpec(heads=((2, 4), (2, 4), (2, 4), (4, 2)), levels="normal"),
         KVSpec(heads=((4, 4),) * 4, residual=33), KVSpec(heads=((4, 2), (2, 16), (4, 2), (3, 3)), residual=0, sink=2, pre_rope=True, outliers=0.02)]
HEADS, QUERIES = 4, 8


def layer_of(spec, name="layer"):
    return MxqCacheLayer(spec, name, ROPE if spec.pre_rope else None)


def filled(spec, *states):
    layer = layer_of(spec)
    layer.append(*states)
    return layer


class Plain:
    """A layer for each head, and nothing but a concatenation around them."""

    def __init__(self, spec, *states):
        self.layers = [filled(next(p for p, own in zip(spec.parts, spec.pairs.values(), strict=True) if h in own), *(x[:, h : h + 1] for x in states))
                       for h in range(HEADS)]

    def all(self, call, *args):
        for layer in self.layers:
            getattr(layer, call)(*args)

    def attend(self, q, k, v, **options):
        out = []
        for h, layer in enumerate(self.layers):
            layer.update(k[:, h : h + 1], v[:, h : h + 1])
            out.append(layer.attend(q[:, 2 * h : 2 * h + 2], **options))
        return torch.cat(out, 2)


def head_states(layer):
    """The tensors of each head of the model, [B, ...], in one order: pages, sink, tail."""
    order = [h for own in layer.spec.pairs.values() for h in own] if layer.spec.heads else [0]
    out = {h: [] for h in order}
    for part, table in heads.parts_of(layer.pages):
        own = order[part]
        for i in range(len(table)):
            for t in table[i]:
                for j, h in enumerate(own):
                    out[h].append(t.view(layer.batch, len(own), *t.shape[1:])[:, j])
    for buffers, n in ((layer.sink, layer.sink_tokens), (layer.tail, layer.tail_tokens)):
        for x in buffers:
            for j, h in enumerate(order):
                out[h].append(x[:, j, :n])
    return [out[h] for h in sorted(out)]


def check_same(layer, plain):
    for have, alone in zip(head_states(layer), plain.layers, strict=True):
        (want,) = head_states(alone)
        assert len(have) == len(want) and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(have, want, strict=True))
        unequal = sum(int((a != b).sum()) for a, b in zip(have, want, strict=True) if a.dtype == torch.uint8)
        if layer.spec.rotate:  # a product rounds as its shape makes it
            assert unequal <= 1e-3 * sum(a.numel() for a in have)
        else:
            assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in layer.tensors()) == sum(x.nbytes() for x in plain.layers)


def states(tokens, batch=2, seed=0):
    return numbers(tokens, batch=batch, heads=HEADS, seed=seed)


# -- the plan ----------------------------------------------------------------------------------------------------------------------


def test_spelling(tmp_path):
    spec = KVSpec(heads={"0,3": {"key": 8, "value": 4}, "1-2": {"key": 2, "value": 16}}, sink=2)
    assert spec.heads == APART and spec == KVSpec(heads=APART, sink=2) == KVSpec(8, 16, heads=[list(p) for p in APART], sink=2)
    assert (spec.key, spec.value) == (8, 16) and str(spec) == "k8v4-k2v16x2-k8v4g64_s2"
    assert spec.pairs == {(8, 4): (0, 3), (2, 16): (1, 2)} and spec.parts == [KVSpec(8, 4, sink=2), KVSpec(2, 16, sink=2)]
    assert spec.to_json()["heads"] == {"0,3": {"key": 8, "value": 4}, "1-2": {"key": 2, "value": 16}} and not {"key", "value"} & set(spec.to_json())
    for s in SPECS:
        assert KVSpec.parse(s.to_json()) == KVSpec.named(s.name) == s
    assert KVSpec.named("k4v4x3").heads == ((4, 4),) * 3 and KVSpec.named("k4v4").heads is None and KVSpec().parts == [KVSpec()]
    plan = Plan.for_kv(layers={1: spec, 2: {"heads": [[4, 2], [2, 2]]}, 3: "keep"})
    assert plan.kv.spec(2).heads == ((4, 2), (2, 2)) and str(plan.kv) == "k4v4g64, 1: k8v4-k2v16x2-k8v4g64_s2, 2: k4v2-k2v2g64, 3: keep"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [row[0] for row in plan.diff(Plan.for_kv(layers={1: spec, 3: "keep"}))] == ["kv.2"]


@pytest.mark.parametrize(("spec", "text"), [
    ({"heads": {}}, "heads '': head 0 is missing; name every key/value head"),
    ({"heads": {"0,2": {"key": 8, "value": 4}}}, "heads '0,2': head 1 is missing"),
    ({"heads": {"0-2": {"key": 8, "value": 4}, "2": {"key": 4, "value": 4}}}, "heads '2': head 2 is named twice"),
    ({"heads": {"2-1": {"key": 8, "value": 4}}}, "heads '2-1': a range goes from first to last"),
    ({"heads": {"0-1024": {"key": 8, "value": 4}}}, "heads are 0 to 1023"),
    ({"heads": {"a": {"key": 8, "value": 4}}}, "heads 'a': heads are named by their index"),
    ({"heads": {"0": {"key": 8}}}, "heads 0: {'key': 8}: bits of keys and bits of values are expected"),
    ({"heads": {"0": 8}}, "heads 0: 8: bits of keys"),
    ({"heads": "0"}, "heads '0': it names groups of heads, or has a pair of bits for each head"),
    ({"heads": []}, "it names groups of heads"),
    ({"heads": [[4, 4], [4, 5]]}, "head 1: value 5: it must be one of 2, 3, 4, 8, 16"),
    ({"heads": [[4, 4]], "key": 4}, "key 4: bits are given head by head; leave it out"),
    ({"heads": [[4, 4]], "budget": 100}, "heads 'k4v4x1': bits by head do not go with a budget, with mixed, or with codebooks of a plan's own"),
    ({"heads": [[4, 4]], "mixed": {}}, "heads 'k4v4x1': bits by head do not go"),
    ({"heads": [[2, 2]], "levels": [[-1, -0.5, 0.5, 1]] * 2}, "heads 'k2v2x1': bits by head do not go"),
    ({"heads": [[2, 2], [8, 2]], "levels": "normal"}, "codebooks have 2, 3 or 4 bits, the spec 8 for keys"),
])
def test_spellings_that_are_refused(spec, text):
    with pytest.raises(PlanError, match=text) as e:
        KVPlan.parse({"layers": {"7": spec}})
    assert "plan: kv: layer 7: " in str(e.value)


def test_names_that_are_refused():
    with pytest.raises(PlanError, match="kv spec: key 2: bits are given head by head, at most 8"):
        KVSpec(2, heads=APART)
    for name in ("k4v4x0", "k4v4x1025", "k4v4x3-k2v2x1022"):
        with pytest.raises(PlanError, match="a layer has 1 to 1024 key/value heads"):
            KVSpec.named(name)


# -- one layer ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_head_is_kept_as_in_a_layer_of_its_own(spec):
    k, v = states(300)
    plain = Plain(spec, k, v)
    check_same(filled(spec, k, v), plain)
    for sizes in ([1] * 300, [200, 1, 99]):
        layer, start = layer_of(spec), 0
        for n in sizes:
            layer.append(k[:, :, start : start + n], v[:, :, start : start + n])
            start += n
        check_same(layer, plain)
    assert isinstance(layer.pages, heads.HeadPages) == (len(spec.pairs) > 1)
    for tokens in (1, 64, 150, 331):
        layer = filled(spec, *numbers(tokens, batch=2, heads=HEADS, dim=80 if spec.pre_rope or not spec.rotate else 64, dtype=torch.float16))
        assert layer.nbytes() == cache_nbytes(spec, tokens, HEADS, layer.dim, batch=2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attention_is_that_of_a_layer_for_each_head(spec):
    (k, v), g = states(330), torch.Generator().manual_seed(1)
    q = torch.randn(2, QUERIES, 330, 32, generator=g)
    padding = torch.ones(2, 330, dtype=torch.bool)
    padding[1, :9] = False
    for window, softcap in ((0, 0.0), (50, 5.0)):
        plain = Plain(spec, k[:, :, :30], v[:, :, :30])
        options = {"scale": 0.2, "causal": True, "window": window, "softcap": softcap}
        want = torch.cat([plain.attend(q[:, :, i : i + 50], k[:, :, i : i + 50], v[:, :, i : i + 50], mask=padding[:, : i + 50], **options)
                          for i in range(30, 330, 50)], 1)
        for step in (1, 300):
            layer, out = filled(spec, k[:, :, :30], v[:, :, :30]), []
            for i in range(30, 330, step):
                layer.update(k[:, :, i : i + step], v[:, :, i : i + step])
                out.append(layer.attend(q[:, :, i : i + step], mask=padding[:, : i + step], **options))
            check_same(layer, plain)
            torch.testing.assert_close(torch.cat(out, 1), want, rtol=1e-4, atol=1e-2 if spec.rotate else 1e-5)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.rotate], ids=str)
def test_attention_is_that_over_what_numpy_reads(spec, target):
    k, v = states(280)
    layer, whole = filled(spec, k, v), []
    order = [h for own in spec.pairs.values() for h in own]
    for side in (0, 1):
        parts = [layer.sink[side][:, :, : layer.sink_tokens].double().numpy()]
        for i in range(len(layer.pages)):
            page = []
            for _, table in heads.parts_of(layer.pages):
                codes, params = table[i][2 * side : 2 * side + 2]
                fmt = table.formats(i)[side]
                x = np.stack([reference.unpack(codes[h].numpy().tobytes(), params[h].numpy(), fmt) for h in range(table.heads)])
                if side == 0 and spec.pre_rope:
                    x = reference.turn(x, spec.sink + 64 * i, ROPE.frequencies)
                page.append(x.reshape(2, -1, 64, 32))
            parts.append(np.concatenate(page, 1))
        new = states(3, seed=4)[side].double().numpy()
        kept = np.concatenate([*parts, layer.tail[side][:, :, : layer.tail_tokens].double().numpy()], 2)
        whole.append(np.concatenate([kept[:, np.argsort(order)], new], 2))
    q = torch.randn(2, QUERIES, 3, 32, generator=torch.Generator().manual_seed(1))
    layer.update(*states(3, seed=4))
    have = layer.attend(q, scale=0.3, mask=None, causal=True, window=0, softcap=0.0)
    assert layer.tail_tokens >= 3, "the new tokens are not in pages yet"
    want = reference.attend(q.numpy(), *whole, scale=0.3)
    np.testing.assert_allclose(have.transpose(1, 2).numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_crop_and_batches(spec):
    k, v = states(300, batch=3)
    for gone in (1, 40, 100, 263, 300):
        layer, plain = filled(spec, k, v), Plain(spec, k, v)
        for x in (layer, *plain.layers):
            x.crop(-gone)
        assert layer.get_seq_length() == 300 - gone
        check_same(layer, plain)
        layer.append(k, v)
        for h, x in enumerate(plain.layers):
            x.append(k[:, h : h + 1], v[:, h : h + 1])
        check_same(layer, plain)
    for call, arg, index in (("reorder_cache", torch.tensor([2, 2, 0]), [2, 2, 0]), ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
                             ("batch_select_indices", torch.tensor([True, False, True]), [0, 2])):
        layer = filled(spec, k, v)
        getattr(layer, call)(arg)
        check_same(layer, Plain(spec, k[index], v[index]))
        layer.append(*states(70, batch=len(index)))
        assert layer.get_seq_length() == 370
    layer.reset()
    assert layer.nbytes() == layer.get_seq_length() == 0 and layer.tensors() == []
    layer.append(k, v)
    check_same(layer, Plain(spec, k, v))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False, map_location="cpu")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_copy_stands_by_itself(copied, tokens):
    k, v = states(tokens)
    layer = filled(SPECS[1], k, v)
    other = copied(layer)
    for t in layer.tensors():
        t.fill_(7)
    check_same(other, plain := Plain(SPECS[1], k, v))
    q, options = torch.randn(2, QUERIES, 1, 32), {"scale": 1.0, "mask": None, "causal": True, "window": 0, "softcap": 0.0}
    other.update(k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(other.attend(q, **options), plain.attend(q, k[:, :, :1], v[:, :, :1], **options), rtol=1e-4, atol=1e-5)


def test_layers_that_are_refused():
    with pytest.raises(PlanError, match="decoder layer 3: a KV cache of k8v4-k2v16x2-k8v4g64: it has bits for 4 heads, the layer has 3 key/value heads; name"):
        layer_of(KVSpec(heads=APART), "decoder layer 3").append(*numbers(3))
    with pytest.raises(PlanError, match="it has bits for 4 heads, the layer has 2"):
        cache_nbytes(KVSpec(heads=APART), 100, 2, 64)
    layer = filled(SPECS[0], *states(70))
    layer.update(*states(1))
    with pytest.raises(ShapeError, match="attention of 6 query heads over 1 pages of 4 heads in 2 pairs of bits"):
        layer.attend(torch.randn(2, 6, 1, 32), scale=1.0, mask=None, causal=True, window=0, softcap=0.0)


# -- models -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_mha", "qwen2_window"])
def test_sixteen_bits_give_the_same_text(family):
    """All heads in 16 bits; and a side of some heads in 8, so that there are two tables, for a text so short that their rounding does not show."""
    model, exact = build(family), replace_attention(build(family), EXACT)
    count = model.config.num_key_value_heads
    for pairs, tokens in ((((16, 16),) * count, 200), (((8, 16), *((16, 16),) * (count - 2), (8, 16)) if count > 2 else ((16, 16), (16, 8)), 60)):
        packed = replace_attention(copy.deepcopy(model), KVSpec(heads=pairs, residual=EXACT.residual))
        want = model.generate(prompt(), max_new_tokens=tokens, do_sample=False)
        have = packed.generate(prompt(), max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(have.sequences, want) and len(set(want[0, 20:].tolist())) > 5 and isinstance(cache_in(have), MxqCache)
        assert all(len(x.pages) == (tokens + 19 - EXACT.residual) // 64 and x.spec.heads == pairs for x in cache_in(have).layers)
        beams = {"do_sample": False, "max_new_tokens": 40, "num_beams": 2}
        assert tokens < 200 or torch.equal(packed.generate(**padded(), **beams), exact.generate(**padded(), **beams))


@torch.no_grad()
def test_left_padding_and_a_window_in_a_model():
    """Two tables beside one: the logits must be those of pages of 16 bits but for the rounding of 8."""
    model = build("mistral")
    batch, out = padded(2, 230), []
    for spec in (KVSpec(16, 16, residual=10), KVSpec(heads=((16, 8), (8, 16)), residual=10)):
        packed = replace_attention(copy.deepcopy(model), spec)
        first = packed(batch["input_ids"][:, :150], attention_mask=batch["attention_mask"][:, :150], use_cache=True)
        out.append(packed(batch["input_ids"][:, 150:], attention_mask=batch["attention_mask"], use_cache=True, **{CACHE: first[CACHE]}).logits)
    error = (out[1] - out[0]).norm() / out[0].norm()
    assert 0 < error < 0.02


def test_through_a_plan_and_a_checkpoint(tmp_path):
    plan = Plan(default="w8", kv={"default": {"key": 4, "value": 4}, "layers": {"0": {"heads": [[8, 4], [2, 2]], "residual": 0}}})
    model = mxq.replace_linear(build("llama"), plan)
    mxq.save(model, tmp_path / "out")
    loaded = mxq.load(tmp_path / "out")
    assert loaded.mxq_kv == plan.kv and str(loaded.mxq_kv) == "k4v4g64, 0: k8v4-k2v2g64_r0"
    ids = torch.randint(1, VOCAB, (1, LENGTH - 50), generator=torch.Generator().manual_seed(2))
    want, have = (evaluate(m, None, ids) for m in (model, loaded))
    assert have.kv == str(plan.kv) and have.kv_nbytes == want.kv_nbytes and abs(have.perplexity / want.perplexity - 1) < 1e-4
    cache = MxqCache(model.config, plan)
    assert "k8v4-k2v2g64_r0, 0 tokens" in repr(cache.layers[0])
    for bad in ([[4, 4]] * 3, [[4, 4]]):
        with pytest.raises(PlanError, match=f"layer model.layers.0: a KV cache of .*: it has bits for {len(bad)} heads, the layer has 2 key/value heads"):
            replace_attention(build("llama"), Plan.for_kv(layers={0: {"heads": bad}}))


def test_native_layers_step_aside_and_say_so():
    model = mxq.replace_linear(build("llama"), Plan(default="w8", kv=KVSpec(heads=((4, 2), (2, 2)), residual=0)))
    want = model.generate(prompt(tokens=90), max_new_tokens=40, do_sample=False)
    fuse_layers(model, "layer")
    with pytest.warns(MxqWarning, match=r"layer 0 of the cache has heads=\(\(4, 2\), \(2, 2\)\)"):
        have = model.generate(prompt(tokens=90), max_new_tokens=40, do_sample=False)
    assert torch.equal(have, want) and "layer 0 of the cache has heads" in repr(model)


def test_what_is_made_for_one_pair_of_bits_refuses():
    spec = KVSpec(heads=((4, 4), (2, 2)))
    with pytest.raises(PlanError, match="trying widths of k4v4-k2v2g64: widths are tried for all heads alike"):
        CacheTrial(build("llama"), spec)
    with pytest.raises(PlanError, match="codebooks for k4v4-k2v2g64_normal: a layer's codebooks are made for one pair of bits"):
        codebooks.fit_codebooks([], KVSpec(heads=spec.heads, levels="normal"), [None], 16)

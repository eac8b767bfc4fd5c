"""Bits by token: pages of two kinds in a table, which tokens go where, and that masks, crops and copies follow."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import make_sharp_model
from test_kv_cache import numbers
from test_kv_codebooks import levels
from test_kv_ops import LIMIT, OPTIONS, ROWS, packed
from test_kv_ops import numbers as channels

import mxq_ext as mxq
from mxq_ext.errors import FormatError, ModelError, MxqWarning, PlanError, ShapeError
from mxq_ext.evaluate import evaluate
from mxq_ext.kv import ops, reference, salience
from mxq_ext.kv.attention import replace_attention
from mxq_ext.kv.cache import MxqCache, MxqCacheLayer, cache_nbytes
from mxq_ext.kv.ops import PageFormat, PageMix, PageTable
from mxq_ext.kv.trial import CacheTrial
from mxq_ext.plan import KVPlan, KVSpec, Mixed
from mxq_ext.plan.presets import find_kv
from mxq_ext.testing import numeric

SPECS = [KVSpec(4, 4, residual=30, sink=3, mixed=Mixed(2, 2, 3, 2)), KVSpec(16, 8, residual=0, mixed=Mixed(3, 16, 1, 1)),
         KVSpec(4, 3, residual=70, levels="normal", mixed=Mixed(2, 2, 1, 2, True)), KVSpec(8, 4, residual=64, rotate=True, mixed=Mixed(2, 3, 1, 1))]
EXACT = KVSpec(16, 16, residual=20, sink=2, mixed=Mixed(16, 16, 1, 2))


# -- tables ------------------------------------------------------------------------------------------------------------------------


def mixed_table(kinds, heads, pages, d, high, each, seed):
    table = PageTable(*kinds[0], heads, mix=PageMix(*kinds[1], high, each))
    whole = [[], []]
    for p in range(pages):
        kind = kinds[p % each >= high]
        sides = [packed(channels(1, heads, 64, d, seed=seed + 2 * p + i), fmt) for i, fmt in enumerate(kind)]
        table.append(*sides[0], *sides[1])
        for i, (fmt, (codes, params)) in enumerate(zip(kind, sides, strict=True)):
            whole[i].append(np.stack([reference.unpack(codes[h].numpy().tobytes(), params[h].numpy(), fmt) for h in range(heads)])[None])
    return table, *(np.concatenate(w, 2) for w in whole)


def test_attention_over_pages_of_two_kinds(target):
    for i, ((queries, ratio), options) in enumerate(zip(ROWS, OPTIONS, strict=False)):
        d, high, each = (64, 80, 128)[i % 3], 1 + i % 2, 3 + i % 3
        kinds = [[PageFormat(side, b, 64 if side == "keys" or d != 80 else 0, d, levels(b) if book and b < 8 else None)
                  for side, b in zip(ops.SIDES, bits, strict=True)] for bits, book in (((4, 8), i % 2), ((2, 3), i % 3))]
        table, k, v = mixed_table(kinds, 2, (7, 2, 90)[i % 3], d, high, each, i)
        tail = [channels(1, 2, 9, d, seed=90 + j) for j in (0, 1)]
        k, v = (np.concatenate([x, t.double().numpy()], 2) for x, t in zip((k, v), tail, strict=True))
        q = channels(1, 2 * ratio, queries, d, seed=70 + i)
        exact = reference.attend(q.numpy(), k, v, **options)
        lse, twin = torch.full(q.shape[:3], torch.nan), torch.full(q.shape[:3], torch.nan)
        numeric.check(ops.attend(q, table, None, None, *tail, lse=lse, **options), exact, 2 * LIMIT, f"{i} {target}")
        numeric.check(ops.attend_ref(q, table, None, None, *tail, lse=twin, **options), exact, 2 * LIMIT, f"{i} twin")
        want = log_sums(q.double().numpy(), k, **options)
        for have in (lse, twin):
            np.testing.assert_allclose(have.numpy(), want, rtol=1e-5, atol=1e-4)
    assert table.nbytes() == sum(t.nbytes for p in range(len(table)) for t in table[p])
    other = copy.deepcopy(table)
    assert other.mix == table.mix and torch.equal(ops.attend(q, other, None, None, *tail, **options), ops.attend(q, table, None, None, *tail, **options))


def log_sums(q, k, scale=None, causal=True, window=0, softcap=0.0):
    n, t = k.shape[2], q.shape[2]
    scores = q @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    place, key = n - t + np.arange(t)[:, None], np.arange(n)
    hidden = (key > place if causal else key < 0) | ((key <= place - window) if window else key < 0)
    with np.errstate(divide="ignore"):
        return np.logaddexp.reduce(np.where(hidden, -np.inf, scores), 3)


def test_a_query_that_sees_nothing_has_no_sum(target):
    table, *_ = mixed_table([[PageFormat(side, b, 64, 64) for side in ops.SIDES] for b in (4, 2)], 1, 3, 64, 1, 2, 0)
    lse = torch.zeros(1, 2, 5)
    ops.attend(channels(1, 2, 5, 64), table, mask=torch.zeros(1, 192, dtype=torch.bool), lse=lse)
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_tables_that_make_no_sense_are_refused():
    key, value = PageFormat("keys", 4, 64, 64), PageFormat("values", 4, 64, 64)
    with pytest.raises(FormatError, match="keys and values of one head dimension"):
        PageTable(key, value, 1, mix=PageMix(PageFormat("keys", 2, 64, 80), PageFormat("values", 2, 64, 80), 1, 2))
    table = PageTable(key, value, 1, mix=PageMix(PageFormat("keys", 2, 64, 64), value, 1, 2))
    table.append(*key.empty_page(1), *value.empty_page(1))
    with pytest.raises(ShapeError, match="page 1 of a KV cache of 1 heads, keys"):
        table.append(*key.empty_page(1), *value.empty_page(1))
    with pytest.raises(ShapeError, match="lse must be a contiguous float32 tensor"):
        ops.attend(channels(1, 1, 2, 64), PageTable(key, value, 1), lse=torch.zeros(1, 2, 1))


# -- which tokens are salient ---------------------------------------------------------------------------------------------------------


def streamed(spec, q, k, v, sizes, padding=None, scale=0.3):
    """A layer that read tokens in pieces of these sizes with their queries, and what it answered [B, tokens, Hq, D]."""
    layer, out, start = MxqCacheLayer(spec), [], 0
    for n in sizes:
        part = slice(start, start + n)
        layer.update(k[:, :, part], v[:, :, part])
        out.append(layer.attend(q[:, :, part], scale=scale, mask=None if padding is None else padding[:, : start + n], causal=True, window=0, softcap=0.0))
        start += n
    return layer, torch.cat(out, 1)


def orders_of(spec, q, k, padding=None, scale=0.3):
    """The orders of all rounds from plain attention in float64, token by token, for a cache that is exact."""
    batch, heads, tokens, _ = q.shape
    step, room = 64 * spec.round_pages, spec.residual + 64 * spec.round_pages
    keys = np.repeat(k.double().numpy(), heads // k.shape[1], 1)
    first, total, count, orders = spec.sink, np.zeros((batch, tokens)), np.zeros(tokens), []
    for t in range(tokens):
        scores = np.einsum("bhd,bhnd->bhn", q[:, :, t].double().numpy(), keys[:, :, : t + 1]) * scale
        if padding is not None:
            scores = np.where(padding[:, None, : t + 1], scores, -np.inf)
        p = np.exp(scores - np.where(np.isfinite(top := scores.max(-1, keepdims=True)), top, 0))
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
        if t >= first and (t % 16 == 0 or t - first >= room - 16):
            total[:, first : t + 1] += p.mean(1)[:, first:]
            count[first : t + 1] += 1
        if t + 1 - first == room:
            part = slice(first, first + step)
            mean = total[:, part] if spec.mixed.accumulated else total[:, part] / np.maximum(count[part], 1)
            rank, salient = np.argsort(-mean, 1, kind="stable"), 64 * spec.mixed.high
            orders.append(np.concatenate([np.sort(rank[:, :salient], 1), np.sort(rank[:, salient:], 1)], 1))
            first += step
    return orders


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 500, [70, 1, 200, 229], [500]], ids=["one by one", "pieces", "at once"])
def test_tokens_that_queries_look_at_get_the_bits(sizes, accumulated):
    spec = KVSpec(**EXACT.to_json() | {"mixed": {"key": 16, "value": 16, "high": 1, "low": 2, "accumulated": accumulated}})
    k, v = numbers(500)
    q = torch.randn(2, 6, 500, 32, generator=torch.Generator().manual_seed(1))
    padding = torch.ones(2, 500, dtype=torch.bool)
    padding[1, :40] = False
    layer, _ = streamed(spec, q, k, v, sizes, padding)
    want = orders_of(spec, q, k, padding.numpy())
    assert len(layer.orders) == len(want) == 2 and len(layer.pages) == 6
    for have, order in zip(layer.orders, want, strict=True):
        # numbers of the same rank but for rounding may change places
        for b in range(2):
            assert len(set(have[b, :64].tolist()) & set(order[b, :64].tolist())) >= 63
            assert sorted(have[b].tolist()) == list(range(192))


def test_a_prompt_is_ranked_by_its_own_probes():
    k, v = numbers(400)
    q = torch.randn(2, 6, 400, 32, generator=torch.Generator().manual_seed(1))
    layer = MxqCacheLayer(EXACT)
    layer.update(k, v)
    seen = torch.ones(400, 400, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, :30] = False
    layer.store(q, scale=0.3, seen=seen, softcap=0.0)
    scores = np.where(seen.numpy(), (q.double() @ k.double().repeat_interleave(2, 1).mT).numpy() * 0.3, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.nan_to_num(np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)).mean(1)
    probes = np.array([t for t in range(400) if t % 16 == 0 or t >= 380])
    count = (np.arange(400) <= probes[:, None]).sum(0)
    mean = p[:, probes].sum(1) / count
    for r, order in enumerate(layer.orders):
        part = mean[:, 2 + 192 * r : 194 + 192 * r]
        for b in range(2):
            assert len(set(order[b, :64].tolist()) & set(np.argsort(-part[b])[:64].tolist())) >= 63
    assert len(layer.orders) == 1 and layer.tail_tokens == 400 - 2 - 192


def test_caps_are_part_of_the_weights():
    k, _ = numbers(50)
    q = torch.randn(2, 6, 50, 32, generator=torch.Generator().manual_seed(1)) * 5
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.3
    scores = (4 * torch.tanh(scores / 4)).masked_fill(~torch.ones(50, 50, dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1).mean(1)
    total, _ = salience.weights_of_prompt(q, k, None, scale=0.3, softcap=4.0)
    probes = salience.probes_of(0, 50, 16)
    torch.testing.assert_close(total.double(), p[:, probes].sum(1), rtol=1e-4, atol=1e-5)
    over, count = salience.weights_over_tail(q[:, :, probes], k, scores.logsumexp(-1)[:, :, probes].float(), probes, scale=0.3, softcap=4.0, mask=None)
    torch.testing.assert_close(over, total, rtol=1e-4, atol=1e-5)
    assert torch.equal(count, (torch.arange(50) <= probes[:, None]).sum(0, dtype=torch.int32))


# -- a layer ---------------------------------------------------------------------------------------------------------------------------


def contents(layer):
    """Keys and values [B, Hkv, tokens, D] float64 in the order of positions, by numpy from the stored bytes."""
    out, step = [], layer.spec.round_pages
    for side in (0, 1):
        parts = [layer.sink[side][:, :, : layer.sink_tokens].double().numpy()]
        for r, order in enumerate(layer.orders):
            pages = []
            for i in range(step * r, step * (r + 1)):
                bits = (layer.spec.key, layer.spec.value) if i % step < layer.spec.mixed.high else (layer.spec.mixed.key, layer.spec.mixed.value)
                fmt = layer.pages.formats(i)[side]
                assert fmt.bits == bits[side]
                codes, params = layer.pages[i][2 * side : 2 * side + 2]
                x = np.stack([reference.unpack(codes[h].numpy().tobytes(), params[h].numpy(), fmt) for h in range(layer.pages.heads)])
                pages.append(x.reshape(layer.batch, layer.heads, 64, layer.dim))
            x = np.concatenate(pages, 2)
            straight = np.empty_like(x)
            for b in range(layer.batch):
                straight[b][:, order[b].numpy()] = x[b]
            parts.append(straight)
        out.append(np.concatenate([*parts, layer.tail[side][:, :, : layer.tail_tokens].double().numpy()], 2))
    return out


def filled(spec, tokens=460, batch=2):
    k, v = numbers(tokens, batch=batch)
    q = torch.randn(batch, 6, tokens, 32, generator=torch.Generator().manual_seed(1))
    return streamed(spec, q, k, v, [30] * (tokens // 30) + [tokens % 30])[0], k, v


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("spec", [s for s in SPECS if not s.rotate], ids=str)
def test_attention_is_that_over_the_contents(spec, dense, target):
    layer, k, v = filled(spec)
    assert layer.orders and len({tuple(o[0].tolist()) for o in layer.orders} | {tuple(o[1].tolist()) for o in layer.orders}) == 2 * len(layer.orders)
    (new_k, new_v), q = numbers(3, seed=7), torch.randn(2, 6, 3, 32, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 463, dtype=torch.bool)
    mask[1, :100] = False
    if dense:
        mask = mask[:, None] & torch.ones(3, 463, dtype=torch.bool).tril(460) & (torch.rand(2, 3, 463, generator=torch.Generator().manual_seed(5)) < 0.8)
    keys, values = (np.concatenate([x, y.double().numpy()], 2) for x, y in zip(contents(layer), (new_k, new_v), strict=True))
    layer.update(new_k, new_v)
    have = layer.attend(q, scale=0.3, mask=mask, causal=not dense, window=0, softcap=0.0)
    want = reference.attend(q.numpy(), keys, values, scale=0.3, causal=not dense, mask=mask.numpy())
    np.testing.assert_allclose(have.transpose(1, 2).numpy(), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_how_tokens_come_does_not_matter(spec):
    k, v = numbers(460)
    q = torch.randn(2, 6, 460, 32, generator=torch.Generator().manual_seed(1))
    (one, a), (many, b) = (streamed(spec, q, k, v, sizes) for sizes in ([1] * 460, [33, 400, 27]))
    assert [o.shape for o in one.orders] == [o.shape for o in many.orders] and one.tail_tokens == many.tail_tokens
    changed = np.mean([(x != y).float().mean() for x, y in zip(one.orders, many.orders, strict=True)])
    assert changed < 0.02  # of equal rank but for rounding
    assert (a - b).square().mean() < 1e-3 * a.square().mean()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_salient_tokens_are_closer(spec):
    layer, k, v = filled(spec)
    if spec.rotate:
        return
    for side, x in enumerate((k, v)):
        error, step = np.abs(contents(layer)[side] - x.double().numpy()), 64 * spec.round_pages
        high, low = [], []
        for r, order in enumerate(layer.orders):
            for b in range(2):
                at = spec.sink + step * r + order[b].numpy()
                high.append(error[b][:, at[: 64 * spec.mixed.high]].mean())
                low.append(error[b][:, at[64 * spec.mixed.high :]].mean())
        bits = [(spec.key, spec.mixed.key), (spec.value, spec.mixed.value)][side]
        assert (np.mean(high) < np.mean(low)) == (bits[0] > bits[1])
    exact = np.r_[0 : spec.sink, 460 - layer.tail_tokens : 460]
    assert np.array_equal(contents(layer)[0][:, :, exact], k.double().numpy()[:, :, exact])


@pytest.mark.parametrize("gone", [1, 30, 70, 150, 333, 459, 460])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_crop_leaves_the_first_tokens(spec, gone):
    layer, *_ = filled(spec)
    before = contents(layer)
    layer.crop(-gone)
    assert layer.get_seq_length() == 460 - gone and len(layer.pages) == spec.round_pages * len(layer.orders)
    for have, want in zip(contents(layer), before, strict=True):
        np.testing.assert_allclose(have, want[:, :, : 460 - gone], rtol=1e-6, atol=1e-6)
    assert not layer.salience.sum[:, layer.tail_tokens :].any() and not layer.salience.count[layer.tail_tokens :].any()
    layer.append(*numbers(gone, seed=3))
    assert layer.get_seq_length() == 460 and layer.nbytes() == cache_nbytes(spec, 460, 3, 32, batch=2, float_bytes=4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_batches_copies_and_bytes(spec):
    layer, *_ = filled(spec, batch=3)
    (k, v), q = numbers(1, batch=3, seed=7), torch.randn(3, 6, 1, 32, generator=torch.Generator().manual_seed(3))

    def answer(x, index=slice(None)):
        x.update(k[index], v[index])
        return x.attend(q[index], scale=0.3, mask=None, causal=True, window=0, softcap=0.0)

    want, before = answer(copy.deepcopy(layer)), contents(layer)
    assert torch.equal(answer(pickle.loads(pickle.dumps(layer))), want)
    for tokens in (0, 1, 460):
        whole = MxqCacheLayer(spec)
        whole.append(*numbers(tokens, batch=3))
        assert whole.nbytes() == sum(t.nbytes for t in whole.tensors()) == cache_nbytes(spec, tokens, 3, 32, batch=3, float_bytes=4)
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert all(np.array_equal(a, b[[2, 2, 0]]) for a, b in zip(contents(layer), before, strict=True))
    assert torch.equal(answer(layer, [2, 2, 0]), want[[2, 2, 0]])
    assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in layer.tensors()) == cache_nbytes(spec, 461, 3, 32, batch=3, float_bytes=4)
    layer.reset()
    assert layer.nbytes() == 0 and not layer.orders


def test_windows_are_refused():
    layer, k, v = filled(SPECS[0])
    layer.update(k[:, :, :1], v[:, :, :1])
    with pytest.raises(ModelError, match="layer with a sliding window of 9 tokens and k4v4.*: its pages hold tokens out of their order"):
        layer.attend(torch.zeros(2, 6, 1, 32), scale=1.0, mask=None, causal=True, window=9, softcap=0.0)


# -- models ----------------------------------------------------------------------------------------------------------------------------


def test_a_model_writes_the_same_with_exact_pages():
    """Both kinds at 16 bits: padded batches, beams and chunks of a prompt give the tokens of transformers' cache, whatever the order in pages."""
    model = make_sharp_model()
    ids = torch.randint(0, 256, (2, 230), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    options = [dict(do_sample=False, max_new_tokens=100), dict(num_beams=3, do_sample=False, max_new_tokens=10),
               dict(do_sample=False, max_new_tokens=20, prefill_chunk_size=50)]
    want = [model.generate(ids, attention_mask=mask, **o) for o in options]
    replace_attention(model, EXACT)
    assert all(torch.equal(model.generate(ids, attention_mask=mask, **o), w) for o, w in zip(options, want, strict=True))


def test_choosing_by_attention_is_better_than_the_opposite(monkeypatch):
    model, tokens = make_sharp_model(), torch.randint(0, 257, (3, 500), generator=torch.Generator().manual_seed(3))

    def kl(spec):
        return evaluate(replace_attention(make_sharp_model(), spec), model, tokens).kl

    spec = KVSpec(8, 8, residual=0, mixed=Mixed(2, 2, 1, 1))
    high, mixed, low = kl(KVSpec(8, 8, residual=0)), kl(spec), kl(KVSpec(2, 2, residual=0))
    score = salience.Salience.score
    monkeypatch.setattr(salience.Salience, "score", lambda self, *a: -score(self, *a))
    opposite = kl(spec)
    assert high < mixed < 0.7 * opposite and mixed < low


def test_layers_with_windows_are_refused_and_whole_layers_step_aside():
    config = transformers.MistralConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, sliding_window=70, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match="layer model.layers.1: it has a sliding window, pages of mix3.2k2v2 hold tokens out of their order"):
        replace_attention(transformers.MistralForCausalLM(config), find_kv("zipcache"))
    config.layer_types = None
    with pytest.raises(ModelError, match="layer model.layers.0: it has a sliding window"):
        replace_attention(transformers.MistralForCausalLM(config), find_kv("zipcache"))
    model = make_sharp_model()
    mxq.replace_linear(model, mxq.Plan(default="w8g32", kv=SPECS[0]), fuse="layer")
    with pytest.warns(MxqWarning, match="mixed=Mixed"), torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64))
    assert model.model.mxq_layers.native == 0


def test_names_json_and_presets():
    for spec in SPECS:
        assert KVSpec.named(spec.name) == spec == KVSpec.parse(spec.to_json()) and KVPlan.parse(KVPlan(spec).to_json()) == KVPlan(spec)
    assert SPECS[0].name == "k4v4g64_r30_s3_mix3.2k2v2" and SPECS[2].name == "k4v3g64_r70_normal_mix1.2k2v2a" and "mixed" not in KVSpec().to_json()
    for name, accumulated in (("zipcache", False), ("mikv", True)):
        assert find_kv(name).default.mixed.accumulated is accumulated
        MxqCache(make_sharp_model().config, find_kv(name))
    with pytest.raises(PlanError, match="widths are tried for all tokens of a layer alike"):
        CacheTrial(make_sharp_model(), SPECS[0])


@pytest.mark.parametrize(("values", "rule"), [
    ({"mixed": {"key": 5}}, "mixed: key 5: it must be one of 2, 3, 4, 8, 16"),
    ({"mixed": {"high": 0}}, "mixed: high 0: it is a number of pages of a round, 1 to 16"),
    ({"mixed": {"low": 17}}, "mixed: low 17"),
    ({"mixed": {"accumulated": 1}}, "accumulated 1: it must be true or false"),
    ({"mixed": {"bits": 2}}, "mixed {'bits': 2}: it is an object of key, value, high, low, accumulated"),
    ({"mixed": {}, "pre_rope": True}, "it does not go with pre_rope, a budget, or codebooks of one width"),
    ({"mixed": {}, "budget": 100}, "it does not go with pre_rope"),
    ({"mixed": {}, "levels": [[0.0] * 16] * 2}, "it does not go with pre_rope"),
    ({"mixed": {"key": 16}, "levels": "normal"}, "codebooks have 2, 3 or 4 bits, the spec 16 for keys"),
])
def test_specs_that_are_refused(values, rule):
    with pytest.raises(PlanError, match=rule):
        KVSpec.parse(values)

"""What a cache costs and how its bits are chosen: gradients against float64 autograd over explicit pairs, bytes against real caches, choices by brute force."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import make_sharp_model  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from mxq_ext import kv_planning, verbs  # noqa: E402
from mxq_ext.errors import BudgetError, ModelError, MxqWarning, PlanError  # noqa: E402
from mxq_ext.evaluate import evaluate  # noqa: E402
from mxq_ext.kv import reference as numpy_pages  # noqa: E402
from mxq_ext.kv.attention import replace_attention  # noqa: E402
from mxq_ext.kv.cache import MxqCache, cache_nbytes, page_formats  # noqa: E402
from mxq_ext.kv.codebooks import fit_codebooks  # noqa: E402
from mxq_ext.kv.rope import Rope  # noqa: E402
from mxq_ext.kv.trial import CacheTrial  # noqa: E402
from mxq_ext.plan import KVPlan, KVSpec, Plan, solve_joint, solve_kv  # noqa: E402
from mxq_ext.plan.presets import KV_POLICIES, find_kv  # noqa: E402
from mxq_ext.quantizers.kmeans import kmeans_table  # noqa: E402
from mxq_ext.sensitivity import CostTable, KVTable, sense_kv  # noqa: E402
from mxq_ext.sensitivity.kv import METRICS  # noqa: E402
from mxq_ext.stats.walk import sample_labels, window_uniform  # noqa: E402

LENGTH = 150
SPEC = KVSpec(group=32, residual=10, sink=3)


def windows(count=1, length=LENGTH, seed=2):
    return torch.randint(0, 257, (count, length), generator=torch.Generator().manual_seed(seed))


def numpy_round_trip(x, bits, side, spec):
    """x [1, H, T, D] float64 with whole pages behind the sink as numpy packs and unpacks them."""
    fmt = page_formats(KVSpec(bits, bits, group=spec.group), x.shape[3], "layer")[side]
    out = x.clone()
    for h, t in itertools.product(range(x.shape[1]), range(spec.sink, x.shape[2] - 63, 64)):
        out[0, h, t : t + 64] = torch.from_numpy(numpy_pages.unpack(*numpy_pages.pack(x[0, h, t : t + 64].float().numpy(), fmt), fmt))
    return out


class Pairs:
    """Attention in which every pair (query, token) has a key and a value of its own: the token's, and for far pairs a difference of the token on top."""

    def __init__(self, spec):
        self.spec, self.seen = spec, []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        t, group = key.shape[2], query.shape[1] // key.shape[1]
        far = torch.zeros(t, t, dtype=torch.bool)
        for page in range((t - self.spec.sink) // 64):
            first = self.spec.sink + 64 * page
            far[first + 64 + self.spec.residual :, first : first + 64] = True  # from the query on that comes behind the token that fills the tail
        changes = [torch.zeros_like(x).requires_grad_() for x in (key, value)]
        self.seen.append((key.detach(), value.detach(), changes, far))
        k, v = (x[:, :, None] + far[None, None, :, :, None] * d[:, :, None] for x, d in zip((key, value), changes, strict=True))  # [1, H, q, t, D]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("bhqd,bhqtd->bhqt", query, k) * scaling
        p = scores.masked_fill(torch.arange(t) > torch.arange(t)[:, None], -math.inf).softmax(-1)
        out = torch.einsum("bhqt,bhqtd->bhqd", p, v)
        return out.transpose(1, 2), None


def explicit(model, tokens, spec, bits, metric):
    """loss [2 L, C] of one window, in float64."""
    attention = Pairs(spec)
    AttentionInterface.register("explicit_pairs", attention)
    AttentionMaskInterface.register("explicit_pairs", sdpa_mask)
    model = make_sharp_model().double()
    model.set_attn_implementation("explicit_pairs")
    logits = model(tokens, use_cache=False).logits[0]
    labels = sample_labels(logits.detach(), window_uniform(0, 0, tokens.shape[1]))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    out = np.zeros((2 * len(attention.seen), len(bits)))
    for i, (key, value, changes, _) in enumerate(attention.seen):
        for s, x in enumerate((key, value)):
            for b, width in enumerate(bits):
                moved = changes[s].grad * (numpy_round_trip(x, width, s, spec) - x)
                out[2 * i + s, b] = float(0.5 * moved.square().sum() if metric == "fisher" else moved.abs().sum()) / tokens.shape[1]
    return out


@pytest.mark.parametrize("metric", ["fisher", "first_order"])
def test_losses_equal_explicit_pairs(metric):
    model, tokens, bits = make_sharp_model(), windows(), (2, 4)
    got = sense_kv(model, tokens, bits, trial=CacheTrial(model, SPEC), metric=metric)
    want = explicit(model, tokens, SPEC, bits, metric)
    print(metric, got.loss / want)
    assert (want > 0).all() and got.loss == pytest.approx(want, rel=2e-3)
    assert got.settings == {"group": 32, "residual": 10, "sink": 3, "rotate": False}
    assert model.config._attn_implementation == make_sharp_model().config._attn_implementation


def test_attention_error_is_that_of_the_layer_output():
    model, tokens = make_sharp_model(), windows()
    got = sense_kv(model, tokens, (2, 16), trial=CacheTrial(model, SPEC), metric="attention")
    seen = Pairs(SPEC)
    AttentionInterface.register("explicit_pairs", seen)
    AttentionMaskInterface.register("explicit_pairs", sdpa_mask)
    other = make_sharp_model().double()
    other.set_attn_implementation("explicit_pairs")
    outs = []
    handles = [layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: outs.append(args[0].detach())) for layer in other.model.layers]
    other(tokens, use_cache=False)
    base = list(outs)
    for s in range(2):
        calls = iter(range(2))
        rounded = [numpy_round_trip(pair[s], 2, s, SPEC) - pair[s] for pair in seen.seen[:2]]

        def changed(module, query, key, value, mask, scaling=None, s=s, calls=calls, rounded=rounded, **kwargs):
            i, far = next(calls), seen.seen[0][3]
            k, v = (x[:, :, None] + (far[None, None, :, :, None] * rounded[i][:, :, None] if j == s else 0) for j, x in enumerate((key, value)))
            k, v = (x.expand(-1, -1, LENGTH, -1, -1).repeat_interleave(2, 1) for x in (k, v))
            p = (torch.einsum("bhqd,bhqtd->bhqt", query, k) * scaling).masked_fill(torch.arange(LENGTH) > torch.arange(LENGTH)[:, None], -math.inf).softmax(-1)
            return torch.einsum("bhqt,bhqtd->bhqd", p, v).transpose(1, 2), None

        AttentionInterface.register("explicit_changed", changed)
        AttentionMaskInterface.register("explicit_changed", sdpa_mask)
        other.set_attn_implementation("explicit_changed")
        outs.clear()
        other(tokens, use_cache=False)
        want = float((outs[0] - base[0]).square().sum() / base[0].square().sum())  # of the first layer: the second sees its change
        assert got.loss[s, 0] == pytest.approx(want, rel=1e-3) and got.loss[s, 1] < 1e-5 * want
    for h in handles:
        h.remove()


def test_losses_foretell_the_divergence():
    """Nats per token: the sum over layers and sides against the KL of the model with that cache, on the same windows."""
    model, tokens, spec = make_sharp_model(), windows(6, 260), KVSpec(residual=0)
    table = sense_kv(model, tokens, (3, 4, 8), trial=CacheTrial(model, spec))
    for b, width in enumerate(table.bits):
        kl = evaluate(replace_attention(make_sharp_model(), KVSpec(width, width, residual=0)), model, tokens).kl
        print(f"{width} bits: foretold {table.loss[:, b].sum():.2e}, measured {kl:.2e}")
        assert 0.4 < table.loss[:, b].sum() / kl < 2.5


def test_rounding_is_the_cache_s_own():
    """What the trial gives back is what MxqCacheLayer holds, with and without rotation."""
    for rotate in (False, True):
        spec = KVSpec(3, 3, residual=0, sink=5, rotate=rotate)
        cache = MxqCache(make_sharp_model().config, spec)
        x = torch.randn(1, 2, 5 + 128 + 7, 16, generator=torch.Generator().manual_seed(8)) * 3
        layer = cache.layers[0]
        layer.append(x, x)
        trial = CacheTrial(make_sharp_model(), spec)
        from mxq_ext.kv import ops
        from mxq_ext.kv.cache import rotated

        for side, at in (("keys", 0), ("values", 2)):
            held = torch.cat([ops.unpack_page(*layer.pages[p][at : at + 2], (layer.pages.key, layer.pages.value)[at // 2]) for p in range(2)], 2)
            held = rotated(held) if rotate else held
            assert torch.allclose(trial.round_trip(side, 3, x)[:, :, 5:133], held, atol=1e-5)
            assert torch.equal(trial.round_trip(side, 3, x)[:, :, :5], x[:, :, :5]) and torch.equal(trial.round_trip(side, 3, x)[:, :, 133:], x[:, :, 133:])


def test_rounding_before_the_embedding_is_the_cache_s_own():
    spec, model = KVSpec(3, 3, residual=0, sink=5, pre_rope=True, outliers=0.02), make_sharp_model()
    layer = MxqCache(model.config, spec).layers[0]
    x = torch.randn(1, 2, 5 + 128 + 7, 16, generator=torch.Generator().manual_seed(8)) * 3
    layer.append(x, x)
    trial = CacheTrial(model, spec)
    got = trial.round_trip("keys", 3, x)
    for page in range(2):
        first, held = 5 + 64 * page, [t.numpy() for t in layer.pages[page][:2]]
        want = np.stack([numpy_pages.unpack(held[0][h].tobytes(), held[1][h], layer.pages.key) for h in range(2)])
        frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(got[0, :, first : first + 64].numpy(), numpy_pages.turn(want, first, frequencies), atol=1e-4)
    assert trial.settings["pre_rope"] and sense_kv(model, windows(), (2, 4), trial=CacheTrial(model, KVSpec(residual=0, pre_rope=True))).settings["pre_rope"]
    table = sense_kv(model, windows(), (2, 4, 16), trial=trial)
    assert table.settings["outliers"] == 0.02 and all(s.pre_rope and s.outliers == 0.02 for s in solve_kv(table, bits=3).resolve(2))
    for b, width in enumerate(table.bits):  # 16 bits have none
        counted = cache_nbytes(dataclasses.replace(spec, key=width, value=width), 300, 2, 16, batch=3, float_bytes=4)
        assert table.nbytes(300, 3)[:2, b].sum() == counted
    with pytest.raises(PlanError, match="codebooks belong to one width"):
        CacheTrial(model, KVSpec(levels="normal"))
    shared = transformers.Gemma3TextConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                           num_key_value_heads=2, head_dim=16, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(ModelError, match="its layers differ in their rotary embeddings"):
        CacheTrial(transformers.Gemma3ForCausalLM(shared), spec)


@pytest.mark.parametrize("tokens, batch", [(1, 1), (77, 1), (78, 2), (300, 3)])
def test_bytes_are_those_of_a_cache(tokens, batch):
    model = make_sharp_model()
    table = sense_kv(model, windows(), (2, 4, 16), trial=CacheTrial(model, SPEC))
    cache = MxqCache(model.config, KVPlan(KVSpec(2, 16, 32, 10, 3), {1: KVSpec(4, 2, 32, 10, 3)}))
    for layer in cache.layers:
        layer.append(*torch.randn(2, batch, 2, tokens, 16))
    sizes = table.nbytes(tokens, batch)
    assert cache.nbytes() == sizes[0, 0] + sizes[1, 2] + sizes[2, 1] + sizes[3, 0]


def test_anchored_losses_add_up_to_the_kl_of_whole_caches():
    model, tokens, bits = make_sharp_model(), windows(), (2, 4, 16)
    plain, got = (kv_planning.make_kv_table(model, tokens, SPEC, bits=bits, anchored=anchored) for anchored in (False, True))
    assert getattr(model, "mxq_kv", None) is None
    for b in (0, 1):
        packed = replace_attention(copy.deepcopy(model), dataclasses.replace(SPEC, key=bits[b], value=bits[b]))
        kl = evaluate(packed, model, tokens).kl
        assert kl > 0 and got.loss[:, b].sum() == pytest.approx(kl, rel=1e-6) and got.meta["anchored"][str(bits[b])] == pytest.approx(kl, rel=1e-6)
        assert got.loss[:, b] / got.loss[0, b] == pytest.approx(plain.loss[:, b] / plain.loss[0, b], rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_losses_by_head_add_up_to_those_of_layers(metric):
    model, tokens, bits = make_sharp_model(), windows(), (2, 4)
    trial = CacheTrial(model, SPEC)
    whole, heads = (sense_kv(model, tokens, bits, trial=trial, metric=metric, by_head=by_head) for by_head in (False, True))
    each = heads.loss.reshape(2, 2, 2, len(bits))  # layer, head, side, bits
    assert heads.heads == 2 and heads.layers == whole.layers == 2 and (each > 0).all()
    assert each.sum(1).reshape(whole.loss.shape) == pytest.approx(whole.loss, rel=1e-6)
    assert (heads.nbytes(300, 3).reshape(2, 2, 2, -1).sum(1).reshape(whole.loss.shape) == whole.nbytes(300, 3)).all()
    assert KVTable.from_json(json.loads(json.dumps(heads.to_json()))).heads == 2 and "heads" not in whole.to_json()
    with pytest.raises(PlanError, match=r"must be \[2 layers x 3 heads, 2 widths\]"):
        dataclasses.replace(heads, heads=3)
    with pytest.raises(PlanError, match="heads must be their number, it is 0"):
        dataclasses.replace(heads, heads=0)

    class OneHead(CacheTrial):
        """Rounds the keys and values of head 1 alone."""

        def round_trip(self, side, bits, x):
            return torch.cat([x[:, :1], super().round_trip(side, bits, x)[:, 1:]], 1)

    alone = sense_kv(model, tokens, bits, trial=OneHead(model, SPEC), metric=metric)
    assert alone.loss == pytest.approx(each[:, 1].reshape(whole.loss.shape), rel=1e-5)


# -- choosing -------------------------------------------------------------------------------------------------------------------------


def kv_table(layers=2, bits=(2, 4, 8), seed=0, metric="fisher"):
    rng = np.random.default_rng(seed)
    loss = rng.random((2 * layers, 1)) * 4.0 ** -np.array(bits) * rng.uniform(0.5, 2, (2 * layers, len(bits)))
    settings = {"group": 64, "residual": 64, "sink": 0, "rotate": False}
    return KVTable(bits, loss, np.array([[16 * b + 4 for b in bits]] * (2 * layers)), 24, settings, {"metric": metric})


def cost_table(kv, seed=1):
    rng = np.random.default_rng(seed)
    return CostTable([f"u{i}" for i in range(3)], ["w2", "w4", "w8"], rng.random((3, 1)) * 4.0 ** -np.array([2, 4, 8]),
                     np.array([[100, 200, 400], [60, 120, 240], [40, 80, 160]]), np.array([400, 240, 160]), kv=kv)


@pytest.mark.parametrize("pairs", [None, ((2, 2), (4, 2), (4, 4), (8, 8))])
@pytest.mark.parametrize("budget", [28_500, 31_000, 36_000])
def test_joint_choice_is_the_best_there_is(budget, pairs):
    kv = kv_table()
    table = cost_table(kv)
    sizes = kv.nbytes(700, 2)
    each = list(itertools.product(range(3), repeat=2)) if pairs is None else [tuple(kv.bits.index(b) for b in p) for p in pairs]
    best = math.inf
    for weights in itertools.product(range(3), repeat=3):
        for cache in itertools.product(each, repeat=2):
            rows = [(2 * i + s, c) for i, pair in enumerate(cache) for s, c in enumerate(pair)]
            size = sum(table.nbytes[u, c] for u, c in enumerate(weights)) + sum(sizes[r] for r in rows)
            if size <= budget:
                best = min(best, sum(table.loss[u, c] for u, c in enumerate(weights)) + sum(kv.loss[r] for r in rows))
    plan = solve_joint(table, nbytes=budget, context=700, batch=2, pairs=pairs)
    joint = plan.meta["joint"]
    assert joint["weights"]["loss"] + joint["cache"]["loss"] == pytest.approx(best, rel=1e-9)
    assert joint["weights"]["nbytes"] + joint["cache"]["nbytes"] <= budget and (joint["context"], joint["batch"]) == (700, 2)
    specs = plan.kv.resolve(2)
    assert joint["cache"]["nbytes"] == sum(sizes[2 * i + s, kv.bits.index(b)] for i, spec in enumerate(specs) for s, b in enumerate((spec.key, spec.value)))
    assert all(pairs is None or (s.key, s.value) in pairs for s in specs) and Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_longer_contexts_move_bytes_to_the_cache():
    table = cost_table(kv_table())
    least = [int(table.nbytes[:, 0].sum() + table.kv.nbytes(n)[:, 0].sum()) for n in (500, 5000)]
    short, long = (solve_joint(table, nbytes=b + 300, context=n) for b, n in zip(least, (500, 5000), strict=True))
    assert long.meta["joint"]["cache"]["nbytes"] > short.meta["joint"]["cache"]["nbytes"]


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.3, 4.0])
def test_pairs_by_mean_bits(bits):
    """KVTuner's cap: mean of (bits of keys + bits of values) / 2 over the layers."""
    table, pairs = kv_table(3), ((2, 2), (4, 2), (4, 4), (8, 4))
    best = math.inf
    for choice in itertools.product(pairs, repeat=3):
        if sum(map(sum, choice)) / 6 <= bits:
            best = min(best, sum(table.loss[2 * i + s, table.bits.index(b)] for i, pair in enumerate(choice) for s, b in enumerate(pair)))
    specs = solve_kv(table, bits=bits, pairs=pairs).resolve(3)
    assert sum(s.key + s.value for s in specs) / 6 <= bits and all((s.key, s.value) in pairs for s in specs)
    assert sum(table.loss[2 * i + j, table.bits.index(b)] for i, s in enumerate(specs) for j, b in enumerate((s.key, s.value))) == pytest.approx(best)


def test_kv_by_bytes():
    table = kv_table()
    sizes = table.nbytes(1000)
    budget = int(sizes[:, 1].sum())
    specs = solve_kv(table, nbytes=budget, context=1000).resolve(2)
    rows = [(2 * i + j, table.bits.index(b)) for i, s in enumerate(specs) for j, b in enumerate((s.key, s.value))]
    assert sum(sizes[r] for r in rows) <= budget and sum(table.loss[r] for r in rows) <= table.loss[:, 1].sum()


def test_mistakes_in_planning(tmp_path):
    table = cost_table(kv_table())
    with pytest.raises(BudgetError, match=r"for 3 units and a cache of 1 x 1000 tokens: the smallest choice takes [\d,]+ bytes"):
        solve_joint(table, nbytes=1000, context=1000)
    with pytest.raises(PlanError, match="holds no costs of cached keys and values.*mxq sense --kv"):
        solve_joint(cost_table(None), nbytes=10**6, context=1000)
    with pytest.warns(MxqWarning, match=r"a budget of 1,000,000,000 bytes for weights and cache: the largest candidates take [\d,]+ bytes"):
        solve_joint(table, nbytes=10**9, context=1000)
    with pytest.raises(PlanError, match="attention has no unit in common"):
        solve_joint(cost_table(kv_table(metric="attention")), nbytes=10**6, context=1000)
    with pytest.raises(PlanError, match="measured with 2, 4, 8 bits, not 3"):
        solve_kv(table.kv, bits=3, pairs=((3, 3),))
    with pytest.raises(BudgetError, match="exactly one"):
        solve_kv(table.kv)
    with pytest.raises(PlanError, match="a cache of 0 tokens"):
        table.kv.nbytes(0)
    model = make_sharp_model()
    with pytest.raises(PlanError, match=r"windows of 70 tokens: the first page is read from token 78 on"):
        sense_kv(model, windows(1, 70), (2,), trial=CacheTrial(model, SPEC))
    with pytest.raises(PlanError, match=f"choose one of {', '.join(METRICS)}"):
        sense_kv(model, windows(), (2,), trial=CacheTrial(model, SPEC), metric="kl")
    with pytest.raises(PlanError, match="losses must be finite"):
        KVTable((2,), [[1.0], [math.nan]], [[1], [1]], 1, table.kv.settings)
    with pytest.raises(PlanError, match="its settings are group"):
        KVTable((2,), [[1.0], [1.0]], [[1], [1]], 1, {})
    table.save(tmp_path / "cost.json")
    again = CostTable.load(tmp_path / "cost.json")
    assert again.kv.to_json() == table.kv.to_json() and CostTable.load(tmp_path / "cost.json").subset(["w2"]).kv.bits == (2, 4, 8)


def test_models_that_cannot_be_watched_are_refused():
    config = transformers.BloomConfig(vocab_size=257, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(ModelError, match="AttentionInterface"):
        sense_kv(model, windows(), (2,), trial=CacheTrial(make_sharp_model(), SPEC))


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_policies_choose_what_their_own_loss_says(policy):
    model, tokens, chosen = make_sharp_model(), windows(1, 260), KV_POLICIES[policy]
    got = kv_planning.plan_kv(model, tokens, policy, bits=3)
    specs = got.resolve(2)
    assert sum(s.key + s.value for s in specs) / 4 <= 3 and got == KVPlan.parse(got.to_json())
    assert all((s.group, s.residual, s.sink) == (chosen.spec.group, chosen.spec.residual, chosen.spec.sink) for s in specs)
    if chosen.pairs is not None:
        wide = sorted({b for p in chosen.pairs for b in p})
        table = sense_kv(model, tokens, wide, trial=CacheTrial(model, chosen.spec), metric=chosen.metric)

        def loss(pairs):
            return sum(table.loss[2 * i + j, wide.index(b)] for i, pair in enumerate(pairs) for j, b in enumerate(pair))

        best = min(loss(p) for p in itertools.product(chosen.pairs, repeat=2) if sum(map(sum, p)) <= 12)
        assert loss([(s.key, s.value) for s in specs]) == pytest.approx(best)
    assert evaluate(replace_attention(model, got), None, tokens).kv == str(got)


def normalised(x, g, side, fmt):
    """Numbers of [H, 64 n, D] by the range of their groups, and their weights, group by group."""
    numbers, weights = [], []
    for h, t in itertools.product(range(x.shape[0]), range(0, x.shape[1], 64)):
        page, slope = (y[h, t : t + 64] if side == 0 else y[h, t : t + 64].T for y in (x, g))
        size = fmt.group or page.shape[0]
        for r in range(0, page.shape[0], size):
            low, high = page[r : r + size].min(0), page[r : r + size].max(0)
            numbers.append(((2 * page[r : r + size] - low - high) / (high - low)).ravel())
            weights.append((slope[r : r + size] * (high - low) / 2).ravel() ** 2)
    return np.concatenate(numbers), np.concatenate(weights)


def test_codebooks_are_the_best_for_the_numbers_they_were_made_of():
    """Against exact k-means over numbers that were normalized one by one, and against another seed's."""
    spec, rope = KVSpec(3, 2, group=32, residual=0, sink=2, pre_rope=True, levels="normal"), Rope((1.0, 0.3, 0.01))
    r = np.random.default_rng(4)
    samples = [(layer, *(tuple(torch.from_numpy(r.standard_normal((1, 2, 150, 80)).astype(np.float32) ** p) for _ in range(2)) for p in (3, 1)))
               for layer in (1, 0, 1)]
    plan = fit_codebooks(samples, spec, [rope, rope], 80)
    assert plan.spec(0).levels != plan.spec(1).levels and dataclasses.replace(plan.spec(1), levels="normal") == spec
    formats = page_formats(spec, 80, "layer")
    for layer, side in itertools.product((0, 1), (0, 1)):
        parts = []
        for _, states, gradients in (s for s in samples if s[0] == layer):
            x, g = (y[side][0, :, 2:130].double().numpy() for y in (states, gradients))
            if side == 0:
                x, g = (back(y, 2, rope) for y in (x, g))
            parts.append(normalised(x, g, side, formats[side]))
        numbers, weights = (np.concatenate(p) for p in zip(*parts, strict=True))
        count = 2 ** formats[side].bits
        best = kmeans_table(torch.tensor(numbers)[None].float(), torch.tensor(weights)[None], count)[0].numpy()

        def error(levels, numbers=numbers, weights=weights):
            return float((weights * np.abs(numbers[:, None] - np.asarray(levels)).min(1) ** 2).sum())

        have = plan.spec(layer).levels[side]
        assert error(have) < 1.002 * error(best) and error(have) < 0.99 * error(plan.spec(1 - layer).levels[side])
    with pytest.raises(PlanError, match="it has uniform grids"):
        fit_codebooks(samples, KVSpec(3, 2), [None, None], 80)
    samples[1][1][1][0, 0, 3, 3] = math.nan
    with pytest.raises(PlanError, match="codebooks for the values of layer 0: they or their gradients are not finite"):
        fit_codebooks(samples, spec, [rope, rope], 80)


def back(x, start, rope):
    """Turned back: the inverse of numpy's turn, by its matrix at each position."""
    return np.stack([np.linalg.solve(numpy_pages.turn(np.eye(x.shape[-1])[:, None], start + t, rope.frequencies)[:, 0].T, x[:, t].T).T
                     for t in range(x.shape[1])], 1)


def test_bits_are_chosen_by_head():
    """The best there is within the budget, and a cache of such a plan has the bytes that were foretold."""
    flat = kv_table(layers=4, seed=3)
    table = dataclasses.replace(flat, heads=2)
    sizes = table.nbytes(700, 2)
    for pairs, wide in ((None, 0.5), (((2, 2), (4, 2), (8, 8)), 0.25)):
        each = list(itertools.product(range(3), repeat=2)) if pairs is None else [tuple(table.bits.index(b) for b in p) for p in pairs]
        budget = int(sizes[:, 0].sum() + wide * (sizes[:, 1] - sizes[:, 0]).sum())
        best = min(sum(table.loss[2 * i + s, c] for i, pair in enumerate(choice) for s, c in enumerate(pair)) for choice in itertools.product(each, repeat=4)
                   if sum(sizes[2 * i + s, c] for i, pair in enumerate(choice) for s, c in enumerate(pair)) <= budget)
        plan = solve_kv(table, nbytes=budget, context=700, batch=2, pairs=pairs)
        have = [pair for s in plan.resolve(2) for pair in s.heads or ((s.key, s.value),) * 2]
        assert any(s.heads for s in plan.resolve(2))
        assert sum(table.loss[2 * i + s, table.bits.index(b)] for i, pair in enumerate(have) for s, b in enumerate(pair)) == pytest.approx(best)
    assert np.mean([b for s in solve_kv(table, bits=3.5).resolve(2) for pair in s.heads or ((s.key, s.value),) * 2 for b in pair]) <= 3.5
    joint = solve_joint(cost_table(table), nbytes=int(sizes[:, 1].sum()) + 300, context=700, batch=2)
    assert joint.meta["joint"]["cache"]["nbytes"] == sum(sizes[2 * i + s, table.bits.index(b)] for i, pair in enumerate(
        pair for spec in joint.kv.resolve(2) for pair in spec.heads or ((spec.key, spec.value),) * 2) for s, b in enumerate(pair))


def test_a_policy_by_head_of_a_model():
    model, tokens = make_sharp_model(), windows(2, 300)
    for policy, bits in (("kvtuner", 2.5), ("pm_kvq", 3.5)):
        kv = kv_planning.plan_kv(model, tokens, policy, bits=bits, by_head=True)
        pairs = [pair for s in kv.resolve(2) for pair in s.heads or ((s.key, s.value),) * 2]
        assert any(s.heads for s in kv.resolve(2)) and np.mean(pairs) <= bits and set(pairs) <= set(KV_POLICIES[policy].pairs)
        assert evaluate(replace_attention(make_sharp_model(), kv), model, tokens).kl > 0
    with pytest.raises(PlanError, match="KV policy 'kvquant' by head: codebooks are made for the keys and the values of a layer"):
        kv_planning.plan_kv(model, tokens, "kvquant", bits=2, by_head=True)


def test_calibrated_codebooks_of_a_model():
    model, tokens = make_sharp_model(), windows(2, 300)
    got = kv_planning.plan_kv(model, tokens, "kvquant", bits=2.0)
    assert all((s.key, s.value, s.pre_rope, s.sink, s.outliers) == (2, 2, True, 4, 0.01) and isinstance(s.levels, tuple) for s in got.resolve(2))
    assert got == KVPlan.parse(json.loads(json.dumps(got.to_json()))) and len({s.levels for s in got.resolve(2)}) == 2
    dense = kv_planning.plan_kv(model, tokens, "kvquant_dense", bits=2)
    assert all(s.outliers == 0 and s.levels != own.levels for s, own in zip(dense.resolve(2), got.resolve(2), strict=True))
    kl = {}
    for name, kv in {"fitted": got, "dense": dense, "normal": find_kv("kvquant2"), "uniform": KVPlan(KVSpec(2, 2, residual=0, sink=4, pre_rope=True))}.items():
        kl[name] = evaluate(replace_attention(make_sharp_model(), kv), model, windows(4, 300, seed=9)).kl
    assert 0 < kl["fitted"] < kl["dense"] < kl["uniform"] and 0 < kl["normal"] < kl["uniform"]
    for bad in ({"bits": 5}, {"bits": 2.5}, {"nbytes": 10**6}, {}):
        with pytest.raises(PlanError, match="all of its layers have the same bits: 2, 3 or 4"):
            kv_planning.plan_kv(model, tokens, "kvquant", **bad)


def test_policies_that_pages_cannot_hold_are_refused():
    with pytest.raises(PlanError, match="kv preset 'kvquant': it is made by calibration; make its plan first"):
        find_kv("kvquant")
    with pytest.raises(PlanError, match="pages have two kinds of tokens, in fixed shares; zipcache is the nearest"):
        find_kv("qaq")
    with pytest.raises(PlanError, match="'kvtuner': it is made by calibration"):
        find_kv("kvtuner")
    with pytest.raises(PlanError, match="choose one of layerwise, kvtuner, pm_kvq"):
        kv_planning.plan_kv(make_sharp_model(), windows(), "kivi", bits=3)


# -- the line -------------------------------------------------------------------------------------------------------------------------


def test_one_budget_through_the_line(tiny_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i * i} is the square of {i}." for i in range(900)))
    model, _ = verbs.load(tiny_dir)
    with pytest.raises(BudgetError, match="and a cache of 1 x 2000 tokens"):
        verbs.quantize_checkpoint(tiny_dir, tmp_path / "q", nbytes=100_000, context=2000, text=text, windows=2)
    with pytest.raises(BudgetError, match="weights and cache have one budget in bytes"):
        verbs.quantize_checkpoint(tiny_dir, tmp_path / "q", bits=4, context=2000, text=text, windows=2)
    with pytest.raises(PlanError, match="with kv=none: the bits of each layer are planned"):
        verbs.quantize_checkpoint(tiny_dir, tmp_path / "q", nbytes=500_000, context=2000, kv="none", text=text, windows=2)
    done = verbs.quantize_checkpoint(tiny_dir, tmp_path / "q", nbytes=500_000, context=2000, batch=2, text=text, windows=2, method="rtn")
    joint = done["joint"]
    assert joint["weights"]["nbytes"] == done["bytes_on_disk"] and joint["weights"]["nbytes"] + joint["cache"]["nbytes"] <= 500_000
    assert sum(done["cache"].values()) == 2
    loaded, _ = verbs.load(tmp_path / "q")
    cache = MxqCache(loaded.config, loaded.mxq_kv)
    for layer in cache.layers:
        layer.append(*torch.randn(2, 2, 2, 2000, 16))
    assert cache.nbytes() == joint["cache"]["nbytes"]
    assert evaluate(loaded, model, windows()).kv == str(loaded.mxq_kv)


def test_sense_and_plan_verbs(tiny_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i * i} is the square of {i}." for i in range(900)))
    verbs.calibrate_model(tiny_dir, tmp_path / "stats", text_path=text, windows=2)
    sensed = verbs.sense_model(tiny_dir, tmp_path / "stats", tmp_path / "cost.json", candidates=["w2g64_asym", "w4g64_asym"], kv="k4v4g32_s2",
                                  kv_by_head=True)
    assert [row["bits"] for row in sensed["cache"]] == [2, 3, 4, 8, 16]
    assert CostTable.load(tmp_path / "cost.json").kv.heads == 2
    shown = verbs.plan_from_table(tmp_path / "cost.json", tmp_path / "plan.json", nbytes=230_000, context=1500)
    plan = Plan.load(tmp_path / "plan.json")
    assert shown["joint"]["cache"]["nbytes"] + shown["joint"]["weights"]["nbytes"] <= 230_000
    assert all((s.group, s.sink) == (32, 2) for s in plan.kv.resolve(2))
    with pytest.raises(BudgetError, match="give it as nbytes=N"):
        verbs.plan_from_table(tmp_path / "cost.json", tmp_path / "plan.json", bits=3, context=1500)
    with pytest.raises(PlanError, match="costs of a cache by head: no cache is named"):
        verbs.sense_model(tiny_dir, tmp_path / "stats", tmp_path / "cost.json", kv_by_head=True)

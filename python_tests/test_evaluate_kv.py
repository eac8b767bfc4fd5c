"""Evaluating with a packed cache: against the same model token by token, and against dense attention with pages dequantized by numpy."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import make_sharp_model  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

import mxq_ext as mxq  # noqa: E402
from mxq_ext import verbs  # noqa: E402
from mxq_ext.decoding import Decoder  # noqa: E402
from mxq_ext.errors import CheckpointError, ModelError, PlanError  # noqa: E402
from mxq_ext.evaluate import cached_hidden, evaluate  # noqa: E402
from mxq_ext.kv import reference as numpy_pages  # noqa: E402
from mxq_ext.kv.attention import replace_attention  # noqa: E402
from mxq_ext.kv.cache import MxqCache, page_formats  # noqa: E402
from mxq_ext.nn import fuse_layers  # noqa: E402
from mxq_ext.plan import KVPlan, KVSpec, Plan  # noqa: E402
from mxq_ext.plan.presets import KV_PRESETS, find_kv  # noqa: E402

LENGTH = 300


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 257, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def dequantized(x, fmt):
    """x [B, H, T, D] with each whole page of 64 tokens as numpy packs and unpacks it."""
    out = x.double().clone()
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for t in range(0, x.shape[2] - 63, 64):
                out[b, h, t : t + 64] = torch.from_numpy(numpy_pages.unpack(*numpy_pages.pack(x[b, h, t : t + 64].numpy(), fmt), fmt))
    return out


class Dense:
    """Attention over all keys at once in float64, where query q sees token t from its page once the cache would have made that page."""

    def __init__(self, specs):
        self.specs = specs

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        spec, (t, d) = self.specs[module.layer_idx], key.shape[2:]
        k_fmt, v_fmt = page_formats(spec, d, "layer")
        group = query.shape[1] // key.shape[1]
        sides = []
        for x, fmt in ((key, k_fmt), (value, v_fmt)):
            rest = dequantized(x[:, :, spec.sink :], fmt)
            sides.append([y.repeat_interleave(group, 1) for y in (x.double(), torch.cat([x[:, :, : spec.sink].double(), rest], 2))])
        q, place = torch.arange(t)[:, None], torch.arange(t)[None]
        packed = (place >= spec.sink) & (q >= spec.sink + spec.residual + 64 * ((place - spec.sink) // 64 + 1))
        scores = torch.where(packed, query.double() @ sides[0][1].mT, query.double() @ sides[0][0].mT) * scaling
        p = scores.masked_fill(place > q, -math.inf).softmax(-1)
        out = (p * packed) @ sides[1][1] + (p * ~packed) @ sides[1][0]
        return out.to(query.dtype).transpose(1, 2), None


def dense_nll(model, specs, tokens):
    AttentionInterface.register("dense_pages", Dense(specs))
    AttentionMaskInterface.register("dense_pages", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("dense_pages")
    try:
        return evaluate(model, None, tokens).nll_windows
    finally:
        model.set_attn_implementation(before)


SPECS = [KVSpec(2, 2, residual=0), KVSpec(4, 2, group=32, residual=32, sink=3), KVSpec(3, 8, residual=70), KVSpec(2, 3, group=32, residual=128)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_dense_attention_over_dequantized_pages(spec, tokens):
    """Were old tokens not read from their pages, or too early or too late, 2 bits would show it."""
    model = make_sharp_model()
    plain, want = evaluate(model, None, tokens).nll_windows, dense_nll(model, [spec, spec], tokens)
    got = evaluate(replace_attention(model, spec), None, tokens)
    print(spec, "nll", got.nll_windows, "dense", want, "without", plain)
    assert got.nll_windows == pytest.approx(want, rel=2e-6)
    assert max(abs(a - b) for a, b in zip(plain, want, strict=True)) > 1e-4
    assert got.kv == str(spec) and got.kv_nbytes > 0


def test_layers_may_differ(tokens):
    model, kv = make_sharp_model(), KVPlan(KVSpec(2, 2, residual=0), {1: KVSpec(8, 4, residual=32)})
    want = dense_nll(model, kv.resolve(2), tokens)
    assert evaluate(replace_attention(model, kv), None, tokens).nll_windows == pytest.approx(want, rel=2e-6)


def test_equals_one_token_at_a_time(tokens):
    model = replace_attention(make_sharp_model(), KVSpec(2, 2, residual=10))
    got, total, cache = evaluate(model, None, tokens[:1, :200]), 0.0, None
    decoder = Decoder(model)
    for i in range(199):
        total -= float(torch.log_softmax(decoder.step(tokens[:1, i : i + 1]).double(), -1)[0, tokens[0, i + 1]])
    cache = decoder.cache
    assert got.nll == pytest.approx(total / 199, rel=1e-6)
    assert got.kv_nbytes == cache.nbytes()  # 199 and 200 tokens fill the same pages


def test_sixteen_bits_equal_no_cache(tokens):
    model = make_sharp_model()
    plain = evaluate(model, model, tokens)
    packed = evaluate(replace_attention(make_sharp_model(), KVSpec(16, 16, residual=0)), model, tokens)
    print(f"KL of 16 bits {packed.kl:.1e}")
    assert plain.kl == 0 and plain.kv is None and "kv" not in plain.to_dict()
    assert packed.nll_windows == pytest.approx(plain.nll_windows, rel=1e-4) and packed.kl < 1e-5
    record = json.loads(json.dumps(packed.to_dict()))
    assert record["kv"] == "k16v16g64_r0" and record["kv_nbytes"] == packed.kv_nbytes


def test_fewer_bits_cost_more(tokens):
    model, kls = make_sharp_model(), []
    for bits in (8, 4, 3, 2):
        kls.append(evaluate(replace_attention(make_sharp_model(), KVSpec(bits, bits, residual=0)), model, tokens).kl)
    assert kls == sorted(kls) and kls[0] < 0.1 * kls[-1]


@pytest.mark.parametrize("step", [1, 7, 64, 300])
def test_another_cache(step, tokens):
    """transformers' own cache in any steps gives what no cache gives."""
    model = make_sharp_model()
    got = evaluate(model, None, tokens[:, :130], cache=lambda: DynamicCache(config=model.config), step=step)
    assert got.nll_windows == pytest.approx(evaluate(model, None, tokens[:, :130]).nll_windows, rel=1e-5)
    assert got.kv == "DynamicCache" and got.kv_nbytes is None


def test_steps_do_not_matter_to_a_packed_cache(tokens):
    model = replace_attention(make_sharp_model(), KVSpec(2, 2, residual=0))
    whole = evaluate(model, None, tokens[:1])
    assert evaluate(model, None, tokens[:1], cache=lambda: MxqCache(model.config, model.mxq_kv), step=13).nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_cache_that_attention_does_not_read_is_an_error(tokens):
    model = make_sharp_model()  # its attention was not replaced
    with pytest.raises(ModelError, match="its attention did not read the packed cache"):
        cached_hidden(model, tokens[:1, :64], MxqCache(model.config, KVSpec(4, 4)))


def test_the_verb_takes_a_cache(tiny_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * i) for i in range(400)))
    options = {"text": text, "windows": 1, "length": 200, "reference": tiny_dir}
    plain, packed, kivi = (verbs.evaluate_checkpoint(tiny_dir, kv=kv, **options) for kv in (None, "k2v2_r0", "kivi2"))
    assert plain["kl"] == 0 < packed["kl"] and packed["kv"] == "k2v2g64_r0" and kivi["kv"] == str(KV_PRESETS["kivi2"].spec)


def test_a_plan_with_a_cache_is_evaluated_with_it(tiny_dir, tmp_path):
    model, tokenizer = verbs.load(tiny_dir)
    import mxq_ext as mxq

    mxq.replace_linear(model, Plan(default="w8", quantizer={"name": "rtn"}, kv=KVSpec(2, 2, residual=0)))
    mxq.save(model, tmp_path / "q", tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * i) for i in range(400)))
    own, none = (verbs.evaluate_checkpoint(tmp_path / "q", text=text, windows=1, length=200, kv=kv) for kv in (None, "none"))
    assert own["kv"] == "k2v2g64_r0" and "kv" not in none and own["nll"] != none["nll"]


# -- names ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*SPECS, KVSpec(), KVSpec(16, 8, 128, 0, 7, True)], ids=str)
def test_names_of_specs_read_back(spec):
    assert KVSpec.named(spec.name) == spec


def test_find_kv(tmp_path):
    assert find_kv("none") is None
    assert find_kv("k4v2") == KVPlan(KVSpec(4, 2)) and find_kv("kivi4") == KVPlan(KVSpec(4, 4, group=32, residual=128))
    kv = KVPlan(KVSpec(4, 4), {1: None})
    Plan(kv=kv).save(tmp_path / "plan.json")
    (tmp_path / "kv.json").write_text(json.dumps(kv.to_json()))
    Plan().save(tmp_path / "bare.json")
    assert find_kv(tmp_path / "plan.json") == find_kv(tmp_path / "kv.json") == kv
    with pytest.raises(PlanError, match="the plan has none"):
        find_kv(tmp_path / "bare.json")
    with pytest.raises(CheckpointError):
        find_kv(tmp_path / "absent.json")
    with pytest.raises(PlanError, match=r"kv spec 'kivi'.*did you mean 'kivi4'"):
        find_kv("kivi")
    with pytest.raises(PlanError, match=r"kv spec 'w4'.*write for example k4v2g64"):
        find_kv("w4")
    for name in ("k5v2", "k5v4"):
        with pytest.raises(PlanError, match="key 5: it must be one of 2, 3, 4, 8, 16; choose one of them"):
            find_kv(name)


def test_names_in_python():
    assert KVSpec.parse("k4v2g32_r128") == KVSpec(4, 2, group=32, residual=128)
    model = make_sharp_model()
    for name in ("kivi4", "k4v2"):
        assert mxq.replace_attention(model, name).mxq_kv == find_kv(name)
    assert mxq.replace_attention(model, "none").mxq_kv is None
    with pytest.raises(PlanError, match="did you mean 'kivi4'"):
        mxq.replace_attention(model, "kivi")


def test_whole_layers_step_aside_while_a_block_is_watched(tokens, monkeypatch):
    monkeypatch.setenv("MXQ_STRICT", "1")  # a fallback would be an error
    model = make_sharp_model()
    mxq.replace_linear(model, Plan(default="w4g32", kv=KVSpec(4, 4, residual=0)), fuse="layer")
    have, path = evaluate(model, None, tokens), model.model.mxq_layers
    assert have.kv and not path.native and set(path.fallbacks) <= {"no cache"} and not path.paused
    fuse_layers(model, None)
    assert evaluate(model, None, tokens).nll_windows == have.nll_windows

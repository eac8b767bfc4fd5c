"""evaluate.py against whole-window float64 computations and transformers' own generate."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import make_model  # noqa: E402

from mxq_ext import evaluate as module  # noqa: E402
from mxq_ext.errors import ModelError, ShapeError  # noqa: E402
from mxq_ext.evaluate import Evaluation, Reference, evaluate, greedy, greedy_agreement, paired, speed  # noqa: E402


def sharp(seed=0, tied=True):
    """A tiny model whose distributions are not flat."""
    model = make_model(seed=seed, tied=tied)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3.0)
    return model


def noisy(model, size=0.02, seed=3):
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in other.parameters():
            p.add_(size * torch.randn_like(p))
    return other


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 257, (4, 50), generator=torch.Generator().manual_seed(1))


def direct(model, reference, tokens):
    """(nll, kl, top-1) per window in float64 from whole logits."""
    with torch.no_grad():
        q = torch.log_softmax(model(tokens).logits[:, :-1].double(), -1)
        p = torch.log_softmax(reference(tokens).logits[:, :-1].double(), -1)
    nll = -q.gather(2, tokens[:, 1:, None])[..., 0].mean(1)
    return nll, (p.exp() * (p - q)).sum(-1).mean(1), (p.argmax(-1) == q.argmax(-1)).double().mean(1)


@pytest.mark.parametrize("chunk", [7, 49, 64])
def test_equals_a_direct_computation(chunk, tokens):
    reference = sharp()
    model = noisy(reference)
    got = evaluate(model, reference, tokens, chunk=chunk)
    nll, kl, top1 = direct(model, reference, tokens)
    assert got.nll_windows == pytest.approx(nll.tolist(), rel=1e-5)
    assert got.kl_windows == pytest.approx(kl.tolist(), rel=1e-4)
    assert got.top1_windows == pytest.approx(top1.tolist()) and 0 < got.agreement < 1
    assert got.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert (got.windows, got.length, got.scored) == (4, 50, 4 * 49)
    assert got.kl_se == pytest.approx(kl.std().item() / 2, rel=1e-3) and got.nll_se == pytest.approx(nll.std().item() / 2, rel=1e-3)
    assert got.agreement_se == pytest.approx(top1.std().item() / 2)


def test_small_divergences_are_resolved(tokens):
    """A change of the size that 8 bits make; float32 logits must not drown it."""
    reference = sharp()
    model = noisy(reference, 1e-4)
    got = evaluate(model, reference, tokens)
    expected = direct(model, reference, tokens)[1]
    print(f"KL {got.kl:.3e}, float64 {expected.mean().item():.3e}")
    assert 0 < expected.mean() < 1e-4 and got.kl == pytest.approx(expected.mean().item(), rel=0.05)


def test_a_model_against_itself(tokens):
    model = sharp()
    got = evaluate(model, model, tokens)
    assert got.kl == 0 and got.agreement == 1 and got.kl_se == 0


def test_a_reference_is_run_once(tokens, monkeypatch):
    model = sharp(tied=False)
    reference = Reference.of(model, tokens)
    real, ran = module.final_hidden, []
    monkeypatch.setattr(module, "final_hidden", lambda m, t: ran.append(m) or real(m, t))
    other = noisy(model)
    assert evaluate(other, reference, tokens).kl == pytest.approx(direct(other, model, tokens)[1].mean().item(), rel=1e-4)
    assert len(ran) == 4 and all(m is other for m in ran)


def test_logits_are_held_by_chunks(tokens, monkeypatch):
    model = sharp()
    real, largest = module.tail, [0]

    def watched(m, hidden):
        largest[0] = max(largest[0], hidden.shape[0] * hidden.shape[1])
        return real(m, hidden)

    monkeypatch.setattr(module, "tail", watched)
    evaluate(noisy(model), model, tokens, chunk=8)
    assert largest[0] == 8


def test_reference_of_other_tokens_or_of_a_changed_model_is_refused(tokens):
    model = sharp()
    reference = Reference.of(model, tokens)
    with pytest.raises(ShapeError, match="the reference was made of others"):
        evaluate(model, reference, tokens[:2])
    other = noisy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.05)
    with pytest.raises(ModelError, match="has been changed since"):
        evaluate(other, reference, tokens)


def test_without_reference(tokens):
    got = evaluate(sharp(), None, tokens[:1])
    assert got.kl is None and got.kl_se is None and got.agreement is None and got.agreement_se is None and math.isnan(got.nll_se)
    record = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert record["nll_se"] is None and "kl" not in record and record["scored_tokens"] == 49


def test_to_dict_is_json(tokens):
    model = sharp()
    record = json.loads(json.dumps(evaluate(noisy(model), model, tokens).to_dict(), allow_nan=False))
    assert record["kl"] > 0 and len(record["kl_windows"]) == 4 and record["agreement"] < 1 and len(record["tokens_sha256"]) == 64


def test_half_precision_models_are_scored_in_float32(tokens):
    model = sharp()
    half = noisy(model, 0.0).bfloat16()
    got = evaluate(half, model, tokens)
    assert 0 < got.kl < 0.05 and got.nll == pytest.approx(evaluate(model, None, tokens).nll, abs=0.05)


def test_refusals(tokens):
    model = sharp()
    with pytest.raises(ShapeError, match="compare models of one vocabulary"):
        evaluate(make_model(vocab=300), model, tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        evaluate(model, None, tokens)
    with pytest.raises(ShapeError, match="integers"):
        evaluate(model, None, tokens[0])


def test_paired_differences(tokens):
    model = sharp()
    a, b = (evaluate(noisy(model, size), model, tokens) for size in (0.03, 0.01))
    got = paired(a, b)
    kl = torch.tensor(a.kl_windows, dtype=torch.float64) - torch.tensor(b.kl_windows, dtype=torch.float64)
    nll = torch.tensor(a.nll_windows, dtype=torch.float64) - torch.tensor(b.nll_windows, dtype=torch.float64)
    assert got == pytest.approx({"nll": nll.mean().item(), "nll_se": nll.std().item() / 2, "kl": kl.mean().item(), "kl_se": kl.std().item() / 2})
    assert got["kl"] > 0
    assert set(paired(evaluate(model, None, tokens), b)) == {"nll", "nll_se"}
    with pytest.raises(ShapeError, match="not of the same windows"):
        paired(a, evaluate(model, model, tokens.flip(1)))
    one = Evaluation(1, 2, 1, "x", [1.0])
    assert paired(one, one) == {"nll": 0.0, "nll_se": None}


def test_greedy_equals_generate(tokens):
    model = sharp()
    prompt = tokens[0, :9]
    expected = model.generate(prompt[None], attention_mask=torch.ones(1, 9, dtype=torch.int64), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                              pad_token_id=0, eos_token_id=-1)[0, 9:]
    assert torch.equal(greedy(model, prompt, 12), expected)


def test_greedy_agreement(tokens):
    model = sharp()
    assert greedy_agreement(model, model, tokens[:2, :9], 6) == {"prompts": 2, "tokens": 6, "same": 1.0, "prefix": 6.0}
    other = sharp(seed=8)
    mine, theirs = greedy(model, tokens[0, :9], 6), greedy(other, tokens[0, :9], 6)
    got = greedy_agreement(model, other, [tokens[0, :9]], 6)
    equal = (mine == theirs).tolist()
    assert got["same"] == pytest.approx(sum(equal) / 6) and got["same"] < 1
    assert got["prefix"] == (equal + [False]).index(False)
    with pytest.raises(ShapeError, match="no prompts"):
        greedy_agreement(model, other, [], 6)


def test_speed_counts_what_it_says(monkeypatch):
    """A clock that advances by one second per model call: prefill of 20 tokens is 20 tokens/s, a step is 1 token/s."""
    model = sharp().train()
    seen, now = [], [0.0]

    def before(m, args, kwargs):
        seen.append(args[0].shape[1])
        now[0] += 1.0

    model.register_forward_pre_hook(before, with_kwargs=True)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    got = speed(model, prefill=20, decode=5, repeats=2)
    assert got["prefill_tokens_per_s"] == 20 and got["decode_tokens_per_s"] == 1 and got["repeats"] == 2
    assert seen == [20, 1, 1] + 2 * ([20] + 5 * [1]), "a short warm-up, then two rounds with a cache"
    assert model.training
    with pytest.raises(ShapeError, match="at least 1"):
        speed(model, decode=0)

"""Calibration against computations that share nothing with it: hooks on plain forwards, output_attentions, and whole-model autograd."""

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from mxq_ext.errors import CheckpointError, ModelError, MxqWarning, ShapeError  # noqa: E402
from mxq_ext.fileio import read_json, sha256, write_json  # noqa: E402
from mxq_ext.stats import Stats, backward_walk, calibrate, capture_block_inputs, capture_calls, final_hidden, run_from, tail, walk  # noqa: E402
from mxq_ext.stats.calibration import _Calibration  # noqa: E402

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
GATED = {"num_key_value_heads": 2, "intermediate_size": 96}


def make(kind: str):
    torch.manual_seed(0)
    t = transformers
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **GATED)),
        "llama_tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **GATED, tie_word_embeddings=True)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, **GATED, use_sliding_window=True, sliding_window=8,
                                                          max_window_layers=1)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, **GATED, head_dim=16, sliding_window=8)),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=32)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=128)),
    }[kind]()
    # Fresh weights are so small that every distribution is flat; scaled up, attention and logits have something to say.
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(3.0) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p)) if "bias" in name else None
    return model.eval()


KINDS = ("llama", "llama_tied", "qwen2", "gemma2", "opt", "bloom")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


def linears(model):
    """Unit name -> module, written down by hand: linears of the blocks, and the head under its embedding's name if tied."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and (".layers." in n or ".h." in n)}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is (embedding if head.weight is embedding.weight else head))
    return found, name, head


def close(a, b, tolerance=1e-4):
    """Largest difference relative to the largest reference value."""
    worst = ((a - b).abs().max() / b.abs().max()).item()
    print(f"relative difference {worst:.2e}")
    return worst < tolerance


def plain(model, tokens):
    """Unit -> inputs [W*T, K], from hooks on an ordinary forward."""
    blocks, head_name, head = linears(model)
    seen = {}
    handles = [m.register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, a[0].detach().reshape(-1, a[0].shape[-1])))
               for n, m in {**blocks, head_name: head}.items()]
    with torch.no_grad():
        model(tokens)
    for h in handles:
        h.remove()
    return seen


def whole_model_gradients(model, tokens, seed=0):
    """Per window: unit -> (x [T, K], g [T, N], weight gradient [N, K]), from autograd through the whole model."""
    blocks, head_name, head = linears(model)
    def keep(outputs, name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = (args[0].detach().flatten(0, -2), output)

        return hook

    windows = []
    for w in range(tokens.shape[0]):
        outputs = {}
        handles = [m.register_forward_hook(keep(outputs, n)) for n, m in {**blocks, head_name: head}.items()]
        logits = model(tokens[w:w + 1]).logits[0]
        labels = walk.sample_labels(logits.detach(), walk.window_uniform(seed, w, tokens.shape[1]))
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for h in handles:
            h.remove()
        windows.append({n: (x, o.grad.flatten(0, -2), o.grad.flatten(0, -2).T @ x) for n, (x, o) in outputs.items()})
        if w == 0 and head_name not in blocks and model.get_input_embeddings().weight is not head.weight:
            assert torch.allclose(windows[0][head_name][2], head.weight.grad, atol=1e-5)
        model.zero_grad(set_to_none=True)
    return windows


# walk.py -----------------------------------------------------------------------------------------------------------------------------


def test_run_from_any_block_gives_the_models_logits(model, tokens, monkeypatch):
    monkeypatch.setattr(walk, "SLICE", 10)  # 24 positions: two whole slices and a rest
    with torch.no_grad():
        expected = model(tokens).logits
    inputs = capture_block_inputs(model, tokens)
    assert len(inputs.hidden) == 4
    for i, hidden in enumerate(inputs.hidden):
        assert close(run_from(model, i, hidden, inputs.kwargs), expected, 1e-5)
    assert torch.equal(run_from(model, 3, inputs.hidden[3], inputs.kwargs, logits=False), inputs.hidden[3])
    assert close(final_hidden(model, tokens), inputs.hidden[3], 1e-5)
    assert close(tail(model, inputs.hidden[3][:, 5:9]), expected[:, 5:9], 1e-5)


def test_walking_leaves_the_model_as_it_was(tokens):
    model = make("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    capture_block_inputs(model, tokens)
    backward_walk(model, tokens[:1], lambda *a: None)
    assert model.training and all(m.training for m in model.modules())
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    assert all("forward" not in b.__dict__ and not b._forward_hooks and not b._forward_pre_hooks for b in model.model.layers)
    assert all(p.grad is None for p in model.parameters())


def test_backward_walk_equals_autograd(model, tokens, monkeypatch):
    monkeypatch.setattr(walk, "SLICE", 10)
    expected = whole_model_gradients(model, tokens)
    calls = []
    backward_walk(model, tokens, lambda unit, x, g: calls.append((unit, x, g)))
    units = len(expected[0])
    assert len(calls) == 3 * units and [c[0] for c in calls[:units]] == [c[0] for c in calls[units:2 * units]]
    for w in range(3):
        for unit, x, g in calls[w * units:(w + 1) * units]:
            assert close(x, expected[w][unit][0]) and close(g, expected[w][unit][1])


def test_sampled_labels_follow_the_distribution():
    logits = torch.tensor([2.0, 0.0, -1.0, -30.0]).expand(20000, 4)
    counts = torch.bincount(walk.sample_labels(logits, walk.window_uniform(0, 0, 20000)), minlength=4) / 20000
    assert (counts - torch.softmax(logits[0], -1)).abs().max() < 0.015
    assert walk.sample_labels(logits[:1], torch.tensor([0.99999994])) < 4


def test_models_that_cannot_be_walked_are_refused(tokens):
    class Skip(transformers.LlamaForCausalLM):
        pass

    model = Skip(transformers.LlamaConfig(**SMALL, **GATED))
    first, second = model.model.layers[0], model.model.layers[1]
    forward = second.forward
    second.forward = lambda hidden_states, **k: forward(hidden_states, **k)
    handle = second.register_forward_pre_hook(lambda m, a, k: ((a[0] + 1, *a[1:]), k), with_kwargs=True)
    with pytest.raises(ModelError, match="does not take the output of the one before"):
        capture_calls(model, tokens)
    handle.remove()
    # A side input that depends on the text.
    ids = []
    model.model.register_forward_pre_hook(lambda m, a, k: ids.append(k["input_ids"]), with_kwargs=True)
    first.register_forward_pre_hook(lambda m, a, k: (a, {**k, "side": ids[-1].float()}), with_kwargs=True)
    with pytest.raises(ModelError, match="side inputs that depend on the text"):
        capture_calls(model, tokens)


def test_malformed_requests(tokens):
    model = make("llama")
    for bad in (tokens[0], tokens.float(), tokens[:, :1], tokens[:0]):
        with pytest.raises(ShapeError, match="integers \\[W, T\\]"):
            capture_block_inputs(model, bad)
    inputs = capture_block_inputs(model, tokens)
    with pytest.raises(ShapeError, match="the model has 3 blocks"):
        run_from(model, 4, inputs.hidden[3], inputs.kwargs)
    with pytest.raises(ShapeError, match="captured for \\[W, 24, H\\]"):
        run_from(model, 0, inputs.hidden[0][:, :7], inputs.kwargs)
    with pytest.raises(ModelError, match="no linear output head"):
        backward_walk(model.model, tokens, lambda *a: None)


# calibrate ---------------------------------------------------------------------------------------------------------------------------


def weightings_of(model):
    return ("none", "gradient") if "Bloom" in type(model).__name__ else ("none", "attention", "gradient")


def test_second_moments_and_channels_equal_a_plain_forward(model, tokens, tmp_path):
    stats = calibrate(model, tokens, tmp_path / "s", weightings=("none",), fisher=False)
    seen = plain(model, tokens)
    assert set(stats.units) == set(seen)
    for unit, x in seen.items():
        h = stats.hessian(unit)
        assert h.dtype == torch.float32 and torch.equal(h, h.T)
        assert close(h, x.T @ x / len(x))
        channels = stats.channels(unit)
        assert close(channels["absmax"], x.abs().amax(0)) and close(channels["absmean"], x.abs().mean(0))
        assert close(channels["meansq"], x.square().mean(0))
        assert stats.fisher(unit) is None
    with pytest.raises(CheckpointError, match="collected were none"):
        stats.hessian(stats.units[0], "gradient")
    with pytest.raises(CheckpointError, match="gradients were not collected"):
        stats.gradient_scale(stats.units[0])


def test_gram_in_stripes_is_the_whole_product():
    from mxq_ext.stats.collect import add_gram, mirrored

    x = torch.randn(9, 600)
    total = torch.zeros(600, 600)
    add_gram(total, x)
    add_gram(total, x)
    assert close(mirrored(total), 2 * x.T @ x, 1e-5)


def test_forward_and_backward_runs_agree(tokens, tmp_path):
    model = make("llama_tied")
    a = calibrate(model, tokens, tmp_path / "a", weightings=("none", "attention"), fisher=False)
    b = calibrate(model, tokens, tmp_path / "b")
    assert a.units == b.units
    for unit in a.units:
        assert close(a.hessian(unit, "attention"), b.hessian(unit, "attention"), 1e-6)
    assert all(torch.equal(a.kv(1)[k], b.kv(1)[k]) for k in a.kv(1))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "opt"])
def test_attention_weighting_equals_output_attentions(kind, tokens, tmp_path):
    model = make(kind)
    before = model.config._attn_implementation
    stats = calibrate(model, tokens, tmp_path / "s", weightings=("none", "attention"), fisher=False)
    assert model.config._attn_implementation == before
    seen = plain(model, tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    for layer, a in enumerate(attentions):
        w = a.sum(dim=2).mean(dim=1).flatten()
        assert abs(w.mean() - 1) < 1e-5 and w.std() > 0.2, "an even weighting would test nothing"
        for unit in (u for u in stats.units if f".layers.{layer}." in u):
            x = seen[unit]
            expected = (x * w[:, None]).T @ x / len(x) if unit.endswith(("k_proj", "v_proj")) else x.T @ x / len(x)
            assert close(stats.hessian(unit, "attention"), expected)


def test_gradient_weighting_and_fisher_equal_autograd(model, tokens, tmp_path):
    stats = calibrate(model, tokens, tmp_path / "s", weightings=weightings_of(model), fisher_windows=2)
    windows = whole_model_gradients(model, tokens)
    for unit in stats.units:
        x, g = (torch.cat([w[unit][i] for w in windows]) for i in (0, 1))
        weight = g.square().mean(1)
        assert stats.gradient_scale(unit) == pytest.approx(weight.mean().item(), rel=1e-4)
        assert close(stats.hessian(unit, "gradient"), (x * (weight / weight.mean())[:, None]).T @ x / len(x))
        # bfloat16 on disk: half a unit in the eighth bit
        fisher = sum(w[unit][2].square() for w in windows[:2]) / 2
        assert close(stats.fisher(unit), fisher, 2**-8) and stats.fisher(unit).shape == fisher.shape


def test_gradient_scale_predicts_the_loss(tokens, tmp_path):
    """0.5 * scale * sum d H d against the measured KL of a small random change, averaged over changes."""
    model = make("llama")
    many = torch.randint(0, 128, (24, 24), generator=torch.Generator().manual_seed(5))
    stats = calibrate(model, many, tmp_path / "s", fisher_windows=24)
    unit = "model.layers.1.mlp.up_proj"
    weight = dict(model.named_parameters())[unit + ".weight"]
    with torch.no_grad():
        logp = torch.log_softmax(model(many).logits.double(), -1)
        measured, predicted, diagonal = 0.0, 0.0, 0.0
        for seed in range(6):
            d = 2e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight += d
            logq = torch.log_softmax(model(many).logits.double(), -1)
            weight -= d
            measured += (logp.exp() * (logp - logq)).sum(-1).mean().item()
            predicted += 0.5 * stats.gradient_scale(unit) * ((d @ stats.hessian(unit, "gradient")) * d).sum().item()
            diagonal += 0.5 * (stats.fisher(unit) * d.square()).sum().item() / 24
    print(f"measured KL {measured:.3e}, from H {predicted:.3e}, from the Fisher diagonal {diagonal:.3e}")
    assert 0.5 < predicted / measured < 2 and 0.5 < diagonal / measured < 2


def test_units_that_share_an_input_share_the_file_space(tokens, tmp_path):
    stats = calibrate(make("llama"), tokens, tmp_path / "s", weightings=("none",), fisher=False)
    prefix = "model.layers.2."
    assert {u.rpartition(".")[2]: stats.shared_input(u).rpartition(".")[2] for u in stats.units if u.startswith(prefix)} == {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj", "gate_proj": "gate_proj", "up_proj": "gate_proj",
        "down_proj": "down_proj"}
    from safetensors import safe_open

    with safe_open(tmp_path / "s" / "block-002.safetensors", "pt") as f:
        assert sorted(k for k in f.keys() if k.startswith("none/")) == [f"none/{prefix}{n}" for n in (  # noqa: SIM118
            "mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")]


def test_kv_ranges_are_those_of_the_cache(tokens, tmp_path):
    model = make("llama")
    stats = calibrate(model, tokens, tmp_path / "s", weightings=("none",), fisher=False)
    with torch.no_grad():
        out = model(tokens, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    for layer in range(3):
        got = stats.kv(layer)
        for kind, t in (("key", cache.layers[layer].keys), ("value", cache.layers[layer].values)):
            flat = t.transpose(1, 2).reshape(-1, 32)
            assert close(got[f"{kind}_min"], flat.amin(0)) and close(got[f"{kind}_max"], flat.amax(0))
            assert close(got[f"{kind}_absmax"], flat.abs().amax(0))
    with pytest.raises(CheckpointError, match="layer 3"):
        stats.kv(3)


# resuming ----------------------------------------------------------------------------------------------------------------------------


def files(directory):
    return {p.name: sha256(p) for p in directory.iterdir()}


@pytest.mark.parametrize("gradients", [False, True])
def test_an_interrupted_run_ends_with_the_same_bytes(gradients, tokens, tmp_path, monkeypatch):
    """Fails at every file that a run writes, before and after it is there, and goes on."""
    options = {} if gradients else {"weightings": ("none", "attention"), "fisher": False}
    model = make("llama_tied")
    calibrate(model, tokens, tmp_path / "whole", **options)
    expected = files(tmp_path / "whole")
    assert set(expected) == {"stats.json", "head.safetensors", *(f"block-00{i}.safetensors" for i in range(3))}

    class Killed(Exception):
        pass

    import mxq_ext.stats.calibration as calibration

    real, budget, work = calibration.save_tensors, [0], [0]
    counted = _Calibration._backward if gradients else _Calibration._forward

    def dying(path, *a, **k):
        if budget[0] == 0:
            raise Killed
        budget[0] -= 1
        real(path, *a, **k)
        if budget[0] == 0:
            raise Killed

    def counting(self, i, probe):
        work[0] += 1
        return counted(self, i, probe)

    monkeypatch.setattr(calibration, "save_tensors", dying)
    monkeypatch.setattr(_Calibration, counted.__name__, counting)
    attempts = 0
    while True:
        attempts += 1
        budget[0] = 2
        try:
            stats = calibrate(model, tokens, tmp_path / "cut", **options)
            break
        except Killed:
            with pytest.raises(CheckpointError, match="has not been finished"):
                Stats.load(tmp_path / "cut")
            (tmp_path / "cut" / ".block-001.safetensors.77.part").write_bytes(b"what a killed process leaves")
        assert attempts < 40
    assert attempts > 3 and work[0] < attempts + 3, "it must go on, not start again"
    assert files(tmp_path / "cut") == expected and not (tmp_path / "cut" / "walk").exists()
    assert stats.units == Stats.load(tmp_path / "whole").units


def test_a_finished_run_is_opened(tokens, tmp_path, monkeypatch):
    model = make("llama")
    calibrate(model, tokens, tmp_path / "s", fisher=False)
    monkeypatch.setattr(_Calibration, "go", lambda *a: pytest.fail("it ran again"))
    assert calibrate(model, tokens, tmp_path / "s", fisher=False).meta["tokens"]["windows"] == 3


@pytest.mark.parametrize("finished", [True, False])
def test_another_calibration_is_refused(finished, tokens, tmp_path):
    model = make("llama")
    out = tmp_path / "s"
    calibrate(model, tokens, out, fisher=False)
    if not finished:
        write_json(out / "calibrate.json", {"meta": read_json(out / "stats.json")["meta"]})
        (out / "stats.json").unlink()
    with pytest.raises(CheckpointError, match="tokens hash"):
        calibrate(model, tokens.flip(1), out, fisher=False)
    with pytest.raises(CheckpointError, match="settings seed: 0 there, 7 here"):
        calibrate(model, tokens, out, fisher=False, seed=7)
    with pytest.raises(CheckpointError, match="settings weightings"):
        calibrate(model, tokens, out, fisher=False, weightings=("none",))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(CheckpointError, match="model hash"):
        calibrate(model, tokens, out, fisher=False)


def test_damaged_statistics_are_refused(tokens, tmp_path):
    out = tmp_path / "s"
    calibrate(make("llama"), tokens, out, fisher=False)
    block = out / "block-001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"has {len(whole) - 10} bytes, {len(whole)} were written"):
        Stats.load(out)
    block.unlink()
    with pytest.raises(CheckpointError, match="block-001.safetensors is missing"):
        Stats.load(out)
    record = read_json(out / "stats.json")
    record["meta"]["mxq_stats"] = 99
    write_json(out / "stats.json", record)
    with pytest.raises(CheckpointError, match="version 99 is stored"):
        Stats.load(out)
    with pytest.raises(CheckpointError, match="there is no stats.json"):
        Stats.load(tmp_path)


def test_attention_weighting_of_one_linear_for_all_three_is_told_to_be_none(tokens, tmp_path):
    config = transformers.GPTNeoXConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.warns(MxqWarning, match="GPTNeoXForCausalLM has no linear k_proj or v_proj"):
        stats = calibrate(transformers.GPTNeoXForCausalLM(config), tokens, tmp_path / "s", weightings=("attention",))
    unit = "gpt_neox.layers.0.attention.query_key_value"
    assert torch.equal(stats.hessian(unit, "attention"), stats.hessian(unit, "none"))


def test_values_that_are_not_finite_are_told(tokens, tmp_path):
    model = make("llama")
    model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(ModelError, match="model.norm.weight holds values that are NaN or infinite"):
        calibrate(model, tokens, tmp_path / "s")


def test_unknown_units_and_unsupported_models(tokens, tmp_path):
    stats = calibrate(make("llama"), tokens, tmp_path / "s", fisher=False, weightings=("none",))
    assert "lm_head" in stats and "model.embed_tokens" not in stats
    with pytest.raises(CheckpointError, match="closest names: .*layers.1.mlp.up_proj"):
        stats.hessian("model.layers.1.mlp.up_project")
    bloom = make("bloom")
    with pytest.warns(MxqWarning, match="the weighting attention is the plain one here"):  # it has no unit that would need it
        assert "transformer.h.0.self_attention.query_key_value" in calibrate(bloom, tokens, tmp_path / "bloom")
    bloom.transformer.h[0].k_proj = torch.nn.Linear(64, 64)
    with pytest.raises(ModelError, match="cannot be watched"):
        calibrate(bloom, tokens, tmp_path / "b")
    with pytest.raises(ModelError, match="torch.bfloat16, float32 is needed"):
        calibrate(make("llama").bfloat16(), tokens, tmp_path / "b")
    with pytest.raises(ModelError, match="weightings hessian"):
        calibrate(make("llama"), tokens, tmp_path / "b", weightings=("hessian",))


def test_memory_is_one_blocks_sums(tokens, tmp_path, monkeypatch):
    """No more than one block's sums are alive at a time."""
    import gc
    import weakref

    from mxq_ext.stats.collect import BlockSums

    made, alive = weakref.WeakSet(), []
    init, result = BlockSums.__init__, BlockSums.result

    def counted_init(self, *args):
        init(self, *args)
        made.add(self)

    def counted_result(self):
        gc.collect()
        alive.append(len(made))
        return result(self)

    monkeypatch.setattr(BlockSums, "__init__", counted_init)
    monkeypatch.setattr(BlockSums, "result", counted_result)
    calibrate(make("llama"), tokens, tmp_path / "s")
    assert alive == [1] * 4

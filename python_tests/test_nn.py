"""QuantLinear and QuantEmbedding on their own: values, dtypes, copies, state dicts, and what they refuse."""

import copy
import pickle
import re
import sys
import timeit

import pytest
import torch
from conftest import make_model
from torch import nn

from mxq_ext import ops
from mxq_ext.errors import NativeError, ShapeError
from mxq_ext.nn import Held, QuantEmbedding, QuantLinear, replace_linear, set_compute
from mxq_ext.nn.linear import META_KEY, shape_meta
from mxq_ext.plan import Plan
from mxq_ext.qtensor import QTensor, Rectangle, Sparse
from mxq_ext.quantizers import quantize

FORMATS = ["w1g64_fz", "w2g32", "w3g64_asym", "w4g64", "w4g32_fz_bf16", "w5g64", "w6g32_asym", "w8", "nf4g64", "lut3", "fp16", "w3g32_nest"]


def linear(n=48, k=80, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


def rich_qtensor(n=24, k=96, seed=1):
    """Everything a QTensor may hold: two column bands, both permutations, a sparse part."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    left, right = quantize(w[:, :64].contiguous(), "w3g32_asym", method="rtn"), quantize(w[:, 64:].contiguous(), "w8", method="rtn")
    rects = [Rectangle(0, n, 0, 64, left.rectangles[0].format, left.rectangles[0].tensors),
             Rectangle(0, n, 64, k, right.rectangles[0].format, right.rectangles[0].tensors)]
    rowptr = torch.zeros(n + 1, dtype=torch.int32)
    rowptr[3:] = 2
    sparse = Sparse(rowptr, torch.tensor([5, 90], dtype=torch.int32), torch.tensor([0.5, -2.0], dtype=torch.float16))
    q = QTensor((n, k), rects, torch.randperm(n, generator=g).int(), torch.randperm(k, generator=g).int(), sparse)
    q.validate()
    return q


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_computes_with_the_dequantized_weight(fmt, bias):
    source = linear(bias=bias)
    layer = QuantLinear.from_linear(source, fmt)
    assert (layer.in_features, layer.out_features, layer.shape, layer.mxq_kind) == (80, 48, (48, 80), "linear")
    assert layer.format_name == fmt
    x = torch.randn(2, 3, 80)
    want = x.double() @ layer.qtensor().dequantize().double().T + (source.bias.double() if bias else 0)
    got = layer(x)
    assert got.dtype == torch.float32 and got.shape == (2, 3, 48) and not got.requires_grad
    assert (got - want).abs().max() < 1e-4
    # RTN at these widths stays near the float layer; a wrong layout would not.
    bound = {"w1g64_fz": 0.6, "w2g32": 0.6, "lut3": 0.3}.get(fmt, 0.35)
    assert (got - source(x)).norm() / source(x).norm() < bound


def test_the_quantizer_options_reach_the_quantizer():
    source = linear()
    x = torch.randn(256, 80) @ torch.randn(80, 80)
    h = x.T @ x / 256
    plain, gptq = QuantLinear.from_linear(source, "w3g64"), QuantLinear.from_linear(source, "w3g64", method="gptq", hessian=h)
    error = [((layer.qtensor().dequantize() - source.weight) @ x.T).norm().item() for layer in (plain, gptq)]
    assert error[1] < 0.9 * error[0]
    assert gptq.qtensor().info["method"] == "gptq"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_module_leaves_the_packed_bytes_alone(dtype):
    layer = QuantLinear.from_linear(linear(), "w4g32_asym")
    before = {k: v.clone() for k, v in layer.qtensor().to_tensors().items()}
    for cast in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.double(), lambda m: m.type(dtype), lambda m: m.to(dtype)):
        cast(layer)
        after = layer.qtensor().to_tensors()
        assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
        assert layer.blob is layer.packed.blob and layer.blob.dtype == torch.uint8
    assert layer.bias.dtype == dtype
    y = layer(torch.randn(5, 80).to(dtype))
    assert y.dtype == dtype and torch.isfinite(y.float()).all()


def test_moving_to_a_device_without_kernels_is_refused_and_harmless():
    layer = QuantLinear.from_linear(linear(), "w4g64")
    x = torch.randn(80)
    want = layer(x)
    with pytest.raises(NativeError, match="keep the model on the CPU"):
        layer.to("meta")
    assert layer.bias.device.type == "cpu" and torch.equal(layer(x), want)


def test_share_memory_shares_the_packed_bytes():
    layer = QuantLinear.from_linear(linear(), "w4g64").share_memory()
    assert layer.packed.blob.is_shared() and layer.blob is layer.packed.blob


@pytest.mark.parametrize("fmt", ["w3g64_asym", "w3g64_nest"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_are_independent(copier, fmt):
    layer = QuantLinear.from_linear(linear(), fmt)
    other = copier(layer)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    x = torch.randn(4, 80)
    want = layer(x)
    assert torch.equal(other(x), want) and other.blob is other.packed.blob and other.blob is not layer.blob
    other.packed.blob.zero_()
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_tied_modules_stay_tied_in_copies(copier):
    held = Held.of(quantize(torch.randn(50, 64), "w4g32", method="rtn"))
    pair = copier(nn.ModuleDict({"embed": QuantEmbedding(held), "head": QuantLinear(held, owner=False)}))
    assert pair["embed"].held is pair["head"].held
    assert pair["embed"].blob is pair["head"].blob is pair["head"].packed.blob


@pytest.mark.parametrize("q", [quantize(torch.randn(24, 96), f, method="auto") for f in FORMATS] + [rich_qtensor()], ids=[*FORMATS, "rich"])
def test_state_dict_round_trip(q, tmp_path):
    layer = QuantLinear.from_qtensor(q, torch.randn(24))
    state = layer.state_dict()
    assert set(state) == {*q.to_tensors(), "bias", META_KEY}, "canonical tensors, not the packed blob"
    torch.save(state, tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    x = torch.randn(3, 96)
    for target in (QuantLinear.empty((24, 96), q.meta(), torch.zeros(24)), QuantLinear.from_qtensor(copy.deepcopy(q), torch.zeros(24))):
        if target.held.packed is not None:
            target.packed.blob.zero_()
        assert not any(target.load_state_dict(state))
        assert torch.equal(target(x), layer(x))
        for name, t in q.to_tensors().items():
            assert torch.equal(t, target.qtensor().to_tensors()[name])


def test_state_dict_of_a_parent_and_of_tied_children():
    held = Held.of(quantize(torch.randn(50, 64), "w4g32", method="rtn"))
    net = nn.ModuleDict({"embed": QuantEmbedding(held), "norm": nn.LayerNorm(64), "head": QuantLinear(held, torch.randn(50), owner=False)})
    state = net.state_dict()
    assert not [k for k in state if k.startswith("head.") and k != "head.bias"], "a tied weight is saved once"
    empty = Held(shape_meta((50, 64), "w4g32"))
    other = nn.ModuleDict({"embed": QuantEmbedding(empty), "norm": nn.LayerNorm(64),
                           "head": QuantLinear(empty, torch.zeros(50), owner=False)})
    assert not any(other.load_state_dict(state))
    x = torch.randn(2, 64)
    assert torch.equal(other["head"](x), net["head"](x)) and other["head"].blob is other["embed"].blob


def test_load_state_dict_reports_what_does_not_fit():
    source = QuantLinear.from_linear(linear(), "w4g64")
    state = source.state_dict()
    with pytest.raises(RuntimeError, match=re.escape("loading weight of 48 x 80, w3g64: the tensors are 48 x 80, w4g64")):
        QuantLinear.empty((48, 80), "w3g64", torch.zeros(48)).load_state_dict(state)
    target = QuantLinear.empty((48, 80), "w4g64", torch.zeros(48))
    with pytest.raises(RuntimeError, match="Unexpected key.*r7.codes"):
        target.load_state_dict({**state, "r7.codes": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key.*mxq_meta"):
        target.load_state_dict({"bias": torch.zeros(48)})
    missing = {k: v for k, v in state.items() if k != "r0.scales"}
    with pytest.raises(RuntimeError, match="tensor r0.scales is missing"):
        target.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="no description of a quantized weight"):
        target.load_state_dict({**state, META_KEY: torch.zeros(3, dtype=torch.uint8)})
    assert not any(QuantLinear.empty((48, 80), "w4g64", torch.zeros(48)).load_state_dict({}, strict=False).unexpected_keys)


def test_a_waiting_module_says_so():
    layer = QuantLinear.empty((48, 80), "w4g64")
    assert "w4g64, not loaded" in repr(layer) and layer.state_dict() == {}
    for use in (lambda: layer(torch.randn(80)), layer.qtensor, lambda: layer.packed):
        with pytest.raises(NativeError, match="have not been loaded yet"):
            use()
    with pytest.raises(NativeError, match="have not been loaded yet"):
        QuantEmbedding.empty((9, 80), "w4g64")(torch.tensor([1]))


def test_gradients_flow_through_to_the_input():
    layer = QuantLinear.from_linear(linear(), "w4g64")
    x = torch.randn(2, 80, requires_grad=True)
    dy = torch.randn(2, 48)
    layer(x).backward(dy)
    want = dy @ layer.qtensor().dequantize()
    assert (x.grad - want).abs().max() < 1e-5 * want.abs().max()
    assert not list(layer.parameters()) and not layer.bias.requires_grad


def test_weight_is_explained():
    layer = QuantLinear.from_linear(linear(), "w4g64")
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"has no float weight; use .qtensor\(\).dequantize\(\)"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = layer.nothing_like_it


def test_repr_names_format_bits_and_kernel():
    layer = QuantLinear.from_linear(linear(64, 128), "w4g64")
    text = repr(layer)
    assert "in_features=128, out_features=64, bias=True, w4g64, stored_bits=4.250" in text
    assert f"kernel={ops.explain(layer.packed, 1, torch.float32)}" in text
    assert "50, 64, w4g32, stored_bits=4.500, dtype=bfloat16" in repr(QuantEmbedding.from_embedding(nn.Embedding(50, 64,
                                                                                                                 dtype=torch.bfloat16),
                                                                                                    "w4g32"))


def test_wrong_shapes():
    q = quantize(torch.randn(24, 64), "w4g64", method="rtn")
    with pytest.raises(ShapeError, match="the bias must have 24 values, it is .23,."):
        QuantLinear.from_qtensor(q, torch.zeros(23))
    with pytest.raises(ShapeError, match="its description says .24, 64."):
        QuantLinear.empty((24, 65), q.meta())


@pytest.mark.parametrize("fmt", FORMATS)
def test_embedding_looks_up_dequantized_rows(fmt):
    torch.manual_seed(0)
    layer = QuantEmbedding.from_embedding(nn.Embedding(50, 64), fmt)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(layer(ids), layer.qtensor().dequantize()[ids])
    assert (layer.num_embeddings, layer.embedding_dim, layer.mxq_kind) == (50, 64, "embedding")


def test_embedding_follows_the_dtype_of_the_model():
    layer = QuantEmbedding.from_embedding(nn.Embedding(50, 64), "w4g32")
    want = layer(torch.arange(50))
    net = nn.Sequential(layer).to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16 and torch.equal(net(torch.arange(50)), want.to(torch.bfloat16))


def test_the_plan_says_how_linears_read_their_input():
    model = make_model()
    replace_linear(model, Plan.uniform("w4g32", activations="a8"))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.compute == "a8" and "gemv_w4g32_a8__" in repr(layer)
    x = torch.randn(3, layer.in_features)
    eight = layer(x)
    assert torch.equal(eight, ops.linear(x, layer.packed, layer.bias, "a8"))
    set_compute(model, "a16")
    exact = layer(x)
    assert torch.equal(exact, ops.linear(x, layer.packed, layer.bias)) and 1e-4 < (eight - exact).norm() / exact.norm() < 0.02
    with pytest.raises(NativeError, match="compute mode 'a4': there are a16 and a8"):
        set_compute(model, "a4")


def test_the_call_adds_less_than_five_microseconds(monkeypatch):
    layer = QuantLinear.from_linear(linear(8, 32), "w4g32")
    x = torch.randn(1, 32)
    # A native call that takes no time: what is left is what the module adds to it.
    monkeypatch.setattr(ops, "linear", lambda x, packed, bias, compute: x)
    packed, bias = layer.packed, layer.bias

    # In turn, so that a busy spell of the machine meets both; and without the tracer of a coverage run, which counts each line of forward().
    calls, tracer = (lambda: layer(x), lambda: ops.linear(x, packed, bias, "a16")), sys.gettrace()
    sys.settrace(None)
    try:
        with torch.inference_mode():
            rounds = [[timeit.timeit(call, number=200) / 200 for call in calls] for _ in range(200)]
    finally:
        sys.settrace(tracer)
    extra = min(whole for whole, _ in rounds) - min(native for _, native in rounds)
    print(f"QuantLinear adds {extra * 1e6:.2f} us to ops.linear")
    assert extra < 5e-6  # 1 to 2 where nothing else runs

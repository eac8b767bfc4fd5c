"""Modules that move to a GPU and back: the weight is packed anew, forward goes to the CUDA kernels, and nothing of the weight is lost on the way."""

import copy
import pickle

import pretend_gpu as gpu
import pytest
import torch
from conftest import make_model
from cuda_tools import error
from torch import nn

from mxq_ext.cuda import CudaPacked
from mxq_ext.errors import NativeError, ShapeError
from mxq_ext.formats import kernel_format
from mxq_ext.nn import Held, QuantEmbedding, QuantLinear, replace_linear
from mxq_ext.ops import Packed
from mxq_ext.testing import cases


@pytest.fixture
def streams(monkeypatch):
    with gpu.pretend_gpu(monkeypatch) as launched:
        yield launched


def tensors(module) -> dict[str, torch.Tensor]:
    return module.qtensor().to_tensors()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("q", [cases.random_qtensor(f, 37, 130) for f in ("w4g64_asym", "lut3", "nf4g32", "fp16", "w3g32_nest")] + [cases.LAYOUTS[4].make()],
                         ids=lambda q: q.format_name)
def test_there_and_back(streams, q):
    n, k = q.shape
    layer, bias = QuantLinear.from_qtensor(q, torch.randn(n).half()), torch.randn(n).half()
    layer.bias.copy_(bias)
    before, home = tensors(layer), layer.packed.blob
    x = cases.random_x(3, k, torch.float16)
    expected = x.double() @ q.dequantize().double().T + bias.double()

    assert layer.to("cuda") is layer and isinstance(layer.packed, CudaPacked) and layer.held.device == gpu.DEVICE
    assert layer.blob is layer.packed.blob and layer.blob.device == layer.bias.device == gpu.DEVICE
    assert same(tensors(layer), before) and layer.held.nbytes == q.nbytes()
    y = layer(x.to("cuda"))
    assert y.device == gpu.DEVICE and y.dtype == torch.float16 and streams == [gpu.STREAM]
    assert error(y.cpu(), expected) <= 1e-3
    assert f"kernel=mv_{kernel_format(q.format_name)}_a16__sm80" in repr(layer)

    layer.to("cpu")
    assert isinstance(layer.packed, Packed) and layer.blob.device == layer.bias.device == torch.device("cpu")
    assert torch.equal(layer.packed.blob, home), "the very bytes that it was packed to before"
    assert error(layer(x), expected) <= 1e-3 and len(streams) == 1


def test_casts_on_the_device_move_nothing(streams):
    layer = QuantLinear.from_qtensor(cases.random_qtensor("w4g64", 20, 100), torch.randn(20)).to("cuda")
    packed = layer.packed
    layer.to(torch.bfloat16).half()
    assert layer.packed is packed and layer.blob is packed.blob and layer.bias.dtype == torch.float16 and layer.bias.device == gpu.DEVICE
    layer.to("cuda")
    assert layer.packed is packed, "packed once"


def test_device_and_type_at_once(streams):
    layer = QuantLinear.from_qtensor(cases.random_qtensor("w4g64", 20, 100), torch.randn(20)).to("cuda", torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.blob.dtype == torch.uint8 and layer.blob.device == gpu.DEVICE


def test_tied_modules_are_packed_once(streams):
    q = cases.random_qtensor("w4g32", 50, 64)
    held = Held.of(q)
    pair = nn.ModuleDict({"embed": QuantEmbedding(held, torch.float16), "head": QuantLinear(held, owner=False)}).to("cuda")
    assert pair["embed"].held is pair["head"].held and pair["embed"].blob is pair["head"].blob is held.packed.blob
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    rows = pair["embed"](ids.to("cuda"))
    assert rows.device == gpu.DEVICE and torch.equal(rows.cpu(), q.dequantize()[ids].half())
    assert error(pair["head"](rows).cpu(), rows.cpu().double() @ q.dequantize().double().T) <= 1e-3


def test_an_id_out_of_range_is_a_row_of_nan(streams):
    q = cases.LAYOUTS[4].make()
    embed = QuantEmbedding.from_qtensor(q).to("cuda")
    rows = embed(torch.tensor([3, q.shape[0], -1, 0], dtype=torch.int32).to("cuda")).cpu()
    assert rows[1:3].isnan().all() and torch.equal(rows[[0, 3]], q.dequantize()[[3, 0]])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_on_the_device(streams, copier):
    layer = QuantLinear.from_qtensor(cases.random_qtensor("w3g64_asym", 20, 100)).to("cuda")
    other = copier(layer)
    assert other.blob is other.packed.blob and other.blob.data_ptr() != layer.blob.data_ptr() and other.held.device == gpu.DEVICE
    assert same(tensors(other), tensors(layer))


def test_a_state_dict_is_the_same_on_every_device(streams):
    layer = QuantLinear.from_qtensor(cases.LAYOUTS[3].make(), torch.randn(37))
    at_home = layer.state_dict()
    away = layer.to("cuda").state_dict()
    assert at_home.keys() == away.keys() and all(torch.equal(at_home[k], away[k].cpu()) for k in at_home)
    other = QuantLinear.from_qtensor(cases.LAYOUTS[3].make(1), torch.zeros(37)).to("cuda")
    assert not any(other.load_state_dict(away)) and isinstance(other.packed, CudaPacked)
    x = cases.random_x(2, 160, torch.float16).to("cuda")
    assert torch.equal(other(x).cpu(), layer(x).cpu())


def test_a_waiting_module_is_packed_where_it_waits(streams):
    q = cases.random_qtensor("w4g64", 48, 80)
    layer = QuantLinear.empty((48, 80), "w4g64").to("cuda").half()
    layer.load_state_dict(QuantLinear.from_qtensor(q).state_dict())
    assert isinstance(layer.packed, CudaPacked) and layer.blob.device == gpu.DEVICE and same(tensors(layer), q.to_tensors())


def test_inputs_elsewhere_and_what_kernels_cannot_do(streams):
    layer = QuantLinear.from_qtensor(cases.random_qtensor("w4g64", 20, 100)).to("cuda")
    x = cases.random_x(2, 100, torch.float16)
    with pytest.raises(ShapeError, match="the weight is packed for cuda:0, x is on cpu; move x and the module to the same device"):
        layer(x)
    with pytest.raises(ShapeError, match="the table is packed for cuda:0, ids are on cpu; move ids and the module to the same device"):
        QuantEmbedding(layer.held)(torch.tensor([1]))
    with pytest.raises(NativeError, match="forward only"):
        layer(x.to("cuda").requires_grad_())
    layer.compute = "a8"
    with pytest.raises(NativeError, match="the CUDA kernels read x as it is"):
        layer(x.to("cuda"))


def test_a_device_that_has_no_kernels():
    """The module is left as it was."""
    layer = QuantLinear.from_qtensor(cases.random_qtensor("w4g64", 20, 100), torch.randn(20))
    x = torch.randn(100)
    want, packed = layer(x), layer.packed
    with pytest.raises(NativeError, match="moving QuantLinear to meta: packing a weight of 20 x 100 for meta: there are kernels for CPUs and"):
        layer.to("meta")
    assert layer.packed is packed and layer.bias.device.type == "cpu" and torch.equal(layer(x), want)


def test_a_whole_model(streams, new_parameters):
    """Logits of a tiny Llama with tied embedding, computed on the device, against those of the same packed model on the CPU."""
    model = replace_linear(make_model(), "w4g32")
    ids = torch.arange(40).reshape(2, 20) % 250
    with torch.no_grad():
        want = model(ids).logits
        packed = model.lm_head.packed.blob
        got = model.to("cuda")(ids.to("cuda")).logits
        assert got.device == gpu.DEVICE and len(streams) > 14 and set(streams) == {gpu.STREAM}
        assert error(got.cpu(), want.double()) <= 1e-5
        back = model.to("cpu")(ids).logits
    assert torch.equal(back, want) and torch.equal(model.lm_head.packed.blob, packed)

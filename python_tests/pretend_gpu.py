"""A CUDA device that is none: tensors in host memory that say they are on ``cuda:0``, and the kernels of the CPU executor behind ``mxq_ext.cuda``.

What moves to the device, what is launched there and what comes back is then the code that a GPU runs; only the memory and the kernels' processor differ.
An operation of torch with tensors of both places is an error, as it is with a GPU, and what the host waits for is written down.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import cuda_tools
import torch
import transformers.generation  # noqa: F401 - it looks for devices when it is first imported: not when there is a pretended one
from torch.overrides import TorchFunctionMode

from mxq_ext import cuda
from mxq_ext.kv import cuda as kv_cuda
from mxq_ext.nn import fused, fused_cuda

DEVICE = torch.device("cuda", 0)
STREAM, CAPTURING = 4711, 4712
_CALLS = {"linear": cuda.LinearCall, "kv_attend": kv_cuda.AttendCall, "run_layers": fused_cuda.LayersCall}


#: Operations of torch that move numbers between places, or choose by indices that may be anywhere.
_MOVING = {"to", "cuda", "cpu", "copy_", "__setitem__", "__getitem__", "__get__", "__set__", "_has_compatible_shallow_copy_type"}
#: Operations whose result the host has to wait for.
_WAITING = {"item", "tolist", "numpy", "nonzero", "equal", "allclose", "masked_select", "unique", "__bool__", "__int__", "__float__", "__index__"}
#: Those that make a tensor of numbers that the host has.
_MAKING = {"tensor", "as_tensor"}
FROM_HOST, TO_HOST, BY_MASK, BY_HOST = "copy from the host", "copy to the host", "index by a mask", "index from the host"


class OnGpu(torch.Tensor):
    """What torch computes from it is on the device as well."""

    device, is_cuda, is_cpu = DEVICE, True, False

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.detach().clone())


def _tensors(values) -> Iterator[torch.Tensor]:
    for v in values:
        if isinstance(v, torch.Tensor):
            yield v
        elif isinstance(v, tuple | list):
            yield from _tensors(v)


def _pinned(t: torch.Tensor) -> torch.Tensor:
    """Says that it is; there is no such memory without a GPU. What is computed from it does not say so."""
    t.pinned = True
    return t


class _Placement(TorchFunctionMode):
    """``.to("cuda")``, ``.to("cpu")`` and ``device="cuda"`` make tensors of the kind above and of the usual one; what is not pinned is waited for."""

    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if any(issubclass(t, OnGpu) for t in types):
            self._look(name, args, kwargs)
        if name == "pin_memory":
            return _pinned(args[0].clone())
        if name in ("to", "cuda", "cpu"):
            said = (*args[1:], *kwargs.values())
            place = next((torch.device(a) for a in said if isinstance(a, str | torch.device)), None) if name == "to" else torch.device(name)
            dtype = next((a for a in said if isinstance(a, torch.dtype)), args[0].dtype)
            kind = type(args[0]) if place is None else OnGpu if place.type == "cuda" else torch.Tensor
            if place is not None and place.type not in ("cpu", "cuda"):
                return function(*args, **kwargs)
            if isinstance(args[0], OnGpu) and kind is torch.Tensor:
                self.waits.append("cpu")
            elif kind is OnGpu:
                self._copied(args[0], any(a is True for a in args[1:]) or kwargs.get("non_blocking"))
            moved = args[0] if isinstance(args[0], OnGpu) == (kind is OnGpu) else args[0].clone().as_subclass(kind)
            return moved if moved.dtype == dtype else moved.type(dtype)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = "cpu"
            if name in _MAKING and not isinstance(args[0], OnGpu):
                self.waits.append(FROM_HOST)
            return function(*args, **kwargs).as_subclass(OnGpu)
        if kwargs.pop("pin_memory", False):
            return _pinned(function(*args, **kwargs))
        return function(*args, **kwargs)

    def _copied(self, source: torch.Tensor, non_blocking: bool) -> None:
        """To the device, from wherever it is."""
        if not isinstance(source, OnGpu) and not (non_blocking and getattr(source, "pinned", False)):
            self.waits.append(FROM_HOST)

    def _look(self, name: str, args: tuple, kwargs: dict) -> None:
        if name in _WAITING or (name == "where" and len(args) == 1):
            self.waits.append(name)
        elif name in ("__getitem__", "__setitem__"):
            self._index(*args)
        elif name == "copy_" and isinstance(args[0], OnGpu):
            self._copied(args[1], kwargs.get("non_blocking") or args[2:] == (True,))
        elif name == "copy_":
            self.waits.append(TO_HOST)
        if name not in _MOVING:
            places = {str(t.device) for t in _tensors([*args, *kwargs.values()]) if t.dim() or isinstance(t, OnGpu)}
            assert len(places) < 2, f"{name} of tensors on {' and '.join(sorted(places))}"

    def _index(self, x: torch.Tensor, index, value=None) -> None:
        """``x[index]``, and ``x[index] = value``: indices of the host are copied, and numbers of one place that go to the other."""
        parts = index if isinstance(index, tuple) else (index,)
        tensors = [t for t in parts if isinstance(t, torch.Tensor) and t.dim()]
        if not isinstance(x, OnGpu):
            assert not any(isinstance(t, OnGpu) for t in tensors), "index of tensors on cpu and cuda:0"
            if isinstance(value, OnGpu):
                self.waits.append(TO_HOST)
            return
        if any(t.dtype == torch.bool for t in tensors):
            self.waits.append(BY_MASK)
        if any(isinstance(p, list) for p in parts) or any(not isinstance(t, OnGpu) for t in tensors):
            self.waits.append(BY_HOST)
        if isinstance(value, torch.Tensor) and value.dim():
            self._copied(value, False)


class Launches(list):
    """Streams of the launches so far; ``names`` of the functions; ``waits``: what the host waited for; ``capturing``: whether a graph is said to be;
    ``calls``: the structs of whole layers that were launched, as bytes; ``captures`` and ``replays`` of graphs of them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []
        self.calls: list[bytes] = []
        self.capturing = False
        self.graph: Graph | None = None  #: that is being captured
        self.captures = self.replays = 0

    @contextlib.contextmanager
    def capture(self, graph, stream, capture_error_mode):
        """As torch.cuda.graph: what is launched inside is not run."""
        self.graph, self.capturing = graph, True
        self.captures += 1
        yield
        self.graph, self.capturing = None, False


class Frozen:
    """A call of whole layers as a graph keeps it: what the host writes to its structs later does not show."""

    def __init__(self, address: int):
        self.call = fused_cuda.LayersCall.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(fused_cuda.LayersCall)))
        layers = fused_cuda.LayerDesc * self.call.layers
        self.layers = layers.from_buffer_copy(ctypes.string_at(self.call.layer, ctypes.sizeof(layers)))
        self.call.layer = ctypes.addressof(self.layers)

    def words(self) -> bytes:
        """All that the call says, but for the stream and the host's address of the layers."""
        whole = fused_cuda.LayersCall.from_buffer_copy(self.call)
        whole.layer = whole.stream = 0
        return bytes(whole) + bytes(self.layers)


class Graph:
    """As torch.cuda.CUDAGraph. Of the launches it can hold those of whole layers."""

    def __init__(self, launches: Launches, run):
        self.launches, self.run, self.kept = launches, run, []

    def replay(self):
        self.launches.append(STREAM)
        self.launches.names.append("replay")
        self.launches.replays += 1
        for frozen in self.kept:
            self.run(ctypes.addressof(frozen.call))


@contextlib.contextmanager
def pretend_gpu(monkeypatch, capability: int = 80, sms: int = 108, **schedule):
    """Inside, ``cuda:0`` is the device above. Gives a list of the streams that launches went to; its ``waits`` are the names of what was waited for.
    ``schedule``: see ``simt.Library.configure``."""
    streams = Launches()
    functions = cuda_tools.Functions(cuda_tools.library(), **schedule)

    def noted(name):
        def call(*args):
            if name == "run_layers":
                frozen = Frozen(args[0])
                streams.calls.append(frozen.words())
                if streams.graph is not None:
                    assert frozen.call.stream == CAPTURING, "a launch on another stream is no part of the graph"
                    streams.graph.kept.append(frozen)
                    return 0
            assert streams.graph is None, f"{name} is captured"
            streams.append(_CALLS[name].from_address(args[0]).stream if name in _CALLS else args[-1])
            streams.names.append(name)
            return getattr(functions, name)(*args)

        return call

    host = ("blob_sizes", "prepack", "unpack", "workspace_nbytes", "explain", "kernel_name", "error_text", "layouts", "kv_workspace_nbytes", "kv_explain",
            "layers_workspace_nbytes")
    launching = ("linear", "dequantize", "embedding", "kv_attend", "kv_pack", "run_layers")
    library = SimpleNamespace(**{n: getattr(functions, n) for n in host}, **{n: noted(n) for n in launching})
    runtime = cuda.Runtime(library, capability, sms)

    def runtime_of(device):
        assert device == DEVICE, f"kernels are asked for on {device}"
        return runtime

    with monkeypatch.context() as patch, _Placement(streams.waits):
        patch.setattr(cuda, "runtime", runtime_of)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: streams.capturing)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM if streams.graph is None else CAPTURING))
        patch.setattr(torch.cuda, "Stream", SimpleNamespace)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(streams, functions.run_layers))
        patch.setattr(torch.cuda, "graph", streams.capture)
        patch.setattr(fused, "PLAIN", (*fused.PLAIN, OnGpu))
        yield streams

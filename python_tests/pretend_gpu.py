"""A CUDA device that is none: tensors in host memory that say they are on ``cuda:0``, and the kernels of the CPU executor behind ``mxq_ext.cuda``.

What moves to the device, what is launched there and what comes back is then the code that a GPU runs; only the memory and the kernels' processor differ.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import cuda_tools
import torch
from torch.overrides import TorchFunctionMode

from mxq_ext import cuda

DEVICE = torch.device("cuda", 0)
STREAM = 4711


class OnGpu(torch.Tensor):
    """What torch computes from it is on the device as well."""

    device, is_cuda, is_cpu = DEVICE, True, False

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.detach().clone())


class _Placement(TorchFunctionMode):
    """``.to("cuda")``, ``.to("cpu")`` and ``device="cuda"`` make tensors of the kind above and of the usual one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("to", "cuda", "cpu"):
            said = (*args[1:], *kwargs.values())
            place = next((torch.device(a) for a in said if isinstance(a, str | torch.device)), None) if name == "to" else torch.device(name)
            dtype = next((a for a in said if isinstance(a, torch.dtype)), args[0].dtype)
            kind = type(args[0]) if place is None else OnGpu if place.type == "cuda" else torch.Tensor
            if place is not None and place.type not in ("cpu", "cuda"):
                return function(*args, **kwargs)
            moved = args[0] if isinstance(args[0], OnGpu) == (kind is OnGpu) else args[0].clone().as_subclass(kind)
            return moved if moved.dtype == dtype else moved.type(dtype)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = "cpu"
            return function(*args, **kwargs).as_subclass(OnGpu)
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretend_gpu(monkeypatch, capability: int = 80, sms: int = 108):
    """Inside, ``cuda:0`` is the device above. Gives a list of the streams that launches went to."""
    streams: list[int] = []
    functions = cuda_tools.Functions(cuda_tools.library())

    def noted(name):
        def call(*args):
            streams.append(cuda.LinearCall.from_address(args[0]).stream if name == "linear" else args[-1])
            return getattr(functions, name)(*args)

        return call

    host = ("blob_sizes", "prepack", "unpack", "workspace_nbytes", "explain", "kernel_name", "error_text")
    library = SimpleNamespace(**{n: getattr(functions, n) for n in host}, **{n: noted(n) for n in ("linear", "dequantize", "embedding")})
    runtime = cuda.Runtime(library, capability, sms)

    def runtime_of(device):
        assert device == DEVICE, f"kernels are asked for on {device}"
        return runtime

    with monkeypatch.context() as patch, _Placement():
        patch.setattr(cuda, "runtime", runtime_of)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
        yield streams

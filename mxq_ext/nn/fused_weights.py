"""The weights of a model's layers as native code takes them, and whether they are still those of the modules.

To look at 400 modules before each token took 0.1 to 0.3 ms: they are cold once the weights have run through the caches. So whatever puts
another module, parameter, packed weight or compute mode into a model counts up one number, and only then (and for each new sequence) they are compared.
"""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .. import _native, ops
from ..cuda import CudaPacked
from ..errors import ModelError
from . import linear as quant_linear
from .fused_model import Family, linears, parts


def _registered(module: nn.Module, name: str, value: object) -> None:
    quant_linear.note_change()


# Called by torch whenever any module gets a submodule, parameter or buffer by assignment.
torch_module.register_module_module_registration_hook(_registered)
torch_module.register_module_parameter_registration_hook(_registered)
torch_module.register_module_buffer_registration_hook(_registered)

_ASKED = "native weights of the layers"


class NativeWeights:
    """Addresses of everything that the layers of ``family`` compute with, on the device ``place``. What they point at lives as long as this object.

    Attributes:
        stack: what native code on the CPU takes; ``fused_cuda.CudaWeights`` makes something else of the same.
        dtype: of activations and norms.
        hidden, heads, kv_heads, dim, inner: sizes, as in the config.

    Raises ModelError for weights that do not go together, NativeError for weights that have not been loaded.
    """

    def __init__(self, family: Family, place: torch.device):
        self.place = place
        decoder, config, blocks = family.decoder, family.decoder.config, family.decoder.layers
        norms = [m for _, m, kind in parts(decoder, blocks, family.name) if kind.endswith("RMSNorm")]
        self.linears = [m for _, m in linears(blocks)]
        self.floats = [(m._parameters, "weight") for m in norms] + [(m._buffers, "bias") for m in self.linears if m._buffers["bias"] is not None]
        self.places = [(decoder._modules, "layers"), (decoder._modules, "norm"), *((blocks._modules, name) for name in blocks._modules)]
        for block in blocks:
            self.places += [(part._modules, name) for part in (block, block.self_attn, block.mlp) for name in part._modules]
        self.modules = [entries[name] for entries, name in self.places]
        self.values, self.kept, self.changes = self._values(), [], quant_linear.changes()

        self.dtype, self.hidden = norms[0].weight.dtype, config.hidden_size
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, blocks[0].self_attn.head_dim
        self.inner, self.epsilon = config.intermediate_size, decoder.norm.variance_epsilon
        if self.dtype not in ops.TYPES:
            raise ModelError(_ASKED, f"the norms are {self.dtype}", "use float32, bfloat16 or float16")
        q, kv, h, inner = self.heads * self.dim, self.kv_heads * self.dim, self.hidden, self.inner
        shapes = [(q, h), (kv, h), (kv, h), (h, q), (inner, h), (inner, h), (h, inner)]
        layers = []
        for i, block in enumerate(blocks):
            attention, seven = block.self_attn, self.linears[7 * i : 7 * i + 7]
            of_heads = [self._norm(getattr(attention, n), self.dim) if hasattr(attention, n) else 0 for n in ("q_norm", "k_norm")]
            layers.append((self._norm(block.input_layernorm, h), self._norm(block.post_attention_layernorm, h), *of_heads, attention.scaling,
                           family.windows[i], tuple(map(self._linear, seven, shapes))))
        self._make(self._norm(decoder.norm, h), layers)

    def _make(self, final_norm: int, layers: list[tuple]) -> None:
        sizes = (self.hidden, self.heads, self.kv_heads, self.dim, self.inner)
        self.stack = _native.cpu.LayerStack((ops.TYPES[self.dtype], *sizes, self.epsilon, final_norm), layers)

    def current(self, look: bool) -> bool:
        """Whether the model still has these modules with these weights; ``look`` asks them even if nothing is known to have changed."""
        if not look and self.changes == quant_linear.changes():
            return True
        self.changes = quant_linear.changes()
        try:
            there = [entries[name] for entries, name in self.places]
        except KeyError:
            return False
        return all(map(operator.is_, there, self.modules)) and self._values() == self.values

    def _values(self) -> tuple[list, list, list, list]:
        packed = [m.held.packed for m in self.linears]
        # The same object may have its bytes elsewhere: share_memory() moves them.
        return (packed, [0 if p is None else p.blob.data_ptr() for p in packed], [m.compute for m in self.linears],
                [entries[name].data_ptr() for entries, name in self.floats])

    def _norm(self, module: nn.Module, size: int) -> int:
        weight = module.weight.detach().contiguous()
        if weight.dtype != self.dtype or tuple(weight.shape) != (size,) or weight.device != self.place:
            raise ModelError(_ASKED, f"a norm is {str(weight.dtype)[6:]} {tuple(weight.shape)} on {weight.device}, expected {str(self.dtype)[6:]} ({size},) "
                             f"on {self.place}", "bring the whole model to one dtype and one device")
        self.kept.append(weight)
        return weight.data_ptr()

    def _linear(self, module: nn.Module, shape: tuple[int, int]):
        packed, bias = module.held.loaded(), module._buffers["bias"]
        if packed.blob.device != self.place:
            raise ModelError(_ASKED, f"a linear is packed for {packed.blob.device}, the tokens are on {self.place}", "move them to one device")
        if packed.shape != shape or (bias is not None and bias.dtype not in ops.TYPES):
            raise ModelError(_ASKED, f"a linear is {packed.shape[0]} x {packed.shape[1]}, the config makes it {shape[0]} x {shape[1]}",
                             "use the config of this model")
        bias = None if bias is None else bias.contiguous()
        self.kept.append((packed, bias))
        return self._native(packed, (0, 0) if bias is None else (bias.data_ptr(), ops.TYPES[bias.dtype]), module.compute)

    def _native(self, packed: ops.Packed | CudaPacked, bias: tuple[int, int], compute: str):
        """A linear as native code takes it; ``bias``: address and type, 0 for none."""
        return packed.blob.data_ptr(), *bias, compute == "a8"

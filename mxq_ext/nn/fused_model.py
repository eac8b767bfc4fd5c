"""Which models native layers know: recognising the parts of a decoder of the Llama family."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import ModelError
from ..kv.ops import MAX_HEAD
from ..structure import decoder_blocks
from .linear import QuantLinear

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_LINEARS = (("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate_proj", "up_proj", "down_proj")))


@dataclass(frozen=True)
class Family:
    """The parts of a recognised model.

    Attributes:
        name: of :data:`FAMILIES`.
        decoder: the module whose forward runs the layers.
        windows: sliding window of each layer, 0 for none.
    """

    name: str
    decoder: nn.Module
    windows: tuple[int, ...]


def recognise(model: nn.Module, planned: Collection[str] = ()) -> Family:
    """What native layers need to know of ``model``. Raises ModelError with what stands against it. No weight is looked at.

    ``planned`` names linears that are not quantized yet but will be.
    """
    asked = f"whole-layer decoding of {type(model).__name__}"

    def refuse(rule: str, fix: str = 'pass fuse=None or fuse="auto" to go through the modules'):
        raise ModelError(asked, rule, fix)

    prefix, blocks = decoder_blocks(model)
    decoder = model.get_submodule(prefix.rpartition(".")[0])
    name = type(decoder).__name__.removesuffix("Model")
    home = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    if name not in FAMILIES or type(decoder).__module__ != home:
        refuse(f"its layers are those of {type(decoder).__name__}, native code knows {', '.join(FAMILIES)}")
    for where, part, kind in parts(decoder, blocks, name):
        if type(part).__name__ != kind or type(part).__module__ != home:
            refuse(f"{where} is a {type(part).__qualname__}, expected {kind}")
    for where, module in linears(blocks):
        if not isinstance(module, QuantLinear) and f"{prefix}.{where}" not in planned:
            refuse(f"{prefix}.{where} is not quantized ({type(module).__name__})", "give every linear of the layers a format in the plan")
    config = decoder.config
    if config.hidden_act not in ("silu", "swish"):
        refuse(f"its activation is {config.hidden_act}, native code has silu")
    attention = blocks[0].self_attn
    dim, heads, kv_heads = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
    if dim % 16 or not 0 < dim <= MAX_HEAD or heads % kv_heads:
        refuse(f"{heads} heads over {kv_heads} of dimension {dim}: it must be a multiple of 16 up to {MAX_HEAD}, and the heads a multiple")
    if len(blocks) != config.num_hidden_layers:
        refuse(f"config.num_hidden_layers is {config.num_hidden_layers}, {prefix} has {len(blocks)}", "correct the config")
    if getattr(config, "is_causal", True) is False:
        refuse("its attention is not causal")
    norms = [m for block in blocks for m in (block.input_layernorm, block.post_attention_layernorm)] + [decoder.norm]
    if len({m.variance_epsilon for m in norms}) != 1:
        refuse("its norms have several epsilons")
    return Family(name, decoder, tuple(_window(config, block.self_attn, i, refuse) for i, block in enumerate(blocks)))


def _window(config, attention: nn.Module, i: int, refuse) -> int:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[i] if kinds else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        refuse(f"layer {i} is of type {kind}")
    if type(attention).__name__ == "MistralAttention":  # its model gives all layers one mask
        return getattr(config, "sliding_window", None) or 0
    return (getattr(config, "sliding_window", None) or 0) if kind == "sliding_attention" else 0


def parts(decoder: nn.Module, blocks, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, name of the class that it must have) of all modules that native code stands in for, but the linears."""
    yield "norm", decoder.norm, f"{name}RMSNorm"
    yield "rotary_emb", decoder.rotary_emb, f"{name}RotaryEmbedding"
    for i, block in enumerate(blocks):
        yield f"layers.{i}", block, f"{name}DecoderLayer"
        yield f"layers.{i}.self_attn", block.self_attn, f"{name}Attention"
        yield f"layers.{i}.mlp", block.mlp, f"{name}MLP"
        yield f"layers.{i}.input_layernorm", block.input_layernorm, f"{name}RMSNorm"
        yield f"layers.{i}.post_attention_layernorm", block.post_attention_layernorm, f"{name}RMSNorm"
        if name == "Qwen3":
            yield f"layers.{i}.self_attn.q_norm", block.self_attn.q_norm, f"{name}RMSNorm"
            yield f"layers.{i}.self_attn.k_norm", block.self_attn.k_norm, f"{name}RMSNorm"


def linears(blocks) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the linears, layer after layer, in the order q k v o gate up down."""
    for i, block in enumerate(blocks):
        for part, names in _LINEARS:
            for name in names:
                yield f"{i}.{part}.{name}", block._modules[part]._modules[name]

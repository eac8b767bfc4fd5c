"""Rotation of the residual stream, folded into the weights: the float model computes the same, its weights and inputs have no outlying channels.

RMSNorm divides by a length, which a rotation leaves alone, so with its gain moved into the linears behind it the whole stream can be rotated
(SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024; QuaRot, 2404.00456; R1 of SpinQuant, 2405.16406):

    embed <- embed R,   q, k, v, gate, up, head <- W diag(gain) R,   o, down <- R^T W,   gain <- 1

and values within a head by another rotation (R2): rows of v, columns of o. Nothing is added at run time. Column outliers vanish, so methods
that keep outlying columns apart have nothing to find afterwards.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ModelError
from ..structure import decoder_blocks
from .hadamard import random_rotation

#: Architectures that are RMSNorm, q/k/v/o and gate/up/down, and nothing else between them.
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@torch.no_grad()
def rotate_residual(model: nn.Module, seed: int = 0, *, kind: str = "hadamard", heads: bool = True) -> nn.Module:
    """Rotates a float model in place and returns it; logits are those of before up to rounding.

    Args:
        seed: of the random signs (``kind="hadamard"``) or of the rotation (``"orthogonal"``, for hidden sizes without a Hadamard matrix).
        heads: rotate the values within each head, too.

    A head that is tied to the embedding becomes a weight of its own, because the final norm's gain goes into one of them only: a plan
    then has a unit more, and its bytes. Raises ModelError for other architectures and for quantized models, ShapeError for a size that has no such matrix.
    """
    check_family(model, "rotating")
    config = model.config
    hidden, dim = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    r = random_rotation(hidden, seed, kind)
    inner = random_rotation(dim, seed + 1, kind) if heads else None
    untie_head(model)
    _columns(model.model.embed_tokens, r)
    for block in decoder_blocks(model)[1]:
        attention, mlp = block.self_attn, block.mlp
        fold_gain(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        fold_gain(block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _columns(linear, r)
        for linear in (attention.o_proj, mlp.down_proj):
            _rows(linear, r)
        if inner is not None:
            _rows(attention.v_proj, torch.block_diag(*[inner] * config.num_key_value_heads))
            _columns(attention.o_proj, torch.block_diag(*[inner] * config.num_attention_heads))
    fold_gain(model.model.norm, (model.lm_head,))
    _columns(model.lm_head, r)
    return model


def check_family(model: nn.Module, what: str) -> None:
    """Raises ModelError unless the model is a float model of FAMILY with norms without bias."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILY:
        raise ModelError(f"{what} {type(model).__name__} ({kind or 'no transformers model'})", f"only {', '.join(FAMILY)} are known to keep their function",
                         "leave the transform out")
    wrong = [n for n, m in model.named_modules() if n.endswith("_proj") and not isinstance(m, nn.Linear)]
    if wrong:
        raise ModelError(f"{what} {type(model).__name__}", f"{wrong[0]} is {type(model.get_submodule(wrong[0])).__name__}, no nn.Linear",
                         "transform the float model")


def untie_head(model: nn.Module) -> None:
    """Gives a head that shares the embedding's weight a copy of its own."""
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=model.lm_head.weight.requires_grad)
        model.config.tie_word_embeddings = False
        # transformers ties again, on saving and on loading, what it finds here.
        keys = getattr(model, "all_tied_weights_keys", {})
        model.all_tied_weights_keys = {k: v for k, v in keys.items() if "lm_head.weight" not in (k, v)}


def fold_gain(norm: nn.Module, linears: tuple[nn.Linear, ...]) -> None:
    """Moves a norm's gain into the columns of the linears that read it."""
    for linear in linears:
        linear.weight.copy_(linear.weight.double() * norm.weight.double())
    norm.weight.fill_(1)


def _columns(module: nn.Module, r: torch.Tensor) -> None:
    """W <- W R, for what reads the rotated stream (an embedding writes it, row by row)."""
    module.weight.copy_(module.weight.double() @ r)


def _rows(linear: nn.Linear, r: torch.Tensor) -> None:
    """W <- R^T W and b <- R^T b, for what writes it."""
    linear.weight.copy_(r.T @ linear.weight.double())
    if linear.bias is not None:
        linear.bias.copy_(r.T @ linear.bias.double())

"""What a decoder-only transformer is made of: its blocks, its units, and which units share an input or a weight.

A *unit* is what one decision of a plan covers. Today that is a whole ``nn.Linear`` or ``nn.Embedding``; its name is the module's
name in the model. An output head tied to the embedding is one unit with it, under the embedding's name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .errors import ModelError, MxqWarning


@dataclass(frozen=True)
class Unit:
    """One unit of the plan.

    Attributes:
        name: module name, for example ``model.layers.3.mlp.down_proj``.
        kind: ``"linear"`` or ``"embedding"``.
        shape: weight [N, K] (vocabulary x hidden for an embedding).
        layer: index of the decoder block, -1 outside of them.
        role: last part of the name, for example ``down_proj``.
        tied: names of other modules that use the same weight (``lm_head``).
    """

    name: str
    kind: str
    shape: tuple[int, int]
    layer: int
    role: str
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the longest ModuleList of one block class, lists inside of others (experts) left out. Raises ModelError if there
    is none."""
    best, outer = None, []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{o}.") for o in outer):
            continue
        outer.append(name)
        if len(module) and len({type(m) for m in module}) == 1 and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise ModelError(f"model {type(model).__name__}", "it has no list of equal decoder blocks", "use a decoder-only transformer such as Llama or Qwen")
    return best


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or getattr(module, "mxq_kind", None) == "embedding"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or getattr(module, "mxq_kind", None) == "linear"


def find_units(model: nn.Module) -> list[Unit]:
    """All units in model order: linears, the token embedding, an untied head. Tied modules are folded into the first one.

    Position embeddings (GPT-2, OPT) stay in floating point and are no units. Raises ModelError if the model has no linear.
    """
    prefix, blocks = decoder_blocks(model)
    inside = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    token_embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    by_weight: dict[int, str] = {}
    found: dict[str, Unit] = {}
    for name, module in model.named_modules():
        embedding = _is_embedding(module) and (token_embedding is None or module is token_embedding)
        if not (embedding or _is_linear(module)):
            continue
        # Quantized modules have no weight; those that are tied share one `held` (there is no packed weight yet on the meta device).
        key = id(getattr(module, "weight", None)) if getattr(module, "weight", None) is not None else id(getattr(module, "held", module))
        if key in by_weight:
            first = found[by_weight[key]]
            found[first.name] = Unit(**{**first.__dict__, "tied": (*first.tied, name)})
            continue
        m = inside.match(name)
        shape = tuple(module.weight.shape) if getattr(module, "weight", None) is not None else module.shape
        by_weight[key] = name
        found[name] = Unit(name, "embedding" if embedding else "linear", shape, int(m[1]) if m else -1, name.rpartition(".")[2])
    if not any(u.kind == "linear" for u in found.values()):
        raise ModelError(f"model {type(model).__name__}", "it has no nn.Linear", "Conv1D models (GPT-2) need converting to nn.Linear first")
    return list(found.values())


def warn_left_out(model: nn.Module, units: Sequence[Unit]) -> None:
    """Warns of decoder blocks over a hundredth of whose weights are matrices that no unit covers: they stay in float, and neither budgets nor stored bits
    count them. In transformers, the experts of a mixture are such: one parameter holds all of a block. Always from this line, so that each is told once."""
    prefix, _ = decoder_blocks(model)
    covered = {f"{name}.weight" for u in units for name in (u.name, *u.tied)}
    inside = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name.startswith(f"{prefix}.")}
    left = {name: n for name, n in inside.items() if name not in covered}
    if sum(left.values()) > 0.01 * sum(inside.values()):
        warnings.warn(f"{sum(left.values()):,} of the {sum(inside.values()):,} weights in the blocks of a {type(model).__name__} are in no nn.Linear, the "
                      f"largest in {max(left, key=left.get)}: they stay in float, and neither budgets nor stored bits count them", MxqWarning, stacklevel=1)

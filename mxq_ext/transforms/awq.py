"""AWQ's scale search (Lin et al. 2023, arXiv 2306.00978): input channels that carry large activations get finer steps.

    W x = (W diag(s)) (diag(s)^-1 x),    s = max(m^a, 1e-4) / sqrt(max s * min s),    m_j = mean_t |x_tj|

diag(s)^-1 goes into what produces x, so nothing is added at run time: the gain of a norm (q, k, v; gate, up), or the rows of the linear before (v for o,
up for down). All linears that read one input share s. The exponent a is searched in 0, 1/20, ... 19/20 for the least error of their outputs
after rounding to nearest.

Two departures from the authors' code: the error is that of the linears themselves, sum over them of tr(dW H dW^T) with the second moment H of the input,
where theirs runs the attention or the whole MLP; and with grouped queries, where they leave o alone, the query heads that share a
value channel share its s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import QuantizationError
from ..formats import Format
from ..progress import SILENT, Progress
from ..quantizers.base import check_weight
from ..quantizers.grid import make_grid
from ..stats import Stats
from ..structure import decoder_blocks
from .rotate import check_family

EXPONENTS = 20


@dataclass
class ScaleGroup:
    """Linears that read one input, and what produces it: a norm, or a linear whose row ``i`` feeds the columns ``columns[i]`` of the readers."""

    producer: str
    readers: list[str]
    columns: torch.Tensor  #: int64 [rows of the producer, columns fed by each]


def scale_groups(model: nn.Module) -> list[ScaleGroup]:
    """The groups of every block, first to last. Raises ModelError for other architectures than ``rotate.FAMILY``."""
    check_family(model, "scaling")
    prefix, blocks = decoder_blocks(model)
    config = model.config
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    out = []
    for i, block in enumerate(blocks):
        name = f"{prefix}.{i}."
        dim = block.self_attn.v_proj.weight.shape[0] // kv
        hidden = torch.arange(config.hidden_size)[:, None]
        # Query head h reads the values of head h // (heads / kv).
        values = torch.arange(heads * dim).view(kv, heads // kv, dim).transpose(1, 2).reshape(kv * dim, heads // kv)
        out += [ScaleGroup(name + "input_layernorm", [name + f"self_attn.{x}_proj" for x in "qkv"], hidden),
                ScaleGroup(name + "self_attn.v_proj", [name + "self_attn.o_proj"], values),
                ScaleGroup(name + "post_attention_layernorm", [name + "mlp.gate_proj", name + "mlp.up_proj"], hidden),
                ScaleGroup(name + "mlp.up_proj", [name + "mlp.down_proj"], torch.arange(config.intermediate_size)[:, None])]
    return out


@torch.no_grad()
def scale_activations(model: nn.Module, stats: Stats, formats: Mapping[str, Format | str], *, weighting: str = "none",
                      progress: Progress = SILENT) -> dict[str, float]:
    """Searches and folds the scales, in place. Returns the exponent chosen for each producer.

    Args:
        model: a float model; its logits stay what they were up to rounding.
        stats: calibration of this model, from before.
        formats: of the units that will be quantized; the search rounds to them. A group none of whose readers is among them is left alone.
        weighting: which second moments the error is taken under.

    Statistics of the inputs are others afterwards: calibrate again before quantizing. Raises QuantizationError for lut formats, which are
    fitted and have no step that a scale could make finer.
    """
    formats = {name: Format.parse(f) for name, f in formats.items()}
    groups, chosen = scale_groups(model), {}
    for name in (r for g in groups for r in g.readers if r in formats and formats[r].kind == "lut"):
        raise QuantizationError(f"AWQ scales for {name} in {formats[name]}", "a fitted table has no step that a scale would make finer",
                                "use a uniform or nf format")
    for group in progress.track(groups, "scales"):
        readers = {r: formats[r] for r in group.readers if r in formats and formats[r].kind != "float"}
        if not readers:
            continue
        mean = stats.channels(group.readers[0])["absmean"][group.columns].mean(1)
        weights = {r: check_weight(model.get_submodule(r).weight, f) for r, f in readers.items()}
        moments = {r: stats.hessian(r, weighting) for r in readers}
        losses = [sum(scaled_error(w, moments[r], readers[r], _spread(channel_scales(mean, a / EXPONENTS), group.columns)) for r, w in weights.items())
                  for a in range(EXPONENTS)]
        best = min(range(EXPONENTS), key=losses.__getitem__)  # the smallest of equals
        chosen[group.producer] = best / EXPONENTS
        if best:
            _fold(model, group, channel_scales(mean, best / EXPONENTS))
    return chosen


def channel_scales(mean: torch.Tensor, exponent: float) -> torch.Tensor:
    """s [K] of mean magnitudes m [K]; its largest and smallest multiply to 1."""
    s = mean.pow(exponent).clamp_(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def scaled_error(w: torch.Tensor, h: torch.Tensor, fmt: Format, s: torch.Tensor) -> float:
    """tr(dW H dW^T) of w [N, K] rounded to nearest with its columns scaled by s [K]."""
    grid = make_grid(w * s, fmt)
    d = grid.decode(grid.encode(w * s)) / s - w
    return float(((d @ h) * d).sum(dtype=torch.float64))


def _spread(s: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A scale per producer's row -> per column of the readers."""
    out = torch.empty(columns.numel())
    out[columns] = s[:, None].expand(columns.shape)
    return out


def _fold(model: nn.Module, group: ScaleGroup, s: torch.Tensor) -> None:
    for name in group.readers:
        weight = model.get_submodule(name).weight
        weight.mul_(_spread(s, group.columns).to(weight.dtype))
    producer = model.get_submodule(group.producer)
    for p in (producer.weight, getattr(producer, "bias", None)):
        if p is not None:
            p.div_(s.to(p.dtype).view(-1, *[1] * (p.dim() - 1)))

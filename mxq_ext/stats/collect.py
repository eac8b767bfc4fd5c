"""What is summed over the tokens of one block: second moments under three weightings, channel ranges, squared gradients, KV ranges.

For a linear y = W x, with inputs x_t and loss gradients g_t = dL/dy_t at the tokens t:

- ``none``: H = mean_t x_t x_t^T, the matrix of GPTQ (Frantar et al., arXiv 2210.17323) per token and without its factor 2;
- ``attention``: H = mean_t w_t x_t x_t^T for k_proj and v_proj, w_t the attention that position t receives (column sums of the
  softmax, averaged over heads, mean 1). Nearly every query reads the first token's key and value, which is one row in hundreds
  of the unweighted sum;
- ``gradient``: w_t = mean_n g_tn^2, scaled to mean 1: the Fisher information of y shared out over the tokens. With
  ``scale`` = mean_{t,n} g_tn^2, the loss per token rises by about 0.5 * scale * sum_n d_n^T H d_n when row n of W moves by d_n;
- ``fisher``: F = mean over windows of (sum_t g_t x_t^T)^2, element by element (SqueezeLLM, arXiv 2306.07629, with labels
  drawn from the model itself); the loss of a window of T tokens rises by about 0.5 * sum F dW^2.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..errors import ModelError

WEIGHTINGS = ("none", "attention", "gradient")
#: Roles whose inputs are weighted by the attention that their positions receive.
ATTENDED = ("k_proj", "v_proj")

# Rows of H that are summed together; only blocks on and above the diagonal are computed, 58 % of a 1536 x 1536 H.
_STRIPE = 256


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """``total`` [K, K] += x^T x for ``x`` [t, K], on and above the diagonal (in stripes, so a little below it too)."""
    for r in range(0, total.shape[0], _STRIPE):
        total[r:r + _STRIPE, r:].addmm_(x[:, r:r + _STRIPE].T, x[:, r:])


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose upper triangle is ``total``'s."""
    upper = total.triu()
    return upper + upper.triu(1).T


class BlockSums:
    """Running sums over the windows of one block's linears (or of the head alone).

    Args:
        units: names of the linears.
        weightings: of ``WEIGHTINGS``; ``none`` is always summed, for units without an own weighting fall back on it.
        fisher: whether the squared gradients of the weights are summed, for the windows that ``add`` is told to.

    Units that read the same tensor (q/k/v, gate/up) share one plain H, stored under the first of them, their *input*.
    """

    def __init__(self, units: list[str], weightings: tuple[str, ...], fisher: bool):
        self.units, self.weightings, self.fisher = units, weightings, fisher
        self.inputs: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.windows = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._mass: dict[str, float] = {}
        self._kv: dict[str, torch.Tensor] = {}

    def add(self, seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]], probe: AttentionProbe | None = None,
            fisher: bool = False) -> None:
        """Adds one window: ``seen`` is unit -> (x [t, K], g [t, N] or None)."""
        received = probe.take() if probe is not None else None
        if received is not None:
            self._add_kv(received.keys, received.values)
        by_tensor: dict[tuple, str] = {}
        done = set()
        for unit, (x, g) in seen.items():
            source = by_tensor.setdefault((x.data_ptr(), x.shape, x.stride()), unit)
            if self.inputs.setdefault(unit, source) != source:
                raise ModelError(f"unit {unit}", f"it shares its input with {self.inputs[unit]} in one window and {source} in another",
                                 "models whose wiring depends on the text are not supported")
            if source == unit:
                self._add_input(unit, x)
            if "attention" in self.weightings and unit.rpartition(".")[2] in ATTENDED and received is not None and source not in done:
                done.add(source)
                self._add_weighted(f"attention/{source}", x, received.mass)
            if g is not None and "gradient" in self.weightings:
                self._add_weighted(f"gradient/{unit}", x, g.square().mean(dim=1))
            if g is not None and fisher:
                self._sum(f"fisher/{unit}", (g.shape[1], x.shape[1]), x).add_((g.T @ x).square_())
        self.windows += fisher

    def _sum(self, key: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if key not in self._sums:
            self._sums[key] = like.new_zeros(shape)
        return self._sums[key]

    def _add_input(self, unit: str, x: torch.Tensor) -> None:
        k = x.shape[1]
        self.tokens[unit] = self.tokens.get(unit, 0) + x.shape[0]
        add_gram(self._sum(f"none/{unit}", (k, k), x), x)
        size = x.abs()
        self._sum(f"absmean/{unit}", (k,), x).add_(size.sum(dim=0))
        peak = self._sum(f"absmax/{unit}", (k,), x)
        torch.maximum(peak, size.amax(dim=0), out=peak)

    def _add_weighted(self, key: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        self._mass[key] = self._mass.get(key, 0.0) + float(weight.sum(dtype=torch.float64))
        add_gram(self._sum(key, (x.shape[1], x.shape[1]), x), x * weight.sqrt()[:, None])

    def _add_kv(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, t in (("key", keys), ("value", values)):
            low, high = t.amin(dim=0), t.amax(dim=0)
            self._kv[f"kv/{name}_min"] = torch.minimum(self._kv.get(f"kv/{name}_min", low), low)
            self._kv[f"kv/{name}_max"] = torch.maximum(self._kv.get(f"kv/{name}_max", high), high)
            self._kv[f"kv/{name}_absmax"] = torch.maximum(-self._kv[f"kv/{name}_min"], self._kv[f"kv/{name}_max"])

    def result(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors to store, index). The index maps each unit to the keys of its tensors, its gradient scale and its token count."""
        tensors = dict(self._kv)
        for key, total in self._sums.items():
            kind, _, unit = key.partition("/")
            if kind == "none":
                tensors[key] = mirrored(total).div_(self.tokens[unit])
                tensors[f"meansq/{unit}"] = tensors[key].diagonal().clone()
            elif kind in ("attention", "gradient"):
                tensors[key] = mirrored(total).div_(self._mass[key] or 1.0)
            elif kind == "fisher":
                # bfloat16: squared gradients span the exponent range of float32, and three digits are plenty for a weight.
                tensors[key] = (total / self.windows).to(torch.bfloat16)
            elif kind == "absmean":
                tensors[key] = total / self.tokens[unit]
            else:
                tensors[key] = total
        index = {}
        for unit in (u for u in self.units if u in self.inputs):
            source = self.inputs[unit]
            entry = {"input": source, "tokens": self.tokens[source], "none": f"none/{source}"}
            if "attention" in self.weightings:
                own = unit.rpartition(".")[2] in ATTENDED and f"attention/{source}" in tensors
                entry["attention"] = f"attention/{source}" if own else entry["none"]
            if f"gradient/{unit}" in tensors:
                entry["gradient"] = f"gradient/{unit}"
                entry["gradient_scale"] = self._mass[f"gradient/{unit}"] / self.tokens[source]
            if f"fisher/{unit}" in tensors:
                entry["fisher"] = f"fisher/{unit}"
            index[unit] = entry
        return tensors, index


# Attention ------------------------------------------------------------------------------------------------------------------------

_NAME = "mxq_calibration"


class Attended:
    """One attention call on one window: ``keys`` and ``values`` [T, kv_heads * head_dim], ``mass`` [T] with mean 1.

    Keys are what the cache would hold: after the rotary embedding.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, probabilities: torch.Tensor):
        received = probabilities.detach()[0].float().sum(dim=-2).mean(dim=0)
        self.mass = received / received.mean()
        self.keys, self.values = (t.detach()[0].transpose(0, 1).flatten(1) for t in (key, value))


class AttentionProbe:
    """Keeps what the last attention call saw; ``take`` hands it over and forgets it."""

    def __init__(self):
        self.last: Attended | None = None

    def take(self) -> Attended | None:
        last, self.last = self.last, None
        return last


_active: AttentionProbe | None = None


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """The model's own eager attention, watched. Registered with transformers under ``_NAME``."""
    out, probabilities = _eager_of(module)(module, query, key, value, attention_mask, **kwargs)
    if _active is not None:
        _active.last = Attended(key, value, probabilities)
    return out, probabilities


def _eager_of(module: nn.Module):
    for cls in type(module).__mro__:
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ModelError(f"attention module {type(module).__name__}", "its file defines no eager_attention_forward",
                     "leave out the attention weighting")


@contextlib.contextmanager
def attention_replaced(model: nn.Module, name: str, function: Callable) -> Iterator[bool]:
    """The model with ``function``, registered under ``name``, as its attention, with dense masks; what was set before comes back at the end.

    Yields False, and changes nothing, for models that do not use transformers' attention interface (Bloom, MPT).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        yield False
        return
    try:
        yield True
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def probed_attention(model: nn.Module) -> Iterator[AttentionProbe | None]:
    """The model with its eager attention under a probe; the implementation that was set before is restored at the end.

    Yields None, and changes nothing, for models that do not use transformers' attention interface (Bloom, MPT).
    """
    global _active
    with attention_replaced(model, _NAME, _attention) as replaced:
        if not replaced:
            yield None
            return
        outer, _active = _active, AttentionProbe()
        try:
            yield _active
        finally:
            _active = outer

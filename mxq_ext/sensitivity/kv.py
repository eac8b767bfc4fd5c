"""``sense_kv``: what each width of cached keys and values costs each decoder layer, without changing the model.

A query sees a token exactly while that token is among the newest, and from its page later on. Calibration therefore runs the model's own attention with the
keys and values of *far* pairs (query, token), those whose page has been made when the query comes, as variables of their own, and carries the
gradient g of the loss back to them: near pairs, which a cache never rounds, do not count. With d the difference that packing a page and reading it
back makes, and T tokens in a window:

============= ============================================== ==================================================================================
metric        loss of a layer's keys (or values)             source
============= ============================================== ==================================================================================
fisher        1/2 sum (g d)^2 / T, labels drawn from the     second order of the KL with the diagonal of the true Fisher; the units of the weights'
              model; nats per token                          ``fisher``. Rounding errors are as good as independent, so that the diagonal is all
first_order   sum abs(g d) / T                               PM-KVQ (Liu et al. 2025), which takes the gradient on the text's own labels
attention     squared error of the layer's attention output  KVTuner (Li et al. 2025, arXiv 2502.04420); no unit in common with weights, and a
              over its square                                plan of weights and cache together refuses it
============= ============================================== ==================================================================================
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..errors import ModelError, PlanError
from ..formats import PAGE
from ..progress import SILENT, Progress
from ..stats.collect import attention_replaced
from ..stats.walk import capture_calls, check_tokens, embed, frozen, head_backward, linears_of, run_block, window_uniform
from ..structure import decoder_blocks
from .metrics import is_number
from .table import KVTable

METRICS = ("fisher", "first_order", "attention")
SIDES = ("keys", "values")
_NAME = "mxq_kv_sense"


class KVTrial(Protocol):
    """What a cache would do to one layer's keys or values; handed in, since this module knows no cache. All layers are alike."""

    settings: dict  #: the fields of a KVSpec beside its bits: group, residual, sink, rotate, and pre_rope and outliers where there are
    heads: int  #: key/value heads
    token_bytes: int  #: of one exact token, one side, all heads

    def round_trip(self, side: str, bits: int, x: torch.Tensor) -> torch.Tensor:
        """x [1, heads, T, D] as the cache gives it back: whole pages from the sink on; what has no page yet stays as it is."""

    def page_bytes(self, side: str, bits: int) -> int:
        """Of one page of a sequence, all heads."""


@dataclass
class _Layer:
    """One attention call of one window."""

    query: torch.Tensor
    seen: tuple[torch.Tensor, torch.Tensor]  # keys, values [1, heads, T, D]
    change: tuple[torch.Tensor, torch.Tensor]  # what is added to them for far queries: zeros, leaves of the graph
    again: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # the output with other far keys and values
    out: torch.Tensor


@dataclass
class _Probe:
    sink: int
    residual: int
    last: _Layer | None = None

    def far(self, tokens: int) -> torch.Tensor:
        """bool [T, T]: whether query (row) reads token (column) from a page; see ``kv.cache``: a page is made when the tail is full."""
        q, t = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        return (t >= self.sink) & (q >= self.sink + self.residual + PAGE * ((t - self.sink).clamp(min=0) // PAGE + 1))


_active: _Probe | None = None


def _attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
               scaling: float | None = None, softcap: float | None = None, **kwargs):
    """Eager attention in which far pairs have keys and values of their own. Registered with transformers."""
    probe, (tokens, dim) = _active, key.shape[2:]
    if probe is None or any(kwargs.get(n) is not None for n in ("s_aux", "position_bias", "head_mask")):
        raise ModelError(f"KV sensitivity of {type(module).__name__}", "its attention has terms of its own", "plan the weights alone")
    far, group = probe.far(tokens), query.shape[1] // key.shape[1]
    scaling = dim**-0.5 if scaling is None else scaling

    def attend(far_key: torch.Tensor, far_value: torch.Tensor) -> torch.Tensor:
        k, fk, v, fv = (x.repeat_interleave(group, 1) for x in (key, far_key, value, far_value))
        scores = torch.where(far, query @ fk.mT, query @ k.mT) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., :tokens]
        p = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        return (p * far) @ fv + (p * ~far) @ v

    change = tuple(torch.zeros_like(x).requires_grad_(torch.is_grad_enabled()) for x in (key, value))
    out = attend(key + change[0], value + change[1])
    probe.last = _Layer(query.detach(), (key.detach(), value.detach()), change, attend, out.detach())
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _probed(model: nn.Module, sink: int, residual: int) -> Iterator[_Probe]:
    """The model with attention that keeps far keys and values apart; the implementation that was set before is restored."""
    global _active
    with attention_replaced(model, _NAME, _attention) as replaced:
        if not replaced:
            raise ModelError(f"KV sensitivity of {type(model).__name__}", "its attention does not go through transformers' AttentionInterface",
                             "plan the weights alone")
        outer, _active = _active, _Probe(sink, residual)
        try:
            yield _active
        finally:
            _active = outer


def sense_kv(model: nn.Module, tokens: torch.Tensor, bits: Sequence[int], *, trial: KVTrial, metric: str = "fisher", seed: int = 0,
             by_head: bool = False, progress: Progress = SILENT) -> KVTable:
    """Loss and bytes of every (layer, side, bits), or (layer, head, side, bits).

    Args:
        model: the float model.
        tokens: windows int64 [W, T], about as long as the context that is planned for: far pairs are what differs with it. T must exceed the tokens
            that stay exact by a page.
        bits: widths to try.
        trial: packs and reads back, and counts bytes.
        metric: of ``METRICS``.
        seed: of the labels that the model draws.
        by_head: each key/value head of a layer by itself: the metrics are sums over heads, but for the square in the attention output's error, which is that of
            the whole layer.

    Memory: the block inputs of one window, and some ten float32 [heads, T, T]. Raises PlanError for an unknown metric, windows that are too short, or a
    loss that is not finite; ModelError for models whose attention cannot be watched.
    """
    if metric not in METRICS:
        raise PlanError(f"KV metric {metric!r}", "it is unknown", f"choose one of {', '.join(METRICS)}")
    tokens, settings, blocks = check_tokens(tokens).to(torch.int64), trial.settings, decoder_blocks(model)[1]
    heads = trial.heads if by_head else 1
    loss = np.zeros((len(blocks), heads, 2, len(bits)))
    for i, layer, gradients in _watched(model, tokens, settings["sink"], settings["residual"], metric != "attention", seed, progress):
        for (s, side), (b, width) in itertools.product(enumerate(SIDES), enumerate(bits)):
            each = _loss(metric, layer, gradients, s, trial.round_trip(side, width, layer.seen[s])) / tokens.shape[0]
            loss[i, :, s, b] += each if by_head else each.sum()
    for (i, head, s, b), value in np.ndenumerate(loss):
        if not is_number(value):
            where = f"{SIDES[s]} of {f'head {head} of ' if by_head else ''}layer {i}"
            raise PlanError(f"loss of the {where} at {bits[b]} bits", f"it is {value}", "check the model and the calibration text")
    pages = [[trial.page_bytes(side, width) // heads for width in bits] for _ in range(len(blocks) * heads) for side in SIDES]
    return KVTable(tuple(bits), loss.reshape(-1, len(bits)), np.array(pages), trial.token_bytes // heads, dict(settings),
                   {"metric": metric, "seed": seed, "windows": tokens.shape[0], "length": tokens.shape[1]}, heads if by_head else None)


def watch_kv(model: nn.Module, tokens: torch.Tensor, *, sink: int, residual: int, seed: int = 0, progress: Progress = SILENT
             ) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """(layer, keys and values, their gradients) of every window [W, T] and layer, each [1, heads, T, D]; keys after the rotary embedding.

    Gradients are those of the loss, labels drawn from the model, through the queries that read a token from its page; 0 for tokens that none reads so.
    Raises as :func:`sense_kv` does.
    """
    for i, layer, gradients in _watched(model, check_tokens(tokens).to(torch.int64), sink, residual, True, seed, progress):
        yield i, layer.seen, tuple(gradients)


def _watched(model, tokens, sink: int, residual: int, differentiate: bool, seed: int, progress: Progress) -> Iterator[tuple[int, _Layer, list | None]]:
    """:func:`_walk` over all windows."""
    exact = sink + residual + PAGE
    if tokens.shape[1] <= exact:
        raise PlanError(f"KV sensitivity on windows of {tokens.shape[1]} tokens", f"the first page is read from token {exact + 1} on",
                        "use longer windows, or a smaller residual")
    blocks, head = decoder_blocks(model)[1], linears_of(model)[2] if differentiate else None
    with frozen(model), _probed(model, sink, residual) as probe:
        calls = capture_calls(model, tokens)
        for w in progress.track(range(tokens.shape[0]), "KV sensitivity"):
            yield from _walk(model, blocks, head, tokens[w : w + 1], calls, probe, window_uniform(seed, w, tokens.shape[1]))


def _walk(model, blocks, head, window, calls, probe: _Probe, uniform) -> Iterator[tuple[int, _Layer, list[torch.Tensor] | None]]:
    """(layer index, its attention, gradients of its far keys and values) of one window, last layer first; without a ``head``
    first layer first, and no gradients."""
    with torch.no_grad():
        hidden = [embed(model, window)]
        for i, block in enumerate(blocks):
            hidden.append(run_block(block, i, hidden[-1], calls))
            if head is None:
                yield i, probe.last, None
    if head is None:
        return
    grad, _, _ = head_backward(model, head, hidden.pop(), uniform)
    for i in range(len(blocks) - 1, -1, -1):
        entry = hidden.pop().detach().requires_grad_()
        with torch.enable_grad():
            out = run_block(blocks[i], i, entry, calls)
            layer = probe.last
            grad, *gradients = torch.autograd.grad(out, [entry, *layer.change], grad)
        yield i, layer, gradients


def _loss(metric: str, layer: _Layer, gradients, side: int, rounded: torch.Tensor) -> np.ndarray:
    """float64 [key/value heads]."""
    tokens, heads = layer.query.shape[2], layer.seen[0].shape[1]

    def by_head(x: torch.Tensor) -> np.ndarray:
        return x.unflatten(1, (heads, -1)).sum((0, 2, 3, 4), dtype=torch.float64).numpy()

    if metric == "attention":
        with torch.no_grad():
            far = list(layer.seen)
            far[side] = rounded
            return by_head((layer.again(*far) - layer.out).square()) / float(layer.out.square().sum(dtype=torch.float64))
    change = gradients[side] * (rounded - layer.seen[side])
    return (0.5 * by_head(change.square()) if metric == "fisher" else by_head(change.abs())) / tokens

"""Measured end effects: KL(float || model with one changed weight), restarted at the block that holds the weight.

The hidden states at the input of every block are kept for a few calibration windows, so a probe of a unit in block i runs
blocks i and later only, and a probe of an untied head runs nothing but the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import MxqError
from ..stats.walk import SLICE, capture_block_inputs, embed, run_from, tail
from ..structure import Unit, decoder_blocks


@contextlib.contextmanager
def changed(module: nn.Module, delta: torch.Tensor) -> Iterator[None]:
    """``module.weight + delta`` inside the context, the exact old weight after it."""
    old = module.weight.data
    module.weight.data = (old.float() + delta).to(old.dtype)
    try:
        yield
    finally:
        module.weight.data = old


class KLProbe:
    """KL of the float model to the model with one weight changed, over ``tokens`` [W, T]; nats per token.

    Memory: the inputs of all blocks for W windows, and their float log-probabilities (W * T * V float32: 100 MB a window of 512
    tokens with a vocabulary of 49152), so keep W small.
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor):
        self.model, self.tokens = model, tokens
        self.inputs = capture_block_inputs(model, tokens)
        self.modules = dict(model.named_modules())
        self.last = len(decoder_blocks(model)[1])
        self.reference = list(self._log_probs(self.inputs.hidden[-1]))

    @torch.no_grad()
    def _log_probs(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """log softmax [t, V] of the model's tail, slice by slice of the positions of [W, T, H]."""
        for window in hidden.split(1):
            for piece in window.split(SLICE, dim=1):
                yield torch.log_softmax(tail(self.model, piece)[0].float(), dim=-1)

    @torch.no_grad()
    def kl(self, unit: Unit, delta: torch.Tensor) -> float:
        """Mean KL when ``delta`` [N, K] is added to the weight of ``unit``, tied modules included."""
        with changed(self.modules[unit.name], delta):
            if unit.kind == "embedding":
                start, entry = 0, torch.cat([embed(self.model, t[None]) for t in self.tokens])
            else:
                start = unit.layer if unit.layer >= 0 else self.last
                entry = self.inputs.hidden[start]
            hidden = run_from(self.model, start, entry, self.inputs.kwargs, logits=False)
            total = sum(float((lp.exp() * (lp - lq)).sum(dtype=torch.float64))
                        for lp, lq in zip(self.reference, self._log_probs(hidden), strict=True))
        return total / self.tokens.numel()


def noise_slope(probe: KLProbe, unit: Unit, weight: torch.Tensor, hessian: torch.Tensor, *, size: float, seed: int) -> float:
    """KL per relative squared output error: adds Gaussian noise of relative output error ``size`` and divides the KL by it.

    The slope ``a`` of HIGGS (Malinovskii et al. 2024, linearity theorem): end loss ~ sum over layers of a_l * t_l**2 with t_l**2 the
    relative squared error of layer l. Here t_l**2 = tr(D H D^T) / tr(W H W^T), the error of the layer's output, since the
    errors of a Hessian-aware quantizer are anything but isotropic. weight [N, K] float32, hessian [K, K].
    """
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    noise *= (size * energy(weight, hessian) / energy(noise, hessian)) ** 0.5
    return probe.kl(unit, noise) / size


def energy(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(M H M^T): the mean squared norm of the outputs M x when H is the second moment of x. M [N, K], H [K, K]."""
    value = sum(float(((rows @ hessian) * rows).sum(dtype=torch.float64)) for rows in matrix.split(4096))
    if not value >= 0:
        if value < -1e-3 * float(matrix.square().sum()) * float(hessian.diagonal().mean()) or value != value:
            raise MxqError("second moment of a unit's input", f"tr(M H M^T) is {value:g}", "calibrate again in float32: H is not positive semidefinite")
        return 0.0
    return value

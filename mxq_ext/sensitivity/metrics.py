"""Metrics: what it costs the end loss to replace one weight W by W + D. One class each, all with the same three steps.

    metric = METRICS["fisher"](Context(model, tokens, stats, seed))
    metric.prepare(units, progress)                 # measures what it needs, once
    metric.loss(unit, weight, [delta, ...])         # one number per candidate

==============  ===========================================================================  =======================================
name            loss of D                                                                    source
==============  ===========================================================================  =======================================
output          tr(D H D^T), H the plain second moment of the input                          OBQ / GPTQ, Frantar et al. 2022
obq             sum D_ij^2 / [H^-1]_jj                                                       OBS saliency; SpQR, SliM-LLM
activation      sum_ij E[x_j^2] D_ij^2, the norm of each input channel                       CMPQ 2024; AWQ, Lin et al. 2023
hutchinson      tr(G) / n * |D|^2, tr(G) of the KL's Hessian by Hutchinson's estimator       HAWQ-V2, Dong et al. 2020
fisher          1/2 E_t[|g_t|^2/N . |D x_t|^2], g the gradient at the layer's output         K-FAC-like; GuidedQuant 2025
fisher_diag     1/2 sum F_ij D_ij^2, F the mean squared weight gradient                      SqueezeLLM, Kim et al. 2023
first_order     mean over windows of |<g, D>| / tokens                                       LLM-MQ 2023
linear_kl       a tr(D H D^T) / tr(W H W^T), a = KL per unit of relative noise               HIGGS, Malinovskii et al. 2024
anchored_kl     KL measured with the coarsest candidate, the others in ratio of ``fisher``   ours
==============  ===========================================================================  =======================================

``fisher``, ``linear_kl`` and ``anchored_kl`` are in nats per token, so their sums over units predict the KL of a plan; ``output``,
``obq`` and ``activation`` have no common unit across layers and are there for comparison with the literature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import PlanError
from ..progress import Progress
from ..stats import Stats
from ..stats.walk import backward_walk
from ..structure import Unit
from .probes import KLProbe, energy, noise_slope


@dataclass
class Context:
    """What metrics may look at: the float model, calibration windows [W, T], their Stats, and a seed for noise."""

    model: nn.Module
    tokens: torch.Tensor
    stats: Stats
    seed: int = 0


class Metric:
    """Base: holds the context; ``prepare`` does nothing unless a metric measures something over the whole model.

    ``weightings``: second moments that it reads beside the plain ones; ``fisher``: whether it reads Fisher diagonals. Both are then calibrated.
    """

    weightings: tuple[str, ...] = ()
    fisher = False

    def __init__(self, context: Context):
        self.context = context

    def prepare(self, units: list[Unit], progress: Progress) -> None:
        """Called once before the first ``loss``."""

    def loss(self, unit: Unit, weight: torch.Tensor, deltas: list[torch.Tensor]) -> list[float]:
        """One loss per candidate difference [N, K] (quantized minus float), coarsest candidate first."""
        raise NotImplementedError

    def lookup_loss(self, unit: Unit, deltas: list[torch.Tensor]) -> list[float]:
        """The same for an embedding that is no head, whose input has no second moment; nats per token.

        The KL measured with the coarsest candidate, the others in ratio of the squared error of the rows that the text looks up.
        """
        errors = self._row_errors(deltas)
        worst = max(range(len(deltas)), key=lambda i: errors[i])
        if errors[worst] == 0:
            return errors
        measured = max(KLProbe(self.context.model, self.context.tokens[:1]).kl(unit, deltas[worst]), 0.0)
        return [measured * e / errors[worst] for e in errors]

    def _row_errors(self, deltas: list[torch.Tensor]) -> list[float]:
        """Mean over the calibration tokens of |row of D|^2, which is the squared error of the lookup's output."""
        tokens = self.context.tokens.flatten()
        return [float(d.square().sum(1)[tokens].double().mean()) for d in deltas]


class OutputError(Metric):
    """tr(D H D^T): squared error of the layer's output, mean per token."""

    def loss(self, unit, weight, deltas):
        h = self.context.stats.hessian(unit.name, "none")
        return [energy(d, h) for d in deltas]

    def lookup_loss(self, unit, deltas):
        return self._row_errors(deltas)


class OBQ(Metric):
    """sum_ij D_ij^2 / [H^-1]_jj with 1 % mean-diagonal damping: the loss after all other weights of the row have re-adjusted."""

    def loss(self, unit, weight, deltas):
        h = self.context.stats.hessian(unit.name, "none").clone()
        h.diagonal().add_(0.01 * h.diagonal().mean())
        salience = 1 / torch.cholesky_inverse(torch.linalg.cholesky(h)).diagonal()
        return [float((d.square() @ salience).sum(dtype=torch.float64)) for d in deltas]

    def lookup_loss(self, unit, deltas):
        return self._row_errors(deltas)


class Activation(Metric):
    """sum_ij E[x_j^2] D_ij^2: the error of the output if the input channels were uncorrelated."""

    def loss(self, unit, weight, deltas):
        power = self.context.stats.channels(unit.name)["meansq"]
        return [float((d.square() @ power).sum(dtype=torch.float64)) for d in deltas]

    def lookup_loss(self, unit, deltas):
        return self._row_errors(deltas)


class Hutchinson(Metric):
    """1/2 tr(G_l) / n_l * |D|^2 per token: HAWQ-V2's loss of a layer with n_l weights, G the Hessian of KL(float || model) at the float weights.

    tr(G_l) is estimated for all units together, in E[v^T G v] with v = +-1 on every weight: one double backward through the whole model per probe,
    on the first ``TOKENS`` tokens of a window each. The KL's gradient is zero there and its Hessian is the Gauss-Newton matrix, so that no trace is
    negative but for the noise of the probes (which is cut off). The other units' share of a probe is noise, which is why there are many. Needs
    about five copies of the weights in memory.
    """

    PROBES = 16
    TOKENS = 64

    def prepare(self, units, progress):
        model, tokens = self.context.model, self.context.tokens
        modules = dict(model.named_modules())
        weights = {u.name: modules[u.name].weight for u in units}
        self.trace = dict.fromkeys(weights, 0.0)
        generator = torch.Generator().manual_seed(self.context.seed)
        required = {p: p.requires_grad for p in weights.values()}
        try:
            for p in weights.values():
                p.requires_grad_(True)
            for i in progress.track(range(self.PROBES), "trace probes"):
                window = tokens[i % len(tokens), : self.TOKENS][None]
                signs = [torch.randint(0, 2, p.shape, generator=generator).to(p.dtype).mul_(2).sub_(1) for p in weights.values()]
                # Only composite attention can be differentiated twice.
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                    logp = torch.log_softmax(model(window, use_cache=False).logits.float(), dim=-1)
                    reference = logp.detach()
                    kl = (reference.exp() * (reference - logp)).sum()
                    gradients = torch.autograd.grad(kl, list(weights.values()), create_graph=True)
                    products = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradients, signs, strict=True)), list(weights.values()))
                for name, v, product in zip(weights, signs, products, strict=True):
                    self.trace[name] += float((v * product).sum(dtype=torch.float64)) / window.numel() / self.PROBES
                del logp, kl, gradients, products
        finally:
            for p, flag in required.items():
                p.requires_grad_(flag)

    def loss(self, unit, weight, deltas):
        mean = max(0.0, self.trace[unit.name]) / weight.numel()
        return [0.5 * mean * float(d.square().sum(dtype=torch.float64)) for d in deltas]


class Fisher(Metric):
    """Second order of the KL with the true Fisher at the layer's output, channels of one token sharing their mean: nats per token."""

    weightings = ("gradient",)

    def loss(self, unit, weight, deltas):
        stats = self.context.stats
        h, scale = stats.hessian(unit.name, "gradient"), stats.gradient_scale(unit.name)
        return [0.5 * scale * energy(d, h) for d in deltas]


class FisherDiagonal(Metric):
    """1/2 sum F_ij D_ij^2 with squared gradients of whole windows, divided by the window length: nats per token, roughly."""

    fisher = True

    def loss(self, unit, weight, deltas):
        f = self.context.stats.fisher(unit.name)
        if f is None:
            raise PlanError("metric fisher_diag", f"the stats hold no Fisher diagonal of {unit.name}", "calibrate with fisher=True")
        return [0.5 * float((f * d.square()).sum(dtype=torch.float64)) / self.context.tokens.shape[1] for d in deltas]


class FirstOrder(Metric):
    """|<g, D>| per window, averaged, per token. The gradients are walked once for all units; products are taken in ``loss``.

    <g, D> = sum_t g_t . (D x_t), so the weight gradient G = g^T x [N, K] of each window is all that is kept.
    """

    WINDOWS = 2

    def prepare(self, units, progress):
        wanted = {u.name for u in units}
        self.gradients: dict[str, list[torch.Tensor]] = {u: [] for u in wanted}
        windows = self.context.tokens[: self.WINDOWS]

        def keep(name, x, g):
            if name in wanted:
                self.gradients[name].append((g.T @ x).to(torch.bfloat16))

        backward_walk(self.context.model, windows, keep, seed=self.context.seed, progress=progress)

    def loss(self, unit, weight, deltas):
        per_token = 1 / self.context.tokens.shape[1]
        seen = self.gradients[unit.name]
        return [sum(abs(float((g.float() * d).sum(dtype=torch.float64))) for g in seen) / max(1, len(seen)) * per_token for d in deltas]


class LinearKL(Metric):
    """Slope of the KL from one noise probe per unit, times the relative squared output error of the candidate."""

    WINDOWS = 1
    SIZE = 0.02  # relative squared output error of the noise: within the linear regime, far above rounding noise

    def prepare(self, units, progress):
        probe = KLProbe(self.context.model, self.context.tokens[: self.WINDOWS])
        modules = dict(self.context.model.named_modules())
        self.slope = {}
        for i, unit in enumerate(progress.track([u for u in units if u.name in self.context.stats], "noise probes")):
            weight = modules[unit.name].weight.detach().float()
            h = self.context.stats.hessian(unit.name, "none")
            self.slope[unit.name] = max(0.0, noise_slope(probe, unit, weight, h, size=self.SIZE, seed=self.context.seed + i))

    def loss(self, unit, weight, deltas):
        h = self.context.stats.hessian(unit.name, "none")
        whole = energy(weight, h)
        return [self.slope[unit.name] * energy(d, h) / whole if whole else 0.0 for d in deltas]


class AnchoredKL(Fisher):
    """KL measured with the coarsest candidate itself; finer candidates follow in the ratio of their Fisher losses.

    One forward per unit from its block on. It sees what second order cannot: the sink token, saturation at 2 bits, both
    sides of a tied embedding.
    """

    WINDOWS = 1

    def prepare(self, units, progress):
        self.probe = KLProbe(self.context.model, self.context.tokens[: self.WINDOWS])

    def loss(self, unit, weight, deltas):
        second_order = super().loss(unit, weight, deltas)
        anchor = max(range(len(deltas)), key=lambda i: second_order[i])
        if second_order[anchor] == 0:
            return second_order
        measured = max(self.probe.kl(unit, deltas[anchor]), 0.0)
        return [measured * s / second_order[anchor] for s in second_order]


METRICS: dict[str, type[Metric]] = {
    "output": OutputError,
    "obq": OBQ,
    "activation": Activation,
    "hutchinson": Hutchinson,
    "fisher": Fisher,
    "fisher_diag": FisherDiagonal,
    "first_order": FirstOrder,
    "linear_kl": LinearKL,
    "anchored_kl": AnchoredKL,
}


def find_metric(name: str) -> type[Metric]:
    """The metric of that name. Raises PlanError with the names there are."""
    if name not in METRICS:
        raise PlanError(f"metric {name!r}", "it is unknown", f"choose one of {', '.join(METRICS)}")
    return METRICS[name]


def is_number(x: float) -> bool:
    """Finite and not negative: what a loss in a CostTable must be."""
    return math.isfinite(x) and x >= 0

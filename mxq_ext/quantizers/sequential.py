"""Quantizing a block's linears one after the other, each on the inputs that it will really get, towards the outputs of the float model.

GPTQ's second moments come from the float model; by the time a linear runs, what lies before it is quantized. With x the float model's input of a linear and
x' that of the quantized one, the error to make small is |W x - W' x'|, whose minimum without rounding is

    W* = W + W C H^-1,    H = mean_t w_t x'_t x'_t^T,    C = mean_t w_t (x_t - x'_t) x'_t^T

and rounding W* under H minimizes the same error up to a constant (GPTAQ, Li et al. 2025, arXiv 2504.02692, puts the correction into the sweep; Qronos, Zhang
et al. 2025, arXiv 2505.11695, shows that correcting first and then rounding is the better order). Weights w_t are the attention that a position
receives, for keys and values, and 1 for all others, as in :mod:`mxq_ext.stats.collect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..errors import ModelError, QuantizationError
from ..qtensor import QTensor
from ..stats.collect import ATTENDED
from .base import quantize
from .hessian import prepare_hessian

#: Damping of the correction, as a share of the mean diagonal: it is fitted to the tokens of calibration alone.
DAMPING = 0.05


class _Reached(Exception):
    """Leaves a block as soon as the input that was wanted has been seen."""


def input_groups(run: Callable[[], object], linears: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Names of the linears that read the same tensor, in the order in which ``run()`` calls them; those that it does not call are missing."""
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def hook(name):
        def before(module, args):
            for tensor, names in groups:
                if tensor is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))
        return before

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        run()
    finally:
        for h in handles:
            h.remove()
    return [names for _, names in groups]


def inputs_of(run: Callable[[int], object], windows: int, linears: Mapping[str, nn.Linear]) -> dict[str, list[torch.Tensor]]:
    """Inputs [T, K] of the named linears in each of ``run(0)``, ``run(1)`` ..., which are left once all have been seen."""
    out: dict[str, list[torch.Tensor]] = {name: [] for name in linears}

    def hook(name):
        def before(module, args):
            out[name].append(args[0].detach().flatten(0, -2))
            if all(len(x) == len(out[name]) for x in out.values()):
                raise _Reached
        return before

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        for w in range(windows):
            try:
                run(w)
            except _Reached:
                pass
    finally:
        for h in handles:
            h.remove()
    return out


def moments_of(real: list[torch.Tensor], wanted: list[torch.Tensor], weights: list[torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, C) of the head of this file, float32 [K, K], from inputs x' (``real``) and x (``wanted``), [T, K] a window, and weights [T] or None."""
    k = real[0].shape[1]
    h, c, mass = torch.zeros(k, k), torch.zeros(k, k), 0.0
    for i, (a, b) in enumerate(zip(real, wanted, strict=True)):
        a, b = a.float(), b.float()
        weighted = a if weights is None else a * weights[i][:, None]
        h.addmm_(a.T, weighted)
        c.addmm_((b - a).T, weighted)
        mass += a.shape[0] if weights is None else float(weights[i].sum())
    return h / mass, c / mass


def corrected(w: torch.Tensor, h: torch.Tensor, c: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """W* = W + W C H^-1 of w [N, K], with ``damping`` times H's mean diagonal added to it."""
    h = h.double()
    h = h + damping * h.diagonal().mean().clamp(min=1e-30) * torch.eye(h.shape[0], dtype=h.dtype)
    factor, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise QuantizationError(f"correcting a weight of {w.shape[0]} x {w.shape[1]}", "the second moment of its inputs is not positive definite",
                                "check the model's activations for overflow")
    return w + torch.cholesky_solve((w.double() @ c.double()).T, factor).T.float()


def requantize(run: Callable[[int], object], windows: int, modules: Mapping[str, nn.Linear], start: Mapping[str, QTensor],
               wanted: Mapping[str, list[torch.Tensor]], masses: list[torch.Tensor] | None) -> dict[str, tuple[torch.Tensor, QTensor]]:
    """Quantizes the linears of one block anew, group by group; their modules hold the dequantized weights afterwards.

    Args:
        run: ``run(w)`` runs the block on window w of the real inputs.
        modules: unit name -> linear of that block, with float weights.
        start: unit name -> QTensor whose format, method and options are taken (``gptq`` if it does not say); those of several rectangles, with a
            sparse part or permuted are put in as they are.
        wanted: unit name -> inputs [T, K] of the float model, a window each.
        masses: attention that each position receives, [T] a window, or None.

    Returns unit name -> (W* float32 [N, K], QTensor). Raises ModelError for linears that do not see every token of every window, such as experts:
    their real inputs and those of the float model are not of the same tokens.
    """
    out = {}
    groups = input_groups(lambda: run(0), modules)
    for name in start:
        if not any(name in g for g in groups) or len(wanted[name]) != windows:
            raise _unaligned(name)
    for group in groups:
        real = inputs_of(run, windows, {group[0]: modules[group[0]]})[group[0]]
        if [len(x) for x in real] != [len(x) for x in wanted[group[0]]]:
            raise _unaligned(group[0])
        found: dict[tuple, tuple] = {}
        for name in (n for n in group if n in start):
            q, w = start[name], modules[name].weight.detach().float()
            if len(q.rectangles) > 1 or q.sparse is not None or q.perm_rows is not None or q.perm_cols is not None:
                out[name] = w, q
            else:
                weighted = masses is not None and name.rpartition(".")[2] in ATTENDED
                method, options, factorization = _method(q)
                key = (weighted, *factorization)
                if key not in found:
                    h, c = moments_of(real, wanted[group[0]], masses if weighted else None)
                    found[key] = prepare_hessian(h, *factorization), h, c
                factor, h, c = found[key]
                target = corrected(w, h, c)
                out[name] = target, quantize(target, q.rectangles[0].format, method=method, hessian=factor, **options)
        for name in group:
            if name in out:
                modules[name].weight.data = out[name][1].dequantize()
    return out


def _method(q: QTensor) -> tuple[str, dict, tuple[float, bool]]:
    """Method and options that ``q`` was made by; damping and order of the factorization apart, because a HessianFactor has them built in."""
    method, options = q.info.get("method", "gptq"), dict(q.info.get("options", {}))
    if method == "round":  # fp16, whatever the method
        return "rtn", {}, (0.01, True)
    damp, act_order = (options.pop(name, None) for name in ("damp", "act_order"))
    return method, options, (0.01 if damp is None else damp, act_order is not False)


def _unaligned(name: str) -> ModelError:
    return ModelError(f"quantizing {name} on its real inputs", "it does not see every token of every window", "reconstruct with requantize=False")

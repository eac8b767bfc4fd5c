"""What an error at the output of a decoder block costs: second moments of the loss gradient there.

For the hidden states h that leave a block and a small change d of them at every token, the KL divergence of the model's predictions rises by
about 0.5 * sum_t d_t F d_t^T, with F = E[g g^T] the Fisher information of h, g = dL/dh for labels drawn from the model itself. The plain squared
error weighs all channels alike, also those that are large and that the next norm scales away.

The first position gets a moment's trace of its own: it is one row in hundreds, and nearly every later token reads it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..progress import SILENT, Progress
from ..structure import decoder_blocks
from .walk import block_backward, capture_calls, check_tokens, embed, frozen, head_backward, linears_of, run_block, window_uniform


@dataclass
class OutputMoments:
    """Per block i: ``moment[i]`` float32 [H, H], the mean of g g^T over all positions but the first, and ``first[i]``, the trace of the first
    position's moment over that of the others."""

    moment: torch.Tensor
    first: torch.Tensor


PRECISIONS = ("auto", "float32", "bfloat16")


def autocast(precision: str):
    """A context in which products are made in ``"bfloat16"`` or ``"float32"``; ``"auto"`` is bfloat16 on CPUs that have instructions for it."""
    if precision == "auto":
        found = torch.cpu.get_capabilities()
        precision = "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"
    return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()


def output_moments(model: nn.Module, tokens: torch.Tensor, *, precision: str = "auto", seed: int = 0, progress: Progress = SILENT) -> OutputMoments:
    """Gradient moments at the output of every block, on windows ``tokens`` [W, T]; ``precision`` of the products as for ``autocast``.

    Memory: the block inputs of one window, one block's graph, T * V floats at the head, and blocks * H^2 floats of result.
    Raises as ``stats.walk.capture_calls`` does.
    """
    tokens = check_tokens(tokens)
    _, blocks = decoder_blocks(model)
    _, _, head = linears_of(model)
    calls, size = capture_calls(model, tokens), len(blocks)
    moment, first = None, torch.zeros(size, dtype=torch.float64)
    with frozen(model), autocast(precision):
        for w in progress.track(range(tokens.shape[0]), "output moments"):
            with torch.no_grad():
                hidden = [embed(model, tokens[w:w + 1])]
                for i, block in enumerate(blocks):
                    hidden.append(run_block(block, i, hidden[-1], calls))
            grad = head_backward(model, head, hidden.pop(), window_uniform(seed, w, tokens.shape[1]))[0]
            if moment is None:
                moment = torch.zeros(size, grad.shape[-1], grad.shape[-1])
            for i in range(size - 1, -1, -1):
                g = grad[0].float()
                with torch.autocast("cpu", enabled=False):
                    moment[i].addmm_(g[1:].T, g[1:])
                first[i] += float(g[0].square().sum())
                if i:
                    grad, _ = block_backward(blocks[i], i, hidden.pop(), grad, calls, {})
    moment /= tokens.shape[0] * (tokens.shape[1] - 1)
    first /= tokens.shape[0]
    return OutputMoments(moment, (first / moment.diagonal(dim1=1, dim2=2).sum(1).double().clamp(min=1e-300)).float())

"""What single rows, columns, tiles and elements of a weight are worth: the scores by which bands, tiles and sparse parts are chosen.

W, D (quantized minus float) [N, K] and the second moment H [K, K] of the input, float32. Scores rise with importance.

=================  =======================================================  ==================================================
score              formula                                                  source
=================  =======================================================  ==================================================
column_salience    sum_i W_ij^2 / U_jj^2, H^-1 = U^T U                      OBQ's saliency as SliM-LLM's code has it
column_error       H_jj sum_i D_ij^2                                        OWQ, Lee et al. 2023
column_norm        sqrt(H_jj), the channel's root mean square               CMPQ, Chen et al. 2024
row_error          sum_jk D_ij H_jk D_ik                                    SKIM, Bai et al. 2024
row_taylor         abs(mean_w s + 1/2 mean_w s^2), s = <g_w, D>_i           MixLLM, Zheng et al. 2024
tile_sums          sum_ij F_ij, rows and columns sorted by such sums        SFMP 2026
outlier_score      distance beyond the quartiles over their distance        SqueezeLLM, Kim et al. 2023
outlier_gain       by how much sum_j D_ij^2 / U_jj^2 of a group falls        SpQR, Dettmers et al. 2023
                   when one element is left out
=================  =======================================================  ==================================================
"""

from __future__ import annotations

import torch


def column_salience(weight: torch.Tensor, hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """[K]. U is the upper factor of the inverse in the columns' own order: U_jj^2 is [H^-1]_jj once the columns before j are fixed."""
    h = hessian.double()
    dead = h.diagonal() <= 0
    h = h + torch.diag(torch.where(dead, torch.ones_like(h.diagonal()), damp * h.diagonal().mean().expand(len(h))))
    # One Cholesky factor of H reversed gives it: with J the reversal, J H J = L L^T, H^-1 = U^T U and U_jj = 1 / L_(K-1-j)(K-1-j).
    factor = torch.linalg.cholesky(h.flip(0, 1)).diagonal().flip(0)
    return (weight.double().square().sum(0) * factor.square()).float()


def column_error(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """[K]."""
    return hessian.diagonal().clamp(min=0) * delta.square().sum(0)


def column_norm(hessian: torch.Tensor) -> torch.Tensor:
    """[K]."""
    return hessian.diagonal().clamp(min=0).sqrt()


def row_error(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """[N]: the mean squared error of each output."""
    return torch.cat([((rows @ hessian) * rows).sum(1) for rows in delta.split(4096)]).clamp(min=0)


def row_taylor(products: torch.Tensor) -> torch.Tensor:
    """[N] from ``products`` [windows, N]: <g_w, D> of each row, g_w the gradient of window w. Second order with the whole Fisher of a row."""
    return (products.mean(0) + 0.5 * products.square().mean(0)).abs()


def row_products(delta: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """[N]: sum_t g_ti (D x_t)_i, which is <g, D> of row i without the weight's gradient being formed. x [T, K], g [T, N]."""
    return (g * (x @ delta.T)).sum(0)


def tile_sums(salience: torch.Tensor, tile: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orders of the rows [N] and columns [K] by rising sums of ``salience`` [N, K] >= 0, and its sums over tiles of the sorted matrix, float64
    [ceil(N / rows), ceil(K / cols)]; the last tile of either axis may be ragged."""
    rows = torch.cat([part.double().sum(1) for part in salience.split(4096)]).argsort(stable=True)
    cols = sum(part.double().sum(0) for part in salience.split(4096)).argsort(stable=True)
    sums = [torch.stack([part.sum() for part in salience[own].double().sum(0)[cols].split(tile[1])]) for own in rows.split(tile[0])]
    return rows, cols, torch.stack(sums)


def outlier_score(weight: torch.Tensor, sample: int = 1 << 20) -> torch.Tensor:
    """[N, K]: how far each weight lies outside the quartiles of its matrix, in units of their distance; 0 between them.

    The quartiles are those of at most ``sample`` evenly spread weights.
    """
    flat = weight.reshape(-1)
    low, high = torch.quantile(flat[:: max(1, -(-flat.numel() // sample))], torch.tensor([0.25, 0.75]))
    distance = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(low - weight, weight - high).clamp_(min=0) / distance


def outlier_gain(weight: torch.Tensor, price: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """[N, K]: what a group's error, sum_j D_ij^2 price_j, falls by when one element of it is kept exactly and the range fitted to the others.

    SpQR's leave-one-out error over codes of ``bits`` bits that cover the range of each ``group`` columns (a ragged last one too), in units of tau. ``price``
    [K] is 1 / U_jj^2. An element inside the range saves its own error; one at an end also what the others gain from the narrower range.
    """
    out = torch.empty_like(weight)
    full = weight.shape[1] // group * group
    for a, b in ((0, full), (full, weight.shape[1])):
        if b > a:
            p = price[a:b].view(-1, min(group, b - a))
            for rows, into in zip(weight[:, a:b].split(256), out[:, a:b].split(256), strict=True):
                into.copy_(_gain(rows.unflatten(1, p.shape), p, (1 << bits) - 1).flatten(1))
    return out


def _gain(x: torch.Tensor, price: torch.Tensor, top: int) -> torch.Tensor:
    """For groups x [N, G, width] and price [G, width]."""

    def errors(low, high):
        step = (high - low) / top
        q = ((x - low) / torch.where(step > 0, step, torch.ones_like(step))).round_().clamp_(0, top)
        return (q * step + low - x).square_() * price

    if x.shape[-1] == 1:
        return torch.zeros_like(x)  # one value is met by its range
    ends = {end: x.topk(2, largest=end == "high") for end in ("low", "high")}
    low, high = (ends[end].values[..., :1] for end in ("low", "high"))
    gain = errors(low, high)
    total = gain.sum(-1, keepdim=True)
    for end, ranged in (("low", (ends["low"].values[..., 1:], high)), ("high", (low, ends["high"].values[..., 1:]))):
        place = ends[end].indices[..., :1]
        left = errors(*ranged).scatter_(-1, place, 0.0)
        gain = gain.scatter(-1, place, total - left.sum(-1, keepdim=True))
    return gain


def outlier_unit(weight: torch.Tensor, price: torch.Tensor) -> float:
    """What SpQR's threshold tau of a linear is a multiple of: the mean over columns of var(W_j) / U_jj^2."""
    return float((weight.var(0, correction=1) * price).mean()) if len(weight) > 1 else 0.0


def largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """bool, shape of ``score``: its ``count`` largest entries, of equal ones the first."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[torch.argsort(score.reshape(-1), descending=True, stable=True)[:count]] = True
    return mask.view_as(score)

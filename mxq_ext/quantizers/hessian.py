"""From a layer's second moment H to the triangular factor that GPTQ needs.

GPTQ (Frantar et al. 2023) quantizes the columns of W in a fixed order and moves each column's rounding error to the columns not
yet done, by the rows of U with H^-1 = U^T U. The same numbers come from H itself without an inverse (LDLQ, QuIP, Chee et al. 2023):

    H = V D V^T,  V unit upper triangular,  D diagonal
    target_j = W_j + sum_{i<j} (W_i - Q_i) V_ij          what column j should be rounded from
    tr(dW H dW^T) = sum_j D_j |Q_j - target_j|^2         so D_j is the price of a rounding error in column j

with 1 / D_j = U_jj^2 = [(H_{j:,j:})^-1]_jj. One Cholesky factorization of H with rows and columns reversed gives V and D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import QuantizationError, ShapeError

RETRIES = 4  # dampings tried: damp, 10 damp, 100 damp, 1000 damp


@dataclass
class HessianFactor:
    """A factorized Hessian; shared by all weights that read the same input and by all formats tried on them.

    Attributes:
        matrix: H, symmetric, not damped, float32 [K, K], original column order.
        order: int64 [K]; the column quantized at step t (None: 0 .. K-1).
        feedback: V^T, unit lower triangular, float32 [K, K], in that order.
        price: D, float32 [K], in that order.
        damp: the damping that worked, as a fraction of the mean diagonal; asked_damp: the one tried first.
        retries: how many smaller dampings failed before.
        dead: number of columns with H_jj = 0 (inputs that were always zero).
        warnings: one text for each retry.
    """

    matrix: torch.Tensor
    order: torch.Tensor | None
    feedback: torch.Tensor
    price: torch.Tensor
    damp: float
    asked_damp: float
    retries: int
    dead: int
    warnings: list[str] = field(default_factory=list)

    @property
    def act_order(self) -> bool:
        return self.order is not None

    def importance(self) -> torch.Tensor:
        """D in original column order, float32 [K]; 0 for dead columns."""
        d = self.price.clone() if self.order is None else torch.empty_like(self.price).index_copy_(0, self.order, self.price)
        return d.masked_fill_(self.matrix.diagonal() <= 0, 0.0)

    def damped(self) -> torch.Tensor:
        """H as it was factorized: damping added, dead columns decoupled; float32 [K, K], original order."""
        h = self.matrix.clone()
        h.diagonal().copy_(_damped_diagonal(h.diagonal().double(), self.damp))
        return h


def diagonal(hessian: torch.Tensor | HessianFactor) -> torch.Tensor:
    """diag(H) >= 0, float32 [K]: the mean square of each input, the importance of a column to a method without feedback."""
    return (hessian.matrix if isinstance(hessian, HessianFactor) else hessian).diagonal().clamp(min=0)


def _damped_diagonal(diagonal: torch.Tensor, damp: float) -> torch.Tensor:
    """Diagonal + damp * its mean over live columns. A dead column gets the mean itself: it is rounded to nearest and disturbs nobody."""
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=diagonal.dtype)
    return torch.where(dead, mean, diagonal + damp * mean)


def prepare_hessian(hessian: torch.Tensor, damp: float = 0.01, act_order: bool = True) -> HessianFactor:
    """Symmetrizes, damps and factorizes H [K, K], the factorization in float64.

    ``damp`` is multiplied by 10 until the factorization succeeds, at most three times; each retry is reported in ``warnings``.
    ``act_order`` sorts the columns by falling H_jj (ties by index). Columns with H_jj = 0 are decoupled and will be rounded to
    nearest: the calibration says nothing of them, which is no reason to zero them as the original does.

    Raises:
        ShapeError: not a square matrix.
        QuantizationError: values that are not finite, a negative diagonal, or no damping that helps.
    """
    shape = " x ".join(map(str, hessian.shape))
    what = f"factorizing a Hessian of {shape}"
    advice = "calibrate this unit again in float32 with more tokens, or give it method='rtn'"
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] == 0:
        raise ShapeError(what, "it must be a square matrix [K, K]", "pass the mean of x x^T over tokens")
    if not (damp > 0 and math.isfinite(damp)):
        raise QuantizationError(what, f"damp must be a positive fraction of the mean diagonal, it is {damp:g}", "use 0.01")
    h = hessian.detach().to(device="cpu", dtype=torch.float32)
    matrix = (h + h.T).mul_(0.5)
    if not torch.isfinite(matrix).all():
        raise QuantizationError(what, f"{int((~torch.isfinite(h)).sum())} of its {h.numel()} values are NaN or infinite", advice)
    squares = matrix.diagonal().double()
    if float(squares.min()) < 0:
        raise QuantizationError(what, f"its diagonal holds sums of squares, yet the least entry is {float(squares.min()):g}", advice)
    order = torch.sort(squares, descending=True, stable=True).indices if act_order else None
    backward = order.flip(0) if act_order else torch.arange(h.shape[0]).flip(0)
    reversed_h = matrix.index_select(0, backward).index_select(1, backward).double()
    asked, warnings = damp, []
    for retry in range(RETRIES):
        reversed_h.diagonal().copy_(_damped_diagonal(squares, damp)[backward])
        c, failed = torch.linalg.cholesky_ex(reversed_h)
        pivots = c.diagonal().clone()
        if not int(failed) and float(pivots.min()) > 0 and torch.isfinite(pivots).all():
            # reversed H = C C^T, so H = R R^T with R = C flipped both ways, and V_ij = R_ij / R_jj.
            feedback = c.div_(pivots).float().T.flip(0, 1).contiguous()
            price = pivots.flip(0).square().float()
            return HessianFactor(matrix, order, feedback, price, damp, asked, retry, int((squares == 0).sum()), warnings)
        if retry < RETRIES - 1:
            warnings.append(f"the Hessian is not positive definite with {damp:g} of its mean diagonal as damping; took {damp * 10:g}")
            damp *= 10
    raise QuantizationError(what, f"it is not positive definite even with {damp:g} of its mean diagonal as damping "
                            f"(the factorization stops at column {int(failed)} of {h.shape[0]})", advice)

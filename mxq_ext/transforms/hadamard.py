"""Hadamard matrices: orthogonal, all entries of one magnitude, so that a rotation spreads what stands out evenly over all channels."""

from __future__ import annotations

import torch

from ..errors import ShapeError

_LARGEST_CORE = 256


def hadamard(n: int) -> torch.Tensor:
    """float64 [n, n], entries +-1/sqrt(n), H H^T = I.

    n = 2^k * m with m = 1, or m = q + 1 (q a prime of the form 4i + 3) or m = 2 (q + 1) (q a prime of the form 4i + 1): Sylvester's doubling of a core
    that Paley's constructions (1933) give. Covers hidden sizes such as 576 = 16 * 36 and 1536 = 128 * 12. Raises ShapeError for other n.
    """
    core, doublings = n, 0
    while core >= 1:
        found = _core(core)
        if found is not None:
            h = found
            for _ in range(doublings):
                h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
            return h / n**0.5
        if core % 2:
            break
        core, doublings = core // 2, doublings + 1
    raise ShapeError(f"a Hadamard matrix of order {n}", "no construction is known here: n must be 2^k times 1, or a Paley order such as 12, 20, 28, 36",
                     'use kind="orthogonal", a random rotation of any size')


def _core(m: int) -> torch.Tensor | None:
    """A matrix of +-1 of order m that is no doubling of a smaller one, or None."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m > _LARGEST_CORE or m % 4:
        return None
    if _is_prime(m - 1) and (m - 1) % 4 == 3:
        s = _bordered(m - 1)
        s[:, 0] *= -1  # skew: S + S^T = 0 but for the diagonal, which the identity fills
        s[0, 0] = 0
        return s + torch.eye(m, dtype=torch.float64)
    q = m // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        s = _bordered(q)
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(s, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def _bordered(q: int) -> torch.Tensor:
    """[q+1, q+1]: a border of ones around the matrix of Legendre symbols (i - j | q), zero at the corner."""
    squares = {x * x % q for x in range(1, q)}
    out = torch.ones(q + 1, q + 1, dtype=torch.float64)
    out[0, 0] = 0
    for i in range(q):
        for j in range(q):
            out[i + 1, j + 1] = 0 if i == j else 1 if (i - j) % q in squares else -1
    return out


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def random_rotation(n: int, seed: int, kind: str = "hadamard") -> torch.Tensor:
    """Orthogonal float64 [n, n]: ``"hadamard"`` is diag(random signs) H (QuIP#, Tseng et al. 2024, arXiv 2402.04396), ``"orthogonal"`` a uniformly
    random rotation (Haar), which every n has. Raises ShapeError for an n without a Hadamard matrix, or another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
        return signs[:, None] * hadamard(n)
    if kind == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()
    raise ShapeError(f"a rotation of kind {kind!r}", "the kinds are hadamard and orthogonal", "use one of those")

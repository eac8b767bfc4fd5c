"""How much queries look at tokens, for pages whose bits depend on it (``KVSpec.mixed``).

    p_i = sum over probes k of A_ki / count of probes that could see i          ZipCache (He et al. 2024, arXiv 2405.14256)
    p_i = sum over probes k of A_ki                                             accumulated, as MiKV (Yang et al. 2024, arXiv 2402.18096) after H2O

with A the softmax over everything that a query sees, averaged over the heads. Probes are the queries whose position in the sequence, or in the tail, says
so, so that it does not matter in which pieces tokens come: every PERIOD-th, and the newest ones before pages are made. Where a text is read at once from an
empty cache, its newest twentieth are probes too.
"""

from __future__ import annotations

import torch

PERIOD = 16
_SLICE = 1 << 24  # attention weights held at a time


class Salience:
    """Of the tokens in a tail of ``room`` tokens."""

    def __init__(self, batch: int, room: int):
        self.sum = torch.zeros(batch, room)
        self.count = torch.zeros(room, dtype=torch.int32)

    def tensors(self) -> list[torch.Tensor]:
        return [self.sum, self.count]

    @staticmethod
    def nbytes(batch: int, room: int) -> int:
        """Bytes of :meth:`tensors`."""
        return 4 * room * (batch + 1)

    def add(self, start: int, weights: torch.Tensor, count: torch.Tensor) -> None:
        """To the tokens from place ``start`` on: weights [B, n], count [n]."""
        part = slice(start, start + weights.shape[1])
        self.sum[:, part] += weights
        self.count[part] += count

    def score(self, tokens: int, accumulated: bool) -> torch.Tensor:
        """float32 [B, tokens] of the oldest tokens."""
        total = self.sum[:, :tokens]
        return total.clone() if accumulated else total / self.count[:tokens].clamp(min=1)

    def drop(self, oldest: int) -> None:
        """The oldest tokens are gone, the others move up."""
        for x in (self.sum.T, self.count):
            x[:-oldest] = x[oldest:].clone()
            x[-oldest:] = 0

    def forget(self, tokens: int) -> None:
        """Only the first ``tokens`` tokens are left."""
        self.sum[:, tokens:], self.count[tokens:] = 0, 0

    def select(self, index: torch.Tensor) -> None:
        self.sum = self.sum.index_select(0, index)


def probes_of(first: int, count: int, newest: int) -> torch.Tensor:
    """Which of ``count`` queries from position ``first`` on are probes: int64 indices. The ``newest`` last ones are, whatever their position."""
    place = torch.arange(count)
    return place[((place + first) % PERIOD == 0) | (place >= count - newest)]


def weights_over_tail(query: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, first: int, *, scale: float, softcap: float,
                      mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What probes give to tokens of a tail.

    Args:
        query: [B, Hq, n, D]; keys: [B, Hkv, t, D], the tail.
        lse: float32 [B, Hq, n]: the logarithm of the sum of exponentials over all that a query sees.
        first: int64 [n], the place of each query's own token in the tail; it sees those up to it.
        mask: bool [B, t] or [B, n, t], or None.

    Returns (sum of the weights float32 [B, t], averaged over heads; count of probes that could see each token int32 [t], by place alone).
    """
    batch, heads, n, dim = query.shape
    grouped = query.float().view(batch, keys.shape[1], -1, dim)  # the query heads of a key head are rows of one product
    scores = (grouped @ keys.float().mT).view(batch, heads, n, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.arange(keys.shape[2]) <= first[:, None]
    p = (scores - lse[..., None]).exp().masked_fill(~seen, 0.0)
    if mask is not None:
        p = p.masked_fill(~(mask[:, None, None] if mask.dim() == 2 else mask[:, None]), 0.0)
    return p.sum((1, 2)) / heads, seen.sum(0, dtype=torch.int32)


def weights_of_prompt(query: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor | None, *, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a text that attends to itself: query [B, Hq, T, D], keys [B, Hkv, T, D], ``seen`` bool [B or 1, 1, T, T] or None for causal attention."""
    batch, heads, tokens, dim = query.shape
    probes = probes_of(0, tokens, max(PERIOD, tokens // 20))
    group = heads // keys.shape[1]
    allowed = (torch.arange(tokens) <= probes[:, None])[None, None] if seen is None else seen[:, :, probes]
    total = torch.zeros(batch, tokens)
    step = max(1, _SLICE // (batch * len(probes) * tokens))
    for head in range(0, heads, step):
        part = range(head, min(head + step, heads))
        scores = query[:, head : part.stop, probes].float() @ keys[:, [h // group for h in part]].float().mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
        total += torch.softmax(scores, -1).masked_fill(~allowed, 0.0).sum((1, 2)) / heads
    return total, (torch.arange(tokens) <= probes[:, None]).sum(0, dtype=torch.int32)

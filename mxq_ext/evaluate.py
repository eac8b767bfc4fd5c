"""Measuring a model: perplexity, divergence from a reference, greedy agreement, speed.

Logits of a whole window are never held: the last block's output is kept, and head and softmax run on slices of positions. So a
``Reference`` costs W * T * H floats, and many models can be compared with it without running the reference's blocks again.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn

from . import decoding
from .decoding import Decoder
from .errors import ModelError, ShapeError
from .nn.fused import through_modules
from .progress import SILENT, Progress
from .stats.store import tokens_hash
from .stats.walk import check_tokens, final_hidden, frozen, hooked, tail
from .structure import decoder_blocks

#: Positions whose logits are held at a time; 64 x 49152 float32 are 13 MB, and three such tensors are alive.
CHUNK = 64
#: Tokens that a model with a cache reads at a time. A packed cache holds as many exactly before it makes its first page.
STEP = 64


def _mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over windows (NaN for a single one, which has no spread to judge by)."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass
class Evaluation:
    """How a model did on windows of text, in nats per token; each list holds the mean over one window's scored positions.

    Attributes:
        windows, length: W and T of the tokens.
        scored: predictions that were scored, W * (T - 1): every token but the first of its window.
        tokens: sha256 of the tokens.
        nll_windows: negative log likelihood of the text.
        kl_windows: KL(reference || model); None without a reference, as the next.
        top1_windows: share of positions at which both have the same likeliest token.
        kv: which cache the model read its past from, None if it had none, and ``kv_nbytes``, its bytes at the end of a window.

    ``nll``, ``kl``, ``agreement`` are the means, ``*_se`` their standard errors over windows, and ``perplexity`` is exp(nll).
    """

    windows: int
    length: int
    scored: int
    tokens: str
    nll_windows: list[float] = field(repr=False)
    kl_windows: list[float] | None = field(default=None, repr=False)
    top1_windows: list[float] | None = field(default=None, repr=False)
    kv: str | None = None
    kv_nbytes: int | None = None

    @property
    def nll(self) -> float:
        return _mean_and_se(self.nll_windows)[0]

    @property
    def nll_se(self) -> float:
        return _mean_and_se(self.nll_windows)[1]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def kl(self) -> float | None:
        return None if self.kl_windows is None else _mean_and_se(self.kl_windows)[0]

    @property
    def kl_se(self) -> float | None:
        return None if self.kl_windows is None else _mean_and_se(self.kl_windows)[1]

    @property
    def agreement(self) -> float | None:
        return None if self.top1_windows is None else _mean_and_se(self.top1_windows)[0]

    @property
    def agreement_se(self) -> float | None:
        return None if self.top1_windows is None else _mean_and_se(self.top1_windows)[1]

    def to_dict(self) -> dict:
        """For JSON: means, standard errors (null for a single window) and the values per window; no KL entries without a reference."""
        out = {"windows": self.windows, "length": self.length, "stride": self.length, "scored_tokens": self.scored, "tokens_sha256": self.tokens,
               "perplexity": self.perplexity, "nll": self.nll, "nll_se": _finite(self.nll_se), "nll_windows": self.nll_windows}
        if self.kl_windows is not None:
            out |= {"kl": self.kl, "kl_se": _finite(self.kl_se), "kl_windows": self.kl_windows, "agreement": self.agreement,
                    "agreement_se": _finite(self.agreement_se), "agreement_windows": self.top1_windows}
        if self.kv is not None:
            out |= {"kv": self.kv, "kv_nbytes": self.kv_nbytes}
        return out

    @staticmethod
    def from_dict(row: dict) -> Evaluation:
        """The Evaluation that ``to_dict`` made a row of."""
        return Evaluation(row["windows"], row["length"], row["scored_tokens"], row["tokens_sha256"], row["nll_windows"], row.get("kl_windows"),
                          row.get("agreement_windows"), row.get("kv"), row.get("kv_nbytes"))


def _finite(value: float) -> float | None:
    # NaN is no JSON
    return value if math.isfinite(value) else None


class Reference:
    """A model's last hidden states on given windows, from which its logits are made again slice by slice.

    The model's final norm and head are used, not copied: they must stay as they are while the reference is in use (checked).
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor, hidden: torch.Tensor):
        self.model, self.hidden = model, hidden
        self.tokens = tokens_hash(tokens)
        self._first = tail(model, hidden[:1, :1])

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, tokens: torch.Tensor, progress: Progress = SILENT) -> Reference:
        """Runs ``model`` on ``tokens`` [W, T], without a cache. Memory: W * T * H floats."""
        tokens = check_tokens(tokens)
        with frozen(model):
            return cls(model, tokens, torch.cat([final_hidden(model, t[None]) for t in progress.track(tokens.unbind(), "reference")]))

    @torch.no_grad()
    def check(self, tokens: torch.Tensor) -> None:
        """Raises ShapeError if made of other tokens, ModelError if the model's head has changed since."""
        if tokens_hash(tokens) != self.tokens:
            raise ShapeError(f"tokens {list(tokens.shape)}", f"the reference was made of others ({list(self.hidden.shape[:2])})",
                             "make the reference of the same windows")
        with frozen(self.model):
            now = tail(self.model, self.hidden[:1, :1])
        if not torch.allclose(now, self._first, rtol=1e-4, atol=1e-4):
            raise ModelError("the reference", "its model has been changed since it was made", "quantize a copy of the reference model")


class _Enough(Exception):
    """Leaves a model's forward behind its last block."""


@torch.no_grad()
def cached_hidden(model: nn.Module, tokens: torch.Tensor, cache, step: int = STEP) -> torch.Tensor:
    """Output [1, T, H] of the last block on ``tokens`` [1, T], which the model reads ``step`` at a time with ``cache``, as if it wrote them.

    Tokens of one step see each other as the cache's ``update`` returns them. With an MxqCache and at most 64 of them that is what they see when they come
    one by one: each sees all before it in the form in which the cache holds them at that moment.
    """
    blocks, name, out = decoder_blocks(model)[1], Decoder(model).name, []

    def stop(block, args, output):
        out.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    with through_modules(model), hooked([blocks[-1].register_forward_hook(stop)]):
        for piece in check_tokens(tokens).split(step, dim=1):
            with contextlib.suppress(_Enough):
                model(piece, use_cache=True, **{name: cache})
    if hasattr(cache, "check_read"):  # the model's own check comes behind the block at which its forward was left
        cache.check_read()
    return torch.cat(out, dim=1)


@torch.no_grad()
def evaluate(model: nn.Module, reference: nn.Module | Reference | None, tokens: torch.Tensor, *, chunk: int = CHUNK,
             cache: Callable[[], object] | None = None, step: int = STEP, progress: Progress = SILENT) -> Evaluation:
    """Scores ``model`` on ``tokens`` [W, T]; every token but the first of a window is predicted from those before it in the window.

    A model that keeps its keys and values in packed pages (``replace_attention``, or a plan with a KV section) reads each window through such a
    cache: what has become a page is read from that page.

    Args:
        reference: a model, a ``Reference`` of the same tokens (cheaper if several models are compared), or None for perplexity alone. It runs
            without a cache.
        chunk: positions whose logits are held at a time.
        cache: makes the cache of a window, to measure another than the model's own; ``step``: tokens that are read at a time with it.

    Raises ShapeError if the vocabularies or the tokens differ from the reference's, ModelError if a loss is not finite.
    """
    tokens = check_tokens(tokens).to(torch.int64)
    if isinstance(reference, nn.Module):
        reference = Reference.of(reference, tokens, progress)
    elif reference is not None:
        reference.check(tokens)
    if cache is None and getattr(model, "mxq_kv", None) is not None:
        cache = _packed_cache(model)
    scores, kv, kv_nbytes = Scores(tokens, reference, chunk), None, None
    with frozen(model):
        for w in progress.track(range(tokens.shape[0]), "evaluate"):
            if cache is None:
                hidden = final_hidden(model, tokens[w:w + 1])
            else:
                past = cache()
                hidden = cached_hidden(model, tokens[w:w + 1], past, step)
                kv = str(getattr(past, "kv", type(past).__name__))
                kv_nbytes = past.nbytes() if hasattr(past, "nbytes") else None
                del past
            scores.add(lambda part, hidden=hidden: tail(model, hidden[:, part])[0])
    return scores.evaluation(type(model).__name__, kv, kv_nbytes)


@torch.no_grad()
def evaluate_logits(logits: Callable[[torch.Tensor], torch.Tensor], reference: Reference | None, tokens: torch.Tensor, *, chunk: int = CHUNK,
                    progress: Progress = SILENT) -> Evaluation:
    """:func:`evaluate` of something that is no torch model: ``logits`` gives [T, V] for a window int64 [T]. Raises the same."""
    tokens = check_tokens(tokens).to(torch.int64)
    if reference is not None:
        reference.check(tokens)
    scores = Scores(tokens, reference, chunk)
    for window in progress.track(tokens.unbind(), "evaluate"):
        found = logits(window)
        scores.add(lambda part, found=found: found[part])
    return scores.evaluation("logits")


class Scores:
    """Sums over the positions of one window after another, a slice of logits at a time."""

    def __init__(self, tokens: torch.Tensor, reference: Reference | None, chunk: int):
        self.tokens, self.reference, self.chunk = tokens, reference, chunk
        self.nll: list[float] = []
        self.kl: list[float] = []
        self.top1: list[float] = []

    def add(self, logits: Callable[[slice], torch.Tensor]) -> None:
        """Scores the next window; ``logits`` gives [t, V] for a slice of its positions."""
        w, last = len(self.nll), self.tokens.shape[1] - 1
        sums = [0.0, 0.0, 0.0]
        for start in range(0, last, self.chunk):
            part = slice(start, min(start + self.chunk, last))
            logq = torch.log_softmax(logits(part).float(), dim=-1)
            sums[0] -= float(logq.gather(1, self.tokens[w, part.start + 1:part.stop + 1, None]).sum(dtype=torch.float64))
            if self.reference is not None:
                logp = torch.log_softmax(tail(self.reference.model, self.reference.hidden[w:w + 1, part])[0].float(), dim=-1)
                divergence, same = _compare(logp, logq)
                sums[1] += divergence
                sums[2] += same
        for values, total in zip((self.nll, self.kl, self.top1), sums, strict=True):
            values.append(total / last)

    def evaluation(self, what: str, kv: str | None = None, kv_nbytes: int | None = None) -> Evaluation:
        """Of all windows. Raises ModelError if a loss is not finite."""
        if not all(map(math.isfinite, self.nll + self.kl)):
            raise ModelError(f"evaluating {what}", "its loss is not finite", "its logits hold inf or NaN: check the weights and the dtype")
        windows, length = self.tokens.shape
        against = self.reference is not None
        return Evaluation(windows, length, windows * (length - 1), tokens_hash(self.tokens), self.nll, self.kl if against else None,
                          self.top1 if against else None, kv, kv_nbytes)


def _packed_cache(model: nn.Module) -> Callable[[], object]:
    """Makes the caches of a model with a KV section."""
    from .kv.cache import MxqCache  # it imports transformers

    return lambda: MxqCache(model.config, model.mxq_kv)


def _compare(logp: torch.Tensor, logq: torch.Tensor) -> tuple[float, int]:
    """(sum over positions of KL(p || q), positions with the same argmax). Overwrites both arguments, to hold no more than three tensors."""
    if logp.shape != logq.shape:
        raise ShapeError(f"logits {list(logq.shape)}", f"the reference has {list(logp.shape)}", "compare models of one vocabulary")
    same = int((logp.argmax(dim=-1) == logq.argmax(dim=-1)).sum())
    # sum p (log p - log q): the differences are small where p is large, so little cancels. p = 0 where log p is -inf must give 0.
    p = logp.exp()
    difference = logp.sub_(logq).masked_fill_(p == 0, 0.0)
    return float(p.mul_(difference).sum(dtype=torch.float64)), same


def paired(a: Evaluation, b: Evaluation) -> dict[str, float | None]:
    """Mean over windows of a - b, and its standard error: ``nll``, ``nll_se``, and ``kl``, ``kl_se`` if both have a reference.

    Windows differ far more from each other than two models do on one window, so this resolves what the two single errors cannot.
    Raises ShapeError if the evaluations are of different windows.
    """
    if (a.tokens, a.windows, a.length) != (b.tokens, b.windows, b.length):
        raise ShapeError(f"comparing evaluations of {a.windows} x {a.length} and {b.windows} x {b.length} tokens", "they are not of the same windows",
                         "evaluate both on the same tokens")
    out = {}
    for name, x, y in (("nll", a.nll_windows, b.nll_windows), ("kl", a.kl_windows, b.kl_windows)):
        if x is not None and y is not None:
            mean, error = _mean_and_se([i - j for i, j in zip(x, y, strict=True)])
            out |= {name: mean, f"{name}_se": _finite(error)}
    return out


# Generating -----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def speed(model: nn.Module, prefill: int = 512, decode: int = 32, repeats: int = 3, seed: int = 0) -> dict[str, float | int]:
    """Tokens per second at batch 1, on random tokens: reading a prompt of ``prefill`` tokens, then writing ``decode`` tokens greedily.

    Medians: of ``repeats`` prompts for ``prefill_tokens_per_s``, of all their steps for ``decode_tokens_per_s`` (one step is one token,
    with ``prefill`` and more tokens in the cache). A first, shorter round is not counted.
    """
    if min(prefill, decode, repeats) < 1:
        raise ShapeError(f"speed of prefill {prefill}, decode {decode}, {repeats} repeats", "each must be at least 1", "use positive numbers")
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    prompts, steps = [], []
    with frozen(model):
        for round_ in range(-1, repeats):
            ids = torch.randint(0, vocabulary, (1, prefill), generator=generator).to(model.device)
            decoder = Decoder(model)
            start = time.perf_counter()
            token = decoder.step(ids).argmax(dim=-1, keepdim=True)
            first = time.perf_counter()
            times = []
            for _ in range(decode if round_ >= 0 else min(decode, 2)):
                before = time.perf_counter()
                token = decoder.step(token).argmax(dim=-1, keepdim=True)
                times.append(time.perf_counter() - before)
            if round_ >= 0:
                prompts.append(first - start)
                steps += times
    return {"prefill_tokens_per_s": prefill / statistics.median(prompts), "decode_tokens_per_s": 1 / statistics.median(steps),
            "prefill": prefill, "decode": decode, "repeats": repeats, "threads": torch.get_num_threads()}


@torch.no_grad()
def greedy(model: nn.Module, prompt: torch.Tensor, n: int) -> torch.Tensor:
    """The ``n`` likeliest next tokens, one after the other, int64 [n], after ``prompt`` [T]; an end-of-text token does not stop it."""
    with frozen(model):
        return torch.cat(list(islice(decoding.greedy(model, prompt[None]), n)))


def greedy_agreement(model: nn.Module, reference: nn.Module, prompts: Iterable[torch.Tensor], n: int = 32,
                     progress: Progress = SILENT) -> dict[str, float | int]:
    """How alike two models write: ``n`` greedy tokens after each of ``prompts`` (int64 [T] each).

    Returns ``same``, the share of the tokens that are equal place by place, and ``prefix``, the mean number of tokens before the first
    difference (at most n). Each model goes on from its own text, so one early difference counts for all that follows.
    """
    same, prefix = [], []
    for prompt in progress.track(list(prompts), "greedy agreement"):
        equal = greedy(model, prompt, n) == greedy(reference, prompt, n)
        same.append(float(equal.double().mean()))
        prefix.append(int(equal.long().cumprod(dim=0).sum()))
    if not same:
        raise ShapeError("greedy agreement", "there are no prompts", "give at least one")
    return {"prompts": len(same), "tokens": n, "same": statistics.fmean(same), "prefix": statistics.fmean(prefix)}

"""End-to-end training of what is cheap to move: the constants of quantized weights, and the norms, against the float model's predictions.

Codes stay. The loss is KL(float || quantized) of the next-token distributions, over the whole model, so errors of one block are made good by later ones,
and by what the layers' outputs are for. Scales, float zeros and tables cost no byte more after training (EfficientQAT's second phase: Chen et al. 2024,
arXiv 2407.11062); neither do the norms' weights, which scale whole input channels (Norm Tweaking: Li et al. 2023, arXiv 2309.02784). Adam (Kingma and Ba
2015) on relative moves: a scale by a part of its size, a table's entry by a part of its row's mean gap, a norm's weight by a part of its own mean size. The
rate rises over the first steps and falls linearly to zero.

The model is walked forward without a graph, then back block by block, each computed again: memory is one block's graph, not the model's.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import QuantizationError
from ..fileio import load_tensors, save_tensors
from ..progress import SILENT, Progress
from ..qtensor import QTensor
from ..stats.outputs import PRECISIONS, autocast
from ..stats.walk import Calls, capture_calls, check_tokens, embed, final_hidden, frozen, linears_of, run_block, tail
from ..structure import decoder_blocks
from .base import Options, need, training_key
from .learned import LearnedWeight

SLICE = 128  #: positions whose logits are held at a time
EVERY = 8  #: steps between two states on disk
JUDGED = 8  #: windows, at most, whose KL is taken before and after
MOMENTS = (0.9, 0.95)  #: of Adam; the second is short, since there are tens of steps and not thousands


@dataclass
class DistillOptions(Options):
    """Options of :func:`distill`.

    steps, batch: training steps, and windows in each. rate, norms: what a constant, and a norm's weight, moves in a step at most, relative to its size;
    ``norms=0`` leaves the norms alone. precision: of the products, ``"bfloat16"``, ``"float32"``, or ``"auto"``. seed: of the order of windows.
    """

    steps: int = 100
    batch: int = 2
    rate: float = 1e-3
    norms: float = 1e-3
    precision: str = "auto"
    seed: int = 0

    def check(self) -> None:
        need(self.steps >= 1, "steps", self.steps, "it must be an integer >= 1")
        need(self.batch >= 1, "batch", self.batch, "it must be an integer >= 1")
        need(0 < self.rate <= 0.1, "rate", self.rate, "it must lie in (0, 0.1]")
        need(0 <= self.norms <= 0.1, "norms", self.norms, "it must lie in [0, 0.1]")
        need(self.precision in PRECISIONS, "precision", self.precision, f"it must be one of {', '.join(PRECISIONS)}")

    def share(self, step: int) -> float:
        """Of the rate at ``step``: up over a tenth of the steps, then down to zero."""
        rise = max(1, self.steps // 10)
        return min(1.0, (step + 1) / rise) * (self.steps - step) / self.steps


def distill(model: nn.Module, start: Mapping[str, QTensor], tokens: torch.Tensor, options: DistillOptions, *, directory: Path | None = None,
            progress: Progress = SILENT) -> tuple[dict[str, QTensor], dict[str, torch.Tensor]]:
    """Trains the quantized weights ``start`` (unit name -> QTensor) and returns them, and the norms' weights by parameter name.

    Args:
        model: the float model; not changed. What ``start`` does not name stays in float.
        tokens: calibration windows [W, T].
        directory: where the state is kept every few steps; a run that was stopped goes on from it and ends with the same bits.

    Weights outside of the decoder blocks (embedding, head) are used as they are quantized, and stay so. Rectangles of fp16, of more than five bits and with
    nested scales stay, too.
    ``info`` of each QTensor of a block says ``distill_kl_start`` and ``distill_kl_end``: the mean KL on the same few of the windows, of the start and of what
    is returned. If training has made it worse, that is the start, with a note.

    Memory beside the model: a copy of it, hidden states of all windows, one block's graph, and 16 bytes per constant. Raises QuantizationError if nothing can
    move.
    """
    tokens = check_tokens(tokens).to(torch.int64)
    run = _Distillation(model, start, tokens, options, directory, progress)
    if not run.learned:
        raise QuantizationError("distillation", "no weight in the decoder blocks has constants of five bits or fewer that are not nested",
                                "leave it out for this plan")
    with frozen(run.student), frozen(model):
        return run.go()


class _Moves:
    """Adam over a list of tensors of relative moves: ``step`` takes derivatives and returns by how much each moves now."""

    def __init__(self, like: list[torch.Tensor]):
        self.first, self.second = ([torch.zeros_like(t, dtype=torch.float32) for t in like] for _ in range(2))

    def step(self, slopes: list[torch.Tensor], rate: float, count: int) -> list[torch.Tensor]:
        out, (b1, b2) = [], MOMENTS
        for m, v, g in zip(self.first, self.second, slopes, strict=True):
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            out.append((m / (1 - b1 ** count)).div_((v / (1 - b2 ** count)).sqrt_().add_(1e-12)).mul_(-rate))
        return out


class _Distillation:
    """One run: ``student`` is a copy of the model with the quantized weights, ``learned`` those in its blocks that can move."""

    def __init__(self, model, start, tokens, options, directory, progress):
        self.model, self.start, self.tokens, self.options, self.progress = model, dict(start), tokens, options, progress
        self.student = copy.deepcopy(model)
        self.modules = dict(self.student.named_modules())
        self.blocks = list(decoder_blocks(self.student)[1])
        self.linears = [[n for n in names if n in self.start] for names in linears_of(self.student)[0]]  # quantized ones of each block
        inside = {n for names in self.linears for n in names}
        found = {n: LearnedWeight(self.modules[n].weight, self.start[n]) for n in inside}
        self.learned = {n: w for n, w in sorted(found.items()) if any(w.constants())}
        for name, q in self.start.items():
            self.modules[name].weight.data = self.learned[name].value() if name in self.learned else q.dequantize()
        self.norms = {n: p for n, p in self.student.named_parameters() if p.dim() == 1 and "norm" in n.lower()} if options.norms else {}
        self.sizes = {n: p.detach().abs().mean() for n, p in self.norms.items()}
        mine = [{id(p) for p in block.parameters()} for block in self.blocks]
        self.block_norms = [[n for n, p in self.norms.items() if id(p) in ids] for ids in mine]
        self.last_norms = [n for n, p in self.norms.items() if not any(id(p) in ids for ids in mine)]
        self.moves = {n: [_Moves(list(part.values())) for part in w.constants()] for n, w in self.learned.items()}
        self.norm_moves = _Moves(list(self.norms.values()))
        self.losses: list[float] = []
        self.state = None if directory is None else Path(directory) / f"{training_key(self.options, self.start, self.tokens)}.safetensors"

    # The run

    def go(self) -> tuple[dict[str, QTensor], dict[str, torch.Tensor]]:
        calls = capture_calls(self.student, self.tokens)
        with torch.no_grad():
            target = [final_hidden(self.model, t[None]) for t in self.progress.track(self.tokens.unbind(), "reference")]
        before = self._kl(calls, target)  # the student still is the start, also where a run goes on
        done, order = self._resume(), self._order()
        for step in self.progress.track(range(done, self.options.steps), "distill"):
            self._step(step, order[step], calls, target)
            if self.state is not None and (step + 1) % EVERY == 0:
                self._write(step + 1)
        after = self._kl(calls, target)
        better = after <= before  # false for NaN
        out, norms = dict(self.start), self.norms if better else {n: self.model.get_parameter(n) for n in self.norms}
        for name, w in self.learned.items():
            out[name] = w.qtensor() if better else copy.copy(self.start[name])
            out[name].info = out[name].info | {"distill_kl_start": before, "distill_kl_end": after if better else before}
        self.progress.note(f"distilled: KL on {len(self._judged())} calibration windows {before:.4g} -> {after:.4g}"
                           + ("" if better else ", which is worse: the weights stay as they were; try fewer or more steps, or more windows"))
        return out, {n: p.detach().clone() for n, p in norms.items()}

    def _judged(self) -> list[int]:
        """Indices of the windows to judge by, evenly spread."""
        return torch.linspace(0, len(self.tokens) - 1, min(JUDGED, len(self.tokens))).round().long().tolist()

    @torch.no_grad()
    def _kl(self, calls: Calls, target: list[torch.Tensor]) -> float:
        """Mean KL of the student as it is on the windows to judge by."""
        total, chosen = 0.0, self._judged()
        for w in chosen:
            with autocast(self.options.precision):
                hidden = embed(self.student, self.tokens[w:w + 1])
                for i, block in enumerate(self.blocks):
                    hidden = run_block(block, i, hidden, calls)
            total += self._head(hidden, target[w], [])[0]
        return total / len(chosen)

    def _order(self) -> list[list[int]]:
        """Windows of each step: every window once before any comes again."""
        generator, queue, out = torch.Generator().manual_seed(self.options.seed), [], []
        for _ in range(self.options.steps):
            while len(queue) < self.options.batch:
                queue += torch.randperm(len(self.tokens), generator=generator).tolist()
            out.append([queue.pop(0) for _ in range(self.options.batch)])
        return out

    def _step(self, step: int, windows: list[int], calls: Calls, target: list[torch.Tensor]) -> None:
        slopes: dict[str, list[dict[str, torch.Tensor]]] = {}
        norms = {n: torch.zeros_like(p) for n, p in self.norms.items()}
        loss = 0.0
        for w in windows:
            loss += self._backward(w, calls, target[w], slopes, norms) / len(windows)
        self.losses.append(loss)
        share = self.options.share(step)
        for name, weight in self.learned.items():
            found = slopes.get(name)
            if found is None:  # an expert that no token of these windows chose
                continue
            steps = [dict(zip(part, moves.step(list(part.values()), share * self.options.rate, step + 1), strict=True))
                     for part, moves in zip(found, self.moves[name], strict=True)]
            weight.move(steps)
            self.modules[name].weight.data = weight.value()
        scaled = [g * self.sizes[n] for n, g in norms.items()]
        for (n, p), move in zip(self.norms.items(), self.norm_moves.step(scaled, share * self.options.norms, step + 1), strict=True):
            p.data.add_(move * self.sizes[n])

    def _backward(self, w: int, calls: Calls, target: torch.Tensor, slopes: dict, norms: dict) -> float:
        """Adds the derivatives of one window's mean KL to ``slopes`` and ``norms``; returns the KL."""
        with torch.no_grad(), autocast(self.options.precision):
            hidden = [embed(self.student, self.tokens[w:w + 1])]
            for i, block in enumerate(self.blocks):
                hidden.append(run_block(block, i, hidden[-1], calls))
        loss, grad, found = self._head(hidden.pop(), target, [self.norms[n] for n in self.last_norms])
        for n, g in zip(self.last_norms, found, strict=True):
            norms[n] += g
        for i in range(len(self.blocks) - 1, -1, -1):
            linears = [n for n in self.linears[i] if n in self.learned]
            moving = [*(self.norms[n] for n in self.block_norms[i]), *(self.modules[n].weight for n in linears)]
            entry = hidden.pop().detach().requires_grad_()
            with _needing_gradients(moving), torch.enable_grad():
                with autocast(self.options.precision):
                    out = run_block(self.blocks[i], i, entry, calls)
                grad, *found = torch.autograd.grad(out, [entry, *moving], grad.to(out.dtype), allow_unused=True)
            for n, g in zip(self.block_norms[i], found, strict=False):
                norms[n] += 0 if g is None else g
            for n, g in zip(linears, found[len(self.block_norms[i]):], strict=True):
                if g is not None:  # else an expert that no token of this window chose
                    slopes[n] = _added(slopes.get(n), self.learned[n].slopes(g))
        return loss

    def _head(self, hidden: torch.Tensor, target: torch.Tensor, norms: list[torch.Tensor]) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        """(mean KL over positions, its derivative at ``hidden`` [1, T, H], and those of the last norms), a slice of positions at a time."""
        total, grads, found, length = 0.0, [], [torch.zeros_like(p) for p in norms], hidden.shape[1]
        with _needing_gradients(norms):
            for start in range(0, length, SLICE):
                piece = hidden[:, start:start + SLICE].detach().float().requires_grad_()
                with torch.no_grad():
                    wanted = torch.log_softmax(tail(self.model, target[:, start:start + SLICE]).float(), -1)
                with torch.enable_grad():
                    with autocast(self.options.precision):
                        logits = tail(self.student, piece)
                    loss = (wanted.exp() * (wanted - torch.log_softmax(logits.float(), -1))).sum() / length
                g, *more = torch.autograd.grad(loss, [piece, *norms])
                total += float(loss.detach())
                grads.append(g)
                for a, b in zip(found, more, strict=True):
                    a += b
        return total, torch.cat(grads, dim=1), found

    # States

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that moves, by name; the same tensors, not copies."""
        out = {}
        for name, weight in self.learned.items():
            for i, part in enumerate(weight.constants()):
                out |= {f"{name}/{i}/{k}": t for k, t in part.items()}
            for i, moves in enumerate(self.moves[name]):
                out |= {f"{name}/{i}/{kind}{j}": t for kind in ("first", "second") for j, t in enumerate(getattr(moves, kind))}
        out |= {f"norm/{n}": p.data for n, p in self.norms.items()}
        out |= {f"norm/{kind}{j}": t for kind in ("first", "second") for j, t in enumerate(getattr(self.norm_moves, kind))}
        return out

    def _write(self, steps: int) -> None:
        save_tensors(self.state, self._tensors(), {"steps": str(steps), "losses": json.dumps(self.losses)})

    def _resume(self) -> int:
        if self.state is None or not self.state.is_file():
            return 0
        tensors, meta = load_tensors(self.state)
        for name, t in self._tensors().items():
            t.copy_(tensors[name])
        self.losses = json.loads(meta["losses"])
        for name, weight in self.learned.items():
            weight.move([{k: torch.zeros_like(t) for k, t in part.items()} for part in weight.constants()])  # constants anew, from their moves
            self.modules[name].weight.data = weight.value()
        return int(meta["steps"])


@contextlib.contextmanager
def _needing_gradients(parameters: list[torch.Tensor]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)


def _added(old: list[dict[str, torch.Tensor]] | None, new: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """``old`` with ``new`` added in place, or ``new``."""
    for part, more in zip(old or (), new, strict=old is not None):
        for kind, t in more.items():
            part[kind] += t
    return new if old is None else old

"""Block-wise output reconstruction: after GPTQ, codes and scales of a whole decoder block are trained to give the float block's output.

GPTQ looks at one linear at a time. Here the seven linears of a block move together, so that errors of one are made good by another, through the
attention and the nonlinearity between them (BRECQ, Li et al. 2021, arXiv 2102.05426). Blocks go from first to last: the input of a block comes from the
quantized blocks before it, its target is what the float model has there, so errors that have come in are mended too. The moving parts are those of
:mod:`.learned`, steps are SignRound's (AutoRound, Cheng et al. 2023, arXiv 2309.05516): signed gradients of a few windows, a rate that falls linearly to
zero. What is ours: it starts from GPTQ's codes, and the error is weighed by what it costs at the model's end (:mod:`mxq_ext.stats.outputs`).

Before that, the block's linears are quantized once more, each on the inputs that it really gets (:mod:`.sequential`). Of the given weights, those, and the
trained ones, a block keeps what has the least error on windows that training has not seen. (Requantizing has seen them, so training has to win by more than
it seems.)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelError, QuantizationError
from ..fileio import load_tensors, save_tensors
from ..progress import SILENT, Progress
from ..qtensor import QTensor
from ..stats.collect import probed_attention
from ..stats.outputs import PRECISIONS, OutputMoments, autocast
from ..stats.walk import Recorder, capture_calls, check_tokens, embed, frozen, linears_of, run_block
from ..structure import decoder_blocks, find_units
from .base import Options, need, training_key
from .learned import LearnedWeight
from .sequential import requantize

LOSSES = ("output", "fisher")
#: Of how many windows one is held back to judge by.
HELD_BACK = 8


@dataclass
class BlockOptions(Options):
    """Options of :func:`reconstruct_blocks`.

    requantize: begin with the linears one by one on their real inputs. steps: training steps per block, 0 for none. batch: windows per step.
    rounding: how far a latent goes, in codes, if all its gradients agree; scale: the same for scales, relative to their size.
    loss: ``"output"`` is the mean squared error of the block's output, ``"fisher"`` weighs it by its cost at the model's end (needs moments).
    precision: of the products in training, ``"bfloat16"``, ``"float32"``, or ``"auto"``, bfloat16 on CPUs that have instructions for it.
    seed: of the order of windows.
    """

    requantize: bool = True
    steps: int = 200
    batch: int = 2
    rounding: float = 0.5
    scale: float = 0.05
    loss: str = "fisher"
    precision: str = "auto"
    seed: int = 0

    def check(self) -> None:
        need(self.steps >= 0, "steps", self.steps, "it must be an integer >= 0")
        need(self.batch >= 1, "batch", self.batch, "it must be an integer >= 1")
        need(0 <= self.rounding <= 8, "rounding", self.rounding, "it must lie in [0, 8]")
        need(0 <= self.scale <= 0.5, "scale", self.scale, "it must lie in [0, 0.5]")
        need(self.loss in LOSSES, "loss", self.loss, f"it must be one of {', '.join(LOSSES)}")
        need(self.precision in PRECISIONS, "precision", self.precision, f"it must be one of {', '.join(PRECISIONS)}")


def reconstruct_blocks(model: nn.Module, start: Mapping[str, QTensor], tokens: torch.Tensor, options: BlockOptions, *,
                       moments: OutputMoments | None = None, directory: Path | None = None, progress: Progress = SILENT) -> dict[str, QTensor]:
    """Trains the quantized weights ``start`` (unit name -> QTensor) block by block and returns all of them, those outside of blocks as they came.

    Args:
        model: the float model; not changed.
        start: formats of any mix; units that are missing stay in float.
        tokens: calibration windows [W, T], W >= 2; one of HELD_BACK is held back to judge by.
        moments: of the same model; needed for ``loss="fisher"``.
        directory: where finished blocks are kept, for this model and these moments alone; a run that was stopped goes on behind the last of
            them, and ends with the same bits.

    ``info`` of each QTensor says what the error of its block was on the windows held back: ``block_error_start``, ``block_error_requantized``,
    ``block_error_trained``. The least of them was kept.

    Memory beside the model: a copy of one block with latents, gradients and weights (16 bytes per weight); the hidden states of all windows, four times;
    and with ``requantize`` the inputs of its linears on all windows.

    Raises QuantizationError for moments that are missing or of another model, ModelError for names that are no units, for experts unless ``requantize`` is off,
    and as ``capture_calls`` does.
    """
    tokens = check_tokens(tokens)
    if tokens.shape[0] < 2:
        raise QuantizationError(f"reconstruction on {tokens.shape[0]} window", "one window is held back to judge by, so two are needed",
                                "calibrate on more text")
    _, blocks = decoder_blocks(model)
    if options.loss == "fisher" and moments is None:
        raise QuantizationError("reconstruction with loss='fisher'", "it needs the moments of the output gradients",
                                "pass moments=output_moments(model, tokens)")
    if moments is not None and moments.moment.shape[0] != len(blocks):
        raise QuantizationError("reconstruction", f"the moments are of {moments.moment.shape[0]} blocks, the model has {len(blocks)}",
                                "collect them on this model")
    names = {u.name for u in find_units(model)}
    if unknown := sorted(set(start) - names):
        raise ModelError(f"reconstruction of {unknown[0]}", "the model has no such unit", "quantize this model's units")
    run = _Reconstruction(model, start, tokens, options, moments, directory, progress)
    with frozen(model):
        return run.go()


class _Reconstruction:
    """One run. What it hands from block to block, and keeps in files, are the hidden states of the float and of the quantized model."""

    def __init__(self, model, start, tokens, options, moments, directory, progress):
        self.model, self.start, self.tokens, self.options, self.moments, self.progress = model, dict(start), tokens, options, moments, progress
        self.blocks, self.linears = decoder_blocks(model)[1], linears_of(model)[0]
        self.calls, self.watched = capture_calls(model, tokens), None
        self.directory = None if directory is None else Path(directory) / training_key(self.options, self.start, self.tokens)

    # Files

    def _hidden_path(self) -> Path:
        return self.directory / "hidden.safetensors"

    def _block_path(self, i: int) -> Path:
        return self.directory / f"block-{i:03d}.safetensors"

    def _resume(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(block to go on with, float inputs, quantized inputs)."""
        if self.directory is not None and self._hidden_path().is_file():
            tensors, meta = load_tensors(self._hidden_path())
            return int(meta["block"]), tensors["float"], tensors["quantized"]
        reference = torch.cat([embed(self.model, t[None]) for t in self.tokens])
        return 0, reference, self._embed_quantized(reference)

    def _embed_quantized(self, reference: torch.Tensor) -> torch.Tensor:
        """Inputs of the first block when the token embedding is quantized too."""
        embedding = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embedding)
        if name not in self.start:
            return reference.clone()
        kept = embedding.weight.data
        try:
            embedding.weight.data = self.start[name].dequantize(kept.dtype)
            return torch.cat([embed(self.model, t[None]) for t in self.tokens])
        finally:
            embedding.weight.data = kept

    # The run

    def go(self) -> dict[str, QTensor]:
        first, reference, inputs = self._resume()
        out = dict(self.start)
        for i in range(first):
            out |= self._read(i)
        # Blocks behind the last quantized one have nothing to learn, and nobody reads their outputs.
        end = max((i + 1 for i, names in enumerate(self.linears) if not self.start.keys().isdisjoint(names)), default=0)
        for i in self.progress.track(range(first, end), "reconstruct"):
            done, reference, inputs = self._block(i, reference, inputs)
            out |= done
            if self.directory is not None:
                self._write(i, done, reference, inputs)
        return out

    def _block(self, i: int, reference: torch.Tensor, inputs: torch.Tensor):
        """(QTensors of block i, float outputs, quantized outputs)."""
        best = {name: self.start[name] for name in self.linears[i] if name in self.start}
        block = copy.deepcopy(self.blocks[i])
        modules = dict(zip(self.linears[i], _linears_like(self.blocks[i], block, self.linears[i].values()), strict=True))
        targets = {name: modules[name].weight.detach().float() for name in best}
        target = self._run(i, self.blocks[i], reference)
        loss = self._loss(i, target)
        held, trained = _split(len(inputs))

        def error(qtensors):
            for name, q in qtensors.items():
                modules[name].weight.data = q.dequantize()
            return self._error(i, block, inputs, target, loss, held)

        report = {"start": error(best)}
        least = report["start"]
        if self.options.requantize:
            for name, weight in targets.items():
                modules[name].weight.data = weight
            wanted, masses = self._wanted(i, reference)
            made = requantize(lambda w: self._call(i, block, inputs[w]), len(inputs), modules, best, wanted, masses)
            del wanted
            report["requantized"] = error({name: q for name, (_, q) in made.items()})
            if report["requantized"] < least:
                least, best = report["requantized"], {name: q for name, (_, q) in made.items()}
                targets = {name: w for name, (w, _) in made.items()}
        if self.options.steps:
            learned = {name: LearnedWeight(targets[name], q) for name, q in best.items()}
            self._train(i, block, modules, learned, inputs, target, loss, trained)
            done = {name: weight.qtensor() for name, weight in learned.items()}
            report["trained"] = error(done)
            if report["trained"] < least:
                least, best = report["trained"], done
        best = {name: replace(q, info=q.info | {f"block_error_{what}": value for what, value in report.items()}) for name, q in best.items()}
        for name, q in best.items():
            modules[name].weight.data = q.dequantize()
        self.progress.note(f"block {i}: error " + ", ".join(f"{what} {value:.4g}" for what, value in report.items()))
        return best, target, self._run(i, block, inputs)

    @torch.no_grad()
    def _call(self, i: int, block: nn.Module, window: torch.Tensor) -> torch.Tensor:
        with autocast(self.options.precision):
            return run_block(block, i, window[None], self.calls)

    def _run(self, i: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._call(i, block, h) for h in hidden])

    def _wanted(self, i: int, reference: torch.Tensor):
        """(unit -> inputs [T, K] of the float model, a window each; attention that each position receives, [T] a window, or None)."""
        wanted, masses = {name: [] for name in self.linears[i]}, []
        with probed_attention(self.model) as probe:
            if self.watched is None:
                self.watched = capture_calls(self.model, self.tokens)  # other masks than unwatched attention gets
            for h in reference:
                with torch.no_grad(), autocast(self.options.precision), Recorder(self.linears[i]) as seen:
                    run_block(self.blocks[i], i, h[None], self.watched)
                for name, (x, _) in seen.items():
                    wanted[name].append(x.flatten(0, -2))
                if probe is not None:
                    masses.append(probe.take().mass)
        return wanted, masses or None

    def _loss(self, i: int, target: torch.Tensor):
        """Function (output, target [1, T, H]) -> weighted squared error, 1 for an error as large as the target's spread over tokens."""
        o = self.options
        weights = torch.ones(target.shape[1], 1)
        root = None
        if o.loss == "fisher":
            f = self.moments.moment[i].double()
            f = f + 0.01 * f.diagonal().mean() * torch.eye(f.shape[0], dtype=f.dtype)
            root = torch.linalg.cholesky(f).float()
            weights[0] = float(self.moments.first[i])
        spread = target[:, 1:] - target[:, 1:].mean((0, 1))
        scale = 1 / float((spread if root is None else spread @ root).square().mean().clamp(min=1e-30))
        weights *= scale

        def loss(output, goal):
            e = output.float() - goal
            return ((e if root is None else e @ root).square() * weights).mean()

        return loss

    @torch.no_grad()
    def _error(self, i, block, inputs, target, loss, windows) -> float:
        total = 0.0
        for w in windows:
            with autocast(self.options.precision):
                out = run_block(block, i, inputs[w:w + 1], self.calls)
            total += float(loss(out, target[w:w + 1]))
        return total / len(windows)

    @torch.enable_grad()
    def _train(self, i, block, modules, learned, inputs, target, loss, windows) -> None:
        o = self.options
        moving = {name: weight for name, weight in learned.items() if weight.learnable}
        for name, weight in learned.items():
            modules[name].weight.data = weight.value()
            modules[name].weight.requires_grad_(name in moving)
        if not moving:
            return
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + i)
        queue: list[int] = []
        for step in range(o.steps):
            with autocast(self.options.precision):
                for _ in range(o.batch):
                    if not queue:
                        queue = [windows[j] for j in torch.randperm(len(windows), generator=generator)]
                    w = queue.pop()
                    out = run_block(block, i, inputs[w:w + 1], self.calls)
                    with torch.autocast("cpu", enabled=False):
                        loss(out, target[w:w + 1]).backward()
            rate = 2 * (1 - (step + 0.5) / o.steps) / o.steps  # falls linearly, and sums to 1
            for name, weight in moving.items():
                p = modules[name].weight
                if p.grad is not None:  # an expert that no token of these windows chose has none
                    weight.step(p.grad, o.rounding * rate, o.scale * rate)
                    p.grad = None
                    p.data = weight.value()
        for name in moving:
            modules[name].weight.requires_grad_(False)

    # Finished blocks

    def _write(self, i: int, done: dict[str, QTensor], reference: torch.Tensor, inputs: torch.Tensor) -> None:
        tensors = {k: t for name, q in done.items() for k, t in q.to_tensors(f"{name}.").items()}
        save_tensors(self._block_path(i), tensors, {"qtensors": json.dumps({n: [q.meta(), q.info] for n, q in done.items()})})
        save_tensors(self._hidden_path(), {"float": reference, "quantized": inputs}, {"block": str(i + 1)})

    def _read(self, i: int) -> dict[str, QTensor]:
        tensors, meta = load_tensors(self._block_path(i))
        out = {}
        for name, (shape, info) in json.loads(meta["qtensors"]).items():
            out[name] = QTensor.from_tensors(shape, tensors, f"{name}.")
            out[name].info = info
        return out


def _split(windows: int) -> tuple[list[int], list[int]]:
    """(windows held back, windows trained on): one of HELD_BACK, at least one of each."""
    held = list(range(min(HELD_BACK, windows) - 1, windows, HELD_BACK))
    return held, [w for w in range(windows) if w not in held]


def _linears_like(block: nn.Module, twin: nn.Module, linears) -> list[nn.Linear]:
    """The modules of ``twin``, a copy of ``block``, that stand where ``linears`` stand in ``block``."""
    names = {id(m): n for n, m in block.named_modules()}
    return [twin.get_submodule(names[id(m)]) for m in linears]

"""The run: which blocks are walked in which order, what is written when, and how an interrupted run goes on."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError, ModelError, MxqWarning
from ..fileio import load_tensors, read_json, save_tensors, write_json
from ..progress import SILENT, Progress
from ..structure import decoder_blocks, find_units
from .collect import ATTENDED, WEIGHTINGS, AttentionProbe, BlockSums, probed_attention
from .store import FILE, VERSION, Stats, differences, model_fingerprint, tokens_hash
from .walk import (
    Recorder,
    block_backward,
    capture_calls,
    check_tokens,
    embed,
    frozen,
    head_backward,
    linears_of,
    run_block,
    tail,
    window_uniform,
)


def calibrate(model: nn.Module, tokens: torch.Tensor, out_dir: str | os.PathLike, *, weightings: tuple[str, ...] = WEIGHTINGS,
              fisher: bool = True, fisher_windows: int = 8, seed: int = 0, progress: Progress = SILENT) -> Stats:
    """Collects the statistics of every linear in the blocks and of the head (see ``collect``) and writes them under ``out_dir``.

    Args:
        model: a float32 decoder-only transformers model with a linear head. Its mode, attention implementation and
            ``requires_grad`` flags are as before at the end.
        tokens: int64 [W, T].
        weightings: of ``none``, ``attention``, ``gradient``; the last needs a backward walk, about twice the time.
        fisher: also collect squared weight gradients, on the first ``fisher_windows`` windows.
        seed: of the labels that the model draws for the backward walk.

    Memory beside the model: one block's sums and graph, the hidden states of all windows (W * T * H floats), their gradients (as much
    again), and T * V floats at the head. Disk while it walks back: the inputs of all blocks, (blocks + 1) * W * T * H * 4 bytes under
    ``walk/``, removed as they are used up; otherwise the model would have to run from its start for every block.

    A run that was interrupted continues at the block where it stopped and ends with the same bytes; a finished one is opened as it is.
    Raises CheckpointError if ``out_dir`` belongs to another model, other tokens or other settings, saying which differ; ModelError for a
    model that is not float32, not finite or cannot be walked; ShapeError for malformed tokens. Warns where the weighting ``attention`` finds no unit.
    """
    tokens = check_tokens(tokens).to(torch.int64)
    unknown = sorted(set(weightings) - set(WEIGHTINGS))
    if unknown:
        raise ModelError(f"weightings {', '.join(unknown)}", f"known are {', '.join(WEIGHTINGS)}", "use a subset of those")
    wrong = {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}
    if wrong:
        raise ModelError("calibration", f"the model has parameters of {', '.join(sorted(wrong))}, float32 is needed",
                         "load it with dtype=torch.float32")
    bad = next((n for n, p in model.named_parameters() if p.numel() and not torch.isfinite(torch.stack(p.detach().aminmax())).all()), None)
    if bad is not None:
        raise ModelError("calibration", f"the model's {bad} holds values that are NaN or infinite", "check the float model before quantizing it")
    attended = any(u.role in ATTENDED for u in find_units(model))
    if "attention" in weightings and not attended:
        warnings.warn(f"a {type(model).__name__} has no linear {' or '.join(ATTENDED)}, the units whose inputs are weighted by attention (queries, keys and "
                      "values are one linear, perhaps): the weighting attention is the plain one here", MxqWarning, stacklevel=1)
    settings = {"weightings": [w for w in WEIGHTINGS if w == "none" or w in weightings],
                "fisher_windows": min(fisher_windows, tokens.shape[0]) if fisher else 0, "seed": seed}
    out = Path(out_dir)
    meta = _meta(model, tokens, settings)
    if _finished(out, meta):
        return Stats.load(out)
    run = _Calibration(model, tokens, out, settings, progress)
    with frozen(model), probed_attention(model) as probe:
        if probe is None and attended and "attention" in weightings:
            raise ModelError(f"model {type(model).__name__}", "its attention does not use transformers' interface and cannot be watched",
                             'leave out the "attention" weighting (mxq quantize --preset gradient)')
        run.go(probe)
    return run.finish(meta)


def _meta(model: nn.Module, tokens: torch.Tensor, settings: dict) -> dict:
    import transformers

    return {"mxq_stats": VERSION,
            "model": {"class": type(model).__name__, "hash": model_fingerprint(model)},
            "tokens": {"windows": tokens.shape[0], "length": tokens.shape[1], "hash": tokens_hash(tokens)},
            "settings": settings, "keys": "after the rotary embedding",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def _finished(out: Path, meta: dict) -> bool:
    """Whether ``out`` holds this calibration complete; claims the directory for it otherwise. Raises CheckpointError for another one."""
    for name in (FILE, "calibrate.json"):
        if (out / name).is_file():
            record = read_json(out / name)
            found = differences(record.get("meta", {}), meta)
            if found:
                raise CheckpointError(f"calibration in {out}", f"it holds another one ({'; '.join(found)})",
                                      "use another directory or remove this one")
            if name == FILE:
                return True
    write_json(out / "calibrate.json", {"meta": meta})
    return False


class _Calibration:
    """The walk of one run. Its whole state lies in files, so that it can stop anywhere:

    ``walk/hidden-i`` is the input of block i for all windows [W, T, H] (i = blocks: the last output), ``walk/grad-i`` the gradient
    there. Forward alone, a block's statistics and then ``hidden-(i+1)`` are written, and ``hidden-i`` removed. With a backward walk, all
    ``hidden-i`` come first; then the head and the blocks from last to first, each writing its statistics and then ``grad-i``. The
    newest ``hidden`` or ``grad`` therefore says where to go on.
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor, out: Path, settings: dict, progress: Progress):
        self.model, self.tokens, self.out, self.progress = model, tokens, out, progress
        self.weightings, self.fisher_windows, self.seed = tuple(settings["weightings"]), settings["fisher_windows"], settings["seed"]
        self.backward = self.fisher_windows > 0 or "gradient" in self.weightings
        self.blocks = decoder_blocks(model)[1]
        self.linears, self.head_name, self.head = linears_of(model)
        self.walk = out / "walk"

    # Files

    def _path(self, kind: str, i: int) -> Path:
        return self.walk / f"{kind}-{i:03d}.safetensors"

    def _have(self, kind: str) -> list[int]:
        return sorted(int(p.stem.rpartition("-")[2]) for p in self.walk.glob(f"{kind}-*.safetensors"))

    def _put(self, kind: str, i: int, windows: list[torch.Tensor]) -> None:
        save_tensors(self._path(kind, i), {kind: torch.cat(windows)})

    def _get(self, kind: str, i: int) -> list[torch.Tensor]:
        return list(load_tensors(self._path(kind, i))[0][kind].split(1))

    def _drop(self, kind: str, i: int) -> None:
        self._path(kind, i).unlink(missing_ok=True)

    def _write(self, name: str, sums: BlockSums) -> None:
        tensors, index = sums.result()
        save_tensors(self.out / name, tensors, {"index": json.dumps(index)})

    # The walk

    def go(self, probe: AttentionProbe | None) -> None:
        for leftover in (*self.out.glob(".*.part"), *self.walk.glob(".*.part")):  # of a run that was killed while writing
            leftover.unlink(missing_ok=True)
        self.calls = capture_calls(self.model, self.tokens)
        last = len(self.blocks)
        if not self._have("hidden") and not self._have("grad"):
            self._put("hidden", 0, [embed(self.model, t[None]) for t in self.tokens])
        if not self.backward:
            for i in self.progress.track(range(self._have("hidden")[-1], last), "statistics"):
                self._forward(i, probe)
            self._head_forward()
            return
        if not self._have("grad"):
            start = self._have("hidden")[-1]
            hidden = self._get("hidden", start)
            for i in self.progress.track(range(start, last), "forward"):
                with torch.no_grad():
                    hidden = [run_block(self.blocks[i], i, h, self.calls) for h in hidden]
                self._put("hidden", i + 1, hidden)
            del hidden
            self._head_backward()
        for i in self.progress.track(range(self._have("grad")[0] - 1, -1, -1), "statistics"):
            self._backward(i, probe)

    def _sums(self, names: list[str]) -> BlockSums:
        return BlockSums(names, self.weightings, self.fisher_windows > 0)

    def _forward(self, i: int, probe: AttentionProbe | None) -> None:
        hidden, linears = self._get("hidden", i), self.linears[i]
        sums = self._sums(list(linears))
        for w, h in enumerate(hidden):
            with torch.no_grad(), Recorder(linears) as seen:
                hidden[w] = run_block(self.blocks[i], i, h, self.calls)
            sums.add({name: (x.flatten(0, -2), None) for name, (x, _) in seen.items()}, probe)
        self._write(_block_file(i), sums)
        self._put("hidden", i + 1, hidden)
        self._drop("hidden", i)

    def _head_forward(self) -> None:
        sums = self._sums([self.head_name])
        for h in self._get("hidden", len(self.blocks)):
            with torch.no_grad(), Recorder({self.head_name: self.head}) as seen:
                tail(self.model, h)
            sums.add({name: (x.flatten(0, -2), None) for name, (x, _) in seen.items()})
        self._write("head.safetensors", sums)

    def _head_backward(self) -> None:
        last = len(self.blocks)
        sums, grads = self._sums([self.head_name]), []
        for w, h in enumerate(self.progress.track(self._get("hidden", last), "head")):
            grad, x, g = head_backward(self.model, self.head, h, window_uniform(self.seed, w, h.shape[1]))
            sums.add({self.head_name: (x, g)}, fisher=w < self.fisher_windows)
            grads.append(grad)
        self._write("head.safetensors", sums)
        self._put("grad", last, grads)
        self._drop("hidden", last)

    def _backward(self, i: int, probe: AttentionProbe | None) -> None:
        hidden, grads, linears = self._get("hidden", i), self._get("grad", i + 1), self.linears[i]
        sums = self._sums(list(linears))
        for w, h in enumerate(hidden):
            grads[w], seen = block_backward(self.blocks[i], i, h, grads[w], self.calls, linears)
            sums.add(seen, probe, fisher=w < self.fisher_windows)
        self._write(_block_file(i), sums)
        self._put("grad", i, grads)
        self._drop("grad", i + 1)
        self._drop("hidden", i)

    def finish(self, meta: dict) -> Stats:
        """Writes ``stats.json`` from the files' own indexes and removes what only resuming needed."""
        names = [_block_file(i) for i in range(len(self.blocks))] + ["head.safetensors"]
        units, kv = {}, {}
        for i, name in enumerate(names):
            _, metadata = load_tensors(self.out / name, [])
            units.update({u: {"file": name, **e} for u, e in json.loads(metadata["index"]).items()})
            if i < len(self.blocks) and self._has_kv(name):
                kv[str(i)] = {"file": name}
        write_json(self.out / FILE, {"meta": meta, "units": units, "kv": kv, "files": {n: (self.out / n).stat().st_size for n in names}})
        shutil.rmtree(self.walk, ignore_errors=True)
        (self.out / "calibrate.json").unlink(missing_ok=True)
        return Stats.load(self.out)

    def _has_kv(self, name: str) -> bool:
        from safetensors import safe_open

        with safe_open(self.out / name, "pt") as f:
            return "kv/key_min" in f.keys()


def _block_file(i: int) -> str:
    return f"block-{i:03d}.safetensors"

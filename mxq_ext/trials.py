"""Quantized weights kept in files: sensing tries them, the final plan takes them, an interrupted run finds them again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .fileio import load_tensors, save_tensors
from .formats import Format
from .plan.language import Preset
from .qtensor import QTensor
from .quantizers import find_method, prepare_hessian, quantize
from .stats import Stats
from .stats.store import model_fingerprint
from .structure import Unit


@functools.cache
def code_hash() -> str:
    """sha256 over the sources that decide what a quantized weight or a loss is: files made by other code are not reused."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    files = [*package.glob("quantizers/*.py"), *package.glob("sensitivity/*.py"), *package.glob("stats/*.py")]
    for path in sorted([*files, *(package / f"{n}.py" for n in ("formats", "pack", "qtensor", "trials", "banding"))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def own_code(*parts: Callable) -> list[str]:
    """What tells the versions of metrics and quantizers apart that others have registered: the source of their module, and their own. Nothing for those of
    this package, which ``code_hash`` covers; a text that never comes again where there is no source (functions typed at a prompt)."""
    out = []
    for part in parts:
        if part.__module__.partition(".")[0] == __package__:
            continue
        try:
            module = inspect.getmodule(part)
            whole = Path(module.__file__).read_text() if getattr(module, "__file__", None) else ""
            out.append(hashlib.sha256((whole + inspect.getsource(part)).encode()).hexdigest())
        except (OSError, TypeError):
            out.append(uuid.uuid4().hex)
    return out


def own_quantizer(method: str) -> list[str]:
    """``own_code`` of a quantizer by its name."""
    return [] if method == "auto" else own_code(find_method(method).run)


def short_hash(settings: dict) -> str:
    """Twelve hex digits of a JSON object, for file names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def kept(path: Path, weight: torch.Tensor, make: Callable[[], QTensor]) -> QTensor:
    """The QTensor in ``path`` if it was made of this very ``weight``, else what ``make`` gives, which is written there."""
    digest = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
    if path.exists():
        tensors, meta = load_tensors(path)
        if meta["weight"] == digest:
            q = QTensor.from_tensors(json.loads(meta["qtensor"]), tensors)
            q.info = json.loads(meta["info"])
            return q
    q = make()
    save_tensors(path, q.to_tensors(), {"qtensor": json.dumps(q.meta()), "info": json.dumps(q.info), "weight": digest})
    return q


class Trials:
    """Quantized weights by (unit, format), each made once and kept under ``directory/<key>/``.

    A weight and its second moment decide the result, not the plan, so one file serves every budget. The key covers the model (sampled),
    the statistics, the quantizer's settings and its code.
    """

    def __init__(self, directory: Path, model: nn.Module, stats: Stats | None, preset: Preset):
        self.key = short_hash({"model": model_fingerprint(model), "quantizer": preset.quantizer(), "code": [code_hash(), *own_quantizer(preset.method)],
                               "stats": None if stats is None else stats.meta})
        self.directory, self.stats, self.preset = directory / self.key, stats, preset
        self._factor: tuple[str, object] | None = None

    def path(self, unit: Unit, fmt: Format) -> Path:
        return self.directory / f"{unit.name}.{fmt}.safetensors"

    def __call__(self, unit: Unit, weight: torch.Tensor, fmt: Format) -> QTensor:
        """The QTensor of ``weight`` [N, K] in ``fmt``, from its file if there is one of this very weight."""
        return kept(self.path(unit, fmt), weight, lambda: self._quantize(unit, weight, fmt))

    def _quantize(self, unit: Unit, weight: torch.Tensor, fmt: Format) -> QTensor:
        method, options = self.preset.method, dict(self.preset.options)
        if self.stats is None or unit.name not in self.stats:  # a lookup has no second moment: its rows do not interact
            needs = method in ("gptq", "awq")
            return quantize(weight, fmt, method="auto" if needs else method, **({} if needs else options))
        fisher = self.stats.fisher(unit.name) if method == "kmeans" else None
        return quantize(weight, fmt, method=method, hessian=self._hessian(unit), fisher=fisher, **options)

    def _hessian(self, unit: Unit):
        """The factorized second moment; the last one is kept, since all formats of a unit come in a row."""
        if self._factor is None or self._factor[0] != unit.name:
            self._factor = (unit.name, prepare_hessian(self.stats.hessian(unit.name, self.preset.weighting)))
        return self._factor[1]

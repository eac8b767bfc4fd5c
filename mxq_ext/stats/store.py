"""Stats on disk: one safetensors file per block, one for the head, and ``stats.json`` that says what is in them and of what."""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError
from ..fileio import load_tensors, read_json

VERSION = 1
FILE = "stats.json"


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over the class, the parameters' names, shapes and dtypes, and 256 values spread over each of them.

    Cheap on any size; finds another model, another training step or a quantized layer, not a single edited weight.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {list(p.shape)} {p.dtype}".encode())
        flat = p.detach().reshape(-1)
        digest.update(flat[::max(1, flat.numel() // 256)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokens_hash(tokens: torch.Tensor) -> str:
    """sha256 of the shape and the int64 values."""
    return hashlib.sha256(f"{list(tokens.shape)}".encode() + tokens.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


def differences(old: dict, new: dict) -> list[str]:
    """Readable differences of two metas in what decides the numbers: model, tokens and settings, not library versions."""
    found = []
    for key in ("mxq_stats", "model", "tokens", "settings"):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key} {k}: {a.get(k)} there, {b.get(k)} here" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        elif a != b:
            found.append(f"{key}: {a} there, {b} here")
    return found


class Stats:
    """What calibration saw. Tensors are read from their files when asked for and not kept.

    Attributes:
        dir: the directory.
        meta: ``model``, ``tokens`` (windows, length, hash), ``settings`` (weightings, fisher_windows, seed) and ``versions``.
    """

    def __init__(self, directory: Path, record: dict):
        self.dir = directory
        self.meta: dict = record["meta"]
        self._units: dict[str, dict] = record["units"]
        self._kv: dict[str, dict[str, str]] = record["kv"]

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Stats:
        """Opens a finished calibration. Raises CheckpointError if it is unfinished, of another version, or if a file has changed size."""
        directory = Path(directory)
        if not (directory / FILE).is_file():
            begun = (directory / "calibrate.json").is_file()
            raise CheckpointError(f"statistics in {directory}", "the calibration has not been finished" if begun else f"there is no {FILE}",
                                  "run calibrate again; it resumes" if begun else "run calibrate first, or check the path")
        record = read_json(directory / FILE)
        version = record.get("meta", {}).get("mxq_stats")
        if version != VERSION:
            raise CheckpointError(f"statistics in {directory}", f"version {version} is stored, {VERSION} is read",
                                  "calibrate again with this version of mxq_ext")
        for name, size in record["files"].items():
            found = (directory / name).stat().st_size if (directory / name).is_file() else None
            if found != size:
                raise CheckpointError(f"statistics in {directory}", f"{name} has {found} bytes, {size} were written" if found is not None
                                      else f"{name} is missing", "calibrate again into an empty directory")
        return cls(directory, record)

    @property
    def units(self) -> list[str]:
        """Names of the units with statistics, in model order, the head last."""
        return list(self._units)

    def __contains__(self, unit: str) -> bool:
        return unit in self._units

    def _entry(self, unit: str) -> dict:
        if unit not in self._units:
            close = difflib.get_close_matches(unit, self._units, 3)
            raise CheckpointError(f"statistics of unit {unit!r}", "calibration saw no input of it (an embedding that is no head has none)",
                                  f"closest names: {', '.join(close)}" if close else "see Stats.units")
        return self._units[unit]

    def _read(self, entry: dict, keys: list[str]) -> list[torch.Tensor]:
        tensors, _ = load_tensors(self.dir / entry["file"], keys)
        return [tensors[k] for k in keys]

    def shared_input(self, unit: str) -> str:
        """The first unit that reads the same input; equal for q_proj, k_proj and v_proj of a layer, and for gate_proj and up_proj."""
        return self._entry(unit)["input"]

    def hessian(self, unit: str, weighting: str = "none") -> torch.Tensor:
        """float32 [K, K], symmetric: mean over tokens of w_t x_t x_t^T with mean(w_t) = 1.

        ``attention`` is the plain matrix for units other than keys and values. Raises CheckpointError for a weighting that
        was not collected.
        """
        entry = self._entry(unit)
        if weighting not in entry or weighting not in ("none", "attention", "gradient"):
            raise CheckpointError(f"the {weighting!r} second moments of {unit}",
                                  f"collected were {', '.join(self.meta['settings']['weightings'])}", "calibrate again with that weighting")
        return self._read(entry, [entry[weighting]])[0]

    def gradient_scale(self, unit: str) -> float:
        """mean_{t,n} g_tn^2 (nats^2 per squared output unit), the factor by which ``hessian(unit, "gradient")`` was divided.

        The loss per token rises by about 0.5 * gradient_scale * sum_n d_n^T H d_n when the rows of the weight move by d_n.
        """
        entry = self._entry(unit)
        if "gradient_scale" not in entry:
            raise CheckpointError(f"the gradient scale of {unit}", "gradients were not collected",
                                  'calibrate with the "gradient" weighting')
        return entry["gradient_scale"]

    def channels(self, unit: str) -> dict[str, torch.Tensor]:
        """``absmax``, ``absmean`` and ``meansq`` of the unit's input channels, each float32 [K]."""
        entry = self._entry(unit)
        names = ("absmax", "absmean", "meansq")
        return dict(zip(names, self._read(entry, [f"{n}/{entry['input']}" for n in names]), strict=True))

    def fisher(self, unit: str) -> torch.Tensor | None:
        """float32 [N, K]: mean over windows of the squared gradient of the window's summed loss; None if it was not collected."""
        entry = self._entry(unit)
        return self._read(entry, [entry["fisher"]])[0].float() if "fisher" in entry else None

    def kv(self, layer: int) -> dict[str, torch.Tensor]:
        """``key_min``, ``key_max``, ``key_absmax`` (after the rotary embedding) and ``value_*``, each float32 [kv_heads * head_dim].

        Raises CheckpointError if the layer has none (models without transformers' attention interface).
        """
        if str(layer) not in self._kv:
            raise CheckpointError(f"KV ranges of layer {layer}", "none were collected for it", "the model's attention cannot be watched")
        entry = self._kv[str(layer)]
        names = [f"{kind}_{what}" for kind in ("key", "value") for what in ("min", "max", "absmax")]
        return dict(zip(names, self._read(entry, [f"kv/{n}" for n in names]), strict=True))

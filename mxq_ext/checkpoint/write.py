"""Saving: everything goes into a temporary directory beside the target, and one rename makes it visible."""

from __future__ import annotations

import copy
import glob
import json
import os
import re
import shutil
import socket
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..errors import CheckpointError, PlanError
from ..fileio import save_tensors, sha256, write_json
from ..formats import Format
from ..nn.linear import Held, QuantModule
from ..plan.schema import Bands, Plan, Tiles
from ..progress import SILENT, Progress
from ..structure import Unit, find_units
from .manifest import MANIFEST, VERSION, digest, guard, producer, tensor_bytes
from .read import computed_buffers, float_tensors


def save(model: nn.Module, directory: str | os.PathLike, tokenizer=None, plan: Plan | None = None, *, max_shard_size: int | str = "4GB",
         overwrite: bool = False, evaluation: dict | None = None, progress: Progress = SILENT) -> Path:
    """Writes a quantized model as a checkpoint directory and returns its path.

    Args:
        model: a transformers model after ``replace_linear``.
        directory: must not exist, or be empty; with ``overwrite`` it may be an mxq checkpoint, which is replaced as a whole.
        tokenizer: saved beside the model when given.
        plan: default the plan that the model was swapped with, or else one made from its formats. It must agree with the modules.
        max_shard_size: bytes, or ``"500MB"``, ``"4GB"`` (powers of 1000). A single larger tensor gets a file of its own.
        evaluation: numbers to keep in the manifest (JSON).

    Raises:
        CheckpointError: the target exists, the model has nothing quantized, or transformers refuses its generation_config.
        PlanError: the plan does not agree with the model.
    """
    target = Path(os.path.abspath(directory))
    limit = _parse_size(max_shard_size)
    _sweep(target)
    check_target(target, overwrite)
    units = find_units(model)
    held = {u.name: m.held for u in units if isinstance(m := model.get_submodule(u.name), QuantModule)}
    if not held:
        raise CheckpointError(f"saving {type(model).__name__} to {target}", "it has no quantized module",
                              "call replace_linear first, or use model.save_pretrained")
    plan = _plan_of(model, units, held, plan)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f"{_temp_prefix(target)}{os.getpid()}.part")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        _write_config(model, temp, tokenizer)
        if plan is not None:
            plan.save(temp / "plan.json")
        tensors = _write_shards(model, held, temp, limit, progress)
        _write_manifest(model, units, held, tensors, evaluation, temp)
        for path in (*temp.rglob("*"), temp):  # the rename must not reach the disk before the data does
            _fsync(path)
        _rename(temp, target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return target


# -- the directory ------------------------------------------------------------------------------------------------------------


def check_target(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``save`` would refuse to write there: long work asks before it begins."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise CheckpointError(f"saving to {target}", "it exists and is no mxq checkpoint, so it is never replaced",
                              "choose another directory")
    if not overwrite:
        raise CheckpointError(f"saving to {target}", "a checkpoint is there already", "pass overwrite=True, or choose another directory")


def _temp_prefix(target: Path) -> str:
    # The host, because a process id says nothing about the processes of another machine on a shared disk.
    return f".{target.name}.{socket.gethostname()}."


def _sweep(target: Path) -> None:
    """Removes what killed saves of this target left behind; an old checkpoint that had stepped aside (see _rename) comes back."""
    prefix = _temp_prefix(target)
    for path in target.parent.glob(f"{glob.escape(prefix)}*.part"):
        pid, _, rest = path.name[len(prefix) :].partition(".")
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if rest == "old.part" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's process
        return True
    return True


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(temp: Path, target: Path) -> None:
    """Puts ``temp`` in the place of ``target``. A directory cannot be renamed over a full one, so an old checkpoint steps aside first."""
    old = None
    if target.is_dir() and any(target.iterdir()):
        old = target.with_name(temp.name.removesuffix(".part") + ".old.part")
        os.rename(target, old)
    try:
        os.rename(temp, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    if old is not None:
        # Under another name first: what _sweep brings back must be whole, and a deletion may be cut short.
        trash = old.with_name(old.name.replace(".old.part", ".trash.part"))
        os.rename(old, trash)
        shutil.rmtree(trash)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parse_size(size: int | str) -> int:
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(size).strip(), re.IGNORECASE)
    value = int(float(m[1]) * {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}.get((m[2] or "").upper(), 1)) if m else 0
    if value < 1:
        raise CheckpointError(f"max_shard_size {size!r}", "it must be a positive number of bytes, or text such as 500MB",
                              "write for example 4GB")
    return value


# -- its files ----------------------------------------------------------------------------------------------------------------


def _write_config(model: nn.Module, temp: Path, tokenizer) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _name(model.dtype)
    # transformers needs quant_method only; the formats live in the manifest, which is checked. One that it does not know makes it warn, no more: see guard().
    config.quantization_config = {"quant_method": "mxq", "version": VERSION, "producer": f"mxq_ext {__version__}"}
    config.save_pretrained(temp)
    if getattr(model, "generation_config", None) is not None:
        try:
            model.generation_config.save_pretrained(temp)
        except ValueError as e:
            raise CheckpointError("saving generation_config", f"transformers refuses it ({e})", "correct model.generation_config") from e
    if tokenizer is not None:
        tokenizer.save_pretrained(temp)


def _write_shards(model: nn.Module, held: dict[str, Held], temp: Path, limit: int, progress: Progress) -> dict[str, dict]:
    """Writes all tensors, a shard at a time, and returns their description {name: {file, dtype, shape}}."""
    shards: list[list[str]] = []
    described: dict[str, dict] = {}
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush():
        save_tensors(temp / f"shard-{len(shards)}", pending, {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name in progress.track([*held, None], "save"):  # None: what is not packed
        if name is None:
            tensors = float_tensors(model) | {guard(held): torch.zeros(0, dtype=torch.uint8)}
        else:
            tensors = held[name].qtensor().to_tensors(f"{name}.")
        for n, t in tensors.items():
            nbytes = t.numel() * t.element_size()
            if pending and size + nbytes > limit:
                flush()
                size = 0
            pending[n] = t.detach()
            size += nbytes
            described[n] = {"file": "", "dtype": _name(t.dtype), "shape": list(t.shape)}
    flush()
    for i, names in enumerate(shards):  # file names hold the number of shards, which is known only now
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(temp / f"shard-{i}", temp / file)
        for n in names:
            described[n]["file"] = file
    if len(shards) > 1:
        write_json(temp / "model.safetensors.index.json", {"metadata": {"total_size": sum(map(tensor_bytes, described.values()))},
                                                           "weight_map": {n: d["file"] for n, d in described.items()}})
    return described


def _write_manifest(model: nn.Module, units: list[Unit], held: dict[str, Held], tensors: dict[str, dict], evaluation: dict | None,
                    temp: Path) -> None:
    described = {}
    for u in units:
        if u.name in held:
            h = held[u.name]
            info = {k: v for k, v in h.info.items() if isinstance(v, str | int | float | bool | None)}
            described[u.name] = {"kind": u.kind, "tied": list(u.tied), "layer": u.layer, "format": h.format_name, "bytes": h.nbytes,
                                 "qtensor": h.meta, "info": info}
    manifest = {
        "mxq_checkpoint": VERSION,
        "producer": producer(),
        "model": {"class": type(model).__name__, "dtype": _name(model.dtype), "source": getattr(model, "mxq_source", None),
                  "buffers": {n: _name(b.dtype) for n, b in computed_buffers(model).items()}},
        "bytes": {"units": sum(h.nbytes for h in held.values()), "tensors": sum(map(tensor_bytes, tensors.values()))},
        "units": described,
        "tensors": tensors,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temp.iterdir()) if p.is_file()},
        "evaluation": evaluation,
    }
    try:
        manifest = json.loads(json.dumps(manifest))  # as a reader will see it: keys are strings, tuples are lists
    except TypeError as e:
        raise CheckpointError("saving a checkpoint", f"evaluation cannot be written as JSON ({e})",
                              "pass numbers, strings, lists and dicts") from None
    write_json(temp / MANIFEST, manifest | {"sha256": digest(manifest)})


# -- its plan -----------------------------------------------------------------------------------------------------------------


def _plan_of(model: nn.Module, units: list[Unit], held: dict[str, Held], plan: Plan | None) -> Plan | None:
    """The plan to save, checked against what the modules really hold; None if their formats cannot be written as a plan."""
    plan = plan or getattr(model, "mxq_plan", None)
    if plan is None:
        entries, kv = {u.name: plan_entry(held[u.name].meta) if u.name in held else "keep" for u in units}, getattr(model, "mxq_kv", None)
        if None not in entries.values():
            return Plan(default=None, units=entries, kv=kv)
        if kv is not None:
            raise PlanError("saving a model with a quantized KV cache", "its formats cannot be written as a plan, which is where the cache's are",
                            "call replace_attention(model, None) first")
        return None
    for name, decision in plan.resolve(units).items():
        says = None if decision is None else decision.name
        has = held[name].format_name.removesuffix("+sparse") if name in held else None
        if says != has:
            raise PlanError(f"saving a model with its plan: unit {name}",
                            f"the plan says {says or 'keep'}, the module holds {has or 'float weights'}",
                            "pass the plan that the model was quantized with, or none")
    return plan


def plan_entry(meta: dict) -> str | dict | None:
    """The plan entry that asks for the rectangles of a ``QTensor.meta()``, or None if they are neither bands nor tiles in bands of rows."""
    rects, (n, k) = meta["rectangles"], meta["shape"]
    if len(rects) == 1:
        return rects[0][4]
    for axis, low, across, size in (("rows", 0, 2, k), ("cols", 2, 0, n)):
        if all((r[across], r[across + 1]) == (0, size) for r in rects):
            parts = [(r[low + 1] - r[low], Format.parse(r[4])) for r in sorted(rects, key=lambda r: r[low])]
            if all(a.bits <= b.bits for (_, a), (_, b) in pairwise(parts)):
                return Bands(axis, tuple(parts), permute=meta[f"perm_{axis}"]).to_json()
    bands: dict[tuple[int, int], list] = {}
    for r in sorted(rects, key=lambda r: r[2]):
        bands.setdefault((r[0], r[1]), []).append((r[3] - r[2], Format.parse(r[4])))
    if any(a[1] != b[0] for a, b in pairwise(sorted(bands))):
        return None
    stored = tuple(axis for axis in ("rows", "cols") if meta[f"perm_{axis}"])
    tiles = Tiles(tuple((r1 - r0, tuple(parts)) for (r0, r1), parts in sorted(bands.items())), permute=bool(stored))
    return tiles.to_json() if tiles.permuted == stored else None

"""What a checkpoint directory says about itself, and whether it is true.

``mxq_manifest.json``::

    {"mxq_checkpoint": 1,                                         version of the layout
     "producer": {"mxq_ext": .., "torch": .., "transformers": .., "python": ..},
     "model": {"class": "LlamaForCausalLM", "dtype": "float32", "buffers": {name: dtype}, "source": {...} | null},
     "bytes": {"units": int, "tensors": int},
     "units": {name: {kind, tied, layer, format, bytes, qtensor: QTensor.meta(), info}},
     "tensors": {name: {file, dtype, shape}},
     "files": {name: {bytes, sha256}},
     "evaluation": {...} | null,
     "sha256": digest of all of the above}

The digests find damage and careless edits; they are no signature. Whoever forges a manifest can recompute them, so everything
that leads to a path, an allocation or a kernel is checked for what it says as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..errors import CheckpointError
from ..fileio import read_json, sha256
from ..formats import Format
from ..nn.linear import meta_format_name
from ..plan.schema import Plan

VERSION = 1  #: of the directory's layout; exactly this one is read
MANIFEST = "mxq_manifest.json"
AGAIN = "copy the checkpoint again from where it was made, or make it again with mxq quantize"

#: safetensors' names of dtypes -> torch's. The floats of 8 bits are missing: nothing here writes them.
_DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
           "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass
class Checked:
    """A directory whose files agree with its manifest. ``tensors``: name -> {file, dtype, shape}, from the files' own headers."""

    path: Path
    manifest: dict
    tensors: dict[str, dict]

    @property
    def units(self) -> dict[str, dict]:
        return self.manifest["units"]


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a directory with a manifest of ours."""
    return (Path(path) / MANIFEST).is_file()


def producer() -> dict[str, str]:
    """Versions that go into the manifest."""
    import platform

    return {"mxq_ext": __version__, "torch": torch.__version__, "transformers": metadata.version("transformers"),
            "python": platform.python_version()}


def digest(manifest: dict) -> str:
    """sha256 of a manifest without its own ``sha256``. Key order and white space of the file do not matter."""
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def tensor_bytes(described: dict) -> int:
    """Bytes of a tensor {dtype, shape}."""
    return math.prod(described["shape"]) * getattr(torch, described["dtype"]).itemsize


def unit_tensors(unit: dict) -> dict[str, tuple[tuple[int, ...], str] | None]:
    """The tensors of a manifest's unit, by name after the ``<unit>.`` prefix: (shape, dtype), or None where QTensor.validate has to tell.

    Raises ValueError, TypeError or KeyError for an entry that describes no weight (FormatError is a ValueError).
    """
    meta, out = unit["qtensor"], {}
    n, k = meta["shape"]
    for i, (r0, r1, c0, c1, fmt) in enumerate(meta["rectangles"]):
        if not all(isinstance(v, int) for v in (n, k, r0, r1, c0, c1)) or not (0 <= r0 < r1 <= n and 0 <= c0 < c1 <= k):
            raise ValueError(f"rectangle {i} [{r0}:{r1}, {c0}:{c1}] of {n} x {k}")
        out |= {f"r{i}.{t}": described for t, described in Format.parse(fmt).tensor_shapes(r1 - r0, c1 - c0).items()}
    out |= {key: None for key in ("perm_rows", "perm_cols") if meta[key]}
    return out | {f"sparse.{t}": None for t in ("rowptr", "cols", "values") if meta["sparse"]}


def guard(units: Iterable[str]) -> str:
    """Name of an empty tensor that makes transformers fail where it does not know us: the weight of the first of the quantized ``units``.

    transformers only warns about a ``quant_method`` that it does not know, and then gives what it misses random values; but a tensor of another shape than
    the model's is an error. It has no bytes and no reader; checkpoints from before there was one lack it.
    """
    return f"{next(iter(units), None)}.weight"


# -- checking -----------------------------------------------------------------------------------------------------------------


def check(directory: str | os.PathLike, verify: str = "full") -> Checked:
    """Checks a checkpoint without building the model: version, files, sizes, hashes, and the header of every tensor.

    ``verify="size"`` leaves out the hashes of the files. Raises CheckpointError.
    """
    if verify not in ("full", "size"):
        raise CheckpointError(f"verify={verify!r}", 'it must be "full" (sizes and hashes) or "size"', 'pass verify="full"')
    path = Path(directory)
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        _check_file(path, name, entry, verify)
    stray = sorted(p.name for p in path.glob("*.safetensors") if p.name not in manifest["files"])
    if stray:
        raise CheckpointError(f"checkpoint {path}", f"{stray[0]} is not in the manifest", "remove it, or make the checkpoint again")
    found: dict[str, dict] = {}
    for name in (n for n in manifest["files"] if n.endswith(".safetensors")):
        for tensor, described in _header(path / name).items():
            if tensor in found:
                raise CheckpointError(f"checkpoint {path}", f"tensor {tensor} is in {found[tensor]['file']} and in {name}", AGAIN)
            found[tensor] = described
    _check_tensors(path, manifest["tensors"], found)
    _check_units(path, manifest)
    return Checked(path, manifest, found)


def _read_manifest(path: Path) -> dict:
    asked = f"checkpoint {path}"
    if not path.is_dir():
        raise CheckpointError(asked, "there is no such directory", "check the path")
    if not (path / MANIFEST).is_file():
        if not (path / "config.json").is_file():
            raise CheckpointError(asked, f"{MANIFEST} is missing, so this is no mxq checkpoint", "check the path")
        method = (read_json(path / "config.json").get("quantization_config") or {}).get("quant_method")
        if method == "mxq":
            raise CheckpointError(asked, f"{MANIFEST} is missing, so this is no mxq checkpoint",
                                  "write quantized models with mxq_ext.save, not with save_pretrained")
        raise CheckpointError(asked, f"it is a model that is {f'quantized by {method}' if method else 'not quantized'}, and no mxq checkpoint",
                              "make one of a float model with mxq quantize, or quantize_model and save")
    manifest = read_json(path / MANIFEST)
    version = manifest.get("mxq_checkpoint")
    if isinstance(version, bool) or version != VERSION:
        raise CheckpointError(f"{asked} of version {version!r}", f"this mxq_ext ({__version__}) reads version {VERSION}",
                              "install the mxq_ext that wrote it, or quantize the model again")
    if manifest.get("sha256") != digest(manifest):
        raise CheckpointError(asked, f"{MANIFEST} was edited: its content does not match its own sha256", AGAIN)
    for key in ("producer", "model", "bytes", "units", "tensors", "files"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(asked, f"{MANIFEST} has no object {key!r}", AGAIN)
    return manifest


def _check_file(path: Path, name: str, entry: object, verify: str) -> None:
    asked = f"checkpoint {path}, file {name!r}"
    if name in ("", ".", "..", MANIFEST) or name != os.path.basename(name) or "\\" in name or "\0" in name:
        raise CheckpointError(asked, "names in the manifest must be plain file names in the directory",
                              "do not use this checkpoint: it is forged")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
        raise CheckpointError(asked, "the manifest gives no size and sha256 for it", AGAIN)
    file = path / name
    if not file.is_file():
        raise CheckpointError(asked, "it is missing", AGAIN)
    if (size := file.stat().st_size) != entry["bytes"]:
        raise CheckpointError(asked, f"it has {size} bytes, the manifest says {entry['bytes']}: it was cut short or edited", AGAIN)
    if verify == "full" and sha256(file) != entry["sha256"]:
        raise CheckpointError(asked, "its sha256 is not the manifest's: its content was changed", AGAIN)


def _header(file: Path) -> dict[str, dict]:
    """Tensor -> {file, dtype, shape} of a safetensors file, without reading its data."""
    from safetensors import SafetensorError, safe_open

    out = {}
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():
                s = f.get_slice(name)
                if s.get_dtype() not in _DTYPES:
                    raise CheckpointError(f"reading {file}", f"tensor {name} has the unknown dtype {s.get_dtype()}", AGAIN)
                out[name] = {"file": file.name, "dtype": _DTYPES[s.get_dtype()], "shape": list(s.get_shape())}
    except SafetensorError as e:
        raise CheckpointError(f"reading {file}", f"it is no whole safetensors file ({e})", AGAIN) from None
    return out


def _check_tensors(path: Path, want: dict, found: dict) -> None:
    for what, names in (("missing from the files", want.keys() - found.keys()), ("not in the manifest", found.keys() - want.keys())):
        if names:
            raise CheckpointError(f"checkpoint {path}", f"{len(names)} tensors are {what}, the first is {min(names)}", AGAIN)
    for name, f in found.items():
        if want[name] != f:
            raise CheckpointError(f"checkpoint {path}, tensor {name}",
                                  f"it is {f['dtype']} {f['shape']} in {f['file']}, the manifest says {want[name]}", AGAIN)


def _check_units(path: Path, manifest: dict) -> None:
    """The description of every unit, before anything is built from it. Tensors have been compared with the files by now."""
    have = manifest["tensors"]
    for name, unit in manifest["units"].items():
        asked = f"checkpoint {path}, unit {name}"
        try:
            want = unit_tensors(unit)
            if unit["format"] != meta_format_name(unit["qtensor"]) or not isinstance(unit["tied"], list) or not isinstance(unit["bytes"],
                                                                                                                           int):
                raise ValueError("format, tied or bytes do not fit the rectangles")
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(asked, f"its description cannot be used ({type(e).__name__}: {e})", AGAIN) from None
        for t, described in want.items():
            d = have.get(f"{name}.{t}")
            if d is None:
                raise CheckpointError(asked, f"its tensor {t} is missing", AGAIN)
            if described is not None and (tuple(d["shape"]), d["dtype"]) != described:
                raise CheckpointError(asked,
                                      f"its tensor {t} must be {described[1]} {described[0]}, it is {d['dtype']} {tuple(d['shape'])}",
                                      AGAIN)
        total = sum(tensor_bytes(have[f"{name}.{t}"]) for t in want)
        if total != unit["bytes"]:
            raise CheckpointError(asked, f"its tensors have {total} bytes, the manifest says {unit['bytes']}", AGAIN)


# -- looking ------------------------------------------------------------------------------------------------------------------


def read_plan(checked: Checked) -> Plan | None:
    """The saved plan, or None if the checkpoint's formats cannot be written as one."""
    return Plan.load(checked.path / "plan.json") if "plan.json" in checked.manifest["files"] else None


def inspect(directory: str | os.PathLike) -> dict:
    """What a checkpoint holds, without building the model; plain JSON.

    Keys: path, version, producer, model, evaluation, files {name: bytes}, totals {unit_bytes, tensor_bytes, file_bytes, weights,
    stored_bits}, units [{name, kind, layer, format, shape, stored_bits, bytes, tied, info}], plan (None if it cannot be written as one).
    ``weights`` and ``stored_bits`` count the quantized units. Raises CheckpointError; the hashes of the files are not computed.
    """
    checked = check(directory, "size")
    m = checked.manifest
    units = []
    for name, u in checked.units.items():
        n, k = u["qtensor"]["shape"]
        units.append({"name": name, "kind": u["kind"], "layer": u["layer"], "format": u["format"], "shape": [n, k],
                      "stored_bits": 8 * u["bytes"] / (n * k), "bytes": u["bytes"], "tied": u["tied"], "info": u["info"]})
    unit_bytes, weights = sum(u["bytes"] for u in units), sum(math.prod(u["shape"]) for u in units)
    totals = {"unit_bytes": unit_bytes, "tensor_bytes": sum(map(tensor_bytes, checked.tensors.values())),
              "file_bytes": sum(f["bytes"] for f in m["files"].values()), "weights": weights,
              "stored_bits": 8 * unit_bytes / max(1, weights)}
    plan = read_plan(checked)
    return {"path": str(checked.path), "version": m["mxq_checkpoint"], "producer": m["producer"], "model": m["model"],
            "evaluation": m["evaluation"], "files": {n: f["bytes"] for n, f in m["files"].items()}, "totals": totals, "units": units,
            "plan": None if plan is None else plan.to_json()}


def bytes_on_disk(directory: str | os.PathLike) -> dict:
    """``{"total": int, "units": {name: int}, "float": int}``: bytes of the tensors, counted from the headers of the files themselves.

    ``units`` are the quantized ones, ``float`` is all the rest (norms, biases, units kept in float). Raises CheckpointError.
    """
    checked = check(directory, "size")
    sizes = {name: tensor_bytes(d) for name, d in checked.tensors.items()}
    units = {name: sum(sizes[f"{name}.{t}"] for t in unit_tensors(u)) for name, u in checked.units.items()}
    total = sum(sizes.values())
    return {"total": total, "units": units, "float": total - sum(units.values())}

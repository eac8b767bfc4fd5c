"""Loading: the float model is built on the meta device, its units are swapped for waiting modules, and checked tensors fill both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import CheckpointError, MxqError, ShapeError
from ..fileio import load_tensors
from ..nn.linear import Held, QuantModule
from ..nn.swap import finish, fuse_layers, put, quantized_modules
from ..progress import SILENT, Progress
from ..qtensor import QTensor
from ..structure import Unit, find_units
from .manifest import AGAIN, Checked, check, guard, read_plan, unit_tensors


def load(directory: str | os.PathLike, dtype: torch.dtype | str | None = None, *, device: torch.device | str | int | None = None, verify: str = "full",
         progress: Progress = SILENT, fuse: str | None = "auto") -> nn.Module:
    """Loads a checkpoint that ``save`` wrote, in eval mode; run in the same way (``fuse``), its logits are bit-equal to those before saving.

    No network, no remote code.

    Args:
        directory: the checkpoint.
        dtype: float dtype of norms, biases and activations, or its name; None means the one it was saved with.
        device: where the model goes once it is loaded, as by ``model.to(device)``; None leaves it on the CPU.
        verify: ``"full"`` checks the sha256 of every file, ``"size"`` only its size. Every value that a kernel relies on (index
            ranges, permutations, finite scales) is checked in both.
        fuse: how calls with a cache go through the decoder layers (``nn.fuse_layers``): ``"auto"``, all layers in one native call where the model is
            of a kind that native code knows; ``"layer"``, the same or a ModelError; None, module by module. ``repr(model)`` says which.

    Raises CheckpointError that names the file or tensor, the rule, and the way out; ShapeError for a dtype that kernels do not compute in.
    """
    dtype = None if dtype is None else _float_dtype(dtype)
    checked = check(directory, verify)
    plan = read_plan(checked)
    model = _build(checked, dtype)
    units = swap_to_meta(model, checked)
    fill_units(model, checked, units, progress)
    _fill_floats(model, checked, dtype)
    if dtype is None:
        _cast_buffers(model, checked)
    finish(model, plan)
    model.mxq_source = {"path": str(checked.path), "kind": "mxq", "sha256": checked.manifest["sha256"]}
    return fuse_layers(model.eval() if device is None else model.eval().to(device), fuse)


def _float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ShapeError(f"loading with dtype={dtype!r}", "a model computes in float32, bfloat16 or float16; its packed weights keep their bits in any of them",
                         "pass one of the three, or leave dtype out")
    return found


def _build(checked: Checked, dtype: torch.dtype | None) -> nn.Module:
    """The float model of config.json with its parameters on the meta device, and its computed buffers (RoPE tables) real."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    asked, saved = f"checkpoint {checked.path}", checked.manifest["model"].get("dtype")
    if not isinstance(saved, str) or not isinstance(getattr(torch, saved, None), torch.dtype):
        raise CheckpointError(asked, f"the manifest's dtype {saved!r} is unknown", AGAIN)
    try:
        config = AutoConfig.from_pretrained(checked.path, local_files_only=True, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or getattr(torch, saved), trust_remote_code=False)
        if "generation_config.json" in checked.manifest["files"]:
            model.generation_config = GenerationConfig.from_pretrained(checked.path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as e:
        wrote = checked.manifest["producer"].get("transformers")
        raise CheckpointError(f"{asked}, config.json", f"transformers cannot build the model ({type(e).__name__}: {e})",
                              f"it was made with transformers {wrote}: install that version") from e
    if type(model).__name__ != checked.manifest["model"].get("class"):
        raise CheckpointError(f"{asked}, config.json",
                              f"it makes a {type(model).__name__}, the manifest says {checked.manifest['model'].get('class')}", AGAIN)
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have their parameters on the meta device, while buffers are real.

    ``torch.device("meta")`` would take the buffers too, and those that no checkpoint holds (RoPE frequencies) could not be recovered.
    It patches ``nn.Module`` while it lasts, so only one thread may build models meanwhile.
    """
    register = nn.Module.register_parameter

    def on_meta(module, name, param):
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def swap_to_meta(model: nn.Module, checked: Checked) -> list[Unit]:
    """Puts waiting modules in the place of the checkpoint's units, after checking that the model has just those. Returns the units."""
    units = {u.name: u for u in find_units(model)}
    for name, u in checked.units.items():
        asked = f"checkpoint {checked.path}, unit {name}"
        if name not in units:
            raise CheckpointError(asked, "the model of config.json has no such unit", AGAIN)
        have, shape, tied = units[name], tuple(u["qtensor"]["shape"]), tuple(u["tied"])
        if (shape, u["kind"], tied) != (tuple(have.shape), have.kind, have.tied):
            raise CheckpointError(asked,
                                  f"the manifest describes a {u['kind']} of {shape} tied to {tied}, config.json makes a {have.kind} of "
                                  f"{tuple(have.shape)} tied to {have.tied}", AGAIN)
    for name, u in checked.units.items():
        put(model, units[name], Held(u["qtensor"]))
    return [units[name] for name in checked.units]


def fill_units(model: nn.Module, checked: Checked, units: list[Unit], progress: Progress = SILENT) -> None:
    """Reads, validates and packs every quantized weight into the waiting modules."""
    modules = quantized_modules(model)
    for unit in progress.track(units, "load"):
        entry, prefix = checked.units[unit.name], f"{unit.name}."
        tensors = _read(checked, [prefix + t for t in unit_tensors(entry)])
        for name, t in tensors.items():
            _check_finite(checked, name, t)
        try:
            q = QTensor.from_tensors(entry["qtensor"], tensors, prefix)
            q.info = dict(entry.get("info") or {})
            modules[unit.name].held.fill(q, unit.name)
        except MxqError as e:
            raise CheckpointError(f"checkpoint {checked.path}, unit {unit.name}", f"{e.asked}: {e.rule}", AGAIN) from e
        for name in (unit.name, *unit.tied):
            modules[name].refresh()


def float_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers that are not packed, by name. What several modules share stands once, under its first name."""
    out, seen = {}, set()
    for prefix, module in model.named_modules():
        persistent = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, t in {**module._parameters, **persistent}.items():
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                out[f"{prefix}.{name}" if prefix else name] = t
    return out


def computed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Float buffers that no checkpoint holds because the model computes them (RoPE frequencies), by name."""
    out = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, QuantModule):
            out |= {f"{prefix}.{n}" if prefix else n: b for n, b in module._buffers.items()
                    if n in module._non_persistent_buffers_set and b is not None and b.is_floating_point()}
    return out


def _cast_buffers(model: nn.Module, checked: Checked) -> None:
    """``model.to(bfloat16)`` rounds computed buffers too, which from_config() does not; bit-equal logits need the same here."""
    saved = checked.manifest["model"].get("buffers")
    for name, buffer in computed_buffers(model).items():
        dtype = getattr(torch, str(saved.get(name)), None) if isinstance(saved, dict) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointError(f"checkpoint {checked.path}", f"the manifest gives no float dtype for the buffer {name}", AGAIN)
        prefix, _, leaf = name.rpartition(".")
        model.get_submodule(prefix)._buffers[leaf] = buffer.to(dtype)


def _fill_floats(model: nn.Module, checked: Checked, dtype: torch.dtype | None) -> None:
    want = float_tensors(model)
    have = checked.tensors.keys() - {f"{n}.{t}" for n, u in checked.units.items() for t in unit_tensors(u)}
    if checked.tensors.get(guard(checked.units), {}).get("shape") == [0]:
        have -= {guard(checked.units)}
    for what, names in (("missing from the checkpoint", want.keys() - have), ("unknown to the model", have - want.keys())):
        if names:
            raise CheckpointError(f"checkpoint {checked.path}", f"{len(names)} float tensors are {what}, the first is {min(names)}", AGAIN)
    # A tied parameter stands once in the file, but in each of its modules here: every place that holds it gets the new one.
    places: dict[int, list[dict]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for attribute, t in table.items():
                if t is not None:
                    places.setdefault(id(t), []).append((table, attribute))
    values = _read(checked, sorted(want))
    for name, old in want.items():
        t = values[name]
        if t.shape != old.shape or t.is_floating_point() != old.is_floating_point():
            raise CheckpointError(f"checkpoint {checked.path}, tensor {name}",
                                  f"it is {t.dtype} {tuple(t.shape)}, the model needs {old.dtype} {tuple(old.shape)}", AGAIN)
        _check_finite(checked, name, t)
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        new = nn.Parameter(t, requires_grad=False) if isinstance(old, nn.Parameter) else t
        for table, attribute in places[id(old)]:
            table[attribute] = new


def _read(checked: Checked, names: list[str]) -> dict[str, torch.Tensor]:
    by_file: dict[str, list[str]] = {}
    for n in names:
        by_file.setdefault(checked.tensors[n]["file"], []).append(n)
    out: dict[str, torch.Tensor] = {}
    for file, listed in by_file.items():
        out |= load_tensors(checked.path / file, listed)[0]
    return out


def _check_finite(checked: Checked, name: str, t: torch.Tensor) -> None:
    if t.is_floating_point() and not torch.isfinite(t).all():
        bad = int((~torch.isfinite(t)).sum())
        raise CheckpointError(f"checkpoint {checked.path}, tensor {name}", f"{bad} of its {t.numel()} values are NaN or infinite",
                              "quantize the model again")

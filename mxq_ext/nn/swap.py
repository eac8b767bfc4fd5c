"""replace_linear: puts packed weights into a model, in place, by a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from .. import ops
from ..errors import ModelError, MxqError, PlanError
from ..formats import Format
from ..plan.schema import Cut, Plan, closest
from ..progress import SILENT, Progress
from ..qtensor import QTensor, Rectangle
from ..structure import Unit, find_units, warn_left_out
from .embedding import QuantEmbedding, lookup_scale
from .linear import Held, QuantLinear, QuantModule, quantize_weight, shape_meta

#: Which position weighting of the second moment a unit gets unless the plan's quantizer says otherwise. Keys and values of the
#: first token (the attention sink) enter almost every output; unweighted, GPTQ moves its error onto that one row.
DEFAULT_WEIGHTING = {"k_proj": "attention", "v_proj": "attention", "default": "none"}

Quantizer = Callable[[Unit, torch.Tensor, Format | Cut], QTensor]


def quantized_modules(model: nn.Module) -> dict[str, QuantModule]:
    """Name -> module of everything in the model that has a packed weight, in model order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantModule)}


def set_compute(model: nn.Module, compute: str) -> None:
    """How all packed linears of the model read their input from now on: ``"a16"`` or ``"a8"``. Raises NativeError for anything else."""
    ops.check_compute(compute)
    for module in quantized_modules(model).values():
        if isinstance(module, QuantLinear):
            module.compute = compute


def as_plan(plan: Plan | Format | str | os.PathLike, quantizer: dict | None = None) -> Plan:
    """A Plan as it is; a format (name) as the uniform plan, by ``quantizer``; a path (``.json``, or an existing file) is read."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Format):
        return Plan.uniform(plan, quantizer=quantizer)
    if isinstance(plan, os.PathLike) or plan.endswith(".json") or Path(plan).is_file():
        return Plan.load(plan)
    return Plan.uniform(Format.parse(plan), quantizer=quantizer)


def replace_linear(model: nn.Module, plan: Plan | Format | str | os.PathLike, stats=None, qtensors: Mapping[str, QTensor] | None = None, *,
                   quantizer: str | Mapping | Quantizer | None = None, progress: Progress = SILENT, fuse: str | None = None) -> nn.Module:
    """Swaps the model's linears, token embedding and tied head for packed ones, in place, and returns the model.

    All or nothing: the plan is checked and every weight is quantized before the first module is replaced, so the peak of memory is the
    float model plus its packed weights, and an error leaves the model as it was. Then each float weight is dropped as its module goes.
    The model is for inference afterwards: what is left of its parameters no longer requires grad.

    Args:
        model: on the CPU, or on the meta device (then the modules wait for ``load_state_dict`` and no value is read).
        plan: a Plan, a format for all units (``"w4g64"``), or the path of a plan file.
        stats: what calibration saw; without it GPTQ, the default of a plan, gives way to RTN (k-means for LUT formats).
        qtensors: finished weights by unit name, which are taken as they are; they must have the plan's formats.
        quantizer: overrides the plan's: a method name, ``{"name": ..., "weighting": ..., options}``, or a function
            (unit, weight float32 [N, K], Format | Cut) -> QTensor. ``weighting`` is one of the weightings of the second moments,
            or a dict from the last part of a module's name (and ``"default"``) to one.
        progress: where to show it.
        fuse: ``"layer"`` runs all decoder layers in one native call where that is possible (:func:`fuse_layers`), ``"auto"`` the same for models that
            it knows, None goes through the modules.

    Raises:
        PlanError: names in the plan or in ``qtensors`` that are no units, formats that differ from the plan's.
        ModelError: modules that are quantized already, or that are not plain ``nn.Linear`` / ``nn.Embedding``; a KV section that the
            model cannot follow (``kv.attention.check_attention``, also for FormatError and NativeError); ``fuse="layer"`` for a model whose
            layers native code does not know.
        QuantizationError, ShapeError: from the quantizer, with the name of the unit.
    """
    plan = as_plan(plan)
    if plan.kv is not None:
        _kv_attention().check_attention(model, plan.kv)
    units = find_units(model)
    wanted = {u.name: (u, d) for u, d in zip(units, plan.resolve(units).values(), strict=True) if d is not None}
    qtensors = dict(qtensors or {})
    _check_qtensors(qtensors, units, wanted)
    check_modules(model, [unit for unit, _ in wanted.values()])
    if wanted:
        warn_left_out(model, units)
    if fuse is not None:
        _fused().check_fuse(model, fuse, wanted)

    make = _maker(plan, stats, quantizer)
    held: dict[str, Held] = {}
    for name, (unit, decision) in progress.track(list(wanted.items()), "quantize"):
        weight = model.get_submodule(name).weight
        if name in qtensors:
            held[name] = Held.of(qtensors.pop(name))
        elif weight.is_meta:
            held[name] = Held(_meta(unit, decision))
        else:
            held[name] = Held.of(_quantize(make, unit, weight, decision))

    for unit, _ in wanted.values():
        put(model, unit, held.pop(unit.name))
    finish(model, plan)
    return fuse_layers(model, fuse) if fuse is not None else model


def fuse_layers(model: nn.Module, fuse: str | None) -> nn.Module:
    """Chooses how the layers of a quantized model are run: :func:`mxq_ext.nn.fused.fuse_layers`."""
    return _fused().fuse_layers(model, fuse)


def put(model: nn.Module, unit: Unit, held: Held) -> None:
    """Replaces the modules of one unit; those tied to it share ``held``. Their float weight is dropped here."""
    for name in (unit.name, *unit.tied):
        old = model.get_submodule(name)
        owner = name == unit.name
        if isinstance(old, nn.Embedding):
            new = QuantEmbedding(held, old.weight.dtype, old.padding_idx, owner, lookup_scale(old))
        else:
            new = QuantLinear(held, old.bias, owner)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
        _untie(model, name)


def finish(model: nn.Module, plan: Plan | None) -> None:
    """Marks a swapped model: its parameters frozen, its plan kept, and a ``quantization_config``: to transformers it is no float model.

    What the plan says about activations and about the KV cache is set here. From now on ``model.save_pretrained`` refuses.
    """
    model.requires_grad_(False)
    model.mxq_plan = plan
    if plan is not None and plan.activations is not None:
        set_compute(model, plan.activations)
    if plan is not None and plan.kv is not None:
        _kv_attention().replace_attention(model, plan.kv)
    if getattr(model, "config", None) is not None:
        model.config.quantization_config = {"quant_method": "mxq"}
    if hasattr(model, "save_pretrained") and quantized_modules(model):
        model.save_pretrained = _refuse_save_pretrained


def _refuse_save_pretrained(directory: str | os.PathLike, *args, **kwargs):
    """Stands in for the method of a swapped model: transformers would write the packed weights' absence without a word."""
    raise ModelError(f"save_pretrained({str(directory)!r}) of a quantized model", "transformers would leave out the packed weights",
                     "call mxq_ext.save(model, directory, tokenizer)")


def _fused():
    from . import fused  # only where it is asked for: it imports transformers

    return fused


def _kv_attention():
    from ..kv import attention  # only where a plan asks for it: it imports transformers

    return attention


def _untie(model: nn.Module, name: str) -> None:
    """Makes transformers forget that ``<name>.weight`` is tied: its ``tie_weights()`` would look for a weight that is gone."""
    gone = f"{name}.weight"
    for prefix, module in model.named_modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict):
                full = {k: (f"{prefix}.{k}" if prefix else k, f"{prefix}.{v}" if prefix else v) for k, v in keys.items()}
                if any(gone in pair for pair in full.values()):
                    setattr(module, attribute, {k: v for k, v in keys.items() if gone not in full[k]})


def check_modules(model: nn.Module, units: Sequence[Unit]) -> None:
    """Raises ModelError if the modules of one of the units cannot be replaced by packed ones."""
    for unit in units:
        for name in (unit.name, *unit.tied):
            _check_module(model, name)


def _check_module(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    if isinstance(module, QuantModule):
        raise ModelError(f"quantizing {name}", f"it is quantized already ({module.format_name})",
                         'start from the float model, or set it to "keep" in the plan')
    # A subclass may scale or clip in its forward, and the packed module would not. Gemma's embeddings scale, which ours can.
    if isinstance(module, nn.Embedding):
        plain = lookup_scale(module) is not None
    else:
        plain = type(module).forward is nn.Linear.forward or type(module).__qualname__ == "FalconLinear"  # which writes out the same product
    if not plain or getattr(module, "max_norm", None) is not None:
        raise ModelError(f"quantizing {name}", f"{type(module).__qualname__} computes more than a plain nn.Linear or nn.Embedding does",
                         f'set "{name}": "keep" in the plan')
    if module.weight.dtype == torch.float64:
        raise ModelError(f"quantizing {name}", "its weight is float64, and kernels compute in float32, bfloat16 or float16", "call model.float() first")
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        raise ModelError(f"quantizing {name}", "it has forward hooks or a wrapped forward, which would be lost",
                         "remove them first (accelerate: load the model without device_map)")


def _check_qtensors(qtensors: dict[str, QTensor], units: list[Unit], wanted: dict) -> None:
    shapes = {u.name: u.shape for u in units}
    for name, q in qtensors.items():
        asked = f"quantized weight {name!r}"
        if name not in shapes:
            raise PlanError(asked, f"no unit of the model ({len(units)} units) has such a name", closest(name, shapes))
        if name not in wanted:
            raise PlanError(asked, "the plan keeps this unit in float", "give it a format in the plan, or leave the weight out")
        if tuple(q.shape) != tuple(shapes[name]):
            raise PlanError(asked, f"the unit is {shapes[name][0]} x {shapes[name][1]}, the weight {q.shape[0]} x {q.shape[1]}",
                            "quantize this model's weight")
        decision = wanted[name][1]
        if q.format_name.removesuffix("+sparse") != decision.name:
            raise PlanError(asked, f"the plan asks for {decision}, it holds {q.format_name}", "quantize it again, or correct the plan")


def _meta(unit: Unit, decision: Format | Cut) -> dict:
    """``QTensor.meta()`` of a unit before there is a weight."""
    if isinstance(decision, Format):
        return shape_meta(unit.shape, decision)
    meta = shape_meta(unit.shape, "fp16")
    meta["rectangles"] = [[r0, r1, c0, c1, f.name] for r0, r1, c0, c1, f in decision.rectangles(unit.shape, unit.name)]
    return meta | {f"perm_{axis}": True for axis in decision.permuted} | {"sparse": decision.sparse > 0}


def _quantize(make: Quantizer, unit: Unit, weight: torch.Tensor, decision: Format | Cut) -> QTensor:
    """Runs the quantizer on one unit; its errors get the unit's name."""
    try:
        return make(unit, weight.detach().float(), decision)
    except MxqError as e:
        raise type(e)(f"unit {unit.name}: {e.asked}", e.rule, e.fix) from e
    except Exception as e:
        e.add_note(f"while quantizing unit {unit.name} to {decision}")
        raise


def _maker(plan: Plan, stats, quantizer: str | Mapping | Quantizer | None) -> Quantizer:
    if callable(quantizer):
        return quantizer
    options = dict(plan.quantizer if quantizer is None else {"name": quantizer} if isinstance(quantizer, str) else quantizer)
    weighting = options.pop("weighting", DEFAULT_WEIGHTING)
    method = options.pop("name", "auto")
    if stats is None and quantizer is None and method == "gptq":
        method, options = "auto", {}  # every plan says gptq unless it says otherwise, and without Stats there is no Hessian

    def make(unit: Unit, weight: torch.Tensor, decision: Format | Cut) -> QTensor:
        if unit.kind == "embedding" and (stats is None or unit.name not in stats):
            # A lookup alone has no second moment: every row is an output of its own, and GPTQ has nothing to spread errors with.
            # (An embedding that is the head too has the head's.)
            if method in ("auto", "gptq"):
                return _fill(weight, decision, {"method": "auto"})
            return _fill(weight, decision, {"method": method, **options})
        extra = {}
        if stats is not None:
            which = weighting if isinstance(weighting, str) else weighting.get(unit.role, weighting.get("default", "none"))
            extra["hessian"] = stats.hessian(unit.name, which)
            if method == "kmeans":
                extra["fisher"] = stats.fisher(unit.name)
        return _fill(weight, decision, {"method": method, **extra, **options})

    return make


def _fill(weight: torch.Tensor, decision: Format | Cut, options: dict) -> QTensor:
    """One call for a Format; one per band or tile otherwise, each with its own part of the Hessian (errors do not cross bands)."""
    if isinstance(decision, Format):
        return quantize_weight(weight, decision, **options)
    if decision.permute or decision.sparse:
        what = "permutation" if decision.permute else "sparse part"
        raise PlanError(f"bands {decision} with a {what}", "which rows, columns or values those are is not in the plan",
                        "pass the finished weight in qtensors=")
    rects: list[Rectangle] = []
    for r0, r1, c0, c1, fmt in decision.rectangles(tuple(weight.shape)):
        part = dict(options)
        if part.get("hessian") is not None:
            part["hessian"] = part["hessian"][c0:c1, c0:c1].contiguous()
        if part.get("fisher") is not None:
            part["fisher"] = part["fisher"][r0:r1, c0:c1].contiguous()
        q = quantize_weight(weight[r0:r1, c0:c1].contiguous(), fmt, **part)
        if q.perm_cols is not None or q.perm_rows is not None:
            raise PlanError(f"bands {decision}", "the quantizer permuted a band, and a weight has one permutation only",
                            "turn its act-order off")
        rects.append(Rectangle(r0, r1, c0, c1, fmt, q.rectangles[0].tensors))
    q = QTensor(tuple(weight.shape), rects)
    q.validate()
    return q

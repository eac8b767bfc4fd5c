"""The one entry, ``quantize``: checks the request, finds the method by name, runs it, and measures what came out.

A method is a function ``run(weight, fmt, options, *, hessian, fisher) -> (QTensor, report)`` with a dataclass of options,
registered under a name with the formats that it can fill. Methods never see a malformed weight, Hessian or option.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import QuantizationError, ShapeError
from ..formats import Format
from ..qtensor import QTensor, Sparse
from .hessian import HessianFactor

FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Method:
    """A registered quantizer.

    ``applies(fmt)`` is None when the method can fill the format, else a pair (rule, fix) for the error message. ``sparse``: ``run`` also takes ``exact``.
    """

    name: str
    options: type
    run: Callable
    applies: Callable[[Format], tuple[str, str] | None]
    sparse: bool = False


METHODS: dict[str, Method] = {}


def register(name: str, options: type, applies: Callable[[Format], tuple[str, str] | None], sparse: bool = False):
    """Decorator: adds ``run`` to the registry under ``name``."""

    def add(run):
        METHODS[name] = Method(name, options, run, applies, sparse)
        return run

    return add


def find_method(name: str) -> Method:
    """The registered method of that name. Raises QuantizationError with the names there are."""
    if name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        raise QuantizationError(f"quantization method {name!r}", f"the methods are {', '.join(sorted(METHODS))} and auto",
                                f"did you mean {close[0]!r}?" if close else "choose one of them")
    return METHODS[name]


def default_method(fmt: Format | str, with_hessian: bool) -> str:
    """What ``method="auto"`` stands for: gptq when there is a Hessian, else kmeans for lut formats and rtn for all others."""
    if with_hessian:
        return "gptq"
    return "kmeans" if Format.parse(fmt).kind == "lut" else "rtn"


def make_options(method: str, values: dict):
    """The option dataclass of ``method`` filled from ``values``. Raises QuantizationError that lists the known options."""
    cls = find_method(method).options
    known = {f.name: f.default for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            listed = ", ".join(f"{n}={d!r}" for n, d in known.items())
            raise QuantizationError(f"option {name!r} of method {method}", f"its options (with defaults) are {listed or 'none at all'}",
                                    "remove or rename it")
    return cls(**values)


def need(ok: bool, option: str, value, rule: str) -> None:
    """For the ``check`` of option dataclasses."""
    if not ok:
        raise QuantizationError(f"option {option}={value!r}", rule, "change the value or drop the option")


class Options:
    """Base of option dataclasses: values come from command lines and plan files, so their types are checked before ``check`` compares them."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            names = (field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)).split(" | ")  # text under `import annotations`
            need(any(_TYPES[name][1](value) for name in names), field.name, value, f"it must be {' or '.join(_TYPES[name][0] for name in names)}")
        self.check()

    def check(self) -> None:
        """Raises QuantizationError, by :func:`need`, for a value of the right type that is out of range."""


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


#: What a field of an option dataclass may be declared as: in words, and whether a value is one.
_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "int": ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "float": ("a finite number", _number),
    "str": ("text", lambda v: isinstance(v, str)),
    "None": ("nothing", lambda v: v is None),
}


def quantize(weight: torch.Tensor, fmt: Format | str, *, method: str = "gptq", hessian: torch.Tensor | HessianFactor | None = None,
             fisher: torch.Tensor | None = None, exact: torch.Tensor | None = None, **options) -> QTensor:
    """Quantizes one weight.

    Args:
        weight: [N, K], any float dtype; computed in float32.
        fmt: the Format or its name. ``fp16`` is plain rounding whatever the method.
        method: ``"rtn"``, ``"gptq"``, ``"hqq"``, ``"kmeans"``, or ``"auto"`` (see :func:`default_method`).
        hessian: [K, K] second moment of the layer's input, mean over tokens of w_t x_t x_t^T, or a HessianFactor that several
            weights and formats share (see :func:`prepare_hessian`). Needed by gptq; the others use its diagonal as importance.
        fisher: [N, K] mean squared gradients >= 0; the weights of k-means when given.
        exact: bool [N, K], elements for a sparse fp16 part (rtn, gptq, kmeans). They count nothing in the fit of ranges and tables, and the result's sparse
            part holds what is missing at their places: of the weight, or with gptq of what error feedback makes of it there, so that they pass no error on.
        options: see the option dataclass of the method.

    Returns:
        A QTensor whose ``info`` holds method, options, damp and damp_retries (gptq; else None and 0), weight_error = |dW|^2 / |W|^2,
        output_error = tr(dW H dW^T) / tr(W H W^T) (None without a Hessian), seconds, warnings, and what else the method reports.

    Raises:
        QuantizationError: unknown method or option, a method that cannot fill the format, values that are not finite or exceed the
            stored 16-bit type, a Hessian that no damping makes positive definite.
        ShapeError: weight, Hessian and Fisher that do not go together.
    """
    start = time.perf_counter()
    fmt = Format.parse(fmt)
    if method == "auto":
        method = default_method(fmt, hessian is not None)
    entry = find_method(method)
    opts = make_options(method, options)
    w = check_weight(weight, fmt)
    h = check_hessian(hessian, w, fmt)
    f = check_fisher(fisher, w, fmt)
    _check_exact(exact, w, fmt)
    if exact is not None and not entry.sparse:
        able = ", ".join(name for name, m in sorted(METHODS.items()) if m.sparse)
        raise QuantizationError(f"quantizing to {fmt} with {method} and exact elements", f"methods that leave elements out are {able}", "use one of them")
    if fmt.kind == "float":
        q, report = with_sparse(_round(w), w, exact), {"method": "round"}
    else:
        bad = entry.applies(fmt)
        if bad is not None:
            raise QuantizationError(f"quantizing to {fmt} with {method}", *bad)
        q, report = entry.run(w, fmt, opts, hessian=h, fisher=f, **({} if exact is None else {"exact": exact}))
    weight_error, output_error = errors(w, q.dequantize(), h.matrix if isinstance(h, HessianFactor) else h)
    if not math.isfinite(weight_error):
        # Finite bf16 scales whose products with codes are not: only weights near the end of float32 get here.
        rule = f"magnitudes up to {float(w.abs().max()):g} overflow float32 when they are restored"
        raise QuantizationError(f"quantizing a weight of {w.shape[0]} x {w.shape[1]} to {fmt}", rule, "scale the weight down")
    q.info = {"method": method, "options": dataclasses.asdict(opts), "damp": None, "damp_retries": 0, "warnings": []} | report
    q.info |= {"weight_error": weight_error, "output_error": output_error, "seconds": time.perf_counter() - start}
    return q


def errors(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor | None) -> tuple[float, float | None]:
    """(|dW|^2 / |W|^2, tr(dW H dW^T) / tr(W H W^T)); the second None without a Hessian, either 0 when nothing was lost of nothing.

    weight, restored float32 [N, K]; hessian float32 [K, K].
    """
    def ratio(a, b):
        return a / b if b > 0 else (0.0 if a == 0 else math.inf)

    d = restored - weight
    we = ratio(float(d.double().square().sum()), float(weight.double().square().sum()))
    if hessian is None:
        return we, None
    return we, ratio(_trace(d, hessian), _trace(weight, hessian))


def _trace(a: torch.Tensor, h: torch.Tensor, block: int = 256) -> float:
    """tr(A H A^T) >= 0 of a symmetric H: by blocks of columns, so that only one half of H is multiplied and the temporaries stay small."""
    total = 0.0
    for rows in a.split(4096):
        for i in range(0, a.shape[1], block):
            j = i + block
            product = rows[:, i:j] @ h[i:j, i:j]
            if i:
                product.addmm_(rows[:, :i], h[:i, i:j], alpha=2)
            total += float(torch.sum(product.mul_(rows[:, i:j]), dtype=torch.float64))
    return max(0.0, total)


def check_weight(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The weight as contiguous float32 [N, K]. Raises ShapeError, and QuantizationError that says where it is not finite."""
    what = f"quantizing a weight of shape {tuple(weight.shape)}, {str(weight.dtype).removeprefix('torch.')}, to {fmt}"
    if weight.dim() != 2 or weight.numel() == 0:
        raise ShapeError(what, "a weight is a matrix [N, K] with N, K >= 1", "reshape it (of a convolution, flatten all but the first)")
    if not weight.is_floating_point():
        raise ShapeError(what, "a weight has a float dtype", "pass the float weights, not codes")
    if weight.is_meta:
        raise ShapeError(what, "a weight on the meta device has no values", "load the model's weights first")
    w = weight.detach().to(device="cpu", dtype=torch.float32).contiguous()
    finite = torch.isfinite(w)
    if not finite.all():
        r, c = (~finite).nonzero()[0].tolist()
        rule = f"{int((~finite).sum())} of {w.numel()} values are NaN or infinite, the first at [{r}, {c}] = {w[r, c]:g}"
        raise QuantizationError(what, rule, "check the float model before quantizing it")
    return w


def check_hessian(hessian, w: torch.Tensor, fmt: Format):
    """The Hessian as symmetric float32 [K, K] (a HessianFactor as it is) after checks of shape and values."""
    if hessian is None:
        return None
    what = f"quantizing a weight of {w.shape[0]} x {w.shape[1]} to {fmt}"
    shape = tuple(hessian.matrix.shape if isinstance(hessian, HessianFactor) else hessian.shape)
    if shape != (w.shape[1], w.shape[1]):
        raise ShapeError(what, f"its Hessian must be {w.shape[1]} x {w.shape[1]}, it is {' x '.join(map(str, shape))}",
                         "pass the second moment of this layer's input")
    if isinstance(hessian, HessianFactor):
        return hessian
    h = hessian.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(h).all():
        raise QuantizationError(what, f"{int((~torch.isfinite(h)).sum())} of the Hessian's {h.numel()} values are NaN or infinite",
                                "calibrate again in float32, and check the model's activations for overflow")
    return (h + h.T).mul_(0.5)


def check_fisher(fisher, w: torch.Tensor, fmt: Format):
    """The Fisher diagonal as float32 [N, K] after checks of shape and values."""
    if fisher is None:
        return None
    what = f"quantizing a weight of {w.shape[0]} x {w.shape[1]} to {fmt}"
    if tuple(fisher.shape) != tuple(w.shape):
        raise ShapeError(what, f"its Fisher diagonal must have the same shape, it has {tuple(fisher.shape)}",
                         "pass stats.fisher(unit) of this unit")
    f = fisher.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(f).all() or bool((f < 0).any()):
        raise QuantizationError(what, "its Fisher diagonal must be finite and >= 0", "calibrate again in float32")
    return f


def _check_exact(exact, w: torch.Tensor, fmt: Format) -> None:
    """Raises ShapeError for a mask of exact elements that is none."""
    if exact is not None and (tuple(exact.shape) != tuple(w.shape) or exact.dtype != torch.bool):
        raise ShapeError(f"quantizing a weight of {w.shape[0]} x {w.shape[1]} to {fmt}",
                         f"exact elements are a bool mask of the same shape, it is {str(exact.dtype)[6:]} {tuple(exact.shape)}", "pass one value per weight")


def with_sparse(q: QTensor, target: torch.Tensor, exact: torch.Tensor | None) -> QTensor:
    """``q`` with a sparse part that makes it ``target`` float32 [N, K] (to fp16's precision) at the places ``exact``; ``q`` itself where that is None."""
    if exact is None:
        return q
    counts, places = exact.sum(1), exact.nonzero()
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    values = (target - q.dequantize())[exact]
    most = float(values.abs().nan_to_num(nan=math.inf, posinf=math.inf).max()) if values.numel() else 0.0  # NaN: feedback went on from an infinity
    if most > FP16_MAX:
        raise QuantizationError(f"quantizing to {q.format_name} with exact elements", f"a sparse value of {most:g} exceeds fp16's largest value {FP16_MAX:g}",
                                "leave it out of the exact elements, or scale the weight down")
    out = QTensor(q.shape, q.rectangles, q.perm_rows, q.perm_cols, Sparse(rowptr, places[:, 1].int().contiguous(), values.half()), q.info)
    out.validate()
    return out


def check_half(values: torch.Tensor, fmt: Format, what: str) -> None:
    """Refuses magnitudes that the stored 16-bit type cannot hold; a silent inf would only show up as NaN logits."""
    if fmt.scale_dtype == "fp16" and (most := float(values.abs().max())) > FP16_MAX:
        fix = "use its _bf16 variant" if fmt.kind in ("uniform", "nf") else "use a uniform format with bf16 scales, such as w8_bf16"
        fix = f"use {fmt.expanded}_bf16" if fmt.nested else fix
        raise QuantizationError(f"quantizing to {fmt}", f"a {what} of {most:g} exceeds fp16's largest value {FP16_MAX:g}", fix)


def _round(w: torch.Tensor) -> QTensor:
    check_half(w, Format.parse("fp16"), "weight")
    return QTensor.from_float(w)


def training_key(options: object, start: Mapping[str, QTensor], tokens: torch.Tensor) -> str:
    """Twelve hex digits of all that decides a training run beside the float model: options (a dataclass), starting weights, windows."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(options), sort_keys=True).encode())
    for name, q in sorted(start.items()):
        digest.update(name.encode())
        for t in q.to_tensors().values():
            digest.update(t.contiguous().view(torch.uint8).numpy())
    digest.update(tokens.contiguous().numpy())
    return digest.hexdigest()[:12]

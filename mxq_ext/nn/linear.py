"""QuantLinear: an ``nn.Linear`` for inference whose weight stays packed.

Who owns what::

    QuantLinear / QuantEmbedding  --held-->  Held  --packed-->  ops.Packed (kernel layout, one uint8 blob)

A tied output head and its embedding point at one ``Held``, so the bytes exist once in memory, in a deep copy, in a pickle and
in a state dict. The module called *owner* saves and loads them; the other one only reads.
"""

from __future__ import annotations

import json

import torch
from torch import nn

from .. import ops
from ..cuda import CudaPacked
from ..errors import CheckpointError, MxqError, NativeError, ShapeError
from ..formats import Format
from ..qtensor import QTensor

#: Name of the state-dict entry that describes the tensors beside it: ``QTensor.meta()`` as JSON in a uint8 vector. A tensor, so
#: that every tool that stores tensors only (safetensors, ``save_pretrained``) can store it too.
META_KEY = "mxq_meta"

_changes = 0


def note_change() -> None:
    """To be called when a packed weight, a compute mode or the place of a module changes: what keeps addresses of weights looks at them again."""
    global _changes
    _changes += 1


def changes() -> int:
    """Counts the calls of :func:`note_change` in this process."""
    return _changes


def shape_meta(shape: tuple[int, int], fmt: str | Format) -> dict:
    """``QTensor.meta()`` of a weight [N, K] that is one rectangle of ``fmt``, before any tensor of it exists."""
    n, k = shape
    return {"shape": [n, k], "rectangles": [[0, n, 0, k, Format.parse(fmt).name]], "perm_rows": False, "perm_cols": False, "sparse": False}


def meta_format_name(meta: dict) -> str:
    """``QTensor.format_name`` read off ``QTensor.meta()``."""
    return "+".join([*dict.fromkeys(r[4] for r in meta["rectangles"]), *(["sparse"] if meta["sparse"] else [])])


class Held:
    """One packed weight, shared by all modules that are tied to it.

    Attributes:
        packed: the layout that the kernels of ``device`` read, or None on a model that waits for its tensors.
        device: for which weights are packed here.
        meta: ``QTensor.meta()``.
        nbytes: bytes on disk (0 while waiting). The packed blob may be larger: kernels pad it.
        info: what the quantizer reported.
    """

    def __init__(self, meta: dict):
        self.packed: ops.Packed | CudaPacked | None = None
        self.device = torch.device("cpu")
        self.meta = meta
        self.nbytes = 0
        self.info: dict = {}

    @staticmethod
    def of(q: QTensor) -> Held:
        held = Held(q.meta())
        held.fill(q)
        return held

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.meta["shape"])

    @property
    def format_name(self) -> str:
        return meta_format_name(self.meta)

    def fill(self, q: QTensor, name: str = "weight") -> None:
        """Packs ``q``, which must have the shape and the format that this place was made for. Raises ShapeError."""
        if tuple(q.shape) != self.shape or q.format_name != self.format_name:
            raise ShapeError(f"loading {name} of {self.shape[0]} x {self.shape[1]}, {self.format_name}",
                             f"the tensors are {q.shape[0]} x {q.shape[1]}, {q.format_name}",
                             "build the model with the plan that the tensors were made with")
        self.packed, self.meta, self.nbytes, self.info = ops.pack(q, self.device), q.meta(), q.nbytes(), dict(q.info)
        note_change()

    def move(self, device: torch.device) -> None:
        """Packs the weight anew, from its canonical tensors, for another device; those of both layouts exist meanwhile. NativeError: no kernels there."""
        if device != self.device:
            if self.packed is not None:
                self.packed = ops.pack(ops.unpack(self.packed), device)
            self.device = device
            note_change()

    def loaded(self) -> ops.Packed | CudaPacked:
        """``packed``. Raises NativeError while it is None."""
        if self.packed is None:
            raise NativeError(f"weight of {self.shape[0]} x {self.shape[1]}, {self.format_name}",
                              "its tensors have not been loaded yet (the model was built on the meta device)",
                              "fill it with load_state_dict, or load the checkpoint with mxq_ext.load")
        return self.packed

    def qtensor(self) -> QTensor:
        """The weight as it is stored, rebuilt from the packed bytes without loss. Raises NativeError while there is none."""
        q = ops.unpack(self.loaded())
        q.info = dict(self.info)
        return q


class QuantModule(nn.Module):
    """What QuantLinear and QuantEmbedding share: the weight, its state dict, and how it survives ``.to()``.

    ``blob`` is a non-persistent uint8 buffer, the very tensor of ``packed``: memory accounting sees it, the state dict holds the
    canonical tensors instead. It never changes dtype with ``.to()``, ``.half()`` or ``.to_empty()``; on its way to a device with other kernels
    it is unpacked to the canonical tensors and packed in their layout (:meth:`Held.move`), and on its way back likewise, without loss.
    """

    mxq_kind = ""

    def __init__(self, held: Held, owner: bool = True):
        super().__init__()
        self.held = held
        self.owner = owner
        self.register_buffer("blob", None, persistent=False)
        self.refresh()

    def refresh(self) -> None:
        """Takes over what ``held`` has been filled with."""
        self._buffers["blob"] = None if self.held.packed is None else self.held.packed.blob

    @property
    def packed(self) -> ops.Packed | CudaPacked:
        """The weight as the kernels read it. Raises NativeError while its tensors have not been loaded."""
        return self.held.loaded()

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.held.shape

    @property
    def format_name(self) -> str:
        return self.held.format_name

    @property
    def stored_bits(self) -> float:
        """Bytes on disk times 8 over the number of weights."""
        return 8 * self.held.nbytes / max(1, self.shape[0] * self.shape[1])

    def qtensor(self) -> QTensor:
        """The weight as it is stored. Raises NativeError if it has not been loaded."""
        return self.held.qtensor()

    def __getattr__(self, name: str):
        # Code written for nn.Linear reads .weight; "no attribute 'weight'" would not tell its user what to do.
        if name == "weight":
            raise AttributeError(f"{type(self).__name__} ({self.held.format_name}) has no float weight; use .qtensor().dequantize() for "
                                 "its values, and resize or edit a model before it is quantized")
        return super().__getattr__(name)

    def _apply(self, fn, recurse=True):
        packed = self.held.packed
        place = fn(torch.empty(0, dtype=torch.uint8, device=self.held.device) if packed is None else packed.blob[:0]).device
        if place != self.held.device and (packed is not None or place.type in ("cpu", "cuda")):
            self._move(place)
        elif packed is not None:
            fn(packed.blob)  # which may share its memory, but makes no other tensor of it
        self._buffers["blob"] = None
        note_change()
        try:
            return super()._apply(fn, recurse)
        finally:
            self.refresh()

    def _move(self, device: torch.device) -> None:
        try:
            self.held.move(device)
        except NativeError as e:
            raise NativeError(f"moving {type(self).__name__} to {device}: {e.asked}", e.rule, e.fix) from e

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Before loading there is nothing to save, and transformers asks every model on the meta device for its state dict.
        if self.owner and self.held.packed is not None:
            q = self.held.qtensor()
            destination.update(q.to_tensors(prefix))
            destination[prefix + META_KEY] = torch.frombuffer(bytearray(json.dumps(q.meta()).encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        mine: set[str] = set()
        if self.owner:
            if prefix + META_KEY in state_dict:
                try:
                    q = state_dict_qtensor(state_dict, prefix)
                    mine = set(q.to_tensors(prefix)) | {prefix + META_KEY}
                    self.held.fill(q, prefix.rstrip(".") or "weight")
                except MxqError as e:
                    error_msgs.append(str(e))
            elif strict:
                missing_keys.append(prefix + META_KEY)
        self.refresh()
        # The default looks for what register_buffer made (the bias) and calls all else unexpected.
        own = {k: v for k, v in state_dict.items() if k not in mine}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _describe(self) -> str:
        if self.held.packed is None:
            return f"{self.format_name}, not loaded"
        return f"{self.format_name}, stored_bits={self.stored_bits:.3f}"


def state_dict_qtensor(state_dict: dict[str, torch.Tensor], prefix: str) -> QTensor:
    """The QTensor that a QuantModule saved under ``prefix``. Raises CheckpointError or ShapeError."""
    raw = state_dict[prefix + META_KEY]
    try:
        meta = json.loads(bytes(raw.tolist()).decode())
        meta["rectangles"], meta["shape"]  # noqa: B018 (the check is the access)
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"state dict entry {prefix}{META_KEY}", f"it is no description of a quantized weight ({e!r})",
                              "save the model again") from None
    return QTensor.from_tensors(meta, state_dict, prefix)


def quantize_weight(weight: torch.Tensor, fmt: str | Format, **options) -> QTensor:
    """:func:`mxq_ext.quantizers.quantize` with ``method="auto"``: GPTQ if a ``hessian`` is given, else RTN (k-means for LUT formats)."""
    from ..quantizers import quantize  # scipy and its like load when something is quantized, not with every model

    return quantize(weight, fmt, **{"method": "auto", **options})


class QuantLinear(QuantModule):
    """``y = x W^T + b`` with a packed W [out_features, in_features] and a float bias. W is not trained; gradients flow to x.

    Input [..., in_features] in float32, bfloat16 or float16; output of the same dtype, accumulated in float32. ``compute`` says how the input
    is read: ``"a16"`` exactly, ``"a8"`` rounded to int8 (see ``ops.linear``); it may be set at any time. ``repr`` names the kernel that a
    single row would use. Make one with :meth:`from_linear`, :meth:`from_qtensor` or :meth:`empty`.
    """

    mxq_kind = "linear"

    def __init__(self, held: Held, bias: torch.Tensor | None = None, owner: bool = True, compute: str = "a16"):
        super().__init__(held, owner)
        self.compute = compute
        self.out_features, self.in_features = held.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(f"QuantLinear of {self.out_features} x {self.in_features}",
                             f"the bias must have {self.out_features} values, it is {tuple(bias.shape)}",
                             "pass the bias of the same linear layer")
        self.register_buffer("bias", None if bias is None else bias.detach())

    @staticmethod
    def from_qtensor(q: QTensor, bias: torch.Tensor | None = None) -> QuantLinear:
        """From a quantized weight [N, K] and an optional float bias [N]."""
        return QuantLinear(Held.of(q), bias)

    @staticmethod
    def from_linear(linear: nn.Linear, fmt: str | Format, **quantize_options) -> QuantLinear:
        """Quantizes an ``nn.Linear`` on its own: RTN, or ``method="gptq", hessian=H`` and so on (see ``mxq_ext.quantizers``)."""
        return QuantLinear.from_qtensor(quantize_weight(linear.weight, fmt, **quantize_options), linear.bias)

    @staticmethod
    def empty(shape: tuple[int, int], fmt: str | Format | dict, bias: torch.Tensor | None = None) -> QuantLinear:
        """A place for a weight that comes later (``load_state_dict``); ``fmt`` is a format or a ``QTensor.meta()``. No memory is used."""
        meta = fmt if isinstance(fmt, dict) else shape_meta(shape, fmt)
        if tuple(meta["shape"]) != tuple(shape):
            raise ShapeError(f"QuantLinear of {shape[0]} x {shape[1]}", f"its description says {tuple(meta['shape'])}",
                             "pass the description of this weight")
        return QuantLinear(Held(meta), bias)

    @property
    def compute(self) -> str:
        """How the input is read, ``"a16"`` or ``"a8"``."""
        return self._compute

    @compute.setter
    def compute(self, compute: str) -> None:
        self._compute = compute
        note_change()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.held.packed
        if packed is None:
            self.held.loaded()  # raises
        return ops.linear(x, packed, self._buffers["bias"], self._compute)

    def extra_repr(self) -> str:
        bias = self._buffers["bias"]
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias is not None}, {self._describe()}"
        if self.held.packed is not None:
            usual = torch.float32 if self.held.device.type == "cpu" else torch.float16
            text += f", kernel={ops.explain(self.held.packed, 1, usual if bias is None else bias.dtype, self.compute)}"
        return text

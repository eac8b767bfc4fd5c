"""QuantEmbedding: an ``nn.Embedding`` for inference whose table stays packed; rows are dequantized as they are looked up."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..errors import ModelError
from ..formats import Format
from ..qtensor import QTensor
from .linear import Held, QuantModule, quantize_weight, shape_meta


class QuantEmbedding(QuantModule):
    """Token ids int64 [...] -> rows [..., embedding_dim] of a packed table [num_embeddings, embedding_dim].

    The output has the dtype that the model was last cast to (``model.to(torch.bfloat16)``); the packed table does not change with it. ``scale``: what the
    rows are multiplied by after the lookup, rounded to that dtype first (:func:`lookup_scale`).
    """

    mxq_kind = "embedding"

    def __init__(self, held: Held, dtype: torch.dtype = torch.float32, padding_idx: int | None = None, owner: bool = True,
                 scale: float = 1.0):
        super().__init__(held, owner)
        self.num_embeddings, self.embedding_dim = held.shape
        self.padding_idx, self.scale = padding_idx, scale
        # As floats, not as a buffer, which transformers' from_pretrained would leave without a value on its way over the meta device.
        self._scales = {d: torch.tensor(scale, dtype=d, device="cpu").item() for d in (torch.float32, torch.bfloat16, torch.float16)}
        # Follows every cast of the model as its weights would, which is how the output dtype is known.
        self.register_buffer("cast", torch.empty(0, dtype=dtype), persistent=False)

    @staticmethod
    def from_qtensor(q: QTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> QuantEmbedding:
        """From a quantized table [V, K]."""
        return QuantEmbedding(Held.of(q), dtype, padding_idx)

    @staticmethod
    def from_embedding(embedding: nn.Embedding, fmt: str | Format, **quantize_options) -> QuantEmbedding:
        """Quantizes an ``nn.Embedding`` on its own (RTN unless ``method`` says otherwise). Raises ModelError for one that does more than look up and scale."""
        scale = lookup_scale(embedding)
        if scale is None:
            raise ModelError(f"quantizing a {type(embedding).__qualname__}", "it computes more than a plain nn.Embedding does", "keep it in float")
        return QuantEmbedding(Held.of(quantize_weight(embedding.weight, fmt, **quantize_options)), embedding.weight.dtype, embedding.padding_idx, scale=scale)

    @staticmethod
    def empty(shape: tuple[int, int], fmt: str | Format | dict, dtype: torch.dtype = torch.float32) -> QuantEmbedding:
        """A place for a table that comes later (``load_state_dict``); ``fmt`` is a format or a ``QTensor.meta()``."""
        return QuantEmbedding(Held(fmt if isinstance(fmt, dict) else shape_meta(shape, fmt)), dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the output."""
        return self._buffers["cast"].dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        packed = self.held.packed
        if packed is None:
            self.held.loaded()  # raises
        rows = ops.embedding(ids, packed, self._buffers["cast"].dtype)
        return rows if self.scale == 1 else rows * self._scales[rows.dtype]

    def extra_repr(self) -> str:
        scale = "" if self.scale == 1 else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}, dtype={str(self.dtype).removeprefix('torch.')}{scale}"


def lookup_scale(embedding: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by: 1 for a plain ``nn.Embedding``, the ``scalar_embed_scale`` of Gemma's; None if it computes something else.

    That it does is seen by asking it for a few rows, but on the meta device, where there are none.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", None)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        return None
    weight = embedding.weight.detach()
    if not weight.is_meta:
        ids = torch.arange(min(4, len(weight)), device=weight.device)
        with torch.no_grad():
            rows = type(embedding).forward(embedding, ids)
        if not torch.allclose(rows, weight[ids] * torch.tensor(scale, dtype=weight.dtype), rtol=0, atol=0, equal_nan=True):
            return None
    return float(scale)

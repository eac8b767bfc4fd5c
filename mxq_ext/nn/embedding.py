"""QuantEmbedding: an ``nn.Embedding`` for inference whose table stays packed; rows are dequantized as they are looked up."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..formats import Format
from ..qtensor import QTensor
from .linear import Held, QuantModule, quantize_weight, shape_meta


class QuantEmbedding(QuantModule):
    """Token ids int64 [...] -> rows [..., embedding_dim] of a packed table [num_embeddings, embedding_dim].

    The output has the dtype that the model was last cast to (``model.to(torch.bfloat16)``); the packed table does not change with it.
    """

    mxq_kind = "embedding"

    def __init__(self, held: Held, dtype: torch.dtype = torch.float32, padding_idx: int | None = None, owner: bool = True):
        super().__init__(held, owner)
        self.num_embeddings, self.embedding_dim = held.shape
        self.padding_idx = padding_idx
        # Follows every cast of the model as its weights would, which is how the output dtype is known.
        self.register_buffer("cast", torch.empty(0, dtype=dtype), persistent=False)

    @staticmethod
    def from_qtensor(q: QTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> QuantEmbedding:
        """From a quantized table [V, K]."""
        return QuantEmbedding(Held.of(q), dtype, padding_idx)

    @staticmethod
    def from_embedding(embedding: nn.Embedding, fmt: str | Format, **quantize_options) -> QuantEmbedding:
        """Quantizes an ``nn.Embedding`` on its own (RTN unless ``method`` says otherwise)."""
        return QuantEmbedding.from_qtensor(quantize_weight(embedding.weight, fmt, **quantize_options), embedding.weight.dtype,
                                           embedding.padding_idx)

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
        return ops.embedding(ids, packed, self._buffers["cast"].dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}, dtype={str(self.dtype).removeprefix('torch.')}"

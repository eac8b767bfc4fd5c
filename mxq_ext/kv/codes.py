"""Codes of pages as tensors of torch, on whatever device they are: for what happens too rarely to have a kernel (docs/formats.md, "KV cache pages")."""

from __future__ import annotations

import torch

from .ops import PageFormat

_LANES, _STRIPE = 16, 32  # rows of a tile, columns of a stripe


def _bits_of_bytes(bits: int, per: int, device: torch.device) -> torch.Tensor:
    """int64 [per, 4, 1]: where in a word the codes of a quad lie; code 4 (per w + i) + k in word w at bit 8 k + bits i."""
    return 8 * torch.arange(4, device=device)[None, :, None] + bits * torch.arange(per, device=device)[:, None, None]


def codes_of(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored words as codes 0 .. 2^bits - 1: uint8 [heads, bytes] -> int64 [heads, tiles and stripes, 32 columns, 16 rows]; 2, 3, 4 and 8 bits."""
    words = packed.view(torch.int32).to(torch.int64).view(packed.shape[0], -1, bits, 1, 1, _LANES)  # of a stripe
    quads = ((words >> _bits_of_bytes(bits, 8 // bits, packed.device)) & ((1 << bits) - 1)).flatten(2, 3)
    if bits == 3:  # six quads are whole; of the others the outer words hold two bits each, the middle one the third
        high = _bits_of_bytes(1, 2, packed.device) + 6
        outer, middle = (words[:, :, ::2, 0] >> high[0]) & 3, (words[:, :, 1] >> high) & 1
        quads = torch.cat([quads, outer | middle << 2], 2)
    return (quads ^ (1 << (bits - 1))).reshape(packed.shape[0], -1, _STRIPE, _LANES)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`codes_of` for 2, 4 and 8 bits."""
    per = 8 // bits
    parts = (codes ^ (1 << (bits - 1))).view(codes.shape[0], -1, bits, per, 4, _LANES) << _bits_of_bytes(bits, per, codes.device)
    words = parts.sum((3, 4))  # their bits do not overlap
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(codes.shape[0], -1).view(torch.uint8)


def numbers(codes: torch.Tensor, params: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """What a page without a codebook stands for, float32 [heads, 64, D]: the bits of :func:`ops.unpack_page`. Nothing is checked."""
    heads, rows, columns = codes.shape[0], fmt.rows, fmt.columns
    if fmt.bits == 16:
        tiles = codes.view(torch.float16).view(heads, -1, columns, _LANES)
        out = tiles.transpose(2, 3).reshape(heads, -1, columns)[:, :rows].float()
    else:
        stripes = -(-columns // _STRIPE)
        q = codes_of(codes, fmt.bits).view(heads, -1, stripes, _STRIPE, _LANES).permute(0, 1, 4, 2, 3).reshape(heads, -1, stripes * _STRIPE)
        s, z = (params[:, :, i].float().repeat_interleave(fmt.group or rows, 1)[:, :rows] for i in range(2))
        out = s * q[:, :rows, :columns] + z  # the product is exact
    return out if fmt.side == "keys" else out.transpose(1, 2)

"""Canonical bit streams: integer codes <-> the packed bytes that are stored on disk.

One layout for every width (drawn in ``csrc/formats.h``): row after row, each row padded to a whole byte, least significant
bit first. The kernels repack it once at load into a layout of their own; the checkpoint never changes with the kernels.
"""

from __future__ import annotations

import torch

from .errors import ShapeError

_CHUNK = 1 << 22  # codes unpacked at a time: bounds the temporary to 8 * bits bytes each


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs integer codes [rows, cols] in 0 .. 2**bits-1 to uint8 [rows, ceil(cols*bits/8)].

    Raises ShapeError if a code is out of range.
    """
    rows, cols = codes.shape
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ShapeError(f"packing codes of {rows} x {cols} to {bits} bits",
                         f"codes must be in 0..{(1 << bits) - 1}, found {int(codes.min())}..{int(codes.max())}", "clamp the codes first")
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    out = torch.empty(rows, -(-cols * bits // 8), dtype=torch.uint8)
    step = max(1, _CHUNK // max(1, cols))
    place = torch.arange(bits, dtype=torch.uint8)
    weight = (1 << torch.arange(8)).to(torch.uint8)
    for r in range(0, rows, step):
        planes = (codes[r : r + step, :, None] >> place) & 1
        flat = planes.reshape(planes.shape[0], -1)
        flat = torch.nn.functional.pad(flat, (0, out.shape[1] * 8 - flat.shape[1]))
        out[r : r + step] = (flat.view(flat.shape[0], -1, 8) * weight).sum(-1, dtype=torch.uint8)
    return out


def unpack_codes(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`: uint8 [rows, ceil(cols*bits/8)] -> uint8 codes [rows, cols]."""
    rows = packed.shape[0]
    if packed.shape[1] != -(-cols * bits // 8):
        raise ShapeError(f"unpacking {tuple(packed.shape)} bytes to {cols} columns of {bits} bits",
                         f"a row must have {-(-cols * bits // 8)} bytes, it has {packed.shape[1]}", "check the format and the shape")
    if bits == 8:
        return packed.clone()
    out = torch.empty(rows, cols, dtype=torch.uint8)
    step = max(1, _CHUNK // max(1, cols))
    place = torch.arange(8, dtype=torch.uint8)
    weight = (1 << torch.arange(bits)).to(torch.uint8)
    for r in range(0, rows, step):
        flat = ((packed[r : r + step, :, None] >> place) & 1).reshape(min(step, rows - r), -1)[:, : cols * bits]
        out[r : r + step] = (flat.view(flat.shape[0], cols, bits) * weight).sum(-1, dtype=torch.uint8)
    return out

"""Pages at half their bits, from their codes alone: PM-KVQ's progressive shrink (Liu et al. 2025).

With codes q of 2c bits, ``number = s q + z``, the nearest code of c bits for the step (2^c + 1) s is, in integers::

    q' = ((q + 2^(c-1)) (2^(2c) - 2^c + 1)) >> 3c  ~  round(q / (2^c + 1)),    s' = (2^c + 1) s,    z' = z

since 2^(2c) - 1 = (2^c + 1)(2^c - 1): the largest code stands for the largest number again. Nothing is dequantized. Pages of 16 bits hold numbers and no codes;
they are packed to 8 bits like any others.
"""

from __future__ import annotations

import dataclasses

import torch

from ..errors import FormatError
from . import device, ops
from .codes import codes_of, packed

HALF = {16: 8, 8: 4, 4: 2}  #: bits -> what a shrink makes of them
_LARGEST = 65504.0  # of fp16


def shrunk(fmt: ops.PageFormat) -> ops.PageFormat:
    """The format at half the bits. Raises FormatError for 2 and 3 bits, which have no half, and for pages with outliers."""
    if fmt.outliers:
        raise FormatError(f"shrinking {fmt.bits}-bit {fmt.side} with {fmt.outliers} outliers", "what outliers add belongs to the codes as they are",
                          "leave outliers out")
    if fmt.bits not in HALF:
        raise FormatError(f"shrinking {fmt.bits}-bit {fmt.side}", f"pages of {', '.join(map(str, HALF))} bits can be halved", "begin with one of those")
    return dataclasses.replace(fmt, bits=HALF[fmt.bits])


def shrink_codes(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 .. 2^bits - 1 (int64) of ``bits`` = 2c as codes of c bits, by the formula above."""
    c = bits // 2
    return ((q + (1 << (c - 1))) * ((1 << 2 * c) - (1 << c) + 1)) >> 3 * c


def shrink_page(codes: torch.Tensor, params: torch.Tensor, fmt: ops.PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, params) of a page in ``shrunk(fmt)``, freshly allocated on its device. A scale beyond fp16 becomes the largest fp16. Padding stays stored code 0.

    Raises FormatError as :func:`shrunk` does.
    """
    half = shrunk(fmt)
    if fmt.bits == 16:
        page = half.empty_page(codes.shape[0], codes.device)
        device.pack_page(device.unpack_page(codes, params, fmt), half, *page)
        return page
    small = shrink_codes(codes_of(codes, fmt.bits), fmt.bits)
    if pad := -fmt.columns % 32:  # the last stripe of each tile
        stripes = (fmt.columns + pad) // 32
        small.view(codes.shape[0], -1, stripes, 32, 16)[:, :, -1, 32 - pad :] = 1 << (half.bits - 1)
    new = params.clone()
    new[:, :, 0] = (params[:, :, 0].float() * (2 ** half.bits + 1)).clamp(max=_LARGEST).half()
    return packed(small, half.bits), new

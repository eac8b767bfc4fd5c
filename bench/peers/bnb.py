"""bitsandbytes' nf4 layer. Only ``Linear4bit.eval()`` without gradients packs for its AVX-512 kernel; the plain function is 40 times slower.

At import it says that it would rather load a kernel with the package ``kernels``, which downloads it: what is timed is what the wheel holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit

from . import BF16, Candidate, Case, eager


def candidates(case: Case) -> Iterator[Candidate]:
    if case.n % 32 or case.k % 64:
        return  # what that kernel takes
    layer = bitsandbytes.nn.Linear4bit(case.k, case.n, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.weight = bitsandbytes.nn.Params4bit(case.weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").eval()  # quantizes; the first call repacks
    state = layer.weight.quant_state
    dense = dequantize_4bit(layer.weight.data, state)[case.sample].float()
    yield Candidate(f"bitsandbytes nf4 g{state.blocksize}", 4, layer.weight.nbytes + state.absmax.nbytes, BF16, dense,
                    eager(lambda: copy.deepcopy(layer), lambda x, w: w(x)), torch.bfloat16)

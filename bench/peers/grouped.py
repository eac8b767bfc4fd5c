"""Random codes with a scale for each group of columns: what graph libraries take as constants."""

from __future__ import annotations

import numpy as np
import torch

from . import Case


class Grouped:
    """Codes [n, k] of ``bits`` bits and float16 scales [n, k / group] of a weight ``levels[code] * scale``.

    Without ``levels`` they are ``code - 2^(bits-1)``.
    """

    def __init__(self, case: Case, bits: int, levels: np.ndarray | None = None):
        rng = np.random.default_rng(bits)
        self.n, self.k, self.bits, self.group = case.n, case.k, bits, case.group
        self.middle, self.mark = 1 << (bits - 1), case.mark
        codes = rng.integers(0, 1 << bits, (case.n, case.k), dtype=np.uint8)
        self.scales = (rng.random((case.n, case.k // self.group), dtype=np.float32) * 0.01 + 0.001).astype(np.float16)
        parts = 8 // bits
        self.codes = sum(codes[:, i::parts] << (bits * i) for i in range(parts)).astype(np.uint8)  # first code in the lowest bits
        levels = np.arange(1 << bits, dtype=np.float32) - self.middle if levels is None else levels
        rows = case.sample.numpy()
        self.dense = torch.from_numpy(levels[codes[rows]] * np.repeat(self.scales[rows].astype(np.float32), self.group, 1))

    def copy(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(codes, scales) with the number in row ``case.mark``: libraries keep equal constants only once, in the cache then."""
        codes, scales = self.codes.copy(), self.scales.copy()
        codes[self.mark, :4] = np.frombuffer(np.int32(number).tobytes(), np.uint8)
        scales.view(np.uint16)[self.mark, 0] = number + 1
        return codes, scales

"""What a packed KV cache means, read from docs/formats.md alone: numpy, float64 wherever the document does not say float32.

Deliberately naive: it shares no line with the C++ sources, so that a mistake in one of them shows up as a difference. ``fmt`` is anything
with ``side``, ``bits``, ``group``, ``head_dim``, ``levels`` and ``outliers``, such as ``ops.PageFormat``.
"""

from __future__ import annotations

import numpy as np

PAGE = 64


def places(bits: int) -> list[list[tuple[int, int, int, int]]]:
    """Where the 32 codes of a lane of a stripe lie: for each code its parts (word, bit of the word, first bit of the code, count of bits)."""
    out = []
    for code in range(32):
        i, k = divmod(code, 4)
        if bits == 3 and i == 6:
            out.append([(0, 8 * k + 6, 0, 2), (1, 8 * k + 6, 2, 1)])
        elif bits == 3 and i == 7:
            out.append([(2, 8 * k + 6, 0, 2), (1, 8 * k + 7, 2, 1)])
        else:
            per = 8 // bits  # quads of a word: 4, 2, 2, 1
            out.append([(i // per, 8 * k + bits * (i % per), 0, bits)])
    return out


def _geometry(fmt) -> tuple[int, int, int, int]:
    """(rows, columns, rows of a group, groups)"""
    rows, columns = (PAGE, fmt.head_dim) if fmt.side == "keys" else (fmt.head_dim, PAGE)
    group = min(fmt.group or rows, rows)
    return rows, columns, group, -(-rows // group)


def outliers(matrix: np.ndarray, fmt) -> np.ndarray:
    """Which numbers of a page [rows, columns] float32 are outliers: bool [rows, columns]."""
    rows, columns, group, groups = _geometry(fmt)
    distance = np.zeros(matrix.shape, np.float32)
    for g in range(groups):
        part = slice(g * group, min((g + 1) * group, rows))
        numbers = matrix[part]
        fits = (np.abs(numbers) <= 16384).all(axis=0)  # not a NaN
        total = np.zeros(columns)
        for row in np.where(fits, numbers, 0):
            total += row  # float64, in order
        mean = (total / len(numbers)).astype(np.float32)
        distance[part] = np.where(fits, np.abs(np.where(fits, numbers, 0) - mean), 0)
    by_token = distance if fmt.side == "keys" else distance.T  # [64, channels]: the order of indices
    found = np.zeros(by_token.shape, bool)
    for i in np.argsort(-by_token.ravel(), kind="stable")[: fmt.outliers]:
        found.flat[i] = by_token.flat[i] > 0
    return found if fmt.side == "keys" else found.T


def quantize(matrix: np.ndarray, bits: int, levels: tuple[float, ...] | None = None,
             apart: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One group [rows, columns] float32 as (codes 0 .. 2^bits - 1, scales fp16 [columns], zeros fp16 [columns]); ``levels``: a codebook; ``apart``: numbers
    that do not count for scale and zero, bool [rows, columns]."""
    top = np.float32(2**bits - 1)
    bad = ~np.isfinite(matrix).all(axis=0)
    number = np.where(bad, np.float32(0), matrix)
    apart = np.zeros(matrix.shape, bool) if apart is None else apart
    none = apart.all(axis=0)
    smallest = np.where(none, 0, np.where(apart, np.inf, number).min(axis=0)).astype(np.float32) + np.float32(0)  # -0 + 0 = 0
    largest = np.where(none, 0, np.where(apart, -np.inf, number).max(axis=0)).astype(np.float32) + np.float32(0)
    with np.errstate(over="ignore", divide="ignore"):
        half = np.float32(0.5)
        step, zero = ((largest - smallest) / top, smallest) if levels is None else (half * largest - half * smallest, half * largest + half * smallest)
        s = np.minimum(step, np.float32(65504)).astype(np.float16)
        z = np.clip(zero, np.float32(-65504), np.float32(65504)).astype(np.float16)
        inverse = np.where(s == 0, np.float32(0), np.float32(1) / s.astype(np.float32))
        steps = (number - z.astype(np.float32)) * inverse
        if levels is None:
            codes = np.rint(np.minimum(np.maximum(steps, np.float32(0)), top))
        else:
            level = np.asarray(levels, np.float32)
            codes = np.where(bad, 0, (steps[None] > (half * (level[1:] + level[:-1]))[:, None, None]).sum(0))
    nan = np.array(0x7E00, np.uint16).view(np.float16)
    return codes.astype(np.uint32), np.where(bad, nan, s), np.where(bad, nan, z)


def pack(x: np.ndarray, fmt) -> tuple[bytes, np.ndarray]:
    """One head's page, x [64, D] float32: (the bytes of its codes and outliers, params fp16 [groups, 2, columns])."""
    rows, columns, group, groups = _geometry(fmt)
    matrix = x.astype(np.float32) if fmt.side == "keys" else x.astype(np.float32).T
    if fmt.bits == 16:
        matrix = np.where(np.isfinite(matrix), np.clip(matrix, np.float32(-65504), np.float32(65504)), matrix)
        halves = np.where(np.isnan(matrix), np.array(0x7E00, np.uint16).view(np.float16), matrix.astype(np.float16)).astype("<f2")
        return halves.reshape(rows // 16, 16, columns).transpose(0, 2, 1).tobytes(), np.empty((0, 2, columns), np.float16)
    padded = -(-columns // 32) * 32
    stored = np.zeros((rows, padded), np.uint32)
    params = np.empty((groups, 2, columns), np.float16)
    apart = outliers(matrix, fmt)
    for g in range(groups):
        part = slice(g * group, min((g + 1) * group, rows))
        codes, params[g, 0], params[g, 1] = quantize(matrix[part], fmt.bits, fmt.levels, apart[part])
        stored[part, :columns] = codes ^ (1 << (fmt.bits - 1))
    words = np.zeros((rows // 16, padded // 32, fmt.bits, 16), "<u4")
    for tile in range(rows // 16):
        for stripe in range(padded // 32):
            for code, parts in enumerate(places(fmt.bits)):
                lanes = stored[16 * tile : 16 * tile + 16, 32 * stripe + code]
                for word, bit, first, count in parts:
                    words[tile, stripe, word] |= (lanes >> first & ((1 << count) - 1)) << bit
    if not fmt.outliers:
        return words.tobytes(), params
    rest = matrix - _read(stored[:, :columns], params, fmt).astype(np.float32)
    index, delta = np.zeros(fmt.outliers, "<u2"), np.zeros(fmt.outliers, "<f2")
    where = zip(*apart.nonzero(), strict=True)
    found = sorted((512 * row + col if fmt.side == "keys" else 512 * col + row, rest[row, col] + np.float32(0)) for row, col in where)
    for i, (at, missing) in enumerate(found, fmt.outliers - len(found)):
        index[i], delta[i] = at, missing
    return words.tobytes() + index.tobytes() + delta.tobytes(), params


def _read(stored: np.ndarray, params: np.ndarray, fmt) -> np.ndarray:
    """What stored codes [rows, columns] stand for, float64, nothing rounded."""
    q = stored ^ (1 << (fmt.bits - 1))
    q = q.astype(np.float64) if fmt.levels is None else np.asarray(fmt.levels, np.float64)[q]
    of_row = np.arange(len(stored)) // _geometry(fmt)[2]
    return params[of_row, 0].astype(np.float64) * q + params[of_row, 1].astype(np.float64)


def unpack(codes: bytes, params: np.ndarray, fmt) -> np.ndarray:
    """What one head's page stands for, float64 [64, D], nothing rounded but what an outlier's delta is added to, which is float32."""
    rows, columns, _, _ = _geometry(fmt)
    sparse = codes[len(codes) - 4 * fmt.outliers :]
    codes = codes[: len(codes) - len(sparse)]
    if fmt.bits == 16:
        matrix = np.frombuffer(codes, "<f2").reshape(rows // 16, columns, 16).transpose(0, 2, 1).reshape(rows, columns).astype(np.float64)
        return matrix if fmt.side == "keys" else matrix.T
    words = np.frombuffer(codes, "<u4").reshape(rows // 16, -1, fmt.bits, 16)
    stored = np.zeros((rows, words.shape[1] * 32), np.uint32)
    for tile in range(rows // 16):
        for stripe in range(words.shape[1]):
            for code, parts in enumerate(places(fmt.bits)):
                for word, bit, first, count in parts:
                    stored[16 * tile : 16 * tile + 16, 32 * stripe + code] |= (words[tile, stripe, word] >> bit & ((1 << count) - 1)) << first
    matrix = _read(stored[:, :columns], params, fmt)
    x = matrix if fmt.side == "keys" else matrix.T
    half = len(sparse) // 2
    for at, delta in zip(np.frombuffer(sparse[:half], "<u2"), np.frombuffer(sparse[half:], "<f2"), strict=True):
        if delta:
            x[at // 512, at % 512] = float(np.float32(x[at // 512, at % 512])) + float(delta)
    return x


def turn(x: np.ndarray, start: int, frequencies: np.ndarray) -> np.ndarray:
    """x [..., tokens, D] at positions ``start`` on, each pair of channels (c, c + half) turned by position * frequencies[c], as complex numbers."""
    half = len(frequencies)
    angles = (start + np.arange(x.shape[-2]))[:, None] * np.asarray(frequencies, np.float64)
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, causal: bool = True, window: int = 0, softcap: float = 0.0,
           mask: np.ndarray | None = None) -> np.ndarray:
    """softmax(q k^T) v in float64: q [B, Hq, Tq, D], k and v [B, Hkv, N, D], mask bool [B, N] or [B, Tq, N]. Rows that see nothing are 0."""
    batch, hq, tq, d = q.shape
    n = k.shape[2]
    k, v = (np.repeat(t.astype(np.float64), hq // k.shape[1], axis=1) for t in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) * (d**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    position, key = n - tq + np.arange(tq)[:, None], np.arange(n)[None, :]
    seen = np.ones((batch, 1, tq, n), bool)
    if causal:
        seen &= key <= position
    if window:
        seen &= key > position - window
    if mask is not None:
        seen &= (mask[:, None, :] if mask.ndim == 2 else mask)[:, None]
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = p.sum(axis=-1, keepdims=True)
    return (p @ v) / np.where(total == 0, 1.0, total)

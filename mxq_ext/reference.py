"""What the formats mean, read from the document alone: Python integers and numpy float64, no tensor library and no native code.

Deliberately naive. It shares no line with ``pack.py``, ``qtensor.py`` or the C++ sources, so that a mistake in one of them shows up as a
difference. Small weights only.
"""

from __future__ import annotations

import numpy as np

from .formats import NF4_LEVELS, Format
from .qtensor import QTensor, Rectangle


def read_stream(row: bytes, bits: int, count: int) -> list[int]:
    """The first ``count`` codes of a bit stream: the row is one little-endian number, code j its bits [j*bits, (j+1)*bits)."""
    number = int.from_bytes(row, "little")
    return [number >> (j * bits) & ((1 << bits) - 1) for j in range(count)]


def write_stream(codes: list[int], bits: int) -> bytes:
    """Inverse of :func:`read_stream`: whole bytes, the bits behind the last code are zero."""
    number = sum(int(c) << (j * bits) for j, c in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


def read_half(data: bytes, bf16: bool = False) -> float:
    """Two little-endian bytes as IEEE half precision, or as bfloat16 (the upper half of a float32)."""
    if bf16:
        return float(np.frombuffer(b"\0\0" + data, "<f4")[0])
    return float(np.frombuffer(data, "<f2")[0])


def _rows(tensor) -> list[bytes]:
    """Raw bytes of each row of a stored tensor."""
    import torch

    flat = tensor.contiguous().view(torch.uint8).numpy()
    return [flat[i].tobytes() for i in range(flat.shape[0])]


def dequantize_rectangle(r: Rectangle) -> np.ndarray:
    """float64 [rows, cols], by the table of formulas in docs/formats.md. Products and sums are not rounded."""
    f: Format = r.format
    rows, cols = r.shape
    out = np.zeros((rows, cols))
    if f.kind == "float":
        for i, row in enumerate(_rows(r.tensors["values"])):
            out[i] = [read_half(row[2 * j : 2 * j + 2]) for j in range(cols)]
        return out
    stored = {name: _rows(t) for name, t in r.tensors.items()}
    groups = f.groups(cols)
    for i in range(rows):
        codes = read_stream(stored["codes"][i], f.bits, cols)
        if f.kind == "lut":
            table = [read_half(stored["table"][i][2 * q : 2 * q + 2]) for q in range(2**f.bits)]
            out[i] = [table[q] for q in codes]
            continue
        scales = _constants(stored, "scale", i, groups, f)
        if f.zero == "int":
            zeros = read_stream(stored["zeros"][i], f.bits, groups)
        elif f.zero == "float":
            zeros = _constants(stored, "zero", i, groups, f)
        else:
            zeros = [2 ** (f.bits - 1)] * groups
        for j, q in enumerate(codes):
            g = j // f.group if f.group else 0
            if f.kind == "nf":
                out[i, j] = scales[g] * NF4_LEVELS[q]
            elif f.zero == "float":
                out[i, j] = scales[g] * q + zeros[g]
            else:
                out[i, j] = scales[g] * (q - zeros[g])
    return out


def _constants(stored: dict[str, list[bytes]], what: str, i: int, groups: int, f: Format) -> list[float]:
    """Scales or float zeros (``what``: "scale", "zero") of row i: stored as they are, or nested, as codes of 3 bits in a range for each 16 groups."""
    bf16, row = f.scale_dtype == "bf16", stored[f"{what}s"][i]
    if not f.nested:
        return [read_half(row[2 * g : 2 * g + 2], bf16) for g in range(groups)]
    steps, starts = ([read_half(stored[f"{what}_{part}"][i][2 * s : 2 * s + 2]) for s in range(-(-groups // 16))] for part in ("steps", "starts"))
    return [float(np.float16(np.float32(steps[g // 16] * code + starts[g // 16]))) for g, code in enumerate(read_stream(row, 3, groups))]


def dequantize(q: QTensor, rectangle=dequantize_rectangle) -> np.ndarray:
    """The whole weight, float64 [N, K]: rectangles (read by ``rectangle``), then permutations, then the sparse part is added."""
    n, k = q.shape
    stored = np.zeros((n, k))
    for r in q.rectangles:
        stored[r.r0 : r.r1, r.c0 : r.c1] = rectangle(r)
    rows = range(n) if q.perm_rows is None else q.perm_rows.tolist()
    cols = range(k) if q.perm_cols is None else q.perm_cols.tolist()
    out = np.zeros((n, k))
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            out[row, col] = stored[i, j]
    if q.sparse is not None:
        start, columns, values = q.sparse.rowptr.tolist(), q.sparse.cols.tolist(), _rows(q.sparse.values[:, None])
        for i in range(n):
            for e in range(start[i], start[i + 1]):
                out[i, columns[e]] += read_half(values[e])
    return out


def round_group(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """A group of x [M, columns] float32 as integers -127..127 and their unit [M, 1], by docs/formats.md: float32 arithmetic, ties to even."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    tiny = largest < np.float32(2.0**-100)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(tiny, np.float32(0), np.float32(127) / largest)
        return np.rint(x * inverse), np.where(tiny, np.float32(0), largest / np.float32(127))


def _rounded_weight(r: Rectangle) -> np.ndarray:
    """float64 [rows, cols]: the rectangle as the integer kernels know it, nf levels and lut tables in steps of 1/127 of the largest."""
    if r.format.kind == "nf":
        levels = [float(np.rint(level * 127) / 127) for level in NF4_LEVELS]
        scales = _rows(r.tensors["scales"])
        return np.array([[read_half(scales[i][2 * g : 2 * g + 2], r.format.scale_dtype == "bf16") * levels[c]
                          for j, c in enumerate(read_stream(row, 4, r.shape[1])) for g in [j // r.format.group if r.format.group else 0]]
                         for i, row in enumerate(_rows(r.tensors["codes"]))])
    if r.format.kind == "lut":
        w, tables = dequantize_rectangle(r), r.tensors["table"].float().numpy()
        largest = np.abs(tables).max(axis=1, keepdims=True)
        return np.rint(w.astype(np.float32) * (np.float32(127) / largest)).astype(np.float64) * (largest / np.float32(127))
    return dequantize_rectangle(r)


def linear(x, q: QTensor, bias=None, compute: str = "a16") -> np.ndarray:
    """``x W^T + bias`` in float64; x [M, K] is a float tensor of any type. ``"a8"``: x and tables rounded as docs/formats.md says."""
    bias = 0 if bias is None else bias.double().numpy()
    if compute == "a16":
        return x.double().numpy() @ dequantize(q).T + bias
    y = x.double().numpy() @ dequantize(q, lambda r: dequantize_rectangle(r) if r.format.kind == "float" else 0.0).T + bias
    rows = np.arange(q.shape[0]) if q.perm_rows is None else q.perm_rows.numpy()
    single = x.float().numpy()
    stored = single if q.perm_cols is None else single[:, q.perm_cols.numpy()]
    for r in (r for r in q.rectangles if r.format.kind != "float"):
        w, width = _rounded_weight(r), r.format.group or (256 if r.format.kind == "uniform" and r.format.bits == 8 else 128)
        for c in range(r.c0, r.c1, width):
            end = min(r.c1, c + width)
            codes, unit = round_group(stored[:, c:end])
            y[:, rows[r.r0 : r.r1]] += unit.astype(np.float64) * (codes.astype(np.float64) @ w[:, c - r.c0 : end - r.c0].T)
    return y

"""The CUDA layout written down a second time, in numpy and from the drawing in docs/formats.md alone: what the packer is held to."""

from __future__ import annotations

import numpy as np

from mxq_ext.formats import Format
from mxq_ext.qtensor import QTensor, Rectangle


def place_uniform(bits: int, s: int, i: int, e: int) -> list[tuple[int, int]]:
    """(word, bit) of every bit of the code of step s, register a_i, element e; least significant first."""
    if bits == 1:
        word, p = 0, 4 * s + i
    elif bits == 2:
        word, p = i // 2, 4 * s + 2 * (i % 2)
    elif bits == 4:
        word, p = s, 4 * i
    elif bits == 8:
        word, p = 2 * s + i // 2, 8 * (i % 2)
    elif bits == 16:
        word, p = 4 * s + i, 0
    elif bits == 5 and i < 3:
        word, p = s, (0, 5, 10)[i]
    elif bits == 5:
        if s == 3:
            return [(b, 15 + 16 * e) for b in range(5)]
        word, p = 4, 5 * s
    elif bits == 6:
        if s == 3:
            low = 6 + 2 * (i % 2) + 16 * e
            return [(4 + i // 2, low), (4 + i // 2, low + 1), *((i, 6 + 16 * e + b) for b in range(4))]
        word, p = 2 * s + i // 2, (0, 10)[i % 2]
    elif s < 3:
        word, p = s, (0, 3, 9, 12)[i]
    elif i < 3:
        word, p = i, 6
    else:
        return [(b, 15 + 16 * e) for b in range(3)]
    return [(word, p + 16 * e + b) for b in range(bits)]


def place_table(bits: int, s: int, r: int, j: int) -> list[tuple[int, int]]:
    """(word, bit) of every bit of the code of step s, row g + 8r, column k + j."""
    if bits == 2:
        return [(s // 2, 8 * j + 4 * (s % 2) + 2 * r + b) for b in range(2)]
    if bits == 3:
        low = 16 * r + 4 * j + 2 * (s % 2)
        return [(s // 2, low), (s // 2, low + 1), (2, 16 * r + 4 * j + s)]
    return [(s, 16 * r + 4 * j + b) for b in range(4)]


def pack_tile(codes: np.ndarray, bits: int, table: bool) -> np.ndarray:
    """codes [16, 64] -> words uint32 [bits, 32 lanes]."""
    words = np.zeros((bits, 32), np.uint64)
    for g in range(8):
        for t in range(4):
            for h in range(2):
                for u in range(2):
                    k = 32 * h + 8 * t + 4 * u
                    for r in range(2):
                        for j in range(4):
                            s = 2 * h + u
                            bits_at = place_table(bits, s, r, j) if table else place_uniform(bits, s, r + 2 * (j // 2), j % 2)
                            for b, (word, bit) in enumerate(bits_at):
                                words[word, 4 * g + t] |= np.uint64(int(codes[g + 8 * r, k + j]) >> b & 1) << np.uint64(bit)
    return words.astype(np.uint32)


def pack_row_block(codes: np.ndarray, bits: int, table: bool) -> bytes:
    """codes [16, 64 * tiles] -> the bytes of a row block."""
    tiles = [pack_tile(codes[:, i : i + 64], bits, table) for i in range(0, codes.shape[1], 64)]
    per, out = {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 2, 8: 2, 16: 1}[bits], b""
    for first in range(0, len(tiles), per):
        words = np.concatenate(tiles[first : first + per])  # [words, 32]
        full = len(tiles) - first >= per
        out += (words.reshape(-1, 4, 32).transpose(0, 2, 1) if full else words).tobytes()
    return out


def pair_order(rows: np.ndarray) -> np.ndarray:
    """[16, ...] -> rows in the order 0, 8, 1, 9, ..."""
    return rows.reshape(2, 8, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _raw(tensor) -> np.ndarray:
    import torch

    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def pack_piece(r: Rectangle, r0: int, r1: int) -> dict[str, bytes]:
    """Rows r0:r1 of the weight (all of the rectangle's columns): ``codes``, ``scales`` and ``zeros`` of all row blocks."""
    f: Format = r.format
    cols, rows = r.c1 - r.c0, slice(r0 - r.r0, r1 - r.r0)
    blocks, tiles = -(-(r1 - r0) // 16), -(-cols // 64)
    codes = np.zeros((blocks * 16, tiles * 64), np.uint16)
    codes[: r1 - r0, :cols] = _raw(r.tensors["values"])[rows] if f.kind == "float" else r.codes().numpy()[rows]
    out = {"codes": b"".join(pack_row_block(codes[16 * b : 16 * b + 16], f.bits, f.kind in ("nf", "lut")) for b in range(blocks)), "scales": b"", "zeros": b""}

    def padded(values: np.ndarray, columns: int) -> np.ndarray:  # [blocks, 16, columns]
        full = np.zeros((blocks * 16, columns), values.dtype)
        full[: r1 - r0, : values.shape[1]] = values
        return full.reshape(blocks, 16, columns)

    def grouped(values: np.ndarray, groups: int) -> bytes:  # [blocks][groups][16 in pair order]
        return np.ascontiguousarray(np.stack([pair_order(block).T for block in padded(values, groups)])).tobytes()

    if f.kind == "lut":
        out["scales"] = padded(_raw(r.tensors["table"])[rows], 2**f.bits).tobytes()
    elif f.kind != "float":
        groups = -(-tiles * 64 // f.group) if f.group else 1
        out["scales"] = grouped(_raw(r.tensors["scales"])[rows], groups)
        if f.zero == "int":
            out["zeros"] = grouped(r.zeros().numpy()[rows].astype(np.uint8), groups)
        elif f.zero == "float":
            out["zeros"] = grouped(_raw(r.tensors["zeros"])[rows], groups)
    return out


def bands(q: QTensor) -> list[tuple[int, int, list[int]]]:
    """(r0, r1, rectangles) between neighbouring cuts."""
    cuts = sorted({0, q.shape[0], *(r.r0 for r in q.rectangles), *(r.r1 for r in q.rectangles)})
    return [(a, b, [i for i, r in enumerate(q.rectangles) if r.r0 <= a and b <= r.r1]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def pack(q: QTensor) -> tuple[bytes, list[tuple[int, dict[str, bytes]]]]:
    """(bytes from the permutations on, [(rectangle, its parts)]): the whole blob behind the head, each part padded to 128 bytes."""
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 128)

    def inverse(p):
        return np.argsort(p.numpy()).astype(np.int32).tobytes()

    parts = []
    if q.perm_rows is not None:
        parts += [q.perm_rows.numpy().tobytes(), inverse(q.perm_rows)]
    if q.perm_cols is not None:
        parts += [q.perm_cols.numpy().tobytes(), inverse(q.perm_cols)]
    if q.sparse is not None:
        parts += [q.sparse.rowptr.numpy().tobytes(), q.sparse.cols.numpy().tobytes(), _raw(q.sparse.values).tobytes()]
    pieces = [(i, pack_piece(q.rectangles[i], r0, r1)) for r0, r1, rects in bands(q) for i in rects]
    parts += [p[name] for _, p in pieces for name in ("codes", "scales", "zeros")]
    return b"".join(map(padded, parts)), pieces


def head_nbytes(q: QTensor) -> int:
    """Bytes of the head: sizes of the structs of csrc/cuda_layout.h times their numbers, each padded to 128."""
    every = bands(q)
    return sum(-(-size // 128) * 128 for size in (136, 16 * len(every), 80 * sum(len(r) for _, _, r in every), 24 * len(q.rectangles)))

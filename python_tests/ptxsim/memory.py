"""The address spaces of a kernel. Every access is checked: inside one array, inside one shared variable, aligned to its size."""

import numpy as np

from .parse import SIZES, PtxError

UINT = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
#: Where generic addresses show the other spaces; no user address is that high.
WINDOWS = {"shared": 1 << 62, "local": (1 << 62) + (1 << 40), "param": (1 << 62) + (1 << 41)}
GAP = 256  # bytes between shared variables, and before the first


class Region:
    """Bytes that all threads see, at an address."""

    def __init__(self, address: int, data: np.ndarray, what: str, writable: bool = True):
        self.address, self.bytes, self.what, self.writable = address, data, what, writable
        self.views = {size: data[: len(data) // size * size].view(UINT[size]) if address % size == 0 else None for size in UINT}


class Memory:
    """Global memory at the real addresses of its arrays, shared memory, parameters, and local memory of each thread."""

    def __init__(self, threads: int):
        self.threads = threads
        self.lanes = np.arange(threads)
        self.regions: list[Region] = []
        self.starts = np.zeros(0, np.uint64)
        self.params = np.zeros(0, np.uint8)
        self.shared = np.zeros(0, np.uint8)
        self.valid = np.zeros(0, bool)
        self.local = np.zeros((threads, 0), np.uint8)

    def add(self, address: int, data: np.ndarray, what: str, writable: bool = True):
        for r in self.regions:
            if r.address < address + len(data) and address < r.address + len(r.bytes):
                if r.address <= address and address + len(data) <= r.address + len(r.bytes):
                    return
                raise PtxError(f"{what} overlaps {r.what}")
        self.regions.append(Region(address, data, what, writable))
        self.regions.sort(key=lambda r: r.address)
        self.starts = np.array([r.address for r in self.regions], np.uint64)

    # ---- one access of all lanes of a mask: `count` elements of `size` bytes

    def load(self, space, address, size, count, mask):
        """List of arrays [threads] of unsigned integers; lanes outside of the mask have zeros."""
        on = self.lanes[mask]
        where = address[mask]
        out = [np.zeros(self.threads, UINT[size]) for _ in range(count)]
        if not len(on):
            return out
        for part, place, data, offset in self.places(space, where, size * count, False):
            lanes = on if part is None else on[part]
            for i in range(count):
                out[i][lanes] = self.gather(data, place, lanes, offset + i * size, size)
        return out

    def load_rows(self, address, mask):
        """[threads, 8] halves: the 16 bytes of shared memory at each lane's address."""
        out = np.zeros((self.threads, 8), np.uint16)
        on = self.lanes[mask]
        if len(on):
            for _, _, data, offset in self.places("shared", address[mask], 16, False):
                out[on] = data.view(np.uint16)[offset[:, None] // 2 + np.arange(8)]
        return out

    def store(self, space, address, size, values, mask):
        on = self.lanes[mask]
        if not len(on):
            return
        for part, place, data, offset in self.places(space, address[mask], size * len(values), True):
            lanes = on if part is None else on[part]
            for i, value in enumerate(values):
                self.scatter(data, place, lanes, offset + i * size, size, value[lanes])

    def places(self, space, where, size, writing):
        """(lanes of `where` or None for all, kind, data, offsets): resolved and checked, one entry for each region touched."""
        if space == "generic":
            if (where < np.uint64(WINDOWS["shared"])).all():
                space = "global"
            else:
                names = sorted(WINDOWS, key=WINDOWS.get)
                index = np.searchsorted([WINDOWS[n] for n in names], where.astype(np.int64), side="right") - 1
                if (index < 0).any():
                    raise PtxError("one access mixes global addresses with others")
                for i in np.unique(index):
                    part = np.flatnonzero(index == i)
                    for _, place, data, offset in self.places(names[i], where[part] - np.uint64(WINDOWS[names[i]]), size, writing):
                        yield part, place, data, offset
                return
        unaligned = where % np.uint64(size) != 0
        if unaligned.any():
            raise PtxError(f"address {int(where[unaligned][0]):#x} of {size} bytes in {space} memory is not aligned")
        if space in ("global", "const"):
            index = np.searchsorted(self.starts, where, side="right") - 1
            for i in np.unique(index):
                part = None if (index == i).all() else np.flatnonzero(index == i)
                some = where if part is None else where[part]
                if i < 0:
                    raise PtxError(f"address {int(some[0]):#x} is in no array")
                r = self.regions[i]
                offset = (some - np.uint64(r.address)).astype(np.int64)
                if (offset + size > len(r.bytes)).any():
                    worst = int(offset.max())
                    raise PtxError(f"{size} bytes at offset {worst} of {r.what}, which has {len(r.bytes)}, or in no array at all")
                if writing and not r.writable:
                    raise PtxError(f"writes to {r.what}, which cannot be written")
                yield part, "region", r, offset
            return
        offset = where.astype(np.int64)
        if space == "shared":
            end = offset + size - 1
            bad = (offset < 0) | (end >= len(self.valid))
            bad = bad | ~(self.valid[np.where(bad, 0, offset)] & self.valid[np.where(bad, 0, end)]) if len(self.valid) else np.ones(len(offset), bool)
            if bad.any():
                raise PtxError(f"{size} bytes at shared address {int(offset[bad][0])}, which belong to no shared variable")
            yield None, "plain", self.shared, offset
        elif space == "local":
            if ((offset < 0) | (offset + size > self.local.shape[1])).any():
                raise PtxError(f"{size} bytes at local address {int(offset.max())} of {self.local.shape[1]}")
            yield None, "local", self.local, offset
        elif space == "param":
            if writing or ((offset < 0) | (offset + size > len(self.params))).any():
                raise PtxError(f"{size} bytes at offset {int(offset.max())} of {len(self.params)} bytes of parameters")
            yield None, "plain", self.params, offset
        else:
            raise PtxError(f"memory space {space!r} is not known")

    @staticmethod
    def gather(data, place, lanes, offset, size):
        if place == "region":
            if data.views[size] is not None:
                return data.views[size][offset // size]
            return data.bytes[offset[:, None] + np.arange(size)].view(UINT[size])[:, 0]
        if place == "local":
            return data[lanes[:, None], offset[:, None] + np.arange(size)].view(UINT[size])[:, 0]
        return data.view(UINT[size])[offset // size]

    @staticmethod
    def scatter(data, place, lanes, offset, size, value):
        if place == "region" and data.views[size] is not None:
            data.views[size][offset // size] = value
        elif place == "plain":
            data.view(UINT[size])[offset // size] = value
        else:
            raw = np.ascontiguousarray(value).view(np.uint8).reshape(len(lanes), size)
            where = offset[:, None] + np.arange(size)
            if place == "region":
                data.bytes[where] = raw
            else:
                data[lanes[:, None], where] = raw

    # ---- shared memory

    def lay_out_shared(self, variables, dynamic):
        """Puts the variables with gaps between them, the dynamic array (size 0) last, and fills all with 0xff, which is NaN in every float."""
        at = GAP
        for v in sorted(variables, key=lambda v: v.size == 0):
            at = (at + 127) // 128 * 128
            v.offset = at
            at += (v.size or dynamic) + GAP
        total = (at + 15) // 16 * 16
        self.shared = np.full(total, 0xFF, np.uint8)
        self.valid = np.zeros(total, bool)
        for v in variables:
            self.valid[v.offset : v.offset + (v.size or dynamic)] = True


def element(kind):
    """(bytes, whether signed) of a type in memory."""
    if kind not in SIZES:
        raise PtxError(f"type {kind!r} is not known")
    return SIZES[kind], kind[0] == "s"

"""Instructions that the lanes of a warp do together. Each returns the lanes that have to wait for others of their warp, or None."""

import numpy as np

from .access import address
from .arithmetic import handles
from .numbers import bf16_read, half_read
from .parse import PtxError

LANE = np.arange(32)
BIT = (np.uint32(1) << LANE.astype(np.uint32))


def present(s, mask):
    """[warps, 32] lanes that are here, and the same as words [warps, 1]."""
    here = s.on(mask).reshape(-1, 32)
    return here, (here * BIT).sum(1, dtype=np.uint32)[:, None]


def partition(s, mask, members):
    """Lanes whose whole member mask is here, and those that wait. A lane outside of its own mask is an error."""
    here, word = present(s, mask)
    members = members.reshape(-1, 32)
    alone = here & (members & BIT == 0)
    if alone.any():
        raise PtxError(f"lane {int(np.argwhere(alone)[0][1])} is not in its own member mask {int(members[alone][0]):#010x}")
    ready = here & (members & ~word == 0)
    return ready.reshape(-1), (here & ~ready).reshape(-1)


def full_warps(s, mask):
    here, _ = present(s, mask)
    whole = here.all(1)
    return np.repeat(whole, 32), (here & ~whole[:, None]).reshape(-1)


@handles("shfl")
def shuffle(ins, ctx):
    mods = ins.modifiers
    if mods[:1] != ["sync"] or mods[1] not in ("up", "down", "bfly", "idx") or mods[2:] != ["b32"]:
        raise PtxError(f"shfl.{'.'.join(mods)} is not known to this interpreter")
    d, *sources = ins.operands
    to, flag = d[1:] if isinstance(d, tuple) else (d, "_")
    put, put_flag = ctx.write(to, "b32"), ctx.write(flag, "pred")
    a, b, c, members = (ctx.read_array(o, "u32") for o in sources)
    mode = mods[1]

    def go(s, mask):
        member = members(s)
        ready, waiting = partition(s, mask, member)
        lane = np.tile(LANE, s.threads // 32)
        bits, control = b(s).astype(np.int64) & 31, c(s).astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        most = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - bits
            inside = source >= most
        elif mode == "down":
            source = lane + bits
            inside = source <= most
        elif mode == "bfly":
            source = lane ^ bits
            inside = source <= most
        else:
            source = (lane & segment) | (bits & ~segment)
            inside = source <= most
        source = np.where(inside, source, lane)
        outside = ready & (member >> source.astype(np.uint32) & np.uint32(1) == 0)
        if outside.any():
            i = np.flatnonzero(outside)[0]
            raise PtxError(f"thread {i} reads lane {source[i]}, which is not in its member mask {member[i]:#010x}")
        value = a(s)
        put(s, ready, value[np.arange(s.threads) // 32 * 32 + source].astype(np.uint32))
        put_flag(s, ready, inside)
        return waiting

    return go


@handles("vote")
def vote(ins, ctx):
    mods = ins.modifiers
    if mods[:1] != ["sync"] or mods[1] not in ("all", "any", "uni", "ballot"):
        raise PtxError(f"vote.{'.'.join(mods)} is not known to this interpreter")
    kind = mods[2]
    put, flag, members = ctx.write(ins.operands[0], kind), ctx.read(ins.operands[1], "pred"), ctx.read_array(ins.operands[2], "u32")

    def go(s, mask):
        member = members(s)
        ready, waiting = partition(s, mask, member)
        yes = np.broadcast_to(flag(s), s.threads).reshape(-1, 32)
        word = np.repeat((yes * BIT).sum(1, dtype=np.uint32), 32) & member
        value = {"ballot": word, "any": word != 0, "all": word == member, "uni": (word == 0) | (word == member)}[mods[1]]
        put(s, ready, value)
        return waiting

    return go


@handles("redux")
def redux(ins, ctx):
    mods = ins.modifiers
    if mods[:1] != ["sync"] or mods[1] not in ("add", "min", "max", "and", "or", "xor"):
        raise PtxError(f"redux.{'.'.join(mods)} is not known to this interpreter")
    kind = mods[2]
    put, a, members = ctx.write(ins.operands[0], kind), ctx.read_array(ins.operands[1], kind), ctx.read_array(ins.operands[2], "u32")
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[mods[1]].reduce

    def go(s, mask):
        member, value = members(s), a(s)
        ready, waiting = partition(s, mask, member)
        out = np.zeros_like(value)
        for i in np.flatnonzero(ready):
            lanes = (i // 32 * 32 + LANE)[(member[i] & BIT) != 0]
            out[i] = reduce(value[lanes])
        put(s, ready, out)
        return waiting

    return go


@handles("activemask")
def activemask(ins, ctx):
    put = ctx.write(ins.operands[0], "b32")
    return lambda s, mask: put(s, mask, np.repeat(present(s, mask)[1][:, 0], 32))


@handles("ldmatrix")
def ldmatrix(ins, ctx):
    mods = ins.modifiers
    count = next((int(m[1:]) for m in mods if m in ("x1", "x2", "x4")), 0)
    if not count or set(mods) - {"sync", "aligned", "m8n8", "trans", "shared", "b16", f"x{count}"}:
        raise PtxError(f"ldmatrix.{'.'.join(mods)} is not known to this interpreter")
    registers = ins.operands[0][1] if isinstance(ins.operands[0], tuple) else [ins.operands[0]]
    if len(registers) != count:
        raise PtxError(f"ldmatrix of {count} matrices into {len(registers)} registers")
    puts, where, transposed = [ctx.write(r, "b32") for r in registers], address(ctx, ins.operands[1], "shared"), "trans" in mods

    def go(s, mask):
        ready, waiting = full_warps(s, mask)
        rows = where(s)
        asked = ready & (np.tile(LANE, s.threads // 32) < 8 * count)
        words = s.memory.load_rows(rows, asked)  # [threads, 8] halves
        s.count_banks(ins, rows, asked, 16)
        tile = words.reshape(-1, 4, 8, 8)  # [warp, matrix, row, column]
        for i, put in enumerate(puts):
            m = tile[:, i].transpose(0, 2, 1) if transposed else tile[:, i]
            put(s, ready, np.ascontiguousarray(m).reshape(-1, 2).view(np.uint32)[:, 0])
        return waiting

    return go


#: shape and types -> (words of a, elements in a word, words of b, reader of an element, words of c)
SHAPES = {
    "m16n8k8.row.col.f32.f16.f16.f32": (2, 2, 1, half_read, 4), "m16n8k16.row.col.f32.f16.f16.f32": (4, 2, 2, half_read, 4),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (4, 2, 2, bf16_read, 4), "m16n8k32.row.col.s32.s8.s8.s32": (4, 4, 2, None, 4),
    "m8n8k16.row.col.s32.s8.s8.s32": (1, 4, 1, None, 2),
}


@handles("mma")
def mma(ins, ctx):
    """PTX ISA, "Matrix fragments for mma": g = lane / 4, t = lane % 4."""
    name = ".".join(ins.modifiers[2:])
    if ins.modifiers[:2] != ["sync", "aligned"] or name not in SHAPES:
        raise PtxError(f"mma.{'.'.join(ins.modifiers)} is not known to this interpreter")
    words_a, per, words_b, read, words_c = SHAPES[name]
    lists = [o[1] if isinstance(o, tuple) else [o] for o in ins.operands]
    if [len(x) for x in lists] != [words_c, words_a, words_b, words_c]:
        raise PtxError(f"{[len(x) for x in lists]} registers of d, a, b, c")
    kind = "s32" if read is None else "f32"
    puts = [ctx.write(r, kind) for r in lists[0]]
    gets_a, gets_b = ([ctx.read_array(r, "b32") for r in x] for x in lists[1:3])
    gets_c = [ctx.read_array(r, kind) for r in lists[3]]
    g, t = LANE // 4, LANE % 4
    rows, depth = 8 * min(words_a, 2), 4 * per * words_b

    def elements(word):
        raw = word.view(np.int8 if read is None else np.uint16)
        return (raw.astype(np.int64) if read is None else read(raw)).reshape(-1, 32, per)

    def go(s, mask):
        ready, waiting = full_warps(s, mask)
        warps = s.threads // 32
        sums = np.int64 if read is None else np.float64
        a, b, c = np.empty((warps, rows, depth), sums), np.empty((warps, depth, 8), sums), np.empty((warps, rows, 8), sums)
        for i, get in enumerate(gets_a):
            for j in range(per):
                a[:, g + 8 * (i % 2), per * t + 4 * per * (i // 2) + j] = elements(get(s))[:, :, j]
        for i, get in enumerate(gets_b):
            for j in range(per):
                b[:, per * t + 4 * per * i + j, g] = elements(get(s))[:, :, j]
        for i, get in enumerate(gets_c):
            c[:, g + 8 * (i // 2), 2 * t + i % 2] = get(s).reshape(-1, 32)
        d = (a @ b + c).astype(np.int32 if read is None else np.float32)
        for i, put in enumerate(puts):
            put(s, ready, np.ascontiguousarray(d[:, g + 8 * (i // 2), 2 * t + i % 2]).reshape(-1))
        s.kernel.module.mma += int(ready.sum()) // 32
        return waiting

    return go

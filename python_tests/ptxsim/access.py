"""Instructions that touch memory: loads, stores, atomics, cp.async, fences."""

import numpy as np

from .arithmetic import handles
from .memory import element
from .operands import DTYPES
from .parse import PtxError

SPACES = ("global", "shared", "local", "param", "const")
#: Hints and orders that change nothing where all runs in lock step.
IGNORED = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys",
           "L1::no_allocate", "L1::evict_first", "L1::evict_last", "L2::64B", "L2::128B", "L2::256B"}


def location(ins):
    """(space, elements, type) of ld and st."""
    space, count = "generic", 1
    *mods, kind = ins.modifiers
    for m in mods:
        if m in SPACES:
            space = m
        elif m in ("v2", "v4", "v8"):
            count = int(m[1:])
        elif m not in IGNORED:
            raise PtxError(f"modifier .{m} of {ins.opcode} is not known to this interpreter")
    return space, count, kind


def address(ctx, operand, space):
    """state -> uint64 array [threads]."""
    if not isinstance(operand, tuple) or operand[0] != "address":
        raise PtxError(f"{operand} is not an address")
    _, base, offset = operand
    number = ctx.register(base)
    kind = "u32" if number is not None and ctx.types[number] in ("b32", "u32", "s32") else "u64"
    if number is None and base not in ctx.addresses:
        raise PtxError(f"[{base}]: no register and no symbol of this kernel")
    get, shift = ctx.read_array(base, kind), np.int64(offset)
    return lambda s: (get(s).astype(np.int64) + shift).astype(np.uint64)


def names(operand, count):
    out = operand[1] if isinstance(operand, tuple) and operand[0] == "vector" else [operand]
    if len(out) != count:
        raise PtxError(f"{len(out)} registers, {count} elements")
    return out


@handles("ld")
def load(ins, ctx):
    space, count, kind = location(ins)
    size, _ = element(kind)
    where, puts, dtype = address(ctx, ins.operands[1], space), [ctx.write(n, kind) for n in names(ins.operands[0], count)], DTYPES[kind]

    def go(s, mask):
        at, on = where(s), s.on(mask)
        for put, value in zip(puts, s.memory.load(space, at, size, count, on), strict=True):
            put(s, mask, value.view(dtype))
        if space == "shared":
            s.count_banks(ins, at, on, size * count)

    return go


@handles("st")
def store(ins, ctx):
    space, count, kind = location(ins)
    size, _ = element(kind)
    where, gets = address(ctx, ins.operands[0], space), [ctx.read_array(n, kind) for n in names(ins.operands[1], count)]

    def go(s, mask):
        at, on = where(s), s.on(mask)
        s.memory.store(space, at, size, [np.ascontiguousarray(g(s)).view(f"u{size}") for g in gets], on)
        if space == "shared":
            s.count_banks(ins, at, on, size * len(gets))

    return go


ATOMIC = {"add": lambda old, b, c: old + b, "exch": lambda old, b, c: b, "and": lambda old, b, c: old & b, "or": lambda old, b, c: old | b,
          "xor": lambda old, b, c: old ^ b, "min": lambda old, b, c: min(old, b), "max": lambda old, b, c: max(old, b),
          "inc": lambda old, b, c: type(old)(0) if old >= b else old + type(old)(1), "cas": lambda old, b, c: c if old == b else old}


@handles("atom", "red")
def atomic(ins, ctx):
    *mods, kind = ins.modifiers
    space = next((m for m in mods if m in SPACES), "generic")
    what = [m for m in mods if m in ATOMIC]
    rest = set(mods) - set(what) - {space} - IGNORED
    if rest or len(what) != 1:
        raise PtxError(f"modifiers {sorted(rest)} of {ins.opcode} are not known to this interpreter")
    operands = ins.operands if ins.opcode == "atom" else ["_", *ins.operands]
    size, _ = element(kind)
    where, put, dtype, change = address(ctx, operands[1], space), ctx.write(operands[0], kind), DTYPES[kind], ATOMIC[what[0]]
    values = [ctx.read_array(o, kind) for o in operands[2:]]

    def go(s, mask):
        at, args, old = where(s), [v(s) for v in values], np.zeros(s.threads, dtype)
        for lane in np.flatnonzero(s.on(mask)):  # one after the other
            one = np.zeros(s.threads, bool)
            one[lane] = True
            now = s.memory.load(space, at, size, 1, one)[0].view(dtype)
            old[lane] = now[lane]
            now[lane] = change(now[lane], args[0][lane], args[1][lane] if len(args) > 1 else None)
            s.memory.store(space, at, size, [now.view(f"u{size}")], one)
        put(s, mask, old)

    return go


@handles("membar", "fence", "griddepcontrol", "prefetch", "prefetchu", "discard", "nanosleep")
def nothing(ins, ctx):
    return lambda s, mask: None


@handles("cp")
def copy_async(ins, ctx):
    mods = ins.modifiers
    if mods[:1] != ["async"]:
        raise PtxError("of cp only cp.async is known to this interpreter")
    if mods == ["async", "commit_group"]:
        return lambda s, mask: s.commit(mask)
    if mods in (["async", "wait_group"], ["async", "wait_all"]):
        keep = int(ins.operands[0]) if mods[1] == "wait_group" else -1
        return lambda s, mask: s.wait(mask, keep)
    if mods[2:4] != ["shared", "global"] or mods[1] not in ("ca", "cg") or set(mods[4:]) - IGNORED:
        raise PtxError(f"cp.{'.'.join(mods)} is not known to this interpreter")
    to, source, size = address(ctx, ins.operands[0], "shared"), address(ctx, ins.operands[1], "global"), int(ins.operands[2])
    if size not in ((16,) if mods[1] == "cg" else (4, 8, 16)):
        raise PtxError(f"cp.async.{mods[1]} of {size} bytes does not exist")
    take = ctx.read_array(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def go(s, mask):
        count = np.full(s.threads, size, np.uint32) if take is None else take(s).copy()
        s.copy(mask, to(s), source(s), size, count)

    return go

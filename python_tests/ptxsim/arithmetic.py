"""Instructions that only read and write registers. Each handler takes (instruction, context) and returns (state, mask) -> None; mask None means all lanes."""

import numpy as np

from .memory import WINDOWS
from .numbers import add_to_odd, bf16_read, bf16_round, flush, fma32, half_read, half_round
from .operands import DTYPES
from .parse import SIZES, PtxError

HANDLERS = {}
INTEGERS = {"u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64"}
SMALL = {"f16": (half_read, half_round), "bf16": (bf16_read, bf16_round), "f16x2": (half_read, half_round), "bf16x2": (bf16_read, bf16_round)}


def handles(*opcodes):
    def add(f):
        HANDLERS.update(dict.fromkeys(opcodes, f))
        return f
    return add


def split(ins, allowed=(), types=1):
    """Set of modifiers, and the last ``types`` of them, which are types. A modifier that is not in ``allowed`` is an error."""
    if len(ins.modifiers) < types:
        raise PtxError("a type is missing")
    kinds = ins.modifiers[len(ins.modifiers) - types:]
    rest = ins.modifiers[: len(ins.modifiers) - types]
    for m in rest:
        if m not in allowed:
            raise PtxError(f"modifier .{m} of {ins.opcode} is not known to this interpreter")
    for k in kinds:
        if k not in DTYPES:
            raise PtxError(f"type .{k} of {ins.opcode} is not known to this interpreter")
    return set(rest), *kinds


def simple(ins, ctx, kinds, out, compute, immediates=0):
    """d = compute(a, b, ...) with operands of the given types, and ``immediates`` more that the handler reads itself."""
    if len(ins.operands) != len(kinds) + 1 + immediates:
        raise PtxError(f"{len(ins.operands)} operands, {len(kinds) + 1 + immediates} expected")
    sources = [ctx.read(o, k) for o, k in zip(ins.operands[1 : len(kinds) + 1], kinds, strict=True)]
    put, dtype = ctx.write(ins.operands[0], out), DTYPES[out]
    return lambda s, mask: put(s, mask, np.asarray(compute(*(get(s) for get in sources)), dtype))


def small_float(ins, ctx, kind, count, compute):
    """On fp16 and bf16, single or in pairs: computed in float64 and rounded once."""
    read, rounded = SMALL[kind]
    sources = [ctx.read_array(o, kind) for o in ins.operands[1 : count + 1]]
    put, dtype = ctx.write(ins.operands[0], kind), DTYPES[kind]

    def go(s, mask):
        values = [read(get(s).view(np.uint16)) for get in sources]
        put(s, mask, np.ascontiguousarray(rounded(compute(*values))).view(dtype))

    return go


def real(ins, ctx, kind, mods, kinds, compute):
    """On float32 and float64, with .ftz and .sat."""
    if mods & {"rz", "rm", "rp"}:
        raise PtxError(f"rounding {sorted(mods)} of {ins.opcode} is not known to this interpreter")

    def finish(*values):
        values = [flush(v) if "ftz" in mods else v for v in values]
        r = compute(*values)
        r = flush(r) if "ftz" in mods else r
        return np.clip(np.nan_to_num(r, nan=0.0), 0, 1).astype(r.dtype) if "sat" in mods else r

    return simple(ins, ctx, kinds, kind, finish)


FLOAT_MODS = ("rn", "rz", "rm", "rp", "ftz", "sat")


@handles("add", "sub")
def add_sub(ins, ctx):
    mods, kind = split(ins, FLOAT_MODS)
    sign = 1 if ins.opcode == "add" else -1
    if kind in SMALL:
        return small_float(ins, ctx, kind, 2, lambda a, b: add_to_odd(a, sign * b))
    compute = np.add if sign > 0 else np.subtract
    if kind in INTEGERS:
        if mods:
            raise PtxError(f"{sorted(mods)} of an integer {ins.opcode} is not known to this interpreter")
        return simple(ins, ctx, [kind] * 2, kind, compute)
    return real(ins, ctx, kind, mods, [kind] * 2, compute)


def product_high(a, b, kind):
    if SIZES[kind] < 8:
        wide = np.int64 if kind[0] == "s" else np.uint64
        return ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide(8 * SIZES[kind])).astype(DTYPES[kind])
    a, b = np.broadcast_arrays(a, b)
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a.ravel(), b.ravel(), strict=True)]).astype(DTYPES[kind]).reshape(a.shape)


def integer_product(ins, mods, kind):
    """(compute, type of the result) of mul and mad."""
    which = mods & {"lo", "hi", "wide"}
    if which == {"lo"}:
        return np.multiply, kind
    if which == {"hi"}:
        return (lambda a, b: product_high(a, b, kind)), kind
    if which == {"wide"}:
        out = kind[0] + str(16 * SIZES[kind])
        return (lambda a, b: np.asarray(a).astype(DTYPES[out]) * np.asarray(b).astype(DTYPES[out])), out
    raise PtxError(f"{ins.opcode} of integers needs one of lo, hi, wide")


@handles("mul")
def mul(ins, ctx):
    mods, kind = split(ins, (*FLOAT_MODS, "lo", "hi", "wide"))
    if kind in SMALL:
        return small_float(ins, ctx, kind, 2, np.multiply)
    if kind in INTEGERS:
        compute, out = integer_product(ins, mods, kind)
        return simple(ins, ctx, [kind] * 2, out, compute)
    return real(ins, ctx, kind, mods, [kind] * 2, np.multiply)


@handles("mad", "fma")
def mad(ins, ctx):
    mods, kind = split(ins, (*FLOAT_MODS, "lo", "hi", "wide"))
    if kind in SMALL:
        return small_float(ins, ctx, kind, 3, lambda a, b, c: add_to_odd(a * b, c))
    if kind in INTEGERS:
        compute, out = integer_product(ins, mods, kind)
        return simple(ins, ctx, [kind, kind, out], out, lambda a, b, c: compute(a, b) + c)
    if kind == "f64":
        raise PtxError("fma of doubles is not known to this interpreter")
    return real(ins, ctx, kind, mods, [kind] * 3, lambda a, b, c: fma32(np.asarray(a), np.asarray(b), np.asarray(c)))


@handles("div", "rem")
def div_rem(ins, ctx):
    mods, kind = split(ins, ("rn", "ftz", "full", "approx"))
    if kind not in INTEGERS:
        if ins.opcode == "rem":
            raise PtxError("rem of floats does not exist")
        return real(ins, ctx, kind, mods, [kind] * 2, np.divide)
    a, b = (ctx.read_array(o, kind) for o in ins.operands[1:])
    put, division = ctx.write(ins.operands[0], kind), ins.opcode == "div"

    def go(s, mask):
        x, y = a(s), b(s)
        zero = y == 0
        if (zero if mask is None else zero & mask).any():
            raise PtxError("division by zero")
        y = np.where(zero, DTYPES[kind].type(1), y)
        quotient = x // y
        if kind[0] == "s":  # towards zero
            quotient = quotient + ((x % y != 0) & ((x < 0) != (y < 0)))
        put(s, mask, (quotient if division else x - quotient * y).astype(DTYPES[kind]))

    return go


@handles("neg", "abs", "not", "cnot")
def unary(ins, ctx):
    mods, kind = split(ins, ("ftz",))
    if ins.opcode == "not":
        return simple(ins, ctx, [kind], kind, np.logical_not if kind == "pred" else np.invert)
    if kind in SMALL:
        bits = np.uint16(0x8000)
        if kind.endswith("x2"):
            bits = np.uint32(0x80008000)
        return simple(ins, ctx, [kind], kind, (lambda a: a ^ bits) if ins.opcode == "neg" else (lambda a: a & ~bits))
    if kind in INTEGERS:
        return simple(ins, ctx, [kind], kind, np.negative if ins.opcode == "neg" else np.abs)
    return real(ins, ctx, kind, mods, [kind], np.negative if ins.opcode == "neg" else np.abs)


@handles("min", "max")
def min_max(ins, ctx):
    mods, kind = split(ins, ("ftz", "NaN"))
    if kind in SMALL:
        pair = (np.minimum, np.maximum) if "NaN" in mods else (np.fmin, np.fmax)
        return small_float(ins, ctx, kind, 2, pair[ins.opcode == "max"])
    if kind in INTEGERS:
        return simple(ins, ctx, [kind] * 2, kind, np.minimum if ins.opcode == "min" else np.maximum)
    pair = (np.minimum, np.maximum) if "NaN" in mods else (np.fmin, np.fmax)
    return real(ins, ctx, kind, mods, [kind] * 2, pair[ins.opcode == "max"])


@handles("and", "or", "xor")
def bitwise(ins, ctx):
    _, kind = split(ins)
    return simple(ins, ctx, [kind] * 2, kind, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.opcode])


@handles("shl", "shr")
def shift(ins, ctx):
    _, kind = split(ins)
    bits, dtype = 8 * SIZES[kind], DTYPES[kind]

    def compute(a, n):
        near = np.minimum(n, bits - 1).astype(dtype)
        if ins.opcode == "shl":
            return np.where(n >= bits, dtype.type(0), np.left_shift(a, near))
        r = np.right_shift(a, near)
        return r if kind[0] == "s" else np.where(n >= bits, dtype.type(0), r)

    return simple(ins, ctx, [kind, "u32"], kind, compute)


@handles("shf")
def funnel_shift(ins, ctx):
    mods, _ = split(ins, ("l", "r", "wrap", "clamp"))

    def compute(a, b, n):
        n = (n & np.uint32(31) if "wrap" in mods else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        return (both >> n if "r" in mods else both << n >> np.uint64(32)).astype(np.uint32)

    return simple(ins, ctx, ["u32"] * 3, "b32", compute)


@handles("lop3")
def lop3(ins, ctx):
    split(ins)
    table = int(ins.operands[4], 0)

    def compute(a, b, c):
        out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return simple(ins, ctx, ["b32"] * 3, "b32", compute, immediates=1)


@handles("prmt")
def prmt(ins, ctx):
    split(ins)

    def compute(a, b, sel):
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        out = np.zeros(np.broadcast(a, b, sel).shape, np.uint32)
        for i in range(4):
            nibble = sel >> np.uint32(4 * i)
            byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(0xFF)
            byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
            out |= byte << np.uint32(8 * i)
        return out

    return simple(ins, ctx, ["b32"] * 3, "b32", compute)


@handles("bfe")
def bit_field_extract(ins, ctx):
    """The field, and above it zeros, or for signed types the last bit of the field; of those beyond the word, the word's last bit."""
    _, kind = split(ins)
    bits, dtype = 8 * SIZES[kind], DTYPES[kind]

    def compute(a, start, length):
        start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), bits)
        near = np.minimum(start, bits - 1).astype(dtype)
        low = np.where((start >= bits) & (kind[0] == "u"), dtype.type(0), np.right_shift(a, near))
        up = np.minimum(bits - length, bits - 1).astype(dtype)
        return np.where(length == 0, dtype.type(0), np.right_shift(np.left_shift(low, up), up))

    return simple(ins, ctx, [kind, "u32", "u32"], kind, compute)


@handles("bfi")
def bit_field_insert(ins, ctx):
    _, kind = split(ins)
    bits, dtype = 8 * SIZES[kind], DTYPES[kind]

    def compute(a, b, start, length):
        start, length = np.minimum(start & np.uint32(255), bits).astype(int), np.minimum(length & np.uint32(255), bits).astype(int)
        length = np.minimum(length, bits - start)
        field = np.where(length > 0, np.right_shift(dtype.type(~dtype.type(0)), np.minimum(bits - length, bits - 1).astype(dtype)), dtype.type(0)).astype(dtype)
        place = np.minimum(start, bits - 1).astype(dtype)
        return (b & ~(field << place)) | (a & field) << place

    return simple(ins, ctx, [kind, kind, "u32", "u32"], kind, compute)


@handles("popc", "clz", "brev")
def count_bits(ins, ctx):
    _, kind = split(ins)
    bits = 8 * SIZES[kind]

    def each(a):
        digits = [format(int(v), f"0{bits}b") for v in np.atleast_1d(a)]
        if ins.opcode == "brev":
            return np.array([int(d[::-1], 2) for d in digits], DTYPES[kind])
        return np.array([d.count("1") if ins.opcode == "popc" else len(d) - len(d.lstrip("0")) for d in digits], np.uint32)

    return simple(ins, ctx, [kind], kind if ins.opcode == "brev" else "u32", each)


@handles("dp4a")
def dp4a(ins, ctx):
    _, left, right = split(ins, types=2)
    bytes_of = [np.int8 if k == "s32" else np.uint8 for k in (left, right)]
    a, b, c = ctx.read_array(ins.operands[1], "b32"), ctx.read_array(ins.operands[2], "b32"), ctx.read_array(ins.operands[3], "s32")
    put = ctx.write(ins.operands[0], "s32")

    def go(s, mask):
        x, y = (get(s).view(t).reshape(-1, 4).astype(np.int64) for get, t in zip((a, b), bytes_of, strict=True))
        put(s, mask, ((x * y).sum(1) + c(s)).astype(np.int32))

    return go


@handles("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
def transcendental(ins, ctx):
    mods, kind = split(ins, ("approx", "rn", "ftz"))
    exact = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos,
             "tanh": np.tanh}[ins.opcode]
    if kind != "f32":
        raise PtxError(f"{ins.opcode} of {kind} is not known to this interpreter")
    return real(ins, ctx, kind, mods, [kind], lambda x: exact(np.asarray(x, np.float64)).astype(np.float32))


@handles("copysign")
def copysign(ins, ctx):
    _, kind = split(ins)
    return simple(ins, ctx, [kind] * 2, kind, lambda a, b: np.copysign(b, a))


# ---------------------------------------------------------------------------------------------------------------- moves, comparisons


@handles("mov")
def mov(ins, ctx):
    _, kind = split(ins)
    to, source = ins.operands
    if isinstance(source, tuple) and source[0] == "vector":  # pack
        part = {2: "b16", 4: "b16", 8: "b32"}[SIZES[kind]] if len(source[1]) != 4 else {4: "b8", 8: "b16"}[SIZES[kind]]
        gets = [ctx.read_array(name, part) for name in source[1]]
        put = ctx.write(to, kind)
        return lambda s, mask: put(s, mask, np.stack([g(s) for g in gets], 1).reshape(-1).view(DTYPES[kind]))
    if isinstance(to, tuple) and to[0] == "vector":
        size = SIZES[kind] // len(to[1])
        part = f"b{8 * size}"
        puts, get = [ctx.write(name, part) for name in to[1]], ctx.read_array(source, kind)

        def unpack(s, mask):
            values = get(s).view(DTYPES[part]).reshape(-1, len(puts))
            for i, put in enumerate(puts):
                put(s, mask, np.ascontiguousarray(values[:, i]))

        return unpack
    return simple(ins, ctx, [kind], kind, lambda a: a)


@handles("cvta")
def cvta(ins, ctx):
    mods, kind = split(ins, ("to", "global", "shared", "local", "const", "param"))
    (space,) = mods - {"to"}
    window = DTYPES[kind].type(WINDOWS.get(space, 0))
    return simple(ins, ctx, [kind], kind, (lambda a: a - window) if "to" in mods else (lambda a: a + window))


COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
           "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def comparison(word, kind):
    floating = kind[0] == "f" or kind == "bf16"
    if word in COMPARE:
        if floating and word == "ne":
            return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
        return COMPARE[word]
    if floating and word == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if floating and word == "num":
        return lambda a, b: ~np.isnan(a) & ~np.isnan(b)
    if floating and word[-1] == "u" and word[:-1] in COMPARE:
        return lambda a, b: COMPARE[word[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    raise PtxError(f"comparison .{word} of {kind} is not known to this interpreter")


@handles("setp")
def setp(ins, ctx):
    mods, kind = split(ins, (*COMPARE, "nan", "num", *(c + "u" for c in COMPARE), "and", "or", "xor", "ftz"))
    joined = mods & {"and", "or", "xor"}
    (word,) = mods - joined - {"ftz"}
    compare = comparison(word, kind)
    a, b = (ctx.read(o, kind) for o in ins.operands[1:3])
    third = ctx.read(ins.operands[3], "pred") if joined else None
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined.pop()] if joined else None
    names = ins.operands[0][1:] if isinstance(ins.operands[0], tuple) else (ins.operands[0],)
    puts = [ctx.write(name, "pred") for name in names]
    read = SMALL[kind][0] if kind in SMALL else (lambda v: v)

    def go(s, mask):
        x, y = read(np.asarray(a(s))), read(np.asarray(b(s)))
        if "ftz" in mods:
            x, y = flush(x), flush(y)
        r = np.asarray(compare(x, y))
        for put, value in zip(puts, (r, ~r), strict=False):
            put(s, mask, value if join is None else join(value, third(s)))

    return go


@handles("selp")
def selp(ins, ctx):
    _, kind = split(ins)
    return simple(ins, ctx, [kind, kind, "pred"], kind, lambda a, b, p: np.where(p, a, b))


# ---------------------------------------------------------------------------------------------------------------- conversions


@handles("cvt")
def cvt(ins, ctx):
    mods, to, source = split(ins, ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu"), types=2)
    if to in ("f16x2", "bf16x2"):  # the first source is the upper half
        if mods != {"rn"} or source != "f32":
            raise PtxError(f"cvt {ins.modifiers} is not known to this interpreter")
        hi, lo = (ctx.read_array(o, "f32") for o in ins.operands[1:3])
        put, rounded = ctx.write(ins.operands[0], to), SMALL[to][1]
        return lambda s, mask: put(s, mask, rounded(hi(s)).astype(np.uint32) << np.uint32(16) | rounded(lo(s)))
    return simple(ins, ctx, [source], to, lambda a: convert(a, to, source, mods))


def convert(a, to, source, mods):
    a = SMALL[source][0](np.asarray(a)) if source in SMALL else np.asarray(a)
    from_float, to_float = source[0] == "f" or source in SMALL, to[0] == "f" or to in SMALL
    if "relu" in mods:
        raise PtxError(".relu is not known to this interpreter")
    if "ftz" in mods and source == "f32":
        a = flush(a)
    if to_float:
        if mods & {"rz", "rm", "rp"}:
            raise PtxError(f"rounding {sorted(mods)} of cvt is not known to this interpreter")
        to_whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        for m in mods & set(to_whole):
            a = to_whole[m](a)
        if "sat" in mods:
            a = np.clip(np.nan_to_num(a, nan=0.0), 0, 1)
        if to in SMALL:
            return SMALL[to][1](a.astype(np.float64))
        out = a.astype(DTYPES[to])
        return flush(out) if "ftz" in mods and to == "f32" else out
    info = np.iinfo(DTYPES[to])
    if from_float:
        (way,) = mods & {"rni", "rzi", "rmi", "rpi"}
        whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[way](a.astype(np.float64))
        whole = np.where(np.isnan(whole), 0, whole)
        inside = np.where((whole < info.min) | (whole >= 2.0 ** (8 * info.dtype.itemsize - (info.min < 0))), 0, whole).astype(DTYPES[to])
        return np.where(whole < info.min, info.min, np.where(whole > float(info.max), info.max, inside)).astype(DTYPES[to])
    if "sat" in mods:
        wide = a.astype(object)
        return np.clip(wide, info.min, info.max).astype(DTYPES[to])
    return a.astype(DTYPES[to])

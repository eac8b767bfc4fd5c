"""Reading and writing what an instruction names: registers, immediates, special registers, addresses of symbols."""

import numpy as np

from .memory import UINT
from .parse import SIZES, PtxError, constant

DTYPES = {"u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16, "s16": np.int16, "f16": np.uint16, "bf16": np.uint16,
          "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
          "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f64": np.float64, "pred": np.bool_}
DTYPES = {k: np.dtype(v) for k, v in DTYPES.items()}


class Context:
    """What the compilation of one kernel shares: the numbers of its registers and the addresses of its symbols."""

    def __init__(self, function, addresses):
        self.function, self.addresses = function, addresses
        self.numbers: dict[str, int] = {}
        self.types: list[str] = []

    def register(self, name) -> int | None:
        """Its number in ``state.registers``, or None if the name is no register."""
        if not isinstance(name, str):
            return None
        if name not in self.numbers:
            kind = self.function.register_type(name)
            if kind is None:
                return None
            self.numbers[name] = len(self.types)
            self.types.append(kind)
        return self.numbers[name]

    def read(self, operand, kind):
        """state -> array [threads], or a scalar for an immediate, of the numpy type of ``kind``."""
        dtype = DTYPES[kind]
        if isinstance(operand, tuple) and operand[0] == "not":
            inner = self.read(operand[1], "pred")
            return lambda s: ~inner(s)
        number = self.register(operand)
        if number is not None:
            have, want = SIZES[self.types[number]], SIZES[kind]
            if (self.types[number] == "pred") != (kind == "pred"):
                raise PtxError(f"{operand} is a {self.types[number]}, not a {kind}")
            if have == want:
                return (lambda s: s.registers[number]) if kind == "pred" else (lambda s: s.registers[number].view(dtype))
            if have < want:
                raise PtxError(f"{operand} has {have} bytes, {kind} needs {want}")
            unsigned = UINT[want]
            return lambda s: s.registers[number].astype(unsigned).view(dtype)
        if operand in SPECIAL:
            if SIZES[kind] != 4:
                raise PtxError(f"{operand} is read as {kind}")
            return lambda s: s.special[operand].view(dtype)
        if operand in self.addresses:
            value = np.array(self.addresses[operand], np.uint64).astype(UINT[SIZES[kind]]).view(dtype)[()]
            return lambda s: value
        if not isinstance(operand, str):
            raise PtxError(f"operand {operand} where a {kind} is expected")
        value = np.bool_(int(operand)) if kind == "pred" else np.frombuffer(constant(operand, kind), dtype)[0]
        return lambda s: value

    def read_array(self, operand, kind):
        """The same, but always an array of its own length."""
        get = self.read(operand, kind)
        return lambda s: np.ascontiguousarray(np.broadcast_to(get(s), s.threads))

    def write(self, operand, kind):
        """(state, mask or None, value) -> None. A register wider than the type gets it extended, by its sign if it has one."""
        if operand == "_":
            return lambda s, mask, value: None
        number = self.register(operand)
        if number is None:
            raise PtxError(f"{operand} is not a register")
        have, want = SIZES[self.types[number]], SIZES[kind]
        if (self.types[number] == "pred") != (kind == "pred") or have < want:
            raise PtxError(f"{operand} of type {self.types[number]} cannot take a {kind}")
        dtype, raw = DTYPES[kind], UINT[have]
        wide = np.dtype(f"i{have}" if kind[0] == "s" else f"u{have}")

        def put(s, mask, value):
            value = np.asarray(value)
            if value.dtype != dtype:
                raise TypeError(f"{value.dtype} for {kind}")  # a mistake in this interpreter
            if kind != "pred":
                value = value.view(raw) if have == want else value.astype(wide).view(raw)
            if mask is None:
                s.registers[number][...] = value
            else:
                np.copyto(s.registers[number], value, where=mask)

        return put


SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid", "%warpid"}

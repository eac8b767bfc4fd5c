"""PTX text to functions and instructions. Nothing is interpreted here but the syntax; see the PTX ISA, "Syntax" and "Directives"."""

import re
from dataclasses import dataclass, field

import numpy as np

#: Bytes of a type. Packed types are one register of 32 bits.
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1}

TOKEN = re.compile(r'"[^"]*"|[\w$.%]+(?:::[\w.]+)*|[{}()\[\],;:@!=|<>+\-]')


class PtxError(AssertionError):
    """The text has something that this interpreter does not know, or the kernel did what a device forbids. Names the line."""


@dataclass
class Variable:
    """A symbol in memory: a parameter, a shared or local array, a table of the module."""

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None
    offset: int = 0  # where the machine puts it


@dataclass
class Instruction:
    opcode: str                # the word before the first dot
    modifiers: list[str]
    operands: list             # see Parser.operand
    guard: tuple | None        # (register, negated)
    line: int                  # in the PTX text
    text: str
    source: str                # file:line of the kernel, or ""


@dataclass
class Function:
    name: str
    params: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)   # name -> type
    ranges: dict[str, tuple] = field(default_factory=dict)    # prefix -> (count, type)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list] = field(default_factory=dict)     # of brx.idx: name -> labels

    def register_type(self, name: str) -> str | None:
        if name in self.registers:
            return self.registers[name]
        if m := re.fullmatch(r"(.*?)(\d+)", name):
            count, kind = self.ranges.get(m[1], (0, None))
            if int(m[2]) < count:
                return kind
        return None


class Parser:
    """One pass over the tokens of a module."""

    def __init__(self, text: str):
        self.variables: list[Variable] = []
        self.functions: dict[str, Function] = {}
        self.target = ""
        files, self.places = {}, {}
        lines = re.sub(r"^\s*\.section[^{]*\{[^}]*\}", lambda m: "\n" * m[0].count("\n"), text, flags=re.M).split("\n")
        place, words = None, []
        for number, raw in enumerate(lines, 1):
            line = raw.strip()
            if line.startswith(".file"):
                m = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', line)
                files[m[1]] = m[2].rsplit("/", 1)[-1]
                continue
            if line.startswith((".loc ", ".loc\t")):
                place = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", line)
                continue
            line = line.split("//", 1)[0]
            if line:
                self.places[number] = place
                words += [(w, number) for w in TOKEN.findall(line)]
        # "mv.cu:80 > ptx.cuh:125" for a function that was inlined; the names of the files come last in the text
        self.places = {n: " > ".join(f"{files.get(f, '?')}:{number}" for f, number in reversed(p or [])) for n, p in self.places.items()}
        self.words, self.at = words, 0
        self.module()

    # ---- tokens

    def peek(self, ahead: int = 0) -> str:
        return self.words[self.at + ahead][0] if self.at + ahead < len(self.words) else ""

    def take(self, expected: str | None = None) -> str:
        word, line = self.words[self.at]
        if expected is not None and word != expected:
            raise PtxError(f"PTX line {line}: {word!r} where {expected!r} is expected")
        self.at += 1
        return word

    def fail(self, what: str):
        raise PtxError(f"PTX line {self.words[min(self.at, len(self.words) - 1)][1]}: {what}")

    # ---- module level

    def module(self):
        while self.at < len(self.words):
            word = self.take()
            if word in (".version", ".address_size"):
                self.take()
            elif word == ".target":
                self.target = self.take()
                while self.peek() == ",":
                    self.take()
                    self.take()
            elif word in (".visible", ".extern", ".weak", ".common"):
                continue
            elif word == ".entry":
                self.entry()
            elif word in (".global", ".const", ".shared"):
                self.variables.append(self.variable(word[1:]))
            elif word == ".pragma":
                while self.take() != ";":
                    pass
            else:
                self.at -= 1
                self.fail(f"{word!r} at module level is not known to this interpreter (functions that are called must be inlined)")

    def variable(self, space: str) -> Variable:
        """.align 4 .b8 name[32] = {0, 188, ...};"""
        align, kind, size, data = 0, "", 0, None
        while self.peek().startswith("."):
            word = self.take()
            if word == ".align":
                align = int(self.take())
            elif word[1:] in SIZES:
                kind = word[1:]
            elif word in (".v2", ".v4"):
                size = int(word[2:])
            else:
                self.fail(f"{word!r} of a variable is not known")
        name = self.take()
        count = size or 1
        while self.peek() == "[":
            self.take()
            count *= 0 if self.peek() == "]" else int(self.take(), 0)
            self.take("]")
        if self.peek() == "=":
            self.take()
            values, depth = [], 0
            while True:
                word = self.take()
                depth += (word == "{") - (word == "}")
                if word not in "{},":
                    if word == "-":
                        word += self.take()
                    values.append(word)
                if depth == 0 and self.peek() in (";", ","):
                    break
            data = b"".join(constant(v, kind, self) for v in values).ljust(count * SIZES[kind], b"\0")
        self.take(";")
        return Variable(name, space, count * SIZES[kind], align or SIZES[kind], data)

    def entry(self):
        name = self.take()
        params, offset = [], 0
        if self.peek() == "(":
            self.take()
            while self.peek() != ")":
                self.take(".param")
                align, kind, count = 0, "", 1
                while self.peek().startswith("."):
                    word = self.take()
                    if word == ".align":
                        align = int(self.take())
                    elif word == ".ptr":
                        while self.peek() in (".global", ".shared", ".const", ".align"):
                            if self.take() == ".align":
                                self.take()
                    else:
                        kind = word[1:]
                label = self.take()
                if self.peek() == "[":
                    self.take()
                    count = int(self.take())
                    self.take("]")
                size = SIZES[kind] * count
                align = align or SIZES[kind]
                offset = (offset + align - 1) // align * align
                params.append(Variable(label, "param", size, align, None, offset))
                offset += size
                if self.peek() == ",":
                    self.take()
            self.take(")")
        while self.peek() != "{":
            self.take()  # .maxntid and its like
        self.take("{")
        self.functions[name] = f = Function(name, params)
        self.body(f)

    # ---- a body

    def body(self, f: Function):
        scopes, count = [{}], 0
        while True:
            word, line = self.words[self.at]
            if word == "{":
                self.take()
                count += 1
                scopes.append({"": f"@{count}"})
            elif word == "}":
                self.take()
                scopes.pop()
                if not scopes:
                    return
            elif self.peek(1) == ":" and word[0] not in ".@":
                self.at += 2
                if self.peek() in (".branchtargets", ".calltargets"):
                    self.take()
                    f.tables[word] = [w for w in self.until(";") if w != ","]
                else:
                    f.labels[word] = len(f.code)
            elif word == ".reg":
                self.take()
                self.registers(f, scopes[-1])
            elif word in (".shared", ".local"):
                self.take()
                f.variables.append(self.variable(word[1:]))
            elif word == ".pragma":
                self.until(";")
            elif word[0] == ".":
                self.fail(f"{word!r} in a function is not known to this interpreter")
            else:
                f.code.append(self.instruction(scopes, line))

    def until(self, end: str) -> list[str]:
        out = []
        while (word := self.take()) != end:
            out.append(word)
        return out

    def registers(self, f: Function, scope: dict):
        kind = self.take()[1:]
        if kind not in SIZES:
            self.fail(f"registers of type {kind!r} are not known")
        while True:
            name = self.take()
            if self.peek() == "<":
                self.take()
                f.ranges[name] = (int(self.take()), kind)
                self.take(">")
            else:
                if "" in scope:  # a scope inside the function hides outer names
                    scope[name] = name + scope[""]
                f.registers[scope.get(name, name)] = kind
            if self.take() == ";":
                return

    def instruction(self, scopes: list[dict], line: int) -> Instruction:
        start, guard = self.at, None
        if self.peek() == "@":
            self.take()
            negated = self.peek() == "!"
            if negated:
                self.take()
            guard = (self.name(scopes), negated)
        opcode, *modifiers = self.take().split(".")
        operands = []
        while self.peek() != ";":
            operands.append(self.operand(scopes))
            if self.peek() == ",":
                self.take()
            elif self.peek() != ";":
                self.fail(f"{self.peek()!r} after an operand")
        self.take(";")
        text = re.sub(r" ?([\],;\[{}|+]) ?", r"\1", " ".join(w for w, _ in self.words[start:self.at])).replace(",", ", ")
        return Instruction(opcode, modifiers, operands, guard, line, text, self.places.get(line, ""))

    def name(self, scopes: list[dict]) -> str:
        word = self.take()
        for scope in reversed(scopes):
            if word in scope and word:
                return scope[word]
        return word

    def operand(self, scopes: list[dict]):
        """A word, ("address", base, offset), ("vector", [...]), ("not", word) or ("pair", a, b)."""
        word = self.peek()
        if word == "[":
            self.take()
            base, offset = self.name(scopes), 0
            if self.peek() in ("+", "-"):
                sign = -1 if self.take() == "-" else 1
                if self.peek() == "-":
                    self.take()
                    sign = -sign
                offset = sign * int(self.take(), 0)
            self.take("]")
            return ("address", base, offset)
        if word == "{":
            self.take()
            items = []
            while self.peek() != "}":
                items.append(self.name(scopes))
                if self.peek() == ",":
                    self.take()
            self.take("}")
            return ("vector", items)
        if word == "!":
            self.take()
            return ("not", self.name(scopes))
        if word == "-":
            self.take()
            return "-" + self.take()
        word = self.name(scopes)
        if self.peek() == "|":
            self.take()
            return ("pair", word, self.name(scopes))
        return word


def constant(word: str, kind: str, parser: Parser | None = None) -> bytes:
    """An immediate as the bytes of its type: 12, -3, 0x1F, 0f3F800000 (a float's bits), 0d... (a double's)."""
    sign, body = (-1, word[1:]) if word[0] == "-" else (1, word)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", body):
        value = np.array(int(body[2:], 16), np.uint32).view(np.float32)[()]
        return (np.float32(value) if kind != "f64" else np.float64(value)).tobytes() if sign > 0 else (-value).tobytes()
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", body):
        value = np.array(int(body[2:], 16), np.uint64).view(np.float64)[()]
        return np.float64(sign * value).tobytes() if kind == "f64" else np.float32(sign * value).tobytes()
    m = re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", body)
    if not m:
        text = f"{word!r} is neither a register nor a number"
        raise PtxError(text) if parser is None else parser.fail(text)
    digits = m[1]
    value = sign * int(digits, 8 if re.fullmatch(r"0[0-7]+", digits) else 0)
    return (value & ((1 << 8 * SIZES[kind]) - 1)).to_bytes(SIZES[kind], "little")

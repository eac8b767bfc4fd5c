"""Runs the kernels of a PTX module: all threads of a block in lock step, block after block.

Each thread has a place in the code. Those with the lowest place run together until they meet others or part; so lanes that diverged come together again
where the compiler put their common code, which it does behind both branches.
"""

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np

from . import access, warp  # noqa: F401  (they enter their handlers into HANDLERS)
from .arithmetic import HANDLERS
from .memory import UINT, Memory
from .operands import SPECIAL, Context
from .parse import SIZES, Parser, PtxError

END = 1 << 60
COLLECTIVE = {"shfl", "vote", "redux", "ldmatrix", "mma"}


@dataclass
class Step:
    """A compiled instruction: ``go(state, mask)``, and what the scheduler has to know of it."""

    kind: str        # "plain", "collective", "branch", "table", "return", "barrier", "trap"
    go: object
    guard: object    # state -> bool array, or None
    target: object = None
    instruction: object = None
    ran: bool = False
    issued: int = 0  # times that a warp came to it


class Kernel:
    """A function of the module, compiled to closures when it is first launched."""

    def __init__(self, module, function):
        self.module, self.function = module, function
        variables = [v for v in module.variables if v.space == "shared"] + [v for v in function.variables if v.space == "shared"]
        used = {w for i in function.code for o in i.operands for w in words(o)}
        self.shared = [v for v in variables if v.name in used]
        # the dynamic array's place hangs on nothing but the static ones, so addresses are known before the launch
        layout = Memory(32)
        layout.lay_out_shared(self.shared, 0)
        at = 16
        for v in function.variables:
            if v.space == "local":
                at = (at + v.align - 1) // v.align * v.align
                v.offset = at
                at += v.size
        self.local_size = (at + 15) // 16 * 16
        addresses = {v.name: v.offset for v in (*self.shared, *function.params, *(v for v in function.variables if v.space == "local"))}
        addresses |= {v.name: v.offset for v in module.variables if v.space != "shared"}
        self.context = Context(function, addresses)
        self.steps = [self.compile(i) for i in function.code]

    def compile(self, ins):
        try:
            guard = None
            if ins.guard:
                read = self.context.read(ins.guard[0], "pred")
                guard = (lambda s: ~read(s)) if ins.guard[1] else read
            if ins.opcode == "bra":
                if set(ins.modifiers) - {"uni"}:
                    raise PtxError(f"modifiers {ins.modifiers} of bra are not known to this interpreter")
                return Step("branch", None, guard, self.label(ins.operands[0]), ins)
            if ins.opcode == "brx":
                table = [self.label(w) for w in self.function.tables[ins.operands[1]]]
                return Step("table", self.context.read_array(ins.operands[0], "u32"), guard, np.array(table), ins)
            if ins.opcode in ("ret", "exit"):
                return Step("return", None, guard, None, ins)
            if ins.opcode == "trap":
                return Step("trap", None, guard, None, ins)
            if ins.opcode in ("bar", "barrier"):
                return Step("barrier", self.barrier(ins), guard, None, ins)
            if ins.opcode not in HANDLERS:
                raise PtxError(f"instruction {ins.opcode} is not known to this interpreter")
            return Step("collective" if ins.opcode in COLLECTIVE else "plain", HANDLERS[ins.opcode](ins, self.context), guard, None, ins)
        except PtxError as e:
            raise PtxError(f"{where(ins)}: {e}") from None

    def label(self, name):
        if name not in self.function.labels:
            raise PtxError(f"no label {name}")
        return self.function.labels[name]

    def barrier(self, ins):
        """("warp", members) or ("block", None or what is done when all have come)."""
        mods = [m for m in ins.modifiers if m not in ("cta", "aligned")]
        if mods[:1] == ["warp"]:
            return "warp", self.context.read_array(ins.operands[0], "u32")
        if mods == ["sync"]:
            if ins.operands not in (["0"], ["0x0"]):
                raise PtxError(f"barrier {ins.operands}: only barrier 0 of all threads is known to this interpreter")
            return "block", None
        if mods[:1] == ["red"] and mods[1] in ("popc", "and", "or") and ins.operands[1] in ("0", "0x0"):
            kind = mods[2]
            put, flag = self.context.write(ins.operands[0], kind), self.context.read(ins.operands[-1], "pred")

            def reduce(s, mask):
                yes = np.broadcast_to(flag(s), s.threads)[mask]
                value = np.uint32(yes.sum()) if mods[1] == "popc" else np.bool_(yes.all() if mods[1] == "and" else yes.any())
                put(s, mask, np.full(s.threads, value))

            return "block", reduce
        raise PtxError(f"{ins.opcode}.{'.'.join(ins.modifiers)} is not known to this interpreter")


def words(operand):
    """The names in an operand."""
    if isinstance(operand, str):
        return [operand]
    return [w for part in operand[1:] for w in (part if isinstance(part, list) else [part]) if isinstance(w, str)]


def where(ins):
    return f"{ins.source + ', ' if ins.source else ''}PTX line {ins.line}: {ins.text}"


class State:
    """A block at work."""

    def __init__(self, kernel, grid, block, index, memory, lazy):
        self.kernel, self.memory, self.lazy = kernel, memory, lazy
        self.live = block[0] * block[1] * block[2]
        self.threads = (self.live + 31) // 32 * 32  # lanes that do not exist have returned
        self.registers = [np.zeros(self.threads, bool) if t == "pred" else np.full(self.threads, 0xA5A5A5A5A5A5A5A5 & ((1 << 8 * SIZES[t]) - 1), UINT[SIZES[t]])
                          for t in kernel.context.types]
        n = np.arange(self.threads, dtype=np.uint32)
        tid = (n % block[0], n // block[0] % block[1], n // (block[0] * block[1]))
        every = {"tid": tid, "ntid": block, "ctaid": index, "nctaid": grid}
        self.special = {name: np.full(self.threads, every[name[1:-2]]["xyz".index(name[-1])], np.uint32) if name[-2] == "." else None for name in SPECIAL}
        for axis in range(3):
            self.special["%tid." + "xyz"[axis]] = tid[axis].astype(np.uint32)
        self.special["%laneid"], self.special["%warpid"] = n % 32, n // 32
        self.all = np.ones(self.threads, bool)
        self.copies, self.group = [], np.zeros(self.threads, np.int64)

    def on(self, mask):
        return self.all if mask is None else mask

    # cp.async: at the latest moment allowed, as the fibers do it

    def copy(self, mask, to, source, size, take):
        mask = self.on(mask).copy()
        if (take[mask] > size).any():
            raise PtxError(f"cp.async takes {int(take[mask].max())} of {size} bytes")
        list(self.memory.places("shared", to[mask], size, True))
        some = mask & (take > 0)
        for _ in self.memory.places("global", source[some], 1, False) if some.any() else ():
            pass
        if (source[some] % np.uint64(size) != 0).any():
            raise PtxError(f"the source of cp.async is not aligned to {size} bytes")
        if self.lazy:
            self.memory.store("shared", to, 1, [np.full(self.threads, 0xFF, np.uint8)], mask)
            self.copies.append((mask, to, source, size, take, self.group.copy()))
        else:
            self.land(mask, to, source, size, take)

    def land(self, mask, to, source, size, take):
        for i in range(size):
            have = mask & (take > i)
            value = self.memory.load("global", source + np.uint64(i), 1, 1, have)[0]  # zeros where nothing is taken
            self.memory.store("shared", to + np.uint64(i), 1, [value], mask)

    def commit(self, mask):
        self.group[self.on(mask)] += 1

    def wait(self, mask, keep):
        mask, left = self.on(mask), []
        for lanes, to, source, size, take, group in self.copies:
            now = lanes & mask & ((group < self.group - keep) if keep >= 0 else True)
            if now.any():
                self.land(now, to, source, size, take)
            if (lanes & ~now).any():
                left.append((lanes & ~now, to, source, size, take, group))
        self.copies = left

    def count_banks(self, ins, address, mask, size):
        """Shared memory has 32 banks of 4 bytes. A warp's access goes in phases of 128 bytes: 32 lanes of up to 4 bytes, 16 of 8, 8 of 16. A phase costs as
        many turns as the busiest bank has different words; all but one of them are conflicts."""
        lanes = np.flatnonzero(mask)
        each = max(1, size // 4)
        phase = np.repeat(lanes * each // 32, each)
        word = (address[lanes, None].astype(np.int64) // 4 + np.arange(each)).reshape(-1)
        pairs = np.unique(np.stack([phase, word]), axis=1)
        turns = np.bincount(pairs[0] * 32 + pairs[1] % 32, minlength=32 * (self.threads * each // 32)).reshape(-1, 32).max(1)
        count = self.kernel.module.banks.setdefault(ins.source or f"PTX line {ins.line}", [0, 0])
        count[0] += int((turns > 0).sum())
        count[1] += int(np.maximum(turns - 1, 0).sum())

    # the schedule

    def run(self, limit):
        steps, pc = self.kernel.steps, np.zeros(self.threads, np.int64)
        alive, parked, at_barrier = np.arange(self.threads) < self.live, np.zeros(self.threads, bool), np.zeros(self.threads, bool)
        done = 0
        while True:
            free = alive & ~parked & ~at_barrier
            if not free.any():
                if not alive.any():
                    return
                self.open_barrier(alive, parked, at_barrier, pc)
                continue
            p = int(pc[free].min())
            mask = alive & ~at_barrier & (pc == p)
            parked[mask] = False
            ahead = pc[alive & ~at_barrier & ~mask & (pc > p)]
            stop = int(ahead.min()) if len(ahead) else END
            whole, warps = None if mask.all() else mask, int(mask.reshape(-1, 32).any(1).sum())
            while p < stop:
                step = steps[p]
                done += 1
                step.issued += warps
                if done > limit:
                    raise PtxError(f"{where(step.instruction)}: {limit} instructions and no end")
                now = whole
                if step.guard is not None:
                    now = step.guard(self) & mask
                    if step.kind == "plain" and not now.any():
                        p += 1
                        continue
                step.ran = True
                try:
                    if step.kind == "plain":
                        step.go(self, now)
                        p += 1
                        continue
                    came, p = p, self.special_step(step, p, mask, mask if now is None else now, pc, alive, parked, at_barrier)
                except PtxError as e:
                    raise PtxError(f"{where(step.instruction)}: {e}") from None
                if p is None:
                    break
                if p < came:  # others may wait between there and here
                    ahead = pc[alive & ~at_barrier & ~mask & (pc >= p)]
                    stop = int(ahead.min()) if len(ahead) else END
            else:
                pc[mask] = p

    def special_step(self, step, p, mask, now, pc, alive, parked, at_barrier):
        """The next place of the whole group, or None if its lanes have parted and their places are in ``pc``."""
        if step.kind == "branch":
            if now.all() or (now == mask).all():
                return step.target
            if not now.any():
                return p + 1
            pc[mask] = p + 1
            pc[now] = step.target
            return None
        if step.kind == "collective":
            waiting = step.go(self, now)
            if waiting is None or not waiting.any():
                return p + 1
            pc[mask] = p + 1
            pc[waiting] = p
            parked[waiting] = True
            return None
        if not now.any():
            return p + 1
        pc[mask] = p + 1
        if step.kind == "table":
            index = step.go(self)
            if (index[now] >= len(step.target)).any():
                raise PtxError("the index is beyond the table")
            pc[now] = step.target[index[now]]
        elif step.kind == "return":
            alive[now] = False
        elif step.kind == "trap":
            raise PtxError("trap")
        elif step.go[0] == "warp":
            _, waiting = warp.partition(self, now, step.go[1](self))
            pc[waiting] = p
            parked |= waiting
        else:
            pc[now] = p
            at_barrier |= now
        return None

    def open_barrier(self, alive, parked, at_barrier, pc):
        """Nobody can run: all wait at one barrier, or the kernel is wrong."""
        steps = self.kernel.steps
        if parked.any():
            first = np.flatnonzero(parked & alive)[0]
            of_warp = np.arange(first // 32 * 32, first // 32 * 32 + 32)
            elsewhere = {}
            for i in of_warp:
                if not (parked[i] and pc[i] == pc[first]):
                    text = "returned" if not alive[i] else where(steps[pc[i]].instruction)
                    elsewhere.setdefault(text, []).append(int(i) % 32)
            raise PtxError(f"{where(steps[pc[first]].instruction)}: waits for lanes that never come: " +
                           "; ".join(f"{lanes} at {text}" for text, lanes in elsewhere.items()))
        places = np.unique(pc[at_barrier])
        texts = [where(steps[p].instruction) for p in places]
        if len(places) > 1:
            raise PtxError(f"divergent barrier: {' and '.join(texts)}")
        gone = np.flatnonzero(~alive[: self.live])
        if len(gone):
            raise PtxError(f"{texts[0]}: threads {gone[0]} to {gone[-1]} ({len(gone)} in all) have returned and do not come to the barrier")
        reduce = steps[places[0]].go[1]
        if reduce is not None:
            reduce(self, at_barrier.copy())
        pc[at_barrier] += 1
        at_barrier[:] = False


class Module:
    """The kernels of a PTX text.

    Args:
        text: what ``nvcc -ptx`` wrote. With ``-lineinfo`` messages name the line of the kernel's source as well.

    Raises:
        PtxError: for anything that this interpreter does not know, at the latest when a kernel that has it is launched.
    """

    def __init__(self, text):
        parsed = Parser(text)
        self.target, self.functions, self.variables = parsed.target, parsed.functions, parsed.variables
        self.mma = 0      # products of a warp so far
        self.banks = {}   # line of the kernel -> [phases, conflicts] of its accesses to shared memory so far
        self.tables = []
        for v in self.variables:
            if v.space == "shared":
                continue
            room = np.zeros(v.size + 128, np.uint8)
            start = -room.ctypes.data % 64
            data = room[start : start + v.size]
            data[:] = np.frombuffer(v.data, np.uint8) if v.data is not None else 0
            v.offset = data.ctypes.data
            self.tables.append((v, data))
        self.compiled = {}

    @property
    def kernels(self):
        """{name in the text: name in C++}"""
        if not hasattr(self, "_names"):
            names = list(self.functions)
            plain = names
            if shutil.which("c++filt") and names:
                plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split("\n")
            self._names = dict(zip(names, plain, strict=False))
        return self._names

    def find(self, pattern):
        """Name of the one kernel whose name, mangled or not, is ``pattern`` or has a match for it.

        Raises:
            KeyError: none or several match.
        """
        if pattern in self.functions:
            return pattern
        same = [name for name in self.functions if unnamed(name) == unnamed(pattern)]
        if len(same) == 1:
            return same[0]
        found = [name for name, plain in self.kernels.items() if re.search(pattern, name) or re.search(pattern, plain)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} kernels match {pattern!r}; there are {list(self.kernels.values())}")
        return found[0]

    def executed(self):
        """The instructions, with all modifiers, that have run so far."""
        return {".".join([i.opcode, *i.modifiers]) for k in self.compiled.values() for i in (s.instruction for s in k.steps if s.ran)}

    def issued(self):
        """Instructions that warps have been given so far, all kernels together; those that a predicate turned off count, as they do on hardware."""
        return sum(s.issued for k in self.compiled.values() for s in k.steps)

    def replay(self, launches, memory):
        """Runs what ``simt.Library.record`` wrote down; ``memory``: the arrays that the host function was given."""
        for one in launches:
            self.launch(one.kernel, one.grid, one.block, one.args, one.shared, memory)

    def launch(self, kernel, grid, block, args, shared=0, memory=(), lazy=True, limit=20_000_000):
        """Runs a kernel.

        Args:
            kernel: its name in the text, or a pattern for ``find``.
            grid, block: int or up to three of them.
            args: one for each parameter: a contiguous numpy array (its address), an int, a float, None, or bytes (a struct by value).
            shared: bytes of dynamic shared memory.
            memory: what else the kernel may reach, for example through pointers in a struct: numpy arrays, torch tensors (all of their storage), or
                (address, bytes) of anything else that is alive.
            lazy: cp.async lands in its wait (True) or at once.
            limit: instructions of one block, against loops without end.

        Raises:
            PtxError: with the instruction and, if known, the line of the kernel.
        """
        name = self.find(kernel)
        function = self.functions[name]
        if name not in self.compiled:
            self.compiled[name] = Kernel(self, function)
        compiled = self.compiled[name]
        grid, block = three(grid), three(block)
        if not 1 <= block[0] * block[1] * block[2] <= 1024:
            raise PtxError(f"a block of {block} threads cannot be launched")
        if len(args) != len(function.params):
            raise PtxError(f"{self.kernels[name]} has {len(function.params)} parameters, {len(args)} given")
        template = Memory((block[0] * block[1] * block[2] + 31) // 32 * 32)
        for v, data in self.tables:
            template.add(v.offset, data, v.name, writable=v.space == "global")
        reachable = [memory_of(a, f"array {i}") for i, a in enumerate((*[a for a in args if isinstance(a, np.ndarray)], *memory))]
        for address, data, what, writable in sorted(reachable, key=lambda r: -len(r[1])):  # views may lie in others
            if len(data):
                template.add(address, data, what, writable)
        size = max((p.offset + p.size for p in function.params), default=0)
        params = np.zeros((size + 15) // 16 * 16, np.uint8)
        for p, a in zip(function.params, args, strict=True):
            params[p.offset : p.offset + p.size] = np.frombuffer(argument(a, p), np.uint8)
        template.params = params
        with np.errstate(all="ignore"):
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        template.lay_out_shared(compiled.shared, shared)
                        template.local = np.full((template.threads, compiled.local_size), 0xFF, np.uint8)
                        try:
                            State(compiled, grid, block, (x, y, z), template, lazy).run(limit)
                        except PtxError as e:
                            raise PtxError(f"{e} [kernel {self.kernels[name]}, block ({x}, {y}, {z})]") from None


def unnamed(name):
    """A mangled name in which unnamed namespaces are called as g++ calls them; nvcc gives each file's a name of its own."""
    out, at = "", 0
    for m in re.finditer(r"(\d+)(?=_GLOBAL__N_)", name):
        if m.start() >= at:
            out += name[at : m.start()] + "12_GLOBAL__N_1"
            at = m.end() + int(m[1])
    return out + name[at:]


def three(v):
    v = (v,) if isinstance(v, int) else tuple(v)
    return v + (1,) * (3 - len(v))


def memory_of(item, name):
    """(address, its bytes as an array, what it is, writable)"""
    if isinstance(item, np.ndarray):
        if not item.flags.c_contiguous:
            raise PtxError(f"{name} of shape {item.shape} is not contiguous")
        return item.ctypes.data, item.reshape(-1).view(np.uint8), f"{name} of {item.dtype} {list(item.shape)}", item.flags.writeable
    if isinstance(item, tuple):
        address, size = item
        what = f"{name} of {size} bytes"
    else:
        address, size = item.untyped_storage().data_ptr(), item.untyped_storage().nbytes()
        what = f"the storage of {name}, {item.dtype} {list(item.shape)},"
    data = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8) if size else np.zeros(0, np.uint8)
    return address, data, what, True


def argument(value, param):
    if isinstance(value, np.ndarray):
        raw = np.uint64(value.ctypes.data).tobytes()
    elif isinstance(value, bytes):
        raw = value
    elif value is None:
        raw = bytes(8)
    elif isinstance(value, float):
        raw = np.float32(value).tobytes() if param.size == 4 else np.float64(value).tobytes()
    else:
        raw = int(value).to_bytes(param.size, "little", signed=int(value) < 0)
    if len(raw) != param.size:
        raise PtxError(f"parameter {param.name} has {param.size} bytes, {len(raw)} given")
    return raw


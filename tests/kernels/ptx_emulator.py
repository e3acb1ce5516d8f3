"""A kernel's PTX carried out by numpy, one instruction at a time for all threads of all programs, with a check for races.

It knows the instructions of straight-line row kernels for sm_90 and refuses any other. Barriers need no waiting in lockstep:
what they are for, the order of accesses to shared memory, is checked instead. A word must not be read after another
thread's store, nor stored to after a read, without a barrier in between: one of the cluster where a program reads another's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

GLOBAL = 1 << 33  # the address of global memory's first byte
WINDOW = 1 << 24  # mapa: rank r's shared memory lies at (r + 1) * WINDOW
SHARED_WORDS = 1 << 14
TYPES = {
    "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4",
    "b64": "u8", "u64": "u8", "s64": "i8",
}  # fmt: skip
BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift, "min": np.fmin, "max": np.fmax, "div": np.divide,
}  # fmt: skip
COMPARE: dict[str, Callable[..., Any]] = {
    "lt": np.less, "gt": np.greater, "le": np.less_equal, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def bfloat16_to_float(bits: Any) -> Any:
    """fp32 of uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bfloat16(values: Any) -> Any:
    """uint16 of fp32, rounded to the nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def instructions(ptx: str) -> list[str]:
    """The instructions of the entry, up to its end."""
    body = ptx[ptx.index("{", ptx.index(".visible .entry")) + 1 :].partition("\tret;")[0]
    lines = (line.partition("//")[0].strip() for line in body.split("\n"))
    texts = [text.strip() for line in lines if not line.startswith((".", "$")) for text in line.split(";")]
    return [re.sub(r"\s+", " ", text) for text in texts if text.strip("{} ")]


class Emulator:
    """One launch: grid clusters of num_ctas programs of so many threads, on memory, the bytes of global memory.

    loads and stores count, for each byte of memory, how often it was read and written; races says what was unordered.
    """

    def __init__(self, grid: int, num_ctas: int, threads: int, params: list[int | float], memory: Any) -> None:
        self.num_ctas, self.params, self.memory = num_ctas, params, memory
        self.count = grid * num_ctas * threads
        self.program = np.repeat(np.arange(grid * num_ctas), threads)
        self.tid = np.tile(np.arange(threads), grid * num_ctas)
        self.registers: dict[str, Any] = {}
        shape = (grid * num_ctas, SHARED_WORDS)
        self.shared = np.zeros(shape, np.uint32)
        self.stored, self.read, self.read_by_others = (np.full(shape, -1) for _ in range(3))  # by which instruction
        self.barrier = self.cluster_barrier = 0
        self.loads, self.stores = np.zeros(len(memory), np.int32), np.zeros(len(memory), np.int32)
        self.races: list[str] = []
        self.cluster_reads = 0

    def run(self, ptx: str) -> None:
        """Carry out the kernel."""
        with np.errstate(all="ignore"):
            for number, text in enumerate(instructions(ptx), 1):
                self.number, self.text = number, text
                guard = re.match(r"@(%p\d+) (.*)", text)
                self.on = self.registers[guard[1]] if guard else None
                name, _, rest = (guard[2] if guard else text).partition(" ")
                self._step(name.split("."), [a.strip() for a in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)])
        self._order(self.read_by_others < self.cluster_barrier, "ends while others may read its memory")

    def _value(self, operand: str, kind: str) -> Any:
        dtype = np.dtype(kind)
        special = {"%tid.x": self.tid, "%ctaid.x": self.program, "%clusterid.x": self.program // self.num_ctas}
        special |= {"%cluster_ctarank": self.program % self.num_ctas, "global_smem": np.zeros_like(self.tid)}
        if operand in special:
            return special[operand].astype(dtype)
        if operand.startswith("%"):
            return self.registers[operand].view(dtype)
        if operand.startswith("0f"):
            return np.full(self.count, int(operand[2:], 16), np.uint32).view(dtype)
        bits = 8 * dtype.itemsize
        return np.full(self.count, int(operand.rstrip("U"), 0) % (1 << bits), f"u{bits // 8}").view(dtype)

    def _set(self, register: str, value: Any) -> None:
        if value.dtype != bool:
            value = value.view(f"u{value.dtype.itemsize}")
        if self.on is not None and register in self.registers:
            value = np.where(self.on, value, self.registers[register])
        self.registers[register] = value

    def _address(self, operand: str, kind: str) -> Any:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return self._value(base, kind) + np.dtype(kind).type(int(offset or 0))

    def _order(self, kept: Any, what: str) -> None:
        if not np.all(kept):
            self.races.append(f"{what}: {self.text}")

    def _step(self, op: list[str], args: list[str]) -> None:
        method = getattr(self, f"_do_{op[0]}", None)
        if op[:2] == ["ld", "param"]:
            self._param(op[-1], args)
        elif op[0] in ("ld", "st") and op[1] == "global":
            self._global(op, args)
        elif op[0] in ("ld", "st") and op[1].startswith("shared"):
            self._shared(op, args)
        elif method is not None:
            method(op, args)
        elif op[0] in BINARY and op[-1] == "pred":
            self._set(args[0], BINARY[op[0]](self.registers[args[1]], self.registers[args[2]]))
        elif op[0] in BINARY and op[1] != "wide" and op[-1] in TYPES:
            kind = TYPES[op[-1]]
            second = self._value(args[2], "u4").astype(kind) if op[0] in ("shl", "shr") else self._value(args[2], kind)
            self._set(args[0], BINARY[op[0]](self._value(args[1], kind), second))
        else:
            raise NotImplementedError(self.text)

    def _param(self, kind: str, args: list[str]) -> None:
        value = self.params[int(re.search(r"param_(\d+)", args[1])[1])]  # type: ignore[index]
        wide = "i8" if kind.endswith("64") or args[0].startswith("%rd") else "i4"
        self._set(args[0], np.full(self.count, value, "f4" if isinstance(value, float) else wide))

    def _global(self, op: list[str], args: list[str]) -> None:
        kind, load = TYPES[op[-1]], op[0] == "ld"
        size = np.dtype(kind).itemsize
        registers = args[0 if load else 1].strip("{} ").split(",")
        on = np.ones(self.count, bool) if self.on is None else self.on
        start = (self._address(args[1 if load else 0], "i8") - GLOBAL)[on]
        assert (start % (size * len(registers)) == 0).all(), f"misaligned: {self.text}"
        for i, register in enumerate(name.strip() for name in registers):
            where = start[:, None] + size * i + np.arange(size)
            assert where.size == 0 or (where.min() >= 0 and where.max() < len(self.memory)), f"outside: {self.text}"
            np.add.at(self.loads if load else self.stores, where, 1)
            if load:
                value = np.zeros(self.count, kind)
                value[on] = np.ascontiguousarray(self.memory[where]).view(kind)[:, 0]
                self._set(register, value)
            else:
                self.memory[where] = np.ascontiguousarray(self._value(register, kind)[on]).view(np.uint8).reshape(-1, size)

    def _shared(self, op: list[str], args: list[str]) -> None:
        assert self.on is None, self.text
        ordered, program = max(self.barrier, self.cluster_barrier), self.program
        address = self._address(args[1 if op[0] == "ld" else 0], "u4").astype(np.int64)
        if op[:2] == ["ld", "shared::cluster"]:
            self.cluster_reads += 1
            program = program // self.num_ctas * self.num_ctas + address // WINDOW - 1
            word = program, address % WINDOW // 4
            self._order(self.stored[word] < self.cluster_barrier, "reads another program's store")
            self.read_by_others[word] = self.number
        else:
            word = program, address // 4
        if op[0] == "st":
            value = self._value(args[1].strip("{} "), "u4")
            self._order((self.read[word] < ordered) & (self.read_by_others[word] < self.cluster_barrier), "stores after a read")
            self._order((self.stored[word] < ordered) | (self.shared[word] == value), "stores after a store")
            self.shared[word] = value
            self._order(self.shared[word] == value, "threads store different values")
            self.stored[word] = self.number
            return
        if op[1] == "shared":
            self._order(self.stored[word] < ordered, "reads another thread's store")
            self.read[word] = self.number
        self._order(self.stored[word] >= 0, "reads what nobody stored")
        self._set(args[0].strip("{} "), self.shared[word])

    def _do_bar(self, op: list[str], args: list[str]) -> None:
        self.barrier = self.number

    def _do_barrier(self, op: list[str], args: list[str]) -> None:
        assert op[1] == "cluster", self.text
        if op[2] == "wait":
            self.cluster_barrier = self.number

    def _do_mapa(self, op: list[str], args: list[str]) -> None:
        self._set(args[0], self._value(args[1], "u4") + (self._value(args[2], "u4") + np.uint32(1)) * np.uint32(WINDOW))

    def _do_shfl(self, op: list[str], args: list[str]) -> None:
        assert op[:3] == ["shfl", "sync", "bfly"], self.text
        self._set(args[0], self._value(args[1], "u4")[np.arange(self.count) ^ int(args[2])])

    def _do_mov(self, op: list[str], args: list[str]) -> None:
        if args[0].startswith("{"):
            halves = self._value(args[1], "u4").view("u2").reshape(-1, 2)
            for i, name in enumerate(args[0].strip("{} ").split(",")):
                self._set(name.strip(), halves[:, i].copy())
        elif args[1].startswith("{"):
            low, high = (self._value(name.strip(), "u2").astype("u4") for name in args[1].strip("{} ").split(","))
            self._set(args[0], low | high << np.uint32(16))
        else:
            self._set(args[0], self._value(args[1], TYPES[op[-1]]))

    def _do_cvt(self, op: list[str], args: list[str]) -> None:
        target, source = op[-2], op[-1]
        if target in ("bf16x2", "f16x2"):  # the first operand is the upper half
            high, low = (self._value(name, "f4") for name in args[1:])
            halves = [float_to_bfloat16(v) if target == "bf16x2" else v.astype("f2").view("u2") for v in (low, high)]
            self._set(args[0], halves[0].astype("u4") | halves[1].astype("u4") << np.uint32(16))
        elif target == "bf16":
            self._set(args[0], float_to_bfloat16(self._value(args[1], "f4")))
        elif source == "bf16":
            self._set(args[0], bfloat16_to_float(self._value(args[1], "u2")))
        else:
            self._set(args[0], self._value(args[1], TYPES[source]).astype(TYPES[target]))

    def _do_mul(self, op: list[str], args: list[str]) -> None:
        kind = TYPES[op[-1]]
        a, b = self._value(args[1], kind), self._value(args[2], kind)
        if op[1] == "wide":
            a, b = (v.astype(f"{kind[0]}{2 * v.dtype.itemsize}") for v in (a, b))
        self._set(args[0], a * b)

    def _do_fma(self, op: list[str], args: list[str]) -> None:
        assert op[-1] == "f32", self.text
        a, b, c = (self._value(name, "f4").astype("f8") for name in args[1:])
        self._set(args[0], (a * b + c).astype("f4"))

    def _do_ex2(self, op: list[str], args: list[str]) -> None:
        self._set(args[0], np.exp2(self._value(args[1], "f4")))

    def _do_sqrt(self, op: list[str], args: list[str]) -> None:
        self._set(args[0], np.sqrt(self._value(args[1], "f4")))

    def _do_setp(self, op: list[str], args: list[str]) -> None:
        kind = TYPES[op[-1]]
        self._set(args[0], COMPARE[op[1]](self._value(args[1], kind), self._value(args[2], kind)))

    def _do_selp(self, op: list[str], args: list[str]) -> None:
        kind = TYPES[op[-1]]
        self._set(args[0], np.where(self.registers[args[3]], self._value(args[1], kind), self._value(args[2], kind)))

    def _do_bfe(self, op: list[str], args: list[str]) -> None:
        mask = np.uint32((1 << int(args[3])) - 1)
        self._set(args[0], self._value(args[1], "u4") >> self._value(args[2], "u4") & mask)

    def _do_prmt(self, op: list[str], args: list[str]) -> None:
        pair = np.stack([self._value(name, "u4") for name in args[1:3]], axis=1).view(np.uint8)
        picked = [int(args[3].rstrip("U"), 0) >> 4 * i & 7 for i in range(4)]
        self._set(args[0], np.ascontiguousarray(pair[:, picked]).view("u4")[:, 0])

"""A machine that runs PTX in numpy, all threads of a cluster's programs at once: what Triton compiled, with no GPU.

A register is an array with one element a thread. Threads that branch apart run one group after the other, the one that is
furthest behind first, and meet again where they can. What a GPU does asynchronously happens as late as it is allowed to
(hopper.py, warp.py), what it forbids raises. thread.py, warp.py and hopper.py register what each instruction does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import TYPES
from .knowledge import MemoryFaultError
from .memory import SHARED_BASE, Global, Shared
from .order import Order
from .text import Address, Instruction, Program, Register

STORAGE = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
IGNORED = {  # hints, and the order of other grids' accesses
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "setmaxnreg",
    "pragma",
    "discard",
    "applypriority",
}
MOST_STEPS = 1 << 20

Step = Callable[["Machine"], None]
HANDLERS: dict[str, Callable[[Instruction, Code], Step]] = {}
OTHERWISE = ""  # the name of the handler for every instruction that has none of its own


class UnsupportedError(NotImplementedError):
    """An instruction that this machine does not know."""


class DeadlockError(AssertionError):
    """Threads wait for what will never come."""


def handler(*names: str) -> Callable[[Any], Any]:
    """Register a function that makes a step of an instruction whose mnemonic begins with one of these names."""

    def register(function: Any) -> Any:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


AGENTS = {  # what an instruction starts that it does not wait for (order.py), by how its mnemonic begins
    "copy": ("cp.async.ca", "cp.async.cg"),
    "send": ("cp.async.bulk",),
    "sent": ("cp.async.bulk",),
    "product": ("wgmma",),
    "phase": ("mbarrier",),
}
ELEMENT_BYTES = {
    0: 1,
    1: 2,
    2: 4,
    3: 4,
    4: 8,
    5: 8,
    6: 2,
    7: 4,
    8: 4,
    9: 8,
    10: 2,
    11: 4,
    12: 4,
}  # of a descriptor, by elemtype


def access_bytes(instruction: Instruction, space: str) -> int:
    """The bytes that an instruction accesses at once in a space, or 8 where it accesses none or more."""
    op = instruction.op
    if op[:2] == ("cp", "async") and op[2] in ("ca", "cg"):
        return min(8, int(instruction.operands[2]))
    if "elemtype" in op and space == "global":
        return ELEMENT_BYTES[instruction.operands[-1]]
    if op[0] in ("ld", "st") and any(part.startswith(space) for part in op):
        value = instruction.operands[0 if op[0] == "ld" else 1]
        return min(8, np.dtype(TYPES[op[-1]]).itemsize * (len(value) if isinstance(value, tuple) else 1))
    return 8


class Code:
    """A program made ready to run: basic blocks of steps, each ended by a control instruction or by running on."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.classes = program.classes
        mnemonics = {".".join(instruction.op[:4]) for instruction in program.instructions}
        self.agents = {kind for kind, beginnings in AGENTS.items() if any(name.startswith(beginnings) for name in mnemonics)}
        self.units = {
            space: min((access_bytes(i, space) for i in program.instructions), default=8) for space in ("global", "shared")
        }
        starts = {0, *program.labels.values()}
        for i, instruction in enumerate(program.instructions):
            if is_control(instruction):
                starts.add(i + 1)
        order = sorted(s for s in starts if s < len(program.instructions))
        number = {start: block for block, start in enumerate(order)}
        self.targets = {name: number.get(at, len(order)) for name, at in program.labels.items()}
        self.blocks: list[tuple[list[Step], Instruction | None]] = []
        for start, end in zip(order, [*order[1:], len(program.instructions)]):
            body = program.instructions[start:end]
            control = body[-1] if is_control(body[-1]) else None
            self.blocks.append(([self.step(i) for i in (body[:-1] if control else body)], control))

    def step(self, instruction: Instruction) -> Step:
        """The step of one instruction, under its guard."""
        if instruction.op[0] in IGNORED:
            return nothing
        names = (".".join(instruction.op[:parts]) for parts in (3, 2, 1))  # the longest that is known
        make = next((HANDLERS[name] for name in names if name in HANDLERS), HANDLERS[OTHERWISE])
        try:
            run = make(instruction, self)
        except (KeyError, NotImplementedError) as error:  # of a type, a modifier or an operand
            raise UnsupportedError(instruction.text) from error
        if instruction.guard is None:
            return run
        register, negated = instruction.guard

        def guarded(m: Machine) -> None:
            before = m.mask
            mask = m.registers[register.index]
            mask = ~mask if negated else mask
            mask = mask if before is None else mask & before
            if mask.any():
                m.mask = None if mask.all() else mask
                run(m)
                m.mask = before

        return guarded

    def read(self, operand: Any, kind: str) -> Callable[[Machine], Any]:
        """A function that gives an operand's value as numbers of a PTX type."""
        number: Any = TYPES[kind]
        if isinstance(operand, Register):
            index = operand.index
            if "product" in self.agents:
                return self._checked_read(index, kind)
            if STORAGE[self.classes[index]]().itemsize == np.dtype(number).itemsize:
                return lambda m: m.registers[index].view(number)
            size = np.dtype(number).itemsize
            return lambda m: m.registers[index].astype(f"u{size}").view(number)
        if isinstance(operand, int):
            if kind == "pred":
                constant: Any = np.bool_(operand != 0)
            else:
                size = np.dtype(number).itemsize
                constant = np.array(operand & ((1 << 8 * size) - 1), f"u{size}").view(number)
            return lambda m: constant
        if operand in SPECIAL:
            special = SPECIAL[operand]
            return lambda m: np.asarray(special(m)).astype(number)
        if operand in self.program.parameters:  # its address: kernels choose between two pointers that way
            slot = np.asarray(self.program.parameters.index(operand), number)
            return lambda m: slot
        if operand == "global_smem":
            return lambda m: np.asarray(SHARED_BASE, number)
        raise UnsupportedError(f"operand {operand!r}")

    def _checked_read(self, index: int, kind: str) -> Callable[[Machine], Any]:
        """As read, of a register that a wgmma under way may be writing."""
        number: Any = TYPES[kind]
        size = np.dtype(number).itemsize
        same = STORAGE[self.classes[index]]().itemsize == size

        def read(m: Machine) -> Any:
            if index in m.in_flight:
                m.refuse_in_flight(index, "read")
            m.touched.add(index)
            return m.registers[index].view(number) if same else m.registers[index].astype(f"u{size}").view(number)

        return read

    def address(self, operand: Address) -> Callable[[Machine], np.ndarray]:
        """A function that gives each thread's address."""
        base = self.read(operand.base, "u64")
        offset = np.int64(operand.offset).astype(np.uint64)
        return lambda m: np.broadcast_to(base(m) + offset, m.lanes.shape)

    def write(self, operand: Any) -> Callable[[Machine, Any], None]:
        """A function that sets a register in the active threads. "_" takes nothing."""
        if operand == "_":
            return lambda m, value: None
        if not isinstance(operand, Register):
            raise UnsupportedError(f"destination {operand!r}")
        index, storage = operand.index, STORAGE[self.classes[operand.index]]
        size = np.dtype(storage).itemsize

        def write(m: Machine, value: Any) -> None:
            value = np.asarray(value)
            if value.dtype.itemsize == size:
                value = value.view(storage)
            else:
                value = value.astype(f"i{size}" if value.dtype.kind == "i" else f"u{size}").view(storage)
            m.set(index, value)

        return write


def is_control(instruction: Instruction) -> bool:
    """Whether an instruction ends a block."""
    op = instruction.op
    return op[0] in ("bra", "ret", "exit", "trap") or op[:2] in (("bar", "sync"), ("barrier", "sync")) or (
        op[:2] == ("barrier", "cluster") and op[2] == "wait"
    )  # fmt: skip


class Machine:
    """A cluster of programs running a Code. lanes: the number of each thread in the cluster.

    order: what each thread knows of the others' accesses. seed: None runs the threads that are furthest behind first, all together;
    a number runs one group of warps at a time, drawn.
    """

    def __init__(
        self, code: Code, memory: Global, parameters: list[int], block: int, grid: int, shared: int, programs: int = 1,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self.code, self.memory, self.grid, self.programs = code, memory, grid, programs
        self.threads = code.program.threads
        self.lanes = np.arange(self.threads * programs)
        self.program_of = self.lanes // self.threads
        self.block = block  # the number of the cluster's first program
        self.parameters = np.array([value & (2**64 - 1) for value in parameters], np.uint64)
        self.registers: list[np.ndarray] = [_poison(kind, self.lanes.size) for kind in code.classes]
        self.mask: np.ndarray | None = None
        self.order = Order(self.threads, programs, block // programs, code.agents)
        self.shared = Shared(shared, self.threads, programs, self.order, code.units["shared"], memory.traffic)
        memory.begin(self.order, code.units["global"])
        self.state: dict[str, Any] = {}  # of asynchronous instructions
        self.in_flight: dict[int, InFlight] = {}  # registers that wgmma writes or reads, by number
        self.touched = set(range(len(self.registers)))  # since the last wgmma.fence; before the first, every register
        self.draw = None if seed is None else np.random.default_rng((seed, block))
        self.arrivals, self.waits = np.zeros((2, self.lanes.size), np.int64)  # of each thread at the cluster's barrier
        self.completed = 0  # phases of the cluster's barrier

    def set(self, index: int, value: np.ndarray) -> None:
        """Write a register in the active threads."""
        if index in self.in_flight:
            self.refuse_in_flight(index, "written")
        self.touched.add(index)
        if self.mask is None:
            self.registers[index] = value if value.shape == self.lanes.shape else np.broadcast_to(value, self.lanes.shape)
        else:
            self.registers[index] = np.where(self.mask, value, self.registers[index])

    def refuse_in_flight(self, index: int, verb: str) -> None:
        """Raise where a wgmma that these threads did not wait for writes the register, or reads it and it is written."""
        flight = self.in_flight[index]
        if (flight.value is not None or verb == "written") and flight.group[self.active()].any():
            raise MemoryFaultError(f"{flight.what}: register {index} is {verb} before the product is waited for")

    def active(self) -> np.ndarray:
        """The numbers of the active threads."""
        return self.lanes if self.mask is None else self.lanes[self.mask]

    def run(self) -> None:
        """Run every thread to its end."""
        end = len(self.code.blocks)
        at = np.zeros(self.lanes.size, np.int64)  # the block each thread is in
        waiting = np.zeros(self.lanes.size, np.int8)  # 1: at its program's barrier, 2: at the cluster's
        stalled = np.zeros(self.lanes.size, bool)
        with np.errstate(all="ignore"):
            for _ in range(MOST_STEPS):
                ready = (at < end) & (waiting == 0)
                if not ready.any():
                    if (at >= end).all():
                        return
                    raise DeadlockError(f"{int((waiting > 0).sum())} threads at a barrier that others never reach")
                if (ready & ~stalled).any():
                    ready &= ~stalled
                elif stalled.any():
                    raise DeadlockError(f"{int(ready.sum())} threads wait for a barrier in memory that nobody completes")
                ready = self._drawn(ready)
                block = int(at[ready].min())
                group = ready & (at == block)
                self.mask = None if group.all() else group
                steps, control = self.code.blocks[block]
                for step in steps:
                    step(self)
                self._leave(block, group, control, at, waiting, end)
                if control is not None and "try_wait" in self.state and (at[group] == block).all():
                    stalled |= group  # it looped: others first
                else:
                    stalled[:] = False
                self.state.pop("try_wait", None)
        raise DeadlockError("no end in sight")

    def _drawn(self, ready: np.ndarray) -> np.ndarray:
        """Those of the ready threads that run next: all, or by the seed one warp's, or four warps' where products need them."""
        if self.draw is None:
            return ready
        together = 32 * (4 if "product" in self.code.agents else 1)
        groups = np.unique(np.flatnonzero(ready) // together)
        return ready & (self.lanes // together == self.draw.choice(groups))

    def _leave(self, block: int, group: np.ndarray, control: Instruction | None, at: Any, waiting: Any, end: int) -> None:
        at[group] = block + 1
        if control is None:
            return
        if control.op[0] in ("bar", "barrier"):
            cluster = control.op[1] == "cluster"
            if not cluster and (control.operands[0] != 0 or len(control.operands) > 1):
                raise UnsupportedError(control.text)
            self.waits[group] += cluster
            if (self.waits > self.arrivals).any():
                raise MemoryFaultError(f"{control.text}: a thread that did not arrive at the cluster's barrier")
            waiting[group] = 2 if cluster else 1
            self._release(at, waiting, end)
            return
        if control.guard is not None:
            register, negated = control.guard
            group = group & (~self.registers[register.index] if negated else self.registers[register.index])
        if control.op[0] == "trap" and group.any():
            raise AssertionError("trap: an assertion in the kernel failed")
        at[group] = end if control.op[0] in ("ret", "exit") else self.code.targets[control.operands[-1]]
        self._release(at, waiting, end)

    def _release(self, at: np.ndarray, waiting: np.ndarray, end: int) -> None:
        """Let those go on whose barrier everyone has reached."""
        if self.programs == 1 and not waiting.any():
            return
        by_program = waiting.reshape(self.programs, -1)
        done = at.reshape(self.programs, -1) >= end
        for program in np.flatnonzero((by_program == 1).any(1) & ((by_program == 1) | done).all(1)):
            self.order.join(program * self.threads + np.flatnonzero(by_program[program] == 1))
            by_program[program] = 0
        if self.programs == 1:
            return
        if ((self.arrivals > self.completed) | (at >= end)).all() and (self.arrivals > self.completed).any():
            self.completed += 1
            self.order.cluster_complete()
        through = (waiting == 2) & (self.waits <= self.completed)
        if through.any():
            self.order.cluster_wait(np.flatnonzero(through))
            waiting[through] = 0


class InFlight:
    """Registers that a wgmma under way uses: of which group in each thread (0: none), and their result where it writes them."""

    def __init__(self, registers: tuple[int, ...], group: np.ndarray, value: np.ndarray | None, what: str) -> None:
        self.registers, self.group, self.value, self.what = registers, group, value, what


def nothing(m: Machine) -> None:
    """A step that does nothing."""


def _poison(kind: str, lanes: int) -> np.ndarray:
    return np.zeros(lanes, bool) if kind == "pred" else np.full(lanes, -1).astype(STORAGE[kind])


SPECIAL: dict[str, Callable[[Machine], Any]] = {
    "%tid.x": lambda m: m.lanes % m.threads,
    "%ntid.x": lambda m: m.threads,
    "%laneid": lambda m: m.lanes % 32,
    "%ctaid.x": lambda m: m.block + m.program_of,
    "%nctaid.x": lambda m: m.grid,
    "%clusterid.x": lambda m: m.block // m.programs,
    "%nclusterid.x": lambda m: m.grid // m.programs,
    "%cluster_ctarank": lambda m: m.program_of,
    "%cluster_ctaid.x": lambda m: m.program_of,
    "%cluster_nctaid.x": lambda m: m.programs,
    "%cluster_nctarank": lambda m: m.programs,
    **{f"%{name}.{axis}": (lambda m: 0) for name in ("tid", "ctaid", "clusterid", "cluster_ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": (lambda m: 1) for name in ("ntid", "nctaid", "nclusterid", "cluster_nctaid") for axis in "yz"},
}

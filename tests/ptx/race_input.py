"""A launch as SentryWard reads it: PTX, and a JSON object of its grid, its block and its parameters.

SentryWard (a verifier of PTX, for `python -m tests.ptx.races`) takes pointers as symbols: each is an array of its own, as long as need be.
It knows no values either, so to it two threads that store the same at one address are a race. Triton lets threads that hold copies of
an element do that. `watched` finds such stores while the PTX machine, which compares the values, runs the launch, and
`by_one_thread` leaves one thread of each such set to store.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np

from fused_ops.testing.ptx import gpu
from fused_ops.testing.ptx.deletions import synchronisations
from fused_ops.testing.ptx.grid import run_grid
from fused_ops.testing.ptx.machine import Code, Machine
from fused_ops.testing.ptx.memory import Global
from fused_ops.testing.ptx.text import Address, Instruction, Parser, Program, Register

from .main_kernels import Case

SCHEMA = "spverify.kernel-input/v1"
LOADS = ("ld", "atom", "red", "ldmatrix")
NOT_DATA = ("param", "const")  # spaces whose contents the launch fixes
ASYNCHRONOUS = {"wgmma": "wgmma", "cp.async.bulk.tensor": "tensor copies (TMA)"}
_PARAMETER = re.compile(r"\.param\s+\.(\w+)((?:\s+\.ptr)?)[^,()]*?(\w+)\s*(?=[,)]|$)")


@dataclass
class Run:
    """One launch that the PTX machine ran. case: the name of the call that made it. ptx: what Triton compiled.

    programs: in all, ctas of them a cluster. shared: bytes of shared memory a program. parameters: the bits of each of the kernel's.
    copies: of each store, by its text, the bits of a thread's number without which another thread stores the same there.
    """

    case: str
    kernel: str
    ptx: str
    programs: int
    ctas: int
    shared: int
    parameters: list[int]
    copies: dict[str, int] = field(default_factory=dict)

    @cached_property
    def program(self) -> Program:
        return Parser(self.ptx).program

    @cached_property
    def target(self) -> str:
        found = re.search(r"\.target\s+(\w+)", self.ptx)
        assert found is not None
        return found[1]

    @property
    def structure(self) -> tuple[Any, ...]:
        """What tells kernels apart that differ in how their threads work together."""
        kinds = tuple(one.kind for one in synchronisations(self.ptx))
        return self.kernel, self.target, self.program.threads, self.ctas, self.shared, kinds

    @property
    def verified(self) -> str:
        """The PTX to verify: each store of copies by one thread."""
        return by_one_thread(self.ptx, self.copies)


def as_input(run: Run, programs: int | None = None) -> dict[str, Any]:
    """The JSON object that describes a launch, or one of so many programs. Pointers, which the PTX marks, and floats may be any."""
    head = re.search(r"\.entry\s+\S+\s*\((.*?)\)", run.ptx, re.S)
    assert head is not None
    declared = [(kind, bool(pointer), name) for kind, pointer, name in _PARAMETER.findall(head[1])]
    assert [name for _, _, name in declared] == run.program.parameters
    arguments = []
    for (kind, pointer, name), bits in zip(declared, run.parameters):
        if not pointer and kind[0] in "usb":
            arguments.append({"parameter": name, "type": "u" + kind[1:], "value": bits & ((1 << int(kind[1:])) - 1)})
    launch = {
        "grid_dim": [programs or run.programs, 1, 1],
        "block_dim": [run.program.threads, 1, 1],
        "cluster_dim": [run.ctas, 1, 1],
        "dynamic_shared_bytes": run.shared,
    }
    return {"schema": SCHEMA, "launch": launch, "arguments": arguments}


class _Watched(Code):
    """A program that notes which threads store at one address in one instruction.

    copies: by the text of a store, the bits of a thread's number that make no difference to where any execution of it stores.
    """

    def __init__(self, program: Program) -> None:
        self.copies: dict[str, int] = {}
        super().__init__(program)

    def step(self, instruction: Instruction) -> Any:
        run = super().step(instruction)
        if instruction.op[0] != "st":
            return run
        address = self.address(instruction.operands[0])

        def watched(m: Machine) -> None:
            active = np.ones(m.lanes.size, bool) if m.mask is None else m.mask.copy()
            if instruction.guard is not None:
                register, negated = instruction.guard
                active &= ~m.registers[register.index] if negated else m.registers[register.index]
            self._note(instruction.text, m.threads, np.flatnonzero(active), active, address(m))
            run(m)

        return watched

    def _note(self, text: str, threads: int, lanes: np.ndarray, active: np.ndarray, addresses: np.ndarray) -> None:
        if not lanes.size:
            return
        candidates = self.copies.get(text, threads - 1 if threads & (threads - 1) == 0 else 0)
        self.copies[text] = 0
        for bit in (1 << i for i in range(candidates.bit_length())):
            others = lanes ^ bit
            if candidates & bit and active[others].all() and (addresses[lanes] == addresses[others]).all():
                self.copies[text] |= bit


def by_one_thread(ptx: str, copies: dict[str, int]) -> str:
    """ptx with each store executed only by threads without the bits that copies says of it. Lines keep their numbers."""
    for text, bits in copies.items():
        if not bits:
            continue
        found = re.fullmatch(r"(?:@(!?)(\S+) )?(.*)", text)
        assert found is not None
        negated, guard, store = found.groups()
        also = "" if guard is None else f"{'not' if negated else 'mov'}.pred %also, {guard}; and.pred %one, %one, %also; "
        one = (
            "{ .reg .pred %one, %also; .reg .b32 %thread; mov.u32 %thread, %tid.x; "
            f"and.b32 %thread, %thread, {bits}; setp.eq.u32 %one, %thread, 0; {also}@%one {store}; }}"
        )
        ptx, count = re.subn(r"\s+".join(map(re.escape, text.split())) + r"\s*;", lambda _, one=one: one, ptx)
        if not count:
            raise ValueError(f"{text!r} is not in the PTX")
    return ptx


@dataclass
class _Seen:
    """What run_grid was given, and the memory as it was before."""

    code: _Watched
    before: Global
    memory: Global
    parameters: list[int]
    grid: int
    shared: int
    ctas: int


@contextmanager
def watched() -> Iterator[list[_Seen]]:
    """While active, what the PTX machine runs is watched."""
    seen = []

    def run(
        code: Code, memory: Global, parameters: list[int], grid: int, shared: int, ctas: int = 1, seed: int | None = None
    ) -> Any:
        own = _Watched(code.program)
        seen.append(_Seen(own, copy.deepcopy(memory), memory, parameters, grid, shared, ctas))
        return run_grid(own, memory, parameters, grid, shared, ctas, seed)

    with mock.patch.object(gpu, "run_grid", run):
        yield seen


def runs_of(case: Case) -> list[Run]:
    """The launches of a case. They are run again with copies stored by one thread.

    AssertionError where that makes a difference to any byte of global memory.
    """
    with case.ready() as (device, call):
        before = len(device.launches)
        with watched() as seen:
            call()
        launches = device.launches[before:]
    found = []
    for launch, one in zip(launches, seen, strict=True):
        run = Run(
            case.name, launch.kernel, launch.compiled.asm["ptx"], one.grid * one.ctas, one.ctas, one.shared, one.parameters,
            one.code.copies,
        )  # fmt: skip
        if any(run.copies.values()):
            for _ in run_grid(Code(Parser(run.verified).program), one.before, one.parameters, one.grid, one.shared, one.ctas):
                pass
            for i in range(len(one.memory.allocations)):
                assert one.before.content(i).tobytes() == one.memory.content(i).tobytes(), (
                    f"{case.name}: {launch.kernel}: no copies"
                )
        found.append(run)
    return found


def beyond(program: Program) -> str:
    """Why SentryWard 0.1.1 cannot read a program, as far as its instructions tell: empty where it should."""
    names = [".".join(instruction.op) for instruction in program.instructions]
    found = [what for beginning, what in ASYNCHRONOUS.items() if any(name.startswith(beginning) for name in names)]
    if found:
        return ", ".join(found)
    data = _from_memory(program)
    for instruction in program.instructions:
        if instruction.op[0] == "bra" and instruction.guard is not None and instruction.guard[0].index in data:
            return "a branch depends on what is loaded"
    for instruction in program.instructions:
        places = [o.base for o in instruction.operands if isinstance(o, Address) and isinstance(o.base, Register)]
        if any(place.index in data for place in places):
            return "an address depends on what is loaded"
    return ""


def _from_memory(program: Program) -> set[int]:
    """The numbers of the registers whose value depends on what is loaded from global or shared memory."""
    data: set[int] = set()
    grown = True
    while grown:
        before = len(data)
        for instruction in program.instructions:
            if not instruction.operands or instruction.op[0] in ("st", "bra"):
                continue
            loads = instruction.op[0] in LOADS and not set(instruction.op) & set(NOT_DATA)
            read = _registers(instruction.operands[1:]) | ({instruction.guard[0].index} if instruction.guard else set())
            if loads or read & data:
                data |= _registers(instruction.operands[:1])
        grown = len(data) > before
    return data


def _registers(operands: Any) -> set[int]:
    if isinstance(operands, Register):
        return {operands.index}
    if isinstance(operands, Address):
        return _registers(operands.base)
    return set().union(*map(_registers, operands)) if isinstance(operands, tuple) else set()

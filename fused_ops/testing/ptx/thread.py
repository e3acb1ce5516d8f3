"""Instructions that every thread executes by itself: arithmetic, moves, loads and stores."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .arithmetic import TYPES, WIDER, arithmetic, comparison, convert, convert_pair
from .knowledge import MemoryFaultError
from .machine import OTHERWISE, Code, Machine, Step, UnsupportedError, handler, nothing
from .memory import RANK_SHIFT, Global, Shared
from .text import Instruction

SPACES = ("param", "global", "shared", "shared::cta", "shared::cluster")


@handler(OTHERWISE)
def _arithmetic(instruction: Instruction, code: Code) -> Step:
    """add, mul, fma, setp, cvt and the like."""
    op, operands = instruction.op, instruction.operands
    if op[0] == "cvt":
        found = convert_pair(op) or convert(op)
    else:
        found = arithmetic(op)
    if found is None:
        raise UnsupportedError(instruction.text)
    function, kind, _ = found
    kinds = [kind] * (len(operands) - 1)
    if op[0] in ("shl", "shr"):
        kinds[1] = "u32"
    elif op[0] == "bfe":
        kinds[1:] = ["u32", "u32"]
    elif op[0] == "mad" and "wide" in op:
        kinds[2] = {4: "u32", 8: "u64"}[np.dtype(WIDER[kind]).itemsize]
    reads = [code.read(operand, k) for operand, k in zip(operands[1:], kinds)]
    write = code.write(operands[0])
    return lambda m: write(m, function(*[read(m) for read in reads]))


@handler("setp")
def _compare(instruction: Instruction, code: Code) -> Step:
    if len(instruction.operands) != 3 or len(instruction.op) > 4:
        raise UnsupportedError(instruction.text)
    function, kind = comparison(instruction.op)
    target = instruction.operands[0]
    if kind.endswith("x2"):  # a predicate for each half of a register, the lower first
        halves = [code.read(operand, "b32") for operand in instruction.operands[1:]]
        writes = [code.write(t) for t in target]

        def both(m: Machine) -> None:
            pairs: list[np.ndarray] = [
                np.ascontiguousarray(np.broadcast_to(read(m), m.lanes.shape)).view(TYPES[kind[:-2]]) for read in halves
            ]
            found = function(*(pair.reshape(-1, 2) for pair in pairs))
            for i, write in enumerate(writes):
                write(m, found[:, i])

        return both
    a, b = (code.read(operand, kind) for operand in instruction.operands[1:])
    write = code.write(target)
    return lambda m: write(m, function(a(m), b(m)))


@handler("selp")
def _select(instruction: Instruction, code: Code) -> Step:
    kind = instruction.op[-1]
    a, b = (code.read(operand, kind) for operand in instruction.operands[1:3])
    condition = code.read(instruction.operands[3], "pred")
    write = code.write(instruction.operands[0])
    return lambda m: write(m, np.where(condition(m), a(m), b(m)))


@handler("mov", "cvta")
def _move(instruction: Instruction, code: Code) -> Step:
    target, source = instruction.operands
    kind = instruction.op[-1]
    if isinstance(target, tuple):  # a register taken apart
        part = f"b{TYPES[kind](0).itemsize * 8 // len(target)}"
        whole, writes = code.read(source, kind), [code.write(t) for t in target]

        def apart(m: Machine) -> None:
            pieces: np.ndarray = np.ascontiguousarray(np.broadcast_to(whole(m), m.lanes.shape)).view(TYPES[part])
            for i, write in enumerate(writes):
                write(m, pieces.reshape(-1, len(target))[:, i])

        return apart
    write = code.write(target)
    if isinstance(source, tuple):  # put together
        part = f"b{TYPES[kind](0).itemsize * 8 // len(source)}"
        reads = [code.read(s, part) for s in source]

        def together(m: Machine) -> None:
            pieces = np.stack([np.broadcast_to(read(m), m.lanes.shape) for read in reads], axis=1)
            write(m, np.ascontiguousarray(pieces).view(TYPES[kind])[:, 0])

        return together
    read = code.read(source, kind)
    return lambda m: write(m, read(m))


@handler("createpolicy")
def _policy(instruction: Instruction, code: Code) -> Step:
    write = code.write(instruction.operands[0])
    return lambda m: write(m, np.uint64(0))


@handler("mapa")
def _remote_address(instruction: Instruction, code: Code) -> Step:
    """The shared::cluster address of an address in another program's shared memory."""
    kind = instruction.op[-1]
    address, rank = code.read(instruction.operands[1], kind), code.read(instruction.operands[2], "u32")
    write, number = code.write(instruction.operands[0]), TYPES[kind]
    own = number((1 << RANK_SHIFT) - 1)
    return lambda m: write(m, (address(m) & own) | ((rank(m).astype(number) + number(1)) << number(RANK_SHIFT)))


@handler("bar", "barrier")
def _arrive(instruction: Instruction, code: Code) -> Step:
    """Those at which nobody waits here: of a warp, and arriving at the cluster's. The others end a block (machine.py)."""
    op = instruction.op
    if op[:2] == ("bar", "warp") and instruction.operands[0] in (-1, 2**32 - 1):
        return lambda m: m.order.join_warps(m.active())
    if op[:3] != ("barrier", "cluster", "arrive"):
        raise UnsupportedError(instruction.text)

    def arrive(m: Machine) -> None:
        active = m.active()
        if (m.arrivals[active] > m.completed).any():
            raise MemoryFaultError(f"{instruction.text}: a thread arrives twice at one phase of the cluster's barrier")
        m.arrivals[active] += 1
        if "relaxed" not in op:
            m.order.cluster_arrive(active)

    return arrive


@handler("fence", "membar")
def _fence(instruction: Instruction, code: Code) -> Step:
    """Fences between proxies. Those between threads order nothing here without a barrier: there are no flags and no atomics."""
    op = instruction.op
    if op[:3] == ("fence", "proxy", "async"):
        return lambda m: m.order.fence_async(m.active())
    if op[:3] == ("fence", "proxy", "tensormap::generic") and "acquire" in op:
        address = code.address(instruction.operands[0])

        def acquire(m: Machine) -> None:
            for one in np.unique(address(m)[m.active()]):
                m.order.acquire_map(int(one), m.active()[address(m)[m.active()] == one])

        return acquire
    if op[0] == "membar" or op[1] in ("acq_rel", "sc", "mbarrier_init"):
        return nothing
    raise UnsupportedError(instruction.text)


def _memory(m: Machine, space: str) -> Global | Shared:
    return m.memory if space == "global" else m.shared


def _space(op: Iterable[str]) -> str:
    return next((part for part in op if part in SPACES), "generic")


@handler("ld")
def _load(instruction: Instruction, code: Code) -> Step:
    op, (target, source) = instruction.op, instruction.operands[:2]
    space, kind = _space(op), op[-1]
    number = TYPES[kind]
    if space == "param":
        write, slot = code.write(target), code.address(source)

        def parameter(m: Machine) -> None:
            bits = m.parameters[np.minimum(slot(m), m.parameters.size - 1).astype(np.int64)]
            write(m, bits.astype(f"u{np.dtype(number).itemsize}").view(number))

        return parameter
    if space == "generic":
        raise UnsupportedError(instruction.text)
    targets = target if isinstance(target, tuple) else (target,)
    writes, address, size = [code.write(t) for t in targets], code.address(source), np.dtype(number).itemsize

    def load(m: Machine) -> None:
        active = m.active()
        loaded = _memory(m, space).access(address(m)[active], active, size, len(targets), None, instruction.text)
        for i, write in enumerate(writes):
            values = np.zeros(m.lanes.size, loaded.dtype)
            values[active] = loaded[:, i]
            write(m, values.view(number))

    return load


@handler("st")
def _store(instruction: Instruction, code: Code) -> Step:
    op, (target, source) = instruction.op, instruction.operands[:2]
    space, kind = _space(op), op[-1]
    if space in ("generic", "param"):
        raise UnsupportedError(instruction.text)
    sources = source if isinstance(source, tuple) else (source,)
    size = np.dtype(TYPES[kind]).itemsize
    reads, address = [code.read(s, kind) for s in sources], code.address(target)

    def store(m: Machine) -> None:
        active = m.active()
        values = np.stack([np.broadcast_to(read(m), m.lanes.shape)[active].view(f"u{size}") for read in reads], axis=1)
        _memory(m, space).access(address(m)[active], active, size, len(sources), values, instruction.text)

    return store

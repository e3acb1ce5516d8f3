"""Instructions that a warp executes together: shuffles, matrix loads and stores, mma.sync, and asynchronous copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import TYPES
from .knowledge import LANES, MemoryFaultError
from .machine import Code, Machine, Step, UnsupportedError, handler
from .text import Instruction

LANE = np.arange(LANES)


def whole_warps(m: Machine, what: str) -> np.ndarray:
    """The numbers of the warps whose threads are all active. A warp in part would hang or read garbage on a GPU."""
    if m.mask is None:
        return np.arange(m.lanes.size // LANES)
    by_warp = m.mask.reshape(-1, LANES)
    if (by_warp.any(1) != by_warp.all(1)).any():
        raise MemoryFaultError(f"{what}: not all threads of a warp take part")
    return np.flatnonzero(by_warp.all(1))


def by_warp(values: Any, m: Machine, warps: np.ndarray) -> np.ndarray:
    """(warps, 32) of a value in each thread."""
    return np.broadcast_to(values, m.lanes.shape).reshape(-1, LANES)[warps]


def spread(m: Machine, warps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One element a thread from (warps, 32), zeros in the other warps."""
    out = np.zeros((m.lanes.size // LANES, LANES), values.dtype)
    out[warps] = values
    return out.reshape(-1)


@handler("shfl")
def _shuffle(instruction: Instruction, code: Code) -> Step:
    mode = instruction.op[2]
    target, source, by, clamp = instruction.operands[:4]
    if isinstance(target, tuple) or mode not in ("bfly", "idx", "up", "down"):
        raise UnsupportedError(instruction.text)
    read, amount, limit, write = code.read(source, "b32"), code.read(by, "u32"), code.read(clamp, "u32"), code.write(target)

    def shuffle(m: Machine) -> None:
        warps = whole_warps(m, instruction.text)
        values = by_warp(read(m), m, warps)
        b, c = (by_warp(f(m), m, warps).astype(np.int64) for f in (amount, limit))
        segment = (c >> 8) & 31  # the bits of a lane's number that stay
        lowest, highest = LANE & segment, (LANE & segment) | (c & 31 & ~segment)
        lane = {"bfly": LANE ^ b, "idx": lowest | (b & ~segment), "up": LANE - b, "down": LANE + b}[mode]
        inside = lane >= highest if mode == "up" else lane <= highest
        lane = np.where(inside, lane, LANE)
        write(m, spread(m, warps, np.take_along_axis(values, lane, axis=1)))

    return shuffle


@handler("redux")
def _reduce(instruction: Instruction, code: Code) -> Step:
    """A reduction of integers over the warp."""
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    function, kind = functions.get(instruction.op[2]), instruction.op[-1]
    if function is None or kind[0] == "f":
        raise UnsupportedError(instruction.text)
    read, write = code.read(instruction.operands[1], kind), code.write(instruction.operands[0])

    def reduce(m: Machine) -> None:
        warps = whole_warps(m, instruction.text)
        values = function.reduce(by_warp(read(m), m, warps), axis=1, keepdims=True, dtype=TYPES[kind])
        write(m, spread(m, warps, np.broadcast_to(values, (warps.size, LANES))))

    return reduce


@handler("elect")
def _elect(instruction: Instruction, code: Code) -> Step:
    """One thread of each warp: the first."""
    lane, chosen = (code.write(t) for t in instruction.operands[0])

    def elect(m: Machine) -> None:
        whole_warps(m, instruction.text)
        lane(m, np.uint32(0))
        chosen(m, m.lanes % LANES == 0)

    return elect


def _matrix_rows(m: Machine, addresses: np.ndarray, count: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, threads) of the rows of count 8x8 matrices: row i of matrix j is at the address of thread 8 j + i."""
    rows = by_warp(addresses, m, warps)[:, : 8 * count]
    threads = by_warp(m.lanes, m, warps)[:, : 8 * count]
    return rows.reshape(-1), threads.reshape(-1)


def _matrix_access(instruction: Instruction, code: Code) -> tuple[Any, int, Any, bool]:
    op = instruction.op
    if "b16" not in op or "m8n8" not in op:
        raise UnsupportedError(instruction.text)
    count = int(next(part for part in op if part in ("x1", "x2", "x4"))[1:])
    load = op[0] == "ldmatrix"
    registers, address = instruction.operands if load else reversed(instruction.operands)
    return code.address(address), count, registers if isinstance(registers, tuple) else (registers,), "trans" in op


@handler("ldmatrix")
def _load_matrix(instruction: Instruction, code: Code) -> Step:
    address, count, targets, trans = _matrix_access(instruction, code)
    writes = [code.write(t) for t in targets]

    def load(m: Machine) -> None:
        warps = whole_warps(m, instruction.text)
        rows, threads = _matrix_rows(m, address(m), count, warps)
        matrices = m.shared.access(rows, threads, 2, 8, None, instruction.text).reshape(warps.size, count, 8, 8)
        matrices = matrices.swapaxes(2, 3) if trans else matrices
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(warps.size, count, LANES)
        for i, write in enumerate(writes):
            write(m, spread(m, warps, pairs[:, i]))

    return load


@handler("stmatrix")
def _store_matrix(instruction: Instruction, code: Code) -> Step:
    address, count, sources, trans = _matrix_access(instruction, code)
    reads = [code.read(s, "b32") for s in sources]

    def store(m: Machine) -> None:
        warps = whole_warps(m, instruction.text)
        pairs = np.ascontiguousarray(np.stack([by_warp(read(m), m, warps) for read in reads], axis=1))
        matrices = pairs.view(np.uint16).reshape(warps.size, count, 8, 8)
        matrices = matrices.swapaxes(2, 3) if trans else matrices
        rows, threads = _matrix_rows(m, address(m), count, warps)
        m.shared.access(rows, threads, 2, 8, matrices.reshape(-1, 8), instruction.text)

    return store


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of the values of a type packed in 32-bit registers: (..., registers) to (..., registers, values)."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    bits = np.ascontiguousarray(bits)[..., None]
    return bits.view(TYPES[kind]).astype(np.float32)


def fragment(values: np.ndarray, halves: bool) -> np.ndarray:
    """A matrix (warps, rows, K) from (warps, 32, registers, values) of an mma operand. halves: rows come in two halves of 8."""
    warps, _, registers, each = values.shape
    rows = 16 if halves else 8
    matrix = np.empty((warps, rows, 4 * each * registers // (2 if halves else 1)), np.float32)
    group, inside = LANE // 4, LANE % 4
    for i in range(registers):
        row = group + (8 * (i % 2) if halves else 0)
        first = 4 * each * (i // 2 if halves else i)
        for j in range(each):
            matrix[:, row, first + each * inside + j] = values[:, :, i, j]
    return matrix


@handler("mma")
def _mma(instruction: Instruction, code: Code) -> Step:
    op = instruction.op
    if op[1] != "sync" or op[4:6] != ("row", "col") or op[6] != "f32" or op[9] != "f32" or op[7] != op[8]:
        raise UnsupportedError(instruction.text)
    kind = op[7]
    d, a, b, c = instruction.operands
    writes = [code.write(t) for t in d]
    reads = [[code.read(s, "b32") for s in operand] for operand in (a, b)]
    adds = [code.read(s, "f32") for s in c]

    def mma(m: Machine) -> None:
        warps = whole_warps(m, instruction.text)
        packed = [np.stack([by_warp(read(m), m, warps) for read in operand], axis=2) for operand in reads]
        left, right = fragment(numbers(packed[0], kind), True), fragment(numbers(packed[1], kind), False)
        product = left @ right.swapaxes(1, 2)
        for i, (add, write) in enumerate(zip(adds, writes)):
            part = product[:, LANE // 4 + 8 * (i // 2), 2 * (LANE % 4) + i % 2]
            write(m, spread(m, warps, part + by_warp(add(m), m, warps)))

    return mma


@handler("cp.async")
def _copy(instruction: Instruction, code: Code) -> Step:
    """cp.async: the bytes arrive when they are waited for, and until then the destination holds NaN."""
    op = instruction.op
    if op[2] == "commit_group":
        return lambda m: m.order.commit("copy", m.active())
    if op[2] in ("wait_group", "wait_all"):
        left = instruction.operands[0] if instruction.operands else 0
        return lambda m: _arrive(m, left, op[2] == "wait_all")
    if op[2] not in ("ca", "cg"):
        raise UnsupportedError(instruction.text)
    target, source, size = instruction.operands[:3]
    to, start = code.address(target), code.address(source)
    valid = code.read(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def copy(m: Machine) -> None:
        active = m.active()
        program, offset = m.shared.locate(to(m)[active], active, size, instruction.text)
        content = np.zeros((active.size, size), np.uint8)
        count = np.full(active.size, size) if valid is None else np.broadcast_to(valid(m), m.lanes.shape)[active]
        if ((count != 0) & (count != size)).any():
            raise UnsupportedError("cp.async of a part of its bytes")
        some = count == size
        if some.any():
            words = m.memory.access(start(m)[active][some], active[some], 4, size // 4, None, instruction.text)
            content[some] = np.ascontiguousarray(words).view(np.uint8)
        m.order.copy(m.shared.shadow, m.shared.units(program, offset, size), active, instruction.text)
        where = offset[:, None] + np.arange(size)
        m.shared.poison(program[:, None], where)
        groups = m.order.committed["copy"][active] + 1
        m.state.setdefault("copies", []).append((active, groups, program, where, content))

    return copy


def _arrive(m: Machine, left: int, everything: bool) -> None:
    """What the active threads' groups copy is there, but for their last `left` groups."""
    if everything:
        m.order.commit("copy", m.active())
    m.order.await_groups("copy", m.active(), left)
    done = m.order.committed["copy"] - left
    waits = np.ones(m.lanes.size, bool) if m.mask is None else m.mask
    under_way = []
    for threads, groups, program, where, content in m.state.get("copies", []):
        there = waits[threads] & (groups <= done[threads])
        m.shared.data[program[there][:, None], where[there]] = content[there]
        if not there.all():
            under_way.append(tuple(x[~there] for x in (threads, groups, program, where, content)))
    m.state["copies"] = under_way

"""Hopper's matrix product, wgmma, of operands in shared memory or registers.

It reads when it is issued, and order.py refuses a write to what it reads until its group is waited for. Its registers hold the
result when it is waited for, and may not be touched before.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import TYPES
from .knowledge import LANES, MemoryFaultError
from .machine import Code, InFlight, Machine, Step, UnsupportedError, handler
from .text import Instruction
from .warp import LANE, by_warp, fragment, numbers, whole_warps

MATRIX_SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}  # by bits 62 and 63 of a matrix descriptor
GROUP = 4 * LANES  # threads that issue a wgmma together


def _matrix(
    m: Machine, thread: int, descriptor: int, rows: int, depth: int, size: int, transposed: bool, what: str
) -> np.ndarray:
    """(rows, depth) bits of an operand in shared memory, read by a thread's group. transposed: rows move fastest."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mask = MATRIX_SWIZZLE[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise UnsupportedError(f"{what}: a base offset")
    width, each = 16 * (mask + 1), 16 // size
    if transposed:
        k, piece = np.divmod(np.arange(depth * rows // each), rows // each)
        piece = piece * 16
        if mask:
            address = piece // width * leading + piece % width + k // 8 * stride + k % 8 * width
        else:
            address = piece // 16 * stride + k // 8 * leading + k % 8 * 16
    else:
        row, piece = np.divmod(np.arange(rows * depth // each), depth // each)
        address = row // 8 * stride + row % 8 * width + piece * (16 if mask else leading)
    address += start
    address ^= (address >> 7 & mask) << 4
    lanes = np.full(address.size, thread)
    program, offset = m.shared.locate(address.astype(np.uint64), lanes, 16, what)
    group = np.arange(thread, thread + GROUP)
    m.order.product(m.shared.shadow, m.shared.units(program, offset, 16).ravel(), group, what)
    bits = m.shared.data.view(f"u{size}")[program[:, None], (offset // size)[:, None] + np.arange(each)]
    return bits.reshape(depth, rows).T if transposed else bits.reshape(rows, depth)


@handler("wgmma")
def _wgmma(instruction: Instruction, code: Code) -> Step:
    op, what = instruction.op, instruction.text
    if op[1] == "fence":
        return lambda m: m.touched.clear()
    if op[1] == "commit_group":
        return lambda m: m.order.commit("product", m.active())
    if op[1] == "wait_group":
        return lambda m: _await_products(m, instruction.operands[0])
    shape, kind = op[4], op[6]
    if op[1] != "mma_async" or op[5] != "f32" or op[7] != kind or not shape.startswith("m64n"):
        raise UnsupportedError(what)
    columns, depth = (int(n) for n in shape[4:].split("k"))
    size = 4 if kind == "tf32" else TYPES[kind](0).itemsize
    d, a, b, scale, *flags = instruction.operands
    if flags[:2] != [1, 1]:
        raise UnsupportedError(what)
    a_transposed, b_transposed = (
        bool(f) for f in (flags[2:] if len(flags) == 4 else [0, *flags[2:]] if len(flags) == 3 else (0, 0))
    )
    accumulate, registers = code.read(scale, "pred"), tuple(register.index for register in d)
    number = np.arange(len(d))[:, None]  # which element of a warp's 16 rows each register holds in each lane
    row, column = LANE // 4 + 8 * (number // 2 % 2), 8 * (number // 4) + 2 * (LANE % 4) + number % 2
    a_reads = [code.read(register, "b32") for register in a] if isinstance(a, tuple) else [code.read(a, "u64")]
    b_read = code.read(b, "u64")

    def product(m: Machine) -> None:
        warps = whole_warps(m, what)
        if warps.size % 4 or (warps.reshape(-1, 4) != warps[::4, None] + np.arange(4)).any() or (warps[::4] % 4).any():
            raise MemoryFaultError(f"{what}: not all four warps of a group take part")
        threads = warps[::4] * LANES

        held = tuple(r.index for r in a) if isinstance(a, tuple) else ()
        if late := m.touched.intersection((*registers, *held)):
            raise MemoryFaultError(
                f"{what}: register {min(late)} was read or written since the last wgmma.fence, or there is none"
            )
        a_values = [np.broadcast_to(read(m), m.lanes.shape) for read in a_reads]
        m.touched.difference_update(held)  # products may share what they read
        b_values = np.broadcast_to(b_read(m), m.lanes.shape)
        out = np.empty((threads.size, 64, columns), np.float32)
        for i, thread in enumerate(threads.tolist()):
            right = _matrix(m, thread, int(b_values[thread]), columns, depth, size, b_transposed, what)
            if not isinstance(a, tuple):
                left = _matrix(m, thread, int(a_values[0][thread]), 64, depth, size, a_transposed, what)
            if isinstance(a, tuple):
                packed = np.stack([by_warp(v, m, warps[4 * i : 4 * i + 4]) for v in a_values], axis=2)
                matrix = fragment(numbers(packed, kind), True).reshape(64, depth)
            else:
                matrix = numbers(left, kind)[..., 0] if kind == "tf32" else left.view(TYPES[kind]).astype(np.float32)
            other = numbers(right, kind)[..., 0] if kind == "tf32" else right.view(TYPES[kind]).astype(np.float32)
            out[i] = matrix @ other.T
        keep = np.broadcast_to(accumulate(m), m.lanes.shape)
        parts = np.zeros((len(d), m.lanes.size // LANES, LANES), np.float32)
        parts[:, warps] = out.reshape(warps.size, 16, columns)[:, row, column].swapaxes(0, 1)
        values = parts.reshape(len(d), -1)
        if keep.any():
            values += np.where(keep, _accumulated(m, registers), np.float32(0))
        _start(m, InFlight(registers, _group(m), values, what))
        if isinstance(a, tuple):
            _start(m, InFlight(tuple(r.index for r in a), _group(m), None, what))

    return product


def _group(m: Machine) -> np.ndarray:
    """The number of the wgmma group that each active thread's warp commits next; 0 in other threads."""
    group = np.repeat(m.order.committed["product"] + 1, LANES)
    return group if m.mask is None else np.where(m.mask, group, 0)


def _accumulated(m: Machine, registers: tuple[int, ...]) -> np.ndarray:
    """(registers, threads): what these hold, or will when the products under way that write them are waited for."""
    flight = m.in_flight.get(registers[0])
    if flight is not None and flight.value is not None and flight.registers == registers and flight.group.all():
        return flight.value
    held = np.stack([m.registers[register] for register in registers]).view(np.float32)
    if flight is not None and flight.value is not None and flight.registers == registers:
        return np.where(flight.group > 0, flight.value, held)
    return held


def _start(m: Machine, flight: InFlight) -> None:
    """A wgmma uses registers from now on; other warps' products that use them stay, and this one's own that it adds to."""
    for before in {id(f): f for f in map(m.in_flight.get, flight.registers) if f is not None}.values():
        same = before.registers == flight.registers and (before.value is None) == (flight.value is None)
        if not same and ((before.group > 0) & (flight.group > 0)).any() and not (before.value is None and flight.value is None):
            raise MemoryFaultError(f"{flight.what}: registers of a product that nobody waited for")
        if same and before.value is not None and flight.value is not None:
            flight.value = np.where(flight.group > 0, flight.value, before.value)
        if same:
            flight.group = np.where(flight.group > 0, flight.group, before.group)
    m.in_flight.update(dict.fromkeys(flight.registers, flight))


def _await_products(m: Machine, left: int) -> None:
    """The registers of groups that are done hold their results."""
    m.order.await_groups("product", m.active(), left)
    done = np.repeat(m.order.committed["product"] - left, LANES)
    for flight in {id(f): f for f in m.in_flight.values()}.values():
        through = (flight.group > 0) & (flight.group <= done)
        if m.mask is not None:
            through &= m.mask
        if flight.value is not None and through.any():
            for register, value in zip(flight.registers, flight.value.view(np.uint32)):
                m.registers[register] = value if through.all() else np.where(through, value, m.registers[register])
        flight.group = np.where(through, 0, flight.group)
        if not flight.group.any():
            for register in flight.registers:
                if m.in_flight.get(register) is flight:
                    del m.in_flight[register]

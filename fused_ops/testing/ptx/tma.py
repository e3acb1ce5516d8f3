"""Hopper's copies by TMA: barriers in memory, tensor descriptors, and bulk copies in and out of shared memory.

A copy into shared memory leaves NaN there until its barrier is waited for. A copy out of it reads when it is issued, and order.py
refuses a write to what it reads until its group is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .knowledge import MemoryFaultError
from .machine import ELEMENT_BYTES, Code, Machine, Step, UnsupportedError, handler
from .text import Instruction
from .warp import whole_warps

DESCRIPTOR_FIELDS = ("rank", "elemtype", "interleave_layout", "swizzle_mode", "fill_mode")
SWIZZLE_BITS = {0: 0, 1: 1, 2: 3, 3: 7}  # by a descriptor's swizzle_mode: how many 16-byte pieces change places, less one


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that this phase still waits for."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[Callable[[], int]] = field(default_factory=list)  # under way; each completes and gives its bytes

    def settle(self) -> None:
        """Turn the phase where nothing is missing."""
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


def _places(m: Machine, address: np.ndarray, size: int, what: str) -> list[tuple[int, int]]:
    """(program, offset) in shared memory for each active thread."""
    active = m.active()
    program, offset = m.shared.locate(address[active], active, size, what)
    return list(zip(program.tolist(), offset.tolist()))


def _barrier(m: Machine, place: tuple[int, int], what: str) -> Barrier:
    barriers = m.state.setdefault("barriers", {})
    if place not in barriers:
        raise MemoryFaultError(f"{what}: no barrier at byte {place[1]} of shared memory")
    found: Barrier = barriers[place]
    return found


def _touch(m: Machine, place: tuple[int, int], threads: np.ndarray, write: bool, what: str, size: int = 8) -> None:
    """Threads access the mbarrier or the descriptor at a place, which is ordered as any access to its bytes is."""
    units = np.repeat(m.shared.units(place[0], np.array([place[1]]), size), threads.size, axis=0)
    if write:
        m.order.store(m.shared.shadow, units, threads, np.ones(units.shape, bool), what)
    else:
        m.order.load(m.shared.shadow, units, threads, what)


def _by_place(m: Machine, address: np.ndarray, size: int, what: str) -> dict[tuple[int, int], np.ndarray]:
    """The active threads at each place."""
    found: dict[tuple[int, int], list[int]] = {}
    for thread, place in zip(m.active().tolist(), _places(m, address, size, what)):
        found.setdefault(place, []).append(thread)
    return {place: np.array(threads) for place, threads in found.items()}


@handler("mbarrier")
def _mbarrier(instruction: Instruction, code: Code) -> Step:
    what, action, operands = instruction.text, instruction.op[1], instruction.operands
    if action in ("init", "inval"):
        address = code.address(operands[0])
        count = operands[1] if action == "init" else 0

        def define(m: Machine) -> None:
            for place, threads in _by_place(m, address(m), 8, what).items():
                barriers = m.state.setdefault("barriers", {})
                _touch(m, place, threads, True, what)
                if action == "init":
                    if place in barriers:
                        raise MemoryFaultError(f"{what}: a barrier is there that nothing invalidated")
                    barriers[place] = Barrier(count, count)
                elif place not in barriers:
                    raise MemoryFaultError(f"{what}: no barrier at byte {place[1]} of shared memory")
                elif barriers.pop(place).copies:
                    raise MemoryFaultError(f"{what}: a copy is under way to a barrier that goes")

        return define
    if action == "arrive":
        address = code.address(operands[1])
        amount = operands[2] if len(operands) > 2 else 1 if "expect_tx" not in instruction.op else 0

        def arrive(m: Machine) -> None:
            for thread, place in zip(m.active().tolist(), _places(m, address(m), 8, what)):
                barrier = _barrier(m, place, what)
                _touch(m, place, np.array([thread]), False, what)
                m.order.arrive(place, thread)
                phase = barrier.phase
                barrier.bytes += amount if "expect_tx" in instruction.op else 0
                barrier.pending -= 1 if "expect_tx" in instruction.op else amount
                if barrier.pending < 0:
                    raise MemoryFaultError(f"{what}: more arrivals than the {barrier.count} of a phase")
                barrier.settle()
                if barrier.phase != phase:
                    m.order.complete(place)

        return arrive
    if action in ("try_wait", "test_wait") and "parity" in instruction.op:
        address, parity, write = code.address(operands[1]), code.read(operands[2], "u32"), code.write(operands[0])

        def wait(m: Machine) -> None:
            done = np.zeros(m.lanes.size, bool)
            wanted = np.broadcast_to(parity(m), m.lanes.shape)
            for place, threads in _by_place(m, address(m), 8, what).items():
                barrier = _barrier(m, place, what)
                _touch(m, place, threads, False, what)
                parities = wanted[threads] & 1
                if barrier.pending == 0 and (barrier.phase == parities).any():
                    while barrier.copies:
                        barrier.bytes -= barrier.copies.pop(0)()
                    phase = barrier.phase
                    barrier.settle()
                    if barrier.phase != phase:
                        m.order.complete(place)
                done[threads] = barrier.phase != parities
                if done[threads].any():
                    m.order.waited(place, threads[done[threads]])
            if not done[m.active()].all():
                m.state["try_wait"] = True
            write(m, done)

        return wait
    raise UnsupportedError(what)


@handler("tensormap")
def _tensormap(instruction: Instruction, code: Code) -> Step:
    """A descriptor is made field by field in shared memory, and copied to global memory, where its address names it."""
    what, op, operands = instruction.text, instruction.op, instruction.operands
    if op[1] == "cp_fenceproxy":
        target, source = code.address(operands[0]), code.address(operands[1])

        def publish(m: Machine) -> None:
            whole_warps(m, what)
            place = _places(m, source(m), 128, what)[0]
            threads = m.active()
            m.order.join_warps(threads)
            _touch(m, place, threads, False, what, 128)
            m.order.join_warps(threads)
            m.order.publish_map(int(target(m)[threads][0]), threads)
            address = target(m)[m.active()][:1]
            m.memory.access(address, m.active()[:1], 1, 128, None, what, "tma")
            fields = dict(m.state["fields"][place])
            if unset := [
                name for name in DESCRIPTOR_FIELDS if (name, 0) not in fields
            ]:  # Triton 3.9 writes zeros, then no zero field
                program, at = place
                if m.shared.data[program, at : at + 128].any():
                    raise MemoryFaultError(f"{what}: nothing wrote the descriptor's {unset[0]}")
                fields |= {(name, 0): 0 for name in unset}
            m.state.setdefault("maps", {})[int(address[0])] = fields

        return publish
    if op[1:3] != ("replace", "tile"):
        raise UnsupportedError(what)
    name, kind = op[3], "b64" if op[-1] == "b64" else "b32"
    address, value = code.address(operands[0]), code.read(operands[-1], kind)
    ordinal = operands[1] if len(operands) == 3 else 0

    def replace(m: Machine) -> None:
        values = np.broadcast_to(value(m), m.lanes.shape)[m.active()]
        for thread, place, number in zip(m.active(), _places(m, address(m), 128, what), values.tolist()):
            _touch(m, place, np.array([thread]), True, what, 128)
            m.state.setdefault("fields", {}).setdefault(place, {})[name, ordinal] = number

    return replace


def _box(m: Machine, map_address: int, corner: list[int], at: int, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(global addresses, whether inside the tensor, offsets in shared memory, bytes of an element) of a box of a tensor whose
    shared copy starts at offset `at`."""
    maps = m.state.get("maps", {})
    if map_address not in maps:
        raise MemoryFaultError(f"{what}: no descriptor at {map_address:#x}")
    fields = maps[map_address]
    rank, size = fields["rank", 0] + 1, ELEMENT_BYTES[fields["elemtype", 0]]
    if rank != len(corner) or fields["interleave_layout", 0] or any(fields["element_stride", i] != 1 for i in range(rank)):
        raise UnsupportedError(f"{what}: {fields}")
    box = [fields["box_dim", i] for i in range(rank)]
    strides = [size, *(fields["global_stride", i] for i in range(rank - 1))]
    base = fields["global_address", 0]
    swizzle = SWIZZLE_BITS[fields["swizzle_mode", 0]]
    if (
        base % 16
        or any(stride % 16 for stride in strides[1:])
        or (box[0] * size) % 16
        or at % (128 if not swizzle else 16 * (swizzle + 1) * 8)
    ):
        raise MemoryFaultError(f"{what}: a base, a stride or a box that the hardware refuses: {fields}, shared offset {at}")
    if (swizzle and box[0] * size > 16 * (swizzle + 1)) or max(box) > 256:
        raise MemoryFaultError(f"{what}: a box of {box} elements of {size} bytes is too wide for its swizzle or for any")
    index = np.indices(box[::-1])[::-1]  # of dimension 0 first, which moves fastest
    addresses, inside = np.full(box[::-1], base, np.int64), np.ones(box[::-1], bool)
    for i in range(rank):
        position = index[i] + corner[i]
        inside &= (position >= 0) & (position < fields["global_dim", i])
        addresses += position * strides[i]
    offsets = at + size * np.arange(addresses.size).reshape(addresses.shape)
    offsets ^= (offsets >> 7 & swizzle) << 4
    return addresses.ravel().astype(np.uint64), inside.ravel(), offsets.ravel(), size


@handler("cp.async.bulk")
def _bulk(instruction: Instruction, code: Code) -> Step:
    """cp.async.bulk: tensor copies between global and shared memory, and the groups of those out of it."""
    op, what, operands = instruction.op, instruction.text, instruction.operands
    if op[3] == "commit_group":

        def commit(m: Machine) -> None:
            for kind in ("send", "sent"):
                m.order.commit(kind, m.active())

        return commit
    if op[3] == "wait_group":

        def await_group(m: Machine) -> None:
            for kind in ("send",) if "read" in op else ("send", "sent"):
                m.order.await_groups(kind, m.active(), operands[0])

        return await_group
    if op[3] != "tensor" or "multicast::cluster" in op:
        raise UnsupportedError(what)
    inward = op[5].startswith("shared")
    shared, tensor = (operands[0], operands[1]) if inward else (operands[1], operands[0])
    place, map_address = code.address(shared), code.read(tensor.base, "s64")
    corner = [code.read(c, "s32") for c in tensor.coordinates]
    barrier_address = code.address(operands[2]) if inward else None

    def each(m: Machine) -> list[tuple[int, int, int, list[int]]]:
        """(program, offset in shared memory, address of the descriptor, coordinates) of each active thread's copy."""
        picked = [np.broadcast_to(read(m), m.lanes.shape)[m.active()].tolist() for read in (map_address, *corner)]
        return [(*at, name, list(position)) for at, name, *position in zip(_places(m, place(m), 16, what), *picked)]

    def copy_in(m: Machine) -> None:
        assert barrier_address is not None
        places = _places(m, barrier_address(m), 8, what)
        for thread, (program, at, name, position), where in zip(m.active().tolist(), each(m), places):
            m.order.use_map(name, thread, what)
            _touch(m, where, np.array([thread]), False, what)
            box = _box(m, name, position, at, what)
            m.order.tensor_in(m.shared.shadow, _box_units(m, program, box), thread, where, what)
            _barrier(m, where, what).copies.append(_copy_in(m, program, thread, box, what))

    def copy_out(m: Machine) -> None:
        for thread, (program, at, name, position) in zip(m.active().tolist(), each(m)):
            m.order.use_map(name, thread, what)
            box = _box(m, name, position, at, what)
            m.order.tensor_out(m.shared.shadow, _box_units(m, program, box), thread, what)
            _copy_out(m, program, thread, box, what)

    return copy_in if inward else copy_out


Box = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def _box_units(m: Machine, program: int, box: Box) -> np.ndarray:
    """The units of shared memory that a box fills: it lies there in pieces of 16 bytes."""
    offsets, size = box[2], box[3]
    return m.shared.units(program, offsets[:: 16 // size], 16).ravel()


def _copy_in(m: Machine, program: int, thread: int, box: Box, what: str) -> Callable[[], int]:
    """Start a copy into shared memory; what is returned completes it and gives its bytes."""
    addresses, inside, offsets, size = box
    content = np.zeros((addresses.size, 1), f"u{size}")
    if inside.any():
        lanes = np.full(int(inside.sum()), thread)
        m.order.load(*m.memory.shadow_at(addresses[inside], size, what), lanes, what)
        content[inside] = m.memory.access(addresses[inside], np.zeros_like(lanes), size, 1, None, what, "tma")
    where = offsets[:, None] + np.arange(size)
    m.shared.poison(program, where)

    def complete() -> int:
        m.shared.data[program, where] = content.view(np.uint8)
        return addresses.size * size

    return complete


def _copy_out(m: Machine, program: int, thread: int, box: Box, what: str) -> None:
    """Copy a box out of shared memory."""
    addresses, inside, offsets, size = box
    if inside.any():
        content = np.ascontiguousarray(m.shared.data[program, offsets[:, None] + np.arange(size)])
        values = content.view(f"u{size}")[inside]
        m.order.tensor_stored(*m.memory.shadow_at(addresses[inside], size, what), thread, what)
        m.memory.access(addresses[inside], np.zeros(values.shape[0], np.int64), size, 1, values, what, "tma")


def finish(m: Machine) -> None:
    """Refuse a program's end with something under way that must have been waited for."""
    m.order.finish()
    if any(barrier.copies for barrier in m.state.get("barriers", {}).values()):
        raise MemoryFaultError("a program ended with a copy into its shared memory under way")
    if m.in_flight:
        raise MemoryFaultError("a program ended with a wgmma that nobody waited for")

"""Hopper's asynchronous instructions: barriers in memory, tensor descriptors and their copies, and wgmma.

A copy into shared memory leaves NaN there until its barrier is waited for, and a copy out of it reads when its group is waited
for. A product is computed when it is issued, and its operands must be the same still when it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import TYPES
from .machine import Code, Machine, Step, UnsupportedError, handler
from .memory import LANES, MemoryFaultError
from .text import Instruction
from .warp import LANE, by_warp, fragment, numbers, spread, whole_warps

ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}  # by elemtype
SWIZZLE_BITS = {0: 0, 1: 1, 2: 3, 3: 7}  # by a descriptor's swizzle_mode: how many 16-byte pieces change places, less one
MATRIX_SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}  # by bits 62 and 63 of a matrix descriptor
GROUP = 4 * LANES  # threads that issue a wgmma together


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


@handler("mbarrier")
def _mbarrier(instruction: Instruction, code: Code) -> Step:
    what, action, operands = instruction.text, instruction.op[1], instruction.operands
    if action in ("init", "inval"):
        address = code.address(operands[0])
        count = operands[1] if action == "init" else 0

        def define(m: Machine) -> None:
            for place in _places(m, address(m), 8, what):
                barriers = m.state.setdefault("barriers", {})
                if action == "init":
                    barriers[place] = Barrier(count, count)
                elif barriers.pop(place).copies:
                    raise MemoryFaultError(f"{what}: a copy is under way to a barrier that goes")

        return define
    if action == "arrive":
        address = code.address(operands[1])
        amount = operands[2] if len(operands) > 2 else 1 if "expect_tx" not in instruction.op else 0

        def arrive(m: Machine) -> None:
            for place in _places(m, address(m), 8, what):
                barrier = _barrier(m, place, what)
                barrier.bytes += amount if "expect_tx" in instruction.op else 0
                barrier.pending -= 1 if "expect_tx" in instruction.op else amount
                if barrier.pending < 0:
                    raise MemoryFaultError(f"{what}: more arrivals than the {barrier.count} of a phase")
                barrier.settle()

        return arrive
    if action in ("try_wait", "test_wait") and "parity" in instruction.op:
        address, parity, write = code.address(operands[1]), code.read(operands[2], "u32"), code.write(operands[0])

        def wait(m: Machine) -> None:
            done = np.zeros(m.lanes.size, bool)
            wanted = np.broadcast_to(parity(m), m.lanes.shape)
            for thread, place in zip(m.active().tolist(), _places(m, address(m), 8, what)):
                barrier = _barrier(m, place, what)
                if barrier.phase == int(wanted[thread]) & 1 and barrier.pending == 0:
                    while barrier.copies:
                        barrier.bytes -= barrier.copies.pop(0)()
                    barrier.settle()
                done[thread] = barrier.phase != int(wanted[thread]) & 1
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
            address = target(m)[m.active()][:1]
            m.memory.access(address, m.active()[:1], 1, 128, None, what)
            fields = dict(m.state["fields"][place])
            if ("interleave_layout", 0) not in fields:  # Triton 3.9 writes zeros over the whole, and no field that is zero
                program, at = place
                if m.shared.data[program, at : at + 128].any():
                    raise MemoryFaultError(f"{what}: nothing wrote the descriptor's interleave_layout")
                fields["interleave_layout", 0] = 0
            m.state.setdefault("maps", {})[int(address[0])] = fields

        return publish
    if op[1:3] != ("replace", "tile"):
        raise UnsupportedError(what)
    name, kind = op[3], "b64" if op[-1] == "b64" else "b32"
    address, value = code.address(operands[0]), code.read(operands[-1], kind)
    ordinal = operands[1] if len(operands) == 3 else 0

    def replace(m: Machine) -> None:
        values = np.broadcast_to(value(m), m.lanes.shape)[m.active()]
        for place, number in zip(_places(m, address(m), 128, what), values.tolist()):
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
        return lambda m: m.state.setdefault("outward", []).append(m.state.pop("outward_open", []))
    if op[3] == "wait_group":
        return lambda m: _send(m, operands[0])
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
        for (program, at, name, position), where in zip(each(m), _places(m, barrier_address(m), 8, what)):
            _barrier(m, where, what).copies.append(_copy_in(m, program, name, position, at, what))

    def copy_out(m: Machine) -> None:
        for program, at, name, position in each(m):
            m.state.setdefault("outward_open", []).append(_copy_out(m, program, name, position, at, what))

    return copy_in if inward else copy_out


def _copy_in(m: Machine, program: int, name: int, position: list[int], at: int, what: str) -> Callable[[], int]:
    """Start a copy into shared memory; what is returned completes it and gives its bytes."""
    addresses, inside, offsets, size = _box(m, name, position, at, what)
    content = np.zeros((addresses.size, 1), f"u{size}")
    if inside.any():
        nobody = np.zeros(int(inside.sum()), np.int64)
        content[inside] = m.memory.access(addresses[inside], nobody, size, 1, None, what, "tma")
    where = offsets[:, None] + np.arange(size)
    m.shared.poison(program, where)

    def complete() -> int:
        m.shared.data[program, where] = content.view(np.uint8)
        return addresses.size * size

    return complete


def _copy_out(m: Machine, program: int, name: int, position: list[int], at: int, what: str) -> Callable[[], None]:
    """Start a copy out of shared memory; what is returned completes it."""
    addresses, inside, offsets, size = _box(m, name, position, at, what)
    where = offsets[:, None] + np.arange(size)
    before = m.shared.data[program, where].copy()

    def complete() -> None:
        if (m.shared.data[program, where] != before).any():
            raise MemoryFaultError(f"{what}: shared memory was written before the copy out of it was waited for")
        values = np.ascontiguousarray(before).view(f"u{size}")[inside]
        if inside.any():
            m.memory.access(addresses[inside], np.zeros(values.shape[0], np.int64), size, 1, values, what, "tma")

    return complete


def _send(m: Machine, left: int) -> None:
    groups = m.state.setdefault("outward", [])
    while len(groups) > left:
        for complete in groups.pop(0):
            complete()


def finish(m: Machine) -> None:
    """What a program leaves under way completes after it: copies out of shared memory. Others must have been waited for."""
    m.shared.finish()
    m.state.setdefault("outward", []).append(m.state.pop("outward_open", []))
    _send(m, 0)
    if any(barrier.copies for barrier in m.state.get("barriers", {}).values()):
        raise MemoryFaultError("a program ended with a copy into its shared memory under way")
    if any(m.state.get("products", [])) or m.state.get("products_open"):
        raise MemoryFaultError("a program ended with a wgmma that nobody waited for")


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
    bits = m.shared.access(address.astype(np.uint64), lanes, size, each, None, what)
    return bits.reshape(depth, rows).T if transposed else bits.reshape(rows, depth)


@handler("wgmma")
def _wgmma(instruction: Instruction, code: Code) -> Step:
    op, what = instruction.op, instruction.text
    if op[1] == "fence":
        return lambda m: None
    if op[1] == "commit_group":
        return lambda m: m.state.setdefault("products", []).append(m.state.pop("products_open", []))
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
    accumulate, writes = code.read(scale, "pred"), [code.write(register) for register in d]
    adds = [code.read(register, "f32") for register in d]
    a_reads = [code.read(register, "b32") for register in a] if isinstance(a, tuple) else [code.read(a, "u64")]
    b_read = code.read(b, "u64")

    def product(m: Machine) -> None:
        warps = whole_warps(m, what)
        if warps.size % 4 or (warps.reshape(-1, 4) != warps[::4, None] + np.arange(4)).any() or (warps[::4] % 4).any():
            raise MemoryFaultError(f"{what}: not all four warps of a group take part")
        threads = warps[::4] * LANES

        def operands() -> list[tuple[np.ndarray, np.ndarray]]:
            found = []
            for thread in threads.tolist():
                left = np.zeros(0)
                if not isinstance(a, tuple):
                    left = _matrix(m, thread, int(a_values[0][thread]), 64, depth, size, a_transposed, what)
                found.append((left, _matrix(m, thread, int(b_values[thread]), columns, depth, size, b_transposed, what)))
            return found

        a_values = [np.broadcast_to(read(m), m.lanes.shape) for read in a_reads]
        b_values = np.broadcast_to(b_read(m), m.lanes.shape)
        held = operands()
        m.state.setdefault("products_open", []).append((operands, held, what))
        out = np.empty((threads.size, 64, columns), np.float32)
        for i, (left, right) in enumerate(held):
            if isinstance(a, tuple):
                packed = np.stack([by_warp(v, m, warps[4 * i : 4 * i + 4]) for v in a_values], axis=2)
                matrix = fragment(numbers(packed, kind), True).reshape(64, depth)
            else:
                matrix = numbers(left, kind)[..., 0] if kind == "tf32" else left.view(TYPES[kind]).astype(np.float32)
            other = numbers(right, kind)[..., 0] if kind == "tf32" else right.view(TYPES[kind]).astype(np.float32)
            out[i] = matrix @ other.T
        keep = np.broadcast_to(accumulate(m), m.lanes.shape)
        tiles = out.reshape(warps.size, 16, columns)
        for i, (add, write) in enumerate(zip(adds, writes)):
            part = tiles[:, LANE // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANE % 4) + i % 2]
            write(m, spread(m, warps, part) + np.where(keep, add(m), np.float32(0)))

    return product


def _await_products(m: Machine, left: int) -> None:
    groups = m.state.setdefault("products", [])
    while len(groups) > left:
        for operands, held, what in groups.pop(0):
            for (a, b), (a_before, b_before) in zip(operands(), held):
                if not (np.array_equal(a, a_before) and np.array_equal(b, b_before)):
                    raise MemoryFaultError(f"{what}: an operand changed before the product was waited for")

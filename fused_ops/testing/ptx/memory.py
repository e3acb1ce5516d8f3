"""Global and shared memory of the PTX machine, and what is checked of every access.

Global: inside one allocation, aligned to its size; bytes and 32-byte sectors are counted. Shared: inside a program's part. Both:
ordered against every other access to the same bytes (order.py). Memory nobody wrote holds NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .banks import Wavefronts
from .knowledge import LANES, MemoryFaultError, RaceError
from .order import Order, Shadow

SECTOR = 32
SHARED_BASE = 1024  # CUDA keeps the first KiB of each program's shared memory
RANK_SHIFT = 24  # shared::cluster addresses: the rank of the program + 1 above its own address
MOST_UNIT = 8  # bytes
ROUNDING = 2.0**-12  # of a sum's value: by so much the orders of adding its terms may differ
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def two_values(kept: np.ndarray, values: np.ndarray, same_warp: np.ndarray) -> np.ndarray:
    """Where one instruction stored something else to a place as well: kept is what is there after it, of unsigned integers.

    Not there: fp32 values of one warp's lanes that differ by rounding, or NaNs, of which a GPU keeps one. From Triton 3.8 on every
    lane stores the sum of its warp, and where the first addition of a butterfly was contracted with the lane's own product, the
    lanes' sums are of the same terms, rounded differently.
    """
    differs = kept != values
    if differs.any() and values.dtype.itemsize == 4:
        a, b = kept.view(np.float32), np.ascontiguousarray(values).view(np.float32)
        with np.errstate(all="ignore"):
            close = (np.abs(a - b) <= ROUNDING * np.maximum(np.abs(a), np.abs(b))) | (np.isnan(a) & np.isnan(b))
        differs &= ~(close & same_warp)
    return differs


def _stored(
    s: Shadow,
    view: np.ndarray,
    at: tuple[np.ndarray, ...] | np.ndarray,
    values: np.ndarray,
    units: np.ndarray,
    lanes: np.ndarray,
    what: str,
) -> None:
    """Store values and refuse two at one place."""
    view[at] = values
    kept = view[at]
    if (kept != values).any():
        last = s.agent[units].repeat(kept.shape[1] // units.shape[1] or 1, axis=1)[:, : kept.shape[1]]
        clash = two_values(kept, values, last // LANES == lanes[:, None] // LANES)
        if clash.any():
            raise RaceError(
                f"{what}: two threads store two values at one place, thread {int(lanes[np.argwhere(clash)[0][0]])} one of them"
            )


@dataclass
class Allocation:
    """size bytes of global memory at an address. data: the bytes from the 256-byte boundary below it on, padded."""

    name: str
    address: int
    size: int
    data: np.ndarray = field(repr=False)
    front: int
    loaded: np.ndarray = field(repr=False)  # by sector
    stored: np.ndarray = field(repr=False)
    shadow: Shadow | None = field(default=None, repr=False)  # from the first access on
    program: int = -1  # the last that accessed it


@dataclass
class Traffic:
    """What a launch moved. *_bytes: asked for by threads. *_sectors: 32-byte sectors over all warps' accesses.
    *_once: sectors without counting one twice. widths: bytes by direction and by
    the bits of an access, or "tma". shared: the wavefronts of accesses of shared memory, by instruction."""

    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    load_once: int = 0
    store_once: int = 0
    widths: dict[tuple[str, str], int] = field(default_factory=dict)
    shared: Wavefronts = field(default_factory=Wavefronts)

    @property
    def shared_wavefronts(self) -> int:
        """The wavefronts of all accesses of shared memory."""
        return sum(self.shared.taken.values())

    @property
    def shared_ideal(self) -> int:
        """As many as they would take without bank conflicts."""
        return sum(self.shared.ideal.values())


class Global:
    """The global memory: allocations far apart."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.traffic = Traffic()
        self.unit = 1
        self.order = Order(LANES, 1, 0, set())  # of the program that runs now

    def begin(self, order: Order, unit: int) -> None:
        """A program begins: its order, and the least bytes that it accesses at once."""
        self.order, self.unit = order, min(unit, MOST_UNIT)

    def add(self, name: str, content: np.ndarray, alignment_of: int = 0) -> int:
        """Copy content (uint8) into a new allocation and return its address, which lies in its 256 bytes as alignment_of."""
        front = alignment_of % 256
        address = (len(self.allocations) + 1 << 40) + (1 << 32) + front
        data = np.full(-(-(front + content.size) // 256) * 256 + 256, 0xFF, np.uint8)
        data[front : front + content.size] = content
        sectors = data.size // SECTOR
        self.allocations.append(
            Allocation(name, address, content.size, data, front, np.zeros(sectors, bool), np.zeros(sectors, bool))
        )
        return address

    def content(self, index: int) -> np.ndarray:
        """The bytes of an allocation now."""
        a = self.allocations[index]
        return a.data[a.front : a.front + a.size]

    def _find(self, addresses: np.ndarray, size: int, what: str) -> tuple[Allocation, np.ndarray]:
        """(allocation, offsets in its data) of accesses of size bytes."""
        number = int(addresses[0]) >> 40
        if not 1 <= number <= len(self.allocations):
            raise MemoryFaultError(f"{what}: address {int(addresses[0]):#x} is of no allocation")
        a = self.allocations[number - 1]
        start = addresses.astype(np.int64) - a.address
        outside = (start < 0) | (start + size > a.size)
        if outside.any():
            first = int(start[outside][0])
            raise MemoryFaultError(f"{what}: {size} bytes at byte {first} of {a.name}, which has {a.size}")
        if (addresses % np.uint64(size)).any():
            raise MemoryFaultError(f"{what}: {size} bytes at an address of {a.name} that is no multiple of {size}")
        return a, start + a.front

    def shadow_at(self, addresses: np.ndarray, size: int, what: str) -> tuple[Shadow, np.ndarray]:
        """(shadow, units (n, k)) of accesses of size bytes."""
        a, offsets = self._find(addresses, size, what)
        shadow = self._shadow(a)
        return shadow, shadow.units(offsets, size)

    def _shadow(self, a: Allocation) -> Shadow:
        if a.shadow is None:
            a.shadow = Shadow(a.data.size, self.unit, True)
        if a.program != self.order.program:
            a.shadow.begin()
            a.program = self.order.program
        return a.shadow

    def access(
        self, addresses: np.ndarray, lanes: np.ndarray, bytes_each: int, count: int, values: np.ndarray | None, what: str,
        by: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Load, or with values (lanes, count) store, count items of bytes_each bytes at each address, by these lanes.

        by: what the traffic is listed under, for the bits of an access; such accesses are ordered by whoever makes them."""
        size = bytes_each * count
        a, offsets = self._find(addresses, size, what)
        items = (offsets // bytes_each)[:, None] + np.arange(count)
        view = a.data.view(_UNSIGNED[bytes_each])
        self._count(a, offsets, lanes, size, values is None, by or str(size * 8))
        if by is not None:
            if values is not None:
                view[items] = values
            return view[items]
        shadow = self._shadow(a)
        units = shadow.units(offsets, size)
        said = f"{what} [{a.name}]"
        if values is None:
            self.order.load(shadow, units, lanes, said)
            return view[items]
        whole = _UNSIGNED[shadow.unit]
        differs = a.data.view(whole)[units] != np.ascontiguousarray(values).view(whole)
        self.order.store(shadow, units, lanes, differs, said)
        _stored(shadow, view, items, values, units, lanes, said)
        return values

    def _count(self, a: Allocation, offsets: np.ndarray, lanes: np.ndarray, size: int, load: bool, by: str) -> None:
        sectors = offsets // SECTOR  # an aligned access of at most 32 bytes lies in one
        moved = np.unique((lanes // LANES).astype(np.int64) << 40 | sectors).size
        (a.loaded if load else a.stored)[sectors] = True
        key = ("load" if load else "store", by)
        self.traffic.widths[key] = self.traffic.widths.get(key, 0) + size * offsets.size
        if load:
            self.traffic.load_bytes += size * offsets.size
            self.traffic.load_sectors += moved
        else:
            self.traffic.store_bytes += size * offsets.size
            self.traffic.store_sectors += moved

    def finish(self) -> Traffic:
        """The traffic, with the sectors counted once."""
        self.traffic.load_once = sum(int(a.loaded.sum()) for a in self.allocations)
        self.traffic.store_once = sum(int(a.stored.sum()) for a in self.allocations)
        return self.traffic


class Shared:
    """The shared memory of the programs of a cluster."""

    def __init__(self, size: int, threads: int, programs: int, order: Order, unit: int, traffic: Traffic) -> None:
        self.size, self.threads, self.programs, self.order, self.traffic = size, threads, programs, order, traffic
        self.padded = -(-size // 256) * 256 + 256
        self.data = np.full((programs, self.padded), 0xFF, np.uint8)
        self.shadow = Shadow(programs * self.padded, min(unit, MOST_UNIT), False)
        self.remote_reads = 0

    def units(self, program: np.ndarray | int, offset: np.ndarray, size: int) -> np.ndarray:
        """(n, k) units of accesses of size bytes in programs' parts."""
        return self.shadow.units(program * self.padded + offset, size)

    def locate(self, addresses: np.ndarray, lanes: np.ndarray, size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(program, offset) of accesses of size bytes."""
        addresses = addresses.astype(np.int64)
        rank = addresses >> RANK_SHIFT
        program = np.where(rank > 0, rank - 1, lanes // self.threads)
        offset = (addresses & ((1 << RANK_SHIFT) - 1)) - SHARED_BASE
        outside = (offset < 0) | (offset + size > self.size) | (program >= self.programs)
        if outside.any():
            raise MemoryFaultError(
                f"{what}: {size} bytes at byte {int(offset[outside][0])} of shared memory, which has {self.size}"
            )
        if (offset % size).any():
            raise MemoryFaultError(f"{what}: {size} bytes at a shared address that is no multiple of {size}")
        self.traffic.shared.count(offset, lanes, size, what)
        return program, offset

    def access(
        self, addresses: np.ndarray, lanes: np.ndarray, bytes_each: int, count: int, values: np.ndarray | None, what: str
    ) -> np.ndarray:
        """Load, or with values (lanes, count) store, count items of bytes_each bytes at each address, by these lanes."""
        size = bytes_each * count
        program, offset = self.locate(addresses, lanes, size, what)
        units = self.units(program, offset, size)
        at = program[:, None], (offset // bytes_each)[:, None] + np.arange(count)
        view = self.data.view(_UNSIGNED[bytes_each])
        said = f"{what} [shared memory]"
        if values is None:
            self.order.load(self.shadow, units, lanes, said)
            if self.programs > 1:
                self.remote_reads += self.order.remote_load(program, lanes)
            return view[at]
        whole = _UNSIGNED[self.shadow.unit]
        differs = self.data.reshape(-1).view(whole)[units] != np.ascontiguousarray(values).view(whole)
        self.order.store(self.shadow, units, lanes, differs, said)
        _stored(self.shadow, view, at, values, units, lanes, said)
        return values

    def poison(self, program: int | np.ndarray, offsets: np.ndarray) -> None:
        """Bytes that an asynchronous copy is about to fill hold NaN until it is waited for."""
        self.data[program, offsets] = 0xFF

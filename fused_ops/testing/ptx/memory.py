"""Global and shared memory of the PTX machine, and what is checked of every access.

Global: inside one allocation, aligned to its size; bytes and 32-byte sectors are counted; no warp reads what another one of its
program wrote since the last barrier. Shared: inside the program's
part, and no two warps at the same bytes between two barriers, one of them writing. Memory nobody wrote holds NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SECTOR = 32
SHARED_BASE = 1024  # CUDA keeps the first KiB of each program's shared memory
RANK_SHIFT = 24  # shared::cluster addresses: the rank of the program + 1 above its own address
LANES = 32
SEVERAL = -2  # warps that read a byte
ROUNDING = 2.0**-12  # of a sum's value: by so much the orders of adding its terms may differ
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class MemoryFaultError(AssertionError):
    """An access that a GPU would refuse, or that a race or red zone shows to be wrong."""


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
    written_in: np.ndarray | None = field(default=None, repr=False)  # by byte, once any was: between which barriers
    written_by: np.ndarray | None = field(default=None, repr=False)  # and by which warp


@dataclass
class Traffic:
    """What a launch moved. *_bytes: asked for by threads. *_sectors: 32-byte sectors over all warps' accesses.
    *_once: sectors without counting one twice. widths: bytes by direction and by
    the bits of an access, or "tma"."""

    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    load_once: int = 0
    store_once: int = 0
    widths: dict[tuple[str, str], int] = field(default_factory=dict)


class Global:
    """The global memory: allocations far apart."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.traffic = Traffic()
        self.barriers = 1  # that programs have begun with or passed

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

    def access(
        self, addresses: np.ndarray, lanes: np.ndarray, bytes_each: int, count: int, values: np.ndarray | None, what: str,
        by: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Load, or with values (lanes, count) store, count items of bytes_each bytes at each address, by these lanes.

        by: what the traffic is listed under, for the bits of an access."""
        size = bytes_each * count
        a, offsets = self._find(addresses, size, what)
        items = (offsets // bytes_each)[:, None] + np.arange(count)
        view = a.data.view(_UNSIGNED[bytes_each])
        self._count(a, offsets, lanes, size, values is None, by or str(size * 8))
        if by is None:
            self._race(a, offsets[:, None] + np.arange(size), (lanes // LANES)[:, None], values is None, what)
        if values is None:
            return view[items]
        view[items] = values
        return values

    def _race(self, a: Allocation, where: np.ndarray, warps: np.ndarray, load: bool, what: str) -> None:
        """Refuse to read what another warp wrote since the last barrier: it may not have written it yet."""
        if not load:
            if a.written_in is None or a.written_by is None:
                a.written_in, a.written_by = np.zeros(a.data.size, np.int32), np.zeros(a.data.size, np.int32)
            a.written_in[where], a.written_by[where] = self.barriers, warps
        elif a.written_in is not None and a.written_by is not None:
            clash = (a.written_in[where] == self.barriers) & (a.written_by[where] != warps)
            if clash.any():
                first = int(np.argwhere(clash)[0][0])
                raise MemoryFaultError(
                    f"{what}: warp {int(warps[first, 0])} reads byte {int(where[first, 0]) - a.front} of {a.name}, which another"
                    f" warp wrote since the last barrier"
                )

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
    """The shared memory of the programs of a cluster, and who touched each byte since which barrier."""

    def __init__(self, size: int, threads: int, programs: int) -> None:
        self.size, self.threads, self.programs = size, threads, programs
        padded = -(-size // 256) * 256 + 256
        self.data = np.full((programs, padded), 0xFF, np.uint8)
        self.epoch = np.ones(programs, np.int32)
        nobody = np.full((programs, padded), -1, np.int32)
        self.written_in, self.written_by = np.zeros((programs, padded), np.int32), nobody.copy()
        self.read_in, self.read_by = np.zeros((programs, padded), np.int32), nobody.copy()
        # The same since the last barrier of the cluster, which alone orders what one program does to another's memory.
        self.cluster_epoch = 1
        self.own_write_in, self.others_read_in = np.zeros((programs, padded), np.int32), np.zeros((programs, padded), np.int32)
        self.remote_reads = 0

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
        return program, offset

    def access(
        self, addresses: np.ndarray, lanes: np.ndarray, bytes_each: int, count: int, values: np.ndarray | None, what: str
    ) -> np.ndarray:
        """Load, or with values (lanes, count) store, count items of bytes_each bytes at each address, by these lanes."""
        size = bytes_each * count
        program, offset = self.locate(addresses, lanes, size, what)
        content = None if values is None else np.ascontiguousarray(values).view(np.uint8)
        self._race(program, offset, lanes // LANES, size, content, what)
        if self.programs > 1:
            self._cluster_race(program, offset, lanes // self.threads, size, content is not None, what)
        items = (offset // bytes_each)[:, None] + np.arange(count)
        view = self.data.view(_UNSIGNED[bytes_each])
        if values is None:
            return view[program[:, None], items]
        view[program[:, None], items] = values
        return values

    def _two_values(self, where: tuple[np.ndarray, ...], content: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """The bytes to which one instruction writes two values.

        Not among them: fp32 values of one warp's lanes that differ by rounding, or NaNs, of which a GPU keeps one. From Triton 3.8 on
        every lane stores the sum of its warp, and where the first addition of a butterfly was contracted with the lane's own
        product, the lanes' sums are of the same terms, rounded differently.
        """
        kept = self.data[where]
        differs = kept != content
        if differs.any() and content.shape[-1] % 4 == 0:
            a, b = (np.ascontiguousarray(x).view(np.float32) for x in (kept, content))
            with np.errstate(all="ignore"):
                close = (np.abs(a - b) <= ROUNDING * np.maximum(np.abs(a), np.abs(b))) | (np.isnan(a) & np.isnan(b))
            differs &= ~(np.repeat(close, 4, axis=-1) & (self.written_by[where] == mine))
        return differs

    def _race(
        self, program: np.ndarray, offset: np.ndarray, warps: np.ndarray, size: int, content: np.ndarray | None, what: str
    ) -> None:
        """Refuse what another warp's access since the last barrier may come before or after. Writing the same is no race."""
        where = program[:, None], offset[:, None] + np.arange(size)
        mine, now = warps[:, None].astype(np.int32), self.epoch[program][:, None]
        clash = (self.written_in[where] == now) & (self.written_by[where] != mine)
        if content is not None:
            clash &= self.data[where] != content
            clash |= (self.read_in[where] == now) & (self.read_by[where] != mine)
            self.data[where], self.written_by[where], self.written_in[where] = content, mine, now
            clash |= self._two_values(where, content, mine)
        else:
            readers = np.where((self.read_in[where] == now) & (self.read_by[where] != mine), SEVERAL, mine)
            self.read_by[where] = readers
            self.read_by[where] = np.where(self.read_by[where] != readers, SEVERAL, readers)
            self.read_in[where] = now
        if clash.any():
            first = int(np.argwhere(clash)[0][0])
            raise MemoryFaultError(
                f"{what}: warp {int(warps[first])} at byte {int(offset[first])} of shared memory, which another warp"
                f" touched since the last barrier"
            )

    def _cluster_race(
        self, program: np.ndarray, offset: np.ndarray, own: np.ndarray, size: int, write: bool, what: str
    ) -> None:
        """Refuse what another program's access since the cluster's last barrier may come before or after."""
        where = program[:, None], offset[:, None] + np.arange(size)
        remote = (program != own)[:, None]
        if write and remote.any():
            raise MemoryFaultError(f"{what}: a store to another program's shared memory, which is not looked after here")
        if write:
            clash = self.others_read_in[where] == self.cluster_epoch
            self.own_write_in[where] = self.cluster_epoch
        else:
            clash = remote & (self.own_write_in[where] == self.cluster_epoch)
            far = np.broadcast_to(remote, where[1].shape)
            self.others_read_in[np.broadcast_to(where[0], far.shape)[far], where[1][far]] = self.cluster_epoch
            self.remote_reads += int(remote.sum())
        if clash.any():
            first = int(np.argwhere(clash)[0][0])
            raise MemoryFaultError(
                f"{what}: byte {int(offset[first])} of program {int(program[first])}'s shared memory, which another program"
                f" touched since the cluster's last barrier"
            )

    def finish(self) -> None:
        """Refuse a program's end while another may still read its shared memory."""
        if (self.others_read_in == self.cluster_epoch).any():
            raise MemoryFaultError("a program may have ended before another read its shared memory: no barrier of the cluster")

    def poison(self, program: int | np.ndarray, offsets: np.ndarray) -> None:
        """Bytes that an asynchronous copy is about to fill hold NaN until it is waited for."""
        self.data[program, offsets] = 0xFF

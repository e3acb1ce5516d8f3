"""Happens-before: which access is ordered before which, and the error where two conflicting ones are not.

An access is a race where it conflicts with one that its thread does not know of (knowledge.py). So a race is found
whatever the order in which the machine happened to run the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .knowledge import FENCED, SEEN, Knowledge, RaceError

SEVERAL = -2  # programs


class Shadow:
    """Who touched each unit of a memory last. A unit is `unit` bytes, the smallest that the program accesses at once.

    agent, clock: of the last write. by_async: whether the async proxy wrote it. reader, reader_clock: of the reads since; the
    reader is a thread, or stands for several of a warp or of the program. async_readers: the clocks of agents that read.
    program, reading_program: the programs of a grid that wrote and read global memory.
    """

    def __init__(self, size: int, unit: int, shared_by_programs: bool) -> None:
        self.unit = unit
        count = -(-size // unit)
        self.agent, self.clock = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.by_async = np.zeros(count, bool)
        self.reader, self.reader_clock = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.async_readers: dict[int, np.ndarray] = {}
        self.program = self.reading_program = np.zeros(0, np.int32)
        if shared_by_programs:
            self.program, self.reading_program = np.full(count, -1, np.int32), np.full(count, -1, np.int32)

    def units(self, start: np.ndarray, size: int) -> np.ndarray:
        """(n, k) units of n accesses of size bytes each."""
        return (start // self.unit)[:, None] + np.arange(max(1, size // self.unit))

    def begin(self) -> None:
        """Forget which threads touched what, but not which programs: clocks start anew in each."""
        self.agent[:] = self.clock[:] = self.reader[:] = self.reader_clock[:] = 0
        self.by_async[:] = False
        self.async_readers.clear()


class Order(Knowledge):
    """What the threads of a cluster of programs access, and in what order."""

    def _refuse(
        self, bad: np.ndarray, s: Shadow, units: np.ndarray, agents: np.ndarray, threads: Any, what: str, why: str
    ) -> None:
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            agent, thread = (int(np.broadcast_to(x, bad.shape)[at]) for x in (agents, threads))
            unit = int(np.broadcast_to(units, bad.shape)[at])
            raise RaceError(f"{what}: thread {thread} {why.format(self.name(agent))}, at byte {unit * s.unit}")

    def _writes_known(
        self, s: Shadow, units: np.ndarray, threads: np.ndarray, proxy: bool, differs: Any, what: str, verb: str
    ) -> None:
        """Refuse where the last write is not ordered before. proxy: in the async proxy, so that a generic write needs a fence."""
        agents, clocks = s.agent[units], s.clock[units]
        bad = self.unknown(agents, clocks, threads, SEEN) & differs
        self._refuse(bad, s, units, agents, threads, what, verb + " what {} writes, and nothing orders the two")
        if proxy:
            bad = self.unknown(agents, clocks, threads, FENCED) & ~s.by_async[units] & differs
            self._refuse(bad, s, units, agents, threads, what, verb + " what {} wrote, with no fence.proxy.async between")

    def _reads_known(self, s: Shadow, units: np.ndarray, threads: np.ndarray, proxy: bool, what: str) -> None:
        """Refuse to write where a read since the last write is not ordered before."""
        agents, clocks = s.reader[units], s.reader_clock[units]
        bad = self.unknown(agents, clocks, threads, SEEN)
        self._refuse(bad, s, units, agents, threads, what, "writes what {} reads, and nothing orders the two")
        if proxy:
            bad = self.unknown(agents, clocks, threads, FENCED)
            self._refuse(bad, s, units, agents, threads, what, "writes what {} read, with no fence.proxy.async between")
        for agent, read_in in s.async_readers.items():
            agents = np.array([agent])
            bad = self.unknown(agents, read_in[units], threads, SEEN)
            self._refuse(bad, s, units, agents, threads, what, "writes what {} reads, and nothing orders the two")

    def _between_programs(self, s: Shadow, units: np.ndarray, write: bool, differs: Any, what: str) -> None:
        """Programs of a grid run in any order: none may touch what another writes (but to write the same)."""
        if not s.program.size:
            return
        writer, reader = s.program[units], s.reading_program[units]
        other = (writer != -1) & (writer != self.program)
        clash = (other & differs) | ((reader != -1) & (reader != self.program) & differs) if write else other
        if clash.any():
            at = tuple(np.argwhere(clash)[0])
            verb = "writes" if write else "reads"
            raise RaceError(
                f"{what}: program {self.program} {verb} byte {int(units[at]) * s.unit}, which another program touches"
            )
        if write:
            s.program[units] = self.program
        else:
            s.reading_program[units] = np.where((reader == -1) | (reader == self.program), self.program, SEVERAL)

    def load(self, s: Shadow, units: np.ndarray, threads: np.ndarray, what: str) -> None:
        """Loads by threads (n,) of units (n, k)."""
        self._between_programs(s, units, False, True, what)
        threads = threads[:, None]
        self._writes_known(s, units, threads, False, True, what, "reads")
        before, clocks, now = s.reader[units], s.reader_clock[units], self.clock[threads]
        others = self.unknown(before, clocks, threads, SEEN)
        s.reader[units] = threads
        last = s.reader[units]
        if (last != threads).any():  # several threads of this instruction read a unit
            s.reader[units[::-1]] = threads[::-1]
            s.reader[units] = self._together(s.reader[units], last)
            now = np.broadcast_to(now.max(), units.shape)
        if others.any():  # and readers before, whom nothing orders
            s.reader[units[others]] = self._together(s.reader[units[others]], before[others])
            now = np.where(others, np.maximum(now, clocks), now)
        s.reader_clock[units] = now

    def remote_load(self, programs: np.ndarray, threads: np.ndarray) -> int:
        """How many of these threads read another program's shared memory (programs: whose), which must not end before."""
        far = programs != threads // self.per_program
        self.remote[programs[far], threads[far]] = self.clock[threads[far]]
        return int(far.sum())

    def _together(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The agents that stand for two readers each: the one that both are, their warp, or all threads."""
        warp = self.warp_of[one]
        both = np.where((warp == self.warp_of[other]) & (warp >= 0), self.warp_least + warp, self.least)
        return np.where(one == other, one, both)

    def store(self, s: Shadow, units: np.ndarray, threads: np.ndarray, differs: np.ndarray, what: str) -> None:
        """Stores by threads (n,) to units (n, k). differs: where they change what is there; storing the same is no race."""
        self._between_programs(s, units, True, differs, what)
        threads = threads[:, None]
        self._writes_known(s, units, threads, False, differs, what, "writes")
        self._reads_known(s, units, threads, False, what)
        self._wrote(s, units, threads, self.clock[threads], False)

    def _wrote(self, s: Shadow, units: np.ndarray, agents: Any, clocks: Any, by_async: bool) -> None:
        s.agent[units], s.clock[units], s.by_async[units] = agents, clocks, by_async

    def copy(self, s: Shadow, units: np.ndarray, threads: np.ndarray, what: str) -> None:
        """cp.async by threads (n,) into units (n, k): written when the group is waited for, in the generic proxy."""
        self._writes_known(s, units, threads[:, None], False, True, what, "writes")
        self._reads_known(s, units, threads[:, None], False, what)
        agents, clocks = self.open_group("copy", threads)
        self._wrote(s, units, agents[:, None], clocks[:, None], False)

    def tensor_in(self, s: Shadow, units: np.ndarray, thread: int, place: Any, what: str) -> None:
        """A TMA copy that fills units (n,), started by a thread: written when the phase of the mbarrier at place completes."""
        threads = np.array([thread])
        self._writes_known(s, units, threads, True, True, what, "writes")
        self._reads_known(s, units, threads, True, what)
        phases = self.phases_of(place)
        self._wrote(s, units, phases.agent, phases.number + 1, True)

    def tensor_out(self, s: Shadow, units: np.ndarray, thread: int, what: str) -> None:
        """A TMA copy that reads units (n,), started by a thread, until its bulk group is waited for."""
        threads = np.array([thread])
        self._writes_known(s, units, threads, True, True, what, "copies")
        agents, clocks = self.open_group("send", threads)
        self._async_read(s, units, int(agents[0]), int(clocks[0]))

    def tensor_stored(self, s: Shadow, units: np.ndarray, thread: int, what: str) -> None:
        """What that copy writes in global memory."""
        self._between_programs(s, units, True, True, what)
        threads = np.array([thread])
        flat = units.ravel()
        self._writes_known(s, flat, threads, True, True, what, "writes")
        agents, clocks = self.open_group("sent", threads)
        self._wrote(s, flat, agents[0], clocks[0], True)

    def product(self, s: Shadow, units: np.ndarray, threads: np.ndarray, what: str) -> None:
        """A wgmma of these threads, whole warps, reads units (n,) until its group is waited for; all of them must know the writes."""
        _, one_a_row = np.unique(self.row_of[threads], return_index=True)
        agents, clocks = s.agent[units], s.clock[units]
        for thread in threads[one_a_row]:
            row = self.rows[:, self.row_of[thread]]
            bad = row[SEEN][agents] < clocks
            self._refuse(bad, s, units, agents, thread, what, "multiplies what {} writes, and nothing orders the two")
            bad = (row[FENCED][agents] < clocks) & ~s.by_async[units]
            self._refuse(bad, s, units, agents, thread, what, "multiplies what {} wrote, with no fence.proxy.async between")
        for agent, clock in zip(*self.open_group("product", threads)):
            self._async_read(s, units, int(agent), int(clock))

    def _async_read(self, s: Shadow, units: np.ndarray, agent: int, clock: int) -> None:
        if agent not in s.async_readers:
            s.async_readers[agent] = np.zeros(s.agent.size, np.int32)
        s.async_readers[agent][units] = clock

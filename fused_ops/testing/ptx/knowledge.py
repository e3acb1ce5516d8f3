"""What each thread knows of what others, and what they started and did not wait for, have done.

Every access is a pair (agent, clock). An agent is a thread, or what it started: its cp.async groups, its bulk groups (which read
shared memory, and write global memory), a warp's wgmma groups, and the phases of each mbarrier (which TMA copies fill memory for).
A thread knows of each agent the clock up to which that agent's accesses come before its own next one. Barriers, mbarriers and
waits carry this knowledge from thread to thread.

Knowledge has two sides: what happened before (SEEN), and what a fence.proxy.async has also made visible between ordinary accesses
(the generic proxy) and those of TMA and wgmma (the async proxy; FENCED).
"""

from __future__ import annotations

from typing import Any

import numpy as np

LANES = 32
SEEN, FENCED = 0, 1
KINDS = ("copy", "send", "sent", "product")  # agents that a thread, or for products its warp, owns beside itself


class MemoryFaultError(AssertionError):
    """An access that a GPU would refuse, or that a race or red zone shows to be wrong."""


class RaceError(MemoryFaultError):
    """Two accesses to the same bytes, one of them a write, that nothing orders."""


class Knowledge:
    """What each of the threads of a cluster of programs knows, and how synchronisation changes it.

    Rows hold knowledge: rows[side, row, agent] is a clock. Threads that know the same share a row, and `own` has what they know of
    their own agents beside it. The last columns of a row summarise: the least clock known of a warp's threads, and of all.
    """

    def __init__(self, threads: int, programs: int, program: int, kinds: set[str]) -> None:
        self.threads, self.warps, self.program = threads * programs, threads * programs // LANES, program
        self.per_program = threads
        count = self.threads
        self.first: dict[str, int] = {}  # the number of the first agent of a kind
        for kind in KINDS:
            if kind in kinds:
                self.first[kind] = count
                count += self.warps if kind == "product" else self.threads
        self.phases: dict[Any, int] = {}  # the agent of each mbarrier
        self.free = count
        count += 128 if "phase" in kinds else 0
        self.warp_least, self.least = count, count + self.warps
        self.agents = count + self.warps + 1
        self.rows = np.zeros((2, 64, self.agents), np.int32)
        self.used = 1
        self.row_of = np.zeros(self.threads, np.int64)
        self.own = np.zeros((2, count), np.int32)  # what the owner of each agent knows of it; of itself, the clock
        self.own[SEEN, : self.threads] = 1
        self.clock = self.own[SEEN, : self.threads]
        self.owner, self.owner_lanes = np.full(count, -1), np.ones(count, np.int64)
        self.owner[: self.threads] = np.arange(self.threads)
        for kind, at in self.first.items():
            each = self.warps if kind == "product" else self.threads
            self.owner[at : at + each] = np.arange(each)
            self.owner_lanes[at : at + each] = LANES if kind == "product" else 1
        self.warp_of = np.full(self.agents, -1)
        self.warp_of[: self.threads] = np.arange(self.threads) // LANES
        self.warp_of[self.warp_least : self.least] = np.arange(self.warps)
        self.committed = {kind: np.zeros(self.warps if kind == "product" else self.threads, np.int32) for kind in self.first}
        self.open = {kind: np.zeros_like(groups, bool) for kind, groups in self.committed.items()}
        self.barriers: dict[Any, Phases] = {}
        self.maps: dict[int, Published] = {}
        self.cluster = np.zeros(
            (2, 2, self.agents), np.int32
        )  # what arrived at the cluster's barrier, and did when it completed
        self.remote = np.zeros((programs, self.threads), np.int32)  # when each thread last read another program's shared memory

    # --- rows of knowledge

    def _new_rows(self, rows: np.ndarray) -> int:
        """The number of the first of rows (2, n, agents), which are added."""
        if self.used + rows.shape[1] > self.rows.shape[1]:
            kept, self.row_of = np.unique(self.row_of, return_inverse=True)
            room = max(64, 2 * (kept.size + rows.shape[1]))
            fresh = np.zeros((2, room, self.agents), np.int32)
            fresh[:, : kept.size] = self.rows[:, kept]
            self.rows, self.used = fresh, kept.size
        by_warp = rows[:, :, : self.threads].reshape(2, rows.shape[1], self.warps, LANES)
        rows[:, :, self.warp_least : self.least] = by_warp.min(3)
        rows[:, :, self.least] = rows[:, :, self.warp_least : self.least].min(2)
        at = self.used
        self.rows[:, at : at + rows.shape[1]] = rows
        self.used += rows.shape[1]
        return at

    def _owned(self, threads: np.ndarray) -> np.ndarray:
        """The agents that these threads own, themselves first. A warp's products only where the whole warp is among them."""
        found = [threads]
        for kind, at in self.first.items():
            if kind == "product":
                warps, lanes = np.unique(threads // LANES, return_counts=True)
                found.append(at + warps[lanes == LANES])
            else:
                found.append(at + threads)
        return np.concatenate(found)

    def _released(self, threads: np.ndarray) -> np.ndarray:
        """(2, agents): all that these threads know together, of themselves too."""
        rows = self.row_of[threads]
        known = self.rows[:, rows[0]].copy() if (rows == rows[0]).all() else self.rows[:, np.unique(rows)].max(1)
        owned = self._owned(threads)
        known[:, owned] = np.maximum(known[:, owned], self.own[:, owned])
        return known

    def join(self, threads: np.ndarray) -> None:
        """A barrier of these threads: each knows afterwards what any knew."""
        known = self._released(threads)
        last = int(self.clock[threads].max())
        known[SEEN, threads] = last
        self.row_of[threads] = self._new_rows(known[:, None])
        self.clock[threads] = last + 1

    def join_warps(self, threads: np.ndarray) -> None:
        """bar.warp.sync of these threads, warp by warp."""
        for warp in np.unique(threads // LANES):
            self.join(threads[threads // LANES == warp])

    def _acquire(self, threads: np.ndarray, known: np.ndarray) -> None:
        """These threads also know what known (2, agents) does."""
        rows, which = np.unique(self.row_of[threads], return_inverse=True)
        new = self._new_rows(np.maximum(self.rows[:, rows], known[:, None]))  # which may number the rows anew
        self.row_of[threads] = new + which

    def fence_async(self, threads: np.ndarray) -> None:
        """fence.proxy.async: what these threads know is visible in the other proxy too."""
        rows, which = np.unique(self.row_of[threads], return_inverse=True)
        fenced = self.rows[:, rows]
        fenced[FENCED] = np.maximum(fenced[FENCED], fenced[SEEN])
        self.row_of[threads] = self._new_rows(fenced) + which
        owned = self._owned(threads)
        self.own[FENCED, owned] = np.maximum(self.own[FENCED, owned], self.own[SEEN, owned])
        self.clock[threads] += 1

    def cluster_arrive(self, threads: np.ndarray) -> None:
        """barrier.cluster.arrive: a release of what these threads know."""
        self.cluster[0] = np.maximum(self.cluster[0], self._released(threads))
        self.clock[threads] += 1

    def cluster_complete(self) -> None:
        """All have arrived."""
        self.cluster[1] = self.cluster[0]

    def cluster_wait(self, threads: np.ndarray) -> None:
        """barrier.cluster.wait: these threads know what all that arrived did."""
        self._acquire(threads, self.cluster[1])

    # --- groups: cp.async, cp.async.bulk, wgmma

    def _owners(self, kind: str, threads: np.ndarray) -> np.ndarray:
        return np.unique(threads // LANES) if kind == "product" else threads

    def open_group(self, kind: str, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(agents, clocks) of what these threads' owners start now: the group that they commit next."""
        owners = self._owners(kind, threads)
        self.open[kind][owners] = True
        return self.first[kind] + owners, self.committed[kind][owners] + 1

    def commit(self, kind: str, threads: np.ndarray) -> None:
        """commit_group by these threads."""
        owners = self._owners(kind, threads)
        self.committed[kind][owners] += 1
        self.open[kind][owners] = False

    def await_groups(self, kind: str, threads: np.ndarray, left: int) -> None:
        """wait_group: all but the last `left` groups of these threads are done, which they alone know of."""
        owners = self._owners(kind, threads)
        agents = self.first[kind] + owners
        done = self.committed[kind][owners] - left
        self.own[SEEN, agents] = np.maximum(self.own[SEEN, agents], done)
        if kind != "copy":  # the async proxy's own; cp.async writes as the generic proxy does
            self.own[FENCED, agents] = np.maximum(self.own[FENCED, agents], done)

    # --- mbarriers and descriptors

    def phases_of(self, place: Any) -> Phases:
        """The state of the mbarrier at a place."""
        if place not in self.barriers:
            if self.free == self.warp_least:
                raise NotImplementedError("more than 128 mbarriers")
            self.barriers[place] = Phases(self.free, self.agents)
            self.free += 1
        return self.barriers[place]

    def arrive(self, place: Any, thread: int) -> None:
        """mbarrier.arrive: a release into the phase."""
        phases, threads = self.phases_of(place), np.array([thread])
        phases.arrived = np.maximum(phases.arrived, self._released(threads))
        self.clock[threads] += 1

    def complete(self, place: Any) -> None:
        """A phase of an mbarrier has completed: what arrived for it can be acquired, and its copies are there."""
        phases = self.phases_of(place)
        phases.number += 1
        phases.known = phases.arrived.copy()
        phases.known[:, phases.agent] = phases.number

    def waited(self, place: Any, threads: np.ndarray) -> None:
        """These threads waited for the last completed phase."""
        self._acquire(threads, self.phases_of(place).known)

    def publish_map(self, address: int, threads: np.ndarray) -> None:
        """tensormap.cp_fenceproxy: a release of a descriptor."""
        self.maps[address] = Published(threads, self.clock[threads].copy())
        self.clock[threads] += 1

    def acquire_map(self, address: int, threads: np.ndarray) -> None:
        """fence.proxy.tensormap::generic.acquire: those of these threads that know of the release may use the descriptor."""
        published = self.maps.get(address)
        if published is None:
            return
        for thread in threads.tolist():
            if self._knows_any(thread, published.threads, published.clocks):
                published.acquired.append((thread, int(self.clock[thread])))
        self.clock[threads] += 1

    def use_map(self, address: int, thread: int, what: str) -> None:
        """Refuse a descriptor whose acquire does not come before this thread's use."""
        published = self.maps.get(address)
        acquired = np.array(published.acquired if published else [], np.int64).reshape(-1, 2)
        if not self._knows_any(thread, acquired[:, 0], acquired[:, 1]):
            raise RaceError(f"{what}: a descriptor that no fence.proxy.tensormap acquired before")

    def _knows_any(self, thread: int, others: np.ndarray, clocks: np.ndarray) -> bool:
        return bool(((self.rows[SEEN, self.row_of[thread], others] >= clocks) | (others == thread)).any())

    # --- what is asked of it

    def unknown(self, agents: np.ndarray, clocks: np.ndarray, threads: np.ndarray, side: int) -> np.ndarray:
        """Where the threads do not know of these agents' accesses."""
        unknown = self.rows[side][self.row_of[threads], agents] < clocks
        if unknown.any():
            at = np.nonzero(unknown)
            agents, clocks, threads = (np.broadcast_to(x, unknown.shape)[at] for x in (agents, clocks, threads))
            single = agents < self.own.shape[1]
            agents = np.where(single, agents, 0)
            owned = single & (threads // self.owner_lanes[agents] == self.owner[agents]) & (self.own[side, agents] >= clocks)
            unknown[at] = ~owned
        return unknown

    def name(self, agent: int) -> str:
        if agent < self.threads:
            return f"thread {agent}"
        if agent >= self.warp_least:
            return "several threads" if agent == self.least else f"several threads of warp {agent - self.warp_least}"
        kinds = {"copy": "a cp.async", "send": "a bulk copy", "sent": "a bulk copy", "product": "a wgmma"}
        for kind, at in self.first.items():
            if at <= agent < at + self.committed[kind].size:
                return f"{kinds[kind]} of {'warp' if kind == 'product' else 'thread'} {agent - at}"
        return "a TMA copy"

    def finish(self, what: str = "the program's end") -> None:
        """Refuse an end with groups that were opened and not committed, or bulk copies that may still read shared memory."""
        for kind, opened in self.open.items():
            if opened.any():
                raise RaceError(
                    f"{what}: a {kind} of {'warp' if kind == 'product' else 'thread'} {int(np.flatnonzero(opened)[0])} was never committed"
                )
        if "send" in self.first:
            done = self.own[SEEN, self.first["send"] : self.first["send"] + self.threads]
            late = np.flatnonzero(self.committed["send"] > done)
            if late.size:
                raise RaceError(f"{what}: a bulk copy of thread {int(late[0])} may still read its shared memory")
        for program, read_at in enumerate(self.remote):
            rows = self.row_of[program * self.per_program : (program + 1) * self.per_program]
            late = np.flatnonzero(read_at > self.rows[SEEN][np.unique(rows), : self.threads].max(0))
            if late.size:
                raise RaceError(
                    f"{what}: program {program} may have ended before thread {int(late[0])} of another read its shared memory"
                )


class Phases:
    """An mbarrier's phases. agent: that writes what its copies fill. number: of phases completed, over all uses of the place."""

    def __init__(self, agent: int, agents: int) -> None:
        self.agent, self.number = agent, 0
        self.arrived, self.known = np.zeros((2, agents), np.int32), np.zeros((2, agents), np.int32)


class Published:
    """A descriptor's release, by threads at clocks, and the acquires of it: (thread, clock)."""

    def __init__(self, threads: np.ndarray, clocks: np.ndarray) -> None:
        self.threads, self.clocks = threads, clocks
        self.acquired: list[tuple[int, int]] = []

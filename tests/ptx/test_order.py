"""Happens-before of the PTX machine: against an oracle that searches the graph of events, and rule by rule on small programs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fused_ops.testing.ptx.knowledge import MemoryFaultError, RaceError
from fused_ops.testing.ptx.order import Order, Shadow
from tests.ptx.by_hand import run

THREADS = 64
ACCESSED_BY = (0, 1, 33, 63)
BARRIERS = ("barrier", "warp 0", "warp 1")
SYNCHRONISES = (*BARRIERS, "arrive", "wait", "fence")


class Graph:
    """Every event, and those straight before it: of the same thread, or through a barrier."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []
        self.last: dict[int, int] = {}  # each thread's last event
        self.accesses: list[tuple[int, int, bool]] = []  # (event, unit, whether a write)
        self.arrived: set[int] = set()
        self.phase: set[int] = set()

    def event(self, threads: list[int], others: set[int] = frozenset()) -> int:  # type: ignore[assignment]
        """An event of these threads, after their last and after others."""
        self.before.append({self.last[t] for t in threads if t in self.last} | set(others))
        self.last.update(dict.fromkeys(threads, len(self.before) - 1))
        return len(self.before) - 1

    def races(self, thread: int, unit: int, write: bool) -> bool:
        """Whether an access conflicts with an earlier one that no path leads from."""
        now = self.event([thread])
        reached, to_do = set(), [now]
        while to_do:
            for event in self.before[to_do.pop()] - reached:
                reached.add(event)
                to_do.append(event)
        clash = any(u == unit and (w or write) and event not in reached for event, u, w in self.accesses)
        self.accesses.append((now, unit, write))
        return clash


def steps(draw: np.random.Generator, synchronises: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """(what, thread, unit) of a random program, about half of it accesses."""
    kinds = draw.choice(["load", "store", *synchronises], p=[0.3, 0.2, *[0.5 / len(synchronises)] * len(synchronises)], size=24)
    return [(str(kind), int(draw.choice(ACCESSED_BY)), int(draw.integers(3))) for kind in kinds]


def first_race_of_the_machine(program: list[tuple[str, int, int]]) -> int | None:
    order, shadow = Order(THREADS, 1, 0, {"phase"}), Shadow(12, 4, False)
    place = (0, 64)
    for i, (what, thread, unit) in enumerate(program):
        one, units = np.array([thread]), np.array([[unit]])
        try:
            if what == "load":
                order.load(shadow, units, one, "ld")
            elif what == "store":
                order.store(shadow, units, one, np.ones((1, 1), bool), "st")
            elif what == "barrier":
                order.join(np.arange(THREADS))
            elif what.startswith("warp"):
                order.join_warps(np.arange(32) + 32 * int(what[-1]))
            elif what == "arrive":
                order.arrive(place, thread)
                order.complete(place)
            elif what == "wait":
                order.waited(place, one)
            else:
                order.fence_async(one)
        except RaceError:
            return i
    return None


def first_race_of_the_graph(program: list[tuple[str, int, int]]) -> int | None:
    graph = Graph()
    for i, (what, thread, unit) in enumerate(program):
        if what in ("load", "store"):
            if graph.races(thread, unit, what == "store"):
                return i
        elif what == "barrier":
            graph.event(list(range(THREADS)))
        elif what.startswith("warp"):
            graph.event([t + 32 * int(what[-1]) for t in range(32)])
        elif what == "arrive":
            graph.arrived.add(graph.event([thread]))
            graph.phase = set(graph.arrived)
        elif what == "wait":
            graph.event([thread], graph.phase)
    return None


def test_races_are_those_of_the_graph() -> None:
    """By barriers alone, exactly those."""
    found = clean = 0
    for seed in range(160):
        program = steps(np.random.default_rng(seed), BARRIERS)
        expected = first_race_of_the_graph(program)
        assert first_race_of_the_machine(program) == expected, program
        found, clean = found + (expected is not None), clean + (expected is None)
    assert min(found, clean) > 10


def test_no_race_of_the_graph_is_missed() -> None:
    """With mbarriers too. Readers of several threads are kept as one, so that an alarm may come where only some are ordered."""
    found = early = 0
    for seed in range(160):
        program = steps(np.random.default_rng(seed), SYNCHRONISES)
        expected, alarm = first_race_of_the_graph(program), first_race_of_the_machine(program)
        if expected is not None:
            assert alarm is not None, program
            assert alarm <= expected, program
            found += 1
        early += alarm is not None and (expected is None or alarm < expected)
    assert found > 40
    assert early < 4


ALL = np.arange(256)
UNITS = np.arange(4)[:, None]


class Program:
    """A program of 256 threads on 8 units of memory. Each method is one instruction, by some threads."""

    def __init__(self, program: int = 0, shadow: Shadow | None = None) -> None:
        self.order = Order(256, 1, program, {"copy", "send", "sent", "product", "phase"})
        self.shadow = shadow or Shadow(32, 4, program > 0)

    def store(self, *threads: int, differs: bool = True) -> None:
        units = UNITS[: len(threads)]
        self.order.store(self.shadow, units, np.array(threads), np.full(units.shape, differs), "st")

    def load(self, *threads: int) -> None:
        self.order.load(self.shadow, UNITS[: len(threads)], np.array(threads), "ld")

    def barrier(self) -> None:
        self.order.join(ALL)

    def fence(self, *threads: int) -> None:
        self.order.fence_async(np.array(threads))

    def multiply(self, first: int = 0) -> None:
        self.order.product(self.shadow, np.arange(4), np.arange(first, first + 128), "wgmma")

    def copy_in(self, thread: int) -> None:
        self.order.tensor_in(self.shadow, np.arange(4), thread, (0, 0), "copy")

    def copy_out(self, thread: int) -> None:
        self.order.tensor_out(self.shadow, np.arange(4), thread, "copy")

    def wait(self, kind: str, *threads: int, left: int = 0) -> None:
        self.order.await_groups(kind, np.array(threads), left)

    def commit(self, kind: str, *threads: int) -> None:
        self.order.commit(kind, np.array(threads))


@pytest.mark.parametrize(
    "consume", [Program.multiply, lambda p: p.copy_in(0), lambda p: p.copy_out(0)], ids=["wgmma", "in", "out"]
)
def test_a_store_reaches_the_async_proxy_through_a_barrier_and_a_fence(consume) -> None:
    for fence_before, barrier, fence_after, fine in ((1, 1, 0, 1), (0, 1, 1, 1), (0, 1, 0, 0), (1, 0, 1, 0), (0, 0, 0, 0)):
        program = Program()
        program.store(200)
        if fence_before:
            program.fence(200)
        if barrier:
            program.barrier()
        if fence_after:
            program.fence(*ALL)
        if fine:
            consume(program)
        else:
            with pytest.raises(RaceError, match=r"fence\.proxy\.async" if barrier else "nothing orders"):
                consume(program)


def test_a_fence_does_not_reach_what_comes_after_it() -> None:
    program = Program()
    program.fence(200)
    program.store(200)
    program.barrier()
    with pytest.raises(RaceError, match=r"fence\.proxy\.async"):
        program.multiply()


def test_a_tensor_copy_over_what_was_read_needs_the_fence_too() -> None:
    for fence in (True, False):
        program = Program()
        program.load(200)
        program.barrier()
        if fence:
            program.fence(0)
            program.copy_in(0)
        else:
            with pytest.raises(RaceError, match=r"writes what thread 200 read, with no fence\.proxy\.async"):
                program.copy_in(0)


def test_what_a_product_reads_is_free_when_all_four_warps_waited() -> None:
    for waiting, barrier, fine in (
        (ALL[:128], True, True),
        (ALL[:128], False, False),
        (ALL[:96], True, False),
        ((), True, False),
    ):
        program = Program()
        program.multiply()
        program.commit("product", *ALL[:128])
        if len(waiting):
            program.wait("product", *waiting)
        if barrier:
            program.barrier()
        if fine:
            program.store(255)
        else:
            with pytest.raises(RaceError, match="writes what a wgmma of warp"):
                program.store(255)


def test_a_group_that_may_be_left_is_not_done() -> None:
    program = Program()
    for _ in range(2):
        program.multiply()
        program.commit("product", *ALL[:128])
    program.wait("product", *ALL[:128], left=1)
    program.barrier()
    with pytest.raises(RaceError, match="writes what a wgmma of warp"):
        program.store(0)


def test_what_a_bulk_copy_reads_is_free_when_its_thread_waited() -> None:
    for waiting, barrier, fine in ((0, True, True), (0, False, False), (1, True, False)):
        program = Program()
        program.copy_out(0)
        program.commit("send", 0)
        program.wait("send", waiting)
        if barrier:
            program.barrier()
        if fine:
            program.store(255)
        else:
            with pytest.raises(RaceError, match="writes what a bulk copy of thread 0 reads"):
                program.store(255)


def test_what_cp_async_writes_is_seen_by_its_own_thread_and_by_others_after_a_barrier() -> None:
    def copied(waiting: int) -> Program:
        program = Program()
        program.order.copy(program.shadow, UNITS[:1], np.array([5]), "cp.async")
        program.commit("copy", 5)
        program.wait("copy", waiting)
        return program

    copied(5).load(5)
    program = copied(5)
    program.barrier()
    program.load(7)
    for program in (copied(5), copied(7)):
        with pytest.raises(RaceError, match=r"reads what a cp\.async of thread 5 writes"):
            program.load(7)
    program = copied(5)
    program.barrier()
    with pytest.raises(RaceError, match=r"fence\.proxy\.async"):
        program.multiply()


def test_a_tensor_copy_is_there_when_its_phase_is_waited_for() -> None:
    program = Program()
    program.copy_in(0)
    with pytest.raises(RaceError, match="reads what a TMA copy writes"):
        program.load(3)
    program.order.complete((0, 0))
    with pytest.raises(RaceError, match="reads what a TMA copy writes"):
        program.load(3)
    program.order.waited((0, 0), np.array([3]))
    program.load(3)
    with pytest.raises(RaceError, match="reads what a TMA copy writes"):
        program.load(4)
    program.order.waited((0, 0), ALL[:128])
    program.multiply()  # in one proxy: no fence


def test_a_descriptor_is_acquired_before_its_use() -> None:
    for publish, acquire, barrier, use, fine in (
        ((0,), (0,), True, 9, True), ((0,), (0,), False, 0, True), ((0,), (0,), False, 9, False), ((0,), (), True, 9, False),
        ((0,), (9,), True, 9, False), ((), (0,), True, 9, False),
    ):  # fmt: skip
        order = Program().order
        for threads, step in ((publish, order.publish_map), (acquire, order.acquire_map)):
            if threads:
                step(4096, np.array(threads))
        if barrier:
            order.join(ALL)
        if fine:
            order.use_map(4096, use, "copy")
        else:
            with pytest.raises(RaceError, match=r"no fence\.proxy\.tensormap"):
                order.use_map(4096, use, "copy")


@pytest.mark.parametrize("first", [Program.store, Program.load])
@pytest.mark.parametrize("second", [Program.store, Program.load])
def test_programs_of_a_grid_may_share_only_what_none_writes(first, second) -> None:
    one = Program(1, Shadow(32, 4, True))
    first(one, 0)
    one.shadow.begin()
    other = Program(2, one.shadow)
    if first is second is Program.load:
        second(other, 0)
    else:
        with pytest.raises(RaceError, match=r"program 2 .* which another program touches"):
            second(other, 0)
    again = Program(3, Shadow(32, 4, True))
    again.store(0)
    again.shadow.begin()
    Program(4, again.shadow).store(0, differs=False)  # the same value


def test_an_end_needs_its_groups_committed_and_its_bulk_copies_waited_for() -> None:
    program = Program()
    program.copy_out(0)
    with pytest.raises(RaceError, match="never committed"):
        program.order.finish()
    program.commit("send", 0)
    with pytest.raises(RaceError, match="may still read its shared memory"):
        program.order.finish()
    program.wait("send", 0)
    program.order.finish()


LOAD = "ld.global.b32 %r5, [%rd4]; st.shared.b32 [%r4], %r5; "
NEIGHBOUR = "xor.b32 %r6, %r2, 4; add.s32 %r7, %r3, %r6; ld.shared.b32 %r8, [%r7]; st.global.b32 [%rd5], %r8; "


def test_lanes_of_a_warp_are_in_no_order_without_its_barrier() -> None:
    y, _ = run(LOAD + "bar.warp.sync -1; " + NEIGHBOUR)
    assert y.tolist() == [i ^ 1 for i in range(64)]
    with pytest.raises(RaceError, match="thread 0 reads what thread 1 writes"):
        run(LOAD + NEIGHBOUR)
    with pytest.raises(RaceError, match="thread 0 writes what thread 1 reads"):
        run(LOAD + "bar.warp.sync -1; " + NEIGHBOUR + "add.s32 %r5, %r5, 7; st.shared.b32 [%r4], %r5;")


def test_global_memory_is_ordered_within_a_program_as_shared_memory_is() -> None:
    body = "st.global.b32 [%rd5], %r1; {} xor.b32 %r6, %r2, 128; cvt.u64.u32 %rd6, %r6; add.s64 %rd7, %rd2, %rd6; ld.global.b32 %r8, [%rd7];"
    run(body.format("bar.sync 0;"))
    for nothing in ("", "bar.warp.sync -1;"):
        with pytest.raises(RaceError, match=r"\[y\]: thread 0 reads what thread 32 writes"):
            run(body.format(nothing))


def test_two_threads_of_one_instruction_store_one_value() -> None:
    run("mov.b32 %r5, 7; st.global.b32 [%rd2], %r5;")
    with pytest.raises(RaceError, match="two values at one place"):
        run("st.global.b32 [%rd2], %r1;")


MULTIPLY = (
    "mov.b64 %rd8, 0; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
    "{%r10,%r11,%r12,%r13}, %rd8, %rd8, 1, 1, 1, 0, 0; "
)
START = "mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; "
END = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "


def test_registers_of_a_product_are_its_own_until_it_is_waited_for() -> None:
    matrix = MULTIPLY.replace("mov.b64 %rd8, 0", "mov.b64 %rd8, 64")  # at byte 1024, where shared memory begins
    use = "mov.b32 %r14, %r10; "
    run(START + matrix + END + use, threads=128)
    run(START + matrix + matrix.partition("wgmma.fence.sync.aligned; ")[2] + END + use, threads=128)  # it adds to itself
    for body, match in (
        (START + matrix + use + END, "read before the product is waited for"),
        (START + matrix + "mov.b32 %r10, 0; " + END, "written before the product is waited for"),
        (START + matrix + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; " + use, "read before"),
        (START + matrix.replace("wgmma.fence.sync.aligned; ", "") + END, r"written since the last wgmma\.fence"),
        (START + matrix, "never committed"),
        (START + matrix + "wgmma.commit_group.sync.aligned; ", "nobody waited for"),
    ):
        with pytest.raises(MemoryFaultError, match=match):
            run(body, threads=128)


def test_an_alarm_names_the_instruction_both_threads_and_the_byte() -> None:
    with pytest.raises(RaceError) as raised:
        run(LOAD + "xor.b32 %r6, %r2, 128; add.s32 %r7, %r3, %r6; ld.shared.b32 %r8, [%r7];")
    assert re.fullmatch(
        r"ld\.shared\.b32 %r8, \[%r7\] \[shared memory\]: thread 0 reads what thread 32 writes, and nothing orders the two, at byte 128",
        str(raised.value),
    )

"""The machine itself: what small programs compute, and that it refuses what a GPU would get wrong, each once for real."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fused_ops.testing import ptx
from fused_ops.testing.ptx.arithmetic import arithmetic, comparison, convert, convert_pair
from fused_ops.testing.ptx.knowledge import MemoryFaultError, RaceError
from fused_ops.testing.ptx.machine import DeadlockError, UnsupportedError
from tests.ptx.by_hand import run

COPY = "ld.global.b32 %r5, [%rd4]; st.global.b32 [%rd5], %r5;"


def test_a_copy_and_its_traffic() -> None:
    y, machine = run(COPY)
    assert y.tolist() == list(range(64))
    traffic = machine.memory.finish()
    assert (traffic.load_bytes, traffic.store_bytes) == (256, 256)
    assert (traffic.load_sectors, traffic.load_once) == (8, 8)
    assert traffic.widths == {("load", "32"): 256, ("store", "32"): 256}


def test_accesses_that_are_not_coalesced_show() -> None:
    _, machine = run("shl.b64 %rd6, %rd3, 3; add.s64 %rd7, %rd1, %rd6; ld.global.b32 %r5, [%rd7];", words=512)
    assert machine.memory.finish().load_sectors == 64


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("ld.global.b32 %r5, [%rd4 + 4];", "4 bytes at byte 256 of x, which has 256"),
        ("st.global.b32 [%rd5 + -4], %r5;", "4 bytes at byte -4 of y"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd1 + 4];", "no multiple of 8"),
        ("ld.global.b32 %r5, [%rd3];", "of no allocation"),
        ("st.shared.b32 [%r4 + 1020], %r5;", "of shared memory, which has 1024"),
        ("ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];", "no multiple of 16"),
    ],
)
def test_accesses_outside_or_misaligned_are_refused(body: str, match: str) -> None:
    with pytest.raises(MemoryFaultError, match=match):
        run(body)


TURNED = "xor.b32 %r6, %r2, 128; add.s32 %r7, %r3, %r6; "  # the word of the same lane of the other warp


def test_a_barrier_orders_warps() -> None:
    load = "ld.global.b32 %r5, [%rd4]; st.shared.b32 [%r4], %r5; "
    back = TURNED + "ld.shared.b32 %r8, [%r7]; st.global.b32 [%rd5], %r8;"
    y, _ = run(load + "bar.sync 0; " + back)
    assert y.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(MemoryFaultError, match="thread 0 reads what thread 32 writes, and nothing orders"):
        run(load + back)
    with pytest.raises(MemoryFaultError, match="thread 0 writes what thread 32 reads, and nothing orders"):
        run(load + "bar.sync 0; " + back + "st.shared.b32 [%r4], %r5;")


def test_two_values_at_one_place_are_a_race_within_a_warp_too() -> None:
    with pytest.raises(MemoryFaultError, match="store two values at one place"):
        run("st.shared.b32 [%r3], %r1;", threads=32)
    run("mov.b32 %r5, 7; st.shared.b32 [%r3], %r5;")  # the same value by all


def test_sums_of_one_warp_may_differ_by_rounding_at_one_place() -> None:
    store = "and.b32 %r5, %r1, 1; shl.b32 %r5, %r5, {shift}; add.s32 %r5, %r5, 1065353216; st.shared.b32 [%r3], %r5;"
    run(store.format(shift=0), threads=32)  # 1 and the next number
    with pytest.raises(MemoryFaultError, match="store two values at one place"):
        run(store.format(shift=0), threads=64)  # by two warps
    with pytest.raises(MemoryFaultError, match="store two values at one place"):
        run(store.format(shift=13), threads=32)  # 1 and 1.001


def test_threads_that_branch_apart_meet_again() -> None:
    y, _ = run(
        """mov.b32 %r5, 0; mov.b32 %r6, 0;
        and.b32 %r7, %r1, 3;
        LOOP:
        setp.ge.s32 %p1, %r6, %r7;
        @%p1 bra DONE;
        add.s32 %r5, %r5, 10; add.s32 %r6, %r6, 1;
        bra.uni LOOP;
        DONE:
        shfl.sync.bfly.b32 %r8, %r5, 1, 31, -1;
        st.global.b32 [%rd5], %r8;"""
    )
    assert y.tolist() == [10 * ((i ^ 1) & 3) for i in range(64)]


def test_waiting_for_what_never_comes_is_a_deadlock() -> None:
    make = "setp.eq.u32 %p3, %r1, 0; @%p3 mbarrier.init.shared::cta.b64 [%r3], 1; bar.sync 0;"
    wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra W;"
    with pytest.raises(DeadlockError, match="a barrier in memory that nobody completes"):
        run(make + wait)
    with pytest.raises(DeadlockError, match="a barrier in memory that nobody completes"):
        run(f"{make} setp.lt.u32 %p1, %r1, 32; @%p1 bra A; {wait} A: bar.sync 0;")
    run(make + "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r3]; " + wait)
    with pytest.raises(RaceError, match="reads what thread 0 writes"):
        run(make.replace("bar.sync 0;", "") + wait)


def test_a_shuffle_by_a_part_of_a_warp_is_refused() -> None:
    with pytest.raises(MemoryFaultError, match="not all threads of a warp"):
        run("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r8, %r5, 1, 31, -1;")


def test_a_copy_that_is_not_waited_for_has_not_arrived() -> None:
    start = "cp.async.ca.shared.global [%r4], [%rd4], 4; cp.async.commit_group; "
    end = "ld.shared.b32 %r8, [%r4]; st.global.b32 [%rd5], %r8;"
    y, _ = run(start + "cp.async.wait_group 0; " + end)
    assert y.tolist() == list(range(64))
    for wait in ("cp.async.wait_group 1; ", ""):
        with pytest.raises(RaceError, match=r"reads what a cp\.async of thread 0 writes"):
            run(start + wait + end)
    with pytest.raises(RaceError, match="never committed"):
        run(start.replace("cp.async.commit_group; ", ""))
    run(start.replace("cp.async.commit_group; ", "cp.async.wait_all; ") + end)


CLUSTER = """ld.global.b32 %r5, [%rd4]; mov.u32 %r9, %cluster_ctarank; add.s32 %r5, %r5, %r9; st.shared.b32 [%r4], %r5;
BARRIER xor.b32 %r10, %r9, 1; mapa.shared::cluster.u32 %r11, %r4, %r10; ld.shared::cluster.b32 %r12, [%r11];
setp.eq.b32 %p1, %r9, 0; @%p1 st.global.b32 [%rd5], %r12; """
CLUSTER_BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; "


def test_programs_of_a_cluster_read_one_another() -> None:
    y, machine = run(CLUSTER.replace("BARRIER", CLUSTER_BARRIER) + CLUSTER_BARRIER, programs=2)
    assert y.tolist() == list(range(1, 65))
    assert machine.shared.remote_reads == 128
    for barrier in ("", "bar.sync 0;", "barrier.cluster.arrive.aligned;"):
        with pytest.raises(RaceError, match="reads what thread 64 writes"):
            run(CLUSTER.replace("BARRIER", barrier) + CLUSTER_BARRIER, programs=2)
    with pytest.raises(MemoryFaultError, match="may have ended before thread 64 of another"):
        run(CLUSTER.replace("BARRIER", CLUSTER_BARRIER), programs=2)


@pytest.mark.parametrize(
    "body",
    [
        "vote.sync.all.pred %p1, %p2, -1;",
        "bar.sync 1, 32;",
        "add.cc.u32 %r5, %r5, %r5;",
        "atom.global.add.f32 %r5, [%rd4], %r5;",
    ],
)
def test_unknown_instructions_are_refused(body: str) -> None:
    with pytest.raises(UnsupportedError):
        run(body)


def test_only_one_module_knows_more_than_ptx() -> None:
    folder = Path(ptx.__file__).parent
    foreign = {}
    for path in sorted(folder.glob("*.py")):
        names = re.findall(r"^\s*(?:from|import)\s+(\S+)", path.read_text(), re.MULTILINE)
        foreign[path.name] = {name for name in names if name.startswith(("..", "torch", "triton", "fused_ops"))}
    assert {name for name, found in foreign.items() if found} == {"gpu.py"}


F32 = np.float32


@pytest.mark.parametrize(
    ("op", "arguments", "result"),
    [
        ("max.f32", (F32("nan"), F32(1)), 1),
        ("max.NaN.f32", (F32("nan"), F32(1)), F32("nan")),
        ("fma.rn.f32", (F32(1 + 2**-12), F32(1 + 2**-12), F32(-1)), F32(2**-11 + 2**-24)),
        ("mul.ftz.f32", (F32(2**-100), F32(2**-100)), 0),
        ("div.s32", (np.int32(-7), np.int32(2)), -3),
        ("rem.s32", (np.int32(-7), np.int32(2)), -1),
        ("shr.s32", (np.int32(-8), np.uint32(40)), -1),
        ("shl.b32", (np.uint32(1), np.uint32(32)), 0),
        ("bfe.u32", (np.uint32(0b110100), np.uint32(2), np.uint32(3)), 0b101),
        ("bfe.s32", (np.int32(0b110100), np.uint32(2), np.uint32(3)), -3),
        ("mul.wide.s32", (np.int32(-(2**31)), np.int32(4)), -(2**33)),
        ("mul.hi.u32", (np.uint32(2**31), np.uint32(6)), 3),
        ("prmt.b32", (np.uint32(0x33221100), np.uint32(0x77665544), np.uint32(0x7531)), 0x77553311),
    ],
)
def test_arithmetic(op: str, arguments: tuple, result: float) -> None:
    found = arithmetic(tuple(op.split(".")))
    assert found is not None
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found[0](*map(np.asarray, arguments)), result)


def test_conversions() -> None:
    def of(op: str, *values: object) -> int:
        parts = tuple(op.split("."))
        found = convert_pair(parts) or convert(parts)
        assert found is not None
        return int(
            np.asarray(found[0](*map(np.asarray, values))).view(f"u{np.asarray(found[0](*map(np.asarray, values))).itemsize}")
        )

    assert of("cvt.rn.bf16x2.f32", F32(1), F32(1 + 2**-8)) == 0x3F803F80  # ties to even; the first is the high half
    assert of("cvt.rn.bf16.f32", F32(1 + 3 * 2**-8)) == 0x3F82
    assert of("cvt.rn.f16.f32", F32(65520)) == 0x7C00
    assert of("cvt.rzi.s32.f32", F32(-2.9)) == 2**32 - 2
    assert of("cvt.u64.u32", np.uint32(2**31)) == 2**31
    assert of("cvt.s64.s32", np.int32(-1)) == 2**64 - 1
    assert of("cvt.rn.satfinite.e4m3x2.f32", F32(1000), F32(-1)) == 0x7EB8
    assert of("cvt.rn.f16x2.e4m3x2", np.uint16(0x7EB8)) == 0x5F00BC00


def test_comparisons_with_nan() -> None:
    nan = np.asarray(F32("nan"))
    for name, with_nan in (
        ("eq", False),
        ("ne", False),
        ("lt", False),
        ("ltu", True),
        ("neu", True),
        ("num", False),
        ("nan", True),
    ):
        assert bool(comparison(("setp", name, "f32"))[0](nan, nan)) is with_nan, name


def test_packed_comparisons_give_a_predicate_for_each_half() -> None:
    """1 <= 2 below and 2 <= 1 above, in bfloat16; a NaN is in no order."""
    body = """mov.b32 %r5, {a}; mov.b32 %r6, {b};
        setp.le.bf16x2 %p1|%p2, %r5, %r6;
        selp.b32 %r7, 1, 0, %p1; selp.b32 %r8, 2, 0, %p2; add.s32 %r7, %r7, %r8; st.global.b32 [%rd5], %r7;"""
    one, two, nan = 0x3F80, 0x4000, 0x7FC0
    for low, high, said in (((one, two), (two, one), 1), ((two, one), (one, one), 2), ((nan, one), (one, two), 2)):
        a, b = (low[i] | high[i] << 16 for i in (0, 1))
        y, _ = run(body.format(a=a, b=b))
        assert set(y.tolist()) == {said}


def test_fields_of_a_descriptor_that_are_not_set_are_zeros_that_were_written() -> None:
    zeros = "mov.b32 %r5, 0; st.shared.b32 [%r4], %r5; bar.sync 0;"
    publish = """setp.eq.u32 %p3, %r1, 0; @%p3 tensormap.replace.tile.rank.shared::cta.b1024.b32 [%r3+0], 0x1;
        tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd2+0], [%r3+0], 0x80;"""
    _, machine = run(zeros + publish, threads=32)
    (fields,) = machine.state["maps"].values()
    assert fields == {("rank", 0): 1} | {
        (name, 0): 0 for name in ("elemtype", "interleave_layout", "swizzle_mode", "fill_mode")
    }
    with pytest.raises(MemoryFaultError, match="nothing wrote the descriptor's elemtype"):
        run(publish, threads=32)

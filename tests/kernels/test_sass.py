"""Machine code read and followed: listings that are written by hand, whose figures can be counted with a finger."""

from __future__ import annotations

import pytest

from fused_ops.kernels.sass.counted import constant_bank
from fused_ops.kernels.sass.listing import bytes_in_flight, count, loops, parse, stages_ahead
from fused_ops.kernels.sass.trace import Program, flops_of


def listing(*lines: str) -> str:
    """Instructions as cuobjdump prints them, 16 bytes each, with the trap and padding at the end."""
    lines = (*lines, f"BRA {16 * len(lines):#x}", "NOP", "NOP")
    return "\n".join(f"        /*{16 * n:04x}*/   {text} ;   /* 0x000 */\n   /* 0x000 */" for n, text in enumerate(lines))


# for row in range(program, M, programs): for chunk in range(0, N, 512): load 16 bytes, and add it up; store.
NESTED = listing(
    "S2R R0, SR_CTAID.X",  # 00
    "LDC R1, c[0x0][0x220]",  # 10: M
    "ISETP.GE.AND P0, PT, R0, R1, PT",  # 20
    "@P0 EXIT",  # 30
    "MOV R2, RZ",  # 40: a row
    "IMAD R4, R0, c[0x0][0x224], R2",  # 50: a chunk
    "IMAD.WIDE R4, R4, 0x2, c[0x0][0x210]",  # 60
    "@!P3 LDG.E.128 R8, desc[UR4][R4.64]",  # 70
    "IADD3 R2, R2, 0x200, RZ",  # 80
    "ISETP.GE.AND P1, PT, R2, c[0x0][0x224], PT",  # 90
    "FADD R20, R20, R8",  # a0
    "@!P1 BRA 0x50",  # b0
    "BAR.SYNC.DEFER_BLOCKING 0x0",  # c0
    "IADD3 R0, R0, c[0x0][0xc], RZ",  # d0
    "MUFU.EX2 R21, R20",  # e0
    "ISETP.LT.AND P0, PT, R0, R1, PT",  # f0
    "@P0 BRA 0x40",  # 100
    "IMAD.WIDE R6, R0, 0x4, c[0x0][0x218]",  # 110
    "STG.E desc[UR4][R6.64], R21",  # 120
    "EXIT",  # 130
)
BANK = {0xC: 8, 0x210: 0, 0x214: 1 << 8, 0x218: 0, 0x21C: 2 << 8, 0x220: 20, 0x224: 1024}


def test_loops_are_nested_and_counted() -> None:
    outer, inner = loops(parse(NESTED))
    assert (outer.depth, inner.depth) == (1, 2)
    assert (outer.counts["instructions"], inner.counts["instructions"]) == (13, 7)
    assert (inner.counts["LDG"], inner.counts["BAR"], outer.counts["BAR"], outer.counts["MUFU"]) == (1, 0, 1, 1)


def test_the_trap_and_padding_at_the_end_do_not_count() -> None:
    assert count(parse(NESTED))["instructions"] == 20
    assert [one.opcode for one in parse(listing("EXIT"))] == ["EXIT"]


def test_guards_suffixes_and_operands_are_read() -> None:
    (one, two, *_) = parse(
        listing("@!UP2 LDSM.16.M88.4 R4, [R2+UR4+0x10]", "IADD3 R2.reuse, P1, -R3.reuse, c[0x0][0x210], RZ", "EXIT")
    )
    assert (one.guard, one.opcode, one.kind, one.operands) == ("!UP2", "LDSM.16.M88.4", "LDS", ("R4", "[R2+UR4+0x10]"))
    assert two.operands == ("R2", "P1", "-R3", "c[0x0][0x210]", "RZ")


@pytest.mark.parametrize(("program", "rows"), [(0, 3), (3, 3), (4, 2), (7, 2)])
def test_a_program_makes_the_trips_of_its_sizes(program: int, rows: int) -> None:
    """20 rows by 8 programs: the first four have three. A row of 1024 columns has two chunks."""
    trace = Program.of(parse(NESTED)).follow(BANK, program)
    assert trace.counts["LDG"] == 2 * rows
    assert trace.counts["instructions"] == 4 + rows * (1 + 2 * 7 + 5) + 3
    assert trace.counts["BAR"] == trace.counts["MUFU"] == rows
    assert (dict(trace.reads), dict(trace.writes)) == ({0: 32 * rows}, {1: 4})
    assert trace.unknown == 0


def test_a_wait_is_for_a_load_that_was_made_since_the_last_wait() -> None:
    """Each chunk waits for its own load; two loads before the first use are one wait."""
    assert sum(Program.of(parse(NESTED)).follow(BANK, 0).waits.values()) == 6
    both = listing("LDG.E R4, [R2.64]", "LDG.E R5, [R2.64+0x80]", "FADD R6, R4, R4", "FADD R7, R5, R6", "EXIT")
    apart = listing("LDG.E R4, [R2.64]", "FADD R6, R4, R4", "LDG.E R5, [R2.64+0x80]", "FADD R7, R5, R6", "EXIT")
    assert [sum(Program.of(parse(text)).follow({}, 0).waits.values()) for text in (both, apart)] == [1, 2]


def test_a_second_read_is_found_and_how_much_lies_between() -> None:
    text = listing(
        "ULDC.64 UR4, c[0x0][0x210]", "UMOV UR6, RZ", "MOV R2, UR4", "MOV R3, UR5",
        "LDG.E.128 R4, desc[UR8][R2.64]", "LDG.E.128 R8, desc[UR8][R2.64+0x800]", "LDG.E.128 R12, desc[UR8][R2.64]", "EXIT",
    )  # fmt: skip
    trace = Program.of(parse(text)).follow(BANK, 0)
    assert (dict(trace.reads), dict(trace.again), trace.apart) == ({0: 48}, {0: 16}, 16)


def test_branches_on_what_is_loaded_are_not_taken_and_counted() -> None:
    text = listing("LDG.E R4, [R2.64]", "ISETP.GT.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x40", "MUFU.RCP R5, R4", "EXIT")
    trace = Program.of(parse(text)).follow({}, 0)
    assert (trace.unknown, trace.counts["MUFU"]) == (1, 1)


def test_a_loop_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_ops.kernels.sass.trace.MOST_STEPS", 1000)
    with pytest.raises(RuntimeError, match="does not end within 1000"):
        Program.of(parse(listing("NOP", "BRA 0x0"))).follow({}, 0)


def test_bytes_in_flight_until_the_first_use() -> None:
    """Loads return in order: a use of the second has waited for the first. Statistics, a quarter as wide, do not count."""
    text = listing(
        "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "LDG.E R30, [R40.64]", "FADD R20, R9, R9",
        "LDG.E.128 R12, [R2.64+0x20]", "FADD R20, R4, R12", "EXIT",
    )  # fmt: skip
    assert bytes_in_flight(parse(text)) == 32


def test_bytes_that_an_iteration_asks_for_on_behalf_of_the_next_are_in_flight() -> None:
    text = listing("LDG.E.64 R4, [R2.64]", "FADD R6, R4, R5", "LDG.E.64 R4, [R2.64+0x8]", "LDG.E.64 R8, [R2.64+0x10]", "@P0 BRA 0x10", "EXIT")  # fmt: skip
    assert bytes_in_flight(parse(text)) == 16


def test_copies_are_in_flight_until_a_wait_leaves_fewer_groups() -> None:
    stage = ("LDGSTS.E.BYPASS.128 [R10], desc[UR4][R2.64]", "LDGSTS.E.BYPASS.128 [R11], desc[UR4][R2.64]", "LDGDEPBAR")
    text = listing(*stage, *stage, "DEPBAR.LE SB0, 0x1", "LDS R4, [R10]", *stage, "@P0 BRA 0x60", "DEPBAR.LE SB0, 0x0", "EXIT")
    assert bytes_in_flight(parse(text)) == 64
    assert stages_ahead(parse(text)) == 1
    assert stages_ahead(parse(listing("DEPBAR.LE SB0, 0x1", "EXIT"))) == 0


def test_products_their_flops_and_what_lies_outside_their_loop() -> None:
    text = listing(
        "MOV R0, RZ", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "IADD3 R0, R0, 0x1, RZ", "ISETP.NE.AND P0, PT, R0, 0x4, PT",
        "@P0 BRA 0x10", "FADD R1, R24, R24", "EXIT",
    )  # fmt: skip
    trace = Program.of(parse(text)).follow({}, 0)
    assert trace.flops == 4 * 2 * 64 * 128 * 16
    assert (trace.counts["instructions"], trace.outside["instructions"]) == (1 + 4 * 4 + 2, 3)
    (hmma, *_) = parse(listing("HMMA.16816.F32.BF16 R4, R4, R8, R4", "EXIT"))
    assert flops_of(hmma) == 2 * 16 * 8 * 16


def test_tensor_copies_are_what_their_barriers_await() -> None:
    text = listing(
        "UMOV UR4, 0x8000", "MOV R4, UR4", "SYNCS.ARRIVE.TRANS64 RZ, [UR8], R4", "SYNCS.ARRIVE.TRANS64 RZ, [UR8+0x8], R4",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R9", "@!P0 BRA 0x40", "SYNCS.ARRIVE.TRANS64 RZ, [UR8], R4", "EXIT",
    )  # fmt: skip
    trace = Program.of(parse(text)).follow({}, 0)
    assert (trace.copied, trace.ahead, trace.unknown) == (3 * 0x8000, 2 * 0x8000, 0)
    assert not loops(parse(text))  # a wait is no loop


# What an instruction leaves in R9: (instructions, value).
VALUES = [
    (("MOV R1, 0x7", "IMAD R9, R1, 0x3, R1"), 28),
    (("MOV R1, -0x1", "SHF.R.S32.HI R9, RZ, 0x1f, R1"), 0xFFFFFFFF),
    (("MOV R1, 0x80000000", "SHF.R.U32.HI R9, RZ, 0x1f, R1"), 1),
    (("MOV R1, 0x3", "SHF.L.U32 R9, R1, 0x4, RZ"), 48),
    (("MOV R1, 0xc0000000", "SHF.L.U64.HI R9, R1, 0x1, RZ"), 1),
    (("MOV R1, 0x5", "LOP3.LUT R9, R1, 0x6, RZ, 0xc0, !PT"), 4),
    (("LOP3.LUT R9, R77, RZ, RZ, 0xc0, !PT",), 0),  # unknown and 0
    (("MOV R1, 0x9", "LEA R9, R1, 0x100, 0x2"), 0x124),
    (("MOV R1, -0x5", "LEA.HI R9, R1, R1, RZ, 0x3"), 2),
    (("MOV R1, 0xffffffff", "IADD3 R8, P0, R1, 0x1, RZ", "IADD3.X R9, RZ, 0x4, RZ, P0, !PT"), 5),
    (("MOV R2, 0x10", "MOV R3, 0x1", "IADD3 R8, P0, R2, -0x20, RZ", "IADD3.X R9, R3, -0x1, RZ, P0, !PT"), 0),
    (("MOV R1, 0x10000", "IMAD.WIDE.U32 R8, R1, 0x10000, RZ"), 1),
    (("MOV R1, -0x2", "IMAD.WIDE R8, R1, 0x3, RZ"), 0xFFFFFFFF),
    (("MOV R1, -0x8", "IABS R9, R1"), 8),
    (("MOV R1, -0x8", "ISETP.GE.AND P0, PT, R1, 0x2, PT", "SEL R9, R1, 0x3, P0"), 3),
    (("MOV R1, -0x8", "ISETP.GE.U32.AND P0, PT, R1, 0x2, PT", "SEL R9, 0x5, 0x3, P0"), 5),
    (("ISETP.NE.AND P1, PT, RZ, RZ, PT", "PLOP3.LUT P0, PT, P1, PT, PT, 0x80, 0x0", "SEL R9, 0x5, 0x3, P0"), 3),
    (("ISETP.NE.AND P1, PT, RZ, RZ, PT", "P2R R9, PR, RZ, 0x2"), 0),
    (("MOV R1, 0x11223344", "PRMT R9, R1, 0x3210, RZ"), 0x11223344),
    (("MOV R1, 0x11223344", "PRMT R9, R1, 0x7632, RZ"), 0x00001122),
    (("MOV R1, -0x3", "VIMNMX R9, R1, 0x2, PT"), 0xFFFFFFFD),
    (("HFMA2.MMA R9, -RZ, RZ, 0, 5.9604644775390625e-08",), 1),
    (("MOV R1, 0xff", "SGXT.U32 R9, R1, 0x4"), 0xF),
    (("UIADD3 UR4, URZ, 0x7, URZ", "R2UR UR5, R77", "IMAD.U32 R9, RZ, RZ, UR4"), 7),
    (("CS2R R8, SRZ",), 0),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "value"), VALUES, ids=lambda v: v[-1] if isinstance(v, tuple) else hex(v))
def test_integer_instructions(lines: tuple[str, ...], value: int) -> None:
    """A load from where R9 says shows what it holds."""
    text = listing(*lines, "MOV R10, R9", "MOV R11, 0x100", "LDG.E R12, [R10.64]", "EXIT")
    seen: list[int] = []
    program = Program.of(parse(text))

    class Memory:
        def __init__(self, trace: object) -> None:
            self.sites: dict[int, int] = {}

        def load(self, address: int, width: int, site: int) -> None:
            seen.append(address & 0xFFFFFFFF)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_ops.kernels.sass.trace.Memory", Memory)
        program.follow({}, 0)
    assert seen == [value]


def test_division_by_a_reciprocal_is_exact() -> None:
    """How the compiler divides 1000 by 7, of which it knows neither."""
    text = listing(
        "LDC R1, c[0x0][0x210]", "LDC R2, c[0x0][0x214]", "I2F.U32.RP R3, R2", "MUFU.RCP R3, R3", "IADD3 R4, R3, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R5, R4", "IMAD.MOV R6, RZ, RZ, -R5", "IMAD R7, R6, R2, RZ", "MOV R4, RZ",
        "IMAD.HI.U32 R5, R5, R7, R4", "IMAD.HI.U32 R9, R5, R1, RZ", "IMAD R8, R9, R2, RZ", "IADD3 R8, R1, -R8, RZ",
        "ISETP.GE.U32.AND P0, PT, R8, R2, PT", "@P0 IADD3 R9, R9, 0x1, RZ",
        "MOV R0, RZ", "IADD3 R0, R0, 0x1, RZ", "ISETP.LT.AND P1, PT, R0, R9, PT", "@P1 BRA 0x100", "EXIT",
    )  # fmt: skip
    trace = Program.of(parse(text)).follow({0x210: 1000, 0x214: 7}, 0)
    assert trace.counts["instructions"] == 16 + 3 * (1000 // 7) + 1


def test_the_constant_bank_holds_arguments_where_the_kernel_reads_them() -> None:
    ptx = "\n".join(f"\t.param .{kind} k_param_{n}," for n, kind in enumerate(("u64", "u32", "u64", "f32", "u64", "u64")))
    case = {
        "arch": 90, "num_warps": 4, "signature": {"x_ptr": "*bf16:16", "M": "i32", "stride": "i64", "eps": "fp32"},
        "launch": {"grid": 5, "values": {"M": 3, "stride": 1 << 33, "eps": 1.0}},
    }  # fmt: skip
    bank, names = constant_bank(ptx, case)
    assert names == ["x_ptr", "scratch", "scratch"]
    assert (bank[0x0], bank[0xC], bank[0x210], bank[0x214] >> 8, bank[0x218]) == (128, 5, 0, 1, 3)
    assert (bank[0x220], bank[0x224], bank[0x228]) == (0, 2, 0x3F800000)

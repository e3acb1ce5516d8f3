"""Wavefronts of shared memory: the answers of small programs, known by hand, and of random accesses, counted lane by lane."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from fused_ops.testing.ptx.banks import wavefronts
from fused_ops.testing.ptx.grid import run_grid
from fused_ops.testing.ptx.machine import Code
from fused_ops.testing.ptx.memory import Global, Traffic
from fused_ops.testing.ptx.text import Parser

PROGRAM = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
.reqntid {threads}
{{
	.reg .pred %p<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
	ld.param.b64 %rd1, [k_param_0];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b32 %r2, [%rd3];
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;
	setp.lt.u32 %p1, %r1, 8;
	{body}
	ret;
}}
"""


def run(body: str, places: list[int]) -> Traffic:
    """What a program moves whose threads have these bytes of shared memory at %r4. %p1: a thread is one of the first 8."""
    memory = Global()
    address = memory.add("places", np.array(places, np.uint32).view(np.uint8))
    code = Code(Parser(PROGRAM.format(threads=len(places), body=body)).program)
    for _ in run_grid(code, memory, [address], 1, 8192):
        pass
    return memory.finish()


def counted(body: str, places: list[int]) -> tuple[int, int]:
    """(wavefronts, ideal) of the program."""
    traffic = run(body, places)
    return traffic.shared_wavefronts, traffic.shared_ideal


def strided(step: int, threads: int = 32) -> list[int]:
    """Every thread `step` bytes on."""
    return [step * thread for thread in range(threads)]


def matrices(row_bytes: int, swizzled: bool = False) -> list[int]:
    """Where the rows of four 8x8 matrices side by side begin, in rows of so many bytes. swizzled: row i's pieces of 16 bytes change
    places by i."""
    return [row * row_bytes + 16 * (matrix ^ row if swizzled else matrix) for matrix in range(4) for row in range(8)]


LOAD, STORE = "ld.shared.b32 %r5, [%r4];", "st.shared.b32 [%r4], 0;"
LOAD_8, STORE_8 = "ld.shared.v2.b32 {%r5, %r6}, [%r4];", "st.shared.v2.b32 [%r4], {%r1, %r1};"
LOAD_16, STORE_16 = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];", "st.shared.v4.b32 [%r4], {%r1, %r1, %r1, %r1};"
LOAD_MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r4];"
STORE_MATRIX = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r1, %r1, %r1, %r1};"
COPY = "cp.async.cg.shared.global [%r4], [%rd1], 16; cp.async.commit_group; cp.async.wait_group 0;"
WORDS, PAIRS, ROWS, MATRICES = (LOAD, STORE), (LOAD_8, STORE_8), (LOAD_16, STORE_16, COPY), (LOAD_MATRIX, STORE_MATRIX)

KNOWN = {
    "stride_1": (WORDS, strided(4), (1, 1)),
    "stride_2": (WORDS, strided(8), (2, 1)),  # lanes 0 and 16 share bank 0
    "stride_3": (WORDS, strided(12), (1, 1)),  # 3 and 32 have no common divisor
    "stride_32": (WORDS, strided(128), (32, 1)),  # all in bank 0
    "stride_33": (WORDS, strided(132), (1, 1)),
    "two_warps_of_stride_2": (WORDS, strided(8, 64), (4, 2)),
    "reversed": (WORDS, strided(4)[::-1], (1, 1)),
    "broadcast": ((LOAD,), [64] * 32, (1, 1)),
    "two_words_of_two_banks": ((LOAD,), [0, 4] * 16, (1, 1)),
    "two_words_of_one_bank": ((LOAD,), [0, 128] * 16, (2, 1)),
    "bytes_in_a_row": (("ld.shared.b8 %r5, [%r4];",), strided(1), (1, 1)),  # 8 words
    "halves_of_words": (("ld.shared.b16 %r5, [%r4];",), strided(2), (1, 1)),  # 16 words
    "halves_of_words_far_apart": (("ld.shared.b16 %r5, [%r4];",), strided(128), (32, 1)),
    "pairs_in_a_row": (PAIRS, strided(8), (2, 2)),  # a half warp has all 32 banks
    "pairs_of_stride_2": (PAIRS, strided(16), (4, 2)),  # lanes 0 and 8 share banks 0 and 1
    "pairs_of_the_halves": (PAIRS, [8 * (t % 16) + 128 * (t // 16) for t in range(32)], (2, 2)),  # one half's banks, twice
    "rows_in_a_row": (ROWS, strided(16), (4, 4)),  # a quarter has all 32 banks
    "rows_of_stride_2": (ROWS, strided(32), (8, 4)),
    "a_column_of_rows": (ROWS, strided(128), (32, 4)),  # 8 lanes of each quarter in banks 0 to 3
    "a_column_of_padded_rows": (ROWS, strided(144), (4, 4)),
    "one_row_for_all": ((LOAD_16,), [0] * 32, (4, 4)),  # each quarter by itself
    "matrices_in_a_row": (MATRICES, strided(16), (4, 4)),
    "matrices_of_narrow_rows": (MATRICES, matrices(64), (16, 4)),  # rows 0, 2, 4 and 6 begin in one bank
    "matrices_without_a_swizzle": (MATRICES, matrices(128), (32, 4)),
    "matrices_with_a_swizzle": (MATRICES, matrices(128, swizzled=True), (4, 4)),
    "matrices_of_padded_rows": (MATRICES, matrices(144), (4, 4)),
    "first_8_lanes": (("@%p1 " + STORE, "@%p1 " + LOAD), strided(128), (8, 1)),
    "first_8_rows": (("@%p1 " + STORE_16, "@%p1 " + LOAD_16, "@%p1 " + COPY), strided(16), (1, 1)),
}
CASES = [pytest.param(body, *KNOWN[name][1:], id=f"{name}-{body.split('.')[0]}") for name in KNOWN for body in KNOWN[name][0]]


@pytest.mark.parametrize(("body", "places", "wanted"), CASES)
def test_known_answers(body: str, places: list[int], wanted: tuple[int, int]) -> None:
    assert counted(body, places) == wanted


def test_two_matrices_take_half_the_wavefronts() -> None:
    assert counted("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r4];", matrices(128)) == (16, 2)


def test_every_instruction_counts_by_itself_and_each_time() -> None:
    """Where it repeats another's places, too."""
    traffic = run("st.shared.b32 [%r4], %r1; bar.warp.sync -1; ld.shared.b32 %r5, [%r4]; ld.shared.b32 %r6, [%r4];", strided(8))
    assert traffic.shared.taken == {
        "st.shared.b32 [%r4], %r1": 2,
        "ld.shared.b32 %r5, [%r4]": 2,
        "ld.shared.b32 %r6, [%r4]": 2,
    }
    looped = "mov.b32 %r9, 0; L: ld.shared.b32 %r5, [%r4]; add.s32 %r9, %r9, 1; setp.lt.s32 %p2, %r9, 5; @%p2 bra L;"
    assert counted(looped, strided(8)) == (10, 5)


@pytest.mark.parametrize("body", ["ld.shared::cluster.b32 %r5, [%r4];", "mbarrier.init.shared::cta.b64 [%r3], 1;"])
def test_what_is_no_warps_access_of_the_banks_is_not_counted(body: str) -> None:
    assert counted("@%p1 " + body if body.startswith("mbarrier") else body, strided(128)) == (0, 0)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_random_accesses(size: int) -> None:
    """Of some of the lanes of four warps, against a count lane by lane."""
    random = np.random.default_rng(size)
    for _ in range(20):
        lanes = np.flatnonzero(random.random(128) < 0.7)
        offsets = size * random.integers(0, 1024 // size, lanes.size)
        banks: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # of the lanes served together: distinct words
        for lane, offset in zip(lanes.tolist(), offsets.tolist()):
            for word in range(offset // 4, (offset + size + 3) // 4):
                banks[lane // (32 if size <= 4 else 128 // size), word % 32].add(word)
        served = {group for group, _ in banks}
        taken = sum(max(len(found) for (of, _), found in banks.items() if of == group) for group in served)
        assert wavefronts(offsets, lanes, size) == (taken, len(served))

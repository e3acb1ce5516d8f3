"""The second stage of every deterministic reduction over rows: add partial rows in a fixed order and cast."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import next_power_of_2

TILE = 4096  # elements: 8 vectors on their way in each of 128 threads
MOST_ROWS = 256  # of a tile; its 16 columns are whole sectors of memory
LEAST_ROWS = 16
MOST_COLUMNS = 64


def column_sum_blocks(P: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_N) of column_sum_kernel for up to P partial rows: a tile of all of them where it can hold them.

    Few trips along P rather than wide tiles: a program waits for memory on each, and many programs hide that wait.
    """
    block_p = max(LEAST_ROWS, min(MOST_ROWS, next_power_of_2(P)))
    return block_p, min(MOST_COLUMNS, TILE // block_p)


@triton.jit
def column_sum_kernel(
    part_ptr, first_ptr, second_ptr, P, N, stride_pp,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """first = sum(part[0], axis=0),  second = sum(part[1], axis=0).

    part (1 or 2, P, N) fp32, the last two dimensions of strides (stride_pp, 1), the first of P * stride_pp
    first, second (N,) any float
    Grid (1 or 2 times cdiv(N, BLOCK_N),). BLOCK_N columns a program, all P rows in steps of BLOCK_P, always in the same
    order. fp32.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    which = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    part_ptr += which.to(tl.int64) * P * stride_pp
    acc = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        acc += tl.load(part_ptr + rows[:, None] * stride_pp + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    if which == 0:
        tl.store(first_ptr + cols, total.to(first_ptr.dtype.element_ty), mask=cols < N)
    else:
        tl.store(second_ptr + cols, total.to(second_ptr.dtype.element_ty), mask=cols < N)

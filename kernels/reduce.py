"""The second stage of every deterministic reduction over rows: add partial rows in a fixed order and cast."""

from __future__ import annotations

import triton
import triton.language as tl

COLUMN_SUM_BLOCK_P = 32
COLUMN_SUM_BLOCK_N = 64


@triton.jit
def column_sum_kernel(part_ptr, out_ptr, P, N, stride_pp, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = sum(part, axis=0).

    part (P, N) fp32, last stride 1 | out (N,) any float
    Grid (cdiv(N, BLOCK_N),). BLOCK_N columns a program, all P rows in steps of BLOCK_P, always in the same order. fp32.
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        acc += tl.load(part_ptr + rows[:, None] * stride_pp + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=cols < N)

"""The backward of layer norm and RMS norm over rows that no program can hold beside the sums for dw and db.

Two kernels, so that neither keeps more than it reads. One takes rows and leaves their two sums. The other takes strips of
columns, down a group of rows, with dw and db of the strip in registers: it writes dx, and each partial row once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, cdiv
from ..rows import aligned, two_sums

PROGRAMS_PER_SM = 4  # strips of columns that an SM works on at once


def wide_config(itemsize: int, whole: bool) -> RowConfig:
    """The configuration of both kernels, for rows of N elements of itemsize bytes. whole: whether rows are whole aligned vectors.

    Per row, memory moves x and dy twice and dx once: 10 N bytes in 16 bits, where 6 N would do if dw and db had a place beside
    x and dy. They have none. In registers they are 8 N bytes a program, 128 of the 256 KB of an SM at 16384 columns, and the
    rest spills. In L2 they are read and written for each tile of rows: 16 N bytes a tile, which for 1, 2 or 4 rows a tile adds
    16, 8 or 4 N bytes a row to the 10 N that x, dy and dx move through L2; and 132 programs' partial rows (1056 N bytes: 17, 35
    and 69 MB at 16384, 32768 and 65536 columns) with their rows of x and dy (528 N a row of a tile: 9, 17 and 35 MB) are
    more than the 60% of 50 MB that can be counted on, so that memory moves more than 10 N after all.
    Here L2 need hold nothing, and partial rows are few: at most PROGRAMS_PER_SM * SMs / strips.

    A strip is as wide as the vectors of 4 warps, so that a column has one thread: a sum over a tile's rows is an addition in
    registers. Across warps it would go through shared memory for each tile, with conflicts on its banks.
    """
    return RowConfig(2, 2048 // itemsize, num_warps=4, variant="chunked", num_stages=3 if whole else 1)


def row_groups(M: int, N: int, config: RowConfig, sms: int) -> int:
    """How many groups the rows are taken in, each by as many programs as there are strips: the rows of partial sums."""
    places = sms * max(1, PROGRAMS_PER_SM * 4 // config.num_warps)
    return max(1, min(cdiv(M, config.block_m), places // cdiv(N, config.block_n)))


@triton.jit
def _x_hat(x, mean, rstd, mask, CENTRED: tl.constexpr):
    """(x - mean) * rstd, or x * rstd; 0 outside mask."""
    if CENTRED:
        x -= mean
    return tl.where(mask, x * rstd, 0.0)


@triton.jit
def norm_bwd_chunked_sums_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, sums_ptr, N, stride_dym, stride_dyn, stride_xm, stride_xn,
    HAS_WEIGHT: tl.constexpr, CENTRED: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """sums[:, 0] = mean(g),  sums[:, 1] = mean(g * x_hat),  g = dy * w,  x_hat = (x - mean) * rstd

    Without CENTRED x_hat = x * rstd, and mean(g) is left out.

    dy, x (M, N) any float, any strides | w (N,) any float, stride 1 | mean, rstd (M,) fp32 | sums (M, 2) fp32
    Grid (M,). One row a program in chunks of BLOCK_N, NUM_STAGES of them on their way. BLOCK_N running sums in fp32, added up at
    the end. N and the row strides are multiples of VEC.
    """
    row = tl.program_id(0).to(tl.int64)
    end = aligned(N, VEC)
    mean = 0.0
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_sums = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    gx_sums = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        mask, wide = cols < end, cols.to(tl.int64)
        g = tl.load(dy_ptr + aligned(row * stride_dym, VEC) + wide * stride_dyn, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + aligned(row * stride_xm, VEC) + wide * stride_xn, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        g_sums += g
        gx_sums += g * _x_hat(x, mean, rstd, mask, CENTRED)
    both = 2 * row + tl.arange(0, 1)
    if CENTRED:
        g_sum, gx_sum = two_sums(g_sums, gx_sums, 1)
        tl.store(sums_ptr + both, g_sum / N)
    else:
        gx_sum = tl.sum(gx_sums, axis=1)
    tl.store(sums_ptr + both + 1, gx_sum / N)


@triton.jit
def norm_bwd_chunked_columns_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, sums_ptr, dx_ptr, dw_part_ptr, db_part_ptr, M, N,
    stride_dym, stride_dyn, stride_xm, stride_xn, stride_dxm,
    HAS_WEIGHT: tl.constexpr, CENTRED: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  dw = sum(dy * x_hat),  db = sum(dy); g, x_hat as norm_bwd_chunked_sums_kernel

    dy, x (M, N) any float, any strides | w (N,) stride 1 | mean, rstd (M,) fp32 | sums (M, 2) fp32, read with NEED_DX
    dx (M, N), last stride 1 | dw_part, db_part (groups, N) fp32
    Grid (groups * strips,). Strip s of BLOCK_N columns down row tiles p, p + groups, ..., the last first: L2 may still
    hold what the other kernel read last. NUM_STAGES tiles on their way. fp32 inside. N and the row strides are multiples of VEC.
    """
    strips = tl.cdiv(N, BLOCK_N)
    groups = tl.num_programs(0) // strips
    group = (tl.program_id(0) // strips).to(tl.int64)
    cols = (tl.program_id(0) % strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row, wide = cols < aligned(N, VEC), cols.to(tl.int64)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_N], dtype=tl.float32)
    tiles = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(group, tiles, groups, num_stages=NUM_STAGES):
        rows = (tiles - 1 - tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = (rows < M)[:, None]
        mask = in_m & in_row[None, :]
        dy_ptrs = dy_ptr + aligned(rows * stride_dym, VEC)[:, None] + wide[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if NEED_DX or NEED_DW:
            x_ptrs = x_ptr + aligned(rows * stride_xm, VEC)[:, None] + wide[None, :] * stride_xn
            x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
            mean = 0.0
            if CENTRED:
                mean = tl.load(mean_ptr + rows[:, None], mask=in_m, other=0.0)
            rstd = tl.load(rstd_ptr + rows[:, None], mask=in_m, other=0.0)
            x_hat = _x_hat(x, mean, rstd, mask, CENTRED)
        if NEED_DX:
            g = dy
            if HAS_WEIGHT:
                g = dy * w[None, :]
            if CENTRED:
                g -= tl.load(sums_ptr + 2 * rows[:, None], mask=in_m, other=0.0)
            dx = rstd * (g - x_hat * tl.load(sums_ptr + 2 * rows[:, None] + 1, mask=in_m, other=0.0))
            dx_ptrs = dx_ptr + aligned(rows * stride_dxm, VEC)[:, None] + cols[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += tl.sum(dy * x_hat, axis=0)
        if NEED_DB:
            db += tl.sum(dy, axis=0)
    if NEED_DW:
        tl.store(dw_part_ptr + aligned(group * N, VEC) + cols, dw, mask=in_row)
    if NEED_DB:
        tl.store(db_part_ptr + aligned(group * N, VEC) + cols, db, mask=in_row)

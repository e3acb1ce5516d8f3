"""Layer norm backward: dx, and dw and db as fp32 partial sums over a persistent grid.

A program owns every P-th tile of rows and one row of the partial buffers; column_sum_kernel (reduce.py) adds the P
partial rows in a fixed order. No atomics: the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, cdiv, next_power_of_2, rows_that_fill
from ..rows import aligned

MAX_ONE_PASS_BWD = 8192  # columns for which x, dy and both accumulators fit the registers of 32 warps


def layer_norm_bwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, whole: bool = True
) -> RowConfig:
    """The configuration of layer_norm_bwd_kernel (or its chunked form) for M rows of N elements of itemsize bytes.

    whole: whether every row is a whole number of aligned vectors. Other rows of more than 4096 columns would spill registers
    on GPUs later than Hopper, and are chunked there.
    """
    block_n = next_power_of_2(N)
    if block_n > (MAX_ONE_PASS_BWD if whole or capability[0] < 10 else MAX_ONE_PASS_BWD // 2):
        return RowConfig(4, 2048, num_warps=16, variant="chunked")
    if block_n <= 256:
        return RowConfig(rows_that_fill(M, max(4, 2048 // block_n), sms, least=4), block_n, num_warps=4)
    # Beyond Hopper 8 elements a thread spill at 4096 columns and more: the compiler aims at 64 registers all the same.
    per_thread = 16 if capability[0] >= 10 and block_n >= 4096 else 8
    return RowConfig(1, block_n, num_warps=min(32, max(1, block_n // (32 * per_thread))))


def layer_norm_bwd_programs(M: int, config: RowConfig, sms: int) -> int:
    """How many programs (and rows of partial sums) the backward launches: bounded by the SMs, never by M."""
    per_sm = max(1, min(4, 32 // config.num_warps)) if not config.chunked else 1
    return max(1, min(cdiv(M, config.block_m), sms * per_sm))


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_part_ptr, db_part_ptr, M, N,
    stride_dym, stride_dyn, stride_xm, stride_xn, stride_dxm,
    HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  g = dy * w;   dw = sum(dy * x_hat),  db = sum(dy)

    dy, x (M, N) any float, any strides | w (N,) stride 1 | mean, rstd (M,) fp32 | dx (M, N), last stride 1
    dw_part, db_part (P, N) fp32, P the number of programs
    Grid (P,). Program p takes row tiles p, p + P, ... and writes partial row p once. N <= BLOCK_N. fp32 inside.
    N and the row strides are multiples of VEC.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < aligned(N, VEC)
    wide = cols.to(tl.int64)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), programs):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & in_row[None, :]
        dy_ptrs = dy_ptr + aligned(rows * stride_dym, VEC)[:, None] + wide[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if NEED_DX or NEED_DW:
            x_ptrs = x_ptr + aligned(rows * stride_xm, VEC)[:, None] + wide[None, :] * stride_xn
            x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
            x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if NEED_DX:
            g = dy
            if HAS_WEIGHT:
                g = dy * w[None, :]
            g_mean = tl.sum(g, axis=1) / N
            gx_mean = tl.sum(g * x_hat, axis=1) / N
            dx = rstd[:, None] * (g - g_mean[:, None] - x_hat * gx_mean[:, None])
            dx_ptrs = dx_ptr + aligned(rows * stride_dxm, VEC)[:, None] + cols[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += dy * x_hat
        if NEED_DB:
            db += dy
    if NEED_DW:
        tl.store(dw_part_ptr + aligned(program * N, VEC) + cols, tl.sum(dw, axis=0), mask=in_row)
    if NEED_DB:
        tl.store(db_part_ptr + aligned(program * N, VEC) + cols, tl.sum(db, axis=0), mask=in_row)


@triton.jit
def layer_norm_bwd_chunked_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_part_ptr, db_part_ptr, M, N,
    stride_dym, stride_dyn, stride_xm, stride_xn, stride_dxm,
    HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """layer_norm_bwd_kernel for rows of any length: per tile of rows, the two means over chunks, then dx, dw and db.

    dy, x (M, N) any float, any strides | w (N,) stride 1 | mean, rstd (M,) fp32 | dx (M, N), last stride 1
    dw_part, db_part (P, N) fp32, P the number of programs
    Grid (P,). A program adds to its own partial row, which stays in L2; its first tile writes instead of adding.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    end = aligned(N, VEC)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), programs):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = (rows < M)[:, None]
        rows_before = tl.full([BLOCK_N], tile - program, tl.int64)  # > 0 where an earlier tile of this program wrote
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        dy_rows = dy_ptr + aligned(rows * stride_dym, VEC)[:, None]
        x_rows = x_ptr + aligned(rows * stride_xm, VEC)[:, None]
        g_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        gx_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        if NEED_DX:
            for start in tl.range(0, N, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                wide = cols.to(tl.int64)[None, :]
                mask = in_m & (cols < end)[None, :]
                g = tl.load(dy_rows + wide * stride_dyn, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
                x = tl.load(x_rows + wide * stride_xn, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
                if HAS_WEIGHT:
                    g *= tl.load(w_ptr + cols, mask=cols < end, other=0.0).to(tl.float32)[None, :]
                g_sum += tl.sum(g, axis=1)
                gx_sum += tl.sum(tl.where(mask, g * ((x - mean) * rstd), 0.0), axis=1)
        g_mean = (g_sum / N)[:, None]
        gx_mean = (gx_sum / N)[:, None]
        for start in tl.range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            in_row = cols < end
            wide = cols.to(tl.int64)[None, :]
            mask = in_m & in_row[None, :]
            dy = tl.load(dy_rows + wide * stride_dyn, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            x = tl.load(x_rows + wide * stride_xn, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            x_hat = tl.where(mask, (x - mean) * rstd, 0.0)
            if NEED_DX:
                g = dy
                if HAS_WEIGHT:
                    g = dy * tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
                dx = rstd * (g - g_mean - x_hat * gx_mean)
                dx_ptrs = dx_ptr + aligned(rows * stride_dxm, VEC)[:, None] + cols[None, :]
                tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            seen = in_row & (rows_before > 0)
            if NEED_DW:
                dw_ptrs = dw_part_ptr + aligned(program * N, VEC) + cols
                dw = tl.load(dw_ptrs, mask=seen, other=0.0) + tl.sum(dy * x_hat, axis=0)
                tl.store(dw_ptrs, dw, mask=in_row)
            if NEED_DB:
                db_ptrs = db_part_ptr + aligned(program * N, VEC) + cols
                db = tl.load(db_ptrs, mask=seen, other=0.0) + tl.sum(dy, axis=0)
                tl.store(db_ptrs, db, mask=in_row)
        tl.debug_barrier()  # the next tile reads back the partial row

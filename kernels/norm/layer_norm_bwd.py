"""Layer norm backward: dx, and dw and db as fp32 partial sums over a persistent grid.

A program owns every P-th tile of rows and one row of the partial buffers; column_sum_kernel (reduce.py) adds the P
partial rows in a fixed order. No atomics: the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, cdiv, next_power_of_2, rows_of_whole_vectors, rows_that_fill
from ..rows import aligned, two_sums
from .norm_bwd_wide import wide_config

MAX_ONE_PASS_BWD = 8192  # columns for which x, dy and both accumulators fit the registers of 32 warps


def layer_norm_bwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, whole: bool = True
) -> RowConfig:
    """The configuration of layer_norm_bwd_kernel, or of the kernels of norm_bwd_wide.py, for M rows of N elements of itemsize bytes.

    whole: whether every row is a whole number of aligned vectors. Only such rows are prefetched: two rows ahead up to 2 KB, one
    beyond, so that an SM has 24 KB or more on their way. Other rows of more than 4096 columns would spill registers on GPUs
    later than Hopper, and are chunked there.
    """
    block_n = next_power_of_2(N)
    if block_n > (MAX_ONE_PASS_BWD if whole or capability[0] < 10 else MAX_ONE_PASS_BWD // 2):
        return wide_config(itemsize, whole)
    num_stages = 1 if not whole else 3 if block_n * itemsize <= 2048 else 2
    if block_n <= 256:
        block_m = rows_that_fill(M, max(4, 2048 // block_n), sms, rows_of_whole_vectors(block_n, 4, itemsize))
        return RowConfig(block_m, block_n, 4, num_stages=min(2, num_stages))
    # Beyond Hopper 8 elements a thread spill at 4096 columns and more: the compiler aims at 64 registers all the same. With 8
    # at 4096, on Hopper, an SM would hold one program of 16 warps.
    per_thread = 16 if block_n >= 4096 and (capability[0] >= 10 or (block_n == 4096 and whole)) else 8
    return RowConfig(1, block_n, min(32, max(1, block_n // (32 * per_thread))), num_stages=num_stages)


def layer_norm_bwd_programs(M: int, config: RowConfig, sms: int) -> int:
    """How many programs (and rows of partial sums) layer_norm_bwd_kernel has: bounded by the SMs, never by M."""
    per_sm = max(1, min(4, 32 // config.num_warps))
    return max(1, min(cdiv(M, config.block_m), sms * per_sm))


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_part_ptr, db_part_ptr, M, N,
    stride_dym, stride_dyn, stride_xm, stride_xn, stride_dxm,
    HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  g = dy * w;   dw = sum(dy * x_hat),  db = sum(dy)

    dy, x (M, N) any float, any strides | w (N,) stride 1 | mean, rstd (M,) fp32 | dx (M, N), last stride 1
    dw_part, db_part (P, N) fp32, P the number of programs
    Grid (P,). Program p takes row tiles p, p + P, ... and writes partial row p once. N <= BLOCK_N. fp32 inside.
    N and the row strides are multiples of VEC. NUM_STAGES: tiles of rows in flight, the next ones in shared memory.
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
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), programs, num_stages=NUM_STAGES):
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
            g_sum, gx_sum = two_sums(g, g * x_hat, 1)
            g_mean, gx_mean = g_sum / N, gx_sum / N
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

"""RMS norm, forward and backward, and the functions that choose their configurations.

Forward: rows up to MAX_ONE_PASS columns are held in registers, so that x is read once; longer rows take two passes.
Backward: dx, and dw as fp32 partial sums over a persistent grid. A program owns every P-th tile of rows and one partial row;
column_sum_kernel (reduce.py) adds the P partial rows in a fixed order. No atomics: the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, cdiv, next_power_of_2, rows_of_whole_vectors, rows_that_fill
from ..rows import aligned, edge_columns, split_row, sum_of_squares, tile_rows
from .norm_bwd_wide import wide_config

MAX_ONE_PASS = 32768  # columns whose fp32 values fit the registers of 32 warps without a spill
MAX_ONE_PASS_BWD = 8192  # columns for which x, dy, w and the sum for dw fit the registers of 32 warps


def rms_norm_fwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, whole: bool = True, wide_weight: bool = False
) -> RowConfig:
    """The configuration of rms_norm_fwd_kernel (or its chunked form) for M rows of N elements of itemsize bytes.

    whole: whether every row is a whole number of aligned vectors. Other rows hold more registers: they get smaller tiles,
    and are chunked from fewer columns on. wide_weight: whether a weight's elements are larger than x's.
    """
    block_n = next_power_of_2(N)
    fewer = not whole or wide_weight or (capability[0] == 12 and itemsize == 4)  # MAX_ONE_PASS columns would spill
    if block_n > (MAX_ONE_PASS // 2 if fewer else MAX_ONE_PASS):
        return RowConfig(1, 8192, num_warps=16, variant="chunked")
    if block_n <= 512:  # several rows a program, each row inside one warp
        num_warps = 4 if block_n <= 256 else 1
        least = rows_of_whole_vectors(block_n, num_warps, itemsize)
        block_m = rows_that_fill(M, max(num_warps, (1024 if whole else 512) * num_warps // block_n), sms, least)
        return RowConfig(block_m, block_n, num_warps)
    per_thread = 8 if not whole else 16 if block_n <= 8192 else 32
    return RowConfig(1, block_n, num_warps=min(32, block_n // (32 * per_thread)))


def rms_norm_bwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, whole: bool = True, strided: bool = False
) -> RowConfig:
    """The configuration of rms_norm_bwd_kernel, or of the kernels of norm_bwd_wide.py, for M rows of N elements of itemsize bytes.

    whole: whether every row is a whole number of aligned vectors. Only such rows are prefetched, enough of them that an SM
    has 32 KB of x and dy on their way. Other rows hold more registers, and are chunked from fewer columns on.
    strided: whether the elements of a row lie apart, as those of a transposed matrix.
    """
    block_n = next_power_of_2(N)
    if block_n > (MAX_ONE_PASS_BWD if whole else MAX_ONE_PASS_BWD // 2):
        return wide_config(itemsize, whole)
    if block_n <= 256:
        tile = 4096 // itemsize if whole else 1024
        block_m = rows_that_fill(M, max(4, tile // block_n), sms, rows_of_whole_vectors(block_n, 4, itemsize))
        num_warps = 8 if block_n == 256 and strided else 4  # with 4 they would spill
        return RowConfig(block_m, block_n, num_warps, num_stages=2 if whole else 1)
    # On Ampere, prefetching rows of 4096 columns would cost one of the two programs an SM.
    alone = not whole or (capability[0] == 8 and block_n == 4096)
    num_stages = 1 if alone else 3 if block_n * itemsize <= 2048 else 2
    return RowConfig(1, block_n, num_warps=block_n // (32 * 8), num_stages=num_stages)


def rms_norm_bwd_programs(M: int, config: RowConfig, sms: int) -> int:
    """How many programs (and rows of partial sums) rms_norm_bwd_kernel has: bounded by the SMs, never by M.

    As many an SM as its registers hold, but at most 4, so that the partial sums stay few.
    """
    per_sm = max(1, min(4, MAX_ONE_PASS_BWD // (config.block_m * config.block_n)))
    return max(1, min(cdiv(M, config.block_m), sms * per_sm))


@triton.jit
def scaled(y, w_ptr, cols, in_row, HAS_WEIGHT: tl.constexpr):
    """y * w for an fp32 tile y (rows, cols), or y where the kernel has no w."""
    if HAS_WEIGHT:
        y *= tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def edge_squares(x_edge, edge_mask, VEC: tl.constexpr):
    """The sum of squares of each row of a tile of edges, (rows, 2 * VEC).

    Heads and ends are added apart: after a reshape, Triton before 3.8 does not load the edges again in the layout of the row.
    """
    squares = tl.where(edge_mask, x_edge * x_edge, 0.0)
    return tl.sum(tl.sum(tl.reshape(squares, (squares.shape[0], 2, VEC)), axis=2), axis=1)


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, M, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, STATS: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x * rstd * w,   rstd = 1 / sqrt(mean(x^2) + eps)        [Zhang and Sennrich 2019]

    x (M, N) any float, any strides | w (N,) any float, stride 1 | y (M, N) any float, last stride 1
    rstd (M,) fp32, written with STATS
    Grid (tiles,). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside, rounded once, at the store.
    A NaN, and a row of zeros with eps = 0, make a row NaN. Squares that overflow fp32 make it 0, but NaN where x is inf.
    VEC, EDGES and SAME, and the rows of a tile with EDGES, as in layer_norm_fwd_kernel.
    """
    tile = tl.program_id(0).to(tl.int64)
    rows = tile_rows(tile, VEC if EDGES else 1, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_m = (rows < M)[:, None]
    x_row, y_row, count = rows * stride_xm, rows * stride_ym, N
    if EDGES:
        head, count = split_row(tile % VEC * stride_xm, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, count, N, VEC)
        edge_mask = in_m & in_edge[None, :]
        x_edge = tl.load(x_ptr + x_row[:, None] + edge[None, :], mask=edge_mask, other=0.0).to(tl.float32)
        y_edge_ptrs = y_ptr + y_row[:, None] + edge[None, :]
        x_row, y_row = x_row + head, y_row + head
    x_row = aligned(x_row, VEC)
    if SAME:
        y_row = aligned(y_row, VEC)
    in_row = cols < aligned(count, VEC)
    mask = in_m & in_row[None, :]
    x = tl.load(x_ptr + x_row[:, None] + cols.to(tl.int64)[None, :] * stride_xn, mask=mask, other=0.0).to(tl.float32)
    squares = sum_of_squares(x, mask, 1)
    if EDGES:
        squares += edge_squares(x_edge, edge_mask, VEC)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    if EDGES:
        y_edge = scaled(x_edge * rstd[:, None], w_ptr, edge, in_edge, HAS_WEIGHT)
        tl.store(y_edge_ptrs, y_edge.to(y_ptr.dtype.element_ty), mask=edge_mask)
        w_ptr += head
    y = scaled(x * rstd[:, None], w_ptr, cols, in_row, HAS_WEIGHT)
    tl.store(y_ptr + y_row[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def rms_norm_fwd_chunked_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, STATS: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rms_norm_fwd_kernel for rows of any length: the sum of squares over chunks, then a second pass that writes.

    x (M, N) any float, any strides | w (N,) any float, stride 1 | y (M, N) any float, last stride 1
    rstd (M,) fp32, written with STATS
    Grid (M,). One row a program in chunks of BLOCK_N, its edges apart. fp32 inside: BLOCK_N running sums, added up at the end.
    Second read of x from L2. VEC, EDGES and SAME as in layer_norm_fwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row, count = row * stride_xm, row * stride_ym, N
    if EDGES:
        head, wide_count = split_row(x_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, wide_count, N, VEC)
        x_edge = tl.load(x_ptr + x_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        y_edge_ptrs = y_ptr + y_row + edge
        x_row, y_row, count = x_row + head, y_row + head, wide_count.to(tl.int32)
    x_row, count = aligned(x_row, VEC), aligned(count, VEC)
    if SAME:
        y_row = aligned(y_row, VEC)
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
        x = tl.load(x_ptrs, mask=cols < count, other=0.0, eviction_policy="evict_last").to(tl.float32)
        acc += x * x
    squares = tl.sum(acc, axis=0)
    if EDGES:
        squares += sum_of_squares(x_edge, in_edge, 0)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    if EDGES:
        y_edge = scaled((x_edge * rstd)[None, :], w_ptr, edge, in_edge, HAS_WEIGHT)
        tl.store(y_edge_ptrs[None, :], y_edge.to(y_ptr.dtype.element_ty), mask=in_edge[None, :])
        w_ptr += head
    for start in tl.range(0, count, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        in_row = cols < count
        x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
        x = tl.load(x_ptrs, mask=in_row, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = scaled((x * rstd)[None, :], w_ptr, cols, in_row, HAS_WEIGHT)
        tl.store((y_ptr + y_row + cols)[None, :], y.to(y_ptr.dtype.element_ty), mask=in_row[None, :])
    if STATS:
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_part_ptr, M, N, stride_dym, stride_dyn, stride_xm, stride_xn, stride_dxm,
    HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - h * mean(g * h)),  g = dy * w,  h = x * rstd;   dw = sum(dy * h)

    dy, x (M, N) any float, any strides | w (N,) any float, stride 1 | rstd (M,) fp32 | dx (M, N), last stride 1
    dw_part (P, N) fp32, P the number of programs
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
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), programs, num_stages=NUM_STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & in_row[None, :]
        dy_ptrs = dy_ptr + aligned(rows * stride_dym, VEC)[:, None] + wide[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + aligned(rows * stride_xm, VEC)[:, None] + wide[None, :] * stride_xn
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        h = tl.where(mask, x * rstd[:, None], 0.0)
        if NEED_DX:
            g = dy
            if HAS_WEIGHT:
                g = dy * w[None, :]
            gh_mean = tl.sum(g * h, axis=1) / N
            dx = rstd[:, None] * (g - h * gh_mean[:, None])
            dx_ptrs = dx_ptr + aligned(rows * stride_dxm, VEC)[:, None] + cols[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += dy * h
    if NEED_DW:
        tl.store(dw_part_ptr + aligned(program * N, VEC) + cols, tl.sum(dw, axis=0), mask=in_row)

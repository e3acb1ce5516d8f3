"""Layer norm forward and the functions that choose its configuration. The backward is in layer_norm_bwd.py.

Rows up to MAX_ONE_PASS columns are held in registers: one read of x, one write of y, and a variance of centred values.
Longer rows take two passes: chunk means and squared deviations merged pairwise [Chan et al. 1979], then the write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, next_power_of_2, rows_of_whole_vectors, rows_that_fill
from ..rows import aligned, edge_columns, split_row, sum_of_squares, tile_rows

MAX_ONE_PASS = 32768  # columns whose fp32 values fit the registers of 32 warps without a spill


def layer_norm_fwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, whole: bool = True
) -> RowConfig:
    """The configuration of layer_norm_fwd_kernel (or its chunked form) for M rows of N elements of itemsize bytes.

    whole: whether every row is a whole number of aligned vectors. Other rows hold more registers: they get smaller tiles,
    and are chunked from fewer columns on.
    """
    block_n = next_power_of_2(N)
    one_pass = MAX_ONE_PASS // 2 if capability[0] == 12 and itemsize == 4 else MAX_ONE_PASS  # spills on sm_120
    if block_n > (one_pass if whole else MAX_ONE_PASS // 4):
        return RowConfig(1, 8192, num_warps=16, variant="chunked")
    if block_n <= 512:  # several rows a program, each row inside one warp
        num_warps = 4 if block_n <= 256 else 1
        least = rows_of_whole_vectors(block_n, num_warps, itemsize)
        block_m = rows_that_fill(M, max(num_warps, (1024 if whole else 512) * num_warps // block_n), sms, least)
        return RowConfig(block_m, block_n, num_warps)
    per_thread = 8 if not whole else 16 if block_n <= 8192 else 32
    return RowConfig(1, block_n, num_warps=min(32, block_n // (32 * per_thread)))


@triton.jit
def scale_and_shift(y, w_ptr, b_ptr, cols, in_row, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y * w + b for an fp32 tile y (rows, cols); w and b are left out where the kernel has none."""
    if HAS_WEIGHT:
        y *= tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * w + b,   rstd = 1 / sqrt(var + eps)        [Ba et al. 2016]

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | y (M, N) any float, last stride 1
    mean, rstd (M,) fp32, written with STATS
    Grid (tiles,). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside.
    VEC: elements in one vector access. Without EDGES, N and the row strides are multiples of VEC. With EDGES they need not be:
    a row is an aligned part, moved in vectors, and the few elements before and after it. EDGES needs a last stride of 1 in x.
    SAME: row i of x and row i of y start equally far from a multiple of VEC, so that their aligned parts are the same columns.
    With EDGES a tile takes every VEC-th row. Those rows all have the same number of elements before their aligned part, so w
    and b, shifted by that number, are loaded once for the whole tile.
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
    total = tl.sum(x, axis=1)
    if EDGES:
        total += tl.sum(x_edge, axis=1)
    mean = total / N
    centred = tl.where(mask, x - mean[:, None], 0.0)
    sq_dev = sum_of_squares(centred, mask, 1)
    if EDGES:
        centred_edge = tl.where(edge_mask, x_edge - mean[:, None], 0.0)
        sq_dev += sum_of_squares(centred_edge, edge_mask, 1)
    rstd = 1.0 / tl.sqrt(sq_dev / N + eps)
    if EDGES:
        y_edge = scale_and_shift(centred_edge * rstd[:, None], w_ptr, b_ptr, edge, in_edge, HAS_WEIGHT, HAS_BIAS)
        tl.store(y_edge_ptrs, y_edge.to(y_ptr.dtype.element_ty), mask=edge_mask)
        w_ptr, b_ptr = w_ptr + head, b_ptr + head
    y = scale_and_shift(centred * rstd[:, None], w_ptr, b_ptr, cols, in_row, HAS_WEIGHT, HAS_BIAS)
    tl.store(y_ptr + y_row[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def layer_norm_fwd_chunked_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """layer_norm_fwd_kernel for rows of any length: statistics merged over chunks, then a second pass that writes.

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | y (M, N) any float, last stride 1
    mean, rstd (M,) fp32, written with STATS
    Grid (M,). One row a program in chunks of BLOCK_N, its edges the first of them. fp32 inside. Second read of x from L2.
    VEC, EDGES and SAME as layer_norm_fwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row, count = row * stride_xm, row * stride_ym, N
    mean = 0.0
    sq_dev = 0.0  # sum of (x - mean)^2 over the columns seen so far
    seen = 0  # how many those are
    if EDGES:
        head, wide_count = split_row(x_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, wide_count, N, VEC)
        x_edge = tl.load(x_ptr + x_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        y_edge_ptrs = y_ptr + y_row + edge
        x_row, y_row, count = x_row + head, y_row + head, wide_count.to(tl.int32)
        seen = N - count
        mean = tl.sum(x_edge, axis=0) / tl.maximum(seen, 1)
        centred_edge = tl.where(in_edge, x_edge - mean, 0.0)
        sq_dev = sum_of_squares(centred_edge, in_edge, 0)
    x_row, count = aligned(x_row, VEC), aligned(count, VEC)
    if SAME:
        y_row = aligned(y_row, VEC)
    for start in tl.range(0, count, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
        x = tl.load(x_ptrs, mask=cols < count, other=0.0, eviction_policy="evict_last").to(tl.float32)
        new = tl.minimum(count - start, BLOCK_N).to(tl.float32)
        chunk_mean = tl.sum(x, axis=0) / new
        centred = tl.where(cols < count, x - chunk_mean, 0.0)
        delta = chunk_mean - mean
        share = new / (seen + start + new)
        mean += delta * share
        sq_dev += tl.sum(centred * centred, axis=0) + delta * delta * (seen + start) * share
    rstd = 1.0 / tl.sqrt(sq_dev / N + eps)
    if EDGES:
        y_edge = ((x_edge - mean) * rstd)[None, :]
        y_edge = scale_and_shift(y_edge, w_ptr, b_ptr, edge, in_edge, HAS_WEIGHT, HAS_BIAS)
        tl.store(y_edge_ptrs[None, :], y_edge.to(y_ptr.dtype.element_ty), mask=in_edge[None, :])
        w_ptr, b_ptr = w_ptr + head, b_ptr + head
    for start in tl.range(0, count, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        in_row = cols < count
        x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
        x = tl.load(x_ptrs, mask=in_row, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = scale_and_shift(((x - mean) * rstd)[None, :], w_ptr, b_ptr, cols, in_row, HAS_WEIGHT, HAS_BIAS)
        tl.store((y_ptr + y_row + cols)[None, :], y.to(y_ptr.dtype.element_ty), mask=in_row[None, :])
    if STATS:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)

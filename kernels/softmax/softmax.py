"""Softmax over the last dimension, forward and backward, and the functions that choose a configuration.

Rows that fit are held in registers: one read, one write. Longer rows take two passes over the row: an online
maximum and sum [Milakov and Gimelshein 2018], then the normalised values, whose second read comes from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import CLUSTER_CTAS, RowConfig, next_power_of_2, rows_of_whole_vectors, rows_that_fill
from ..rows import aligned, edge_columns, exp_over, exp_sub, split_row

MAX_ONE_PASS_FWD = 32768  # columns whose fp32 values fit the registers of 32 warps without a spill
MAX_ONE_PASS_BWD = 16384  # the backward holds two rows
MAX_PACKED_FWD = 65536  # half of it where a row of pairs spills: compute capabilities 8 and 12
MAX_PACKED_BWD = 32768
SHORT_FWD, SHORT_BWD = 512, 256  # columns up to which 16-bit rows that start anywhere take one warp (element_wise)


def element_wise(config: RowConfig) -> bool:
    """Whether short rows that start anywhere are read with VEC = 1: by one warp, which holds each row whole.

    An edge tile and its part in every reduction are more instructions than the wider accesses save: 312 a row of 197 elements
    where 137 do. A warp's 64 bytes may lie in three sectors, so that L1 is asked up to 1.5 times for what memory moves once.
    """
    return config.variant == "one_pass" and config.num_warps == 1


def _short_config(M: int, N: int, itemsize: int, sms: int, tile: int) -> RowConfig:
    block_n = next_power_of_2(N)
    least = rows_of_whole_vectors(block_n, 1, itemsize)
    return RowConfig(rows_that_fill(M, tile // block_n, sms, least), block_n, num_warps=1)


def _row_config(
    M: int, N: int, itemsize: int, sms: int, one_pass: int, packed: int, per_thread: int, clusters: bool
) -> RowConfig:
    block_n = next_power_of_2(N)
    if block_n > max(one_pass, packed):
        part = block_n // CLUSTER_CTAS
        if clusters and part <= (packed or one_pass):
            # A part of 64k spills in 32 warps on one Triton version or another.
            num_warps = 16 if part > 32768 else min(32, part // (32 * (32 if packed else per_thread)))
            return RowConfig(1, block_n, num_warps, "packed" if packed else "one_pass", num_ctas=CLUSTER_CTAS)
        return RowConfig(1, 8192, num_warps=16, variant="chunked")
    if block_n > one_pass // 2 and packed:
        return RowConfig(1, block_n, num_warps=min(32, block_n // (32 * per_thread)), variant="packed")
    if block_n <= 512:  # several rows a program, each row inside one warp
        num_warps = 4 if block_n <= 256 else 1
        least = rows_of_whole_vectors(block_n, num_warps, itemsize)
        block_m = rows_that_fill(M, max(num_warps, per_thread * 32 * num_warps // block_n), sms, least)
        return RowConfig(block_m, block_n, num_warps)
    per_thread = min(per_thread, 16) if block_n <= 8192 else per_thread
    return RowConfig(1, block_n, min(32, max(1, block_n // (32 * per_thread))))


def softmax_fwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, packable: bool = True, clusters: bool = False,
    edges: bool = False,
) -> RowConfig:  # fmt: skip
    """The configuration of the forward for M rows of N elements of itemsize bytes.

    packable: whether the packed kernel can run. clusters: whether rows too long for one program may run as clusters.
    edges: whether rows start anywhere.
    """
    if edges and N <= SHORT_FWD:
        return _short_config(M, N, itemsize, sms, 2048)
    packed = (MAX_PACKED_FWD if capability[0] in (9, 10) else MAX_PACKED_FWD // 2) if packable and itemsize == 2 else 0
    return _row_config(M, N, itemsize, sms, MAX_ONE_PASS_FWD, packed, 32, clusters)


def softmax_bwd_config(
    M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int, packable: bool = True, clusters: bool = False,
    edges: bool = False,
) -> RowConfig:  # fmt: skip
    """The configuration of the backward; two rows are live, so half the forward's tile."""
    if edges and N <= SHORT_BWD:
        return _short_config(M, N, itemsize, sms, 1024)
    packed = MAX_PACKED_BWD if packable and itemsize == 2 else 0
    return _row_config(M, N, itemsize, sms, MAX_ONE_PASS_BWD, packed, 16, clusters)


@triton.jit
def softmax_fwd_kernel(
    x_ptr, y_ptr, M, N, stride_xm, stride_xn, stride_ym,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over each row.

    x (M, N) any float, any strides | y (M, N) any float, last stride 1
    Grid (cdiv(M, BLOCK_M),). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside.
    VEC: elements in one vector access. Without EDGES, N and the row strides are multiples of VEC. With EDGES they need not be:
    a row is an aligned part, moved in vectors, and the few elements before and after it. EDGES needs a last stride of 1 in x.
    SAME: row i of x and row i of y start equally far from a multiple of VEC, so that their aligned parts are the same columns.
    A row of -inf, or one with NaN or +inf, gives NaN.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_m = (rows < M)[:, None]
    x_row, y_row, count = rows * stride_xm, rows * stride_ym, N
    if EDGES:
        head, count = split_row(x_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC)[None, :], head[:, None], count[:, None], N, VEC)
        in_edge = in_edge & in_m
        x_edge = tl.load(x_ptr + x_row[:, None] + edge, mask=in_edge, other=float("-inf")).to(tl.float32)
        y_edge_ptrs = y_ptr + y_row[:, None] + edge
        x_row, y_row = aligned(x_row + head, VEC), y_row + head
        if SAME:
            y_row = aligned(y_row, VEC)
        mask = in_m & (cols[None, :] < aligned(count, VEC)[:, None])
    else:
        if VEC > 1:
            x_row, y_row, count = aligned(x_row, VEC), aligned(y_row, VEC), aligned(N, VEC)
        mask = in_m & (cols < count)[None, :]
    x_ptrs = x_ptr + x_row[:, None] + cols.to(tl.int64)[None, :] * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    row_max = tl.max(x, axis=1)
    if EDGES:
        row_max = tl.maximum(row_max, tl.max(x_edge, axis=1))
    e = exp_sub(x, row_max[:, None])
    row_sum = tl.sum(e, axis=1)
    if EDGES:
        e_edge = exp_sub(x_edge, row_max[:, None])
        row_sum += tl.sum(e_edge, axis=1)
    scale = (1.0 / row_sum)[:, None]
    tl.store(y_ptr + y_row[:, None] + cols[None, :], (e * scale).to(y_ptr.dtype.element_ty), mask=mask)
    if EDGES:
        tl.store(y_edge_ptrs, (e_edge * scale).to(y_ptr.dtype.element_ty), mask=in_edge)


@triton.jit
def softmax_fwd_chunked_kernel(
    x_ptr, y_ptr, M, N, stride_xm, stride_xn, stride_ym,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """softmax_fwd_kernel for rows of any length: an online maximum and sum over chunks, then a second pass that writes.

    x (M, N) any float, any strides | y (M, N) any float, last stride 1
    Grid (P,). Program p takes rows p, p + P, ..., each in chunks of BLOCK_N, of which NUM_STAGES are on the way. P rows fit L2,
    but for config.chunked_programs. fp32 inside. VEC, EDGES, SAME and edge cases as softmax_fwd_kernel.
    """
    program = tl.program_id(0).to(tl.int64)
    for row in tl.range(program, M, tl.num_programs(0)):
        x_row, y_row, count = row * stride_xm, row * stride_ym, N
        row_max = tl.full([], float("-inf"), tl.float32)
        row_sum = 0.0
        if EDGES:
            head, wide_count = split_row(x_row, N, VEC)
            edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, wide_count, N, VEC)
            x_edge = tl.load(x_ptr + x_row + edge, mask=in_edge, other=float("-inf")).to(tl.float32)
            y_edge_ptrs = y_ptr + y_row + edge
            row_max = tl.max(x_edge, axis=0)
            row_sum = tl.sum(exp_sub(x_edge, tl.where(row_max == float("-inf"), 0.0, row_max)), axis=0)
            x_row, y_row, count = aligned(x_row + head, VEC), y_row + head, aligned(wide_count.to(tl.int32), VEC)
            if SAME:
                y_row = aligned(y_row, VEC)
        elif VEC > 1:
            x_row, y_row, count = aligned(x_row, VEC), aligned(y_row, VEC), aligned(N, VEC)
        for start in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
            cols = start + tl.arange(0, BLOCK_N)
            x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
            x = tl.load(x_ptrs, mask=cols < count, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
            new_max = tl.maximum(row_max, tl.max(x, axis=0))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # so far nothing but -inf: its sum is 0, not NaN
            row_sum = row_sum * exp_sub(row_max, shift) + tl.sum(exp_sub(x, shift), axis=0)
            row_max = new_max
        log2_sum = tl.log2(row_sum)
        for start in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
            cols = start + tl.arange(0, BLOCK_N)
            x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
            x = tl.load(x_ptrs, mask=cols < count, other=0.0, eviction_policy="evict_first").to(tl.float32)
            y = exp_over(x, row_max, log2_sum)
            tl.store(y_ptr + y_row + cols, y.to(y_ptr.dtype.element_ty), mask=cols < count)
        if EDGES:
            tl.store(y_edge_ptrs, exp_over(x_edge, row_max, log2_sum).to(y_ptr.dtype.element_ty), mask=in_edge)


@triton.jit
def softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N,
    stride_dym, stride_dyn, stride_ym, stride_yn, stride_dxm,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = (dy - sum(dy * y)) * y over each row.

    dy, y (M, N) any float, any strides | dx (M, N) any float, last stride 1
    Grid (cdiv(M, BLOCK_M),). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside.
    VEC and EDGES as in softmax_fwd_kernel, of dy and y. EDGES needs SAME: row i of dy, y and dx starts equally far from a
    multiple of VEC.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    wide = cols.to(tl.int64)[None, :]
    in_m = (rows < M)[:, None]
    dy_row, y_row, dx_row, count = rows * stride_dym, rows * stride_ym, rows * stride_dxm, N
    if EDGES:
        tl.static_assert(SAME)
        head, count = split_row(y_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC)[None, :], head[:, None], count[:, None], N, VEC)
        in_edge = in_edge & in_m
        y_edge = tl.load(y_ptr + y_row[:, None] + edge, mask=in_edge, other=0.0).to(tl.float32)
        dy_edge = tl.load(dy_ptr + dy_row[:, None] + edge, mask=in_edge, other=0.0).to(tl.float32)
        dx_edge_ptrs = dx_ptr + dx_row[:, None] + edge
        dy_row, y_row, dx_row = dy_row + head, y_row + head, dx_row + head
        mask = in_m & (cols[None, :] < aligned(count, VEC)[:, None])
    else:
        if VEC > 1:
            count = aligned(N, VEC)
        mask = in_m & (cols < count)[None, :]
    if VEC > 1:
        dy_row, y_row, dx_row = aligned(dy_row, VEC), aligned(y_row, VEC), aligned(dx_row, VEC)
    y = tl.load(y_ptr + y_row[:, None] + wide * stride_yn, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + dy_row[:, None] + wide * stride_dyn, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(dy * y, axis=1)
    if EDGES:
        dot += tl.sum(dy_edge * y_edge, axis=1)
    dx = (dy - dot[:, None]) * y
    tl.store(dx_ptr + dx_row[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if EDGES:
        dx_edge = (dy_edge - dot[:, None]) * y_edge
        tl.store(dx_edge_ptrs, dx_edge.to(dx_ptr.dtype.element_ty), mask=in_edge)


@triton.jit
def softmax_bwd_chunked_kernel(
    dy_ptr, y_ptr, dx_ptr, N,
    stride_dym, stride_dyn, stride_ym, stride_yn, stride_dxm,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """softmax_bwd_kernel for rows of any length: sum(dy * y) over chunks, then a second pass that writes dx.

    dy, y (M, N) any float, any strides | dx (M, N) any float, last stride 1
    Grid (M,). One row a program in chunks of BLOCK_N. fp32 inside. VEC, EDGES and SAME as softmax_bwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    dy_row, y_row, dx_row, count = row * stride_dym, row * stride_ym, row * stride_dxm, N
    total = 0.0
    if EDGES:
        tl.static_assert(SAME)
        head, wide_count = split_row(y_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, wide_count, N, VEC)
        y_edge = tl.load(y_ptr + y_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        dy_edge = tl.load(dy_ptr + dy_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        dx_edge_ptrs = dx_ptr + dx_row + edge
        total = tl.sum(dy_edge * y_edge, axis=0)
        dy_row, y_row, dx_row, count = dy_row + head, y_row + head, dx_row + head, wide_count.to(tl.int32)
    if VEC > 1:
        dy_row, y_row, dx_row = aligned(dy_row, VEC), aligned(y_row, VEC), aligned(dx_row, VEC)
        count = aligned(count, VEC)
    dot = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        wide = cols.to(tl.int64)
        y = tl.load(y_ptr + y_row + wide * stride_yn, mask=cols < count, other=0.0, eviction_policy="evict_last")
        dy = tl.load(dy_ptr + dy_row + wide * stride_dyn, mask=cols < count, other=0.0, eviction_policy="evict_last")
        dot += dy.to(tl.float32) * y.to(tl.float32)
    total += tl.sum(dot, axis=0)
    for start in tl.range(0, count, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        wide = cols.to(tl.int64)
        y = tl.load(y_ptr + y_row + wide * stride_yn, mask=cols < count, other=0.0, eviction_policy="evict_first")
        dy = tl.load(dy_ptr + dy_row + wide * stride_dyn, mask=cols < count, other=0.0, eviction_policy="evict_first")
        dx = (dy.to(tl.float32) - total) * y.to(tl.float32)
        tl.store(dx_ptr + dx_row + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < count)
    if EDGES:
        tl.store(dx_edge_ptrs, ((dy_edge - total) * y_edge).to(dx_ptr.dtype.element_ty), mask=in_edge)

"""Layer norm forward and the functions that choose its configuration. The backward is in layer_norm_bwd.py.

Rows up to MAX_ONE_PASS columns are held in registers: one read of x, one write of y, and a variance of centred values.
Longer rows take two passes: chunk means and squared deviations merged pairwise [Chan et al. 1979], then the write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import RowConfig, next_power_of_2, rows_that_fill
from .rows import aligned

MAX_ONE_PASS = 32768  # columns whose fp32 values fit the registers of 32 warps without a spill


def layer_norm_fwd_config(M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int) -> RowConfig:
    """The configuration of layer_norm_fwd_kernel (or its chunked form) for M rows of N elements of itemsize bytes."""
    block_n = next_power_of_2(N)
    one_pass = MAX_ONE_PASS // 2 if capability[0] == 12 and itemsize == 4 else MAX_ONE_PASS  # spills on sm_120
    if block_n > one_pass:
        return RowConfig(1, 8192, num_warps=16, variant="chunked")
    if block_n <= 512:  # several rows a program, each row inside one warp
        num_warps = 4 if block_n <= 256 else 1
        block_m = rows_that_fill(M, max(num_warps, 1024 * num_warps // block_n), sms, least=num_warps)
        return RowConfig(block_m, block_n, num_warps)
    per_thread = 16 if block_n <= 8192 else 32
    return RowConfig(1, block_n, num_warps=min(32, block_n // (32 * per_thread)))


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * w + b,   rstd = 1 / sqrt(var + eps)        [Ba et al. 2016]

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | y (M, N) any float, last stride 1
    mean, rstd (M,) fp32, written with STATS
    Grid (cdiv(M, BLOCK_M),). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside.
    N and the row strides are multiples of VEC.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < aligned(N, VEC)
    mask = (rows < M)[:, None] & in_row[None, :]
    x_ptrs = x_ptr + aligned(rows * stride_xm, VEC)[:, None] + cols.to(tl.int64)[None, :] * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / N
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + aligned(rows * stride_ym, VEC)[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def layer_norm_fwd_chunked_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """layer_norm_fwd_kernel for rows of any length: statistics merged over chunks, then a second pass that writes.

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | y (M, N) any float, last stride 1
    mean, rstd (M,) fp32, written with STATS
    Grid (M,). One row a program in chunks of BLOCK_N. fp32 inside. Second read of x from L2. VEC as layer_norm_fwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + aligned(row * stride_xm, VEC)
    y_row = y_ptr + aligned(row * stride_ym, VEC)
    end = aligned(N, VEC)
    mean = 0.0
    sq_dev = 0.0  # sum of (x - mean)^2 over the columns seen so far
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_row + cols.to(tl.int64) * stride_xn, mask=cols < end, other=0.0, eviction_policy="evict_last")
        x = x.to(tl.float32)
        count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        chunk_mean = tl.sum(x, axis=0) / count
        centred = tl.where(cols < N, x - chunk_mean, 0.0)
        delta = chunk_mean - mean
        share = count / (start + count)
        mean += delta * share
        sq_dev += tl.sum(centred * centred, axis=0) + delta * delta * start * share
    rstd = 1.0 / tl.sqrt(sq_dev / N + eps)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        in_row = cols < end
        x = tl.load(x_row + cols.to(tl.int64) * stride_xn, mask=in_row, other=0.0, eviction_policy="evict_first")
        y = (x.to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        tl.store(y_row + cols, y.to(y_ptr.dtype.element_ty), mask=in_row)
    if STATS:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)

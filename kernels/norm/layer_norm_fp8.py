"""Layer norm whose output is e4m3 with a scale for each row: what an fp8 product reads, without the 16-bit copy between.

Rows up to MAX_ONE_PASS bytes are held in registers: one read of x, one write. Longer rows take three passes over x, the
second and third from L2: statistics, the greatest magnitude, the write. Output is stored as bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, next_power_of_2, rows_of_whole_vectors, rows_that_fill
from ..rows import aligned, sum_of_squares

MAX_ONE_PASS = 32768  # bytes of x: fp32 rows of 16384 columns spill on sm_100
LARGEST = tl.constexpr(448.0)  # of e4m3
LEAST_TOP = tl.constexpr(1e-12)  # a row of zeros keeps a scale that can be divided by
ROUNDER = tl.constexpr(8388608.0)  # 2^23: adding it to a small positive number rounds that to an integer, ties to even


def layer_norm_fp8_config(M: int, N: int, itemsize: int, sms: int) -> RowConfig:
    """The configuration of layer_norm_fp8_kernel (or its chunked form) for M rows of N elements of itemsize bytes."""
    block_n = next_power_of_2(N)
    if block_n * itemsize > MAX_ONE_PASS:
        return RowConfig(1, 8192, num_warps=16, variant="chunked")
    if block_n <= 512:  # several rows a program, each row inside one warp
        num_warps = 4 if block_n <= 256 else 1
        least = rows_of_whole_vectors(block_n, num_warps, itemsize=1)  # q is bytes
        block_m = rows_that_fill(M, max(num_warps, 1024 * num_warps // block_n), sms, least)
        return RowConfig(block_m, block_n, num_warps)
    return RowConfig(1, block_n, num_warps=min(32, block_n // 512))


@triton.jit
def _magnitude(y):
    """The bits of |y| as int32: ordered as |y| is, and NaN above all, so that a maximum of them keeps NaN."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(top):
    """The scale that maps a row's greatest magnitude, given by its bits, to 448, e4m3's largest number."""
    top = top.to(tl.float32, bitcast=True)
    return tl.where(top < LEAST_TOP, LEAST_TOP, top) / LARGEST


@triton.jit
def _e4m3_bits(v, CVT: tl.constexpr):
    """fp32 v, |v| at most 448 but for rounding, as the byte of the nearest e4m3 number, ties to even; NaN stays NaN.

    CVT: by the instruction, from capability 8.9 on; else in arithmetic.
    """
    if CVT:
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = v.to(tl.int32, bitcast=True)
        a = tl.minimum(tl.abs(v), LARGEST)
        exponent = tl.maximum((a.to(tl.int32, bitcast=True) >> 23) - 127, -6)  # below 2^-6 the spacing stays 2^-9
        per_step = ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(3 - exponent)
        steps = (a * per_step + ROUNDER) - ROUNDER
        code = (exponent + 6) * 8 + steps.to(tl.int32)
        code = tl.where(v != v, 127, code)
        return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def layer_norm_fp8_kernel(
    x_ptr, w_ptr, b_ptr, q_ptr, scale_ptr, M, N, stride_xm, stride_xn, stride_qm, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CVT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q = e4m3(y / scale),  scale = max |y| / 448,  y = (x - mean) * rstd * w + b        [Ba et al. 2016; Micikevicius et al. 2022]

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | q (M, N) bytes of e4m3, last stride 1 | scale (M,) fp32
    Grid (cdiv(M, BLOCK_M),). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside; y is rounded once, to e4m3.
    N and the row strides are multiples of VEC. A NaN makes its row's scale NaN, and the row.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < aligned(N, VEC)
    mask = (rows < M)[:, None] & in_row[None, :]
    x_ptrs = x_ptr + aligned(rows * stride_xm, VEC)[:, None] + cols.to(tl.int64)[None, :] * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / N
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(sum_of_squares(centred, mask, 1) / N + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    scale = _scale_of(tl.max(tl.where(mask, _magnitude(y), 0), axis=1))
    q = _e4m3_bits(y * (1.0 / scale)[:, None], CVT)
    tl.store(q_ptr + aligned(rows * stride_qm, VEC)[:, None] + cols[None, :], q, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@triton.jit
def _normalised(
    x_row, w_ptr, b_ptr, cols, in_row, stride_xn, mean, rstd, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """y at some columns of a row whose statistics are known."""
    x = tl.load(x_row + cols.to(tl.int64) * stride_xn, mask=in_row, other=0.0, eviction_policy="evict_last")
    y = (x.to(tl.float32) - mean) * rstd
    if HAS_WEIGHT:
        y *= tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    return y


@triton.jit
def layer_norm_fp8_chunked_kernel(
    x_ptr, w_ptr, b_ptr, q_ptr, scale_ptr, N, stride_xm, stride_xn, stride_qm, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CVT: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """layer_norm_fp8_kernel for rows of any length: statistics merged over chunks [Chan et al. 1979], then max |y|, then q.

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | q (M, N) bytes of e4m3, last stride 1 | scale (M,) fp32
    Grid (M,). One row a program in chunks of BLOCK_N. fp32 inside. VEC as layer_norm_fp8_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + aligned(row * stride_xm, VEC)
    q_row = q_ptr + aligned(row * stride_qm, VEC)
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
    top = tl.zeros([BLOCK_N], dtype=tl.int32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        y = _normalised(x_row, w_ptr, b_ptr, cols, cols < end, stride_xn, mean, rstd, HAS_WEIGHT, HAS_BIAS)
        top = tl.maximum(top, tl.where(cols < N, _magnitude(y), 0))
    scale = _scale_of(tl.max(top, axis=0))
    inverse = 1.0 / scale
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        y = _normalised(x_row, w_ptr, b_ptr, cols, cols < end, stride_xn, mean, rstd, HAS_WEIGHT, HAS_BIAS)
        tl.store(q_row + cols, _e4m3_bits(y * inverse, CVT), mask=cols < end)
    tl.store(scale_ptr + row, scale)

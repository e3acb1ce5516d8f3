"""Softmax over the last dimension, forward and backward, and the functions that choose a configuration.

Short and middle rows are held in registers (one read, one write). Longer rows take two passes over the row: an online
maximum and sum [Milakov and Gimelshein 2018], then the normalised values, whose second read comes from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import RowConfig, next_power_of_2, rows_that_fill

MAX_ONE_PASS_FWD = 32768  # columns whose fp32 values fit the registers of 32 warps without a spill
MAX_ONE_PASS_BWD = 16384  # the backward holds two rows


def _warps(block_n: int, per_thread: int) -> int:
    return min(32, max(1, block_n // (32 * per_thread)))


def _row_config(M: int, N: int, sms: int, max_one_pass: int, per_thread: int) -> RowConfig:
    block_n = next_power_of_2(N)
    if block_n > max_one_pass:
        return RowConfig(1, 8192, num_warps=16, chunked=True)
    if block_n <= 256:  # several rows a program, each row inside one warp
        block_m = rows_that_fill(M, max(4, per_thread * 128 // block_n), sms, least=4)
        return RowConfig(block_m, block_n, num_warps=4)
    return RowConfig(1, block_n, _warps(block_n, min(per_thread, 16) if block_n <= 8192 else per_thread))


def softmax_fwd_config(M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int) -> RowConfig:
    """The configuration of softmax_fwd_kernel (or its chunked form) for M rows of N elements of itemsize bytes."""
    return _row_config(M, N, sms, MAX_ONE_PASS_FWD, 32)


def softmax_bwd_config(M: int, N: int, itemsize: int, capability: tuple[int, int], sms: int) -> RowConfig:
    """The configuration of softmax_bwd_kernel (or its chunked form); two rows are live, so half the forward's tile."""
    return _row_config(M, N, sms, MAX_ONE_PASS_BWD, 16)


@triton.jit
def softmax_fwd_kernel(x_ptr, y_ptr, M, N, stride_xm, stride_xn, stride_ym, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over each row.

    x (M, N) any float or integer, any strides | y (M, N) any float, last stride 1
    Grid (cdiv(M, BLOCK_M),). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside.
    A row of -inf, or one with NaN or +inf, gives NaN.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols.to(tl.int64)[None, :] * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    y = e / tl.sum(e, axis=1)[:, None]
    tl.store(y_ptr + rows[:, None] * stride_ym + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_fwd_chunked_kernel(x_ptr, y_ptr, N, stride_xm, stride_xn, stride_ym, BLOCK_N: tl.constexpr):
    """softmax_fwd_kernel for rows of any length: an online maximum and sum over chunks, then a second pass that writes.

    x (M, N) any float or integer, any strides | y (M, N) any float, last stride 1
    Grid (M,). One row a program in chunks of BLOCK_N. fp32 inside. Edge cases as softmax_fwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    y_row = y_ptr + row * stride_ym
    row_max = float("-inf")
    row_sum = 0.0
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_row + cols.to(tl.int64) * stride_xn, mask=cols < N, other=float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # so far nothing but -inf: its sum is 0, not NaN
        row_sum = row_sum * tl.exp(row_max - shift) + tl.sum(tl.exp(x - shift), axis=0)
        row_max = new_max
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_row + cols.to(tl.int64) * stride_xn, mask=cols < N, other=0.0, eviction_policy="evict_first")
        y = tl.exp(x.to(tl.float32) - row_max) / row_sum
        tl.store(y_row + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N,
    stride_dym, stride_dyn, stride_ym, stride_yn, stride_dxm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = (dy - sum(dy * y)) * y over each row.

    dy, y (M, N) any float, any strides | dx (M, N) any float, last stride 1
    Grid (cdiv(M, BLOCK_M),). A tile of BLOCK_M whole rows a program, N <= BLOCK_N. fp32 inside.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    wide = cols.to(tl.int64)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    y = tl.load(y_ptr + rows[:, None] * stride_ym + wide[None, :] * stride_yn, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows[:, None] * stride_dym + wide[None, :] * stride_dyn, mask=mask, other=0.0).to(tl.float32)
    dx = (dy - tl.sum(dy * y, axis=1)[:, None]) * y
    tl.store(dx_ptr + rows[:, None] * stride_dxm + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_bwd_chunked_kernel(
    dy_ptr, y_ptr, dx_ptr, N,
    stride_dym, stride_dyn, stride_ym, stride_yn, stride_dxm,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """softmax_bwd_kernel for rows of any length: sum(dy * y) over chunks, then a second pass that writes dx.

    dy, y (M, N) any float, any strides | dx (M, N) any float, last stride 1
    Grid (M,). One row a program in chunks of BLOCK_N. fp32 inside.
    """
    row = tl.program_id(0).to(tl.int64)
    dot = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        wide = cols.to(tl.int64)
        y = tl.load(y_ptr + row * stride_ym + wide * stride_yn, mask=cols < N, other=0.0, eviction_policy="evict_last")
        dy = tl.load(dy_ptr + row * stride_dym + wide * stride_dyn, mask=cols < N, other=0.0, eviction_policy="evict_last")
        dot += dy.to(tl.float32) * y.to(tl.float32)
    total = tl.sum(dot, axis=0)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        wide = cols.to(tl.int64)
        y = tl.load(y_ptr + row * stride_ym + wide * stride_yn, mask=cols < N, other=0.0, eviction_policy="evict_first")
        dy = tl.load(dy_ptr + row * stride_dym + wide * stride_dyn, mask=cols < N, other=0.0, eviction_policy="evict_first")
        dx = (dy.to(tl.float32) - total) * y.to(tl.float32)
        tl.store(dx_ptr + row * stride_dxm + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < N)

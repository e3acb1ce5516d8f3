"""Softmax over a dimension that is not the last, forward and backward, without a transposing copy.

The tensor is seen as (outer, N, K): softmax runs over N and neighbouring threads hold neighbouring k, so loads and
stores stay coalesced along K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import RowConfig, next_power_of_2
from ..rows import exp_over, exp_sub


def softmax_inner_config(N: int, K: int, itemsize: int, capability: tuple[int, int], sms: int) -> RowConfig:
    """block_m columns of K and block_n elements of N a program; chunked when N takes several block_n."""
    block_k = min(64, next_power_of_2(K))
    block_n = min(next_power_of_2(N), 4096 // block_k)
    num_warps = 4 if block_k * block_n <= 2048 else 8
    return RowConfig(block_k, block_n, num_warps, variant="chunked" if block_n < N else "one_pass")


@triton.jit
def softmax_fwd_inner_kernel(
    x_ptr, y_ptr, N, K,
    stride_xo, stride_xn, stride_xk, stride_yo, stride_yn, stride_yk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over the middle dimension.

    x (outer, N, K) any float, any strides | y (outer, N, K) any float, any strides
    Grid (outer * cdiv(K, BLOCK_K),). BLOCK_K columns a program; one read when N <= BLOCK_N, else CHUNKED: two. fp32 inside.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    outer = (pid // blocks_k).to(tl.int64)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    x_ptrs = x_ptr + outer * stride_xo + k[None, :] * stride_xk
    y_ptrs = y_ptr + outer * stride_yo + k[None, :] * stride_yk
    in_k = (k < K)[None, :]
    if CHUNKED:
        col_max = tl.full([BLOCK_K], float("-inf"), dtype=tl.float32)
        col_sum = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in tl.range(0, N, BLOCK_N):
            rows = start + n
            mask = (rows < N)[:, None] & in_k
            x = tl.load(x_ptrs + rows[:, None] * stride_xn, mask=mask, other=float("-inf")).to(tl.float32)
            new_max = tl.maximum(col_max, tl.max(x, axis=0))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            col_sum = col_sum * exp_sub(col_max, shift) + tl.sum(exp_sub(x, shift[None, :]), axis=0)
            col_max = new_max
        log2_sum = tl.log2(col_sum)
        for start in tl.range(0, N, BLOCK_N):
            rows = start + n
            mask = (rows < N)[:, None] & in_k
            x = tl.load(x_ptrs + rows[:, None] * stride_xn, mask=mask, other=0.0).to(tl.float32)
            y = exp_over(x, col_max[None, :], log2_sum[None, :])
            tl.store(y_ptrs + rows[:, None] * stride_yn, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        mask = (n < N)[:, None] & in_k
        x = tl.load(x_ptrs + n[:, None] * stride_xn, mask=mask, other=float("-inf")).to(tl.float32)
        e = exp_sub(x, tl.max(x, axis=0)[None, :])
        y = e * (1.0 / tl.sum(e, axis=0))[None, :]
        tl.store(y_ptrs + n[:, None] * stride_yn, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_bwd_inner_kernel(
    dy_ptr, y_ptr, dx_ptr, N, K,
    stride_dyo, stride_dyn, stride_dyk, stride_yo, stride_yn, stride_yk, stride_dxo, stride_dxn, stride_dxk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = (dy - sum(dy * y)) * y over the middle dimension.

    dy, y, dx (outer, N, K) any float, any strides
    Grid (outer * cdiv(K, BLOCK_K),). Two loops over N in steps of BLOCK_N; the second read comes from L1 or L2. fp32 inside.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    outer = (pid // blocks_k).to(tl.int64)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    y_ptrs = y_ptr + outer * stride_yo + k[None, :] * stride_yk
    dy_ptrs = dy_ptr + outer * stride_dyo + k[None, :] * stride_dyk
    dx_ptrs = dx_ptr + outer * stride_dxo + k[None, :] * stride_dxk
    in_k = (k < K)[None, :]
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        rows = start + n
        mask = (rows < N)[:, None] & in_k
        y = tl.load(y_ptrs + rows[:, None] * stride_yn, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs + rows[:, None] * stride_dyn, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dy * y, axis=0)
    for start in tl.range(0, N, BLOCK_N):
        rows = start + n
        mask = (rows < N)[:, None] & in_k
        y = tl.load(y_ptrs + rows[:, None] * stride_yn, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs + rows[:, None] * stride_dyn, mask=mask, other=0.0).to(tl.float32)
        dx = (dy - total[None, :]) * y
        tl.store(dx_ptrs + rows[:, None] * stride_dxn, dx.to(dx_ptr.dtype.element_ty), mask=mask)

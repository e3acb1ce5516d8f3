"""Matmul with bias and activation in its epilogue, and the activation's backward.

One matmul kernel serves the forward and, with other strides, both gradients: dx = dpre @ W and dW = dpre^T @ x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activation_grad
from .config import MatmulConfig, cdiv, next_power_of_2


def linear_config(M: int, N: int, K: int, itemsize: int, capability: tuple[int, int], sms: int) -> MatmulConfig:
    """Tiles of linear_fwd_kernel for (M, K) @ (K, N) of itemsize bytes."""
    if itemsize == 4:
        return MatmulConfig(64, 64, 32, num_warps=4, num_stages=3)
    if M <= 64:
        return MatmulConfig(max(16, next_power_of_2(M)), 64, 64, num_warps=4, num_stages=4)
    if cdiv(M, 128) * cdiv(N, 128) < sms:
        return MatmulConfig(64, 64, 64, num_warps=4, num_stages=3)
    if capability[0] in (9, 10):
        return MatmulConfig(128, 128, 64, num_warps=8, num_stages=4)
    return MatmulConfig(128, 128, 32, num_warps=8, num_stages=3)


@triton.jit
def linear_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, pre_ptr, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_b, stride_ym,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = act(pre),  pre = x @ w^T + b

    x (M, K), w (N, K) of one dtype, any strides | b (N,) any float, any stride | y, pre (M, N) any float, last stride 1
    Grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),), one tile a program, GROUP_M tile rows share a band of w in L2.
    Accumulates in fp32; K = 0 gives act(b). pre is written only when SAVE_PRE. WIDEN multiplies in fp32 (interpreter).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP_M * tiles_n)
    band_rows = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    in_band = pid % (GROUP_M * tiles_n)
    rows = (band * GROUP_M + in_band % band_rows).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (in_band // band_rows).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m = (rows < M)[:, None]
    in_n = (cols < N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols[None, :] * stride_wn + ks[:, None] * stride_wk
    step = tl.full([], BLOCK_K, tl.int64)  # so that a large stride does not wrap
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        in_k = ks < K - start
        x = tl.load(x_ptrs, mask=in_m & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols * stride_b, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * stride_ym + cols[None, :]
    if SAVE_PRE:
        tl.store(pre_ptr + offsets, acc.to(pre_ptr.dtype.element_ty), mask=in_m & in_n)
    tl.store(y_ptr + offsets, activate(acc, ACT).to(y_ptr.dtype.element_ty), mask=in_m & in_n)


ACT_BWD_BLOCK_M = 16
ACT_BWD_BLOCK_N = 128


def linear_act_bwd_rows(M: int, N: int, sms: int) -> int:
    """Rows a program of linear_act_bwd_kernel takes: the partial rows stay few and the chip stays full."""
    programs = max(1, 8 * sms // cdiv(N, ACT_BWD_BLOCK_N))
    return ACT_BWD_BLOCK_M * max(1, cdiv(M, ACT_BWD_BLOCK_M * programs))


@triton.jit
def linear_act_bwd_kernel(
    dy_ptr, saved_ptr, dpre_ptr, db_part_ptr, M, N, rows_per_program,
    stride_dym, stride_dyn, stride_sm, stride_dpm,
    ACT: tl.constexpr, NEED_DPRE: tl.constexpr, NEED_DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dpre = dy * act'(saved);   db_part[p] = sum of dpre over the rows of block p

    dy (M, N) any strides | saved (M, N) last stride 1: the pre-activation, or y for relu; unused when ACT is none
    dpre (M, N) last stride 1 | db_part (P, N) fp32, from dpre before it is rounded
    Grid (P * cdiv(N, BLOCK_N),), P = cdiv(M, rows_per_program). fp32 inside.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = (pid // blocks_n).to(tl.int64)
    cols = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (cols < N)[None, :]
        dpre = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn, mask=mask, other=0.0)
        dpre = dpre.to(tl.float32)
        if ACT != "none":
            saved = tl.load(saved_ptr + rows[:, None] * stride_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dpre = activation_grad(saved, dpre, ACT)
        if NEED_DPRE:
            tl.store(dpre_ptr + rows[:, None] * stride_dpm + cols[None, :], dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if NEED_DB:
            db += dpre
    if NEED_DB:
        tl.store(db_part_ptr + part * N + cols, tl.sum(db, axis=0), mask=cols < N)

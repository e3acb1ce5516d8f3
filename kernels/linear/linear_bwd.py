"""The activation's backward with the bias gradient: on its own, or in the epilogue of the product that gives dy."""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import cdiv
from .activations import activation_grad
from .linear_tiles import pointer_product, tile_of

ACT_BWD_BLOCK_M = 16
ACT_BWD_BLOCK_N = 128
ACT_BWD_WARPS = 8
ACT_BWD_PROGRAMS = 5  # that an SM holds of linear_act_bwd_kernel on 16-bit tensors, each with a tile on its way
GATE_BWD_PROGRAMS = 4  # and of gate_bwd_kernel


def linear_act_bwd_rows(M: int, N: int, sms: int, programs: int = ACT_BWD_PROGRAMS) -> int:
    """Rows that a program takes, so that an SM has at most so many programs, all at once: a second wave would be a half empty one."""
    parts = max(1, programs * sms // cdiv(N, ACT_BWD_BLOCK_N))
    return ACT_BWD_BLOCK_M * max(1, cdiv(M, ACT_BWD_BLOCK_M * parts))


@triton.jit
def linear_act_bwd_kernel(
    dy_ptr, saved_ptr, dpre_ptr, db_part_ptr, M, N, rows_per_program,
    stride_dym, stride_dyn, stride_sm, stride_dpm,
    ACT: tl.constexpr, NEED_DPRE: tl.constexpr, NEED_DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dpre = dy * act'(saved);   db_part[p] = sum of dpre over the rows of block p

    dy (M, N) any strides | saved (M, N) last stride 1: the pre-activation, or y for relu; unused when ACT is none
    dpre (M, N) last stride 1 | db_part (P, N) fp32, from dpre before it is rounded
    Grid (P * cdiv(N, BLOCK_N),), P = cdiv(M, rows_per_program). fp32 inside. A 16-bit tile is copied while the one before it
    is computed.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = (pid // blocks_n).to(tl.int64)
    cols = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    STAGES: tl.constexpr = 2 if dy_ptr.dtype.element_ty.primitive_bitwidth == 16 else 1  # 32 bits have enough on their way
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (cols < N)[None, :]
        dpre = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn, mask=mask, other=0.0)
        dpre = dpre.to(tl.float32)
        if ACT != "none":
            saved = tl.load(saved_ptr + rows[:, None] * stride_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dpre = activation_grad(saved, dpre, ACT, saved_ptr.dtype.element_ty == tl.float32)
        if NEED_DPRE:
            tl.store(dpre_ptr + rows[:, None] * stride_dpm + cols[None, :], dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if NEED_DB:
            db += dpre
    if NEED_DB:
        tl.store(db_part_ptr + part * N + cols, tl.sum(db, axis=0), mask=cols < N)


@triton.jit
def linear_dact_kernel(
    x_ptr, w_ptr, saved_ptr, dpre_ptr, db_ptr, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    ACT: tl.constexpr, NEED_DB: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dpre = (x @ w^T) * act'(saved);   db[p] = sum of dpre over tile row p

    x (M, K), w (N, K) of one dtype, any strides | dpre (M, N) contiguous | saved (M, N) contiguous: the pre-activation,
    or the output of relu; not read when ACT is none | db (cdiv(M, BLOCK_M), N) fp32, from dpre before it is rounded
    db is written only where NEED_DB.
    Grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),), one tile a program. fp32 accumulation.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = pointer_product(x_ptr, w_ptr, acc, rows, cols, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
                          PRECISION, 0, WIDEN, BLOCK_K)  # fmt: skip
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if NEED_DB:
        acc = tl.where((rows < M)[:, None], acc, 0.0)  # a row beyond M, zero in x, is NaN where w is infinite
    saved = acc
    if ACT != "none":
        saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dpre = activation_grad(saved, acc, ACT, saved_ptr.dtype.element_ty == tl.float32)
    tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
    if NEED_DB:
        tl.store(db_ptr + tile_m.to(tl.int64) * N + cols, tl.sum(dpre, axis=0), mask=cols < N)

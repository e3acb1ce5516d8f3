"""Persistent matmuls over TMA descriptors, for Hopper and datacentre Blackwell.

Operands, 16 or 8 bits wide, with 16-byte aligned pointers and row strides and a last stride of 1; X_T, W_T: the operand
is stored transposed. As many programs as the GPU holds at once walk the tiles in L2-aware order. Descriptors are made in the
kernel: a launch passes pointers, as to any other kernel. Each takes a trip to memory and over a hundred instructions, one after
the other, before the first tile is copied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activation_grad
from .linear_tiles import descriptor, descriptor_product, halves, operand, tile_of


@triton.jit
def _store_fwd(
    acc, b_ptr, y_desc, pre_desc, xs_ptr, ws_ptr, row, col, M, N, stride_b, stride_xs, stride_ws,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, HAS_SCALE: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Scale, bias, activation and stores of the BLOCK_N columns from col on, in SUBTILES parts."""
    if SUBTILES > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_fwd(left, b_ptr, y_desc, pre_desc, xs_ptr, ws_ptr, row, col, M, N, stride_b, stride_xs, stride_ws,
                   ACT, HAS_BIAS, SAVE_PRE, HAS_SCALE, OUT, BLOCK_M, HALF, SUBTILES // 2)  # fmt: skip
        _store_fwd(right, b_ptr, y_desc, pre_desc, xs_ptr, ws_ptr, row, col + HALF, M, N, stride_b, stride_xs, stride_ws,
                   ACT, HAS_BIAS, SAVE_PRE, HAS_SCALE, OUT, BLOCK_M, HALF, SUBTILES // 2)  # fmt: skip
    else:
        cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)
        if HAS_SCALE:
            rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
            acc *= tl.load(xs_ptr + rows * stride_xs, mask=rows < M, other=0.0)[:, None]
            acc *= tl.load(ws_ptr + cols * stride_ws, mask=cols < N, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(b_ptr + cols * stride_b, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if SAVE_PRE:
            pre_desc.store([row, col], acc.to(OUT))
        y_desc.store([row, col], activate(acc, ACT).to(OUT))


@triton.jit
def linear_fwd_tma_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, pre_ptr, xs_ptr, ws_ptr, M, N, K,
    stride_x, stride_w, stride_b, stride_y, stride_xs, stride_ws,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, HAS_SCALE: tl.constexpr,
    X_T: tl.constexpr, W_T: tl.constexpr, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """y = act(pre),  pre = (x @ w^T) * xs[:, None] * ws[None, :] + b

    x (M, K), w (N, K): bf16, fp16 or fp8 | b (N,) any float | y, pre (M, N) of y's dtype, row stride stride_y
    xs, ws fp32, (M,) and (N,), or one number with stride 0; only where HAS_SCALE.
    Grid (min(programs, tiles),), persistent. fp32 accumulation. pre is written only where SAVE_PRE.
    """
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    x_desc = operand(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, X_T)
    w_desc = operand(w_ptr, N, K, stride_w, BLOCK_N, BLOCK_K, W_T)
    y_desc = descriptor(y_ptr, M, N, stride_y, BLOCK_M, WIDTH)
    pre_desc = y_desc
    if SAVE_PRE:
        pre_desc = descriptor(pre_ptr, M, N, stride_y, BLOCK_M, WIDTH)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc = descriptor_product(x_desc, w_desc, acc, row, col, K, X_T, W_T, PRECISION, IMPRECISE, WIDEN, BLOCK_K)
        _store_fwd(acc, b_ptr, y_desc, pre_desc, xs_ptr, ws_ptr, row, col, M, N, stride_b, stride_xs, stride_ws,
                   ACT, HAS_BIAS, SAVE_PRE, HAS_SCALE, OUT, BLOCK_M, BLOCK_N, SUBTILES)  # fmt: skip


@triton.jit
def _store_dact(
    acc, saved_desc, dpre_desc, db_ptr, tile_m, row, col, M, N,
    ACT: tl.constexpr, NEED_DB: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """dpre and the tile's column sums, for the BLOCK_N columns from col on."""
    if SUBTILES > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_dact(left, saved_desc, dpre_desc, db_ptr, tile_m, row, col, M, N,
                    ACT, NEED_DB, OUT, BLOCK_M, HALF, SUBTILES // 2)  # fmt: skip
        _store_dact(right, saved_desc, dpre_desc, db_ptr, tile_m, row, col + HALF, M, N,
                    ACT, NEED_DB, OUT, BLOCK_M, HALF, SUBTILES // 2)  # fmt: skip
    else:
        if NEED_DB:
            rows = row + tl.arange(0, BLOCK_M)
            acc = tl.where((rows < M)[:, None], acc, 0.0)  # a row beyond M, zero in x, is NaN where w is infinite
        saved = acc
        if ACT != "none":
            saved = saved_desc.load([row, col]).to(tl.float32)
        dpre = activation_grad(saved, acc, ACT, saved_desc.dtype == tl.float32)
        if NEED_DB:
            cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)
            tl.store(db_ptr + tile_m.to(tl.int64) * N + cols, tl.sum(dpre, axis=0), mask=cols < N)
        dpre_desc.store([row, col], dpre.to(OUT))


@triton.jit
def linear_dact_tma_kernel(
    x_ptr, w_ptr, saved_ptr, dpre_ptr, db_ptr, M, N, K, stride_x, stride_w,
    ACT: tl.constexpr, NEED_DB: tl.constexpr,
    X_T: tl.constexpr, W_T: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """dpre = (x @ w^T) * act'(saved);   db[p] = sum of dpre over tile row p

    x (M, K), w (N, K), dpre (M, N): bf16 or fp16, dpre contiguous | saved (M, N) contiguous: the pre-activation,
    or the output of relu; not read when ACT is none | db (cdiv(M, BLOCK_M), N) fp32, from dpre before it is rounded
    db is written only where NEED_DB.
    Grid (min(programs, tiles),), persistent. fp32 accumulation.
    """
    OUT: tl.constexpr = dpre_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    x_desc = operand(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, X_T)
    w_desc = operand(w_ptr, N, K, stride_w, BLOCK_N, BLOCK_K, W_T)
    saved_desc = descriptor(saved_ptr, M, N, N, BLOCK_M, WIDTH)
    dpre_desc = descriptor(dpre_ptr, M, N, N, BLOCK_M, WIDTH)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc = descriptor_product(x_desc, w_desc, acc, row, col, K, X_T, W_T, PRECISION, 0, WIDEN, BLOCK_K)
        _store_dact(acc, saved_desc, dpre_desc, db_ptr, tile_m, row, col, M, N,
                    ACT, NEED_DB, OUT, BLOCK_M, BLOCK_N, SUBTILES)  # fmt: skip

"""The gated linear's backward: the gate elementwise, with both bias gradients, and dx as the sum of two products."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activation_grad
from .linear_tiles import descriptor, descriptor_product, halves, operand, pointer_product, tile_of


@triton.jit
def gate_bwd_kernel(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, part_ptr, M, N, P, rows_per_program, stride_dym, stride_dyn,
    ACT: tl.constexpr, NEED_DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dg = dy * u * act'(g),   du = dy * act(g);   part[0, p], part[1, p] = sums of dg, du over the rows of block p

    dy (M, N) any strides | g, u, dg, du (M, N) contiguous, of one dtype | part (2, P, N) fp32, before dg, du are rounded
    Grid (P * cdiv(N, BLOCK_N),), P = cdiv(M, rows_per_program). fp32 inside.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = (pid // blocks_n).to(tl.int64)
    cols = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    dbg = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dbu = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (cols < N)[None, :]
        offsets = rows[:, None] * N + cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        du = dy * activate(g, ACT)  # stored before dg is computed: fewer registers
        tl.store(du_ptr + offsets, du.to(du_ptr.dtype.element_ty), mask=mask)
        if NEED_DB:
            dbu += tl.where(mask, du, 0.0)
        dg = activation_grad(g, dy * u, ACT, g_ptr.dtype.element_ty == tl.float32)
        tl.store(dg_ptr + offsets, dg.to(dg_ptr.dtype.element_ty), mask=mask)
        if NEED_DB:
            dbg += dg
    if NEED_DB:
        tl.store(part_ptr + part * N + cols, tl.sum(dbg, axis=0), mask=cols < N)
        tl.store(part_ptr + (P + part) * N + cols, tl.sum(dbu, axis=0), mask=cols < N)


@triton.jit
def product_sum_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, M, N, K, stride_bk, stride_bn, stride_dk, stride_dn,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = a @ b + c @ d

    a, c (M, K) contiguous | b, d (K, N) any strides, all of one dtype | out (M, N) contiguous
    Grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),). One fp32 accumulator for both products: rounded once.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = pointer_product(a_ptr, b_ptr, acc, rows, cols, M, N, K, K, 1, stride_bn, stride_bk, PRECISION, 0, WIDEN, BLOCK_K)
    acc = pointer_product(c_ptr, d_ptr, acc, rows, cols, M, N, K, K, 1, stride_dn, stride_dk, PRECISION, 0, WIDEN, BLOCK_K)
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _store_sum(
    acc, out_desc, row, col, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr
):
    if SUBTILES > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_sum(left, out_desc, row, col, OUT, BLOCK_M, HALF, SUBTILES // 2)
        _store_sum(right, out_desc, row, col + HALF, OUT, BLOCK_M, HALF, SUBTILES // 2)
    else:
        out_desc.store([row, col], acc.to(OUT))


@triton.jit
def product_sum_tma_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, M, N, K, stride_b, stride_d,
    B_T: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """product_sum_kernel over TMA descriptors: persistent, grid (min(programs, tiles),). b and d (K, N), or (N, K) where B_T."""
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    a_desc = operand(a_ptr, M, K, K, BLOCK_M, BLOCK_K, False)
    c_desc = operand(c_ptr, M, K, K, BLOCK_M, BLOCK_K, False)
    b_desc = operand(b_ptr, N, K, stride_b, BLOCK_N, BLOCK_K, not B_T)
    d_desc = operand(d_ptr, N, K, stride_d, BLOCK_N, BLOCK_K, not B_T)
    out_desc = descriptor(out_ptr, M, N, N, BLOCK_M, BLOCK_N // SUBTILES)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc = descriptor_product(a_desc, b_desc, acc, row, col, K, False, not B_T, PRECISION, 0, WIDEN, BLOCK_K)
        acc = descriptor_product(c_desc, d_desc, acc, row, col, K, False, not B_T, PRECISION, 0, WIDEN, BLOCK_K)
        _store_sum(acc, out_desc, row, col, OUT, BLOCK_M, BLOCK_N, SUBTILES)

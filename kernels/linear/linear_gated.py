"""The gated linear: two products and the gate between them in one kernel, and the gate's backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .linear_tiles import descriptor, halves, multiply, operand, tile_of


@triton.jit
def gated_linear_fwd_kernel(
    x_ptr, wg_ptr, wu_ptr, bg_ptr, bu_ptr, y_ptr, g_ptr, u_ptr, M, N, K,
    stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk, stride_bg, stride_bu, stride_ym,
    ACT: tl.constexpr, HAS_BG: tl.constexpr, HAS_BU: tl.constexpr, SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = act(g) * u,   g = x @ wg^T + bg,   u = x @ wu^T + bu        [Shazeer, GLU Variants, 2020]

    x (M, K), wg, wu (N, K) of one dtype, any strides | bg, bu (N,) any float, any stride | y, g, u (M, N), last stride 1
    Grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),), one tile a program; x is read once for both products.
    Accumulates in fp32; g and u are written, rounded, only where SAVE_PRE. WIDEN multiplies in fp32 (interpreter).
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m = (rows < M)[:, None]
    in_n = (cols < N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    g_ptrs = wg_ptr + cols[None, :] * stride_gn + ks[:, None] * stride_gk
    u_ptrs = wu_ptr + cols[None, :] * stride_un + ks[:, None] * stride_uk
    step = tl.full([], BLOCK_K, tl.int64)
    g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        in_k = ks < K - start
        x = tl.load(x_ptrs, mask=in_m & in_k[None, :], other=0.0)
        g = multiply(x, tl.load(g_ptrs, mask=in_k[:, None] & in_n, other=0.0), g, PRECISION, 0, WIDEN)
        u = multiply(x, tl.load(u_ptrs, mask=in_k[:, None] & in_n, other=0.0), u, PRECISION, 0, WIDEN)
        x_ptrs += step * stride_xk
        g_ptrs += step * stride_gk
        u_ptrs += step * stride_uk
    if HAS_BG:
        g += tl.load(bg_ptr + cols * stride_bg, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BU:
        u += tl.load(bu_ptr + cols * stride_bu, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * stride_ym + cols[None, :]
    if SAVE_PRE:
        tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=in_m & in_n)
        tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_m & in_n)
    tl.store(y_ptr + offsets, (activate(g, ACT) * u).to(y_ptr.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def _store_gated(
    g, u, bg_ptr, bu_ptr, y_desc, g_desc, u_desc, row, col, N, stride_bg, stride_bu,
    ACT: tl.constexpr, HAS_BG: tl.constexpr, HAS_BU: tl.constexpr, SAVE_PRE: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Biases, gate and stores of the BLOCK_N columns from col on, in SUBTILES parts."""
    if SUBTILES > 1:
        g_left, g_right = halves(g, BLOCK_M, BLOCK_N)
        u_left, u_right = halves(u, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_gated(g_left, u_left, bg_ptr, bu_ptr, y_desc, g_desc, u_desc, row, col, N, stride_bg, stride_bu,
                     ACT, HAS_BG, HAS_BU, SAVE_PRE, OUT, BLOCK_M, HALF, SUBTILES // 2)  # fmt: skip
        _store_gated(g_right, u_right, bg_ptr, bu_ptr, y_desc, g_desc, u_desc, row, col + HALF, N, stride_bg, stride_bu,
                     ACT, HAS_BG, HAS_BU, SAVE_PRE, OUT, BLOCK_M, HALF, SUBTILES // 2)  # fmt: skip
    else:
        cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)
        if HAS_BG:
            g += tl.load(bg_ptr + cols * stride_bg, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if HAS_BU:
            u += tl.load(bu_ptr + cols * stride_bu, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if SAVE_PRE:
            g_desc.store([row, col], g.to(OUT))
            u_desc.store([row, col], u.to(OUT))
        y_desc.store([row, col], (activate(g, ACT) * u).to(OUT))


@triton.jit
def gated_linear_fwd_tma_kernel(
    x_ptr, wg_ptr, wu_ptr, bg_ptr, bu_ptr, y_ptr, g_ptr, u_ptr, M, N, K, stride_x, stride_g, stride_u, stride_bg, stride_bu,
    ACT: tl.constexpr, HAS_BG: tl.constexpr, HAS_BU: tl.constexpr, SAVE_PRE: tl.constexpr,
    X_T: tl.constexpr, W_T: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """gated_linear_fwd_kernel over TMA descriptors: persistent, grid (min(programs, tiles),).

    x (M, K), wg, wu (N, K) of bf16 or fp16, or stored transposed (X_T, W_T); aligned as linear_tma's | y, g, u (M, N)
    contiguous. fp32 accumulation, two accumulators.
    """
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    x_desc = operand(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, X_T)
    wg_desc = operand(wg_ptr, N, K, stride_g, BLOCK_N, BLOCK_K, W_T)
    wu_desc = operand(wu_ptr, N, K, stride_u, BLOCK_N, BLOCK_K, W_T)
    y_desc = descriptor(y_ptr, M, N, N, BLOCK_M, WIDTH)
    g_desc = y_desc
    u_desc = y_desc
    if SAVE_PRE:
        g_desc = descriptor(g_ptr, M, N, N, BLOCK_M, WIDTH)
        u_desc = descriptor(u_ptr, M, N, N, BLOCK_M, WIDTH)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            x = x_desc.load([k, row]).T if X_T else x_desc.load([row, k])
            wg = wg_desc.load([k, col]) if W_T else wg_desc.load([col, k]).T
            wu = wu_desc.load([k, col]) if W_T else wu_desc.load([col, k]).T
            g = multiply(x, wg, g, PRECISION, 0, WIDEN)
            u = multiply(x, wu, u, PRECISION, 0, WIDEN)
        _store_gated(g, u, bg_ptr, bu_ptr, y_desc, g_desc, u_desc, row, col, N, stride_bg, stride_bu,
                     ACT, HAS_BG, HAS_BU, SAVE_PRE, OUT, BLOCK_M, BLOCK_N, SUBTILES)  # fmt: skip

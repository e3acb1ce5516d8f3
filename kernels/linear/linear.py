"""Matmul with bias and activation in its epilogue, by pointers: any strides, any alignment, any GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .linear_tiles import pointer_product, tile_of


@triton.jit
def linear_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, pre_ptr, xs_ptr, ws_ptr, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_b, stride_ym, stride_xs, stride_ws,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, IMPRECISE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = act(pre),  pre = (x @ w^T) * xs[:, None] * ws[None, :] + b

    x (M, K), w (N, K) of one dtype (fp8 too), any strides | b (N,) any float, any stride | y, pre (M, N), last stride 1
    xs, ws fp32, (M,) and (N,), or one number with stride 0; only where HAS_SCALE.
    Grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),), one tile a program, GROUP_M tile rows share a band of w in L2.
    Accumulates in fp32; K = 0 gives act(b). pre is written only where SAVE_PRE. WIDEN multiplies in fp32 (interpreter).
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = pointer_product(x_ptr, w_ptr, acc, rows, cols, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
                          PRECISION, IMPRECISE, WIDEN, BLOCK_K)  # fmt: skip
    if HAS_SCALE:
        acc *= tl.load(xs_ptr + rows * stride_xs, mask=rows < M, other=0.0)[:, None]
        acc *= tl.load(ws_ptr + cols * stride_ws, mask=cols < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols * stride_b, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * stride_ym + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if SAVE_PRE:
        tl.store(pre_ptr + offsets, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, activate(acc, ACT).to(y_ptr.dtype.element_ty), mask=mask)

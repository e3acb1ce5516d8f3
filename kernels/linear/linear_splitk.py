"""Small M, where reading the weights is all the time: K in parts so that every SM reads some, then a reduction.

No atomics: the parts are added in a fixed order, so the bits are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .linear_tiles import pointer_product


@triton.jit
def linear_split_k_kernel(
    x_ptr, w_ptr, part_ptr, M, N, K, k_per_split, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, IMPRECISE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[s] = x[:, ks] @ w[:, ks]^T,  ks the s-th k_per_split of K

    x (M, K), w (N, K) of one dtype (fp8 too), any strides | part (S, M, N) fp32
    Grid (S * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),), S = cdiv(K, k_per_split). Accumulates in fp32.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    split = pid // (tiles_m * tl.cdiv(N, BLOCK_N))
    tile = pid % (tiles_m * tl.cdiv(N, BLOCK_N))
    rows = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split.to(tl.int64) * k_per_split
    length = tl.minimum(K - first, k_per_split).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = pointer_product(x_ptr + first * stride_xk, w_ptr + first * stride_wk, acc, rows, cols, M, N, length,
                          stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, IMPRECISE, WIDEN, BLOCK_K)  # fmt: skip
    offsets = (split.to(tl.int64) * M + rows[:, None]) * N + cols[None, :]
    tl.store(part_ptr + offsets, acc, mask=(rows < M)[:, None] & (cols < N)[None, :])


def reduce_block(itemsize: int) -> int:
    """BLOCK of linear_reduce_kernel for parts of itemsize bytes an element: 16 bytes a thread of 4 warps."""
    return 2048 // itemsize


@triton.jit
def linear_reduce_kernel(
    part_ptr, b_ptr, y_ptr, pre_ptr, xs_ptr, ws_ptr, M, N, S, stride_b, stride_xs, stride_ws,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(pre),  pre = sum(part, axis=0) * xs[:, None] * ws[None, :] + b

    part (S, M, N) any float | b (N,) any float | y, pre (M, N) contiguous | xs, ws as linear_fwd_kernel's
    Grid (cdiv(M * N, BLOCK),). The S parts are added in order, in fp32.
    """
    size = tl.full([], M, tl.int64) * N
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    rows = offsets // N
    cols = offsets % N
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for s in tl.range(0, S):
        acc += tl.load(part_ptr + s * size + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        acc *= tl.load(xs_ptr + rows * stride_xs, mask=mask, other=0.0)
        acc *= tl.load(ws_ptr + cols * stride_ws, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols * stride_b, mask=mask, other=0.0).to(tl.float32)
    if SAVE_PRE:
        tl.store(pre_ptr + offsets, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, activate(acc, ACT).to(y_ptr.dtype.element_ty), mask=mask)

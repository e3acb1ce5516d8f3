"""Softmax over rows of 16-bit floats held in registers as pairs, forward and backward: twice the row of softmax.py.

The pairs are unpacked to fp32 for each reduction and again for the result, which costs arithmetic and saves registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    BF16_MINUS_INF_PAIR,
    FP16_MINUS_INF_PAIR,
    aligned,
    edge_columns,
    exp_over,
    exp_sub,
    opaque_zero,
    pack,
    pair_max,
    split_row,
    unpack,
)


@triton.jit
def softmax_fwd_packed_kernel(
    x_ptr, y_ptr, N, stride_xm, stride_ym,
    VEC: tl.constexpr, EDGES: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over each row.

    x, y (M, N) both bfloat16 (BF16) or both float16, last stride 1
    Grid (M,). One row a program, N <= BLOCK_N. fp32 inside.
    N and the row strides are multiples of VEC, or, with EDGES, rows of x and y start at the same distance from one.
    A row of -inf, or one with NaN or +inf, gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, head, count = row * stride_xm, 0, N
    if EDGES:
        head, count = split_row(x_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, count, N, VEC)
        x_edge = tl.load(x_ptr + x_row + edge, mask=in_edge, other=float("-inf")).to(tl.float32)
    pairs = tl.arange(0, BLOCK_N // 2)
    x_pairs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + aligned((x_row + head) // 2, VEC // 2)
    mask = pairs < aligned((count // 2).to(tl.int32), VEC // 2)
    x = tl.load(x_pairs + pairs, mask=mask, other=BF16_MINUS_INF_PAIR if BF16 else FP16_MINUS_INF_PAIR)
    row_max = pair_max(x, BF16, ASM)  # a NaN that it passes over is NaN again in the sum
    if EDGES:
        row_max = tl.maximum(row_max, tl.max(x_edge, axis=0))
    x ^= opaque_zero(N, row_max)
    lo, hi = unpack(x, BF16)
    row_sum = tl.sum(exp_sub(lo, row_max) + exp_sub(hi, row_max), axis=0)
    if EDGES:
        row_sum += tl.sum(exp_sub(x_edge, row_max), axis=0)
    log2_sum = tl.log2(row_sum)
    x ^= opaque_zero(N, row_sum)
    lo, hi = unpack(x, BF16)
    row += opaque_zero(N, row_sum)  # what follows from row is computed again rather than kept
    y_row, head, count = row * stride_ym, 0, N
    if EDGES:
        head, count = split_row(y_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, count, N, VEC)
        y_edge = exp_over(x_edge, row_max, log2_sum)
        tl.store(y_ptr + y_row + edge, y_edge.to(y_ptr.dtype.element_ty), mask=in_edge)
    y_pairs = y_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + aligned((y_row + head) // 2, VEC // 2)
    mask = pairs < aligned((count // 2).to(tl.int32), VEC // 2)
    y = pack(exp_over(lo, row_max, log2_sum), exp_over(hi, row_max, log2_sum), BF16, ASM)
    tl.store(y_pairs + pairs, y, mask=mask)


@triton.jit
def softmax_bwd_packed_kernel(
    dy_ptr, y_ptr, dx_ptr, N, stride_dym, stride_ym, stride_dxm,
    VEC: tl.constexpr, EDGES: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = (dy - sum(dy * y)) * y over each row.

    dy, y, dx (M, N) all bfloat16 (BF16) or all float16, last stride 1
    Grid (M,). One row a program, N <= BLOCK_N. fp32 inside. VEC and EDGES as softmax_fwd_packed_kernel, for all three.
    """
    row = tl.program_id(0).to(tl.int64)
    dy_row, y_row, dx_row, count = row * stride_dym, row * stride_ym, row * stride_dxm, N
    if EDGES:
        head, count = split_row(y_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, count, N, VEC)
        y_edge = tl.load(y_ptr + y_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        dy_edge = tl.load(dy_ptr + dy_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        dx_edge_ptrs = dx_ptr + dx_row + edge
        dy_row, y_row, dx_row = dy_row + head, y_row + head, dx_row + head
    pairs = tl.arange(0, BLOCK_N // 2)
    mask = pairs < aligned((count // 2).to(tl.int32), VEC // 2)
    dy_pairs = dy_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + aligned(dy_row // 2, VEC // 2)
    y_pairs = y_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + aligned(y_row // 2, VEC // 2)
    dx_pairs = dx_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + aligned(dx_row // 2, VEC // 2)
    y = tl.load(y_pairs + pairs, mask=mask, other=0)
    dy = tl.load(dy_pairs + pairs, mask=mask, other=0)
    y_lo, y_hi = unpack(y, BF16)
    dy_lo, dy_hi = unpack(dy, BF16)
    dot = tl.sum(dy_lo * y_lo + dy_hi * y_hi, axis=0)
    if EDGES:
        dot += tl.sum(dy_edge * y_edge, axis=0)
    y ^= opaque_zero(N, dot)
    dy ^= opaque_zero(N, dot)
    y_lo, y_hi = unpack(y, BF16)
    dy_lo, dy_hi = unpack(dy, BF16)
    tl.store(dx_pairs + pairs, pack((dy_lo - dot) * y_lo, (dy_hi - dot) * y_hi, BF16, ASM), mask=mask)
    if EDGES:
        tl.store(dx_edge_ptrs, ((dy_edge - dot) * y_edge).to(dx_ptr.dtype.element_ty), mask=in_edge)

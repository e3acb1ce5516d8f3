"""Softmax over long rows, each held in the registers of a cluster: several programs that read one another's shared memory.

Launched with num_ctas of more than 1, a kernel's tensors are split over the programs of the cluster: each loads, reduces and
stores a part of the row, and the partial results cross over in shared memory. Rows of 16-bit floats take softmax_packed.py,
launched so; here is the form that holds fp32. In one dimension, since Triton 3.8 reduces no other over a cluster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import aligned, edge_columns, exp_sub, split_row


@triton.jit
def softmax_fwd_cluster_kernel(
    x_ptr, y_ptr, N, stride_xm, stride_xn, stride_ym,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over each row.

    x (M, N) any float, any strides | y (M, N) any float, last stride 1
    Grid (M,) of clusters. One row a cluster, N <= BLOCK_N. fp32 inside. VEC, EDGES, SAME and edge cases as softmax_fwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x_row, y_row, count = row * stride_xm, row * stride_ym, N
    if EDGES:
        head, wide_count = split_row(x_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, wide_count, N, VEC)
        x_edge = tl.load(x_ptr + x_row + edge, mask=in_edge, other=float("-inf")).to(tl.float32)
        y_edge_ptrs = y_ptr + y_row + edge
        x_row, y_row, count = aligned(x_row + head, VEC), y_row + head, aligned(wide_count.to(tl.int32), VEC)
        if SAME:
            y_row = aligned(y_row, VEC)
    elif VEC > 1:
        x_row, y_row, count = aligned(x_row, VEC), aligned(y_row, VEC), aligned(N, VEC)
    x_ptrs = x_ptr + x_row + cols.to(tl.int64) * stride_xn
    x = tl.load(x_ptrs, mask=cols < count, other=float("-inf")).to(tl.float32)
    row_max = tl.max(x, axis=0)
    if EDGES:
        row_max = tl.maximum(row_max, tl.max(x_edge, axis=0))
    e = exp_sub(x, row_max)
    row_sum = tl.sum(e, axis=0)
    if EDGES:
        e_edge = exp_sub(x_edge, row_max)
        row_sum += tl.sum(e_edge, axis=0)
    scale = 1.0 / row_sum
    tl.store(y_ptr + y_row + cols, (e * scale).to(y_ptr.dtype.element_ty), mask=cols < count)
    if EDGES:
        tl.store(y_edge_ptrs, (e_edge * scale).to(y_ptr.dtype.element_ty), mask=in_edge)


@triton.jit
def softmax_bwd_cluster_kernel(
    dy_ptr, y_ptr, dx_ptr, N,
    stride_dym, stride_dyn, stride_ym, stride_yn, stride_dxm,
    VEC: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = (dy - sum(dy * y)) * y over each row.

    dy, y (M, N) any float, any strides | dx (M, N) any float, last stride 1
    Grid (M,) of clusters. One row a cluster, N <= BLOCK_N. fp32 inside. VEC, EDGES and SAME as softmax_bwd_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    dy_row, y_row, dx_row, count = row * stride_dym, row * stride_ym, row * stride_dxm, N
    if EDGES:
        tl.static_assert(SAME)
        head, wide_count = split_row(y_row, N, VEC)
        edge, in_edge = edge_columns(tl.arange(0, 2 * VEC), head, wide_count, N, VEC)
        y_edge = tl.load(y_ptr + y_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        dy_edge = tl.load(dy_ptr + dy_row + edge, mask=in_edge, other=0.0).to(tl.float32)
        dx_edge_ptrs = dx_ptr + dx_row + edge
        dy_row, y_row, dx_row, count = dy_row + head, y_row + head, dx_row + head, wide_count.to(tl.int32)
    if VEC > 1:
        dy_row, y_row, dx_row = aligned(dy_row, VEC), aligned(y_row, VEC), aligned(dx_row, VEC)
        count = aligned(count, VEC)
    wide = cols.to(tl.int64)
    y = tl.load(y_ptr + y_row + wide * stride_yn, mask=cols < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + dy_row + wide * stride_dyn, mask=cols < count, other=0.0).to(tl.float32)
    dot = tl.sum(dy * y, axis=0)
    if EDGES:
        dot += tl.sum(dy_edge * y_edge, axis=0)
    tl.store(dx_ptr + dx_row + cols, ((dy - dot) * y).to(dx_ptr.dtype.element_ty), mask=cols < count)
    if EDGES:
        tl.store(dx_edge_ptrs, ((dy_edge - dot) * y_edge).to(dx_ptr.dtype.element_ty), mask=in_edge)

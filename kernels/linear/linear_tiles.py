"""What the matmul kernels share: the order of the tiles, and the product of one tile, by pointers or by descriptors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile row, tile column) of the tile-th tile: GROUP_M rows of tiles are walked column by column, so that the
    programs that run together read few rows of x and few of w, and those stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = tile // (GROUP_M * tiles_n)
    band_rows = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    in_band = tile % (GROUP_M * tiles_n)
    return band * GROUP_M + in_band % band_rows, in_band // band_rows


@triton.jit
def multiply(x, w, acc, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr, WIDEN: tl.constexpr):
    """acc + x @ w in fp32. IMPRECISE: how many fp8 products Hopper may sum before they join acc. WIDEN: the interpreter
    cannot multiply bf16 and fp8, so they are widened there."""
    if WIDEN:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    elif IMPRECISE >= x.shape[1]:  # acc joins outside: within, Triton adds the products' registers before it waits for them
        return acc + tl.dot(x, w, input_precision=PRECISION)
    elif IMPRECISE > 0:
        return tl.dot(x, w, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def pointer_product(
    x_ptr, w_ptr, acc, rows, cols, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, IMPRECISE: tl.constexpr, WIDEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x[rows] @ w[cols]^T; rows, cols int64. Any strides; what lies outside M, N, K counts as zero."""
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m = (rows < M)[:, None]
    in_n = (cols < N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols[None, :] * stride_wn + ks[:, None] * stride_wk
    step = tl.full([], BLOCK_K, tl.int64)  # so that a large stride does not wrap
    for start in tl.range(0, K, BLOCK_K):
        in_k = ks < K - start
        x = tl.load(x_ptrs, mask=in_m & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n, other=0.0)
        acc = multiply(x, w, acc, PRECISION, IMPRECISE, WIDEN)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    return acc


@triton.jit
def descriptor(ptr, rows, cols, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """A TMA descriptor of a matrix with last stride 1: tiles of BLOCK_ROWS x BLOCK_COLS, zero outside."""
    return tl.make_tensor_descriptor(ptr, [rows, cols], [stride, 1], [BLOCK_ROWS, BLOCK_COLS])


@triton.jit
def operand(ptr, rows, K, stride, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The descriptor of a matmul operand of shape (rows, K), or (K, rows) where TRANSPOSED."""
    if TRANSPOSED:
        return descriptor(ptr, K, rows, stride, BLOCK_K, BLOCK_ROWS)
    else:
        return descriptor(ptr, rows, K, stride, BLOCK_ROWS, BLOCK_K)


@triton.jit
def descriptor_product(
    x_desc, w_desc, acc, row, col, K, X_T: tl.constexpr, W_T: tl.constexpr,
    PRECISION: tl.constexpr, IMPRECISE: tl.constexpr, WIDEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the product of the tile at (row, col): x (M, K) or its transpose, w (N, K) or its transpose."""
    for k in tl.range(0, K, BLOCK_K):
        if X_T:
            x = x_desc.load([k, row]).T
        else:
            x = x_desc.load([row, k])
        if W_T:
            w = w_desc.load([k, col])
        else:
            w = w_desc.load([col, k]).T
        acc = multiply(x, w, acc, PRECISION, IMPRECISE, WIDEN)
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns of acc."""
    return acc.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute([0, 2, 1]).split()

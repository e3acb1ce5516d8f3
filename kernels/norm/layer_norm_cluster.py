"""Layer norm forward over long rows, each held in the registers of a cluster, as in softmax_cluster.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import CLUSTER_CTAS, RowConfig, next_power_of_2
from ..rows import aligned

MAX_CLUSTER = 262144  # columns: 32k of each program


def layer_norm_fwd_cluster_config(config: RowConfig, N: int) -> RowConfig:
    """A cluster in place of config, where config is chunked and a cluster holds N columns."""
    block_n = next_power_of_2(N)
    if not config.chunked or block_n > MAX_CLUSTER:
        return config
    return RowConfig(1, block_n, num_warps=block_n // CLUSTER_CTAS // 1024, num_ctas=CLUSTER_CTAS)


@triton.jit
def layer_norm_fwd_cluster_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, N, stride_xm, stride_xn, stride_ym, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * w + b,   rstd = 1 / sqrt(var + eps)        [Ba et al. 2016]

    x (M, N) any float, any strides | w, b (N,) any float, stride 1 | y (M, N) any float, last stride 1
    mean, rstd (M,) fp32, written with STATS
    Grid (M,) of clusters. One row a cluster, N <= BLOCK_N. fp32 inside. N and the row strides are multiples of VEC.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < aligned(N, VEC)
    x_ptrs = x_ptr + aligned(row * stride_xm, VEC) + cols.to(tl.int64) * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / N
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps)
    y = centred * rstd
    if HAS_WEIGHT:
        y *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + aligned(row * stride_ym, VEC) + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)

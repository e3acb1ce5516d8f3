"""The launches of a gated linear, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._runtime.device import KERNEL_DTYPES
from ..._runtime.rows import no_columns, rows_and_strides, rows_of
from .gated_linear_reference import gated_linear_bwd_reference, gated_linear_reference
from .matmul import product
from .matmul_gated import gate_bwd, matmul_gated, product_sum
from .matmul_plan import fp32_on_cublas


def gated_linear_launch(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """gated_linear_reference by one kernel. fp32 on a GPU: cuBLAS, which reads x twice and still wins."""
    if x.dtype not in KERNEL_DTYPES or fp32_on_cublas(x):
        return gated_linear_reference(x, gate_weight, up_weight, gate_bias, up_bias, activation, save_pre)
    y = x.new_empty((*x.shape[:-1], gate_weight.shape[0]))
    g = torch.empty_like(y) if save_pre else x.new_empty((0,))
    u = torch.empty_like(y) if save_pre else x.new_empty((0,))
    rows, M, stride_xm, stride_xk = rows_and_strides(x) if x.shape[-1] else no_columns(x)
    matmul_gated(rows, (M, stride_xm, stride_xk), gate_weight, up_weight, gate_bias, up_bias, y, g, u, activation, save_pre)
    return y, g, u


def infer_launch(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    return gated_linear_launch(x, gate_weight, up_weight, gate_bias, up_bias, activation, False)[0]


def gated_linear_bwd_launch(
    dy: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, g: Tensor, u: Tensor, activation: str,
    need_dx: bool, need_dwg: bool, need_dwu: bool, need_dbg: bool, need_dbu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """gated_linear_bwd_reference by kernels.

    One computes dg, du and the partial sums of the biases' gradients, one adds dx's two products before rounding, and each
    weight's gradient is a product.
    """
    N, K = gate_weight.shape
    if dy.dtype not in KERNEL_DTYPES or dy.numel() == 0 or K == 0:
        needs = (need_dx, need_dwg, need_dwu, need_dbg, need_dbu)
        return gated_linear_bwd_reference(dy, x, gate_weight, up_weight, g, u, activation, *needs)
    none = dy.new_empty((0,))
    dg, du, dbg, dbu = gate_bwd(rows_of(dy), g, u, activation, need_dbg, need_dbu)
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device) if need_dx else none
    dwg = torch.empty((N, K), dtype=dy.dtype, device=dy.device) if need_dwg else none
    dwu = torch.empty((N, K), dtype=dy.dtype, device=dy.device) if need_dwu else none
    if need_dx:
        product_sum(dg, gate_weight, du, up_weight, dx.view(-1, K))
    if need_dwg:
        product(dg.t(), rows_of(x), dwg)
    if need_dwu:
        product(du.t(), rows_of(x), dwu)
    return dx, dwg, dwu, dbg, dbu

"""The launches of a linear with bias and activation, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.device import KERNEL_DTYPES
from ..._runtime.notices import warn_once
from ..._runtime.rows import no_columns, rows_and_strides, rows_of
from .linear_plan import Linear, linear_plan
from .linear_reference import linear_bwd_reference, linear_reference
from .matmul import act_bwd, matmul_epilogue, product, run_linear
from .matmul_plan import operands


def linear_launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """linear_reference by what linear_plan says: one Triton kernel (two for small M), cuBLAS and an epilogue, or cuBLASLt."""
    if x.dtype not in KERNEL_DTYPES:
        warn_once("linear", NO_FP64)
        return linear_reference(x, weight, bias, activation, save_pre)
    plan, rows, M = plan_of(x, weight, bias, activation, save_pre)
    if plan.backend == "cublas" and activation == "none" and not save_pre:
        return F.linear(x, weight, bias).contiguous(), x.new_empty((0,))
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    pre = torch.empty_like(y) if save_pre else x.new_empty((0,))
    if y.numel() == 0:
        return y, pre
    if plan.backend == "cublas":
        product = pre if save_pre else y
        torch.mm(rows.view(M, K), weight.t(), out=product.view(M, N))
        matmul_epilogue(product, bias, y, activation)
    elif plan.backend == "cublaslt":
        torch.ops.aten._addmm_activation.out(bias, rows.view(M, K), weight.t(), use_gelu=True, out=y.view(M, N))
    else:
        run_linear(plan, M, rows, weight, bias, y, pre)
    return y, pre


def plan_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Linear, Tensor, int]:  # fmt: skip
    """(what computes a linear, x as its rows, M)."""
    rows, M, stride_xm, stride_xk = rows_and_strides(x) if x.shape[-1] else no_columns(x)
    stride_b, b_dtype = (None, None) if bias is None else (bias.stride(0), bias.dtype)
    o = operands(x, M, (stride_xm, stride_xk), weight)
    return linear_plan(o, stride_b, b_dtype, x.dtype, activation, save_pre), rows, M


def infer_launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return linear_launch(x, weight, bias, activation, False)[0]


def linear_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_bwd_reference by kernels: one for dpre and the partial sums of db, then one product a gradient."""
    N, K = (dy.shape[-1],) * 2 if weight is None else weight.shape
    if dy.dtype not in KERNEL_DTYPES or dy.numel() == 0 or K == 0:
        return linear_bwd_reference(dy, x, weight, saved, activation, need_dx, need_dw, need_db)
    dpre = rows_of(dy)
    db = dy.new_empty((0,))
    if need_db or activation != "none":
        dpre, db = act_bwd(dpre, saved, activation, need_dx or need_dw, need_db)
    if weight is None:
        return dpre.view(dy.shape) if need_dx else dy.new_empty((0,)), dy.new_empty((0,)), db
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device) if need_dx else dy.new_empty((0,))
    dw = torch.empty((N, K), dtype=dy.dtype, device=dy.device) if need_dw else dy.new_empty((0,))
    if need_dx:
        product(dpre, weight, dx.view(-1, K))
    if need_dw:
        product(dpre.t(), rows_of(x), dw)
    return dx, dw, db

"""The launch of an fp8 linear."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._runtime.device import properties_of
from ..._runtime.rows import no_columns, rows_and_strides
from .linear_fp8_reference import linear_fp8_reference
from .linear_plan import Linear, linear_plan
from .matmul import add_up, run_linear, scale_stride
from .matmul_plan import operands

scaled_mm_out = torch.ops.aten._scaled_mm.out
LEAST_CAPABILITY = (8, 9)  # Ada: the first tensor cores that multiply e4m3


def linear_fp8_launch(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """linear_fp8_reference by what linear_plan says: one Triton kernel, two for small M, or torch._scaled_mm and one kernel. In
    ATen on GPUs that cannot multiply e4m3."""
    if properties_of(x.get_device())[0] < LEAST_CAPABILITY:
        return linear_fp8_reference(x, weight, input_scale, weight_scale, bias, activation, out_dtype)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    if y.numel() == 0:
        return y
    plan, rows, M = plan_of(x, weight, input_scale, weight_scale, bias, activation, out_dtype)
    xs, ws = input_scale.reshape(-1), weight_scale.reshape(-1)
    if plan.backend == "scaled_mm":
        _scaled_mm(plan, rows.view(M, x.shape[-1]), weight, bias, y, xs, ws)
    else:
        run_linear(plan, M, rows, weight, bias, y, y, xs, ws)
    return y


def plan_of(
    x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> tuple[Linear, Tensor, int]:  # fmt: skip
    """(what computes an fp8 linear, x as its rows, M)."""
    rows, M, stride_xm, stride_xk = rows_and_strides(x) if x.shape[-1] else no_columns(x)
    o = operands(x, M, (stride_xm, stride_xk), weight)
    stride_b, b_dtype = (None, None) if bias is None else (bias.stride(0), bias.dtype)
    scales = scale_stride(input_scale.reshape(-1)), scale_stride(weight_scale.reshape(-1))
    return linear_plan(o, stride_b, b_dtype, out_dtype, activation, False, scales), rows, M


def _scaled_mm(found: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, xs: Tensor, ws: Tensor) -> None:
    """y by torch._scaled_mm, whose sums are not of the fast kind; with bias and activation behind it where it would round twice."""
    M, N = x.shape[0], weight.shape[0]
    if found.reduce is None:
        if xs.numel() > 1:
            xs, ws = xs.contiguous().view(M, 1), ws.contiguous().view(1, N)
        scaled_mm_out(x, weight.t(), xs, ws, bias, out_dtype=y.dtype, out=y.view(M, N))
        return
    one = torch.ones((), dtype=torch.float32, device=x.device)
    product = torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32)
    add_up(found.reduce, M, product, product if bias is None else bias, y, y, xs, ws)

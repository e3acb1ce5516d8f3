"""The launch of an fp8 linear."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._runtime.device import properties_of
from ..._runtime.rows import no_columns, rows_and_strides
from .linear_fp8_reference import linear_fp8_reference
from .linear_plan import linear_plan
from .matmul import run_linear, scale_stride
from .matmul_plan import operands

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
    """linear_fp8_reference by one Triton kernel, two for small M; in ATen on GPUs that cannot multiply e4m3."""
    if properties_of(x.get_device())[0] < LEAST_CAPABILITY:
        return linear_fp8_reference(x, weight, input_scale, weight_scale, bias, activation, out_dtype)
    rows, M, stride_xm, stride_xk = rows_and_strides(x) if x.shape[-1] else no_columns(x)
    o = operands(x, M, (stride_xm, stride_xk), weight)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    if y.numel() == 0:
        return y
    xs, ws = input_scale.reshape(-1), weight_scale.reshape(-1)
    stride_b, b_dtype = (None, None) if bias is None else (bias.stride(0), bias.dtype)
    plan = linear_plan(o, stride_b, b_dtype, out_dtype, activation, False, (scale_stride(xs), scale_stride(ws)), True)
    run_linear(plan, M, rows, weight, bias, y, y, xs, ws)
    return y

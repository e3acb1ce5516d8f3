"""The launch of an fp8 linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._runtime.device import device_properties
from ..._runtime.rows import rows_of
from .linear_fp8_reference import linear_fp8_reference
from .matmul import matmul

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
    if device_properties(x)[0] < LEAST_CAPABILITY:
        return linear_fp8_reference(x, weight, input_scale, weight_scale, bias, activation, out_dtype)
    N, K = weight.shape
    y = torch.empty((*x.shape[:-1], N), dtype=out_dtype, device=x.device)
    x2 = rows_of(x) if K else x.new_empty((math.prod(x.shape[:-1]), 0))
    matmul(x2, weight, bias, y, y, activation, False, input_scale.reshape(-1), weight_scale.reshape(-1))
    return y

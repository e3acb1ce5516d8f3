"""The fp8 linear in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch.arguments import is_one
from ..._torch.autograd import autocast_off
from .activations import activate


def linear_fp8_eager(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Optional[Tensor] = None,
    activation: Optional[str] = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What fused_linear_fp8 computes, in fp32 on dequantised tensors, whatever autocast says."""
    if activation is None:
        activation = "none"
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _formula(input, weight, input_scale, weight_scale, input_scale.numel() == 1, bias, activation, out_dtype)
    else:
        with autocast_off(input):
            one = is_one(input_scale.numel())
            return _formula(input, weight, input_scale, weight_scale, one, bias, activation, out_dtype)


def _formula(
    input: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, one: bool, bias: Optional[Tensor], activation: str,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    xs = input_scale.reshape([]) if one else input_scale.reshape(input.shape[:-1]).unsqueeze(-1)
    product = F.linear(input.float(), weight.float()) * xs.float() * weight_scale.reshape(-1).float()
    return activate(product if bias is None else product + bias.float(), activation).to(out_dtype)


def linear_fp8_reference(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """y (..., N) in ATen. x (..., K), weight (N, K) e4m3; scales fp32 of one element, or of x.shape[:-1] and of (N,)."""
    one = is_one(input_scale.numel())
    return _formula(x, weight, input_scale, weight_scale, one, bias, activation, out_dtype).contiguous()

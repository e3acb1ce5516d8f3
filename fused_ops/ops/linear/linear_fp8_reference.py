"""The fp8 linear in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch.arguments import is_one
from ..._torch.autograd import autocast_off
from .activations import activated, eager_activation


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
        pre = _pre_activation(input, weight, input_scale, weight_scale, input_scale.numel() == 1, bias)
        return eager_activation(pre, activation).to(out_dtype)
    else:
        with autocast_off(input):
            pre = _pre_activation(input, weight, input_scale, weight_scale, is_one(input_scale.numel()), bias)
            return eager_activation(pre, activation).to(out_dtype)


def _pre_activation(
    input: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, one: bool, bias: Optional[Tensor]
) -> Tensor:
    xs = input_scale.reshape([]) if one else input_scale.reshape(input.shape[:-1]).unsqueeze(-1)
    product = F.linear(input.float(), weight.float()) * xs.float() * weight_scale.reshape(-1).float()
    return product if bias is None else product + bias.float()


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
    pre = _pre_activation(x, weight, input_scale, weight_scale, is_one(input_scale.numel()), bias)
    return activated(pre, activation).to(out_dtype).contiguous()

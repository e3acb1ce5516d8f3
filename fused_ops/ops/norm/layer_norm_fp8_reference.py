"""Layer norm quantised to fp8 in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_fp8_eager(
    input: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """What fused_layernorm_fp8 computes, as PyTorch users write it today: the layer norm in fp32, then quantised by rows."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    w = None if weight is None else weight.to(wide)
    b = None if bias is None else bias.to(wide)
    y = F.layer_norm(input.to(wide), normalized_shape, w, b, eps).flatten(input.dim() - len(normalized_shape))
    top = y.abs().amax(-1) if y.shape[-1] > 0 else y.new_zeros(y.shape[:-1])
    scale = top.clamp(min=1e-12) / 448.0
    q = (y / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return q.view(input.shape).contiguous(), scale.to(torch.float32)


def layer_norm_fp8_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(q, scale) in ATen. x (..., N); weight, bias (N,); q e4m3 as x; scale of x.shape[:-1] in fp32."""
    return layer_norm_fp8_eager(x, [x.shape[-1]], weight, bias, eps)

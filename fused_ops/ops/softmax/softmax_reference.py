"""Softmax in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_reference(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """softmax(x) over dim in ATen; y contiguous, in dtype or x's."""
    return torch.softmax(x, dim, dtype)  # contiguous, whatever the strides of x


def softmax_bwd_reference(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx = (dy - sum(dy * y)) * y over dim in ATen, in at least fp32; dx contiguous, in dtype."""
    wide = torch.float64 if y.dtype is torch.float64 else torch.float32
    return torch._softmax_backward_data(dy.to(wide), y.to(wide), dim, wide).to(dtype).contiguous()

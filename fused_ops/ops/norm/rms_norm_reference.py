"""RMS norm in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

FP32_EPS, FP64_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def _wide(x: Tensor) -> torch.dtype:
    """What a row of x is computed in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def eps_of(x: Tensor, eps: float | None) -> float:
    """eps, or F.rms_norm's own where none is given: that of the dtype it computes in."""
    return eps if eps is not None else FP64_EPS if x.dtype is torch.float64 else FP32_EPS


def rms_norm_eager(
    input: Tensor, normalized_shape: list[int], weight: Optional[Tensor] = None, eps: Optional[float] = None
) -> Tensor:
    """F.rms_norm, and for input and weight of different dtypes wide_rms_norm. For TorchScript."""
    if weight is None or weight.dtype == input.dtype:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return wide_rms_norm(input, normalized_shape, weight, eps)


def wide_rms_norm(input: Tensor, normalized_shape: list[int], weight: Optional[Tensor], eps: Optional[float]) -> Tensor:
    """F.rms_norm in fp32 (fp64 for fp64 input), rounded once to input's dtype, whatever weight's is; differentiable."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    w = None if weight is None else weight.to(wide)
    return F.rms_norm(input.to(wide), normalized_shape, w, eps).to(input.dtype)


def rms_norm_rows(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """wide_rms_norm over the last dimension."""
    return wide_rms_norm(x, [x.shape[-1]], weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd) in ATen. x (..., N); weight (N,); y as x; rstd of x.shape[:-1] in fp32 (fp64 for fp64)."""
    rstd = torch.rsqrt(x.to(_wide(x)).square().mean(-1) + eps)
    return rms_norm_rows(x, weight, eps).contiguous(), rstd


def rms_norm_formula(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm_reference with one mean of squares, for torch.compile."""
    wide = _wide(x)
    h = x.to(wide)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    y = h * rstd
    return (y if weight is None else y * weight.to(wide)).to(x.dtype), rstd.squeeze(-1)


def rms_norm_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dw) in ATen, in fp32 for half precision; a gradient not needed is an empty tensor. dw in weight's dtype."""
    wide = rstd.dtype
    s, none = rstd.unsqueeze(-1), x.new_empty((0,))
    h, g = x.to(wide) * s, dy.to(wide)
    dw = none
    if need_dw:
        columns = (g * h).sum(tuple(range(x.dim() - 1))) if x.dim() > 1 else g * h
        dw = columns.to(x.dtype if weight is None else weight.dtype)
    if not need_dx:
        return none, dw
    g = g if weight is None else g * weight.to(wide)
    return (s * (g - h * (g * h).mean(-1, keepdim=True))).to(x.dtype).contiguous(), dw

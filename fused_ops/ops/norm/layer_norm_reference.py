"""Layer norm in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _stats_dtype(x: Tensor) -> torch.dtype:
    """fp32, as the kernels accumulate in; fp64 for fp64, which only ATen computes."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """(y, mean, rstd) in ATen. x (..., N); weight, bias (N,); y as x; mean, rstd of x.shape[:-1] in fp32 (fp64 for fp64)."""
    N = x.shape[-1]
    dtype = _stats_dtype(x)
    if x.dtype is dtype and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype):
        y, mean, rstd = torch.native_layer_norm(x, [N], weight, bias, eps)
        return y.contiguous(), mean.squeeze(-1), rstd.squeeze(-1)
    wide = x.to(dtype)
    if N == 0 or x.dim() == 0:
        mean = rstd = wide.new_zeros(x.shape[:-1])
    else:
        var, mean = torch.var_mean(wide, dim=-1, correction=0)
        rstd = torch.rsqrt(var + eps)
    return F.layer_norm(x, [N], weight, bias, eps).contiguous(), mean, rstd


def train_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """layer_norm_reference, with statistics of shape (..., 1) as ATen returns them: squeezing would take 2 µs."""
    if x.dtype is torch.float32:  # and so must weight and bias be, in ATen
        return torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def layer_norm_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw, db) in ATen, in fp32 for half precision: ATen's own half-precision dw and db lose the small terms.

    dw in weight's dtype, db in bias_dtype; a gradient not needed is an empty tensor.
    """
    dtype = mean.dtype
    N = x.shape[-1]
    stats = (*x.shape[:-1], 1)
    grads = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype), x.to(dtype), [N], mean.reshape(stats), rstd.reshape(stats),
        None if weight is None else weight.to(dtype), None, [need_dx, False, False],
    )  # fmt: skip
    dx = grads[0].to(x.dtype).contiguous() if need_dx else x.new_empty((0,))
    rows = dy.to(dtype).reshape(-1, N) if N else dy.to(dtype).reshape(0, 0)
    dw = x.new_empty((0,))
    if need_dw:
        x_hat = (x.to(dtype).reshape(rows.shape) - mean.reshape(-1, 1)) * rstd.reshape(-1, 1)
        dw = (rows * x_hat).sum(0).to(x.dtype if weight is None else weight.dtype)
    db = rows.sum(0).to(x.dtype if bias_dtype is None else bias_dtype) if need_db else x.new_empty((0,))
    return dx, dw, db


def differentiable_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None and bias is not None:  # ATen's own double backward loses the bias here
        return F.layer_norm(x, [x.shape[-1]], None, None, eps) + bias.to(x.dtype)
    return F.layer_norm(x, [x.shape[-1]], weight, bias, eps)

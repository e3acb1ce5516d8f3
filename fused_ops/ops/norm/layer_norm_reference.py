"""Layer norm in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_eager(
    input: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm, and for input, weight and bias of different dtypes, which it refuses, wide_layer_norm. For TorchScript."""
    dtype = input.dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return wide_layer_norm(input, normalized_shape, weight, bias, eps)


def wide_layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> Tensor:
    """F.layer_norm in fp32 (fp64 for fp64 input), rounded once to input's dtype, whatever weight's and bias's are.

    So are its derivatives of every order, each rounded once to its tensor's dtype. ATen's own in half precision, of which there is
    one for each sum, are far outside the contract.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    b = None if bias is None else bias.to(wide)
    if weight is None and b is not None:  # ATen's own double backward loses the bias here
        return (F.layer_norm(input.to(wide), normalized_shape, None, None, eps) + b).to(input.dtype)
    w = None if weight is None else weight.to(wide)
    return F.layer_norm(input.to(wide), normalized_shape, w, b, eps).to(input.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """(y, mean, rstd) in ATen. x (..., N); weight, bias (N,); y as x; mean, rstd of x.shape[:-1] in fp32 (fp64 for fp64)."""
    N = x.shape[-1]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if x.dtype is dtype and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype):
        y, mean, rstd = torch.native_layer_norm(x, [N], weight, bias, eps)
        return y.contiguous(), mean.squeeze(-1), rstd.squeeze(-1)
    _, mean, rstd = torch.native_layer_norm(x.to(dtype), [N], None, None, eps)
    return layer_norm_eager(x, [N], weight, bias, eps).contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def train_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """layer_norm_reference, with statistics of shape (..., 1) as ATen returns them: squeezing would take 2 µs."""
    dtype = x.dtype
    if dtype is torch.float32 and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype):
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
    rows = dy.to(dtype).reshape(-1 if N else mean.numel(), N)
    dw = x.new_empty((0,))
    if need_dw:
        x_hat = (x.to(dtype).reshape(rows.shape) - mean.reshape(-1, 1)) * rstd.reshape(-1, 1)
        dw = (rows * x_hat).sum(0).to(x.dtype if weight is None else weight.dtype)
    db = rows.sum(0).to(x.dtype if bias_dtype is None else bias_dtype) if need_db else x.new_empty((0,))
    return dx, dw, db


def layer_norm_bwd_formula(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """layer_norm_bwd_reference as one of ATen's operators in fp32 or wider, for torch.compile. x_hat is then the forward's own."""
    wide = mean.dtype
    w = x.new_ones((x.shape[-1],), dtype=wide) if weight is None else weight.to(wide)
    stats = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x.to(wide), [x.shape[-1]], *stats, w, w, [need_dx, need_dw, need_db]
    )
    return (
        dx.to(x.dtype) if need_dx else x.new_empty((0,)),
        dw.to(x.dtype if weight is None else weight.dtype) if need_dw else x.new_empty((0,)),
        db.to(x.dtype if bias_dtype is None else bias_dtype) if need_db else x.new_empty((0,)),
    )


def differentiable_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return wide_layer_norm(x, [x.shape[-1]], weight, bias, eps)

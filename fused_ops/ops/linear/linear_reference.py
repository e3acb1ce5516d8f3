"""Linear with bias and activation in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .activations import ACTIVATIONS, activated, activation_backward, eager_activation
from .wide import HALF_DTYPES, wide_linear, widens


def linear_eager(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, activation: Optional[str] = None) -> Tensor:
    """What fused_linear computes, as PyTorch users write it today: act(F.linear(input, weight, bias))."""
    if activation is None:
        activation = "none"
    return eager_activation(F.linear(input, weight, bias), activation)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """(y, pre) in ATen. x (..., K), weight (N, K), bias (N,); y, pre (..., N) as x; pre is empty unless save_pre."""
    if not save_pre:
        y = infer_reference(x, weight, bias, activation)
        return no_view(y) if activation == "none" else y, x.new_empty((0,))
    if activation != "none" and x.dtype in HALF_DTYPES and widens(x, weight, bias):
        pre = wide_linear(x, weight, bias)
        return ACTIVATIONS[activation](pre).to(x.dtype), pre.to(x.dtype)
    pre = F.linear(x, weight, bias).contiguous()
    y = ACTIVATIONS[activation](pre)
    return y.clone() if y is pre else y, pre


def infer_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The y of linear_reference. Under forward-mode AD too, which the fast path leaves to ATen."""
    half = x.dtype in HALF_DTYPES
    if activation is None or activation == "none":
        if half and bias is not None and widens(x, weight, bias):  # ATen may round the product before it adds the bias
            return wide_linear(x, weight, bias).to(x.dtype)
        return F.linear(x, weight, bias).contiguous()
    if half and widens(x, weight, bias):
        return activated(wide_linear(x, weight, bias), activation).to(x.dtype)
    if forward_ad._current_level >= 0:
        return activated(F.linear(x, weight, bias).contiguous(), activation)
    return ACTIVATIONS[activation](F.linear(x, weight, bias).contiguous())


def no_view(y: Tensor) -> Tensor:
    """y of F.linear, of which autograd is not to know that it may be a view: one that a Function returns nobody may change in place."""
    return y if y.dim() == 2 else torch.ops.aten._unsafe_view.default(y, y.shape)


def train_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """linear_reference, but None in place of an empty pre-activation, which would take 1 µs to make."""
    if save_pre:
        return linear_reference(x, weight, bias, activation, True)
    y = infer_reference(x, weight, bias, activation)
    return no_view(y) if activation == "none" else y, None


def linear_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) in ATen. A gradient that is not needed is an empty tensor.

    saved is the pre-activation, or y for relu. x is read for dw only: without need_dw it may be any tensor. weight is None
    in the activation's own step: then dx is the pre-activation's gradient (..., N), and there is no dw.
    """
    N, K = (dy.shape[-1],) * 2 if weight is None else weight.shape
    M = math.prod(dy.shape[:-1])
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    dpre = dy.reshape(M, N).to(wide)
    if activation != "none":
        dpre = activation_backward(dpre, saved.reshape(M, N).to(wide), activation)
    low = dpre.to(dy.dtype)
    if need_dx:
        dx = (low if weight is None else low @ weight).reshape((*dy.shape[:-1], K)).contiguous()
    else:
        dx = dy.new_empty((0,))
    dw = (low.t() @ x.reshape(M, K)).contiguous() if need_dw else dy.new_empty((0,))
    db = dpre.sum(0).to(dy.dtype) if need_db else dy.new_empty((0,))
    return dx, dw, db

"""Linear with bias and activation in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, activate, activation_derivative


def linear_eager(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, activation: Optional[str] = None) -> Tensor:
    """What fused_linear computes, as PyTorch users write it today: act(F.linear(input, weight, bias))."""
    if activation is None:
        activation = "none"
    return activate(F.linear(input, weight, bias), activation)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """(y, pre) in ATen. x (..., K), weight (N, K), bias (N,); y, pre (..., N) as x; pre is empty unless save_pre."""
    pre = F.linear(x, weight, bias).contiguous()
    if not save_pre:
        return ACTIVATIONS[activation](pre), x.new_empty((0,))
    y = ACTIVATIONS[activation](pre)
    return y.clone() if y is pre else y, pre


def infer_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The y of linear_reference."""
    pre = F.linear(x, weight, bias).contiguous()
    return pre if activation is None or activation == "none" else ACTIVATIONS[activation](pre)


def train_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """linear_reference, but None in place of an empty pre-activation, which would take 1 µs to make."""
    return (
        linear_reference(x, weight, bias, activation, True)
        if save_pre
        else (infer_reference(x, weight, bias, activation), None)
    )


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
        dpre = dpre * activation_derivative(saved.reshape(M, N).to(wide), activation)
    low = dpre.to(dy.dtype)
    back = low if weight is None else low @ weight
    dx = back.reshape((*dy.shape[:-1], K)).contiguous() if need_dx else dy.new_empty((0,))
    dw = (low.t() @ x.reshape(M, K)).contiguous() if need_dw else dy.new_empty((0,))
    db = dpre.sum(0).to(dy.dtype) if need_db else dy.new_empty((0,))
    return dx, dw, db

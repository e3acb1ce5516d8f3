"""The two-layer perceptron in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, activated, activation_backward, eager_activation
from .linear_reference import infer_reference as infer_linear
from .linear_reference import linear_reference, no_view
from .wide import HALF_DTYPES


def mlp_eager(
    input: Tensor,
    weight1: Tensor,
    bias1: Optional[Tensor],
    weight2: Tensor,
    bias2: Optional[Tensor],
    activation: Optional[str] = "gelu",
    *,
    recompute: bool = False,
) -> Tensor:
    """What fused_mlp computes, as PyTorch users write it today."""
    if activation is None:
        activation = "none"
    return F.linear(eager_activation(F.linear(input, weight1, bias1), activation), weight2, bias2)


def mlp_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_pre: bool,
    save_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, pre, h) in ATen. x (..., K), weight1 (H, K), weight2 (N, H); y (..., N), pre, h (..., H), each empty unless saved."""
    h, pre = linear_reference(x, weight1, bias1, activation, save_pre)
    y = no_view(infer_linear(h, weight2, bias2, "none"))
    return y, pre, h if save_h else x.new_empty((0,))


def infer_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    """The y of mlp_reference. Under forward-mode AD too, which the fast path leaves to ATen."""
    if x.dtype in HALF_DTYPES:
        return infer_linear(infer_linear(x, weight1, bias1, activation), weight2, bias2, "none")
    return F.linear(activated(F.linear(x, weight1, bias1), activation), weight2, bias2).contiguous()


def mlp_bwd_reference(
    dy: Tensor, weight2: Tensor, saved: Tensor, h: Tensor | None, activation: str,
    need_dpre: bool, need_db1: bool, need_dw2: bool, need_db2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dpre, db1, dw2, db2) in ATen: all but the first layer's products, which are fused_linear's. dpre (..., H) is the
    pre-activation's gradient. A gradient not needed is an empty tensor.

    saved (..., H) is the pre-activation, or h for relu; any tensor where the activation is none. Without h it is
    computed again from saved.
    """
    (N, H), M = weight2.shape, math.prod(dy.shape[:-1])
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    rows, none = dy.reshape(M, N), dy.new_empty((0,))
    dpre = db1 = dw2 = db2 = none
    if need_dpre or need_db1:
        gradient = rows.to(wide) @ weight2.to(wide)
        if activation != "none":
            gradient = activation_backward(gradient, saved.reshape(M, H).to(wide), activation)
        dpre = gradient.to(dy.dtype).reshape((*dy.shape[:-1], H)).contiguous() if need_dpre else none
        db1 = gradient.sum(0).to(dy.dtype) if need_db1 else none
    if need_dw2:
        if h is None:
            h = ACTIVATIONS[activation](saved.to(wide)).to(dy.dtype)
        dw2 = (rows.t() @ h.reshape(M, H)).contiguous()
    if need_db2:
        db2 = rows.to(wide).sum(0).to(dy.dtype)
    return dpre, db1, dw2, db2

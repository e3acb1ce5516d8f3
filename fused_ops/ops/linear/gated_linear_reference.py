"""The gated linear in ATen: what the kernels are held to, and what runs where no kernel does."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, activated, activation_backward, eager_activation
from .wide import HALF_DTYPES, wide_linear, widens


def gated_linear_eager(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: Optional[str] = "silu",
    gate_bias: Optional[Tensor] = None,
    up_bias: Optional[Tensor] = None,
) -> Tensor:
    """What fused_gated_linear computes, as PyTorch users write it today."""
    if activation is None:
        activation = "none"
    return eager_activation(F.linear(input, gate_weight, gate_bias), activation) * F.linear(input, up_weight, up_bias)


def gated_linear_reference(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, u) in ATen. x (..., K), weights (N, K), biases (N,); y, g, u (..., N) as x; g, u empty unless save_pre."""
    if x.dtype in HALF_DTYPES and widens(x, gate_weight, up_weight, gate_bias, up_bias):
        g, u = wide_linear(x, gate_weight, gate_bias), wide_linear(x, up_weight, up_bias)
        y, g, u = (activated(g, activation) * u).to(x.dtype), g.to(x.dtype), u.to(x.dtype)
    else:
        g = F.linear(x, gate_weight, gate_bias).contiguous()
        u = F.linear(x, up_weight, up_bias).contiguous()
        y = activated(g, activation) * u
    return (y, g, u) if save_pre else (y, x.new_empty((0,)), x.new_empty((0,)))


def infer_reference(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    """The y of gated_linear_reference. Under forward-mode AD too, which the fast path leaves to ATen."""
    if x.dtype in HALF_DTYPES:
        return gated_linear_reference(x, gate_weight, up_weight, gate_bias, up_bias, activation, False)[0]
    g = F.linear(x, gate_weight, gate_bias).contiguous()
    return activated(g, activation) * F.linear(x, up_weight, up_bias).contiguous()


def gated_linear_bwd_reference(
    dy: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, g: Tensor, u: Tensor, activation: str,
    need_dx: bool, need_dwg: bool, need_dwu: bool, need_dbg: bool, need_dbu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dwg, dwu, dbg, dbu) in ATen; a gradient not needed is an empty tensor. x is read for dwg and dwu only."""
    N, K = gate_weight.shape
    M = math.prod(dy.shape[:-1])
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    rows, G, U = (t.reshape(M, N).to(wide) for t in (dy, g, u))
    dg = activation_backward(rows * U, G, activation)
    du = rows * ACTIVATIONS[activation](G)
    none = dy.new_empty((0,))
    low_g, low_u = dg.to(dy.dtype), du.to(dy.dtype)
    dx = none
    if need_dx:
        both = low_g.to(wide) @ gate_weight.to(wide) + low_u.to(wide) @ up_weight.to(wide)
        dx = both.to(dy.dtype).reshape((*dy.shape[:-1], K)).contiguous()
    x2 = x.reshape(M, K) if need_dwg or need_dwu else none
    return (
        dx,
        (low_g.t() @ x2).contiguous() if need_dwg else none,
        (low_u.t() @ x2).contiguous() if need_dwu else none,
        dg.sum(0).to(dy.dtype) if need_dbg else none,
        du.sum(0).to(dy.dtype) if need_dbu else none,
    )

"""Pre-activations and gradients at which formulas break: zeros, infinities, NaN, and what overflows when it is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.ops.linear.activations import ACTIVATIONS, eager_activation

INF, NAN = float("inf"), float("nan")
PRE = (-INF, -3e38, -1e20, -1.0, -0.0, 0.0, 1.0, 1e20, 3e38, INF, NAN)
DY = (NAN, INF, -INF, 0.0, 1.0, 3e38)
NAMES = [name for name in ACTIVATIONS if name != "none"]
CLOSES = ("relu", "relu2")  # a gradient above one of these is stopped, whatever it is


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(pre-activations, gradients) of every pair, (66,) each."""
    grid = torch.cartesian_prod(torch.tensor(PRE, dtype=torch.float64), torch.tensor(DY, dtype=torch.float64))
    return grid[:, 0].to(dtype), grid[:, 1].to(dtype)


def exact(activation: str, pre: Tensor, dy: Tensor) -> Tensor:
    """dy act'(pre) in fp64, by torch's own derivative of the formula.

    quick_gelu's formula is a product, of which torch multiplies both halves of the derivative with dy; their sum is NaN where dy
    is infinite and they have unlike signs, or one is 0. Its derivative is multiplied once here.
    """
    x, g = pre.double().requires_grad_(), dy.double()
    y = eager_activation(x, activation)
    if activation == "quick_gelu":
        return g * torch.autograd.grad(y, x, torch.ones_like(y))[0]
    return torch.autograd.grad(y, x, g)[0]

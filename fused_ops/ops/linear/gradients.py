"""Gradients of products in differentiable ATen: what backwards do under create_graph=True.

The Functions of this package return what they save (pre-activations) as further outputs. So a backward that is itself
differentiated finds them connected to the inputs, and no input has to be kept for that alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import differentiable_backward


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b; None counts as zero."""
    return b if a is None else a if b is None else a + b


def times_derivative(dy: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """dy * act'(saved), computed in fp32 or wider; saved is the pre-activation, or y for relu."""
    if saved is None or activation == "none":
        return dy
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    return differentiable_backward(dy.to(wide), saved.to(wide), activation).to(dy.dtype)


def linear_grads(
    dpre: Tensor | None, x: Tensor | None, weight: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db) of pre = x @ weight^T + b for dpre (..., N), each only where needed."""
    if dpre is None:
        return None, None, None
    rows = dpre.reshape(math.prod(dpre.shape[:-1]), dpre.shape[-1])
    dx = dpre @ weight if needs[0] and weight is not None else None
    dw = rows.t() @ x.reshape(rows.shape[0], x.shape[-1]) if needs[1] and x is not None else None
    db = rows.sum(0) if needs[2] else None
    return dx, dw, db

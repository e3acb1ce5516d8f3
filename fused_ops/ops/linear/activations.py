"""The activations in ATen: what the kernels' own are held to, and what runs where no kernel does."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch.arguments import refuse, refuse_type, said

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),
}
SAVES_OUTPUT = frozenset(("none", "relu"))  # the backward needs no pre-activation: relu's sign can be read from y


def activate(pre: Tensor, activation: str) -> Tensor:
    """act(pre) in ATen, in words that torch.jit.script reads."""
    if activation == "none":
        return pre
    elif activation == "relu":
        return F.relu(pre)
    elif activation == "gelu":
        return F.gelu(pre)
    elif activation == "gelu_tanh":
        return F.gelu(pre, approximate="tanh")
    elif activation == "quick_gelu":
        return pre * torch.sigmoid(1.702 * pre)
    elif activation == "silu":
        return F.silu(pre)
    elif activation == "sigmoid":
        return torch.sigmoid(pre)
    elif activation == "tanh":
        return torch.tanh(pre)
    elif activation == "relu2":
        return F.relu(pre).square()
    else:
        raise RuntimeError("activation: unknown name")


def activation_derivative(x: Tensor, activation: str) -> Tensor:
    """act'(x) in ATen, itself differentiable."""
    ones = torch.ones_like(x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(ones, x, 0)
    if activation in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(ones, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1 - s)
    if activation == "silu":  # in full: ATen's silu_backward has no derivative of its own
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if activation == "sigmoid":
        s = torch.sigmoid(x)
        return s * (1 - s)
    if activation == "tanh":
        return 1 - torch.tanh(x).square()
    if activation == "relu2":
        return 2 * F.relu(x)
    return ones


def check_activation(op: str, activation: object) -> None:
    """Refuse what is no name of ACTIVATIONS: TypeError for what is no string, RuntimeError for another string."""
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return
    names = "None, " + ", ".join(repr(a) for a in ACTIVATIONS if a != "none")
    if not isinstance(activation, str):
        refuse_type(op, "activation", activation, names)
    refuse(RuntimeError, op, "activation", said(activation), names)

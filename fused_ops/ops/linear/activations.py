"""The activations in ATen: what the kernels' own are held to, and what runs where no kernel does.

Their derivatives are the same wherever a gradient is computed, with dy finite, infinite or NaN:

    relu, relu2 below 0 and at 0      0, whatever dy is: it is selected, not multiplied by 0
    relu, relu2 above 0 and at NaN    dy, and 2 dy x
    sigmoid, tanh                     dy act'(x), with act' = 0 at both infinities
    the others                        dy act'(x), with act' = 1 and 0 at large finite x, and NaN at infinities as torch's
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..._torch.arguments import refuse, refuse_type, said
from ..._torch.autograd import transformed
from .wide import is_computed

INFINITY = float("inf")
SATURATED = 1000.0  # from here on gelu, quick_gelu and silu are x or 0 in float64 too, with a derivative of 1 or 0
QUICK_GELU_SLOPE = 1.702  # Hendrycks and Gimpel 2016


def gelu_is_wrong(gelu: Callable[[Tensor], Tensor]) -> bool:
    """Whether a gelu gives NaN for +inf on this CPU, as ATen's does in the vectors of some CPUs."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return any(bool(gelu(torch.full((64,), INFINITY, dtype=dtype, device="cpu")).isnan().any()) for dtype in dtypes)


def repaired(gelu: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """gelu with gelu(+inf) = +inf; what is traced stays gelu alone."""

    def with_infinity(x: Tensor) -> Tensor:
        y = gelu(x)
        return y.masked_fill_(x == INFINITY, INFINITY) if is_computed(x) else y

    return with_infinity


_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": repaired(F.gelu) if gelu_is_wrong(F.gelu) else F.gelu,
    "gelu_tanh": repaired(_gelu_tanh) if gelu_is_wrong(_gelu_tanh) else _gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),
}
SAVES_OUTPUT = frozenset(("none", "relu"))  # the backward needs no pre-activation: relu's sign can be read from y


def activated(pre: Tensor, activation: str) -> Tensor:
    """act(pre) as the raw operators compute it, and under forward-mode AD, which the fast path leaves to ATen."""
    return ACTIVATIONS[activation](pre) if forward_ad._current_level < 0 else activate(pre, activation)


def eager_activation(pre: Tensor, activation: str) -> Tensor:
    """act(pre) as PyTorch users write it, in words that torch.jit.script reads. What torch.func and forward-mode AD
    differentiate is `activate`."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _formula(pre, activation)
    elif transformed():
        return activate(pre, activation)
    else:
        return _formula(pre, activation)


def _formula(pre: Tensor, activation: str) -> Tensor:
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


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x) in ATen's differentiable functions, each derivative of any order as the module's docstring has it."""
    if activation == "relu2":
        y = F.relu(x)
        return y * y  # square's derivative is NaN where 2 x overflows and dy is 0
    if activation not in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
        return _formula(x, activation)
    large = _is_large(x)
    small = torch.where(large, 0.0, x)
    if activation == "quick_gelu":  # as one function of ATen, whose derivative is one product with dy
        y = F.silu(QUICK_GELU_SLOPE * small) / QUICK_GELU_SLOPE
    elif activation == "gelu":
        y = torch.where(small == INFINITY, F.silu(small), F.gelu(small))  # the same there, and never NaN
    else:
        y = torch.where(small == INFINITY, F.silu(small), F.gelu(small, approximate="tanh"))
    return torch.where(large, x * (x > 0), y if activation != "silu" else F.silu(small))


def _is_large(x: Tensor) -> Tensor:
    """Where x is finite and a derivative's formula could overflow, though the derivative is 1 or 0."""
    size = x.abs()
    return (size > SATURATED) & (size < INFINITY)


def activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """dy * act'(x) in as few ATen calls as there are. dy, x float32 or float64, of one shape."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dy, _saturated(x), approximate="tanh")
    if activation == "quick_gelu":
        s = torch.sigmoid(QUICK_GELU_SLOPE * x)
        return dy * (s + QUICK_GELU_SLOPE * (x * (s * (1 - s))))
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(dy, torch.sigmoid(x))
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(dy, torch.tanh(x))
    if activation == "relu2":
        return 2 * torch.ops.aten.threshold_backward(dy * x, x, 0)
    return dy


def differentiable_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """activation_backward, differentiable in dy and in x: x that is large passes no gradient."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    if activation == "relu2":
        return 2 * (torch.ops.aten.threshold_backward(dy, x, 0) * F.relu(x))
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(dy, _saturated(x), approximate=approximate)
    if activation in ("quick_gelu", "silu"):  # in full: ATen's silu_backward has no derivative of its own
        x = _saturated(x) * (QUICK_GELU_SLOPE if activation == "quick_gelu" else 1.0)
        s = torch.sigmoid(x)
        return dy * (s * (1 + x * (1 - s)))
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(dy, torch.sigmoid(x))
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(dy, torch.tanh(x))
    return dy


def _saturated(x: Tensor) -> Tensor:
    """x with large finite values cut to SATURATED, and NaN and infinities as they are."""
    return torch.where(_is_large(x), x.clamp(-SATURATED, SATURATED), x)


def check_activation(op: str, activation: object) -> None:
    """Refuse what is no name of ACTIVATIONS: TypeError for what is no string, RuntimeError for another string."""
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return
    names = "None, " + ", ".join(repr(a) for a in ACTIVATIONS if a != "none")
    if not isinstance(activation, str):
        refuse_type(op, "activation", activation, names)
    refuse(RuntimeError, op, "activation", said(activation), names)

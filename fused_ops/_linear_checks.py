"""What the public functions of the linear family check before anything is launched, and their cast under autocast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._activations import check_activation
from ._autograd import FLOATS
from ._checks import refuse, require_device, require_float, require_shape, require_tensor


def fits_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """What check_linear checks, in one expression, for tensors on one device, a weight (N, K) and a bias (N,)."""
    if weight is None:
        return False
    sizes, shape, dtype = x.shape, weight.shape, x.dtype
    return (
        len(shape) == 2
        and len(sizes) > 0
        and sizes[-1] == shape[1]
        and dtype in FLOATS
        and weight.dtype is dtype
        and (bias is None or (bias.dtype is dtype and bias.shape == (shape[0],)))
    )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, autocast: bool) -> None:
    op = "fused_linear"
    require_tensor(op, "input", x)
    require_tensor(op, "weight", weight)
    require_float(op, "input", x)
    check_activation(op, activation)
    if weight.dim() not in (1, 2):
        refuse(RuntimeError, op, "weight", f"shape {tuple(weight.shape)}", "shape (N, K) or (K,)")
    if x.dim() == 0:
        refuse(RuntimeError, op, "input", "a 0-d tensor", f"shape (*, {weight.shape[-1]})")
    if x.shape[-1] != weight.shape[-1]:
        got = f"shape {tuple(x.shape)}, whose last dimension is {x.shape[-1]}"
        refuse(RuntimeError, op, "input", got, f"last dimension K = {weight.shape[-1]} of weight {tuple(weight.shape)}")
    _require_like(op, "input", x, (("weight", weight, None), ("bias", bias, None)), autocast)
    N = weight.shape[0] if weight.dim() == 2 else 1
    if bias is not None and tuple(bias.shape) not in ((N,), (1,), ()):
        refuse(RuntimeError, op, "bias", f"shape {tuple(bias.shape)}", f"shape ({N},)")


def check_gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, b_gate: Tensor | None, b_up: Tensor | None, autocast: bool
) -> None:
    op = "fused_gated_linear"
    require_tensor(op, "x", x)
    require_float(op, "x", x)
    check_activation(op, activation)
    require_tensor(op, "w_gate", w_gate)
    if w_gate.dim() != 2:
        refuse(RuntimeError, op, "w_gate", f"shape {tuple(w_gate.shape)}", "shape (N, K)")
    if x.dim() == 0 or x.shape[-1] != w_gate.shape[1]:
        refuse(RuntimeError, op, "x", f"shape {tuple(x.shape)}", f"last dimension K = {w_gate.shape[1]} of w_gate")
    shape, row = w_gate.shape, w_gate.shape[:1]
    others = (("w_gate", w_gate, shape), ("w_up", w_up, shape), ("b_gate", b_gate, row), ("b_up", b_up, row))
    _require_like(op, "x", x, others, autocast)


def check_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, autocast: bool) -> None:
    op = "fused_mlp"
    require_tensor(op, "x", x)
    require_float(op, "x", x)
    check_activation(op, activation)
    for name, weight in (("w1", w1), ("w2", w2)):
        require_tensor(op, name, weight)
        if weight.dim() != 2:
            refuse(RuntimeError, op, name, f"shape {tuple(weight.shape)}", "two dimensions")
    (H, K), N = w1.shape, w2.shape[0]
    if x.dim() == 0 or x.shape[-1] != K:
        refuse(RuntimeError, op, "x", f"shape {tuple(x.shape)}", f"last dimension K = {K} of w1 {tuple(w1.shape)}")
    others = (("w1", w1, (H, K)), ("w2", w2, (N, H)), ("b1", b1, (H,)), ("b2", b2, (N,)))
    _require_like(op, "x", x, others, autocast)


def _require_like(
    op: str, first: str, x: Tensor, others: Iterable[tuple[str, Tensor | None, Sequence[int] | None]], autocast: bool
) -> None:
    """Each of others, (name, tensor, its shape or None for any), is a float tensor of x's device and, unless autocast is to
    cast it, of x's dtype. A bias may be None."""
    for name, tensor, shape in others:
        require_tensor(op, name, tensor, optional=name.startswith("b"))
        if tensor is not None:
            require_float(op, name, tensor)
            if shape is not None:
                require_shape(op, name, tensor, shape)
            require_device(op, name, tensor, x.device)
            if tensor.dtype is not x.dtype and not autocast:
                refuse(RuntimeError, op, name, tensor.dtype, f"the dtype of {first}, {x.dtype}")


def cast_all(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Everything in the autocast dtype, as torch's linear under autocast; None stays None, float64 as it is."""
    if x.dtype is torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return (x.to(dtype), *(t if t is None else t.to(dtype) for t in others))
